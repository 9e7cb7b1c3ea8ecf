"""Per-layer-embedding rows as torch values [t, layers, dim], float32, from whichever tier the plan chose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from edge.engine.torch_weights import BITS, DTYPE, to_device
from edge.store.ple import Counters, MemoryTable, StreamedTable, Table, in_table
from edge.store.weights import fill
from loaders.checkpoint import RAW, Checkpoint
from loaders.network.matformer import Part


class Rows(Protocol):
    """What the engine asks for rows."""

    tier: str
    counters: Counters

    def gather(self, ids: np.ndarray) -> torch.Tensor:
        """Rows [t, columns] of ids int64 [t] on the engine's device, in the type they are stored in."""

    def prefetch(self, ids: Sequence[int]) -> None:
        """These ids come next."""

    def close(self) -> None:
        """Releases threads and descriptors."""


class HostRows:
    """Rows found by numpy on the host, then handed to the device."""

    def __init__(self, table: Table, dtype: str, device: torch.device) -> None:
        self.table, self.dtype, self.device = table, DTYPE[dtype], device
        self.tier, self.counters = table.tier, table.counters

    def gather(self, ids: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(self.table.rows(ids)).view(self.dtype).to(self.device)

    def prefetch(self, ids: Sequence[int]) -> None:
        self.table.prefetch(ids)

    def close(self) -> None:
        self.table.close()


class DeviceRows:
    """The table on the device itself."""

    tier = "device"

    def __init__(self, table: torch.Tensor) -> None:
        self.table, self.counters = table, Counters()

    def gather(self, ids: np.ndarray) -> torch.Tensor:
        self.counters.rows += len(ids)
        self.counters.hits += len(ids)
        found = torch.from_numpy(in_table(ids, self.table.shape[0])).to(self.table.device)
        return self.table.index_select(0, found)

    def prefetch(self, ids: Sequence[int]) -> None:
        """Nothing to fetch."""

    def close(self) -> None:
        """Nothing to end."""


class PinnedRows(DeviceRows):
    """The table in page-locked host memory, read by the GPU itself: no host round trip, no staging copy."""

    tier = "ram"

    def __init__(self, table: torch.Tensor, device: torch.device) -> None:
        super().__init__(table)
        self.device = device

    def gather(self, ids: np.ndarray) -> torch.Tensor:
        from edge.engine.pinned import gather_pinned

        self.counters.rows += len(ids)
        self.counters.hits += len(ids)
        found = torch.from_numpy(in_table(ids, self.table.shape[0])).to(self.device)
        return gather_pinned(self.table, found)


def open_rows(checkpoint: Checkpoint, part: Part, tier: str, cache_bytes: int, device: torch.device) -> Rows:
    """Opens the table of a slice in a tier; ``cache_bytes`` bounds what the ssd tier keeps in memory."""
    dtype = checkpoint.where[part.name].dtype
    if tier == "ssd":
        return HostRows(StreamedTable(checkpoint, part, cache_bytes), dtype, device)
    if device.type == "cpu":
        raw = np.empty(part.window.shape, RAW[dtype])
        fill(checkpoint, part, dtype, raw)
        rows = HostRows(MemoryTable(raw), dtype, device)
        rows.tier = tier
        return rows
    table = load_table(checkpoint, part, dtype, device, pinned=tier == "ram")
    return PinnedRows(table, device) if tier == "ram" else DeviceRows(table)


def load_table(checkpoint: Checkpoint, part: Part, dtype: str, device: torch.device, *, pinned: bool) -> torch.Tensor:
    """The window of the table in page-locked memory, or on the device."""
    if not pinned:
        return to_device(checkpoint, part, dtype, device)
    from edge.engine.pinned import pinned_empty

    table = pinned_empty(part.window.shape, DTYPE[dtype])
    fill(checkpoint, part, dtype, table.view(BITS[dtype]).numpy())
    return table
