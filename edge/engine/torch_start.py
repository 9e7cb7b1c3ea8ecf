"""Brings torch up and runs a toy model through it once, so that what the libraries take can be measured, not guessed.

Kernels, thread pools and scratch are allocated on first use: a floor read before that would be too low by tens of MB.
"""

from __future__ import annotations

import gc

import numpy as np
import torch

from edge.budget.memory import trim
from edge.engine.cuda_memory import lean
from edge.engine.pinned import Pinned
from edge.engine.torch import TorchEngine
from edge.engine.torch_blocks import Blocks
from edge.engine.torch_ple import DeviceRows, PinnedRows, from_records
from edge.engine.torch_weights import DTYPE
from edge.engine.toy import toy
from loaders.errors import Unsupported, Usage
from loaders.formats.quant import BITS, block_count, code_bytes, record_bytes
from loaders.formats.recipe import Recipe, recipes, stored_as
from loaders.network.tensors import tensors


def pick_device(name: str) -> torch.device:
    """'auto' takes a GPU where there is one. Raises Unsupported for a device this machine or this torch lacks."""
    found = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if found[kind])
    if name not in found:
        raise Usage(name, field="--device", expected="auto, cpu, cuda or mps")
    if not found[name]:
        raise Unsupported(f"no {name} device here", field="--device", hint="Use --device cpu")
    return torch.device(name)


def use_threads(count: int) -> None:
    """How many threads torch computes with."""
    torch.set_num_threads(count)


def empty(name: str, shape: tuple[int, ...], recipe: Recipe, device: torch.device) -> torch.Tensor | Blocks:
    """A tensor of zeros in the format it would be kept in."""
    stored = stored_as(name, shape, recipe)
    if stored not in BITS:
        return torch.zeros(shape, dtype=DTYPE[stored], device=device)
    codes = torch.zeros((shape[0], code_bytes(shape[1], stored)), dtype=torch.uint8, device=device)
    scales = torch.zeros((shape[0], block_count(shape[1])), dtype=torch.float16, device=device)
    return Blocks(codes, scales, BITS[stored], *shape)


def toy_rows(precision: str, device: torch.device) -> DeviceRows:
    """The toy's table, as records at quantized precisions; on CUDA in page-locked memory, which the GPU then reads."""
    kind = precision if precision in BITS else None
    table = torch.zeros((64, 3 * record_bytes(16, kind)), dtype=torch.uint8) if kind else torch.zeros(64, 48)
    decode = (lambda found: from_records(found, 3, 16, kind)) if kind else (lambda found: found.view(-1, 3, 16))
    if device.type != "cuda":
        return DeviceRows(table.to(device), decode)
    pinned = Pinned(tuple(table.shape), table.dtype)
    pinned.tensor.copy_(table)
    return PinnedRows(pinned, device, decode)


def warm_up(device: torch.device) -> None:
    """Prefill, decode and a wrapped window, in every precision."""
    if device.type == "cuda":
        lean()
    model = toy()
    for precision in ("float32", "bf16", "int8", "int4"):
        recipe = recipes(precision)[0]
        weights = {name: empty(name, shape, recipe, device) for name, shape in tensors(model).items()}
        rows = toy_rows(precision, device)
        kv = precision if precision == "float32" else "bf16"
        engine = TorchEngine(model, weights, rows, context=64, chunk=32, kv=kv, device=device)
        for tokens in (32, 2, 1):
            engine.forward(np.arange(min(tokens, 64 - engine.position)), "last")
        engine.close()
    del engine, weights, rows
    gc.collect()
    trim()
    if device.type == "cuda":
        torch.cuda.empty_cache()
