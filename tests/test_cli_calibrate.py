"""``edge calibrate``: tables, JSON, a slice file that other commands take, results that plans go by."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from edge.budget.plan import Floor, Request
from edge.calibrate.bench import Bench
from edge.calibrate.space import Space
from edge.evaluate import Score
from edge.store.measured import measured
from loaders.checkpoint import Checkpoint
from loaders.formats.measured import Measured
from loaders.formats.recipe import recipes
from loaders.network.matformer import Slice
from tests.command import Cli, cli_fixture, floor_fixture, refused  # noqa: F401
from tests.small import TEXTS, gemma3n_fixture, llama_fixture  # noqa: F401
from tests.test_cli_slice import digest

WIDE = 128


@pytest.fixture(name="text")
def text_fixture(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(TEXTS * 8))
    return path


@pytest.fixture(autouse=True)
def formula(monkeypatch: pytest.MonkeyPatch, floor: Floor) -> None:
    """Losses from a formula instead of runs: late layers need their width most."""

    def run(self: Bench, part: Slice, which: int) -> Score:
        lost = sum((i + 1) * (1 - w / WIDE) for i, w in zip(part.keep, part.widths, strict=True))
        loss = 3 + lost / 50 + 2 * (12 - len(part.keep)) + which
        precision, text = self.ready.request.precision, self.texts[0].sha256
        if which == 0:
            cut = (part.name, part.keep, part.widths)
            self.measured[part.name] = Measured(*cut, precision, precision, loss, 2.0, 100, 64, text)
        return Score(100, 300, loss, None, None, 0.1, 64, 64)

    monkeypatch.setattr(Bench, "run", run)


@pytest.fixture(name="budget")
def budget_fixture(gemma3n: Path, floor: Floor) -> int:
    """Half-way between what half the width and all of it take."""
    with closing(Checkpoint.open(gemma3n)) as checkpoint:
        space = Space(checkpoint, recipes("bf16")[0], Request(context=2048, engine="native"), floor)
        return (space.total(space.uniform(1)) + space.total(space.uniform(-1))) // 2


def test_the_answer_as_json(cli: Cli, gemma3n: Path, text: Path, budget: int) -> None:
    done = cli("calibrate", gemma3n, "--text", text, "--budget", budget, "--json")
    assert (done.code, done.err) == (0, "")
    found = done.json
    assert (found["model"], found["precision"], found["saved"]) == (str(gemma3n), "bf16", None)
    (choice,) = found["choices"]
    winner = choice["winner"]
    assert winner["bytes"] <= choice["budget_bytes"] == budget
    assert winner["loss"] < min(row["loss"] for row in choice["uniform"])
    assert choice["gain"] == pytest.approx(min(row["held_out"] for row in choice["uniform"]) - winner["held_out"])
    assert {row["slice"] for row in choice["uniform"]} >= {"ffn=64x12", "ffn=128x9+skip=6-8"}
    assert len(found["sensitivities"]) == 12 * 2 + 1
    assert {tuple(row["layers"]) for row in found["sensitivities"] if row["width"] == 0} == {(6, 7, 8)}
    assert all(set(row) >= {"slice", "bytes", "loss", "kind"} for row in found["points"])
    plan = cli("plan", gemma3n, "--json", "--slice", winner["slice"], "--precision", "bf16", "--budget", budget)
    assert plan.code == 0
    assert plan.json["plan"]["widths"] == winner["widths"]
    assert plan.json["plan"]["context"] == found["context"] == 2048


def test_the_answer_as_text_says_what_to_type_next(cli: Cli, gemma3n: Path, text: Path, budget: int) -> None:
    done = cli("calibrate", gemma3n, "--text", text, "--budget", budget)
    assert (done.code, done.err) == (0, "")
    assert "\x1b" not in done.out
    lines = done.out.splitlines()
    assert lines[0].startswith("bf16, 100 tokens to choose by, 100 held out, ")
    assert " ".join(lines[2].split()) == "layer width saves costs the full model costs the narrowest"
    assert any(line.split()[:2] == ["6-8", "skipped"] for line in lines)
    assert any(line.split() == ["slice", "bytes", "predicted", "loss", "held", "out"] for line in lines)
    assert any("better than ffn=" in line and line.endswith("on the text held out") for line in lines)
    following = lines[-1].split()
    assert following[:4] == ["next:", "edge", "run", str(gemma3n)]
    assert cli("plan", *following[3:]).code == 0


def test_a_curve_has_a_row_for_each_size(cli: Cli, gemma3n: Path, text: Path) -> None:
    done = cli("calibrate", gemma3n, "--text", text, "--points", 4, "--effort", 2)
    assert (done.code, done.err) == (0, "")
    rows = done.out.split("\n\n")[-1].splitlines()
    assert " ".join(rows[0].split()) == "bytes loss held out one width gain slice"
    assert len(rows) == 5
    assert rows[-1].split()[-1] == "full"
    found = cli("calibrate", gemma3n, "--text", text, "--points", 4, "--effort", 2, "--json").json
    losses = [choice["winner"]["loss"] for choice in found["choices"]]
    assert losses == sorted(losses, reverse=True)


def test_a_slice_file_is_what_slice_takes(cli: Cli, gemma3n: Path, text: Path, budget: int, tmp_path: Path) -> None:
    out = tmp_path / "best.json"
    done = cli("calibrate", gemma3n, "--text", text, "--budget", budget, "-o", out, "--effort", 2, "--json")
    assert done.code == 0
    winner = done.json["choices"][0]["winner"]
    lists = {"layers_to_skip": [i for i in range(12) if i not in winner["layers"]], "ffn_hidden_dims": winner["widths"]}
    assert json.loads(out.read_text()) == lists
    plan = cli("plan", gemma3n, "--slice", out, "--precision", "bf16", "--budget", budget, "--json").json["plan"]
    assert (plan["layers"], plan["widths"]) == (winner["layers"], winner["widths"])
    assert sorted(os.listdir(tmp_path)) == ["best.json", "text.txt"]


def test_a_file_is_replaced_only_when_told(
    cli: Cli, gemma3n: Path, text: Path, budget: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "best.json"
    out.write_text("mine")
    flags = ("calibrate", gemma3n, "--text", text, "--budget", budget, "-o", out, "--effort", 1)
    with monkeypatch.context() as patch:
        patch.setattr(Bench, "run", lambda *_: pytest.fail("nothing may be measured first"))
        refused(cli(*flags), 73, "already there", "--force")
        refused(cli(*flags[:-3], tmp_path / "no" / "where.json"), 73, "no such folder")
        (tmp_path / "folder").mkdir()
        refused(cli(*flags[:-3], tmp_path / "folder", "--force"), 73, "already there")
    assert out.read_text() == "mine"
    assert cli(*flags, "--force").code == 0
    assert json.loads(out.read_text())["ffn_hidden_dims"]
    assert sorted(os.listdir(tmp_path)) == ["best.json", "folder", "text.txt"]


def test_a_file_that_cannot_be_written_leaves_nothing(
    cli: Cli, gemma3n: Path, text: Path, budget: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def taken(source: Any, target: Any) -> None:
        Path(target).write_text("somebody else's")
        raise FileExistsError

    out = tmp_path / "best.json"
    monkeypatch.setattr(os, "link", taken)
    refused(
        cli("calibrate", gemma3n, "--text", text, "--budget", budget, "-o", out, "--effort", 1, "--json"), 73, "already"
    )
    assert out.read_text() == "somebody else's"
    assert sorted(os.listdir(tmp_path)) == ["best.json", "text.txt"]


def test_what_is_kept_is_what_plans_go_by(
    cli: Cli, gemma3n: Path, text: Path, budget: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    shutil.copytree(gemma3n, folder)
    before = digest(folder)
    done = cli("calibrate", folder, "--text", text, "--budget", budget, "--save", "--json")
    assert done.code == 0
    assert digest(folder) == before
    found = done.json
    checkpoint = Checkpoint.open(folder)
    kept = {result.name: result for result in measured(checkpoint)}
    checkpoint.close()
    assert Path(found["saved"]).is_relative_to(tmp_path / "cache")
    winner = found["choices"][0]["winner"]
    assert kept[winner["slice"]].loss == winner["loss"]
    points = sorted(found["points"], key=lambda point: point["bytes"])
    for i, point in enumerate(points):
        beaten = any(other["loss"] <= point["loss"] for other in points[:i])
        assert (point["slice"] in kept) >= (not beaten), "the best of each size are kept"
    assert {"full", "ffn=64x12", "ffn=32x12"} <= kept.keys()
    assert len(kept) < len(points)


# Errors


def test_a_budget_that_is_too_small(cli: Cli, gemma3n: Path, text: Path, floor: Floor) -> None:
    line = refused(cli("calibrate", gemma3n, "--text", text, "--budget", floor.host), 80, "narrowest slice", "bytes)")
    needed = int(line.rstrip(".\n").rsplit(" ", 1)[1])
    assert cli("calibrate", gemma3n, "--text", text, "--budget", needed, "--effort", 1, "--json").code == 0
    refused(cli("calibrate", gemma3n, "--text", text, "--budget", needed - 1), 80)


def test_what_makes_no_sense_is_refused(cli: Cli, gemma3n: Path, llama: Path, text: Path, tmp_path: Path) -> None:
    refused(cli("calibrate", llama, "--text", text), 78, "llama", "MatFormer")
    refused(cli("calibrate", gemma3n), 2, "--text")
    refused(cli("calibrate", gemma3n, "--text", text, "-o", tmp_path / "x.json"), 2, "--budget")
    refused(cli("calibrate", gemma3n, "--text", text, "--step", 1), 2, "--step")
    refused(cli("calibrate", gemma3n, "--text", text, "--precision", "int3"), 2, "--precision")
    refused(cli("calibrate", gemma3n, "--text", tmp_path / "gone.txt"), 66, "gone.txt")
    refused(cli("calibrate", tmp_path / "gone", "--text", text), 66, "gone")
    (tmp_path / "short.txt").write_text("once")
    refused(cli("calibrate", gemma3n, "--text", tmp_path / "short.txt"), 65, "short.txt", "64 tokens")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe" * 400)
    refused(cli("calibrate", gemma3n, "--text", tmp_path / "bytes.txt"), 65, "UTF-8")
