"""Tokens per second as a prediction: rates are found from timings, never absurd, and survive whatever a cache holds."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.budget import machine, rates, rates_timed
from edge.budget.decoding import USUAL, KVRate, Rates, row_seconds, usual
from edge.budget.plan import Floor, Plan, Request, enumerate_plans, pick
from edge.budget.rates import Timed, fit, parsed
from edge.budget.rates_timed import FAR, Shape, Shapes, weights_of
from edge.budget.reads import Reads, slots
from edge.store.cache import remember
from loaders.errors import Unsupported
from loaders.network.spec import Attention, LatentAttention, Rope
from loaders.sketch import sketch
from tests.shrink import CONFIGS

FORMATS = ("int4", "int8", "bf16", "float32")
BANDWIDTH = 30e9
TRUE = Rates(
    {"int4": 0.7, "int8": 0.85, "bf16": 0.95, "float32": 1.0},
    step_s=2e-6,
    token_s=4e-5,
    kv={"bf16": KVRate(6e-11, 2e-11), "int8": KVRate(2e-10, 3e-11, 1e-7)},
    bandwidth=BANDWIDTH,
)


@pytest.fixture(name="cache", autouse=True)
def cache_fixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own: nothing is known of the machine."""
    monkeypatch.setenv("EDGE_CACHE", str(tmp_path))
    return tmp_path / machine.FILE


def took(weights: Mapping[str, int], steps: int, kv: str = "", kv_bytes: int = 0, products: int = 0) -> Timed:
    """A token as an engine of the TRUE rates would take it."""
    seconds = sum(count / (TRUE.shares[name] * BANDWIDTH) for name, count in weights.items())
    seconds += steps * TRUE.step_s + TRUE.token_s
    if kv:
        seconds += kv_bytes * TRUE.kv[kv].byte_s + products * TRUE.kv[kv].product_s
    return Timed(seconds, weights, steps, 1, kv, kv_bytes, products)


# Fitting


def test_rates_are_found_from_timings() -> None:
    wide = [took({"float32": 4096, name: 170_000_000}, 100) for name in FORMATS]
    narrow = [took({"int4": 150_000_000}, 400), took({"bf16": 40_000}, 20)]
    far = []
    for kind in ("bf16", "int8"):
        rate = TRUE.kv[kind]
        for count, products in ((50_000_000, 50_000_000), (25_000_000, 100_000_000)):
            far.append(Timed(count * rate.byte_s + products * rate.product_s, {}, 0, 0, kind, count, products))
    more = Timed(100 * TRUE.kv["int8"].step_s, tokens=0, kv="int8", more=100)
    found = fit([*wide, *narrow, *far, more], BANDWIDTH)
    assert found.bandwidth == BANDWIDTH
    assert found.step_s == pytest.approx(TRUE.step_s)
    assert found.token_s == pytest.approx(TRUE.token_s)
    assert found.shares == pytest.approx(dict(TRUE.shares))
    for kind, rate in TRUE.kv.items():
        assert found.kv[kind].byte_s == pytest.approx(rate.byte_s)
        assert found.kv[kind].product_s == pytest.approx(rate.product_s)
    assert found.kv["int8"].step_s == pytest.approx(1e-7)
    one = took({"int4": 5 * 10**8, "int8": 10**8}, 300, "int8", 2 * 10**7, 10**8)
    wanted = one.seconds + 300 * 1e-7
    said = found.seconds(one.weights, one.steps, one.kv_bytes, BANDWIDTH, "int8", one.products)
    assert said == pytest.approx(wanted)


def test_what_reads_faster_than_memory_shows_how_fast_memory_is() -> None:
    found = fit([took({"float32": 10**9}, 0), took({"float32": 10**8}, 0)], BANDWIDTH / 2)
    assert found.bandwidth == pytest.approx(BANDWIDTH, rel=0.01)
    assert found.shares["float32"] == pytest.approx(1.0, rel=0.01)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.floats(1e-6, 1.0), min_size=9, max_size=9),
    st.floats(1e8, 1e12),
)
def test_noise_never_makes_a_rate_that_is_none(seconds: list[float], bandwidth: float) -> None:
    """However wild timings are: no rate below zero, no share above one, and what is found can be remembered."""
    timed = [Timed(s, {name: 10**8}, 100 + i) for i, (s, name) in enumerate(zip(seconds[:4], FORMATS, strict=True))]
    timed += [Timed(seconds[4], {"int4": 10**8}, 900), Timed(seconds[5], {"bf16": 10**4}, 20)]
    timed += [Timed(s, {}, 0, 0, "bf16", 10**7, p) for s, p in zip(seconds[6:8], (10**7, 10**8), strict=True)]
    timed.append(Timed(seconds[8], tokens=0, kv="int8", more=100))
    found = fit(timed, bandwidth)
    parts = [
        found.step_s,
        found.token_s,
        *(x for kv in found.kv.values() for x in (kv.byte_s, kv.product_s, kv.step_s)),
    ]
    assert all(part >= 0 and math.isfinite(part) for part in parts)
    assert all(0 < share <= 1 for share in found.shares.values())
    assert found.bandwidth >= bandwidth
    if found.shares:
        assert parsed(json.loads(json.dumps(found.as_dict()))) == found


def test_least_squares_without_negative_parts() -> None:
    rows = np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]])
    assert rates.nonnegative(rows, np.array([3.0, 5.0, 7.0])) == pytest.approx([1.0, 2.0])
    falling = rates.nonnegative(rows, np.array([7.0, 5.0, 3.0]))
    assert falling == pytest.approx([5.0, 0.0])


# Predicting


counts = st.integers(0, 10**11)


@settings(deadline=None)
@given(
    st.dictionaries(st.sampled_from((*FORMATS, "float16", "unheard of")), counts, min_size=1),
    counts, counts, st.integers(0, 10**4), counts, st.sampled_from(FORMATS), st.floats(1e8, 1e13),
    st.sampled_from([TRUE, *USUAL.values(), Rates()]),
)  # fmt: skip
def test_more_bytes_are_never_predicted_faster(
    weights: dict[str, int], more: int, kv_bytes: int, steps: int, products: int, kv: str, bandwidth: float, some: Rates
) -> None:
    before = some.seconds(weights, steps, kv_bytes, bandwidth, kv, products)
    assert before >= sum(weights.values()) / max(bandwidth, some.bandwidth) * 0.999
    for name, count in weights.items():
        assert some.seconds({**weights, name: count + more}, steps, kv_bytes, bandwidth, kv, products) >= before
    assert some.seconds(weights, steps, kv_bytes + more, bandwidth, kv, products) >= before
    assert some.seconds(weights, steps + 1, kv_bytes, bandwidth, kv, products) >= before
    assert some.seconds(weights, steps, kv_bytes, bandwidth, kv, products + more) >= before
    assert some.seconds(weights, steps, kv_bytes, bandwidth * 2, kv, products) <= before


def plan_of(name: str, **wanted: Any) -> Plan:
    request = Request(engine="native", **wanted)
    return pick(enumerate_plans(sketch(CONFIGS / f"{name}.json"), request, Floor(200 << 20)), request)


def test_a_plan_predicts_no_more_than_memory_reads_and_less_far_in() -> None:
    plan = plan_of("llama-3.2-1B", precision="int4", context=4096)
    most = plan.most_tps(BANDWIDTH)
    near, far = plan.predicted_tps(BANDWIDTH), plan.predicted_tps(BANDWIDTH, depth=4095)
    assert near is not None
    assert far is not None
    assert most * 0.5 < far < near < most
    assert plan.predicted_tps(BANDWIDTH, TRUE) != near
    assert plan.predicted_tps(None) is None
    assert plan.predicted_tps(None, TRUE) == plan.predicted_tps(BANDWIDTH, TRUE)
    on_gpu = replace(plan, device="cuda", engine="torch")
    assert on_gpu.predicted_tps(BANDWIDTH) is None, "nothing is known of a GPU before it was measured"
    assert on_gpu.predicted_tps(None, TRUE) is not None


def test_a_row_that_comes_from_a_disk_is_waited_for() -> None:
    reads = {"one_4k": SimpleNamespace(p50_s=1e-4), "one_18k": SimpleNamespace(p50_s=3e-4)}
    disk: Any = SimpleNamespace(**reads)
    assert row_seconds(4096, disk) == pytest.approx(1e-4)
    assert row_seconds(18 << 10, disk) == pytest.approx(3e-4)
    assert row_seconds(100, disk) == pytest.approx(1e-4)
    assert row_seconds(0, disk) == row_seconds(4096, None) == 0
    plan = plan_of("gemma-3n-E2B", precision="int4", ple="ssd", context=512)
    assert plan.reads.row == 30 * (256 + 2), "a record of each layer"
    plain, waited = plan.predicted_tps(BANDWIDTH), plan.predicted_tps(BANDWIDTH, disk=disk)
    assert plain is not None
    assert waited is not None
    assert 1 / waited - 1 / plain == pytest.approx(row_seconds(plan.reads.row, disk))
    in_ram = replace(plan, ple="ram")
    assert in_ram.predicted_tps(BANDWIDTH, disk=disk) == plain


def test_what_is_read_of_keys_and_values() -> None:
    rope = Rope(10_000.0, 64)
    full = Attention(8, 2, 64, 1.0, rope)
    token = 2 * 2 * 64 * 2
    assert [Reads({}, (full,)).kv_bytes(depth, "bf16") for depth in (0, 1, 1000)] == [0, token, 1000 * token]
    window, chunk = replace(full, window=128), replace(full, chunk=100)
    assert [Reads({}, (window,)).kv_bytes(depth, "bf16") for depth in (64, 1000)] == [64 * token, 128 * token]
    assert [Reads({}, (chunk,)).kv_bytes(depth, "bf16") for depth in (99, 100, 250)] == [99 * token, 0, 50 * token]
    shared = Reads({}, (full, replace(full, kv_from=0)))
    assert shared.kv_bytes(10, "bf16") == 20 * token, "what another layer keeps is read all the same"
    assert Reads({}, (full,)).kv_bytes(10, "int8") == 10 * (2 * 2 * 64 + 2 * 2 * 2 * 2)
    latent = LatentAttention(4, None, 32, 16, 16, 1.0, Rope(10_000.0, 16))
    assert Reads({}, (latent,)).kv_bytes(10, "int8") == 10 * (32 + 16) * 2
    assert Reads({}, (full,)).products(10) == 10 * 8 * 2 * 64
    assert Reads({}, (latent,)).products(10) == 10 * 4 * (48 + 32)


@pytest.mark.parametrize(("position", "seen"), [(0, 256), (255, 256), (256, 512), (3000, 4096), (4200, 4352)])
def test_a_recorded_step_reads_every_slot_it_might_need(position: int, seen: int) -> None:
    from edge.engine import static

    assert slots(position, 4352) == static.bucket(position, 4352) == seen
    full = Attention(8, 2, 64, 1.0, Rope(10_000.0, 64))
    assert Reads({}, (full,)).kv_bytes(position, "bf16", 4352) == seen * 2 * 2 * 64 * 2
    assert Reads({}, (replace(full, window=100),)).products(position, 4352) == 100 * 8 * 2 * 64


# What is remembered


def test_rates_are_remembered_for_an_engine_a_device_and_threads() -> None:
    assert rates.known("native", "cpu", 2) is None
    assert rates.expected("native", "cpu", 2) == usual("native", "cpu")
    assert rates.expected("torch", "cuda") is None
    remember(machine.FILE, rates.key("native", "cpu", 2), TRUE.as_dict())
    assert rates.known("native", "cpu", 2) == rates.expected("native", "cpu", 2) == rates.measured("native", "cpu", 2)
    assert rates.known("native", "cpu", 2) == TRUE
    assert rates.known("native", "cpu", 1) is None
    assert rates.known("torch", "cpu", 2) is None


BAD: list[Any] = [
    None, 7, "fast", [], {}, {"shares": {}}, {**TRUE.as_dict(), "shares": {}}, {**TRUE.as_dict(), "kv": None},
    {**TRUE.as_dict(), "shares": {"int4": 0}}, {**TRUE.as_dict(), "shares": {"int4": -1.0}},
    {**TRUE.as_dict(), "shares": {"int4": 1.5}}, {**TRUE.as_dict(), "shares": {"int4": True}},
    {**TRUE.as_dict(), "shares": {"int4": "0.5"}}, {**TRUE.as_dict(), "shares": [0.5]},
    {**TRUE.as_dict(), "step_s": -1}, {**TRUE.as_dict(), "token_s": None}, {**TRUE.as_dict(), "step_s": 1e300},
    {**TRUE.as_dict(), "bandwidth": 0}, {**TRUE.as_dict(), "bandwidth": 1e300}, {**TRUE.as_dict(), "bandwidth": None},
    {**TRUE.as_dict(), "steady": 2.0}, {**TRUE.as_dict(), "kv": {"bf16": 1}},
    {**TRUE.as_dict(), "kv": {"bf16": {"byte_s": 1e-10}}},
    {**TRUE.as_dict(), "kv": {"bf16": {"byte_s": "x", "product_s": 0, "step_s": 0}}},
]  # fmt: skip


@pytest.mark.parametrize("value", BAD)
def test_nonsense_in_the_cache_is_as_good_as_nothing(value: Any) -> None:
    remember(machine.FILE, rates.key("native", "cpu", 2), value)
    assert rates.known("native", "cpu", 2) is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"bandwidth, 2 threads": 7}', '{"x": NaN}', "\x00" * 100])
def test_a_broken_cache_is_no_cache(cache: Path, text: str) -> None:
    cache.write_text(text)
    assert rates.known("native", "cpu", 2) is None
    assert machine.remembered_bandwidth(2) == (0.0, 0.0)


# Bandwidth


def test_the_best_stretch_counts_and_only_what_is_read_together() -> None:
    steady = [i * 0.001 for i in range(101)]
    assert machine.best_rate([steady, steady], 1000, 0.005) == pytest.approx(2e6)
    slow_then_fast = [*(i * 0.01 for i in range(11)), *(0.1 + i * 0.001 for i in range(1, 51))]
    assert machine.best_rate([slow_then_fast], 1000, 0.005) == pytest.approx(1e6)
    assert machine.best_rate([slow_then_fast], 1000, math.inf) == pytest.approx(60 * 1000 / 0.15)
    apart = [[0.0, 0.001, 0.002], [1.0, 1.001]]
    assert machine.best_rate(apart, 1000, 0.005) == pytest.approx(1e6)


def test_bandwidth_is_measured_remembered_and_raised(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr(machine, "READ_S", 0.02)
    monkeypatch.setattr(machine, "READ_BYTES", (24 << 20, 24 << 20))
    first = machine.read_bandwidth(2)
    assert 1e8 < first < 1e13
    monkeypatch.setattr(machine, "measured_bandwidth", lambda count: pytest.fail("measured again within the hour"))
    assert machine.read_bandwidth(2) == first
    machine.raise_bandwidth(2, first / 2)
    assert machine.read_bandwidth(2) == first
    machine.raise_bandwidth(2, first * 2)
    assert machine.read_bandwidth(2) == first * 2
    known = json.loads(cache.read_text())
    assert len([name for name in known if name.startswith("bandwidth, 2")]) == 1
    monkeypatch.setattr(machine, "measured_bandwidth", lambda count: 1.5e9 * count)
    assert machine.read_bandwidth(1) == 1.5e9, "one thread reads less than two"


def test_little_memory_is_no_reason_to_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "available_memory", lambda: (512 << 20, "here"))
    assert machine.read_bytes() == 64 << 20
    monkeypatch.setattr(machine, "available_memory", lambda: (1 << 20, "here"))
    assert machine.read_bytes() == machine.LEAST_BYTES


# The real thing, small


TINY = Shapes(
    1 << 20, 1 << 20, 1 << 20,
    narrow=Shape(128, 4, 2, 32, 256), wide=Shape(256, 4, 2, 32, 512),
    pairs=Shape(64, 4, 2, 32, 64), eights=Shape(64, 8, 1, 32, 64),
)  # fmt: skip


@pytest.mark.parametrize("engine", ["native", "torch"])
def test_an_engine_is_timed(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every format, the layers and both kinds of groups, through the engine itself."""
    from edge import engine as engines

    monkeypatch.setattr(rates_timed, "DECODING_S", 0.001)
    monkeypatch.setattr(rates_timed, "READING_S", 0.005)
    monkeypatch.setattr(machine, "READ_BYTES", (16 << 20, 16 << 20))
    bench = rates_timed.Bench(engines.start(engine, "cpu", 1), machine.Reader(1))
    found = list(rates_timed.cases(bench, TINY))
    assert {name for one in found for name in one.weights} == set(FORMATS)
    assert {one.kv for one in found if one.kv_bytes} == {"bf16", "int8", "float32"}
    assert all(one.seconds > 0 for one in found)
    done = bench.rates(found)
    assert parsed(json.loads(json.dumps(done.as_dict()))) == done
    assert done.bandwidth > 1e8


def test_weights_of_a_shape() -> None:
    model = Shape(256, 4, 2, 32, 512).model(3)
    found = weights_of(model, "int4")
    values = 512 * 256 + 3 * (256 * (4 + 2 + 2 + 4) * 32 + 3 * 256 * 512)
    assert found["int4"] == values // 32 * 18
    assert found["float32"] == (2 * 3 + 1) * 256 * 4
    assert rates_timed.layers_of(Shape(256, 4, 2, 32, 512), "bf16", 10**7) * 2 * (values - 512 * 256) // 3 >= 10**7
    assert model.context == FAR + 1


def test_the_process_that_measures_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One process for real; with next to no memory to measure in, it takes next to none."""
    with pytest.raises(Unsupported, match="runs packages alone"):
        rates.measured("ort", "cpu")
    sized = "from edge.budget import machine, rates, rates_timed as t\n"
    sized += "t.ON_CPU = t.KV = t.WIDENED = 1 << 22\nt.DECODING_S = t.READING_S = 0.004\n"
    sized += "machine.READ_BYTES = (1 << 24, 1 << 24)\nmachine.cache_bytes = t.cache_bytes = lambda: 0\nrates.main()\n"
    script = tmp_path / "small.py"
    script.write_text(sized)
    run = machine.subprocess.run

    def small(line: list[str], **options: Any) -> Any:
        assert line[1:4] == ["-P", "-m", "edge.budget.rates"]
        return run([line[0], str(script), *line[4:]], **options)

    monkeypatch.setattr(machine.subprocess, "run", small)
    monkeypatch.setattr(rates, "STEADY", 0.0)
    found = rates.measured("native", "cpu", 1)
    assert set(found.shares) == set(FORMATS)
    assert 0 < found.steady <= 1
    monkeypatch.setattr(machine.subprocess, "run", lambda *_, **__: pytest.fail("measured twice"))
    assert rates.measured("native", "cpu", 1) == found
    assert machine.remembered_bandwidth(1)[0] >= found.bandwidth


def test_a_process_that_says_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    silent = SimpleNamespace(stdout="", stderr="Traceback\nMemoryError")
    monkeypatch.setattr(machine.subprocess, "run", lambda *_, **__: silent)
    with pytest.raises(Unsupported, match="cannot be measured"):
        rates.measured("native", "cpu", 1)


def test_rates_of_a_machine_that_others_use_are_not_kept(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """They hold for this process, which would measure again and again; the next one may find the machine quiet."""
    answers = iter([replace(TRUE, steady=0.5), TRUE])
    said = lambda *_, **__: SimpleNamespace(stdout=json.dumps(next(answers).as_dict()), stderr="")  # noqa: E731
    monkeypatch.setattr(machine.subprocess, "run", said)
    monkeypatch.setattr(rates, "_unsteady", {})
    assert rates.measured("native", "cpu", 3).steady == rates.measured("native", "cpu", 3).steady == 0.5
    assert "rates" not in cache.read_text()
    monkeypatch.setattr(rates, "_unsteady", {})
    assert rates.measured("native", "cpu", 3) == rates.measured("native", "cpu", 3) == TRUE
    assert "rates" in cache.read_text()
