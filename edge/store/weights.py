"""Realises a slice as bytes in buffers the caller owns: windows of the checkpoint, in the type the plan asks for.

Knows numpy and files, not devices: an engine hands in the memory that tensors are to live in.
"""

from __future__ import annotations

import math

import numpy as np

from loaders.checkpoint import RAW, Checkpoint, bands
from loaders.formats.buffers import from_float32, to_float32
from loaders.formats.safetensors import ITEMSIZE
from loaders.network.matformer import Part
from loaders.network.tensors import PLE_TABLE

STORED = {"float32": "F32", "bf16": "BF16"}
# Conversions go through a buffer of this size, so that loading adds nothing that shows to what is loaded.
STAGING = 4 << 20
# Small and sensitive: they steer how streams are mixed, and weigh nothing.
STEERING = ("altup.router", "altup.predict", "altup.correct")


def stored_dtype(name: str, shape: tuple[int, ...], precision: str) -> str:
    """The type a tensor is kept in: vectors and AltUp's steering matrices stay in float32 at every precision."""
    if len(shape) == 1 or name.endswith(STEERING):
        return "F32"
    return STORED[precision]


def stored_bytes(name: str, shape: tuple[int, ...], precision: str) -> int:
    """Bytes of one tensor as it is kept."""
    return math.prod(shape) * ITEMSIZE[stored_dtype(name, shape, precision)]


def fill(checkpoint: Checkpoint, part: Part, dtype: str, out: np.ndarray) -> None:
    """Reads a window into ``out``, raw storage (uint16 or uint32) of the window's shape, as ``dtype``.

    Without a change of type bytes go from the file straight into ``out``; otherwise through a small buffer.
    """
    tensor = checkpoint.where[part.name]
    if tensor.dtype == dtype:
        checkpoint.shards.read_window(tensor, part.window, out)
        return
    at = 0
    for window in bands(part.window, max(1, STAGING // 4 // max(1, part.window.count // part.window.shape[0]))):
        raw = np.empty(window.shape, RAW[tensor.dtype])
        checkpoint.shards.read_window(tensor, window, raw)
        band = from_float32(to_float32(raw, tensor.dtype), dtype)
        out[at : at + band.shape[0]] = band.view(out.dtype)
        at += band.shape[0]


def weights_bytes(small: dict[str, tuple[int, ...]], precision: str) -> int:
    """Bytes of all tensors of a slice but the per-layer-embedding table."""
    return sum(stored_bytes(name, shape, precision) for name, shape in small.items() if name != PLE_TABLE)
