"""A model as a program: the recorded graph lowered to instructions over one arena, planned once for any chunk.

Whoever runs it says how many tokens a pass has at most and how long caches are; then every view has its final place.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from edge.engine.native.library import NUMBERS, REALS, VIEWS, WEIGHTS, Instruction, Op
from edge.engine.native.lower import Lowering, Step, Turn, turn
from edge.engine.native.plan_memory import aligned, place
from edge.engine.native.values import ARENA, OUTPUT, Layout
from loaders.network.graph import record
from loaders.network.ops import Want
from loaders.network.rotary import frequencies
from loaders.network.spec import Model, Rope
from loaders.network.tensors import PLE_TABLE, tensors

Capacity = Callable[[int], int]
# Keys that one piece of attention goes through.
RANGE = 512
# program.h's Instruction, as C lays it out; a View is three int64 and six int32.
LAYOUT = struct.Struct("@ii" + VIEWS * "qqqiiiiii" + f"{WEIGHTS}i{NUMBERS}i{REALS}f")
NO_VIEW = (0,) * 9


class View(NamedTuple):
    """program.h's, in its order."""

    at: int
    row: int
    step: int
    n: int
    m: int
    unit: int
    one: int
    space: int
    unused: int


@dataclass(frozen=True)
class Compiled:
    """``weights`` and ``constants`` (float32 vectors) make the table of weights, the same for any ``want``; ``caches``
    are the layers that own one, in the order of their numbers, as long as a ``want`` of none or more fills them all.

    ``row_floats`` of the arena are taken per token of a chunk, ``one_floats`` once, and then attention's scratch.
    ``out_one``: one row of logits comes out, not one a token; ``out_width`` floats each, 0 without logits.
    """

    steps: tuple[Step, ...]
    weights: tuple[str, ...]
    constants: tuple[npt.NDArray[np.float32], ...]
    caches: tuple[int, ...]
    row_floats: int
    one_floats: int
    out_one: bool
    out_width: int

    def scratch_floats(self, capacity: Capacity) -> int:
        """Floats of attention's scratch, with caches of ``capacity(layer)`` tokens."""
        found = (self.scratch(step.views[2], capacity) for step in self.steps if step.op == Op.ATTENTION)
        return max(map(aligned, found), default=0)

    def scratch(self, view: Layout | None, capacity: Capacity) -> int:
        """Floats of one attention's."""
        assert view is not None
        _, cache, heads, _, values, _ = view
        return attention_scratch(heads, values, capacity(self.caches[cache]))

    def arena_floats(self, chunk: int, capacity: Capacity) -> int:
        """Floats of the arena, for passes of at most ``chunk`` tokens and caches of ``capacity(layer)``."""
        return self.row_floats * chunk + self.one_floats + self.scratch_floats(capacity)

    def views(self, step: Step, chunk: int, capacity: Capacity) -> tuple[View | None, ...]:
        """The views of a step where they finally are."""
        return tuple(None if view is None else self.view(view, chunk, capacity) for view in step.views)

    def view(self, view: Layout, chunk: int, capacity: Capacity) -> View:
        """Where a view finally is."""
        buffer, at, n, step, m, unit = view
        assert buffer is not None
        ones = self.row_floats * chunk
        if buffer.space == ARENA:
            start = ones + buffer.place if buffer.one else buffer.place * chunk
            return View(start + at, aligned(buffer.floats), step, n, m, unit, buffer.one, ARENA, 0)
        if buffer.space == OUTPUT:
            return View(at, buffer.floats, step, n, m, unit, buffer.one, OUTPUT, 0)
        floats = self.scratch(view, capacity)
        return View(ones + self.one_floats, floats, floats, 1, floats, 1, 1, ARENA, 0)

    def instructions(self, chunk: int, capacity: Capacity) -> Any:
        """All steps as a ctypes array of :class:`library.Instruction`."""
        found = (Instruction * len(self.steps))()
        for i, step in enumerate(self.steps):
            numbers: list[Any] = [step.op, 0]
            for view in step.views:
                numbers += NO_VIEW if view is None else self.view(view, chunk, capacity)
            numbers += repeat(0, 9 * (VIEWS - len(step.views)))
            for given, size, rest in ((step.weights, WEIGHTS, -1), (step.numbers, NUMBERS, 0), (step.reals, REALS, 0)):
                numbers += given
                numbers += repeat(rest, size - len(given))
            LAYOUT.pack_into(found, i * LAYOUT.size, *numbers)
        return found


def compiled(model: Model, stored: Callable[[str], str], want: Want) -> Compiled:
    """The program of a pass that gives ``want``. ``stored``: the format of a weight, or of the table of per-layer
    embeddings, by canonical name: F32, BF16, F16, int8 or int4. Raises AssertionError for an operator it lacks.
    """
    weights = tuple(name for name in tensors(model) if name != PLE_TABLE)
    ropes = distinct(model)
    turns = {key: len(weights) + i for i, key in enumerate(ropes)}
    graph = record(model, want=want)
    lowering = Lowering(graph, {name: i for i, name in enumerate(weights)}, turns, stored)
    steps = lowering.run()
    row_floats, one_floats = place(steps)
    constants = tuple(frequencies(rope) for rope in ropes.values())
    width = model.vocab if graph.output else 0
    return Compiled(
        tuple(steps), weights, constants, tuple(lowering.layers), row_floats, one_floats, want != "all", width
    )


def distinct(model: Model) -> dict[Turn, Rope]:
    """One rotation of each kind, in the order of layers."""
    found: dict[Turn, Rope] = {}
    for layer in model.layers:
        if layer.attention.rope is not None:
            found.setdefault(turn(layer.attention.rope), layer.attention.rope)
    return found


def attention_scratch(heads: int, v_dim: int, capacity: int) -> int:
    """Floats of ATTENTION's scratch, as attend.h has it: a partial result of each query head for each range of keys."""
    return heads * (capacity // RANGE + 2) * (-(-v_dim // 8) * 8 + 8)
