"""Where canonical tensors lie in a family's files: under another name, beside others, transposed, one file tensor each.

A family says it as data; here it becomes file names, stored shapes and blocks. Nothing is opened.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from loaders.errors import Unsupported
from loaders.formats.placed import Block
from loaders.network.spec import Model
from loaders.network.tensors import Shape, tensors


@dataclass(frozen=True)
class Place:
    """A stored tensor that is not simply the canonical one. ``{}`` in ``name`` stands for the layer.

    ``beside``: the canonical tensors that one stored matrix holds, this one among them: one below another, or side by
    side where ``across``. ``transposed``: stored as [in, out]. ``each``: every matrix of a stack has a tensor of its
    own, and a second ``{}`` stands for its number; ``together``: the matrices of a stack lie one below another in one.
    ``offset`` is what the stored values lack: 1 where a file keeps w of 1 + w.
    """

    name: str
    beside: tuple[str, ...] = ()
    across: bool = False
    transposed: bool = False
    each: bool = False
    together: bool = False
    offset: float = 0.0


Names = Mapping[str, str | Place]

MAX_MATRICES = 1 << 18  # in stacks; Kimi K2 has 77,000


class Spot(NamedTuple):
    """Consecutive rows of a canonical tensor: a block of the stored tensor ``name``, whose shape is ``shape``."""

    name: str
    shape: Shape
    block: Block


def place_of(names: Names, canonical: str) -> tuple[Place, str]:
    """How a canonical tensor is stored, and the number of its layer, "" where it has none."""
    layer = ""
    if canonical.startswith("layers."):
        _, layer, rest = canonical.split(".", 2)
        canonical = "layers.{}." + rest
    found = names[canonical]
    return (Place(found) if isinstance(found, str) else found), layer


def file_name(names: Names, canonical: str) -> str:
    """The name in the file, without prefix, of a canonical tensor; of a stack's first matrix, where each has one."""
    place, layer = place_of(names, canonical)
    return place.name.format(layer, 0)


def spots(names: Names, table: Mapping[str, Shape], canonical: str) -> Iterator[Spot]:
    """Where a tensor of ``table`` lies, in order of its rows."""
    place, layer = place_of(names, canonical)
    shape = table[canonical]
    start, whole = beside(names, table, canonical, place)
    if len(shape) == 1:
        yield Spot(place.name.format(layer), (whole,), Block(0, (start, start + shape[0]), None))
        return
    planes = shape[0] if len(shape) == 3 else 1
    high, wide = stored_size(shape, place)
    height, width = (high, whole) if place.across else (whole, wide)
    top, left = (0, start) if place.across else (start, 0)
    stored: Shape = (height, width)
    block = Block(0, (top, top + high), (left, left + wide), place.transposed)
    if len(shape) == 2 or place.each:
        # Kimi K2 has 69,120 of these: only the name differs.
        yield from (Spot(place.name.format(layer, plane), stored, block) for plane in range(planes))
        return
    name = place.name.format(layer)
    stored = (planes * height, width) if place.together else (planes, height, width)
    for plane in range(planes):
        if place.together:
            first = plane * height + top
            yield Spot(name, stored, block._replace(rows=(first, first + high)))
        else:
            yield Spot(name, stored, block._replace(plane=plane))


def refuse_many(table: Mapping[str, Shape], file: str | os.PathLike[str]) -> None:
    """Unsupported where stacks hold so many matrices that their spots alone fill the memory.

    A matrix may be two bytes of a file, and its spot is hundreds.
    """
    found = sum(shape[0] for shape in table.values() if len(shape) == 3)
    if found > MAX_MATRICES:
        raise Unsupported(f"{found:,} matrices of experts and heads", file=file, expected=f"at most {MAX_MATRICES:,}")


def stored_size(shape: Shape, place: Place) -> tuple[int, int]:
    """(height, width) of one matrix as it is stored; a vector is as high as it is long."""
    if len(shape) == 1:
        return shape[0], 1
    out, inputs = shape[-2:]
    return (inputs, out) if place.transposed else (out, inputs)


def beside(names: Names, table: Mapping[str, Shape], canonical: str, place: Place) -> tuple[int, int]:
    """(where this tensor begins, how much there is) along the axis on which it shares a stored matrix."""
    own = canonical.rpartition("layers.")[2].partition(".")[2] if canonical.startswith("layers.") else canonical
    prefix = canonical.removesuffix(own)
    sizes = {}
    for name in place.beside or (own,):
        sibling, _ = place_of(names, prefix + name)
        sizes[name] = stored_size(table[prefix + name], sibling)[1 if place.across else 0]
    order = list(sizes)
    return sum(sizes[name] for name in order[: order.index(own)]), sum(sizes.values())


class Filed(NamedTuple):
    """A tensor of a checkpoint that holds a model: its shape there, and one canonical tensor that lies in it."""

    shape: Shape
    canonical: str
    offset: float


def files(names: Names, model: Model) -> dict[str, Filed]:
    """Every tensor of a checkpoint, by its name without prefix."""
    table = tensors(model)
    found: dict[str, Filed] = {}
    for canonical in table:
        place, _ = place_of(names, canonical)
        for spot in spots(names, table, canonical):
            found.setdefault(spot.name, Filed(spot.shape, canonical, place.offset))
    return found
