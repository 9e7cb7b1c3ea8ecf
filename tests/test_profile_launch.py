"""A measuring process, from outside: whatever it says and however it ends is reported, and nothing of it is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.profile.launch import POINTS, Ended, components, follow_text, launch, timeline

MIB = 1 << 20
GOOD = """
import json, sys, time
def say(**line): print(json.dumps(line), flush=True)
say(at=time.monotonic(), mark="started")
block = bytearray(b"x") * (64 << 20)
say(at=time.monotonic(), held={"weights": 64 << 20})
time.sleep(0.4)
say(at=time.monotonic(), mark="loaded")
say(result={"load_s": 0.5})
"""


def run(code: str) -> Ended:
    return launch([sys.executable, "-c", code])


def test_a_good_run_is_sampled_and_followed() -> None:
    heard: list[str] = []
    found = launch([sys.executable, "-c", GOOD], heard=heard.append)
    assert (found.status, found.why, found.result) == ("ok", None, {"load_s": 0.5})
    assert heard == ["started", "loaded"] == [name for _, name in found.marks]
    assert 0.3 < found.marks[1][0] - found.marks[0][0] < 5
    # 50 Hz, as far as a busy machine lets it: far more than a few samples, and they saw the block.
    assert len(found.samples) > 8
    assert 64 * MIB < found.peak_seen < 160 * MIB
    assert found.peak_seen == max(rss for _, rss, *_ in found.samples)
    for _, rss, anonymous, file, device in found.samples:
        assert device is None
        assert abs(rss - anonymous - file) < MIB
    said = timeline(found)
    assert max(said["rss"]) == found.peak_seen
    assert said["components"]["weights"][0] == 0
    assert said["components"]["weights"][-1] == 64 * MIB
    assert {len(said[name]) for name in ("seconds", "rss", "anonymous", "file")} == {len(said["seconds"])}


@pytest.mark.parametrize(
    ("code", "status", "words"),
    [
        ("import sys; sys.stderr.write('first\\nlast words\\n'); sys.exit(3)", "failed", "exit 3: last words"),
        ("import os; os.kill(os.getpid(), 9)", "killed", "killed by"),
        ("import os; os.kill(os.getpid(), 11)", "killed", "ended by SIGSEGV"),
        ("pass", "failed", "exit 0: no message"),
        ("print('not json'); print('[1]'); print('{\"result\": 7}')", "failed", "exit 0"),
        ('print(\'{"error": {"text": "no such file", "kind": "MissingFile"}}\'); exit(66)', "failed", "no such file"),
        ('print(\'{"error": {"text": "too big", "needed_bytes": 7}}\'); exit(80)', "refused", "too big"),
        ('print(\'{"result": {"load_s": 1.0, "over": true}}\')', "failed", "budget was broken"),
        ('print(\'{"result": {"load_s": 1.0}}\'); exit(1)', "failed", "exit 1"),
    ],
)
def test_how_it_ended(code: str, status: str, words: str) -> None:
    found = run(code)
    assert found.status == status
    assert found.why is not None
    assert words in found.why
    assert "\n" not in found.why


def test_a_line_without_an_end_is_not_waited_for_forever() -> None:
    found = run("import sys; sys.stdout.write('x' * (9 << 20)); sys.stdout.flush()")
    assert found.status == "failed"


def test_interrupted_it_takes_its_child_along(tmp_path: Path) -> None:
    """A signal to the one that measures, as a terminal sends it; then a kill, which nobody can catch."""
    code = f"""
import sys
from edge.profile.launch import launch
child = "import os, time; from edge.profile.child import volunteer; volunteer()\\n"
child += "open({str(tmp_path / "pid")!r}, 'w').write(str(os.getpid())); time.sleep(600)"
launch([sys.executable, "-c", child])
"""
    for number in (signal.SIGINT, signal.SIGKILL):
        (tmp_path / "pid").unlink(missing_ok=True)
        process = subprocess.Popen(
            [sys.executable, "-c", code], stderr=subprocess.PIPE, cwd=Path(__file__).parent.parent
        )
        pid = wait_for(tmp_path / "pid")
        os.kill(process.pid, number)
        process.communicate(timeout=30)
        assert gone(pid)


def wait_for(path: Path) -> int:
    for _ in range(1000):
        text = path.read_text() if path.exists() else ""
        if text:
            return int(text)
        time.sleep(0.02)
    raise AssertionError("the child did not start")


def gone(pid: int) -> bool:
    for _ in range(500):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.02)
    return False


@given(st.lists(st.tuples(st.floats(0, 100), st.integers(0, 2**40)), max_size=3 * POINTS))
def test_a_timeline_keeps_its_highest_point(points: list[tuple[float, int]]) -> None:
    points = sorted(points)
    found = Ended(samples=[(at, rss, rss, 0, None) for at, rss in points])
    said = timeline(found)
    assert len(said["rss"]) <= POINTS
    assert said["seconds"] == sorted(said["seconds"])
    assert max(said["rss"], default=0) == max((rss for _, rss in points), default=0)


def test_components_are_those_of_the_last_change() -> None:
    held = [(1.0, {"weights": 5}), (2.0, {"weights": 5, "kv": 3}), (3.0, {"kv": 1})]
    assert components(held, [0.5, 1.0, 1.9, 2.0, 9.0]) == {"weights": [0, 5, 5, 5, 0], "kv": [0, 0, 0, 3, 1]}
    assert components([], [1.0]) == {}


@given(st.text())
def test_anything_may_be_said(text: str) -> None:
    found = Ended()
    follow_text(text, found)
    follow_text(json.dumps({"at": "soon", "mark": 7, "held": [], "result": text}) + "\n", found)
    assert found.result == {}
    assert all(isinstance(name, str) for _, name in found.marks)
