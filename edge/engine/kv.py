"""Caches of keys and values in torch: full for layers that see everything, a ring for sliding ones, one chunk for
those that see no more than their own chunk, and for latent attention one buffer that is keys and values in one.

A layer that shares another's keys has no cache. Buffers are [kv_heads, capacity, head_dim], or [1, capacity, entry];
pages that were never written are not resident.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from edge.budget.price import kv_capacity
from loaders.network.spec import LatentAttention, Model


@dataclass(frozen=True)
class Keys:
    """Keys and values [kv_heads, n, head_dim] a pass may attend to, until the pass ends.

    Of a latent layer ``k`` is the entries [1, n, entry] and ``v`` the same memory, short of each entry's rotated end.

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
        self.model, self.context, self.device = model, context, device
        self.start = self.tokens = 0
        self.positions = torch.empty(0, dtype=torch.int64)
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for i, layer in enumerate(model.layers):
            a = layer.attention
            if isinstance(a, LatentAttention):
                entries = torch.empty((1, kv_capacity(a, context), a.entry), dtype=dtype, device=device)
                self.layers[i] = (entries, entries[..., : a.kv_rank])
            elif a.kv_from is None:
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

    def append(
        self, layer: int, k: torch.Tensor, v: torch.Tensor, window: int | None, chunk: int | None = None
    ) -> Keys:
        """k, v [t, kv_heads, head_dim] -> everything this pass may see of the layer."""
        ks, vs = self.layers[layer]
        end = self.start + k.shape[0]
        # Contiguous per head: some of torch's matrix kernels are slow, or on older builds wrong, on strided halves.
        new_k, new_v = k.transpose(0, 1).to(ks.dtype), v.transpose(0, 1).to(vs.dtype)
        size = ks.shape[1]
        if window is None and chunk is not None:
            return self.append_chunk(ks, vs, new_k, new_v, chunk)
        if window is None or end <= size:
            ks[:, self.start : end], vs[:, self.start : end] = new_k, new_v
            return Keys(ks[:, :end], vs[:, :end], 0, end)
        if k.shape[0] == 1:
            at = self.start % size
            ks[:, at : at + 1], vs[:, at : at + 1] = new_k, new_v
            return Keys(ks, vs, None, end)
        return self.wrap(ks, vs, new_k, new_v, end)

    def append_latent(self, layer: int, entry: torch.Tensor, rank: int) -> Keys:
        """entry [t, rank + rotated] -> the entries so far; their first ``rank`` values are the values."""
        entries, values = self.layers[layer]
        end = self.start + entry.shape[0]
        entries[0, self.start : end] = entry.to(entries.dtype)
        return Keys(entries[:, :end], values[:, :end], 0, end)

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

    def append_chunk(self, ks: torch.Tensor, vs: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chunk: int) -> Keys:
        """k, v [kv_heads, t, head_dim] into slots p % chunk; the pass sees from the start of its first chunk on.

        Past a chunk's end that is a copy, for the same reason as in a ring, and the slots keep the newest chunk.
        """
        at, end = self.start % chunk, self.start + k.shape[1]
        stop = at + k.shape[1]
        if stop <= chunk:
            ks[:, at:stop], vs[:, at:stop] = k, v
            return Keys(ks[:, :stop], vs[:, :stop], self.start - at, end)
        seen_k, seen_v = torch.cat((ks[:, :at], k), 1), torch.cat((vs[:, :at], v), 1)
        kept = (end - 1) % chunk + 1
        ks[:, :kept], vs[:, :kept] = k[:, -kept:], v[:, -kept:]
        return Keys(seen_k, seen_v, self.start - at, end)
