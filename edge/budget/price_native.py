"""What a run in the native engine costs in bytes: panels, ring caches, and the arena that its program was planned for.

The arena is that of the compiled program, not an estimate of it. A model has few kinds of layers: a program of one
layer of each kind needs as much.
"""

from __future__ import annotations

import math
import mmap
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from edge.budget.price import FLOAT, Prices
from edge.engine.native.compile import attention_scratch, compiled
from edge.engine.native.library import SCRATCH
from edge.engine.native.plan_memory import aligned
from edge.engine.native_kv import cache_bytes, capacity
from edge.engine.threads import thread_count
from loaders.formats.panels import panel_bytes
from loaders.formats.quant import BITS
from loaders.formats.recipe import Recipe
from loaders.formats.safetensors import ITEMSIZE
from loaders.network.matformer import Slice
from loaders.network.ops import Want
from loaders.network.spec import Attention, FeedForward, LatentAttention, Layer, Model
from loaders.network.tensors import PLE_TABLE, tensors
from loaders.weights import Kept, Source

# Where arrays in own memory begin.
ALIGNED = 64
# Of the last token's logits: themselves, and what sampling makes of them.
SAMPLING = 4
# What the program takes for each of its steps, made and being made; rows of a table on their way, ids.
STEP_BYTES = 2500
SLACK = 3 << 20
# Layers of a kind: a second one finds holes that the first leaves.
EACH = 2
# The formats that decide how a program is made: what of a product is quantized.
PLAIN, BLOCKS = "F32", "int8"


def weight_bytes(tensor: Kept, recipe: Recipe) -> int:
    """What a tensor of a slice takes: panels, and where others that are not read lie beside them the pages at their
    ends; or plain values.
    """
    stored = tensor.stored(recipe)
    if stored in BITS:
        cut = tensor.shape[-2] != tensor.full[-2]
        held = panel_bytes(tensor.shape, stored)
        return min(held + 2 * mmap.PAGESIZE, panel_bytes(tensor.full, stored)) if cut else held
    return -(-math.prod(tensor.shape) * ITEMSIZE[stored] // ALIGNED) * ALIGNED


class NativePrices(Prices):
    """Bytes by component of one slice, as the native engine holds it. ``count``: threads, None for the usual."""

    def __init__(
        self, source: Source, part: Slice, small: Model, tensors: Mapping[str, Kept], count: int | None
    ) -> None:
        super().__init__(source, part, small, tensors, "cpu")
        self.count = count or thread_count()
        self.essence = essence(small)
        self.sizes: dict[Recipe, Size] = {}
        self.rings: dict[tuple[str, int, int], int] = {}
        self.scratch: dict[tuple[int, int], int] = {}

    def held(self, tensor: Kept, recipe: Recipe) -> int:
        return weight_bytes(tensor, recipe)

    def kv_bytes(self, kv: str, context: int, chunk: int) -> int:
        key = kv, context, chunk
        if key not in self.rings:
            self.rings[key] = cache_bytes(self.small, context, chunk, kv)
        return self.rings[key]

    def activation_bytes(self, recipe: Recipe, kv: str, context: int, chunk: int) -> int:
        if recipe not in self.sizes:
            self.sizes[recipe] = self.essence.size(lambda name: self.tensors[name].stored(recipe))
        if (context, chunk) not in self.scratch:
            self.scratch[context, chunk] = scratch_floats(self.small, context, chunk)
        return working_bytes(self.small, self.sizes[recipe], self.scratch[context, chunk], chunk, self.count)


def working_bytes(model: Model, size: Size, scratch: int, chunk: int, count: int) -> int:
    """What passes of at most ``chunk`` tokens take: the arena, threads' scratch, one token's logits, the program.

    ``scratch``: floats of attention's.
    """
    arena = size.row * chunk + size.one + scratch
    return arena * FLOAT + count * SCRATCH + SAMPLING * model.vocab * FLOAT + size.steps * STEP_BYTES + SLACK


def logits_bytes(model: Model, size: Size, tokens: int, chunk: int, kv: str) -> int:
    """What computing the logits of all of ``tokens`` takes: themselves, a cache, and a pass."""
    working = working_bytes(model, size, scratch_floats(model, tokens, chunk), min(chunk, tokens), 1)
    return tokens * model.vocab * FLOAT + cache_bytes(model, tokens, chunk, kv) + working


def scratch_floats(model: Model, context: int, chunk: int) -> int:
    """Of the attention that has most of it."""
    layers = (layer.attention for _, _, layer in model.runs)
    pairs = ((a, a.kv_rank if isinstance(a, LatentAttention) else a.head_dim) for a in layers)
    return max(aligned(attention_scratch(a.heads, v_dim, capacity(a, context, chunk))) for a, v_dim in pairs)


class Size(NamedTuple):
    """Of a program: floats of its arena for each token, floats once, steps."""

    row: int
    one: int
    steps: int


@dataclass(frozen=True)
class Essence:
    """A model with few layers, over which a pass holds as much at once as over all; ``stands_for``: their places.
    ``layers``: how many the whole has.
    """

    model: Model
    stands_for: tuple[int, ...]
    layers: int

    def size(self, stored: Callable[[str], str], want: Want = "last") -> Size:
        """Of the whole model's program, in which weights are ``stored`` so."""
        names = (name for name in tensors(self.model) if name != PLE_TABLE)
        found = sized(self.model, frozenset(name for name in names if stored(self.original(name)) in BITS), want)
        return found._replace(steps=found.steps * self.layers // len(self.stands_for))

    def original(self, name: str) -> str:
        """What a tensor is called in the whole model."""
        if not name.startswith("layers."):
            return name
        _, layer, rest = name.split(".", 2)
        return f"layers.{self.stands_for[int(layer)]}.{rest}"


@lru_cache(64)
def sized(small: Model, quantized: frozenset[str], want: Want) -> Size:
    """Of a model as it is. One for many slices and recipes: planning asks for hundreds."""
    program = compiled(small, lambda name: BLOCKS if name in quantized else PLAIN, want)
    return Size(program.row_floats, program.one_floats, len(program.steps))


Kind = tuple[Layer, bool, bool, bool]


def kind_of(layer: Layer, i: int, last: int) -> Kind:
    """Equal for layers that compute alike, but for what their caches keep; ``last``: the last that writes keys."""
    a = layer.attention
    if isinstance(a, Attention):
        layer = replace(layer, attention=replace(a, window=None, chunk=None, kv_from=None))
    return layer, a.kv_from is not None, i > last, i == last


def essence(model: Model) -> Essence:
    """Layers of each kind, as wide as the widest."""
    last, widths = model.last_writer, dict[tuple[type[FeedForward], bool], int]()
    for i, layer in enumerate(model.layers):
        key = (type(layer.ffn), i > last)
        widths[key] = max(widths.get(key, 0), layer.ffn.width)
    place, counts, chosen = dict[Kind, int](), Counter[Kind](), list[tuple[int, Layer]]()
    kinds = []
    for i, layer in enumerate(model.layers):
        wide = replace(layer, ffn=replace(layer.ffn, width=widths[type(layer.ffn), i > last]))
        kinds.append(kind_of(wide, i, last))
        counts[kinds[-1]] += 1
        if counts[kinds[-1]] <= EACH:
            place.setdefault(kinds[-1], len(chosen))
            chosen.append((i, wide))
    layers = []
    for _, layer in chosen:
        a = layer.attention
        if isinstance(a, Attention) and a.kv_from is not None:
            a = replace(a, kv_from=place[kinds[a.kv_from]])
        layers.append(replace(layer, attention=a))
    ple = model.ple
    if ple is not None:  # rows are as long as they were
        ple = replace(ple, dim=-(-len(model.layers) * ple.dim // len(layers)))
    small = replace(model, layers=tuple(layers), ple=ple, nested=None)
    return Essence(small, tuple(i for i, _ in chosen), len(model.layers))
