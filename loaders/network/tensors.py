"""The tensor table: canonical name -> shape, the one source behind loading, planning, random weights and export."""

from __future__ import annotations

import math
from collections.abc import Iterator

from loaders.network.spec import Attention, Experts, FeedForward, Gated, LatentAttention, Layer, Model, Plain

Shape = tuple[int, ...]

PLE_TABLE = "ple.table"
# Where a model remembers its table.
TABLE = "_tensors"


def tensors(model: Model) -> dict[str, Shape]:
    """Every tensor the model needs, by canonical name, as [out, in] for matrices and [n, out, in] for stacks of them.

    A tied head is not listed: :func:`head` names the tensor that serves as head.
    """
    # Asked for once a tensor by whoever loads one; the table of a large model takes milliseconds.
    if TABLE not in model.__dict__:
        model.__dict__[TABLE] = _tensors(model)
    return dict(model.__dict__[TABLE])


def _tensors(model: Model) -> dict[str, Shape]:
    table: dict[str, Shape] = {"embed": (model.vocab, model.dim), **_norm(model, "norm")}
    if not model.tied:
        table["head"] = (model.vocab, model.dim)
    if model.positions is not None:
        table["positions"] = (model.positions, model.dim)
    table.update(_ple(model))
    table.update(_altup(model))
    for i, layer in enumerate(model.layers):
        table.update({f"layers.{i}.{name}": shape for name, shape in _layer(model, layer)})
    return table


def head(model: Model) -> str:
    """The tensor the logits are computed with."""
    return "embed" if model.tied else "head"


def core(model: Model) -> int:
    """Parameters that stay on the device besides the token embedding: all but ``embed`` and the PLE table."""
    return sum(math.prod(s) for name, s in tensors(model).items() if name not in ("embed", PLE_TABLE))


def total(model: Model) -> int:
    """All parameters, tied ones once."""
    return sum(math.prod(s) for s in tensors(model).values())


def active(model: Model) -> int:
    """Parameters that one token meets: all but the experts it is not sent to."""
    idle = 0
    for layer in model.layers:
        if isinstance(layer.ffn, Experts):
            idle += (layer.ffn.experts - layer.ffn.active) * 3 * layer.ffn.width * model.dim
    return total(model) - idle


def flat(shape: Shape) -> Shape:
    """A stack of matrices as one matrix, its rows one after another; any other shape as it is."""
    return (math.prod(shape[:-1]), shape[-1]) if len(shape) > 2 else shape


def _ple(model: Model) -> dict[str, Shape]:
    if model.ple is None:
        return {}
    columns = len(model.layers) * model.ple.dim
    return {
        PLE_TABLE: (model.ple.rows, columns),
        "ple.proj": (columns, model.dim),
        "ple.norm": (model.ple.dim,),
    }


def _altup(model: Model) -> dict[str, Shape]:
    if model.altup is None:
        return {}
    square = (model.dim, model.dim)
    extra = range(1, model.altup.streams)
    return {f"altup.{side}.{k}": square for side in ("expand", "merge") for k in extra}


def _norm(model: Model, name: str) -> dict[str, Shape]:
    bias = {f"{name}_bias": (model.dim,)} if model.layer_norm else {}
    return {name: (model.dim,), **bias}


def _layer(model: Model, layer: Layer) -> Iterator[tuple[str, Shape]]:
    dim, a = model.dim, layer.attention
    yield from _latent(dim, a) if isinstance(a, LatentAttention) else _attention(dim, a)
    yield from _feed_forward(dim, layer.ffn)
    for norm in layer.norms:
        yield from _norm(model, f"norm.{norm}").items()
    if layer.scalar:
        yield "scalar", (1,)
    if model.laurel is not None:
        yield "laurel.left", (model.laurel.rank, dim)
        yield "laurel.right", (dim, model.laurel.rank)
        yield "laurel.norm", (dim,)
    if model.altup is not None:
        n = model.altup.streams
        yield "altup.router", (n, dim)
        yield "altup.norm", (dim,)
        yield "altup.predict", (n * n, n)
        yield "altup.correct", (n, n)
        if model.altup.scaled:
            yield "altup.scale", (dim,)
    if model.ple is not None:
        yield "ple.gate", (model.ple.dim, dim)
        yield "ple.proj", (dim, model.ple.dim)
        yield "ple.norm", (dim,)


def _attention(dim: int, a: Attention) -> Iterator[tuple[str, Shape]]:
    outputs = {"q": a.heads * a.head_dim}
    if a.kv_from is None:
        outputs.update(k=a.kv_heads * a.head_dim, v=a.kv_heads * a.head_dim)
    for name, size in outputs.items():
        yield f"attn.{name}", (size, dim)
        if a.bias:
            yield f"attn.{name}_bias", (size,)
        if name != "v" and a.qk_norm in ("head", "whole"):
            yield f"attn.{name}_norm", (a.head_dim if a.qk_norm == "head" else size,)
    yield "attn.o", (dim, a.heads * a.head_dim)
    if a.bias:
        yield "attn.o_bias", (dim,)


def _latent(dim: int, a: LatentAttention) -> Iterator[tuple[str, Shape]]:
    queries = a.heads * (a.nope_dim + a.rope.dim)
    if a.q_rank is None:
        yield "attn.q", (queries, dim)
    else:
        yield "attn.q_a", (a.q_rank, dim)
        yield "attn.q_a_norm", (a.q_rank,)
        yield "attn.q_b", (queries, a.q_rank)
    yield "attn.kv_a", (a.entry, dim)
    yield "attn.kv_norm", (a.kv_rank,)
    yield "attn.k_b", (a.heads, a.kv_rank, a.nope_dim)
    yield "attn.v_b", (a.heads, a.v_dim, a.kv_rank)
    yield "attn.o", (dim, a.heads * a.v_dim)


def _feed_forward(dim: int, f: FeedForward) -> Iterator[tuple[str, Shape]]:
    if isinstance(f, Plain):
        yield from {"ffn.up": (f.width, dim), "ffn.up_bias": (f.width,)}.items()
        yield from {"ffn.down": (dim, f.width), "ffn.down_bias": (dim,)}.items()
    elif isinstance(f, Gated):
        yield from _gated("ffn", dim, f)
    else:
        yield "experts.router", (f.experts, dim)
        if f.router.bias:
            yield "experts.bias", (f.experts,)
        yield "experts.gate", (f.experts, f.width, dim)
        yield "experts.up", (f.experts, f.width, dim)
        yield "experts.down", (f.experts, dim, f.width)
        if f.shared is not None:
            yield from _gated("shared", dim, f.shared)


def _gated(scope: str, dim: int, f: Gated) -> Iterator[tuple[str, Shape]]:
    yield f"{scope}.gate", (f.width, dim)
    yield f"{scope}.up", (f.width, dim)
    yield f"{scope}.down", (dim, f.width)
