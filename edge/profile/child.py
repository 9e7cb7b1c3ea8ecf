"""``python -m edge.profile.child JSON``: one run, measured from inside, told line by line as it happens.

A line is a JSON object: ``{"at": seconds, "mark": name}`` when something has been done, ``{"at": seconds, "held":
{component: bytes}}`` when the ledger has changed, and at the end ``{"result": {...}}`` or ``{"error": {...}}``. Seconds
are those of the monotonic clock, which processes share.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any

import numpy as np

from edge.budget.plan import Floor, Request
from edge.cli import run as _run  # noqa: F401 - what `edge run` has in memory too
from edge.profile.energy import Meter
from edge.profile.regularly import Regularly
from edge.sampling import Sampler, Sampling
from edge.session import Ready, Session, prepare
from loaders.errors import EdgeError, WontFit

PR_SET_PDEATHSIG = 1
# Of a thousand: whom the kernel kills first when memory runs out. Better this process than the one that reports it.
VOLUNTEER = 800


@dataclass(frozen=True)
class Asked:
    """What a child measures. ``request`` are the fields of a planner's request, ``floor`` those of the floor that the
    plan stands on: another process may find a few pages more or less.

    ``prompt``: tokens of the first prompt; ``new``: of a decoding; ``depth``: tokens of context after which is decoded
    again, 0 for not. ``short``: leave out all but loading, the first prompt and decoding. ``new`` 0: only load.
    """

    model: str
    request: dict[str, Any] = field(default_factory=dict)
    floor: dict[str, int] | None = None
    device: str = "cpu"
    engine: str = "auto"
    prompt: int = 512
    new: int = 128
    depth: int = 0
    short: bool = False
    seed: int = 0

    def to_json(self) -> str:
        """For a command line."""
        return json.dumps(asdict(self))


class Voice:
    """Lines on stdout, one thread at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __call__(self, **line: Any) -> None:
        text = json.dumps(line, allow_nan=False) + "\n"
        with self._lock:
            sys.stdout.write(text)
            sys.stdout.flush()

    def mark(self, name: str) -> None:
        """Something has been done."""
        self(at=monotonic(), mark=name)


class Observed(Session):
    """A session whose ledger is followed from the moment it is there."""

    def __init__(self, ready: Ready, say: Voice, started: float) -> None:
        with followed(lambda: getattr(self, "ledger", None), say):
            super().__init__(ready, started=started)
        self.followed = followed(lambda: self.ledger, say)


def followed(ledger: Callable[[], Any], say: Voice) -> Regularly:
    """Tells of a ledger's changes while it is entered."""
    told: dict[str, int] = {}

    def look() -> bool:
        found = ledger()
        held = {} if found is None else found.held()
        if held != told:
            told.clear()
            told.update(held)
            say(at=monotonic(), held=held)
        return True

    return Regularly(look, "edge-ledger")


@dataclass
class Decoded:
    """One decoding: seconds of each token, the tokens, and what was read and used meanwhile."""

    seconds: list[float]
    tokens: list[int]
    rows: int
    hits: int
    bytes_read: int
    wait_s: float
    storage_bytes: int | None
    joules: float | None

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def decode(session: Session, token: int, count: int, meter: Meter, seed: int) -> Decoded:
    """``count`` tokens after ``token``, each drawn from the likeliest 40 after the one before: greedy text of random
    weights would repeat itself, and so would the rows it reads. Timed as llama-bench does, without sampling.
    """
    sampler, seconds, tokens = Sampler(Sampling(temperature=1.0, top_k=40), seed), list[float](), list[int]()
    rows, storage, joules = counters(session), storage_bytes(), meter.joules()
    for _ in range(count):
        start = perf_counter()
        session.prefetch(token)
        out = session.step([token])
        seconds.append(perf_counter() - start)
        token = int(sampler(out, ()))
        tokens.append(token)
    used, read = difference(joules, meter.joules()), difference(storage, storage_bytes())
    after = [after - before for before, after in zip(rows, counters(session), strict=True)]
    return Decoded(seconds, tokens, *(int(n) for n in after[:3]), after[3], None if read is None else int(read), used)


def counters(session: Session) -> tuple[float, ...]:
    """Of the per-layer-embedding table: rows, hits, bytes read, seconds waited; zeros without one."""
    ple = session.ple
    return (0, 0, 0, 0.0) if ple is None else (ple.rows, ple.hits, ple.bytes_read, ple.wait_s)


def storage_bytes() -> int | None:
    """Bytes that this process has had read from storage; None where the kernel does not count them."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes:")), None)


def difference(before: float | None, after: float | None) -> float | None:
    """None where either is not known."""
    return None if before is None or after is None else after - before


def measure(asked: Asked, say: Voice) -> dict[str, Any]:
    """Loads, and runs what is asked for; figures in seconds, bytes and tokens."""
    started = perf_counter()
    say.mark("started")
    before = storage_bytes()
    ready = prepare(Path(asked.model), Request(**asked.request), asked.device, asked.engine)
    if asked.floor is not None:
        ready = replace(ready, floor=Floor(**asked.floor))
    with Observed(ready, say, started) as session, session.followed:
        say.mark("loaded")
        loaded = difference(before, storage_bytes())
        found = {"load_s": session.load_s, "plan": session.plan.as_dict(), "label": session.plan.label()}
        found |= {"load_bytes": loaded, "chunk": session.plan.chunk}
        if asked.new:
            found |= tests(session, asked, say)
        found["memory"] = {**session.memory(), "host_planned_bytes": session.plan.host_total_bytes or None}
        if session.watch.over:
            found["over"] = True
    return found


def tests(session: Session, asked: Asked, say: Voice) -> dict[str, Any]:
    """Each on an empty cache: the first prompt, decoding, a prompt once everything is warm and, going on from there,
    one as long as ``depth`` and decoding after it.
    """
    ids = prompt_ids(session, max(asked.prompt, asked.depth), asked.seed)
    meter = Meter.open(device=session.runtime.device)
    found: dict[str, Any] = {"energy": {"source": meter.source, "why": meter.why}}

    start = perf_counter()
    session.step(ids[: asked.prompt])
    found["first_s"] = perf_counter() - start
    say.mark("first prompt")

    session.reset()
    session.step(ids[:1])
    found["decode"] = decode(session, int(ids[1]), asked.new, meter, asked.seed).as_dict()
    say.mark(f"tg{asked.new}")
    if asked.short:
        return found

    session.reset()
    reached: list[tuple[int, float]] = []
    found["prompt_s"] = seconds = filled(session, ids[: asked.prompt], 0, 0.0, reached)
    say.mark(f"pp{asked.prompt}")
    if asked.depth:
        found["depth_s"] = seconds + filled(session, ids[asked.prompt : asked.depth], asked.prompt, seconds, reached)
        say.mark(f"pp{asked.depth}")
        found["deep"] = decode(session, int(ids[0]), asked.new, meter, asked.seed).as_dict()
        say.mark(f"tg{asked.new} @ d{asked.depth}")
    return {**found, "first_token": reached}


def prompt_ids(session: Session, count: int, seed: int) -> np.ndarray:
    """Random ids that every table of the model has, at least two."""
    table = session.model.ple
    vocab = session.model.vocab if table is None else min(session.model.vocab, table.rows)
    return np.random.default_rng(seed).integers(min(4, vocab - 1), vocab, max(2, count))


def filled(
    session: Session, ids: Sequence[int] | np.ndarray, before: int, seconds: float, reached: list[tuple[int, float]]
) -> float:
    """Seconds that a prompt takes; into ``reached``, how many were done when, ``before`` and ``seconds`` added."""
    start = perf_counter()

    def heard(what: str, done: int, total: int) -> None:
        if what == "prefill" and done < total:
            reached.append((before + done, seconds + perf_counter() - start))

    quiet, session.notify = session.notify, heard
    try:
        session.step(ids)
    finally:
        session.notify = quiet
    took = perf_counter() - start
    reached.append((before + len(ids), seconds + took))
    return took


def volunteer() -> None:
    """Ends with the process that started it, whatever ends that, and goes first when memory runs out."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        Path("/proc/self/oom_score_adj").write_text(str(VOLUNTEER))
    except OSError:
        return


def told(error: EdgeError) -> dict[str, Any]:
    """An error as the other side shows it."""
    found = {"kind": type(error).__name__, "text": str(error), "exit_code": error.exit_code}
    return {**found, "needed_bytes": error.needed} if isinstance(error, WontFit) else found


def main() -> int:
    """Measures what the command line asks for."""
    volunteer()
    say = Voice()
    try:
        say(result=measure(Asked(**json.loads(sys.argv[1])), say))
    except EdgeError as error:
        say(error=told(error))
        return error.exit_code
    except BrokenPipeError:
        os._exit(1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
