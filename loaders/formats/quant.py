"""Block quantization: symmetric int8 and int4 with one float16 scale per block of 32 columns.

A matrix [rows, cols] is codes and scales, both row-major; packs hold the same bytes in panels, see
:mod:`loaders.formats.panels`. With ``nb = ceil(cols / 32)``; columns beyond ``cols`` hold zero codes:

* int8: codes int8 [rows, nb * 32], -127 to 127.
* int4: codes uint8 [rows, nb * 16]; byte j of a block holds value j in its low nibble and value j + 16 in its high one,
  each as code + 8, from -8 to 7.
* scales: float16 [rows, nb]. value = code * scale. An int4 scale may be negative: the largest value then gets -8.

Rows of per-layer embeddings are records of their own, with one scale per layer: see :func:`quantize_rows`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from loaders.errors import BadCheckpoint, Unsupported

Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint8]
Scales = npt.NDArray[np.float16]

BLOCK = 32
BITS = {"int8": 8, "int4": 4}
SCALE_BYTES = 2
HALF_MAX = 65504.0
# Scales of int4 that are tried, as what the largest value of a block is divided by: -8 represents it exactly, others
# clip it a little for a finer grid below. On normal weights the error falls from 8.60% to 8.17%, with eleven to 8.13%.
DIVISORS = (-8.0, -8.6, 7.4)
# Values that are worked on at a time: several temporaries of this many floats stay in a core's cache.
STRIP = 1 << 16


def block_count(cols: int) -> int:
    """Blocks that hold ``cols`` columns."""
    return -(-cols // BLOCK)


def code_bytes(cols: int, kind: str) -> int:
    """Bytes of one row's codes."""
    return block_count(cols) * BLOCK * BITS[kind] // 8


def quantized_bytes(shape: tuple[int, ...], kind: str) -> int:
    """Bytes of codes and scales of a matrix, row-major."""
    rows, cols = shape
    return rows * (code_bytes(cols, kind) + SCALE_BYTES * block_count(cols))


def quantize(x: Floats, kind: str, importance: Floats | None = None) -> tuple[Codes, Scales]:
    """float32 [rows, cols] -> (codes uint8 [rows, code_bytes], scales float16 [rows, nb]), nearest to ``x``.

    ``importance`` float32 [cols], not negative, weighs the squared error of each column: what calibration measures.
    An int4 scale is the best of several by that error, an int8 scale the largest value over 127.

    The error of an int8 value is at most half a scale, and where scales are subnormal a little more; the squared error
    of an int4 block is at most that of the nearest codes under max / -8. Raises BadCheckpoint for what is not finite
    or too large for a float16 scale.
    """
    rows, cols = x.shape
    nb = block_count(cols)
    codes, scales = np.empty((rows, code_bytes(cols, kind)), np.uint8), np.empty((rows, nb), np.float16)
    weights = None if importance is None else _padded(importance[None].astype(np.float32), nb)[0]
    step = max(1, STRIP // (nb * BLOCK))
    for start in range(0, rows, step):
        blocks = _padded(x[start : start + step], nb)
        n = len(blocks)
        flat = blocks.reshape(n * nb, BLOCK)
        w = (
            None
            if weights is None
            else np.broadcast_to(weights.reshape(1, nb, BLOCK), (n, nb, BLOCK)).reshape(-1, BLOCK)
        )
        q, scale = (_int8 if kind == "int8" else _int4)(flat, w)
        scales[start : start + n] = scale.reshape(n, nb)
        packed = q.view(np.uint8) if kind == "int8" else nibbles(q)
        codes[start : start + n] = packed.reshape(n, -1)
    return codes, scales


def dequantize(codes: npt.NDArray[Any], scales: Scales, kind: str, cols: int) -> Floats:
    """(codes uint8 [rows, code_bytes], scales float16 [rows, nb]) -> float32 [rows, cols], each value code * scale."""
    rows, nb = scales.shape
    q = _codes(codes, kind, BLOCK).reshape(rows, nb, BLOCK)
    out: Floats = q * scales.astype(np.float32)[..., None]
    return out.reshape(rows, nb * BLOCK)[:, :cols]


def record_bytes(dim: int, kind: str) -> int:
    """Bytes of one layer's part of a quantized row: a float16 scale, then ``dim`` codes.

    Raises Unsupported where int4 codes would not fill whole bytes.
    """
    if kind == "int4" and dim % 2:
        raise Unsupported(f"per-layer embeddings of width {dim}", expected="an even one for int4")
    return SCALE_BYTES + dim * BITS[kind] // 8


def quantize_rows(x: Floats, kind: str) -> Codes:
    """Rows float32 [t, layers, dim] -> records uint8 [t, layers * record_bytes], one scale per (row, layer).

    A record is its scale, then its codes; for int4 byte j holds value j low and value j + dim / 2 high. Layers lie side
    by side, so that a slice that leaves some out reads windows. Raises what :func:`quantize` raises.
    """
    t, layers, dim = x.shape
    out = np.empty((t, layers, record_bytes(dim, kind)), np.uint8)
    step = max(1, STRIP // (layers * dim))
    for start in range(0, t, step):
        strip = x[start : start + step]
        q, scale = (_int8 if kind == "int8" else _int4)(np.ascontiguousarray(strip).reshape(-1, dim), None)
        packed = q.view(np.uint8) if kind == "int8" else nibbles(q)
        place = out[start : start + step]
        place[..., :SCALE_BYTES] = scale.reshape(len(strip), layers, 1).view(np.uint8)
        place[..., SCALE_BYTES:] = packed.reshape(len(strip), layers, -1)
    return out.reshape(t, -1)


def dequantize_rows(records: Codes, layers: int, dim: int, kind: str) -> Floats:
    """Records uint8 [t, layers * record_bytes] -> float32 [t, layers, dim]."""
    t = len(records)
    parts = records.reshape(t, layers, record_bytes(dim, kind))
    scale = np.ascontiguousarray(parts[..., :SCALE_BYTES]).view(np.float16).astype(np.float32)
    q = _codes(parts[..., SCALE_BYTES:], kind, dim).reshape(t, layers, dim)
    out: Floats = q * scale
    return out


def nibbles(q: npt.NDArray[np.int8]) -> Codes:
    """Codes int8 [n, block], -8 to 7 -> uint8 [n, block / 2]: the first half low, the second half high."""
    half = q.shape[1] // 2
    biased = (q + np.int8(8)).view(np.uint8)
    return biased[:, :half] | (biased[:, half:] << np.uint8(4))


def _codes(codes: npt.NDArray[Any], kind: str, block: int) -> Floats:
    """Stored codes [..., bytes] -> float32 [n, block], unscaled."""
    raw = np.ascontiguousarray(codes).view(np.uint8)
    if kind == "int8":
        return raw.view(np.int8).reshape(-1, block).astype(np.float32)
    packed = raw.reshape(-1, block // 2)
    out = np.empty((len(packed), block), np.float32)
    out[:, : block // 2] = packed & np.uint8(15)
    out[:, block // 2 :] = packed >> np.uint8(4)
    out -= np.float32(8)
    return out


def _padded(x: Floats, nb: int) -> Floats:
    """Rows filled up with zeros to whole blocks; C-contiguous."""
    missing = nb * BLOCK - x.shape[1]
    return np.pad(x, ((0, 0), (0, missing))) if missing else np.ascontiguousarray(x)


def _scale(top: Floats, divisor: float) -> Scales:
    """The scale that gives ``top`` the code ``divisor``. Refuses what is not finite, or would not be in float16."""
    if not np.isfinite(top).all():
        raise BadCheckpoint("a value that is not finite", expected="finite weights")
    most, largest = HALF_MAX * abs(divisor), float(np.abs(top).max())
    if largest > most:
        raise BadCheckpoint(f"values up to {largest:g}", expected=f"weights up to {most:g}")
    return _half(top / np.float32(divisor))


def _half(scale: Floats) -> Scales:
    """The nearest finite float16."""
    with np.errstate(under="ignore"):
        return np.clip(scale, -HALF_MAX, HALF_MAX).astype(np.float16)


def _inverse(scale: Scales) -> Floats:
    """1 / scale, and 0 for a zero scale: its block is all zeros."""
    wide = scale.astype(np.float32)
    return np.divide(np.float32(1), wide, out=np.zeros_like(wide), where=wide != 0)


def _int8(x: Floats, weights: Floats | None) -> tuple[npt.NDArray[np.int8], Scales]:
    """[n, block] -> codes and scales [n, 1]. With 255 levels, choosing the scale would gain next to nothing."""
    scale = _scale(np.abs(x).max(axis=1, keepdims=True), 127)
    q = np.rint(x * _inverse(scale))
    np.clip(q, -127, 127, out=q)
    return q.astype(np.int8), scale


def _int4(x: Floats, weights: Floats | None) -> tuple[npt.NDArray[np.int8], Scales]:
    """[n, block] -> codes and scales [n, 1]: the scale with the least squared error, by column weight where given."""
    top = np.take_along_axis(x, np.abs(x).argmax(axis=1)[:, None], 1)
    weighted = x if weights is None else x * weights
    best = _scale(top, DIVISORS[0])
    gain, along, energy = _fit(x, weighted, weights, best)
    for divisor in DIVISORS[1:]:
        scale = _half(top / np.float32(divisor))
        better, a, e = _fit(x, weighted, weights, scale)
        best = np.where(better > gain, scale, best)
        along, energy = np.where(better > gain, a, along), np.where(better > gain, e, energy)
        gain = np.maximum(gain, better)
    # With the codes fixed the best scale is a projection; with the scale moved, codes are chosen anew.
    refined = _half(np.divide(along, energy, out=np.zeros_like(along), where=energy > 0))
    best = np.where(_fit(x, weighted, weights, refined)[0] > gain, refined, best)
    return _round4(x, best).astype(np.int8), best


def _round4(x: Floats, scale: Scales) -> Floats:
    q: Floats = np.rint(x * _inverse(scale))
    return np.clip(q, -8, 7, out=q)


def _fit(x: Floats, weighted: Floats, weights: Floats | None, scale: Scales) -> tuple[Floats, Floats, Floats]:
    """How much of sum(w x^2) a scale explains [n, 1], with sum(w x q) and sum(w q^2) of its codes."""
    q = _round4(x, scale)
    along = np.einsum("ij,ij->i", weighted, q)[:, None]
    energy = np.einsum("ij,ij->i", q if weights is None else q * weights, q)[:, None]
    wide = scale.astype(np.float32)
    gain: Floats = wide * (2 * along - wide * energy)
    return gain, along, energy
