"""Weights as the native engine reads them: in memory of its own, or a pack's panels where they lie, mapped once a file.

A matrix goes by a fifth faster in large pages, which Linux gives to memory but to few files: where there are such
pages, panels are read into memory as they are; elsewhere, or where it is asked for, they are mapped, and processes
share them. Of a mapped file pages outside a slice never become resident; what a slice takes of a matrix that is neither
whole panels nor whole rows of them is copied: mapped, a panel's part would bring its neighbours' pages along.
"""

from __future__ import annotations

import errno
import math
import mmap
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from edge.budget.memory import Ledger
from edge.budget.price_native import ALIGNED, weight_bytes
from edge.engine.native.library import Kind, Weight
from loaders.errors import OverBudget, ReadFailed
from loaders.formats.panels import BLOCK_BYTES, panel_count, panel_shape, panel_window
from loaders.formats.placed import bands
from loaders.formats.quant import BITS, block_count
from loaders.formats.recipe import Recipe
from loaders.formats.safetensors import ITEMSIZE
from loaders.formats.sharded import Notify
from loaders.network.matformer import Part
from loaders.weights import Kept, PanelPlace, Source, panel_place, panel_rows, plain_stream

KINDS = {"F32": Kind.F32, "BF16": Kind.BF16, "F16": Kind.F16, "int8": Kind.INT8, "int4": Kind.INT4}
# Bytes between two looks at whether the budget still holds.
BAND = 32 << 20
# From here on larger pages, where the system has them, make up for being asked for.
HUGE = 4 << 20
# Linux, from 5.14 on; the mmap module has no name for it.
POPULATE_READ = 22
PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")

Range = tuple[int, int]


class Own:
    """Memory for weights that are read: one mapping, arrays at multiples of 64 bytes."""

    def __init__(self, nbytes: int) -> None:
        try:
            pages = mmap.mmap(-1, max(1, nbytes), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError:
            raise OverBudget(f"{nbytes} bytes of weights", field="memory", hint="Give a lower --budget") from None
        if nbytes >= HUGE:
            advise(pages, "MADV_HUGEPAGE", 0, nbytes)
        self.memory, self.used = np.frombuffer(pages, np.uint8), 0

    def take(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """The next part of it, C-contiguous."""
        size = math.prod(shape) * dtype.itemsize
        part = self.memory[self.used : self.used + size]
        self.used += aligned(size)
        return part.view(dtype).reshape(shape)


def aligned(size: int) -> int:
    """Bytes up to where the next array may begin."""
    return -(-size // ALIGNED) * ALIGNED


@dataclass
class Mapped:
    """A file, mapped, and the ranges of it that are read: byte offsets."""

    path: str
    pages: mmap.mmap
    ranges: list[Range] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.view = np.frombuffer(self.pages, np.uint8)

    @classmethod
    def of(cls, place: PanelPlace) -> Mapped:
        """The file of a place, through the descriptor it was opened with: it may have been removed since."""
        with place.shards._descriptor(place.path, True) as fd:
            try:
                return cls(place.path, mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ))
            except (OSError, ValueError) as error:
                raise ReadFailed(getattr(error, "strerror", None) or error, file=place.path) from None

    def merged(self) -> Iterator[Range]:
        """The ranges in whole pages, neighbours as one."""
        size, begin, end = mmap.PAGESIZE, 0, 0
        for start, past in sorted(self.ranges):
            first, stop = start // size * size, -(-past // size) * size
            if first > end:
                yield from ((begin, end),) if end else ()
                begin = first
            end = max(end, stop)
        if end:
            yield begin, end

    def prefault(self, done: Callable[[int], None]) -> None:
        """Makes the ranges resident, and no page beside them. Raises ReadFailed where the file cannot be read."""
        ranges = list(self.merged())
        for begin, end in ranges:
            # Not for the advice: where it changes, the kernel maps no cached pages around the one that is touched.
            advise(self.pages, "MADV_RANDOM", begin, end)
        for begin, end in ranges:
            for first in range(begin, end, BAND):
                stop = min(first + BAND, end)
                advise(self.pages, "MADV_WILLNEED", first, stop)
                self.touch(first, stop)
                done(stop - first)

    def touch(self, first: int, stop: int) -> None:
        """Reads a byte of every page, or has the kernel do as much: it says what it cannot read, and kills nobody."""
        if sys.platform.startswith("linux"):
            try:
                self.pages.madvise(POPULATE_READ, first, stop - first)
                return
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise ReadFailed(f"read at offset {first}: {error.strerror}", file=self.path) from None
        self.view[first : stop : mmap.PAGESIZE].max()


def advise(pages: mmap.mmap, name: str, first: int, stop: int) -> None:
    """What the kernel may know; nothing depends on it."""
    if hasattr(mmap, name):
        pages.madvise(getattr(mmap, name), first, stop - first)


class Weights:
    """``named``: canonical name -> Weight, in memory that lives as long as this does."""

    def __init__(self, nbytes: int) -> None:
        self.named: dict[str, Weight] = {}
        self.files: dict[str, Mapped] = {}
        self.own = Own(nbytes)

    def ranges(self) -> Iterator[tuple[int, int]]:
        """(address, bytes) of all of it."""
        for file in self.files.values():
            yield from ((file.view.ctypes.data + begin, end - begin) for begin, end in file.merged())
        yield self.own.memory.ctypes.data, self.own.memory.nbytes

    def map(self, place: PanelPlace) -> Weight:
        """Panels where they lie."""
        if place.path not in self.files:
            self.files[place.path] = Mapped.of(place)
        file, matrix = self.files[place.path], place.panels * place.step
        size, kind = place.matrices * matrix, KINDS[place.kind]
        if place.offset + size > len(file.view):
            raise ReadFailed("changed since it was opened", file=place.path)
        file.ranges.append((place.offset, place.offset + size))
        address = file.view.ctypes.data + place.offset
        return Weight(address, size, place.matrices, place.rows, place.cols, place.step, matrix, kind, 0)


def large_pages() -> bool:
    """Whether memory that asks for it comes in pages of megabytes."""
    try:
        return "[never]" not in PAGES.read_text("ascii")
    except (OSError, ValueError):
        return False


def load_weights(
    source: Source,
    tensors: dict[str, Kept],
    parts: dict[str, Part],
    recipe: Recipe,
    ledger: Ledger,
    notify: Notify,
    mapped: bool | None = None,
) -> Weights:
    """Every tensor of a slice but the per-layer-embedding table, in the recipe's formats. ``mapped``: a pack's panels
    where they lie; None: only where there are no large pages to read them into.

    Raises ReadFailed, BadCheckpoint, OverBudget.
    """
    places = {}
    if mapped or (mapped is None and not large_pages()):
        found_at = ((name, whole(panel_place(source, parts[name], recipe))) for name in tensors)
        places = {name: place for name, place in found_at if place is not None}
    read = {n: t for n, t in tensors.items() if n not in places}
    found = Weights(sum(aligned(nbytes(tensor, recipe)) for tensor in read.values()))
    total = sum(weight_bytes(tensor, recipe) for tensor in tensors.values())
    ledger.take("weights", total)
    so_far = 0

    def done(count: int) -> None:
        nonlocal so_far
        so_far = min(so_far + count, total)
        notify("loading", so_far, total)

    for name, place in places.items():
        found.named[name] = found.map(place)
    for file in found.files.values():
        file.prefault(done)
    for name, tensor in read.items():
        found.named[name] = taken(source, parts[name], tensor, recipe, found.own)
        done(nbytes(tensor, recipe))
    notify("loading", total, total)
    return found


def whole(place: PanelPlace | None) -> PanelPlace | None:
    """A place whose panels lie one after another, with nothing in between."""
    if place is None or place.step != place.blocks * BLOCK_BYTES[place.kind]:
        return None
    return place if place.matrices == 1 or place.matrix == place.panels * place.step else None


def nbytes(tensor: Kept, recipe: Recipe) -> int:
    """Of a tensor in own memory."""
    stored = tensor.stored(recipe)
    if stored in BITS:
        return math.prod(panel_shape(tensor.shape, stored))
    return math.prod(tensor.shape) * ITEMSIZE[stored]


def taken(source: Source, part: Part, tensor: Kept, recipe: Recipe, own: Own) -> Weight:
    """A tensor read into own memory."""
    stored = tensor.stored(recipe)
    if stored in BITS:
        return quantized(source, part, tensor, recipe, own)
    stream = plain_stream(source, part, recipe)
    raw = own.take(stream.window.shape, np.dtype(f"u{ITEMSIZE[stored]}"))
    stream.read(stream.window, raw)
    return plain(raw, tensor.shape, stored)


def plain(raw: np.ndarray, shape: tuple[int, ...], stored: str) -> Weight:
    """Contiguous values of ``shape``, a vector as a matrix of one row."""
    count = math.prod(shape[:-2])
    rows, cols = (1, *shape)[-2:]
    row = cols * ITEMSIZE[stored]
    return Weight(raw.ctypes.data, raw.nbytes, count, rows, cols, row, rows * row, KINDS[stored], 0)


def quantized(source: Source, part: Part, tensor: Kept, recipe: Recipe, own: Own) -> Weight:
    """Panels, copied as they are where the window has its own, else made of their rows."""
    stored, shape = tensor.stored(recipe), tensor.shape
    out = own.take(panel_shape(shape, stored), np.dtype(np.uint8))
    place, window = panel_place(source, part, recipe), panel_window(part.window, tensor.full, stored)
    if place is None or window is None:
        panel_rows(source, part, recipe, out)
    else:
        at, stored_tensor = 0, place.shards.tensors[part.name]
        for band in bands(window, max(1, BAND // 8 // out.shape[1])):
            lines = band.shape[0]
            place.shards.read_window(stored_tensor, band, out[at : at + lines])
            at += lines
    return panels(out, shape, stored)


def panels(raw: np.ndarray, shape: tuple[int, ...], stored: str) -> Weight:
    """Contiguous panels of a matrix, or of a stack of them."""
    rows, cols = shape[-2:]
    step = block_count(cols) * BLOCK_BYTES[stored]
    matrix = panel_count(rows) * step
    return Weight(raw.ctypes.data, raw.nbytes, math.prod(shape[:-2]), rows, cols, step, matrix, KINDS[stored], 0)
