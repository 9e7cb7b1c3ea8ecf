"""ROUTE and EXPERTS of the native engine against float64: who is chosen, what they count, and nobody else is read.

A missing compiled file is a failure here: without it nothing below would be tested.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from edge.engine.native import library
from edge.engine.native.library import BLOCK, PANEL, QUANT_FLOATS, Activation, Kind, Op, View, Weight
from edge.engine.torch_experts import route
from loaders.network.spec import Router

# What memory holds that nobody may use; it shows in the result.
GUARD, GAP = np.float32(np.nan), 16
QUANTIZED = (Kind.INT8, Kind.INT4)
MIXED = ((Kind.INT4, Kind.INT8), (Kind.INT8, Kind.BF16), (Kind.F32, Kind.INT4))
PAIRS = (*((kind, kind) for kind in (Kind.F32, Kind.BF16, *QUANTIZED)), *MIXED)


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    yield
    library.use()
    library.threads(1)


class Stack(NamedTuple):
    """Matrices as the engine has them, each in pages of its own, and what they stand for: float64 [n, rows, cols]."""

    there: Weight
    values: np.ndarray
    pages: np.ndarray

    def keep(self, weights: np.ndarray) -> None:
        """From now on reading one that no token has a weight for ends the process."""
        protect = ctypes.CDLL(None).mprotect
        protect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        for i in np.flatnonzero(~weights.any(0)).tolist():
            assert protect(self.there.data + i * self.there.matrix, self.there.matrix, 0) == 0


def stored(data: np.ndarray, kind: Kind, values: np.ndarray, row: int) -> Stack:
    n, rows, cols = values.shape
    data = np.ascontiguousarray(data).view(np.uint8).reshape(n, -1)
    step = -(-data.shape[1] // mmap.PAGESIZE) * mmap.PAGESIZE
    pages = np.frombuffer(mmap.mmap(-1, n * step), np.uint8).reshape(n, step)
    pages[:, : data.shape[1]] = data
    there = Weight(pages.ctypes.data, pages.size - step + data.shape[1], n, rows, cols, row, step, kind)
    return Stack(there, values.astype(np.float64), pages)


def panels(rng: np.random.Generator, kind: Kind, n: int, rows: int, cols: int) -> Stack:
    """Random codes and scales in panels of 16 rows, beyond the last row and column too."""
    count, nb = -(-rows // PANEL), -(-cols // BLOCK)
    most = 127 if kind == Kind.INT8 else 7
    codes = rng.integers(-most, most + 1, (n, count, PANEL, nb, BLOCK), np.int8)
    scales = (rng.standard_normal((n, count, PANEL, nb)) * (3 / most / cols**0.5)).astype(np.float16)
    values = (codes * scales.astype(np.float32)[..., None]).reshape(n, count * PANEL, -1)[:, :rows, :cols]
    if kind == Kind.INT4:
        codes = (codes + 8).astype(np.uint8)
        codes = codes[..., :16] | codes[..., 16:] << 4
    # Four columns of a row, then those of the next row.
    lines = codes.reshape(n, count, PANEL, nb, -1, 4).transpose(0, 1, 3, 4, 2, 5)
    lines = np.ascontiguousarray(lines).view(np.uint8).reshape(n, count, nb, -1)
    scales = np.ascontiguousarray(scales.swapaxes(2, 3)).view(np.uint8)
    data = np.concatenate([scales, lines], 3)
    return stored(data, kind, values, nb * data.shape[3])


def stack(rng: np.random.Generator, kind: Kind, n: int, rows: int, cols: int) -> Stack:
    if kind in QUANTIZED:
        return panels(rng, kind, n, rows, cols)
    values = (rng.standard_normal((n, rows, cols)) / cols**0.5).astype(np.float32)
    if kind == Kind.F32:
        return stored(values, kind, values, cols * 4)
    values = (values.view(np.uint32) & 0xFFFF0000).view(np.float32)
    return stored((values.view(np.uint32) >> 16).astype(np.uint16), kind, values, cols * 2)


class Desk:
    """An arena of values with guards between them and their rows."""

    def __init__(self, tokens: int, one: bool = False) -> None:
        self.tokens, self.one, self.rows = tokens, one, 1 if one else tokens
        self.floats, self.filled = GAP, list[tuple[View, np.ndarray]]()

    def view(self, m: int, values: np.ndarray | None = None, gap: int = 3) -> View:
        """[rows, 1, m], the last of ``values`` in it."""
        view = View(at=self.floats, row=m + gap, step=m, n=1, m=m, unit=1, one=self.one)
        self.floats += -(-self.rows * view.row // GAP) * GAP + GAP
        if values is not None:
            self.filled.append((view, values[-self.rows :]))
        return view

    def array(self, arena: np.ndarray, view: View) -> np.ndarray:
        return np.lib.stride_tricks.as_strided(arena[view.at :], (self.rows, view.m), (4 * view.row, 4))

    def run(
        self, op: Op, views: list[View], weights: list[Stack], numbers: list[int], real: float, written: list[View]
    ) -> np.ndarray:
        """One pass of one instruction; all but the ``written`` stays as it was. Returns the first of those."""
        room = np.full(self.floats + GAP, GUARD, np.float32)
        arena = room[(-room.ctypes.data // 4) % GAP :][: self.floats]
        for view, values in self.filled:
            self.array(arena, view)[:] = values
        before = arena.copy()
        one = library.Instruction(op=op, view=(View * library.VIEWS)(*views))
        one.weight[:] = [i if i < len(weights) else -1 for i in range(library.WEIGHTS)]
        one.number[: len(numbers)] = numbers
        one.real[0] = real
        program = library.Program(
            instructions=(library.Instruction * 1)(one),
            weights=(Weight * 3)(*[held.there for held in weights]),
            **{"instruction_count": 1, "weight_count": len(weights), "vocab": 1, "context": self.tokens},
            **{"arena": arena.ctypes.data, "arena_floats": len(arena), "chunk": self.tokens},
        )
        ids, out = np.zeros(self.tokens, np.int64), np.zeros(1, np.float32)
        library.check(program)
        library.run(program, library.Pass(tokens=self.tokens, ids=ids.ctypes.data, out=out.ctypes.data))
        result = self.array(arena, written[0]).copy()
        for view in written:
            self.array(before, view)[:] = self.array(arena, view)
        np.testing.assert_array_equal(arena.view(np.int32), before.view(np.int32), "written outside of the output")
        return result


def machines() -> Iterator[str]:
    for name in library.isas():
        yield library.use(name)


# ---- ROUTE


class Routing(NamedTuple):
    experts: int
    active: int
    router: Router


def routed(logits: np.ndarray, bias: np.ndarray | None, spec: Routing) -> np.ndarray:
    """The weights [t, experts], by the instruction."""
    desk, router = Desk(len(logits)), spec.router
    views = [desk.view(spec.experts, logits), desk.view(spec.experts, gap=5)]
    numbers = [spec.active, router.score == "sigmoid", router.normalized, router.groups, router.active_groups]
    held = [] if bias is None else [stored(bias, Kind.F32, bias[None, None], 4 * spec.experts)]
    return desk.run(Op.ROUTE, views, held, numbers, router.scale, views[1:])


def oracle(logits: np.ndarray, bias: np.ndarray | None, spec: Routing) -> tuple[np.ndarray, float]:
    """The weights of one token in float64, and the smallest difference that decided between two that are not equal."""
    x, router = logits.astype(np.float64), spec.router

    def highest(values: np.ndarray, count: int) -> np.ndarray:
        return np.argsort(-values, kind="stable")[:count]

    e = np.exp(x - x.max())
    scores = e / e.sum() if router.score == "softmax" else 1 / (1 + np.exp(-x))
    by_logits = bias is None and (router.score == "sigmoid" or router.groups == 1)
    choice = x if by_logits else scores if bias is None else scores + bias
    gaps = [np.inf, *([] if by_logits else np.diff(np.unique(choice)))]
    if router.groups > 1:
        totals = np.sort(choice.reshape(router.groups, -1), 1)[:, -2:].sum(1)
        gaps += np.diff(np.unique(totals)).tolist()
        kept = np.isin(np.arange(router.groups), highest(totals, router.active_groups))
        choice = np.where(np.repeat(kept, spec.experts // router.groups), choice, -np.inf)
    chosen = np.isin(np.arange(spec.experts), highest(choice, spec.active))
    out = np.where(chosen, scores, 0)
    return (out / (out.sum() + 1e-20) if router.normalized else out) * router.scale, min(gaps)


@st.composite
def routings(draw: st.DrawFn) -> Routing:
    groups, size = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    kept = draw(st.integers(1, groups))
    score, scale = draw(st.sampled_from(["softmax", "sigmoid"])), draw(st.sampled_from([1.0, 2.5]))
    router = Router(score, draw(st.booleans()), scale, groups=groups, active_groups=kept)  # type: ignore[arg-type]
    return Routing(groups * size, draw(st.integers(1, kept * size)), router)


@settings(max_examples=100, deadline=None)
@given(routings(), st.sampled_from([0.1, 1.0, 40.0]), st.booleans(), st.integers(0, 2**32 - 1))
def test_who_is_chosen(spec: Routing, spread: float, biased: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    # Few values, so that many are equal.
    logits = (rng.choice(rng.standard_normal(6), (3, spec.experts)) * spread).astype(np.float32)
    bias = rng.choice(rng.standard_normal(3), spec.experts).astype(np.float32) if biased else None
    rows, gaps = zip(*(oracle(row, bias, spec) for row in logits), strict=True)
    assume(min(gaps) > 1e-5)
    wanted = np.stack(rows)
    for _ in machines():
        found = routed(logits, bias, spec)
        assert not found[wanted == 0].any()
        # A score that is 0 in float32 may be more of a sum that is nearly as small.
        assert found[wanted > 1e-15].all()
        np.testing.assert_allclose(found, wanted, rtol=3e-5, atol=1e-9)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("experts", "groups", "kept"), [(128, 1, 1), (128, 8, 3), (64, 64, 9)])
def test_the_same_as_in_torch(score: str, normalized: bool, biased: bool, experts: int, groups: int, kept: int) -> None:
    spec = Routing(experts, 7, Router(score, normalized, 2.5, biased, groups, kept))  # type: ignore[arg-type]
    rng = np.random.default_rng(5)
    logits = (rng.standard_normal((40, experts)) * 3).astype(np.float32)
    bias = rng.standard_normal(experts).astype(np.float32) if biased else None
    held = None if bias is None else torch.from_numpy(bias)
    expected = route(torch.from_numpy(logits), held, spec.active, spec.router).numpy()
    for _ in machines():
        found = routed(logits, bias, spec)
        assert ((found != 0) == (expected != 0)).all()
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_what_a_score_cannot_tell_apart() -> None:
    """Sigmoids above 17 are all 1 in float32; of those that are equal the first are chosen."""
    logits, spec = np.array([[20, 30, 25, 40, -5]], np.float32), Routing(5, 2, Router("sigmoid"))
    for _ in machines():
        assert routed(logits, None, spec).tolist() == [[0, 1, 0, 1, 0]]
        assert routed(logits * 0, None, spec).tolist() == [[0.5, 0.5, 0, 0, 0]]


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("at", range(4))
def test_what_is_no_number_is_chosen(score: str, at: int) -> None:
    logits = np.array([[3, 2, 1, 0]], np.float32)
    logits[0, at] = np.nan
    for _ in machines():
        found = routed(logits, None, Routing(4, 2, Router(score, normalized=True)))  # type: ignore[arg-type]
        assert np.isnan(found).sum() == 2


# ---- EXPERTS


@dataclass(frozen=True)
class Mixture:
    """An instruction: its sizes and its kinds of weights, gate and up of the first."""

    dim: int
    width: int
    experts: int
    active: int
    kinds: tuple[Kind, Kind]
    activation: Activation = Activation.SILU
    on_input: bool = False
    one: bool = False

    def stacks(self, rng: np.random.Generator) -> list[Stack]:
        inner = [stack(rng, self.kinds[0], self.experts, self.width, self.dim) for _ in range(2)]
        return [*inner, stack(rng, self.kinds[1], self.experts, self.dim, self.width)]

    def scratch(self) -> int:
        """Floats a token that the instruction is promised to need at most."""
        sizes = zip((self.dim, self.width), self.kinds, strict=True)
        rows = sum(-(-cols // BLOCK) * QUANT_FLOATS if kind in QUANTIZED else cols for cols, kind in sizes)
        return -(-(self.active * (rows + 2 * self.width + self.dim) + 4 * self.experts + 64) // 16) * 16

    def tolerance(self) -> float:
        return 3e-4 if {*self.kinds} & {*QUANTIZED} else 1e-5


def shares(rng: np.random.Generator, tokens: int, spec: Mixture) -> np.ndarray:
    """Weights as ROUTE gives them: at most ``active`` of a token are not 0; of some tokens fewer, of a few none."""
    weights = np.zeros((tokens, spec.experts), np.float32)
    for row in weights:
        count = spec.active if rng.random() < 0.8 else rng.integers(0, spec.active + 1)
        row[rng.choice(spec.experts, count, replace=False)] = rng.uniform(0.1, 2, count)
    return weights


def computed(spec: Mixture, stacks: list[Stack], x: np.ndarray, weights: np.ndarray, short: int = 0) -> np.ndarray:
    """out [t, dim], by the instruction. ``short``: floats that its scratch lacks."""
    desk = Desk(len(x), spec.one)
    views = [desk.view(spec.dim, x), desk.view(spec.experts, weights, 5), desk.view(spec.dim, gap=7)]
    views.append(desk.view(spec.scratch() - short, gap=0))
    return desk.run(Op.EXPERTS, views, stacks, [spec.active, spec.activation, spec.on_input], 0, views[2:])


def activated(x: np.ndarray, kind: Activation) -> np.ndarray:
    if kind == Activation.SILU:
        return x / (1 + np.exp(-x))
    if kind == Activation.GELU_TANH:
        return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    return np.tanh(x) if kind == Activation.TANH else x


def exact(spec: Mixture, stacks: list[Stack], x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """What should come out. Experts that no token chose cannot be read from now on."""
    gate, up, down = (held.values for held in stacks)
    out = np.zeros(x.shape)
    for token, expert in np.argwhere(weights):
        share = float(weights[token, expert])
        row = x[token] * (share if spec.on_input else 1.0)
        hidden = activated(gate[expert] @ row, spec.activation) * (up[expert] @ row)
        out[token] += down[expert] @ hidden * (1.0 if spec.on_input else share)
    for held in stacks:
        held.keep(weights)
    return out


def assert_near(found: np.ndarray, wanted: np.ndarray, tolerance: float) -> None:
    assert np.abs(found - wanted).max() <= tolerance * max(np.abs(wanted).max(), 1e-3)


@pytest.mark.parametrize("kinds", PAIRS)
@pytest.mark.parametrize("on_input", [False, True])
def test_every_kind_of_weight(kinds: tuple[Kind, Kind], on_input: bool) -> None:
    """A chunk is its tokens one by one, and threads change nothing."""
    spec, rng = Mixture(72, 44, 11, 3, kinds, on_input=on_input), np.random.default_rng(1)
    x, weights, stacks = rng.standard_normal((37, 72), np.float32), shares(rng, 37, spec), spec.stacks(rng)
    weights[:, [0, 4, 5, 10]] = 0
    wanted = exact(spec, stacks, x, weights)
    for _ in machines():
        library.threads(1)
        found = computed(spec, stacks, x, weights)
        assert_near(found, wanted, spec.tolerance())
        alone = np.concatenate([computed(spec, stacks, x[t : t + 1], weights[t : t + 1]) for t in range(5)])
        assert_near(alone, wanted[:5], spec.tolerance())
        assert (alone == found[:5]).all() or not {*kinds} <= {*QUANTIZED}
        for threads in (2, 5):
            library.threads(threads)
            assert (computed(spec, stacks, x, weights) == found).all()


@st.composite
def mixtures(draw: st.DrawFn) -> Mixture:
    sizes, experts = st.integers(1, 70), draw(st.integers(1, 9))
    active, kinds = draw(st.integers(1, experts)), draw(st.sampled_from(PAIRS))
    rest = draw(st.sampled_from(Activation)), draw(st.booleans()), draw(st.booleans())
    return Mixture(draw(sizes), draw(sizes), experts, active, kinds, *rest)


@settings(max_examples=80, deadline=None)
@given(mixtures(), st.integers(1, 40), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_any_shape(spec: Mixture, tokens: int, threads: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    library.threads(threads)
    x, weights = rng.standard_normal((tokens, spec.dim), np.float32), shares(rng, tokens, spec)
    stacks, last = spec.stacks(rng), tokens - 1 if spec.one else 0
    wanted = exact(spec, stacks, x[last:], weights[last:])
    for _ in machines():
        # Products of few columns can nearly cancel: what is lost is a part of what was added.
        assert_near(computed(spec, stacks, x, weights), wanted, spec.tolerance() * 10)


@pytest.mark.parametrize("kind", [Kind.INT4, Kind.BF16])
def test_eight_of_128(kind: Kind) -> None:
    """One token, as most passes are, and the threads that share its experts."""
    spec, rng = Mixture(96, 80, 128, 8, (kind, kind), Activation.GELU_TANH), np.random.default_rng(2)
    x, logits, stacks = rng.standard_normal((1, 96), np.float32), rng.standard_normal((1, 128)), spec.stacks(rng)
    weights = routed(logits, None, Routing(128, 8, Router("softmax", normalized=True)))
    wanted = exact(spec, stacks, x, weights)
    for _ in machines():
        for threads in (1, 4):
            library.threads(threads)
            assert_near(computed(spec, stacks, x, weights), wanted, spec.tolerance())


@pytest.mark.parametrize("kind", [Kind.INT8, Kind.F32])
def test_weights_that_nobody_promised(kind: Kind) -> None:
    """A token's first ``active`` experts are taken, for which there is room; nobody where all are 0."""
    spec, rng = Mixture(40, 24, 9, 2, (kind, kind)), np.random.default_rng(3)
    x, stacks, weights = rng.standard_normal((20, 40), np.float32), spec.stacks(rng), np.ones((20, 9), np.float32)
    first = np.where(np.arange(9) < 2, weights, 0)
    wanted = exact(spec, stacks, x, first)
    for _ in machines():
        assert_near(computed(spec, stacks, x, weights), wanted, spec.tolerance())
        assert not computed(spec, stacks, x, weights * 0).any()


@pytest.mark.parametrize("kind", [Kind.INT8, Kind.F32])
def test_what_is_no_number_shows_in_its_token(kind: Kind) -> None:
    spec, rng = Mixture(40, 24, 5, 2, (kind, kind)), np.random.default_rng(4)
    x, weights = rng.standard_normal((6, 40), np.float32), np.tile(np.array([0, 1, 0, 1, 0], np.float32), (6, 1))
    x[1, 7], weights[2, 3] = np.nan, np.nan
    stacks = spec.stacks(rng)
    for _ in machines():
        found = np.isnan(computed(spec, stacks, x, weights))
        assert found.all(1).tolist() == found.any(1).tolist() == [False, True, True, False, False, False]


def test_scratch_that_is_too_small() -> None:
    spec, rng = Mixture(40, 24, 9, 2, (Kind.INT4, Kind.BF16)), np.random.default_rng(5)
    with pytest.raises(AssertionError, match="scratch"):
        computed(spec, spec.stacks(rng), np.ones((3, 40), np.float32), np.ones((3, 9), np.float32), short=16)


def test_scratch_that_is_not_its_own() -> None:
    """Places in it are followed: nothing else may lie there."""
    spec, rng = Mixture(40, 24, 9, 2, (Kind.INT4, Kind.BF16)), np.random.default_rng(5)
    desk, scratch = Desk(3), spec.scratch()
    views = [desk.view(size) for size in (spec.dim, spec.experts, spec.dim)] + [desk.view(scratch, gap=0)]
    views[0].at = views[3].at + 2 * scratch
    with pytest.raises(AssertionError, match="overlap"):
        desk.run(Op.EXPERTS, views, spec.stacks(rng), [spec.active, spec.activation, 0], 0, views[2:])
