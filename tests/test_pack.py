"""Packs: what is in them, that runs from them are the runs they stand for, and the command that makes them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edge
from edge.cli.app import run_app
from edge.session import Session
from edge.store import packs
from loaders import packing
from loaders.checkpoint import Checkpoint
from loaders.errors import Unsupported
from loaders.formats import manifest as manifests
from loaders.formats.buffers import to_float32
from loaders.formats.pack import BASE, PARTS, PLE, VOCAB, WEIGHTS, Pack, contents, parts_for
from loaders.formats.panels import panel_bytes, panel_shape, rows
from loaders.formats.quant import BITS, dequantize, dequantize_rows, quantize, quantize_rows
from loaders.formats.recipe import Recipe, recipes, stored_as, stored_bytes, usual_head
from loaders.formats.safetensors_writer import Writer
from loaders.formats.window import Window
from loaders.network.matformer import full
from loaders.network.tensors import PLE_TABLE, tensors
from loaders.packing import fingerprint, write_pack
from loaders.weights import Kept, kept
from tests import small
from tests.makers import assert_close, prompt

RECIPES = tuple(recipe for precision in BITS for recipe in recipes(precision))
# Every matrix at least a block wide: none is left in bfloat16, so a run in float32 computes the very same.
WIDE: dict[str, Any] = {**small.GEMMA3N, "hidden_size_per_layer_input": 32, "laurel_rank": 32}
RAGGED: dict[str, Any] = {**small.LLAMA, "hidden_size": 80, "head_dim": 16, "intermediate_size": 136}
SHARDS = ("model.safetensors",)


@cache
def source(name: str) -> Path:
    """A checkpoint to pack; read-only."""
    if name in ("wide", "ragged"):
        return small.write(Path(small._home().name, name), WIDE if name == "wide" else RAGGED, "BF16")
    return small.built(name)


def packed(name: str, ple: str = "int8") -> Path:
    """A pack of it, made once; read-only."""
    return _packed(name, ple)


@cache
def _packed(name: str, ple: str) -> Path:
    folder = Path(small._home().name, f"{name}-{ple}.pack")
    checkpoint = Checkpoint.open(source(name))
    write_pack(checkpoint, folder, ple=ple)
    checkpoint.close()
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache for each test."""
    monkeypatch.setenv("EDGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def load() -> Iterator[Callable[..., Session]]:
    """``edge.load`` with torch, keys and values in float32, closed at the end."""
    sessions: list[Session] = []

    def opened(folder: Path, **options: Any) -> Session:
        usual = {"engine": "torch", "slice": "full", "kv": "float32", "context": 64}
        sessions.append(edge.load(folder, **{**usual, **options}))
        return sessions[-1]

    yield opened
    for session in sessions:
        session.close()


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    capsys.readouterr()
    code = run_app([str(arg) for arg in args])
    found = capsys.readouterr()
    return code, found.out, found.err


def weights(checkpoint: Checkpoint, name: str) -> np.ndarray:
    """A tensor of a checkpoint as float32."""
    return to_float32(checkpoint.read_raw(name), checkpoint.where[name].dtype)


def stored(pack: Pack, name: str, recipe: Recipe) -> tuple[np.ndarray, np.ndarray | None, str]:
    """What a pack holds of a tensor: row-major codes or raw values, scales or None, format."""
    shards, tensor, kind = pack.find(name, recipe)
    raw = np.empty(tensor.shape, {"U8": np.uint8, "F32": np.uint32, "BF16": np.uint16}[tensor.dtype])
    shards.read_window(tensor, Window.full(tensor.shape), raw)
    if kind not in BITS:
        return raw, None, kind
    return *rows(raw, kind, *tensors(pack.model)[name]), kind


def plain(pack: Pack, name: str, recipe: Recipe) -> np.ndarray:
    """A tensor as the recipe sees it, float32."""
    model = pack.model
    if name == PLE_TABLE:
        shards, tensor = pack.table()
        records = np.empty(tensor.shape, np.uint8)
        shards.read_window(tensor, Window.full(tensor.shape), records)
        assert model.ple is not None
        assert pack.ple_kind is not None
        return dequantize_rows(records, len(model.layers), model.ple.dim, pack.ple_kind).reshape(len(records), -1)
    raw, scales, kind = stored(pack, name, recipe)
    return to_float32(raw, kind) if scales is None else dequantize(raw, scales, kind, tensors(model)[name][1])


def dequantized(name: str, recipe: Recipe, ple: str = "int8") -> Path:
    """The dequantized weights of a pack as a float32 checkpoint; read-only."""
    return _dequantized(name, recipe, ple)


@cache
def _dequantized(name: str, recipe: Recipe, ple: str) -> Path:
    folder = Path(small._home().name, f"{name}-{recipe.precision}-{recipe.head}-{ple}.plain")
    folder.mkdir()
    shutil.copy(source(name) / "config.json", folder)
    with packs.pack_closed(Pack.open(packed(name, ple))) as pack:
        checkpoint = Checkpoint.open(source(name))
        specs = {t.name: ("F32", t.shape) for t in checkpoint.where.values()}
        with Writer(folder / "model.safetensors", specs) as writer:
            for canonical, tensor in checkpoint.where.items():
                writer.write(tensor.name, [np.ascontiguousarray(plain(pack, canonical, recipe))])
        checkpoint.close()
    return folder


# What a pack holds


@pytest.mark.parametrize("name", ["gemma3n", "llama", "ragged"])
def test_every_tensor_at_every_recipe(name: str) -> None:
    """Found, in the format of the recipe, with the bytes the recipe counts, and the codes that quantizing it gives."""
    checkpoint = Checkpoint.open(source(name))
    with packs.pack_closed(Pack.open(packed(name))) as pack:
        table = tensors(pack.model)
        for recipe in RECIPES:
            for tensor, shape in table.items():
                if tensor == PLE_TABLE:
                    continue
                raw, scales, kind = stored(pack, tensor, recipe)
                assert kind == stored_as(tensor, shape, recipe)
                assert raw.nbytes + (0 if scales is None else scales.nbytes) == stored_bytes(shape, kind)
                if scales is not None:
                    codes, wanted = quantize(weights(checkpoint, tensor), kind)
                    np.testing.assert_array_equal(raw, codes)
                    np.testing.assert_array_equal(scales, wanted)
                elif kind == "F32":
                    np.testing.assert_array_equal(raw.view(np.float32), weights(checkpoint, tensor))
                else:
                    np.testing.assert_allclose(to_float32(raw, kind), weights(checkpoint, tensor), rtol=2**-8)
        if pack.model.ple is not None:
            model, (shards, tensor) = pack.model, pack.table()
            records = np.empty(tensor.shape, np.uint8)
            shards.read_window(tensor, Window.full(tensor.shape), records)
            rows = weights(checkpoint, PLE_TABLE).reshape(model.ple.rows, len(model.layers), model.ple.dim)
            np.testing.assert_array_equal(records, quantize_rows(rows, "int8"))
    checkpoint.close()


def test_formats_of_the_recipes() -> None:
    """The rules of thumb, by name."""
    with packs.pack_closed(Pack.open(packed("wide"))) as pack:
        table = tensors(pack.model)
    four, eight, forced = recipes("int4")[0], recipes("int8")[0], recipes("int4")[1]
    assert [usual_head(p) for p in ("float32", "bf16", "int8", "int4")] == ["float32", "bf16", "int8", "int8"]
    assert {stored_as(n, s, four) for n, s in table.items() if ".ffn." in n or n.endswith("attn.q")} == {"int4"}
    assert {stored_as(n, s, eight) for n, s in table.items() if ".ffn." in n} == {"int8"}
    for recipe in RECIPES:
        for name, shape in table.items():
            if len(shape) == 1 or name.endswith(("altup.router", "altup.predict", "altup.correct")):
                assert stored_as(name, shape, recipe) == "F32"
            if name.startswith("altup.") or name.endswith(("ple.gate", "ple.proj")):
                assert stored_as(name, shape, recipe) == "int8"
    assert (stored_as("embed", table["embed"], four), stored_as("embed", table["embed"], forced)) == ("int8", "int4")


@pytest.mark.parametrize("name", ["gemma3n", "llama"])
def test_parts_hold_what_they_say_and_nothing_twice(name: str) -> None:
    with packs.pack_closed(Pack.open(packed(name))) as pack:
        assert tuple(pack.parts) == tuple(p for p in PARTS if p != PLE or name == "gemma3n")
        assert pack.precisions == ("int8", "int4")
        for part, shards in pack.parts.items():
            formats = contents(pack.model, part)
            assert set(shards.tensors) == set(formats)
            panels = {n: shards.tensors[n] for n, f in formats.items() if f in BITS and part != PLE}
            table = tensors(pack.model)
            assert {n: t.shape for n, t in panels.items()} == {n: panel_shape(table[n], formats[n]) for n in panels}
            assert all(t.offset % 32 == 0 for t in panels.values())
            assert min(t.offset for t in shards.tensors.values()) % 64 == 0
        base = set(contents(pack.model, BASE))
        assert base.isdisjoint(contents(pack.model, "int8"))
        # The embedding lies in base at int8, and in int4 for budgets that force it there.
        assert base & set(contents(pack.model, "int4")) == ({"embed"} if name == "gemma3n" else {"embed", "head"})
        needed = sum(packing.part_bytes(Checkpoint.open(source(name)), part) for part in pack.parts)
        heads = sum(min(t.offset for t in s.tensors.values()) for s in pack.parts.values())
        root = sum(f["bytes"] for f in pack.manifest["files"].values())
        assert sum(pack.sizes().values()) == needed + heads + root
        assert pack.verify() == sum(pack.sizes().values())


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_what_is_loaded_is_what_the_planner_counted(precision: str, load: Callable[..., Session]) -> None:
    for folder in (packed("gemma3n"), source("gemma3n")):
        session = load(folder, precision=precision, ple="ram")
        tensors_kept = kept(session.source.model, full(session.source.model), session.model)
        counted = sum(t.nbytes(session.plan.recipe) for t in tensors_kept.values())
        assert isinstance(session.source, Pack)
        assert session.plan.bytes["weights"] == counted
        read = sum(shards.bytes_read for shards in session.source.parts.values())
        assert (
            read
            == sum(bytes_in_panels(t, session.plan.recipe) for t in tensors_kept.values()) + session.plan.bytes["ple"]
        )


def bytes_in_panels(tensor: Kept, recipe: Recipe) -> int:
    """Bytes of a pack that hold what a slice keeps of a tensor."""
    kind = tensor.stored(recipe)
    return panel_bytes(tensor.shape, kind) if kind in BITS else tensor.nbytes(recipe)


# Runs


def both(found: Session, wanted: Session) -> None:
    """The same logits, all positions at once and one step after another."""
    ids = prompt(found.model.vocab, 24)
    expected = wanted.logits(ids)
    assert_close(found.logits(ids), expected)
    found.reset()
    steps = [found.step(ids[:9]), *(found.step(ids[i : i + 1]) for i in range(9, 24))]
    assert_close(np.array(steps), expected[8:])


@pytest.mark.parametrize("name", ["wide", "ragged"])
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_run_from_a_pack_is_one_on_the_dequantized_weights(
    name: str, precision: str, load: Callable[..., Session]
) -> None:
    found = load(packed(name), precision=precision)
    assert found.plan.recipe == recipes(precision)[0]
    both(found, load(dequantized(name, found.plan.recipe), precision="float32"))


def test_and_so_is_one_with_the_head_at_int4(load: Callable[..., Session], monkeypatch: pytest.MonkeyPatch) -> None:
    forced = recipes("int4")[1]
    monkeypatch.setattr("edge.budget.wanted.recipes", lambda precision: (forced,) if precision == "int4" else ())
    found = load(packed("wide"), precision="int4")
    assert found.plan.recipe == forced
    monkeypatch.undo()
    both(found, load(dequantized("wide", forced), precision="float32"))


def test_and_so_is_one_with_rows_at_int4(load: Callable[..., Session]) -> None:
    found = load(packed("wide", "int4"), precision="int8", ple="ssd")
    assert isinstance(found.source, Pack)
    assert found.source.ple_kind == "int4"
    both(found, load(dequantized("wide", found.plan.recipe, "int4"), precision="float32"))
    found.engine.relieve()
    assert found.source.parts[PLE].total_bytes == 316 * 12 * (2 + 16)


@pytest.mark.parametrize("text", ["half", "skip=6,9", "half+skip=9-10", "ffn=40x3,72,100x8"])
def test_a_slice_reads_its_windows_and_no_more(text: str, load: Callable[..., Session]) -> None:
    """The last one's widths end inside blocks, which are then read whole."""
    found = load(packed("wide"), precision="int4", slice=text, ple="ram")
    assert isinstance(found.source, Pack)
    read = {part: shards.bytes_read for part, shards in found.source.parts.items()}
    kept_here = kept(found.source.model, found.plan.part, found.model).values()
    assert sum(read.values()) == sum(bytes_in_panels(t, found.plan.recipe) for t in kept_here) + found.plan.bytes["ple"]
    assert read[PLE] == 316 * len(found.plan.part.keep) * (2 + 32)
    assert read["int8"] == 0
    whole = {part: shards.total_bytes for part, shards in found.source.parts.items()}
    assert read["int4"] < whole["int4"] - 328 * 2 * (16 + 2)  # less than all but the embedding that it leaves out
    both(found, load(dequantized("wide", found.plan.recipe), precision="float32", slice=text))


def test_tiers_of_the_table_agree_to_the_bit(load: Callable[..., Session]) -> None:
    ids = prompt(small.VOCAB, 24)
    for ple in ("int8", "int4"):
        found = [load(packed("gemma3n", ple), precision="int8", ple=t).logits(ids) for t in ("ram", "ssd", "device")]
        assert found[0].tobytes() == found[1].tobytes() == found[2].tobytes()


def test_a_checkpoint_and_its_pack_agree_to_the_bit(load: Callable[..., Session]) -> None:
    ids = prompt(small.VOCAB, 24)
    for name in ("gemma3n", "llama"):
        for precision in BITS:
            a, b = (load(folder, precision=precision).logits(ids) for folder in (source(name), packed(name)))
            assert a.tobytes() == b.tobytes()


def test_a_pack_runs_without_its_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(source("gemma3n-chat"), tmp_path / "model")
    say = ("-n", "3", "--temp", "0", "-c", "64", "--json", "--precision", "int4")
    code, before, err = run(capsys, "run", tmp_path / "model", "once upon", *say)
    assert code == 0, err
    assert run(capsys, "pack", tmp_path / "model", "-o", tmp_path / "pack", "-q")[0] == 0
    shutil.rmtree(tmp_path / "model")
    shutil.rmtree(tmp_path / "cache")
    code, after, err = run(capsys, "run", tmp_path / "pack", "once upon", *say)
    assert code == 0, err
    assert json.loads(after)["tokens"] == json.loads(before)["tokens"]
    # Nothing was packed again, or remembered of it.
    assert not (tmp_path / "cache" / "packs").exists()
    assert run(capsys, "plan", tmp_path / "pack", "--budget", "2GB", "--json")[0] == 0


@pytest.mark.parametrize("precision", ["bf16", "float32", "int8"])
def test_a_pack_runs_at_what_it_holds_alone(tmp_path: Path, precision: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "pack", source("llama"), "-o", tmp_path / "p", "--precision", "int4", "-q")[0] == 0
    code, out, err = run(capsys, "run", tmp_path / "p", "hi", "--precision", precision)
    assert (code, out) == (78, "")
    assert err.count("\n") == 1
    assert f"--precision {precision}: this pack holds int4" in err
    with packs.pack_closed(Pack.open(tmp_path / "p")) as pack:
        assert pack.dtype == "int4"


# The cache


def test_the_second_run_reads_the_pack(load: Callable[..., Session], own_cache: Path) -> None:
    first = load(source("gemma3n"), precision="int8", ple="ssd")
    assert isinstance(first.checkpoint, Checkpoint)
    assert first.checkpoint.shards.bytes_read == first.checkpoint.shards.total_bytes
    made = {path: os.stat(path).st_ino for path in own_cache.rglob("*")}
    second = load(source("gemma3n"), precision="int8", ple="ssd")
    assert isinstance(second.checkpoint, Checkpoint)
    assert second.checkpoint.shards.bytes_read == 0
    assert {path: os.stat(path).st_ino for path in own_cache.rglob("*")} == made
    # int8 alone: the other core is made when a run first needs it.
    (folder,) = [p for p in (own_cache / "packs").iterdir() if p.is_dir()]
    assert not (folder / "int4").exists()
    third = load(source("gemma3n"), precision="int4", ple="ssd")
    assert isinstance(third.source, Pack)
    assert third.source.folder == folder
    assert {path: os.stat(path).st_ino for path in made if path.is_file()}.items() <= made.items()
    np.testing.assert_array_equal(second.logits([1, 2, 3]), first.logits([1, 2, 3]))


def test_a_float32_run_makes_no_weights(load: Callable[..., Session], own_cache: Path) -> None:
    load(source("gemma3n"), precision="float32")
    assert list(own_cache.rglob(WEIGHTS)) == []


def test_a_changed_source_is_packed_anew(tmp_path: Path) -> None:
    """The same size, and the modification time put back: what tells is the time of change."""
    shutil.copytree(source("llama"), tmp_path / "model")
    path = tmp_path / "model" / SHARDS[0]
    checkpoint = Checkpoint.open(tmp_path / "model")
    with packs.pack_closed(packs.ensure(checkpoint, (BASE, "int8"), notify=quiet)) as pack:
        first = pack.folder
    mark, before = fingerprint(checkpoint), os.stat(path)
    checkpoint.close()
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    time.sleep(0.02)  # longer than a tick of the file system's clock
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (os.stat(path).st_size, os.stat(path).st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    checkpoint = Checkpoint.open(tmp_path / "model")
    assert fingerprint(checkpoint) != mark
    assert packs.cached(checkpoint) is None
    with packs.pack_closed(packs.ensure(checkpoint, (BASE, "int8"), notify=quiet)) as pack:
        assert pack.folder != first
        assert (
            weights(checkpoint, "layers.2.ffn.down").shape == plain(pack, "layers.2.ffn.down", recipes("int8")[0]).shape
        )
    checkpoint.close()
    assert [(e.folder == first, e.state) for e in packs.listing()].count((True, "source changed")) == 1
    assert [e.state for e in packs.listing() if e.folder != first] == ["ready"]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("config.json", lambda text: text.replace('"rms_norm_eps": 1e-05', '"rms_norm_eps": 1e-06')),
        ("tokenizer.json", lambda text: text.replace('"<pad>"', '"<Pad>"')),
        ("generation_config.json", lambda text: text.replace("4", "3")),
    ],
)
def test_text_and_config_belong_to_the_fingerprint(tmp_path: Path, name: str, change: Callable[[str], str]) -> None:
    shutil.copytree(source("llama"), tmp_path / "model", copy_function=shutil.copy2)
    checkpoint = Checkpoint.open(tmp_path / "model")
    before = fingerprint(checkpoint)
    path = tmp_path / "model" / name
    assert change(path.read_text()) != path.read_text()
    path.write_text(change(path.read_text()))
    assert fingerprint(Checkpoint.open(tmp_path / "model")) != before


def quiet(what: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


def test_threads_that_pack_the_same_do_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    write_part = packs.write_part

    def counted(checkpoint: Checkpoint, part: str, *args: Any, **options: Any) -> None:
        made.append(part)
        write_part(checkpoint, part, *args, **options)

    monkeypatch.setattr(packs, "write_part", counted)
    waited: list[str] = []
    start, failed = threading.Barrier(4), []

    def work() -> None:
        try:
            checkpoint = Checkpoint.open(source("llama"))
            start.wait()
            packs.ensure(checkpoint, parts_for(checkpoint.model), notify=lambda what, *_: waited.append(what)).close()
            checkpoint.close()
        except BaseException as e:  # noqa: BLE001 - shown by the assertion below
            failed.append(e)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert made == ["base", "int8", "int4"]
    assert "waiting for another process to pack" in waited


CHILD = """
import sys
from edge.store import packs
from edge.cli.app import run_app
write = packs.write_part
def said(checkpoint, part, *args, **options):
    print("made", part, flush=True)
    write(checkpoint, part, *args, **options)
packs.write_part = said
sys.exit(run_app(sys.argv[1:]))
"""


def test_processes_that_pack_the_same_do_it_once(own_cache: Path) -> None:
    checkpoint = Checkpoint.open(source("llama"))
    folder = packs.packs_folder() / packs.key_of(checkpoint, fingerprint(checkpoint))
    checkpoint.close()
    folder.parent.mkdir(parents=True)
    lock = packs.lock_path(folder)
    command = [sys.executable, "-c", CHILD, "pack", str(source("llama")), "-q"]
    with packs.locked(folder, quiet):
        children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        # Both have opened the lock that is ours, so both wait for it.
        deadline = time.monotonic() + 60
        while not all(holds(child.pid, lock) for child in children):
            assert time.monotonic() < deadline
            time.sleep(0.02)
    said = [child.communicate(timeout=60)[0].split() for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert sorted(said) == [[], ["made", "base", "made", "int8", "made", "int4"]]
    assert [entry.state for entry in packs.listing()] == ["ready"]


def holds(pid: int, path: Path) -> bool:
    """Whether a process has a file open."""
    try:
        links = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
    except OSError:
        return False
    return str(path) in links


def test_two_packs_are_the_same_bytes(tmp_path: Path) -> None:
    """Whoever made them, whatever the size of a band."""
    checkpoint = Checkpoint.open(source("gemma3n"))
    for name, room in (("a", None), ("b", 0)):
        write_pack(checkpoint, tmp_path / name, room=room)
    with packs.pack_closed(packs.ensure(checkpoint, parts_for(checkpoint.model), notify=quiet)) as pack:
        assert tree(tmp_path / "a") == tree(tmp_path / "b") == tree(pack.folder)
    checkpoint.close()


def test_what_is_in_the_folder(tmp_path: Path) -> None:
    found = tree(packed("gemma3n-chat"))
    text = {"config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"}
    parts = {f"{part}/{name}" for part in PARTS for name in (manifests.NAME, WEIGHTS)}
    assert found.keys() - {VOCAB} == text | parts | {manifests.NAME}
    for name in text - {"config.json"}:
        assert found[name] == (source("gemma3n-chat") / name).read_bytes()
    assert json.loads(found["config.json"]) == small.GEMMA3N
    sealed = json.loads(found[manifests.NAME])
    assert sealed["source"] == {"name": "gemma3n-chat", "path": str(source("gemma3n-chat"))}
    assert (sealed["format"], sealed["version"], sealed["part"]) == ("edge pack", 2, "root")


# The command


def test_pack_into_the_cache(own_cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "pack", source("llama"))
    assert (code, out) == (0, "")
    assert err.count("\n") == 1
    code, out, _ = run(capsys, "pack", source("llama"), "--json")
    facts = json.loads(out)
    assert code == 0
    assert Path(facts["pack"]).parent == own_cache / "packs"
    assert list(facts["parts"]) == ["root", "base", "int8", "int4"]
    assert facts["bytes"] == sum(facts["parts"].values())
    code, out, _ = run(capsys, "pack", "--list", "--json")
    (entry,) = json.loads(out)["packs"]
    assert entry["source"] == str(source("llama"))
    assert (entry["state"], entry["bytes"], entry["parts"]) == ("ready", facts["bytes"], facts["parts"])
    code, out, err = run(capsys, "pack", "--list")
    assert (code, err) == (0, "")
    assert entry["key"] in out
    for name in (facts["pack"], entry["key"], entry["key"][:7], source("llama")):
        code, out, _ = run(capsys, "pack", "--verify", name, "--json")
        assert (code, json.loads(out)) == (0, {"pack": facts["pack"], "bytes": facts["bytes"], "ok": True})


def test_remove(own_cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "pack", source("llama"), "-q")
    run(capsys, "pack", source("gemma3n"), "-q")
    assert run(capsys, "pack", "--remove", "")[0] == 66
    assert run(capsys, "pack", "--remove", "nothing")[0] == 66
    code, out, err = run(capsys, "pack", "--remove", source("llama"))
    assert (code, out) == (0, "")
    assert err.startswith("removed ")
    (left,) = packs.listing()
    assert left.key.startswith("gemma3n-")
    code, out, _ = run(capsys, "pack", "--remove", left.key, "--json")
    assert (code, json.loads(out)) == (0, {"removed": str(left.folder)})
    assert packs.listing() == []
    assert list((own_cache / "packs").iterdir()) == []
    assert run(capsys, "pack", "--list")[1].startswith("no packs in ")


def test_a_key_that_means_several(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for name in ("one", "other"):
        shutil.copytree(source("llama"), tmp_path / name)
        run(capsys, "pack", tmp_path / name, "-q", "--precision", "int8")
    code, _, err = run(capsys, "pack", "--remove", "o")
    assert code == 2
    assert "o means 2 packs" in err
    assert len(packs.listing()) == 2


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["--list", "--verify"], 2, "several things"),
        (["--list", "-o", "x"], 2, "several things"),
        ([], 2, "no model"),
        (["MODEL", "--precision", "bf16"], 2, "--precision: bf16"),
        (["MODEL", "--precision", ""], 2, "--precision"),
        (["MODEL", "--ple", "int4"], 2, "--ple: int4 (expected int8 in the cache)"),
        (["PACK"], 2, "a pack (expected a checkpoint"),
        (["PACK", "-o", "OUT"], 2, "a pack (expected a checkpoint"),
        (["MODEL", "--verify"], 2, "without a pack"),
        (["--verify", "x" * 5000], 66, "no such pack"),
        (["MODEL", "-o", "PACK"], 73, "already there"),
        (["MODEL", "-o", "OUT/deeper"], 73, "OUT"),
        (["nowhere"], 66, "no such folder"),
    ],
)
def test_what_is_refused(
    args: list[str], code: int, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"MODEL": source("llama"), "PACK": packed("llama")}
    filled = [str(places.get(arg, arg)).replace("OUT", str(tmp_path / "OUT")) for arg in args]
    before = tree(packed("llama"))
    found, out, err = run(capsys, "pack", *filled)
    assert (found, out) == (code, "")
    assert err.count("\n") == 1
    assert words in err
    assert tree(packed("llama")) == before
    assert not (tmp_path / "OUT").exists()


def test_a_listing_shows_text_as_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "[bold]x[/bold]\n\x1b[31m"
    shutil.copytree(source("llama"), folder)
    assert run(capsys, "pack", folder, "-q", "--precision", "int8")[0] == 0
    code, out, _ = run(capsys, "pack", "--list")
    assert code == 0
    assert "\x1b" not in out
    assert "[bold]x[/bold]" in out.replace("\n", "")


def test_an_odd_width_has_no_int4_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = small.write(tmp_path / "odd", {**small.GEMMA3N, "hidden_size_per_layer_input": 7})
    code, _, err = run(capsys, "pack", model, "-o", tmp_path / "p", "--ple", "int4")
    assert code == 78
    assert "width 7" in err
    assert os.listdir(tmp_path) == ["odd"]
    with pytest.raises(Unsupported):
        write_pack(Checkpoint.open(model), tmp_path / "p", ple="int4")
    assert run(capsys, "pack", model, "-o", tmp_path / "p", "-q")[0] == 0


def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(source("llama"), tmp_path / "model")
    checkpoint = Checkpoint.open(source("llama"))
    place = checkpoint.where["layers.1.ffn.up"].pieces[0].tensor
    with open(tmp_path / "model" / SHARDS[0], "r+b") as file:
        file.seek(place.offset + 4 * 700)
        file.write(np.float32(np.nan).tobytes())
    code, out, err = run(capsys, "pack", tmp_path / "model")
    assert (code, out) == (65, "")
    assert "model.safetensors: model.layers.1.mlp.up_proj.weight: a value that is not finite" in err


def test_importance_reaches_the_codes(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(source("llama"))
    columns = np.where(np.arange(64) < 8, 50.0, 1.0).astype(np.float32)
    name = "layers.0.attn.q"
    write_pack(checkpoint, tmp_path / "p", importance=lambda n: columns if n == name else None)
    with packs.pack_closed(Pack.open(tmp_path / "p")) as pack:
        raw, _, _ = stored(pack, name, recipes("int4")[0])
        wanted = quantize(weights(checkpoint, name), "int4", columns)
        np.testing.assert_array_equal(raw, wanted[0])
        assert (raw != quantize(weights(checkpoint, name), "int4")[0]).any()
    checkpoint.close()
