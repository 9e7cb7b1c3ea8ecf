"""A folder's tensors: one safetensors file, or numbered ones with an index, under the names published files have."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path

from loaders.errors import Usage
from loaders.formats.buffers import Buffer, as_bytes
from loaders.formats.safetensors import INDEX, ITEMSIZE
from loaders.formats.safetensors_writer import Writer

PREFIX = "model."
HEAD = "lm_head.weight"

# (what is going on, how much is done, of how much)
Notify = Callable[[str, int, int], None]
Specs = Mapping[str, tuple[str, tuple[int, ...]]]


def stored_name(name: str) -> str:
    """A family's name for a tensor with the prefix published files have; a head stands outside of it."""
    return name if name == HEAD else PREFIX + name


def sizes_of(specs: Specs) -> dict[str, int]:
    """Bytes of each tensor."""
    return {name: math.prod(shape) * ITEMSIZE[dtype] for name, (dtype, shape) in specs.items()}


def by_size(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Tensors in order, in groups of at most ``limit`` bytes; a larger tensor is a group of its own."""
    groups: list[list[str]] = [[]]
    held = 0
    for name, size in sizes.items():
        if held and held + size > limit:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    return groups


def by_count(sizes: Mapping[str, int], count: int) -> list[list[str]]:
    """Tensors in order, in exactly ``count`` groups: the largest is halved until there are enough.

    Raises Usage where there are fewer tensors than that.
    """
    if not 1 <= count <= len(sizes):
        raise Usage(f"{count} shards", expected=f"1 to {len(sizes)}, the number of tensors")
    groups = [list(sizes)]
    while len(groups) < count:
        at = max(range(len(groups)), key=lambda i: (len(groups[i]) > 1, sum(sizes[n] for n in groups[i])))
        before = list(accumulate(sizes[n] for n in groups[at]))
        cut = min(range(1, len(before)), key=lambda i: abs(2 * before[i - 1] - before[-1]))
        groups[at : at + 1] = [groups[at][:cut], groups[at][cut:]]
    return groups


def write_tensors(
    folder: Path,
    specs: Specs,
    groups: Sequence[Sequence[str]],
    chunks: Callable[[str], Iterable[Buffer]],
    notify: Notify = lambda *_: None,
) -> int:
    """Writes every group into a file of its own, and the index if there are several; returns the tensors' bytes.

    ``chunks``: name -> the raw bytes of a tensor, in pieces. Raises what Writer raises.
    """
    total, done = sum(sizes_of(specs).values()), 0

    def counted(pieces: Iterable[Buffer]) -> Iterator[Buffer]:
        nonlocal done
        for piece in pieces:
            yield piece
            done += as_bytes(piece, writable=False).nbytes
            notify("writing", done, total)

    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors" if len(groups) > 1 else "model.safetensors"
        with Writer(folder / file, {name: specs[name] for name in group}) as writer:
            for name in group:
                writer.write(name, counted(chunks(name)))
                weight_map[name] = file
    if len(groups) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2))
    return total
