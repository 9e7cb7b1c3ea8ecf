"""Programs of the native engine compute what the graph says, in no more memory than it takes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from time import process_time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.engine.native.compile import LAYOUT, Compiled, compiled
from edge.engine.native.library import Activation, Instruction, Op
from edge.engine.native.lower import Lowering
from edge.engine.native.plan_memory import lifetimes, place
from edge.engine.native.values import ARENA, overlap
from loaders.network.graph import Graph, Node, Recorded, Recorder, replay
from loaders.network.ops import Want
from loaders.network.rotary import frequencies
from loaders.network.tensors import PLE_TABLE, tensors
from tests.makers import prompt
from tests.native_machine import CONTEXT, Machine, activated, capacity, instructions
from tests.shrink import DISTINCT, NAMES, parse, real
from tests.test_graph import Player, made, small

WANTS: tuple[Want, ...] = ("all", "last", "none")
# More tokens than most windows of the shrunk models, in passes shorter than the chunk and as long as it.
CHUNK = 11
PLAN: tuple[tuple[int, Want], ...] = ((9, "all"), (11, "none"), (1, "none"), (5, "last"), (1, "last"), (1, "all"))
FEW = ("gemma-3n-E2B", "gemma-4-E2B", "deepseek-v3")
IN_PLACE = {
    *(Op.BINARY, Op.NORM, Op.LAYER_NORM, Op.ROPE, Op.TEMPERATURE, Op.ACTIVATION, Op.GAUSSIAN_TOPK),
}


def plain(name: str) -> str:
    """All weights as they are."""
    return "F32"


def mixed(name: str) -> str:
    """Matrices in every format, so that some of one value are done together and others are not."""
    part = name.rsplit(".", 2)[-2:]
    return ("int4", "int8", "BF16", "int4")[sum(map(ord, "".join(part))) % 4]


@cache
def programs(name: str, stored: Callable[[str], str]) -> dict[Want, Compiled]:
    return {want: compiled(small(name), stored, want) for want in WANTS}


def weights_of(player: Player) -> dict[str, np.ndarray]:
    return {name: weight.numpy() for name, weight in player.weights.items()}


@pytest.mark.parametrize("name", DISTINCT)
@pytest.mark.parametrize("stored", [plain, mixed])
def test_programs_compute_what_the_graph_does(name: str, stored: Callable[[str], str]) -> None:
    player = made(name, CONTEXT)
    weights, caches, start = weights_of(player), {}, 0
    machines = {want: Machine(p, weights, CHUNK, stored) for want, p in programs(name, stored).items()}
    ids = prompt(player.model.vocab, sum(size for size, _ in PLAN))
    for size, want in PLAN:
        part = ids[start : start + size]
        expected, rows = player.run(part, want), player.rows(part)
        with np.errstate(invalid="ignore", over="ignore"):
            found = machines[want].run(part, start, None if rows is None else rows.numpy(), caches)
        start += size
        if expected is not None:
            assert found.shape == expected.shape
            assert np.abs(found - expected).max() <= 2e-5 * np.abs(expected).max()
    assert all(len(k) == len(ids) for k, _ in caches.values())


@pytest.mark.parametrize(
    ("name", "want"), [*[(n, "last") for n in NAMES], *[(n, w) for n in FEW for w in ("all", "none")]]
)
def test_programs_hang_together(name: str, want: Want) -> None:
    """At full size too: weights of any pass are one table, values that live at once lie apart, no step overwrites what
    it has yet to read.
    """
    model = parse(real(name))
    program = compiled(model, mixed, want)
    assert program.weights == tuple(name for name in tensors(model) if name != PLE_TABLE)
    assert program.caches == tuple(i for i, layer in enumerate(model.layers) if layer.attention.kv_from is None)
    used = {w for step in program.steps for w in step.weights}
    assert want == "none" or used - {-1} == set(range(len(program.weights) + len(program.constants)))
    turns = [layer.attention.rope for layer in model.layers if layer.attention.rope is not None]
    assert all(any(np.array_equal(frequencies(t), c) for c in program.constants) for t in turns)
    assert sum(step.op == Op.ROTATION for step in program.steps) <= 2 * len(program.constants)
    quantized = [step.views[0] for step in program.steps if step.op == Op.QUANTIZE]
    assert len(quantized) <= sum(step.op in (Op.LINEAR, Op.HEAD_LINEAR) for step in program.steps)
    check_apart(program)
    check_steps(program)
    arena = program.arena_floats(64, capacity) - program.scratch_floats(capacity)
    assert arena <= 1.3 * live_floats(program, 64)


def check_apart(program: Compiled) -> None:
    """Buffers in use at the same time share no memory, and lie inside their region."""
    for one, limit in ((False, program.row_floats), (True, program.one_floats)):
        found = [b for b in lifetimes(program.steps) if b.one is one]
        first, last, start = (np.array([getattr(b, key) for b in found]) for key in ("first", "last", "place"))
        stop = start + np.array([b.floats for b in found], np.int64)
        assert not found or (start.min() == 0 and limit - 16 < stop.max() <= limit)
        assert not (start % 16).any()
        together = (first[:, None] <= last) & (first <= last[:, None])
        share = (start[:, None] < stop) & (start < stop[:, None])
        assert (together & share).sum() == len(found)


def check_steps(program: Compiled) -> None:
    """What is written is what is read, place by place, or none of it."""
    for step in program.steps:
        outs = {Op.LINEAR: range(1, len(step.views)), Op.BINARY: (2,), Op.MATMUL: (2,), Op.EXPERTS: (2, 3)}
        alone = step.op in (Op.EMBED, Op.PLE_ROWS, Op.ROTATION)
        places = () if step.op == Op.APPEND else (0,) if alone else outs.get(step.op, (1,))
        for i in places:
            for j, read in enumerate(step.views):
                written = step.views[i]
                assert written is not None
                if j != i and read is not None and read.buffer is written.buffer and overlap(read, written):
                    assert read == written
                    assert step.op in IN_PLACE


def live_floats(program: Compiled, chunk: int) -> int:
    """The most that is in use at once."""
    change = np.zeros(len(program.steps) + 1, np.int64)
    for b in lifetimes(program.steps):
        size = b.floats if b.one else b.floats * chunk
        change[b.first] += size
        change[b.last + 1] -= size
    return int(change.cumsum().max())


def test_what_can_be_is_done_on_the_way() -> None:
    """Gemma 3n: one product for q, k and v and one for gate and up; streams are updated where they lie."""
    program = compiled(parse(real("gemma-3n-E2B")), lambda name: "int4", "all")
    counts = {op: sum(step.op == op for step in program.steps) for op in Op}
    assert [step.numbers[0] for step in program.steps if step.op == Op.LINEAR].count(4) == 20
    assert counts[Op.COPY] == 0
    assert counts[Op.ROTATION] == 2
    assert counts[Op.ACTIVATION] == 2 * 30, "of AltUp's routers: the others are done by products"
    last = program.steps[-3:]
    assert [step.op for step in last] == [Op.LINEAR, Op.BINARY, Op.BINARY]
    assert all(v is None or v.buffer.space != ARENA for step in last[1:] for v in step.views)


def test_instructions_say_what_steps_do() -> None:
    assert ctypes.sizeof(Instruction) == LAYOUT.size
    program = programs("deepseek-v3", mixed)["last"]
    for step, found in zip(program.steps, instructions(program, CHUNK), strict=True):
        assert found.op == step.op
        for view, final in zip(step.views, program.views(step, CHUNK, capacity), strict=True):
            there = found.view[step.views.index(view)]
            assert final is None or final == tuple(getattr(there, field) for field in final._fields)
        assert all(v.m == 0 for v in found.view[len(step.views) :])
        assert found.weight == [*step.weights, *[-1] * (4 - len(step.weights))]
        assert found.number == [*step.numbers, *[0] * (8 - len(step.numbers))]
        assert found.real == [*map(np.float32, step.reals), *[0.0] * (4 - len(step.reals))]


def test_compiling_is_quick() -> None:
    model = parse(real("gemma-3n-E2B"))
    times = []
    for _ in range(3):
        start = process_time()
        compiled(model, mixed, "last")
        times.append(process_time() - start)
    assert min(times) < 0.2


def test_an_unknown_operator_is_named() -> None:
    graph = Graph({"ids": ("t",)}, {"w": (8, 4)}, [], "%1")
    graph.nodes = [Node("embed", ("w", "ids"), {}, "%0", ("t", 4)), Node("erf", ("%0",), {}, "%1", ("t", 4))]
    with pytest.raises(AssertionError, match="erf"):
        Lowering(graph, {"w": 0}, {}, plain).run()


class Sketch(Recorder):
    """Graphs that no model has, of values between -1 and 1 or so."""

    def __init__(self) -> None:
        self.graph = Graph()
        self._table = {"table": (5, 8), "vector": (8,), **{f"w{i}": (8, 8) for i in range(4)}}
        self.pool: list[Recorded] = []
        embedded = self.embed(self.weight("table"), self.input("ids", ("t",)))
        self.pool += [embedded, self.reshape(embedded, (-1, 2, 4))]

    def pick(self, k: int, shape: tuple[Any, ...] | None = None, rank: int | None = None) -> Recorded:
        """One of the values so far, of a shape or of so many axes: later ones more often."""
        fit = [x for x in self.pool if shape in (None, x.shape) and rank in (None, len(x.shape))]
        return fit[-1 - k % len(fit)] if k % 3 else fit[k % len(fit)]

    def grow(self, what: int, j: int, k: int) -> None:
        """One more value."""
        a = self.pick(j)
        b = self.pick(k, a.shape)
        flat, cube = self.pick(j, ("t", 8)), self.pick(j, ("t", 2, 4))
        made: list[Callable[[], Recorded]] = [
            lambda: a * b,
            lambda: (a + b) * 0.5,
            lambda: self.tanh(a) - b * 0.5,
            lambda: self.activation(a, "silu") * b,
            lambda: b * self.activation(a, "gelu_tanh"),
            lambda: self.norm(a, None, 1.0),
            lambda: self.tanh(a),
            lambda: self.activation(a, "silu"),
            lambda: self.concat([cube, self.pick(k, cube.shape)], 2),
            lambda: a * self.rms(a, 0.01),
            lambda: self.linear(flat, self.weight(f"w{k % 4}")),
            lambda: (flat + self.weight("vector")) * 0.5,
            lambda: self.reshape(flat, (-1, 2, 4)),
            lambda: self.reshape(cube, (-1, 8)),
            lambda: self.slice(cube, 1, k % 2, k % 2 + 1) * self.slice(cube, 2, k % 4, k % 4 + 1),
            lambda: self.slice(cube, 1, k % 2, k % 2 + 1) * self.pick(k, ("t", 2, 4)),
            lambda: self.concat([self.slice(flat, 1, 0, k % 7 + 1), self.slice(self.tanh(flat), 1, k % 7 + 1, 8)], 1),
            lambda: self.concat([self.slice(cube, 1, 0, 1), self.tanh(self.slice(cube, 1, 1, 2))], 1),
            lambda: self.concat(
                [self.tanh(self.slice(cube, 1, 0, 1)), self.slice(self.pick(k, cube.shape), 1, 1, 2)], 1
            ),
            lambda: self.concat([self.tanh(self.slice(cube, 2, 0, 3)), self.slice(cube, 2, 3, 4) * 0.5], 2),
            lambda: self.concat(
                [self.reshape(self.linear(flat, self.weight(f"w{i}")), (-1, 1, 8)) for i in (0, k % 4)], 1
            ),
        ]
        found = made[what % len(made)]()
        self.pool.append(found)
        if found.shape == ("t", 2, 8):
            self.pool.append(self.reshape(self.slice(found, 1, k % 2, k % 2 + 1), (-1, 8)))

    def end(self, picks: list[int], last: bool) -> None:
        """The output: some of the values, as they are or of the last token."""
        chosen = [self.pick(k) for k in picks]
        flat = [self.reshape(x, (-1, int(np.prod(x.shape[1:])))) for x in chosen]
        out = self.concat([self.last(x) for x in flat] if last else flat, 1)
        self.graph.output = (self.tanh(out / 2.0) * 2.0).name


class Arrays:
    """The operators that sketches use."""

    embed = staticmethod(lambda table, ids: table[ids])
    linear = staticmethod(lambda x, w: x @ w.T)
    norm = staticmethod(lambda x, w, eps: x / np.sqrt(np.square(x).mean(-1, keepdims=True) + eps))
    rms = staticmethod(lambda x, floor: np.sqrt(np.maximum(np.square(x).mean(-1, keepdims=True), floor)))
    activation = staticmethod(lambda x, kind: activated(x, Activation[kind.upper()]))
    tanh = staticmethod(np.tanh)
    reshape = staticmethod(np.reshape)
    concat = staticmethod(np.concatenate)
    slice = staticmethod(lambda x, axis, start, stop: np.take(x, range(start, stop), axis))
    last = staticmethod(lambda x: x[-1:])


NUMBERS = st.integers(0, 99)


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS), min_size=3, max_size=30),
    st.lists(NUMBERS, min_size=1, max_size=5),
    st.booleans(),
    st.sampled_from((plain, mixed)),
)
def test_any_graph(
    nodes: list[tuple[int, int, int]], picks: list[int], last: bool, stored: Callable[[str], str]
) -> None:
    """Whatever is written over whatever, put together from pieces, cut up and read again."""
    sketch, rng = Sketch(), np.random.default_rng(0)
    for node in nodes:
        sketch.grow(*node)
    sketch.end(picks, last)
    weights = {name: rng.uniform(-1, 1, shape).astype(np.float32) for name, shape in sketch._table.items()}
    weights.update({name: w / np.abs(w).sum(1, keepdims=True) for name, w in weights.items() if name.startswith("w")})
    names, graph = tuple(weights), sketch.graph
    steps = Lowering(graph, {name: i for i, name in enumerate(names)}, {}, stored).run()
    rows, ones = place(steps)
    program = Compiled(tuple(steps), names, (), (), rows, ones, last, int(graph.nodes[-1].shape[1]))
    check_apart(program)
    check_steps(program)
    ids = np.array([3, 0, 4])
    expected = replay(graph, Arrays, weights.__getitem__, {"ids": ids}, SimpleNamespace(positions=ids))
    found = Machine(program, weights, 4, stored).run(ids, 0, None, {})
    assert np.abs(found - expected).max() < 1e-5
