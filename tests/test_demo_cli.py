"""The model that runs when none is named: when that is, what is said of it, and that an installed edge has it."""

from __future__ import annotations

import io
import json
import sys
import tomllib
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from edge import demo
from edge.budget.plan import Floor
from edge.cli.model import model_path, told_apart
from loaders.errors import MissingFile
from loaders.network.tensors import total
from loaders.sketch import sketch
from tests.command import ENOUGH, PROMPT, ROOT, Cli, cli_fixture, floor_fixture, piped, refused, short_run  # noqa: F401
from tests.small import chatty_fixture, gemma3n_fixture  # noqa: F401

REST = ("-n", 6, "-c", 64, "--temp", 0, *ENOUGH)


@pytest.fixture(name="small")
def small_fixture(gemma3n: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small model in the demo's place."""
    monkeypatch.setattr(demo, "FOLDER", gemma3n)
    return gemma3n


def said_of(folder: Path) -> str:
    millions = total(sketch(folder / "config.json").model) / 1e6
    return f"model: the demo that ships with edge ({millions:.1f}M parameters, tales); "


# What the arguments are


@pytest.mark.parametrize(
    ("given", "means"),
    [
        ((None, None, None), (None, None)),
        ((None, None, "hi"), (None, None)),
        (("once upon a time", None, None), (None, "once upon a time")),
        (("once\nupon", None, None), (None, "once\nupon")),
        (("once\u3000upon", None, None), (None, "once\u3000upon")),
        (("a b " * 4000, None, None), (None, "a b " * 4000)),
        (("a \0 b", None, None), (None, "a \0 b")),
        (("-", None, None), (None, "-")),
        (("folder", None, None), ("folder", None)),
        (("a folder", None, None), ("a folder", None)),
        (("a file", None, None), ("a file", None)),
        (("a dead link", None, None), ("a dead link", None)),
        (("nowhere", "hi", None), ("nowhere", "hi")),
        (("no where", "hi", None), ("no where", "hi")),
        (("no where", None, "hi"), ("no where", None)),
        (("folder", None, "hi"), ("folder", None)),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_one_argument_is_the_model_if_it_is_there_and_the_prompt_if_it_has_several_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: tuple[str | None, ...], means: tuple[str | None, str | None]
) -> None:
    for name in ("folder", "a folder"):
        (tmp_path / name).mkdir()
    (tmp_path / "a file").write_text("")
    (tmp_path / "a dead link").symlink_to("nothing")
    monkeypatch.chdir(tmp_path)
    assert told_apart(*given) == means


@pytest.mark.parametrize("word", ["Once", "./nowhere", "/no/such folder", "~/my models/x", "a" * 5000, "", "\0"])
def test_one_word_is_a_model_that_is_missing(word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingFile, match=r"no such folder .*with -p"):
        told_apart(word, None, None)


def test_a_missing_model_is_told_how_to_be_a_prompt_and_no_prompt_is_waited_for(
    cli: Cli, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", None)
    assert refused(cli("run", "Once", *REST), 66, "Once: no such folder", "any prompt with -p")
    assert "any prompt" not in refused(cli("run", "Once", "-p", "hi", *REST), 66, "Once: no such folder")
    assert "any prompt" not in refused(cli("run", "Once", "hi", *REST), 66, "Once: no such folder")


def test_model_path_is_the_model_or_the_demo(small: Path) -> None:
    assert model_path(None) == demo.model_path() == small
    assert model_path("x/y") == Path("x/y")


# What runs


def by_argument(patch: pytest.MonkeyPatch) -> tuple[object, ...]:
    return (PROMPT,)


def by_flag(patch: pytest.MonkeyPatch) -> tuple[object, ...]:
    return ("-p", PROMPT)


def by_pipe(patch: pytest.MonkeyPatch) -> tuple[object, ...]:
    piped(patch, PROMPT.encode())
    return ()


def by_echo(patch: pytest.MonkeyPatch) -> tuple[object, ...]:
    piped(patch, PROMPT.encode() + b"\r\n")
    return ("-",)


@pytest.mark.parametrize("given", [by_argument, by_flag, by_pipe, by_echo], ids=lambda f: f.__name__)
def test_a_prompt_alone_runs_the_demo(
    cli: Cli, small: Path, monkeypatch: pytest.MonkeyPatch, given: Callable[[pytest.MonkeyPatch], tuple[object, ...]]
) -> None:
    named = cli(*short_run(small))
    done = cli("run", *given(monkeypatch), *REST)
    assert (done.code, done.out) == (0, named.out)
    line, rest = done.err.split("\n", 1)
    assert line.startswith(said_of(small))
    assert rest.startswith("plan: ")
    assert "model:" not in named.err


def test_quiet_and_json_say_nothing_of_it_on_stderr(cli: Cli, small: Path) -> None:
    quiet = cli("run", PROMPT, *REST, "-q")
    assert (quiet.code, quiet.err) == (0, "")
    data = cli("run", PROMPT, *REST, "--json")
    assert (data.code, data.err) == (0, "")
    assert data.json["model"] == str(small) == cli(*short_run(small), "--json").json["model"]


def test_a_line_break_ends_the_line_not_the_prompt(cli: Cli, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def tokens(data: bytes) -> int:
        piped(monkeypatch, data)
        count: int = cli("run", *REST, "--json").json["timing"]["prompt_tokens"]
        return count

    assert tokens(b"once upon\n") == tokens(b"once upon\r\n") == tokens(b"once upon")
    assert tokens(b"once upon\n\n") == tokens(b"once upon\n\r\n") == tokens(b"once upon") + 1


def test_plan_and_inspect_take_the_demo(cli: Cli, small: Path, floor: Floor) -> None:
    for command in (("inspect",), ("plan", *ENOUGH, "-c", 64)):
        named, done = cli(command[0], small, *command[1:]), cli(*command)
        assert (done.code, done.out) == (0, named.out)
        assert done.err.startswith(said_of(small))
        assert (named.err, done.err.count("\n")) == ("", 1)
        assert cli(*command, "--json") == cli(command[0], small, *command[1:], "--json")
        assert cli(*command, "--json").json["model"] == str(small)


def test_a_budget_too_small_for_the_demo_is_one_line(cli: Cli, small: Path) -> None:
    refused(cli("run", PROMPT, "--budget", "1MB"), 80, "nothing fits --budget")


def test_edge_without_its_demo_says_so(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "FOLDER", tmp_path)
    for command in (("run", PROMPT), ("run", "-p", "hi"), ("run",), ("plan", *ENOUGH), ("inspect",)):
        refused(cli(*command), 66, str(tmp_path / "config.json"), "without its demo model", "MODEL")


# On a terminal


@pytest.fixture(name="typed")
def typed_fixture(monkeypatch: pytest.MonkeyPatch, cli: Cli) -> Callable[..., tuple[str, str]]:
    """Types lines into a terminal; gives what stood on stdout and on stderr."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    def typed(lines: list[str], *args: object) -> tuple[str, str]:
        left: Iterator[str] = iter(lines)
        out = Terminal()
        with monkeypatch.context() as patch:
            patch.setattr("builtins.input", lambda prompt: next(left))
            patch.setattr(sys, "stdin", Terminal())
            patch.setattr(sys, "stdout", out)
            done = cli(*args)
        assert done.code == 0, done.err
        assert next(left, None) is None
        return out.getvalue(), done.err

    return typed


def test_a_terminal_without_a_prompt_tells_texts_from_their_beginnings(
    cli: Cli, small: Path, typed: Callable[..., tuple[str, str]]
) -> None:
    out, err = typed([PROMPT, "", "a \x1b[31mstory", "word " * 100, "/bye"], "run", *REST)
    assert out.startswith(PROMPT + cli(*short_run(small), "-q").out + "a [31mstory")
    assert "word" not in out, "what is refused is not begun"
    assert said_of(small) in err
    assert "Type how a text begins" in err
    assert "context: " in err
    assert "Start again" not in err


def test_a_chat_does_not_repeat_what_was_typed(
    chatty: Path, monkeypatch: pytest.MonkeyPatch, typed: Callable[..., tuple[str, str]]
) -> None:
    monkeypatch.setattr(demo, "FOLDER", chatty)
    out, err = typed([PROMPT, "/bye"], "run", *REST)
    assert not out.startswith(PROMPT)
    assert "Type a message" in err


# What is installed


def test_the_demo_lies_in_the_package_and_every_file_of_it_is_installed() -> None:
    assert Path(demo.__file__).parent == demo.FOLDER
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["edge.demo"]
    for file in (path for path in demo.FOLDER.iterdir() if path.name not in ("__init__.py", "__pycache__")):
        assert any(fnmatchcase(file.name, pattern) for pattern in data), file.name
    for name in ("config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "README.md"):
        assert any(fnmatchcase(name, pattern) for pattern in data), name
    index = demo.FOLDER / "model.safetensors.index.json"
    shards = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else set()
    assert shards <= {path.name for path in demo.FOLDER.iterdir()}
