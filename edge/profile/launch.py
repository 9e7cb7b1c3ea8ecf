"""Starts a measuring process, samples its memory from outside, and says how it ended, however that was."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import tempfile
import threading
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import IO, Any, Self

from edge.budget.memory import read_process
from edge.budget.nvml import device_used
from edge.budget.units import format_bytes
from edge.processes import module_command, module_environment
from edge.profile.child import Asked
from edge.profile.regularly import Regularly
from loaders.errors import printable

# Seconds after which a child that has not ended is ended.
LONGEST = 7200.0
KILL = getattr(signal, "SIGKILL", 9)
# Points of a timeline that is kept.
POINTS = 400
LONGEST_LINE = 4 << 20
# What is read of a program's output that is no lines of ours, and of its errors, in bytes.
MOST_OUTPUT, LAST_WORDS = 4 << 20, 4096
SERIES = ("rss", "anonymous", "file")


@dataclass
class Ended:
    """How a child ended. ``status``: ok, refused, killed, failed. ``held`` and ``marks`` are (seconds since its start,
    what), ``samples`` (seconds, rss, anonymous, file-backed, device or None), in bytes.
    """

    status: str = "failed"
    why: str | None = None
    result: dict[str, Any] = field(default_factory=dict)
    error: dict[str, Any] = field(default_factory=dict)
    marks: list[tuple[float, str]] = field(default_factory=list)
    held: list[tuple[float, dict[str, int]]] = field(default_factory=list)
    samples: list[tuple[float, int, int, int, int | None]] = field(default_factory=list)
    peak_seen: int = 0


class Sampling:
    """Reads a process's memory 50 times a second, and the device's beyond ``baseline`` where there is one, while it is
    entered.
    """

    def __init__(self, pid: int, baseline: int | None, began: float) -> None:
        self.samples: list[tuple[float, int, int, int, int | None]] = []
        self._pid, self._began, self._baseline = pid, began, baseline
        self._regularly = Regularly(self._look, "edge-sampling")

    def __enter__(self) -> Self:
        self._regularly.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._regularly.__exit__(kind, error, at)

    def _look(self) -> bool:
        try:
            now = read_process(self._pid)
        except ProcessLookupError:
            return False
        if now.rss:  # a zombie has none
            shared = now.file_backed + now.shared
            row = (monotonic() - self._began, now.rss + now.swap, now.anonymous + now.swap, shared, self._device())
            self.samples.append(row)
        return True

    def _device(self) -> int | None:
        used = None if self._baseline is None else device_used()
        return None if used is None or self._baseline is None else max(0, used - self._baseline)


def command(asked: Asked) -> list[str]:
    """The process that measures."""
    return module_command("edge.profile.child", asked.to_json())


def launch(line: Sequence[str], *, device: bool = False, heard: Callable[[str], None] = lambda _: None) -> Ended:
    """Runs a child of ours to its end. ``heard`` is told of its marks."""
    return run(line, timeout=LONGEST, env=module_environment(), device=device, heard=heard)[0]


def run(
    line: Sequence[str],
    *,
    timeout: float,
    env: Mapping[str, str] | None = None,
    text: bool = False,
    device: bool = False,
    heard: Callable[[str], None] = lambda _: None,
) -> tuple[Ended, str]:
    """How a program ended, ours or somebody else's, and with ``text`` what it said; without, it says lines as
    edge/profile/child.py does. Nothing of it is left when this ends or is interrupted.

    With ``text`` the status is that of the exit code alone. Never raises for what the program does, or where there is
    none that starts.
    """
    kills, began, found = kernel_kills(), monotonic(), Ended()
    baseline = device_used() if device else None
    with tempfile.TemporaryFile() as errors:
        try:
            # A session of its own: Ctrl-C reaches this process alone, and what it starts ends with it.
            process = subprocess.Popen(
                line, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors,
                env={**os.environ, **(env or {})}, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            found.why = f"{line[0]} does not start: {error.strerror or type(error).__name__}"
            return found, ""
        late = threading.Event()
        timer = threading.Timer(timeout, expire, (process, late))
        timer.daemon = True
        timer.start()
        try:
            with Sampling(process.pid, baseline, began) as sampling:
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
            follow(stream, found, began, heard)
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
    with suppress(OSError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, KILL)
    process.kill()


def follow(stream: IO[bytes], found: Ended, began: float, heard: Callable[[str], None]) -> None:
    """Takes in what a child says; what is no line of ours is passed over."""
    while data := stream.readline(LONGEST_LINE):
        line = parsed(data)
        at = line.get("at", 0.0) - began if type(line.get("at")) is float else 0.0
        if isinstance(line.get("mark"), str):
            found.marks.append((at, line["mark"]))
            heard(line["mark"])
        if isinstance(line.get("held"), dict):
            found.held.append((at, line["held"]))
        for name, place in (("result", found.result), ("error", found.error)):
            if isinstance(line.get(name), dict):
                place.update(line[name])


def follow_text(text: str, found: Ended) -> None:
    """The same of what a child has said in all."""
    follow(io.BytesIO(text.encode()), found, 0.0, lambda _: None)


def parsed(data: bytes) -> dict[str, Any]:
    """A line as an object; empty for anything else."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def ending(code: int, found: Ended, said: str, kills: int) -> tuple[str, str | None]:
    """(status, why) of a child that ended with ``code``, negative for a signal; ``kills``: by the kernel meanwhile."""
    if code == 0 and found.result:
        return ("failed", "the budget was broken while it ran") if found.result.get("over") else ("ok", None)
    if found.error:
        return ("refused" if "needed_bytes" in found.error else "failed"), str(found.error.get("text"))
    held = f" at {format_bytes(found.peak_seen)}" if found.peak_seen else ""
    if code == -KILL:
        whom = "by the kernel, out of memory" if kills else "by somebody, or by the kernel out of memory"
        return "killed", f"killed {whom}{held}"
    if code < 0:
        return "killed", f"ended by {signal_name(-code)}{held}"
    last = next((line.strip() for line in reversed(said.splitlines()) if line.strip()), "no message")
    return "failed", f"exit {code}: {last[:300]}"


def signal_name(number: int) -> str:
    """SIGSEGV, or signal 99."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def kernel_kills() -> int:
    """How many processes the kernel has killed for memory since it started; 0 where it does not say."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def timeline(found: Ended) -> dict[str, Any]:
    """What is kept of a child's memory over time: at most ``POINTS`` points, each the highest of its stretch."""
    samples = found.samples
    each = max(1, -(-len(samples) // POINTS))
    stretches = [samples[i : i + each] for i in range(0, len(samples), each)]
    points = [max(stretch, key=lambda s: s[1]) for stretch in stretches]
    times = [round(point[0], 3) for point in points]
    series: dict[str, Any] = {name: [point[1 + i] for point in points] for i, name in enumerate(SERIES)}
    on_device = any(point[4] is not None for point in points)
    series["device"] = [max(s[4] or 0 for s in stretch) for stretch in stretches] if on_device else None
    marks = [[round(at, 3), name] for at, name in found.marks]
    return {"seconds": times, **series, "components": components(found.held, times), "marks": marks}


def components(held: Sequence[tuple[float, dict[str, int]]], times: Sequence[float]) -> dict[str, list[int]]:
    """What the ledger held of each component at each time."""
    names = list(dict.fromkeys(name for _, line in held for name in line))
    when = [at for at, _ in held]
    found: dict[str, list[int]] = {name: [] for name in names}
    for at in times:
        place = bisect_right(when, at) - 1
        for name in names:
            found[name].append(int(held[place][1].get(name, 0)) if place >= 0 else 0)
    return found
