"""The command line: one group, one exit. Results go to stdout, everything else to stderr.

An error is one line and an exit code of its class; a traceback appears only with ``--debug``.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import TextIOWrapper

import click

from edge import __version__
from loaders.errors import EdgeError, printable

INTERRUPTED, BUG, IO, MEMORY = 130, 70, 74, 81


class Lazy(click.Group):
    """Imports the commands' files when the command line is read; none of them imports torch."""

    commands_in = (
        *("run", "plan", "inspect", "pack", "slice", "export", "eval", "calibrate", "profile", "doctor", "synth"),
    )

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands_in)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.commands_in:
            return None
        from importlib import import_module

        command: click.Command = import_module(f"edge.cli.{cmd_name}").command
        return command


@click.command(cls=Lazy, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="edge")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def app(debug: bool) -> None:
    """Run the best language model that fits in the memory you have.

    \b
      edge run "Once upon a time"                         the demo model, which completes tales
      edge run ./model --budget 2GB "Once upon a time"
      edge plan ./model --budget 2GB
    """


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP as exceptions: what was half-written goes, and the exit code is the shell's for them."""

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        numbers = []
    # Ignored ones stay so: nohup.
    before = {n: signal.signal(n, end) for n in numbers if signal.getsignal(n) is signal.SIG_DFL}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_app(args: Sequence[str]) -> int:
    """Runs one command; returns the exit code."""
    debug = "--debug" in args
    if isinstance(sys.stdout, TextIOWrapper):
        # A character that a terminal's encoding lacks is no reason to stop.
        sys.stdout.reconfigure(errors="replace")
    try:
        # Not app.main: it would handle some errors itself, a closed pipe among them.
        plain = [a for a in args if a != "--debug"]
        with ended_by_signals(), app.make_context("edge", plain) as context:
            result = app.invoke(context)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as done:
        return done.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        sys.stderr.write(f"{error.format_message()}\n")
        return 2
    except BrokenPipeError:
        # Whoever read our output has had enough; the interpreter must not complain about it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (KeyboardInterrupt, click.Abort):
        return INTERRUPTED
    except BaseException as error:  # noqa: BLE001 - the one place where everything ends as a line and a code
        if debug:
            traceback.print_exc()
        code, line = explain(error)
        if line:
            sys.stderr.write(f"edge: error: {line}\n")
        return code


def explain(error: BaseException) -> tuple[int, str]:
    """(exit code, one line) for anything that came out of a command."""
    if isinstance(error, SystemExit):
        return (error.code if isinstance(error.code, int) else 1), ""
    if isinstance(error, EdgeError):
        return error.exit_code, str(error)
    if isinstance(error, click.ClickException):
        where = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "edge"
        return 2, f"{printable(error.format_message().rstrip('.'))}. See '{where} --help'."
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return MEMORY, "out of memory: the system refused an allocation. Give a lower --budget."
    if isinstance(error, OSError):
        name = f"{printable(error.filename)}: " if error.filename else ""
        return IO, f"{name}{error.strerror or type(error).__name__}."
    found = printable(f"{type(error).__name__}: {error}").replace("\n", " ")
    return BUG, f"a bug in edge: {found}. Run again with --debug and report what it shows."
