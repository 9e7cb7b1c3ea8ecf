"""The tensor table: canonical name -> shape, the one source behind loading, planning, random weights and export."""

from __future__ import annotations

import math
from collections.abc import Iterator

from loaders.network.spec import Layer, Model

Shape = tuple[int, ...]

PLE_TABLE = "ple.table"


def tensors(model: Model) -> dict[str, Shape]:
    """Every tensor the model needs, by canonical name, as [out, in] for matrices.

    A tied head is not listed: :func:`head` names the tensor that serves as head.
    """
    table: dict[str, Shape] = {"embed": (model.vocab, model.dim), "norm": (model.dim,)}
    if not model.tied:
        table["head"] = (model.vocab, model.dim)
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


def _layer(model: Model, layer: Layer) -> Iterator[tuple[str, Shape]]:
    dim, a, f = model.dim, layer.attention, layer.ffn
    yield "attn.q", (a.heads * a.head_dim, dim)
    yield "attn.o", (dim, a.heads * a.head_dim)
    if a.qk_norm:
        yield "attn.q_norm", (a.head_dim,)
    if a.kv_from is None:
        yield "attn.k", (a.kv_heads * a.head_dim, dim)
        yield "attn.v", (a.kv_heads * a.head_dim, dim)
        if a.qk_norm:
            yield "attn.k_norm", (a.head_dim,)
    yield "ffn.gate", (f.width, dim)
    yield "ffn.up", (f.width, dim)
    yield "ffn.down", (dim, f.width)
    for norm in layer.norms:
        yield f"norm.{norm}", (dim,)
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
