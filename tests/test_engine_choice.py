"""Which engine runs, with how many threads and in what memory; that none imports another's library; what is refused."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import edge
from edge.budget.plan import Floor, Request, enumerate_plans
from edge.engine import choice, native_lock, threads
from edge.engine.native import library
from edge.session import Session
from loaders.checkpoint import Checkpoint
from loaders.errors import NotPermitted, Usage
from tests.command import ENOUGH, PROMPT, Cli, cli_fixture, environment, refused  # noqa: F401
from tests.small import gemma3n_fixture  # noqa: F401

Load = Callable[..., Session]


@pytest.fixture(name="load")
def load_fixture(gemma3n: Path) -> Iterator[Load]:
    """``edge.load`` of the Gemma 3n checkpoint, closed in the end."""
    sessions: list[Session] = []

    def load(**options: Any) -> Session:
        sessions.append(edge.load(gemma3n, **{"context": 32, **options}))
        return sessions[-1]

    yield load
    for session in sessions:
        session.close()


# No torch, and what is said where something else is not there


def test_a_run_on_a_cpu_imports_neither_torch_nor_onnx(gemma3n: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from edge.cli.app import run_app; code = run_app(sys.argv[1:]); "
        "print([m for m in ('torch', 'onnx', 'onnxruntime', 'transformers') if m in sys.modules]); sys.exit(code)"
    )
    for precision in ("int4", "float32"):
        line = [
            "run",
            gemma3n,
            PROMPT,
            "-n",
            4,
            "-c",
            32,
            "--precision",
            precision,
            "--device",
            "cpu",
            *ENOUGH,
            "--json",
        ]
        command = [sys.executable, "-c", script, *map(str, line)]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=environment(EDGE_CACHE=str(tmp_path))
        )
        assert done.returncode == 0, done.stderr
        answer, modules = done.stdout.splitlines()
        assert modules == "[]"
        assert json.loads(answer)["plan"]["engine"] == "native"


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The module was not compiled."""
    monkeypatch.setattr(library, "_opened", lambda: (None, "it was not compiled: install a C++ compiler"))


@pytest.mark.usefixtures("missing")
def test_without_the_module_torch_runs_and_one_line_says_why(cli: Cli, gemma3n: Path) -> None:
    flags = (gemma3n, "-c", 32, "--device", "cpu", *ENOUGH)
    done = cli("run", *flags, "-p", PROMPT, "-n", 2)
    assert done.code == 0, done.err
    (line,) = [line for line in done.err.splitlines() if line.startswith("engine: torch")]
    assert "C++ compiler" in line
    quiet = cli("run", *flags, "-p", PROMPT, "-n", 2, "-q")
    assert (quiet.code, quiet.err) == (0, "")
    assert "engine: torch" in cli("plan", *flags).out
    assert cli("plan", *flags, "--json").json["plan"]["engine"] == "torch"


@pytest.mark.usefixtures("missing")
def test_without_any_engine_it_is_said_what_to_install(
    cli: Cli, gemma3n: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "installed", lambda: False)
    refused(cli("run", gemma3n, PROMPT, *ENOUGH), 78, "C++ compiler", "pip install torch")
    refused(cli("run", gemma3n, PROMPT, "--engine", "native", *ENOUGH), 78, "--engine native", "C++ compiler")
    refused(cli("run", gemma3n, PROMPT, "--engine", "torch", *ENOUGH), 78, "--engine torch", "pip install torch")


def test_what_auto_comes_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(choice, "device_used", lambda: None)
    assert choice.choose("auto", "auto") == choice.choose("native", "auto") == choice.Choice("native", "cpu")
    assert choice.choose("torch", "auto") == choice.Choice("torch", "auto")
    monkeypatch.setattr(choice, "device_used", lambda: 1 << 30)
    assert choice.choose("auto", "auto") == choice.Choice("torch", "auto"), "a GPU"
    assert choice.choose("auto", "cpu").engine == "native"
    assert choice.choose("auto", "cuda") == choice.Choice("torch", "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert choice.choose("auto", "auto").engine == "native", "a hidden GPU"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(choice, "installed", lambda: False)
    assert choice.choose("auto", "auto") == choice.Choice("native", "cpu"), "a GPU that nobody can use"
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(choice.platform, "machine", lambda: "arm64")
    assert choice.choose("auto", "auto").engine == "native"
    monkeypatch.setattr(choice, "installed", lambda: True)
    assert choice.choose("auto", "auto") == choice.Choice("torch", "auto")


def test_a_gpu_that_torch_cannot_use_is_no_reason_for_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from edge import engine as engines

    monkeypatch.setattr(choice, "device_used", lambda: 1 << 30)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert engines.start("auto", "auto").engine == "native"


def test_it_runs_on_the_cpu_alone(cli: Cli, gemma3n: Path) -> None:
    for command in (("run", gemma3n, PROMPT), ("plan", gemma3n)):
        refused(cli(*command, "--engine", "native", "--device", "cuda", *ENOUGH), 78, "--device", "expected cpu")
    with pytest.raises(Usage):
        choice.choose("native", "tpu")


# Threads and locked memory


def test_threads_are_counted(cli: Cli, gemma3n: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for count in (0, -1, 257):
        refused(cli("run", gemma3n, PROMPT, "-t", count, *ENOUGH), 2, "--threads", "1 to 256")
    more, fewer = ({"budget": 64 << 30, "engine": "native", "threads": count} for count in (9, 1))
    source = Checkpoint.open(gemma3n)
    most, least = (enumerate_plans(source, Request(**keys), Floor(1))[0] for keys in (more, fewer))
    assert most.bytes["activations"] - least.bytes["activations"] == 8 * library.SCRATCH
    source.close()
    threads.tell(5)
    assert threads.thread_count() == 5
    threads.tell(None)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert threads.thread_count() == 3


@pytest.mark.parametrize("engine", ["torch", "native"])
def test_threads_are_the_engines(load: Load, engine: str) -> None:
    import torch

    before = torch.get_num_threads()
    try:
        session = load(engine=engine, threads=2, precision="float32")
        assert engine == "native" or torch.get_num_threads() == 2
        assert session.runtime.threads == 2
    finally:
        torch.set_num_threads(before)


def locked_kib() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmLck:"))


def test_lock_keeps_weights_in_memory(load: Load) -> None:
    before = locked_kib()
    session = load(precision="int8", lock=True)
    held = sum(nbytes for _, nbytes in session.engine.weights.ranges())
    assert locked_kib() - before >= held // 1024
    session.close()
    assert locked_kib() <= before


def test_lock_where_the_system_allows_no_more(cli: Cli, gemma3n: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(address: int, nbytes: int) -> int:
        native_lock.ctypes.set_errno(errno.ENOMEM)
        return -1

    monkeypatch.setattr(native_lock, "mlock", fails)
    monkeypatch.setattr(native_lock, "limit_bytes", lambda: 65536)
    refused(cli("run", gemma3n, PROMPT, "--lock", *ENOUGH), 77, "--lock", "65.5 kB", "ulimit -l")
    monkeypatch.setattr(native_lock, "limit_bytes", lambda: None)
    with pytest.raises(NotPermitted, match="Leave --lock away"):
        native_lock.lock([(0, 1)])


def test_lock_is_of_the_native_engine(cli: Cli, gemma3n: Path) -> None:
    refused(cli("run", gemma3n, PROMPT, "--lock", "--engine", "torch", *ENOUGH), 78, "--lock", "native")
