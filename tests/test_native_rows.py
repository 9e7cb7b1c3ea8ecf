"""Single instructions of the native engine against numpy in float64: rows, single values, products with plain weights.

Everything lies at the end of memory that may be touched, so that reading one float too many ends the test with a
signal; what is not the output must be unchanged afterwards.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib.stride_tricks import as_strided

from edge.engine.native import library
from edge.engine.native.library import Activation, Arithmetic, Kind, Op, Space, View
from loaders.formats import panels, quant

GUARD = np.float32(-12345.0)
PAGE = mmap.PAGESIZE
QUICK = settings(max_examples=20, deadline=None)
SIZES = st.one_of(st.integers(1, 40), st.sampled_from((64, 129, 1000, 4096, 4100)))
GAPS = st.tuples(st.integers(0, 3), st.integers(0, 3))


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    library.use("auto")
    library.threads(1)


class Fenced(NamedTuple):
    """Bytes that end where memory does."""

    memory: mmap.mmap
    array: np.ndarray


def fenced(data: np.ndarray) -> Fenced:
    size = -(-max(data.nbytes, 1) // PAGE) * PAGE
    memory = mmap.mmap(-1, size + PAGE)
    all_of_it = np.frombuffer(memory, np.uint8)
    fence = ctypes.c_void_p(all_of_it.ctypes.data + size)
    assert ctypes.CDLL(None).mprotect(fence, ctypes.c_size_t(PAGE), 0) == 0
    array = all_of_it[size - data.nbytes : size].view(data.dtype)
    array[:] = data.reshape(-1)
    return Fenced(memory, array.reshape(data.shape))


class Desk:
    """An arena, its views and a pass of one instruction."""

    def __init__(self, tokens: int, start: int = 0, seed: int = 0) -> None:
        self.tokens, self.start, self.floats = tokens, start, 0
        self.rng = np.random.default_rng(seed)
        self.stored: list[tuple[library.Weight, Fenced]] = []
        self.filled: list[tuple[View, np.ndarray]] = []
        self.vocab, self.ple = 1 << 20, np.zeros((tokens, 0), np.uint8)
        self.ids = np.zeros(tokens, np.int64)

    def rows(self, view: View) -> int:
        return 1 if view.one else self.tokens

    def view(self, n: int, m: int, gaps: tuple[int, int] = (0, 0), *, one: bool = False, repeat: str = "") -> View:
        """Room for [rows, n, m]; ``repeat`` names the axes, of "r", "n" and "m", along which one value repeats."""
        step = m + gaps[0]
        view = View(self.floats, n * step + gaps[1], step, n, m, 1, one, Space.ARENA, 0)
        self.floats += self.rows(view) * view.row
        if "r" in repeat:
            view.row = 0
        if "n" in repeat:
            view.step = 0
        if "m" in repeat:
            view.unit = 0
        return view

    def input(self, *shape: Any, **how: Any) -> tuple[View, np.ndarray]:
        """A view of random values, and they in float64 as an instruction sees them."""
        view = self.view(*shape, **how)
        values = self.rng.standard_normal((self.rows(view), view.n, view.m), np.float32)
        seen = values[:: 1 if view.row else len(values), :: 1 if view.step else view.n, :: view.unit or view.m]
        self.filled.append((view, np.broadcast_to(seen, values.shape).copy()))
        return view, self.filled[-1][1].astype(np.float64)

    def weight(self, data: np.ndarray, kind: int, shape: tuple[int, ...] | None = None) -> int:
        """The number of a weight [rows, cols], or of a panel's bytes for a ``shape``."""
        held = fenced(data)
        rows, cols = shape or data.shape
        row = data.strides[0]
        stored = library.Weight(held.array.ctypes.data, data.nbytes, 1, rows, cols, row, data.nbytes, kind, 0)
        self.stored.append((stored, held))
        return len(self.stored) - 1

    def vector(self, size: int) -> tuple[int, np.ndarray]:
        values = self.rng.standard_normal((1, size), np.float32)
        return self.weight(values, Kind.F32), values[0].astype(np.float64)

    def array(self, arena: np.ndarray, view: View) -> np.ndarray:
        strides = (4 * view.row, 4 * view.step, 4 * view.unit)
        return as_strided(arena[view.at + self.shift :], (self.rows(view), view.n, view.m), strides)

    @property
    def shift(self) -> int:
        """The arena begins at a multiple of 64 bytes and ends with the last view."""
        return -self.floats % 16

    def run(
        self,
        op: Op,
        views: Sequence[View],
        out: View,
        weights: Sequence[int] = (),
        numbers: Sequence[int] = (),
        reals: Sequence[float] = (),
    ) -> Iterator[np.ndarray]:
        """What ``out`` holds afterwards, float32 [rows, n, m], for all kinds of kernels and with two threads."""
        for isa in library.isas():
            library.use(isa)
            for threads in (1, 2):
                library.threads(threads)
                arena = fenced(np.full(self.floats + self.shift, GUARD, np.float32)).array
                for view, values in self.filled:
                    self.array(arena, view)[:] = values
                before = arena.copy()
                self.once(arena, op, views, weights, numbers, reals)
                result = self.array(arena, out).copy()
                self.array(before, out)[:] = result
                np.testing.assert_array_equal(arena, before, f"{isa}: written outside of the output")
                yield result

    def once(self, arena: np.ndarray, op: Op, views: Sequence[View], weights: Any, numbers: Any, reals: Any) -> None:
        moved = []
        for view in views:
            copy = View.from_buffer_copy(view)
            copy.at += self.shift
            moved.append(copy)
        one = library.Instruction(
            op,
            0,
            (View * library.VIEWS)(*moved),
            (ctypes.c_int32 * library.WEIGHTS)(*weights, *[-1] * (library.WEIGHTS - len(weights))),
            (ctypes.c_int32 * library.NUMBERS)(*numbers),
            (ctypes.c_float * library.REALS)(*reals),
        )
        table = (library.Weight * max(1, len(self.stored)))(*[w for w, _ in self.stored])
        program = library.Program()
        program.instructions, program.instruction_count = (library.Instruction * 1)(one), 1
        program.weights, program.weight_count = table, len(self.stored)
        program.arena, program.arena_floats = arena.ctypes.data, arena.size
        program.chunk, program.vocab, program.context = self.tokens, self.vocab, self.start + self.tokens
        program.ple_row_bytes = self.ple.shape[1]
        library.check(program)
        ple = fenced(self.ple).array
        library.run(program, library.Pass(self.tokens, self.start, self.ids.ctypes.data, ple.ctypes.data, None, 0))


def close(got: np.ndarray, wanted: np.ndarray, tolerance: float = 2e-6) -> None:
    scale = max(1.0, float(np.abs(wanted).max()))
    np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance * scale)


def activated(x: np.ndarray, kind: int) -> np.ndarray:
    if kind == Activation.SILU:
        return x / (1 + np.exp(-x))
    if kind == Activation.GELU_TANH:
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    return np.tanh(x) if kind == Activation.TANH else x


def bf16(x: np.ndarray) -> np.ndarray:
    return (x.view(np.uint32) >> 16).astype(np.uint16)


def widened(x: np.ndarray) -> np.ndarray:
    return (x.astype(np.uint32) << 16).view(np.float32)


shapes = given(
    tokens=st.integers(1, 4), n=st.integers(1, 5), m=SIZES, gaps=st.tuples(GAPS, GAPS), in_place=st.booleans()
)  # fmt: skip


def norm(x: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)


@QUICK
@shapes
def test_norms(tokens: int, n: int, m: int, gaps: Any, in_place: bool) -> None:
    for op in (Op.NORM, Op.LAYER_NORM):
        for weighted in (False, True):
            desk = Desk(tokens, seed=m)
            x, values = desk.input(n, m, gaps[0])
            out = x if in_place else desk.view(n, m, gaps[1])
            w, scale = desk.vector(m) if weighted else (-1, 1.0)
            weights, bias = [w], np.float64(0)
            if op == Op.LAYER_NORM:
                number, bias = desk.vector(m)
                weights, values = [w, number], values - values.mean(-1, keepdims=True)
            for got in desk.run(op, [x, out], out, weights, reals=[1e-5]):
                close(got, norm(values, 1e-5) * scale + bias, 4e-6)


@QUICK
@shapes
def test_magnitudes_and_sparsity(tokens: int, n: int, m: int, gaps: Any, in_place: bool) -> None:
    desk = Desk(tokens, seed=m)
    x, values = desk.input(n, m, gaps[0])
    out = desk.view(n, 1, gaps[1])
    for floor in (0.0, 2.0):
        wanted = np.sqrt(np.maximum((values**2).mean(-1, keepdims=True), floor))
        for got in desk.run(Op.RMS, [x, out], out, reals=[floor]):
            close(got, wanted)
    desk = Desk(tokens, seed=m)
    x, values = desk.input(n, m, gaps[0])
    out = x if in_place else desk.view(n, m, gaps[1])
    least = values.mean(-1, keepdims=True) + 0.7 * values.std(-1, keepdims=True)
    for got in desk.run(Op.GAUSSIAN_TOPK, [x, out], out, reals=[0.7]):
        close(got, np.maximum(values - least, 0))


@QUICK
@shapes
def test_activations(tokens: int, n: int, m: int, gaps: Any, in_place: bool) -> None:
    for kind in Activation:
        desk = Desk(tokens, seed=m)
        x, values = desk.input(n, m, gaps[0])
        out = x if in_place else desk.view(n, m, gaps[1])
        for got in desk.run(Op.ACTIVATION, [x, out], out, numbers=[kind]):
            close(got, activated(values, kind))


ARITHMETIC: dict[Arithmetic, Callable[[Any, Any], np.ndarray]] = {
    Arithmetic.ADD: np.add,
    Arithmetic.SUB: np.subtract,
    Arithmetic.MUL: np.multiply,
    Arithmetic.DIV: np.divide,
}
REPEATS = st.sampled_from(("", "", "n", "m", "nm", "r", "rn", "rnm"))


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 4),
    n=st.integers(1, 5),
    m=SIZES,
    gaps=st.tuples(GAPS, GAPS, GAPS),
    repeats=st.tuples(REPEATS, REPEATS),
    target=st.sampled_from(("new", "a", "b")),
    kind=st.sampled_from(Arithmetic),
    first=st.sampled_from(Activation),
)
def test_arithmetic(tokens: int, n: int, m: int, gaps: Any, repeats: Any, target: str, kind: Any, first: Any) -> None:
    desk = Desk(tokens, seed=m)
    a, left = desk.input(n, m, gaps[0], repeat="" if target == "a" else repeats[0])
    b, right = desk.input(n, m, gaps[1], repeat="" if target == "b" else repeats[1])
    out = {"a": a, "b": b}.get(target) or desk.view(n, m, gaps[2])
    wanted = ARITHMETIC[kind](activated(left, first), right)
    for got in desk.run(Op.BINARY, [a, b, out], out, numbers=[kind, 0, first]):
        np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=2e-6)


@QUICK
@shapes
def test_arithmetic_with_a_number_and_with_weights(tokens: int, n: int, m: int, gaps: Any, in_place: bool) -> None:
    for kind, do in ARITHMETIC.items():
        desk = Desk(tokens, seed=m)
        a, left = desk.input(n, m, gaps[0])
        out = a if in_place else desk.view(n, m, gaps[1])
        number, weights = desk.vector(m)
        for got in desk.run(Op.BINARY, [a, View(), out], out, numbers=[kind, 1, 0], reals=[0.37]):
            np.testing.assert_allclose(got, do(left, np.float32(0.37)), rtol=2e-6)
        for got in desk.run(Op.BINARY, [a, View(), out], out, [number], [kind, 2, Activation.SILU]):
            np.testing.assert_allclose(got, do(activated(left, Activation.SILU), weights), rtol=2e-5, atol=2e-6)


def test_what_is_not_a_number_stays_one() -> None:
    for op, numbers in ((Op.ACTIVATION, [Activation.SILU]), (Op.GAUSSIAN_TOPK, []), (Op.NORM, [])):
        desk = Desk(1)
        x, _ = desk.input(1, 19)
        desk.filled[0][1][0, 0, 17] = np.nan
        out = desk.view(1, 19)
        for got in desk.run(op, [x, out], out, numbers=numbers, reals=[0.1]):
            assert np.isnan(got[0, 0, 17])


@QUICK
@shapes
def test_copies(tokens: int, n: int, m: int, gaps: Any, in_place: bool) -> None:
    for repeat in ("", "n", "m"):
        desk = Desk(tokens, seed=m)
        x, values = desk.input(n, m, gaps[0], repeat=repeat)
        out = desk.view(n, m, gaps[1], one=in_place)
        for got in desk.run(Op.COPY, [x, out], out):
            np.testing.assert_array_equal(got, values[-1:] if in_place else values)


@QUICK
@given(tokens=st.integers(1, 3), n=st.integers(1, 9), k=st.integers(1, 9), m=SIZES, gaps=st.tuples(GAPS, GAPS, GAPS))
def test_small_products(tokens: int, n: int, k: int, m: int, gaps: Any) -> None:
    desk = Desk(tokens, seed=m)
    (a, left), (b, right), out = desk.input(n, k, gaps[0]), desk.input(k, m, gaps[1]), desk.view(n, m, gaps[2])
    for got in desk.run(Op.MATMUL, [a, b, out], out):
        close(got, left @ right)


@QUICK
@given(
    tokens=st.integers(1, 4),
    heads=st.integers(1, 4),
    half=st.integers(1, 35),
    rest=st.integers(0, 9),
    gaps=st.tuples(GAPS, GAPS),
    in_place=st.booleans(),
    start=st.sampled_from((0, 7, 100_000)),
)
def test_rotations(tokens: int, heads: int, half: int, rest: int, gaps: Any, in_place: bool, start: int) -> None:
    desk = Desk(tokens, start, seed=half)
    number, _ = desk.vector(half)
    frequencies = desk.stored[number][1].array[0]
    turn = desk.view(1, 2 * half, (0, gaps[0][0]))
    angles = (np.arange(start, start + tokens, dtype=np.float32)[:, None] * frequencies).astype(np.float64)
    wanted = np.concatenate((np.cos(angles), np.sin(angles)), -1)[:, None] * 1.5
    for got in desk.run(Op.ROTATION, [turn], turn, [number], reals=[1.5]):
        close(got, wanted)

    for neighbours in (0, 1):
        desk = Desk(tokens, start, seed=half)
        turn, angle = desk.input(1, 2 * half)
        x, values = desk.input(heads, 2 * half + rest, gaps[0])
        out = x if in_place else desk.view(heads, 2 * half + rest, gaps[1])
        cos, sin = angle[..., :half], angle[..., half:]
        places = (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if neighbours else (slice(half), slice(half, 2 * half))
        wanted = values.copy()
        wanted[..., places[0]] = values[..., places[0]] * cos - values[..., places[1]] * sin
        wanted[..., places[1]] = values[..., places[1]] * cos + values[..., places[0]] * sin
        for got in desk.run(Op.ROPE, [x, out, turn], out, numbers=[2 * half, neighbours]):
            close(got, wanted)
            np.testing.assert_array_equal(got[..., 2 * half :], values[..., 2 * half :])


@pytest.mark.parametrize("start", [0, 8180, 1 << 20])
def test_temperature(start: int) -> None:
    desk = Desk(30, start)
    x, values = desk.input(3, 21, (1, 2))
    out = desk.view(3, 21)
    positions = np.arange(start, start + 30)
    factor = 1 + 0.1 * np.log1p((positions + 1) // 8192)
    for got in desk.run(Op.TEMPERATURE, [x, out], out, numbers=[8192], reals=[0.1]):
        close(got, values * factor[:, None, None])


@QUICK
@given(tokens=st.integers(1, 5), rows=st.integers(1, 40), cols=st.integers(1, 100), by_position=st.booleans())
def test_rows_of_a_table(tokens: int, rows: int, cols: int, by_position: bool) -> None:
    start = 3 if by_position else 0
    rows += (start + tokens) * by_position
    for kind in (Kind.F32, Kind.BF16, Kind.INT8, Kind.INT4):
        desk = Desk(tokens, start, seed=cols)
        desk.vocab = 1 if by_position else rows
        desk.ids = desk.rng.integers(0, desk.vocab, tokens)
        x = desk.rng.standard_normal((rows, cols), np.float32)
        if kind == Kind.F32:
            table, number = x, desk.weight(x, kind)
        elif kind == Kind.BF16:
            table, number = widened(bf16(x)), desk.weight(bf16(x), kind)
        else:
            name = kind.name.lower()
            codes, scales = quant.quantize(x, name)
            table = quant.dequantize(codes, scales, name, cols)
            number = desk.weight(panels.panels(codes, scales, name), kind, (rows, cols))
        out = desk.view(1, cols, (0, 2))
        wanted = table[start : start + tokens] if by_position else table[desk.ids]
        for got in desk.run(Op.EMBED, [out], out, [number], [int(by_position)]):
            np.testing.assert_array_equal(got[:, 0], wanted)


@QUICK
@given(tokens=st.integers(1, 4), layers=st.integers(1, 5), half=st.integers(1, 40), kind=st.sampled_from(Kind))
def test_per_layer_rows(tokens: int, layers: int, half: int, kind: Kind) -> None:
    dim = 2 * half - (kind != Kind.INT4)
    desk = Desk(tokens, seed=dim)
    x = desk.rng.standard_normal((tokens, layers, dim), np.float32)
    if kind in (Kind.INT8, Kind.INT4):
        desk.ple = quant.quantize_rows(x, kind.name.lower())
        x = quant.dequantize_rows(desk.ple, layers, dim, kind.name.lower())
    else:
        stored = {Kind.F32: x, Kind.BF16: bf16(x), Kind.F16: x.astype(np.float16)}[kind]
        x = widened(stored) if kind == Kind.BF16 else stored.astype(np.float32)
        desk.ple = np.ascontiguousarray(stored).view(np.uint8).reshape(tokens, -1)
    # Rows of a file may be longer than what a program reads of them.
    desk.ple = np.pad(desk.ple, ((0, 0), (0, 3)))
    out = desk.view(layers, dim, (1, 2))
    for got in desk.run(Op.PLE_ROWS, [out], out, numbers=[kind]):
        np.testing.assert_array_equal(got, x)


@QUICK
@given(
    tokens=st.sampled_from((1, 2, 3, 4, 5, 11, 12, 13, 100)),
    rows=st.integers(1, 50),
    cols=st.one_of(st.integers(1, 40), st.sampled_from((255, 256, 257, 512, 777))),
    kind=st.sampled_from((Kind.F32, Kind.BF16)),
    gap=st.integers(0, 5),
)
def test_products_with_plain_weights(tokens: int, rows: int, cols: int, kind: Kind, gap: int) -> None:
    """Right, and of a token the same bits whatever others it comes with."""
    w = np.random.default_rng(rows).standard_normal((rows, cols), np.float32)
    stored = bf16(w) if kind == Kind.BF16 else w
    wide = widened(stored) if kind == Kind.BF16 else w

    def products(first: int, count: int) -> list[np.ndarray]:
        desk = Desk(count)
        number = desk.weight(stored, kind)
        x, _ = desk.input(1, cols, (0, gap))
        desk.filled[0][1][:] = values[first : first + count]
        out = desk.view(1, rows, (0, gap))
        return [got[:, 0] for got in desk.run(Op.LINEAR, [x, out], out, [number], [1])]

    values = np.random.default_rng(cols).standard_normal((tokens, 1, cols), np.float32)
    together, alone = products(0, tokens), products(tokens - 1, 1)
    exact = values[:, 0].astype(np.float64) @ wide.T.astype(np.float64)
    most = np.abs(values[:, 0]) @ np.abs(wide.T)
    for got, last in zip(together, alone, strict=True):
        assert (np.abs(got - exact) <= 1e-6 * most).all()
        np.testing.assert_array_equal(got[-1:], last)
