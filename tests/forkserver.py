"""Runs commands of edge in forked children of a process that has imported it already, and watches them.

A start costs milliseconds instead of seconds, so that hundreds of commands fit into a fast suite. The child is what a
new process would be: its own peak memory, descriptors, directory and environment; nothing of it comes back but a
report. ``python -m tests.forkserver cold|warm`` speaks JSON, one object per line; ``warm`` has an engine too.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 5.0
MOST_OUTPUT = 1 << 20
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")

# What costs most of a second and comes out the same for every file: done once, before the first fork.
REMEMBERED = (("edge.engine.native_start", "warm_up"), ("loaders.text.compact_unicode", "proved"))


@dataclass(frozen=True)
class Report:
    """How a command ended. ``code`` is None for one that was killed after ``LIMIT`` seconds, negative for a signal.

    ``peak`` is VmHWM of the child alone in bytes, ``wall`` seconds; ``opened`` and ``written`` are the paths it opened
    for reading and for writing, as Python saw them.
    """

    code: int | None
    out: str
    err: str
    peak: int
    wall: float
    opened: tuple[str, ...]
    written: tuple[str, ...]


class Server:
    """The parent of all children, in a process of its own: this one has threads, and forking those is no good."""

    def __init__(self, kind: str) -> None:
        # Bytecode would be a file that was written; naming the frames of a panic takes half a second.
        quiet = {"PYTHONDONTWRITEBYTECODE": "1", "TOKENIZERS_PARALLELISM": "false", "RUST_BACKTRACE": "0"}
        env = {**os.environ, **ONE_THREAD, **quiet}
        command = [sys.executable, "-m", "tests.forkserver", kind]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
        )

    def run(
        self, args: list[str], cwd: Path, env: dict[str, str], inside: str | None = None, limit: float = LIMIT
    ) -> Report:
        """``edge ARGS`` in ``cwd``. ``inside``: 'MODULE:ID' of a case whose ``inside`` the child calls first."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        request = {"args": args, "cwd": str(cwd), "env": env, "inside": inside, "limit": limit}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline() or '{"failed": "the server is gone"}')
        assert "failed" not in answer, answer["failed"]
        return Report(**{**answer, "opened": tuple(answer["opened"]), "written": tuple(answer["written"])})

    def close(self) -> None:
        """Ends the server; it ends by itself when this process does."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(10)


@cache
def server(kind: str) -> Server:
    """The one server of a kind that all tests of this process share."""
    found = Server(kind)
    atexit.register(found.close)
    return found


# The server's side


def bring_up(kind: str) -> None:
    """Everything a command imports, by running some; for 'warm' with an answer, so that the engine is there too."""
    from edge.cli.app import run_app
    from tests.mutations import DIR, EVERY, GENERATION, INSPECT, SAY, keys, sound

    folder = sound("gemma3n")
    stops = (folder / GENERATION).read_text()
    rehearsals: list[tuple[dict[str, int], tuple[str, ...]]] = [
        ({}, INSPECT),
        *(({"eos_token_id": -1}, c) for c in EVERY),
    ]
    if kind == "warm":
        for name, function in REMEMBERED:
            module = import_module(name)
            setattr(module, function, cache(getattr(module, function)))
        rehearsals.append(({}, SAY))
    with TemporaryDirectory() as own:
        os.environ["EDGE_CACHE"] = own
        for change, command in rehearsals:
            keys(GENERATION, **change)(folder)
            with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
                run_app([str(folder) if arg == DIR else arg for arg in command])
            (folder / GENERATION).write_text(stops)
    gc.collect()
    gc.freeze()


def serve(kind: str) -> None:
    """One request, one child, one answer, until standard input ends."""
    bring_up(kind)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in iter(sys.stdin.readline, ""):
        threads = len(os.listdir("/proc/self/task"))
        answer = watched(json.loads(line)) if threads == 1 else {"failed": f"{threads} threads before the fork"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def watched(request: dict[str, Any]) -> dict[str, Any]:
    """Forks, waits no longer than the limit, and collects what the child said and did."""
    out, err = os.memfd_create("out"), os.memfd_create("err")
    told, tell = os.pipe()
    begun = time.monotonic()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(told)
            child(request, out, err, tell)
        except BaseException:  # noqa: BLE001 - a bug of the tests; the report shows it
            traceback.print_exc()
        finally:
            os._exit(99)
    os.close(tell)
    story, alive = b"", True
    while alive:
        left = begun + request["limit"] - time.monotonic()
        if left <= 0 or not select.select([told], [], [], left)[0]:
            os.kill(pid, signal.SIGKILL)
            break
        part = os.read(told, 1 << 16)
        story, alive = story + part, bool(part)
    status = os.waitpid(pid, 0)[1]
    os.close(told)
    wall = time.monotonic() - begun
    facts = json.loads(story) if story and not alive else {"peak": 0, "opened": [], "written": []}
    texts = [text_of(fd) for fd in (out, err)]
    code = None if alive else os.waitstatus_to_exitcode(status)
    return {**facts, "code": code, "out": texts[0], "err": texts[1], "wall": wall}


def text_of(fd: int) -> str:
    """What was written to a descriptor, at most ``MOST_OUTPUT`` bytes of it; closes it."""
    data = os.pread(fd, MOST_OUTPUT, 0)
    os.close(fd)
    return data.decode("utf-8", "backslashreplace")


def child(request: dict[str, Any], out: int, err: int, tell: int) -> None:
    """The command, as its own process; tells what it did and ends with the command's exit code."""
    from edge.budget.memory import read_process, reset_peak
    from edge.cli.app import run_app

    nothing = os.open(os.devnull, os.O_RDONLY)
    for fd, place in ((nothing, 0), (out, 1), (err, 2)):
        os.dup2(fd, place)
        os.close(fd)
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    opened: list[str] = []
    written: list[str] = []
    assert reset_peak()
    if request["inside"]:
        module, _, name = request["inside"].partition(":")
        next(case for case in import_module(module).CASES if case.id == name).inside()
    sys.addaudithook(lambda event, args: noted(event, args, opened, written))
    code = run_app(request["args"])
    sys.stdout.flush()
    sys.stderr.flush()
    facts = {"peak": read_process().peak_rss, "opened": opened[:2000], "written": written[:2000]}
    with os.fdopen(tell, "w", encoding="utf-8") as pipe:
        json.dump(facts, pipe)
    os._exit(code)


def noted(event: str, args: tuple[Any, ...], opened: list[str], written: list[str]) -> None:
    """An audit hook: every path that is opened."""
    if event != "open" or not isinstance(args[0], str | bytes | os.PathLike) or args[0] == os.devnull:
        return
    flags = args[2] if isinstance(args[2], int) else 0
    writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) or any(c in (args[1] or "") for c in "wax+")
    (written if writes else opened).append(os.fsdecode(args[0]))


if __name__ == "__main__":
    serve(sys.argv[1])
