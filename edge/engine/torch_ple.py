"""Per-layer-embedding rows as torch tensors on the engine's device, from whichever tier the plan chose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch

from edge.engine.pinned import Pinned, PinnedGather
from edge.engine.torch_weights import DTYPE, RAW_BITS, to_device
from edge.store.ple import Counters, MemoryTable, StreamedTable, Table, TableRows, in_table
from loaders.formats.pack import Pack
from loaders.formats.quant import BITS, SCALE_BYTES, dequantize_rows
from loaders.network.matformer import Part
from loaders.weights import Source, table_place, table_stream

# Stored rows [t, columns] -> float32 [t, layers, dim].
Decode = Callable[[torch.Tensor], torch.Tensor]


class Rows(Protocol):
    """What the engine asks for rows."""

    counters: Counters

    def gather(self, ids: np.ndarray) -> torch.Tensor:
        """float32 [t, layers, dim] of ids int64 [t], on the engine's device."""

    def prefetch(self, ids: Sequence[int]) -> None:
        """These ids come next."""

    def relieve(self) -> int:
        """Gives back what can be read again; the bytes that frees."""

    def close(self) -> None:
        """Releases memory, threads and descriptors."""


class HostRows(TableRows):
    """Rows found by numpy on the host, then handed to the device as they are stored."""

    def __init__(self, table: Table, dtype: torch.dtype, device: torch.device, decode: Decode) -> None:
        super().__init__(table)
        self.dtype, self.device, self.decode = dtype, device, decode

    def gather(self, ids: np.ndarray) -> torch.Tensor:
        return self.decode(torch.from_numpy(self.table.rows(ids)).view(self.dtype).to(self.device))


class DeviceRows:
    """The table on the device itself."""

    def __init__(self, table: torch.Tensor, decode: Decode) -> None:
        self.table, self.counters, self.decode = table, Counters(), decode

    def gather(self, ids: np.ndarray) -> torch.Tensor:
        return self.decode(self.lookup(self.found(ids)))

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

    def relieve(self) -> int:
        """All of it is needed."""
        return 0

    def close(self) -> None:
        """Nothing to end."""


class PinnedRows(DeviceRows):
    """The table in page-locked host memory, read by the GPU itself."""

    def __init__(self, pinned: Pinned, device: torch.device, decode: Decode) -> None:
        super().__init__(pinned.tensor, decode)
        self.pinned, self.device = pinned, device
        self.kernel = PinnedGather(pinned.tensor, device)

    def lookup(self, rows: torch.Tensor) -> torch.Tensor:
        return self.kernel(rows.to(self.device))

    def close(self) -> None:
        self.pinned.close()


def decoder_for(source: Source, layers: int) -> Decode:
    """How a source's rows become float32."""
    assert source.model.ple is not None
    dim = source.model.ple.dim
    if isinstance(source, Pack):
        kind = source.ple_kind or "int8"
        return lambda records: from_records(records, layers, dim, kind)
    return lambda rows: rows.float().view(-1, layers, dim)


def from_records(records: torch.Tensor, layers: int, dim: int, kind: str) -> torch.Tensor:
    """Records uint8 [t, bytes] -> float32 [t, layers, dim]; see :func:`loaders.formats.quant.quantize_rows`."""
    if records.device.type == "cpu":
        return torch.from_numpy(dequantize_rows(records.numpy(), layers, dim, kind))
    parts = records.view(len(records), layers, -1)
    scale = parts[..., :SCALE_BYTES].contiguous().view(torch.float16).float()
    codes = parts[..., SCALE_BYTES:]
    if BITS[kind] == 8:
        return codes.contiguous().view(torch.int8).float() * scale
    return (torch.cat((codes & 15, codes >> 4), -1).float() - 8.0) * scale


def open_rows(source: Source, part: Part, layers: int, tier: str, cache_bytes: int, device: torch.device) -> Rows:
    """Opens the table of a slice in a tier; ``cache_bytes`` bounds what the ssd tier keeps in memory."""
    decode = decoder_for(source, layers)
    stream = table_stream(source, part)
    dtype, raw = DTYPE[stream.dtype], RAW_BITS[stream.dtype]
    if tier == "ssd":
        return HostRows(StreamedTable(*table_place(source, part), cache_bytes), dtype, device, decode)
    if tier == "device" and device.type != "cpu":
        return DeviceRows(to_device(stream, device), decode)
    if device.type == "cuda":
        pinned = Pinned(stream.window.shape, dtype)
        stream.read(stream.window, pinned.tensor.view(raw).numpy())
        return PinnedRows(pinned, device, decode)
    # On a CPU the device's memory is the host's.
    table = to_device(stream, device).view(raw).numpy()
    return HostRows(MemoryTable(table), dtype, device, decode)
