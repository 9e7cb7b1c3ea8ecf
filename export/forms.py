"""The forms that tensors take in an exported file, as numpy: what turns a band of a matrix into bytes of an operator.

Codes come in row-major (:mod:`loaders.formats.quant`): int8, or int4 whose byte j of a block holds the values
j and j + 16, each as code + 8. ONNX Runtime wants neighbours in a byte, and int8 codes biased by 128.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from loaders.errors import BadCheckpoint, Unsupported
from loaders.formats.quant import BITS, BLOCK, HALF_MAX, Codes, Floats, Scales, block_count

Bytes = npt.NDArray[Any]
HALF = BLOCK // 2


class Form(NamedTuple):
    """What a form is made of. ``base``: the form of the rows; ``sources``: how many tensors, their rows interleaved."""

    base: str
    sources: int = 1

    @property
    def quantized(self) -> bool:
        """Made of codes and scales, not of values."""
        return self.base not in ("values", "turned")

    @property
    def turned(self) -> bool:
        """Stored by columns: a band of rows is a strip of every line."""
        return self.base.startswith("turned")


FORMS = {
    **{base: Form(base) for base in ("values", "turned", "codes", "scales", "turned.codes", "turned.scales")},
    "codes.trimmed": Form("codes.trimmed"),
    "interleaved": Form("values", 2),
    "codes.interleaved": Form("codes.trimmed", 2),
    "scales.interleaved": Form("scales", 2),
}
FLOATS: dict[int, int] = {TensorProto.FLOAT: 4, TensorProto.FLOAT16: 2}
PACKED: dict[str, int] = {"int8": TensorProto.INT8, "int4": TensorProto.INT4}


def types(base: str, stored: str) -> tuple[int, ...]:
    """The types of onnx.TensorProto that a form may have, of a tensor that is kept as ``stored``."""
    if base in ("codes", "codes.trimmed"):
        return (TensorProto.UINT8,)
    return (PACKED[stored],) if base == "turned.codes" else tuple(FLOATS)


def form_bytes(base: str, dtype: int, stored: str, rows: int, cols: int) -> int:
    """Bytes of a form of a matrix, or of all matrices of a stack together."""
    if base in ("values", "turned"):
        return rows * cols * FLOATS[dtype]
    if base == "codes.trimmed":
        return rows * trimmed(cols, stored)
    if base.endswith("codes"):
        return rows * block_count(cols) * BLOCK * BITS[stored] // 8
    return rows * block_count(cols) * FLOATS[dtype]


def of_values(x: Floats, base: str, dtype: int) -> Bytes:
    """float32 [rows, cols] or [rows] -> the bytes of a band of ``values`` or ``turned``, C-contiguous."""
    return np.ascontiguousarray(as_type(x.T if base == "turned" else x, dtype))


def trimmed(cols: int, stored: str) -> int:
    """Bytes of a row's codes without those of columns that are only there to fill a block.

    Raises Unsupported for an odd number of int4 codes.
    """
    if cols * BITS[stored] % 8:
        raise Unsupported(f"rows of {cols} {stored} codes", expected="an even number", hint="Export at int8")
    return cols * BITS[stored] // 8


def of_codes(codes: Codes, scales: Scales, base: str, dtype: int, stored: str, cols: int) -> Bytes:
    """Codes and scales of a band of rows -> the bytes of the band in a form, C-contiguous."""
    if base in ("codes", "codes.trimmed"):
        found = codes ^ np.uint8(128) if stored == "int8" else neighbours(codes)
        return found if base == "codes" else np.ascontiguousarray(found[:, : trimmed(cols, stored)])
    if base == "turned.codes":
        return np.ascontiguousarray(codes.T) if stored == "int8" else turned_nibbles(codes)
    wide = as_type(scales, dtype)
    return np.ascontiguousarray(wide.T) if base == "turned.scales" else wide


def as_type(x: npt.NDArray[Any], dtype: int) -> npt.NDArray[Any]:
    """As float32 or float16, to nearest even. Raises BadCheckpoint for a value that float16 does not hold."""
    if dtype == TensorProto.FLOAT:
        return x.astype(np.float32, copy=False)
    if x.dtype == np.float16:
        return x
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        half = x.astype(np.float16)
    if not np.isfinite(half).all():
        largest = float(np.abs(x).max())
        raise BadCheckpoint(f"values up to {largest:g}", expected=f"weights up to {HALF_MAX:g} for float16")
    return half


def interleaved(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Rows of two matrices [rows, n] by turns -> [2 rows, n]."""
    return np.stack((a, b), axis=1).reshape(-1, a.shape[1])


def neighbours(codes: Codes) -> Codes:
    """int4 codes [rows, nb * 16] -> the same shape: byte j of a block holds value 2j low and 2j + 1 high."""
    pair = codes.view("<u2")
    out = np.empty((*pair.shape[:-1], pair.shape[-1] // 8, 2, 8), np.uint8)
    blocks = pair.reshape(*pair.shape[:-1], -1, 8)
    out[..., 0, :] = (blocks & 0x000F) | (blocks >> 4 & 0x00F0)
    out[..., 1, :] = (blocks >> 4 & 0x000F) | (blocks >> 8 & 0x00F0)
    return out.reshape(codes.shape)


def turned_nibbles(codes: Codes) -> Codes:
    """int4 codes [rows, nb * 16], rows even -> signed nibbles by columns [nb * 32, rows / 2], the lower row low."""
    signed = codes ^ np.uint8(0x88)
    even, odd = signed[0::2], signed[1::2]
    out = np.empty((codes.shape[1] // HALF, 2, HALF, len(even)), np.uint8)
    blocks = (len(even), -1, HALF)
    out[:, 0] = ((even & 15) | (odd << 4)).reshape(blocks).transpose(1, 2, 0)
    out[:, 1] = ((even >> 4) | (odd & 0xF0)).reshape(blocks).transpose(1, 2, 0)
    return out.reshape(-1, len(even))


def turned_odd(codes: Codes) -> Codes:
    """The same of all rows, an odd number of them: lines begin inside a byte. -> [nb * 16 * rows]."""
    signed = codes ^ np.uint8(0x88)
    out = np.empty((codes.shape[1] // HALF, 2, HALF, len(codes)), np.uint8)
    blocks = (len(codes), -1, HALF)
    out[:, 0] = (signed & 15).reshape(blocks).transpose(1, 2, 0)
    out[:, 1] = (signed >> 4).reshape(blocks).transpose(1, 2, 0)
    flat = out.reshape(-1, 2)
    packed: Codes = flat[:, 0] | (flat[:, 1] << np.uint8(4))
    return packed
