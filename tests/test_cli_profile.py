"""``edge profile``: measured in processes of their own, kept as they end, whatever becomes of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from edge.cli import profile
from edge.profile import box, case, forecast, noise, results, run, subject
from edge.profile.launch import Ended, launch
from loaders.errors import Usage
from tests.command import Cli, Done, cli_fixture, edge_command, environment, refused  # noqa: F401
from tests.sample_results import everything

SHORT = ("--repeat", 1, "-n", 6, "-t", 1)


@pytest.fixture(autouse=True)
def nothing_to_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """How fast this machine decodes and reads is measured elsewhere."""
    monkeypatch.setattr(forecast, "forecast", lambda plan, threads: forecast.Forecast(20e9))
    monkeypatch.setattr(run, "measured_bandwidth", lambda threads=None: 20e9)


@pytest.fixture(scope="module", autouse=True)
def rates_known(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of these tests alone: others remember how much this very process holds. Processes of their own find the
    rates of this machine measured already, though badly.
    """
    from edge.budget.decoding import Rates
    from edge.budget.rates import key
    from edge.store.cache import remember

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGE_CACHE", str(tmp_path_factory.mktemp("cache")))
        for threads in (None, 1, 2):
            known = Rates({"int4": 0.8, "int8": 0.8, "bf16": 0.8, "float32": 0.8}, bandwidth=20e9)
            remember("machine.json", key("native", "cpu", threads), known.as_dict())
        yield


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory, rates_known: None) -> tuple[Done, Path]:
    """The demo: one budget that nothing fits, one that does; a prompt, and a context beyond it."""
    folder = tmp_path_factory.mktemp("profiled") / "report"
    line = edge_command("profile", "--budgets", "40MB,90MB", "--contexts", "64,560", *SHORT, "-o", folder, "--json")
    done = subprocess.run(line, capture_output=True, text=True, env=environment(), check=False, timeout=300)
    return Done(done.returncode, done.stdout, done.stderr), folder


def test_every_figure_of_a_case(profiled: tuple[Done, Path]) -> None:
    done, folder = profiled
    assert (done.code, done.err) == (0, "")
    lines = done.json["cases"]
    assert lines == results.read(folder / "results.jsonl")
    assert [line["case"] for line in lines] == [f"{b}, {c} tokens" for b in ("40MB", "90MB") for c in (64, 560)]
    assert [line["status"] for line in lines] == ["refused", "refused", "ok", "ok"]
    for line in lines[:2]:
        assert line["needed_bytes"] > 40 * 10**6
        assert "nothing fits" in line["why"]
    short, deep = lines[2:]
    assert set(short["tests"]) == {"pp64", "tg6"}
    assert set(deep["tests"]) == {"pp512", "pp560", "tg6", "tg6 @ d560"}
    for line in (short, deep):
        check_case(line)
    assert [tokens for tokens, _ in deep["first_token"]][-2:] == [512, 560]
    times = [seconds for _, seconds in deep["first_token"]]
    assert times == sorted(times)
    assert deep["tests"]["pp560"]["mean"] == pytest.approx(560 / times[-1], rel=1e-6)


def check_case(line: dict[str, Any]) -> None:
    """What holds of any case that ran."""
    memory, plan = line["memory"], line["plan"]
    assert memory["kept"] is True
    assert memory["peak_bytes"] <= line["asked"]["budget_bytes"]
    assert memory["planned_bytes"] == plan["total_bytes"] == sum(plan["bytes"].values())
    assert line["predicted"]["memory_error"] == pytest.approx(memory["planned_bytes"] / memory["peak_bytes"] - 1)
    assert max(line["timeline"]["rss"]) <= memory["peak_bytes"] + (1 << 20)
    assert [name for _, name in line["timeline"]["marks"]][:3] == ["started", "loaded", "first prompt"]
    assert set(line["timeline"]["components"]) >= {"runtime", "weights", "kv", "activations"}
    for test, found in line["tests"].items():
        results.check_figure(found, "line", test)
        assert found["mean"] > 0
    for latency in line["latency_ms"].values():
        assert 0 < latency["p50"] <= latency["p95"] <= latency["p99"]
    band = line["bandwidth"]
    assert band["achieved_gbps"] == pytest.approx(line["tests"]["tg6"]["mean"] * plan["bytes_per_token"] / 1e9)
    assert 0 <= line["ple"]["hit_rate"] <= 1
    assert (line["energy"]["joules_per_token"] is None) == (line["energy"]["why"] is not None)
    assert line["cold"]["load_s"]["mean"] > 0
    assert line["model"]["weights"] == "real"
    assert line["model"]["parameters"] > 10**7
    assert line["versions"]["edge"]


def test_the_page_has_the_same_figures(profiled: tuple[Done, Path]) -> None:
    done, folder = profiled
    page = (folder / "report.html").read_text()
    assert done.json["report"] == str(folder / "report.html")
    assert page.startswith("<!DOCTYPE html>")
    for line in done.json["cases"][2:]:
        assert line["plan"]["slice"] in page
        assert f"{line['tests']['tg6']['mean']:,.0f}"[:3] in page
    assert sorted(p.name for p in folder.iterdir()) == ["report.html", "results.jsonl"]


def test_random_weights_come_and_go(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.shrink import real, shrink

    monkeypatch.setenv("EDGE_CACHE", str(tmp_path / "cache"))
    config = tmp_path / "tiny.json"
    config.write_text(json.dumps(shrink(real("qwen3-0.6B"))))
    flags = ("--config", config, "--contexts", 16, "--budgets", "200MB", "--precision", "int8", *SHORT)
    done = cli("profile", *flags, "--json")
    assert done.code == 0, done.err
    (line,) = done.json["cases"]
    assert (line["model"]["name"], line["model"]["weights"], line["ple"]) == ("tiny", "synthetic", None)
    assert done.json["report"] is None
    assert not any((tmp_path / "cache" / "synthetic").iterdir())
    assert cli("profile", *flags, "--keep", "-q").code == 0
    (kept,) = (tmp_path / "cache" / "synthetic").glob("tiny-*")
    assert kept.name.startswith("tiny-")
    stamp = (kept / "manifest.json").stat().st_mtime_ns
    assert cli("profile", *flags, "--keep", "-q").code == 0
    assert (kept / "manifest.json").stat().st_mtime_ns == stamp


def test_in_a_control_group_the_same_tokens_come_out(cli: Cli) -> None:
    if box.why_not() is not None:
        line = refused(cli("profile", "--in-cgroup", *SHORT), 77, "--in-cgroup")
        assert "root" in line
        return
    done = cli("profile", "--budgets", "90MB", "--contexts", 32, "--in-cgroup", *SHORT, "--json")
    assert done.code == 0, done.err
    boxed = done.json["cases"][0]["boxed"]
    assert (boxed["status"], boxed["same_tokens"], boxed["oom_kills"]) == ("ok", True, 0)
    assert boxed["limit_bytes"] == 90 * 10**6


def test_a_box_that_kills_is_no_success(monkeypatch: pytest.MonkeyPatch) -> None:
    tight = box.Boxed(-9, "", "", 10, 10, None, 1, None, 1.0)
    monkeypatch.setattr(box, "run", lambda *args, **more: tight)
    asked = case.Case("1GB", run.Request(budget=10), 16, "cpu", "native", 4, 1)
    good = Ended("ok", result={"decode": {"tokens": [1], "seconds": [1.0]}})
    found = case.boxed(asked, Path("model"), case.Measured(warm=[(good, 1.0)]))
    assert (found["status"], found["same_tokens"], found["oom_kills"]) == ("killed", False, 1)
    assert profile.verdict([{"status": "ok", "boxed": found}]) == 1


def test_one_that_is_killed_does_not_stop_the_others(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first case's first warm run is killed as the kernel would."""
    started: list[str] = []

    def shot(line: list[str], **more: Any) -> Ended:
        started.append(line[-1])
        if len(started) == 2:
            return launch([line[0], "-c", "import os; os.kill(os.getpid(), 9)"], **more)
        return launch(line, **more)

    monkeypatch.setattr(case, "launch", shot)
    done = cli("profile", "--budgets", "88MB,90MB", "--contexts", 32, *SHORT, "-o", tmp_path / "r")
    assert done.code == 1
    first, second = results.read(tmp_path / "r" / "results.jsonl")
    assert (first["status"], second["status"]) == ("killed", "ok")
    assert "killed by" in first["why"]
    assert "cold" in first
    assert "tests" not in first
    assert f"88MB, 32 tokens: killed: {first['why']}\n" in done.out
    assert (tmp_path / "r" / "report.html").exists()


def test_what_happens_to_one_case_is_its_own(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that cannot be looked at; a plan that is not the one announced; a packing that is killed."""
    seen: list[Path] = []

    def broken(path: Path, precision: str) -> list[Path]:
        seen.append(path)
        if len(seen) == 1:
            raise OSError(5, "Input/output error", str(path))
        return []

    monkeypatch.setattr(subject, "files_of", broken)
    monkeypatch.setattr(case, "changed", lambda ran, plan: len(seen) == 2)
    monkeypatch.setattr(subject, "needs_packing", lambda path, plan: len(seen) == 3)
    flags = ("--budgets", "88MB,89MB,90MB", "--contexts", 16, *SHORT, "-o", tmp_path / "r", "-q")
    started: list[str] = []

    def shot(line: list[str], **more: Any) -> Ended:
        started.append(line[-1])
        return launch([line[0], "-c", "import os; os.kill(os.getpid(), 9)"] if len(started) > 2 else line, **more)

    monkeypatch.setattr(case, "launch", shot)
    assert cli("profile", *flags).code == 1
    first, second, third = results.read(tmp_path / "r" / "results.jsonl")
    assert first["status"] == "failed"
    assert "Input/output error" in first["why"]
    assert second["status"] == "failed"
    assert second["why"].startswith("another plan ran: ")
    assert third["status"] == "killed"


def test_modules_of_the_current_folder_are_not_ours(tmp_path: Path) -> None:
    (tmp_path / "secrets.py").write_text("raise SystemExit('ran')")
    (tmp_path / "statistics.py").write_text("raise SystemExit('ran')")
    line = [sys.executable, "-P", *edge_command("profile", "--budgets", "90MB", "--contexts", 16, *SHORT)[1:]]
    done = subprocess.run(line, capture_output=True, text=True, env=environment(), cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr


def test_an_interrupt_keeps_what_there_is(tmp_path: Path) -> None:
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        folder = tmp_path / str(number)
        line = edge_command("profile", "--budgets", "88MB,90MB", "--contexts", 32, "--repeat", 900, "-o", folder)
        process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
        for _ in range(3000):
            if (folder / "results.jsonl").exists() and b"edge.profile.child" in children(process.pid):
                break
            time.sleep(0.02)
        time.sleep(1.5)
        os.kill(process.pid, number)
        _, err = process.communicate(timeout=60)
        assert process.returncode == code, err
        assert "Traceback" not in err
        (only,) = results.read(folder / "results.jsonl")
        assert only["status"] == "interrupted"
        assert "of 900 runs" in only["why"]
        assert "interrupted" in (folder / "report.html").read_text()


def children(pid: int) -> bytes:
    """The command lines of a process's children."""
    with suppress(OSError):
        pids = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return b" ".join(Path(f"/proc/{child}/cmdline").read_bytes() for child in pids)
    return b""


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (("--budgets", "1kB"), 80, ("nothing fits", "needs")),
        (("--budgets", "90MB,90MB"), 2, ("--budgets", "nothing twice")),
        (("--budgets", "much"), 2, ("--budgets",)),
        (("--contexts", "0"), 2, ("--contexts",)),
        (("--contexts", "-4"), 2, ("--contexts",)),
        (("--contexts", "99999"), 2, ("--contexts", "this model has a context of 1024")),
        (("--contexts", "12,"), 2, ("--contexts",)),
        (("--repeat", "0"), 2, ("--repeat",)),
        (("--config", "no-such-model"), 66, ("no-such-model",)),
        (("--config", "gemma-3n-E2B", "x"), 2, ("one of them",)),
        (("no/such/model",), 66, ("no/such/model",)),
        (("--against", "everybody"), 2, ("--against", "llama.cpp")),
        (("--engine", "steam"), 2, ("--engine",)),
        (("--compare", "a.jsonl", "b.jsonl"), 66, ("a.jsonl",)),
    ],
)
def test_what_cannot_be_measured_is_refused_in_a_line(
    cli: Cli, tmp_path: Path, flags: tuple[str, ...], code: int, words: tuple[str, ...]
) -> None:
    refused(cli("profile", *flags, "-o", tmp_path / "r"), code, *words)
    assert not (tmp_path / "r").exists()


def test_a_disk_too_full_for_the_weights(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    monkeypatch.setenv("EDGE_CACHE", str(tmp_path / "cache"))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**9))
    done = cli("profile", "--config", "gemma-3n-E2B", "--budgets", "2GB", *SHORT, "-o", tmp_path / "r")
    assert done.code == 74
    assert "disk full" in done.err.splitlines()[-1]
    assert "Traceback" not in done.err
    assert not (tmp_path / "r" / "results.jsonl").exists()
    assert not any((tmp_path / "cache" / "synthetic").iterdir())


def test_a_disk_too_full_for_a_line(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    done = cli("profile", "--budgets", "40MB,90MB", "--contexts", 32, *SHORT, "-o", tmp_path / "r", "-q")
    assert done.code == 74
    assert "No space left" in done.err.splitlines()[-1]
    assert "does not fit" in done.out


def test_comparing_says_what_got_worse(cli: Cli, tmp_path: Path) -> None:
    lines = everything()
    slower = json.loads(json.dumps(lines))
    for line in slower:
        for found in (line.get("tests") or {}).values():
            found["values"] = [v / 2 for v in found["values"]]
            found["mean"], found["deviation"] = found["mean"] / 2, found["deviation"] / 2
    old, new = tmp_path / "old.jsonl", tmp_path / "new.jsonl"
    for path, content in ((old, lines), (new, slower)):
        path.write_text("".join(json.dumps(line) + "\n" for line in content))
    assert cli("profile", "--compare", old, old).code == 0
    done = cli("profile", "--compare", old, new)
    assert done.code == 1
    assert "tg128" in done.out
    assert cli("profile", "--compare", new, old).code == 0
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({**lines[0], "model": {"name": "another"}}) + "\n")
    assert cli("profile", "--compare", old, other).code == 1
    assert cli("profile", "--compare", old, new, "--json").json["regressed"] is True


def test_a_ladder_of_budgets(cli: Cli) -> None:
    found = subject.find(None, None)
    wanted = run.Wanted(run.Request(), None, (64,), "cpu", "auto", 8, 1)
    items = run.planned(found, wanted)
    assert all(item.plan is not None for item in items)
    budgets = [item.case.request.budget for item in items]
    assert budgets == sorted(set(budgets))
    assert 2 <= len(budgets) <= run.RUNGS
    with pytest.raises(Usage, match="--contexts"):
        run.planned(found, run.Wanted(run.Request(), None, (1020,), "cpu", "auto", 8, 1))


@pytest.mark.parametrize(
    ("size", "text"), [(1.31e9, "1.4GB"), (1e9, "1GB"), (999.9e6, "1e+03MB"), (86.2e6, "87MB"), (12.01e9, "13GB")]
)
def test_round_budgets(size: float, text: str) -> None:
    from edge.budget.units import parse_bytes

    assert parse_bytes(run.rounded_up(size)) >= size
    assert run.rounded_up(size) == (text if text != "1e+03MB" else "1000MB")


def test_a_noisy_machine_is_said_to_be_one() -> None:
    rates_of = iter([30e9, 20e9])
    with noise.Around(bandwidth=lambda: next(rates_of)) as around:
        pass
    found = around.as_dict()
    assert found["noisy"] is True
    assert found["why"][0] == "memory read 30.0 GB/s before and 20.0 after"
    with noise.Around(bandwidth=lambda: 30e9) as around:
        time.sleep(0.05)
    around.others = 0.0
    assert around.as_dict() == {"noisy": False, "why": [], "others_cores": 0.0}
