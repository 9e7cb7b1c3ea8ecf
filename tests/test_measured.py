"""Measured quality: kept beside the weights, never believed unread, and what the planner makes of it."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge.budget.plan import Floor
from edge.store import packs
from edge.store.measured import measured, save
from loaders.checkpoint import Checkpoint
from loaders.errors import BadCheckpoint, CannotCreate, EdgeError, Unsupported
from loaders.formats import manifest as manifests
from loaders.formats.measured import MOST, NAME, Measured, dump, load, merge, parse, plain
from loaders.formats.pack import MEASURED, Pack
from loaders.formats.recipe import PRECISIONS, Recipe, recipes
from loaders.network.matformer import validate
from loaders.packing import fingerprint, write_pack, write_root
from loaders.slices import named
from tests import small
from tests.command import Cli, cli_fixture, floor_fixture  # noqa: F401
from tests.faulty import CHANGES, Faults, ended, forked, raising, suicide, tree

CONFIG: dict[str, Any] = {**small.GEMMA3N, "num_hidden_layers": 6, "num_kv_shared_layers": 2}
CONFIG |= {key: small.GEMMA3N[key][:6] for key in ("layer_types", "intermediate_size", "activation_sparsity_pattern")}
TEXT, OTHER = "0f" * 32, "1e" * 32
FLOOR = Floor(1 << 20)
INT8 = Recipe("int8", "int8")
ALL_RECIPES = tuple(recipe for precision in PRECISIONS for recipe in recipes(precision))


def quiet(*_: object) -> None:
    """Nobody watches."""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Packs of one test are not those of another."""
    monkeypatch.setenv("EDGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with slices and without a tokenizer; shared, so copied before it is changed."""
    folder = small.write(tmp_path_factory.mktemp("measured") / "model", CONFIG)
    (folder / "tokenizer.json").unlink()
    return folder


@pytest.fixture
def source(written: Path, tmp_path: Path) -> Iterator[Checkpoint]:
    """A copy of it, opened."""
    shutil.copytree(written, tmp_path / "model")
    checkpoint = Checkpoint.open(tmp_path / "model")
    yield checkpoint
    checkpoint.close()


@pytest.fixture
def root(source: Checkpoint, tmp_path: Path) -> Path:
    """A pack of it without weights, in a folder of the user's."""
    write_root(source, tmp_path / "pack", fingerprint(source))
    return tmp_path / "pack"


MODEL = small.family_of("gemma3n_text", "").parse(small.Config(CONFIG, ""))


def result(part: str = "full", recipe: Recipe = INT8, loss: float = 3.0, **more: Any) -> Measured:
    """One of a slice by name."""
    found = named(MODEL, part)
    facts = {"bits_per_byte": loss / 3, "tokens": 4096, "context": 512, "text": TEXT, **more}
    return Measured(part, found.keep, found.widths, recipe.precision, recipe.head, loss, **facts)


SLICES = ("full", "half", "quarter", "skip-first-shared", "skip=5", "ffn=128x3,64x3", "ffn=17,1,64,9x3")
RESULTS = st.builds(
    result,
    st.sampled_from(SLICES),
    st.sampled_from(ALL_RECIPES),
    st.floats(1e-3, 12.0),
    tokens=st.integers(1, 2**53),
    context=st.sampled_from([64, 512]),
    text=st.sampled_from([TEXT, OTHER]),
    kl=st.none() | st.floats(0, 20),
    top1=st.none() | st.floats(0, 1),
)
quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


# What is kept


@quick
@given(st.lists(RESULTS, max_size=8), st.lists(RESULTS, max_size=8))
def test_what_is_written_is_what_is_read(tmp_path: Path, old: list[Measured], new: list[Measured]) -> None:
    both = merge(old, new)
    assert merge(both, both) == both
    assert {m.key for m in both} == {m.key for m in (*old, *new)}
    last = {m.key: m for m in (*old, *new)}
    assert all(m == last[m.key] for m in both), "the newest of a slice, precision, text and context"
    (tmp_path / NAME).write_bytes(dump(both))
    assert load(tmp_path, MODEL) == both
    assert parse(json.loads(json.dumps(plain(both))), "x", MODEL) == both


BAD: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda m: m.pop("loss"), "loss"),
    (lambda m: m.update(loss=True), "loss"),
    (lambda m: m.update(loss="3"), "loss"),
    (lambda m: m.update(loss=0), "loss"),
    (lambda m: m.update(loss=-1.0), "loss"),
    (lambda m: m.update(loss=10**400), "loss"),
    (lambda m: m.update(loss=None), "loss"),
    (lambda m: m.update(bits_per_byte=1e7), "bits_per_byte"),
    (lambda m: m.update(kl=-0.5), "kl"),
    (lambda m: m.update(top1=1.01), "top1"),
    (lambda m: m.update(top1=-0.01), "top1"),
    (lambda m: m.update(tokens=0), "tokens"),
    (lambda m: m.update(tokens=2**54), "tokens"),
    (lambda m: m.update(context=0.5), "context"),
    (lambda m: m.update(text="0" * 63), "text"),
    (lambda m: m.update(text="0" * 63 + "\n"), "text"),
    (lambda m: m.update(text=["0" * 64]), "text"),
    (lambda m: m.update(name=""), "name"),
    (lambda m: m.update(name="x" * 601), "name"),
    (lambda m: m.update(name="\x1b[2J"), "name"),
    (lambda m: m.update(name="\u202efull"), "name"),
    (lambda m: m.update(name=5), "name"),
    (lambda m: m.update(keep=[]), "slice of this model"),
    (lambda m: m.update(keep=[5, 4, 3, 2, 1, 0]), "ascending"),
    (lambda m: m.update(keep=[0, 1, 2, 3, 4, 6]), "0 to 5"),
    (lambda m: m.update(keep=[0, 1, 2, 4, 5], widths=[128] * 5), "layer 3 is dropped"),
    (lambda m: m.update(keep=[0.0, 1, 2, 3, 4, 5]), "keep[0]"),
    (lambda m: m.update(widths=[128] * 5), "5 widths"),
    (lambda m: m.update(widths=[129] * 6), "width 129"),
    (lambda m: m.update(widths=[0] * 6), "widths[0]"),
    (lambda m: m.update(widths={}), "widths"),
    (lambda m: m.update(precision="int3"), "precision"),
    (lambda m: m.update(head="int4"), "head"),
    (lambda m: m.update(more=1), "more"),
]


@pytest.mark.parametrize(("change", "words"), BAD)
def test_results_that_cannot_be(change: Callable[[dict[str, Any]], object], words: str, tmp_path: Path) -> None:
    entry = result().as_dict()
    change(entry)
    with pytest.raises(EdgeError) as refused:
        parse([result("half").as_dict(), entry], tmp_path / "manifest.json", MODEL)
    assert refused.value.exit_code in (65, 78)
    assert words in str(refused.value)
    assert "measured[1]" in str(refused.value)
    assert "manifest.json" in str(refused.value)


@pytest.mark.parametrize("found", [None, {}, "x", 5, [5], [[]], [result().as_dict()] * 2, [{}] * (MOST + 1)])
def test_lists_that_cannot_be(found: Any) -> None:
    with pytest.raises(BadCheckpoint, match="measured"):
        parse(found, "manifest.json", MODEL)


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"format": "edge pack", "version": 1, "measured": []},
        {"format": "edge measured", "version": 2, "measured": []},
        {"format": "edge measured", "version": 1},
        {"format": "edge measured", "version": 1, "measured": [], "more": 1},
        [],
    ],
)
def test_files_that_cannot_be(data: Any, tmp_path: Path) -> None:
    (tmp_path / NAME).write_text(json.dumps(data))
    with pytest.raises(EdgeError) as refused:
        load(tmp_path, MODEL)
    assert refused.value.exit_code in (65, 78)
    assert NAME in str(refused.value)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=100, deadline=None)
@given(RESULTS, st.dictionaries(st.sampled_from(list(result().as_dict())), JUNK, min_size=1, max_size=3))
def test_anything_is_refused_or_sound(sound: Measured, junk: dict[str, Any]) -> None:
    try:
        (found,) = parse([{**sound.as_dict(), **junk}], "manifest.json", MODEL)
    except (BadCheckpoint, Unsupported):
        return
    validate(MODEL, found.part)
    assert found.recipe in ALL_RECIPES
    assert all(math.isfinite(x) for x in (found.loss, found.bits_per_byte, found.kl or 0, found.top1 or 0))
    assert found.name.isprintable()
    assert parse(json.loads(json.dumps(plain([found]), allow_nan=False)), "x", MODEL) == (found,)


def test_a_sealed_pack_with_results_that_cannot_be(root: Path) -> None:
    manifest = json.loads((root / manifests.NAME).read_bytes())
    for bad in ([{**result().as_dict(), "loss": -1}], {}, None):
        (root / manifests.NAME).write_bytes(manifests.sealed({**manifest, MEASURED: bad}))
        with pytest.raises(BadCheckpoint, match=r"manifest\.json: measured"):
            Pack.open(root)


# Where it is kept


def test_a_checkpoint_keeps_what_was_measured_in_its_pack(source: Checkpoint) -> None:
    """Its own folder is left alone; there and in the pack the same result may be, and the pack's is the newer."""
    before, mark = tree(source.folder), fingerprint(source)
    assert measured(source) == ()
    folder = save(source, [result(), result("half", loss=3.2)], quiet)
    assert folder.parent == packs.packs_folder()
    assert measured(source) == (result(), result("half", loss=3.2))
    assert save(source, [result("half", loss=3.1), result(context=64)], quiet) == folder
    assert measured(source) == (result(), result("half", loss=3.1), result(context=64))
    assert tree(source.folder) == before
    (source.folder / NAME).write_bytes(dump([result(loss=9.0), result("quarter")]))
    assert fingerprint(source) == mark, "what was measured does not make it another model"
    assert set(measured(source)) == {result(), result("half", loss=3.1), result(context=64), result("quarter")}
    assert not [name for name in os.listdir(folder) if name.startswith(".")]
    with packs.pack_closed(packs.ensure(source, ("base",), notify=quiet)) as pack:
        assert measured(pack) == pack.measured == (result(), result("half", loss=3.1), result(context=64))
        assert pack.verify()


def test_a_pack_anywhere_keeps_it_too(source: Checkpoint, tmp_path: Path, own_cache: Path) -> None:
    """And is made with what lay beside the checkpoint."""
    (source.folder / NAME).write_bytes(dump([result(), result("half")]))
    write_pack(source, tmp_path / "pack", ("int4",))
    before = set(os.listdir(tmp_path))
    with packs.pack_closed(Pack.open(tmp_path / "pack")) as pack:
        assert measured(pack) == (result(), result("half"))
        odd = result("ffn=17,1,64,9x3", loss=3.3)
        assert save(pack, [odd], quiet) == tmp_path / "pack"
        assert measured(pack) == (result(), result("half"), odd)
    with packs.pack_closed(Pack.open(tmp_path / "pack")) as pack:
        assert measured(pack) == (result(), result("half"), odd)
        assert pack.verify()
    assert set(os.listdir(tmp_path)) == before
    assert not [name for name in os.listdir(tmp_path / "pack") if name.startswith(".")]
    assert not (own_cache / "packs").exists()


def test_the_cached_pack_is_made_with_what_lay_beside(source: Checkpoint) -> None:
    (source.folder / NAME).write_bytes(dump([result()]))
    with packs.pack_closed(packs.ensure(source, (), notify=quiet)) as pack:
        assert pack.measured == (result(),)


def test_nothing_is_made_of_results_that_cannot_be(source: Checkpoint, tmp_path: Path) -> None:
    (source.folder / NAME).write_bytes(dump([replace(result(), widths=(999,) * 6)]))
    for make in (
        lambda: packs.ensure(source, (), notify=quiet),
        lambda: write_pack(source, tmp_path / "pack"),
        lambda: measured(source),
    ):
        with pytest.raises(BadCheckpoint, match=rf"{NAME}: measured\[0\]: width 999"):
            make()
    assert packs.listing() == []
    assert not (tmp_path / "pack").exists()


@pytest.mark.parametrize("found", [result(loss=math.nan), result(loss=-1.0), replace(result(), keep=(0,))])
def test_what_no_pack_could_hold_is_not_saved(root: Path, found: Measured) -> None:
    before = tree(root)
    with packs.pack_closed(Pack.open(root)) as pack:
        with pytest.raises(BadCheckpoint):
            save(pack, [result("half"), found], quiet)
        assert tree(root) == before
        assert measured(pack) == ()


def test_as_many_as_a_pack_may_hold(root: Path) -> None:
    with packs.pack_closed(Pack.open(root)) as pack:
        save(pack, [result(context=n) for n in range(1, MOST + 1)], quiet)
        with pytest.raises(CannotCreate, match=f"at most {MOST}"):
            save(pack, [result("half")], quiet)
        save(pack, [result(context=8, loss=2.0)], quiet)
    with packs.pack_closed(Pack.open(root)) as pack:
        assert len(pack.measured) == MOST
        assert pack.measured[7].loss == 2.0


@pytest.mark.parametrize("where", ["cache", "folder"])
@pytest.mark.parametrize("forks", [False, True])
def test_results_saved_at_once_are_all_kept(source: Checkpoint, root: Path, where: str, forks: bool) -> None:
    target = source if where == "cache" else Pack.open(root)
    save(target, [result()], quiet)

    def several(start: int) -> None:
        for n in range(start, start + 5):
            save(target, [result(context=n)], quiet)

    if forks:
        children = [forked(lambda n=n: several(n)) for n in (1, 6, 11)]  # type: ignore[misc]
        assert [ended(child) for child in children] == [0, 0, 0]
    else:
        threads = [threading.Thread(target=several, args=(n,)) for n in (1, 6, 11)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    again = source if where == "cache" else Pack.open(root)
    assert {m.context for m in measured(again)} == {512, *range(1, 16)}
    for opened in (target, again):
        opened.close()


@pytest.mark.parametrize("where", ["cache", "folder"])
def test_a_killed_writer_leaves_the_old_or_the_new(source: Checkpoint, root: Path, where: str) -> None:
    old, new = (result(),), (result(), result("half"))
    folder = save(source, old, quiet) if where == "cache" else root
    for n in range(1, 50):
        with packs.pack_closed(Pack.open(folder)) as pack:
            manifests.rewrite(folder, {**pack.manifest, MEASURED: plain(old)})
        faults = Faults(CHANGES, n, suicide)

        def work(faults: Faults = faults) -> None:
            with packs.pack_closed(Pack.open(folder)) as pack, faults.here():
                save(pack, new, quiet)

        code = ended(forked(work))
        with packs.pack_closed(Pack.open(folder)) as pack:
            assert pack.measured in ((old, new) if code else (new,))
            assert pack.verify()
            save(pack, new, quiet)
            assert measured(pack) == new
        assert code in (0, -signal.SIGKILL)
        if code == 0:
            break
    assert n > 3, "a folder, a sync and a rename at least"
    if where == "cache":
        assert not [name for name in os.listdir(folder) if name.endswith(".tmp")]


@pytest.mark.parametrize("where", ["cache", "folder"])
@pytest.mark.parametrize("name", ["mkdir", "fsync", "replace", "lock"])
@pytest.mark.parametrize(
    ("number", "code"), [(errno.EACCES, 77), (errno.EPERM, 77), (errno.EROFS, 73), (errno.ENOSPC, 74), (errno.EIO, 74)]
)
def test_a_pack_that_cannot_be_written(
    source: Checkpoint, root: Path, where: str, name: str, number: int, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = source if where == "cache" else Pack.open(root)
    folder, real = save(target, [result()], quiet), os.open
    before = tree(folder)

    def failing(path: Any, *rest: Any, **options: Any) -> Any:
        """Any call of this name, or the opening of a lock."""
        if name == "lock" and not os.fspath(path).endswith(".lock"):
            return real(path, *rest, **options)
        return raising(number)()

    with monkeypatch.context() as patch:
        patch.setattr(os, "open" if name == "lock" else name, failing)
        with pytest.raises(EdgeError) as refused:
            save(target, [result("half")], quiet)
    assert refused.value.exit_code == code
    assert str(folder if name != "lock" else folder.parent) in str(refused.value)
    assert tree(folder) == before
    assert measured(target) == (result(),)
    if where == "folder" and code in (73, 77):
        assert "copy it to a folder of your own" in str(refused.value)
    target.close()
