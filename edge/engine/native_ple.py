"""Per-layer-embedding rows as the native engine takes them: raw, from memory or from storage."""

from __future__ import annotations

import numpy as np

from edge.store.ple import BITS_OF, MemoryTable, StreamedTable, Table, TableRows
from loaders.formats.placed import bands
from loaders.formats.safetensors import ITEMSIZE
from loaders.formats.sharded import Notify
from loaders.network.matformer import Part
from loaders.weights import Source, table_place, table_stream

BAND = 32 << 20


class Rows(TableRows):
    """Token ids in, rows as they are stored out, ``row_bytes`` each."""

    def __init__(self, table: Table, row_bytes: int) -> None:
        super().__init__(table)
        self.row_bytes = row_bytes

    def gather(self, ids: np.ndarray) -> np.ndarray:
        """[t, columns] of ids int64 [t], C-contiguous: bits of uint8 records, uint16 or uint32."""
        return np.ascontiguousarray(self.table.rows(ids))


def open_rows(source: Source, part: Part, tier: str, cache_bytes: int, notify: Notify) -> Rows:
    """Opens the table of a slice in a tier; ``cache_bytes`` bounds what the ssd tier keeps in memory. On a CPU the
    device's memory is the host's.
    """
    stream = table_stream(source, part)
    row_bytes = stream.window.shape[1] * ITEMSIZE[stream.dtype]
    if tier == "ssd":
        return Rows(StreamedTable(*table_place(source, part), cache_bytes), row_bytes)
    raw = np.empty(stream.window.shape, BITS_OF[ITEMSIZE[stream.dtype]])
    at, step = 0, max(1, BAND // (raw.shape[1] * raw.itemsize))
    for window in bands(stream.window, step):
        stream.read(window, raw[at : at + window.shape[0]])
        at += window.shape[0]
        notify("loading the table", at, len(raw))
    return Rows(MemoryTable(raw), row_bytes)
