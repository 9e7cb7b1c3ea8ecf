"""``edge run`` and the help: what is printed where, as text and as JSON, and how the prompt gets in."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import edge
from loaders.text.tokenizer import Tokenizer
from tests.command import ENOUGH, PROMPT, STATISTICS, Cli, Done, cli_fixture, environment, piped, short_run  # noqa: F401
from tests.small import SPECIALS, gemma3n_fixture, llama_fixture  # noqa: F401


def test_the_text_is_on_stdout_and_the_rest_on_stderr(cli: Cli, gemma3n: Path) -> None:
    done = cli(*short_run(gemma3n))
    with edge.load(gemma3n, context=64) as session:
        said = "".join(event.text for event in session.generate(PROMPT, max_tokens=6))
    assert (done.code, done.out) == (0, said + "\n")
    lines = done.err.splitlines()
    assert lines[0].startswith("plan: full in float32, PLE table in RAM, context 64: ")
    assert lines[0].endswith(" of 64.0 GB budget")
    assert [line.split(":")[0] + ":" for line in lines if line.startswith(STATISTICS)] == list(STATISTICS)
    assert "6 tokens" in next(line for line in lines if line.startswith("decode:"))
    assert re.search(r"of 64\.0 GB budget \(\d+%\), .* planned", done.err)
    assert "\x1b" not in done.err
    assert "to fit" not in done.err


def test_quiet_prints_the_text_alone(cli: Cli, gemma3n: Path) -> None:
    loud, quiet = cli(*short_run(gemma3n)), cli(*short_run(gemma3n), "--quiet")
    assert quiet == Done(0, loud.out, "")


def test_without_a_budget_it_says_what_it_takes(cli: Cli, gemma3n: Path) -> None:
    done = cli("run", gemma3n, PROMPT, "-n", 2, "-c", 64)
    assert done.code == 0
    assert re.match(r"no --budget: 4/5 of the [\d.]+ [GMT]B ", done.err)


CONTRACT: dict[str, Any] = {
    "model": str,
    "text": str,
    "tokens": [int],
    "finish": str,
    "plan": {
        "slice": str,
        "precision": str,
        "head": str,
        "ple": str,
        "context": int,
        "engine": str,
        "device": str,
        "bytes": {"runtime": int, "tokenizer": int, "weights": int, "ple": int, "kv": int, "activations": int},
        "total_bytes": int,
        "bytes_per_token": int,
    },
    "memory": {
        "budget_bytes": int,
        "planned_bytes": int,
        "peak_bytes": int,
        "device_peak_bytes": type(None),
        "components": dict,
    },
    "timing": {"load_s": float, "ttft_s": float, "prefill_tps": float, "decode_tps": float, "read_gbps": float},
    "ple": {"tier": str, "rows": int, "bytes_read": int, "hit_rate": float},
}


def conforms(value: Any, contract: Any) -> bool:
    if isinstance(contract, dict):
        return isinstance(value, dict) and all(key in value and conforms(value[key], contract[key]) for key in contract)
    if isinstance(contract, list):
        return isinstance(value, list) and all(type(item) is contract[0] for item in value)
    return type(value) is contract


@pytest.mark.parametrize("tier", ["ram", "ssd"])
def test_json_is_the_contract_and_nothing_else(cli: Cli, gemma3n: Path, tier: str) -> None:
    done = cli(*short_run(gemma3n), "--json", "--ple", tier)
    assert (done.code, done.err) == (0, "")
    found = done.json
    assert set(found) == set(CONTRACT)
    assert {key for key in CONTRACT if not conforms(found[key], CONTRACT[key])} == set()
    assert found["text"] + "\n" == cli(*short_run(gemma3n), "--quiet").out
    assert len(found["tokens"]) == 6
    assert found["finish"] == "length"
    assert found["plan"]["total_bytes"] == sum(found["plan"]["bytes"].values()) == found["memory"]["planned_bytes"]
    assert found["memory"]["budget_bytes"] == 64 * 10**9
    assert found["ple"]["tier"] == found["plan"]["ple"] == tier
    assert (found["ple"]["bytes_read"] > 0) == (tier == "ssd")
    assert 0 <= found["ple"]["hit_rate"] <= 1
    assert found["timing"]["decode_tps"] > 0


def test_json_of_a_model_without_a_table(cli: Cli, llama: Path) -> None:
    found = cli(*short_run(llama), "--json").json
    assert found["ple"] is None
    assert found["plan"]["ple"] == "none"
    assert found["plan"]["slice"] == "full"
    assert len(found["tokens"]) == 6


def test_json_of_one_token_has_no_number_that_is_none(cli: Cli, gemma3n: Path) -> None:
    found = cli("run", gemma3n, PROMPT, "-n", 1, "-c", 64, "--json", *ENOUGH).json
    assert found["timing"]["decode_tps"] == 0.0
    assert len(found["tokens"]) == 1


def test_the_same_seed_writes_the_same_and_another_does_not(cli: Cli, gemma3n: Path) -> None:
    def text(seed: int) -> str:
        return cli("run", gemma3n, PROMPT, "-n", 12, "-c", 64, "-s", seed, "-q", *ENOUGH).out

    assert text(1) == text(1) != text(2)


def test_no_limit_runs_until_the_context_is_full(cli: Cli, gemma3n: Path) -> None:
    found = cli("run", gemma3n, PROMPT, "-n", -1, "-c", 24, "--temp", 0, "--json", *ENOUGH).json
    assert found["finish"] == "length"
    assert len(found["tokens"]) == 24 - found["timing"]["prompt_tokens"] + 1


@pytest.mark.parametrize("dash", [(), ("-p", "-"), ("-",)])
def test_the_prompt_may_come_through_a_pipe(
    cli: Cli, gemma3n: Path, monkeypatch: pytest.MonkeyPatch, dash: tuple[str, ...]
) -> None:
    piped(monkeypatch, PROMPT.encode())
    done = cli("run", gemma3n, *dash, "-n", 6, "-c", 64, "--temp", 0, "-q", *ENOUGH)
    assert done == cli(*short_run(gemma3n), "-q")


@pytest.mark.parametrize(
    "data",
    [b"caf\xe9 \xff\xfe", b"\x00\x1b]0;title\x07", "\u202e e\u0301 👩‍👩‍👧 \ufeff".encode(), b"<bos><eos><end_of_turn>"],
)
def test_no_prompt_is_too_strange(cli: Cli, gemma3n: Path, monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    piped(monkeypatch, data)
    found = cli("run", gemma3n, "-n", 3, "-c", 64, "--temp", 0, "--json", *ENOUGH)
    assert (found.code, found.err) == (0, "")
    prompt = Tokenizer.open(gemma3n).encode(data.decode("utf-8", "replace"))
    assert found.json["timing"]["prompt_tokens"] == len(prompt)
    assert not set(prompt[1:]) & set(range(len(SPECIALS))), "special tokens that were typed are plain text"


def test_text_that_the_terminal_cannot_show_is_no_reason_to_stop(
    cli: Cli, gemma3n: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        done = cli("run", gemma3n, PROMPT, "-n", 40, "-c", 64, "--temp", 0, "-q", *ENOUGH)
    assert (done.code, done.err) == (0, "")
    assert out.buffer.getvalue().endswith(b"\n")


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_quantized_run_packs_once_and_says_the_same_again(cli: Cli, gemma3n: Path, precision: str) -> None:
    first = cli(*short_run(gemma3n), "--json", "--precision", precision)
    assert (first.code, first.err) == (0, "")
    assert {key for key in CONTRACT if not conforms(first.json[key], CONTRACT[key])} == set()
    assert (first.json["plan"]["precision"], first.json["plan"]["head"]) == (precision, "int8")
    again = cli(*short_run(gemma3n), "--json", "--precision", precision)
    assert again.json["tokens"] == first.json["tokens"]
    packs = cli("pack", "--list", "--json").json["packs"]
    assert [pack["source"] for pack in packs].count(str(gemma3n)) == 1
    (pack,) = (pack for pack in packs if pack["source"] == str(gemma3n))
    assert {"root", "base", "ple", precision} <= set(pack["parts"])
    assert pack["folder"].startswith(os.environ["EDGE_CACHE"])
    from_pack = cli(*short_run(pack["folder"]), "--json", "--precision", precision)
    assert from_pack.json["tokens"] == first.json["tokens"]


def test_help_needs_no_engine_and_no_patience(gemma3n: Path) -> None:
    """No torch is imported; at best it is there within a second and a half."""
    took = []
    for args in (("--help",), ("run", "--help")):
        started = time.monotonic()
        command = [sys.executable, "-X", "importtime", "-m", "edge", *args]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60, check=False)
        took.append(time.monotonic() - started)
        assert done.returncode == 0
        assert done.stdout.startswith("Usage: edge")
        assert not re.search(r"\| +(torch|onnx|onnxruntime|transformers)$", done.stderr, re.MULTILINE)
    assert min(took) < 1.5


def test_edge_alone_shows_the_help(cli: Cli) -> None:
    done = cli()
    assert done.code in (0, 2)
    assert "edge run ./model --budget 2GB" in (done.out + done.err)
    assert "Commands:\n  run " in (done.out + done.err)
    assert "\\n" not in done.err


def test_help_lists_every_command_and_every_flag(cli: Cli) -> None:
    commands = ("run", "plan", "inspect", "pack", "slice", "synth")
    assert [name for name in commands if f"  {name} " not in cli("--help").out] == []
    run = cli("run", "--help").out
    for flag in ("--budget", "--context", "--temp", "--top-k", "--seed", "--device", "--engine", "--slice", "--json"):
        assert flag in run
    assert cli("--version").out.startswith("edge, version ")
    assert all(cli(name, "--help").code == 0 for name in commands)


def test_more_context_than_the_model_has_is_cut_and_said(cli: Cli, gemma3n: Path) -> None:
    done = cli("run", gemma3n, PROMPT, "-n", 2, "--temp", 0, "-c", 4096, "--budget", "64GB")
    assert done.code == 0
    assert "context 4096 cut to 2048, the longest this model was made for" in done.err
