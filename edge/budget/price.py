"""What each part of a run costs in bytes, from shapes alone: no weights are touched, no torch is imported."""

from __future__ import annotations

from edge.store.weights import STORED
from loaders.checkpoint import Checkpoint
from loaders.formats.safetensors import ITEMSIZE
from loaders.network.matformer import Slice
from loaders.network.spec import Attention, Model
from loaders.network.tensors import PLE_TABLE

# The row cache of the ssd tier: enough for the words a text keeps coming back to.
ROW_CACHE = 16 << 20
# Measured on a model of 27 million parameters and on one of E2B's shapes: benchmarks/run.py repeats it.
SCRATCH = 8 << 20
TILES = 6
TILE_BYTES = 8 << 20
FLOAT = 4


def itemsize(precision: str) -> int:
    """Bytes per value."""
    return ITEMSIZE[STORED[precision]]


def kv_capacity(a: Attention, context: int) -> int:
    """Tokens whose keys and values one layer keeps: all of them, or a window's worth."""
    return context if a.window is None else min(a.window, context)


def kv_bytes(model: Model, context: int, precision: str) -> int:
    """Keys and values of every layer that owns some, for ``context`` tokens."""
    owners = (layer.attention for layer in model.layers if layer.attention.kv_from is None)
    return sum(2 * a.kv_heads * a.head_dim * kv_capacity(a, context) for a in owners) * itemsize(precision)


def ple_bytes(checkpoint: Checkpoint, part: Slice, tier: str) -> int:
    """What a tier of the per-layer-embedding table keeps in memory."""
    if tier == "none":
        return 0
    assert checkpoint.model.ple is not None
    ple = checkpoint.model.ple
    table = ple.rows * len(part.keep) * ple.dim * checkpoint.where[PLE_TABLE].itemsize
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


def components(
    checkpoint: Checkpoint,
    part: Slice,
    small: Model,
    *,
    weights: int,
    kv: str,
    tier: str,
    context: int,
    chunk: int,
) -> dict[str, int]:
    """Bytes by component of a slice ``small`` of the checkpoint's model, besides the runtime's own floor."""
    return {
        "weights": weights,
        "ple": ple_bytes(checkpoint, part, tier),
        "kv": kv_bytes(small, context, kv),
        "activations": activation_bytes(small, chunk, context, kv),
    }
