"""The command line refuses: what is wrong with a checkpoint, a flag or a prompt is one line and a code of its class."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from edge import engine as engines
from tests.command import ENOUGH, PROMPT, Cli, cli_fixture, piped, refused, short_run  # noqa: F401
from tests.small import GEMMA3N, VOCAB, Clone, clone_fixture, gemma3n_fixture, llama_fixture  # noqa: F401


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
    ("A15 unknown", config_keys(model_type="bert"), 78, "gemma4_text, gpt2"),
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
        refused(cli("pack", folder, "-o", tmp_path / "pack"), 65),
        refused(cli("pack", folder), 65),
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
    refused(cli("run", gemma3n / "config.json", PROMPT, *ENOUGH), 66, "no such folder")


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
        (("--engine", "native", "--device", "cuda"), 78, "--device"),
        (("--threads", "0"), 2, "--threads"),
        (("--lock", "--engine", "torch"), 78, "--lock"),
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
    "args",
    [("pack",), ("slice",), ("synth",), ("bake",), ("--x",)],
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
