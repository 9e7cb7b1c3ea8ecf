"""What this machine is, as plain data: for ``edge doctor``, and in short for every line of a profile.

Engines are looked for, not imported: whether one is installed, in which version and for which devices is known without.
"""

from __future__ import annotations

import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

import edge
from edge.budget import disk, machine, nvml, rates
from edge.budget.cgroup import CGROUPS, PROC, cgroup_levels
from edge.budget.memory import available_memory
from edge.engine import threads
from edge.engine.choice import HIDDEN, INSTALL, has_gpu, installed
from edge.engine.native import library
from edge.profile import cpu
from edge.profile.advice import advice
from edge.profile.energy import Meter
from edge.store.cache import cache_root, in_memory, remember
from loaders.errors import printable
from loaders.formats.sharded import Notify

LIBRARIES = ("numpy", "onnxruntime", "torch")
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
# What the system may refuse to give beyond: name of the limit, and how a shell calls it.
LIMITS = {"RLIMIT_AS": "ulimit -v", "RLIMIT_DATA": "ulimit -d"}


def silent(what: str, done: int, total: int) -> None:
    """Nobody is told how far it is."""


def machine_facts(*, measure: bool, fresh: bool = False, notify: Notify = silent) -> dict[str, Any]:
    """Everything, by the keys of ``edge doctor --json``; never imports torch.

    With ``measure`` memory and disk are timed unless they lately were, or in any case with ``fresh``: 3 s. Without,
    what is known of them.
    """
    notify("measuring", 0, 2)
    bandwidth = bandwidth_gbps(measure, fresh)
    notify("measuring", 1, 2)
    speed, disk_why = disk_facts(measure, fresh)
    notify("measuring", 2, 2)
    found = {
        "cpu": cpu_facts(),
        "memory": memory_facts(),
        "limits": limits(),
        "disk": speed,
        "disk_why": disk_why,
        "bandwidth_gbps": bandwidth,
        "gpus": gpus(),
        "engines": with_rates({"native": native(), "torch": torch(), "ort": ort()}),
        "energy": energy(),
        "system": runs_on(),
    }
    return {**found, "advice": advice(found)}


def brief() -> dict[str, Any]:
    """The machine in a line of results: what is known at once."""
    first = next((gpu for gpu in gpus() if gpu["index"] == nvml.visible()), None)
    physical, logical = cpu.cores()
    release = ".".join(platform.release().split("-")[0].split(".")[:2])
    return {
        "cpu": printable(cpu.cpu_name()),
        "cores": physical or logical,
        "threads": threads.thread_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "vector": vector(),
        "gpu": None if first is None or not has_gpu() else first["name"],
        "system": printable(f"{platform.system()} {release} {platform.machine()}"),
    }


def versions() -> dict[str, str | None]:
    """Of edge, of the commit it runs from if it runs from a checkout, of Python and of the libraries that compute."""
    found = {name: version(name) for name in LIBRARIES}
    return {"edge": edge.__version__, "commit": commit(), "python": platform.python_version(), **found}


def version(name: str) -> str | None:
    """Of an installed distribution; None where there is none."""
    try:
        return printable(metadata.version(name))
    except (metadata.PackageNotFoundError, ValueError):
        return None


def commit() -> str | None:
    """Of edge's own checkout, shortened: not of a repository whose virtual environment it may lie in."""
    root = Path(edge.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    line = ["git", "-C", str(root), "rev-parse", "--short", "HEAD"]
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(line, capture_output=True, text=True, timeout=5, check=False, env=env)
        return done.stdout.strip() or None if done.returncode == 0 else None
    return None


# The processor and its memory


def vector() -> str:
    """The kernels that the native engine picks here; where it is missing, what they would be by the CPU's flags."""
    if library.available():
        return library.isas()[0]
    has = cpu.flags()
    usual = {"avx512_vnni": "avx512", "avx2": "avx2", "i8mm": "i8mm", "asimddp": "asimd", "neon": "neon"}
    return next((name for flag, name in usual.items() if flag in has), "any")


def cpu_facts() -> dict[str, Any]:
    """Name, cores and what holds them back."""
    physical, logical = cpu.cores()
    share, named = threads.quota(), os.environ.get("OMP_NUM_THREADS")
    return {
        "name": printable(cpu.cpu_name()),
        "architecture": platform.machine(),
        "kernels": list(library.isas()) if library.available() else [],
        "vector": vector(),
        "flags": cpu.flags(),
        "physical_cores": physical,
        "logical_cores": logical,
        "usable_cores": len(threads.usable_cpus()),
        "quota_cores": None if share is None else share.cores,
        "quota_source": None if share is None else printable(share.source),
        "threads": threads.thread_count(),
        "threads_named": None if named is None else printable(named),
        "clock": cpu.frequency(),
    }


def memory_facts() -> dict[str, Any]:
    """Bytes, and whether large pages can be had. ``free_bytes`` heeds limits, ``available_bytes`` is the machine's."""
    memory, swap = psutil.virtual_memory(), psutil.swap_memory()
    free, ruled = available_memory()
    return {
        "total_bytes": memory.total,
        "available_bytes": memory.available,
        "free_bytes": free,
        "free_why": printable(ruled),
        "swap_bytes": swap.total,
        "swap_used_bytes": swap.used,
        "lockable_bytes": rlimit("RLIMIT_MEMLOCK"),
        "huge_pages": huge_pages(),
    }


def huge_pages(file: Path = HUGE_PAGES) -> str | None:
    """'always', 'madvise' or 'never'; None where the kernel has no such pages."""
    words = (cpu.text(file) or "").split()
    return next((word[1:-1] for word in words if word.startswith("[") and word.endswith("]")), None)


def limits(proc: str = PROC, cgroups: str = CGROUPS) -> list[dict[str, Any]]:
    """Of memory, set on this process: control groups, innermost first, and what the shell was told."""
    found: list[dict[str, Any]] = [
        {"limit_bytes": level.limit_bytes, "used_bytes": level.used_bytes, "source": printable(level.source)}
        for level in cgroup_levels(proc, cgroups)
        if level.limit_bytes is not None
    ]
    for name, shell in LIMITS.items():
        most = rlimit(name)
        if most is not None:
            found.append({"limit_bytes": most, "used_bytes": None, "source": shell})
    return found


def rlimit(name: str) -> int | None:
    """Bytes; None without a limit."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    number = getattr(resource, name, None)
    soft = resource.RLIM_INFINITY if number is None else resource.getrlimit(number)[0]
    return None if soft == resource.RLIM_INFINITY else int(soft)


def bandwidth_gbps(measure: bool, fresh: bool) -> float | None:
    """GB/s that the usual threads read from memory; None where it is not known and not to be measured."""
    count = threads.thread_count()
    if measure and fresh:
        found = machine.measured_bandwidth(count)
        remember(machine.FILE, machine.bandwidth_key(count), {"bytes_per_s": found, "at": time.time()})
    else:
        found = machine.read_bandwidth() if measure else machine.remembered_bandwidth(count)[0]
    return found / 1e9 if found and math.isfinite(found) else None


# The disk


def disk_facts(measure: bool, fresh: bool) -> tuple[dict[str, Any] | None, str | None]:
    """How fast the cache's disk reads and what it is, or None and why."""
    try:
        folder = disk.existing(cache_root())
        speed = disk.remembered(folder, fresh=fresh) if measure else disk.known(folder)
    except (disk.Unmeasured, OSError) as error:
        return None, printable(error)
    if speed is None:
        why = "its files lie in memory" if in_memory(folder) else "not measured yet"
        return None, f"{printable(folder)}: {why}"
    return {**speed.as_dict(), "folder": printable(folder), **block_device(folder)}, None


def block_device(folder: Path, sys_root: Path = cpu.SYS) -> dict[str, Any]:
    """Name of the device and how much the kernel reads ahead on it; None where it is none of the machine's."""
    number = os.stat(folder).st_dev
    name = f"{os.major(number)}:{os.minor(number)}"
    block = sys_root / "dev" / "block" / name
    lines = (cpu.text(block / "uevent") or "").splitlines()
    device = next((line.partition("=")[2] for line in lines if line.startswith("DEVNAME=")), None)
    # A partition has no queue of its own.
    places = (sys_root / "class" / "bdi" / name, block / "queue", block / ".." / "queue")
    ahead = next((kb for place in places if (kb := cpu.number(place / "read_ahead_kb")) is not None), None)
    return {"device": None if device is None else printable(device), "read_ahead_kb": ahead}


# GPUs and engines


def gpus() -> list[dict[str, Any]]:
    """All that NVIDIA's driver knows."""
    return [
        {
            "index": gpu.index,
            "name": printable(gpu.name),
            "driver": printable(gpu.driver),
            "memory_bytes": gpu.memory,
            "used_bytes": gpu.used,
            "hidden": os.environ.get("CUDA_VISIBLE_DEVICES", "all") in HIDDEN,
        }
        for gpu in nvml.gpus()
    ]


def engine(why: str | None, found: str | None, devices: list[str]) -> dict[str, Any]:
    """One that is here if nothing speaks against it."""
    return {"available": why is None, "why": why, "version": found, "devices": devices if why is None else []}


def with_rates(engines: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Adds ``streams``: device -> format -> the part of the read bandwidth that decoding was measured to reach."""
    for name, one in engines.items():
        found = {device: rates.known(name, device) for device in one["devices"]}
        one["streams"] = {device: dict(rate.shares) for device, rate in found.items() if rate is not None}
    return engines


def native() -> dict[str, Any]:
    """The compiled engine."""
    why = library.why_not()
    return engine(None if why is None else printable(why), edge.__version__, ["cpu"])


def torch() -> dict[str, Any]:
    """torch, if it is installed, and whether it was built for a GPU that is here."""
    if not installed():
        return engine(f"not installed: {INSTALL.partition(': ')[2]}", None, [])
    devices = ["cpu"]
    if has_gpu():
        devices += ["mps"] if sys.platform == "darwin" else ["cuda"] if built_for_cuda() else []
    return engine(None, version("torch"), devices)


def built_for_cuda() -> bool:
    """Whether the installed torch has its CUDA library: seen from outside."""
    with suppress(ImportError, ValueError):
        spec = find_spec("torch")
        if spec is not None and spec.origin is not None:
            folder = Path(spec.origin).parent / "lib"
            return any((folder / name).exists() for name in ("libtorch_cuda.so", "torch_cuda.dll"))
    return False


def ort() -> dict[str, Any]:
    """ONNX Runtime, which exported packages run in."""
    with suppress(ImportError, ValueError):
        if "onnxruntime" in sys.modules or find_spec("onnxruntime") is not None:
            return engine(None, version("onnxruntime"), ["cpu"])
    return engine("not installed: pip install onnxruntime", None, [])


def energy() -> dict[str, Any]:
    """What would count joules here, for a run on the CPU and, with a GPU, on that."""
    meter = Meter.open()
    found: dict[str, Any] = {"source": meter.source, "why": meter.why}
    if nvml.device_count():
        gpu = Meter.open("cuda")
        found["gpu"] = {"source": gpu.source, "why": gpu.why}
    return found


def runs_on() -> dict[str, Any]:
    """What it runs on."""
    virtual = cpu.hypervisor()
    values: Mapping[str, Any] = {
        "name": platform.system(),
        "release": platform.release(),
        "virtual_machine": None if virtual is None else printable(virtual),
        "power": cpu.power(),
        "cache": printable(cache_root()),
        "versions": versions(),
    }
    return dict(values)
