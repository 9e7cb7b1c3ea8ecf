"""``edge run`` as a chat: with a template, on a terminal, turn by turn."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import edge
from loaders.errors import Usage
from loaders.text.template import ChatTemplate, encode_chat
from loaders.text.tokenizer import Tokenizer
from tests.command import ENOUGH, PROMPT, Cli, cli_fixture, edge_command, environment, refused, short_run  # noqa: F401
from tests.small import chatty_fixture, gemma3n_fixture  # noqa: F401


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
