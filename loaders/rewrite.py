"""Writes a slice as a checkpoint folder of its own, streaming: one band of rows in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from loaders.checkpoint import Checkpoint
from loaders.errors import Unsupported
from loaders.formats.atomic import fresh_folder
from loaders.formats.config import read_bytes
from loaders.formats.placed import bands
from loaders.formats.safetensors import ITEMSIZE
from loaders.formats.sharded import Notify, by_size, sizes_of, stored_name, write_tensors
from loaders.layout import file_name
from loaders.network.matformer import Part, Slice, parts

SHARD_BYTES = 4 * 10**9  # files of a size every tool handles
BAND_BYTES = 8 << 20
# What goes along unchanged, and the most each may hold.
COMPANIONS = {
    "tokenizer.json": 256 << 20,
    "tokenizer.model": 64 << 20,
    "tokenizer_config.json": 64 << 20,
    "special_tokens_map.json": 8 << 20,
    "generation_config.json": 8 << 20,
    "chat_template.jinja": 1 << 20,
}


def write_slice(checkpoint: Checkpoint, part: Slice, output: Path, notify: Notify = lambda *_: None) -> int:
    """Writes config, weights, tokenizer and defaults of a slice into a new folder; returns the bytes of its weights.

    Raises Unsupported for a family whose config cannot be cut, CannotCreate when ``output`` exists or its parent
    cannot be written, ReadFailed when the disk is full. The source is only read.
    """
    family = checkpoint.family
    if family.sliced_config is None:
        raise Unsupported(f"{family.title} has no slices", field="--slice")
    config = family.sliced_config(checkpoint.raw_config, checkpoint.model, part)
    wanted = {
        stored_name(file_name(family.names, name)): piece for name, piece in parts(checkpoint.model, part).items()
    }
    specs = {name: (checkpoint.where[piece.name].dtype, piece.window.shape) for name, piece in wanted.items()}
    sizes = sizes_of(specs)
    with fresh_folder(output, sum(sizes.values())) as folder:
        groups = by_size(sizes, SHARD_BYTES)
        total = write_tensors(folder, specs, groups, lambda name: raw_bands(checkpoint, wanted[name]), notify)
        (folder / "config.json").write_text(json.dumps(config, indent=2))
        for name, limit in COMPANIONS.items():
            if (checkpoint.folder / name).exists():
                (folder / name).write_bytes(read_bytes(checkpoint.folder / name, limit))
    return total


def raw_bands(checkpoint: Checkpoint, part: Part) -> Iterator[np.ndarray]:
    """A window's raw bytes, a few rows at a time."""
    row = part.window.count // part.window.shape[0] * ITEMSIZE[checkpoint.where[part.name].dtype]
    for window in bands(part.window, max(1, BAND_BYTES // max(1, row))):
        yield checkpoint.read_raw(part.name, window)
