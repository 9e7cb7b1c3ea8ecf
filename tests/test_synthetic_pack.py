"""Packs of random weights: laid out as a packed checkpoint is, the same bytes for the same seed, and fit to run."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edge
from edge.store import packs
from loaders import synthetic_pack
from loaders.checkpoint import Checkpoint
from loaders.errors import CannotCreate, MissingFile, ReadFailed, Unsupported, Usage
from loaders.formats import manifest as manifests
from loaders.formats.buffers import to_float32
from loaders.formats.pack import PARTS, PLE, WEIGHTS, Pack, contents
from loaders.formats.panels import PANEL, ZERO, panel_count, rows
from loaders.formats.quant import BITS, BLOCK, block_count, dequantize, dequantize_rows
from loaders.formats.synthetic import write_random
from loaders.network.tensors import PLE_TABLE, tensors
from loaders.packing import write_pack
from loaders.synthetic_pack import fingerprint, is_random, write_random_pack
from tests.command import Cli, cli_fixture, environment, interrupted_synth, refused  # noqa: F401
from tests.makers import distance
from tests.shrink import real, shrink
from tests.small import GEMMA3N, LLAMA

FAMILIES = ("gemma-3n-E2B", "llama-3.2-1B", "qwen3-30B-A3B", "deepseek-v3", "gpt2", "gemma-4-E2B")
# Neither rows nor columns are whole panels and blocks.
RAGGED: dict[str, Any] = {**LLAMA, "hidden_size": 200, "head_dim": 50, "intermediate_size": 331, "vocab_size": 1003}
TABLE: dict[str, Any] = {**GEMMA3N, "hidden_size_per_layer_input": 50}
KNOWN = "857f5823d9be"
Config = Callable[[str], Path]


@pytest.fixture(scope="module", name="config")
def config_fixture(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """name -> the config.json of a shrunk real model, or of one of this file."""
    folder = tmp_path_factory.mktemp("configs")

    def path(name: str) -> Path:
        file = folder / f"{name}.json"
        own = {"ragged": RAGGED, "table": TABLE}
        file.write_text(json.dumps(own[name] if name in own else shrink(real(name))))
        return file

    return path


def opened(folder: Path) -> Any:
    return closing(Pack.open(folder))


def digests(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files(folder)}


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def stored(pack: Pack) -> Iterator[tuple[str, str, np.ndarray]]:
    """Name, format and bytes of every tensor of every part."""
    for part, shards in pack.parts.items():
        for name, kind in contents(pack.model, part).items():
            tensor = shards.tensors[name]
            raw = np.empty(tensor.shape, {"U8": np.uint8, "BF16": np.uint16, "F32": np.float32}[tensor.dtype])
            shards.read_into(tensor, raw)
            yield name, pack.ple_kind or "" if part == PLE else kind, raw


def matrices(raw: np.ndarray, shape: tuple[int, ...], kind: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Codes and scales of every matrix of a stack, with all that is beyond them."""
    count = panel_count(shape[-2])
    for start in range(0, len(raw), count):
        yield rows(raw[start : start + count], kind, count * PANEL, shape[-1])


def values(pack: Pack) -> Iterator[tuple[str, str, np.ndarray]]:
    """Name, format and float32 values of every tensor."""
    shapes, model = tensors(pack.model), pack.model
    for name, kind, raw in stored(pack):
        if name == PLE_TABLE:
            assert model.ple is not None
            found = dequantize_rows(raw, len(model.layers), model.ple.dim, kind)
        elif kind in BITS:
            *_, height, cols = shapes[name]
            found = np.stack([dequantize(q, s, kind, cols)[:height] for q, s in matrices(raw, shapes[name], kind)])
        else:
            found = to_float32(raw, kind)
        yield name, kind, found


def check_beyond(pack: Pack) -> int:
    """Codes and scales beyond every matrix are zero; how many bytes that were."""
    shapes, seen = tensors(pack.model), 0
    for name, kind, raw in stored(pack):
        if kind not in BITS or name == PLE_TABLE:
            continue
        *_, height, cols = shapes[name]
        rest = cols % BLOCK
        for codes, scales in matrices(raw, shapes[name], kind):
            assert (scales[height:] == 0).all(), name
            assert (scales[:height] != 0).all(), name
            assert (codes[height:] == ZERO[kind]).all(), name
            last = codes.reshape(len(codes), block_count(cols), -1)[:, -1]
            if kind == "int8":
                beyond = last[:, rest:] if rest else last[:, :0]
            else:
                low = (last & 15)[:, rest:] if 0 < rest < BLOCK // 2 else last[:, :0]
                high = (last >> 4)[:, max(0, rest - BLOCK // 2) :] if rest else last[:, :0]
                beyond = np.concatenate((low, high), axis=1) ^ 8
            assert (beyond == 0).all(), name
            seen += codes[height:].size + beyond.size
    return seen


# what is written


@pytest.mark.parametrize("name", ["ragged", FAMILIES[0], FAMILIES[3]])
def test_it_is_laid_out_as_a_packed_checkpoint(config: Config, tmp_path: Path, name: str) -> None:
    write_random(config(name), tmp_path / "checkpoint")
    with closing(Checkpoint.open(tmp_path / "checkpoint")) as checkpoint:
        size = write_pack(checkpoint, tmp_path / "packed")
    assert write_random_pack(config(name), tmp_path / "random") == size
    assert digests(tmp_path / "random").keys() == digests(tmp_path / "packed").keys()
    with opened(tmp_path / "packed") as packed, opened(tmp_path / "random") as random:
        assert random.verify() == sum(p.stat().st_size for p in files(tmp_path / "random") if p.name != manifests.NAME)
        assert random.raw_config == packed.raw_config
        assert random.sizes() == packed.sizes()
        assert random.precisions == packed.precisions == tuple(BITS)
        assert random.ple_kind == packed.ple_kind
        for part in packed.parts:
            found, wanted = random.parts[part].tensors, packed.parts[part].tensors
            assert {n: (t.dtype, t.shape, t.offset) for n, t in found.items()} == {
                n: (t.dtype, t.shape, t.offset) for n, t in wanted.items()
            }
            assert random.manifests[part].keys() == packed.manifests[part].keys()
        beyond = check_beyond(random)
        assert beyond == check_beyond(packed)
        assert beyond > 0 or name != "ragged"


@pytest.mark.parametrize(
    ("name", "ple"), [("ragged", "int8"), ("table", "int8"), ("table", "int4"), (FAMILIES[2], "int8")]
)
def test_values_have_the_deviation_of_random_checkpoints(config: Config, tmp_path: Path, name: str, ple: str) -> None:
    write_random_pack(config(name), tmp_path / "made", ple=ple)
    kinds = set()
    with opened(tmp_path / "made") as pack:
        shapes, table = tensors(pack.model), pack.model.ple
        for tensor, kind, x in values(pack):
            assert np.isfinite(x).all(), tensor
            if x.ndim == 1:
                assert 0.4 < x.min() < x.max() < 1.6, tensor
            elif x.size > 20_000:
                width = table.dim if tensor == PLE_TABLE and table else shapes[tensor][-1]
                z = x.astype(np.float64).ravel() * width**0.5
                assert abs(z.mean()) < 5 / z.size**0.5, tensor
                assert z.std() == pytest.approx(1, rel=0.03), tensor
                # int4 codes have a mean of -1/2, whose sign is that of their scale: a block goes a little one way.
                alike = 0.25 / np.mean(np.arange(-8.0, 8.0) ** 2) if kind == "int4" else 0
                assert abs(np.corrcoef(z[:-1], z[1:])[0, 1] - alike) < 5 / z.size**0.5, tensor
                kinds.add(kind)
    assert kinds >= set(BITS)


def test_codes_and_scales_are_such_as_quantizing_gives(config: Config, tmp_path: Path) -> None:
    write_random_pack(config("ragged"), tmp_path / "made")
    with opened(tmp_path / "made") as pack:
        shapes = tensors(pack.model)
        for name, kind, raw in stored(pack):
            if kind not in BITS:
                continue
            for codes, scales in matrices(raw, shapes[name], kind):
                inside = scales[: shapes[name][-2]]
                assert np.unique(inside).size > min(100, inside.size // 2)
                if kind == "int8":
                    assert codes.view(np.int8).min() == -127
                    assert (inside > 0).all()
                else:
                    assert set(np.unique(codes & 15)) == set(range(16))
                    assert 0.4 < (inside > 0).mean() < 0.6


def test_no_two_tensors_and_no_two_rows_are_alike(config: Config, tmp_path: Path) -> None:
    write_random_pack(config(FAMILIES[0]), tmp_path / "made")
    seen: set[bytes] = set()
    with opened(tmp_path / "made") as pack:
        for name, _, raw in stored(pack):
            lines = raw if raw.ndim == 2 and raw.shape[1] > 32 else raw[None]
            found = {line.tobytes() for line in lines}
            assert len(found) == len(lines), name
            assert not seen & found, name
            seen |= found


def test_the_arguments_decide_every_byte(config: Config, tmp_path: Path) -> None:
    for name, options in {"a": {}, "b": {}, "seed": {"seed": 1 << 40}, "ple": {"ple": "int4"}}.items():
        write_random_pack(config("table"), tmp_path / name, **options)
    one = digests(tmp_path / "a")
    assert one == digests(tmp_path / "b")
    assert all(one[file] != found for file, found in digests(tmp_path / "seed").items() if file != "config.json")
    other = digests(tmp_path / "ple")
    assert {file for file in one if one[file] == other[file]} >= {f"{part}/{WEIGHTS}" for part in PARTS if part != PLE}
    assert one[f"{PLE}/{WEIGHTS}"] != other[f"{PLE}/{WEIGHTS}"]


@pytest.mark.parametrize("name", ["ragged", "table", "qwen3-30B-A3B"])
@pytest.mark.parametrize(("threads", "size"), [(1, 1 << 30), (3, 1), (2, 7168)])
def test_threads_and_bands_change_nothing(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, threads: int, size: int
) -> None:
    write_random_pack(config(name), tmp_path / "one")
    monkeypatch.setattr(synthetic_pack, "THREADS", threads)
    monkeypatch.setattr(synthetic_pack, "BAND", max(size, 32))
    write_random_pack(config(name), tmp_path / "two")
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


def test_known_bytes_stay_what_they_were(config: Config, tmp_path: Path) -> None:
    """What was measured on such a pack compares with later measurements."""
    write_random_pack(config("table"), tmp_path / "made", seed=7)
    found = hashlib.sha256("".join(digests(tmp_path / "made")[f"{part}/{WEIGHTS}"] for part in PARTS).encode())
    assert found.hexdigest()[:12] == KNOWN


def test_the_fingerprint_is_of_all_that_decides() -> None:
    raw = {"a": 1, "b": [2]}
    one = fingerprint(raw, ("int8",), "int8", 0)
    assert one == fingerprint({"b": [2], "a": 1}, ("int8",), "int8", 0)
    others = [
        fingerprint({"a": 2, "b": [2]}, ("int8",), "int8", 0),
        fingerprint(raw, ("int8", "int4"), "int8", 0),
        fingerprint(raw, ("int8",), "int4", 0),
        fingerprint(raw, ("int8",), "int8", 1),
    ]
    assert len({one, *others}) == 5


def test_it_says_that_it_is_random(config: Config, tmp_path: Path) -> None:
    write_random_pack(config("ragged"), tmp_path / "made", ("int4",), seed=3)
    with opened(tmp_path / "made") as pack:
        assert pack.manifest["source"] == {"name": "ragged", "synthetic": True, "seed": 3}
        assert is_random(pack)
        assert pack.source == ""
        assert pack.precisions == ("int4",)
    entry = packs.entry(tmp_path / "made")
    assert (entry.source, entry.state) == ("", "source missing")


def test_a_table_of_odd_width(config: Config, tmp_path: Path) -> None:
    path = tmp_path / "odd.json"
    path.write_text(json.dumps({**TABLE, "hidden_size_per_layer_input": 33, "num_hidden_layers": 12}))
    write_random_pack(path, tmp_path / "made")
    with opened(tmp_path / "made") as pack:
        table = next(x for name, _, x in values(pack) if name == PLE_TABLE)
        assert table.std() == pytest.approx(33**-0.5, rel=0.03)
        assert (table != 0).all()
    with pytest.raises(Unsupported, match="width 33"):
        write_random_pack(path, tmp_path / "other", ple="int4")


# running it


@pytest.mark.parametrize("name", FAMILIES)
def test_the_native_engine_runs_it(config: Config, tmp_path: Path, name: str) -> None:
    write_random_pack(config(name), tmp_path / "made")
    for precision in BITS:
        with edge.load(tmp_path / "made", precision=precision, engine="native", slice="full", context=32) as session:
            ids = np.random.default_rng(0).integers(0, session.model.vocab, 24)
            logits = session.logits(ids)
            assert np.isfinite(logits).all()
            assert 0.5 < logits.std() < 2
            assert np.abs(np.diff(logits, axis=0)).max(axis=1).min() > 0.1
            assert len(set(logits.argmax(axis=1).tolist())) > 4


def test_torch_computes_the_same(config: Config, tmp_path: Path) -> None:
    write_random_pack(config(FAMILIES[0]), tmp_path / "made")
    found = []
    for engine in ("native", "torch"):
        options = {"precision": "int4", "slice": "full", "context": 32, "kv": "float32"}
        with edge.load(tmp_path / "made", engine=engine, **options) as session:
            found.append(session.logits(np.arange(5, 29)))
    assert distance(found[0], found[1]) < 5e-3


# refused, stopped


def test_what_is_refused(config: Config, tmp_path: Path) -> None:
    good = config("ragged")
    for wrong in ({"precisions": ()}, {"precisions": ("int2",)}, {"seed": -1}, {"ple": "bf16"}):
        with pytest.raises(Usage):
            write_random_pack(good, tmp_path / "made", **wrong)
    with pytest.raises(MissingFile, match="no such file"):
        write_random_pack(tmp_path / "gone.json", tmp_path / "made")
    with pytest.raises(CannotCreate):
        write_random_pack(good, tmp_path / "no" / "where")
    (tmp_path / "taken").mkdir()
    with pytest.raises(CannotCreate, match="already there"):
        write_random_pack(good, tmp_path / "taken")
    assert os.listdir(tmp_path) == ["taken"]


def test_a_disk_too_small_is_noticed_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 10**9))
    monkeypatch.setattr(synthetic_pack, "panel_band", None)
    with pytest.raises(ReadFailed, match="disk full: needs "):
        write_random_pack("gemma-3n-E2B", tmp_path / "made")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), MemoryError()]
)
def test_an_error_leaves_nothing_behind(config: Config, tmp_path: Path, error: BaseException) -> None:
    steps: list[int] = []

    def fails(what: str, done: int, total: int) -> None:
        assert what == "writing"
        steps.append(done)
        if len(steps) == 5:
            assert os.listdir(tmp_path) != []
            raise error

    before = threading.active_count()
    with pytest.raises(ReadFailed if isinstance(error, OSError) else type(error)):
        write_random_pack(config(FAMILIES[0]), tmp_path / "made", notify=fails)
    assert os.listdir(tmp_path) == []
    assert len(steps) == 5, "the other part went on"
    assert threading.active_count() == before


def test_an_error_in_a_thread_is_an_error(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(synthetic_pack, "panel_band", fails)
    with pytest.raises(MemoryError):
        write_random_pack(config("ragged"), tmp_path / "made")
    assert os.listdir(tmp_path) == []


def test_progress_reaches_the_end(config: Config, tmp_path: Path) -> None:
    said: list[tuple[int, int]] = []
    size = write_random_pack(
        config("ragged"), tmp_path / "made", notify=lambda _, done, total: said.append((done, total))
    )
    assert [done for done, _ in said] == sorted(done for done, _ in said)
    assert said[-1] == (size, size)


def test_ctrl_c_leaves_nothing_behind(tmp_path: Path) -> None:
    interrupted_synth(tmp_path, ".made.*/*/.weights*", "--config", "gemma-3n-E2B", "--pack", "int4")


def test_a_large_tensor_streams(tmp_path: Path) -> None:
    """The peak is read inside the process: a parent's figure would be its own."""
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "vocab_size": 400_000, "hidden_size": 512}))
    program = """
import sys
from edge.cli.app import run_app
code = run_app(sys.argv[1:])
print(code, "torch" in sys.modules, open("/proc/self/status").read().partition("VmHWM:")[2].split()[0])
"""
    flags = ("synth", "--config", str(tmp_path), "--pack", "int8", "-o", str(tmp_path / "made"))
    done = subprocess.run(
        [sys.executable, "-c", program, *flags],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    code, torch_there, peak = done.stdout.split()
    assert (code, torch_there) == ("0", "False"), done.stderr
    assert sum(path.stat().st_size for path in files(tmp_path / "made")) > 400_000_000
    assert int(peak) * 1024 < 120_000_000
    shutil.rmtree(tmp_path / "made")


# the command


def test_the_command_writes_a_pack(config: Config, cli: Cli, tmp_path: Path) -> None:
    flags = ("--config", config(FAMILIES[0]), "--seed", 3)
    done = cli("synth", *flags, "--pack", "int4", "--pack", "int8", "-o", tmp_path / "made")
    assert (done.code, done.out, done.err.count("\n")) == (0, "", 1)
    assert done.err.startswith(f"{tmp_path / 'made'}: Gemma 3n text, ")
    assert "random parameters, " in done.err
    assert " MB int8, int4, " in done.err
    assert cli("synth", *flags, "--pack", "int4,int8", "-q", "-o", tmp_path / "again").err == ""
    assert digests(tmp_path / "made") == digests(tmp_path / "again")
    assert "; random weights\n" in cli("inspect", tmp_path / "made").out
    found = cli("inspect", tmp_path / "made", "--json").json["pack"]
    assert (found["random"], found["source"]) == (True, "")
    assert cli("pack", tmp_path / "made", "--verify").code == 0
    refused(cli("run", tmp_path / "made", "a prompt"), 66, "tokenizer.json")


def test_what_the_command_refuses(config: Config, cli: Cli, tmp_path: Path) -> None:
    flags = ("synth", "--config", config("ragged"), "-o", tmp_path / "made")
    for more in (("--pack", "int2"), ("--pack", ""), ("--pack", "int4,"), ("--pack", "int8", "--pack", "bf16")):
        refused(cli(*flags, *more), 2, "--pack")
    for more in (("--dtype", "bf16"), ("--shards", 2), ("--shard-size", "1GB")):
        refused(cli(*flags, "--pack", "int4", *more), 2, more[0], "given together")
    refused(
        cli("synth", "--config", "gemma3n-e2b", "--pack", "int4", "-o", tmp_path / "made"), 66, "Is it gemma-3n-E2B"
    )
    assert os.listdir(tmp_path) == []


def test_a_published_name_does(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli("synth", "--config", "GPT2", "--pack", "int4", "-o", "made").code == 0
    with opened(tmp_path / "made") as pack:
        assert pack.manifest["source"]["name"] == "gpt2"
    assert cli("synth", "--config", "gpt2", "-o", "whole", "-q").code == 0
    with closing(Checkpoint.open(tmp_path / "whole")) as checkpoint:
        assert len(checkpoint.model.layers) == 12
