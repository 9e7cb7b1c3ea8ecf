"""Realises a slice as bytes in buffers the caller owns: windows of a checkpoint or a pack, in the recipe's formats.

Knows numpy and files, not devices: whoever asks hands in the memory that tensors are to live in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from loaders.checkpoint import Checkpoint
from loaders.formats.buffers import from_float32
from loaders.formats.pack import Pack
from loaders.formats.placed import bands
from loaders.formats.quant import BITS, record_bytes, windows
from loaders.formats.recipe import Recipe, stored_as, stored_bytes
from loaders.formats.safetensors import Shards, Tensor, Window
from loaders.network.matformer import Part, Slice, source_name
from loaders.network.spec import Model
from loaders.network.tensors import PLE_TABLE, Shape, tensors

Source = Checkpoint | Pack
# Conversions go through a buffer of this size, so that loading adds nothing that shows to what is loaded.
STAGING = 4 << 20


@dataclass(frozen=True)
class Kept:
    """One tensor of a slice: its name in the full model, its shape there, and its shape in the slice.

    The full model decides the format: a slice reads windows of what a pack holds.
    """

    source: str
    full: Shape
    shape: Shape

    @property
    def kind(self) -> Kept:
        """The same without the number of its layer: equal for tensors that are kept alike."""
        return Kept(self.source.split(".", 2)[2], self.full, self.shape) if self.source.startswith("layers.") else self

    def stored(self, recipe: Recipe) -> str:
        """The format it is kept in."""
        return stored_as(self.source, self.full, recipe)

    def nbytes(self, recipe: Recipe) -> int:
        """Bytes as it is kept."""
        return stored_bytes(self.shape, self.stored(recipe))


def kept(model: Model, part: Slice, small: Model) -> dict[str, Kept]:
    """Every tensor of a slice ``small`` of ``model``, by its name in the slice, but the per-layer-embedding table."""
    whole = tensors(model)
    names = {name: (source_name(part, name), shape) for name, shape in tensors(small).items() if name != PLE_TABLE}
    return {name: Kept(source, whole[source], shape) for name, (source, shape) in names.items()}


def table_kind(source: Source, recipe: Recipe) -> str:
    """The format of per-layer-embedding rows: as stored in a checkpoint, int8 in the packs made of it."""
    if isinstance(source, Pack):
        return source.ple_kind or "int8"
    return "int8" if recipe.precision in BITS else source.where[PLE_TABLE].dtype


def fill(checkpoint: Checkpoint, part: Part, dtype: str, out: np.ndarray) -> None:
    """Reads a window into ``out``, raw storage (uint16 or uint32) of the window's shape, as ``dtype``.

    Without a change of type bytes go from the file straight into ``out``; otherwise through a small buffer.
    """
    placed = checkpoint.where[part.name]
    if placed.exact == dtype:
        placed.read(checkpoint.shards, part.window, out)
        return
    at = 0
    for window in bands(part.window, max(1, STAGING // 4 // max(1, part.window.count // part.window.shape[0]))):
        band = from_float32(placed.values(checkpoint.shards, window), dtype)
        out[at : at + band.shape[0]] = band.view(out.dtype)
        at += band.shape[0]


@dataclass(frozen=True)
class Stream:
    """One array of a run: ``read(window, out)`` fills raw storage of a part of ``window``; ``dtype`` by safetensors."""

    window: Window
    dtype: str
    read: Callable[[Window, np.ndarray], None]


def streams(source: Source, part: Part, recipe: Recipe) -> tuple[Stream, ...]:
    """A tensor of a slice as it is read: one array, or codes and scales."""
    if isinstance(source, Checkpoint):
        stored = stored_as(part.name, tensors(source.model)[part.name], recipe)
        return (Stream(part.window, stored, lambda w, out: fill(source, Part(part.name, w), stored, out)),)
    shards, tensor, scale, stored = source.find(part.name, recipe)
    if scale is None:
        return (of_shards(shards, tensor, part.window),)
    code_window, scale_window = windows(part.window, stored)
    return of_shards(shards, tensor, code_window), of_shards(shards, scale, scale_window)


def table_stream(source: Source, part: Part) -> Stream:
    """The per-layer-embedding table: rows as stored in a checkpoint, or a pack's records of the layers it keeps."""
    shards, tensor, window = table_place(source, part)
    return of_shards(shards, tensor, window)


def table_place(source: Source, part: Part) -> tuple[Shards, Tensor, Window]:
    """Where the table's rows lie, and the columns that a slice reads of them."""
    if isinstance(source, Checkpoint):
        tensor = source.where[part.name].plain
        assert tensor is not None
        return source.shards, tensor, part.window
    shards, tensor = source.table()
    assert source.model.ple is not None
    assert source.ple_kind is not None
    assert part.window.cols is not None
    dim, record = source.model.ple.dim, record_bytes(source.model.ple.dim, source.ple_kind)
    return (
        shards,
        tensor,
        Window.of(part.window.rows, ((a // dim * record, b // dim * record) for a, b in part.window.cols)),
    )


def of_shards(shards: Shards, tensor: Tensor, window: Window) -> Stream:
    """Bytes as they are in a file."""
    return Stream(window, tensor.dtype, lambda w, out: shards.read_window(tensor, w, out))
