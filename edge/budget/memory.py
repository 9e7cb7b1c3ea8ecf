"""What this process and this machine use, read from the kernel, and the ledger that large buffers ask first.

Every number is in bytes. The kernel batches its counters: VmHWM and VmRSS may be off by about 1 MiB on a small machine.
"""

from __future__ import annotations

import ctypes
import operator
import os
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from edge.budget.cgroup import CGROUPS, PROC, Limit, cgroup_levels, cgroup_limit
from edge.budget.units import format_bytes
from loaders.errors import OverBudget

__all__ = [
    "Ledger",
    "Limit",
    "ProcessMemory",
    "available_memory",
    "bound_malloc",
    "cgroup_limit",
    "default_budget",
    "read_process",
    "read_pss",
    "reset_peak",
    "tree_peak",
    "trim",
]

MIB = 2**20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8


@dataclass(frozen=True)
class ProcessMemory:
    """One process, in bytes. ``rss`` is ``anonymous + file_backed + shared``; ``rss`` and its peak leave out swap."""

    rss: int
    peak_rss: int
    anonymous: int
    file_backed: int
    shared: int
    swap: int


def read_process(pid: int | None = None) -> ProcessMemory:
    """Memory of process ``pid``, or of this one. Raises ``ProcessLookupError`` if there is no such process.

    Without /proc the split is not known: everything counts as anonymous, and the peak is the present use except on
    Windows, which keeps one.
    """
    if not os.path.isdir(f"{PROC}/self"):
        return _from_psutil(pid)
    status = _kernel_fields(_process_file(pid, "status"))
    if status is None:
        raise ProcessLookupError(f"no process {pid}")
    # A zombie and a kernel thread have no memory and no such lines.
    names = ("VmRSS", "VmHWM", "RssAnon", "RssFile", "RssShmem", "VmSwap")
    return ProcessMemory(*(status.get(name, 0) for name in names))


def read_pss(pid: int | None = None) -> int | None:
    """Proportional set size in bytes: shared pages divided by their users. None where the kernel does not tell.

    Exact, but walks the page tables: milliseconds, more with more memory. There is no high-water mark.
    """
    rollup = _kernel_fields(_process_file(pid, "smaps_rollup"))
    return None if rollup is None else rollup.get("Pss")


def tree_peak(pid: int | None = None) -> int:
    """Peak RSS plus present swap, summed over the process and its living descendants, in bytes.

    The peaks need not have come together, so the sum is an upper bound; processes that have ended are not in it.
    Raises ``ProcessLookupError`` if there is no process ``pid``.
    """
    parent = read_process(pid)
    total = parent.peak_rss + parent.swap
    for child in _descendants(pid):
        try:
            memory = read_process(child)
        except (ProcessLookupError, psutil.Error):
            continue
        total += memory.peak_rss + memory.swap
    return total


def reset_peak() -> bool:
    """Starts this process's peak RSS anew from what it holds now; False where the system cannot."""
    try:
        Path(PROC, "self", "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def available_memory(proc_root: str = PROC, cgroup_root: str = CGROUPS) -> tuple[int, str]:
    """Bytes that can still be taken without swapping, and what rules: 'that are free', or which limit leaves them.

    Each control group above the process counts with its own use: a parent with a larger limit may have less left.
    """
    free, ruled = psutil.virtual_memory().available, "that are free"
    for level in cgroup_levels(proc_root, cgroup_root):
        if level.limit_bytes is None:
            continue
        left = max(0, level.limit_bytes - (level.used_bytes or 0))
        if left < free:
            free, ruled = left, f"that the limit of {format_bytes(level.limit_bytes)} leaves ({level.source})"
    return free, ruled


def default_budget(proc_root: str = PROC, cgroup_root: str = CGROUPS) -> tuple[int, str]:
    """Four fifths of the available memory, in bytes, and the sentence that says so."""
    free, ruled = available_memory(proc_root, cgroup_root)
    return free * 4 // 5, f"no --budget: 4/5 of the {format_bytes(free)} {ruled}"


class Ledger:
    """Bytes held by component, against the bytes the plan gave each. Every large buffer asks here first.

    Without a budget (None) it refuses nothing and only keeps count. Safe to use from several threads.
    """

    def __init__(self, budget: int | None, planned: Mapping[str, int]) -> None:
        self.budget = budget
        self.planned = dict(planned)
        self._held = dict.fromkeys(self.planned, 0)
        self._peak = dict.fromkeys(self.planned, 0)
        # Reentrant: a finalizer that gives back may run while this very thread holds the lock.
        self._lock = threading.RLock()

    def take(self, component: str, nbytes: int) -> None:
        """Counts ``nbytes`` as held. Raises ``OverBudget``, and counts nothing, if the component's plan has no room.

        The room is the planned bytes and a slack of 5%, at least 1 MiB; a component the plan does not name has none.
        """
        nbytes = _size(nbytes)
        with self._lock:
            total = self._held.get(component, 0) + nbytes
            if self.budget is not None:
                self._check_room(component, total)
            self._held[component] = total
            self._peak[component] = max(self._peak.get(component, 0), total)

    def give(self, component: str, nbytes: int) -> None:
        """Counts ``nbytes`` as released. Raises ``ValueError``, and counts nothing, if that is more than is held."""
        nbytes = _size(nbytes)
        with self._lock:
            held = self._held.get(component, 0)
            if nbytes > held:
                raise ValueError(f"{component}: {nbytes} bytes given back, {held} held")
            if component in self._held:
                self._held[component] = held - nbytes

    def held(self) -> dict[str, int]:
        """Bytes held now, by component."""
        with self._lock:
            return dict(self._held)

    def peak(self) -> dict[str, int]:
        """The most bytes each component has held; the components need not have peaked together."""
        with self._lock:
            return dict(self._peak)

    def report(self) -> dict[str, dict[str, int]]:
        """Component -> {'planned': bytes, 'peak': bytes}; planned is 0 for what the plan does not name."""
        return {name: {"planned": self.planned.get(name, 0), "peak": peak} for name, peak in self.peak().items()}

    def _check_room(self, component: str, total: int) -> None:
        planned = self.planned.get(component)
        if planned is None:
            raise OverBudget(
                f"{format_bytes(total)} asked for, and the plan has no such component",
                field=component,
                expected="one of " + (", ".join(sorted(self.planned)) or "none"),
            )
        if total > planned + max(MIB, planned // 20):
            raise OverBudget(
                f"would hold {format_bytes(total)}",
                field=component,
                expected=f"at most the planned {format_bytes(planned)}",
                hint="Raise --budget or lower --context",
            )


def trim() -> bool:
    """Hands freed heap pages back to the system; True if there were any. Does nothing without glibc."""
    libc = _glibc()
    return libc is not None and bool(libc.malloc_trim(0))


def bound_malloc() -> bool:
    """Keeps freed memory from piling up in glibc: two arenas, and blocks from 1 MiB on mapped and unmapped singly.

    Call it before threads start: arenas that exist stay. False, and nothing done, without glibc.
    """
    libc = _glibc()
    if libc is None:
        return False
    # Setting a threshold also stops glibc from raising it each time a larger block is freed.
    settings = ((_M_ARENA_MAX, 2), (_M_MMAP_THRESHOLD, MIB), (_M_TRIM_THRESHOLD, MIB))
    accepted = [bool(libc.mallopt(name, value)) for name, value in settings]
    return all(accepted)


def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    if not (hasattr(libc, "malloc_trim") and hasattr(libc, "mallopt")):
        return None
    libc.malloc_trim.argtypes = [ctypes.c_size_t]
    return libc


def _size(nbytes: int) -> int:
    size = operator.index(nbytes)
    if size < 0:
        raise ValueError(f"{size} bytes: a buffer cannot have a negative size")
    return size


def _descendants(pid: int | None) -> list[int]:
    try:
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    except psutil.Error:
        return []


def _process_file(pid: int | None, name: str) -> Path:
    return Path(PROC, "self" if pid is None else str(pid), name)


def _kernel_fields(path: Path) -> dict[str, int] | None:
    """The lines 'Name: 123 kB' of a /proc file, in bytes; None if it cannot be read. The kernel's kB is 1024 bytes."""
    try:
        lines = path.read_bytes().decode("utf-8", "replace").splitlines()
    except OSError:
        return None
    fields = {}
    for line in lines:
        name, _, rest = line.partition(":")
        words = rest.split()
        if len(words) == 2 and words[1] == "kB":
            fields[name] = int(words[0]) * 1024
    return fields


def _from_psutil(pid: int | None) -> ProcessMemory:
    try:
        info = psutil.Process(pid).memory_info()
    except psutil.NoSuchProcess:
        raise ProcessLookupError(f"no process {pid}") from None
    return ProcessMemory(info.rss, getattr(info, "peak_wset", info.rss), info.rss, 0, 0, 0)
