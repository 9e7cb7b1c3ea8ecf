"""How fast the disk under a folder reads, past the page cache: a scratch file is written and read, about two seconds.

What streaming asks of a disk is a row of 4 to 18 KB anywhere in a file, one after another or a few at once; what
loading asks is the bytes of a file in their order. Both are measured as edge reads, from Python.
"""

from __future__ import annotations

import errno
import math
import mmap
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any, TypeGuard

from edge.store.cache import cache_root, in_memory, recall, remember
from loaders.errors import EdgeError, printable

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FILE = "machine.json"
MIB = 1 << 20
SIZE, LEAST, CHUNK = 192 * MIB, 8 * MIB, 4 * MIB
PAGE = 4096
# A row of 18 KB that lies at a multiple of its size touches five pages.
ROWS = {"4k": PAGE, "18k": 5 * PAGE}
AT_ONCE = 8
# Seconds that writing, reading in order and each kind of random reads may take.
WRITE_S, SEQUENTIAL_S, RANDOM_S = 0.8, 0.4, 0.2
MOST_READS = 20_000
WEEK = 7 * 86400.0
# Of what is free, at most this share is written.
SHARE = 4
DIRECT, DROPPED, UNCACHED = "O_DIRECT", "page cache dropped", "F_NOCACHE"
F_NOCACHE = 48


class Unmeasured(EdgeError):
    """Why a disk cannot be measured, in one line."""

    exit_code = 74


@dataclass(frozen=True)
class Reads:
    """Random reads of one size: how many a second, and seconds that half of them take less than."""

    per_second: float
    p50_s: float


@dataclass(frozen=True)
class DiskSpeed:
    """Reads of 4 KB, and of a row of 18 KB (the five pages it lies in), one at a time and eight at once.

    ``sequential``: bytes per second. ``path``: the folder. ``how`` the page cache was kept out. ``size``: bytes of the
    file that was read.
    """

    path: str
    how: str
    size: int
    sequential: float
    one_4k: Reads
    one_18k: Reads
    eight_4k: Reads
    eight_18k: Reads

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def disk_speed(folder: Path | None = None, *, fresh: bool = False) -> DiskSpeed | None:
    """The disk under a folder (usually the cache's): remembered for a week, or measured now. None: it cannot be."""
    with suppress(Unmeasured):
        return remembered(folder, fresh=fresh)
    return None


def remembered(folder: Path | None = None, *, fresh: bool = False) -> DiskSpeed:
    """:func:`disk_speed`; raises Unmeasured, which says why there is none."""
    place = existing(folder or cache_root())
    speed = None if fresh else known(place)
    if speed is None:
        speed = measured(place)
        remember(FILE, key(place), {**speed.as_dict(), "at": time.time()})
    return speed


def known(folder: Path | None = None) -> DiskSpeed | None:
    """What was measured within a week, if it was; takes no time."""
    with suppress(Unmeasured, OSError):
        return parsed(recall(FILE).get(key(existing(folder or cache_root()))))
    return None


def measure(folder: Path, size: int = SIZE) -> DiskSpeed | None:
    """:func:`measured`, or None."""
    with suppress(Unmeasured):
        return measured(folder, size)
    return None


def key(folder: Path) -> str:
    """A device has one speed, whichever of its folders is asked about."""
    return f"disk {os.stat(folder).st_dev}"


def existing(path: Path) -> Path:
    """The folder, or the nearest parent there is. Raises Unmeasured."""
    for place in (path, *path.parents):
        with suppress(OSError):
            if place.is_dir():
                return place
    raise Unmeasured("there is no such folder", file=path)


def parsed(value: Any) -> DiskSpeed | None:
    """A remembered speed, unless it is old or somebody wrote nonsense there."""
    if not isinstance(value, dict):
        return None
    at, path, how, size = (value.get(name) for name in ("at", "path", "how", "size"))
    if not positive(at) or not 0 <= time.time() - at < WEEK:
        return None
    if not isinstance(path, str) or how not in (DIRECT, DROPPED, UNCACHED):
        return None
    reads = [parsed_reads(value.get(name)) for name in ("one_4k", "one_18k", "eight_4k", "eight_18k")]
    if type(size) is not int or size <= 0 or not positive(value.get("sequential")) or None in reads:
        return None
    return DiskSpeed(printable(path), how, size, float(value["sequential"]), *filter(None, reads))


def parsed_reads(value: Any) -> Reads | None:
    """One kind of reads, unless it is nonsense."""
    if not isinstance(value, dict) or not positive(value.get("per_second")) or not positive(value.get("p50_s")):
        return None
    return Reads(value["per_second"], value["p50_s"])


def positive(value: Any) -> TypeGuard[float]:
    """Whether it is a float above zero and finite."""
    return isinstance(value, float) and 0 < value < math.inf


# Measuring


def measured(folder: Path, size: int = SIZE) -> DiskSpeed:
    """Writes at most ``size`` bytes into a file without a name and reads them; a slow disk gets less to do.

    Raises Unmeasured: memory for a disk, no room, not to be written, no way past the page cache.
    """
    if in_memory(folder):
        raise Unmeasured("no disk: its files lie in memory", file=folder)
    try:
        with scratch(folder) as file:
            how = bypass(file)
            written = fill(file, room(folder, size))
            return timed(folder, file, how, written)
    except OSError as error:
        raise Unmeasured(error.strerror or "it cannot be read", file=folder) from None


def room(folder: Path, size: int) -> int:
    """How many bytes to write: whole chunks. Raises Unmeasured where there is no room for a few."""
    free = os.statvfs(folder)
    size = min(size, free.f_bavail * free.f_frsize // SHARE) // CHUNK * CHUNK
    if size < LEAST:
        raise Unmeasured(f"less than {LEAST * SHARE // MIB} MiB are free", file=folder)
    return size


@contextmanager
def scratch(folder: Path) -> Iterator[int]:
    """A file that goes with this process, however that ends: it has no name, or loses it before anything is written."""
    try:
        file = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except (OSError, AttributeError):  # a file system, or a system, without such files
        file, name = tempfile.mkstemp(prefix=".edge-disk-", dir=folder)
        os.unlink(name)
    try:
        yield file
    finally:
        os.close(file)


def bypass(file: int) -> str:
    """Turns the page cache off for a file, where its file system lets us. Returns how; raises Unmeasured."""
    if hasattr(os, "O_DIRECT"):
        with suppress(OSError):
            fcntl.fcntl(file, fcntl.F_SETFL, fcntl.fcntl(file, fcntl.F_GETFL) | os.O_DIRECT)
            return DIRECT
    if hasattr(os, "posix_fadvise"):
        return DROPPED
    if os.uname().sysname == "Darwin":
        fcntl.fcntl(file, F_NOCACHE, 1)
        return UNCACHED
    raise Unmeasured("this system has no way past its page cache")


def fill(file: int, size: int) -> int:
    """Writes ``size`` bytes, or what a second allows: of noise, for some disks compress. Returns their number."""
    start, written = time.perf_counter(), 0
    with aligned(CHUNK) as chunk:
        chunk[:] = os.urandom(CHUNK)
        while written < size and (written < LEAST or time.perf_counter() - start < WRITE_S):
            if os.pwrite(file, chunk, written) != CHUNK:
                raise OSError(errno.ENOSPC, "a write ended early: the disk is full, or files are limited (ulimit -f)")
            # Else the whole of it would be waited for in the end, however long that takes.
            flush(file)
            written += CHUNK
    return written


def flush(file: int) -> None:
    """On the disk, as far as the system knows."""
    (os.fdatasync if hasattr(os, "fdatasync") else os.fsync)(file)


def timed(folder: Path, file: int, how: str, size: int) -> DiskSpeed:
    """All figures of a file that is written."""
    forget = dropping(file) if how == DROPPED else nothing
    forget()
    sequential = in_order(file, size)
    if how == DROPPED:
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
    found = {}
    for name, nbytes in ROWS.items():
        forget()
        found[f"one_{name}"] = anywhere(file, size, nbytes, 1)
        forget()
        found[f"eight_{name}"] = anywhere(file, size, nbytes, AT_ONCE)
    return DiskSpeed(printable(folder), how, size, sequential, **found)


def nothing() -> None:
    """The page cache never had it."""


def dropping(file: int) -> Callable[[], None]:
    """What puts a file out of the page cache, where it may not be kept out of it."""
    return lambda: os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)


def in_order(file: int, size: int) -> float:
    """Bytes per second, in large pieces."""
    start, done, taken = time.perf_counter(), 0, 0.0
    with aligned(CHUNK) as chunk:
        while done < size and taken < SEQUENTIAL_S:
            read(file, chunk, done)
            done += CHUNK
            taken = time.perf_counter() - start
    return done / taken


def anywhere(file: int, size: int, nbytes: int, at_once: int) -> Reads:
    """Reads of ``nbytes`` at places of which none comes twice before all have come, by ``at_once`` threads."""
    places = [i * nbytes for i in range(size // nbytes)]
    random.Random(nbytes).shuffle(places)
    until = time.perf_counter() + RANDOM_S

    def some(first: int) -> list[float]:
        taken: list[float] = []
        with aligned(nbytes) as row:
            for place in islice(cycle(places[first::at_once]), MOST_READS // at_once):
                start = time.perf_counter()
                if start >= until and taken:
                    break
                read(file, row, place)
                taken.append(time.perf_counter() - start)
        return taken

    start = time.perf_counter()
    with ThreadPoolExecutor(at_once) as pool:
        taken = [seconds for share in pool.map(some, range(at_once)) for seconds in share]
    # A clock's tick is the least that anything takes.
    return Reads(len(taken) / (time.perf_counter() - start), max(median(taken), 1e-9))


def read(file: int, into: mmap.mmap, at: int) -> None:
    """All of a buffer. Raises OSError, for a read that ends early too."""
    if os.preadv(file, [into], at) != len(into):
        raise OSError(errno.EIO, "a read ended early")


@contextmanager
def aligned(nbytes: int) -> Iterator[mmap.mmap]:
    """A buffer that begins with a page, as reads past the page cache want it."""
    with mmap.mmap(-1, nbytes) as buffer:
        yield buffer
