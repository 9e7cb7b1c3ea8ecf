"""How fast a disk reads: measured past the page cache, remembered, and never in the way of anything."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.budget import disk
from edge.budget.disk import MIB, DiskSpeed, Reads, Unmeasured, measure, measured
from edge.store import cache
from tests.command import environment

SPEED = DiskSpeed(
    "/x", disk.DIRECT, 8 * MIB, 1e9, Reads(9e3, 1e-4), Reads(8e3, 2e-4), Reads(3e4, 3e-4), Reads(2e4, 4e-4)
)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured is not asserted: little time will do."""
    for name in ("WRITE_S", "SEQUENTIAL_S", "RANDOM_S"):
        monkeypatch.setattr(disk, name, 0.02)


@pytest.fixture(name="folder")
def folder_fixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder that counts as one on a disk, wherever tests run, and is empty again afterwards."""
    monkeypatch.setattr(disk, "in_memory", lambda path: False)
    yield tmp_path
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(name="kept")
def kept_fixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a cache of its own."""
    monkeypatch.setenv("EDGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / disk.FILE


def plausible(speed: DiskSpeed) -> None:
    for reads in (speed.one_4k, speed.one_18k, speed.eight_4k, speed.eight_18k):
        assert 0 < reads.p50_s < 10
        assert 0 < reads.per_second < 1e7
    assert 1e5 < speed.sequential < 1e12


# Measuring


def test_a_disk_is_measured_past_the_page_cache_and_left_as_it_was(folder: Path) -> None:
    speed = measured(folder, 12 * MIB)
    plausible(speed)
    assert speed.path == str(folder)
    assert speed.how in (disk.DIRECT, disk.DROPPED, disk.UNCACHED)
    assert 8 * MIB <= speed.size <= 12 * MIB


def test_one_at_a_time_takes_what_a_second_has_room_for(folder: Path) -> None:
    """Reads a second and the time of each are of one measurement."""
    one = measured(folder, 8 * MIB).one_4k
    assert one.per_second * one.p50_s < 1.5


def test_without_direct_reads_pages_are_dropped_before_each_kind(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dropped: list[int] = []
    advise = os.posix_fadvise

    def watched(file: int, start: int, length: int, advice: int) -> None:
        dropped.append(advice)
        advise(file, start, length, advice)

    monkeypatch.delattr(os, "O_DIRECT")
    monkeypatch.setattr(os, "posix_fadvise", watched)
    speed = measured(folder, 8 * MIB)
    plausible(speed)
    assert speed.how == disk.DROPPED
    assert dropped.count(os.POSIX_FADV_DONTNEED) == 5


def test_a_file_system_without_direct_reads_or_unnamed_files_will_do(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "O_TMPFILE")
    monkeypatch.setattr(disk.fcntl, "fcntl", refuse(errno.EINVAL))
    assert measured(folder, 8 * MIB).how == disk.DROPPED


def test_a_system_without_a_way_past_its_page_cache_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "O_DIRECT")
    monkeypatch.delattr(os, "posix_fadvise")
    with pytest.raises(Unmeasured, match="no way past"):
        measured(folder)


def test_a_slow_disk_gets_less_to_write(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "WRITE_S", 0.0)
    assert measured(folder, 64 * MIB).size == disk.LEAST


def refuse(number: int) -> Any:
    def call(*args: object) -> int:
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize(
    ("function", "number", "words"),
    [
        ("pwrite", errno.ENOSPC, "No space left"),
        ("pwrite", errno.EFBIG, "too large"),
        ("fdatasync", errno.EIO, "Input/output"),
        ("preadv", errno.EIO, "Input/output"),
        ("statvfs", errno.EACCES, "Permission denied"),
    ],
)
def test_what_fails_is_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, function: str, number: int, words: str
) -> None:
    monkeypatch.setattr(os, function, refuse(number))
    with pytest.raises(Unmeasured, match=words) as error:
        measured(folder, 8 * MIB)
    assert str(folder) in str(error.value)
    assert measure(folder, 8 * MIB) is None


def test_a_disk_that_takes_or_gives_half_is_no_measurement(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", lambda file, data, at: len(data) // 2)
        assert measure(folder, 8 * MIB) is None
    monkeypatch.setattr(os, "preadv", lambda file, into, at: 0)
    assert measure(folder, 8 * MIB) is None


def test_a_full_disk_is_not_filled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.statvfs(folder)
    little = os.statvfs_result((*real[:4], 20 * MIB // real.f_frsize, *real[5:10]))
    monkeypatch.setattr(os, "statvfs", lambda path: little)
    monkeypatch.setattr(os, "pwrite", refuse(errno.EPERM))
    with pytest.raises(Unmeasured, match="less than 32 MiB are free"):
        measured(folder)


def test_memory_is_no_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = os.stat(tmp_path).st_dev
    mounts = tmp_path / "mountinfo"
    mounts.write_text(f"1 0 {os.major(device)}:{os.minor(device)} / / rw - tmpfs tmpfs rw\n")
    monkeypatch.setattr(cache, "MOUNTS", mounts)
    with pytest.raises(Unmeasured, match="lie in memory"):
        measured(tmp_path)


def test_a_folder_that_takes_no_files_is_one_line(folder: Path) -> None:
    with pytest.raises(Unmeasured):
        measured(folder / "missing")
    assert measure(Path("/proc/self")) is None


def test_nothing_is_left_by_a_process_that_is_killed(folder: Path) -> None:
    code = (
        "import os, sys, time; from pathlib import Path; from edge.budget import disk\n"
        "if sys.argv[2] == 'named': del os.O_TMPFILE\n"
        "with disk.scratch(Path(sys.argv[1])) as file:\n"
        "    os.write(file, b'x' * 5000); os.kill(os.getpid(), 9)"
    )
    for kind in ("named", "unnamed"):
        line = [sys.executable, "-c", code, str(folder), kind]
        assert subprocess.run(line, env=environment(), check=False, timeout=60).returncode == -9
        assert list(folder.iterdir()) == []


# Remembering


def test_a_speed_is_remembered_by_device(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Path] = []
    monkeypatch.setattr(disk, "measured", lambda place: calls.append(place) or SPEED)
    assert disk.known() is None
    assert disk.disk_speed() == SPEED
    assert calls == [tmp_path], "the nearest folder there is"
    inside = tmp_path / "some" / "folder"
    inside.mkdir(parents=True)
    assert disk.disk_speed(inside) == disk.known(inside / "not" / "there") == SPEED
    assert len(calls) == 1
    disk.disk_speed(fresh=True)
    assert len(calls) == 2
    data = json.loads(kept.read_text())
    assert list(data) == [f"disk {os.stat(tmp_path).st_dev}"]
    monkeypatch.setattr(time, "time", lambda: data[next(iter(data))]["at"] + disk.WEEK + 1)
    assert disk.known() is None


def test_a_disk_that_cannot_be_measured_is_none_and_not_remembered(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "in_memory", lambda path: True)
    assert disk.disk_speed() is None
    with pytest.raises(Unmeasured, match="in memory"):
        disk.remembered()
    assert not kept.exists()


def test_what_is_written_reads_back() -> None:
    value = json.loads(json.dumps({**SPEED.as_dict(), "at": time.time()}))
    assert disk.parsed(value) == SPEED


WRONG = st.sampled_from([None, True, 0, 1, -1.0, 0.0, math.nan, math.inf, "x", "\ud800", [], {}, {"p50_s": 1.0}, 1e300])


@given(st.dictionaries(st.sampled_from([*SPEED.as_dict(), "at"]), WRONG, min_size=1))
def test_nonsense_in_the_file_is_nothing_known(change: dict[str, Any]) -> None:
    found = disk.parsed({**SPEED.as_dict(), "at": time.time(), **change})
    harmless = {"path": str, "sequential": float, "size": int}
    if found is not None:
        assert all(name in harmless and type(change[name]) is harmless[name] for name in change)
        assert found.path.isprintable()
        assert 0 < found.sequential < math.inf


@pytest.mark.parametrize("text", ["", "[]", "{", '{"disk 1": 3}', "\x00" * 99, '{"a":' * 5000])
def test_a_file_of_nonsense_is_written_anew(kept: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    kept.parent.mkdir()
    kept.write_text(text)
    monkeypatch.setattr(disk, "measured", lambda place: SPEED)
    assert disk.known() is None
    assert disk.disk_speed() == disk.known() == SPEED


def test_a_cache_that_cannot_be_written_is_no_reason_to_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EDGE_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(disk, "measured", lambda place: SPEED)
    assert disk.disk_speed() == SPEED
