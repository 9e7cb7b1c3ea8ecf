"""A program of somebody else's, run to its end: sampled, with a limit of time, and nothing of it left afterwards."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from time import monotonic

from edge.profile.launch import Ended, Sampling, ending, follow, kernel_kills
from loaders.errors import printable

# What is read of a program's output, in bytes; a line of llama-bench's is some hundreds.
MOST_OUTPUT = 4 << 20
LAST_WORDS = 4096


def run(
    line: Sequence[str],
    *,
    timeout: float,
    env: Mapping[str, str] | None = None,
    text: bool = False,
    heard: Callable[[str], None] = lambda _: None,
) -> tuple[Ended, str]:
    """How it ended, and with ``text`` what it said; without, it says lines as edge/profile/child.py does.

    With ``text`` the status is that of the exit code alone. Never raises for what the program does, or where there is
    none that starts.
    """
    kills, began, found = kernel_kills(), monotonic(), Ended()
    with tempfile.TemporaryFile() as errors:
        try:
            # A session of its own: what it starts ends with it.
            process = subprocess.Popen(
                line, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors,
                env={**os.environ, **(env or {})}, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            found.why = f"{line[0]} does not start: {error.strerror or type(error).__name__}"
            return found, ""
        late = threading.Event()
        timer = threading.Timer(timeout, expire, (process, late))
        timer.start()
        try:
            with Sampling(process.pid, False, None, began) as sampling:
                said = taken(process, found, began, text, heard)
                process.wait()
        finally:
            timer.cancel()
            end(process)
            process.wait()
        found.samples, found.peak_seen = sampling.samples, max((s[1] for s in sampling.samples), default=0)
        errors.seek(max(0, errors.seek(0, os.SEEK_END) - LAST_WORDS))
        words = errors.read().decode("utf-8", "replace")
    if text and process.returncode == 0:
        found.status = "ok"
    else:
        found.status, found.why = ending(process.returncode, found, words, kernel_kills() - kills)
    if late.is_set():
        found.status, found.why = "failed", f"not done after {timeout:,.0f} seconds"
    found.why = None if found.why is None else printable(found.why)
    return found, said


def taken(
    process: subprocess.Popen[bytes], found: Ended, began: float, text: bool, heard: Callable[[str], None]
) -> str:
    """What it says, as text or into ``found``. Who says more than anybody reads is ended."""
    assert process.stdout is not None
    with process.stdout as stream:
        if not text:
            try:
                follow(stream, found, began, heard)
            except RecursionError:
                end(process)
            return ""
        data = stream.read(MOST_OUTPUT + 1)
        if len(data) > MOST_OUTPUT:
            found.error = {"text": f"said more than {MOST_OUTPUT >> 20} MiB"}
            end(process)
        return data[:MOST_OUTPUT].decode("utf-8", "replace")


def expire(process: subprocess.Popen[bytes], late: threading.Event) -> None:
    """Time is up."""
    late.set()
    end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """Kills it and what it has started."""
    with contextlib.suppress(OSError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
