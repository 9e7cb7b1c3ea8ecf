"""What edge has measured of this machine and keeps: what an engine's libraries take, how fast memory reads.

A plan must be made in milliseconds, and loading torch to weigh it takes two seconds; so it is weighed once.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import numpy as np

from edge import __version__
from edge.budget.plan import Floor
from edge.engine.choice import choose
from edge.store.cache import recall, remember
from loaders.errors import EdgeError, Unsupported

FILE = "machine.json"
# Larger than the last-level caches of anything edge is meant for, shared out among the threads that read.
READ_BYTES = 96 << 20
READ_TRIES = 5
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
        line = [sys.executable, "-m", "edge.budget.floor", engine, device]
        done = subprocess.run(line, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        answer = last_line(done.stdout)
        if "error" in answer:
            raise error_of(answer)
        found = parsed(answer)
        if found is None:
            raise Unsupported(f"the {engine} engine does not start here", field="--engine", hint=last(done.stderr))
        remember_floor(engine, device, found)
    return found


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


def read_bandwidth() -> float:
    """Bytes per second that all cores read from memory together: the most that was ever measured here.

    Measured anew once an hour: other programs can only make it less.
    """
    known = recall(FILE).get("bandwidth")
    best, at = (known.get("bytes_per_s"), known.get("at")) if isinstance(known, dict) else (None, None)
    best = best if isinstance(best, float) and best > 0 else 0.0
    now = time.time()
    if not best or not isinstance(at, float) or not 0 <= now - at < RECENT:
        best = max(best, measured_bandwidth())
        remember(FILE, "bandwidth", {"bytes_per_s": best, "at": now})
    return best


def measured_bandwidth() -> float:
    """The best of a few passes over 96 MiB: what disturbs a pass only makes it slower."""
    workers = max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    shares = np.array_split(np.ones(READ_BYTES // 8), workers)
    with ThreadPoolExecutor(workers) as pool:
        best = float("inf")
        for _ in range(READ_TRIES):
            start = time.perf_counter()
            list(pool.map(np.max, shares))
            best = min(best, time.perf_counter() - start)
    return READ_BYTES / best
