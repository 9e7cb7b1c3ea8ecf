"""The mathematics of a layer, once, over :class:`loaders.network.ops.Ops`.

Every function takes ``w``, which maps a canonical tensor name to a value: placement, precision, slices and streaming
all enter there and nowhere else.
"""

from __future__ import annotations

from math import sqrt

from loaders.network.ops import Cache, Ops, Value, Weights
from loaders.network.spec import (
    Activation,
    AnyAttention,
    Attention,
    Experts,
    FeedForward,
    Gated,
    LatentAttention,
    Model,
    Plain,
)


def scoped(w: Weights, prefix: str) -> Weights:
    """``w`` seen from inside one layer."""
    return lambda name: w(prefix + name)


def normed(op: Ops, spec: Model, w: Weights, name: str, x: Value) -> Value:
    """The model's kind of norm over x [..., dim], by the name of its weight."""
    if spec.layer_norm:
        return op.layer_norm(x, w(name), w(f"{name}_bias"), spec.eps)
    return op.norm(x, w(name), spec.eps)


def projected(op: Ops, a: Attention, w: Weights, name: str, x: Value, heads: int, eps: float) -> Value:
    """x [t, dim] -> queries or keys [t, heads, head_dim], normed where the model norms them."""
    out = op.linear(x, w(f"attn.{name}"))
    if a.bias:
        out = out + w(f"attn.{name}_bias")
    if a.qk_norm == "whole":
        out = op.norm(out, w(f"attn.{name}_norm"), eps)
    out = op.reshape(out, (-1, heads, a.head_dim))
    if a.qk_norm == "head":
        out = op.norm(out, w(f"attn.{name}_norm"), eps)
    elif a.qk_norm == "unweighted":
        # Published after the rotation, which does not change lengths.
        out = op.norm(out, None, eps)
    return out


def keys_values(
    op: Ops, a: AnyAttention, w: Weights, x: Value, positions: Value, cache: Cache, layer: int, eps: float
) -> Value:
    """Projects x [t, dim] to keys and values, appends them to the cache and returns the handle to attend over."""
    if isinstance(a, LatentAttention):
        return cache.append_latent(layer, latent(op, a, w, x, positions), a.kv_rank)
    k = projected(op, a, w, "k", x, a.kv_heads, eps)
    v = op.linear(x, w("attn.v"))
    if a.bias:
        v = v + w("attn.v_bias")
    v = op.reshape(v, (-1, a.kv_heads, a.head_dim))
    if a.v_norm:
        v = op.norm(v, None, eps)
    if a.rope is not None:
        k = op.rope(k, positions, a.rope)
    return cache.append(layer, k, v, a.window, a.chunk)


def attention(op: Ops, a: AnyAttention, w: Weights, x: Value, positions: Value, kv: Value, eps: float) -> Value:
    """Queries from x [t, dim] over a handle that :func:`keys_values` made, here or in an earlier layer -> [t, dim]."""
    if isinstance(a, LatentAttention):
        return latent_attention(op, a, w, x, positions, kv)
    q = projected(op, a, w, "q", x, a.heads, eps)
    if a.rope is not None:
        q = op.rope(q, positions, a.rope)
    if a.temperature is not None:
        q = op.temperature(q, positions, a.temperature)
    out = op.linear(op.attention(q, kv, positions, a.scale, a.window, a.chunk), w("attn.o"))
    return out + w("attn.o_bias") if a.bias else out


def latent(op: Ops, a: LatentAttention, w: Weights, x: Value, positions: Value) -> Value:
    """x [t, dim] -> cache entries [t, kv_rank + rope.dim]: the normed latent, then the rotated key of all heads."""
    both = op.linear(x, w("attn.kv_a"))
    c = op.norm(op.slice(both, 1, 0, a.kv_rank), w("attn.kv_norm"), a.eps)
    k = op.reshape(op.slice(both, 1, a.kv_rank, a.entry), (-1, 1, a.rope.dim))
    return op.concat((c, op.reshape(op.rope(k, positions, a.rope), (-1, a.rope.dim))), 1)


def latent_attention(op: Ops, a: LatentAttention, w: Weights, x: Value, positions: Value, kv: Value) -> Value:
    """Absorbed form: queries are taken to the latent space, so keys and values are never expanded (arXiv 2405.04434).

    q k = q (K c) = (K^T q) c, and the sum of values V c is V times the sum of c.
    """
    if a.q_rank is None:
        q = op.linear(x, w("attn.q"))
    else:
        q = op.linear(op.norm(op.linear(x, w("attn.q_a")), w("attn.q_a_norm"), a.eps), w("attn.q_b"))
    q = op.reshape(q, (-1, a.heads, a.nope_dim + a.rope.dim))
    absorbed = op.head_linear(op.slice(q, 2, 0, a.nope_dim), w("attn.k_b"))
    rotated = op.rope(op.slice(q, 2, a.nope_dim, a.nope_dim + a.rope.dim), positions, a.rope)
    seen = op.attention(op.concat((absorbed, rotated), 2), kv, positions, a.scale, None)
    values = op.head_linear(op.reshape(seen, (-1, a.heads, a.kv_rank)), w("attn.v_b"))
    return op.linear(op.reshape(values, (-1, a.heads * a.v_dim)), w("attn.o"))


def feed_forward(op: Ops, f: FeedForward, w: Weights, x: Value) -> Value:
    """x [t, dim] -> [t, dim], by whichever mechanism the layer has."""
    if isinstance(f, Experts):
        return experts(op, f, w, x)
    return plain(op, f, w, x) if isinstance(f, Plain) else gated(op, f, w, x)


def plain(op: Ops, f: Plain, w: Weights, x: Value) -> Value:
    """Two matrices with biases, and an activation between them."""
    hidden = op.activation(op.linear(x, w("ffn.up")) + w("ffn.up_bias"), f.activation)
    return op.linear(hidden, w("ffn.down")) + w("ffn.down_bias")


def experts(op: Ops, f: Experts, w: Weights, x: Value) -> Value:
    """The experts that the router chooses for each token, and the shared one."""
    scores = op.linear(x, w("experts.router"))
    weights = op.route(scores, w("experts.bias") if f.router.bias else None, f.experts, f.active, f.router)
    out = op.experts(x, weights, w("experts.gate"), w("experts.up"), w("experts.down"), f)
    return out if f.shared is None else out + gated(op, f.shared, w, x, "shared")


def gated(op: Ops, f: Gated, w: Weights, x: Value, scope: str = "ffn") -> Value:
    """Gated feed-forward. The Gaussian cut-off acts on the gate before its activation (Spark, as in Gemma 3n)."""
    gate = op.linear(x, w(f"{scope}.gate"))
    if f.sparsity > 0.0:
        gate = op.gaussian_topk(gate, f.cut)
    return op.linear(op.activation(gate, f.activation) * op.linear(x, w(f"{scope}.up")), w(f"{scope}.down"))


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


def ple_injection(op: Ops, w: Weights, x: Value, row: Value, activation: Activation, eps: float) -> Value:
    """What a layer adds from its per-layer input ``row`` [t, width], gated by x [t, dim] -> [t, dim]."""
    gate = op.activation(op.linear(x, w("ple.gate")), activation)
    return op.norm(op.linear(gate * row, w("ple.proj")), w("ple.norm"), eps)


def logits(op: Ops, head: Value, x: Value, softcap: float | None) -> Value:
    """x [t, dim] -> [t, vocab]."""
    out = op.linear(x, head)
    return out if softcap is None else op.tanh(out / softcap) * softcap
