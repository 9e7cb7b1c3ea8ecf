"""The decoder of Gemma 3n: four AltUp streams, LAuReL beside attention, per-layer embeddings after the FFN.

Follows arXiv 2301.13310 (AltUp) and 2411.07501 (LAuReL) as the published Gemma 3n applies them. Streams are kept
as [t, streams, dim], so that mixing them is one small batched matrix product.
"""

from __future__ import annotations

from math import sqrt

from loaders.network.blocks import (
    attention,
    feed_forward,
    keys_values,
    laurel,
    logits,
    ple_context,
    ple_injection,
    scoped,
)
from loaders.network.ops import Cache, Ops, Value, Want, Weights
from loaders.network.spec import Activation, AltUp, Model
from loaders.network.tensors import head

# An all-zero projection must not be blown up to the magnitude it is matched to.
FLOOR = 1e-5


def altup_decoder(
    op: Ops, spec: Model, w: Weights, ids: Value, ple: Value | None, cache: Cache, *, want: Want = "last"
) -> Value | None:
    """ids [t] and raw table rows ``ple`` [t, layers, width] -> logits as :func:`loaders.network.decoder.decoder`."""
    assert spec.ple is not None
    assert spec.altup is not None
    assert ple is not None
    altup, width, positions = spec.altup, spec.ple.dim, cache.positions
    e = op.embed(w("embed"), ids) * spec.embed_scale
    ple = ple_context(op, w, e, ple, len(spec.layers), spec.dim, width, spec.eps)
    h = expand(op, altup, w, e, spec.dim)
    shared: dict[int, Value] = {}
    for i, layer in enumerate(spec.layers):
        a, lw = layer.attention, scoped(w, f"layers.{i}.")
        h = predict(op, altup, lw, h, spec.dim, spec.eps)
        n = op.norm(stream(op, h, altup.active, spec.dim), lw("norm.attn_in"), spec.eps)
        kv = keys_values(op, a, lw, n, positions, cache, i, spec.eps) if a.kv_from is None else shared[a.kv_from]
        if i in spec.donors:
            shared[i] = kv
        if i == spec.last_writer and want == "none":
            return None
        if i == spec.last_writer and want == "last":
            h, n, ple, positions = op.last(h), op.last(n), op.last(ple), op.last(positions)
        active = stream(op, h, altup.active, spec.dim)
        attn = attention(op, a, lw, n, positions, kv, spec.eps)
        attn = op.norm(attn, lw("norm.attn_out"), spec.eps)
        y = (active + attn + laurel(op, lw, n, spec.eps)) * sqrt(0.5)
        f = feed_forward(op, layer.ffn, lw, op.norm(y, lw("norm.ffn_in"), spec.eps))
        y = y + op.norm(f, lw("norm.ffn_out"), spec.eps)
        h = correct(op, altup, lw, h, active, y, spec.dim, spec.eps)
        row = op.reshape(op.slice(ple, 1, i, i + 1), (-1, width))
        h = inject(op, altup, lw, h, row, layer.ffn.activation, spec.dim, spec.eps)
    x = op.norm(merge(op, altup, w, h, spec.dim), w("norm"), spec.eps)
    return logits(op, w(head(spec)), x, spec.softcap)


def stream(op: Ops, h: Value, k: int, dim: int) -> Value:
    """Stream k of [t, streams, dim] as [t, dim]."""
    return op.reshape(op.slice(h, 1, k, k + 1), (-1, dim))


def expand(op: Ops, altup: AltUp, w: Weights, e: Value, dim: int) -> Value:
    """Embeddings [t, dim] -> streams [t, streams, dim]; the projected ones take the first one's magnitude."""
    magnitude = op.rms(e, 0.0)
    streams = [e]
    for k in range(1, altup.streams):
        u = op.linear(e, w(f"altup.expand.{k}"))
        streams.append(u * magnitude / op.rms(u, FLOOR))
    return op.concat([op.reshape(s, (-1, 1, dim)) for s in streams], 1)


def merge(op: Ops, altup: AltUp, w: Weights, h: Value, dim: int) -> Value:
    """Streams [t, streams, dim] -> their mean [t, dim], after projecting and matching all but the first."""
    first = stream(op, h, 0, dim)
    magnitude = op.rms(first, 0.0)
    out = first
    for k in range(1, altup.streams):
        u = op.linear(stream(op, h, k, dim), w(f"altup.merge.{k}"))
        out = out + u * magnitude / op.rms(u, FLOOR)
    return out / float(altup.streams)


def router(op: Ops, w: Weights, x: Value, dim: int, eps: float) -> Value:
    """Modalities [t, streams] of x [t, dim]. The scale is 1/dim, not its square root."""
    return op.tanh(op.linear(op.norm(x, w("altup.norm"), eps) * (1.0 / dim), w("altup.router")))


def predict(op: Ops, altup: AltUp, w: Weights, h: Value, dim: int, eps: float) -> Value:
    """Each stream plus a mixture of all: out_i = h_i + sum_j C[i, j] h_j, with C row-major in the projection."""
    n = altup.streams
    coefs = op.linear(router(op, w, stream(op, h, altup.active, dim), dim, eps), w("altup.predict"))
    return h + op.matmul(op.reshape(coefs, (-1, n, n)), h)


def correct(
    op: Ops, altup: AltUp, w: Weights, predicted: Value, active: Value, y: Value, dim: int, eps: float
) -> Value:
    """Every stream moves by its own share of what the layer changed on the active one."""
    coefs = op.linear(router(op, w, y, dim, eps), w("altup.correct")) + 1.0
    innovation = op.reshape(y - active, (-1, 1, dim))
    return predicted + op.reshape(coefs, (-1, altup.streams, 1)) * innovation


def inject(
    op: Ops, altup: AltUp, w: Weights, h: Value, row: Value, activation: Activation, dim: int, eps: float
) -> Value:
    """Adds the gated per-layer embedding to every stream but the first, whichever one is active.

    The output scale touches the gate's input only: stream values themselves stay unscaled.
    """
    x = stream(op, h, altup.active, dim)
    if altup.scaled:
        x = x * w("altup.scale")
    t = ple_injection(op, w, x, row, activation, eps)
    rest = op.slice(h, 1, 1, altup.streams) + op.reshape(t, (-1, 1, dim))
    return op.concat([op.slice(h, 1, 0, 1), rest], 1)
