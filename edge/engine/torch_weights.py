"""Weights as torch tensors on their device: ``w(name)`` of the torch engine. Quantized ones are Blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch

from edge.budget.memory import Ledger
from edge.engine.torch_blocks import Blocks
from loaders.formats.placed import bands
from loaders.formats.quant import BITS, BLOCK, Codes, Scales, block_count, code_bytes
from loaders.formats.recipe import Recipe
from loaders.network.matformer import Part
from loaders.network.tensors import flat
from loaders.weights import Kept, Source, Stream, code_bands, plain_stream

DTYPE = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "U8": torch.uint8}
# numpy knows no bfloat16: storage is filled as plain bits of the same size.
RAW_BITS = {"BF16": torch.uint16, "F16": torch.uint16, "F32": torch.uint32, "U8": torch.uint8}
# Host memory that tensors pass through on their way to a GPU.
STAGING = 32 << 20
# Codes that are taken out of panels at a time: read at once, and still in a core's cache when they are copied.
CODES = 2 << 20
# Where arrays begin in the memory they share: what the widest loads want, and more.
ALIGNED = 256


class Arena:
    """One allocation for all weights of a GPU: torch rounds what is asked for singly up, int4 matrices by a fifth."""

    def __init__(self, sizes: Iterable[int], device: torch.device) -> None:
        total = sum(aligned(size) for size in sizes)
        self.memory, self.used = torch.empty(total, dtype=torch.uint8, device=device), 0

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """The next part of it, contiguous."""
        size = math.prod(shape) * dtype.itemsize
        part = self.memory[self.used : self.used + size]
        self.used += aligned(size)
        return part.view(dtype).view(shape)


def aligned(size: int) -> int:
    """Bytes up to where the next array may begin."""
    return -(-size // ALIGNED) * ALIGNED


def load_weights(
    source: Source,
    tensors: dict[str, Kept],
    parts: dict[str, Part],
    recipe: Recipe,
    device: torch.device,
    ledger: Ledger,
    notify: Callable[[str, int, int], None] = lambda *_: None,
) -> dict[str, torch.Tensor | Blocks]:
    """Every tensor of a slice but the per-layer-embedding table, in the recipe's formats, on ``device``."""
    loaded: dict[str, torch.Tensor | Blocks] = {}
    done, total = 0, sum(tensor.nbytes(recipe) for tensor in tensors.values())
    arena = None
    if device.type == "cuda":
        arena = Arena((size for tensor in tensors.values() for size in sizes(tensor, recipe)), device)
    for name, tensor in tensors.items():
        ledger.take("weights", tensor.nbytes(recipe))
        stored, part = tensor.stored(recipe), parts[name]
        if stored in BITS:
            found = code_bands(source, part, recipe, CODES * 8 // BITS[stored])
            loaded[name] = blocks(found, BITS[stored], flat(tensor.shape), device, arena)
        else:
            loaded[name] = to_device(plain_stream(source, part, recipe), device, arena).view(tensor.shape)
        done += tensor.nbytes(recipe)
        notify("loading", done, total)
    return loaded


def sizes(tensor: Kept, recipe: Recipe) -> tuple[int, ...]:
    """Bytes of the array that a tensor is kept in, or of codes and scales, which are row-major here."""
    stored, total = tensor.stored(recipe), tensor.nbytes(recipe)
    if stored not in BITS:
        return (total,)
    rows, cols = flat(tensor.shape)
    codes = rows * code_bytes(cols, stored)
    return codes, total - codes


def room(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, arena: Arena | None) -> torch.Tensor:
    """Where an array is to live."""
    return torch.empty(shape, dtype=dtype, device=device) if arena is None else arena.take(shape, dtype)


def blocks(
    bands: Iterable[Callable[[], tuple[Codes, Scales]]],
    bits: int,
    shape: tuple[int, ...],
    device: torch.device,
    arena: Arena | None = None,
) -> Blocks:
    """Codes and scales filled band by band: a pack has them in panels."""
    rows, cols = shape
    nb, at = block_count(cols), 0
    codes = room((rows, nb * BLOCK * bits // 8), torch.uint8, device, arena)
    scales = room((rows, nb), torch.float16, device, arena)
    for job in bands:
        found = job()
        stop = at + len(found[0])
        for array, band in zip((codes, scales), found, strict=True):
            array[at:stop].copy_(torch.from_numpy(band))
        at = stop
    return Blocks(codes, scales, bits, rows, cols)


def to_device(stream: Stream, device: torch.device, arena: Arena | None = None) -> torch.Tensor:
    """One array, read straight into its final memory on a CPU, through a small buffer otherwise."""
    dtype, raw = DTYPE[stream.dtype], RAW_BITS[stream.dtype]
    tensor = room(stream.window.shape, dtype, device, arena)
    if device.type == "cpu":
        stream.read(stream.window, tensor.view(raw).numpy())
        return tensor
    width = max(1, stream.window.count // stream.window.shape[0])
    at = 0
    for window in bands(stream.window, max(1, STAGING // dtype.itemsize // width)):
        band = torch.empty(window.shape, dtype=dtype)
        stream.read(window, band.view(raw).numpy())
        tensor[at : at + band.shape[0]].copy_(band)
        at += band.shape[0]
    return tensor
