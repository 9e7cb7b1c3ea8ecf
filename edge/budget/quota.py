"""The share of the CPUs that control groups leave this process: v1 and v2, told apart by what is mounted.

A quota is time, not cores: under 1.5 two threads run on two cores, and both are stopped when the time is up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from edge.budget.cgroup import CGROUPS, PROC, below, upwards


@dataclass(frozen=True)
class Quota:
    """``cores``: CPU seconds a second, above 0. ``source`` names the version and the file that rules."""

    cores: float
    source: str


def cpu_quota(proc_root: str = PROC, cgroup_root: str = CGROUPS) -> Quota | None:
    """The smallest quota among this process's control group and its parents; None without one. Never raises."""
    own, found = dict(paths(proc_root)), []
    for version, root, mount in mounts(proc_root, cgroup_root):
        for folder in upwards(mount, below(own.get(version, "/"), root)):
            quota = of_v1(folder) if version == 1 else of_v2(folder)
            if quota is not None:
                found.append(quota)
    return min(found, key=lambda quota: quota.cores, default=None)


def paths(proc_root: str) -> Iterator[tuple[int, str]]:
    """Version and this process's path in the hierarchy that has, or in v2 may have, the CPU controller."""
    for line in text(Path(proc_root, "self", "cgroup")).splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            yield 2, path
        elif "cpu" in controllers.split(","):
            yield 1, path


def mounts(proc_root: str, cgroup_root: str) -> Iterator[tuple[int, str, Path]]:
    """Version, the control group that is the mount's root, and where it is mounted."""
    for line in text(Path(proc_root, "self", "mountinfo")).splitlines():
        before, _, after = line.partition(" - ")
        place, kind = before.split(" "), after.split(" ")
        if len(place) < 5 or len(kind) < 3:
            continue
        mount = PurePosixPath(place[4])
        where = Path(cgroup_root, mount.relative_to(CGROUPS)) if mount.is_relative_to(CGROUPS) else Path(mount)
        if kind[0] == "cgroup2":
            yield 2, place[3], where
        elif kind[0] == "cgroup" and "cpu" in kind[2].split(","):
            yield 1, place[3], where


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
