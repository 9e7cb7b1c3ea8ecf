"""The mathematics of a layer, once, over :class:`loaders.network.ops.Ops`.

Every function takes ``w``, which maps a canonical tensor name to a value: placement, precision, slices and streaming
all enter there and nowhere else.
"""

from __future__ import annotations

from math import sqrt
from statistics import NormalDist

from loaders.network.ops import Cache, Ops, Value, Weights
from loaders.network.spec import Attention, Gated


def scoped(w: Weights, prefix: str) -> Weights:
    """``w`` seen from inside one layer."""
    return lambda name: w(prefix + name)


def keys_values(
    op: Ops, a: Attention, w: Weights, x: Value, positions: Value, cache: Cache, layer: int, eps: float
) -> Value:
    """Projects x [t, dim] to keys and values, appends them to the cache and returns the handle to attend over."""
    k = op.reshape(op.linear(x, w("attn.k")), (-1, a.kv_heads, a.head_dim))
    v = op.reshape(op.linear(x, w("attn.v")), (-1, a.kv_heads, a.head_dim))
    if a.qk_norm:
        k = op.norm(k, w("attn.k_norm"), eps)
    if a.v_norm:
        v = op.norm(v, None, eps)
    if a.rope is not None:
        k = op.rope(k, positions, a.rope)
    return cache.append(layer, k, v, a.window)


def attention(op: Ops, a: Attention, w: Weights, x: Value, positions: Value, kv: Value, eps: float) -> Value:
    """Queries from x [t, dim] over a handle that :func:`keys_values` made, here or in an earlier layer -> [t, dim]."""
    q = op.reshape(op.linear(x, w("attn.q")), (-1, a.heads, a.head_dim))
    if a.qk_norm:
        q = op.norm(q, w("attn.q_norm"), eps)
    if a.rope is not None:
        q = op.rope(q, positions, a.rope)
    return op.linear(op.attention(q, kv, positions, a.scale, a.window), w("attn.o"))


def gated(op: Ops, f: Gated, w: Weights, x: Value) -> Value:
    """Gated feed-forward. The Gaussian cut-off acts on the gate before its activation (Spark, as in Gemma 3n)."""
    gate = op.linear(x, w("ffn.gate"))
    if f.sparsity > 0.0:
        gate = op.gaussian_topk(gate, NormalDist().inv_cdf(f.sparsity))
    return op.linear(op.activation(gate, f.activation) * op.linear(x, w("ffn.up")), w("ffn.down"))


def laurel(op: Ops, w: Weights, x: Value, eps: float) -> Value:
    """x plus its normed low-rank image; x is the layer's normed input, not the residual."""
    return x + op.norm(op.linear(op.linear(x, w("laurel.left")), w("laurel.right")), w("laurel.norm"), eps)


def ple_context(
    op: Ops, w: Weights, embedded: Value, rows: Value, layers: int, dim: int, width: int, eps: float
) -> Value:
    """Per-layer inputs [t, layers, width] from scaled embeddings [t, dim] and raw table rows [t, layers, width].

    One norm vector serves all layers. The table carries a scale of sqrt(width) that is nowhere in the file.
    """
    context = op.reshape(op.linear(embedded, w("ple.proj")) * dim**-0.5, (-1, layers, width))
    return (op.norm(context, w("ple.norm"), eps) + rows * sqrt(width)) * sqrt(0.5)


def logits(op: Ops, head: Value, x: Value, softcap: float | None) -> Value:
    """x [t, dim] -> [t, vocab]."""
    out = op.linear(x, head)
    return out if softcap is None else op.tanh(out / softcap) * softcap
