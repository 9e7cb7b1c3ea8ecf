"""The torch engine: the reference on CPU, and the engine for GPUs.

Computes the network's one definition eagerly; on CUDA a decoded token replays a recorded graph of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from edge.engine.base import Streaming
from edge.engine.cuda_memory import refusals
from edge.engine.kv import KINDS, KVCache
from edge.engine.static import StaticStep, bucket
from edge.engine.torch_blocks import Blocks
from edge.engine.torch_ops import ops_for
from edge.engine.torch_ple import Rows
from loaders.network import decoder_of
from loaders.network.ops import Cache, Want
from loaders.network.spec import Model


class TorchEngine(Streaming):
    """``weights``: canonical name -> tensor. ``chunk``: most tokens run at once. Not thread-safe."""

    name = "torch"

    def __init__(
        self,
        model: Model,
        weights: dict[str, torch.Tensor | Blocks],
        rows: Rows | None,
        *,
        context: int,
        chunk: int,
        kv: str,
        device: torch.device,
    ) -> None:
        self.model, self.weights, self.rows = model, weights, rows
        self.chunk, self.kv, self.torch_device = chunk, KINDS[kv], device
        self.device = device.type
        self.ops = ops_for(device)
        self.decoder = decoder_of(model)
        self.cache = KVCache(model, context, self.kv, device)
        # Eager launches would cost a GPU several times the work itself; a CPU has nothing to gain.
        self.graphs = device.type == "cuda"
        self.steps: dict[int, StaticStep] = {}

    def forward(self, ids: np.ndarray, want: Want, ahead: Sequence[int] = ()) -> np.ndarray:
        """Appends one chunk of ids to the cache; float32 logits of all, of the last, or [0, vocab] for none.

        The rows of ``ahead``, the next chunk, are fetched while this one is computed.
        """
        return self.run(ids, self.cache, want, ahead)

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """float32 logits [t, vocab] of every position, in a cache of their own."""
        cache = KVCache(self.model, len(ids), self.kv, self.torch_device)
        out = np.empty((len(ids), self.model.vocab), np.float32)
        for start in range(0, len(ids), self.chunk):
            part = ids[start : start + self.chunk]
            out[start : start + len(part)] = self.run(part, cache, "all")
        return out

    @torch.inference_mode()
    def run(self, ids: np.ndarray, cache: KVCache, want: Want, ahead: Sequence[int] = ()) -> np.ndarray:
        """One pass over ids [t], t at most a chunk."""
        cache.begin(len(ids))
        with refusals():
            tokens, ple = torch.from_numpy(ids).to(self.torch_device), self.ple(ids)
            if len(ahead):
                self.prefetch(ahead)
            if self.graphs and cache is self.cache and len(ids) == 1 and want != "none":
                out = self.decode(tokens, ple)
            else:
                out = self.network(tokens, ple, cache, want)
        cache.end()
        if out is None:
            return np.empty((0, self.model.vocab), np.float32)
        return out.cpu().numpy()

    def network(
        self, tokens: torch.Tensor, ple: torch.Tensor | None, cache: Cache, want: Want = "last"
    ) -> torch.Tensor | None:
        """The decoder, operator by operator."""
        self.ops.begin()
        out: torch.Tensor | None = self.decoder(
            self.ops, self.model, self.weights.__getitem__, tokens, ple, cache, want=want
        )
        return out

    def decode(self, token: torch.Tensor, ple: torch.Tensor | None) -> torch.Tensor:
        """One token through a recorded step."""
        limit = bucket(self.cache.start, self.cache.context)
        if limit not in self.steps:
            self.steps[limit] = StaticStep(self.cache, limit, ple)
        step = self.steps[limit]
        step.set(token, self.cache.start, ple)
        return step.run(self.network)

    def ple(self, ids: np.ndarray) -> torch.Tensor | None:
        """Rows float32 [t, layers, dim], unscaled, for models that have them."""
        if self.rows is None or self.model.ple is None:
            return None
        return self.rows.gather(ids)

    def close(self) -> None:
        """Releases memory, threads and descriptors."""
        if self.rows is not None:
            self.rows.close()
        # Recorded graphs hold memory of their own, and torch keeps what it freed unless it is told.
        self.rows, self.weights, self.steps = None, {}, {}
        self.cache.layers.clear()
        if self.torch_device.type == "cuda":
            torch.cuda.empty_cache()
