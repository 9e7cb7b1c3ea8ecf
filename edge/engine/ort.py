"""The ONNX Runtime engine: runs exported packages on a CPU, with caches of its own that the graph writes in place.

What to bind is what the package's contract says; buffers are numpy's, and only their addresses are handed over.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

from edge.budget.memory import trim
from edge.budget.price_ort import capacity
from edge.engine.base import Streaming
from edge.engine.ort_pages import Pages
from edge.engine.ort_ple import Rows
from edge.engine.ort_start import ERRORS, options, refused, started
from loaders.errors import BadCheckpoint
from loaders.formats.contract import EMBEDS, IDS, KEEP, LOGITS, MASK, POSITION_IDS, ROWS, Contract, TensorSpec
from loaders.formats.package import Package
from loaders.network.ops import Want

KNOWN = {IDS, EMBEDS, MASK, POSITION_IDS, ROWS, KEEP}
DTYPES = {"float32": np.float32, "float16": np.float16, "int64": np.int64, "int32": np.int32}


def open_session(graph: Path, file: Path, *, optimized: bool = False) -> ort.InferenceSession:
    """A session of ``graph``; errors name ``file``. Raises BadCheckpoint, Unsupported, OverBudget."""
    chosen = options()
    if optimized:
        chosen.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return started(graph, file, chosen)


def shape_of(spec: TensorSpec, tokens: int) -> tuple[int, ...]:
    """The shape of a cache's tensor for one sequence of ``tokens``."""
    return (1, *(tokens if isinstance(size, str) else size for size in spec.shape[1:]))


class Caches:
    """Past and present of every layer, for at most ``context`` tokens.

    One buffer is both where the graph writes in place, and keys and values too where they are one; a growing cache is
    what the last pass gave.
    """

    def __init__(self, contract: Contract, context: int, io: ort.IOBinding) -> None:
        self.start, self.io = 0, io
        self.buffers: list[np.ndarray] = []
        self.grown: dict[str, tuple[TensorSpec, str, ort.OrtValue]] = {}
        for cache in contract.caches:
            sides = [(contract.input(i), contract.output(o)) for i, o in zip(cache.inputs, cache.outputs, strict=True)]
            shared = None
            for past, present in sides:
                assert past is not None
                assert present is not None
                if cache.kind == "growing":
                    self.grown[past.name] = past, present.name, empty(past)
                    continue
                if shared is None or cache.kind != "latent":
                    shared = np.zeros(shape_of(past, capacity(cache, context)), DTYPES[cache.dtype])
                    self.buffers.append(shared)
                for bind, spec in ((io.bind_input, past), (io.bind_output, present)):
                    bind(spec.name, "cpu", 0, shared.dtype.type, shared.shape, shared.ctypes.data)

    def begin(self) -> None:
        """Hands over what grew."""
        for name, (_, present, value) in self.grown.items():
            self.io.bind_ortvalue_input(name, value)
            self.io.bind_output(present, "cpu")

    def end(self, count: int) -> None:
        """``count`` tokens more. What grew is the past of the next pass."""
        self.start += count
        if self.grown:
            # Outputs are in the order in which they were first bound: these after the buffers', logits last.
            given = self.io.get_outputs()[-1 - len(self.grown) : -1]
            self.grown = {n: (*old[:2], new) for (n, old), new in zip(self.grown.items(), given, strict=True)}

    def reset(self) -> None:
        """Empties them: buffers keep what nobody will read."""
        self.start = 0
        self.grown = {name: (spec, present, empty(spec)) for name, (spec, present, _) in self.grown.items()}


def empty(spec: TensorSpec) -> ort.OrtValue:
    """The past before the first token."""
    return ort.OrtValue.ortvalue_from_numpy(np.zeros(shape_of(spec, 0), DTYPES[spec.dtype]))


class OrtEngine(Streaming):
    """``rows``: None for models without per-layer embeddings. ``chunk``: most tokens run at once. Not thread-safe."""

    name, device = "ort", "cpu"

    def __init__(
        self,
        package: Package,
        session: ort.InferenceSession,
        rows: Rows | None,
        pages: Pages,
        *,
        context: int,
        chunk: int,
        embedding: ort.InferenceSession | None = None,
    ) -> None:
        self.embedding = embedding
        self.package, self.session, self.rows, self.pages = package, session, rows, pages
        self.contract, self.vocab, self.chunk = package.contract, package.model.vocab, chunk
        self.names = {spec.name for spec in self.contract.inputs}
        check(self.contract, package, embedded=embedding is not None)
        self.every = KEEP in self.names
        self.cache = Caches(self.contract, context, session.io_binding())
        self.ones, self.places = np.ones(context, np.int64), np.arange(context, dtype=np.int64)
        self.keep, self.scrap = np.ones((), np.int64), np.empty((1, self.vocab), np.float32)
        ple = package.model.ple
        shape = (chunk, len(package.model.layers), ple.dim) if rows is not None and ple is not None else (0, 0, 0)
        self.inputs = np.empty(shape, np.float32)

    def forward(self, ids: np.ndarray, want: Want, ahead: Sequence[int] = ()) -> np.ndarray:
        """Appends one chunk of ids to the cache; float32 logits of all, of the last, or [0, vocab] for none.

        The rows of ``ahead``, the next chunk, are fetched while this one is computed.
        """
        out = np.empty((len(ids) if want == "all" else int(want == "last"), self.vocab), np.float32)
        self.run(ids, self.cache, out, ahead)
        return out

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """float32 logits [t, vocab] of every position, in a cache of their own."""
        cache = Caches(self.contract, len(ids), self.session.io_binding())
        out = np.empty((len(ids), self.vocab), np.float32)
        for start in range(0, len(ids), self.chunk):
            stop = min(start + self.chunk, len(ids))
            self.run(ids[start:stop], cache, out[start:stop])
        return out

    def run(self, ids: np.ndarray, cache: Caches, out: np.ndarray, ahead: Sequence[int] = ()) -> None:
        """One pass over ids [t], t at most a chunk; fills ``out`` with the logits of as many last tokens as it has.

        A graph that gives those of the last alone is run token by token where more are wanted.
        """
        if len(out) > 1 and not self.every:
            for i in range(len(ids)):
                self.run(ids[i : i + 1], cache, out[i : i + 1])
            return
        ids = np.ascontiguousarray(ids, np.int64)
        rows = self.looked_up(ids)
        if len(ahead):
            self.prefetch(ahead)
        # Nothing wanted: one row is computed all the same, and dropped.
        self.compute(ids, rows, cache, out if len(out) else self.scrap)
        self.pages.passed(len(ids))

    def compute(self, ids: np.ndarray, rows: np.ndarray, cache: Caches, out: np.ndarray) -> None:
        """Runs the graph."""
        count, total = len(ids), cache.start + len(ids)
        self.keep[...] = len(out)
        given = {
            IDS: (ids, (1, count)),
            MASK: (self.ones, (1, total)),
            POSITION_IDS: (self.places[cache.start :], (1, count)),
            ROWS: (rows, (1, *rows.shape)),
            KEEP: (self.keep, ()),
        }
        if self.embedding is not None:
            (found,) = self.embedding.run([EMBEDS], {IDS: ids[None]})
            given[EMBEDS] = found, found.shape
        for name, (array, shape) in given.items():
            if name in self.names:
                cache.io.bind_input(name, "cpu", 0, array.dtype.type, shape, array.ctypes.data)
        cache.begin()
        cache.io.bind_output(LOGITS, "cpu", 0, np.float32, (1, *out.shape), out.ctypes.data)
        try:
            self.session.run_with_iobinding(cache.io)
        except (*ERRORS, RuntimeError, MemoryError) as error:
            raise refused(error, self.package.graph) from None
        cache.end(count)

    def looked_up(self, ids: np.ndarray) -> np.ndarray:
        """Rows float32 [t, layers, dim], unscaled, in a buffer that the next pass overwrites."""
        if self.rows is None:
            return self.inputs
        found = self.inputs[: len(ids)]
        self.rows.gather(ids, found)
        return found

    def relieve(self) -> int:
        """Gives back touched rows of mapped tables as well."""
        self.pages.drop()
        return super().relieve()

    def close(self) -> None:
        """Releases memory, threads and descriptors."""
        if self.rows is not None:
            self.rows.close()
        self.rows, self.pages.mapped = None, []
        for name in ("cache", "session"):
            self.__dict__.pop(name, None)
        trim()


def check(contract: Contract, package: Package, *, embedded: bool) -> None:
    """Raises BadCheckpoint for a graph that asks for what no run gives, or answers with something else than logits.

    ``embedded``: somebody looks tokens up before it is run.
    """
    file = package.graph
    pasts = {name for cache in contract.caches for name in cache.inputs}
    strange = [s.name for s in contract.inputs if s.name not in KNOWN | pasts and not s.optional]
    if strange or contract.input(EMBEDS if embedded else IDS) is None:
        expected = "inputs that a run has, input_ids among them"
        raise BadCheckpoint(strange[0] if strange else "no input_ids", file=file, field="inputs", expected=expected)
    if contract.input(ROWS) is not None and package.model.ple is None:
        raise BadCheckpoint(ROWS, file=file, field="inputs", expected="none: this model has no per-layer embeddings")
    logits = contract.output(LOGITS)
    if logits is None or logits.dtype != "float32" or logits.shape[-1] != package.model.vocab or len(logits.shape) != 3:
        expected = f"float32 [batch, kept, {package.model.vocab}]"
        raise BadCheckpoint("other logits" if logits else "no logits", file=file, field="outputs", expected=expected)
