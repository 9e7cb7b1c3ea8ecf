"""Keeps memory from being paged out."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterable, Sequence
from typing import Any

from edge.budget.units import format_bytes
from loaders.errors import NotPermitted, Unsupported


def lock(ranges: Iterable[tuple[int, int]]) -> None:
    """Locks (address, bytes) until they are unmapped. Raises NotPermitted where the system allows no more of it."""
    found = list(ranges)
    for address, nbytes in found:
        if mlock(address, nbytes) != 0:
            raise refused(ctypes.get_errno(), found)


def mlock(address: int, nbytes: int) -> int:
    """The system's own. Raises Unsupported where there is none."""
    try:
        libc: Any = ctypes.CDLL(None, use_errno=True)
        function = libc.mlock
    except (OSError, AttributeError, TypeError):
        raise Unsupported("no mlock on this system", field="--lock") from None
    function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_size_t), ctypes.c_int
    return int(function(address, nbytes))


def refused(code: int, ranges: Sequence[tuple[int, int]]) -> NotPermitted:
    """Why, as far as the system says: mostly its limit."""
    need, limit = sum(nbytes for _, nbytes in ranges), limit_bytes()
    if code in (errno.ENOMEM, errno.EPERM, errno.EAGAIN) and limit is not None and limit < need:
        found = f"at most {format_bytes(limit)} may be locked (RLIMIT_MEMLOCK)"
        hint = f"Raise the limit with `ulimit -l {-(-need // 1024)}`, or leave --lock away"
        return NotPermitted(found, field="--lock", expected=f"{format_bytes(need)} of weights", hint=hint)
    return NotPermitted(os.strerror(code), field="--lock", hint="Leave --lock away")


def limit_bytes() -> int | None:
    """What may be locked; None without a limit, or where nobody says."""
    try:
        import resource
    except ImportError:
        return None
    soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return None if soft == resource.RLIM_INFINITY else soft
