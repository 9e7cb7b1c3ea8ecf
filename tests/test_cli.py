"""The command line: what it prints where, how it ends, and that every refusal is one line.

Most tests call the command in this process; those about pipes, signals and terminals start a real one.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import edge
from edge import engine as engines
from edge.cli.app import run_app
from loaders.checkpoint import Checkpoint
from loaders.errors import Usage
from loaders.text.template import ChatTemplate, encode_chat
from loaders.text.tokenizer import Tokenizer
from tests.small import (  # noqa: F401
    GEMMA3N,
    SPECIALS,
    VOCAB,
    Clone,
    built,
    chatty_fixture,
    clone_fixture,
    gemma3n_fixture,
    llama_fixture,
)

PROMPT = "once upon a time"
ROOT = Path(__file__).resolve().parent.parent
ENOUGH = ("--budget", "64GB")
STATISTICS = ("load:", "prefill:", "decode:", "peak memory:", "PLE:")


@dataclass(frozen=True)
class Done:
    """How a command ended, and what it said."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one object on stdout."""
        assert self.out.count("\n") == 1
        assert self.out.endswith("}\n")
        data: dict[str, Any] = json.loads(self.out)
        return data


Cli = Callable[..., Done]


@pytest.fixture(name="cli")
def cli_fixture(capsys: pytest.CaptureFixture[str]) -> Cli:
    """Runs a command in this process."""

    def cli(*args: object) -> Done:
        capsys.readouterr()
        before = signal.getsignal(signal.SIGINT)
        try:
            code = run_app([str(arg) for arg in args])
        finally:
            signal.signal(signal.SIGINT, before)
        return Done(code, *capsys.readouterr())

    return cli


@pytest.fixture(name="floor")
def floor_fixture(gemma3n: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """The runtime's floor, measured once: later commands in this process then plan alike."""
    with edge.load(gemma3n, context=16) as session:
        floor = session.floor
    monkeypatch.setattr(engines.Runtime, "floor", lambda self: floor)
    return floor.host


def refused(done: Done, code: int, *words: str) -> str:
    """Exactly one line on stderr, nothing on stdout; gives the line."""
    assert done.out == ""
    assert done.err.endswith("\n")
    assert done.err.count("\n") == 1, done.err
    assert done.err.startswith("edge: error: ")
    assert "Traceback" not in done.err
    assert "a bug in edge" not in done.err
    assert "\x1b" not in done.err
    assert done.code == code, done.err
    for word in words:
        assert word in done.err
    return done.err


def short_run(model: Path, *more: object) -> tuple[object, ...]:
    return ("run", model, PROMPT, "-n", 6, "-c", 64, "--temp", 0, *ENOUGH, *more)


# run


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
    "text": str,
    "tokens": [int],
    "finish": str,
    "plan": {
        "slice": str,
        "precision": str,
        "ple": str,
        "context": int,
        "engine": str,
        "device": str,
        "bytes": {"runtime": int, "weights": int, "ple": int, "kv": int, "activations": int},
        "total_bytes": int,
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


def piped(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))


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


# Chat


def chat_tokens(folder: Path, *messages: tuple[str, str]) -> int:
    template = ChatTemplate.open(folder)
    assert template is not None
    said = [{"role": role, "content": content} for role, content in messages]
    return len(encode_chat(template, Tokenizer.open(folder), said))


def test_a_template_makes_it_a_chat(cli: Cli, chatty: Path) -> None:
    def prompt_tokens(*flags: str) -> int:
        count: int = cli(*short_run(chatty), "--json", *flags).json["timing"]["prompt_tokens"]
        return count

    assert prompt_tokens() == prompt_tokens("--chat") == chat_tokens(chatty, ("user", PROMPT))
    assert prompt_tokens("--no-chat") == len(Tokenizer.open(chatty).encode(PROMPT))
    assert prompt_tokens("--system", "be brief") == chat_tokens(chatty, ("system", "be brief"), ("user", PROMPT))


def test_a_chat_without_a_template_is_refused(cli: Cli, gemma3n: Path) -> None:
    refused(cli(*short_run(gemma3n), "-q", "--chat"), 78, "no chat template", "--no-chat")
    refused(cli(*short_run(gemma3n), "-q", "--system", "be brief"), 2, "--system")


# Refusals


def config_text(text: str | bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())

    return change


def config_keys(**keys: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        data = {**GEMMA3N, **keys}
        (folder / "config.json").write_text(json.dumps({k: v for k, v in data.items() if v is not None}))

    return change


def config_raw(key: str, text: str) -> Callable[[Path], None]:
    """A key with a value that json.dumps would not write."""

    def change(folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps({**GEMMA3N, key: "HERE"}).replace('"HERE"', text))

    return change


def instead_of_config(make: Callable[[Path], None]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "config.json").unlink()
        make(folder / "config.json")

    return change


def sparse(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(9 << 20)


def truncated_weights(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 1)


WHOLE = json.dumps(GEMMA3N)
BAD_FILES: list[tuple[str, Callable[[Path], None], int, str]] = [
    ("A1 missing", instead_of_config(lambda path: None), 66, "config.json"),
    ("A1 empty", config_text(""), 65, "empty file"),
    ("A1 folder", instead_of_config(Path.mkdir), 66, "a folder"),
    ("A1 FIFO", instead_of_config(os.mkfifo), 66, "FIFO"),
    ("A2 not JSON", config_text("hello"), 65, "not JSON"),
    ("A2 truncated", config_text(WHOLE[:-20]), 65, "not JSON"),
    ("A2 UTF-16", config_text(WHOLE.encode("utf-16")), 65, "not UTF-8"),
    ("A2 trailing", config_text(WHOLE + "}"), 65, "Extra data"),
    ("A3 list", config_text(f"[{WHOLE}]"), 65, "a JSON object"),
    ("A3 string", config_text('"gemma3n"'), 65, "a JSON object"),
    ("A4 huge", instead_of_config(sparse), 65, "larger than 8 MiB limit"),
    ("A5 deep", config_text("[" * 100_000), 65, "nested"),
    ("A6 digits", config_raw("hidden_size", "9" * 5000), 65, "integer"),
    ("A7 NaN", config_raw("rms_norm_eps", "NaN"), 65, "NaN"),
    ("A7 Infinity", config_raw("rms_norm_eps", "-Infinity"), 65, "Infinity"),
    ("A7 1e999", config_raw("rms_norm_eps", "1e999"), 65, "1e999"),
    ("A8 twice", config_text(WHOLE[:-1] + ', "hidden_size": 64}'), 65, "hidden_size: duplicate key"),
    ("A9 zero", config_keys(num_hidden_layers=0), 65, "num_hidden_layers"),
    ("A9 negative", config_keys(num_hidden_layers=-1), 65, "num_hidden_layers"),
    ("A9 fraction", config_keys(num_hidden_layers=1.5), 65, "num_hidden_layers"),
    ("A9 text", config_keys(num_hidden_layers="12"), 65, "num_hidden_layers"),
    ("A9 true", config_keys(num_hidden_layers=True), 65, "num_hidden_layers"),
    ("A9 null", config_keys(num_hidden_layers=None), 65, "num_hidden_layers"),
    ("A9 10^9", config_keys(num_hidden_layers=10**9), 65, "num_hidden_layers"),
    ("A9 2^63", config_keys(num_hidden_layers=2**63), 65, "num_hidden_layers"),
    ("A10 heads", config_keys(num_key_value_heads=3), 65, "num_key_value_heads"),
    ("A10 more kv", config_keys(num_key_value_heads=8), 65, "num_key_value_heads"),
    ("A10 head_dim", config_keys(head_dim=0), 65, "head_dim"),
    ("A11 fewer", config_keys(num_hidden_layers=11, **{k: GEMMA3N[k][:11] for k in
        ("intermediate_size", "layer_types", "activation_sparsity_pattern")}), 65, "by config.json"),
    ("A11 more", config_keys(num_hidden_layers=13, **{k: [*GEMMA3N[k], GEMMA3N[k][-1]] for k in
        ("intermediate_size", "layer_types", "activation_sparsity_pattern")}), 65, "by config.json"),
    ("A12 vocab", config_keys(vocab_size=VOCAB + 1), 65, "embed_tokens"),
    ("A13 theta", config_keys(rope_theta=0), 65, "rope_theta"),
    ("A13 scaling", config_keys(rope_scaling={"rope_type": "yarn", "factor": 2.0}), 78, "yarn"),
    ("A15 unknown", config_keys(model_type="bert"), 78, "gemma3n_text, llama, qwen3"),
    ("A15 no text", config_keys(model_type=["gemma3n"]), 78, "model_type"),
    ("A16 quantized", config_keys(quantization_config={"quant_method": "awq"}), 78, "quantization_config"),
    ("A16 unknown key", config_keys(mystery_norm=True), 78, "mystery_norm"),
    ("A18 no head", config_keys(tie_word_embeddings=False), 65, "lm_head.weight"),
    ("A19 short", config_keys(layer_types=GEMMA3N["layer_types"][:-1]), 65, "layer_types"),
    ("A19 window", config_keys(sliding_window=0), 65, "sliding_window"),
    ("A19 table", config_keys(hidden_size_per_layer_input=9), 65, "per_layer"),
    ("A19 sparsity", config_keys(activation_sparsity_pattern=1.0), 65, "activation_sparsity_pattern"),
    ("A19 shared", config_keys(num_kv_shared_layers=12), 65, "num_kv_shared_layers"),
    ("C truncated", truncated_weights, 65, "download incomplete"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "code", "word"), [case[1:] for case in BAD_FILES], ids=[c[0] for c in BAD_FILES])
def test_a_bad_checkpoint_is_refused_in_one_line(
    cli: Cli, gemma3n: Path, clone: Clone, change: Callable[[Path], None], code: int, word: str
) -> None:
    folder = clone(gemma3n)
    change(folder)
    before, started = sorted(os.listdir(folder)), time.monotonic()
    assert str(folder) in refused(cli("inspect", folder), code, word)
    assert time.monotonic() - started < 5
    assert sorted(os.listdir(folder)) == before


@pytest.mark.parametrize(("layers", "word"), [(2, "model.layers.2."), (4, "num_hidden_layers=4")])
def test_layers_that_config_and_weights_count_differently(
    cli: Cli, llama: Path, clone: Clone, layers: int, word: str
) -> None:
    refused(cli("inspect", clone(llama, num_hidden_layers=layers)), 65, word)


def test_every_command_refuses_alike(cli: Cli, gemma3n: Path, clone: Clone, tmp_path: Path) -> None:
    folder = clone(gemma3n)
    config_text("{")(folder)
    lines = {
        refused(cli("run", folder, PROMPT, *ENOUGH), 65),
        refused(cli("plan", folder, *ENOUGH), 65),
        refused(cli("plan", folder, "--json", *ENOUGH), 65),
        refused(cli("inspect", folder), 65),
        refused(cli("slice", folder, "--slice", "half", "-o", tmp_path / "new"), 65),
    }
    assert len(lines) == 1


def test_a_byte_order_mark_does_no_harm(cli: Cli, gemma3n: Path, clone: Clone) -> None:
    folder = clone(gemma3n)
    config_text(b"\xef\xbb\xbf" + WHOLE.encode())(folder)
    assert cli("inspect", folder, "--json").json["family"] == "gemma3n"


def test_code_in_a_checkpoint_is_never_run(cli: Cli, gemma3n: Path, clone: Clone, tmp_path: Path) -> None:
    """A16: whatever the config asks for, the module beside it stays a file."""
    canary = tmp_path / "canary"
    folder = clone(gemma3n, auto_map={"AutoModelForCausalLM": "evil.Model"}, trust_remote_code=True)
    for name in ("evil.py", "modeling_evil.py", "sitecustomize.py", "conftest.py"):
        (folder / name).write_text(f"open({str(canary)!r}, 'w')")
    assert cli(*short_run(folder)).code == 0
    assert cli("inspect", folder).code == 0
    assert not canary.exists()


@pytest.mark.parametrize("value", ["-1", "1.5", '"<eos>"', "true", str(2**40), "[" + "1," * 1000 + "1]"])
def test_stop_tokens_that_cannot_be_are_refused(cli: Cli, gemma3n: Path, clone: Clone, value: str) -> None:
    folder = clone(gemma3n)
    (folder / "generation_config.json").write_text(f'{{"eos_token_id": {value}}}')
    refused(cli(*short_run(folder), "-q"), 65, "generation_config.json", "eos_token_id")


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("nowhere", 66),
        ("line\nbreak", 66),
        ("\x1b[31mred", 66),
        ("🎉", 66),
        ("x" * 300, 66),
        ("y/" * 2048, 66),
        ("", 66),
    ],
    ids=["missing", "newline", "escape", "emoji", "long", "longest", "empty"],
)
def test_a_model_that_is_not_there(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: int
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(cli("run", name, PROMPT, *ENOUGH), code)
    refused(cli("inspect", name), code)


def test_a_file_is_no_model(cli: Cli, gemma3n: Path) -> None:
    refused(cli("inspect", gemma3n / "config.json"), 66, "no such folder")


@pytest.mark.parametrize(
    ("flags", "code", "word"),
    [
        (("--budget", "potato"), 2, "--budget"),
        (("--budget", ""), 2, "--budget"),
        (("--budget", "0"), 2, "--budget"),
        (("--budget", "-1"), 2, "--budget"),
        (("--budget", "NaN"), 2, "--budget"),
        (("--budget", "∞"), 2, "--budget"),
        (("--budget", "1MB"), 80, "bytes)"),
        (("--ram-budget", "x"), 2, "--ram-budget"),
        (("--engine", "ort"), 78, "--engine"),
        (("--engine", "native"), 78, "--engine"),
        (("--engine", "gguf"), 2, "--engine"),
        (("--device", "cuda"), 78, "--device cpu"),
        (("--device", "mps"), 78, "--device cpu"),
        (("--device", "tpu"), 2, "--device"),
        (("--slice", "E9B"), 2, "half, quarter, skip-first-shared"),
        (("--slice", "nowhere.json"), 66, "nowhere.json"),
        (("--precision", "int3"), 2, "--precision"),
        (("--ple", "floppy"), 2, "--ple"),
        (("--kv", "int3"), 2, "--kv"),
        (("-c", "0"), 2, "--context"),
        (("-c", "many"), 2, "many"),
        (("-c", "8"), 2, "--context"),
        (("-n", "0"), 2, "-n"),
        (("-n", "-2"), 2, "-n"),
        (("-n", "ten"), 2, "ten"),
        (("--temp", "nan"), 2, "temperature"),
        (("--temp", "-1"), 2, "temperature"),
        (("--temp", "inf"), 2, "temperature"),
        (("--top-p", "0"), 2, "top_p"),
        (("--top-p", "1.1"), 2, "top_p"),
        (("--top-k", "-1"), 2, "top_k"),
        (("--min-p", "2"), 2, "min_p"),
        (("--repeat-penalty", "0"), 2, "repetition_penalty"),
        (("-s", str(2**70)), 2, "seed"),
        (("-s", "-1"), 2, "seed"),
        (("-p", "another"), 2, "two prompts"),
        (("--bogus",), 2, "--bogus"),
        (("one", "more"), 2, "edge run --help"),
    ],
    ids=lambda value: " ".join(value)[:20] if isinstance(value, tuple) else "",
)
def test_a_flag_that_cannot_be_is_refused_by_name(
    cli: Cli, gemma3n: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], code: int, word: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    budget = () if "--budget" in flags else ENOUGH
    refused(cli("run", gemma3n, PROMPT, "-q", *budget, *flags), code, word)


@pytest.mark.parametrize("flags", [("--ple", "ssd"), ("--ple", "ram"), ("--slice", "half")])
def test_a_plain_model_has_no_table_and_no_slices(cli: Cli, llama: Path, flags: tuple[str, ...]) -> None:
    refused(cli("run", llama, PROMPT, *ENOUGH, *flags), 2, flags[0])


@pytest.mark.parametrize(
    "args", [("run",), ("run", "-p", "hi"), ("plan",), ("inspect",), ("slice",), ("bake",), ("--x",)]
)
def test_a_command_without_what_it_needs(cli: Cli, args: tuple[str, ...]) -> None:
    refused(cli(*args), 2)


@pytest.mark.parametrize("data", [b"", b"  \n\t"])
def test_an_empty_prompt_is_refused(cli: Cli, gemma3n: Path, monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    piped(monkeypatch, data)
    refused(cli("run", gemma3n, *ENOUGH), 2, "empty prompt")
    refused(cli("run", gemma3n, "", *ENOUGH), 2, "empty prompt")


def test_a_prompt_of_many_megabytes_is_refused_before_it_is_read(
    cli: Cli, gemma3n: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Endless(io.RawIOBase):
        given = 0

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            self.given += len(buffer)
            assert self.given < 64 << 20, "it would read on for ever"
            buffer[:] = b"a" * len(buffer)
            return len(buffer)

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(Endless())))
    started = time.monotonic()
    refused(cli("run", gemma3n, *ENOUGH), 2, "8 MiB")
    assert time.monotonic() - started < 5


def test_a_flag_out_of_range_is_refused_before_anything_is_loaded(
    cli: Cli, gemma3n: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("something was loaded")

    monkeypatch.setattr(engines, "load", never)
    for flags in (("-n", 0), ("--temp", "nan"), ("--top-p", 0), ("-s", 2**70)):
        refused(cli("run", gemma3n, PROMPT, *ENOUGH, *flags), 2)


def test_the_note_about_the_budget_does_not_make_a_second_line(cli: Cli, tmp_path: Path, gemma3n: Path) -> None:
    refused(cli("run", tmp_path / "nowhere", PROMPT), 66)
    refused(cli("run", gemma3n, PROMPT, "--slice", "E9B"), 2)


@pytest.mark.parametrize(
    ("error", "code", "word"),
    [
        (MemoryError(), 81, "out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 1 bytes"), 81, "--budget"),
        (OSError(errno.EIO, "Input/output error", "/x/y"), 74, "/x/y"),
        (OSError(errno.ENOSPC, "No space left on device"), 74, "No space left"),
    ],
)
def test_errors_of_the_system_have_their_own_codes(
    cli: Cli, gemma3n: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int, word: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("edge.cli.run.open_session", fail)
    refused(cli(*short_run(gemma3n)), code, word)


def test_a_bug_is_one_line_and_a_traceback_on_demand(cli: Cli, gemma3n: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("two\nlines")

    monkeypatch.setattr("edge.cli.run.open_session", fail)
    plain, debug = cli(*short_run(gemma3n)), cli(*short_run(gemma3n), "--debug")
    assert plain.code == debug.code == 70
    assert plain.err.count("\n") == 1
    assert "a bug in edge: ZeroDivisionError: two" in plain.err
    assert "Traceback" in debug.err
    assert debug.err.endswith(plain.err)


# plan


def test_plan_as_json_says_what_run_will_do(cli: Cli, gemma3n: Path, floor: int) -> None:
    done = cli("plan", gemma3n, "--json", "-c", 64, *ENOUGH)
    assert (done.code, done.err) == (0, "")
    found = done.json
    assert set(found) == {"budget_bytes", "ram_budget_bytes", "floor_bytes", "plan", "nearest", "candidates"}
    assert (found["budget_bytes"], found["floor_bytes"], found["nearest"]) == (64 * 10**9, floor, None)
    assert found["plan"] == cli(*short_run(gemma3n), "--json").json["plan"]
    assert all(row["fits"] is True and row["over_bytes"] == 0 for row in found["candidates"])
    names = {row["slice"] for row in found["candidates"]}
    assert names == {f"{a}{b}".strip("+") for a in ("half", "quarter") for b in ("", "+skip-first-shared")} | {
        "full",
        "skip-first-shared",
    }
    assert {(row["precision"], row["ple"]) for row in found["candidates"]} == {
        (precision, tier) for precision in ("float32", "bf16") for tier in ("ram", "ssd")
    }


def test_plan_that_does_not_fit_says_by_how_much(cli: Cli, gemma3n: Path, floor: int) -> None:
    done = cli("plan", gemma3n, "--json", "--budget", floor)
    assert done.code == 80
    assert done.err.startswith("edge: error: nothing fits")
    assert done.err.count("\n") == 1
    found = done.json
    assert found["plan"] is None
    needed = found["nearest"]["needed_bytes"]
    assert f"{needed} bytes" in done.err
    assert needed == min(row["total_bytes"] for row in found["candidates"])
    assert all(not row["fits"] and row["over_bytes"] == row["total_bytes"] - floor for row in found["candidates"])
    assert cli("plan", gemma3n, "--json", "--budget", needed).json["plan"]["total_bytes"] == needed
    assert cli("plan", gemma3n, "--json", "--budget", needed - 1).code == 80
    text = cli("plan", gemma3n, "--budget", needed - 1)
    assert text.code == 80
    assert "1 B over" in text.out
    assert "nothing fits" in text.out


def test_plan_as_text_marks_the_chosen_row(cli: Cli, gemma3n: Path, floor: int) -> None:
    done = cli("plan", gemma3n, "-c", 64, *ENOUGH)
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    header = "slice precision PLE context parameters runtime weights ple kv activations total fits"
    assert " ".join(lines[0].split()) == header
    assert [line.split()[1:4] for line in lines if line.startswith("->")] == [["full", "float32", "ram"]]
    assert lines[-1].startswith("plan: full in float32, PLE table in RAM, context 64: ")
    assert "\x1b" not in done.out


def test_plan_chooses_once(cli: Cli, gemma3n: Path, floor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pricing everything again for every row took minutes on a full-size model."""
    from edge.cli import plan

    calls, real = [], plan.enumerate_plans

    def counted(*args: Any) -> Any:
        calls.append(args)
        return real(*args)

    monkeypatch.setattr(plan, "enumerate_plans", counted)
    least = cli("plan", gemma3n, "--json", "--budget", floor).json["nearest"]["needed_bytes"]
    calls.clear()
    assert cli("plan", gemma3n, "--json", "--budget", least + 2000).code == 0
    assert len(calls) == 1


@pytest.mark.parametrize("flags", [(), ("--ple", "ram"), ("--slice", "half"), ("--precision", "float32")])
def test_a_tight_budget_takes_less_and_says_so(cli: Cli, gemma3n: Path, floor: int, flags: tuple[str, ...]) -> None:
    planned = cli("plan", gemma3n, "--json", "--budget", floor, *flags).json
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
    assert ("precision float32 -> bf16" in fit) == ("--precision" not in flags)
    refused(cli(*args, "--budget", least - 1), 80, f"--budget {least}")


def test_a_budget_in_between_gives_up_as_little_as_it_can(cli: Cli, gemma3n: Path, floor: int) -> None:
    rows = cli("plan", gemma3n, "--json", "-c", 64, *ENOUGH).json["candidates"]
    full = {row["ple"]: row["total_bytes"] for row in rows if (row["slice"], row["precision"]) == ("full", "float32")}
    assert full["ssd"] < full["ram"]
    done = cli("run", gemma3n, PROMPT, "-n", 3, "-c", 64, "--temp", 0, "--budget", full["ram"] - 1)
    assert done.code == 0
    chosen = cli("plan", gemma3n, "--json", "-c", 64, "--budget", full["ram"] - 1).json["plan"]
    assert (chosen["slice"], chosen["precision"]) == ("full", "float32")


# inspect


def test_inspect_describes_the_model(cli: Cli, gemma3n: Path, llama: Path) -> None:
    found = cli("inspect", gemma3n, "--json").json
    with Checkpoint.open(gemma3n).shards as shards:
        assert found["text_bytes"] == shards.total_bytes
    assert found["parameters"] * 4 == found["text_bytes"]
    assert found["ple_row_bytes"] == 12 * 8 * 4
    assert found["kv_bytes_per_token"] == 6 * 2 * 2 * 16 * 2
    assert found["context"] == 2048
    assert len(found["spec"]["layers"]) == 12
    assert found["slices"][0] == "full"
    text = cli("inspect", gemma3n)
    assert (text.code, text.err) == (0, "")
    for word in ("Gemma 3n", "PLE table", "AltUp", "sliding", "layer 5", "50%", "skip-first-shared", "bytes"):
        assert word in text.out
    plain = cli("inspect", llama)
    assert "Llama" in plain.out
    assert "PLE" not in plain.out
    assert cli("inspect", llama, "--json").json["ple_bytes"] == 0


# slice


def digest(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("name", ["half", "half+skip-first-shared", "skip=0-1,6", "ffn=4x3,128x9", "full"])
def test_a_written_slice_is_the_slice_that_runs(cli: Cli, chatty: Path, tmp_path: Path, name: str) -> None:
    before, out = digest(chatty), tmp_path / "sliced"
    done = cli("slice", chatty, "--slice", name, "-o", out)
    assert (done.code, done.out) == (0, "")
    assert done.err.startswith(f"{out}: {name}, ")
    assert digest(chatty) == before
    assert sorted(os.listdir(tmp_path)) == ["sliced"]
    assert sorted(os.listdir(out)) == sorted(os.listdir(chatty))
    assert out.stat().st_mode & 0o777 == 0o777 & ~umask()
    ids = np.random.default_rng(3).integers(5, VOCAB, 30)
    with edge.load(chatty, slice=name, context=64, precision="float32") as inside:
        expected, text = inside.logits(ids), [event.text for event in inside.generate(PROMPT, max_tokens=6)]
    with edge.load(out, context=64, precision="float32") as written:
        assert written.plan.slice == "full"
        assert np.array_equal(written.logits(ids), expected)
        assert [event.text for event in written.generate(PROMPT, max_tokens=6)] == text
        assert written.template is not None


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_slice_keeps_the_stored_type(cli: Cli, tmp_path: Path) -> None:
    assert cli("slice", built("gemma3n-bf16"), "--slice", "quarter", "-o", tmp_path / "new", "-q") == Done(0, "", "")
    with Checkpoint.open(tmp_path / "new").shards as shards:
        assert {tensor.dtype for tensor in shards.tensors.values()} == {"BF16"}


@pytest.mark.parametrize("kind", ["folder", "file", "broken link"])
def test_what_is_there_already_is_never_overwritten(cli: Cli, gemma3n: Path, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "taken"
    {"folder": Path.mkdir, "file": Path.touch, "broken link": lambda p: p.symlink_to("nowhere")}[kind](out)
    refused(cli("slice", gemma3n, "--slice", "half", "-o", out), 73, "already there")
    assert os.listdir(tmp_path) == ["taken"]
    assert not out.is_dir() or os.listdir(out) == []


def test_a_slice_needs_somewhere_to_go(cli: Cli, gemma3n: Path, tmp_path: Path) -> None:
    refused(cli("slice", gemma3n, "--slice", "half", "-o", tmp_path / "no" / "where"), 73, "no")
    (tmp_path / "file").touch()
    refused(cli("slice", gemma3n, "--slice", "half", "-o", tmp_path / "file" / "new"), 73)
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(("name", "code"), [("E2B", 2), ("skip=5", 2), ("ffn=999x12", 2), ("", 2), ("gone.json", 66)])
def test_a_slice_that_cannot_be_cut(cli: Cli, gemma3n: Path, tmp_path: Path, name: str, code: int) -> None:
    refused(cli("slice", gemma3n, "--slice", name, "-o", tmp_path / "new"), code)
    assert os.listdir(tmp_path) == []


def test_a_slice_from_a_file(cli: Cli, gemma3n: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.json"
    recipe.write_text(json.dumps({"layers_to_skip": [6, 7, 8], "ffn_hidden_dims": [64] * 9}))
    assert cli("slice", gemma3n, "--slice", recipe, "-o", tmp_path / "new", "-q").code == 0
    assert len(Checkpoint.open(tmp_path / "new").model.layers) == 9
    recipe.write_text(json.dumps({"layers_to_skip": [99]}))
    refused(cli("slice", gemma3n, "--slice", recipe, "-o", tmp_path / "other"), 65, "layers_to_skip")


def test_a_plain_model_cannot_be_sliced(cli: Cli, llama: Path, tmp_path: Path) -> None:
    refused(cli("slice", llama, "--slice", "full", "-o", tmp_path / "new"), 78)
    refused(cli("slice", llama, "--slice", "half", "-o", tmp_path / "new"), 2)
    assert os.listdir(tmp_path) == []


def test_a_disk_that_is_too_small_is_noticed_first(
    cli: Cli, gemma3n: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    refused(cli("slice", gemma3n, "--slice", "half", "-o", tmp_path / "new"), 74, "disk full", "1000 bytes free")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("at", [0, 1, 40])
def test_a_disk_that_fills_up_leaves_nothing_behind(
    cli: Cli, gemma3n: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    before, real, calls = digest(gemma3n), os.pwrite, []

    def full(fd: int, data: Any, offset: int) -> int:
        calls.append(offset)
        if len(calls) > at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    refused(cli("slice", gemma3n, "--slice", "half", "-o", tmp_path / "new"), 74, "No space left")
    assert os.listdir(tmp_path) == []
    assert digest(gemma3n) == before
    monkeypatch.setattr(os, "pwrite", real)
    assert cli("slice", gemma3n, "--slice", "half", "-o", tmp_path / "new").code == 0


@pytest.mark.parametrize("where", ["fsync", "rename"])
def test_a_failure_at_the_very_end_leaves_nothing_behind(
    cli: Cli, gemma3n: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, where, fail)
    refused(cli("slice", gemma3n, "--slice", "half", "-o", tmp_path / "new"), 74, "new")
    assert os.listdir(tmp_path) == []


def test_an_interrupted_slice_leaves_nothing_behind(
    cli: Cli, gemma3n: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwrite

    def press(fd: int, data: Any, offset: int) -> int:
        signal.raise_signal(signal.SIGINT)
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", press)
    done = cli("slice", gemma3n, "--slice", "half", "-o", tmp_path / "new")
    assert (done.code, done.out, done.err.strip()) == (130, "", "")
    assert os.listdir(tmp_path) == []


# Interrupted, in this process


def press_at(monkeypatch: pytest.MonkeyPatch, number: int) -> list[int]:
    """Ctrl-C while the engine makes its ``number``th pass; gives the tokens of each pass so far."""
    from edge.engine.torch import TorchEngine

    passes: list[int] = []
    real = TorchEngine.forward

    def forward(self: TorchEngine, ids: np.ndarray, *args: Any, **more: Any) -> np.ndarray:
        passes.append(len(ids))
        if len(passes) == number:
            signal.raise_signal(signal.SIGINT)
        return real(self, ids, *args, **more)

    # What warms the libraries up also makes passes.
    monkeypatch.setattr("edge.engine.torch_start.warm_up", lambda device: None)
    monkeypatch.setattr(TorchEngine, "forward", forward)
    return passes


def test_ctrl_c_ends_after_the_current_token_and_still_accounts(
    cli: Cli, gemma3n: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ("run", gemma3n, PROMPT, "-c", 64, "--temp", 0, *ENOUGH)
    whole = cli(*args, "-n", 3, "-q")
    passes = press_at(monkeypatch, 4)
    done = cli(*args, "-n", 50)
    assert (done.code, passes[1:]) == (130, [1, 1, 1])
    assert done.out == whole.out, "every token that was made was printed"
    assert all(any(line.startswith(name) for line in done.err.splitlines()) for name in STATISTICS)
    assert "3 tokens" in next(line for line in done.err.splitlines() if line.startswith("decode:"))
    assert "edge: error" not in done.err
    passes.clear()
    data = cli(*args, "-n", 50, "--json")
    assert (data.code, data.json["finish"], len(data.json["tokens"])) == (130, "interrupted", 3)


def test_ctrl_c_while_a_long_prompt_is_read_still_accounts(
    cli: Cli, gemma3n: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prompt is read in chunks; the answer ends after the current one, with its statistics."""
    passes = press_at(monkeypatch, 2)
    done = cli("run", gemma3n, "once upon " * 400, "-n", 5, "--temp", 0, *ENOUGH)
    assert (done.code, done.out) == (130, "\n")
    assert passes == [256, 256]
    assert "prefill:" in done.err


# In a process of its own


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "NO_COLOR": "1", **more}


def edge_command(*args: object) -> list[str | bytes]:
    return [sys.executable, "-m", "edge", *(arg if isinstance(arg, bytes) else str(arg) for arg in args)]


def greedy(folder: Path, count: int) -> tuple[list[int], Tokenizer]:
    with edge.load(folder, context=2048) as session:
        found = [event.token for event in session.generate(PROMPT, max_tokens=count)][:-1]
        return [token for token in found if token is not None], session.tokenizer


def test_ctrl_c_in_a_terminal(gemma3n: Path) -> None:
    command = edge_command("run", gemma3n, PROMPT, "-n", -1, "--temp", 0, *ENOUGH)
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment(), stdout=pipe, stderr=pipe, bufsize=0) as process:
        assert process.stdout is not None
        first = process.stdout.read(20)
        process.send_signal(signal.SIGINT)
        started = time.monotonic()
        out, err = process.communicate(timeout=30)
    assert time.monotonic() - started < 5
    assert process.returncode == 130
    said, lines = (first + out).decode(), err.decode().splitlines()
    assert all(any(line.startswith(name) for line in lines) for name in STATISTICS), err
    assert "Traceback" not in err.decode()
    count = int(re.findall(r"decode: +(\d+) tokens", err.decode())[0])
    assert 0 < count < 2000
    tokens, tokenizer = greedy(gemma3n, count)
    assert said == tokenizer.decode(tokens) + "\n", "no text is lost"


def test_a_reader_that_has_had_enough(gemma3n: Path) -> None:
    command = edge_command("run", gemma3n, PROMPT, "-n", 300, "--temp", 0, "-q", *ENOUGH)
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert len(process.stdout.read(1)) == 1
        process.stdout.close()
        assert process.stderr is not None
        err = process.stderr.read()
        process.wait(timeout=30)
    assert (process.returncode, err) == (0, b"")


@pytest.mark.parametrize("more", [("--quiet",), ("--json",)])
def test_output_that_cannot_be_written(gemma3n: Path, more: tuple[str, ...]) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            edge_command(*short_run(gemma3n), *more),
            env=environment(),
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=60,
            check=False,
        )
    refused(Done(done.returncode, "", done.stderr.decode()), 74, "No space left on device")


def test_bytes_that_are_no_text_on_the_command_line(gemma3n: Path) -> None:
    """In a locale that knows nothing but ASCII."""
    command = edge_command("run", gemma3n, b"caf\xe9 \xff", "-n", 30, "--temp", 0, "-c", 64, "--json", *ENOUGH)
    done = subprocess.run(command, env=environment(LC_ALL="C"), capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    found = json.loads(done.stdout.decode("utf-8"))
    assert found["timing"]["prompt_tokens"] == len(Tokenizer.open(gemma3n).encode("caf\ufffd \ufffd"))


def test_a_real_budget_is_kept(gemma3n: Path) -> None:
    """The smallest configuration there is, in a process whose floor was measured in another one of its kind."""
    plan = edge_command("plan", gemma3n, "--json", "--budget", "1MB")
    done = subprocess.run(plan, env=environment(), capture_output=True, timeout=60, check=False)
    assert done.returncode == 80
    needed = json.loads(done.stdout)["nearest"]["needed_bytes"]
    budget = needed + (12 << 20)
    run = edge_command("run", gemma3n, PROMPT, "-n", 40, "--json", "--budget", budget)
    done = subprocess.run(run, env=environment(), capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    memory = json.loads(done.stdout)["memory"]
    assert memory["peak_bytes"] <= memory["budget_bytes"] == budget
    assert memory["planned_bytes"] <= budget


@pytest.fixture(name="terminal")
def terminal_fixture(chatty: Path) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """A chat on a terminal of its own."""
    ours, theirs = pty.openpty()
    command = edge_command("run", chatty, "-n", 4, "--temp", 0, *ENOUGH)
    with subprocess.Popen(command, env=environment(TERM="dumb"), stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        yield ours, process
        if process.poll() is None:
            process.kill()
    os.close(ours)


def until(ours: int, ending: str) -> str:
    """What the terminal shows until it ends so."""
    seen, end = b"", time.monotonic() + 30
    while not seen.decode("utf-8", "replace").endswith(ending):
        assert select.select([ours], [], [], max(0.0, end - time.monotonic()))[0], seen
        seen += os.read(ours, 4096)
    return seen.decode("utf-8", "replace")


def test_without_a_prompt_a_terminal_is_a_chat(chatty: Path, terminal: tuple[int, subprocess.Popen[bytes]]) -> None:
    ours, process = terminal
    opening = until(ours, "> ")
    assert "plan: full in float32" in opening
    assert "/bye" in opening
    os.write(ours, b"hello\n")
    reply = until(ours, "\n> ")
    assert reply.startswith("hello\r\n")
    assert len(reply.removeprefix("hello\r\n").removesuffix("\n> ").strip()) > 0
    assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1a\x1c-\x1f]", reply), "nothing that moves a cursor"
    os.write(ours, b"\n/bye\n")
    assert process.wait(timeout=20) == 0


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
    assert [name for name in ("run", "plan", "inspect", "slice") if f"  {name} " not in cli("--help").out] == []
    run = cli("run", "--help").out
    for flag in ("--budget", "--context", "--temp", "--top-k", "--seed", "--device", "--engine", "--slice", "--json"):
        assert flag in run
    assert cli("--version").out.startswith("edge, version ")
    assert all(cli(name, "--help").code == 0 for name in ("run", "plan", "inspect", "slice"))


def test_more_context_than_the_model_has_is_cut_and_said(cli: Cli, gemma3n: Path) -> None:
    done = cli("run", gemma3n, PROMPT, "-n", 2, "--temp", 0, "-c", 4096, "--budget", "64GB")
    assert done.code == 0
    assert "context 4096 cut to 2048, the longest this model was made for" in done.err


def test_a_turn_that_does_not_fit_leaves_the_chat_as_it_was(chatty: Path) -> None:
    from edge.chat import Conversation

    with edge.load(chatty, context=64) as session:
        talk = Conversation(session)
        first = "".join(event.text for event in talk.ask("hi", max_tokens=3))
        with pytest.raises(Usage):
            list(talk.ask("a long question " * 40, max_tokens=3))
        assert [turn["role"] for turn in talk.messages] == ["user", "assistant"]
        assert talk.messages[1]["content"] == first
        assert list(talk.ask("and", max_tokens=3))
