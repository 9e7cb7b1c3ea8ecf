"""Starts a measuring process, samples its memory from outside, and says how it ended, however that was."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import tempfile
import threading
from bisect import bisect_right
from collections.abc import Callable, Sequence
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

HZ = 50
# Seconds after which a child that has not ended is ended.
LONGEST = 7200.0
KILL = getattr(signal, "SIGKILL", 9)
# Points of a timeline that is kept.
POINTS = 400
LONGEST_LINE = 4 << 20
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
    """Reads a process's memory 50 times a second, and the device's where ``device`` says so, while it is entered."""

    def __init__(self, pid: int, device: bool, baseline: int | None, began: float) -> None:
        self.samples: list[tuple[float, int, int, int, int | None]] = []
        self._pid, self._began = pid, began
        self._baseline = baseline if device else None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="edge-sampling", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        due = monotonic()
        while True:
            try:
                now = read_process(self._pid)
            except ProcessLookupError:
                return
            if now.rss:  # a zombie has none
                shared = now.file_backed + now.shared
                row = (monotonic() - self._began, now.rss + now.swap, now.anonymous + now.swap, shared, self._device())
                self.samples.append(row)
            due += 1 / HZ
            if self._stopped.wait(max(0.0, due - monotonic())):
                return

    def _device(self) -> int | None:
        used = None if self._baseline is None else device_used()
        return None if used is None or self._baseline is None else max(0, used - self._baseline)


def command(asked: Asked) -> list[str]:
    """The process that measures."""
    return module_command("edge.profile.child", asked.to_json())


def launch(line: Sequence[str], *, device: bool = False, heard: Callable[[str], None] = lambda _: None) -> Ended:
    """Runs a child to its end. ``heard`` is told of its marks. The child is killed when this is interrupted."""
    kills, began, found = kernel_kills(), monotonic(), Ended()
    baseline = device_used() if device else None
    with tempfile.TemporaryFile() as errors:
        # A session of its own: Ctrl-C reaches this process alone, which then ends the child.
        process = subprocess.Popen(
            line,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
            env=module_environment(),
        )
        late = threading.Timer(LONGEST, process.kill)
        late.daemon = True
        late.start()
        try:
            with Sampling(process.pid, device, baseline, began) as sampling:
                assert process.stdout is not None
                follow(process.stdout, found, began, heard)
                process.wait()
        finally:
            late.cancel()
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
        found.samples, found.peak_seen = sampling.samples, max((s[1] for s in sampling.samples), default=0)
        errors.seek(max(0, errors.seek(0, 2) - 4096))
        said = errors.read().decode("utf-8", "replace")
    found.status, found.why = ending(process.returncode, found, said, kernel_kills() - kills)
    return found


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
