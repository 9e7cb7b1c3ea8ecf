"""All lines of a file together: which budgets there are, what colour each has, what must be said first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from edge.profile.report.case import Case, mapping, ordered, sequence
from edge.profile.report.words import listed, share, short_size, size, span

# Indigo to orange, on light and on dark. Lightness rises all the way: the order is seen without seeing colours.
LIGHT = ("#2b1a8f", "#7c1fa8", "#bb3a80", "#d3603a")
DARK = ("#8f86ff", "#cb7cf0", "#ff8fb0", "#ffc46b")
PEER = "var(--peer)"


def between(anchors: Sequence[str], at: float) -> str:
    """The colour at 0 to 1 along a row of them."""
    place = at * (len(anchors) - 1)
    low = min(int(place), len(anchors) - 2)
    pairs = [(int(anchors[low][i : i + 2], 16), int(anchors[low + 1][i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(a + (b - a) * (place - low)):02x}" for a, b in pairs)


@dataclass(frozen=True)
class Group:
    """The cases of one budget on one device with one engine, the longest context first."""

    budget: str
    where: str
    cases: tuple[Case, ...]
    colour: str

    @property
    def name(self) -> str:
        """2 GB; where there are several engines or devices: 2 GB on cuda."""
        return self.budget + (f" {self.where}" if self.where else "")

    @property
    def best(self) -> Case:
        """The case that answers for the budget: the longest context of those that ran."""
        return next((case for case in self.cases if case.status == "ok" and case.decode), self.cases[0])


@dataclass(frozen=True, eq=False)
class Book:
    """The cases of a file. ``ours`` ran here, by device, engine, budget and context; ``peers`` are other runtimes."""

    lines: tuple[Mapping[str, Any], ...]

    @cached_property
    def cases(self) -> tuple[Case, ...]:
        return tuple(Case(line, place) for place, line in enumerate(self.lines))

    @cached_property
    def ours(self) -> tuple[Case, ...]:
        def order(case: Case) -> tuple[Any, ...]:
            return (*place_of(case), case.budget_bytes or float("inf"), case.asked_context or 0.0, case.place)

        return tuple(sorted((case for case in self.cases if not case.peer), key=order))

    @cached_property
    def peers(self) -> tuple[Case, ...]:
        return tuple(case for case in self.cases if case.peer)

    @cached_property
    def ran(self) -> tuple[Case, ...]:
        """Ours with something measured."""
        return tuple(case for case in self.ours if case.tests)

    @cached_property
    def many_contexts(self) -> bool:
        return len({case.asked_context for case in self.ours}) > 1

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        found: dict[tuple[Any, ...], list[Case]] = {}
        for case in self.ours:
            found.setdefault((*place_of(case), case.budget_bytes, case.budget), []).append(case)
        made = []
        for cases in found.values():
            first = cases[0]
            longest = tuple(sorted(cases, key=lambda case: -(case.asked_context or 0.0)))
            made.append(Group(first.budget, self.where(first), longest, self.colour(first)))
        return tuple(made)

    @cached_property
    def budgets(self) -> list[float | None]:
        """Every budget once, small first, the cases without one last: the order of the colours."""
        return sorted({case.budget_bytes for case in self.ours}, key=lambda b: b or float("inf"))

    def colour(self, case: Case) -> str:
        """The CSS variable of a case's budget."""
        return PEER if case.peer else f"var(--b{self.budgets.index(case.budget_bytes)})"

    def palette(self, anchors: Sequence[str]) -> str:
        """CSS that gives every budget its colour."""
        last = max(len(self.budgets) - 1, 1)
        return "".join(f"--b{i}:{between(anchors, i / last)};" for i in range(len(self.budgets)))

    def title(self, case: Case) -> str:
        """A case's name on this page."""
        end = "" if case.peer else self.where(case)
        return case.title(self.many_contexts) + (f" {end}" if end else "")

    def where(self, case: Case) -> str:
        """On which device and in which engine a case ran, as far as the file has several."""
        engines = {other.engine for other in self.ours if other.device == case.device}
        on = f"on {'CPU' if case.device == 'cpu' else case.device}" if len({c.device for c in self.ours}) > 1 else ""
        return " ".join(filter(None, [on, f"in {case.engine}" if len(engines) > 1 and case.engine else ""]))

    @cached_property
    def components(self) -> list[str]:
        """Every component that any case held."""
        names: set[str] = set()
        for case in self.ours:
            names |= set(case.components)
            lines = mapping(case.get("timeline", "components"))
            names |= {n for n, values in lines.items() if any(v for v in sequence(values))}
        return ordered(sorted(names))

    def one(self, *path: str) -> str:
        """What the cases say at a path, each answer once."""
        return listed(list(dict.fromkeys(filter(None, (case.text(*path) for case in self.cases)))))

    @cached_property
    def model(self) -> str:
        return self.one("model", "name") or "a model"

    @cached_property
    def headline(self) -> str:
        """What this machine can run, in a sentence."""
        fast = [case for case in self.ran if case.decode and case.status == "ok"]
        if not fast:
            return f"{self.model}: nothing was decoded" if self.ours else "Other runtimes on this machine"
        devices = list(dict.fromkeys(case.device for case in fast))
        said: list[str] = []
        for device in devices:
            here = [case for case in fast if case.device == device]
            speeds = span([case.decode.mean for case in here if case.decode])
            on = f" on {'the CPU' if device == 'cpu' else device}" if devices != ["cpu"] else ""
            said.append(speeds + ("" if said else " tokens a second") + ("" if len(devices) > 1 else within(here)) + on)
        return f"{self.model} writes {listed(said)}"

    @cached_property
    def warnings(self) -> list[tuple[str, str]]:
        """(kind, sentence), the gravest first; kind is bad, doubt or note."""
        return [*self.broken(), *self.unfinished(), *self.boxes(), *self.doubts()]

    def broken(self) -> Iterable[tuple[str, str]]:
        for case in self.ours:
            if case.kept is False and case.peak is not None:
                over = f"its peak was {size(case.peak)}, {size(case.peak - (case.budget_bytes or 0))} over the budget"
                yield "bad", f"{self.title(case)}: the promise was broken: {over}."

    def unfinished(self) -> Iterable[tuple[str, str]]:
        said = {
            "killed": "killed before it was done",
            "failed": "failed",
            "interrupted": "interrupted; what is shown is partial",
        }
        for case in self.cases:
            if case.status not in ("ok", "refused"):
                why = case.text("why")
                text = said.get(case.status, f"ended as {case.status!r}")
                yield "bad", f"{self.title(case)}: {text}{f': {why}' if why else ''}."

    def boxes(self) -> Iterable[tuple[str, str]]:
        for case in self.ours:
            box = replace(case, line=mapping(case.get("boxed")))
            name = f"{self.title(case)}, in a control group"
            if (box.above("oom_kills") or 0) > 0:
                yield "bad", f"{name}: the kernel killed it for its memory."
            elif box.get("same_tokens") is False:
                yield "bad", f"{name}: other tokens came out than outside of it."
            elif box.line and box.status not in ("ok", "refused"):
                yield "doubt", f"{name}: {': '.join(filter(None, [box.status, box.text('why')]))}."

    def doubts(self) -> Iterable[tuple[str, str]]:
        noisy = [case for case in self.cases if case.noisy]
        if noisy:
            whys = [str(why) for case in noisy for why in sequence(case.get("noise", "why"))]
            why = f": {listed(list(dict.fromkeys(whys)), 3)}" if whys else ""
            names = listed([self.title(case) for case in noisy])
            yield (
                "doubt",
                f"The machine was busy with something else while {names} ran{why}. Their speeds are in doubt.",
            )
        if any(case.text("model", "weights") == "synthetic" for case in self.cases):
            yield "note", "The weights are random, at the model's true shapes: memory and speed are real, text is not."

    @cached_property
    def memory_title(self) -> str:
        """What the memory charts show, in a sentence."""
        done = [case for case in self.ours if case.status == "ok" and case.peak and case.budget_bytes]
        shares = [(case.peak or 0) / (case.budget_bytes or 1) for case in done]
        broken = sum(case.kept is False for case in self.ours)
        if broken:
            return f"{broken} of {sum(case.kept is not None for case in self.ours)} runs went over budget"
        if not shares:
            return "Memory over time"
        if len(shares) == 1:
            return f"The run stayed within its budget, at {share(shares[0])} of it"
        some = " that finished" if any(case.status not in ("ok", "refused") for case in self.ours) else ""
        return f"All {len(shares)} runs{some} stayed within their budget, the closest at {share(max(shares))} of it"


def within(cases: Sequence[Case]) -> str:
    """The budgets of cases: in 1.5 to 4 GB of memory."""
    budgets = sorted({case.budget_bytes for case in cases if case.budget_bytes})
    if not budgets:
        return ""
    least, most = short_size(budgets[0]), short_size(budgets[-1])
    if len(budgets) == 1:
        return f" in {most} of memory"
    return f" in {least.partition(' ')[0] if least[-2:] == most[-2:] else least} to {most} of memory"


def place_of(case: Case) -> tuple[str, str]:
    """Where a case ran: CPU first."""
    return ("" if case.device == "cpu" else case.device, case.engine)
