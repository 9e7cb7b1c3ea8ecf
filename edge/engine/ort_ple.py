"""Per-layer-embedding rows of a package as numpy arrays, from memory or from storage."""

from __future__ import annotations

import numpy as np

from edge.store.ple import BITS_OF, MemoryTable, StreamedTable, Table, TableRows
from loaders.errors import BadCheckpoint
from loaders.formats.buffers import to_float32
from loaders.formats.package import Package
from loaders.formats.quant import BITS, dequantize_rows, record_bytes
from loaders.formats.safetensors import Shards, Tensor
from loaders.formats.window import Window

BAND_BYTES = 8 << 20


class Rows(TableRows):
    """Token ids in, float32 [t, layers, dim] out."""

    def __init__(self, table: Table, kind: str, layers: int, dim: int) -> None:
        super().__init__(table)
        self.kind, self.layers, self.dim = kind, layers, dim

    def gather(self, ids: np.ndarray, out: np.ndarray) -> None:
        """Fills ``out`` float32 [t, layers, dim] with the rows of ids int64 [t], unscaled."""
        raw = self.table.rows(ids)
        if self.kind in BITS:
            out[...] = dequantize_rows(raw, self.layers, self.dim, self.kind)
        else:
            out[...] = to_float32(raw, self.kind).reshape(out.shape)


def open_rows(package: Package, tier: str, cache_bytes: int) -> Rows:
    """Opens a package's table in a tier, "ram" or "ssd"; ``cache_bytes`` bounds what the ssd tier keeps in memory."""
    ple, facts = package.model.ple, package.facts.ple
    assert ple is not None
    assert facts is not None
    shards, tensor = package.table()
    layers, dim = len(package.model.layers), ple.dim
    width = layers * (record_bytes(dim, facts.kind) if facts.kind in BITS else dim)
    if tensor.shape != (ple.rows, width):
        found = f"shape {list(tensor.shape)}"
        raise BadCheckpoint(found, file=tensor.shard, field=tensor.name, expected=f"{[ple.rows, width]}")
    if tier == "ssd":
        table: Table = StreamedTable(shards, tensor, Window.full(tensor.shape), cache_bytes)
    else:
        table = MemoryTable(read(shards, tensor))
    return Rows(table, facts.kind, layers, dim)


def read(shards: Shards, tensor: Tensor) -> np.ndarray:
    """The whole table as it is stored, a band at a time."""
    out = np.empty(tensor.shape, BITS_OF[tensor.itemsize])
    step = max(1, BAND_BYTES // (tensor.shape[1] * tensor.itemsize))
    for first in range(0, tensor.shape[0], step):
        stop = min(first + step, tensor.shape[0])
        shards.read_window(tensor, Window.of(((first, stop),), ((0, tensor.shape[1]),)), out[first:stop])
    return out
