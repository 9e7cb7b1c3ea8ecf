"""Results beside older ones, case by case: what got better or worse, and whether the two should be compared at all.

What counts as a difference is in edge/profile/compare_figures.py.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from edge.budget.units import format_bytes
from edge.profile.compare_figures import (
    BYTES,
    DELAY,
    JOULES,
    RATE,
    TIME,
    Figure,
    Kind,
    Sample,
    Verdict,
    judged,
    number,
    sample,
)
from loaders.errors import printable

MACHINE = ("cpu", "cores", "threads", "vector", "gpu")
# The memory of one machine, which differs a little from one start to the next.
SAME_MEMORY = 0.02
# What memory may be faster or slower to read before it is worth a word.
DRIFTED = 0.03
LONGEST = 100
SOFTWARE = ("edge", "commit", "python", "numpy", "onnxruntime", "torch", "llama.cpp")


@dataclass(frozen=True)
class Compared:
    """One case of both. ``claims``: what held on one side only; ``notes``: what else is to be known."""

    case: str
    verdict: Verdict
    claims: tuple[tuple[str, Verdict], ...]
    figures: tuple[Figure, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """``warnings``: why the two should not be compared, if so. Cases of one side alone are no verdict."""

    cases: tuple[Compared, ...]
    only_old: tuple[str, ...]
    only_new: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def regressed(self) -> bool:
        """Whether anything got worse."""
        return any(case.verdict == "worse" for case in self.cases)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, numbers finite."""
        return {"regressed": self.regressed, **asdict(self)}


def compare(old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> Comparison:
    """Matches cases by what was asked; of several that asked the same, the first with the first. Raises nothing for
    whatever lines hold.
    """
    before, after = keyed(old), keyed(new)
    both = [(line, after[key]) for key, line in before.items() if key in after]
    warnings = [text for a, b in both for text in differences(a, b)]
    if not both:
        warnings.append("no case was asked of both: nothing is compared")
    return Comparison(
        tuple(compared(a, b) for a, b in both),
        tuple(title(line) for key, line in before.items() if key not in after),
        tuple(title(line) for key, line in after.items() if key not in before),
        tuple(dict.fromkeys(warnings)),
    )


def keyed(lines: Sequence[dict[str, Any]]) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Lines by model, budget, context, device and engine, and the how-manieth of those that is."""
    seen: Counter[tuple[Any, ...]] = Counter()
    found = {}
    for line in lines:
        asked = inside(line, "asked")
        names = ("budget_bytes", "context", "device", "engine")
        key = (plain(inside(line, "model", "name")), *(plain(inside(asked, name)) for name in names))
        found[(*key, seen[key])] = line
        seen[key] += 1
    return found


def compared(old: dict[str, Any], new: dict[str, Any]) -> Compared:
    """One case."""
    drift, noisy = read_drift(old, new), any(inside(x, "noise", "noisy") is True for x in (old, new))
    theirs = dict(figures(new))
    found = []
    for (name, kind), before in figures(old):
        after = theirs.get((name, kind))
        if after is not None and (before.mean > 0 or after.mean > 0):
            found.append(judged(name, kind, before, after, drift if kind.timed else 0.0, noisy and kind.timed))
    claims = tuple(claimed(old, new))
    verdicts = [*(verdict for _, verdict in claims), *(figure.verdict for figure in found)]
    verdict: Verdict = "worse" if "worse" in verdicts else "better" if "better" in verdicts else "same"
    return Compared(title(new), verdict, claims, tuple(found), tuple(remarks(old, new, drift)))


def figures(line: dict[str, Any]) -> Iterator[tuple[tuple[str, Kind], Sample]]:
    """All that a line has, with what they are of, in the order they are shown."""
    for name, value in items(inside(line, "tests")):
        yield from sampled(str(name), RATE, value)
    for start in ("warm", "cold"):
        yield from sampled(f"{start} load", TIME, inside(line, start, "load_s"))
        yield from sampled(f"{start} first token", TIME, inside(line, start, "ttft_s"))
    for name, value in items(inside(line, "latency_ms")):
        for part in ("p50", "p99"):
            yield from sampled(f"{name} {part}", DELAY, inside(value, part))
    for part in ("peak", "device peak", "planned"):
        yield from sampled(f"{part} memory", BYTES, inside(line, "memory", f"{part.replace(' ', '_')}_bytes"))
    yield from sampled("memory needed", BYTES, inside(line, "needed_bytes"))
    yield from sampled("energy", JOULES, inside(line, "energy", "joules_per_token"))


def sampled(name: str, kind: Kind, value: Any) -> Iterator[tuple[tuple[str, Kind], Sample]]:
    """The figure, if that is one. 0 tokens a second is; no bytes and no seconds are none."""
    found = sample(value)
    if found is not None and (found.mean > 0 or kind.higher):
        yield (name, kind), found


def claimed(old: dict[str, Any], new: dict[str, Any]) -> Iterator[tuple[str, Verdict]]:
    """What held on one side and not on the other."""
    ran = [inside(line, "status") == "ok" for line in (old, new)]
    if ran[0] != ran[1]:
        why = inside(new, "why")
        now = words(inside(new, "status")) + (f": {words(why)}" if why else "")
        yield f"was {words(inside(old, 'status'))}, now {now}", "worse" if ran[0] else "better"
    for what, path, good in (("budget", ("memory", "kept"), True), ("control group", ("boxed", "status"), "ok")):
        before, after = inside(old, *path), inside(new, *path)
        if None not in (before, after) and (before == good) != (after == good):
            yield (
                f"{what}: {'kept before, not now' if before == good else 'kept now, not before'}",
                ("worse" if before == good else "better"),
            )


def differences(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    """Why a case should not be compared."""
    for name in MACHINE:
        yield from changed(f"another machine: {name}", *(inside(line, "machine", name) for line in (old, new)))
    memory = [number(inside(line, "machine", "memory_bytes")) or 0.0 for line in (old, new)]
    if min(memory) > 0 and max(memory) > min(memory) * (1 + SAME_MEMORY):
        yield f"another machine: memory {format_bytes(int(memory[0]))}, now {format_bytes(int(memory[1]))}"
    yield from changed("another model: fingerprint", *(inside(line, "model", "fingerprint") for line in (old, new)))
    yield from changed("other weights", *(inside(line, "model", "weights") for line in (old, new)))
    yield from changed("another number of threads", *(inside(line, "asked", "threads") for line in (old, new)))


def remarks(old: dict[str, Any], new: dict[str, Any], drift: float) -> Iterator[str]:
    """What else may explain a difference."""
    yield from changed("plan", inside(old, "label"), inside(new, "label"))
    yield from changed("system", inside(old, "machine", "system"), inside(new, "machine", "system"))
    for name in SOFTWARE:
        yield from changed(name, inside(old, "versions", name), inside(new, "versions", name))
    if abs(drift) > DRIFTED:
        yield f"memory reads {math.exp(drift):.2f}x as fast as before"
    for side, line in (("before", old), ("now", new)):
        if inside(line, "noise", "noisy") is True:
            why = inside(line, "noise", "why")
            yield f"noisy {side}: {', '.join(map(words, why[:4])) if isinstance(why, list) and why else 'no reason'}"
    names = [{name for (name, _), _ in figures(line)} for line in (old, new)]
    if all(inside(line, "status") == "ok" for line in (old, new)):
        for text, only in (("no longer measured", names[0] - names[1]), ("not measured before", names[1] - names[0])):
            if only:
                yield f"{text}: {', '.join(words(name) for name in sorted(only)[:8])}"


def changed(what: str, old: Any, new: Any) -> Iterator[str]:
    """A line where both are known and differ."""
    if None not in (old, new) and plain(old) != plain(new):
        yield f"{what}: {words(old)}, now {words(new)}"


def read_drift(old: dict[str, Any], new: dict[str, Any]) -> float:
    """The logarithm of how many times as fast memory was read; 0 where that is not known of both."""
    rates = [number(inside(line, "bandwidth", "read_gbps")) or 0.0 for line in (old, new)]
    return math.log(rates[1]) - math.log(rates[0]) if min(rates) > 0 else 0.0


def inside(value: Any, *path: str) -> Any:
    """What is at the end of a path of objects; None where there is none."""
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def items(value: Any) -> list[tuple[Any, Any]]:
    """Of an object; nothing of anything else."""
    return list(value.items()) if isinstance(value, dict) else []


def plain(value: Any) -> Any:
    """Something that can be compared and looked up."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"


def words(value: Any) -> str:
    """For people, in a line."""
    if isinstance(value, int) and abs(value) >= 1 << 200:
        return "a huge number"
    text = printable(plain(value))
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def title(line: dict[str, Any]) -> str:
    """Of a case."""
    asked = inside(line, "asked")
    about = [words(inside(asked, name)) for name in ("device", "engine") if inside(asked, name) is not None]
    name = f"{words(inside(line, 'model', 'name'))}: {words(inside(line, 'case'))}"
    return name + (f" ({', '.join(about)})" if about else "")
