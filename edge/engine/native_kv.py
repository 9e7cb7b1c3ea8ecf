"""Caches of keys and values for the native engine: rings, so that no pass makes copies, in one anonymous mapping.

A layer that shares another's keys has no cache. Buffers are [kv_heads, capacity, head_dim], or [1, capacity, entry];
a token at position p is in slot p % capacity. Pages that were never written are not resident.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator

from edge.budget.price import kv_group
from edge.engine.native.library import Cache, Kind
from loaders.errors import OverBudget
from loaders.formats.quant import SCALE_BYTES
from loaders.network.spec import AnyAttention, LatentAttention, Model

KINDS = {"float32": Kind.F32, "bf16": Kind.BF16, "int8": Kind.INT8}
VALUE_BYTES = {Kind.F32: 4, Kind.BF16: 2, Kind.INT8: 1}
# Where a buffer begins: a cache line.
ALIGNED = 64


class Caches:
    """Room for one sequence of at most ``context`` tokens, in passes of at most ``chunk``. ``kind``: one of KINDS.

    ``table`` is C's array of them, in the order of the layers that have one. ``start``: tokens that are in them; it is
    the engine's to count. Addresses hold as long as this object lives. Raises OverBudget without memory.
    """

    def __init__(self, model: Model, context: int, chunk: int, kind: str) -> None:
        self.model, self.context, self.chunk, self.kind = model, context, chunk, kind
        self.start = 0
        self.nbytes = cache_bytes(model, context, chunk, kind)
        try:
            pages = mmap.mmap(-1, self.nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError:
            found = f"{self.nbytes} bytes of keys and values"
            raise OverBudget(found, field="memory", hint="Ask for a shorter --context") from None
        # Keeps the mapping as long as this lives.
        self.bytes = (ctypes.c_char * self.nbytes).from_buffer(pages)
        caches, at = [], ctypes.addressof(self.bytes)
        for attention in owners(model):
            caches.append(self.cache(attention, at))
            at += sum(sizes(attention, context, chunk, kind))
        self.table = (Cache * len(caches))(*caches)

    def cache(self, attention: AnyAttention, at: int) -> Cache:
        """A layer's cache from address ``at`` on."""
        kind, (heads, k_dim, v_dim) = kept(attention, self.kind), shape(attention)
        counts = sizes(attention, self.context, self.chunk, self.kind)
        places = [at + sum(counts[:i]) if count else None for i, count in enumerate(counts)]
        k, v, k_scale, v_scale = places
        group = kv_group(k_dim) if kind == Kind.INT8 else 1
        latent = isinstance(attention, LatentAttention)
        length = self.length(attention)
        return Cache(
            k, v, k_scale, v_scale, counts[0], counts[1], counts[2], counts[3],
            heads, length, k_dim, v_dim, group, kind, int(latent),
        )  # fmt: skip

    def length(self, attention: AnyAttention) -> int:
        """Slots of a layer's cache."""
        return capacity(attention, self.context, self.chunk)

    def capacity(self, layer: int) -> int:
        """Slots of the cache of layer number ``layer``."""
        return self.length(self.model.layers[layer].attention)

    def reset(self) -> None:
        """Forgets everything; memory stays."""
        self.start = 0


def capacity(attention: AnyAttention, context: int, chunk: int) -> int:
    """Slots of a layer's ring: what the first query of a pass of ``chunk`` tokens sees must outlast the whole pass."""
    return context if attention.span is None else min(context, attention.span + chunk - 1)


def cache_bytes(model: Model, context: int, chunk: int, kind: str) -> int:
    """What :class:`Caches` takes, to the byte."""
    return sum(sum(sizes(attention, context, chunk, kind)) for attention in owners(model))


def owners(model: Model) -> Iterator[AnyAttention]:
    """The attention of each layer that has a cache of its own."""
    return (layer.attention for layer in model.layers if layer.attention.kv_from is None)


def shape(attention: AnyAttention) -> tuple[int, int, int]:
    """(heads, values of a key, values of a value)."""
    if isinstance(attention, LatentAttention):
        return 1, attention.entry, attention.kv_rank
    return attention.kv_heads, attention.head_dim, attention.head_dim


def kept(attention: AnyAttention, kind: str) -> Kind:
    """What a layer keeps. Latent entries stay in 16 bits where keys and values have 8."""
    return Kind.BF16 if kind == "int8" and isinstance(attention, LatentAttention) else KINDS[kind]


def sizes(attention: AnyAttention, context: int, chunk: int, kind: str) -> tuple[int, int, int, int]:
    """Bytes of a layer's keys, values, and scales of either; those of a latent layer are keys alone."""
    heads, k_dim, v_dim = shape(attention)
    stored, slots = kept(attention, kind), heads * capacity(attention, context, chunk)
    values = 0 if isinstance(attention, LatentAttention) else v_dim
    groups = [dim // kv_group(dim) if dim and stored == Kind.INT8 else 0 for dim in (k_dim, values)]
    k, v = (aligned(slots * dim * VALUE_BYTES[stored]) for dim in (k_dim, values))
    k_scale, v_scale = (aligned(slots * count * SCALE_BYTES) for count in groups)
    return k, v, k_scale, v_scale


def aligned(size: int) -> int:
    """Bytes up to where the next buffer may begin."""
    return -(-size // ALIGNED) * ALIGNED
