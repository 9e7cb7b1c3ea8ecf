"""Decoding as one recorded CUDA graph: the launches of a whole network for the price of one.

A graph fixes every address and every shape, so a step attends over a fixed number of slots, the empty ones masked,
and its inputs are copied into buffers first. Rows of the per-layer embeddings are gathered before the graph starts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from edge.engine.kv import Keys, KVCache, Stored, stored

# A graph serves positions up to its bucket; the next one is twice as long.
SHORTEST = 256


class StaticCache:
    """One token at a time over a KVCache's own buffers, without a shape that depends on the position.

    Implements the network's Cache. ``limit`` bounds the slots that layers without a window attend over.
    """

    def __init__(self, cache: KVCache, limit: int) -> None:
        self.cache, self.limit = cache, limit
        self.positions = torch.zeros(1, dtype=torch.int64, device=cache.device)
        self.masks: dict[tuple[int, int | None], torch.Tensor] = {}
        # A masked slot still enters a product, with weight zero: what was never written must not be a NaN.
        for i, (k, v) in cache.layers.items():
            chunk = cache.model.layers[i].attention.chunk
            written = cache.start if chunk is None else cache.start % chunk
            k[:, written:].zero_()
            v[:, written:].zero_()

    def begin(self) -> None:
        """A new pass: what is visible has changed."""
        self.masks.clear()

    def append(
        self, layer: int, k: torch.Tensor, v: torch.Tensor, window: int | None, chunk: int | None = None
    ) -> Keys:
        """k, v [1, kv_heads, head_dim] into the slot of the current position; every slot, masked."""
        ks, vs = self.cache.layers[layer]
        period = ks.shape[1] if window is not None else chunk
        at = self.positions if period is None else self.positions % period
        new_k, new_v = stored(ks, k, v)
        ks.index_copy_(1, at, new_k)
        vs.index_copy_(1, at, new_v)
        return self.keys(ks, vs, chunk if window is None else None)

    def append_latent(self, layer: int, entry: torch.Tensor, rank: int) -> Keys:
        """entry [1, rank + rotated] into the slot of the current position; every slot, masked."""
        entries, values = self.cache.layers[layer]
        entries.index_copy_(1, self.positions, entry[None].to(entries.dtype))
        return self.keys(entries, values, None)

    def keys(self, ks: Stored, vs: Stored, chunk: int | None) -> Keys:
        """The slots of a layer and which of them count."""
        slots = min(self.limit, ks.shape[1])
        key = (slots, chunk)
        if key not in self.masks:
            # In a ring that has wrapped every slot is visible, and every slot's number is below the position.
            last = self.positions if chunk is None else self.positions % chunk
            self.masks[key] = (torch.arange(slots, device=last.device) <= last)[None]
        return Keys(ks[:, :slots], vs[:, :slots], None, 0, self.masks[key])


class StaticStep:
    """A decode step of one bucket. ``network(ids, ple, cache)`` -> logits [1, vocab]."""

    def __init__(self, cache: KVCache, limit: int, ple: torch.Tensor | None) -> None:
        self.cache = StaticCache(cache, limit)
        self.ids = torch.zeros(1, dtype=torch.int64, device=cache.device)
        self.ple = None if ple is None else torch.empty_like(ple)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.out = torch.empty(0)

    def set(self, token: torch.Tensor, position: int, ple: torch.Tensor | None) -> None:
        """Copies the inputs of a step into the buffers the graph reads."""
        self.ids.copy_(token)
        self.cache.positions.fill_(position)
        if self.ple is not None and ple is not None:
            self.ple.copy_(ple)

    def run(self, network: Callable[..., torch.Tensor]) -> torch.Tensor:
        """One step; the first one records it."""
        if self.cache.cache.device.type != "cuda":
            self.cache.begin()
            return network(self.ids, self.ple, self.cache)
        if self.graph is None:
            self.capture(network)
        assert self.graph is not None
        self.graph.replay()
        return self.out

    def capture(self, network: Callable[..., torch.Tensor]) -> None:
        """Libraries must have chosen their kernels before anything is recorded, hence a few plain steps first.

        They write to the slot of the current position only, which the recorded step then writes again.
        """
        side, pool = recording()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self.cache.begin()
                network(self.ids, self.ple, self.cache)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        self.cache.begin()
        with torch.cuda.graph(graph, pool=pool, stream=side):
            self.out = network(self.ids, self.ple, self.cache)
        self.graph = graph


@cache
def recording() -> tuple[torch.cuda.Stream, Any]:
    """One stream and one memory pool for every recording: cuBLAS keeps 33 MB for each stream it has ever seen.

    Graphs may share a pool because a step's output is copied out before the next one is replayed.
    """
    return torch.cuda.Stream(), torch.cuda.graph_pool_handle()


def bucket(position: int, context: int) -> int:
    """The slots a step at ``position`` attends over: the next power of two, at most the context."""
    size = SHORTEST
    while size <= position:
        size *= 2
    return min(size, context)
