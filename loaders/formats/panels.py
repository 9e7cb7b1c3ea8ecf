"""Quantized matrices in the order in which they are multiplied: what packs hold, and the native engine reads in place.

A matrix [rows, cols] is uint8 [ceil(rows / 16), ceil(cols / 32) * B], a line for each panel of 16 rows. B bytes are one
block of all its rows: 16 float16 scales, then the codes. Word w of a row's block, 4 bytes of the row-major codes of
:mod:`loaders.formats.quant`, becomes word 16 * w + row of the panel's:

* int8, B = 544: the code of (row, col) is byte 64 * (col / 4) + 4 * row + col % 4.
* int4, B = 288: byte 64 * (col % 16 / 4) + 4 * row + col % 4, in the low nibble for col < 16, else in the high one.

Rows beyond the last have scale 0; there, and in columns beyond the last, codes are zero. Matrices of a stack are one
after another, each of whole panels, so that a window of panels and blocks is a window of the bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np

from loaders.errors import Usage
from loaders.formats.quant import BITS, BLOCK, Codes, Scales, block_count
from loaders.formats.window import Ranges, Window

PANEL = 16
WORD = 4
SCALE_WORDS = PANEL * 2 // WORD
# Bytes of a block of a panel, scales and codes.
BLOCK_BYTES = {kind: PANEL * (2 + BLOCK * bits // 8) for kind, bits in BITS.items()}
# What a byte of zero codes is.
ZERO = {"int8": 0, "int4": 0x88}


def panel_count(rows: int) -> int:
    """Panels that hold ``rows`` rows."""
    return -(-rows // PANEL)


def panel_shape(shape: tuple[int, ...], kind: str) -> tuple[int, int]:
    """What a matrix [rows, cols] or a stack [n, rows, cols] is stored as, uint8."""
    *stack, rows, cols = shape
    return math.prod(stack) * panel_count(rows), block_count(cols) * BLOCK_BYTES[kind]


def panel_bytes(shape: tuple[int, ...], kind: str) -> int:
    """Bytes of a matrix or a stack in panels."""
    return math.prod(panel_shape(shape, kind))


def panels(codes: Codes, scales: Scales, kind: str) -> Codes:
    """(codes uint8 [rows, code_bytes], scales float16 [rows, nb]), row-major -> uint8 [ceil(rows / 16), nb * B]."""
    nb, missing = scales.shape[1], -len(codes) % PANEL
    if missing:
        codes = np.pad(codes, ((0, missing), (0, 0)), constant_values=ZERO[kind])
        scales = np.pad(scales, ((0, missing), (0, 0)))
    count, words = len(codes) // PANEL, BLOCK * BITS[kind] // 8 // WORD
    out = np.empty((count, nb, BLOCK_BYTES[kind] // WORD), np.uint32)
    turned = scales.view(np.uint16).reshape(count, PANEL, nb).transpose(0, 2, 1)
    out[..., :SCALE_WORDS] = np.ascontiguousarray(turned).view(np.uint32)
    lines = np.ascontiguousarray(codes).view(np.uint32).reshape(count, PANEL, nb, words)
    out[..., SCALE_WORDS:].reshape(count, nb, words, PANEL)[...] = lines.transpose(0, 2, 3, 1)
    return out.view(np.uint8).reshape(count, -1)


def rows(found: Codes, kind: str, count: int, cols: int) -> tuple[Codes, Scales]:
    """The inverse: panels uint8 [n, nb * B] of ``cols`` columns -> codes and scales of their first ``count`` rows."""
    n, nb, words = len(found), block_count(cols), BLOCK * BITS[kind] // 8 // WORD
    whole = np.ascontiguousarray(found).view(np.uint32).reshape(n, nb, BLOCK_BYTES[kind] // WORD)
    codes = np.empty((n, PANEL, nb, words), np.uint32)
    codes[...] = whole[..., SCALE_WORDS:].reshape(n, nb, words, PANEL).transpose(0, 3, 1, 2)
    turned = np.ascontiguousarray(whole[..., :SCALE_WORDS]).view(np.float16)
    scales = np.ascontiguousarray(turned.transpose(0, 2, 1)).reshape(n * PANEL, nb)
    return codes.view(np.uint8).reshape(n * PANEL, -1)[:count], scales[:count]


def whole_panels(bands: Iterable[tuple[Codes, Scales]], height: int, kind: str) -> Iterator[Codes]:
    """Bands of codes and scales, in order and of any number of rows -> panels of matrices of ``height`` rows."""
    held: tuple[Codes, Scales] | None = None
    # Where matrices are whole panels, bands may go from one to the next.
    left = height = height if height % PANEL else 1 << 62
    for codes, scales in bands:
        at = 0
        while at < len(codes):
            take = min(len(codes) - at, left)
            band = codes[at : at + take], scales[at : at + take]
            if held is not None:
                band = np.concatenate((held[0], band[0])), np.concatenate((held[1], band[1]))
            at, left = at + take, left - take
            ready = len(band[0]) if left == 0 else len(band[0]) // PANEL * PANEL
            if ready:
                yield panels(band[0][:ready], band[1][:ready], kind)
            held = (band[0][ready:].copy(), band[1][ready:].copy()) if ready < len(band[0]) else None
            left = left or height


def panel_columns(cols: Ranges, kind: str) -> Ranges:
    """Ranges of columns as bytes of a panel. One that ends inside a block takes the whole of it.

    Raises Usage for a range that begins inside a block.
    """
    for a, _ in cols:
        if a % BLOCK:
            raise Usage(f"columns from {a}", expected=f"a multiple of {BLOCK}, where a block begins")
    width = BLOCK_BYTES[kind]
    return tuple((a // BLOCK * width, block_count(b) * width) for a, b in cols)


def covering(first: int, stop: int, height: int) -> tuple[tuple[int, int], int]:
    """Rows of one matrix of a stack: (the panels that hold them, how many rows of those come before the first)."""
    matrix, row = divmod(first, height)
    before = matrix * panel_count(height)
    return (before + row // PANEL, before + panel_count(row + stop - first)), row % PANEL


def panel_window(window: Window, shape: tuple[int, ...], kind: str) -> Window | None:
    """A window of a matrix, or of a stack's rows one after another, as one of its panels that is itself in panels.

    Rows of one matrix, from the beginning of a panel on, or all rows of some; columns from the beginning of a block on.
    The last ones may end inside a panel, and inside a block: what lies there beyond them is not zero. None for others.
    """
    assert window.cols is not None
    if any(a % BLOCK for a, _ in window.cols) or any(b % BLOCK for _, b in window.cols[:-1]):
        return None
    height, found = shape[-2], []
    for a, b in window.rows:
        row, end, count = a % height, b % height, panel_count(height)
        several = b > a - row + height
        ragged = end % PANEL and (a, b) != window.rows[-1]
        if row % PANEL or ragged or (several and (row or end)):
            return None
        found.append((a // height * count + row // PANEL, b // height * count + panel_count(end)))
    return Window.of(found, panel_columns(window.cols, kind))
