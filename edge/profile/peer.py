"""llama.cpp beside edge: found where it is installed, given a model of the same shape, measured by the same tests.

found = peer.find()
with peer.weights(found, model, folder) as file:
    lines = list(peer.run(found, model, file, (512, 4096), facts=..., threads=2, repeat=5, new=128))
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from edge.budget.machine import measured_bandwidth
from edge.budget.plan import Request
from edge.profile import case, gguf, launch, peer_bench, subject
from edge.profile.case import Case, Measured
from edge.profile.gguf import PEER
from edge.profile.launch import Ended, timeline
from edge.profile.noise import Around
from edge.profile.results import number
from loaders.errors import Unsupported
from loaders.network.spec import Model

VARIABLE, BENCH, MODULE = "EDGE_PEERS_PYTHON", "llama-bench", "llama_cpp"
CHILD = Path(__file__).with_name("peer_child.py")
# Seconds for a Python to import its library, and for one run of all tests.
QUICK, LONGEST = 120.0, 7200.0
INSTALL = f"pip install llama-cpp-python, or put {BENCH} on the PATH; {VARIABLE} names a Python that has the former"
WEIGHTS = "Q4_0 with a Q8_0 head, random weights of the same shape"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Peer:
    """A Python that has llama_cpp or, with ``bench``, llama-bench, whose version is known once it has answered."""

    program: str
    version: str
    bench: bool = False

    @property
    def label(self) -> str:
        """For people."""
        return f"{PEER} ({self.version}), {WEIGHTS}"


def find(env: Mapping[str, str] | None = None) -> Peer:
    """The Python that EDGE_PEERS_PYTHON names, else this one, else llama-bench.

    Raises Unsupported, naming what to install; also where the variable names a Python without it.
    """
    env = os.environ if env is None else env
    if named := env.get(VARIABLE):
        version, why = probe(named)
        if version is None:
            raise Unsupported(f"{named}: {why}", field=VARIABLE, expected=f"a Python that has {MODULE}")
        return Peer(named, version)
    missing = ""
    if find_spec(MODULE) is not None:
        version, missing = probe(sys.executable)
        if version is not None:
            return Peer(sys.executable, version)
    if program := shutil.which(BENCH, path=env.get("PATH")):
        return Peer(program, BENCH, bench=True)
    raise Unsupported(f"{PEER} is not installed" + (f": {missing}" if missing else ""), hint=INSTALL)


def probe(python: str) -> tuple[str | None, str]:
    """The version of its llama_cpp, or None and why there is none."""
    ended, _ = launch.run([python, str(CHILD), "version"], timeout=QUICK)
    version = ended.result.get("version")
    if ended.status == "ok" and isinstance(version, str):
        return version[:100], ""
    return None, (ended.why or "says no version")[:300]


def check(peer: Peer, model: Model, folder: Path) -> None:
    """Raises Unsupported for an architecture that is not written here or that this llama.cpp does not know.

    llama-bench is not asked: what it does not know it says when it is run.
    """
    gguf.metadata(model)
    gguf.entries(model)
    if peer.bench:
        return
    file = place(model, folder)
    try:
        gguf.write_header(model, file)
        ended, _ = launch.run([peer.program, str(CHILD), "check", str(file)], timeout=QUICK)
    finally:
        file.unlink(missing_ok=True)
    if ended.status != "ok":
        raise Unsupported(str(ended.why).replace(str(file), f"a {model.family} model"), file=peer.program)


@contextmanager
def weights(peer: Peer, model: Model, folder: Path, say: Say = lambda _: None) -> Iterator[Path]:
    """A file of random weights in ``folder``, which is there, while it is entered.

    Raises what ``check`` does, before anything large is written; ReadFailed for a disk that is full.
    """
    check(peer, model, folder)
    file = place(model, folder)
    try:
        say(f"writing {gguf.nbytes(model) / 1e9:.2g} GB for {PEER}")
        gguf.write(model, file)
        yield file
    finally:
        file.unlink(missing_ok=True)


def place(model: Model, folder: Path) -> Path:
    """Of a file that this process writes."""
    return folder / f"{gguf.architecture(model)}-{os.getpid()}.gguf"


def run(
    peer: Peer,
    model: Model,
    file: Path,
    contexts: Sequence[int],
    *,
    facts: Mapping[str, Any],
    threads: int,
    repeat: int,
    new: int,
    say: Say = lambda _: None,
    timeout: float = LONGEST,
) -> Iterator[dict[str, Any]]:
    """A line of results for each context, as soon as it has ended. ``facts``: model, machine, versions.

    An interrupt ends what runs; the line of its case comes first, then KeyboardInterrupt.
    """
    for context in contexts:
        asked = Case("", Request(threads=threads), context, "cpu", PEER, new, repeat)
        found, stop = Measured(around=Around(partial(measured_bandwidth, threads))), None
        tests: dict[str, Any] = {}
        try:
            with found.around:
                if peer.bench:
                    peer, tests = benched(peer, asked, file, found, say, timeout)
                else:
                    measure(peer, asked, file, found, say, timeout)
        except (KeyboardInterrupt, SystemExit) as interrupt:
            stop = interrupt
        line = summed(peer, asked, facts, found, tests, gguf.bytes_per_token(model))
        if stop is not None:
            line |= case.interrupted(asked, found)
        yield line
        if stop is not None:
            raise stop


def measure(peer: Peer, asked: Case, file: Path, found: Measured, say: Say, timeout: float) -> None:
    """Cold once, where files can be put out of the page cache, and warm as often as asked, into ``found``."""
    what = {
        "file": str(file), "context": -(-(asked.context + asked.new) // 256) * 256, "threads": asked.request.threads,
        "prompt": asked.prompt, "new": asked.new, "depth": asked.depth,
    }  # fmt: skip

    def one(name: str, short: bool) -> tuple[Ended, float | None]:
        share = subject.cached_share([file])
        line = [peer.program, str(CHILD), "measure", json.dumps({**what, "short": short})]
        ended, _ = launch.run(line, timeout=timeout, env=settings(asked), heard=lambda m: say(f"{name}: {m}"))
        return checked(ended, asked, short), share

    if subject.drop([file]):
        found.cold.append(one("cold", True))
    for turn in range(asked.repeat):
        if found.bad() is not None:
            return
        found.warm.append(one(f"run {turn + 1} of {asked.repeat}", False))


def settings(asked: Case) -> dict[str, str]:
    """Of the environment."""
    return {"OMP_NUM_THREADS": str(asked.request.threads)}


def checked(ended: Ended, asked: Case, short: bool) -> Ended:
    """A run that ended well but did not say all that was asked for has failed: it is somebody else's program."""
    if ended.status == "ok":
        try:
            case.start([(ended, None)])
            decoded = [ended.result["decode"], *([] if short or not asked.depth else [ended.result["deep"]])]
            good = all(len(d["seconds"]) == asked.new and min(d["seconds"]) > 0 for d in decoded)
            if not short:
                case.speeds(asked, [ended.result])
            if not good or not number(ended.result["memory"]["peak_bytes"]):
                raise ValueError
        except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError):
            ended.status, ended.why = "failed", "ended without the figures that were asked for"
    return ended


def benched(
    peer: Peer, asked: Case, file: Path, found: Measured, say: Say, timeout: float
) -> tuple[Peer, dict[str, Any]]:
    """llama-bench, with the version it says, and its figures by the tests' names."""
    threads, tests = asked.request.threads or 1, dict[str, Any]()
    for line in peer_bench.commands(
        peer.program, str(file), asked.prompt, asked.new, asked.depth, threads, asked.repeat
    ):
        say(f"{BENCH} {' '.join(line[-4:])}")
        ended, said = launch.run(line, timeout=timeout, env=settings(asked), text=True)
        found.warm.append((ended, subject.cached_share([file])))
        if ended.status != "ok":
            break
        try:
            more, version = peer_bench.parsed(said)
        except ValueError as error:
            ended.status, ended.why = "failed", f"{BENCH} answered what cannot be read: {error}"
            break
        tests, peer = {**tests, **more}, replace(peer, version=version[:100])
    return peer, tests


def summed(
    peer: Peer, asked: Case, facts: Mapping[str, Any], found: Measured, tests: dict[str, Any], size: int
) -> dict[str, Any]:
    """The line of a context. ``tests``: llama-bench's; ``size``: bytes of weights that a token reads."""
    line = case.line(asked, dict(facts))
    good, bad, last = found.good(), found.bad(), [ended for ended, _ in (*found.cold, *found.warm)][-1:]
    versions = {**(facts.get("versions") or {}), PEER: peer.version}
    line |= {"case": f"{PEER}, {asked.context} tokens", "plan": None, "label": peer.label, "versions": versions}
    line["asked"] = {**line["asked"], "budget": None, "budget_bytes": None}
    model = facts.get("model") or {}
    # That of real weights would not be the peer's.
    mark = model.get("fingerprint") if model.get("weights") == "synthetic" else None
    line["model"] = {**model, "fingerprint": mark, "weights": "synthetic"}
    line["noise"] = found.around.as_dict()
    if bad is not None:
        line |= {"status": bad.status, "why": bad.why}
    elif not good:
        line |= {"status": "interrupted", "why": "interrupted before a run had ended"}
    for ended in good[-1:] or last:
        if ended.samples:
            ended.held.clear()
            line["timeline"] = timeline(ended)
    if not good:
        return line
    line["memory"] = memory(good)
    if peer.bench:
        line |= {"tests": tests, "latency_ms": {}}
    else:
        line |= {"warm": case.start(found.warm), **case.speeds(asked, [ended.result for ended in good])}
        line["cold"] = case.start(found.cold) if found.cold and found.cold[0][0].status == "ok" else None
    decoded = line["tests"].get(f"tg{asked.new}")
    if decoded is not None:
        reads = max(found.around.before, found.around.after)
        line["bandwidth"] = case.bandwidth(found.around, decoded["mean"], size, reads)
    return line


def memory(good: Sequence[Ended]) -> dict[str, Any]:
    """The highest of all runs: what the process says itself, where it does, else what was seen from outside."""
    most = {"peak_bytes": 0, "anonymous_bytes": 0, "file_bytes": 0}
    for ended in good:
        seen = max(ended.samples, key=lambda s: s[1], default=(0.0, 0, 0, 0, None))
        outside = dict(zip(most, seen[1:4], strict=True))
        inside = {k: v for k, v in (ended.result.get("memory") or {}).items() if k in most and type(v) is int}
        most = {name: max(most[name], {**outside, **inside}[name]) for name in most}
    return {**most, "pss_bytes": None, "device_peak_bytes": None, "planned_bytes": None, "components": {}, "kept": True}
