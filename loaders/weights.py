"""Realises a slice as bytes in buffers the caller owns: windows of a checkpoint or a pack, in the recipe's formats.

Knows numpy and files, not devices: whoever asks hands in the memory that tensors are to live in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from loaders.checkpoint import Checkpoint
from loaders.errors import Usage
from loaders.formats.buffers import from_float32, to_float32
from loaders.formats.pack import Pack
from loaders.formats.panels import (
    BLOCK_BYTES,
    PANEL,
    covering,
    panel_columns,
    panel_count,
    panel_shape,
    panel_window,
    rows,
    whole_panels,
)
from loaders.formats.placed import bands
from loaders.formats.quant import BITS, BLOCK, Codes, Floats, Scales, dequantize, quantize, record_bytes
from loaders.formats.recipe import Recipe, stored_as, stored_bytes
from loaders.formats.safetensors import ITEMSIZE, Shards, Tensor
from loaders.formats.window import Ranges, Window
from loaders.network.matformer import Part, Slice, source_name
from loaders.network.spec import Model
from loaders.network.tensors import PLE_TABLE, Shape, tensors
from loaders.ordered import blaming

Source = Checkpoint | Pack
# Conversions go through a buffer of this size, so that loading adds nothing that shows to what is loaded.
STAGING = 4 << 20
# What places of panels are multiples of, in a file that is mapped.
ALIGNED = 32


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


def plain_stream(source: Source, part: Part, recipe: Recipe) -> Stream:
    """A tensor of a slice that is kept as values. Quantized ones are read with :func:`code_bands`, or in panels."""
    if isinstance(source, Checkpoint):
        stored = stored_as(part.name, tensors(source.model)[part.name], recipe)
        return Stream(part.window, stored, lambda w, out: fill(source, Part(part.name, w), stored, out))
    shards, tensor, _ = source.find(part.name, recipe)
    return of_shards(shards, tensor, part.window)


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


def matrices(shape: Shape, window: Window) -> list[Ranges]:
    """The rows that a window of a tensor of ``shape`` has of each matrix: of a stack's matrices, or of the one."""
    if len(shape) < 3:
        return [window.rows]
    n = shape[1]
    return [((max(a, i * n), min(b, i * n + n)),) for a, b in window.rows for i in range(a // n, -(-b // n))]


def value_bands(source: Source, part: Part, recipe: Recipe, count: int) -> Iterator[Callable[[], Floats]]:
    """float32 [rows, cols] of a window, the values that a run at ``recipe`` computes with: rounded, or dequantized.

    In bands of about ``count`` values and at least two rows, in order, each made when it is called for. A band has rows
    of one range of the window and of one matrix of a stack. [rows] for a vector.
    """
    shape = tensors(source.model)[part.name]
    stored = stored_as(part.name, shape, recipe)
    if stored in BITS:
        assert part.window.cols is not None
        cols = Window((), part.window.cols).shape[1]
        yield from (partial(as_floats, job, stored, cols) for job in code_bands(source, part, recipe, count))
    elif isinstance(source, Checkpoint):
        for values in checkpoint_bands(source, part, shape, count):
            yield values if stored == "F32" else partial(rounded, values, stored)
    else:
        shards, tensor, _ = source.find(part.name, recipe)
        for window in row_bands(shape, part.window, count):
            yield partial(plain_values, shards, tensor, window)


def code_bands(source: Source, part: Part, recipe: Recipe, count: int) -> Iterator[Callable[[], tuple[Codes, Scales]]]:
    """The same of a quantized matrix as codes and scales, row-major.

    Of a pack a band is as many rows as fill panels: where a range begins with one, no byte is read twice.

    A window is one range of columns. Where it ends inside a block, that block has the codes and the scale it has in the
    full model, and the columns beyond are zero codes.
    """
    shape = tensors(source.model)[part.name]
    stored = stored_as(part.name, shape, recipe)
    assert part.window.cols is not None
    ((first, stop),) = part.window.cols
    if isinstance(source, Pack):
        shards, tensor, _ = source.find(part.name, recipe)
        for window in row_bands(shape, part.window, count, PANEL):
            yield partial(pack_codes, shards, tensor, shape[-2], window, stored)
        return
    whole = min(-(-stop // BLOCK) * BLOCK, shape[-1])
    wide = Part(part.name, Window(part.window.rows, ((first, whole),)))
    placed = source.where[part.name]
    for values in checkpoint_bands(source, wide, shape, count):
        yield partial(blaming, placed, partial(quantized, values, stored, stop % BLOCK if whole != stop else 0))


@dataclass(frozen=True)
class PanelPlace:
    """Where the panels of a window lie in a pack: ``panels`` of each of ``matrices`` [rows, cols], in file ``path``.

    ``offset``: of the first, in bytes of the file, a multiple of 32. ``step`` and ``matrix``: bytes from one panel, and
    from one matrix, to the next. A panel has ``blocks`` blocks of the window. Beyond ``rows`` in a last panel, and
    beyond ``cols`` in a last block, lies what the full model has there, not zeros. ``shards`` has the file open.
    """

    shards: Shards
    path: str
    offset: int
    panels: int
    step: int
    blocks: int
    rows: int
    cols: int
    matrices: int
    matrix: int
    kind: str


def panel_place(source: Source, part: Part, recipe: Recipe) -> PanelPlace | None:
    """Where a quantized tensor can be multiplied as it lies in its file.

    None for what has no panels there, for windows that are not themselves in panels, and for what is not aligned.
    """
    shape = tensors(source.model)[part.name]
    stored = stored_as(part.name, shape, recipe)
    if not isinstance(source, Pack) or stored not in BITS:
        return None
    shards, tensor, _ = source.find(part.name, recipe)
    window, step = panel_window(part.window, shape, stored), tensor.shape[1]
    assert part.window.cols is not None
    if window is None or window.cols is None or len(window.rows) > 1 or len(window.cols) > 1:
        return None
    ((first, _),), ((left, right),) = window.rows, window.cols
    offset = tensor.offset + first * step + left
    if offset % ALIGNED:
        return None
    height, (count, cols) = shape[-2], part.window.shape
    lines = min(height, count)
    return PanelPlace(
        shards, tensor.shard, offset, panel_count(lines), step, (right - left) // BLOCK_BYTES[stored],
        lines, cols, count // lines, panel_count(height) * step, stored,
    )  # fmt: skip


def panel_rows(source: Source, part: Part, recipe: Recipe, out: npt.NDArray[np.uint8]) -> None:
    """Fills ``out``, uint8 of the :func:`panel_shape` of what a window keeps, with its panels, band by band.

    For windows that :func:`panel_place` has no place for, and for checkpoints, whose values are quantized. ``out`` must
    be contiguous. Beyond the window's rows and columns everything is zero. Raises what :func:`code_bands` raises.
    """
    shape = tensors(source.model)[part.name]
    count, cols = part.window.shape
    stored, height = stored_as(part.name, shape, recipe), shape[-2] if len(shape) > 2 else count
    if out.shape != (wanted := panel_shape((count // height, height, cols), stored)):
        raise Usage(f"{list(out.shape)}", field=part.name, expected=str(list(wanted)))
    at = 0
    for found in whole_panels((job() for job in code_bands(source, part, recipe, STAGING // 4)), height, stored):
        out[at : at + len(found)] = found
        at += len(found)


def row_bands(shape: Shape, window: Window, count: int, step: int = 2) -> Iterator[Window]:
    """A window in bands of about ``count`` values, a multiple of ``step`` rows but for the last of each range."""
    lines = max(1, count // (1 if window.cols is None else Window((), window.cols).shape[1]) // step) * step
    for ranges in matrices(shape, window):
        yield from bands(Window(ranges, window.cols), lines)


def checkpoint_bands(checkpoint: Checkpoint, part: Part, shape: Shape, count: int) -> Iterator[Callable[[], Floats]]:
    """Bands of float32 as they are stored. All of a tensor that lies the other way round is read as it lies."""
    placed = checkpoint.where[part.name]
    if placed.plane_bytes and part.window == placed.window:
        return placed.steps(checkpoint.shards, max(2, count // shape[-1] // 2 * 2))
    return (partial(placed.values, checkpoint.shards, window) for window in row_bands(shape, part.window, count))


def as_floats(job: Callable[[], tuple[Codes, Scales]], stored: str, cols: int) -> Floats:
    """Codes and scales as values."""
    return dequantize(*job(), stored, cols)


def rounded(values: Callable[[], Floats], stored: str) -> Floats:
    """Values as they come back from being stored."""
    return to_float32(from_float32(values(), stored), stored)


def plain_values(shards: Shards, tensor: Tensor, window: Window) -> Floats:
    """Values of a pack that are no codes."""
    raw: npt.NDArray[np.uint8] = np.empty(window.shape, f"u{ITEMSIZE[tensor.dtype]}")
    shards.read_window(tensor, window, raw)
    return to_float32(raw, tensor.dtype)


def pack_codes(shards: Shards, tensor: Tensor, height: int, window: Window, stored: str) -> tuple[Codes, Scales]:
    """A band of one matrix, of ``height`` rows, of a pack, the columns beyond the window zeroed."""
    assert window.cols is not None
    ((first, stop),) = window.rows
    lines, skip = covering(first, stop, height)
    place = Window((lines,), panel_columns(window.cols, stored))
    found: Codes = np.empty(place.shape, np.uint8)
    shards.read_window(tensor, place, found)
    codes, scales = rows(found, stored, skip + stop - first, Window((), window.cols).shape[1])
    return zeroed(codes[skip:], stored, window.cols[-1][1] % BLOCK), scales[skip:]


def quantized(values: Callable[[], Floats], stored: str, last: int) -> tuple[Codes, Scales]:
    """A band of a checkpoint as packing makes it, ``last`` columns of the last block kept."""
    found, scales = quantize(values(), stored)
    return zeroed(found, stored, last), scales


def zeroed(codes: Codes, stored: str, last: int) -> Codes:
    """The same codes, in place, those of the last block from column ``last`` on zero; all kept where it is 0."""
    if last and stored == "int8":
        codes[:, last - BLOCK :] = 0
    elif last:
        there = np.arange(BLOCK) < last
        half = BLOCK // 2
        mask = np.where(there[:half], 15, 0).astype(np.uint8) | np.where(there[half:], 240, 0).astype(np.uint8)
        codes[:, -half:] = codes[:, -half:] & mask | (np.uint8(0x88) & ~mask)
    return codes
