"""``edge plan``: what fits, what does not and by how much, before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import click

from edge.budget import disk
from edge.budget.decoding import Rates
from edge.budget.machine import read_bandwidth
from edge.budget.plan import Plan, Request, enumerate_plans, pick
from edge.budget.rates import expected, known
from edge.budget.units import format_bytes
from edge.cli.model import say_demo, shapes_path
from edge.cli.options import planning, wanted
from edge.cli.show import distinct, fits, plan_lines, plan_table, print_json, speed_text, stdout, weights_note
from edge.engine.choice import choose
from edge.session import open_source, plan_floor
from edge.store.measured import measured
from edge.store.packages import engine_for, weighty
from loaders.errors import WontFit, printable


@click.command("plan")
@click.argument("model", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@planning
def command(model: str | None, as_json: bool, device: str, engine: str, **flags: Any) -> int:
    """Say what would run within a budget, and why. Reads headers, loads no weights.

    MODEL is a checkpoint folder, a pack or an exported package; a config.json will do, and the name of a published
    one. Without MODEL it is the demo model that ships with edge.
    Exits with 80 when nothing fits.
    """
    want = wanted(**flags)
    path = shapes_path(model)
    source = open_source(path, shapes=True)
    floor, request = plan_floor(source, want.request, device, engine)
    plans = enumerate_plans(source, request, floor, measured(source))
    pace = paced(request)
    refusal: WontFit | None = None
    chosen: Plan | None = None
    try:
        chosen = pick(plans, request)
    except WontFit as error:
        refusal = error
    if as_json:
        found = report(plans, chosen, refusal, request, floor.host, pace)
        print_json({"model": printable(path), "weights": weighty(source), **found})
    else:
        say_demo(model, source.model)
        engine_note = choose(engine_for(source, engine), device).note
        notes = [*filter(None, (want.note, engine_note)), *weights_note(source)]
        show(plans, chosen, request, notes, pace)
    if refusal is not None:
        raise refusal
    return 0


@dataclass(frozen=True)
class Pace:
    """How fast memory reads, in bytes per second, and decoding near it: None where nobody knows. ``measured``: whether
    the rates are the engine's own here, not those that are usual.
    """

    bandwidth: float | None = None
    rates: Rates | None = None
    disk: disk.DiskSpeed | None = None
    measured: bool = False

    def tps(self, plan: Plan, depth: int = 0) -> float | None:
        """Tokens per second at a position."""
        return plan.predicted_tps(self.bandwidth, self.rates, depth, self.disk)

    def line(self, plan: Plan) -> str | None:
        """What a plan comes to, what it cannot pass, and why; None where nobody knows."""
        tps, far = self.tps(plan), self.tps(plan, plan.context - 1)
        if tps is None or far is None or self.bandwidth is None:
            return None
        unsure = "" if self.measured else ", if the engine is as fast as is usual"
        said = f"about {speed_text(tps)} tokens/s, {speed_text(far)} at the end of the context{unsure}"
        most = f"at most {speed_text(plan.most_tps(self.bandwidth))}"
        return f"{said}; {most}: {format_bytes(plan.bytes_per_token)} a token at {self.bandwidth / 1e9:.1f} GB/s"


def paced(request: Request) -> Pace:
    """Of the machine here. Nothing of it is measured now but, once an hour, how fast memory reads."""
    asked = request.engine, request.device, request.threads
    rates, own = expected(*asked), known(*asked) is not None
    bandwidth = read_bandwidth(request.threads) if request.device == "cpu" else None
    if bandwidth is None and rates is not None:
        bandwidth = rates.bandwidth
    return Pace(bandwidth, rates, disk.known(), own)


def report(
    plans: list[Plan],
    chosen: Plan | None,
    refusal: WontFit | None,
    request: Request,
    floor: int,
    pace: Pace,
) -> dict[str, Any]:
    """What ``--json`` prints: the chosen plan and every candidate."""

    def row(plan: Plan) -> dict[str, Any]:
        over = plan.over(request)
        fits = {"fits": over <= 0, "over_bytes": max(0, over)}
        return {**plan.as_dict(), **fits, "predicted_tps": pace.tps(plan)}

    return {
        "budget_bytes": request.budget,
        "ram_budget_bytes": request.ram_budget,
        "floor_bytes": floor,
        "read_gbps": None if pace.bandwidth is None else pace.bandwidth / 1e9,
        "plan": None if chosen is None else row(chosen),
        "nearest": None if refusal is None else {"needed_bytes": refusal.needed, "text": str(refusal)},
        "candidates": [row(plan) for plan in distinct(plans, request)],
    }


def show(plans: list[Plan], chosen: Plan | None, request: Request, notes: list[str], pace: Pace) -> None:
    """The table, and the chosen row in words. Contexts nobody needs to fall back to are left out."""
    console = stdout()
    for note in notes:
        console.print(note, markup=False, soft_wrap=True)
    context = chosen.context if chosen is not None else min(plan.context for plan in plans)
    same = [plan for plan in plans if plan.context == context]
    table = plan_table(same, chosen, request, pace.tps)
    if not fits(table, console):
        table = plan_table(same, chosen, request, pace.tps, parts=False)
    console.print(table)
    if chosen is not None:
        console.print()
        for line in plan_lines(chosen, request, plans[0]):
            console.print(line, markup=False, soft_wrap=True)
        line = pace.line(chosen)
        if line is not None:
            console.print(f"      {line}, as this machine reads", markup=False, soft_wrap=True)
    elif request.budget is not None:
        console.print(f"\nnothing fits {format_bytes(request.budget)}", markup=False)
