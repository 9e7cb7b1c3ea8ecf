"""The report: every number in a table, nothing from anywhere else, nothing that a file says is markup."""

from __future__ import annotations

import base64
import copy
import gzip
import hashlib
import json
import math
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge.profile.report import write_report
from edge.profile.report.book import Book
from edge.profile.report.case import Case, finite
from edge.profile.report.case import test_of as named
from edge.profile.report.chart import Table
from edge.profile.report.markup import Markup, json_text, label, tag
from edge.profile.report.page import page
from edge.profile.report.words import BLANK, digits, listed, rate, seconds, share, short_size, size, span
from loaders.errors import CannotCreate, Usage
from tests import sample_results as sample

VOID = {"meta", "br", "img", "link", "hr", "col", "input"}
EVIL = "</script><img src=x onerror=alert(1)>\"'&<b>\u2028\x00\x1b[31m"


class Reader(HTMLParser):
    """Reads a page strictly: every element closed in order; keeps attributes, cells, scripts and text."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.faults: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.tags: list[str] = []
        self.cells: list[str] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.text: list[str] = []

    def handle_starttag(self, name: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(name)
        self.attributes += [(name, key, value) for key, value in attrs]
        if name in ("td", "th", "caption", "dd", "h3"):
            self.cells.append("")
        if name == "script":
            self.scripts.append((dict(attrs), ""))
        if name not in VOID:
            self.open.append(name)

    def handle_endtag(self, name: str) -> None:
        if not self.open or self.open.pop() != name:
            self.faults.append(f"</{name}> at {self.getpos()}")

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            attrs, text = self.scripts.pop()
            self.scripts.append((attrs, text + data))
            return
        self.text.append(data)
        if any(name in ("td", "th", "caption", "dd", "h3") for name in self.open):
            self.cells[-1] += data

    @property
    def figures(self) -> dict[str, Any]:
        return json.loads(next(text for attrs, text in self.scripts if attrs.get("id") == "figures"))


def read(lines: list[dict[str, Any]]) -> Reader:
    """The page of lines, read."""
    reader = Reader()
    reader.feed(page(Book(tuple(lines))))
    reader.close()
    assert reader.faults == []
    assert reader.open == []
    return reader


@pytest.fixture(scope="module")
def whole() -> Reader:
    return read(sample.everything())


@pytest.fixture(scope="module")
def words(whole: Reader) -> str:
    return " ".join(whole.cells)


def test_the_page_loads_nothing_and_says_so(whole: Reader) -> None:
    links = [
        (name, value) for name, key, value in whole.attributes if key in ("href", "src", "srcset", "action", "data")
    ]
    assert [name for name, _ in links] == ["a"]
    assert str(links[0][1]).startswith("data:application/gzip;base64,")
    assert "link" not in whole.tags
    assert "base" not in whole.tags
    allowed = next(v for n, k, v in whole.attributes if n == "meta" and k == "content" and "default-src" in str(v))
    assert "default-src 'none'" in str(allowed)
    assert "http" not in str(allowed)
    assert "unsafe-eval" not in str(allowed)
    assert "'unsafe-inline'" not in str(allowed).partition("script-src")[2].partition(";")[0]


def test_style_names_no_address() -> None:
    text = page(Book(tuple(sample.sample())))
    style = text.partition("<style>")[2].partition("</style>")[0]
    assert len(style) > 1000
    assert "url(" not in style
    assert "@import" not in style


def test_only_the_two_scripts_of_the_policy_can_run(whole: Reader) -> None:
    """The hashes are those of what is in the page: one unlike them would leave it without charts."""
    policy = str(next(v for n, k, v in whole.attributes if n == "meta" and k == "content" and "script-src" in str(v)))
    texts = {str(attrs.get("id", "")): text for attrs, text in whole.scripts}
    library = gzip.decompress(base64.b64decode(texts["library"]))
    assert library.startswith(b"/**\n* plotly.js v")
    for source in (texts[""].encode(), library):
        assert base64.b64encode(hashlib.sha256(source).digest()).decode() in policy
    assert [attrs.get("type") for attrs, _ in whole.scripts] == ["application/json", "application/octet-stream", None]
    assert not [key for _, key, _ in whole.attributes if key.startswith("on")]


def test_headings_are_in_order_and_the_page_has_a_language(whole: Reader) -> None:
    levels = [int(name[1]) for name in whole.tags if re.fullmatch("h[1-6]", name)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b <= a + 1 for a, b in pairwise(levels))
    assert ("html", "lang", "en") in whole.attributes


def test_every_chart_has_words_for_those_who_cannot_see_it(whole: Reader) -> None:
    places = [value for name, key, value in whole.attributes if name == "div" and key == "id"]
    assert set(whole.figures) == set(places)
    assert len(whole.figures) == 8 + 1 + 5
    labels = [value for name, key, value in whole.attributes if key == "aria-label" and value]
    assert len([text for text in labels if len(text) > 40]) >= len(places)


def test_all_ids_differ(whole: Reader) -> None:
    ids = [value for _, key, value in whole.attributes if key == "id"]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("line", sample.everything(), ids=lambda line: line["case"])
def test_every_figure_is_in_a_table(line: dict[str, Any], words: str) -> None:
    """With scripts off, or for a reader aloud, the tables are all there is."""
    tests = line.get("tests") or {}
    expected = [rate(figure["mean"]) for figure in tests.values()]
    expected += [digits(figure["deviation"], 2) for figure in tests.values()]
    expected += [digits(ms[p]) for ms in (line.get("latency_ms") or {}).values() for p in ("p50", "p95", "p99")]
    expected += [seconds(wait) for _, wait in line.get("first_token") or []]
    memory = line.get("memory") or {}
    expected += [size(memory[name]) for name in ("peak_bytes", "anonymous_bytes", "file_bytes") if name in memory]
    expected += [size(value) for value in ((line.get("plan") or {}).get("bytes") or {}).values()]
    expected += [size(line["needed_bytes"])] if "needed_bytes" in line else []
    expected += [digits(v) for v in [(line.get("bandwidth") or {}).get("read_gbps")] if v]
    for start in ("cold", "warm"):
        expected += [seconds(line[start][name]["mean"]) for name in ("load_s", "ttft_s") if line.get(start)]
    expected += [f"{name} at {seconds(at)}" for at, name in ((line.get("timeline") or {}).get("marks") or [])]
    assert expected
    assert [text for text in expected if text not in words] == []


def test_predictions_are_in_a_table(words: str) -> None:
    said = sample.measured(2.0, 512)["predicted"]["tests"]["pp512"]
    assert rate(said["tps"]) in words
    assert "-3.0%" in words or "+6.0%" in words


def test_first_what_is_wrong(whole: Reader) -> None:
    text = " ".join(whole.text)
    warned = text.index("killed before it was done: signal 9 after 31.4 s")
    assert warned < text.index("memory read 18.2 GB/s before and 30.1 after") < text.index("The weights are random")
    assert text.index("The weights are random") < text.index("tokens/s")


def test_a_card_answers_in_a_sentence() -> None:
    line = sample.measured(2.0, 4096)
    line["memory"] |= {"peak_bytes": 1_750_000_000}
    line["warm"]["ttft_s"]["mean"] = 7.1
    text = "".join(read([line]).text).replace("\xa0", " ")
    assert "2 GBkept" in text.replace(" kept", "kept")
    assert "full in int4, first token after 7.1 s, peak 1.75 GB." in text
    assert f"{rate(line['tests']['tg128']['mean'])} tokens/s" in text


def test_a_broken_promise_comes_first_and_is_not_believed_to_be_kept() -> None:
    line = sample.measured(2.0, 4096)
    line["memory"] |= {"peak_bytes": 2_100_000_000, "kept": True}
    text = " ".join(read([line, sample.killed()]).text)
    assert "the promise was broken: its peak was 2.10 GB, 100 MB over the budget" in text
    assert text.index("the promise was broken") < text.index("killed before")
    assert "1 of 2 runs went over budget" in text


def test_a_refused_budget_says_what_it_would_take(words: str, whole: Reader) -> None:
    assert "needs 1.36 GB" in words
    assert "memory-0" not in whole.figures


def test_an_interrupted_case_is_partial() -> None:
    line = sample.killed() | {"status": "interrupted", "why": None}
    text = " ".join(read([line]).text)
    assert "interrupted; what is shown is partial." in text
    assert "(interrupted, partial)" in text


def test_a_box_that_broke_is_a_warning() -> None:
    line = sample.boxed()
    line["boxed"] |= {"oom_kills": 1}
    assert "in a control group: the kernel killed it for its memory" in " ".join(read([line]).text)
    line["boxed"] |= {"oom_kills": 0, "same_tokens": False}
    assert "other tokens came out" in " ".join(read([line]).text)


def test_peers_stand_beside_ours_as_ratios() -> None:
    ours, peer = sample.measured(2.0, 4096), sample.peer()
    ours["tests"]["tg128"]["mean"], peer["tests"]["tg128"]["mean"] = 15.0, 10.0
    assert "15.0, 1.50x" in read([ours, peer]).cells


def test_a_peer_of_another_model_is_not_compared() -> None:
    peer = sample.peer()
    peer["model"] = {"name": "another"}
    assert not [cell for cell in read([sample.measured(2.0, 4096), peer]).cells if cell.endswith("x") and "," in cell]


def test_energy_that_was_not_counted_says_why(whole: Reader) -> None:
    text = " ".join(whole.text)
    assert "No energy for some: the kernel offers no RAPL counters here." in text
    assert "1.31 J" in whole.cells


def test_a_budget_has_one_colour_and_a_component_too(whole: Reader) -> None:
    book = Book(tuple(sample.everything()))
    colours = {case.budget: book.colour(case) for case in book.ours}
    assert len(set(colours.values())) == len(colours) == 5
    fills: dict[str, set[str]] = {}
    for key, figure in whole.figures.items():
        for trace in figure["data"] if key.startswith("memory") else []:
            if "fillcolor" in trace:
                fills.setdefault(trace["name"], set()).add(trace["fillcolor"])
    assert fills["weights"] == {"var(--c-weights)"}
    assert all(len(found) == 1 for found in fills.values())


def test_colours_of_charts_are_defined_for_light_and_dark() -> None:
    text = page(Book(tuple(sample.everything())))
    style = text.partition("<style>")[2].partition("</style>")[0]
    used = set(re.findall(r"var\((--[\w-]+)\)", text))
    dark = "".join(
        re.findall(r"prefers-color-scheme: ?dark\)\s*\{\s*:root:not\(\.paper\)\s*\{(.*?)\}", style, re.DOTALL)
    )
    assert used
    for name in used - {"--mark"}:
        assert f"{name}:" in style
        assert f"{name}:" in dark


def test_nothing_a_file_says_is_markup() -> None:
    lines = sample.sample((4096,))
    for line in lines:
        line["case"] = line["label"] = line["why"] = EVIL
        line["model"] |= {"name": EVIL, "family": EVIL}
        line["machine"]["cpu"] = EVIL
        line["asked"]["budget"] = EVIL
        line["versions"][EVIL] = EVIL
        line["noise"] |= {"noisy": True, "why": [EVIL]}
        for held in [(line.get("timeline") or {}).get("components"), (line.get("plan") or {}).get("bytes")]:
            if held:
                held[EVIL] = held.pop("ple")
        if line.get("timeline"):
            line["timeline"]["marks"][0][1] = EVIL
        if line.get("energy"):
            line["energy"]["why"] = EVIL
    reader = read(lines)
    assert "img" not in reader.tags
    assert not [key for _, key, _ in reader.attributes if key.startswith("on")]
    assert len(reader.scripts) == 3
    shown = " ".join(reader.text)
    assert "</script><img src=x onerror=alert(1)>" in shown
    assert not re.search(r"[\x00-\x08\x0b-\x1f\u2028\u2029]", shown)
    raw = next(text for attrs, text in reader.scripts if attrs.get("id") == "figures")
    assert "<" not in raw
    assert "\u2028" not in raw
    drawn = json.dumps(json.loads(raw))
    assert "<img" not in drawn
    assert "&lt;img" in drawn


def test_names_cannot_leave_a_hover_template() -> None:
    """``%{...}`` and tags are read in templates: names are in texts instead, and escaped."""
    line = sample.measured(2.0, 512)
    line["timeline"]["components"] = {"%{x}<extra>": [10**9] * 400}
    trace = read([line]).figures["memory-0"]["data"][0]
    assert trace["name"] == "%{x}&lt;extra&gt;"
    assert "%{x}" not in trace["hovertemplate"]


BAD = [0, -1, math.nan, math.inf, -math.inf, "12", True, None, [], {}, 1 << 1100]


@pytest.mark.parametrize("bad", BAD, ids=lambda value: str(value)[:8])
def test_what_is_no_number_is_blank(bad: Any) -> None:
    line = sample.measured(2.0, 4096)
    line["tests"]["tg128"]["mean"] = bad
    line["first_token"] += [[bad, 1.0], [64, bad], bad]
    line["latency_ms"]["tg128"]["p95"] = bad
    line["timeline"]["rss"][5] = bad
    line["bandwidth"] |= {"read_gbps": bad, "bytes_per_token": bad}
    line["memory"]["planned_bytes"] = bad
    line["asked"]["context"] = bad
    reader = read([line])
    assert "tg128" not in [cell for cell in reader.cells if cell == "tg128"]
    assert "nan" not in " ".join(reader.text).lower().split()
    assert "NaN" not in next(text for attrs, text in reader.scripts if attrs.get("id") == "figures")


def paths(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a line."""
    if at:
        yield at
    if isinstance(value, dict) and len(at) < 3:
        for key, inner in value.items():
            yield from paths(inner, (*at, key))


def test_any_key_may_be_missing_or_of_another_type() -> None:
    line = sample.boxed(2.0, 4096)
    line["timeline"] = sample.timeline(random.Random(0), {"weights": 5, "runtime": 2, "kv": 1}, [(1.0, "a")], 3)
    for place, path in enumerate(paths(line)):
        broken = copy.deepcopy(line)
        inner = broken
        for key in path[:-1]:
            inner = inner[key]
        if place % 2:
            del inner[path[-1]]
        else:
            inner[path[-1]] = ({}, "x", [[]])[place % 3]
        assert len(sections_of([broken])) > 1000, path


def sections_of(lines: list[dict[str, Any]]) -> str:
    """The page without its scripts."""
    return page(Book(tuple(lines))).partition("<script")[0]


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_whatever_a_line_holds_a_page_comes_out(data: st.DataObject) -> None:
    line = sample.measured(2.0, 512)
    line["timeline"] = sample.timeline(random.Random(0), {"weights": 5, "runtime": 2, "kv": 1}, [(1.0, "a")], 3)
    for key in data.draw(st.lists(st.sampled_from(sorted(line)), min_size=1, max_size=3, unique=True)):
        if isinstance(line[key], dict) and data.draw(st.booleans()):
            line[key][data.draw(st.sampled_from(sorted(line[key])))] = data.draw(JSON)
        else:
            line[key] = data.draw(JSON)
    assert "<h1>" in sections_of([line, sample.peer()])


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [{}],
        [sample.peer()],
        [sample.refused()],
        [sample.measured(2.0, 512)],
        [sample.measured(2.0, 512) | {"timeline": None}],
        [sample.gpu()],
        [sample.measured(2.0, 512) | {"asked": {}}],
    ],
    ids=["none", "empty", "peers only", "refused only", "one", "no timeline", "a gpu only", "nothing asked"],
)
def test_few_lines_make_a_page_too(lines: list[dict[str, Any]]) -> None:
    reader = read(lines)
    assert reader.tags.count("h1") == 1
    assert "memory-0" in reader.figures or not (lines and lines[0].get("timeline"))


def test_forty_cases() -> None:
    reader = read(sample.many(40))
    assert len([key for key in reader.figures if key.startswith("memory")]) == 40
    assert len(reader.figures["speed-decode"]["layout"]["xaxis"]["tickvals"]) <= 10


def test_the_lines_come_with_the_page(whole: Reader) -> None:
    address = next(str(value) for name, key, value in whole.attributes if name == "a" and key == "href")
    text = gzip.decompress(base64.b64decode(address.partition(",")[2])).decode()
    assert [json.loads(line) for line in text.splitlines()] == sample.everything()


def test_figures_are_such_that_plotly_takes_them(whole: Reader) -> None:
    from plotly import graph_objects

    for figure in whole.figures.values():
        layout = {key: value for key, value in figure["layout"].items() if key != "meta"}
        plain = re.sub(r"var\(--[\w-]+\)", "#123456", json.dumps({"data": figure["data"], "layout": layout}))
        graph_objects.Figure(json.loads(plain))


def test_the_file_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    path.write_text("before")
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(Exception, match="No space left"):
        write_report([sample.refused()], path)
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["report.html"]
    monkeypatch.undo()
    write_report([sample.refused()], path)
    assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert os.listdir(tmp_path) == ["report.html"]


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CannotCreate, match="nowhere"):
        write_report([sample.refused()], tmp_path / "nowhere" / "report.html")


def test_without_plotly_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edge.profile.report.page import plotly

    plotly.cache_clear()
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(Usage, match="pip install plotly"):
        write_report([sample.refused()], tmp_path / "report.html")
    assert os.listdir(tmp_path) == []


def test_the_package_is_imported_without_plotly() -> None:
    code = "import sys; import edge.profile.report.page; assert not {'plotly', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_same_lines_same_page() -> None:
    assert page(Book(tuple(sample.sample()))) == page(Book(tuple(sample.sample())))


def test_values_that_are_not_finite_are_refused_in_scripts() -> None:
    with pytest.raises(ValueError, match="JSON"):
        json_text({"x": math.nan})


@given(st.text())
def test_tags_and_labels_hold_any_text(text: str) -> None:
    reader = Reader()
    reader.feed(tag("p", text, title=text))
    reader.close()
    assert reader.tags == ["p"]
    assert [key for _, key, _ in reader.attributes] == ["title"]
    assert reader.open == []
    assert "<" not in label(text)


@given(st.floats(min_value=1e-6, max_value=1e12))
def test_three_digits_are_within_half_a_percent(value: float) -> None:
    text = digits(value)
    assert "e" not in text
    assert float(text.replace(",", "")) == pytest.approx(value, rel=0.0051, abs=1e-6)


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (digits(9.999), "10.0"),
        (digits(0.0123), "0.0123"),
        (digits(1234.5), "1,230"),
        (seconds(0.0061), "6.1 ms"),
        (seconds(0.64), "640 ms"),
        (seconds(0.9999), "1.0 s"),
        (seconds(7.13), "7.1 s"),
        (seconds(59.96), "1 min 0 s"),
        (seconds(70), "1 min 10 s"),
        (seconds(None), BLANK),
        (share(0.967), "97%"),
        (short_size(2e9), "2 GB"),
        (short_size(1.5e9), "1.5 GB"),
        (short_size(100), "100 B"),
        (span([8.24, 20.07]), "8.24 to 20.1"),
        (span([8.241, 8.242]), "8.24"),
        (listed(["a", "b", "c"]), "a, b and c"),
        (listed(["a"]), "a"),
        (listed([]), ""),
        (listed(["a", "b", "c", "d", "e"], 2), "a, b and 3 more"),
    ],
)  # fmt: skip
def test_numbers_for_people(made: str, expected: str) -> None:
    assert made == expected


def test_names_of_tests() -> None:
    assert [named("tg128 @ d4096").depth, named("tg128").depth] == [4096, 0]
    assert [named(n).kind for n in ("pp512", "tg128", "tg128 @ d4096", "tg128 @d1", "ppx", "")] == [
        "prefill", "decode", "decode", "", "", "",
    ]  # fmt: skip


def test_a_table_refuses_a_row_of_another_length_and_drops_columns_that_say_nothing() -> None:
    table = Table(["case", "a", "b"])
    with pytest.raises(ValueError, match="2 cells for 3 columns"):
        table.add("x", "1")
    table.add("x", BLANK, "2")
    assert isinstance(table.html(), Markup)
    assert ">a<" not in table.html()
    assert ">b<" in table.html()


def test_a_case_believes_numbers_only() -> None:
    assert [finite(v) for v in (True, "1", math.nan, math.inf, 1e300, 3)] == [None, None, None, None, None, 3.0]
    assert Case({"asked": {"budget_bytes": 0}}).budget == "no budget"
    assert Case({"asked": {"budget": "2GB", "budget_bytes": 2 * 10**9}}).budget == "2 GB"
    assert Case({"asked": {"budget": "2000000000", "budget_bytes": 2 * 10**9}}).budget == "2 GB"
