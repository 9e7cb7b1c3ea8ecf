"""``edge plan``: what fits, what does not and by how much, before anything is loaded."""

from __future__ import annotations

from typing import Any

import click

from edge.budget.machine import read_bandwidth
from edge.budget.plan import Plan, Request, enumerate_plans, pick
from edge.budget.units import format_bytes
from edge.cli.model import model_path, say_demo
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
    """Say what would run within a budget, and why. Reads headers, loads no weights; a config.json will do.

    MODEL is a checkpoint folder, a pack or an exported package; without one it is the demo model that ships
    with edge.
    Exits with 80 when nothing fits.
    """
    want = wanted(**flags)
    path = model_path(model)
    source = open_source(path, shapes=True)
    floor, request = plan_floor(source, want.request, device, engine)
    plans = enumerate_plans(source, request, floor, measured(source))
    bandwidth = read_bandwidth() if request.device == "cpu" else None
    refusal: WontFit | None = None
    chosen: Plan | None = None
    try:
        chosen = pick(plans, request)
    except WontFit as error:
        refusal = error
    if as_json:
        found = report(plans, chosen, refusal, request, floor.host, bandwidth)
        print_json({"model": printable(path), "weights": weighty(source), **found})
    else:
        say_demo(model, source.model)
        engine_note = choose(engine_for(source, engine), device).note
        notes = [*filter(None, (want.note, engine_note)), *weights_note(source)]
        show(plans, chosen, request, notes, bandwidth)
    if refusal is not None:
        raise refusal
    return 0


def report(
    plans: list[Plan],
    chosen: Plan | None,
    refusal: WontFit | None,
    request: Request,
    floor: int,
    bandwidth: float | None,
) -> dict[str, Any]:
    """What ``--json`` prints: the chosen plan and every candidate."""

    def row(plan: Plan) -> dict[str, Any]:
        over = plan.over(request)
        fits = {"fits": over <= 0, "over_bytes": max(0, over)}
        return {**plan.as_dict(), **fits, "predicted_tps": plan.predicted_tps(bandwidth)}

    return {
        "budget_bytes": request.budget,
        "ram_budget_bytes": request.ram_budget,
        "floor_bytes": floor,
        "read_gbps": None if bandwidth is None else bandwidth / 1e9,
        "plan": None if chosen is None else row(chosen),
        "nearest": None if refusal is None else {"needed_bytes": refusal.needed, "text": str(refusal)},
        "candidates": [row(plan) for plan in distinct(plans, request)],
    }


def show(plans: list[Plan], chosen: Plan | None, request: Request, notes: list[str], bandwidth: float | None) -> None:
    """The table, and the chosen row in words. Contexts nobody needs to fall back to are left out."""
    console = stdout()
    for note in notes:
        console.print(note, markup=False, soft_wrap=True)
    context = chosen.context if chosen is not None else min(plan.context for plan in plans)
    same = [plan for plan in plans if plan.context == context]
    table = plan_table(same, chosen, request, bandwidth)
    if not fits(table, console):
        table = plan_table(same, chosen, request, bandwidth, parts=False)
    console.print(table)
    if chosen is not None:
        console.print()
        for line in plan_lines(chosen, request, plans[0]):
            console.print(line, markup=False, soft_wrap=True)
        if bandwidth is not None:
            most = f"at most {speed_text(chosen, bandwidth)} tokens/s"
            read = f"{format_bytes(chosen.bytes_per_token)} a token at {bandwidth / 1e9:.1f} GB/s"
            console.print(f"      {most}: {read}, as this machine reads", markup=False)
    elif request.budget is not None:
        console.print(f"\nnothing fits {format_bytes(request.budget)}", markup=False)
