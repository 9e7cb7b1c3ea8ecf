"""What decoding takes with models that are made for it: weights of zeros, more of them than caches hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median
from time import perf_counter

from edge import engine as engines
from edge.budget.machine import Reader, cache_bytes
from edge.budget.memory import available_memory, trim
from edge.budget.rates import Rates, Timed, fit
from edge.budget.reads import NAMES, Reads
from edge.engine.blank import Blank, device_bandwidth
from edge.engine.threads import thread_count
from loaders.formats.quant import BITS
from loaders.formats.recipe import Recipe, stored_as, stored_bytes
from loaders.network.spec import Attention, Gated, Layer, Model, Rope
from loaders.network.tensors import tensors

VOCAB = 512
MIB = 1 << 20
# Turns in which memory and the engine are timed by turns, and seconds of each in a turn; passes at least.
TURNS, READING_S, DECODING_S, PASSES = 7, 0.04, 0.06, 3
# Positions at which attention is timed, just short of where a step recorded for a GPU grows.
FAR = 4095
CONTEXT = FAR + 1
KINDS = ("bf16", "int8", "float32")
# How much more a token must take on a GPU for its launches to be more.
CLEAR = 1.1


@dataclass(frozen=True)
class Shape:
    """Of a model whose layers are all alike."""

    dim: int
    heads: int
    kv_heads: int
    head_dim: int
    width: int

    def model(self, layers: int) -> Model:
        """With so many of them."""
        a = Attention(self.heads, self.kv_heads, self.head_dim, self.head_dim**-0.5, Rope(10_000.0, self.head_dim))
        return Model("blank", VOCAB, self.dim, (Layer(a, Gated(self.width, "silu")),) * layers, 1e-6, True, CONTEXT)


@dataclass(frozen=True)
class Shapes:
    """What is timed: next to no weights, many small layers in the precision ``most``, few large ones, of so many
    ``bytes`` at least, of ``blocks`` where they are quantized; attention in groups of ``pairs`` and ``eights``, over
    ``kv_bytes`` of bf16.
    """

    bytes: int
    blocks: int
    kv_bytes: int
    most: str = "int4"
    tiny: Shape = Shape(128, 2, 2, 32, 128)
    narrow: Shape = Shape(1024, 16, 8, 64, 3072)
    wide: Shape = Shape(2048, 32, 8, 64, 8192)
    pairs: Shape = Shape(512, 16, 8, 128, 512)
    eights: Shape = Shape(512, 32, 4, 128, 512)


ON_CPU, ON_GPU = 160 * MIB, 1600 * MIB
# As much of keys and values, of which fewer bytes take as long.
KV = 96 * MIB
# torch on a CPU widens blocks, at a speed that caches do not show in.
WIDENED = 32 * MIB


def measure(engine: str, device: str, threads: int | None) -> Rates:
    """Starts the engine and times it. Raises what starting raises, and Unsupported for one that runs packages alone."""
    runtime = engines.start(engine, device, threads)
    if runtime.device == "cpu":
        left = available_memory()[0] // 6
        room, kv = (min(left, max(size, min(2 * cache_bytes(), 4 * size))) for size in (ON_CPU, KV))
        shapes = Shapes(room, room, kv) if runtime.engine == "native" else Shapes(room, WIDENED, kv, "bf16")
        bench: Bench = Bench(runtime, Reader(threads or thread_count()))
    else:
        shapes = Shapes(ON_GPU, ON_GPU, 4 * KV, wide=Shape(4096, 32, 8, 128, 14336))
        bench = Bench(runtime, None)
    found = list(cases(bench, shapes))
    return bench.rates(found)


def cases(bench: Bench, shapes: Shapes) -> Iterator[Timed]:
    """All that is timed, one after another."""
    for shape, precision in (
        (shapes.narrow, shapes.most),
        (shapes.wide, "int4"),
        (shapes.wide, "int8"),
        (shapes.wide, "bf16"),
        (shapes.wide, "float32"),
    ):
        nbytes = shapes.blocks if precision in BITS else shapes.bytes
        yield from bench.timed(shape, layers_of(shape, precision, nbytes), precision)
    yield from bench.timed(shapes.tiny, 1, "bf16")
    for shape in (shapes.pairs, shapes.eights):
        layers = max(1, shapes.kv_bytes // (4 * shape.kv_heads * shape.head_dim * FAR))
        plain: Timed | None = None
        for kind in KINDS if shape is shapes.pairs or bench.reader is None else KINDS[:2]:
            near, far = bench.timed(shape, layers, "bf16", kind, (0, FAR))
            yield difference(near, far)
            if plain is not None and bench.reader is None and near.seconds > plain.seconds * CLEAR:
                yield Timed(near.seconds - plain.seconds, tokens=0, kv=kind, more=near.steps)
            plain = plain or near


def difference(near: Timed, far: Timed) -> Timed:
    """What attending takes, alone. Where noise hides it, next to nothing."""
    seconds = max(far.seconds - near.seconds, far.seconds * 1e-3)
    return Timed(seconds, {}, 0, 0, far.kv, far.kv_bytes - near.kv_bytes, far.products - near.products)


def layers_of(shape: Shape, precision: str, nbytes: int) -> int:
    """Layers that hold so many bytes."""
    one, two = (sum(weights_of(shape.model(count), precision).values()) for count in (1, 2))
    return max(1, -(-nbytes // (two - one)))


def weights_of(model: Model, precision: str) -> dict[str, int]:
    """Bytes by format, all in one precision, embedding and head too."""
    found: dict[str, int] = {}
    for name, shape in tensors(model).items():
        stored = stored_as(name, shape, Recipe(precision, precision))
        plain = NAMES.get(stored, stored)
        found[plain] = found.get(plain, 0) + stored_bytes(shape, stored)
    return found


class Bench:
    """An engine, and a reader of memory that takes turns with it; None on a GPU, whose memory is read once.

    Of the turns the middle one counts: a run, too, has its better and its worse moments.
    """

    def __init__(self, runtime: engines.Runtime, reader: Reader | None) -> None:
        self.runtime, self.reader = runtime, reader
        self.bandwidth = device_bandwidth(runtime.handle) if reader is None else 0.0
        self.means: list[float] = []

    def timed(
        self, shape: Shape, layers: int, precision: str, kv: str = "bf16", depths: Sequence[int] = (0,)
    ) -> list[Timed]:
        """A token at each of the depths, beside the bytes it read."""
        model, recipe = shape.model(layers), Recipe(precision, precision)
        blank = Blank(self.runtime, model, recipe, kv, CONTEXT)
        try:
            times = self.turns(blank.step, depths)
        finally:
            blank.close()
            trim()
        reads = Reads.of(model, weights_of(model, precision))
        context = CONTEXT if self.reader is None else None
        found = []
        for depth in depths:
            attending = kv, reads.kv_bytes(depth, kv, context), reads.products(depth, context)
            found.append(Timed(times[depth], reads.weights, reads.steps, 1, *attending))
        return found

    def turns(self, step: Callable[[int], float], depths: Sequence[int]) -> dict[int, float]:
        """Seconds of a pass at each depth, in the middle one of a few turns; memory is read in between."""
        for depth in depths:
            step(depth)  # what is only done once
        every: dict[int, list[float]] = {depth: [] for depth in depths}
        for _ in range(TURNS):
            self.read()
            for depth in depths:
                found, begun = list[float](), perf_counter()
                while perf_counter() - begun < DECODING_S or len(found) < PASSES:
                    found.append(step(depth))
                every[depth].append(median(found))
        return {depth: median(found) for depth, found in every.items()}

    def read(self) -> None:
        """Reads memory for a moment: the best is what it can, the others say how steady it is."""
        if self.reader is not None:
            marks = self.reader.marks(READING_S)
            self.bandwidth = max(self.bandwidth, self.reader.best_of(marks))
            self.means.append(self.reader.mean_of(marks))

    def rates(self, found: Sequence[Timed]) -> Rates:
        """What explains the times."""
        done = fit(found, self.bandwidth)
        return replace(done, steady=min(1.0, median(self.means) / done.bandwidth) if self.means else 1.0)
