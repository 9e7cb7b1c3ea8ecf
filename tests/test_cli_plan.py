"""``edge plan``: it says what run will do, what does not fit and by how much, and what it remembers of the machine."""

from __future__ import annotations

import io
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from edge.budget import machine
from edge.budget.plan import Floor, Request, enumerate_plans, pick
from edge.budget.units import format_bytes
from edge.store.text import tokenizer_bytes
from loaders.checkpoint import Checkpoint
from loaders.sketch import sketch
from tests.command import ENOUGH, PROMPT, Cli, cli_fixture, floor_fixture, refused, short_run  # noqa: F401
from tests.shrink import CONFIGS
from tests.small import gemma3n_fixture  # noqa: F401


def test_plan_as_json_says_what_run_will_do(cli: Cli, gemma3n: Path, floor: Floor) -> None:
    done = cli("plan", gemma3n, "--json", "-c", 64, *ENOUGH)
    assert (done.code, done.err) == (0, "")
    found = done.json
    keys = {
        "model",
        "weights",
        "budget_bytes",
        "ram_budget_bytes",
        "floor_bytes",
        "read_gbps",
        "plan",
        "nearest",
        "candidates",
    }
    assert set(found) == keys
    assert (found["budget_bytes"], found["floor_bytes"], found["nearest"]) == (64 * 10**9, floor.host, None)
    only_here = {"fits": True, "over_bytes": 0, "predicted_tps": found["plan"]["predicted_tps"]}
    assert found["plan"] == {**cli(*short_run(gemma3n), "--json").json["plan"], **only_here}
    assert found["plan"] == found["candidates"][0]
    for row in found["candidates"]:
        assert 0 < row["predicted_tps"] <= found["read_gbps"] * 1e9 / row["bytes_per_token"]
    assert all(row["fits"] is True and row["over_bytes"] == 0 for row in found["candidates"])
    names = {row["slice"] for row in found["candidates"]}
    assert names == {f"{a}{b}".strip("+") for a in ("half", "quarter") for b in ("", "+skip-first-shared")} | {
        "full",
        "skip-first-shared",
    }
    recipes = (("float32", "float32"), ("bf16", "bf16"), ("int8", "int8"), ("int4", "int8"), ("int4", "int4"))
    assert {(row["precision"], row["head"], row["ple"]) for row in found["candidates"]} == {
        (*recipe, tier) for recipe in recipes for tier in ("ram", "ssd")
    }


def test_plan_that_does_not_fit_says_by_how_much(cli: Cli, gemma3n: Path, floor: Floor) -> None:
    done = cli("plan", gemma3n, "--json", "--budget", floor.host)
    assert done.code == 80
    assert done.err.startswith("edge: error: nothing fits")
    assert done.err.count("\n") == 1
    found = done.json
    assert found["plan"] is None
    needed = found["nearest"]["needed_bytes"]
    assert f"{needed} bytes" in done.err
    assert needed == min(row["total_bytes"] for row in found["candidates"])
    assert all(not row["fits"] and row["over_bytes"] == row["total_bytes"] - floor.host for row in found["candidates"])
    assert cli("plan", gemma3n, "--json", "--budget", needed).json["plan"]["total_bytes"] == needed
    assert cli("plan", gemma3n, "--json", "--budget", needed - 1).code == 80
    text = cli("plan", gemma3n, "--budget", needed - 1)
    assert text.code == 80
    assert "1 B over" in text.out
    assert "nothing fits" in text.out


def test_plan_as_text_marks_the_chosen_row(cli: Cli, gemma3n: Path, floor: Floor) -> None:
    done = cli("plan", gemma3n, "-c", 64, *ENOUGH)
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    components = "runtime tokenizer weights ple kv activations"
    header = f"slice precision PLE context ~parameters {components} total tokens/s ~ fits"
    assert " ".join(lines[0].split()) == header
    assert [line.split()[1:4] for line in lines if line.startswith("->")] == [["full", "float32", "ram"]]
    assert lines[-2].startswith("plan: full in float32, PLE table in RAM, context 64: ")
    assert re.fullmatch(
        r" +about [\d.,]+ tokens/s, [\d.,]+ at the end of the context, if the engine is as fast as is usual; "
        r"at most [\d.,]+: [\d.]+ [kM]B a token at [\d.]+ GB/s, as this machine reads",
        lines[-1],
    )
    assert "\x1b" not in done.out


@pytest.mark.parametrize("width", [100, 160])
def test_a_table_is_never_cut(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where components do not fit beside each other, totals are shown; nothing of what a model has not."""
    from edge.cli import plan

    out = io.StringIO()
    monkeypatch.setattr(plan, "stdout", lambda: Console(file=out, width=width, no_color=True, highlight=False))
    source, request = sketch(CONFIGS / "llama-3.1-8B.json"), Request(budget=5 * 10**9)
    plans = enumerate_plans(source, request, Floor(256 << 20))
    chosen = pick(plans, request)
    plan.show(plans, chosen, request, [], plan.Pace())
    names = "slice precision context ~parameters runtime weights kv activations total fits"
    if width == 100:
        names = names.replace("runtime weights kv activations ", "")
    head, *rows = out.getvalue().partition("\n\n")[0].splitlines()
    assert head.split() == names.split()
    assert "\u2026" not in out.getvalue()
    row = next(row for row in rows if row.startswith("->"))
    assert format_bytes(chosen.total_bytes) in row
    # bf16 would not have fitted: the row says what it is.
    assert chosen.kv == "int8"
    assert (f"int8 {format_bytes(chosen.bytes['kv'])}" in row) == (width == 160)


def test_plan_chooses_once(cli: Cli, gemma3n: Path, floor: Floor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pricing everything again for every row took minutes on a full-size model."""
    from edge.cli import plan

    calls, real = [], plan.enumerate_plans

    def counted(*args: Any) -> Any:
        calls.append(args)
        return real(*args)

    monkeypatch.setattr(plan, "enumerate_plans", counted)
    least = cli("plan", gemma3n, "--json", "--budget", floor.host).json["nearest"]["needed_bytes"]
    calls.clear()
    assert cli("plan", gemma3n, "--json", "--budget", least + 2000).code == 0
    assert len(calls) == 1


PRECISIONS = [("--precision", name) for name in ("float32", "bf16", "int8", "int4")]


@pytest.mark.parametrize("flags", [(), ("--ple", "ram"), ("--slice", "half"), *PRECISIONS])
def test_a_tight_budget_takes_less_and_says_so(cli: Cli, gemma3n: Path, floor: Floor, flags: tuple[str, ...]) -> None:
    planned = cli("plan", gemma3n, "--json", "--budget", floor.host, *flags).json
    least = planned["nearest"]["needed_bytes"]
    args = ("run", gemma3n, PROMPT, "-n", 3, "--temp", 0, *flags)
    done = cli(*args, "--budget", least)
    assert done.code == 0
    fit = next(line for line in done.err.splitlines() if "to fit:" in line)
    found = cli(*args, "--budget", least, "--json").json["plan"]
    assert found["total_bytes"] == least
    assert found["context"] == 512
    assert "context 2048 -> 512" in fit
    if "--slice" not in flags:
        assert found["slice"] == "quarter+skip-first-shared"
        assert "slice full -> quarter+skip-first-shared" in fit
    if "--ple" not in flags:
        assert found["ple"] == "ssd"
        assert "PLE table ram -> ssd" in fit
    if "--precision" not in flags:
        assert "precision float32 -> int4, head int4" in fit
    else:
        assert found["precision"] == flags[1]
        assert ("precision " in fit) == (flags[1] == "int4"), "the head is what is left to give"
    refused(cli(*args, "--budget", least - 1), 80, f"--budget {least}")


def test_a_budget_in_between_gives_up_as_little_as_it_can(cli: Cli, gemma3n: Path, floor: Floor) -> None:
    rows = cli("plan", gemma3n, "--json", "-c", 64, *ENOUGH).json["candidates"]
    full = {row["ple"]: row["total_bytes"] for row in rows if (row["slice"], row["precision"]) == ("full", "float32")}
    assert full["ssd"] < full["ram"]
    done = cli("run", gemma3n, PROMPT, "-n", 3, "-c", 64, "--temp", 0, "--budget", full["ram"] - 1)
    assert done.code == 0
    chosen = cli("plan", gemma3n, "--json", "-c", 64, "--budget", full["ram"] - 1).json["plan"]
    assert (chosen["slice"], chosen["precision"]) == ("full", "float32")


# The floor: measured once, in a process of its own


@pytest.fixture(name="fresh_cache")
def fresh_cache_fixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that nothing is remembered in."""
    monkeypatch.setenv("EDGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(name="children")
def children_fixture(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Command lines of the processes that plans start."""
    started: list[list[str]] = []
    real = subprocess.run

    def run(line: list[str], **more: Any) -> Any:
        started.append(line)
        return real(line, **more)

    monkeypatch.setattr(subprocess, "run", run)
    return started


def test_plan_measures_the_floor_once(
    cli: Cli, gemma3n: Path, fresh_cache: Path, children: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = cli("plan", gemma3n, "--json", *ENOUGH).json
    assert [line[1:] for line in children] == [["-P", "-m", "edge.budget.floor", "auto", "auto"]]
    assert cli("plan", gemma3n, "--json", *ENOUGH).json == first
    assert len(children) == 1, "it is remembered, and so is how fast memory reads"
    remembered = machine.known_floor("auto", "auto")
    assert remembered is not None
    assert remembered.floor == Floor(first["floor_bytes"], 0)
    assert first["floor_bytes"] > 24 << 20, "the interpreter and numpy are in it"
    assert first["plan"]["bytes"]["runtime"] == first["floor_bytes"]
    assert first["plan"]["bytes"]["tokenizer"] == tokenizer_bytes(Checkpoint.open(gemma3n)) > 0
    # Where a process of its own took more than this one has in memory, the run plans on what was remembered.
    machine.remember_floor("auto", "auto", replace(remembered, floor=Floor(4 << 30)))
    assert cli("run", gemma3n, PROMPT, "-n", 1, "--json", *ENOUGH).json["plan"]["bytes"]["runtime"] == 4 << 30
    machine.remember_floor("auto", "auto", replace(remembered, floor=Floor(1 << 20)))
    assert cli("plan", gemma3n, "--json", *ENOUGH).json["floor_bytes"] == 1 << 20
    seen = cli("run", gemma3n, PROMPT, "-n", 1, "--json", *ENOUGH).json["plan"]["bytes"]["runtime"]
    assert seen > 24 << 20, "and where this one has more, on that"


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"KEY": 7}', '{"KEY": {"host": true, "device": 0}}',
    '{"KEY": {"host": 1000, "device": -1, "engine": "torch", "on": "cpu"}}',
    '{"KEY": {"host": 1e9, "device": 0, "engine": "torch", "on": "cpu"}}',
    '{"KEY": {"host": 1000, "device": 0, "engine": null, "on": "cpu"}}', "\x00" * 2_000_000])  # fmt: skip
def test_nonsense_is_not_remembered(fresh_cache: Path, text: str) -> None:
    fresh_cache.mkdir()
    (fresh_cache / machine.FILE).write_text(text.replace("KEY", machine.key("auto", "auto")))
    assert machine.known_floor("auto", "auto") is None
    known = machine.Known(Floor(5, 6), "torch", "cpu")
    machine.remember_floor("auto", "auto", known)
    assert machine.known_floor("auto", "auto") == known


def test_an_engine_that_does_not_start_is_refused_as_a_run_refuses_it(
    cli: Cli, gemma3n: Path, fresh_cache: Path, children: list[list[str]]
) -> None:
    for flags, code in ((("--device", "cuda", "--engine", "native"), 78), (("--device", "tpu"), 2)):
        planned = refused(cli("plan", gemma3n, *ENOUGH, *flags), code, flags[0])
        assert planned == refused(cli(*short_run(gemma3n), *flags), code)
    assert len(children) == 2
    assert not (fresh_cache / machine.FILE).exists()


def test_a_plan_without_a_cache_is_a_plan(cli: Cli, gemma3n: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_CACHE", str(gemma3n / "config.json" / "no folder"))
    assert cli("plan", gemma3n, "--json", *ENOUGH).code == 0
    assert cli(*short_run(gemma3n), "-q").code == 0
