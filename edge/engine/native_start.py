"""Brings the native engine up and runs a toy model through it once, so that what it takes is measured, not guessed."""

from __future__ import annotations

import math

import numpy as np

from edge.budget.memory import trim
from edge.engine.native import library
from edge.engine.native_engine import NativeEngine
from edge.engine.native_ple import Rows
from edge.engine.native_weights import Weights, aligned, panels, plain
from edge.engine.toy import toy
from edge.store.ple import MemoryTable
from loaders.formats.panels import panel_shape
from loaders.formats.quant import BITS, record_bytes
from loaders.formats.recipe import recipes, stored_as
from loaders.formats.safetensors import ITEMSIZE
from loaders.network.tensors import PLE_TABLE, tensors

CONTEXT, CHUNK = 64, 8


def use(count: int) -> None:
    """The best kernels for this machine, on ``count`` threads. Raises Usage, Unsupported where nothing was compiled."""
    library.use()
    library.threads(count)


def warm_up() -> None:
    """A prefill and a step of a toy."""
    model, recipe = toy(), recipes("int8")[0]
    assert model.ple is not None
    formats = {name: stored_as(name, shape, recipe) for name, shape in tensors(model).items()}
    formats[PLE_TABLE] = "int8"
    weights = zeros({name: (shape, formats[name]) for name, shape in tensors(model).items() if name != PLE_TABLE})
    record = len(model.layers) * record_bytes(model.ple.dim, "int8")
    rows = Rows(MemoryTable(np.zeros((model.ple.rows, record), np.uint8)), record)
    engine = NativeEngine(model, weights, formats.__getitem__, rows, context=CONTEXT, chunk=CHUNK, kv="bf16")
    for tokens in (CHUNK, 1):
        engine.forward(np.arange(tokens), "last")
    engine.close()
    trim()


def zeros(wanted: dict[str, tuple[tuple[int, ...], str]]) -> Weights:
    """Name -> (shape, format): weights of zeros."""
    shapes = {name: panel_shape(shape, kind) if kind in BITS else shape for name, (shape, kind) in wanted.items()}
    found = Weights(sum(aligned(math.prod(shapes[n]) * ITEMSIZE.get(kind, 1)) for n, (_, kind) in wanted.items()))
    for name, (shape, kind) in wanted.items():
        raw = found.own.take(shapes[name], np.dtype(f"u{ITEMSIZE.get(kind, 1)}"))
        raw[...] = 0
        found.named[name] = panels(raw, shape, kind) if kind in BITS else plain(raw, shape, kind)
    return found
