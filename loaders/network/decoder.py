"""The decoder of every family with one residual stream: Llama, Qwen3 and their relatives."""

from __future__ import annotations

from loaders.network.blocks import attention, gated, keys_values, logits, scoped
from loaders.network.ops import Cache, Ops, Value, Want, Weights
from loaders.network.spec import Model
from loaders.network.tensors import head


def decoder(
    op: Ops, spec: Model, w: Weights, ids: Value, ple: Value | None, cache: Cache, *, want: Want = "last"
) -> Value | None:
    """ids [t] -> logits [1, vocab] of the last token; [t, vocab] of all; or None, when only the cache is to be filled.

    ``ple`` is unused here: these families have no per-layer embeddings.
    """
    positions = cache.positions
    h = op.embed(w("embed"), ids)
    if spec.embed_scale != 1.0:
        h = h * spec.embed_scale
    kv: dict[int, Value] = {}
    for i, layer in enumerate(spec.layers):
        a, lw = layer.attention, scoped(w, f"layers.{i}.")
        n = op.norm(h, lw("norm.attn_in"), spec.eps)
        if a.kv_from is None:
            kv[i] = keys_values(op, a, lw, n, positions, cache, i, spec.eps)
        if i == spec.last_writer and want == "none":
            return None
        if i == spec.last_writer and want == "last":
            h, n, positions = op.last(h), op.last(n), op.last(positions)
        h = h + attention(op, a, lw, n, positions, kv[i if a.kv_from is None else a.kv_from], spec.eps)
        h = h + gated(op, layer.ffn, lw, op.norm(h, lw("norm.ffn_in"), spec.eps))
    return logits(op, w(head(spec)), op.norm(h, w("norm"), spec.eps), spec.softcap)
