"""The memory limits that control groups set on this process: v1 and v2, told apart by what is mounted."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

PROC = "/proc"
CGROUPS = "/sys/fs/cgroup"
# v1 writes "no limit" as the largest page-aligned int64, which depends on the page size.
_UNLIMITED = 2**62


@dataclass(frozen=True)
class Limit:
    """What one control group allows and holds, in bytes.

    ``limit_bytes`` is None without a limit. ``used_bytes`` leaves out file pages, which the kernel drops when it needs
    room (MemAvailable counts them as free too); it is None where the kernel does not say. ``source`` names the version
    and the file that rules.
    """

    limit_bytes: int | None
    used_bytes: int | None
    source: str


def cgroup_limit(proc_root: str = PROC, cgroup_root: str = CGROUPS) -> Limit | None:
    """The smallest limit among this process's control group and its parents; None where no memory controller is seen.

    Of equal limits the outermost one is returned: its use includes that of the others.
    """
    levels = cgroup_levels(proc_root, cgroup_root)
    limited = [(level.limit_bytes, level) for level in reversed(levels) if level.limit_bytes is not None]
    if limited:
        return min(limited, key=lambda pair: pair[0])[1]
    return levels[0] if levels else None


def cgroup_levels(proc_root: str = PROC, cgroup_root: str = CGROUPS) -> list[Limit]:
    """One ``Limit`` for each visible control group that holds this process, innermost first; never raises."""
    paths = own_paths(proc_root)
    levels = []
    for version, root, mount in mounts(proc_root, cgroup_root):
        for folder in upwards(mount, below(paths.get(version, "/"), root)):
            level = _read_v1(folder) if version == 1 else _read_v2(folder)
            if level is not None:
                levels.append(level)
    return levels


def mounts(proc_root: str, cgroup_root: str, controller: str = "memory") -> Iterator[tuple[int, str, Path]]:
    """Version, the control group that is the mount's root, and where it is mounted."""
    for line in (_read(Path(proc_root, "self", "mountinfo")) or "").splitlines():
        before, dash, after = line.partition(" - ")
        place, kind = before.split(" "), after.split(" ")
        if not dash or len(place) < 5 or len(kind) < 3:
            continue
        root, mount = _unescape(place[3]), PurePosixPath(_unescape(place[4]))
        where = Path(cgroup_root, mount.relative_to(CGROUPS)) if mount.is_relative_to(CGROUPS) else Path(mount)
        if kind[0] == "cgroup2":
            yield 2, root, where
        elif kind[0] == "cgroup" and controller in kind[2].split(","):
            yield 1, root, where


def own_paths(proc_root: str, controller: str = "memory") -> dict[int, str]:
    """Version -> this process's path in the hierarchy that has, or in v2 may have, a controller."""
    paths = {}
    for line in (_read(Path(proc_root, "self", "cgroup")) or "").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            paths[2] = path
        elif controller in controllers.split(","):
            paths[1] = path
    return paths


def below(path: str, root: str) -> PurePosixPath:
    """The group ``path`` as seen from a mount that shows only ``root``; the mount itself where that cannot be said."""
    own, top = PurePosixPath(path), PurePosixPath(root)
    # Seen from another cgroup namespace, both may begin with "/..".
    if ".." in own.parts or ".." in top.parts or not own.is_relative_to(top):
        return PurePosixPath()
    return own.relative_to(top)


def upwards(mount: Path, inside: PurePosixPath) -> Iterator[Path]:
    # The last parent of a relative path is ".", the mount; ``inside`` may not exist in a container, the mount does.
    for part in (inside, *inside.parents):
        yield mount / part


def _read_v1(folder: Path) -> Limit | None:
    own = _number(_read(folder / "memory.limit_in_bytes"))
    usage = _number(_read(folder / "memory.usage_in_bytes"))
    stat = _stat(folder)
    # The kernel's own minimum over the parents, also over those that a container does not see.
    inherited = _bounded(stat.get("hierarchical_memory_limit"))
    if own is None and usage is None:
        return None
    files = stat.get("total_active_file", 0) + stat.get("total_inactive_file", 0)
    limit, name = _smallest((_bounded(own), "memory.limit_in_bytes"), (inherited, "memory.stat"))
    return Limit(limit, _without(usage, files), f"cgroup v1, {folder / name}")


def _read_v2(folder: Path) -> Limit | None:
    hard, soft = _read(folder / "memory.max"), _read(folder / "memory.high")
    usage = _number(_read(folder / "memory.current"))
    if hard is None and usage is None:
        return None
    stat = _stat(folder)
    files = stat.get("active_file", 0) + stat.get("inactive_file", 0)
    # Above memory.high nothing is killed, but the process is throttled to a crawl.
    limit, name = _smallest((_bounded(_number(hard)), "memory.max"), (_bounded(_number(soft)), "memory.high"))
    return Limit(limit, _without(usage, files), f"cgroup v2, {folder / name}")


def _smallest(first: tuple[int | None, str], second: tuple[int | None, str]) -> tuple[int | None, str]:
    return second if second[0] is not None and (first[0] is None or second[0] < first[0]) else first


def _without(usage: int | None, files: int) -> int | None:
    return None if usage is None else max(0, usage - files)


def _bounded(value: int | None) -> int | None:
    return value if value is not None and value < _UNLIMITED else None


def _stat(folder: Path) -> dict[str, int]:
    pairs = (line.partition(" ") for line in (_read(folder / "memory.stat") or "").splitlines())
    return {key: number for key, _, text in pairs if (number := _number(text)) is not None}


def _number(text: str | None) -> int | None:
    """None for 'max', as for anything that is not a plain number."""
    text = (text or "").strip()
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 20 else None


def _unescape(path: str) -> str:
    """mountinfo writes the bytes of spaces, tabs, newlines and backslashes as three octal digits."""
    raw = re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8) & 255]), os.fsencode(path))
    return os.fsdecode(raw)


def _read(path: Path) -> str | None:
    try:
        return os.fsdecode(path.read_bytes())
    except (OSError, ValueError):
        return None
