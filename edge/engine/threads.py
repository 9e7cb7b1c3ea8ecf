"""How many threads an engine computes with: as many as there are cores of their own, unless somebody says otherwise."""

from __future__ import annotations

import math
import os
from functools import cache
from pathlib import Path

from edge.budget.quota import Quota, cpu_quota
from loaders.errors import Usage

# What the native engine's pool holds.
MOST = 256
# What a quota may lack to a whole core.
ALMOST = 0.1
# What this process was told, if it was.
_told: list[int] = []


def tell(count: int | None) -> None:
    """What was asked for, for engines that start from now on; None is the usual. Raises Usage."""
    if count is not None and not 1 <= count <= MOST:
        raise Usage(count, field="--threads", expected=f"1 to {MOST}")
    _told[:] = [] if count is None else [count]


def thread_count() -> int:
    """What was asked for; else, if OMP_NUM_THREADS is not set, as many as this process may run on cores of their own
    and as a quota of the CPUs keeps busy all the time.
    """
    if _told:
        return _told[0]
    named = os.environ.get("OMP_NUM_THREADS", "")
    if named.isdecimal() and int(named) > 0:
        return min(int(named), MOST)
    count = len({siblings(cpu) for cpu in usable_cpus()})
    share = quota()
    # Of 1.5 cores two threads get less done than one: both are stopped when the time is up, often one while the other
    # waits for it.
    most = MOST if share is None else math.floor(share.cores + ALMOST)
    return max(1, min(count, most, MOST))


def usable_cpus() -> set[int]:
    """The CPUs this process may run on."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


@cache
def quota() -> Quota | None:
    """What control groups leave this process, as it was when it was first asked: a plan and its run count alike."""
    return cpu_quota()


@cache
def siblings(cpu: int) -> str:
    """What names the core of a CPU: all that share it have the same; the CPU itself where the system does not tell."""
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text("ascii")
    except OSError:
        return str(cpu)
