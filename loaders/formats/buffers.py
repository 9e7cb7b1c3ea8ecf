"""Raw storage: flat views of memory, and the floating-point types weights are stored in."""

from __future__ import annotations

import os
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from loaders.errors import ReadFailed, Unsupported, Usage

Buffer: TypeAlias = bytes | bytearray | memoryview | npt.NDArray[Any]


def as_bytes(buffer: Buffer, writable: bool = True) -> memoryview:
    """The same memory as flat bytes; a copy of it would be filled in vain, so anything else is refused."""
    if isinstance(buffer, np.ndarray):
        if not buffer.flags.c_contiguous:
            raise Usage("an array that is not C-contiguous")
        buffer = buffer.reshape(-1).view(np.uint8).data
    view = memoryview(buffer)
    if (writable and view.readonly) or not view.c_contiguous:
        raise Usage("a buffer that is read-only or not contiguous")
    return view.cast("B") if view.nbytes else memoryview(bytearray())


def write_exactly(fd: int, view: memoryview, offset: int, path: str | os.PathLike[str]) -> None:
    """All of ``view`` at ``offset`` of a file: the system may take less at a time. Raises ReadFailed."""
    try:
        while view:
            n = os.pwrite(fd, view, offset)
            view, offset = view[n:], offset + n
    except OSError as e:
        raise ReadFailed(f"write at offset {offset}: {e.strerror}", file=path) from None


def to_float32(raw: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.float32]:
    """Raw storage of BF16, F16 or F32 -> the same values as float32, same shape; for F32 the same memory.

    Raises Unsupported for any other dtype.
    """
    if dtype == "BF16":
        wide = raw.view(np.uint16).astype(np.uint32)
        wide <<= np.uint32(16)
        return wide.view(np.float32)
    if dtype == "F16":
        return raw.view(np.float16).astype(np.float32)
    if dtype == "F32":
        return raw.view(np.float32)
    raise Unsupported(f"dtype {dtype}", expected="BF16, F16 or F32")


def from_float32(x: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[Any]:
    """float32 -> raw storage, rounded to nearest even, same shape: uint16 for BF16 and F16, float32 (as is) for F32.

    Too large becomes infinity; NaN stays NaN. Raises Unsupported for any other dtype.
    """
    x = x.astype(np.float32, copy=False)
    if dtype == "BF16":
        bits = x.view(np.uint32)
        rounded = bits >> np.uint32(16)
        rounded &= np.uint32(1)
        rounded += bits  # may wrap, for NaN only
        rounded += np.uint32(0x7FFF)
        rounded >>= np.uint32(16)
        return np.where(np.isnan(x), (bits >> np.uint32(16)) | np.uint32(0x40), rounded).astype(np.uint16)
    if dtype == "F16":
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            return x.astype(np.float16).view(np.uint16)
    if dtype == "F32":
        return x
    raise Unsupported(f"dtype {dtype}", expected="BF16, F16 or F32")
