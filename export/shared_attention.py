"""Attention over keys and values that an earlier layer left in this pass, in operators of ONNX alone.

The fused operator does that too, but not before ONNX Runtime 1.31; what runs in a browser is older.
"""

from __future__ import annotations

import numpy as np

from export.builder import FLOAT
from export.lowering import LOWEST, Lowering
from loaders.formats.contract import CacheSpec


def shared_attention(
    lowering: Lowering, q: str, cache: CacheSpec, heads: int, *, window: int | None, scale: float, cut: bool
) -> str:
    """float32 [batch, queries, heads * dim] of queries ``q`` of the same shape over a cache's ``present``, itself
    [batch, kv_heads, total, dim].

    ``cut``: queries are those whose logits are wanted, not all of the pass.
    """
    b, group, dim = lowering.b, heads // cache.heads, cache.dim
    keys, values = (widened(lowering, name) for name in cache.outputs)
    split = b.node("Reshape", (q, b.ints(0, 0, cache.heads, group, dim)))
    # All queries that read the same keys are rows of one product.
    rows = b.node("Reshape", (b.node("Transpose", (split,), perm=(0, 2, 3, 1, 4)), b.ints(0, 0, -1, dim)))
    scaled = b.node("Mul", (rows, b.floats(scale)))
    scores = b.node("MatMul", (scaled, b.node("Transpose", (keys,), perm=(0, 1, 3, 2))))
    mask = hidden(lowering, window, cut=cut)
    apart = b.node("Concat", (b.ints(0, 0, group, -1), b.node("Shape", (mask,), start=4, end=5)), axis=0)
    seen = b.node("Softmax", (b.node("Add", (b.node("Reshape", (scores, apart)), mask)),), axis=-1)
    together = b.node("Reshape", (seen, b.node("Concat", (b.ints(0, 0, -1), total_of(lowering)), axis=0)))
    out = b.node("Reshape", (b.node("MatMul", (together, values)), b.ints(0, 0, group, -1, dim)))
    return b.node("Reshape", (b.node("Transpose", (out,), perm=(0, 3, 1, 2, 4)), b.ints(0, 0, heads * dim)))


def widened(lowering: Lowering, name: str) -> str:
    """A cache's tensor as float32, once for all that read it."""
    if not lowering.choices.half:
        return name
    key = ("widened", name)
    if key not in lowering.memo:
        lowering.memo[key] = lowering.b.node("Cast", (name,), to=FLOAT)
    return lowering.memo[key]


def total_of(lowering: Lowering) -> str:
    """Tokens that a cache holds after this pass, int64 [1]."""
    if "total" not in lowering.memo:
        lowering.memo["total"] = lowering.b.node("Shape", (lowering.mask,), start=1, end=2)
    return lowering.memo["total"]


def hidden(lowering: Lowering, window: int | None, *, cut: bool) -> str:
    """What hides later keys and those beyond the window, float32 [batch, 1, 1, queries, total]."""
    key = ("hidden", window, cut)
    if key not in lowering.memo:
        b = lowering.b
        places = queries(lowering)
        if cut:
            places = lowering.last_of(places)
        places = b.node("Unsqueeze", (places, b.ints(1, 2, 4)))
        count = b.node("Squeeze", (total_of(lowering),))
        keys = b.node("Range", (b.constant(0, np.int64), count, b.constant(1, np.int64)))
        seen = b.node("LessOrEqual", (keys, places))
        if window is not None:
            far = b.node("Sub", (places, b.constant(window, np.int64)))
            seen = b.node("And", (seen, b.node("Greater", (keys, far))))
        lowering.memo[key] = b.node("Where", (seen, b.floats(0.0), b.floats(LOWEST)))
    return lowering.memo[key]


def queries(lowering: Lowering) -> str:
    """Where each token of this pass lies in the cache, int64 [batch, tokens]: as the fused operator puts it there."""
    if "queries" not in lowering.memo:
        b = lowering.b
        tokens = b.node("Shape", (lowering.ids,), start=1, end=2)
        lengths = b.node("ReduceSum", (lowering.mask, b.ints(1)), keepdims=1)
        before = b.node("Max", (b.node("Sub", (lengths, tokens)), b.ints(0)))
        steps = b.node("Range", (b.constant(0, np.int64), b.node("Squeeze", (tokens,)), b.constant(1, np.int64)))
        lowering.memo["queries"] = b.node("Add", (before, steps))
    return lowering.memo["queries"]
