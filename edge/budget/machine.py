"""What edge has measured of this machine and keeps: what an engine's libraries take, how fast memory reads.

A plan must be made in milliseconds, and loading torch to weigh it takes two seconds; so it is weighed once.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import platform
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge import __version__
from edge.budget.memory import available_memory
from edge.budget.plan import Floor
from edge.engine.choice import choose
from edge.engine.threads import thread_count
from edge.processes import module_command, module_environment
from edge.store.cache import recall, remember
from loaders.errors import EdgeError, Unsupported

FILE = "machine.json"
Raw = npt.NDArray[np.uint8]
# Memory that is read: four times what the last-level caches hold, between these; where little is left, less.
READ_BYTES, LEAST_BYTES = (192 << 20, 1280 << 20), 16 << 20
# Bytes between two looks at the clock, seconds that reading takes, and those of it that count.
CHUNK_BYTES, READ_S, WINDOW_S = 4 << 20, 0.3, 0.005
# More than any memory reads.
MOST_BANDWIDTH = 1e14
RECENT = 3600.0
LIBRARIES = {"ort": "onnxruntime", "torch": "torch", "native": "numpy"}


@dataclass(frozen=True)
class Known:
    """A floor, and the engine and device it was measured with: what 'auto' came to."""

    floor: Floor
    engine: str
    device: str


def key(engine: str, device: str) -> str:
    """What a floor depends on besides the machine: what was asked for, what that comes to, and its library."""
    chosen = "none"
    with suppress(EdgeError):
        chosen = choose(engine, device).engine
    library = LIBRARIES.get(chosen, "edge-runtime")
    try:
        version = metadata.version(library)
    except metadata.PackageNotFoundError:
        version = "none"
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
    asked = f"{engine} {device} {gpus} as {chosen}"
    return f"{asked}, edge {__version__}, {library} {version}, python {platform.python_version()}"


def known_floor(engine: str, device: str) -> Known | None:
    """What was measured before, if it was."""
    return parsed(recall(FILE).get(key(engine, device)))


def remember_floor(engine: str, device: str, known: Known) -> None:
    """Keeps a measurement of a process that had done nothing else."""
    value = {"host": known.floor.host, "device": known.floor.device, "engine": known.engine, "on": known.device}
    remember(FILE, key(engine, device), value)


def parsed(value: Any) -> Known | None:
    """A remembered floor, unless somebody wrote nonsense there."""
    if not isinstance(value, dict):
        return None
    host, device, names = value.get("host"), value.get("device"), (value.get("engine"), value.get("on"))
    if type(host) is not int or type(device) is not int or not all(isinstance(name, str) for name in names):
        return None
    return Known(Floor(host, device), *map(str, names)) if host > 0 and device >= 0 else None


def floor_for(engine: str, device: str) -> Known:
    """The floor of a run: remembered, or measured now in a process that starts the engine and does nothing else.

    Raises what starting the engine raises.
    """
    found = known_floor(engine, device)
    if found is None:
        answer, words = answered("edge.budget.floor", engine, device)
        found = parsed(answer)
        if found is None:
            raise Unsupported(f"the {engine} engine does not start here", field="--engine", hint=words)
        remember_floor(engine, device, found)
    return found


def answered(module: str, *arguments: str, timeout: float | None = None) -> tuple[dict[str, Any], str]:
    """The last line that a module of ours prints, as an object, and its last words on stderr.

    Raises the error that it reports, and subprocess.TimeoutExpired.
    """
    done = subprocess.run(
        module_command(module, *arguments),
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        timeout=timeout,
        env=module_environment(),
    )
    answer = last_line(done.stdout)
    if "error" in answer:
        raise error_of(answer)
    return answer, last(done.stderr)


def reported(error: EdgeError) -> dict[str, Any]:
    """An error of a measuring process, as :func:`error_of` reads it."""
    facts = {"error": str(error.found), "kind": type(error).__name__}
    return facts | {name: str(v) for name in ("field", "expected", "hint") if (v := getattr(error, name)) is not None}


def last(text: str) -> str:
    """The last line that says anything."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no message")


def last_line(text: str) -> dict[str, Any]:
    """The last line as an object; empty when it is none."""
    try:
        found = json.loads(last(text))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def error_of(answer: dict[str, Any]) -> EdgeError:
    """An error of the measuring process, as it was raised there."""
    kinds = {kind.__name__: kind for kind in EdgeError.__subclasses__()}
    kind = kinds.get(str(answer.get("kind")), EdgeError)
    parts = {name: answer.get(name) for name in ("field", "expected", "hint")}
    return kind(answer["error"], **parts)


def read_bandwidth(threads: int | None = None) -> float:
    """Bytes per second that so many threads (None: the usual) read from memory together: the most ever measured here.

    Measured anew once an hour: other programs can only make it less.
    """
    count = threads or thread_count()
    best, at = remembered_bandwidth(count)
    now = time.time()
    if not best or not 0 <= now - at < RECENT:
        best = max(best, measured_bandwidth(count))
        remember(FILE, bandwidth_key(count), {"bytes_per_s": best, "at": now})
    return best


def remembered_bandwidth(count: int) -> tuple[float, float]:
    """(bytes per second, seconds of the clock when that was measured); zeros where it was not, or nonsense stands."""
    known = recall(FILE).get(bandwidth_key(count))
    best, at = (known.get("bytes_per_s"), known.get("at")) if isinstance(known, dict) else (None, None)
    if type(best) is not float or type(at) is not float or not 0 < best < MOST_BANDWIDTH or not math.isfinite(at):
        return 0.0, 0.0
    return best, at


def bandwidth_key(count: int) -> str:
    """Of what few threads read is no more than a part of what memory gives."""
    return f"bandwidth, {count} thread{'s' if count > 1 else ''}"


def raise_bandwidth(count: int, found: float) -> None:
    """An engine has read this fast: whatever was measured before was too little."""
    best, at = remembered_bandwidth(count)
    if best < found < MOST_BANDWIDTH:
        remember(FILE, bandwidth_key(count), {"bytes_per_s": found, "at": at})


def measured_bandwidth(threads: int | None = None) -> float:
    """Bytes per second that so many threads (None: the usual) read together at best, in about half a second.

    The memory is read in pages as large as weights lie in, and there is more of it than caches hold. Of all stretches
    of time of a few milliseconds the best counts: what disturbs others, however long, does not show.
    """
    return Reader(threads or thread_count()).best(READ_S)


class Reader:
    """Memory that ``count`` threads read together, each a share of it, over and over: what reading can reach."""

    def __init__(self, count: int) -> None:
        self.size = read_bytes()
        shares = [share[: len(share) // 8 * 8] for share in np.array_split(large_memory(self.size), count)]
        self.chunk = chunk = min(CHUNK_BYTES, len(shares[-1]))
        parts = [[share[at : at + chunk] for at in range(0, len(share) - chunk + 1, chunk)] for share in shares]
        # Each goes on where it stopped: that was read longest ago.
        self.pieces = [cycle([part.view(np.float64) for part in share]) for share in parts]

    def best(self, seconds: float) -> float:
        """Bytes per second in the best stretch of so many seconds."""
        return self.best_of(self.marks(seconds))

    def best_of(self, marks: Sequence[Sequence[float]]) -> float:
        """In the best few milliseconds; where caches are so large that a part stays there, in a whole pass."""
        found = best_rate(marks, self.chunk, WINDOW_S)
        return found if self.size <= READ_BYTES[0] else best_rate(marks, self.chunk, self.size / found)

    def mean_of(self, marks: Sequence[Sequence[float]]) -> float:
        """As long as all of them read."""
        return best_rate(marks, self.chunk, math.inf)

    def marks(self, seconds: float) -> list[list[float]]:
        """Of each thread: when it began, and when it was done with each further chunk."""
        start = threading.Barrier(len(self.pieces))

        def read(pieces: Iterator[npt.NDArray[np.float64]]) -> list[float]:
            start.wait()
            marks = [time.perf_counter()]
            while marks[-1] - marks[0] < seconds:
                np.max(next(pieces))
                marks.append(time.perf_counter())
            return marks

        with ThreadPoolExecutor(len(self.pieces)) as pool:
            return list(pool.map(read, self.pieces))


def best_rate(readers: Sequence[Sequence[float]], chunk: int, window: float) -> float:
    """Bytes per second of all readers together in their best ``window`` seconds; all their time, where that is less."""
    times = [np.asarray(marks) for marks in readers]
    first, last = max(marks[0] for marks in times), min(marks[-1] for marks in times)
    if last <= first:  # they never read at the same time
        return max(chunk * (len(marks) - 1) / float(marks[-1] - marks[0]) for marks in times)
    window = min(window, float(last - first))
    starts = np.linspace(first, last - window, max(2, int((last - first) / window * 8)))
    total = np.zeros(len(starts))
    for marks in times:
        done = np.arange(len(marks)) * float(chunk)
        total += np.interp(starts + window, marks, done) - np.interp(starts, marks, done)
    return float(total.max()) / window


def read_bytes() -> int:
    """Of the memory to read: beyond the last-level caches, and no more than an eighth of what is left here."""
    wanted = max(READ_BYTES[0], min(4 * cache_bytes(), READ_BYTES[1]))
    return max(LEAST_BYTES, min(wanted, available_memory()[0] // 8))


@cache
def cache_bytes() -> int:
    """Of the last-level caches of the CPUs this process may use, together; 0 where the system does not say."""
    found = dict[str, int]()
    for cpu in os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ():
        with suppress(OSError, ValueError, IndexError):
            last = sorted(Path(f"/sys/devices/system/cpu/cpu{cpu}/cache").glob("index[0-9]*"))[-1]
            size = last.joinpath("size").read_text("ascii").strip()
            units = {"K": 1 << 10, "M": 1 << 20}
            found[last.joinpath("shared_cpu_list").read_text("ascii")] = int(size[:-1]) * units.get(size[-1:], 1)
    return sum(found.values())


def large_memory(size: int) -> Raw:
    """uint8 [size], resident, in large pages where there are such; it goes with the last view of it."""
    pages = mmap.mmap(-1, size, *((mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS,) if hasattr(mmap, "MAP_PRIVATE") else ()))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):
            pages.madvise(mmap.MADV_HUGEPAGE)
    memory: Raw = np.frombuffer(pages, np.uint8)
    memory[:: mmap.PAGESIZE] = 1
    return memory
