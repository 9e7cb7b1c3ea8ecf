"""Faults while packing: system calls that fail, or kill the process, at the nth call; and what must hold afterwards.

``python -m tests.faulty SEED COUNT FOLDER`` packs a small checkpoint in children that are forked from a process which
has imported everything, and kills each: first at every call that changes a file, then COUNT times at a random moment.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

from edge.cli.app import run_app
from edge.store import packs
from loaders import packing
from loaders.formats import manifest as manifests
from loaders.formats.pack import Pack
from tests import small

ROOT = Path(__file__).resolve().parent.parent
TINY: dict[str, Any] = {
    **{**small.LLAMA, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"num_key_value_heads": 1, "intermediate_size": 64},
}
# Calls that change what is on disk, by the name os has for them; OPEN and CLOSE are those of small files.
OPEN, CLOSE = "open", "close"
CHANGES = ("mkdir", "pwrite", "fsync", "rename", "replace", OPEN, CLOSE)
CLEANING = ("unlink", "rmdir")


def tiny(folder: Path) -> Path:
    """A checkpoint of one layer without a tokenizer, which takes longer to pack than all its weights."""
    small.write(folder, TINY)
    (folder / "tokenizer.json").unlink()
    return folder


def tree(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, by path; folders are there as well."""
    found = {}
    for path in sorted(folder.rglob("*")):
        found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
    return found


def command(*args: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of ``edge ARGS``, in this process."""
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = run_app([str(arg) for arg in args])
    return code, out.getvalue(), err.getvalue()


@dataclass
class Faults:
    """What happens at the ``nth`` of these calls, counted from 1, or from there on. ``calls`` counts them all.

    ``act`` raises, kills, or returns for the call to go ahead.
    """

    names: tuple[str, ...]
    nth: int
    act: Callable[[], object]
    on: bool = False
    calls: int = 0
    seen: list[str] = field(default_factory=list)

    def step(self, name: str) -> None:
        """One call."""
        if name in CLEANING and not (self.on and self.calls >= self.nth):
            return  # cleaning up fails where everything does
        self.calls += 1
        self.seen.append(name)
        if self.calls == self.nth or (self.on and self.calls > self.nth):
            self.act()

    @contextmanager
    def here(self) -> Iterator[Faults]:
        """In this process, from now on. Nothing is synced: a disk is slow, and none fails here but by order."""
        calls = {name: self.wrapped(name) for name in self.names if name not in (OPEN, CLOSE)}
        calls = calls or {"fsync": os.fsync}
        with patch.multiple(os, **calls), patch.object(packing, "open", self.opened, create=True):
            yield self

    def wrapped(self, name: str) -> Callable[..., Any]:
        """One function of os."""
        real = getattr(os, name)

        def call(*args: Any, **options: Any) -> Any:
            self.step(name)
            return None if name == "fsync" else real(*args, **options)

        return call

    def opened(self, *args: Any, **options: Any) -> Any:
        """A small file that may fail to open, and to close: what is buffered is written then."""
        if OPEN in self.names:
            self.step(OPEN)
        file = open(*args, **options)  # noqa: SIM115 - the caller closes it
        close = file.close

        def closing(*exc: object) -> None:
            close()
            self.step(CLOSE)

        return Closing(file, closing) if CLOSE in self.names else file


class Closing:
    """A file whose ``with`` block ends in a call of ours."""

    def __init__(self, file: Any, end: Callable[..., None]) -> None:
        self.file, self.end = file, end

    def __enter__(self) -> Any:
        return self.file

    def __exit__(self, *exc: object) -> None:
        self.end()


def raising(number: int) -> Callable[[], None]:
    """Fails as the kernel would."""

    def act() -> None:
        raise OSError(number, os.strerror(number))

    return act


def suicide() -> None:
    """As kill -9 does it: nothing runs after this."""
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass
class Stage:
    """A folder with a source, a pack of another source in the cache, and what a clean pack of the source is."""

    root: Path

    def __post_init__(self) -> None:
        os.environ["EDGE_CACHE"] = str(self.root / "cache")
        self.source, self.other = tiny(self.root / "model"), self.root / "other"
        shutil.copytree(self.source, self.other)
        for model in (self.other, self.source):
            code, _, err = command("pack", model, "-q")
            assert code == 0, err
        self.previous, self.pack = (packs.named(str(model)) for model in (self.other, self.source))
        self.clean, self.before = tree(self.pack), tree(self.previous)
        self.sources = self.outside()
        self.forget()

    def outside(self) -> dict[str, str]:
        """Everything but the cache."""
        return {name: sha for name, sha in tree(self.root).items() if name.split(os.sep)[0] != "cache"}

    def forget(self) -> None:
        """The source is as good as never packed; what lies half-written beside it stays."""
        shutil.rmtree(self.pack, ignore_errors=True)

    def holds(self) -> None:
        """INV1, INV2, INV4: what is listed verifies, the other pack is as it was, nothing outside has changed."""
        for entry in packs.listing():
            assert entry.state == "ready", entry
            assert entry.folder in (self.pack, self.previous)
            if entry.folder == self.pack:
                with packs.pack_closed(Pack.open(entry.folder)) as pack:
                    pack.verify()
        assert tree(self.previous) == self.before
        assert self.outside() == self.sources
        # Whatever says it is a pack or a part is one whole, or has a name that nobody looks for.
        for path in packs.packs_folder().rglob(manifests.NAME):
            folder = path.parent.relative_to(packs.packs_folder())
            whole = all(name in self.clean for name in (f"{p}/{manifests.NAME}" for p in folder.parts[1:]))
            assert folder.parts[-1].startswith(".") or folder.parts[0].startswith(".") or whole

    def again(self) -> None:
        """INV3: without a fault it works, byte for byte, and what was left half-written is gone."""
        code, _, err = command("pack", self.source, "-q")
        assert code == 0, err
        assert tree(self.pack) == self.clean
        assert not leftovers()
        self.holds()


def leftovers() -> list[str]:
    """What was not finished, anywhere in the cache."""
    return [str(path) for path in packs.packs_folder().rglob(".*") if path.name.endswith(".tmp")]


# The campaign


def forked(work: Callable[[], object]) -> int:
    """The process id of a child that does it, silent, and ends."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            code = int(bool(work()))
        finally:
            os._exit(code)
    return pid


def ended(pid: int) -> int:
    """Exit code of a child, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def at_every_call(stage: Stage) -> int:
    """Kills at the nth change of the disk, for every n there is; how many that were."""
    n = 0
    while True:
        n += 1
        faults = Faults(CHANGES, n, suicide)

        def work(faults: Faults = faults) -> int:
            with faults.here():
                return command("pack", stage.source, "-q")[0]

        code = ended(forked(work))
        stage.holds()
        if code == 0:
            assert tree(stage.pack) == stage.clean
            return n - 1
        assert code == -signal.SIGKILL
        if n % 8 == 0:
            stage.again()
        stage.forget()


def at_random(stage: Stage, count: int, rng: random.Random) -> dict[str, int]:
    """Kills packing, and removing, at a random moment, until that has happened ``count`` times."""

    def usual(work: Callable[[], object]) -> float:
        started = time.monotonic()
        assert ended(forked(work)) == 0
        return time.monotonic() - started

    def pack() -> int:
        return command("pack", stage.source, "-q")[0]

    def remove() -> int:
        return command("pack", "--remove", stage.source, "-q")[0]

    stage.forget()
    took = {pack: usual(pack), remove: usual(remove)}
    found = {"killed": 0, "finished": 0, "removals": 0}
    while found["killed"] < count:
        there = stage.pack.exists() and tree(stage.pack) == stage.clean
        work = remove if there else pack
        pid = forked(work)
        time.sleep(rng.random() * took[work])
        os.kill(pid, signal.SIGKILL)
        code = ended(pid)
        assert code in (0, -signal.SIGKILL)
        found["killed" if code else "finished"] += 1
        found["removals"] += there
        stage.holds()
    stage.again()
    return found


def main(seed: int, count: int, root: Path) -> dict[str, int]:
    """Both, and what they found."""
    stage = Stage(root)
    calls = at_every_call(stage)
    return {"calls": calls, **at_random(stage, count, random.Random(seed))}


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))))
