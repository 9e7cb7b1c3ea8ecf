"""What a model is, as data: frozen dataclasses that every consumer reads and nobody mutates.

A field holds the derived fact (``window=512``, ``kv_from=18``, ``rope=None`` for no rotation), never the rule it came
from. ``Model.layers[i]`` is everything there is to know about layer ``i``; the forward pass reads nothing else.
Sizes are elements, never bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from functools import cached_property
from typing import Any, Literal

Activation = Literal["silu", "gelu_tanh"]


@dataclass(frozen=True)
class Llama3Scaling:
    """Frequency-dependent stretching of rotary wavelengths (Llama 3.1 and later)."""

    factor: float
    low: float
    high: float
    original: int


@dataclass(frozen=True)
class Rope:
    """Rotary positions over the first ``dim`` values of a head, half-split layout (RoFormer, NeoX order)."""

    theta: float
    dim: int
    scaling: Llama3Scaling | None = None


@dataclass(frozen=True)
class Attention:
    """Grouped-query attention. ``window`` counts the keys a query sees, itself included; None sees all.

    ``kv_from`` names the layer whose keys and values are read; such a layer projects and caches none of its own.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    rope: Rope | None
    window: int | None = None
    qk_norm: bool = False
    v_norm: bool = False
    kv_from: int | None = None


@dataclass(frozen=True)
class Gated:
    """down(act(gate(x)) * up(x)). ``sparsity`` is the share of gate values a Gaussian cut-off zeroes (0: none)."""

    width: int
    activation: Activation
    sparsity: float = 0.0


Norm = Literal["attn_in", "attn_out", "ffn_in", "ffn_out"]


@dataclass(frozen=True)
class Layer:
    """One layer; ``norms`` are the places where the residual stream or a branch is normalised."""

    attention: Attention
    ffn: Gated
    norms: tuple[Norm, ...] = ("attn_in", "ffn_in")


@dataclass(frozen=True)
class PLE:
    """Per-layer embeddings: a table [rows, layers * dim] of which one row is read per token (Gemma 3n)."""

    rows: int
    dim: int


@dataclass(frozen=True)
class AltUp:
    """Alternating updates: ``streams`` residual streams, of which layers compute on ``active`` (arXiv 2301.13310)."""

    streams: int
    active: int
    scaled: bool


@dataclass(frozen=True)
class Laurel:
    """Learned low-rank augmentation of the residual (arXiv 2411.07501)."""

    rank: int


@dataclass(frozen=True)
class Nested:
    """The model was trained as a MatFormer (arXiv 2310.07707): FFN prefixes of these widths are models too."""

    widths: tuple[int, ...]
    skippable: tuple[int, ...] = ()


@dataclass(frozen=True)
class Model:
    """A whole decoder. ``embed_scale`` multiplies embeddings on the way in, never in the (possibly tied) head."""

    family: str
    vocab: int
    dim: int
    layers: tuple[Layer, ...]
    eps: float
    tied: bool
    context: int
    embed_scale: float = 1.0
    softcap: float | None = None
    ple: PLE | None = None
    altup: AltUp | None = None
    laurel: Laurel | None = None
    nested: Nested | None = None

    @cached_property
    def last_writer(self) -> int:
        """The last layer that writes keys and values: past it, only positions whose logits are wanted need run."""
        return max(i for i, layer in enumerate(self.layers) if layer.attention.kv_from is None)

    @cached_property
    def runs(self) -> tuple[tuple[int, int, Layer], ...]:
        """(first, last, layer) for each run of equal layers; what ``edge inspect`` prints a row for."""
        runs: list[tuple[int, int, Layer]] = []
        for i, layer in enumerate(self.layers):
            if runs and runs[-1][2] == layer:
                runs[-1] = (runs[-1][0], i, layer)
            else:
                runs.append((i, i, layer))
        return tuple(runs)


def mechanisms(spec: Any) -> frozenset[str]:
    """The dataclass types and non-default fields in use anywhere in ``spec``: what shrinking must not switch off."""
    return frozenset(_mechanisms(spec))


def _mechanisms(value: Any) -> Iterator[str]:
    if isinstance(value, tuple):
        for item in value:
            yield from _mechanisms(item)
    if not is_dataclass(value):
        return
    name = type(value).__name__
    yield name
    for field in fields(value):
        item = getattr(value, field.name)
        if isinstance(item, (int, float, str)) and item != field.default:
            yield f"{name}.{field.name}" + (f"={item}" if isinstance(item, (str, bool)) else "")
        yield from _mechanisms(item)
