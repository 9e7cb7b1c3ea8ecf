"""MatFormer slices: a smaller model out of a larger one, as windows into its tensors (arXiv 2310.07707).

A slice keeps some layers whole in order and, in each, the first ``width`` hidden units of the FFN: the first rows of
gate and up, the first columns of down. Per-layer embeddings lose the blocks of the layers that were dropped. All else
is untouched, so a slice costs no copy: it is a list of row and column ranges.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import groupby

from loaders.errors import Usage
from loaders.formats.window import Window
from loaders.network.spec import Attention, Model
from loaders.network.tensors import PLE_TABLE, Shape, flat, tensors


@dataclass(frozen=True)
class Slice:
    """``keep``: source layers kept, ascending. ``widths``: the FFN width of each kept layer."""

    name: str
    keep: tuple[int, ...]
    widths: tuple[int, ...]

    def describe(self) -> str:
        """One phrase for people: how many layers, which widths."""
        return f"{len(self.keep)} layers, FFN " + ", ".join(f"{w}x{n}" for w, n in self.runs)

    @property
    def runs(self) -> list[tuple[int, int]]:
        """(width, how many layers in a row have it)."""
        return [(width, len(list(run))) for width, run in groupby(self.widths)]


@dataclass(frozen=True)
class Part:
    """Where a tensor of the slice lies in the full model: the tensor's name there, and the window of it."""

    name: str
    window: Window


def full(model: Model) -> Slice:
    """The slice that is the whole model."""
    return Slice("full", tuple(range(len(model.layers))), tuple(layer.ffn.width for layer in model.layers))


def sliced(model: Model, part: Slice) -> Model:
    """The smaller model. Raises Usage when ``part`` does not fit ``model`` or drops a layer others read keys from."""
    validate(model, part)
    place = {source: i for i, source in enumerate(part.keep)}
    layers = []
    for source, width in zip(part.keep, part.widths, strict=True):
        layer = model.layers[source]
        attention = layer.attention
        if isinstance(attention, Attention) and attention.kv_from is not None:
            attention = replace(attention, kv_from=place[attention.kv_from])
        layers.append(replace(layer, attention=attention, ffn=replace(layer.ffn, width=width)))
    return replace(model, layers=tuple(layers))


def validate(model: Model, part: Slice) -> None:
    """Raises Usage for a slice that cannot be cut from ``model``."""
    count = len(model.layers)
    if model.nested is None and part != replace(full(model), name=part.name):
        raise Usage(f"{model.family} models are not MatFormers and have no slices", field="--slice", expected="full")
    if not part.keep or len(part.widths) != len(part.keep):
        raise Usage(f"{len(part.widths)} widths", field="--slice", expected=f"one for each of {len(part.keep)} layers")
    if list(part.keep) != sorted(set(part.keep)) or part.keep[0] < 0 or part.keep[-1] >= count:
        raise Usage(f"layers {list(part.keep)}", field="--slice", expected=f"ascending, from 0 to {count - 1}")
    for source, width in zip(part.keep, part.widths, strict=True):
        most = model.layers[source].ffn.width
        if not 1 <= width <= most:
            raise Usage(f"width {width} in layer {source}", field="--slice", expected=f"1 to {most}")
        kv_from = model.layers[source].attention.kv_from
        if kv_from is not None and kv_from not in part.keep:
            raise Usage(
                f"layer {kv_from} is dropped",
                field="--slice",
                expected=f"kept: layer {source} reads its keys and values",
            )


def parts(model: Model, part: Slice) -> dict[str, Part]:
    """Canonical name in the slice -> where it lies in the full model."""
    small, whole = tensors(sliced(model, part)), tensors(model)
    return {name: _part(model, part, name, shape, whole) for name, shape in small.items()}


def source_name(part: Slice, name: str) -> str:
    """What a tensor of the slice is called in the full model."""
    if not name.startswith("layers."):
        return name
    _, layer, rest = name.split(".", 2)
    return f"layers.{part.keep[int(layer)]}.{rest}"


def _part(model: Model, part: Slice, name: str, shape: Shape, whole: dict[str, Shape]) -> Part:
    source = source_name(part, name)
    target = whole[source]
    if name in (PLE_TABLE, "ple.proj") and model.ple is not None:
        blocks = tuple((i * model.ple.dim, (i + 1) * model.ple.dim) for i in part.keep)
        everything = ((0, target[0 if name == PLE_TABLE else 1]),)
        return Part(source, Window.of(everything, blocks) if name == PLE_TABLE else Window.of(blocks, everything))
    if shape == target:
        return Part(source, Window.full(flat(target)))
    return Part(source, Window.of(((0, shape[0]),), ((0, shape[1]),)))
