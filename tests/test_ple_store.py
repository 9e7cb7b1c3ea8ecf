"""Per-layer embeddings from memory and from storage: the same bits, counted exactly, and never garbage.

A row that cannot be read is an error at the token that needed it; the next one works again.
"""

from __future__ import annotations

import errno
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import edge
from edge.engine.torch_ple import open_rows
from edge.store.ple import READERS, Counters, MemoryTable, StreamedTable, in_table
from loaders.checkpoint import RAW, Checkpoint
from loaders.errors import ReadFailed
from loaders.formats.buffers import to_float32
from loaders.network.matformer import Part, parts
from loaders.network.tensors import PLE_TABLE
from loaders.slices import named
from loaders.weights import fill
from tests.small import ROWS, Clone, built, clone_fixture, gemma3n_fixture  # noqa: F401

OUTSIDE = [-1, ROWS, ROWS + 1, -(2**63), 2**63 - 1, 2**31]
WAIT = 20.0


@cache
def opened(name: str) -> Checkpoint:
    return Checkpoint.open(built(name))


def part_of(checkpoint: Checkpoint, slice: str = "full") -> Part:
    return parts(checkpoint.model, named(checkpoint.model, slice))[PLE_TABLE]


def streamed(checkpoint: Checkpoint, rows: int = 8, slice: str = "full") -> StreamedTable:
    """A table with a cache for ``rows`` rows."""
    part, tensor = part_of(checkpoint, slice), checkpoint.where[PLE_TABLE].plain
    return StreamedTable(checkpoint.shards, tensor, part.window, rows * part.window.shape[1] * tensor.itemsize)


def in_memory(checkpoint: Checkpoint, slice: str = "full") -> MemoryTable:
    part = part_of(checkpoint, slice)
    dtype = checkpoint.where[PLE_TABLE].dtype
    raw = np.empty(part.window.shape, RAW[dtype])
    fill(checkpoint, part, dtype, raw)
    return MemoryTable(raw)


def truth(checkpoint: Checkpoint, slice: str = "full") -> np.ndarray:
    """The table's columns, cut by numpy from the whole of it."""
    keep = named(checkpoint.model, slice).keep
    whole = checkpoint.read_raw(PLE_TABLE)
    return whole.reshape(ROWS, len(checkpoint.model.layers), -1)[:, list(keep)].reshape(ROWS, -1)


def at(ids: list[int]) -> np.ndarray:
    return np.asarray(ids, np.int64)


@pytest.fixture(name="table")
def table_fixture() -> Iterator[StreamedTable]:
    table = streamed(opened("gemma3n"))
    yield table
    table.close()


Preadv = Callable[..., int]


class Disk:
    """Stands in for ``os.preadv``: counts, and fails, shortens or waits when told to."""

    def __init__(self) -> None:
        self.real: Preadv = os.preadv
        self.calls: list[tuple[int, int]] = []
        self.threads: set[str] = set()
        self.fail_at: int | None = None
        self.error = errno.EIO
        self.most: int | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.lock = threading.Lock()

    def __call__(self, fd: int, buffers: list[Any], offset: int) -> int:
        with self.lock:
            self.calls.append((offset, len(buffers[0])))
            self.threads.add(threading.current_thread().name)
            broken = self.fail_at is not None and len(self.calls) > self.fail_at
        self.entered.set()
        assert self.gate.wait(WAIT)
        if broken and self.error:
            raise OSError(self.error, os.strerror(self.error))
        if broken:
            return 0
        return self.real(fd, [buffers[0][: self.most]], offset)


@pytest.fixture(name="disk")
def disk_fixture(monkeypatch: pytest.MonkeyPatch) -> Disk:
    disk = Disk()
    monkeypatch.setattr(os, "preadv", disk)
    return disk


# The same bits


@pytest.mark.parametrize("name", ["gemma3n", "gemma3n-bf16"])
@pytest.mark.parametrize("slice", ["full", "skip-first-shared", "skip=0", "skip=1,6-8,11"])
def test_every_row_is_the_same_from_every_tier(name: str, slice: str) -> None:
    checkpoint = opened(name)
    expected = truth(checkpoint, slice)
    ids = at([*range(ROWS), *OUTSIDE, 0, ROWS - 1, 5, 5])
    wanted = expected[[*range(ROWS), *[0] * len(OUTSIDE), 0, ROWS - 1, 5, 5]]
    table = streamed(checkpoint, 8, slice)
    for found in (in_memory(checkpoint, slice).rows(ids), table.rows(ids), table.rows(ids[::-1])[::-1]):
        assert found.dtype == expected.dtype
        assert np.array_equal(found, wanted)
    one_by_one = np.concatenate([table.rows(ids[i : i + 1]) for i in range(0, len(ids), 7)])
    assert np.array_equal(one_by_one, wanted[::7])
    table.close()


def test_rows_differ_so_a_neighbour_would_be_noticed() -> None:
    expected = truth(opened("gemma3n"))
    assert len(np.unique(expected, axis=0)) == ROWS


def test_ids_outside_the_table_use_the_padding_row() -> None:
    ids = at([-1, 0, ROWS - 1, ROWS, *OUTSIDE])
    assert in_table(ids, ROWS).tolist() == [0, 0, ROWS - 1, 0, *[0] * len(OUTSIDE)]


def test_no_ids_no_rows(table: StreamedTable) -> None:
    for source in (table, in_memory(opened("gemma3n"))):
        assert source.rows(at([])).shape == (0, table.width)
    assert table.counters == Counters()


def test_memory_answers_everything(gemma3n: Path) -> None:
    memory = in_memory(opened("gemma3n"))
    memory.prefetch([1, 2])
    memory.rows(at([3, 3, 4]))
    memory.close()
    assert memory.counters == Counters(rows=3, hits=3)
    assert memory.counters.hit_rate == 1.0
    assert gemma3n.is_dir()


# Counted exactly


class Naive:
    """The cache as a story: most recent last, one read per distinct row that is not there."""

    def __init__(self, room: int, row_bytes: int) -> None:
        self.room, self.row_bytes = room, row_bytes
        self.held: OrderedDict[int, None] = OrderedDict()
        self.rows_asked = self.hits = self.read = 0

    def take_in(self, row: int) -> None:
        self.read += self.row_bytes
        self.held[row] = None
        self.held.move_to_end(row)
        if len(self.held) > self.room:
            self.held.popitem(last=False)

    def rows(self, ahead: list[int], ids: list[int]) -> None:
        """A batch; what was read ahead of it and fits the cache comes first, and is no hit."""
        arrived = [row for row in distinct(ahead) if row not in self.held]
        arrived = arrived if len(arrived) <= self.room else []
        for row in arrived:
            self.take_in(row)
        missing = [row for row in distinct(ids) if row not in self.held]
        for row in distinct(ids):
            if row not in missing:
                self.held.move_to_end(row)
        self.rows_asked += len(ids)
        self.hits += len(ids) - len(missing) - len(arrived)
        for row in missing:
            self.take_in(row)


def distinct(ids: list[int]) -> list[int]:
    return sorted({i if 0 <= i < ROWS else 0 for i in ids})


IDS = st.one_of(st.integers(0, 15), st.integers(0, ROWS - 1), st.sampled_from(OUTSIDE))
STEPS = st.lists(st.tuples(st.lists(IDS, max_size=6), st.lists(IDS, min_size=1, max_size=40)), min_size=1, max_size=10)


@settings(max_examples=120, deadline=None)
@given(steps=STEPS, room=st.integers(1, 20), slice=st.sampled_from(["full", "skip=1,6-8,11"]))
def test_rows_and_counters_follow_the_story(steps: list[tuple[list[int], list[int]]], room: int, slice: str) -> None:
    """Each step reads some ids ahead, then asks for them among others."""
    checkpoint = opened("gemma3n")
    expected, table = truth(checkpoint, slice), streamed(checkpoint, room, slice)
    naive, before = Naive(room, table.row_bytes), checkpoint.shards.bytes_read
    try:
        for ahead, others in steps:
            ids = [*others, *ahead]
            table.prefetch(ahead)
            found = table.rows(at(ids))
            naive.rows(ahead, ids)
            assert np.array_equal(found, expected[in_table(at(ids), ROWS)])
            assert list(table.slots) == list(naive.held)
            assert len(table.slots) <= room
            assert len(set(table.slots.values())) == len(table.slots)
            counters = table.counters
            assert (counters.rows, counters.hits, counters.bytes_read) == (naive.rows_asked, naive.hits, naive.read)
        assert table.cache.nbytes == room * table.row_bytes
    finally:
        table.close()
    assert checkpoint.shards.bytes_read - before == naive.read, "what is counted is what was read"


@pytest.mark.parametrize("cache_bytes", [384, 385, 767, 768, 10_000, 15_168])
def test_the_cache_keeps_within_its_bytes(cache_bytes: int) -> None:
    checkpoint = opened("gemma3n")
    table = StreamedTable(checkpoint.shards, checkpoint.where[PLE_TABLE].plain, part_of(checkpoint).window, cache_bytes)
    table.rows(np.arange(ROWS))
    assert table.cache.nbytes <= cache_bytes
    assert table.cache.nbytes == len(table.slots) * table.row_bytes
    table.close()


def test_one_read_per_row_and_not_a_byte_more(table: StreamedTable, disk: Disk) -> None:
    start = table.tensor.offset
    table.rows(at([7, 9, 7, 200]))
    assert sorted(disk.calls) == [(start + row * 384, 384) for row in (7, 9, 200)]
    table.rows(at([200, 9]))
    assert len(disk.calls) == 3
    assert table.counters.hit_rate == pytest.approx(3 / 6)
    table.rows(at([31, 30, 29]))
    assert disk.calls[3:] == [(start + 29 * 384, 3 * 384)], "neighbours are one read"


def test_a_slice_reads_only_its_own_columns(disk: Disk) -> None:
    table = streamed(opened("gemma3n"), slice="skip=1,6-8,11")
    table.rows(at([7]))
    # Layers 0, 2-5, 9-10 of 32 bytes each: three runs.
    start = table.tensor.offset + 7 * 384
    assert disk.calls == [(start, 32), (start + 64, 128), (start + 288, 64)]
    assert table.counters.bytes_read == table.row_bytes == 224
    table.close()


# Many rows at once, and one ahead


@pytest.fixture(name="advice", params=["advice", "no advice"])
def advice_fixture(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """With and without a kernel that takes advice on what will be read."""
    if request.param == "no advice":
        monkeypatch.delattr(os, "posix_fadvise", raising=False)
    return request.param == "advice"


def test_a_long_prompt_is_read_once(disk: Disk, advice: bool) -> None:
    checkpoint = opened("gemma3n")
    table, expected = streamed(checkpoint, ROWS, "skip=1,6-8,11"), truth(checkpoint, "skip=1,6-8,11")
    ids = np.random.default_rng(0).integers(0, ROWS, 400)
    disk.calls = []
    assert np.array_equal(table.rows(ids), expected[ids])
    unique = len(np.unique(ids))
    assert len(disk.calls) == 3 * unique, "three runs of columns"
    assert table.counters.hits == 400 - unique
    assert table.counters.bytes_read == unique * table.row_bytes
    table.close()


def test_the_kernel_is_told_of_all_rows_before_one_is_awaited(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    table, told, real = streamed(opened("gemma3n"), ROWS), [], os.posix_fadvise

    def advise(fd: int, offset: int, length: int, what: int) -> None:
        if what == os.POSIX_FADV_WILLNEED:
            assert disk.calls == [], "asked for before anything is waited for"
            told.append((offset, length))
        real(fd, offset, length, what)

    monkeypatch.setattr(os, "posix_fadvise", advise)
    table.rows(np.arange(100, 164, 2))
    start = table.tensor.offset
    assert told == disk.calls == [(start + row * 384, 384) for row in range(100, 164, 2)]
    table.close()


def test_a_kernel_that_refuses_advice_is_read_from_all_the_same(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "posix_fadvise", refuse)
    table = streamed(opened("gemma3n"), ROWS)
    assert np.array_equal(table.rows(np.arange(100, 164, 2)), truth(opened("gemma3n"))[100:164:2])
    assert len(disk.calls) >= 32
    table.close()


def test_without_advice_many_rows_are_awaited_at_the_same_time(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows are read here; many by eight threads, which all stand before the disk together."""
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    table, together, met = streamed(opened("gemma3n"), ROWS), threading.Barrier(READERS), threading.local()
    expected, real = truth(opened("gemma3n")), disk.real
    disk.threads.clear()
    table.rows(at([1, 5, 9]))
    assert disk.threads == {"MainThread"}

    def meet(fd: int, buffers: list[Any], offset: int) -> int:
        if not hasattr(met, "yes"):
            met.yes = together.wait(WAIT) >= 0
        return real(fd, buffers, offset)

    disk.real = meet
    assert np.array_equal(table.rows(np.arange(100, 164, 2)), expected[100:164:2])
    assert len(disk.threads) == 1 + READERS
    table.close()


def test_what_was_read_ahead_is_not_read_again(table: StreamedTable, disk: Disk) -> None:
    """It is no hit either, the first time: it did cost a read."""
    table.prefetch([42])
    table.rows(at([42]))
    assert (table.counters.rows, table.counters.hits, table.counters.bytes_read) == (1, 0, 384)
    assert len(disk.calls) == 1
    table.prefetch([42])
    table.rows(at([42]))
    assert (table.counters.rows, table.counters.hits, table.counters.bytes_read) == (2, 1, 384)
    assert len(disk.calls) == 1
    assert "MainThread" not in disk.threads


def test_more_than_the_cache_holds_is_not_read_ahead(table: StreamedTable, disk: Disk) -> None:
    table.prefetch(list(range(0, 18, 2)))
    assert table.pending is None
    assert disk.calls == []
    table.prefetch(list(range(0, 16, 2)))
    table.rows(np.arange(0, 16, 2))
    assert len(disk.calls) == 8


def test_rows_do_not_wait_for_others_that_are_read_ahead(table: StreamedTable, disk: Disk) -> None:
    """A chunk of a prompt asks for its rows while those of the next chunk are on their way."""
    expected, start, slow, real = truth(opened("gemma3n")), table.tensor.offset, threading.Event(), disk.real

    def late(fd: int, buffers: list[Any], offset: int) -> int:
        if offset == start + 100 * 384:
            assert slow.wait(WAIT)
        return real(fd, buffers, offset)

    disk.real = late
    table.prefetch([100])
    asked = threading.Thread(target=lambda: table.rows(at([3])))
    asked.start()
    asked.join(2)
    waited = asked.is_alive()
    slow.set()
    asked.join(WAIT)
    assert np.array_equal(table.rows(at([100])), expected[[100]])
    assert not waited


def test_an_error_ahead_is_not_the_error_of_rows_that_are_fine(table: StreamedTable, disk: Disk) -> None:
    expected = truth(opened("gemma3n"))
    table.rows(at([3]))
    disk.calls, disk.fail_at = [], 0
    table.prefetch([100])
    assert np.array_equal(table.rows(at([3])), expected[[3]])
    with pytest.raises(ReadFailed):
        table.rows(at([100]))


def test_only_the_wait_for_a_prefetch_is_waited(table: StreamedTable, disk: Disk) -> None:
    disk.gate.clear()
    table.prefetch([42])
    assert disk.entered.wait(WAIT), "the read starts at once"
    assert table.counters.rows == 0
    disk.gate.set()
    assert np.array_equal(table.rows(at([42])), truth(opened("gemma3n"))[[42]])
    assert table.counters.wait_s > 0


# Faults


@pytest.mark.parametrize("error", [errno.EIO, errno.ENODEV, errno.ESTALE, 0])
@pytest.mark.parametrize("ids", [[3], list(range(50, 190, 2))], ids=["one", "many"])
def test_a_failing_read_is_an_error_and_the_next_one_works(
    table: StreamedTable, disk: Disk, error: int, ids: list[int]
) -> None:
    """0 is the end of the file: a read that returns nothing."""
    expected = truth(opened("gemma3n"))
    table.rows(at([1, 2]))
    for fail_at in (0, len(ids) - 1):
        disk.calls, disk.fail_at, disk.error = [], fail_at, error
        with pytest.raises(ReadFailed) as failed:
            table.rows(at([1, *ids]))
        assert failed.value.exit_code == 74
        assert "model.safetensors" in str(failed.value)
        disk.fail_at = None
        assert np.array_equal(table.rows(at([2, 1])), expected[[2, 1]]), "what is held is untouched"
    assert np.array_equal(table.rows(at(ids)), expected[ids])


@pytest.mark.parametrize("most", [1, 100, 383])
def test_partial_reads_are_gone_on_with(table: StreamedTable, disk: Disk, most: int) -> None:
    expected = truth(opened("gemma3n"))
    disk.calls, disk.most = [], most
    assert np.array_equal(table.rows(at([3, 5])), expected[[3, 5]])
    assert len(disk.calls) == 2 * -(-384 // most)
    table.prefetch([7])
    assert np.array_equal(table.rows(at([7])), expected[[7]])


@pytest.mark.parametrize("error", [errno.EIO, 0])
def test_a_failed_prefetch_surfaces_at_the_token_that_needed_it(table: StreamedTable, disk: Disk, error: int) -> None:
    disk.fail_at, disk.error = 0, error
    table.prefetch([42])
    disk.entered.wait(WAIT)
    assert table.pending is not None
    with pytest.raises(ReadFailed) as failed:
        table.rows(at([42]))
    assert failed.value.exit_code == 74
    disk.fail_at = None
    assert np.array_equal(table.rows(at([42])), truth(opened("gemma3n"))[[42]])
    assert (table.counters.rows, table.counters.hits) == (1, 0)


@pytest.mark.parametrize("opened_before", [True, False])
def test_a_file_cut_while_running_is_an_error_not_garbage(gemma3n: Path, clone: Clone, opened_before: bool) -> None:
    folder = clone(gemma3n)
    checkpoint = Checkpoint.open(folder)
    table, expected = streamed(checkpoint), truth(opened("gemma3n"))
    if opened_before:
        assert np.array_equal(table.rows(at([0])), expected[[0]])
    os.truncate(folder / "model.safetensors", table.tensor.offset + 100 * 384 + 17)
    for ids in ([ROWS - 1], [100], list(range(90, 200))):
        with pytest.raises(ReadFailed, match=r"model\.safetensors") as failed:
            table.rows(at(ids))
        assert failed.value.exit_code == 74
    if opened_before:
        assert np.array_equal(table.rows(at([0, 99])), expected[[0, 99]]), "what is still there can be read"
    table.close()
    checkpoint.close()


def test_a_file_replaced_while_running_is_not_read(gemma3n: Path, clone: Clone) -> None:
    folder = clone(gemma3n)
    checkpoint = Checkpoint.open(folder)
    table = streamed(checkpoint)
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").write_bytes(data[::-1])
    with pytest.raises(ReadFailed, match="changed since it was opened"):
        table.rows(at([3]))
    table.close()


def test_closing_waits_for_the_read_under_way_and_leaves_no_thread(disk: Disk) -> None:
    before, table = threading.enumerate(), streamed(opened("gemma3n"))
    disk.gate.clear()
    table.prefetch([1])
    assert disk.entered.wait(WAIT)
    closing = threading.Thread(target=table.close)
    closing.start()
    disk.gate.set()
    closing.join(WAIT)
    assert not closing.is_alive()
    assert table.pending is None
    assert not [thread for thread in threading.enumerate() if thread not in before]
    table.close()


# Giving memory back


def test_a_streamed_table_gives_back_its_cache_and_finds_the_same_rows() -> None:
    checkpoint = opened("gemma3n")
    table, expected, ids = streamed(checkpoint, 40), truth(checkpoint), np.arange(100, 140)
    table.rows(ids)
    table.prefetch([7])
    before, read = table.cache.nbytes, table.counters.bytes_read
    assert table.relieve() == before - table.cache.nbytes == 35 * table.row_bytes
    assert np.array_equal(table.rows(at([7])), expected[[7]]), "what is on its way still arrives"
    assert np.array_equal(table.rows(ids), expected[ids])
    assert table.counters.bytes_read == read + 41 * table.row_bytes, "what was given up is read again"
    assert len(table.slots) == 5
    assert np.array_equal(table.rows(ids[-5:]), expected[ids[-5:]])
    assert table.counters.bytes_read == read + 41 * table.row_bytes, "what is left of the cache still caches"
    table.close()


def test_a_table_can_be_asked_again_and_again_and_keeps_what_reading_ahead_needs() -> None:
    checkpoint = opened("gemma3n")
    table, expected = streamed(checkpoint, 40), truth(checkpoint)
    assert [table.relieve() // table.row_bytes for _ in range(3)] == [35, 0, 0]
    for ids in ([3], [5, 3, 5, 200], list(range(ROWS))):
        table.prefetch(ids)
        assert np.array_equal(table.rows(at(ids)), expected[ids])
    assert table.cache.nbytes == 5 * table.row_bytes
    table.close()


def test_a_read_that_was_under_way_may_find_a_smaller_cache(table: StreamedTable, disk: Disk) -> None:
    disk.gate.clear()
    ids = list(range(0, 16, 2))
    table.prefetch(ids)
    assert disk.entered.wait(WAIT)
    table.relieve()
    disk.gate.set()
    assert np.array_equal(table.rows(at(ids)), truth(opened("gemma3n"))[ids])
    assert len(table.slots) == 1


def test_a_table_in_memory_has_nothing_to_give() -> None:
    memory, expected = in_memory(opened("gemma3n")), truth(opened("gemma3n"))
    assert memory.relieve() == 0
    assert np.array_equal(memory.rows(np.arange(ROWS)), expected)


# In a session


@pytest.mark.parametrize("name", ["gemma3n", "gemma3n-bf16"])
@pytest.mark.parametrize("slice", ["full", "skip=1,6-8,11"])
def test_rows_come_decoded_from_every_tier(name: str, slice: str) -> None:
    """float32 [t, layers, dim], whatever they are stored in; the same after they have given way."""
    checkpoint, ids = opened(name), at([7, *OUTSIDE, 0, ROWS - 1, 7])
    layers = len(named(checkpoint.model, slice).keep)
    wanted = to_float32(truth(checkpoint, slice), checkpoint.where[PLE_TABLE].dtype)[in_table(ids, ROWS)]
    for tier in ("device", "ram", "ssd"):
        rows = open_rows(checkpoint, part_of(checkpoint, slice), layers, tier, 10_000, torch.device("cpu"))
        for relieved in (False, True):
            found = rows.gather(ids)
            assert (found.dtype, tuple(found.shape)) == (torch.float32, (len(ids), layers, 8))
            assert np.array_equal(found.numpy().reshape(len(ids), -1), wanted)
            assert relieved or (rows.relieve() > 0) == (tier == "ssd")
        assert rows.counters.rows == 2 * len(ids)
        rows.close()


@pytest.mark.parametrize("precision", ["float32", "int8", "int4"])
def test_a_session_that_gives_memory_back_says_the_same(gemma3n: Path, precision: str) -> None:
    with edge.load(gemma3n, context=64, ple="ssd", precision=precision) as session:
        whole = said(session)
        session.reset()
        events = session.generate("once upon a time", max_tokens=12)
        found = [next(events).token for _ in range(4)]
        table = session.engine.rows.table
        before = table.cache.nbytes
        assert session.engine.relieve() == before - table.cache.nbytes > 0
        found += [event.token for event in events][:-1]
        assert found == whole
    with edge.load(gemma3n, context=64, ple="ssd", precision=precision) as session:
        table = session.engine.rows.table
        session.watch.add_relief(session.relief)
        assert session.relief() is False, "a watch is told: later"
        before = table.cache.nbytes
        assert said(session) == whole
        assert table.cache.nbytes < before, "honoured before the next pass"


def said(session: Any, tokens: int = 12) -> list[int]:
    return [event.token for event in session.generate("once upon a time", max_tokens=tokens)][:-1]


def test_every_tier_writes_the_same_text(gemma3n: Path) -> None:
    found = {}
    for tier in ("ram", "ssd", "device"):
        with edge.load(gemma3n, context=64, ple=tier) as session:
            assert session.plan.ple == tier
            found[tier] = said(session)
            logits = session.logits(list(range(5, 45)))
            assert session.ple is not None
            assert (session.ple.bytes_read > 0) == (tier == "ssd")
            found[tier] = (found[tier], logits.tobytes())
    assert found["ram"] == found["ssd"] == found["device"]


def test_a_decoded_token_is_read_ahead(gemma3n: Path, disk: Disk) -> None:
    """While its text is on the way to the user: every read of a decoded token is the other thread's."""
    with edge.load(gemma3n, context=64, ple="ssd") as session:
        events = session.generate("once upon a time", max_tokens=12)
        first = next(events).token
        disk.threads.clear()
        tokens = [event.token for event in events][:-1]
        assert disk.threads
        assert "MainThread" not in disk.threads
        assert len({first, *tokens}) > 2, "a model that repeats itself would read nothing"


def test_a_long_prompt_reads_no_row_twice(gemma3n: Path) -> None:
    """Chunk by chunk, the next one's rows ahead: the counters see each distinct row once, and no hit that was none."""
    ids = np.random.default_rng(1).permutation(ROWS)[:36]
    with edge.load(gemma3n, context=64, ple="ssd") as session:
        session.engine.chunk = 8
        expected = session.logits(ids)[-1]
        session.engine.rows.table.slots.clear()
        before = session.ple.hits, session.ple.bytes_read
        found = session.step(ids)
        assert np.allclose(found, expected, atol=1e-4)
        assert session.ple.bytes_read - before[1] == 36 * 384
        assert session.ple.hits == before[0]


def test_an_error_while_generating_ends_the_answer_and_not_the_session(gemma3n: Path, disk: Disk) -> None:
    with edge.load(gemma3n, context=64, ple="ssd") as session:
        whole = said(session)
        session.reset()
        session.engine.rows.table.slots.clear()
        events = session.generate("once upon a time", max_tokens=12)
        first = [next(events).token for _ in range(3)]
        assert first == whole[:3]
        disk.calls, disk.fail_at = [], 0
        session.engine.rows.table.slots.clear()
        with pytest.raises(ReadFailed):
            list(events)
        disk.fail_at = None
        assert said(session) == whole
