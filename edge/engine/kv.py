"""Caches of keys and values in torch: full for layers that see everything, a ring for sliding ones.

A layer that shares another's keys has no cache. Buffers are [kv_heads, capacity, head_dim]; pages that were never
written are not resident.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from edge.budget.price import kv_capacity
from loaders.network.spec import Model


@dataclass(frozen=True)
class Keys:
    """Keys and values [kv_heads, n, head_dim] a pass may attend to, until the pass ends.

    ``first`` is the position of the first key when they are in order. None means slots in no particular order, for
    the one query there is: all visible to it, or those that ``mask`` [1, n] marks.
    """

    k: torch.Tensor
    v: torch.Tensor
    first: int | None
    end: int
    mask: torch.Tensor | None = None


class KVCache:
    """Implements the network's Cache for one sequence of at most ``context`` tokens."""

    def __init__(self, model: Model, context: int, dtype: torch.dtype, device: torch.device) -> None:
        self.context, self.device = context, device
        self.start = self.tokens = 0
        self.positions = torch.empty(0, dtype=torch.int64)
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for i, layer in enumerate(model.layers):
            a = layer.attention
            if a.kv_from is None:
                shape = (a.kv_heads, kv_capacity(a, context), a.head_dim)
                k, v = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
                self.layers[i] = (k, v)

    def begin(self, tokens: int) -> None:
        """Starts a pass over the next ``tokens`` tokens."""
        if self.start + tokens > self.context:
            raise ValueError(f"{self.start} + {tokens} tokens in a cache for {self.context}")
        self.tokens = tokens
        self.positions = torch.arange(self.start, self.start + tokens, device=self.device)

    def end(self) -> None:
        """The pass is complete; its tokens count."""
        self.start, self.tokens = self.start + self.tokens, 0

    def reset(self) -> None:
        """Forgets everything; buffers stay."""
        self.start = self.tokens = 0

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor, window: int | None) -> Keys:
        """k, v [t, kv_heads, head_dim] -> everything this pass may see of the layer."""
        ks, vs = self.layers[layer]
        end = self.start + k.shape[0]
        # Contiguous per head: some of torch's matrix kernels are slow, or on older builds wrong, on strided halves.
        new_k, new_v = k.transpose(0, 1).to(ks.dtype), v.transpose(0, 1).to(vs.dtype)
        if window is None:
            ks[:, self.start : end], vs[:, self.start : end] = new_k, new_v
            return Keys(ks[:, :end], vs[:, :end], 0, end)
        size = ks.shape[1]
        if end <= size:
            ks[:, self.start : end], vs[:, self.start : end] = new_k, new_v
            return Keys(ks[:, :end], vs[:, :end], 0, end)
        if k.shape[0] == 1:
            at = self.start % size
            ks[:, at : at + 1], vs[:, at : at + 1] = new_k, new_v
            return Keys(ks, vs, None, end)
        return self.wrap(ks, vs, new_k, new_v, end)

    def wrap(self, ks: torch.Tensor, vs: torch.Tensor, k: torch.Tensor, v: torch.Tensor, end: int) -> Keys:
        """Several tokens past the end of a ring: the pass sees old and new in order, the ring keeps the newest.

        What is returned is a copy from before the ring was overwritten: a layer that shares it still needs the
        oldest keys for the earliest queries of this pass.
        """
        size = ks.shape[1]
        old = torch.arange(max(0, self.start - size + 1), self.start, device=self.device) % size
        seen_k, seen_v = torch.cat((ks[:, old], k), 1), torch.cat((vs[:, old], v), 1)
        kept = min(k.shape[1], size)
        slots = torch.arange(end - kept, end, device=self.device) % size
        ks[:, slots], vs[:, slots] = k[:, -kept:], v[:, -kept:]
        return Keys(seen_k, seen_v, end - seen_k.shape[1], end)
