"""Weights as torch tensors on their device: ``w(name)`` of the torch engine."""

from __future__ import annotations

from collections.abc import Callable

import torch

from edge.budget.memory import Ledger
from edge.store.weights import fill, stored_bytes, stored_dtype
from loaders.checkpoint import Checkpoint, bands
from loaders.network.matformer import Part
from loaders.network.tensors import PLE_TABLE

DTYPE = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
BITS = {"BF16": torch.uint16, "F16": torch.uint16, "F32": torch.uint32}
# Host memory that tensors pass through on their way to a GPU.
STAGING = 32 << 20


def load_weights(
    checkpoint: Checkpoint,
    parts: dict[str, Part],
    precision: str,
    device: torch.device,
    ledger: Ledger,
    notify: Callable[[str, int, int], None] = lambda *_: None,
) -> dict[str, torch.Tensor]:
    """Every tensor of a slice but the per-layer-embedding table, in the plan's precision, on ``device``."""
    loaded, done = {}, 0
    sizes = {name: stored_bytes(name, p.window.shape, precision) for name, p in parts.items() if name != PLE_TABLE}
    total = sum(sizes.values())
    for name, size in sizes.items():
        part = parts[name]
        ledger.take("weights", size)
        dtype = stored_dtype(name, part.window.shape, precision)
        loaded[name] = to_device(checkpoint, part, dtype, device)
        done += size
        notify("loading", done, total)
    return loaded


def to_device(checkpoint: Checkpoint, part: Part, dtype: str, device: torch.device) -> torch.Tensor:
    """One window, read straight into its final memory on a CPU, through a small buffer otherwise."""
    tensor = torch.empty(part.window.shape, dtype=DTYPE[dtype], device=device)
    if device.type == "cpu":
        fill(checkpoint, part, dtype, tensor.view(BITS[dtype]).numpy())
        return tensor
    width = max(1, part.window.count // part.window.shape[0])
    at = 0
    for window in bands(part.window, max(1, STAGING // 4 // width)):
        band = torch.empty(window.shape, dtype=DTYPE[dtype])
        fill(checkpoint, Part(part.name, window), dtype, band.view(BITS[dtype]).numpy())
        tensor[at : at + band.shape[0]].copy_(band)
        at += band.shape[0]
    return tensor
