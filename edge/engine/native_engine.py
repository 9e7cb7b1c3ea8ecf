"""The native engine: compiled programs over weights where they lie. Runs on CPUs, without torch in the process."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from edge.budget.memory import trim
from edge.engine.base import Streaming
from edge.engine.native import library
from edge.engine.native.compile import Compiled, compiled
from edge.engine.native_kv import Caches
from edge.engine.native_ple import Rows
from edge.engine.native_weights import Weights, plain
from loaders.network.ops import Want
from loaders.network.spec import Model

# Where the arena begins: a cache line.
ALIGNED = 64


class NativeEngine(Streaming):
    """``stored``: the format of a weight, or of the table's rows, by canonical name. ``chunk``: most tokens at once.

    Programs are compiled when they are first needed; they share the weights and one arena. Not thread-safe.
    """

    name, device = "native", "cpu"

    def __init__(
        self,
        model: Model,
        weights: Weights,
        stored: Callable[[str], str],
        rows: Rows | None,
        *,
        context: int,
        chunk: int,
        kv: str,
    ) -> None:
        self.model, self.weights, self.stored, self.rows = model, weights, stored, rows
        self.context, self.most, self.kv = context, chunk, kv
        self.chunk = chunk
        self.cache = self.caches(context)
        self.compiled: dict[Want, Compiled] = {}
        self.instructions: dict[Want, Any] = {}
        self.programs: dict[Want, library.Program] = {}
        self.table: Any = None
        self.arena = Arena()
        self.programs["last"] = self.program("last", self.cache)

    def forward(self, ids: np.ndarray, want: Want, ahead: Sequence[int] = ()) -> np.ndarray:
        """Appends one chunk of ids to the cache; float32 logits of all, of the last, or [0, vocab] for none.

        The rows of ``ahead``, the next chunk, are fetched while this one is computed.
        """
        if want not in self.programs:
            self.programs[want] = self.program(want, self.cache)
        out = np.empty((len(ids) if want == "all" else int(want == "last"), self.model.vocab), np.float32)
        self.run(self.programs[want], ids, self.cache, out, ahead)
        return out

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """float32 logits [t, vocab] of every position, in a cache of their own."""
        cache = self.caches(len(ids))
        program = self.program("all", cache)
        out = np.empty((len(ids), self.model.vocab), np.float32)
        for start in range(0, len(ids), self.chunk):
            stop = min(start + self.chunk, len(ids))
            self.run(program, ids[start:stop], cache, out[start:stop])
        return out

    def run(
        self, program: library.Program, ids: np.ndarray, cache: Caches, out: np.ndarray, ahead: Sequence[int] = ()
    ) -> None:
        """One pass over ids [t], t at most a chunk; fills ``out``."""
        ids = np.ascontiguousarray(ids, np.int64)
        rows = None if self.rows is None else self.rows.gather(ids)
        if len(ahead):
            self.prefetch(ahead)
        table = None if rows is None else rows.ctypes.data
        library.run(program, library.Pass(len(ids), cache.start, ids.ctypes.data, table, out.ctypes.data, len(out)))
        cache.start += len(ids)

    # Programs

    def caches(self, context: int) -> Caches:
        """Empty ones for at most ``context`` tokens."""
        return Caches(self.model, context, self.most, self.kv)

    def program(self, want: Want, cache: Caches) -> library.Program:
        """A program that fills ``cache``, no longer than the engine's own; checked."""
        if want not in self.compiled:
            self.compile(want)
        made, instructions = self.compiled[want], self.instructions[want]
        if self.table is None:
            self.constants = made.constants
            self.table = weight_table(made, self.weights)
        program = library.Program(
            ctypes.cast(instructions, ctypes.POINTER(library.Instruction)),
            ctypes.cast(self.table, ctypes.POINTER(library.Weight)),
            ctypes.cast(cache.table, ctypes.POINTER(library.Cache)),
            len(instructions),
            len(self.table),
            len(made.caches),
        )
        program.chunk, program.out_width, program.out_one = self.most, made.out_width, made.out_one
        program.vocab, program.context = self.model.vocab, cache.context
        program.ple_row_bytes = 0 if self.rows is None else self.rows.row_bytes
        self.arena.place(program)
        return program

    def compile(self, want: Want) -> None:
        """Instructions of a pass that gives ``want``, and room for their values."""
        made = compiled(self.model, self.stored, want)
        instructions = made.instructions(self.most, self.cache.capacity)
        floats = made.arena_floats(self.most, self.cache.capacity)
        if floats > self.arena.floats:
            # They point into memory that goes; whoever needs one makes it again.
            self.programs.clear()
            self.arena.grow(floats)
        # Steps have become instructions, and take more memory than those.
        self.compiled[want], self.instructions[want] = replace(made, steps=()), instructions

    # Rows, memory

    def close(self) -> None:
        """Releases memory and descriptors, and the row reader's thread. Those that compute are the process's."""
        if self.rows is not None:
            self.rows.close()
        # Programs point into all the rest.
        self.programs, self.instructions, self.compiled = {}, {}, {}
        self.rows, self.table, self.arena, self.weights = None, None, Arena(), Weights(0)
        self.cache = Caches(self.model, 1, 1, self.kv)
        trim()


class Arena:
    """Float32 memory for values, that of the program which needs most."""

    def __init__(self) -> None:
        self.memory, self.floats = np.empty(0, np.float32), 0

    def grow(self, floats: int) -> None:
        """Room for so many floats, elsewhere; what was there is lost."""
        self.memory, self.floats = np.empty(floats + ALIGNED // 4, np.float32), floats

    def place(self, program: library.Program) -> None:
        """Tells a program where its memory is, and checks all of it."""
        address = self.memory.ctypes.data
        program.arena, program.arena_floats = address + -address % ALIGNED, self.floats
        library.check(program)


def weight_table(made: Compiled, weights: Weights) -> Any:
    """Weights, then constants, as C has them."""
    named = [weights.named[name] for name in made.weights]
    vectors = [plain(vector, vector.shape, "F32") for vector in made.constants]
    return (library.Weight * (len(named) + len(vectors)))(*named, *vectors)
