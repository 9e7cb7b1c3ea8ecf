"""The share of the CPUs that control groups leave this process: v1 and v2, told apart by what is mounted.

A quota is time, not cores: under 1.5 two threads run on two cores, and both are stopped when the time is up.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edge.budget.cgroup import CGROUPS, PROC, below, mounts, own_paths, upwards

CPU = "cpu"


@dataclass(frozen=True)
class Quota:
    """``cores``: CPU seconds a second, above 0. ``source`` names the version and the file that rules."""

    cores: float
    source: str


def cpu_quota(proc_root: str = PROC, cgroup_root: str = CGROUPS) -> Quota | None:
    """The smallest quota among this process's control group and its parents; None without one. Never raises."""
    own, found = own_paths(proc_root, CPU), []
    for version, root, mount in mounts(proc_root, cgroup_root, CPU):
        for folder in upwards(mount, below(own.get(version, "/"), root)):
            quota = of_v1(folder) if version == 1 else of_v2(folder)
            if quota is not None:
                found.append(quota)
    return min(found, key=lambda quota: quota.cores, default=None)


def of_v1(folder: Path) -> Quota | None:
    """-1 is no quota, as is anything that is no number."""
    file = folder / "cpu.cfs_quota_us"
    return quota(text(file), text(folder / "cpu.cfs_period_us"), f"cgroup v1, {file}")


def of_v2(folder: Path) -> Quota | None:
    """'max' is no quota."""
    file = folder / "cpu.max"
    most, _, period = text(file).strip().partition(" ")
    return quota(most, period, f"cgroup v2, {file}")


def quota(most: str, period: str, source: str) -> Quota | None:
    """Microseconds of CPU in each period of microseconds."""
    used, every = (int(t) if t.isascii() and t.isdigit() and len(t) < 19 else 0 for t in (most.strip(), period.strip()))
    return Quota(used / every, source) if used > 0 and every > 0 else None


def text(path: Path) -> str:
    """Empty where it cannot be read."""
    try:
        return path.read_bytes().decode("utf-8", "replace")
    except (OSError, ValueError):
        return ""
