"""Sampling: the fast functions next to naive ones, the draw, and what is refused."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edge.sampling import Sampler, Sampling, min_p, repetition_penalty, softmax, temperature, top_k, top_k_ids, top_p
from loaders.errors import BadCheckpoint, Usage

ROWS = hnp.arrays(
    np.float32, st.integers(1, 40), elements=st.floats(-20, 20, width=32) | st.sampled_from([0.0, 1.0, 2.0])
)


def kept(row: np.ndarray) -> set[int]:
    return set(np.flatnonzero(np.isfinite(row)).tolist())


def order(row: np.ndarray) -> list[int]:
    return sorted(range(row.size), key=lambda i: (-row[i], i))


@given(ROWS, st.integers(-1, 50))
@settings(max_examples=200, deadline=None)
def test_top_k_is_the_first_k_of_the_sorted_row(row: np.ndarray, k: int) -> None:
    want = order(row)[:k] if k > 0 else order(row)
    assert kept(top_k(row, k)) == set(want)
    assert top_k_ids(row, k).tolist() == sorted(want)


@pytest.mark.parametrize("size", [5000, 5003, 64 * 70])
@pytest.mark.parametrize("k", [1, 7, 15, 40, 4000])
def test_top_k_of_a_long_row_with_ties(size: int, k: int) -> None:
    rng = np.random.default_rng(size + k)
    for row in (rng.integers(0, 30, size).astype(np.float32), rng.normal(size=size).astype(np.float32), np.zeros(size)):
        assert top_k_ids(row, k).tolist() == sorted(order(row)[:k])
    tail = np.zeros(size, np.float32)
    tail[-3:] = 5  # behind the last whole block
    assert top_k_ids(tail, 3).tolist() == [size - 3, size - 2, size - 1]


@given(ROWS, st.floats(0.01, 1.0))
@settings(max_examples=200, deadline=None)
def test_top_p_is_the_shortest_sufficient_prefix(row: np.ndarray, p: float) -> None:
    probs = softmax(row)
    want: list[int] = []
    for i in order(probs):
        want.append(i)
        if math.fsum(probs[want]) >= p:
            break
    got = kept(top_p(row, p))
    if p < 1.0 and abs(math.fsum(probs[want]) - p) > 1e-9 and abs(math.fsum(probs[want[:-1]]) - p) > 1e-9:
        assert got == set(want)
    # Logits 7e-44 apart have the same probability: either may be the first.
    assert max(probs[i] for i in got) == probs.max()


@given(ROWS, st.floats(0.0, 1.0))
@settings(max_examples=200, deadline=None)
def test_min_p_is_relative_to_the_most_likely(row: np.ndarray, p: float) -> None:
    probs = softmax(row)
    got = kept(min_p(row, p))
    for i, prob in enumerate(probs):
        if abs(prob - p * probs.max()) > 1e-6 * probs.max():
            assert (i in got) == (prob >= p * probs.max())
    assert int(np.argmax(row)) in got


def test_repetition_penalty_counts_an_id_once() -> None:
    row = np.array([2.0, -2.0, 1.0, 0.0], np.float32)
    out = repetition_penalty(row, [0, 0, 1, 3, 99, -1], 2.0)
    assert out.tolist() == [1.0, -4.0, 1.0, 0.0]
    assert row.tolist() == [2.0, -2.0, 1.0, 0.0]
    assert repetition_penalty(row, [], 2.0).tolist() == row.tolist()


def test_temperature_does_not_overflow() -> None:
    row = np.array([3e38, 1.0, -3e38], np.float32)
    assert temperature(row, 1e-300).tolist() == [0.0, -math.inf, -math.inf]
    assert np.allclose(softmax(temperature(np.array([1.0, 2.0]), 2.0)), softmax(np.array([0.5, 1.0])))


@given(ROWS)
@settings(max_examples=50, deadline=None)
def test_nothing_changes_the_row(row: np.ndarray) -> None:
    before = row.copy()
    row.setflags(write=False)
    for sampling in (Sampling(), Sampling(0.7, 3, 0.9, 0.05, 1.3), Sampling(1.0)):
        assert 0 <= Sampler(sampling, 1)(row, [0, 0]) < row.size
    assert np.array_equal(row, before)


def test_greedy_takes_the_lowest_of_equals_and_draws_nothing() -> None:
    sampler = Sampler(Sampling(), 5)
    state = sampler._rng.bit_generator.state
    assert sampler(np.array([0.0, 3.0, 3.0], np.float32), []) == 1
    assert sampler._rng.bit_generator.state == state
    assert Sampler(Sampling(repetition_penalty=2.0))(np.array([0.0, 3.0, 2.9], np.float32), [1]) == 2


def test_the_window_limits_what_is_penalized() -> None:
    row = np.array([0.0, 3.0, 2.9], np.float32)
    assert Sampler(Sampling(repetition_penalty=2.0, repetition_window=1))(row, [1, 0]) == 1
    assert Sampler(Sampling(repetition_penalty=2.0, repetition_window=2))(row, [1, 0]) == 2
    assert Sampler(Sampling(repetition_penalty=2.0, repetition_window=0))(row, [1]) == 1


@pytest.mark.parametrize(
    "sampling",
    [Sampling(1.0), Sampling(0.5), Sampling(1.5, top_k=5), Sampling(1.0, top_p=0.8), Sampling(1.0, 6, 0.9, 0.1)],
    ids=str,
)
def test_the_draw_follows_the_distribution(sampling: Sampling) -> None:
    row = np.array([1.0, 2.0, 0.5, 2.0, -1.0, 0.0, 1.5, -3.0], np.float32)
    want = top_k(row, sampling.top_k)
    want = min_p(top_p(want, sampling.top_p), sampling.min_p)
    probs = softmax(temperature(want, sampling.temperature))
    sampler, draws = Sampler(sampling, 1234), 6000
    counts = np.bincount([sampler(row, []) for _ in range(draws)], minlength=row.size)
    assert not counts[probs == 0].any()
    some = probs > 0
    chi = float((((counts - draws * probs) ** 2)[some] / (draws * probs)[some]).sum())
    assert chi < 30  # 7 degrees of freedom: p < 1e-4, and the seed is fixed


def test_a_seed_repeats_and_is_told() -> None:
    row = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    first = Sampler(Sampling(1.0, top_k=50))
    again = Sampler(Sampling(1.0, top_k=50), first.seed)
    assert [first(row, []) for _ in range(50)] == [again(row, []) for _ in range(50)]
    # literal: a change in the draw, or in numpy's PCG64, breaks everybody's recorded seeds
    one = Sampler(Sampling(1.0), 42)
    assert [one(np.zeros(1000, np.float32), []) for _ in range(4)] == [773, 438, 858, 697]


def test_impossible_tokens_are_never_drawn() -> None:
    row = np.array([-np.inf, 0.0, -np.inf, 0.0, -np.inf], np.float32)
    for sampling in (Sampling(1.0), Sampling(1.0, 3), Sampling(1.0, 4, 0.99, 0.01), Sampling(1e-300), Sampling()):
        sampler = Sampler(sampling, 0)
        assert {sampler(row, [0]) for _ in range(100)} <= {1, 3}


@pytest.mark.parametrize("row", [[np.nan, 1.0], [1.0, np.inf], [-np.inf, -np.inf], [np.nan] * 3])
def test_non_finite_rows_are_refused(row: list[float]) -> None:
    for sampling in (Sampling(), Sampling(1.0, 1)):
        with pytest.raises(BadCheckpoint, match="non-finite logits"):
            Sampler(sampling, 0)(np.array(row, np.float32), [])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("temperature", v) for v in (math.nan, -1.0, math.inf, True, "1", None)),
        *(("top_p", v) for v in (0.0, 1.1, math.nan, -0.5)),
        *(("min_p", v) for v in (-0.1, 1.1, math.nan)),
        *(("top_k", v) for v in (-1, 1.5, 2**31, True)),
        *(("repetition_penalty", v) for v in (0.0, -1.0, math.inf, math.nan)),
        *(("repetition_window", v) for v in (-1, 0.5)),
    ],
)
def test_i11_values_out_of_range_are_usage_errors(field: str, value: object) -> None:
    with pytest.raises(Usage, match=field):
        Sampling(**{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [-1, 2**70, 1.5, True, "0"])
def test_i11_seeds_out_of_range_are_usage_errors(seed: object) -> None:
    with pytest.raises(Usage, match="seed"):
        Sampler(Sampling(), seed)  # type: ignore[arg-type]


def test_a_large_vocabulary_is_fast() -> None:
    row = np.random.default_rng(1).normal(size=262144).astype(np.float32)
    sampler = Sampler(Sampling(0.8, 40, 0.95, 0.05, 1.1), 3)
    recent, spent = list(range(64)), []
    for _ in range(15):
        start = time.perf_counter()
        sampler(row, recent)
        spent.append(time.perf_counter() - start)
    assert min(spent) < 0.003
