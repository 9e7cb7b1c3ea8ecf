"""Caches of keys and values in torch: full for layers that see everything, a ring for sliding ones, one chunk for
those that see no more than their own chunk, and for latent attention one buffer that is keys and values in one.

A layer that shares another's keys has no cache. Buffers are [kv_heads, capacity, head_dim], or [1, capacity, entry];
pages that were never written are not resident.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from edge.budget.price import kv_capacity
from edge.engine import kv_int8
from edge.engine.kv_int8 import Int8
from loaders.network.spec import AnyAttention, LatentAttention, Model

KINDS = {"float32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
Stored = torch.Tensor | Int8


@dataclass(frozen=True)
class Keys:
    """Keys and values [kv_heads, n, head_dim] a pass may attend to, until the pass ends.

    Of a latent layer ``k`` is the entries [1, n, entry] and ``v`` the same memory, short of each entry's rotated end.

    ``first`` is the position of the first key when they are in order. None means slots in no particular order, for
    the one query there is: all visible to it, or those that ``mask`` [1, n] marks.
    """

    k: Stored
    v: Stored
    first: int | None
    end: int
    mask: torch.Tensor | None = None


class KVCache:
    """Implements the network's Cache for one sequence of at most ``context`` tokens. ``dtype``: one of KINDS."""

    def __init__(self, model: Model, context: int, dtype: torch.dtype, device: torch.device) -> None:
        self.model, self.context, self.device = model, context, device
        self.start = self.tokens = 0
        self.positions = torch.empty(0, dtype=torch.int64)
        self.layers: dict[int, tuple[Stored, Stored]] = {}
        for i, layer in enumerate(model.layers):
            if layer.attention.kv_from is None:
                self.layers[i] = buffers(layer.attention, context, dtype, device)

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
        new_k, new_v = stored(ks, k, v)
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
        assert isinstance(entries, torch.Tensor)
        entries[0, self.start : end] = entry.to(entries.dtype)
        return Keys(entries[:, :end], values[:, :end], 0, end)

    def wrap(self, ks: Stored, vs: Stored, k: Stored, v: Stored, end: int) -> Keys:
        """Several tokens past the end of a ring: the pass sees old and new in order, the ring keeps the newest.

        What is returned is a copy from before the ring was overwritten: a layer that shares it still needs the
        oldest keys for the earliest queries of this pass.
        """
        size = ks.shape[1]
        old = torch.arange(max(0, self.start - size + 1), self.start, device=self.device) % size
        seen_k, seen_v = joined(ks[:, old], k), joined(vs[:, old], v)
        kept = min(k.shape[1], size)
        slots = torch.arange(end - kept, end, device=self.device) % size
        ks[:, slots], vs[:, slots] = k[:, -kept:], v[:, -kept:]
        return Keys(seen_k, seen_v, end - seen_k.shape[1], end)

    def append_chunk(self, ks: Stored, vs: Stored, k: Stored, v: Stored, chunk: int) -> Keys:
        """k, v [kv_heads, t, head_dim] into slots p % chunk; the pass sees from the start of its first chunk on.

        Past a chunk's end that is a copy, for the same reason as in a ring, and the slots keep the newest chunk.
        """
        at, end = self.start % chunk, self.start + k.shape[1]
        stop = at + k.shape[1]
        if stop <= chunk:
            ks[:, at:stop], vs[:, at:stop] = k, v
            return Keys(ks[:, :stop], vs[:, :stop], self.start - at, end)
        seen_k, seen_v = joined(ks[:, :at], k), joined(vs[:, :at], v)
        kept = (end - 1) % chunk + 1
        ks[:, :kept], vs[:, :kept] = k[:, -kept:], v[:, -kept:]
        return Keys(seen_k, seen_v, self.start - at, end)


def buffers(a: AnyAttention, context: int, dtype: torch.dtype, device: torch.device) -> tuple[Stored, Stored]:
    """Room for what a layer keeps. Latent entries stay in 16 bits where keys and values would have 8."""
    capacity = kv_capacity(a, context)
    if isinstance(a, LatentAttention):
        plain = torch.bfloat16 if dtype == torch.int8 else dtype
        entries = torch.empty((1, capacity, a.entry), dtype=plain, device=device)
        return entries, entries[..., : a.kv_rank]
    shape = (a.kv_heads, capacity, a.head_dim)
    if dtype == torch.int8:
        return kv_int8.empty(shape, device), kv_int8.empty(shape, device)
    return torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device)


def stored(like: Stored, k: torch.Tensor, v: torch.Tensor) -> tuple[Stored, Stored]:
    """k, v [t, kv_heads, head_dim] as a buffer keeps them, [kv_heads, t, head_dim]."""
    if isinstance(like, Int8):
        return kv_int8.quantize(k, v)
    return k.transpose(0, 1).to(like.dtype), v.transpose(0, 1).to(like.dtype)


def joined(old: Stored, new: Stored) -> Stored:
    """Along the tokens, contiguous per head: some of torch's matrix kernels are slow on strided halves."""
    if isinstance(old, Int8):
        assert isinstance(new, Int8)
        return kv_int8.cat(old, new)
    assert isinstance(new, torch.Tensor)
    return torch.cat((old, new), 1)
