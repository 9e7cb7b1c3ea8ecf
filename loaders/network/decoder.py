"""The decoder of every family with one residual stream: all but Gemma 3n."""

from __future__ import annotations

from loaders.network.blocks import (
    attention,
    feed_forward,
    keys_values,
    logits,
    normed,
    ple_context,
    ple_injection,
    scoped,
)
from loaders.network.ops import Cache, Ops, Value, Want, Weights
from loaders.network.spec import Layer, Model, Norm
from loaders.network.tensors import head


def decoder(
    op: Ops, spec: Model, w: Weights, ids: Value, ple: Value | None, cache: Cache, *, want: Want = "last"
) -> Value | None:
    """ids [t] -> logits [1, vocab] of the last token; [t, vocab] of all; or None, when only the cache is to be filled.

    ``ple``: raw table rows [t, layers, width] of a model with per-layer embeddings, None for any other.
    """
    positions = cache.positions
    h = op.embed(w("embed"), ids)
    if spec.embed_scale != 1.0:
        h = h * spec.embed_scale
    if spec.positions is not None:
        h = h + op.embed(w("positions"), positions)
    if spec.ple is not None:
        assert ple is not None
        ple = ple_context(op, w, h, ple, len(spec.layers), spec.dim, spec.ple.dim, spec.eps)
    # A handle may be a copy of what a window shows: only those that other layers read are held.
    shared: dict[int, Value] = {}
    for i, layer in enumerate(spec.layers):
        a, lw = layer.attention, scoped(w, f"layers.{i}.")
        n = at(op, spec, layer, lw, "attn_in", h)
        kv = keys_values(op, a, lw, n, positions, cache, i, spec.eps) if a.kv_from is None else shared[a.kv_from]
        if i in spec.donors:
            shared[i] = kv
        if i == spec.last_writer and want == "none":
            return None
        if i == spec.last_writer and want == "last":
            h, n, positions = op.last(h), op.last(n), op.last(positions)
            ple = None if ple is None else op.last(ple)
        attn = attention(op, a, lw, n, positions, kv, spec.eps)
        h = h + at(op, spec, layer, lw, "attn_out", attn)
        f = feed_forward(op, layer.ffn, lw, at(op, spec, layer, lw, "ffn_in", h))
        h = h + at(op, spec, layer, lw, "ffn_out", f)
        if spec.ple is not None and ple is not None:
            row = op.reshape(op.slice(ple, 1, i, i + 1), (-1, spec.ple.dim))
            h = h + ple_injection(op, lw, h, row, layer.ffn.activation, spec.eps)
        if layer.scalar:
            h = h * lw("scalar")
    return logits(op, w(head(spec)), normed(op, spec, w, "norm", h), spec.softcap)


def at(op: Ops, spec: Model, layer: Layer, w: Weights, place: Norm, x: Value) -> Value:
    """x, normed if the layer has a norm at that place."""
    return normed(op, spec, w, f"norm.{place}", x) if place in layer.norms else x
