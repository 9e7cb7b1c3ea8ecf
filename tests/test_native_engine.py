"""The native engine as runs use it: against torch, in slices and tiers, without torch in the process, and refused."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edge
from edge.budget import price_native
from edge.budget.memory import Ledger
from edge.budget.plan import Floor, Request, enumerate_plans
from edge.engine.native.compile import compiled
from edge.engine.native_kv import capacity
from edge.engine.native_weights import Mapped, load_weights
from edge.session import Session, open_source
from edge.store.ple import StreamedTable
from loaders.errors import ReadFailed
from loaders.formats.pack import Pack
from loaders.formats.quant import BITS
from loaders.formats.recipe import recipes, stored_as
from loaders.network.matformer import full, parts
from loaders.network.tensors import PLE_TABLE, tensors
from loaders.packing import write_pack
from loaders.weights import kept
from tests.command import ENOUGH, PROMPT, Cli, cli_fixture, edge_command, environment, refused  # noqa: F401
from tests.conftest import Folder
from tests.makers import distance
from tests.shrink import CONFIGS, NAMES, parse, real
from tests.small import Clone, clone_fixture, gemma3n_fixture, llama_fixture  # noqa: F401

LENGTH = 45
# Activations are rounded to 15 bits where weights are blocks; attention in another order moves what they round to.
CLOSE = {"float32": 1e-4, "bf16": 1e-4, "int8": 2e-3, "int4": 2e-3}
FAMILIES = (
    "gemma-3n-E2B",
    "gemma-4-E2B",
    "llama-3.2-1B",
    "llama-4-scout-17B-16E",
    "qwen3-30B-A3B",
    "deepseek-v3",
    "gpt2",
)
CASES = [(n, p) for n in FAMILIES for p in CLOSE if p in ("float32", "int4") or n in FAMILIES[:1]]
SLICES = ("full", "half", "quarter", "half+skip-first-shared", "ffn=100x6,52x5,128x1", "skip=8")
Load = Callable[..., Session]


@pytest.fixture(name="load")
def load_fixture() -> Iterator[Load]:
    """``edge.load`` in the native engine, with a context of LENGTH; closed in the end."""
    sessions: list[Session] = []

    def load(folder: Path, **options: Any) -> Session:
        keys = {"engine": "native", "slice": "full", "context": LENGTH, "kv": "float32", **options}
        sessions.append(edge.load(folder, **keys))
        return sessions[-1]

    yield load
    for session in sessions:
        session.close()


def some_ids(session: Session, count: int = LENGTH) -> np.ndarray:
    return np.random.default_rng(3).integers(0, session.model.vocab, count)


def close(found: np.ndarray, wanted: np.ndarray, precision: str) -> bool:
    return found.shape == wanted.shape and distance(found, wanted) <= CLOSE[precision]


# Against torch


@pytest.mark.parametrize(("name", "precision"), CASES)
def test_the_same_logits_as_torch(folders: Folder, load: Load, name: str, precision: str) -> None:
    ours, torch = (load(folders(name), engine=engine, precision=precision) for engine in ("native", "torch"))
    assert (ours.engine.name, ours.plan["engine"], ours.plan.precision) == ("native", "native", precision)
    ids = some_ids(ours)
    wanted = torch.logits(ids)
    found = ours.logits(ids)
    assert close(found, wanted, precision)
    assert ours.engine.position == 0, "logits() has a cache of its own"
    # In chunks that end anywhere, then token by token.
    ours.engine.chunk = 7
    sizes = [19, *[1] * (LENGTH - 19)]
    ends = np.cumsum(sizes)
    steps = np.stack([ours.step(ids[end - size : end]) for size, end in zip(sizes, ends, strict=True)])
    assert ours.engine.position == LENGTH
    assert close(steps, wanted[ends - 1], precision)
    ours.reset()
    assert np.array_equal(ours.step(ids[:19]), steps[0]), "a cache that was emptied is empty"


@pytest.mark.parametrize("precision", ["float32", "int4"])
@pytest.mark.parametrize("part", SLICES)
def test_slices(gemma3n: Path, load: Load, part: str, precision: str) -> None:
    ours, torch = (load(gemma3n, engine=e, precision=precision, slice=part) for e in ("native", "torch"))
    ids = some_ids(ours)
    assert close(ours.logits(ids), torch.logits(ids), precision)


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_tiers_give_the_same_bits(gemma3n: Path, load: Load, precision: str) -> None:
    sessions = {tier: load(gemma3n, precision=precision, ple=tier, slice="half") for tier in ("ram", "device", "ssd")}
    ids = some_ids(sessions["ram"])
    wanted = sessions["ram"].logits(ids)
    for tier, session in sessions.items():
        assert np.array_equal(session.logits(ids), wanted), tier
        assert session.ple is not None
        assert session.ple.rows >= LENGTH
    table = sessions["ssd"].engine.rows.table
    assert isinstance(table, StreamedTable)
    assert sessions["ssd"].ple.bytes_read >= table.row_bytes
    sessions["ssd"].step(ids[:5])
    assert sessions["ssd"].engine.relieve() > 0
    assert np.array_equal(sessions["ssd"].logits(ids), wanted), "a cache that gave way is a cache"


@pytest.mark.parametrize("kv", ["bf16", "int8"])
def test_narrow_caches(llama: Path, load: Load, kv: str) -> None:
    exact, narrow = load(llama, precision="float32"), load(llama, precision="float32", kv=kv)
    ids = some_ids(exact)
    assert 0 < distance(narrow.logits(ids), exact.logits(ids)) < 0.02
    assert narrow.plan.bytes["kv"] < exact.plan.bytes["kv"]


@pytest.mark.parametrize("precision", ["float32", "int4"])
def test_threads_change_no_bit(gemma3n: Path, load: Load, precision: str) -> None:
    found = []
    for count in (1, 2, 3):
        session = load(gemma3n, precision=precision, threads=count)
        assert session.runtime.threads == count
        ids = some_ids(session)
        found.append((session.logits(ids), np.stack([session.step([i]) for i in ids[:20]])))
        session.close()
    for other in found[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(other, found[0], strict=True))


def test_a_pack_is_run_where_it_lies(gemma3n: Path, load: Load, tmp_path: Path) -> None:
    with closing(open_source(gemma3n)) as source:
        write_pack(source, tmp_path / "pack", ("int4",))
    by_pack, by_checkpoint = load(tmp_path / "pack", mmap=True), load(gemma3n, precision="int4", mmap=False)
    assert isinstance(by_pack.source, Pack)
    ids = some_ids(by_pack)
    assert np.array_equal(by_pack.logits(ids), by_checkpoint.logits(ids))
    assert by_pack.engine.weights.files, "panels are mapped"
    assert not by_checkpoint.engine.weights.files, "panels are read"


# Memory


def mapped_bytes(file: str) -> int:
    """Resident bytes of this process's mappings of a file."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ", 1)[0]:
            inside = line.endswith(file)
        elif inside and line.startswith("Rss:"):
            found += int(line.split()[1]) * 1024
    return found


@pytest.mark.parametrize("part", ["full", "half", "quarter+skip-first-shared"])
def test_no_page_beside_the_slice_is_resident(folders: Folder, load: Load, part: str) -> None:
    session = load(folders("gemma-3n-E2B"), precision="int8", slice=part, mmap=True)
    files = session.engine.weights.files
    assert files
    for path, file in files.items():
        Path(path).read_bytes()  # cached, so that the kernel could map more than was asked for
        assert mapped_bytes(path) == sum(stop - start for start, stop in file.merged())
    session.logits(some_ids(session))
    for path, file in files.items():
        assert mapped_bytes(path) == sum(stop - start for start, stop in file.merged())


@pytest.mark.parametrize("precision", ["float32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("part", ["full", "half", "ffn=100x6,52x5,128x1"])
def test_what_is_held_is_what_was_planned(gemma3n: Path, load: Load, part: str, precision: str) -> None:
    session = load(gemma3n, precision=precision, slice=part, kv="auto")
    planned, engine = session.plan.bytes, session.engine
    held = sum(nbytes for _, nbytes in engine.weights.ranges())
    # Whole pages are held, of each file and of the memory beside; where a matrix is cut, two more are counted.
    cut = 2 * 2 * len(session.model.layers) if part != "full" and precision in BITS else 0
    assert abs(planned["weights"] - held) <= 4096 * (cut + 2 * len(engine.weights.files) + 1)
    assert engine.cache.nbytes == planned["kv"]
    assert engine.arena.floats * 4 < planned["activations"]
    assert session.ledger.held() == session.ledger.planned == planned
    assert set(engine.weights.named) == set(tensors(session.model)) - {PLE_TABLE}


def test_a_file_that_became_shorter_is_an_error(gemma3n: Path, tmp_path: Path) -> None:
    with closing(open_source(gemma3n)) as source:
        write_pack(source, tmp_path / "pack", ("int8",))
    pack = Pack.open(tmp_path / "pack")
    part, recipe = full(pack.model), recipes("int8")[0]
    tensors_of = kept(pack.model, part, pack.model)
    weights = tmp_path / "pack" / "int8" / "weights.safetensors"
    os.truncate(weights, 9000)
    with pytest.raises(ReadFailed, match=r"weights\.safetensors"):
        load_weights(pack, tensors_of, parts(pack.model, part), recipe, Ledger(None, {}), lambda *_: None, True)
    pack.close()


def test_ranges_become_whole_pages_side_by_side(tmp_path: Path) -> None:
    import mmap

    size = mmap.PAGESIZE
    path = tmp_path / "file"
    path.write_bytes(bytes(8 * size + 10))
    with path.open("rb") as file:
        found = Mapped(str(path), mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ))
    found.ranges = [
        (5 * size + 1, 6 * size),
        (10, 20),
        (size + 5, 2 * size + 5),
        (2 * size + 5, 3 * size),
        (8 * size, 8 * size + 10),
    ]
    assert list(found.merged()) == [(0, 3 * size), (5 * size, 6 * size), (8 * size, 9 * size)]
    done: list[int] = []
    found.prefault(done.append)
    assert sum(done) == 5 * size


def test_progress_looks_at_the_budget_while_it_loads(gemma3n: Path) -> None:
    seen: list[str] = []

    def notify(what: str, done: int, total: int) -> None:
        assert 0 <= done <= total
        seen.append(what)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        edge.load(gemma3n, engine="native", precision="float32", context=16, notify=notify)
    assert seen


@pytest.mark.parametrize("name", NAMES)
def test_the_arena_is_priced_without_compiling_the_model(name: str) -> None:
    raw = real(name)
    model = parse(raw)
    table = tensors(model)
    for precision in ("bf16", "int4"):
        recipe = recipes(precision)[0]

        def stored(tensor: str, recipe: Any = recipe) -> str:
            return "int8" if tensor == PLE_TABLE else stored_as(tensor, table[tensor], recipe)

        size = price_native.essence(model).size(stored)
        whole = compiled(model, stored, "last")
        slots = [capacity(layer.attention, 4096, 64) for layer in model.layers]
        found = size.row * 64 + size.one + price_native.scratch_floats(model, 4096, 64)
        assert found == pytest.approx(whole.arena_floats(64, slots.__getitem__), rel=0.02)
        assert size.steps == pytest.approx(len(whole.steps), rel=0.2)


def test_plans_of_a_large_matformer_share_programs() -> None:
    price_native.sized.cache_clear()
    source = open_source(CONFIGS / "gemma-3n-E4B.json", shapes=True)
    plans = enumerate_plans(source, Request(budget=3 << 30, engine="native"), Floor(50 << 20))
    assert len(plans) > 1000
    assert {plan.engine for plan in plans} == {"native"}
    assert price_native.sized.cache_info().misses <= 12
