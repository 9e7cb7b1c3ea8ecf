"""Random checkpoints: the shapes of any config, the same values for the same seed, whole or not at all, streamed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, Gemma3nForCausalLM

import edge
from edge.cli.app import run_app
from loaders.checkpoint import Checkpoint
from loaders.errors import CannotCreate, EdgeError, NotPermitted, ReadFailed, Usage
from loaders.formats import atomic, synthetic
from loaders.formats.atomic import fresh_folder
from loaders.formats.buffers import to_float32
from loaders.formats.sharded import by_count, by_size
from loaders.formats.synthetic import write_random
from loaders.network.tensors import PLE_TABLE, tensors, total
from tests.command import interrupted_synth
from tests.makers import assert_close, prompt
from tests.shrink import CONFIGS, NAMES, real, shrink
from tests.small import LLAMA

ROOT = Path(__file__).resolve().parent.parent
DTYPES = {"BF16": 2, "F16": 2, "F32": 4}
KNOWN = [-0.559007, -1.192156, 0.071297, 0.86056]
GEMMA, PLAIN = "gemma-3n-E2B", "qwen3-0.6B"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """name -> the config.json of a shrunk real model."""
    folder = tmp_path_factory.mktemp("configs")

    def path(name: str) -> Path:
        file = folder / f"{name}.json"
        if not file.exists():
            file.write_text(json.dumps(shrink(real(name))))
        return file

    return path


Config = Callable[[str], Path]


def digest(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def values(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor as float32, by canonical name."""
    checkpoint = Checkpoint.open(folder)
    found = {}
    for name, tensor in checkpoint.where.items():
        found[name] = to_float32(checkpoint.read_raw(name), tensor.dtype).copy()
    checkpoint.close()
    return found


# what is written


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_config_opens_as_a_checkpoint(config: Config, tmp_path: Path, name: str, dtype: str) -> None:
    written = write_random(config(name), tmp_path / "made", dtype=dtype)
    checkpoint = Checkpoint.open(tmp_path / "made")
    assert (checkpoint.ignored, checkpoint.skipped_bytes, checkpoint.shards.notes) == ((), 0, ())
    assert {name: t.shape for name, t in checkpoint.where.items()} == tensors(checkpoint.model)
    assert {t.dtype for t in checkpoint.where.values()} == {dtype}
    assert written == total(checkpoint.model) * DTYPES[dtype] == checkpoint.shards.total_bytes
    assert checkpoint.raw_config == json.loads(config(name).read_text())
    assert sorted(os.listdir(tmp_path / "made")) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_are_those_of_a_trained_model_roughly(config: Config, tmp_path: Path, dtype: str) -> None:
    write_random(config(GEMMA), tmp_path / "made", dtype=dtype)
    checkpoint = Checkpoint.open(tmp_path / "made")
    assert checkpoint.model.ple is not None
    for name, x in values(tmp_path / "made").items():
        assert np.isfinite(x).all(), name
        assert np.unique(x).size > min(x.size // 4, 100), name
        if x.ndim == 1:
            assert 0.4 < x.min() < x.max() < 1.6, name
        elif x.size > 4000:
            width = checkpoint.model.ple.dim if name == PLE_TABLE else x.shape[1]
            z = x.astype(np.float64).ravel() * width**0.5
            noise = 5 / z.size**0.5
            assert abs(z.mean()) < noise, name
            assert abs(z.std() - 1) < noise, name
            # A bell: the fourth moment of a normal is 3 (a flat one has 1.8), and a third lies beyond one deviation.
            assert abs((z**4).mean() - 3) < 10 * noise, name
            assert abs((np.abs(z) > 1).mean() - 0.3173) < noise + 0.004, name  # bfloat16 has few levels there
            assert abs(np.corrcoef(z[:-1], z[1:])[0, 1]) < noise, name


def test_no_two_tensors_and_no_two_rows_are_alike(config: Config, tmp_path: Path) -> None:
    write_random(config(GEMMA), tmp_path / "made", dtype="F32")
    found = values(tmp_path / "made")
    assert len({x.tobytes() for x in found.values()}) == len(found)
    for x in found.values():
        rows = x if x.ndim == 2 and x.shape[1] > 8 else x[None]
        assert len({row.tobytes() for row in rows}) == len(rows)


def test_the_seed_decides_every_value(config: Config, tmp_path: Path) -> None:
    for name, seed in (("a", 5), ("b", 5), ("c", 6), ("d", 5 + (1 << 32))):
        write_random(config(GEMMA), tmp_path / name, seed=seed)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    one, *others = (values(tmp_path / name) for name in "acd")
    for other in others:
        assert all(not np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("threads", "band"), [(1, 1 << 18), (3, 1 << 10), (2, 124)])
def test_threads_and_bands_change_nothing(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int, band: int
) -> None:
    write_random(config(PLAIN), tmp_path / "one")
    monkeypatch.setattr(synthetic, "THREADS", threads)
    monkeypatch.setattr(synthetic, "BAND", band)
    write_random(config(PLAIN), tmp_path / "two")
    assert digest(tmp_path / "one") == digest(tmp_path / "two")


def test_a_known_value_stays_what_it_was() -> None:
    """Numbers that were measured on such a checkpoint compare with later ones."""
    table = synthetic.levels(0.0, 1.0, "F32")
    found = synthetic.band(7, "layers.0.attn.q", 1 << 20, 4, table).view(np.float32)
    assert found.tolist() == pytest.approx(KNOWN, abs=1e-6)


@pytest.mark.parametrize("name", [GEMMA, "gemma-3n-E4B", "llama-3.1-8B", "qwen3-8B"])
def test_transformers_says_the_same(config: Config, tmp_path: Path, name: str) -> None:
    write_random(config(name), tmp_path / "made", dtype="F32", shards=3)
    kind = Gemma3nForCausalLM if name.startswith("gemma") else AutoModelForCausalLM
    loaded, info = kind.from_pretrained(
        tmp_path / "made", dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    assert not info["missing_keys"] - {"lm_head.weight"}
    assert not info["unexpected_keys"]
    with edge.load(tmp_path / "made", precision="float32", context=64, slice="full") as session:
        ids = prompt(session.model.vocab, 24)
        with torch.inference_mode():
            wanted = loaded.eval()(torch.from_numpy(ids)[None], use_cache=False).logits[0].float().numpy()
        assert_close(session.logits(ids), wanted)


# shards


def test_shards_hold_the_same_values(config: Config, tmp_path: Path) -> None:
    write_random(config(GEMMA), tmp_path / "one")
    size = write_random(config(GEMMA), tmp_path / "sized", shard_bytes=100_000)
    write_random(config(GEMMA), tmp_path / "four", shards=4)
    whole = values(tmp_path / "one")
    for name in ("sized", "four"):
        parts = values(tmp_path / name)
        assert all(np.array_equal(whole[key], parts[key]) for key in whole)
        index = json.loads((tmp_path / name / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == size
        assert len(index["weight_map"]) == len(whole)
    assert sorted(os.listdir(tmp_path / "four"))[1:-1] == [f"model-{i}-of-00004.safetensors" for i in IDS]


IDS = ("00001", "00002", "00003", "00004")
SIZES = st.dictionaries(st.text(max_size=5), st.integers(1, 1000), min_size=1, max_size=30)


@given(SIZES, st.integers(1, 2000))
def test_groups_of_a_size(sizes: dict[str, int], limit: int) -> None:
    groups = by_size(sizes, limit)
    assert [name for group in groups for name in group] == list(sizes)
    for group in groups:
        assert len(group) == 1 or 0 < sum(sizes[name] for name in group) <= limit
    for group, following in pairwise(groups):
        assert sum(sizes[name] for name in group) + sizes[following[0]] > limit


@given(SIZES, st.data())
def test_groups_of_a_number(sizes: dict[str, int], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(sizes)))
    groups = by_count(sizes, count)
    assert [name for group in groups for name in group] == list(sizes)
    assert len(groups) == count
    assert all(groups)


@pytest.mark.parametrize("count", [0, -1, 4])
def test_more_shards_than_tensors_are_refused(count: int) -> None:
    with pytest.raises(Usage):
        by_count({"a": 1, "b": 2, "c": 3}, count)


# memory


def test_a_tensor_larger_than_its_memory_streams(tmp_path: Path) -> None:
    """The peak is read inside the process: a parent's figure would be its own."""
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "vocab_size": 400_000, "hidden_size": 512}))
    program = """
import sys
from edge.cli.app import run_app
code = run_app(sys.argv[1:])
print(code, "torch" in sys.modules, open("/proc/self/status").read().partition("VmHWM:")[2].split()[0])
"""
    command = [sys.executable, "-c", program, "synth", "--config", str(tmp_path), "-o", str(tmp_path / "made")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    code, torch_there, peak = done.stdout.split()
    assert (code, torch_there) == ("0", "False"), done.stderr
    embed = Checkpoint.open(tmp_path / "made").where["embed"]
    assert embed.nbytes > 400_000_000
    assert int(peak) * 1024 < 150_000_000
    shutil.rmtree(tmp_path / "made")


# the command


def run(*args: object) -> int:
    return run_app(["synth", *(str(arg) for arg in args)])


def one_line(err: str) -> str:
    assert err.startswith("edge: error: ")
    assert err.count("\n") == 1
    return err


def test_the_command_says_what_it_made(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    shutil.copy(config(GEMMA), tmp_path / "in" / "config.json")
    assert run("--config", tmp_path / "in", "-o", tmp_path / "made", "--seed", 3, "--dtype", "f32", "--shards", 2) == 0
    out, err = capsys.readouterr()
    size = sum(t.nbytes for t in Checkpoint.open(tmp_path / "made").where.values())
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith(f"{tmp_path / 'made'}: Gemma 3n text, ")
    assert f"{size / 4e6:.1f}M random parameters, {size / 1e6:.2f} MB f32, " in err
    assert err.endswith(" s\n")
    assert len(os.listdir(tmp_path / "made")) == 4
    flags = ("--seed", 3, "--dtype", "f32", "-q", "--shard-size", "300kB")
    assert run("--config", config(GEMMA), "-o", tmp_path / "again", *flags) == 0
    assert capsys.readouterr() == ("", "")
    assert len(os.listdir(tmp_path / "again")) > 4
    one, two = values(tmp_path / "made"), values(tmp_path / "again")
    assert all(np.array_equal(one[name], two[name]) for name in one)


def test_what_edge_synth_refuses(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = json.loads(config(PLAIN).read_text())
    cases: dict[str, tuple[object, int]] = {
        "broken": ("{", 65),
        "short": ({k: v for k, v in raw.items() if k != "hidden_size"}, 65),
        "wrong": ({**raw, "hidden_size": -4}, 65),
        "unread": ({**raw, "surprise": 1}, 78),
        "other": ({**raw, "model_type": "mamba"}, 78),
    }
    for name, (data, code) in cases.items():
        path = tmp_path / f"{name}.json"
        path.write_text(data if isinstance(data, str) else json.dumps(data))
        assert run("--config", path, "-o", tmp_path / "made") == code, name
        assert str(path) in one_line(capsys.readouterr().err)
    (tmp_path / "empty").mkdir()
    good = config(PLAIN)
    for code, args in (
        (66, ("--config", tmp_path / "gone.json", "-o", tmp_path / "made")),
        (66, ("--config", tmp_path / "empty", "-o", tmp_path / "made")),
        (73, ("--config", good, "-o", tmp_path / "empty")),
        (73, ("--config", good, "-o", tmp_path / "no" / "where")),
        (73, ("--config", good, "-o", tmp_path / "broken.json" / "x")),
        (2, ("--config", good, "-o", tmp_path / "made", "--shards", 2, "--shard-size", "1GB")),
        (2, ("--config", good, "-o", tmp_path / "made", "--shards", 0)),
        (2, ("--config", good, "-o", tmp_path / "made", "--shards", 10_000)),
        (2, ("--config", good, "-o", tmp_path / "made", "--shard-size", "much")),
        (2, ("--config", good, "-o", tmp_path / "made", "--seed", -1)),
        (2, ("--config", good, "-o", tmp_path / "made", "--dtype", "f64")),
        (2, ("--config", good)),
    ):
        assert run(*args) == code, args
        one_line(capsys.readouterr().err)
    assert sorted(os.listdir(tmp_path)) == sorted([*(f"{name}.json" for name in cases), "empty"])
    assert os.listdir(tmp_path / "empty") == []


@pytest.mark.parametrize("wrong", [{"seed": -1}, {"dtype": "F64"}, {"shard_bytes": 0}, {"shard_bytes": 9, "shards": 2}])
def test_what_the_function_refuses(config: Config, tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(Usage):
        write_random(config(PLAIN), tmp_path / "made", **wrong)
    assert os.listdir(tmp_path) == []


def test_a_disk_too_small_is_noticed_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The true shapes of a model of a thousand layers: more than any disk here."""
    raw = {**real("llama-3.1-8B"), "num_hidden_layers": 1000, "intermediate_size": 1 << 20}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert run("--config", tmp_path, "-o", tmp_path / "made") == 74
    line = one_line(capsys.readouterr().err)
    assert "disk full: needs " in line
    assert f"has {shutil.disk_usage(tmp_path).free // 10**9}"[:6] in line
    assert os.listdir(tmp_path) == ["config.json"]


# interrupted


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), MemoryError()]
)
def test_an_error_leaves_nothing_behind(config: Config, tmp_path: Path, error: BaseException) -> None:
    steps: list[int] = []

    def fails(what: str, done: int, needed: int) -> None:
        steps.append(done)
        if len(steps) == 5:
            assert os.listdir(tmp_path) != []
            raise error

    with pytest.raises(ReadFailed if isinstance(error, OSError) else type(error)):
        write_random(config(PLAIN), tmp_path / "made", notify=fails, shards=2)
    assert os.listdir(tmp_path) == []


def test_an_error_in_a_thread_is_an_error(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(synthetic, "band", fails)
    with pytest.raises(MemoryError):
        write_random(config(PLAIN), tmp_path / "made")
    assert os.listdir(tmp_path) == []


def test_ctrl_c_leaves_nothing_behind(tmp_path: Path) -> None:
    interrupted_synth(tmp_path, ".made.*/.model*", "--config", CONFIGS / "gemma-3n-E2B.json")


# the folder


def test_a_fresh_folder_appears_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    real_sync = atomic.sync
    monkeypatch.setattr(atomic, "sync", lambda path: (synced.append(path.name), real_sync(path)))
    monkeypatch.chdir(tmp_path)
    with fresh_folder("new") as folder:
        assert folder.parent == tmp_path
        assert os.listdir(tmp_path) == [folder.name]
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_text("x")
        (folder / "file").write_text("y")
    assert os.listdir(tmp_path) == ["new"]
    assert (tmp_path / "new" / "deep" / "file").read_text() == "x"
    assert sorted(synced) == sorted(["file", "deep", "file", folder.name, tmp_path.name])
    assert synced[-2:] == [folder.name, tmp_path.name]
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o777 & ~atomic.umask()


@pytest.mark.parametrize("name", ["x" * 255, "ü" * 127, ".hidden", "two words"])
def test_a_fresh_folder_may_have_any_name(tmp_path: Path, name: str) -> None:
    with fresh_folder(tmp_path / name):
        pass
    assert os.listdir(tmp_path) == [name]


def test_a_name_taken_meanwhile_is_kept(tmp_path: Path) -> None:
    for make in (Path.touch, lambda path: (path.mkdir(), (path / "theirs").touch())):
        taken = tmp_path / "new"
        with pytest.raises(CannotCreate), fresh_folder(taken):
            make(taken)
        assert os.listdir(tmp_path) == ["new"]
        taken.unlink() if taken.is_file() else (taken / "theirs").unlink()


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM])
def test_a_parent_that_may_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuses(**_: object) -> str:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(atomic.tempfile, "mkdtemp", refuses)
    with pytest.raises(NotPermitted), fresh_folder(tmp_path / "new"):
        raise AssertionError


@pytest.mark.parametrize("error", [Usage("no"), KeyboardInterrupt(), ValueError()])
def test_an_error_in_the_block_comes_out_as_it_is(tmp_path: Path, error: BaseException) -> None:
    def fill() -> None:
        with fresh_folder(tmp_path / "new") as folder:
            (folder / "half").touch()
            raise error

    with pytest.raises(type(error)) as caught:
        fill()
    assert caught.value is error
    assert os.listdir(tmp_path) == []
    assert not isinstance(error, EdgeError) or error.exit_code == 2
