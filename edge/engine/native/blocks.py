"""Quantized and bf16 matrices times float32 vectors on a CPU: the C kernels of ``blocks.c`` behind raw addresses.

Activations stay float32: a product is that of the dequantized weights, up to the order of summation. The compiled file
is optional; where it is missing ``available()`` is False and ``why_not()`` says what to do.
"""

from __future__ import annotations

import ctypes
import os
import sys
import sysconfig
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from operator import index
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from loaders.errors import Unsupported, Usage

BLOCK = 32
CODES = {4: np.dtype(np.uint8), 8: np.dtype(np.int8), 16: np.dtype(np.uint16)}
# Beyond any machine; keeps what C computes with sizes inside 64 bits.
MOST_BYTES, MOST_COLS, MOST_VECTORS = 1 << 46, 1 << 30, 1 << 30


class _Struct(ctypes.Structure):
    """``struct matrix`` of blocks.c."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("code_stride", ctypes.c_int64),
        ("scale_stride", ctypes.c_int64),
        ("bits", ctypes.c_int64),
    )


def _compiled() -> Path | None:
    """The compiled file: beside this one, or, where edge runs from its sources, with the installed distribution."""
    name = f"_blocks{sysconfig.get_config_var('EXT_SUFFIX')}"
    places = [Path(__file__).with_name(name)]
    with suppress(PackageNotFoundError):
        places.append(Path(str(distribution("edge-runtime").locate_file(f"edge/engine/native/{name}"))))
    return next((path for path in places if path.is_file()), None)


@cache
def _opened() -> tuple[Any, str | None]:
    """The compiled kernels, or None and the reason."""
    path = _compiled()
    if path is None:
        return None, "the kernels were not compiled when edge was installed: install a C compiler, then edge again"
    try:
        return _declared(ctypes.CDLL(str(path))), None
    except (OSError, AttributeError) as error:
        return None, f"{path.name} cannot be used: {error}"


def _declared(lib: ctypes.CDLL) -> ctypes.CDLL:
    """The library with its arguments declared and the best path chosen. Raises AttributeError for another library."""
    number, address = ctypes.c_int64, ctypes.c_void_p
    lib.edge_path.argtypes, lib.edge_path.restype = (ctypes.c_int,), ctypes.c_int
    lib.edge_pool.argtypes, lib.edge_pool.restype = (address, ctypes.c_uint), None
    lib.edge_multiply.argtypes, lib.edge_multiply.restype = (address, address, number, number, address), None
    lib.edge_multiply_parts.argtypes = (address, number, address, address, number, address, number, address)
    lib.edge_multiply_parts.restype = number
    lib.edge_dequantize.argtypes, lib.edge_dequantize.restype = (address, number, number, address), None
    lib.edge_gather.argtypes, lib.edge_gather.restype = (address, address, number, address), number
    lib.edge_path(1)
    return lib


def _lib() -> Any:
    lib, reason = _opened()
    if lib is None:
        raise Unsupported("no compiled kernels", field="native", hint=reason)
    return lib


def available() -> bool:
    """Whether the compiled kernels are here."""
    return _opened()[0] is not None


def why_not() -> str | None:
    """Why the kernels are not available, in one line; None where they are."""
    return _opened()[1]


def use(path: str) -> str:
    """Chooses the kernels of this process: "auto", the best for this CPU, or "portable".

    Returns what runs from now on, "avx2" or "portable". Raises Usage, and Unsupported where nothing was compiled.
    """
    if path not in ("auto", "portable"):
        raise Usage(repr(path), field="path", expected="auto or portable")
    return "avx2" if _lib().edge_path(int(path == "auto")) else "portable"


class _Pool:
    """The thread pool the process already has: torch's. A second one would fight it for the same cores."""

    def __init__(self) -> None:
        self.address, self.count = 0, 0

    def find(self) -> None:
        """Takes torch's pool once torch is loaded; without it, or where it has no such entry, kernels run serially."""
        if self.address or "torch" not in sys.modules or not hasattr(os, "RTLD_NOLOAD"):
            return
        folder = Path(str(sys.modules["torch"].__file__)).parent / "lib"
        for path in sorted(folder.glob("libtorch_cpu.*")):
            try:
                # Looked up through torch's own library: this finds the runtime torch is linked with, whatever its name.
                torch = ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD | os.RTLD_NOW)
                self.address = ctypes.cast(torch.GOMP_parallel, ctypes.c_void_p).value or 0
            except (OSError, AttributeError):
                continue
            self.tell()
            return

    def tell(self) -> None:
        _lib().edge_pool(self.address or None, self.count)


_pool = _Pool()


def threads(count: int) -> bool:
    """Threads that kernels may use; 0, the default, is as many as ``torch.set_num_threads`` said.

    Returns whether there is a pool at all: without torch in the process everything runs in the calling thread.
    """
    if not 0 <= count <= 4096:
        raise Usage(count, field="threads", expected="0 to 4096")
    _pool.count = count
    _pool.find()
    _pool.tell()
    return bool(_pool.address)


class Matrix:
    """A weight [rows, cols] in memory that somebody else owns, as the kernels read it.

    ``bits`` 8: int8 codes, 4: two codes a byte, each with one fp16 scale per 32 columns; 16: bf16, no scales
    (``loaders/formats/quant.py`` describes them). ``code_stride`` counts bytes, ``scale_stride`` elements: a wider
    matrix's first columns, or some of its rows, are a matrix too. ``code_bytes`` and ``scale_bytes`` are what may be
    read from each address. ``keep`` lives as long as this does.

    ``width`` is what one row of x, or of an output of ``dequantize`` and ``gather``, holds: cols rounded up to whole
    blocks, and cols itself for bf16. Where cols ends inside a block, x holds zeros from there on; in outputs the rest
    of the block is whatever the matrix holds.
    """

    __slots__ = ("_address", "_keep", "_multiply", "_parts", "_struct", "bits", "cols", "rows", "width")

    def __init__(
        self,
        codes_ptr: int,
        scales_ptr: int,
        bits: int,
        rows: int,
        cols: int,
        code_stride: int,
        scale_stride: int,
        code_bytes: int,
        scale_bytes: int,
        keep: object = None,
    ) -> None:
        """Raises Usage for anything that would make a kernel read elsewhere, Unsupported where nothing was compiled."""
        if bits not in CODES:
            raise Usage(bits, field="bits", expected="4, 8 or 16")
        rows, cols = index(rows), index(cols)
        if not (0 < rows <= MOST_BYTES and 0 < cols <= MOST_COLS):
            raise Usage(f"[{rows}, {cols}]", field="shape", expected="positive sizes")
        blocks = -(-cols // BLOCK)
        self.bits, self.rows, self.cols = bits, rows, cols
        self.width = cols if bits == 16 else blocks * BLOCK
        _check("codes", codes_ptr, rows, code_stride, self.width * bits // 8, code_bytes, bits // 8 or 1)
        if bits != 16:
            _check("scales", scales_ptr, rows, index(scale_stride) * 2, blocks * 2, scale_bytes, 2)
        self._multiply, self._parts = _lib().edge_multiply, _lib().edge_multiply_parts
        self._struct = _Struct(codes_ptr, scales_ptr or None, rows, self.width, code_stride, scale_stride, bits)
        self._address = ctypes.addressof(self._struct)
        self._keep = keep
        _pool.find()

    @classmethod
    def of(cls, codes: npt.NDArray[Any], scales: npt.NDArray[Any] | None, bits: int, cols: int) -> Matrix:
        """The same from arrays: codes uint8, int8 or uint16 [rows, stored], scales float16 [rows, blocks] or None."""
        if codes.ndim != 2 or codes.dtype != CODES.get(bits) or codes.strides[1] != codes.itemsize:
            raise Usage(f"{codes.dtype} {list(codes.shape)}", field="codes", expected=f"rows of {CODES.get(bits)}")
        if scales is None:
            return cls(
                *(codes.ctypes.data, 0, bits, codes.shape[0], cols, codes.strides[0], 0, _extent(codes), 0), keep=codes
            )
        if scales.dtype != np.float16 or scales.shape[:1] != codes.shape[:1] or scales.strides[1:] != (2,):
            raise Usage(f"{scales.dtype} {list(scales.shape)}", field="scales", expected="as many rows of float16")
        return cls(
            *(codes.ctypes.data, scales.ctypes.data, bits, codes.shape[0], cols),
            *(codes.strides[0], scales.strides[0] // 2, _extent(codes), _extent(scales)),
            keep=(codes, scales),
        )

    def part(self, first: int, rows: int) -> Matrix:
        """Some consecutive rows, as a matrix of their own: the same memory. Raises Usage for rows beyond it."""
        if not (first >= 0 and 0 < rows <= self.rows - first):
            raise Usage(f"{first}:{first + rows}", field="rows", expected=f"within 0:{self.rows}")
        whole = self._struct
        codes, scales = whole.code_stride, 2 * whole.scale_stride
        return Matrix(
            *(whole.codes + first * codes, (whole.scales or 0) + first * scales, self.bits, rows, self.cols),
            *(codes, whole.scale_stride, rows * codes, rows * scales, self._keep),
        )

    def multiply(self, x_ptr: int, t: int, x_stride: int, y_ptr: int) -> None:
        """y [t, rows] = x [t, width] W^T, float32; row k of x begins at ``x_stride`` * k elements. Raises Usage.

        Meant for t up to about 32; beyond, dequantizing tiles for a float32 product is faster. The result does not
        depend on the number of threads. x and y are aligned to 4 bytes; nobody can check how long they are.
        """
        if not 1 <= t <= MOST_VECTORS or (t > 1 and not self.width <= x_stride <= MOST_BYTES) or not (x_ptr and y_ptr):
            raise Usage(f"{t} vectors {x_stride} apart", field="multiply", expected=f"vectors of {self.width} floats")
        self._multiply(self._address, x_ptr, t, x_stride, y_ptr)

    def multiply_parts(
        self, count: int, parts_ptr: int, starts_ptr: int, n: int, x_ptr: int, x_stride: int, y_ptr: int
    ) -> None:
        """Of ``count`` matrices kept as this one, those of int64 parts [n], each times some rows of x.

        Rows starts[k] to starts[k + 1] (int64 [n + 1], ascending) of x meet part parts[k]: y [starts[n], rows / count].
        Otherwise as ``multiply``; all parts are one piece of work for the threads. Raises Usage.
        """
        if not 1 <= count <= self.rows or self.rows % count:
            raise Usage(count, field="parts", expected=f"a divisor of {self.rows} rows")
        each = self.rows // count
        most = min(MOST_VECTORS, MOST_BYTES // each)
        if not (0 <= n <= most and self.width <= x_stride <= MOST_BYTES) or not all((parts_ptr, starts_ptr)):
            raise Usage(
                f"{n} parts, vectors {x_stride} apart", field="parts", expected=f"vectors of {self.width} floats"
            )
        if not (x_ptr and y_ptr):
            raise Usage("no address", field="parts", expected="vectors and room for as many")
        place = self._parts(self._address, each, parts_ptr, starts_ptr, n, x_ptr, x_stride, y_ptr)
        if place >= 0:
            raise Usage(f"place {place}", field="parts", expected=f"parts 0 to {count - 1}, vectors in order")

    def dequantize(self, first: int, stop: int, out_ptr: int) -> None:
        """Rows [first, stop) to float32 [stop - first, width], exactly code x scale. Raises Usage."""
        if not (0 <= first <= stop <= self.rows and out_ptr):
            raise Usage(f"{first}:{stop}", field="rows", expected=f"within 0:{self.rows}")
        _lib().edge_dequantize(self._address, first, stop, out_ptr)

    def gather(self, ids_ptr: int, n: int, out_ptr: int) -> None:
        """The rows of int64 ids [n] to float32 [n, width], in that order. Raises Usage for an id that is no row."""
        if not (0 <= n <= MOST_VECTORS and ids_ptr and out_ptr):
            raise Usage(n, field="ids", expected=f"0 to {MOST_VECTORS} of them")
        place = _lib().edge_gather(self._address, ids_ptr, n, out_ptr)
        if place >= 0:
            raise Usage(f"an id at place {place} that is no row", field="ids", expected=f"0 to {self.rows - 1}")


def _check(what: str, pointer: int, rows: int, stride: int, row_bytes: int, nbytes: int, unit: int) -> None:
    """Refuses rows that are not inside their buffer, overlap, or are not aligned; everything in bytes."""
    pointer, stride, nbytes = index(pointer), index(stride), index(nbytes)
    if not 0 < pointer < 1 << 63 or pointer % unit:
        raise Usage(hex(pointer), field=what, expected=f"an address that is a multiple of {unit}")
    if rows > 1 and (stride < row_bytes or stride % unit):
        raise Usage(f"rows {stride} bytes apart", field=what, expected=f"at least {row_bytes}, a multiple of {unit}")
    needed = (rows - 1) * stride + row_bytes
    if not needed <= nbytes <= MOST_BYTES:
        raise Usage(f"{nbytes} bytes", field=what, expected=f"at least {needed} for {rows} rows")


def _extent(array: npt.NDArray[Any]) -> int:
    """Bytes from the first element to behind the last; negative strides give nothing to read."""
    return (array.shape[0] - 1) * max(0, array.strides[0]) + array.shape[1] * array.itemsize if array.size else 0
