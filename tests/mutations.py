"""One factory for bad inputs: a tiny sound checkpoint, one change per case, and what the command line has to say to it.

A table is a list of ``Case``; ``play`` runs one. The tables are in ``mutations_*.py``, under the numbers by which this
project's list of faults knows them. A case of its own kind (another base, a fault inside the process) is a ``Case``
with another ``base`` or ``inside``; a table in another file needs ``CASES`` and a test that plays them, no more.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tests import small
from tests.forkserver import LIMIT, Report, server

MIB = 1 << 20
# A token of a megabyte takes 72 MiB where text is split at it.
ROOM = 80 * MIB
SMALL = 8 * MIB  # files up to this are hashed whole, larger ones (sparse) at both ends
CONFIG, GENERATION, TOKENIZER = "config.json", "generation_config.json", "tokenizer.json"
SHARD, INDEX = "model.safetensors", "model.safetensors.index.json"

Change = Callable[[Path], object]
Command = tuple[str, ...]

DIR = "DIR"  # stands for the folder in a command
BUDGET = ("--budget", "2GB")
INSPECT: Command = ("inspect", DIR)
PLAN: Command = ("plan", DIR, *BUDGET)
RUN: Command = ("run", DIR, "hi", "-n", "2", *BUDGET)
SHOW: Command = ("inspect", DIR, "--json")
SAY: Command = ("run", DIR, "hi", "-n", "2", "-c", "32", "--temp", "0", "--json", *BUDGET)
EVERY = (INSPECT, PLAN, RUN)
OPENS = (INSPECT, RUN)

PLAIN_TOKEN = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
S, F = "sliding_attention", "full_attention"
BASES: dict[str, dict[str, Any]] = {
    "gemma3n": {
        **small.GEMMA3N,
        **{"hidden_size": 32, "num_hidden_layers": 5, "num_attention_heads": 2, "num_key_value_heads": 1},
        **{"intermediate_size": [64] * 5, "layer_types": [S, S, F, S, F], "num_kv_shared_layers": 2},
        "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0, 0.0],
    },
    "llama": {
        **small.LLAMA,
        **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1},
        "intermediate_size": 64,
    },
}


@dataclass(frozen=True)
class Case:
    """One bad input. Every command is to end with ``code``, all of them with the same line on stderr.

    ``words`` stand in that line: the file's name and the field first. With code 0 nothing is on stderr and the words
    are in the output. ``closed`` are paths, absolute or beside the model, that nobody may open. ``inside`` is called in
    the process of the command before it begins, in the folder that holds ``model``. ``warm`` cases reach the engine.
    """

    id: str
    change: Change
    code: int
    words: tuple[str, ...]
    commands: tuple[Command, ...] = OPENS
    base: str = "gemma3n"
    folder: str = "model"
    warm: bool = False
    closed: tuple[str, ...] = ()
    inside: Callable[[], object] | None = None
    changes_the_model: bool = False

    @property
    def prepares(self) -> bool:
        """Whether a run gets as far as preparing what later runs reuse: in the cache and nowhere else."""
        return self.warm

    @property
    def kind(self) -> str:
        """The server it needs."""
        return "warm" if self.warm else "cold"


@cache
def _home() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="edge-faults-")


@cache
def sound(base: str) -> Path:
    """The checkpoint that every case of a base starts from, under 200 kB; read-only."""
    return small.write(Path(_home().name, base), BASES[base], "BF16", small.TEMPLATE if base == "gemma3n" else None)


@cache
def floor(kind: str) -> int:
    """Peak bytes of a command that finds nothing wrong."""
    args = [str(sound("gemma3n")) if arg == DIR else arg for arg in (SAY if kind == "warm" else INSPECT)]
    report = server(kind).run(args, Path(_home().name), {})
    assert report.code == 0, report.err
    return report.peak


def play(case: Case, table: str, root: Path) -> None:
    """Makes the bad input in the empty folder ``root``, runs its commands there, and checks all that is promised."""
    model, env = root / case.folder, {}
    for name, variable in (("cache", "EDGE_CACHE"), ("home", "HOME"), ("tmp", "TMPDIR")):
        (root / name).mkdir()
        env[variable] = str(root / name)
    shutil.copytree(sound(case.base), model)
    case.change(model)
    before = listing(root)
    said = set()
    for command in case.commands:
        args = [str(model) if arg == DIR else arg for arg in command]
        report = server(case.kind).run(args, root, env, f"{table}:{case.id}" if case.inside else None)
        judge(case, report)
        own = [*[root / "cache"] * case.prepares, *[model] * case.changes_the_model]
        was, now = (without(facts, own) for facts in (before, listing(root)))
        assert [*now] == [*was], "something was left behind, or removed"
        assert not [*root.rglob("*.tmp")], "something unfinished was left behind"
        assert now == was, "a file was changed"
        assert not [path for path in report.written if not below(root / path, own)], "opened for writing"
        opened = {os.path.normpath(root / path) for path in report.opened}
        assert opened.isdisjoint(os.path.normpath(root / name) for name in case.closed), "opened in spite of everything"
        said.add(report.err)
    assert len(said) == 1, "commands disagree"


def judge(case: Case, report: Report) -> None:
    """The promises about one command: exit code, one line, no trace, time and memory."""
    assert report.code is not None, f"killed after {LIMIT} s"
    assert report.code == case.code, f"exit code {report.code}: {report.err or report.out}"
    assert report.wall < LIMIT
    # Nothing is asserted of a command's libraries, only of what a file makes it take.
    assert report.peak < floor(case.kind) + ROOM, f"{report.peak - floor(case.kind)} bytes above the floor"
    assert "\x1b" not in report.out + report.err
    if case.code == 0:
        assert report.err == "", report.err
        text = report.out
    else:
        assert report.out == "", report.out
        assert report.err.startswith("edge: error: "), report.err
        assert report.err.endswith("\n")
        assert report.err.count("\n") == 1, report.err
        assert len(report.err) < 3000
        assert "Traceback" not in report.err
        assert "a bug in edge" not in report.err
        text = report.err
    missing = [word for word in case.words if word not in text]
    assert not missing, f"without {missing}: {text}"


def listing(root: Path) -> dict[str, tuple[object, ...]]:
    """Everything below a folder: kind, mode, size, time of change and content of each name, in order."""
    found: dict[str, tuple[object, ...]] = {}
    todo = [root]
    while todo:
        folder = todo.pop()
        for entry in sorted(os.scandir(folder), key=lambda e: e.name):
            facts = entry.stat(follow_symlinks=False)
            content = os.readlink(entry) if entry.is_symlink() else digest(entry.path, facts)
            found[entry.path] = (facts.st_mode, facts.st_size, facts.st_mtime_ns, content)
            if entry.is_dir(follow_symlinks=False):
                todo.append(Path(entry.path))
    return found


def below(path: Path, folders: list[Path]) -> bool:
    """Whether a path is one of the folders, or in one."""
    return any(folder in (path, *path.parents) for folder in folders)


def without(facts: dict[str, tuple[object, ...]], folders: list[Path]) -> dict[str, tuple[object, ...]]:
    """A listing without some folders."""
    return {path: fact for path, fact in facts.items() if not below(Path(path), folders)}


def digest(path: str, facts: os.stat_result) -> str:
    """SHA-256 of a regular file, of its ends where it is huge; empty for what cannot be read."""
    if not stat.S_ISREG(facts.st_mode) or not os.access(path, os.R_OK):
        return ""
    with open(path, "rb") as file:
        if facts.st_size <= SMALL:
            return hashlib.sha256(file.read()).hexdigest()
        head = file.read(MIB)
        file.seek(-MIB, os.SEEK_END)
        return hashlib.sha256(head + file.read()).hexdigest()


# What a case may do inside the process of the command


def without_privileges() -> None:
    """Root may read everything; without its capabilities it may not."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    assert ctypes.CDLL(None).capset(header, (ctypes.c_uint32 * 6)()) == 0


# Changes: each is a function of the folder.


def nothing(folder: Path) -> None:
    """For cases whose fault is elsewhere."""


def every(*changes: Change) -> Change:
    """Several changes, in order."""

    def change(folder: Path) -> None:
        for one in changes:
            one(folder)

    return change


def written(name: str, data: str | bytes | Callable[[], bytes]) -> Change:
    """A file with this content; a function makes what is large when it is needed."""

    def change(folder: Path) -> None:
        content = data() if callable(data) else data
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def removed(*names: str) -> Change:
    """Files that are not there."""
    return lambda folder: [(folder / name).unlink(missing_ok=True) for name in names]


def instead(name: str, make: Callable[[Path], object]) -> Change:
    """Something else under a file's name."""
    return every(removed(name), lambda folder: make(folder / name))


def linked(name: str, target: str) -> Change:
    """A symbolic link under a file's name."""
    return instead(name, lambda path: os.symlink(target, path))


def closed_to_all(name: str) -> Change:
    """A file of mode 0000."""
    return lambda folder: (folder / name).chmod(0)


def sparse(name: str, size: int, head: bytes = b"", tail: bytes = b"") -> Change:
    """A file of ``size`` bytes that takes no disk: zeros between its ends."""

    def make(path: Path) -> None:
        with open(path, "wb") as file:
            file.write(head)
            file.truncate(size)
            file.seek(size - len(tail))
            file.write(tail)

    return instead(name, make)


def cut(name: str, keep: Callable[[int], int]) -> Change:
    """A file that ends early: ``keep`` gives its new size from the old one."""
    return lambda folder: os.truncate(folder / name, keep((folder / name).stat().st_size))


def bytes_of(name: str, change: Callable[[bytes], bytes]) -> Change:
    """A file rewritten by a function of its bytes."""
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def edited(name: str, change: Callable[[dict[str, Any]], object]) -> Change:
    """A JSON file whose object ``change`` works on; a missing file is an empty object."""

    def edit(folder: Path) -> None:
        path = folder / name
        data = json.loads(path.read_text()) if path.exists() else {}
        change(data)
        path.write_text(json.dumps(data))

    return edit


def keys(name: str, **values: Any) -> Change:
    """A JSON file with other values of some keys."""
    return edited(name, lambda data: data.update(values))


def config(**values: Any) -> Change:
    """config.json with other values of some keys."""
    return keys(CONFIG, **values)


def spelt(name: str, key: str, text: str) -> Change:
    """A JSON file in which a key's value is spelt as ``json.dumps`` would not spell it."""
    return every(keys(name, **{key: "HERE"}), bytes_of(name, lambda data: data.replace(b'"HERE"', text.encode())))


# Changes of a safetensors file


def unpacked(data: bytes) -> tuple[dict[str, Any], bytes]:
    """(header, data) of a safetensors file."""
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def packed(head: object, data: bytes) -> bytes:
    """A safetensors file with this header: an object, or the bytes themselves."""
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    return len(text).to_bytes(8, "little") + text + data


def header(change: Callable[[dict[str, Any]], object], name: str = SHARD) -> Change:
    """A shard whose header ``change`` works on; the data stays."""

    def edit(data: bytes) -> bytes:
        head, rest = unpacked(data)
        change(head)
        return packed(head, rest)

    return bytes_of(name, edit)


def header_text(change: Callable[[bytes], bytes]) -> Change:
    """A shard whose header's text is rewritten, and its length with it."""

    def edit(data: bytes) -> bytes:
        size = int.from_bytes(data[:8], "little")
        return packed(change(data[8 : 8 + size]), data[8 + size :])

    return bytes_of(SHARD, edit)


def entry(tensor: str, **fields: Any) -> Change:
    """A shard in which one tensor's header entry has other fields."""
    return header(lambda head: head[tensor].update(fields))


def added(tensor: str, dtype: str, shape: list[int], data: bytes, name: str = SHARD) -> Change:
    """A shard with one more tensor at its end."""

    def edit(content: bytes) -> bytes:
        head, rest = unpacked(content)
        head[tensor] = {"dtype": dtype, "shape": shape, "data_offsets": [len(rest), len(rest) + len(data)]}
        return packed(head, rest + data)

    return bytes_of(name, edit)


def sharded(parts: int | None = 2) -> Change:
    """The weights in ``parts`` shards and an index, or one shard for each tensor."""

    def change(folder: Path) -> None:
        head, data = unpacked((folder / SHARD).read_bytes())
        (folder / SHARD).unlink()
        head.pop("__metadata__", None)
        names, count = list(head), parts or len(head)
        weight_map = {}
        for part in range(count):
            shard, mine, rest = f"model-{part + 1:05}-of-{count:05}.safetensors", {}, b""
            for name in names[part::count]:
                begin, end = head[name]["data_offsets"]
                mine[name] = {**head[name], "data_offsets": [len(rest), len(rest) + end - begin]}
                rest, weight_map[name] = rest + data[begin:end], shard
            (folder / shard).write_bytes(packed(mine, rest))
        metadata = {"total_size": len(data)}
        (folder / INDEX).write_text(json.dumps({"metadata": metadata, "weight_map": weight_map}))

    return change
