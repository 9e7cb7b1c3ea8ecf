"""Per-layer embeddings as a gather table: token ids in, raw rows out, from memory or from storage.

Rows are the stored bits of the slice's columns (uint16 or uint32 of a checkpoint, uint8 records of a pack), the same
from every tier. Ids outside the table
use row 0, the row of the padding token: image and audio placeholders have ids beyond it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter
from typing import Protocol

import numpy as np

from loaders.formats.safetensors import Shards, Tensor
from loaders.formats.window import Window

# Where the kernel takes no advice on what will be read, threads wait for rows in its place.
READERS = 8
ROWS_PER_READER = 4
BITS_OF = {1: np.uint8, 2: np.uint16, 4: np.uint32}


@dataclass
class Counters:
    """``rows`` looked up, of which ``hits`` cost no read; ``bytes_read`` from storage; seconds waited for reads.

    A row that was read ahead is not a hit, however early it came.
    """

    rows: int = 0
    hits: int = 0
    bytes_read: int = 0
    wait_s: float = 0.0

    @property
    def hit_rate(self) -> float:
        """1.0 before anything was looked up."""
        return self.hits / self.rows if self.rows else 1.0


class Table(Protocol):
    """Where rows come from."""

    tier: str
    counters: Counters

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """Raw rows [t, columns] for ids int64 [t]."""

    def prefetch(self, ids: Sequence[int]) -> None:
        """These ids will be asked for next."""

    def relieve(self) -> int:
        """Gives back what can be read again; the bytes that frees."""

    def close(self) -> None:
        """Ends any read under way."""


class TableRows:
    """Rows of a table, decoded by whoever needs them: what all engines ask of a table but that."""

    def __init__(self, table: Table) -> None:
        self.table, self.counters = table, table.counters

    def prefetch(self, ids: Sequence[int]) -> None:
        """These ids come next."""
        self.table.prefetch(ids)

    def relieve(self) -> int:
        """Gives back what can be read again; the bytes that frees."""
        return self.table.relieve()

    def close(self) -> None:
        """Ends any read under way."""
        self.table.close()


def in_table(ids: np.ndarray, rows: int) -> np.ndarray:
    """ids with everything outside [0, rows) replaced by 0."""
    return np.where((ids >= 0) & (ids < rows), ids, 0)


class MemoryTable:
    """The whole window of the table in memory: ``raw`` [rows, columns]."""

    tier = "ram"

    def __init__(self, raw: np.ndarray) -> None:
        self.raw, self.counters = raw, Counters()

    def rows(self, ids: np.ndarray) -> np.ndarray:
        self.counters.rows += len(ids)
        self.counters.hits += len(ids)
        return self.raw[in_table(ids, self.raw.shape[0])]

    def prefetch(self, ids: Sequence[int]) -> None:
        """Nothing to fetch."""

    def relieve(self) -> int:
        """All of it is needed."""
        return 0

    def close(self) -> None:
        """Nothing to end."""


class StreamedTable:
    """Rows read by offset when they are needed, through a cache of at most ``cache_bytes``.

    A batch is deduplicated and its reads are queued with the kernel together. The rows of the next token, or of the
    next chunk, are fetched while those before are being dealt with. Every read is checked for its length by the shard
    reader.
    """

    tier = "ssd"

    def __init__(self, shards: Shards, tensor: Tensor, window: Window, cache_bytes: int) -> None:
        self.shards, self.tensor = shards, tensor
        assert window.cols is not None
        self.cols, self.count = window.cols, tensor.shape[0]
        self.width, dtype = window.shape[1], BITS_OF[tensor.itemsize]
        self.row_bytes = self.width * self.tensor.itemsize
        self.cache = np.empty((max(1, cache_bytes // self.row_bytes), self.width), dtype)
        self.slots: OrderedDict[int, int] = OrderedDict()
        self.arrived: set[int] = set()
        self.relieved = False
        self.counters = Counters()
        self.ahead = ThreadPoolExecutor(1, thread_name_prefix="edge-ple")
        self.pending: tuple[tuple[int, ...], Future[np.ndarray]] | None = None

    def rows(self, ids: np.ndarray) -> np.ndarray:
        ids = in_table(ids, self.count)
        unique, inverse = np.unique(ids, return_inverse=True)
        # What is on its way for others: neither its wait nor its error is for these rows.
        if self.pending is not None and np.isin(unique, self.pending[0]).any():
            self.settle()
        found = np.empty((len(unique), self.width), self.cache.dtype)
        missing, ahead = [], 0
        for i, row in enumerate(unique.tolist()):
            slot = self.slots.get(row)
            if slot is None:
                missing.append(i)
            else:
                self.slots.move_to_end(row)
                found[i] = self.cache[slot]
                ahead += row in self.arrived
        self.counters.rows += len(ids)
        self.counters.hits += len(ids) - len(missing) - ahead
        self.arrived.clear()
        if missing:
            wanted = unique[missing]
            start = perf_counter()
            fresh = self.read(wanted)
            self.counters.wait_s += perf_counter() - start
            self.counters.bytes_read += fresh.nbytes
            found[missing] = fresh
            self.keep(wanted, fresh)
        return found[inverse]

    def prefetch(self, ids: Sequence[int]) -> None:
        if self.pending is not None and self.pending[1].done():
            if self.pending[1].exception() is None:
                self.settle()
            self.pending = None
        distinct = np.unique(in_table(np.asarray(ids, np.int64), self.count)).tolist()
        wanted = tuple(row for row in distinct if row not in self.slots)
        # Rows the cache could not hold until they are asked for would be read twice.
        if wanted and self.pending is None and len(wanted) <= self.cache.shape[0]:
            self.pending = (wanted, self.ahead.submit(self.read, np.asarray(wanted)))

    def settle(self) -> None:
        """Takes in what was prefetched; an error of that read is raised here, by the token that needed it."""
        if self.pending is None:
            return
        (wanted, future), self.pending = self.pending, None
        start = perf_counter()
        rows = future.result()
        self.counters.wait_s += perf_counter() - start
        self.counters.bytes_read += rows.nbytes
        self.arrived.update(wanted)
        self.keep(np.asarray(wanted), rows)

    def read(self, ids: np.ndarray) -> np.ndarray:
        """Rows of distinct ids, ascending: all asked for at once, then read one by one as they arrive."""
        window = Window.of(((i, i + 1) for i in ids.tolist()), self.cols)
        if len(ids) < ROWS_PER_READER or self.shards.advise(self.tensor, window):
            return self.read_window(window)
        shares = np.array_split(ids, min(READERS, len(ids) // ROWS_PER_READER))
        with ThreadPoolExecutor(len(shares)) as pool:
            windows = (Window.of(((i, i + 1) for i in share.tolist()), self.cols) for share in shares)
            return np.concatenate(list(pool.map(self.read_window, windows)))

    def read_window(self, window: Window) -> np.ndarray:
        """One read per row and run of columns, nothing in between."""
        out = np.empty(window.shape, self.cache.dtype)
        self.shards.read_window(self.tensor, window, out)
        return out

    def keep(self, ids: np.ndarray, rows: np.ndarray) -> None:
        """The most recent rows stay, as many as the cache has room for."""
        room = self.cache.shape[0]
        for row, data in zip(ids[-room:].tolist(), rows[-room:], strict=True):
            slot = self.slots.pop(row, None)
            if slot is None:
                slot = len(self.slots) if len(self.slots) < room else self.slots.popitem(last=False)[1]
            self.cache[slot] = data
            self.slots[row] = slot

    def relieve(self) -> int:
        """Keeps an eighth of the row cache, once: with less there would be no room to read ahead."""
        if self.relieved:
            return 0
        self.relieved, before = True, self.cache.nbytes
        self.slots.clear()
        self.arrived.clear()
        self.cache = np.empty((max(1, len(self.cache) // 8), self.width), self.cache.dtype)
        return before - self.cache.nbytes

    def close(self) -> None:
        self.ahead.shutdown(wait=True, cancel_futures=True)
        self.pending = None
