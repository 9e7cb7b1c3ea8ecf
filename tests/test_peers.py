"""The benchmark beside other engines: what it asks of an engine, what its table says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from benchmarks import peers, peers_measure
from edge.profile.peer_child import AT_ONCE
from loaders.network.spec import Model
from loaders.sketch import sketch


def model_of(name: str) -> Model:
    return sketch(peers.CONFIGS / f"{name}.json").model


class Counting:
    """An engine that only keeps count."""

    def __init__(self) -> None:
        self.fed, self.most, self.calls = 0, 0, [0]

    def feed(self, ids: Sequence[int]) -> None:
        assert 0 < len(ids) <= AT_ONCE
        assert all(0 <= i < 1000 for i in ids)
        self.fed += len(ids)
        self.most = max(self.most, self.fed)
        self.calls.append(self.fed)

    def reset(self) -> None:
        self.fed = 0


@pytest.mark.parametrize("name", list(peers.CASES))
def test_what_is_asked_of_an_engine_fits_in_its_context(name: str) -> None:
    case = peers.CASES[name]
    what = replace(case.asked(model_of(name), 2), vocab=1000)
    engine = Counting()
    found = peers_measure.measure(engine, what)
    assert engine.most == max(case.long + case.new if case.long else 0, case.short + case.new, case.prompt)
    assert engine.most <= what.context
    assert {case.short, case.prompt, case.long} <= {*engine.calls}
    assert ("long_tps" in found) == bool(case.long)
    assert found["peak_bytes"] >= found["anonymous_bytes"] > 0


def line(
    engine: str, speeds: Sequence[float], run: str = "2026-01-01 00:00:00", case: str = "qwen3-0.6B"
) -> dict[str, Any]:
    turns = [
        {"prefill_tps": x * 10, "decode_tps": x, "read_gbps": 20.0, "others": 0.0, "wall_s": 1.0, "load_s": 1.0,
         "peak_bytes": 10**9, "anonymous_bytes": 10**8, "file_bytes": 9 * 10**8, "version": engine, "plan": ""}
        for x in speeds
    ]  # fmt: skip
    facts = {"threads": 2, "bytes_per_token": 10**9, "machine": "a machine", "run": run}
    return peers.summed(peers.CASES[case], engine, turns, facts)


def test_ratios_are_of_turns_that_followed_each_other() -> None:
    edge, peer = line("native", [10.0, 4.0, 2.0]), line("llama.cpp", [5.0, 4.0, 1.0])
    assert edge["decode_tps"] == 4.0
    assert peers.ratio(edge, peer, "decode_tps") == 2.0
    assert peers.ratio(edge, peer, "long_tps") is None
    assert peers.ratio(edge, None, "decode_tps") is None
    assert peers.ratio(edge, {**peer, "run": "another"}, "decode_tps") is None


def test_the_table_has_a_row_for_each_and_says_how_it_came_about() -> None:
    edge, peer = line("native", [10.0, 4.0, 2.0]), line("llama.cpp", [5.0, 4.0, 1.0])
    text = peers.peers_table([edge, peer])
    assert (
        "| qwen3-0.6B | edge, native | 40.0 | 2.00x | 4.0 | 2.00x |  |  | 1,000 MB, 100 own | 4.0 of 20 GB/s |" in text
    )
    assert "| qwen3-0.6B | llama.cpp | 40.0 |  | 4.0 |  |" in text
    assert "Medians of 3 processes" in text
    assert "cores busy" not in text
    peer["runs"][0]["others"] = 1.5
    assert "up to 1.5 cores busy" in peers.peers_table([edge, peer])
    assert peers.peers_table([]) == "Not measured yet."


def test_new_lines_take_the_place_of_old_ones() -> None:
    old = [line("torch", [1.0]), line("llama.cpp", [1.0]), line("llama.cpp", [1.0], case="llama-3.2-1B")]
    found = peers.merged(old, [line("torch", [2.0]), line("native", [3.0])])
    assert [(x["case"], x["engine"], x["decode_tps"]) for x in found] == [
        ("llama-3.2-1B", "llama.cpp", 1.0),
        ("qwen3-0.6B", "native", 3.0),
        ("qwen3-0.6B", "torch", 2.0),
        ("qwen3-0.6B", "llama.cpp", 1.0),
    ]
