"""``edge eval``: the table, the JSON, which combinations run, and how it ends when something is wrong."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

import edge
from edge.cli import eval as command
from edge.evaluate import evaluate, read_text
from loaders.checkpoint import Checkpoint
from tests.command import ENOUGH, Cli, cli_fixture, edge_command, environment, refused  # noqa: F401
from tests.small import TEXTS, gemma3n_fixture, llama_fixture  # noqa: F401

ROW: dict[str, Any] = {
    "slice": str, "precision": str, "head": str, "ple": str, "kv": str, "context": int, "stride": int, "tokens": int,
    "bytes": int, "loss": float, "perplexity": float, "bits_per_byte": float, "kl": type(None), "top1": type(None),
    "seconds": float, "tps": float, "weights_bytes": int, "total_bytes": int, "memory": dict,
}  # fmt: skip
LIMITED = ("--tokens", 40, "-c", 32)


@pytest.fixture(name="story")
def story_fixture(tmp_path: Path) -> Path:
    file = tmp_path / "story.txt"
    file.write_text("\n".join(TEXTS))
    return file


def types(row: dict[str, Any]) -> dict[str, Any]:
    return {key: type(value) for key, value in row.items()}


def test_json_is_the_contract_and_nothing_else(cli: Cli, gemma3n: Path, story: Path) -> None:
    done = cli("eval", gemma3n, "--text", story, "--json", "--stride", 100, "-c", 128)
    assert (done.code, done.err) == (0, "")
    found = done.json
    (row,) = found["results"]
    assert types(row) == ROW
    assert {key: found[key] for key in row} == row
    assert set(found) == {*ROW, "model", "text", "results", "against", "saved"}
    with edge.load(gemma3n, context=128) as session:
        text = read_text(story, session.tokenizer)
        score = evaluate(session, text, stride=100)
    assert found["text"] == {
        "file": str(story), "sha256": text.sha256, "tokens": len(text.ids), "bytes": story.stat().st_size
    }  # fmt: skip
    assert (row["slice"], row["precision"], row["context"], row["stride"]) == ("full", "float32", 128, 100)
    assert (row["loss"], row["perplexity"]) == (score.loss, score.perplexity)
    assert (row["tokens"], row["bytes"]) == (len(text.ids), text.bytes)
    assert row["memory"]["planned_bytes"] == row["total_bytes"] > row["weights_bytes"]


def test_every_combination_is_a_row(cli: Cli, gemma3n: Path, story: Path) -> None:
    flags = ("--slice", "full", "--slice", "half", "--precision", "float32", "--precision", "int8", "--slice", "full")
    done = cli("eval", gemma3n, "--text", story, *LIMITED, *flags, "--against", "float32")
    assert done.code == 0
    header, *rows = (line.split() for line in done.out.splitlines())
    assert header == ["slice", "precision", "weights", "loss", "perplexity", "bits/byte", "KL", "top-1", "tokens/s"]
    pairs = [("full", "float32"), ("full", "int8"), ("half", "float32"), ("half", "int8")]
    assert [(row[0], row[1]) for row in rows] == pairs
    assert (rows[0][-3], rows[0][-2]) == ("0.00000", "100.0%")
    assert float(rows[2][-3]) > float(rows[1][-3]) > 0
    assert "text: 40 tokens, " in done.err
    assert "windows of 32 tokens that move on by 16" in done.err
    assert "peak memory: " in done.err
    assert "\x1b" not in done.out + done.err


def test_quiet_prints_the_table_alone(cli: Cli, gemma3n: Path, story: Path) -> None:
    done = cli("eval", gemma3n, "--text", story, *LIMITED, "--slice", "half", "-q")
    assert (done.code, done.err) == (0, "")
    assert [line.split()[0] for line in done.out.splitlines()] == ["slice", "half"]


def test_a_budget_decides_as_in_a_run(cli: Cli, gemma3n: Path, story: Path) -> None:
    run = cli("run", gemma3n, "once", "-n", 1, "--json", *ENOUGH).json["plan"]
    found = cli("eval", gemma3n, "--text", story, "--tokens", 20, "--json", *ENOUGH).json
    assert (found["slice"], found["precision"], found["ple"]) == (run["slice"], run["precision"], run["ple"])
    assert found["memory"]["budget_bytes"] == 64 * 10**9
    assert found["context"] == 1024
    assert found["text"]["tokens"] == found["tokens"] == 20
    refused(cli("eval", gemma3n, "--text", story, "--budget", "1MB"), 80, "nothing fits --budget")
    refused(cli("eval", gemma3n, "--text", story, "--budget", "1MB", "--against", "bf16"), 80, "nothing fits --budget")


def test_a_tight_budget_is_kept_with_the_reference_in_it(cli: Cli, gemma3n: Path, story: Path) -> None:
    """A process of its own, whose memory no other test has touched: both models on top of what it takes itself."""
    plans = [
        cli("plan", gemma3n, "--slice", "full", "--precision", precision, "-c", 32, "--json", *ENOUGH).json["plan"]
        for precision in ("float32", "int8")
    ]
    budget = sum(plan["total_bytes"] for plan in plans) - plans[0]["bytes"]["runtime"] + (2 << 20)
    flags = ("eval", gemma3n, "--text", story, "--json", *LIMITED, "--against", "float32", "--precision", "int8")
    wide = cli(*flags).json
    done = subprocess.run(
        edge_command(*flags, "--budget", budget), env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    tight = json.loads(done.stdout)
    assert tight["memory"]["peak_bytes"] <= tight["memory"]["budget_bytes"] == budget
    assert budget - tight["total_bytes"] <= 4 << 20, "there is nothing to spare"
    assert (tight["loss"], tight["kl"]) == (
        pytest.approx(wide["loss"], abs=1e-4),
        pytest.approx(wide["kl"], abs=1e-4),
    )


def test_results_are_kept_with_the_pack(cli: Cli, gemma3n: Path, story: Path) -> None:
    from edge.store.measured import measured

    found = cli("eval", gemma3n, "--text", story, *LIMITED, "--json", "--save", "--slice", "ffn=64x12").json
    checkpoint = Checkpoint.open(gemma3n)
    (kept,) = (result for result in measured(checkpoint) if result.text == found["text"]["sha256"])
    checkpoint.close()
    assert (kept.name, kept.widths, kept.tokens, kept.context) == ("ffn=64x12", (64,) * 12, 40, 32)
    assert (kept.loss, kept.bits_per_byte) == (found["loss"], found["bits_per_byte"])
    assert Path(found["saved"]).is_dir()


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (("--tokens", 1), 2, ("--tokens: 1",)),
        (("--stride", 0), 2, ("--stride: 0",)),
        (("-c", 16, "--stride", 17), 2, ("--stride: 17", "1 to 16")),
        (("--stride", 1025), 2, ("--stride: 1025", "1 to 1024")),
        (("-c", 0), 2, ("--context: 0",)),
        (("-c", 1), 2, ("--context: 1",)),
        (("--slice", "half", "--slice", "nonsense"), 2, ("--slice", "nonsense")),
        (("--precision", "int8", "--precision", "int9"), 2, ("--precision", "int9")),
        (("--against", "int8"), 2, ("--against",)),
        (("--budget", "much"), 2, ("much",)),
    ],
)
def test_flags_that_cannot_be(
    cli: Cli, gemma3n: Path, story: Path, flags: tuple[object, ...], code: int, words: tuple[str, ...]
) -> None:
    refused(cli("eval", gemma3n, "--text", story, *flags), code, *words)


def test_a_text_that_cannot_be(cli: Cli, gemma3n: Path, tmp_path: Path) -> None:
    refused(cli("eval", gemma3n, "--text", tmp_path / "no"), 66, "No such file")
    refused(cli("eval", gemma3n, "--text", tmp_path), 66, "a folder (expected a regular file)")
    refused(cli("eval", gemma3n), 2, "--text")
    (tmp_path / "bad").write_bytes(b"once \xff")
    refused(cli("eval", gemma3n, "--text", tmp_path / "bad"), 65, "byte 5 is not UTF-8")
    (tmp_path / "empty").touch()
    refused(cli("eval", gemma3n, "--text", tmp_path / "empty"), 65, "no token", "two tokens or more")


def test_a_model_that_cannot_be(cli: Cli, gemma3n: Path, story: Path, tmp_path: Path) -> None:
    refused(cli("eval", tmp_path / "model", "--text", story), 66, "no such folder")
    pack = tmp_path / "pack"
    assert cli("pack", gemma3n, "-o", pack, "--precision", "int8").code == 0
    refused(cli("eval", pack, "--text", story, "--against", "bf16"), 78, "holds int8", "Run the checkpoint itself")
    found = cli("eval", pack, "--text", story, *LIMITED, "--json").json
    assert (found["slice"], found["precision"]) == ("full", "int8")


def test_ctrl_c_leaves_nothing(cli: Cli, gemma3n: Path, story: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "evaluate", interrupted)
    kept: list[object] = []
    monkeypatch.setattr(command.Job, "save", lambda *args: kept.append(args))
    done = cli("eval", gemma3n, "--text", story, "--save", "-q")
    assert (done.code, done.out, done.err, kept) == (130, "", "", [])


def test_help_names_what_it_takes(cli: Cli) -> None:
    help = cli("eval", "--help").out
    for flag in ("--text", "--tokens", "--stride", "--against", "--save", "--slice", "--precision", "--budget", "--kv"):
        assert help.count(f"  {flag} ") + help.count(f"  {flag}\n") == 1
    assert "  eval " in cli("--help").out
