"""A box holds what it says: who stays within is left alone, who does not is killed and reported, nothing is left."""

import json
import mmap
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from edge.budget.cgroup import Limit
from edge.profile import box as boxed

MIB = 2**20
HOG = """
import sys
from edge.profile.child import volunteer
volunteer()
blocks = []
while True:
    blocks.append(bytearray(b"x") * (8 << 20))
"""
# In a box: a child that wants more than the box has, started by a parent that must outlive it.
PARENT = """
import json, sys
from edge.profile.launch import launch
ended = launch([sys.executable, "-c", sys.argv[1]])
print(json.dumps([ended.status, ended.why, ended.peak_seen]))
"""
HOLD = "import sys; block = bytearray(b'x') * (int(sys.argv[1]) << 20); print(len(block) >> 20)"


def hold(mib, limit):
    return boxed.run([sys.executable, "-c", HOLD, str(mib)], limit)


def left_over():
    return [group for _, parent in boxed._parents() for group in parent.glob(f"edge-box-{os.getpid()}-*")]


def in_ram(path):
    """Whether the file system of ``path`` is in memory: there is nowhere else for its pages to go."""
    mounts = [part for part in psutil.disk_partitions(all=True) if path.is_relative_to(part.mountpoint)]
    return max(mounts, key=lambda part: len(part.mountpoint)).fstype in {"tmpfs", "ramfs"}


@pytest.fixture
def file(tmp_path):
    """48 MiB on the disk, not in the page cache."""
    path = tmp_path / "shard"
    path.write_bytes(os.urandom(MIB) * 48)
    boxed.drop_from_page_cache(path)
    return path


def test_within_the_limit():
    done = hold(24, 96 * MIB)
    assert (done.rc, done.stdout, done.stderr, done.oom_kills, done.limit) == (0, "24\n", "", 0, 96 * MIB)
    assert 24 * MIB < done.peak < 96 * MIB
    assert not done.hits
    assert 0 < done.seconds < 60
    assert not left_over()


def test_beyond_the_limit_is_killed_and_reported():
    done = hold(160, 96 * MIB)
    assert (done.rc, done.stdout) == (-9, "")
    assert done.oom_kills == 1
    assert done.hits is None or done.hits > 0
    assert 90 * MIB < done.peak <= 96 * MIB
    assert not left_over()


def test_children_are_in_the_box_too():
    code = f"import subprocess, sys; print(subprocess.run([sys.executable, '-c', {HOLD!r}, sys.argv[1]]).returncode)"
    done = boxed.run([sys.executable, "-c", code, "160"], 96 * MIB)
    assert (done.rc, done.stdout, done.oom_kills) == (0, "-9\n", 1)
    done = boxed.run([sys.executable, "-c", code, "24"], 96 * MIB)
    assert (done.rc, done.stdout, done.oom_kills) == (0, "24\n0\n", 0)


def test_this_process_stays_outside():
    block = bytearray(b"x") * (64 * MIB)
    assert hold(8, 48 * MIB).oom_kills == 0
    block += bytearray(b"x") * (64 * MIB)
    assert len(block) == 128 * MIB


def test_the_command_gets_its_words_its_folder_and_its_environment(tmp_path):
    code = "import os, sys; print(sys.argv[1:], os.getcwd(), os.environ['GREETING']); sys.exit(125)"
    words = ["two words", "$HOME", "'\"*"]
    done = boxed.run([sys.executable, "-c", code, *words], 96 * MIB, env={"GREETING": "hello"}, cwd=tmp_path)
    assert (done.rc, done.stdout) == (125, f"{words} {os.path.realpath(tmp_path)} hello\n")


def test_files_fill_the_box_but_do_not_break_it(file):
    code = "import sys\nfor _ in range(2):\n with open(sys.argv[1], 'rb') as f:\n  while f.read(1 << 20): pass"
    done = boxed.run([sys.executable, "-c", code, file], 32 * MIB)
    assert (done.rc, done.stderr, done.oom_kills) == (0, "", 0)
    assert done.peak <= 32 * MIB
    if not in_ram(file):
        assert done.hits is None or done.hits > 0
        assert done.refaults is None or done.refaults > 0, "the second reading found nothing of the first"
        assert boxed.cached_bytes(file) <= 32 * MIB


def test_what_takes_too_long_is_ended_with_all_it_started(tmp_path):
    pids = tmp_path / "pids"
    command = ["sh", "-c", 'sleep 60 & echo $! $$ > "$0"; sleep 60', pids]
    with pytest.raises(subprocess.TimeoutExpired):
        boxed.run(command, 64 * MIB, timeout=0.5)
    first, second = map(int, pids.read_text().split())
    end = time.monotonic() + 5
    # The orphan is a zombie until its new parent has taken note.
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in (first, second)):
        assert time.monotonic() < end
        time.sleep(0.01)
    assert not left_over()


def test_who_stays_behind_is_ended(tmp_path):
    pids = tmp_path / "pids"
    done = boxed.run(["sh", "-c", 'sleep 60 > /dev/null 2>&1 & echo $! > "$0"', pids], 64 * MIB)
    assert done.rc == 0
    pid = int(pids.read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie"
    assert not left_over()


def test_a_box_larger_than_what_is_around_it_is_refused(monkeypatch):
    around = Limit(32 * MIB, 0, "cgroup v2, /around/memory.max")
    monkeypatch.setattr(boxed.cgroup, "cgroup_limit", lambda: around)
    with pytest.raises(ValueError, match=r"^a box of 67108864 bytes, where cgroup v2, /around/memory.max allows 335"):
        boxed.run(["true"], 64 * MIB)


@pytest.mark.parametrize(
    ("parents", "reason"),
    [
        ([], "no memory control group is mounted"),
        ([(1, Path("/proc"))], "/proc: "),
        ([(2, Path("/proc")), (1, Path("/nowhere"))], "/proc hands on no memory controller; /nowhere: No such file"),
    ],
)
def test_why_not_says_why_not(monkeypatch, parents, reason):
    assert boxed.why_not() is None
    monkeypatch.setattr(boxed, "_parents", lambda: iter(parents))
    # Past the cache, which is for the real answer.
    answer = boxed.why_not.__wrapped__()
    assert answer.startswith(reason)
    assert "\n" not in answer


def test_a_process_that_cannot_enter_is_no_result(monkeypatch, tmp_path):
    """The group could be made, moving into it is refused: by v2 when this user does not own what is above both."""
    monkeypatch.setattr(boxed, "_ENTER", boxed._ENTER.replace('"$0"', '"$0/no"'))
    with pytest.raises(PermissionError, match="edge-box-"):
        boxed.run(["true"], 64 * MIB)
    assert not left_over()


# --- page cache ------------------------------------------------------------------------------------------------------


def test_dropping_a_file_makes_it_cold(file):
    file.read_bytes()
    assert boxed.cached_bytes(file) == 48 * MIB
    left = boxed.drop_from_page_cache(file)
    assert left == boxed.cached_bytes(file) == (48 * MIB if in_ram(file) else 0)


def test_one_page_at_a_time(file, monkeypatch):
    monkeypatch.setattr(boxed, "CHUNK", 4 * MIB)
    before = boxed.cached_bytes(file)
    with file.open("rb") as f:
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        for at in (0, 5 * MIB + 1, 48 * MIB - 1):
            os.pread(f.fileno(), 1, at)
        assert boxed.cached_bytes(file) - before == (0 if in_ram(file) else 3 * mmap.PAGESIZE)


def test_what_is_written_is_on_the_disk_before_it_is_dropped(tmp_path):
    """A folder, with files below it, one of no bytes, and one that is still dirty."""
    (tmp_path / "below").mkdir()
    for name, size in (("a", 3 * MIB), ("below/b", MIB + 1), ("empty", 0)):
        (tmp_path / name).write_bytes(b"x" * size)
    assert boxed.cached_bytes(tmp_path) == 4 * MIB + mmap.PAGESIZE
    assert boxed.drop_from_page_cache(tmp_path) == (boxed.cached_bytes(tmp_path) if in_ram(tmp_path) else 0)
    assert (tmp_path / "below" / "b").read_bytes() == b"x" * (MIB + 1)


def test_pages_in_use_stay(file):
    with file.open("rb") as f, mmap.mmap(f.fileno(), 8 * MIB, access=mmap.ACCESS_READ) as pages:
        assert len(set(pages[:: mmap.PAGESIZE])) > 1
        assert boxed.drop_from_page_cache(file) >= 8 * MIB


def test_the_kernel_kills_the_child_and_not_who_reports_it() -> None:
    done = boxed.run([sys.executable, "-c", PARENT, HOG], 256 * MIB, cwd=Path(__file__).parent.parent)
    assert done.rc == 0, done.stderr[-500:]
    status, why, peak = json.loads(done.stdout)
    assert status == "killed"
    assert why.startswith("killed by the kernel, out of memory at ")
    assert 32 * MIB < peak < 256 * MIB
    assert done.oom_kills == 1
