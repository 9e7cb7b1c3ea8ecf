"""What each part of a run costs in bytes, from shapes alone: no weights are touched, no torch is imported."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from edge.store.weights import Kept, Source, table_kind
from loaders.formats.quant import BITS, record_bytes
from loaders.formats.recipe import PLAIN, Recipe
from loaders.formats.safetensors import ITEMSIZE
from loaders.network.matformer import Slice
from loaders.network.spec import Attention, Model

# The row cache of the ssd tier: enough for the words a text keeps coming back to.
ROW_CACHE = 16 << 20
# Measured on a model of 27 million parameters and on one of E2B's shapes: benchmarks/run.py repeats it.
SCRATCH = 8 << 20
TILES = 3
TILE_BYTES = 8 << 20
# On a GPU: what torch's allocator keeps between sizes, and rows that are widened to 16 bits at a time for a prefill.
CUDA_SCRATCH = 60 << 20
CUDA_TILE = 32 << 20
FLOAT = 4


def itemsize(precision: str) -> int:
    """Bytes per value."""
    return ITEMSIZE[PLAIN[precision]]


def kv_capacity(a: Attention, context: int) -> int:
    """Tokens whose keys and values one layer keeps: all of them, or a window's worth."""
    return context if a.window is None else min(a.window, context)


def kv_bytes(model: Model, context: int, precision: str) -> int:
    """Keys and values of every layer that owns some, for ``context`` tokens."""
    owners = (layer.attention for layer in model.layers if layer.attention.kv_from is None)
    return sum(2 * a.kv_heads * a.head_dim * kv_capacity(a, context) for a in owners) * itemsize(precision)


def ple_bytes(small: Model, kind: str, tier: str) -> int:
    """What a tier of the per-layer-embedding table keeps in memory, its rows in the format ``kind``."""
    assert small.ple is not None
    dim = small.ple.dim
    row = len(small.layers) * (record_bytes(dim, kind) if kind in BITS else dim * ITEMSIZE[kind])
    table = small.ple.rows * row
    # A row cache as large as the table would make the ssd tier a slow way of holding it in memory.
    return min(ROW_CACHE, table // 8) if tier == "ssd" else table


def activation_bytes(model: Model, chunk: int, context: int, precision: str) -> int:
    """What one pass over ``chunk`` tokens holds at once: its values in float32, the logits of one token, scratch."""
    streams = model.altup.streams if model.altup else 1
    width = max(layer.ffn.width for layer in model.layers)
    a = max((layer.attention for layer in model.layers), key=lambda a: a.heads * a.head_dim)
    residual = model.dim * (4 * streams + 6)
    inner = max(3 * width, a.head_dim * (4 * a.heads + 6 * a.kv_heads))
    ple = 2 * len(model.layers) * model.ple.dim if model.ple else 0
    windows = [kv_capacity(layer.attention, context) for layer in model.layers if layer.attention.window is not None]
    # A ring that wraps hands the pass an ordered copy of what the window still shows.
    ordered = 2 * a.kv_heads * a.head_dim * (max(windows, default=0) + chunk) * itemsize(precision) if windows else 0
    return chunk * (residual + inner + ple) * FLOAT + ordered + 4 * model.vocab * FLOAT + scratch_bytes(model)


def scratch_bytes(model: Model) -> int:
    """Widened tiles and what the matrix library packs beside them, sampling, threads, the allocator's slack."""
    largest = model.dim * max(layer.ffn.width for layer in model.layers) * FLOAT
    return SCRATCH + TILES * min(TILE_BYTES, largest)


def cuda_scratch_bytes(model: Model, chunk: int, recipe: Recipe) -> int:
    """The same on a GPU: quantized matrices are widened in tiles, each with its product with a chunk."""
    if recipe.precision not in BITS:
        return CUDA_SCRATCH
    width = max(layer.ffn.width for layer in model.layers)
    rows = min(width, CUDA_TILE // 2 // model.dim)
    return CUDA_SCRATCH + 2 * rows * (model.dim + chunk)


class Prices:
    """Bytes by component of one slice ``small`` of a source's model, at any recipe. What repeats is counted once."""

    def __init__(self, source: Source, part: Slice, small: Model, tensors: Mapping[str, Kept], device: str) -> None:
        self.source, self.part, self.small, self.tensors, self.device = source, part, small, tensors, device
        # Layers are mostly alike: a few dozen kinds of tensors instead of hundreds of tensors.
        self.kinds = Counter(tensor.kind for tensor in tensors.values())
        self.weights: dict[Recipe, int] = {}
        self.activations: dict[tuple[int, int, str], int] = {}
        self.caches: dict[tuple[int, str], int] = {}

    def components(self, recipe: Recipe, kv: str, tier: str, context: int, chunk: int) -> dict[str, int]:
        """What a run holds besides the runtime's own floor and the tokenizer."""
        key = (chunk, context, kv)
        if key not in self.activations:
            self.activations[key] = activation_bytes(self.small, chunk, context, kv)
        if (context, kv) not in self.caches:
            self.caches[context, kv] = kv_bytes(self.small, context, kv)
        activations = self.activations[key]
        if self.device == "cuda":
            activations += cuda_scratch_bytes(self.small, chunk, recipe) - scratch_bytes(self.small)
        return {
            "weights": self.weights_bytes(recipe),
            "ple": 0 if tier == "none" else ple_bytes(self.small, table_kind(self.source, recipe), tier),
            "kv": self.caches[context, kv],
            "activations": activations,
        }

    def weights_bytes(self, recipe: Recipe) -> int:
        """All tensors but the per-layer-embedding table."""
        if recipe not in self.weights:
            self.weights[recipe] = sum(count * kind.nbytes(recipe) for kind, count in self.kinds.items())
        return self.weights[recipe]

    def bytes_per_token(self, recipe: Recipe) -> int:
        """Weights that one decoded token reads: all but an embedding of which one row is used."""
        unread = 0 if self.small.tied else self.tensors["embed"].nbytes(recipe)
        return self.weights_bytes(recipe) - unread
