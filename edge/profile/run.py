"""A sweep: every budget at every context, planned first, then measured one after another, each kept as it ends."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from edge.budget.machine import measured_bandwidth
from edge.budget.memory import default_budget
from edge.budget.plan import Plan, Request, enumerate_plans, nearest, pick
from edge.budget.units import parse_bytes
from edge.profile import case as cases
from edge.profile.case import Case, Measured
from edge.profile.forecast import Forecast
from edge.profile.noise import Around
from edge.profile.subject import Subject
from edge.session import plan_floor
from edge.store.measured import measured
from loaders.errors import EdgeError, Usage, WontFit, printable

# Budgets of a sweep that nobody named.
RUNGS = 4
# What another process may need more than this one thought: a plan that fits to the byte may not fit it.
ROOM = 2 << 20
MOST_CASES = 100


@dataclass(frozen=True)
class Planned:
    """A case and what would run, or why nothing fits and what is ``nearest``."""

    case: Case
    plan: Plan | None
    refusal: WontFit | None = None
    nearest: str = ""


@dataclass(frozen=True)
class Wanted:
    """The command line. ``request`` has no budget and no context; ``budgets`` None is a ladder of them."""

    request: Request
    budgets: tuple[str, ...] | None
    contexts: tuple[int, ...]
    device: str
    engine: str
    new: int
    repeat: int


def planned(subject: Subject, wanted: Wanted) -> list[Planned]:
    """Every case with its plan, budget by budget. Raises Usage for contexts that the model does not have."""
    source = subject.source
    check_contexts(wanted, source.model.context)
    floor, request = plan_floor(source, wanted.request, wanted.device, wanted.engine)
    known = measured(source)
    tables = {
        context: enumerate_plans(source, replace(request, context=context + wanted.new), floor, known)
        for context in wanted.contexts
    }
    found = []
    for text in wanted.budgets or ladder([plan for plans in tables.values() for plan in plans], request.device):
        for context, plans in tables.items():
            asked = replace(request, budget=parse_bytes(text, "--budgets"), context=context + wanted.new)
            case = Case(text, asked, context, request.device, request.engine, wanted.new, wanted.repeat, floor)
            try:
                found.append(Planned(case, pick(plans, asked)))
            except WontFit as error:
                found.append(Planned(case, None, error, nearest(plans, asked).label()))
    if len(found) > MOST_CASES:
        raise Usage(f"{len(found)} cases", field="--budgets, --contexts", expected=f"at most {MOST_CASES}")
    return found


def check_contexts(wanted: Wanted, most: int) -> None:
    """Raises Usage."""
    for context in wanted.contexts:
        if not 1 <= context <= most - wanted.new:
            expected = f"1 to {most - wanted.new}: this model has a context of {most}, and {wanted.new} are decoded"
            raise Usage(context, field="--contexts", expected=expected)


def ladder(plans: Sequence[Plan], device: str) -> tuple[str, ...]:
    """Budgets from the least that anything fits to what the best plan takes or this machine has, evenly in ratio."""
    least, best = min(plan.total_bytes for plan in plans) + ROOM, plans[0].total_bytes + ROOM
    most = max(least, min(best, default_budget()[0]) if device == "cpu" else best)
    steps = [least * (most / least) ** (i / (RUNGS - 1)) for i in range(RUNGS)]
    return tuple(dict.fromkeys(rounded_up(step) for step in steps))


def rounded_up(size: float) -> str:
    """A budget of two digits that is no smaller: 1.4GB, 87MB."""
    unit, name = (10**9, "GB") if size >= 10**9 else (10**6, "MB")
    value = size / unit
    digit = 10 ** (math.floor(math.log10(max(value, 1e-9))) - 1)
    steps = math.ceil(value / digit - 1e-9)
    return f"{steps * round(digit)}{name}" if digit >= 1 else f"{steps / round(1 / digit):g}{name}"


def explained(error: EdgeError | OSError) -> str:
    """An error as the line of a case says it."""
    if isinstance(error, EdgeError):
        return str(error)
    return printable(f"{error.filename}: {error.strerror}" if error.filename else error.strerror or error)


class Listener(Protocol):
    """Who is told how far a sweep is."""

    def at(self, what: str) -> None: ...

    def done(self, runs: int) -> None: ...


def sweep(
    path: Path,
    items: Sequence[Planned],
    facts: dict[str, Any],
    expected: Forecast,
    in_box: bool,
    listener: Listener,
) -> Iterator[dict[str, Any]]:
    """A line for each case, as soon as it has ended. An interrupt ends the case at hand, whose line is the last:
    KeyboardInterrupt, or SystemExit of a signal, is raised after it.
    """
    for item in items:
        if item.plan is None:
            assert item.refusal is not None
            why = f"nothing fits; the nearest is {item.nearest}"
            yield cases.refused(item.case, facts, why, item.refusal.needed)
            continue
        reading = partial(measured_bandwidth, item.case.request.threads)
        found, interrupt = Measured(around=Around(reading)), None
        try:
            cases.measure(item.case, path, item.plan, found, listener, in_box)
        except (KeyboardInterrupt, SystemExit) as stop:
            interrupt = stop
        except (EdgeError, OSError) as error:
            found.error = explained(error)
        said = cases.summed(item.case, facts, item.plan, found, expected)
        if interrupt is not None:
            said |= cases.interrupted(item.case, found)
        yield said
        if interrupt is not None:
            raise interrupt
