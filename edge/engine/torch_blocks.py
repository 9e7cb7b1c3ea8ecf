"""Matrices that stay quantized in memory as torch tensors: int8 and int4 codes, one float16 scale per 32 columns.

``loaders/formats/quant.py`` describes the format. Here is what any device can do with it; ``cuda_blocks.py`` does it
faster on CUDA, and on CPUs the native engine does without torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from edge.budget.price import TILE_BYTES
from loaders.errors import Usage

BLOCK = 32


@dataclass(eq=False)
class Blocks:
    """A weight [rows, cols]. With ``nb = ceil(cols / 32)``, both contiguous:

    ``codes`` uint8 [rows, nb * 4 * bits]: int8 values; or values + 8 in nibbles, byte j of a block holding j and j + 16
    ``scales`` float16 [rows, nb]. Raises Usage for tensors that are anything else.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    bits: int
    rows: int
    cols: int

    def __post_init__(self) -> None:
        if self.bits not in {4, 8} or self.rows < 1 or self.cols < 1:
            raise Usage(f"{self.bits} bits, [{self.rows}, {self.cols}]", expected="4 or 8 bits, positive sizes")
        nb = -(-self.cols // BLOCK)
        for field, dtype, width in (("codes", torch.uint8, nb * 4 * self.bits), ("scales", torch.float16, nb)):
            found = getattr(self, field)
            if found.dtype != dtype or found.shape != (self.rows, width) or not found.is_contiguous():
                expected = f"contiguous {dtype} [{self.rows}, {width}]"
                raise Usage(f"{found.dtype} {list(found.shape)}", field=field, expected=expected)
        if self.codes.device != self.scales.device:
            raise Usage(f"scales on {self.scales.device}", field="device", expected=str(self.codes.device))

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, cols)."""
        return self.rows, self.cols

    @property
    def width(self) -> int:
        """``cols`` rounded up to whole blocks."""
        return self.scales.shape[1] * BLOCK

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes

    def part(self, index: int, count: int) -> Blocks:
        """Of a stack of ``count`` matrices kept as one, the matrix ``index``: the same memory. Raises Usage."""
        if not 1 <= count <= self.rows or self.rows % count:
            raise Usage(count, field="parts", expected=f"a divisor of {self.rows} rows")
        if not 0 <= index < count:
            raise Usage(index, field="part", expected=f"0 to {count - 1}")
        rows = self.rows // count
        first = index * rows
        codes, scales = (held[first : first + rows] for held in (self.codes, self.scales))
        return Blocks(codes, scales, self.bits, rows, self.cols)

    @property
    def step(self) -> int:
        """Rows that are widened at once."""
        return max(1, min(self.rows, TILE_BYTES // 4 // self.width))

    def dequantize(self, first: int = 0, stop: int | None = None, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Rows [first, stop) -> ``dtype`` [stop - first, cols], each value code * scale, rounded once."""
        stop = self.rows if stop is None else stop
        out = torch.empty((stop - first, self.cols), dtype=dtype, device=self.device)
        if dtype == torch.float32 and self.width == self.cols:
            self.widen(first, stop, out)
            return out
        tile = self.scratch()
        for start in range(first, stop, self.step):
            end = min(start + self.step, stop)
            out[start - first : end - first] = self.widen(start, end, tile)[:, : self.cols]
        return out

    def rows_at(self, ids: torch.Tensor) -> torch.Tensor:
        """The rows of ids int64 [t] -> float32 [t, cols]: an embedding lookup."""
        out = torch.empty((len(ids), self.width), device=self.device)
        widen(self.codes.index_select(0, ids), self.scales.index_select(0, ids), self.bits, out)
        return out[:, : self.cols]

    def product(self, x: torch.Tensor, tile: torch.Tensor | None = None) -> torch.Tensor:
        """x float32 [t, cols] -> float32 [t, rows], as with the dequantized matrix.

        ``tile``: scratch for ``step`` widened rows, float32 on this device; made for the call when there is none.
        """
        out = torch.empty((len(x), self.rows), device=self.device)
        tile = self.scratch() if tile is None else tile
        for first in range(0, self.rows, self.step):
            stop = min(first + self.step, self.rows)
            part = self.widen(first, stop, tile)[:, : self.cols]
            torch.mm(x, part.t(), out=out[:, first:stop])
        return out

    def scratch(self) -> torch.Tensor:
        """Room for ``step`` widened rows."""
        return torch.empty(self.step * self.width, device=self.device)

    def widen(self, first: int, stop: int, tile: torch.Tensor) -> torch.Tensor:
        """Rows [first, stop) into the beginning of a float32 tile -> that part of it, [stop - first, width]."""
        out = tile.view(-1)[: (stop - first) * self.width].view(stop - first, self.width)
        widen(self.codes[first:stop], self.scales[first:stop], self.bits, out)
        return out


def widen(codes: torch.Tensor, scales: torch.Tensor, bits: int, out: torch.Tensor) -> None:
    """Codes uint8 [n, bytes] times scales float16 [n, nb] into float32 [n, nb * 32]."""
    n, nb = scales.shape
    blocks = out.view(n, nb, BLOCK)
    if bits == 8:
        blocks.copy_(codes.view(torch.int8).view(n, nb, BLOCK))
    else:
        packed, half = codes.view(n, nb, BLOCK // 2), BLOCK // 2
        blocks[..., :half].copy_(packed & 15)
        blocks[..., half:].copy_(packed >> 4)
        blocks -= 8
    blocks *= scales[..., None]
