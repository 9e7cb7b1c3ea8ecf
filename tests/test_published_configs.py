"""Published configurations by name: which there are, what else is refused, and the commands that take one."""

from __future__ import annotations

import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loaders.errors import MissingFile
from loaders.published import FOLDER, LONGEST, config_path, found, names, published
from loaders.sketch import sketch
from tests.command import ROOT, Cli, cli_fixture, refused  # noqa: F401
from tests.shrink import CONFIGS, NAMES

HOSTILE = (
    "", ".", "..", "../x", "a/b", "./gpt2", "configs/gpt2", "../configs/gpt2.json", "/etc/passwd", "gpt2/", "gpt2\0",
    "gpt2\n", " gpt2", "gpt2.json.json", "*", "gpt?", "~", "-", "\x1b[31mgpt2", "gpt2\udcff", "g" * 100_000,
    "a/" * 5000, "gpt2\\", "C:gpt2", "ｇｐｔ2",
)  # fmt: skip


def test_names_are_the_files_that_ship() -> None:
    files = {path.name for path in FOLDER.iterdir()}
    assert {name + ".json" for name in names()} == files
    assert list(names()) == sorted(names())
    assert CONFIGS.samefile(FOLDER)
    assert set(NAMES) <= set(names())
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["loaders"]
    assert all(any(fnmatch(f"configs/{name}", pattern) for pattern in data) for name in files)
    assert len({name.casefold() for name in names()}) == len(names())


@pytest.mark.parametrize("name", names())
def test_every_one_is_of_a_model_that_edge_knows(name: str) -> None:
    assert sketch(published(name)).model.layers


@pytest.mark.parametrize("text", ["gemma-3n-E2B", "GEMMA-3N-e2b", "gemma-3n-E2B.json", "gemma-3n-e2b.JSON"])
def test_case_and_ending_do_not_matter(text: str) -> None:
    assert published(text) == config_path(text) == FOLDER / "gemma-3n-E2B.json"


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_what_is_no_plain_name_is_none(text: str) -> None:
    assert found(text) is None
    with pytest.raises(MissingFile) as caught:
        published(text)
    line = str(caught.value)
    assert line.isprintable()
    assert len(line) < 2000


@given(st.one_of(st.text(), st.sampled_from(names()).flatmap(lambda n: st.sampled_from([n, n.upper(), "../" + n]))))
def test_a_name_never_leaves_the_folder(text: str) -> None:
    try:
        path = published(text)
    except MissingFile:
        return
    assert path.parent == FOLDER
    assert path.stem in names()
    assert path.stem.casefold() == text.casefold().removesuffix(".json")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("gemma3n-E2B", "Is it gemma-3n-E2B or"),
        ("lama-3.2-1b.json", "Is it llama-3.2-1B"),
        ("QWEN", "Is it qwen3-"),
        ("tests/configs/gpt2.json", "Is it gpt2 or"),
        ("nothing-like-it-xyz", "Published names: deepseek-v3, gemma-3-1B,"),
        ("some/where.json", "`edge synth --help` lists the published names"),
        ("x" * 10 * LONGEST, "Published names: "),
        ("", "Published names: "),
    ],
)
def test_the_hint_names_what_may_have_been_meant(text: str, words: str) -> None:
    with pytest.raises(MissingFile) as caught:
        config_path(text)
    assert caught.value.hint is not None
    assert caught.value.hint.startswith(words)


def test_what_lies_there_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert config_path("gpt2") == FOLDER / "gpt2.json"
    Path("gpt2").mkdir()
    Path("gpt2.json").symlink_to("gone")
    assert config_path("gpt2") == Path("gpt2")
    assert config_path("gpt2.json") == Path("gpt2.json")
    assert config_path(str(tmp_path)) == tmp_path


def test_plan_and_inspect_take_a_name(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for args in (("inspect",), ("plan", "--budget", "8GB", "--engine", "native", "--device", "cpu")):
        named, filed = cli(*args, "QWEN3-0.6b"), cli(*args, FOLDER / "qwen3-0.6B.json")
        assert named.code == filed.code == 0
        # Speeds are measured, and may be measured again.
        assert named.out.splitlines()[0] == filed.out.splitlines()[0]
        assert len(named.out.splitlines()) == len(filed.out.splitlines())
    assert cli("inspect", "qwen3-0.6B", "--json").json["parameters"] == 596_049_920


def test_plan_and_inspect_refuse_other_names(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for command in ("plan", "inspect"):
        refused(cli(command, "gemma3n-e2b"), 66, "gemma3n-e2b: no such file", "Is it gemma-3n-E2B or")
        refused(cli(command, "../gpt2"), 66, "../gpt2: no such file")
        refused(cli(command, ""), 66, "'': no such file")
    Path("gpt2").mkdir()
    refused(cli("inspect", "gpt2"), 66, "gpt2")


@pytest.mark.parametrize("args", [("gpt2",), ("gpt2", "a prompt"), ("GPT2.json", "-p", "x")])
def test_run_says_that_weights_are_needed(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    line = refused(cli("run", *args), 66, f"{args[0]}: no weights", "`edge profile --config gpt2`")
    assert "`edge synth --config gpt2 -o DIR`" in line


def test_help_names_all(cli: Cli) -> None:
    done = cli("synth", "--help")
    assert done.code == 0
    assert set(names()) <= {word.strip(",.") for word in done.out.split()} | {done.out.split()[-1].strip(".")}
