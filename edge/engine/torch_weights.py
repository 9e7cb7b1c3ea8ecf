"""Weights as torch tensors on their device: ``w(name)`` of the torch engine. Quantized ones are Blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch

from edge.budget.memory import Ledger
from edge.engine.native.blocks import Matrix, available
from edge.engine.torch_blocks import Blocks
from loaders.formats.placed import bands
from loaders.formats.quant import BITS
from loaders.formats.recipe import Recipe
from loaders.network.matformer import Part
from loaders.network.tensors import flat
from loaders.weights import Kept, Source, Stream, streams

DTYPE = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "U8": torch.uint8}
# numpy knows no bfloat16: storage is filled as plain bits of the same size.
RAW_BITS = {"BF16": torch.uint16, "F16": torch.uint16, "F32": torch.uint32, "U8": torch.uint8}
# Host memory that tensors pass through on their way to a GPU.
STAGING = 32 << 20
# Where arrays begin in the memory they share: what the widest loads want, and more.
ALIGNED = 256


class Arena:
    """One allocation for all weights of a GPU: torch rounds what is asked for singly up, int4 matrices by a fifth."""

    def __init__(self, arrays: Iterable[Stream], device: torch.device) -> None:
        total = sum(aligned(stream.window.count * DTYPE[stream.dtype].itemsize) for stream in arrays)
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
    found = {name: streams(source, parts[name], recipe) for name in tensors}
    arena = Arena((s for each in found.values() for s in each), device) if device.type == "cuda" else None
    for name, tensor in tensors.items():
        ledger.take("weights", tensor.nbytes(recipe))
        arrays = [to_device(stream, device, arena) for stream in found[name]]
        stored = tensor.stored(recipe)
        if stored in BITS:
            loaded[name] = quantized(arrays[0], arrays[1], BITS[stored], flat(tensor.shape))
        else:
            loaded[name] = arrays[0].view(tensor.shape)
        done += tensor.nbytes(recipe)
        notify("loading", done, total)
    return loaded


def quantized(codes: torch.Tensor, scales: torch.Tensor, bits: int, shape: tuple[int, ...]) -> Blocks:
    """A matrix that stays quantized; on a CPU with the compiled kernels, where there are any."""
    rows, cols = shape
    native = None
    if codes.device.type == "cpu" and available():
        native = Matrix(
            codes.data_ptr(), scales.data_ptr(), bits, rows, cols,
            codes.shape[1], scales.shape[1], codes.nbytes, scales.nbytes,
        )  # fmt: skip
    return Blocks(codes, scales, bits, rows, cols, native)


def to_device(stream: Stream, device: torch.device, arena: Arena | None = None) -> torch.Tensor:
    """One array, read straight into its final memory on a CPU, through a small buffer otherwise."""
    dtype, raw = DTYPE[stream.dtype], RAW_BITS[stream.dtype]
    shape = stream.window.shape
    tensor = torch.empty(shape, dtype=dtype, device=device) if arena is None else arena.take(shape, dtype)
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
