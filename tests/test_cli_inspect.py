"""``edge inspect``, and ``edge plan`` before a download: what every published configuration is, said from it alone."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import readme
from edge.budget import machine
from edge.budget.plan import Floor
from edge.cli import plan
from edge.cli.layers import MOST_RANGES, cache_kind, ordinal, ranges
from loaders.families import families
from loaders.network.tensors import active, tensors, total
from loaders.sketch import has_weights, sketch
from tests.command import ENOUGH, PROMPT, Cli, cli_fixture, refused  # noqa: F401
from tests.shrink import CONFIGS, parse, real
from tests.small import gemma3n_fixture, llama_fixture  # noqa: F401

PUBLISHED = sorted(path.stem for path in CONFIGS.glob("*.json"))
FLOOR = Floor(250 << 20)
WIDEST = 120
# More rows than this are no summary.
MOST_ROWS = 8


@pytest.fixture(name="known")
def known_fixture(monkeypatch: pytest.MonkeyPatch) -> Floor:
    """A machine whose floor and speed are known, so that a plan is arithmetic and nothing else."""
    monkeypatch.setattr(machine, "known_floor", lambda engine, device: machine.Known(FLOOR, "native", "cpu"))
    monkeypatch.setattr(plan, "read_bandwidth", lambda threads: 20e9)
    return FLOOR


# Which layers: a text that says exactly what the numbers say.


def numbers(text: str, count: int) -> list[int]:
    """What a text of :func:`ranges` means."""
    match = re.fullmatch(r"(?:every (\d+)(?:st|nd|rd|th)|(\d+) of every (\d+)) from (\d+)(?: to (\d+))?", text)
    if match is not None:
        period, width = int(match[1] or match[3]), int(match[2] or 1)
        start, stop = int(match[4]), int(match[5]) + 1 if match[5] else count
        return [i for i in range(start, stop) if (i - start) % period < width]
    found: list[int] = []
    for item in text.split(","):
        first, _, last = item.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


@given(st.sets(st.integers(0, 40), min_size=1), st.integers(41, 60))
def test_ranges_of_any_layers(chosen: set[int], count: int) -> None:
    text = ranges(sorted(chosen), count)
    if "..." not in text:
        assert numbers(text, count) == sorted(chosen)
    assert text.count(",") < MOST_RANGES


@given(st.integers(0, 5), st.integers(2, 9), st.integers(1, 8), st.integers(1, 70))
def test_ranges_of_what_comes_back(start: int, period: int, width: int, length: int) -> None:
    count = start + length
    chosen = [i for i in range(start, count) if (i - start) % period < min(width, period - 1)]
    text = ranges(chosen, count)
    assert numbers(text, count) == chosen
    assert len(text) <= len("9 of every 10 from 5")


@pytest.mark.parametrize(
    ("indices", "text"),
    [
        ([3], "3"),
        ([0, 1, 2], "0-2"),
        ([0, 1, 2, 4], "0-2,4"),
        ([0, 2, 3, 5, 7, 9, 11], "0,2-3,5,7,9,11"),
        ([0, 2, 3, 5, 7, 9, 11, 13], "0,2-3,5,7,...,13"),
        ([3, 7, 11], "3,7,11"),
        ([i for i in range(24) if i % 6 < 5], "0-4,6-10,12-16,18-22"),
        ([i for i in range(26) if i % 6 < 5], "5 of every 6 from 0"),
        (list(range(1, 26, 2)), "every 2nd from 1"),
        (list(range(2, 20, 2)), "every 2nd from 2 to 18"),
        (list(range(5, 26, 6)), "5,11,17,23"),
    ],
)
def test_ranges_as_people_write_them(indices: list[int], text: str) -> None:
    assert ranges(indices, 26) == text


def test_ordinals() -> None:
    assert [ordinal(n) for n in (1, 2, 3, 4, 11, 12, 13, 21, 22, 111)] == [
        "1st", "2nd", "3rd", "4th", "11th", "12th", "13th", "21st", "22nd", "111th",
    ]  # fmt: skip


# Every published configuration


@pytest.mark.parametrize("name", PUBLISHED)
def test_inspect_of_a_config_alone(cli: Cli, name: str) -> None:
    path, model = CONFIGS / f"{name}.json", parse(real(name))
    found = cli("inspect", path, "--json").json
    assert (found["weights"], found["dtype"]) == (False, "BF16")
    assert (found["parameters"], found["active_parameters"]) == (total(model), active(model))
    assert found["text_bytes"] == 2 * total(model)
    rows = found["layers"]
    assert 1 <= len(rows) <= MOST_ROWS
    assert sorted(i for row in rows for i in row["layers"]) == list(range(len(model.layers)))
    assert [row["layers"][0] for row in rows] == sorted(row["layers"][0] for row in rows)
    for row in rows:
        assert len({model.layers[i] for i in row["layers"]}) == 1
        assert numbers(row["where"], len(model.layers)) == row["layers"]
        assert row["bytes"] == 2 * row["parameters"]
    outside = sum(total_of(shape) for name, shape in tensors(model).items() if not name.startswith("layers."))
    assert sum(row["parameters"] for row in rows) + outside == total(model)
    assert sum(row["active_parameters"] for row in rows) + outside == active(model)
    per_token = sum(len(row["layers"]) * row["attention"]["cached_values_per_token"] for row in rows)
    assert found["kv_bytes_per_token"] == 2 * per_token
    assert found["kv_bytes"]["tokens"] == min(4096, model.context)
    assert 0 < found["kv_bytes"]["bytes"] <= found["kv_bytes"]["tokens"] * found["kv_bytes_per_token"]
    text = cli("inspect", path)
    assert (text.code, text.err) == (0, "")
    assert "no weights here" in text.out
    assert (f"{active(model):,} active per token" in text.out) == (active(model) < total(model))
    lines = text.out.split("\n\n")[1].splitlines()
    assert max(len(line.rstrip()) for line in lines) <= WIDEST
    assert {line.split("  ")[0] for line in lines[1:] if not line.startswith(" ")} == {row["where"] for row in rows}


def total_of(shape: tuple[int, ...]) -> int:
    """Values of a tensor."""
    found = 1
    for n in shape:
        found *= n
    return found


@pytest.mark.parametrize("name", PUBLISHED)
def test_plan_of_a_config_alone(cli: Cli, known: Floor, name: str) -> None:
    path, model = CONFIGS / f"{name}.json", parse(real(name))
    done = cli("plan", path, "--json", "--budget", known.host)
    found = done.json
    assert (done.code, found["weights"], found["plan"]) == (80, False, None)
    assert done.err.count("\n") == 1
    needed = found["nearest"]["needed_bytes"]
    table = model.ple.rows * len(model.layers) * model.ple.dim if model.ple is not None else 0
    whole = next(row for row in found["candidates"] if (row["slice"], row["head"]) == ("full", "int4"))
    assert 0.5 < whole["bytes"]["weights"] / (total(model) - table) < 0.7
    fits = cli("plan", path, "--json", "--budget", needed).json
    assert fits["plan"]["total_bytes"] == needed
    # What a token meets is what it reads; of 16-bit weights two bytes for every parameter but the embedding's rows.
    for row in cli("plan", path, "--json", "--budget", "9TB", "--slice", "full", "--precision", "bf16").json[
        "candidates"
    ]:
        unread = table + (0 if model.tied else model.vocab * model.dim)
        assert row["bytes_per_token"] == pytest.approx(2 * (active(model) - unread), rel=0.01)
    has = active(model) < total(model)
    assert ("in experts (" in done.err) == has
    assert any("experts_bytes" in row for row in found["candidates"]) == has
    text = cli("plan", path, "--budget", needed)
    assert (text.code, text.err) == (0, "")
    assert text.out.startswith("no weights here: bytes are those of the config's shapes in BF16")


def test_a_mixture_that_does_not_fit_names_its_experts(cli: Cli, known: Floor) -> None:
    line = cli("plan", CONFIGS / "qwen3-30B-A3B.json", "--budget", "8GB").err
    match = re.search(
        r"needs ([\d.]+) GB \(\d+ bytes\), of it ([\d.]+) GB in experts \(8 of 128 active per token\)", line
    )
    assert match is not None
    experts = 48 * 128 * 3 * 768 * 2048
    assert float(match[2]) == pytest.approx(experts * (0.5 + 2 / 32) / 1e9, rel=0.01)
    assert float(match[2]) < float(match[1])


def test_what_a_config_is_not_asked_for_is_not_read(cli: Cli, known: Floor, tmp_path: Path) -> None:
    """A pack, a tokenizer, a cache: nothing of a run is needed, and nothing is left behind."""
    shutil.copy(CONFIGS / "llama-3.2-1B.json", tmp_path / "other-name.json")
    assert cli("plan", tmp_path / "other-name.json", *ENOUGH).code == 0
    assert cli("inspect", tmp_path / "other-name.json").code == 0
    assert os.listdir(tmp_path) == ["other-name.json"]
    (tmp_path / "tokenizer.json").write_text("{" + " " * 9_000_000)
    counted = cli("plan", tmp_path / "other-name.json", "--json", *ENOUGH).json["plan"]["bytes"]["tokenizer"]
    assert counted > 9_000_000
    assert "no tokenizer is counted" not in cli("inspect", tmp_path / "other-name.json").out


# Rows as they are read

CELLS = {
    "deepseek-v3": ("0-2", "3-60", "latent", "128 x (128+64)", "latent 512+64", "yarn x40",
                    "interleaved", "8 of 256 x 2048", "silu", "+ shared 2048", "18432 silu", "4 of 8 groups"),
    "kimi-k2": ("0", "1-60", "64 x (128+64)", "8 of 384 x 2048", "1.02T", "times 2.827"),
    "gemma-3-4B": ("5 of every 6 from 0", "5,11,17,23,29", "sliding", "1,024", "linear x8", "10,000", "QK per head"),
    "gemma-4-E2B": ("8/1 x 512", "8/1 x 256", "25% turns", "scalar", "12288 gelu_tanh", "from layer 14", "PLE table"),
    "llama-4-maverick-17B-128E": ("every 2nd from 0", "every 4th from 1", "every 4th from 3", "chunked", "8,192",
                                  "1 of 128 x 8192", "temp. 0.1", "16384 silu", "what experts read"),
    "llama-4-scout-17B-16E": ("3 of every 4 from 0", "every 4th from 3", "1 of 16 x 8192", "QK L2", "llama3 x16"),
    "smollm3-3B": ("3 of every 4 from 0", "every 4th from 3", "none", "5,000,000", "16/4 x 128"),
    "qwen3-30B-A3B": ("8 of 128 x 768", "silu", "QK per head", "weights normalised", "3,353,032,704 active per token"),
    "olmo2-7B": ("after", "QK whole"),
    "gpt2": ("LayerNorm", "ungated", "bias", "none", "a learned table of 1,024"),
    "gemma-3n-E4B": ("sliding, shared", "from layer 18", "95% sparse", "both", "0-3,5-8",
                     "20-23,25-28,30-33", "24,29,34"),
    "mistral-7B-v0.1": ("sliding", "4,096"),
    "llama-3.2-1B": ("llama3 x32", "0-15", "32/8 x 64"),
}  # fmt: skip


@pytest.mark.parametrize("name", CELLS)
def test_a_family_shows_what_it_adds(cli: Cli, name: str) -> None:
    out = cli("inspect", CONFIGS / f"{name}.json").out
    for cell in CELLS[name]:
        assert re.search(rf"(^|[\s(]){re.escape(cell)}(?=\s|[,;)]|$)", out, re.MULTILINE), cell


def test_caches_by_kind() -> None:
    def kinds(name: str) -> set[str]:
        return {cache_kind(layer.attention) for layer in parse(real(name)).layers}

    assert kinds("deepseek-v3") == {"latent"}
    assert kinds("gemma-3n-E2B") == {"full", "ring", "shared"}
    assert kinds("llama-3.1-8B") == {"full"}
    assert kinds("llama-4-maverick-17B-128E") == {"full", "chunked"}


def test_the_readme_counts_what_tests_compare() -> None:
    assert readme.verified(["a", "b", "c"], ("b", "c", "d")) == "2 of 3"
    assert readme.verified(["a"], ("d",)) == readme.verified([], ("d",)) == "-"
    llama, mixture = parse(real("llama-3.1-8B")), parse(real("qwen3-30B-A3B"))
    assert (readme.sizes(llama), readme.sizes(mixture)) == ("8.03B", "30.53B, 3.35B active")
    assert readme.caches([parse(real("gemma-3n-E2B")), llama]) == ["full", "ring", "shared"]
    table = readme.supported()
    assert all(f"| {family.title} |" in table for family in families().values())


# What is no config, and what needs weights


def test_only_inspect_and_plan_do_without_weights(cli: Cli, known: Floor, gemma3n: Path, tmp_path: Path) -> None:
    config = gemma3n / "config.json"
    refused(cli("run", config, PROMPT, *ENOUGH), 66, "no such folder")
    refused(cli("pack", config, "-o", tmp_path / "pack"), 66, "no such folder")
    refused(cli("slice", config, "--slice", "half", "-o", tmp_path / "slice"), 66, "no such folder")
    assert os.listdir(tmp_path) == []
    assert cli("inspect", gemma3n, "--json").json["weights"] is True
    assert cli("plan", gemma3n, "--json", *ENOUGH).json["weights"] is True
    assert "no weights" not in cli("inspect", gemma3n).out
    assert cli("inspect", config, "--json").json["layers"][0]["layers"] == [0, 1]


def test_a_folder_without_weights_says_what_would_do(cli: Cli, known: Floor, llama: Path, tmp_path: Path) -> None:
    shutil.copy(llama / "config.json", tmp_path / "config.json")
    for command in ("inspect", "plan"):
        refused(
            cli(command, tmp_path), 66, "no weights", "*.safetensors", "`edge plan` and `edge inspect` take its config"
        )
        assert cli(command, tmp_path / "config.json", *(ENOUGH if command == "plan" else ())).code == 0
    (tmp_path / "config.json").unlink()
    assert "take its config" not in refused(cli("inspect", tmp_path), 66, "config.json")


@pytest.mark.parametrize("command", [("inspect",), ("plan", *ENOUGH)])
def test_a_config_that_is_none(cli: Cli, known: Floor, tmp_path: Path, command: tuple[str, ...]) -> None:
    first, *flags = command
    path = tmp_path / "made-up.json"
    refused(cli(first, path, *flags), 66, "made-up.json")
    os.mkfifo(path)
    refused(cli(first, path, *flags), 66, "made-up.json")
    path.unlink()
    for text, code, word in (
        ("", 65, "empty"),
        ("{", 65, "line 1"),
        ("[1]", 65, "object"),
        ("{}", 78, "model_type"),
        ('{"model_type": "made_up"}', 78, "made_up"),
        (json.dumps({**real("llama-3.2-1B"), "num_key_value_heads": 5}), 65, "num_key_value_heads"),
        (json.dumps({**real("llama-3.2-1B"), "made_up": 5}), 78, "made_up"),
        ("version https://git-lfs.github.com/spec/v1\n", 65, "git-LFS"),
    ):
        path.write_text(text)
        assert str(path) in refused(cli(first, path, *flags), code, word)


def test_a_sketch_has_no_weights() -> None:
    checkpoint = sketch(CONFIGS / "llama-3.2-1B.json")
    assert not has_weights(checkpoint)
    assert checkpoint.stored["embed"] == 2 * 128256 * 2048
    assert {name: placed.shape for name, placed in checkpoint.where.items()} == tensors(checkpoint.model)
