"""An engine over weights of zeros, its cache as full as one likes: what decoding takes, measured without a model."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from time import perf_counter
from typing import Any

import numpy as np

from edge.engine import Runtime
from loaders.errors import Unsupported
from loaders.formats.recipe import Recipe, stored_as
from loaders.network.spec import Model
from loaders.network.tensors import tensors

# Decoding takes one token at a time.
CHUNK = 1
TOKEN = np.array([1], np.int64)
# What a GPU reads to see how fast it can, how often, and passes that are timed at a time.
DEVICE_BYTES, TRIES, PASSES = 1 << 30, 5, 8


class Blank:
    """``step(depth)`` decodes one token that follows ``depth`` others. Models have no per-layer embeddings."""

    def __init__(self, runtime: Runtime, model: Model, recipe: Recipe, kv: str, context: int) -> None:
        makers: dict[str, Callable[..., Any]] = {"native": native, "torch": torch_engine}
        if runtime.engine not in makers:
            raise Unsupported(f"the {runtime.engine} engine runs packages alone", field="--engine")
        self.engine = makers[runtime.engine](model, recipe, kv, context, runtime.handle)

    def step(self, depth: int) -> float:
        """Seconds that it took."""
        self.engine.cache.start = depth
        start = perf_counter()
        self.engine.forward(TOKEN, "last")
        return perf_counter() - start

    def close(self) -> None:
        """Gives its memory back."""
        self.engine.close()


def native(model: Model, recipe: Recipe, kv: str, context: int, _: Any) -> Any:
    """The compiled engine. Pages that were never written are all one page, which no memory is read for."""
    from edge.engine.native_engine import NativeEngine
    from edge.engine.native_start import zeros

    formats = {name: stored_as(name, shape, recipe) for name, shape in tensors(model).items()}
    weights = zeros({name: (shape, formats[name]) for name, shape in tensors(model).items()})
    engine = NativeEngine(model, weights, formats.__getitem__, None, context=context, chunk=CHUNK, kv=kv)
    ctypes.memset(engine.cache.bytes, 0, engine.cache.nbytes)
    return engine


def torch_engine(model: Model, recipe: Recipe, kv: str, context: int, device: Any) -> Any:
    """torch, on its device."""
    from edge.engine.torch import TorchEngine
    from edge.engine.torch_start import empty

    weights = {name: empty(name, shape, recipe, device) for name, shape in tensors(model).items()}
    engine = TorchEngine(model, weights, None, context=context, chunk=CHUNK, kv=kv, device=device)
    for pair in engine.cache.layers.values():
        for part in pair:
            part.zero_()
    return engine


def device_bandwidth(device: Any) -> float:
    """Bytes per second that a GPU reads of its own memory: the best of a few reductions."""
    import torch

    memory = torch.zeros(DEVICE_BYTES // 4, device=device)
    best = 0.0
    for reduce in (memory.max, memory.sum):
        for _ in range(TRIES):
            reduce().item()
            start = perf_counter()
            for _ in range(PASSES):
                found = reduce()
            found.item()
            best = max(best, PASSES * DEVICE_BYTES / (perf_counter() - start))
    return best
