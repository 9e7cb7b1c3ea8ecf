"""Canonical tensors read from stored ones: plain, as blocks of larger ones, transposed, stacked, or in scaled fp8.

fp8 is e4m3 with one inverse scale per 128 x 128 block, as DeepSeek V3 publishes it (arXiv 2412.19437).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from loaders.formats.buffers import to_float32
from loaders.formats.safetensors import Shards, Tensor
from loaders.formats.window import Window

FP8, FP8_BLOCK = "F8_E4M3", 128
RAW = {"BF16": np.uint16, "F16": np.uint16, "F32": np.uint32, FP8: np.uint8}
Range = tuple[int, int]


class Block(NamedTuple):
    """Rows and columns of one matrix of a stored tensor [planes, height, width]; ``cols`` None: of a vector."""

    plane: int
    rows: Range
    cols: Range | None
    transposed: bool = False

    @property
    def height(self) -> int:
        """Rows of the canonical tensor."""
        a, b = self.cols if self.transposed and self.cols is not None else self.rows
        return b - a


class Piece(NamedTuple):
    """Consecutive rows of a canonical tensor. ``scale``: of an fp8 tensor its inverse scales."""

    tensor: Tensor
    block: Block
    scale: Tensor | None = None

    @property
    def whole(self) -> bool:
        """The stored tensor is the piece, as it is."""
        block = self.block
        ranges = (block.rows,) if block.cols is None else (block.rows, block.cols)
        return self.scale is None and not block.transposed and ranges == tuple((0, n) for n in self.tensor.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of it in the file, with the scales of every block it has a part in."""
        rows, cols = self.block.rows, self.block.cols or (0, 1)
        values = (rows[1] - rows[0]) * (cols[1] - cols[0])
        scales = 0 if self.scale is None else blocks(rows) * blocks(cols) * self.scale.itemsize
        return values * self.tensor.itemsize + scales

    def raw(self, shards: Shards, rows: Range, cols: Range | None) -> npt.NDArray[Any]:
        """Stored bits of a range of the piece's canonical rows and columns, in canonical order."""
        found = self.bits(shards, *self.stored(rows, cols))
        return found.T if self.block.transposed else found

    def bits(self, shards: Shards, high: Range, wide: Range | None) -> npt.NDArray[Any]:
        """The same by rows and columns of the stored matrix, as they are stored."""
        kind, shape = RAW[self.tensor.dtype], self.tensor.shape
        if wide is None:
            line = np.empty(high[1] - high[0], kind)
            shards.read_window(self.tensor, Window((high,), None), line)
            return line
        out = np.empty((high[1] - high[0], wide[1] - wide[0]), kind)
        if len(shape) == 2:
            shards.read_window(self.tensor, Window((high,), (wide,)), out)
            return out
        # To the reader a stack has a row for each plane.
        plane, width = self.block.plane, shape[2]
        window = Window.of([(plane, plane + 1)], ((r * width + wide[0], r * width + wide[1]) for r in range(*high)))
        shards.read_window(self.tensor, window, out.reshape(1, -1))
        return out

    def stored(self, rows: Range, cols: Range | None) -> tuple[Range, Range | None]:
        """Canonical ranges within the piece -> rows and columns of the stored matrix."""
        (top, _), left = self.block.rows, 0 if self.block.cols is None else self.block.cols[0]
        if cols is None:
            return (top + rows[0], top + rows[1]), None
        if self.block.transposed:
            return (top + cols[0], top + cols[1]), (left + rows[0], left + rows[1])
        return (top + rows[0], top + rows[1]), (left + cols[0], left + cols[1])

    def values(self, shards: Shards, rows: Range, cols: Range | None) -> npt.NDArray[np.float32]:
        """The same as float32; fp8 values times the scale of their block, rounded once."""
        high, wide = self.stored(rows, cols)
        found = self.bits(shards, high, wide)
        if self.tensor.dtype != FP8:
            out = to_float32(found, self.tensor.dtype)
        else:
            assert wide is not None
            out = fp8_values()[found]
            self.multiply(shards, high, wide, out)
        return out.T if self.block.transposed else out

    def multiply(self, shards: Shards, high: Range, wide: Range, out: npt.NDArray[np.float32]) -> None:
        """Each value of ``out`` times the scale of its block, by rows and columns of the stored matrix."""
        assert self.scale is not None
        top, left = high[0] // FP8_BLOCK, wide[0] // FP8_BLOCK
        window = Window(((top, top + blocks(high)),), ((left, left + blocks(wide)),))
        scales = np.empty(window.shape, np.uint32)
        shards.read_window(self.scale, window, scales)
        lines = to_float32(scales, "F32")[:, np.arange(*wide) // FP8_BLOCK - left]
        for i, line in enumerate(lines):
            start = (top + i) * FP8_BLOCK - high[0]
            out[max(start, 0) : start + FP8_BLOCK] *= line


def blocks(lines: Range) -> int:
    """How many blocks of fp8 a range has a part in."""
    return -(-lines[1] // FP8_BLOCK) - lines[0] // FP8_BLOCK


@dataclass(frozen=True)
class Placed:
    """A canonical tensor of a checkpoint: its pieces in order of rows. Stacks are read as one matrix.

    ``offset`` is added to every value.
    """

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    offset: float = 0.0

    @classmethod
    def of(cls, tensor: Tensor) -> Placed:
        """A stored tensor as it is."""
        rows, *cols = tensor.shape
        return cls(tensor.shape, (Piece(tensor, Block(0, (0, rows), (0, cols[0]) if cols else None)),))

    @cached_property
    def plain(self) -> Tensor | None:
        """The one stored tensor that this is, if it is one."""
        first = self.pieces[0]
        return first.tensor if len(self.pieces) == 1 and first.whole and not self.offset else None

    @cached_property
    def dtype(self) -> str:
        """What it is stored as; F32, which holds them all, where pieces differ."""
        found = {piece.tensor.dtype for piece in self.pieces}
        return found.pop() if len(found) == 1 else "F32"

    @cached_property
    def exact(self) -> str | None:
        """The type in which stored bits are the values; None where reading computes."""
        computed = self.offset or any(p.scale is not None or p.tensor.dtype != self.dtype for p in self.pieces)
        return None if computed else self.dtype

    @cached_property
    def nbytes(self) -> int:
        """Bytes of it in the files, scales included."""
        return sum(piece.nbytes for piece in self.pieces)

    @property
    def name(self) -> str:
        """Of the stored tensor that holds its first row."""
        return self.pieces[0].tensor.name

    @property
    def shard(self) -> str:
        """The file that holds its first row."""
        return self.pieces[0].tensor.shard

    @cached_property
    def starts(self) -> list[int]:
        """The first row of each piece."""
        found, at = [], 0
        for piece in self.pieces:
            found.append(at)
            at += piece.block.height
        return found

    @property
    def window(self) -> Window:
        """All of it."""
        rows = math.prod(self.shape[:-1]) if len(self.shape) > 1 else self.shape[0]
        return Window(((0, rows),), None if len(self.shape) == 1 else ((0, self.shape[-1]),))

    def read(self, shards: Shards, window: Window, out: npt.NDArray[Any]) -> None:
        """Fills ``out``, raw storage of :attr:`exact` in the window's shape, with stored bits."""
        tensor = self.plain
        if tensor is not None:
            shards.read_window(tensor, window, out)
            return
        for piece, rows, cols, target in self.parts(window, out):
            target[...] = piece.raw(shards, rows, cols)

    def values(self, shards: Shards, window: Window) -> npt.NDArray[np.float32]:
        """float32 of the window's shape, whatever the storage."""
        tensor = self.plain
        if tensor is not None and tensor.dtype in RAW:
            raw = np.empty(window.shape, RAW[tensor.dtype])
            shards.read_window(tensor, window, raw)
            return to_float32(raw, tensor.dtype)
        out = np.empty(window.shape, np.float32)
        for piece, rows, cols, target in self.parts(window, out):
            target[...] = piece.values(shards, rows, cols)
        if self.offset:
            out += np.float32(self.offset)
        return out

    @cached_property
    def plane_bytes(self) -> int:
        """The largest piece that is stored the other way round, 0 where none is: :meth:`steps` holds it whole.

        Of scaled fp8 it holds float32.
        """
        turned = (piece for piece in self.pieces if piece.block.transposed)
        return max((piece.nbytes * (1 if piece.scale is None else 4) for piece in turned), default=0)

    def steps(self, shards: Shards, rows: int) -> Iterator[Callable[[], npt.NDArray[np.float32]]]:
        """Everything in order, in bands of at most so many rows; each is read, or turned, when it is called for.

        A band of a transposed piece is a column of thousands of short runs in the file: such a piece is read as it
        lies, once, and bands are taken out of it.
        """
        if not self.plane_bytes:
            yield from (partial(self.values, shards, band) for band in bands(self.window, rows))
            return
        for piece in self.pieces:
            columns = self.shape[-1]
            if piece.scale is not None or not piece.block.transposed:
                held = piece.values(shards, (0, piece.block.height), (0, columns)).T
            else:
                held = piece.bits(shards, *piece.stored((0, piece.block.height), (0, columns)))
            for first in range(0, piece.block.height, rows):
                yield partial(self.turned, held[:, first : first + rows], piece.tensor.dtype)

    def turned(self, held: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.float32]:
        """Columns of what is stored, or already float32, as rows."""
        if held.dtype != np.float32:
            held = to_float32(np.ascontiguousarray(held.T), dtype)
        else:
            held = np.ascontiguousarray(held.T)
        return held + np.float32(self.offset) if self.offset else held

    def parts(
        self, window: Window, out: npt.NDArray[Any]
    ) -> Iterator[tuple[Piece, Range, Range | None, npt.NDArray[Any]]]:
        """A window piece by piece: (piece, its rows, its columns, the part of ``out`` they go to)."""
        at = 0
        for piece, rows in (found for lines in window.rows for found in self.covering(lines)):
            target = out[at : at + rows[1] - rows[0]]
            at += len(target)
            if window.cols is None:
                yield piece, rows, None, target
                continue
            left = 0
            for cols in window.cols:
                yield piece, rows, cols, target[:, left : left + cols[1] - cols[0]]
                left += cols[1] - cols[0]

    def covering(self, lines: Range) -> Iterator[tuple[Piece, Range]]:
        """The pieces that hold canonical rows, each with the rows of its own."""
        index = bisect_right(self.starts, lines[0]) - 1
        while index < len(self.pieces) and self.starts[index] < lines[1]:
            piece, start = self.pieces[index], self.starts[index]
            yield piece, (max(lines[0] - start, 0), min(lines[1] - start, piece.block.height))
            index += 1


@cache
def fp8_values() -> npt.NDArray[np.float32]:
    """float32 [256]: what each e4m3 code means. There is no infinity; all bits set is not a number."""
    codes = np.arange(256)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    small, normal = mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0)
    found = np.where(exponent == 0, small, normal) * np.where(codes & 128, -1.0, 1.0)
    found[[127, 255]] = np.nan
    return found.astype(np.float32)


def bands(window: Window, rows: int) -> Iterator[Window]:
    """The same window in bands of at most ``rows`` rows, in order."""
    for first, stop in window.rows:
        for start in range(first, stop, rows):
            yield Window(((start, min(start + rows, stop)),), window.cols)
