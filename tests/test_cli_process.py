"""``edge run`` stopped, cut off and held to its budget: by Ctrl-C, signals and pipes."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edge
from loaders.text.tokenizer import Tokenizer
from tests.command import (  # noqa: F401
    ENOUGH,
    PROMPT,
    STATISTICS,
    Cli,
    Done,
    cli_fixture,
    edge_command,
    environment,
    refused,
    short_run,
)
from tests.small import gemma3n_fixture  # noqa: F401

# Interrupted, in this process


def press_at(monkeypatch: pytest.MonkeyPatch, number: int) -> list[int]:
    """Ctrl-C while the engine makes its ``number``th pass; gives the tokens of each pass so far."""
    from edge.engine.native_engine import NativeEngine

    passes: list[int] = []
    real = NativeEngine.forward

    def forward(self: NativeEngine, ids: np.ndarray, *args: Any, **more: Any) -> np.ndarray:
        passes.append(len(ids))
        if len(passes) == number:
            signal.raise_signal(signal.SIGINT)
        return real(self, ids, *args, **more)

    # What warms the libraries up also makes passes.
    monkeypatch.setattr("edge.engine.native_start.warm_up", lambda: None)
    monkeypatch.setattr(NativeEngine, "forward", forward)
    return passes


def test_ctrl_c_ends_after_the_current_token_and_still_accounts(
    cli: Cli, gemma3n: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ("run", gemma3n, PROMPT, "-c", 64, "--temp", 0, *ENOUGH)
    whole = cli(*args, "-n", 3, "-q")
    passes = press_at(monkeypatch, 4)
    done = cli(*args, "-n", 50)
    assert (done.code, passes[1:]) == (130, [1, 1, 1])
    assert done.out == whole.out, "every token that was made was printed"
    assert all(any(line.startswith(name) for line in done.err.splitlines()) for name in STATISTICS)
    assert "3 tokens" in next(line for line in done.err.splitlines() if line.startswith("decode:"))
    assert "edge: error" not in done.err
    passes.clear()
    data = cli(*args, "-n", 50, "--json")
    assert (data.code, data.json["finish"], len(data.json["tokens"])) == (130, "interrupted", 3)


def test_ctrl_c_while_a_long_prompt_is_read_still_accounts(
    cli: Cli, gemma3n: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prompt is read in chunks; the answer ends after the current one, with its statistics."""
    passes = press_at(monkeypatch, 2)
    done = cli("run", gemma3n, "once upon " * 400, "-n", 5, "--temp", 0, *ENOUGH)
    assert (done.code, done.out) == (130, "\n")
    assert passes == [64, 64]
    assert "prefill:" in done.err


# In a process of its own


def greedy(folder: Path, count: int) -> tuple[list[int], Tokenizer]:
    with edge.load(folder, context=2048) as session:
        found = [event.token for event in session.generate(PROMPT, max_tokens=count)][:-1]
        return [token for token in found if token is not None], session.tokenizer


def test_ctrl_c_in_a_terminal(gemma3n: Path) -> None:
    command = edge_command("run", gemma3n, PROMPT, "-n", -1, "--temp", 0, *ENOUGH)
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment(), stdout=pipe, stderr=pipe, bufsize=0) as process:
        assert process.stdout is not None
        first = process.stdout.read(20)
        process.send_signal(signal.SIGINT)
        started = time.monotonic()
        out, err = process.communicate(timeout=30)
    assert time.monotonic() - started < 5
    assert process.returncode == 130
    said, lines = (first + out).decode(), err.decode().splitlines()
    assert all(any(line.startswith(name) for line in lines) for name in STATISTICS), err
    assert "Traceback" not in err.decode()
    count = int(re.findall(r"decode: +(\d+) tokens", err.decode())[0])
    assert 0 < count < 2000
    tokens, tokenizer = greedy(gemma3n, count)
    assert said == tokenizer.decode(tokens) + "\n", "no text is lost"


def test_a_reader_that_has_had_enough(gemma3n: Path) -> None:
    command = edge_command("run", gemma3n, PROMPT, "-n", 300, "--temp", 0, "-q", *ENOUGH)
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert len(process.stdout.read(1)) == 1
        process.stdout.close()
        assert process.stderr is not None
        err = process.stderr.read()
        process.wait(timeout=30)
    assert (process.returncode, err) == (0, b"")


@pytest.mark.parametrize("more", [("--quiet",), ("--json",)])
def test_output_that_cannot_be_written(gemma3n: Path, more: tuple[str, ...]) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            edge_command(*short_run(gemma3n), *more),
            env=environment(),
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=60,
            check=False,
        )
    refused(Done(done.returncode, "", done.stderr.decode()), 74, "No space left on device")


def test_bytes_that_are_no_text_on_the_command_line(gemma3n: Path) -> None:
    """In a locale that knows nothing but ASCII."""
    command = edge_command("run", gemma3n, b"caf\xe9 \xff", "-n", 30, "--temp", 0, "-c", 64, "--json", *ENOUGH)
    done = subprocess.run(command, env=environment(LC_ALL="C"), capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    found = json.loads(done.stdout.decode("utf-8"))
    assert found["timing"]["prompt_tokens"] == len(Tokenizer.open(gemma3n).encode("caf\ufffd \ufffd"))


def test_a_real_budget_is_kept(gemma3n: Path) -> None:
    """The smallest configuration there is, in a process whose floor was measured in another one of its kind."""
    plan = edge_command("plan", gemma3n, "--json", "--budget", "1MB")
    done = subprocess.run(plan, env=environment(), capture_output=True, timeout=60, check=False)
    assert done.returncode == 80
    needed = json.loads(done.stdout)["nearest"]["needed_bytes"]
    budget = needed + (12 << 20)
    run = edge_command("run", gemma3n, PROMPT, "-n", 40, "--json", "--budget", budget)
    done = subprocess.run(run, env=environment(), capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    memory = json.loads(done.stdout)["memory"]
    assert memory["peak_bytes"] <= memory["budget_bytes"] == budget
    assert memory["planned_bytes"] <= budget
