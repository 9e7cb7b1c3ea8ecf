"""Brings torch up and runs a toy model through it once, so that what the libraries take can be measured, not guessed.

Kernels, thread pools and scratch are allocated on first use: a floor read before that would be too low by tens of MB.
"""

from __future__ import annotations

import gc

import numpy as np
import torch

from edge.budget.memory import trim
from edge.engine.torch import TorchEngine
from edge.engine.torch_ple import DeviceRows
from edge.engine.torch_weights import DTYPE
from edge.store.weights import stored_dtype
from loaders.errors import Unsupported, Usage
from loaders.network.spec import PLE, AltUp, Attention, Gated, Laurel, Layer, Model, Rope
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


def toy() -> Model:
    """A model with every mechanism once, small enough that warming up takes less than any model will."""
    rope = Rope(10_000.0, 32)
    norms = ("attn_in", "attn_out", "ffn_in", "ffn_out")

    def layer(window: int | None, kv_from: int | None) -> Layer:
        attention = Attention(4, 2, 32, 1.0, rope, window, True, True, kv_from)
        return Layer(attention, Gated(256, "gelu_tanh", 0.5), norms)

    layers = (layer(8, None), layer(None, None), layer(8, 0))
    return Model("toy", 1024, 128, layers, 1e-6, True, 64, 16.0, 30.0, PLE(64, 16), AltUp(4, 0, True), Laurel(8))


def warm_up(device: torch.device) -> None:
    """Prefill, decode and a wrapped window, in both precisions."""
    model = toy()
    table = torch.zeros(64, 48, device=device)
    for precision in ("float32", "bf16"):
        weights = {
            name: torch.zeros(shape, dtype=DTYPE[stored_dtype(name, shape, precision)], device=device)
            for name, shape in tensors(model).items()
        }
        engine = TorchEngine(model, weights, DeviceRows(table), context=64, chunk=32, kv=precision, device=device)
        engine.forward(np.arange(32), "last")
        engine.forward(np.arange(1), "last")
        engine.close()
    del engine, weights, table
    gc.collect()
    trim()
    if device.type == "cuda":
        torch.cuda.empty_cache()
