"""Per-layer-embedding rows as torch tensors on the engine's device, from whichever tier the plan chose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from edge.engine.pinned import Pinned, PinnedGather
from edge.engine.torch_weights import BITS, DTYPE, to_device
from edge.store.ple import Counters, MemoryTable, StreamedTable, Table, in_table
from edge.store.weights import fill
from loaders.checkpoint import RAW, Checkpoint
from loaders.network.matformer import Part


class Rows(Protocol):
    """What the engine asks for rows."""

    counters: Counters

    def gather(self, ids: np.ndarray) -> torch.Tensor:
        """Rows [t, columns] of ids int64 [t] on the engine's device, in the type they are stored in."""

    def prefetch(self, ids: Sequence[int]) -> None:
        """These ids come next."""

    def close(self) -> None:
        """Releases memory, threads and descriptors."""


class HostRows:
    """Rows found by numpy on the host, then handed to the device."""

    def __init__(self, table: Table, dtype: torch.dtype, device: torch.device) -> None:
        self.table, self.dtype, self.device = table, dtype, device
        self.counters = table.counters

    def gather(self, ids: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(self.table.rows(ids)).view(self.dtype).to(self.device)

    def prefetch(self, ids: Sequence[int]) -> None:
        self.table.prefetch(ids)

    def close(self) -> None:
        self.table.close()


class DeviceRows:
    """The table on the device itself."""

    def __init__(self, table: torch.Tensor) -> None:
        self.table, self.counters = table, Counters()

    def gather(self, ids: np.ndarray) -> torch.Tensor:
        return self.lookup(self.found(ids))

    def found(self, ids: np.ndarray) -> torch.Tensor:
        """ids as rows of the table, counted."""
        self.counters.rows += len(ids)
        self.counters.hits += len(ids)
        return torch.from_numpy(in_table(ids, self.table.shape[0]))

    def lookup(self, rows: torch.Tensor) -> torch.Tensor:
        """Device rows of host indices."""
        return self.table.index_select(0, rows.to(self.table.device))

    def prefetch(self, ids: Sequence[int]) -> None:
        """Nothing to fetch."""

    def close(self) -> None:
        """Nothing to end."""


class PinnedRows(DeviceRows):
    """The table in page-locked host memory, read by the GPU itself."""

    def __init__(self, pinned: Pinned, device: torch.device) -> None:
        super().__init__(pinned.tensor)
        self.pinned, self.device = pinned, device
        self.kernel = PinnedGather(pinned.tensor, device)

    def lookup(self, rows: torch.Tensor) -> torch.Tensor:
        return self.kernel(rows.to(self.device))

    def close(self) -> None:
        self.pinned.close()


def open_rows(checkpoint: Checkpoint, part: Part, tier: str, cache_bytes: int, device: torch.device) -> Rows:
    """Opens the table of a slice in a tier; ``cache_bytes`` bounds what the ssd tier keeps in memory."""
    dtype = checkpoint.where[part.name].dtype
    if tier == "ssd":
        return HostRows(StreamedTable(checkpoint, part, cache_bytes), DTYPE[dtype], device)
    if tier == "device" and device.type != "cpu":
        return DeviceRows(to_device(checkpoint, part, dtype, device))
    if device.type == "cuda":
        pinned = Pinned(part.window.shape, DTYPE[dtype])
        fill(checkpoint, part, dtype, pinned.tensor.view(BITS[dtype]).numpy())
        return PinnedRows(pinned, device)
    # On a CPU the device's memory is the host's.
    raw = np.empty(part.window.shape, RAW[dtype])
    fill(checkpoint, part, dtype, raw)
    return HostRows(MemoryTable(raw), DTYPE[dtype], device)
