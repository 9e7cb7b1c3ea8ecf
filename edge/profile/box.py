"""A command in a memory control group of its own with a hard limit and no swap, and files put out of the page cache.

What counts in the box is what its processes touch first. Pages of files that others hold already, such as libraries
that run elsewhere on the machine, cost nothing in it: drop what can be dropped before a figure is called cold.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from edge.budget import cgroup

MIB = 2**20
CHUNK = 256 * MIB
_REFUSED = 125
# The shell writes itself into the group and becomes the command.
_ENTER = f'echo $$ > "$0" || exit {_REFUSED}; exec "$@"'


@dataclass(frozen=True)
class Boxed:
    """How a command ended in its box. ``rc`` is negative for a signal, as ``subprocess`` has it.

    ``peak`` is in bytes and includes the page cache, which fills a box to its limit without harm. ``hits`` is how often
    the limit was met, ``refaults`` how many pages of files came back after they had been put out: that is what a box
    that is too small costs. None where the kernel does not tell; v1 cannot tell no hits from hits not counted.
    """

    rc: int
    stdout: str
    stderr: str
    limit: int
    peak: int | None
    hits: int | None
    oom_kills: int
    refaults: int | None
    seconds: float


@cache
def why_not() -> str | None:
    """Why no box can be made here, in a line; None if one can: it has made one."""
    try:
        done = run(["true"], 64 * MIB)
    except (OSError, ValueError) as error:
        return str(error)
    return f"a box ends with {done.rc}: {done.stderr.strip()}" if done.rc else None


def run(
    command: Sequence[str | os.PathLike[str]],
    limit: int,
    *,
    env: Mapping[str, str] | None = None,
    cwd: str | os.PathLike[str] | None = None,
    timeout: float = 120.0,
) -> Boxed:
    """Runs ``command`` in a fresh group that may hold ``limit`` bytes. Nothing of it is left afterwards.

    Raises OSError where no group can be made, ValueError when this process may itself hold no more than ``limit``, and
    ``subprocess.TimeoutExpired``.
    """
    outer = cgroup.cgroup_limit()
    if outer is not None and outer.limit_bytes is not None and outer.limit_bytes < limit:
        raise ValueError(f"a box of {limit} bytes, where {outer.source} allows {outer.limit_bytes}")
    with _group(limit) as (version, group):
        begun = time.monotonic()
        process = subprocess.Popen(
            ["/bin/sh", "-c", _ENTER, group / "cgroup.procs", *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
            cwd=cwd,
        )
        with process:
            try:
                stdout, stderr = process.communicate(timeout=timeout)
            finally:
                # Also what the command has left behind, which may hold the pipes open.
                _end(group)
                process.kill()
        seconds = time.monotonic() - begun
        peak, hits, kills, refaults = _counters(version, group)
        if process.returncode == _REFUSED and peak == 0:
            raise PermissionError(f"{group}: {stderr.strip()}")
        return Boxed(process.returncode, stdout, stderr, limit, peak, hits, kills, refaults, seconds)


def drop_from_page_cache(path: str | os.PathLike[str]) -> int:
    """Puts a file, or every file below a folder, out of the page cache; the bytes that stayed.

    A page stays while a process has it mapped and touched, and in a file system that has no other place for it.
    """
    for file in _regular(path):
        with file.open("rb") as opened:
            # Only what is on the disk can be dropped.
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return cached_bytes(path)


def cached_bytes(path: str | os.PathLike[str]) -> int:
    """Bytes of a file, or of all files below a folder, in the page cache; whole pages.

    Of files that this user neither owns nor may write, the kernel says that all of it is.
    """
    return sum(_cached(file) for file in _regular(path))


def _cached(file: Path) -> int:
    pages, size = 0, file.stat().st_size
    libc = ctypes.CDLL(None, use_errno=True)
    with file.open("rb") as opened:
        for at in range(0, size, CHUNK):
            length = min(CHUNK, size - at)
            # A private copy, only because ctypes wants a buffer it could write to: no page is touched.
            with mmap.mmap(opened.fileno(), length, access=mmap.ACCESS_COPY, offset=at) as view:
                there = np.zeros(-(-length // mmap.PAGESIZE), np.uint8)
                first = ctypes.c_char.from_buffer(view)
                where = (ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(length))
                failed = libc.mincore(*where, there.ctypes.data_as(ctypes.c_void_p))
                # The view cannot be closed while something points into it.
                del first
            if failed:
                raise OSError(ctypes.get_errno(), "mincore", os.fspath(file))
            pages += int((there & 1).sum())
    return pages * mmap.PAGESIZE


def _regular(path: str | os.PathLike[str]) -> list[Path]:
    path = Path(path)
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


@contextlib.contextmanager
def _group(limit: int) -> Iterator[tuple[int, Path]]:
    """Version and folder of a new group with its limit set, removed at the end with whoever is still in it."""
    version, group = _make()
    try:
        _limit(version, group, limit)
        yield version, group
    finally:
        _end(group)
        _remove(group)


def _make() -> tuple[int, Path]:
    """A group below this process's own, or in v2, where a group with processes has no groups with limits, beside it."""
    tried = []
    for version, parent in _parents():
        if version == 2 and "memory" not in _text(parent / "cgroup.subtree_control").split():
            tried.append(f"{parent} hands on no memory controller")
            continue
        group = parent / f"edge-box-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        try:
            group.mkdir()
        except OSError as error:
            tried.append(f"{parent}: {error.strerror}")
            continue
        return version, group
    raise PermissionError("; ".join(tried) or "no memory control group is mounted")


def _parents() -> Iterator[tuple[int, Path]]:
    """Version and folder of the groups that hold this process, innermost first."""
    own = cgroup.own_paths(cgroup.PROC)
    for version, root, mount in cgroup.mounts(cgroup.PROC, cgroup.CGROUPS):
        for folder in cgroup.upwards(mount, cgroup.below(own.get(version, "/"), root)):
            yield version, folder


def _limit(version: int, group: Path, limit: int) -> None:
    if version == 2:
        settings = {"memory.max": limit, "memory.swap.max": 0}
    else:
        # In this order: memory with swap may not be less than memory.
        settings = {"memory.swappiness": 0, "memory.limit_in_bytes": limit, "memory.memsw.limit_in_bytes": limit}
    for name, value in settings.items():
        # The files of swap are not there where the kernel does not count it.
        if "sw" not in name or (group / name).exists():
            (group / name).write_text(str(value))


def _counters(version: int, group: Path) -> tuple[int | None, int | None, int, int | None]:
    """Peak in bytes, how often the limit was met, processes killed for memory, pages of files read again."""
    refaults = _fields(group / "memory.stat").get("workingset_refault_file")
    if version == 2:
        peak, events = _text(group / "memory.peak"), _fields(group / "memory.events")
        return int(peak) if peak else None, events["max"], events["oom_kill"], refaults
    # Where memory with swap is limited too, that limit is met first.
    hits = sum(int(_text(group / f"memory.{name}") or 0) for name in ("failcnt", "memsw.failcnt"))
    kills = _fields(group / "memory.oom_control")["oom_kill"]
    # Recent kernels (6.18) leave both at 0 while they reclaim and kill.
    return int(_text(group / "memory.max_usage_in_bytes")), hits or None, kills, refaults


def _end(group: Path) -> None:
    """Kills until nobody is left: who forks while the list is read is in the next one."""
    for _ in range(100):
        pids = _text(group / "cgroup.procs").split()
        if not pids:
            return
        for pid in map(int, pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def _remove(group: Path) -> None:
    """A group is busy for a moment after its last process has ended."""
    for _ in range(200):
        try:
            group.rmdir()
        except FileNotFoundError:
            return
        except OSError:
            time.sleep(0.01)
        else:
            return
    raise TimeoutError(f"{group}: cannot be removed")


def _fields(file: Path) -> dict[str, int]:
    return {name: int(value) for name, _, value in (line.partition(" ") for line in _text(file).splitlines())}


def _text(file: Path) -> str:
    """Empty where there is no such file."""
    try:
        return file.read_text().strip()
    except FileNotFoundError:
        return ""
