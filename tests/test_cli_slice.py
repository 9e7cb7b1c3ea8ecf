"""``edge inspect`` and ``edge slice``: what a model is, and a smaller one written out whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edge
from loaders.checkpoint import Checkpoint
from tests.command import PROMPT, Cli, Done, cli_fixture, refused  # noqa: F401
from tests.small import VOCAB, built, chatty_fixture, gemma3n_fixture, llama_fixture  # noqa: F401

# inspect


def test_inspect_describes_the_model(cli: Cli, gemma3n: Path, llama: Path) -> None:
    found = cli("inspect", gemma3n, "--json").json
    with Checkpoint.open(gemma3n).shards as shards:
        assert found["text_bytes"] == shards.total_bytes
    assert found["parameters"] * 4 == found["text_bytes"]
    assert found["ple_row_bytes"] == 12 * 8 * 4
    assert found["kv_bytes_per_token"] == 6 * 2 * 2 * 16 * 2
    assert found["context"] == 2048
    assert len(found["spec"]["layers"]) == 12
    assert found["slices"][0] == "full"
    text = cli("inspect", gemma3n)
    assert (text.code, text.err) == (0, "")
    for word in ("Gemma 3n", "PLE table", "AltUp", "sliding", "layer 5", "50%", "skip-first-shared", "bytes"):
        assert word in text.out
    plain = cli("inspect", llama)
    assert "Llama" in plain.out
    assert "PLE" not in plain.out
    assert cli("inspect", llama, "--json").json["ple_bytes"] == 0


# slice


def digest(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("name", ["half", "half+skip-first-shared", "skip=0-1,6", "ffn=4x3,128x9", "full"])
def test_a_written_slice_is_the_slice_that_runs(cli: Cli, chatty: Path, tmp_path: Path, name: str) -> None:
    before, out = digest(chatty), tmp_path / "sliced"
    done = cli("slice", chatty, "--slice", name, "-o", out)
    assert (done.code, done.out) == (0, "")
    assert done.err.startswith(f"{out}: {name}, ")
    assert digest(chatty) == before
    assert sorted(os.listdir(tmp_path)) == ["sliced"]
    assert sorted(os.listdir(out)) == sorted(os.listdir(chatty))
    assert out.stat().st_mode & 0o777 == 0o777 & ~umask()
    ids = np.random.default_rng(3).integers(5, VOCAB, 30)
    with edge.load(chatty, slice=name, context=64, precision="float32") as inside:
        expected, text = inside.logits(ids), [event.text for event in inside.generate(PROMPT, max_tokens=6)]
    with edge.load(out, context=64, precision="float32") as written:
        assert written.plan.slice == "full"
        assert np.array_equal(written.logits(ids), expected)
        assert [event.text for event in written.generate(PROMPT, max_tokens=6)] == text
        assert written.template is not None


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_slice_keeps_the_stored_type(cli: Cli, tmp_path: Path) -> None:
    assert cli("slice", built("gemma3n-bf16"), "--slice", "quarter", "-o", tmp_path / "new", "-q") == Done(0, "", "")
    with Checkpoint.open(tmp_path / "new").shards as shards:
        assert {tensor.dtype for tensor in shards.tensors.values()} == {"BF16"}


@pytest.mark.parametrize("kind", ["folder", "file", "broken link"])
def test_what_is_there_already_is_never_overwritten(cli: Cli, gemma3n: Path, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "taken"
    {"folder": Path.mkdir, "file": Path.touch, "broken link": lambda p: p.symlink_to("nowhere")}[kind](out)
    refused(cli("slice", gemma3n, "--slice", "half", "-o", out), 73, "already there")
    assert os.listdir(tmp_path) == ["taken"]
    assert not out.is_dir() or os.listdir(out) == []


def test_a_slice_needs_somewhere_to_go(cli: Cli, gemma3n: Path, tmp_path: Path) -> None:
    refused(cli("slice", gemma3n, "--slice", "half", "-o", tmp_path / "no" / "where"), 73, "no")
    (tmp_path / "file").touch()
    refused(cli("slice", gemma3n, "--slice", "half", "-o", tmp_path / "file" / "new"), 73)
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(("name", "code"), [("E2B", 2), ("skip=5", 2), ("ffn=999x12", 2), ("", 2), ("gone.json", 66)])
def test_a_slice_that_cannot_be_cut(cli: Cli, gemma3n: Path, tmp_path: Path, name: str, code: int) -> None:
    refused(cli("slice", gemma3n, "--slice", name, "-o", tmp_path / "new"), code)
    assert os.listdir(tmp_path) == []


def test_a_slice_from_a_file(cli: Cli, gemma3n: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.json"
    recipe.write_text(json.dumps({"layers_to_skip": [6, 7, 8], "ffn_hidden_dims": [64] * 9}))
    assert cli("slice", gemma3n, "--slice", recipe, "-o", tmp_path / "new", "-q").code == 0
    assert len(Checkpoint.open(tmp_path / "new").model.layers) == 9
    recipe.write_text(json.dumps({"layers_to_skip": [99]}))
    refused(cli("slice", gemma3n, "--slice", recipe, "-o", tmp_path / "other"), 65, "layers_to_skip")


def test_a_plain_model_cannot_be_sliced(cli: Cli, llama: Path, tmp_path: Path) -> None:
    refused(cli("slice", llama, "--slice", "full", "-o", tmp_path / "new"), 78)
    refused(cli("slice", llama, "--slice", "half", "-o", tmp_path / "new"), 2)
    assert os.listdir(tmp_path) == []


def test_a_disk_that_is_too_small_is_noticed_first(
    cli: Cli, gemma3n: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    refused(cli("slice", gemma3n, "--slice", "half", "-o", tmp_path / "new"), 74, "disk full", "1000 bytes free")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("at", [0, 1, 40])
def test_a_disk_that_fills_up_leaves_nothing_behind(
    cli: Cli, gemma3n: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    before, real, calls = digest(gemma3n), os.pwrite, []

    def full(fd: int, data: Any, offset: int) -> int:
        calls.append(offset)
        if len(calls) > at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    refused(cli("slice", gemma3n, "--slice", "half", "-o", tmp_path / "new"), 74, "No space left")
    assert os.listdir(tmp_path) == []
    assert digest(gemma3n) == before
    monkeypatch.setattr(os, "pwrite", real)
    assert cli("slice", gemma3n, "--slice", "half", "-o", tmp_path / "new").code == 0


@pytest.mark.parametrize("where", ["fsync", "rename"])
def test_a_failure_at_the_very_end_leaves_nothing_behind(
    cli: Cli, gemma3n: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, where, fail)
    refused(cli("slice", gemma3n, "--slice", "half", "-o", tmp_path / "new"), 74, "new")
    assert os.listdir(tmp_path) == []


def test_an_interrupted_slice_leaves_nothing_behind(
    cli: Cli, gemma3n: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwrite

    def press(fd: int, data: Any, offset: int) -> int:
        signal.raise_signal(signal.SIGINT)
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", press)
    done = cli("slice", gemma3n, "--slice", "half", "-o", tmp_path / "new")
    assert (done.code, done.out, done.err.strip()) == (130, "", "")
    assert os.listdir(tmp_path) == []
