"""One case: a budget and a context, measured in fresh processes, cold once and warm as often as asked, as a line."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from edge.budget.plan import Floor, Plan, Request
from edge.budget.units import format_bytes
from edge.engine.threads import thread_count
from edge.processes import module_environment
from edge.profile import box, subject
from edge.profile.child import Asked
from edge.profile.forecast import Forecast
from edge.profile.launch import Ended, command, follow_text, launch, timeline
from edge.profile.noise import Around
from edge.profile.results import SCHEMA, figure, percentiles

PROMPT = 512
BOX_TIMEOUT = 3600.0


@dataclass(frozen=True)
class Case:
    """What is asked of a run. ``budget`` is in the words of the user; ``context``: tokens decoding begins after."""

    budget: str
    request: Request
    context: int
    device: str
    engine: str
    new: int
    repeat: int
    floor: Floor | None = None

    @property
    def name(self) -> str:
        """Unique in a file of results."""
        return f"{self.budget}, {self.context} tokens"

    @property
    def prompt(self) -> int:
        """Tokens of the prompt that is measured alone."""
        return min(PROMPT, self.context)

    @property
    def depth(self) -> int:
        """Tokens decoding is repeated after; 0 where the prompt is all there is."""
        return self.context if self.context > PROMPT else 0

    def asked(self, path: Path, *, short: bool = False, new: int | None = None, seed: int = 0) -> Asked:
        """What a child is told. Another ``seed``, other tokens: their rows of a table are not in the page cache yet."""
        names = ("budget", "ram_budget", "slice", "precision", "ple", "kv", "context", "threads", "lock", "mmap")
        request = {name: getattr(self.request, name) for name in names}
        count = self.new if new is None else new
        floor = None if self.floor is None else asdict(self.floor)
        about = (floor, self.device, self.engine, self.prompt, count, self.depth)
        return Asked(str(path), request, *about, short=short, seed=seed)


@dataclass
class Measured:
    """What a case has come to so far."""

    cold: list[tuple[Ended, float | None]] = field(default_factory=list)
    warm: list[tuple[Ended, float | None]] = field(default_factory=list)
    boxed: dict[str, Any] | None = None
    around: Around = field(default_factory=Around)
    error: str | None = None

    def good(self) -> list[Ended]:
        """Warm runs that ended well."""
        return [ended for ended, _ in self.warm if ended.status == "ok"]

    def bad(self) -> Ended | None:
        """The first run that did not."""
        return next((ended for ended, _ in (*self.cold, *self.warm) if ended.status != "ok"), None)


def measure(case: Case, path: Path, plan: Plan, found: Measured, listener: Any, in_box: bool) -> None:
    """Runs a case's processes one after another, into ``found``: an interrupt leaves what was measured."""
    on_device = plan.device != "cpu"

    def run(what: str, asked: Asked) -> tuple[Ended, float | None]:
        share = subject.cached_share(files)
        ended = launch(command(asked), device=on_device, heard=lambda mark: listener.at(f"{case.name}: {what}: {mark}"))
        listener.done(1)
        return ended, share

    if subject.needs_packing(path, plan):
        listener.at(f"{case.name}: packing")
        packed = launch(command(case.asked(path, new=0)))
        if packed.status != "ok":
            found.cold.append((packed, None))
            return
    files = subject.files_of(path, plan.precision)
    with found.around:
        if subject.drop(files):
            found.cold.append(run("cold", case.asked(path, short=True)))
        if found.bad() is None:
            for turn in range(case.repeat):
                found.warm.append(run(f"run {turn + 1} of {case.repeat}", case.asked(path, seed=turn + 1)))
                if found.bad() is not None:
                    break
    if in_box and found.bad() is None:
        listener.at(f"{case.name}: in a control group")
        subject.drop(files)
        found.boxed = boxed(case, path, found)


def boxed(case: Case, path: Path, found: Measured) -> dict[str, Any]:
    """The first warm run in short, in a memory control group whose hard limit is the budget, without swap."""
    limit = case.request.budget
    assert limit is not None
    try:
        done = box.run(
            command(case.asked(path, short=True, seed=1)), limit, env=module_environment(), timeout=BOX_TIMEOUT
        )
    except (OSError, ValueError) as error:
        return {"status": "failed", "why": str(error), "limit_bytes": limit, "oom_kills": 0, "same_tokens": False}
    ended = Ended()
    follow_text(done.stdout, ended)
    status = "ok" if done.rc == 0 and ended.result else "killed" if done.oom_kills or done.rc < 0 else "failed"
    tokens = ended.result.get("decode", {}).get("tokens")
    why = None if status == "ok" else f"exit {done.rc}, {done.oom_kills} killed by the kernel for memory"
    tests = {f"tg{case.new}": figure([speed(ended.result["decode"])])} if status == "ok" else {}
    return {
        "status": status, "why": why, "limit_bytes": limit, "peak_bytes": done.peak, "oom_kills": done.oom_kills,
        "same_tokens": tokens is not None and tokens == found.good()[0].result["decode"]["tokens"], "tests": tests,
    }  # fmt: skip


def speed(decoded: dict[str, Any]) -> float:
    """Tokens per second of one decoding."""
    return len(decoded["seconds"]) / sum(decoded["seconds"])


def line(case: Case, facts: dict[str, Any]) -> dict[str, Any]:
    """What every line says, whatever became of its case; ``facts``: model, machine, versions."""
    asked = {
        "budget": case.budget, "budget_bytes": case.request.budget, "context": case.context, "device": case.device,
        "engine": case.engine, "threads": case.request.threads or thread_count(), "repeat": case.repeat,
        "new": case.new,
    }  # fmt: skip
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {"schema": SCHEMA, "case": case.name, "status": "ok", "why": None, "time": when, **facts, "asked": asked}


def refused(case: Case, facts: dict[str, Any], why: str, needed: int) -> dict[str, Any]:
    """A line of a case that no plan fits."""
    return {**line(case, facts), "status": "refused", "why": why, "needed_bytes": needed}


def interrupted(case: Case, found: Measured) -> dict[str, Any]:
    """What a line says instead, of a case that was not let finish."""
    return {"status": "interrupted", "why": f"interrupted after {len(found.good())} of {case.repeat} runs"}


def summed(case: Case, facts: dict[str, Any], plan: Plan, found: Measured, expected: Forecast) -> dict[str, Any]:
    """The line of a case that ran, or began to."""
    said, good, bad = line(case, facts), found.good(), found.bad()
    if found.error is not None:
        said |= {"status": "failed", "why": found.error}
    elif bad is not None:
        said |= {"status": bad.status, "why": bad.why}
        if "needed_bytes" in bad.error:
            said["needed_bytes"] = bad.error["needed_bytes"]
    elif not good:
        said |= {"status": "interrupted", "why": "interrupted before a warm run had ended"}
    said |= {"plan": plan.as_dict(), "label": plan.label()}
    last = bad if bad is not None and not good else (good or [ended for ended, _ in found.cold] or [None])[-1]
    if last is not None and last.samples:
        said["timeline"] = timeline(last)
    said["noise"] = found.around.as_dict()
    if found.cold and found.cold[0][0].status == "ok":
        said["cold"] = start(found.cold)
    if not good:
        return said
    results = [ended.result for ended in good]
    if any(changed(result["plan"], plan) for result in results):
        return said | {"status": "failed", "why": f"another plan ran: {results[-1]['label']}"}
    said |= {"plan": results[-1]["plan"], "label": results[-1]["label"], "warm": start(found.warm)}
    said |= speeds(case, results)
    said["memory"] = memory(good, case.request.budget, plan.device)
    expected.learn(plan, found.around, case.request.threads)
    size, tps = results[-1]["plan"]["bytes_per_token"], said["tests"][f"tg{case.new}"]["mean"]
    said["bandwidth"] = bandwidth(found.around, tps, size, expected.bandwidth)
    said |= {"ple": ple(results), "storage": storage(results), "energy": energy(results)}
    said["predicted"] = predicted(case, plan, said, expected)
    return said if found.boxed is None else {**said, "boxed": found.boxed}


def changed(ran: dict[str, Any], plan: Plan) -> bool:
    """Whether a run was of another plan than was announced."""
    said = plan.as_dict()
    return any(ran[name] != said[name] for name in ("slice", "precision", "head", "ple", "kv", "context", "chunk"))


def start(runs: Sequence[tuple[Ended, float | None]]) -> dict[str, Any]:
    """How a model starts: ``cached_share`` of its files was in the page cache before."""
    good = [(ended.result, share) for ended, share in runs if ended.status == "ok"]
    shares = [share for _, share in good if share is not None]
    return {
        "load_s": figure([result["load_s"] for result, _ in good]),
        "ttft_s": figure([result["first_s"] for result, _ in good]),
        "bytes_read": good[-1][0]["load_bytes"],
        "cached_share": min(shares) if shares else None,
    }


def speeds(case: Case, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Tests by llama-bench's names, latencies, and how long a prompt takes by its length."""
    decoded = {f"tg{case.new}": [r["decode"] for r in results]}
    tests = {f"pp{case.prompt}": figure([case.prompt / r["prompt_s"] for r in results])}
    if case.depth:
        tests[f"pp{case.depth}"] = figure([case.depth / r["depth_s"] for r in results])
        decoded[f"tg{case.new} @ d{case.depth}"] = [r["deep"] for r in results]
    tests |= {name: figure([speed(d) for d in found]) for name, found in decoded.items()}
    latency = {name: percentiles([s for d in found for s in d["seconds"]]) for name, found in decoded.items()}
    return {"tests": tests, "latency_ms": latency, "first_token": curve([r["first_token"] for r in results])}


def curve(runs: Sequence[Sequence[Sequence[float]]]) -> list[list[float]]:
    """Tokens of a prompt and the seconds it takes, once all is warm: the median of runs."""
    return [[points[0][0], statistics.median(seconds for _, seconds in points)] for points in zip(*runs, strict=True)]


def memory(good: Sequence[Ended], budget: int | None, device: str) -> dict[str, Any]:
    """The highest of all runs; of components the last run's. Own and of files: in the highest sample of all.

    ``kept``: whether the budget was; None where nobody counts a device's memory.
    """
    every = [ended.result["memory"] for ended in good]
    most = ("peak_bytes", "pss_bytes", "device_peak_bytes")
    found = {name: max((m[name] for m in every if m[name] is not None), default=None) for name in most}
    counted = found["peak_bytes"] if device == "cpu" else found["device_peak_bytes"]
    highest = max((sample for ended in good for sample in ended.samples), key=lambda sample: sample[1], default=None)
    own, files = (every[-1]["anonymous_bytes"], every[-1]["file_backed_bytes"]) if highest is None else highest[2:4]
    return {
        **found, "anonymous_bytes": own, "file_bytes": files, "planned_bytes": every[-1]["planned_bytes"],
        "host_planned_bytes": every[-1]["host_planned_bytes"], "components": every[-1]["components"],
        "kept": None if counted is None else budget is None or counted <= budget,
    }  # fmt: skip


def bandwidth(around: Around, tps: float, size: int, reads: float | None) -> dict[str, Any]:
    """What decoding read a second, ``size`` bytes a token, beside what the memory it reads from can: ``reads``. Before
    and after the case it is the host's that was measured.
    """
    known = None if reads is None else reads / 1e9
    rates = {"before_gbps": around.before / 1e9, "after_gbps": around.after / 1e9, "read_gbps": known}
    return {**rates, "achieved_gbps": tps * size / 1e9, "bytes_per_token": size}


def ple(results: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Of the per-layer-embedding table while decoding; None without one."""
    tier = results[-1]["plan"]["ple"]
    if tier == "none":
        return None
    total = {name: sum(r["decode"][name] for r in results) for name in ("rows", "hits", "bytes_read", "wait_s")}
    tokens = sum(len(r["decode"]["tokens"]) for r in results)
    return {
        "tier": tier, "rows": total["rows"], "hit_rate": total["hits"] / total["rows"] if total["rows"] else 1.0,
        "bytes_per_token": total["bytes_read"] / tokens, "wait_s": total["wait_s"],
    }  # fmt: skip


def storage(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Read from storage while decoding, by the kernel's count: rows that the page cache had are not in it."""
    read = [r["decode"]["storage_bytes"] for r in results]
    tokens = sum(len(r["decode"]["tokens"]) for r in results)
    return {"bytes_per_token": None if None in read else sum(read) / tokens}


def energy(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Joules a decoded token, of everything the counter counts; or why there is no such figure."""
    about = results[-1]["energy"]
    known = [r["decode"] for r in results if r["decode"]["joules"]]
    tokens = sum(len(d["tokens"]) for d in known)
    joules = sum(d["joules"] for d in known) / tokens if tokens else None
    why = about["why"] if joules is not None or about["why"] else "the counter did not move"
    return {"source": about["source"], "joules_per_token": joules, "why": why}


def predicted(case: Case, plan: Plan, said: dict[str, Any], expected: Forecast) -> dict[str, Any]:
    """The planner's figures beside what was measured: errors are predicted / measured - 1."""
    m, tests = said["memory"], {}
    counted = m["peak_bytes"] if plan.device == "cpu" else m["device_peak_bytes"]
    for name, depth in ((f"tg{case.new}", 0), (f"tg{case.new} @ d{case.depth}", case.depth)):
        tps = expected.tps(plan, depth) if name in said["tests"] else None
        if tps is not None:
            tests[name] = {"tps": tps, "error": tps / said["tests"][name]["mean"] - 1}
    return {"memory_error": m["planned_bytes"] / counted - 1 if counted else None, "tests": tests}


def told(said: dict[str, Any]) -> str:
    """A case in one line for people, as it ends."""
    if said["status"] == "refused":
        return f"{said['case']}: does not fit: at least {format_bytes(said['needed_bytes'])} needed"
    if said["status"] != "ok":
        return f"{said['case']}: {said['status']}: {said['why']}"
    tests = ", ".join(f"{name} {f['mean']:.4g} ± {f['deviation']:.2g}" for name, f in said["tests"].items())
    peak = said["memory"]["device_peak_bytes"] or said["memory"]["peak_bytes"]
    return f"{said['case']}: {said['label']}: {tests} tokens/s, peak {format_bytes(peak)}"
