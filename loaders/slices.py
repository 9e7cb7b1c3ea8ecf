"""What people may call a slice: published names, relative names, explicit widths, a JSON file.

full | E2B | E2.49B | ...              published for the model at hand
half | quarter | skip-first-shared     of any MatFormer; joined with '+': half+skip-first-shared
ffn=8192x20,16384x15 | skip=20-24      explicit; also joined with '+'
slice.json                             {"layers_to_skip": [20], "ffn_hidden_dims": [8192, ...]}
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

from loaders.errors import Usage
from loaders.families import Family, NamedSlice
from loaders.formats.config import Config, read_json
from loaders.network.matformer import Slice, full, validate
from loaders.network.spec import Model

FRACTIONS = {"half": 2, "quarter": 4}
SKIP_FIRST_SHARED = "skip-first-shared"


def candidates(model: Model, family: Family) -> tuple[NamedSlice, ...]:
    """What a planner may choose from: the published slices, else every trained width with and without the skip."""
    published = family.slices(model)
    if published:
        return published
    found = [NamedSlice(full(model))]
    if model.nested is None:
        return tuple(found)
    most = max(layer.ffn.width for layer in model.layers)
    names = ["", *(name for name, by in FRACTIONS.items() if most // by in model.nested.widths)]
    for name in names:
        if name:
            found.append(NamedSlice(named(model, name)))
        if model.nested.skippable:
            found.append(NamedSlice(named(model, "+".join(filter(None, (name, SKIP_FIRST_SHARED))))))
    return tuple(found)


def resolve(model: Model, family: Family, text: str) -> Slice:
    """The slice that ``text`` names, validated against ``model``; Usage, listing the names there are, otherwise."""
    for published in family.slices(model):
        if published.slice.name.lower() == text.lower():
            return published.slice
    if model.nested is None and text != "full":
        raise Usage(f"{model.family} models are not MatFormers and have no slices", field="--slice", expected="full")
    part = from_file(model, Path(text)) if text.endswith(".json") else named(model, text)
    validate(model, part)
    return part


def named(model: Model, text: str) -> Slice:
    """Relative and explicit parts, joined with '+'. Raises Usage for anything else."""
    skip: set[int] = set()
    by, explicit = 1, None
    for token in text.split("+"):
        if token in FRACTIONS:
            by = FRACTIONS[token]
        elif token == SKIP_FIRST_SHARED and model.nested is not None and model.nested.skippable:
            skip.update(model.nested.skippable)
        elif token.startswith("skip="):
            skip.update(layers(token.removeprefix("skip="), len(model.layers)))
        elif token.startswith("ffn="):
            explicit = widths(token.removeprefix("ffn="))
        elif token != "full":
            raise unknown(text, model)
    keep = tuple(i for i in range(len(model.layers)) if i not in skip)
    if explicit is None:
        explicit = tuple(divided(model.layers[i].ffn.width, by, text) for i in keep)
    return Slice(text, keep, explicit)


def unknown(text: str, model: Model) -> Usage:
    """No such slice: says what would be one."""
    names = (
        "full" if model.nested is None else f"full, half, quarter, {SKIP_FIRST_SHARED}, ffn=WIDTHxCOUNT,..., skip=A-B"
    )
    return Usage(f"no slice {text!r}", field="--slice", expected=names, hint="`edge plan MODEL` lists what there is")


def divided(width: int, by: int, text: str) -> int:
    """A whole fraction of a width."""
    if width % by:
        raise Usage(f"width {width} / {by}", field=f"--slice {text}", expected="a whole number")
    return width // by


def layers(text: str, count: int) -> list[int]:
    """'20-24,30' -> [20, 21, 22, 23, 24, 30]."""
    found: list[int] = []
    for item in text.split(","):
        match = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", item)
        if match is None:
            raise Usage(f"{item!r}", field="--slice skip", expected="layers as 20-24,30")
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last < count:
            raise Usage(f"{item!r}", field="--slice skip", expected=f"layers from 0 to {count - 1}")
        found.extend(range(first, last + 1))
    return found


def widths(text: str) -> tuple[int, ...]:
    """'8192x20,16384x15' -> one width per kept layer."""
    found: list[int] = []
    for item in text.split(","):
        match = re.fullmatch(r"(\d{1,9})(?:x(\d{1,4}))?", item)
        if match is None:
            raise Usage(f"{item!r}", field="--slice ffn", expected="widths as 8192x20,16384x15")
        found.extend([int(match[1])] * int(match[2] or 1))
    return tuple(found)


def spelled(model: Model, part: Slice) -> str:
    """A name that means this slice: skip=20-24+ffn=8192x20,16384x10."""
    dropped = ranges(set(range(len(model.layers))).difference(part.keep))
    widths = ",".join(f"{width}x{count}" for width, count in part.runs)
    return (f"skip={dropped}+" if dropped else "") + f"ffn={widths}"


def ranges(layers: Iterable[int]) -> str:
    """As :func:`layers` reads them: [10, 11, 12, 15] -> '10-12,15'."""
    runs = [[i for _, i in run] for _, run in groupby(enumerate(sorted(layers)), lambda pair: pair[1] - pair[0])]
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def from_file(model: Model, path: Path) -> Slice:
    """The two lists of the MatFormer Lab's recipe, by its names."""
    config = Config(read_json(path), str(path))
    last = len(model.layers) - 1
    skip = config.ints("layers_to_skip", default=(), low=0, high=last)
    keep = tuple(i for i in range(len(model.layers)) if i not in skip)
    default = tuple(model.layers[i].ffn.width for i in keep)
    found = config.ints("ffn_hidden_dims", length=len(keep), default=default, low=1)
    config.finish()
    return Slice(path.stem, keep, found)
