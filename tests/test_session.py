"""The library: what ``edge.load`` promises in its docstrings, on two tiny models."""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

import edge
from edge import engine as engines
from edge.budget import machine
from edge.budget.memory import ProcessMemory
from edge.budget.plan import Floor
from edge.budget.pricing import logits_bytes
from edge.budget.watch import Watch
from edge.engine.torch_blocks import Blocks
from edge.generate import PIECE, Event, encode
from edge.session import Session
from edge.store.text import tokenizer_bytes
from loaders.checkpoint import Checkpoint
from loaders.errors import BadCheckpoint, EdgeError, MissingFile, OverBudget, Unsupported, Usage, WontFit
from loaders.formats.pack import Pack
from loaders.network.tensors import PLE_TABLE, tensors
from tests.small import ROWS, VOCAB, Clone, chatty_fixture, clone_fixture, gemma3n_fixture, llama_fixture  # noqa: F401

PROMPT = "once upon a time"
PLAN_KEYS = {"slice": str, "precision": str, "ple": str, "kv": str, "context": int, "chunk": int}
PLAN_KEYS |= {"engine": str, "device": str, "bytes": dict, "total_bytes": int}
Load = Callable[..., Session]


@pytest.fixture(name="load")
def load_fixture(gemma3n: Path) -> Iterator[Load]:
    """``edge.load`` of the Gemma 3n checkpoint, or of another, with a short context; closed in the end."""
    sessions: list[Session] = []

    def load(folder: Path = gemma3n, **options: Any) -> Session:
        sessions.append(edge.load(folder, **{"context": 64, **options}))
        return sessions[-1]

    yield load
    for session in sessions:
        session.close()


def tokens(events: Iterator[Event] | list[Event]) -> list[int]:
    return [event.token for event in events if event.token is not None]


def text(events: Iterator[Event]) -> str:
    return "".join(event.text for event in events)


def some_ids(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(5, VOCAB, count).tolist()


@contextmanager
def uninterrupted() -> Iterator[None]:
    """A KeyboardInterrupt that nobody pressed a key for fails the test instead of ending the whole run."""
    try:
        yield
    except KeyboardInterrupt:
        pytest.fail("a library call raised KeyboardInterrupt")


# The plan


def test_the_plan_is_data(load: Load) -> None:
    plan = load().plan
    assert {key: type(plan[key]) for key in PLAN_KEYS} == PLAN_KEYS
    assert dict(plan) == plan.as_dict() == json.loads(json.dumps(dict(plan)))
    assert len(plan) == len(list(plan)) == len(plan.as_dict())
    assert (plan["slice"], plan["context"], plan["engine"], plan["device"]) == ("full", 64, "native", "cpu")
    assert plan["total_bytes"] == sum(plan["bytes"].values())
    with pytest.raises(KeyError):
        plan["nothing"]


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("tier", ["ram", "ssd"])
@pytest.mark.parametrize("slice", ["full", "half+skip-first-shared", "ffn=100x6,52x5,128x1"])
def test_what_is_held_is_what_was_planned(load: Load, precision: str, tier: str, slice: str) -> None:
    session = load(engine="torch", precision=precision, ple=tier, slice=slice)
    planned, engine = session.plan.bytes, session.engine
    assert sum(w.nbytes for w in engine.weights.values()) == planned["weights"] == session.ledger.held()["weights"]
    assert set(engine.weights) == set(tensors(session.model)) - {PLE_TABLE}
    assert sum(k.nbytes + v.nbytes for k, v in engine.cache.layers.values()) == planned["kv"]
    table = engine.rows.table
    if tier == "ram":
        assert table.raw.nbytes == planned["ple"] == ROWS * len(session.model.layers) * 8 * 4
    else:
        assert planned["ple"] - table.row_bytes < table.cache.nbytes <= planned["ple"]
    assert session.ledger.held() == session.ledger.planned == planned
    assert {w.dtype for n, w in engine.weights.items() if len(w.shape) == 1} == {torch.float32}
    assert session.source is session.checkpoint


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("tier", ["ram", "ssd"])
@pytest.mark.parametrize("slice", ["full", "half+skip-first-shared", "ffn=96x6,64x5,128x1"])
def test_what_is_held_quantized_is_what_was_planned(load: Load, precision: str, tier: str, slice: str) -> None:
    session = load(engine="torch", precision=precision, ple=tier, slice=slice)
    planned, engine, table = session.plan.bytes, session.engine, session.engine.rows.table
    assert sum(w.nbytes for w in engine.weights.values()) == planned["weights"] == session.ledger.held()["weights"]
    assert set(engine.weights) == set(tensors(session.model)) - {PLE_TABLE}
    row = len(session.model.layers) * (2 + 8)
    if tier == "ram":
        assert table.raw.nbytes == planned["ple"] == ROWS * row
    else:
        assert planned["ple"] - row < table.cache.nbytes <= planned["ple"]
    assert session.ledger.held() == session.ledger.planned == planned
    kinds = {w.bits if isinstance(w, Blocks) else w.dtype for w in engine.weights.values()}
    assert kinds == {torch.float32, torch.bfloat16, *((8, 4) if precision == "int4" else (8,))}
    assert isinstance(session.checkpoint, Checkpoint)
    assert isinstance(session.source, Pack)
    assert session.source.folder.is_relative_to(os.environ["EDGE_CACHE"])


def test_a_plain_model_is_held_as_planned(load: Load, llama: Path) -> None:
    session = load(llama, engine="torch")
    assert sum(w.nbytes for w in session.engine.weights.values()) == session.plan.bytes["weights"]
    assert session.bytes_per_token == session.plan.bytes["weights"] - VOCAB * 64 * 4, "one row of the embedding is read"
    assert session.ple is None
    assert session.plan.ple == "none"


# Logits and steps


@pytest.mark.parametrize("which", ["gemma3n", "llama"])
def test_steps_and_logits_agree_however_the_ids_are_cut(load: Load, which: str, request: Any) -> None:
    session = load(request.getfixturevalue(which), precision="float32")
    ids = some_ids(40)
    logits = session.logits(ids)
    assert logits.shape == (40, VOCAB)
    assert logits.dtype == np.float32
    assert np.isfinite(logits).all()
    tolerance = 1e-4 * np.abs(logits).max()
    at = 0
    for size in (1, 3, 1, 20, 15):
        out = session.step(ids[at : at + size])
        at += size
        assert out.shape == (VOCAB,)
        assert np.abs(out - logits[at - 1]).max() < tolerance
    session.reset()
    session.engine.chunk = 7
    assert np.abs(session.step(np.asarray(ids, np.int32)) - logits[-1]).max() < tolerance
    assert np.abs(session.logits(np.asarray(ids, np.uint16)) - logits).max() < tolerance


def test_logits_leave_the_cache_alone(load: Load) -> None:
    session, ids = load(precision="float32"), some_ids(20)
    session.step(ids[:10])
    session.logits(some_ids(30, seed=1))
    assert session.room == 54
    assert session.tokens == ids[:10]
    after = session.step(ids[10:])
    session.reset()
    assert session.room == 64
    assert np.array_equal(after, [session.step(ids[:10]), session.step(ids[10:])][1])


def test_reset_forgets_everything(load: Load) -> None:
    session, ids = load(), some_ids(30)
    first = session.step(ids)
    session.step(some_ids(34, seed=2))
    assert session.room == 0
    session.reset()
    assert np.array_equal(session.step(ids), first)


BAD_IDS = [
    [],
    [[1, 2]],
    [-1],
    [VOCAB],
    [5, 2**40],
    [1.5],
    [True],
    ["a"],
    5,
    None,
    np.zeros(3),
    np.zeros((0,), np.int64),
]


@pytest.mark.parametrize("ids", BAD_IDS, ids=repr)
def test_ids_that_cannot_be_are_refused_and_nothing_is_lost(load: Load, ids: Any) -> None:
    session = load()
    before = session.step(some_ids(5))
    for call in (session.logits, session.step):
        with pytest.raises(Usage) as refused:
            call(ids)
        assert refused.value.exit_code == 2
        assert "ids" in str(refused.value)
    assert session.room == 59
    session.reset()
    assert np.array_equal(session.step(some_ids(5)), before)


def test_more_than_the_context_is_refused_and_the_rest_still_fits(load: Load) -> None:
    session = load()
    with pytest.raises(Usage, match="65 tokens"):
        session.logits(some_ids(65))
    session.step(some_ids(60))
    with pytest.raises(Usage, match=r"5 tokens .*at most 4"):
        session.step(some_ids(5))
    assert session.step(some_ids(4)).shape == (VOCAB,)
    with pytest.raises(Usage, match="at most 0"):
        session.step([5])
    assert session.logits(some_ids(64)).shape == (64, VOCAB)


# Text


def test_events_tell_the_whole_story(load: Load) -> None:
    session = load()
    events = list(session.generate(PROMPT, max_tokens=10))
    *said, last = events
    prompt = len(session.tokenizer.encode(PROMPT))
    assert [event.index for event in events] == list(range(11))
    assert all(isinstance(event.token, int) and event.finish is None for event in said)
    assert (last.token, last.finish) == (None, "length")
    assert all(isinstance(event.text, str) for event in events)
    timing = last.timing
    assert (timing.prompt_tokens, timing.cached_tokens, timing.new_tokens) == (prompt, 0, 10)
    assert 0 < timing.ttft_s == timing.prefill_s
    assert timing.prefill_tps == pytest.approx(prompt / timing.prefill_s)
    assert timing.decode_tps == pytest.approx(9 / timing.decode_s)
    assert timing.read_gbps == pytest.approx(timing.decode_tps * session.plan.bytes["weights"] / 1e9)


@pytest.mark.parametrize("most", [100, 40_000])
def test_of_a_prompt_far_too_long_only_the_beginning_is_encoded(most: int) -> None:
    class Stub:
        def __init__(self) -> None:
            self.seen: list[int] = []

        def encode(self, text: str) -> list[int]:
            self.seen.append(len(text))
            return [0] * (len(text) // 4)

    stub = Stub()
    assert most < len(encode(stub, "x" * 10_000_000, most)) <= 2 * most + PIECE  # type: ignore[arg-type]
    assert max(stub.seen) <= 8 * most + PIECE
    assert len(encode(stub, "x" * 60_000, most)) == 15_000  # type: ignore[arg-type]


def test_streamed_text_is_the_decoded_text_and_splits_no_character(load: Load) -> None:
    """Random weights write random bytes: characters that never complete become U+FFFD, once and not early."""
    session, broken = load(), 0
    for seed in range(6):
        events = list(session.generate(PROMPT, max_tokens=50, temperature=2.0, seed=seed))
        whole = session.tokenizer.decode(tokens(events))
        assert "".join(event.text for event in events) == whole
        assert all(event.text.encode() for event in events if event.text)
        broken += "\ufffd" in whole
    assert broken, "none of these texts would have noticed"


def test_a_character_in_pieces_comes_out_whole(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    session = load()
    wanted = session.tokenizer.encode("a🎉b 日本", bos=False)
    assert len(wanted) > 5
    script = iter(wanted)
    monkeypatch.setattr("edge.sampling.Sampler.__call__", lambda self, logits, recent=(): next(script))
    events = list(session.generate(PROMPT, max_tokens=len(wanted)))
    assert text(iter(events)) == "a🎉b 日本"
    assert not any("\ufffd" in event.text for event in events)


def test_ids_are_as_good_as_text(load: Load) -> None:
    session = load()
    assert tokens(session.generate(session.tokenizer.encode(PROMPT), max_tokens=8)) == tokens(
        load().generate(PROMPT, max_tokens=8)
    )


def test_greedy_is_the_argmax_and_knows_no_seed(load: Load) -> None:
    session = load()
    found = tokens(session.generate(PROMPT, max_tokens=8, seed=1))
    ids = session.tokenizer.encode(PROMPT)
    logits = session.logits(ids + found)
    assert found == logits[len(ids) - 1 : -1].argmax(-1).tolist()
    for seed in (2, None):
        assert tokens(session.generate(PROMPT, max_tokens=8, seed=seed)) == found


def test_the_same_seed_says_the_same_and_another_does_not(load: Load) -> None:
    def sample(session: Session, seed: int) -> list[int]:
        return tokens(session.generate(PROMPT, max_tokens=16, temperature=1.0, top_k=40, top_p=0.95, seed=seed))

    session = load()
    first = [sample(session, seed) for seed in range(4)]
    assert [sample(session, seed) for seed in range(4)] == first
    assert [sample(load(), seed) for seed in range(4)] == first
    assert len({tuple(found) for found in first}) == 4


def test_a_stop_token_ends_the_answer_and_is_not_said(load: Load, gemma3n: Path, clone: Clone) -> None:
    found = tokens(load().generate(PROMPT, max_tokens=12))
    stop = next(token for i, token in enumerate(found) if i >= 3 and token not in found[:i])
    folder = clone(gemma3n)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, stop]}))
    session = load(folder)
    events = list(session.generate(PROMPT, max_tokens=12))
    assert tokens(events) == found[: found.index(stop)]
    assert (events[-1].finish, events[-1].token, events[-1].timing.new_tokens) == ("stop", None, found.index(stop))
    assert text(iter(events)) == session.tokenizer.decode(found[: found.index(stop)])


def test_a_full_context_ends_the_answer(load: Load) -> None:
    session = load(context=16)
    prompt = len(session.tokenizer.encode(PROMPT))
    events = list(session.generate(PROMPT, max_tokens=1000))
    assert events[-1].finish == "length"
    # The last token needs no place of its own.
    assert len(tokens(events)) == 16 - prompt + 1
    assert session.room == 0
    assert tokens(events) == tokens(load(context=64).generate(PROMPT, max_tokens=1000))[: len(tokens(events))]


def test_a_prompt_may_fill_the_context_but_not_pass_it(load: Load) -> None:
    session = load(context=16)
    events = list(session.generate(some_ids(16), max_tokens=5))
    assert (len(tokens(events)), events[-1].finish) == (1, "length")
    with pytest.raises(Usage, match="17 tokens") as refused:
        session.generate(some_ids(17))
    assert "--context" in str(refused.value)
    assert tokens(session.generate(some_ids(16), max_tokens=5)) == tokens(events)


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 0},
        {"max_tokens": -1},
        {"temperature": math.nan},
        {"temperature": -0.1},
        {"temperature": math.inf},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
        {"seed": -1},
        {"seed": 2**70},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused_at_once(load: Load, options: dict[str, Any]) -> None:
    session = load()
    with pytest.raises(Usage) as refused:
        session.generate(PROMPT, **options)
    assert next(iter(options)) in str(refused.value)
    assert "expected" in str(refused.value)
    assert len(tokens(session.generate(PROMPT, max_tokens=3))) == 3


@pytest.mark.parametrize("ids", [[], [-1], [VOCAB], ["a"], [2.7]], ids=repr)
def test_a_prompt_of_ids_that_cannot_be_is_refused(load: Load, ids: list[Any]) -> None:
    session = load()
    with pytest.raises(Usage):
        session.generate(ids, max_tokens=2)
    assert len(tokens(session.generate(PROMPT, max_tokens=2))) == 2


# The cache between prompts


def test_a_prompt_that_goes_on_reuses_the_cache_and_says_the_same(load: Load) -> None:
    session = load(precision="float32")
    start = session.tokenizer.encode(PROMPT)
    said = tokens(session.generate(start, max_tokens=8))
    longer = [*start, *said, *some_ids(5)]
    events = list(session.generate(longer, max_tokens=8))
    assert events[-1].timing.cached_tokens == len(start) + len(said) - 1
    assert events[-1].timing.prompt_tokens == len(longer)
    fresh = list(load(precision="float32").generate(longer, max_tokens=8))
    assert fresh[-1].timing.cached_tokens == 0
    assert tokens(events) == tokens(fresh)
    assert text(iter(events)) == text(iter(fresh))


@pytest.mark.parametrize("change", ["the same", "shorter", "another beginning"])
def test_a_prompt_that_does_not_go_on_starts_afresh(load: Load, change: str) -> None:
    session = load(precision="float32")
    start = session.tokenizer.encode(PROMPT)
    said = tokens(session.generate(start, max_tokens=8))
    prompt = {
        "the same": start,
        "shorter": start[:-2],
        "another beginning": [start[0], 9, *start[2:], *said, *some_ids(5)],
    }[change]
    events = list(session.generate(prompt, max_tokens=8))
    assert events[-1].timing.cached_tokens == 0
    assert tokens(events) == tokens(load(precision="float32").generate(prompt, max_tokens=8))


def test_an_answer_left_halfway_does_no_harm(load: Load) -> None:
    session = load(precision="float32")
    whole = tokens(session.generate(PROMPT, max_tokens=12))
    events = session.generate(PROMPT, max_tokens=12)
    begun = [next(events).token for _ in range(4)]
    del events
    assert begun == whole[:4]
    assert tokens(session.generate(PROMPT, max_tokens=12)) == whole
    session.step([7])
    assert tokens(session.generate(PROMPT, max_tokens=12)) == whole


# Cancelling


def test_cancel_ends_after_the_current_token(load: Load) -> None:
    session = load()
    whole = tokens(session.generate(PROMPT, max_tokens=12))
    events = []
    for event in session.generate(PROMPT, max_tokens=12):
        events.append(event)
        if event.index == 3:
            session.cancel()
    assert tokens(events) == whole[:4]
    assert (events[-1].finish, events[-1].index, events[-1].timing.new_tokens) == ("interrupted", 4, 4)
    assert text(iter(events)) == session.tokenizer.decode(whole[:4])
    assert tokens(session.generate(PROMPT, max_tokens=12)) == whole, "the next answer is not cancelled"


def test_cancel_from_another_thread(load: Load) -> None:
    session = load(context=2000)
    events = session.generate(PROMPT, max_tokens=2000)
    next(events)
    threading.Timer(0.1, session.cancel).start()
    rest = list(events)
    assert rest[-1].finish == "interrupted"
    assert len(rest) < 1900


def test_cancel_ends_a_prefill_after_the_current_chunk(load: Load) -> None:
    def cancel_at_ten(what: str, done: int, total: int) -> None:
        if what == "prefill" and 10 <= done < total:
            session.cancel()

    session = load(precision="float32", notify=cancel_at_ten)
    session.engine.chunk = 5
    with uninterrupted():
        events = list(session.generate(some_ids(30), max_tokens=3))
    assert [(event.token, event.text, event.finish) for event in events] == [(None, "", "interrupted")]
    assert session.tokens == some_ids(10)
    session.notify = lambda *_: None
    events = list(session.generate(some_ids(30), max_tokens=3))
    assert events[-1].timing.cached_tokens == 10, "what was read already is not read again"
    assert tokens(events) == tokens(load(precision="float32").generate(some_ids(30), max_tokens=3))


def test_cancel_with_nothing_running_cancels_nothing(load: Load) -> None:
    session = load()
    session.cancel()
    assert len(tokens(session.generate(PROMPT, max_tokens=3))) == 3
    session.cancel()
    session.reset()
    session.engine.chunk = 4
    with uninterrupted():
        assert session.step(some_ids(20)).shape == (VOCAB,)


# Budgets


@pytest.fixture(name="floor")
def floor_fixture(load: Load, monkeypatch: pytest.MonkeyPatch) -> Floor:
    """The floor as measured once: what other tests leave behind in this process must not move it."""
    floor = load().floor
    monkeypatch.setattr(engines.Runtime, "floor", lambda self: floor)
    return floor


def test_a_budget_is_kept_to_the_byte(load: Load, floor: Floor) -> None:
    with pytest.raises(WontFit) as refused:
        load(budget=floor.host)
    needed = refused.value.needed
    assert refused.value.exit_code == 80
    session = load(budget=needed)
    assert session.plan.total_bytes == needed == session.memory()["planned_bytes"]
    assert session.plan.bytes["runtime"] == floor.host
    assert len(tokens(session.generate(PROMPT, max_tokens=4))) == 4
    with pytest.raises(WontFit):
        load(budget=needed - 1)


def test_a_refusal_comes_before_anything_is_loaded(load: Load, floor: Floor, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("something was loaded")

    monkeypatch.setattr(engines, "load", never)
    with pytest.raises(WontFit):
        load(budget="1MB")
    with pytest.raises(AssertionError, match="something was loaded"):
        load(budget="2TB")


def test_a_budget_as_text_and_as_bytes(load: Load) -> None:
    assert load(budget="3GB").request.budget == load(budget=3 * 10**9).request.budget == 3_000_000_000
    assert load().request.budget is None


def test_logits_that_would_break_the_budget_are_not_computed(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    session = load(budget="3GB")
    rows = 60
    need = logits_bytes(session.source, session.model, session.plan, rows)
    assert need > rows * VOCAB * 4 + session.plan.bytes["kv"] * rows // session.plan.context

    def resident(nbytes: int) -> None:
        monkeypatch.setattr("edge.session.read_process", lambda: ProcessMemory(nbytes, nbytes, nbytes, 0, 0, 0))

    resident(3 * 10**9 - need)
    assert session.logits(some_ids(rows)).shape == (rows, VOCAB)
    resident(3 * 10**9 - need + 1)
    with pytest.raises(OverBudget) as stopped:
        session.logits(some_ids(rows))
    assert stopped.value.exit_code == 81
    assert "3.00 GB" in str(stopped.value)
    assert session.logits(some_ids(2)).shape == (2, VOCAB)
    assert session.step(some_ids(rows)).shape == (VOCAB,), "a step needs no more than was planned"


def test_memory_is_accounted_for(load: Load) -> None:
    session = load(budget="3GB")
    list(session.generate(PROMPT, max_tokens=4))
    memory = session.memory()
    assert memory["budget_bytes"] == 3_000_000_000
    assert memory["planned_bytes"] == session.plan.total_bytes
    assert 0 < memory["rss_bytes"] <= memory["peak_bytes"]
    assert memory["anonymous_bytes"] + memory["file_backed_bytes"] <= memory["rss_bytes"]
    assert memory["device_peak_bytes"] is None
    assert 0 < memory["pss_bytes"] <= memory["rss_bytes"]
    assert memory["components"] == {n: {"planned": b, "peak": b} for n, b in session.plan.bytes.items()}
    assert json.loads(json.dumps(memory)) == memory
    assert load().memory()["budget_bytes"] is None


def test_a_budget_that_is_passed_all_the_same_ends_the_answer(load: Load) -> None:
    """The watch has seen too much: the next pass is not made, and what was said until then stands."""
    session = load(budget="64GB", ple="ssd")
    whole = tokens(session.generate(PROMPT, max_tokens=8))
    session.reset()
    events = session.generate(PROMPT, max_tokens=8)
    said = [next(events).token for _ in range(3)]
    assert session.watch.budget == 64 * 10**9
    session.watch.stop()
    too_much = Watch(session.watch.budget, period=0.001, read=lambda: 65 * 10**9)
    too_much.add_relief(session.relief)
    session.watch = too_much.start()
    end = time.monotonic() + 20
    while not too_much.over and time.monotonic() < end:
        time.sleep(0.01)
    with pytest.raises(OverBudget) as stopped:
        list(events)
    assert stopped.value.exit_code == 81
    assert "65.0 GB" in str(stopped.value)
    assert "--budget" in str(stopped.value)
    assert said == whole[:3]
    with pytest.raises(OverBudget):
        session.step([5])


def test_a_session_without_a_budget_has_no_watch_thread_and_one_with_it_has(load: Load) -> None:
    def watched() -> bool:
        return any(thread.name == "edge-watch" for thread in threading.enumerate())

    assert load().watch.budget is None
    assert not watched()
    with edge.load(load().checkpoint.folder, context=64, budget="64GB"):
        assert watched()
    assert not watched()


def test_loading_stops_where_the_budget_is_passed(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two tensors: a plan that was wrong does not take the machine with it."""
    before, told = {thread.name for thread in threading.enumerate()}, []
    monkeypatch.setattr(Watch, "over", property(lambda self: bool(told)))
    monkeypatch.setattr(Watch, "peak", property(lambda self: 70 * 10**9))
    with pytest.raises(OverBudget):
        load(budget="64GB", notify=lambda *what: told.append(what))
    assert [what for what, *_ in told] == ["loading the table"]
    assert {thread.name for thread in threading.enumerate()} <= before


def test_the_floor_is_the_greater_of_what_is_remembered_and_what_is_seen(load: Load, floor: Floor) -> None:
    text = tokenizer_bytes(load().checkpoint)
    assert floor.tokenizer == text > 0
    for remembered, expected in ((floor.host + 5, floor.host + 5), (1, floor.host - text)):
        with pytest.MonkeyPatch.context() as patch:
            known = machine.Known(Floor(remembered), "native", "cpu")
            patch.setattr(machine, "known_floor", lambda engine, device, known=known: known)
            session = load(ple="ssd")
        assert session.floor == Floor(expected, 0, text)
        assert (session.plan.bytes["runtime"], session.plan.bytes["tokenizer"]) == (expected, text)


def test_a_smaller_budget_takes_a_smaller_model(load: Load, floor: Floor) -> None:
    """The table moves to storage first, then the slice shrinks; text still comes out."""
    full = load(budget="64GB", precision="float32").plan
    assert (full.slice, full.ple) == ("full", "ram")
    tight = load(budget=full.total_bytes - 1, precision="float32", ple="ram")
    assert (tight.plan.slice, tight.plan.chunk, tight.plan.kv) != ("full", full.chunk, full.kv)
    with pytest.raises(WontFit) as refused:
        load(budget=1, precision="float32")
    small = load(budget=refused.value.needed, precision="float32")
    assert (small.plan.slice, small.plan.ple) == ("quarter+skip-first-shared", "ssd")
    assert len(small.model.layers) == 9
    assert len(tokens(small.generate(PROMPT, max_tokens=4))) == 4


# Opening and closing


@pytest.mark.parametrize(
    ("options", "error", "word"),
    [
        ({"budget": "2 potatoes"}, Usage, "--budget"),
        ({"budget": 0}, Usage, "--budget"),
        ({"ram_budget": "-1"}, Usage, "--ram-budget"),
        ({"device": "tpu"}, Usage, "--device"),
        ({"device": "mps"}, Unsupported, "mps"),
        ({"engine": "ort"}, Unsupported, "ort"),
        ({"engine": "native", "device": "cuda"}, Unsupported, "native"),
        ({"threads": 0}, Usage, "--threads"),
        ({"engine": "torch", "lock": True}, Unsupported, "--lock"),
        ({"engine": "gguf"}, Usage, "--engine"),
        ({"precision": "int3"}, Usage, "--precision"),
        ({"slice": "E9B"}, Usage, "--slice"),
        ({"ple": "floppy"}, Usage, "--ple"),
        ({"kv": "int3"}, Usage, "--kv"),
        ({"context": 0}, Usage, "--context"),
        ({"ram_budget": "1GB"}, Usage, "--ram-budget"),
    ],
    ids=str,
)
def test_what_cannot_be_loaded_is_refused_by_name(
    load: Load, options: dict[str, Any], error: type[EdgeError], word: str
) -> None:
    with pytest.raises(error) as refused:
        load(**options)
    assert word in str(refused.value)
    assert refused.value.exit_code == (2 if error is Usage else 78)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(load: Load, gemma3n: Path, clone: Clone) -> None:
    folder = clone(gemma3n)
    inner = Tokenizer.from_file(str(folder / "tokenizer.json"))
    inner.add_tokens([f"<more {i}>" for i in range(VOCAB - inner.get_vocab_size())])
    inner.save(str(folder / "tokenizer.json"))
    assert len(tokens(load(folder).generate(PROMPT, max_tokens=2))) == 2
    inner.add_tokens(["<one too many>"])
    inner.save(str(folder / "tokenizer.json"))
    with pytest.raises(BadCheckpoint, match=f"{VOCAB + 1} tokens"):
        load(folder)


def test_without_a_tokenizer_ids_still_work(load: Load, gemma3n: Path, clone: Clone) -> None:
    folder = clone(gemma3n)
    (folder / "tokenizer.json").unlink()
    session = load(folder)
    assert session.logits([5, 6]).shape == (2, VOCAB)
    with pytest.raises(MissingFile) as missing:
        session.generate(PROMPT)
    assert missing.value.exit_code == 66


def test_the_end_of_a_with_block_releases_everything(gemma3n: Path) -> None:
    before = {thread.name for thread in threading.enumerate()}
    with edge.load(str(gemma3n), context=64, ple="ssd") as session:
        assert len(tokens(session.generate(PROMPT, max_tokens=3))) == 3
        assert {thread.name for thread in threading.enumerate()} > before
    assert {thread.name for thread in threading.enumerate()} <= before
    assert session.engine.weights.named == {}
    assert not session.engine.programs
    with pytest.raises(Usage):
        session.checkpoint.read_raw("norm")


def test_progress_is_told_in_bytes_and_ends_with_all_of_them(load: Load) -> None:
    told: list[tuple[str, int, int]] = []
    session = load(notify=lambda *what: told.append(what))
    loading = [(done, total) for what, done, total in told if what == "loading"]
    assert loading == sorted(loading)
    assert loading[-1] == (session.plan.bytes["weights"],) * 2
    session.engine.chunk = 8
    session.step(some_ids(20))
    assert [what for what in told if what[0] == "prefill"] == [("prefill", n, 20) for n in (8, 16, 20)]


def test_loading_changes_nothing_in_the_folder(load: Load, gemma3n: Path) -> None:
    def state() -> dict[str, tuple[int, int]]:
        return {path.name: (path.stat().st_mtime_ns, path.stat().st_size) for path in gemma3n.iterdir()}

    before = state()
    list(load(ple="ssd").generate(PROMPT, max_tokens=3))
    assert state() == before


def test_the_template_and_the_defaults_are_the_checkpoints(load: Load, chatty: Path) -> None:
    assert load().template is None
    session = load(chatty)
    assert session.template is not None
    assert session.defaults.stop_ids == (1, 4)
    assert "<start_of_turn>user\nhi<end_of_turn>" in session.template.render([{"role": "user", "content": "hi"}])


def test_without_a_tokenizer_ids_go_in_and_tokens_come_out(gemma3n: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in gemma3n.iterdir():
        if path.name != "tokenizer.json":
            (bare / path.name).symlink_to(path)
    with edge.load(bare, context=64) as session, edge.load(gemma3n, context=64) as whole:
        events = list(session.generate([2, 5, 6], max_tokens=8))
        assert [e.token for e in events] == [e.token for e in whole.generate([2, 5, 6], max_tokens=8)]
        assert {e.text for e in events} == {""}
        with pytest.raises(MissingFile):
            session.generate("text")
