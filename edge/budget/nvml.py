"""Device-wide GPU memory through the driver's own library: the only figure that includes the CUDA context.

torch's counters know torch's allocations only, and asking torch for the device's total creates the context that was
to be measured.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from dataclasses import dataclass
from functools import cache

# The longest names that the driver gives, with the zero at their end.
NAME, VERSION = 96, 80


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


@cache
def _library() -> ctypes.CDLL | None:
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    return nvml if nvml.nvmlInit_v2() == 0 else None


@dataclass(frozen=True)
class Gpu:
    """A GPU as its driver names it; bytes of its memory, and in use by everybody: None where it does not say."""

    index: int
    name: str
    driver: str
    memory: int | None
    used: int | None


def gpus() -> list[Gpu]:
    """All that the driver knows, hidden ones too; none where there is no driver to ask."""
    nvml = _library()
    found = [] if nvml is None else [(i, _handle(i)) for i in range(device_count())]
    driver = _text("nvmlSystemGetDriverVersion", VERSION)
    listed = []
    for index, handle in found:
        if handle is not None:
            memory = _memory(handle)
            total, used = (None, None) if memory is None else (int(memory.total), int(memory.used))
            listed.append(Gpu(index, _text("nvmlDeviceGetName", NAME, handle), driver, total, used))
    return listed


def device_count() -> int:
    """How many GPUs the driver knows."""
    nvml, count = _library(), ctypes.c_uint()
    if nvml is None or nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
        return 0
    return count.value


def visible() -> int:
    """The driver's number of the GPU that CUDA calls the first: CUDA_VISIBLE_DEVICES may leave others out.

    One that is named by its UUID is taken for the first there is.
    """
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0].strip()
    return int(first) if first.isascii() and first.isdigit() and len(first) < 5 else 0


def device_used(index: int | None = None) -> int | None:
    """Bytes in use on a GPU by everybody, unless said on the one CUDA calls the first; None without a driver to ask."""
    handle = _handle(visible() if index is None else index)
    memory = None if handle is None else _memory(handle)
    return None if memory is None else int(memory.used)


def total_energy(index: int) -> float | None:
    """Joules that a whole board has taken since its driver was loaded; None where it does not count them."""
    nvml, handle, millijoules = _library(), _handle(index), ctypes.c_ulonglong()
    if nvml is None or handle is None:
        return None
    with suppress(AttributeError):  # a driver from before there was such a count
        if nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules)) == 0:
            return millijoules.value / 1e3
    return None


def _handle(index: int) -> ctypes.c_void_p | None:
    nvml, handle = _library(), ctypes.c_void_p()
    if nvml is None or nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)) != 0:
        return None
    return handle


def _memory(handle: ctypes.c_void_p) -> _Memory | None:
    nvml, memory = _library(), _Memory()
    if nvml is None or nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)) != 0:
        return None
    return memory


def _text(function: str, most: int, *of: ctypes.c_void_p) -> str:
    nvml, text = _library(), ctypes.create_string_buffer(most)
    with suppress(AttributeError):
        if nvml is not None and getattr(nvml, function)(*of, text, most) == 0:
            return text.value.decode("utf-8", "replace")
    return "unknown"
