"""Device-wide GPU memory through the driver's own library: the only figure that includes the CUDA context.

torch's counters know torch's allocations only, and asking torch for the device's total creates the context that was
to be measured.
"""

from __future__ import annotations

import ctypes
from functools import cache


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


@cache
def _library() -> ctypes.CDLL | None:
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    return nvml if nvml.nvmlInit_v2() == 0 else None


def device_used(index: int = 0) -> int | None:
    """Bytes in use on a GPU by everybody; None where there is no driver to ask."""
    nvml, handle, memory = _library(), ctypes.c_void_p(), _Memory()
    if nvml is None or nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)) != 0:
        return None
    if nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)) != 0:
        return None
    return int(memory.used)
