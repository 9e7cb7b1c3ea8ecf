"""The compiled engine behind ctypes: the structures of program.h, and the few functions of program.cpp.

ctypes and not a binding generator: the module needs no Python header, one file serves every version of Python, and
where there is no compiler the installation still succeeds; structures of plain numbers are all there is to pass.
The compiled file is optional: where it is missing ``available()`` is False and ``why_not()`` says what to do.
"""

from __future__ import annotations

import ctypes
import sysconfig
from collections.abc import Iterator
from contextlib import suppress
from ctypes import c_float, c_int32, c_int64, c_void_p
from enum import IntEnum
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from loaders.errors import OverBudget, Unsupported, Usage

BLOCK, PANEL = 32, 16
# Floats of one quantized block of activations.
QUANT_FLOATS = 34
VIEWS, NUMBERS, REALS, WEIGHTS = 6, 8, 4, 4
# The version of program.h.
CONTRACT = 1
# Each thread's own.
SCRATCH = 512 << 10
NONE = -1

Op = IntEnum(
    "Op",
    "EMBED PLE_ROWS QUANTIZE LINEAR HEAD_LINEAR MATMUL NORM LAYER_NORM RMS ROTATION ROPE TEMPERATURE APPEND ATTENTION "
    "ROUTE EXPERTS ACTIVATION GAUSSIAN_TOPK BINARY COPY",
    start=0,
)
Kind = IntEnum("Kind", "F32 BF16 INT8 INT4 F16", start=0)
Arithmetic = IntEnum("Arithmetic", "ADD SUB MUL DIV", start=0)
Activation = IntEnum("Activation", "NONE SILU GELU_TANH TANH", start=0)
Space = IntEnum("Space", "ARENA OUTPUT", start=0)


class View(ctypes.Structure):
    """float32 [rows][n][m], strides in floats; ``unit`` 0 repeats one value along m."""

    _fields_ = (
        ("at", c_int64), ("row", c_int64), ("step", c_int64),
        ("n", c_int32), ("m", c_int32), ("unit", c_int32), ("one", c_int32), ("space", c_int32), ("unused", c_int32),
    )  # fmt: skip


class Instruction(ctypes.Structure):
    """One step; what its views, weights and numbers are is said in program.h."""

    _fields_ = (
        ("op", c_int32), ("unused", c_int32), ("view", View * VIEWS), ("weight", c_int32 * WEIGHTS),
        ("number", c_int32 * NUMBERS), ("real", c_float * REALS),
    )  # fmt: skip


class Weight(ctypes.Structure):
    """``count`` matrices [rows, cols]; ``row`` and ``matrix`` are strides in bytes."""

    _fields_ = (
        ("data", c_void_p), ("bytes", c_int64), ("count", c_int64), ("rows", c_int64), ("cols", c_int64),
        ("row", c_int64), ("matrix", c_int64), ("kind", c_int32), ("unused", c_int32),
    )  # fmt: skip


class Cache(ctypes.Structure):
    """Keys and values of one layer."""

    _fields_ = (
        ("k", c_void_p), ("v", c_void_p), ("k_scale", c_void_p), ("v_scale", c_void_p),
        ("k_bytes", c_int64), ("v_bytes", c_int64), ("k_scale_bytes", c_int64), ("v_scale_bytes", c_int64),
        ("heads", c_int64), ("capacity", c_int64), ("k_dim", c_int64), ("v_dim", c_int64), ("group", c_int64),
        ("kind", c_int32), ("latent", c_int32),
    )  # fmt: skip


class Program(ctypes.Structure):
    """All that a run needs but the tokens. Whoever makes one keeps what its addresses point at."""

    _fields_ = (
        ("instructions", ctypes.POINTER(Instruction)), ("weights", ctypes.POINTER(Weight)),
        ("caches", ctypes.POINTER(Cache)),
        ("instruction_count", c_int64), ("weight_count", c_int64), ("cache_count", c_int64),
        ("arena", c_void_p), ("arena_floats", c_int64), ("chunk", c_int64), ("out_width", c_int64),
        ("ple_row_bytes", c_int64), ("vocab", c_int64), ("context", c_int64),
        ("out_one", c_int32), ("unused", c_int32),
    )  # fmt: skip


class Pass(ctypes.Structure):
    """``tokens`` ids int64 that follow ``start`` others; ``ple``: their rows as stored; ``out`` float32."""

    _fields_ = (
        ("tokens", c_int64), ("start", c_int64), ("ids", c_void_p), ("ple", c_void_p), ("out", c_void_p),
        ("out_rows", c_int64),
    )  # fmt: skip


def _compiled() -> Path | None:
    """The compiled file: beside this one, or, where edge runs from its sources, with the installed distribution."""
    name = f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    places = [Path(__file__).with_name(name)]
    with suppress(PackageNotFoundError):
        places.append(Path(str(distribution("edge-runtime").locate_file(f"edge/engine/native/{name}"))))
    return next((path for path in places if path.is_file()), None)


@cache
def _opened() -> tuple[Any, str | None]:
    """The compiled engine, or None and the reason."""
    path = _compiled()
    if path is None:
        return None, "it was not compiled when edge was installed: install a C++ compiler, then edge again"
    try:
        return _declared(ctypes.CDLL(str(path))), None
    except (OSError, AttributeError) as error:
        return None, f"{path.name} cannot be used: {error}"


def _declared(lib: ctypes.CDLL) -> ctypes.CDLL:
    """The library with its arguments declared. Raises AttributeError, OSError for one that is not of this version."""
    lib.edge_size.argtypes, lib.edge_size.restype = (ctypes.c_int,), c_int64
    structures = (View, Instruction, Weight, Cache, Program, Pass)
    if [lib.edge_size(i) for i in range(8)] != [*map(ctypes.sizeof, structures), len(Op), CONTRACT]:
        raise OSError("it was compiled from another version: install edge again")
    lib.edge_machine.argtypes, lib.edge_machine.restype = (ctypes.c_int,), ctypes.c_char_p
    lib.edge_use.argtypes, lib.edge_use.restype = (ctypes.c_char_p,), ctypes.c_int
    lib.edge_threads.argtypes, lib.edge_threads.restype = (ctypes.c_int,), None
    lib.edge_check.argtypes = (ctypes.POINTER(Program), ctypes.c_char_p, c_int64)
    lib.edge_check.restype = c_int64
    lib.edge_run.argtypes, lib.edge_run.restype = (ctypes.POINTER(Program), ctypes.POINTER(Pass)), ctypes.c_int
    return lib


def _lib() -> Any:
    lib, reason = _opened()
    if lib is None:
        raise Unsupported("no native engine", field="--engine native", hint=reason)
    return lib


def available() -> bool:
    """Whether the compiled engine is here."""
    return _opened()[0] is not None


def why_not() -> str | None:
    """Why it is not, in one line; None where it is."""
    return _opened()[1]


def machines() -> Iterator[str]:
    """Names of the kernels that can run here, best first."""
    for i in range(8):
        name = _lib().edge_machine(i)
        if name is None:
            return
        yield name.decode()


def isas() -> tuple[str, ...]:
    """Kinds of kernels this machine can run, best first; the last is portable C++: 'any'."""
    return tuple(machines())


def use(name: str = "auto") -> str:
    """Chooses the kernels of this process; 'auto' is the best. Returns their name. Raises Usage."""
    found = isas()
    chosen = found[0] if name == "auto" else name
    if chosen not in found or not _lib().edge_use(chosen.encode()):
        raise Usage(repr(name), field="kernels", expected="auto, " + " or ".join(found))
    return chosen


def threads(count: int) -> None:
    """Threads that share the work from now on, the calling one among them. Raises Usage."""
    if not 1 <= count <= 256:
        raise Usage(count, field="--threads", expected="1 to 256")
    _lib().edge_threads(count)


def check(program: Program) -> None:
    """Verifies once that nothing a program does reaches outside its memory. Raises AssertionError: it is our bug."""
    message = ctypes.create_string_buffer(200)
    place = _lib().edge_check(ctypes.byref(program), message, len(message))
    if place:
        raise AssertionError(f"instruction {place - 1}: {message.value.decode()}")


def run(program: Program, one: Pass) -> None:
    """Runs a checked program. Raises OverBudget without memory for the threads; ids are the caller's to check."""
    failed = _lib().edge_run(ctypes.byref(program), ctypes.byref(one))
    if failed == 2:
        raise OverBudget("no memory for the threads", field="memory", hint="Give fewer --threads")
    if failed:
        raise AssertionError(f"a pass of {one.tokens} tokens after {one.start} does not fit its program ({failed})")
