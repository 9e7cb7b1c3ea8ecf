"""results.jsonl: what is written comes back, what somebody else wrote is refused by line and field."""

from __future__ import annotations

import json
import math
import os
import statistics
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.profile import results
from loaders.errors import BadCheckpoint, CannotCreate, MissingFile, NotPermitted, ReadFailed, Unsupported

LINE = {
    "schema": 1, "case": "2GB, 512 tokens", "status": "ok", "model": {"name": "m"}, "machine": {},
    "asked": {"context": 512}, "tests": {"tg128": {"mean": 2.0, "deviation": 0.1, "values": [1.9, 2.1]}},
}  # fmt: skip


def written(path: Path, *lines: Any) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_lines_come_back(tmp_path: Path) -> None:
    path = results.claim(tmp_path / "report")
    assert path == tmp_path / "report" / "results.jsonl"
    for name in ("a", "b"):
        results.append(path, {**LINE, "case": name})
    assert [line["case"] for line in results.read(path)] == ["a", "b"]
    assert results.read(path)[0]["tests"] == LINE["tests"]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"schema": "1"}, "schema"),
        ({"schema": True}, "schema"),
        ({"case": 7}, "case"),
        ({"status": "good"}, "status"),
        ({"status": None}, "status"),
        ({"model": []}, "model"),
        ({"asked": {"context": "512"}}, "asked.context"),
        ({"asked": {"budget_bytes": 2.5}}, "asked.budget_bytes"),
        ({"tests": [1]}, "tests"),
        ({"tests": {"tg128": 7}}, "tests.tg128"),
        ({"tests": {"tg128": {"mean": "2", "deviation": 0.0, "values": []}}}, "tests.tg128"),
        ({"tests": {"tg128": {"mean": True, "deviation": 0.0, "values": []}}}, "tests.tg128"),
        ({"tests": {"tg128": {"mean": 2.0, "deviation": 0.0, "values": [None]}}}, "tests.tg128"),
        ({"tests": {"tg128": {"mean": 10**400, "deviation": 0.0, "values": []}}}, "tests.tg128"),
        ({"first_token": {}}, "first_token"),
        ({"plan": "full"}, "plan"),
    ],
)
def test_what_is_no_line_is_refused_by_number_and_field(tmp_path: Path, change: dict[str, Any], field: str) -> None:
    path = written(tmp_path / "r.jsonl", LINE, "", {**LINE, **change})
    with pytest.raises(BadCheckpoint) as caught:
        results.read(path)
    assert "r.jsonl, line 3" in str(caught.value)
    assert caught.value.field == field


@pytest.mark.parametrize(
    "text", ["", "\n\n", "[]", "{", '{"schema": 1, "schema": 1}', '{"schema": 1, "x": NaN}', "\xff"]
)
def test_what_is_no_json_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(BadCheckpoint):
        results.read(path)


def test_other_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Unsupported, match="newer edge"):
        results.read(written(tmp_path / "new.jsonl", {**LINE, "schema": 2}))
    with pytest.raises(MissingFile):
        results.read(tmp_path / "none.jsonl")
    monkeypatch.setattr(results, "MOST_BYTES", 100)
    with pytest.raises(BadCheckpoint, match="larger"):
        results.read(written(tmp_path / "large.jsonl", LINE))


def test_a_report_is_never_written_over(tmp_path: Path) -> None:
    results.append(results.claim(tmp_path / "a"), LINE)
    with pytest.raises(CannotCreate, match="exists already"):
        results.claim(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "report.html").write_text("mine")
    with pytest.raises(CannotCreate):
        results.claim(tmp_path / "b")
    assert (tmp_path / "b" / "report.html").read_text() == "mine"
    assert not (tmp_path / "b" / "results.jsonl").exists()
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "notes.txt").write_text("mine")
    assert results.claim(tmp_path / "c").exists()
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "no" / "parent"):
        with pytest.raises(CannotCreate):
            results.claim(place)
    if os.geteuid():
        (tmp_path / "locked").mkdir(mode=0o500)
        with pytest.raises(NotPermitted):
            results.claim(tmp_path / "locked")


def test_a_full_disk_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = results.claim(tmp_path / "report")
    results.append(path, LINE)
    before = path.read_bytes()

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ReadFailed, match="No space left"):
        results.append(path, LINE)
    assert path.read_bytes() == before


@given(st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=30))
def test_figures(values: list[float]) -> None:
    found = results.figure(values)
    assert found["mean"] == pytest.approx(statistics.fmean(values))
    assert found["deviation"] == pytest.approx(statistics.stdev(values) if len(values) > 1 else 0.0)
    results.check_figure(found, "file", "field")
    ranks = results.percentiles(values)
    assert ranks["p50"] <= ranks["p95"] <= ranks["p99"] <= max(values) * 1000
    assert sum(v * 1000 <= ranks["p95"] for v in values) >= math.floor(0.95 * len(values))
    assert {ranks["p50"], ranks["p95"], ranks["p99"]} <= {v * 1000 for v in values}
