"""What a model is, as data: frozen dataclasses that every consumer reads and nobody mutates.

A field holds the derived fact (``window=512``, ``kv_from=18``, ``rope=None`` for no rotation), never the rule it came
from. ``Model.layers[i]`` is everything there is to know about layer ``i``; the forward pass reads nothing else.
Sizes are elements, never bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from functools import cached_property
from statistics import NormalDist
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
class Yarn:
    """Stretching that blends by how often a wavelength fits in the original context (arXiv 2309.00071).

    ``attention`` multiplies cosine and sine. ``slow`` and ``fast`` are the turns between which the blend lies.
    """

    factor: float
    original: int
    attention: float
    fast: float = 32.0
    slow: float = 1.0
    truncate: bool = True


@dataclass(frozen=True)
class Linear:
    """Every wavelength stretched by the same factor: positions divided by it (Gemma 3)."""

    factor: float


@dataclass(frozen=True)
class Proportional:
    """Only the fastest ``angles`` of a head's dim / 2 angles turn; exponents count the whole head (Gemma 4)."""

    angles: int


@dataclass(frozen=True)
class Rope:
    """Rotary positions over the first ``dim`` values of a head (RoFormer).

    Pairs are i and i + dim / 2 (NeoX order), or 2i and 2i + 1 where ``interleaved``.
    """

    theta: float
    dim: int
    scaling: Llama3Scaling | Yarn | Linear | Proportional | None = None
    interleaved: bool = False


@dataclass(frozen=True)
class Temperature:
    """Queries grow with their position p: times 1 + scale * ln(1 + floor((p + 1) / floor)) (arXiv 2501.19399)."""

    scale: float
    floor: int


# What is normed before rotation: each head with a weight, the whole projection with one, or each head without any.
QKNorm = Literal["head", "whole", "unweighted"]


@dataclass(frozen=True)
class Attention:
    """Grouped-query attention. ``window`` counts the keys a query sees, itself included; None sees all.

    ``chunk`` cuts the sequence into pieces of that many tokens; a query sees the keys of its own piece alone.
    ``kv_from`` names the layer whose keys and values are read; such a layer projects and caches none of its own.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    rope: Rope | None
    window: int | None = None
    qk_norm: QKNorm | None = None
    v_norm: bool = False
    kv_from: int | None = None
    chunk: int | None = None
    temperature: Temperature | None = None
    bias: bool = False

    @property
    def cached(self) -> int:
        """Values kept per token: keys and values, or none where another layer's are read."""
        return 0 if self.kv_from is not None else 2 * self.kv_heads * self.head_dim

    @property
    def span(self) -> int | None:
        """Tokens after which a cache stops growing; None: never."""
        return self.window if self.window is not None else self.chunk

    @property
    def inner(self) -> int:
        """Values per token between the projections: queries, keys, values, all of them."""
        return self.head_dim * (self.heads + (2 * self.kv_heads if self.kv_from is None else 0))


@dataclass(frozen=True)
class LatentAttention:
    """Attention over one compressed vector per token (MLA, arXiv 2405.04434).

    A token's cache entry is ``kv_rank`` latent values and one rotated key of ``rope.dim`` values, for all heads.
    A head's query has ``nope_dim`` values that meet the latent and ``rope.dim`` that meet the key. ``q_rank`` None:
    queries are projected directly. ``eps`` is that of the latents' norms.
    """

    heads: int
    q_rank: int | None
    kv_rank: int
    nope_dim: int
    v_dim: int
    scale: float
    rope: Rope
    eps: float = 1e-6

    @property
    def window(self) -> None:
        """Sees everything."""
        return None

    chunk = span = kv_from = window

    @property
    def entry(self) -> int:
        """Values of a token's cache entry."""
        return self.kv_rank + self.rope.dim

    cached = entry

    @property
    def inner(self) -> int:
        """Values per token between the projections, absorbed queries among them."""
        return self.entry + self.heads * (self.nope_dim + self.rope.dim + self.entry + self.kv_rank + self.v_dim)


AnyAttention = Attention | LatentAttention


@dataclass(frozen=True)
class Gated:
    """down(act(gate(x)) * up(x)). ``sparsity`` is the share of gate values a Gaussian cut-off zeroes (0: none)."""

    width: int
    activation: Activation
    sparsity: float = 0.0

    @cached_property
    def cut(self) -> float:
        """The cut-off, in standard deviations above the mean."""
        return NormalDist().inv_cdf(self.sparsity)


@dataclass(frozen=True)
class Plain:
    """down(act(up(x) + bias)) + bias: the feed-forward without a gate (GPT-2)."""

    width: int
    activation: Activation


@dataclass(frozen=True)
class Router:
    """How tokens choose experts. ``score`` turns logits to weights, over all experts or each alone.

    ``normalized``: the chosen weights are divided by their sum, then multiplied by ``scale``. ``bias``: a learned
    correction decides who is chosen, not with what weight. ``groups``: only the best ``active_groups`` groups are
    chosen from, each judged by its two best experts. ``on_input``: weights multiply what experts read, not what they
    write.
    """

    score: Literal["softmax", "sigmoid"]
    normalized: bool = False
    scale: float = 1.0
    bias: bool = False
    groups: int = 1
    active_groups: int = 1
    on_input: bool = False


@dataclass(frozen=True)
class Experts:
    """A mixture: each token runs through ``active`` of ``experts`` gated feed-forwards, and through ``shared``."""

    experts: int
    active: int
    width: int
    activation: Activation
    router: Router
    shared: Gated | None = None


FeedForward = Gated | Plain | Experts

Norm = Literal["attn_in", "attn_out", "ffn_in", "ffn_out"]


@dataclass(frozen=True)
class Layer:
    """One layer; ``norms`` are the places where the residual stream or a branch is normalised.

    ``scalar``: what leaves the layer is multiplied by one learned number.
    """

    attention: AnyAttention
    ffn: FeedForward
    norms: tuple[Norm, ...] = ("attn_in", "ffn_in")
    scalar: bool = False


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
    """A whole decoder. ``embed_scale`` multiplies embeddings on the way in, never in the (possibly tied) head.

    ``positions``: rows of a learned table that is added to the embeddings; ``layer_norm``: norms subtract the mean and
    add a bias, instead of dividing by the root mean square alone. ``lookahead``: modules past the last layer that
    predict further tokens; files hold them, a plain decoder reads none of it.
    """

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
    positions: int | None = None
    layer_norm: bool = False
    lookahead: int = 0

    @cached_property
    def last_writer(self) -> int:
        """The last layer that writes keys and values: past it, only positions whose logits are wanted need run."""
        return max(i for i, layer in enumerate(self.layers) if layer.attention.kv_from is None)

    @cached_property
    def donors(self) -> frozenset[int]:
        """Layers whose keys and values other layers read too."""
        found = (layer.attention.kv_from for layer in self.layers)
        return frozenset(source for source in found if source is not None)

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
