"""Runs the command line for tests: in this process, or as a process of its own."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

import edge
from edge import engine as engines
from edge.budget import machine
from edge.budget.plan import Floor
from edge.cli.app import run_app

PROMPT = "once upon a time"
ROOT = Path(__file__).resolve().parent.parent
ENOUGH = ("--budget", "64GB")
STATISTICS = ("load:", "prefill:", "decode:", "peak memory:", "PLE:")


@dataclass(frozen=True)
class Done:
    """How a command ended, and what it said."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one object on stdout."""
        assert self.out.count("\n") == 1
        assert self.out.endswith("}\n")
        data: dict[str, Any] = json.loads(self.out)
        return data


Cli = Callable[..., Done]


@pytest.fixture(name="cli")
def cli_fixture(capsys: pytest.CaptureFixture[str]) -> Cli:
    """Runs a command in this process."""

    def cli(*args: object) -> Done:
        capsys.readouterr()
        before = signal.getsignal(signal.SIGINT)
        try:
            code = run_app([str(arg) for arg in args])
        finally:
            signal.signal(signal.SIGINT, before)
        return Done(code, *capsys.readouterr())

    return cli


@pytest.fixture(name="floor")
def floor_fixture(gemma3n: Path, monkeypatch: pytest.MonkeyPatch) -> Floor:
    """The floor, measured once in this process and remembered: later commands then plan alike."""
    with edge.load(gemma3n, context=16) as session:
        floor = session.floor
    bare = replace(floor, tokenizer=0)
    monkeypatch.setattr(engines.Runtime, "floor", lambda self: bare)
    monkeypatch.setattr(machine, "known_floor", lambda engine, device: machine.Known(bare, "native", "cpu"))
    return floor


def refused(done: Done, code: int, *words: str) -> str:
    """Exactly one line on stderr, nothing on stdout; gives the line."""
    assert done.out == ""
    assert done.err.endswith("\n")
    assert done.err.count("\n") == 1, done.err
    assert done.err.startswith("edge: error: ")
    assert "Traceback" not in done.err
    assert "a bug in edge" not in done.err
    assert "\x1b" not in done.err
    assert done.code == code, done.err
    for word in words:
        assert word in done.err
    return done.err


def short_run(model: Path, *more: object) -> tuple[object, ...]:
    return ("run", model, PROMPT, "-n", 6, "-c", 64, "--temp", 0, *ENOUGH, *more)


def interrupted_synth(folder: Path, pattern: str, *flags: object) -> None:
    """`edge synth FLAGS -o FOLDER/made`, interrupted once a file of ``pattern`` has a megabyte: nothing is left."""
    command = edge_command("synth", *flags, "-o", folder / "made")
    child = subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while not any(p.stat().st_size > 1 << 20 for p in folder.glob(pattern)):
            assert time.monotonic() < deadline
            assert child.poll() is None
            time.sleep(0.005)
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=60)
    finally:
        child.kill()
    assert (child.returncode, err) == (130, "")
    assert os.listdir(folder) == []


def piped(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "NO_COLOR": "1", **more}


def edge_command(*args: object) -> list[str | bytes]:
    return [sys.executable, "-m", "edge", *(arg if isinstance(arg, bytes) else str(arg) for arg in args)]
