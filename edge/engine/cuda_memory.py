"""A GPU's budget: what CUDA takes for itself is kept small, and torch's allocator is held to the rest."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

from loaders.errors import OverBudget

# What drivers take outside torch while a model runs: kernels met later, recorded graphs.
DRIVERS = 12 << 20
# Bytes of stack for every thread the device can have at once, unless a kernel asks for more; the driver's 1024 come to
# 277 MB on an H100, and the kernels met here need some 350.
STACK = 512
STACK_LIMIT = 0
# Scratch of the matrix library for each stream: 8 MB, as on older GPUs, where it would take 32 on newer ones.
WORKSPACE = ":4096:2:16:8"


def lean() -> None:
    """Opens the context of this process. What was set from outside is left as it is, and so are other drivers."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", WORKSPACE)
    torch.zeros(1, device="cuda")
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libcuda.so.1").cuCtxSetLimit(STACK_LIMIT, ctypes.c_size_t(STACK))


def bound(budget: int | None, used: int) -> None:
    """Holds torch to what ``budget`` leaves beside the rest of ``used``, the bytes this process has on the device now.

    Torch gives back what it keeps free before it refuses. None lifts the bound of an earlier run.
    """
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    room = total if budget is None else budget - (used - torch.cuda.memory_reserved()) - DRIVERS
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(0, room) / total))


@contextmanager
def refusals() -> Iterator[None]:
    """What the device refuses is OverBudget, in one line."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        text = str(error).split(". ")[0]
        raise OverBudget(text, field="device memory", hint="Raise --budget or lower --context") from None
