"""``edge run``: plan, load, generate, account."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import click

from edge.chat import Conversation
from edge.cli.model import model_path, say_demo, told_apart
from edge.cli.options import LOCK, MMAP, THREADS, planning, wanted
from edge.cli.show import plan_lines, print_json, progress, safe, statistics, stderr
from edge.generate import Event
from edge.sampling import Sampler, Sampling
from edge.session import Session, open_session
from loaders.errors import Usage, printable

# A prompt is checked before it reaches the tokenizer, which is not linear in everything it is given.
MOST_PROMPT = 8 << 20
INTERRUPTED = 130


@click.command("run")
@click.argument("model", required=False)
@click.argument("prompt", required=False)
@click.option("-p", "--prompt", "flag_prompt", metavar="TEXT", help="The prompt; '-' reads standard input.")
@click.option(
    "-n", "--n-predict", "limit", default=256, show_default=True, metavar="N", help="Most new tokens; -1 until it ends."
)
@click.option(
    "--temp",
    "--temperature",
    "temperature",
    type=float,
    metavar="T",
    help="0 is greedy.  [default: the checkpoint's, else 0.8]",
)
@click.option(
    "--top-k", type=int, metavar="K", help="Only the K likeliest; 0 is off.  [default: the checkpoint's, else 40]"
)
@click.option(
    "--top-p", type=float, metavar="P", help="Only the likeliest up to P.  [default: the checkpoint's, else 0.95]"
)
@click.option(
    "--min-p", type=float, metavar="P", help="Only those above P times the best.  [default: the checkpoint's, else 0]"
)
@click.option(
    "--repeat-penalty",
    type=float,
    metavar="R",
    help="Above 1 discourages repeats.  [default: the checkpoint's, else 1]",
)
@click.option("-s", "--seed", type=int, metavar="N", help="The same seed gives the same text.")
@click.option("--system", metavar="TEXT", help="A system message, in a chat.")
@click.option(
    "--chat/--no-chat", default=None, help="Use the chat template or complete plainly.  [default: by the checkpoint]"
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("-q", "--quiet", is_flag=True, help="Print the text alone.")
@THREADS
@LOCK
@MMAP
@planning
def command(**flags: Any) -> int:
    """Run MODEL on PROMPT within a memory budget.

    MODEL is a checkpoint folder, a pack or an exported package. Without one the demo model runs, which ships
    with edge and completes tales. One argument alone is MODEL if there is such a folder, and PROMPT if it has several
    words; give the demo a prompt of one word with -p.

    \b
      edge run "Once upon a time"
      edge run ./model --budget 2GB "Once upon a time"

    Without a prompt, a terminal is a chat and a pipe is the prompt. The first run at int8 or int4 packs
    the checkpoint under the user's cache (EDGE_CACHE).
    """
    started, console = perf_counter(), stderr()
    model, positional = told_apart(flags["model"], flags["prompt"], flags["flag_prompt"])
    path = model_path(model)
    prompt = read_prompt(positional, flags["flag_prompt"])
    names = ("budget", "ram_budget", "context", "slice", "precision", "ple", "kv", "threads", "lock", "mmap")
    want = wanted(**{name: flags[name] for name in names})
    loud = not (flags["quiet"] or flags["as_json"])
    check(flags)
    with progress(console, loud) as notify:
        session = open_session(
            path,
            want.request,
            flags["device"],
            flags["engine"],
            text=True,
            fresh=True,
            notify=notify,
            started=started,
        )
    with session:
        if loud:
            say_demo(model, session.checkpoint.model)
            for note in filter(None, (want.note, session.runtime.note)):
                console.print(note, markup=False, soft_wrap=True)
            for line in plan_lines(session.plan, session.request, session.best):
                console.print(line, markup=False, soft_wrap=True)
        options = sampling(session, flags)
        chat = flags["chat"] if flags["chat"] is not None else session.template is not None
        ask = asker(session, chat, flags["system"])
        if prompt is None:
            return talk(session, ask, options, chat)
        return answer(session, ask(prompt, **options), flags["as_json"], loud)


def read_prompt(positional: str | None, flag: str | None) -> str | None:
    """The prompt, from the line or from a pipe; None means a chat on this terminal."""
    if positional is not None and flag is not None:
        raise Usage("two prompts", field="PROMPT", expected="one, as an argument or with -p")
    prompt = positional if positional is not None else flag
    if prompt is None and sys.stdin is not None and sys.stdin.isatty():
        return None
    if prompt is None or prompt == "-":
        data = sys.stdin.buffer.read(MOST_PROMPT + 1) if sys.stdin is not None else b""
        prompt = data.decode("utf-8", "replace")
        if prompt.endswith("\n"):
            # Files and echo end a line that the text does not: it would go on in the next one.
            prompt = prompt[:-1].removesuffix("\r")
        if not prompt.strip():
            raise Usage("an empty prompt", field="PROMPT", expected="text, as an argument or on standard input")
    # Bytes of the command line that are not UTF-8 arrive as lone surrogates.
    prompt = prompt.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    if len(prompt.encode("utf-8", "replace")) > MOST_PROMPT:
        raise Usage("a longer prompt", field="PROMPT", expected=f"at most {MOST_PROMPT >> 20} MiB")
    if not prompt:
        raise Usage("an empty prompt", field="PROMPT", expected="text")
    return prompt


def check(flags: dict[str, Any]) -> None:
    """Raises Usage for a flag that no checkpoint could make sense of, before anything is loaded."""
    if flags["limit"] < -1 or flags["limit"] == 0:
        raise Usage(flags["limit"], field="-n", expected="1 or more, or -1 for no limit")
    given = {"repetition_penalty": flags["repeat_penalty"]}
    given |= {name: flags[name] for name in ("temperature", "top_k", "top_p", "min_p")}
    Sampler(Sampling(**{name: value for name, value in given.items() if value is not None}), flags["seed"])


def sampling(session: Session, flags: dict[str, Any]) -> dict[str, Any]:
    """Flags first, then what the checkpoint recommends, then llama.cpp's defaults."""
    d = session.defaults

    def pick(flag: Any, recommended: Any, default: Any) -> Any:
        return next(value for value in (flag, recommended, default) if value is not None)

    seed = flags["seed"]
    return {
        "max_tokens": flags["limit"] if flags["limit"] > 0 else session.plan.context,
        "temperature": pick(flags["temperature"], d.temperature, 0.8),
        "top_k": pick(flags["top_k"], d.top_k, 40),
        "top_p": pick(flags["top_p"], d.top_p, 0.95),
        "min_p": pick(flags["min_p"], d.min_p, 0.0),
        "repetition_penalty": pick(flags["repeat_penalty"], d.repetition_penalty, 1.0),
        "seed": seed if seed is not None else int.from_bytes(os.urandom(4), "little"),
    }


def asker(session: Session, chat: bool, system: str | None) -> Callable[..., Iterator[Event]]:
    """Turns of a chat, or plain completion."""
    if chat:
        return Conversation(session, system).ask
    if system is not None:
        raise Usage("--system without a chat", field="--system", expected="a checkpoint with a chat template")
    return session.generate


@contextmanager
def stoppable(session: Session) -> Iterator[None]:
    """Ctrl-C ends the answer after the current token; a second one ends the program."""

    def stop(number: int, frame: Any) -> None:
        session.cancel()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def answer(session: Session, events: Iterator[Event], as_json: bool, loud: bool) -> int:
    """Streams one answer and accounts for it; the exit code."""
    said, tokens, last = [], [], None
    on_terminal = sys.stdout.isatty()
    with stoppable(session):
        for event in events:
            last = event
            said.append(event.text)
            if event.token is not None:
                tokens.append(event.token)
            if not as_json and event.text:
                sys.stdout.write(safe(event.text) if on_terminal else event.text)
                sys.stdout.flush()
    assert last is not None
    if as_json:
        print_json(report(session, "".join(said), tokens, last))
    else:
        sys.stdout.write("\n")
        sys.stdout.flush()
    if loud:
        console = stderr()
        console.print()
        for name, figure in statistics(session, last.timing):
            console.print(f"{name + ':':<13} {figure}", markup=False, soft_wrap=True)
    return INTERRUPTED if last.finish == "interrupted" else 0


def report(session: Session, text: str, tokens: list[int], last: Event) -> dict[str, Any]:
    """What ``--json`` prints; its keys are a contract."""
    memory, timing, ple = session.memory(), last.timing, session.ple
    return {
        "model": printable(session.checkpoint.folder),
        "text": text,
        "tokens": tokens,
        "finish": last.finish,
        "plan": session.plan.as_dict(),
        "memory": memory,
        "timing": {
            "load_s": session.load_s,
            "ttft_s": timing.ttft_s,
            "prefill_tps": timing.prefill_tps,
            "decode_tps": timing.decode_tps,
            "read_gbps": timing.read_gbps,
            "prompt_tokens": timing.prompt_tokens,
            "new_tokens": timing.new_tokens,
        },
        "ple": None
        if ple is None
        else {
            "tier": session.plan.ple,
            "rows": ple.rows,
            "bytes_read": ple.bytes_read,
            "hit_rate": ple.hit_rate,
            "wait_s": ple.wait_s,
        },
    }


OPENING = {
    True: "Type a message; /bye or Ctrl-D ends, Ctrl-C stops an answer.",
    False: "Type how a text begins and it goes on; /bye or Ctrl-D ends, Ctrl-C stops it.",
}


def talk(session: Session, ask: Callable[..., Iterator[Event]], options: dict[str, Any], chat: bool) -> int:
    """A chat on a terminal, or one text after another for a model that completes, until /bye or end of input."""
    console = stderr()
    console.print(OPENING[chat], markup=False)
    while True:
        try:
            line = input("> ")
        except EOFError:
            console.print()
            return 0
        if line.strip() == "/bye":
            return 0
        if not line.strip():
            continue
        try:
            events = ask(line, **options)
            if not chat and sys.stdout.isatty():
                # A text is read from its beginning.
                sys.stdout.write(safe(line))
            answer(session, events, as_json=False, loud=False)
        except Usage as error:
            # A history that has outgrown the context ends a turn, not the program.
            console.print(f"{error} Start again with /bye." if chat else str(error), markup=False)
