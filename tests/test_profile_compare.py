"""Results beside older ones: verdicts, what is held against chance, what is said of other machines, hostile lines."""

from __future__ import annotations

import copy
import io
import json
import math
import random
import statistics
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from edge.cli.compared import table
from edge.profile.compare import Comparison, compare
from edge.profile.compare_figures import BYTES, NOISY, RATE, SPEED, STUDENT, TIME, Sample, interval, judged, student
from edge.profile.results import figure

TESTS = {"pp512": 5, "tg128": 1, "tg128 @ d4096": 0.5}
OPPOSITE = {"same": "same", "better": "worse", "worse": "better"}


def around(mean: float, share: float = 0.01, count: int = 5) -> dict[str, Any]:
    """Values around a mean whose sample deviation is that share of it, exactly."""
    steps = [i - (count - 1) / 2 for i in range(count)]
    unit = statistics.stdev(steps) if count > 1 else 1.0
    return figure([mean * (1 + share * step / unit) for step in steps])


def line(speed: float = 100.0, count: int = 5, share: float = 0.01, **changes: Any) -> dict[str, Any]:
    """A case that ran; ``speed`` 50 is half as fast in everything."""
    slow = 100.0 / speed
    start = {"load_s": around(2.0 * slow, share, count), "ttft_s": around(5.0 * slow, share, count)}
    whole: dict[str, Any] = {
        "schema": 1, "case": "2GB, 4096 tokens", "status": "ok", "why": None, "label": "full in int4",
        "model": {"name": "gemma-3n-E2B", "fingerprint": "aa", "weights": "synthetic"},
        "machine": {"cpu": "a cpu", "cores": 2, "threads": 2, "memory_bytes": 25 * 10**9, "vector": "avx2"},
        "versions": {"edge": "0.1.0", "commit": "aaa"},
        "asked": {"budget_bytes": 2 * 10**9, "context": 4096, "device": "cpu", "engine": "native", "threads": 2},
        "tests": {name: around(speed * k, share, count) for name, k in TESTS.items()},
        "latency_ms": {"tg128": {"p50": 10.0 * slow, "p95": 12.0 * slow, "p99": 13.0 * slow}},
        "warm": {**start, "bytes_read": 0}, "cold": None,
        "memory": {"peak_bytes": 19 * 10**8, "planned_bytes": 18 * 10**8, "device_peak_bytes": None, "kept": True},
        "bandwidth": {"read_gbps": 20.0}, "energy": {"joules_per_token": 1.5 * slow},
        "noise": {"noisy": False, "why": []}, "boxed": None,
    }  # fmt: skip
    for path, value in changes.items():
        *parents, last = path.split("__")
        place = whole
        for name in parents:
            place = place[name]
        place[last] = value
    return whole


def verdicts(found: Comparison) -> dict[str, str]:
    return {f.name: f.verdict for case in found.cases for f in case.figures}


def shown(found: Comparison) -> str:
    console = Console(width=100, record=True, file=io.StringIO(), color_system=None)
    console.print(table(found))
    return console.export_text()


def test_every_figure_of_both_is_compared() -> None:
    found = compare([line()], [line(cold=line()["warm"])])
    assert not found.regressed
    assert list(verdicts(found)) == [
        "pp512", "tg128", "tg128 @ d4096", "warm load", "warm first token", "tg128 p50", "tg128 p99", "peak memory",
        "planned memory", "energy",
    ]  # fmt: skip
    assert "not measured before: cold first token, cold load" in found.cases[0].notes


def test_a_figure_worse_beyond_the_bound_is_a_regression_and_one_within_is_not() -> None:
    for name, changes, verdict in (
        ("tg128", {"tests__tg128": around(98.0)}, "same"),
        ("tg128", {"tests__tg128": around(95.0)}, "worse"),
        ("tg128", {"tests__tg128": around(105.0)}, "better"),
        ("tg128", {"tests__tg128": around(95.0, 0.03)}, "same"),
        ("tg128", {"tests__tg128": around(95.0, count=1)}, "same"),
        ("tg128", {"tests__tg128": around(88.0, count=1)}, "worse"),
        ("warm load", {"warm__load_s": around(2.1)}, "same"),
        ("warm load", {"warm__load_s": around(2.3)}, "worse"),
        ("tg128 p99", {"latency_ms__tg128__p99": 13.9}, "same"),
        ("tg128 p99", {"latency_ms__tg128__p99": 14.5}, "worse"),
        ("peak memory", {"memory__peak_bytes": 1_910_000_000}, "same"),
        ("peak memory", {"memory__peak_bytes": 1_925_000_000}, "worse"),
        ("planned memory", {"memory__planned_bytes": 1_700_000_000}, "better"),
        ("energy", {"energy__joules_per_token": 1.7}, "worse"),
    ):
        found = compare([line()], [line(**changes)])
        assert verdicts(found)[name] == verdict, (name, changes)
        assert found.regressed == (verdict == "worse"), (name, changes)
        assert [f for f, v in verdicts(found).items() if v != "same" and f != name] == []


def test_memory_that_reads_slower_excuses_as_much_in_one_direction_alone() -> None:
    slower, faster = line(80.0, bandwidth__read_gbps=15.0), line(80.0, bandwidth__read_gbps=25.0)
    assert not compare([line()], [slower]).regressed
    assert compare([line()], [faster]).regressed
    assert compare([line()], [line(60.0, bandwidth__read_gbps=15.0)]).regressed
    assert "memory reads 0.75x as fast as before" in compare([line()], [slower]).cases[0].notes
    assert compare([line()], [line(bandwidth__read_gbps=10.0, memory__peak_bytes=2 * 10**9)]).regressed


def test_noise_widens_what_hangs_on_time_and_is_said() -> None:
    noisy = {"noise__noisy": True, "noise__why": ["other programs kept 1.5 cores busy"]}
    assert compare([line()], [line(92.0)]).regressed
    found = compare([line()], [line(92.0, **noisy)])
    assert not found.regressed
    assert "noisy now: other programs kept 1.5 cores busy" in found.cases[0].notes
    assert compare([line(**noisy)], [line(80.0)]).regressed
    assert compare([line()], [line(memory__peak_bytes=2 * 10**9, **noisy)]).regressed


def test_a_case_that_no_longer_runs_is_a_regression() -> None:
    found = compare([line()], [line(status="killed", why="killed by the kernel", tests=None, memory=None)])
    assert found.regressed
    assert found.cases[0].claims == (("was ok, now killed: killed by the kernel", "worse"),)
    assert not compare([line(status="refused")], [line()]).regressed
    assert compare([line(status="refused")], [line()]).cases[0].verdict == "better"
    needs = [line(status="refused", tests={}, needed_bytes=n) for n in (10**9, 2 * 10**9)]
    assert verdicts(compare(needs[:1], needs[1:]))["memory needed"] == "worse"


def test_a_budget_that_is_no_longer_kept_is_a_regression() -> None:
    assert compare([line()], [line(memory__kept=False)]).cases[0].claims == (("budget: kept before, not now", "worse"),)
    boxes = [line(boxed={"status": status}) for status in ("ok", "killed")]
    assert compare(boxes[:1], boxes[1:]).regressed
    assert not compare(boxes[1:], boxes[:1]).regressed
    assert not compare(boxes[1:], boxes[1:]).regressed


def test_no_speed_at_all_is_worse_and_no_seconds_are_no_figure() -> None:
    found = compare([line()], [line(tests__tg128=figure([0.0, 0.0]), warm__load_s=figure([0.0]))])
    bad = next(f for f in found.cases[0].figures if f.name == "tg128")
    assert (bad.verdict, bad.ratio) == ("worse", 0.0)
    assert "warm load" not in verdicts(found)
    assert (
        next(f for f in compare([line(tests__tg128=0)], [line()]).cases[0].figures if f.name == "tg128").ratio is None
    )


def test_cases_are_matched_by_what_was_asked() -> None:
    old = [line(), line(asked__budget_bytes=10**9, case="1GB"), line(asked__engine="torch", case="torch")]
    new = [line(asked__budget_bytes=4 * 10**9, case="4GB"), line(case="another name"), line(case="again")]
    found = compare(old, new)
    assert [case.case for case in found.cases] == ["gemma-3n-E2B: another name (cpu, native)"]
    assert found.only_old == ("gemma-3n-E2B: 1GB (cpu, native)", "gemma-3n-E2B: torch (cpu, torch)")
    assert found.only_new == ("gemma-3n-E2B: 4GB (cpu, native)", "gemma-3n-E2B: again (cpu, native)")
    assert not found.regressed
    text = shown(found)
    assert "only in the old file: gemma-3n-E2B: 1GB" in text
    assert "only in the new file: gemma-3n-E2B: 4GB" in text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"machine__cpu": "another"}, "another machine: cpu: a cpu, now another"),
        ({"machine__memory_bytes": 16 * 10**9}, "another machine: memory 25.0 GB, now 16.0 GB"),
        ({"model__fingerprint": "bb"}, "another model: fingerprint: aa, now bb"),
        ({"model__weights": "real"}, "other weights: synthetic, now real"),
        ({"asked__threads": 4}, "another number of threads: 2, now 4"),
    ],
)
def test_another_machine_or_model_is_said_loudly_and_compared_all_the_same(changes: dict[str, Any], said: str) -> None:
    found = compare([line(), line(asked__context=512)], [line(50.0, **changes), line(asked__context=512, **changes)])
    assert found.warnings == (said,)
    assert found.regressed
    assert f"WARNING: {said}" in shown(found)


def test_other_software_and_another_plan_are_noted() -> None:
    found = compare(
        [line()], [line(versions__commit="bbb", label="full in int8", machine__memory_bytes=25 * 10**9 + 1)]
    )
    assert found.warnings == ()
    assert found.cases[0].notes == ("plan: full in int4, now full in int8", "commit: aaa, now bbb")


def test_nothing_in_common_is_said() -> None:
    found = compare([line()], [line(asked__context=8192)])
    assert found.warnings == ("no case was asked of both: nothing is compared",)
    assert compare([], []).warnings == found.warnings
    assert "nothing is compared" in shown(compare([], []))


def test_the_table_fits_in_100_columns_and_escapes_what_it_was_given() -> None:
    wild = "x" * 300 + "[red]\x1b[2J\n"
    old = line(case=wild, label="a", tests={wild: around(1e-9), "tg128": around(1e30)}, memory__peak_bytes=10**55)
    text = shown(compare([old], [{**old, "label": wild}]))
    assert max(map(len, text.splitlines())) <= 100
    assert "\x1b" not in text
    ordinary = shown(compare([line()], [line(79.0)]))
    assert max(map(len, ordinary.splitlines())) <= 100
    row = next(r for r in ordinary.splitlines() if "tg128, tokens/s" in r)
    assert row.split() == ["tg128,", "tokens/s", "100", "79", "0.790", "0.971", "to", "1.030", "worse"]


def test_students_t_is_the_handbooks_and_never_too_narrow() -> None:
    assert student(8) == pytest.approx(3.355)
    assert student(1e12) == pytest.approx(2.576, abs=1e-3)
    assert student(1) == STUDENT[0][1]
    # The handbook's rows between ours.
    for freedom, wanted in ((7, 3.499), (12, 3.055), (25, 2.787), (40, 2.704), (100, 2.626)):
        assert wanted <= student(freedom) < wanted * 1.01
    grid = [student(1 + i / 7) for i in range(700)]
    assert grid == sorted(grid, reverse=True)


def test_the_interval_is_welchs() -> None:
    """Of the example of two samples of one deviation: 2n - 2 degrees of freedom."""
    sample = Sample(100.0, 4.0, 5)
    assert interval(sample, sample) == pytest.approx(3.355 * math.sqrt(2 * (0.04**2) / 5))
    # All in one side: its own degrees of freedom.
    assert interval(Sample(100.0, 4.0, 5), Sample(100.0, 0.0, 50)) == pytest.approx(4.604 * 0.04 / math.sqrt(5))
    assert interval(Sample(100.0, 4.0, 1), sample) == 0.0


def test_two_runs_of_one_machine_seldom_differ() -> None:
    draw, wrong = random.Random(1), 0
    for _ in range(2000):
        old, new = ([draw.gauss(100.0, 4.0) for _ in range(5)] for _ in range(2))
        samples = [Sample(statistics.fmean(x), statistics.stdev(x), len(x)) for x in (old, new)]
        wrong += judged("tg", RATE, *samples, 0.0, False).verdict != "same"
    assert wrong / 2000 < 0.015


SPEEDS = st.floats(1e-3, 1e6)
SHARES = st.floats(0.0, 0.2)


@given(speed=SPEEDS, share=SHARES, count=st.integers(1, 7), noisy=st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_file_beside_itself_is_the_same(speed: float, share: float, count: int, noisy: bool) -> None:
    lines = [line(speed, count, share, noise__noisy=noisy), line(speed, count, share, asked__context=512)]
    found = compare(lines, copy.deepcopy(lines))
    assert not found.regressed
    assert {*verdicts(found).values()} == {"same"}
    assert found.warnings == ()


@given(SPEEDS, st.integers(1, 9), st.integers(1, 9), st.floats(1.2, 50.0), st.sampled_from([0.0, 0.002, 0.01]))
@settings(max_examples=60, deadline=None)
def test_a_fifth_slower_at_one_percent_is_always_a_regression(
    speed: float, count: int, others: int, slower: float, share: float
) -> None:
    old = line(speed, count, share)
    assert compare([old], [line(speed / slower, others, 0.01)]).regressed
    assert not compare([old], [line(speed * slower, others, 0.01)]).regressed


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_swapped_files_say_the_opposite(data: st.DataObject) -> None:
    def drawn() -> dict[str, Any]:
        changes = {
            "bandwidth__read_gbps": data.draw(st.floats(5.0, 50.0)),
            "noise__noisy": data.draw(st.booleans()),
            "memory__peak_bytes": data.draw(st.integers(10**9, 11 * 10**8)),
            "status": data.draw(st.sampled_from(["ok", "ok", "killed"])),
        }
        return line(data.draw(st.floats(80.0, 120.0)), data.draw(st.integers(1, 5)), data.draw(SHARES), **changes)

    old, new = drawn(), drawn()
    there, back = compare([old], [new]), compare([new], [old])
    assert verdicts(back) == {name: OPPOSITE[verdict] for name, verdict in verdicts(there).items()}
    assert [v for _, v in back.cases[0].claims] == [OPPOSITE[v] for _, v in there.cases[0].claims]
    for a, b in zip(there.cases[0].figures, back.cases[0].figures, strict=True):
        assert a.ratio is not None
        assert b.ratio is not None
        assert a.ratio * b.ratio == pytest.approx(1)
        assert (a.low * b.high, a.high * b.low) == pytest.approx((1, 1))


NUMBERS = st.one_of(
    st.floats(),
    st.integers(-(2**70), 2**70),
    st.sampled_from([0, 0.0, -0.0, math.nan, math.inf, 10**400, 5e-324, 1e308]),
)
ANYTHING = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["mean", "deviation", "values", "p50", "p99", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)
FIGURES = st.fixed_dictionaries(
    {}, optional={"mean": NUMBERS, "deviation": NUMBERS, "values": st.lists(NUMBERS, max_size=3)}
)


def places(value: dict[str, Any], path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every path into a line."""
    found = []
    for name, inner in value.items():
        found.append((*path, name))
        found += places(inner, (*path, name)) if isinstance(inner, dict) else []
    return found


PLACES = places(line(cold=line()["warm"], needed_bytes=1))


@given(
    st.lists(st.tuples(st.sampled_from(PLACES), ANYTHING | FIGURES | NUMBERS, st.booleans()), min_size=1, max_size=5)
)
@settings(max_examples=120, deadline=None)
def test_hostile_figures_never_crash(hits: list[tuple[tuple[str, ...], Any, bool]]) -> None:
    sides = [line(cold=line()["warm"]), line(cold=line()["warm"])]
    for path, value, which in hits:
        place: Any = sides[which]
        for name in path[:-1]:
            place = place.get(name) if isinstance(place, dict) else None
        if isinstance(place, dict):
            place[path[-1]] = value
    assert max(map(len, shown(compare(*([side] for side in sides))).splitlines()), default=0) <= 100
    for old, new in (sides, sides[::-1]):
        found = compare([old], [new])
        json.dumps(found.as_dict(), allow_nan=False)
        assert not compare([old], [copy.deepcopy(old)]).regressed


@given(st.lists(st.dictionaries(st.sampled_from(["case", "asked", "tests", "model", "status"]), ANYTHING), max_size=3))
@settings(max_examples=60, deadline=None)
def test_lines_that_are_none_never_crash(lines: list[dict[str, Any]]) -> None:
    found = compare(lines, lines)
    assert not found.regressed
    assert len(found.cases) == len(lines)
    assert json.dumps(found.as_dict(), allow_nan=False)


def test_bounds_are_what_is_documented() -> None:
    steady = Sample(100.0, 0.0, 5)
    assert judged("tg", RATE, steady, steady, 0.0, False).high == pytest.approx(1 + SPEED)
    assert judged("tg", RATE, steady, steady, 0.0, True).high == pytest.approx((1 + SPEED) * (1 + NOISY))
    drifted = judged("tg", RATE, steady, steady, math.log(0.5), False)
    assert (drifted.low, drifted.high) == pytest.approx((0.5 / 1.03, 1.03))
    slow = judged("load", TIME, steady, steady, math.log(0.5), False)
    assert (slow.low, slow.high) == pytest.approx((1 / 1.1, 2 * 1.1))
    assert judged("peak", BYTES, Sample(100.0), Sample(100.0), 0.0, False).high == pytest.approx(1.01)
