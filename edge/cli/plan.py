"""``edge plan``: what fits, what does not and by how much, before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edge.budget.plan import enumerate_plans, pick
from edge.budget.units import format_bytes
from edge.cli.options import planning, wanted
from edge.cli.show import distinct, plan_lines, plan_table, print_json, stdout
from edge.session import prepare
from loaders.errors import WontFit


@click.command("plan")
@click.argument("model")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@planning
def command(model: str, as_json: bool, device: str, engine: str, **flags: Any) -> int:
    """Say what would run within a budget, and why. Reads headers, loads no weights.

    Exits with 80 when nothing fits.
    """
    want = wanted(**flags)
    ready = prepare(Path(model), want.request, device, engine)
    request, floor = ready.request, ready.runtime.floor()
    plans = enumerate_plans(ready.checkpoint, request, floor)
    refusal: WontFit | None = None
    chosen = None
    try:
        chosen = pick(plans, request)
    except WontFit as error:
        refusal = error
    if as_json:
        rows = [
            {**p.as_dict(), "fits": p.over(request) <= 0, "over_bytes": max(0, p.over(request))}
            for p in distinct(plans, request)
        ]
        print_json(
            {
                "budget_bytes": request.budget,
                "ram_budget_bytes": request.ram_budget,
                "floor_bytes": floor.host,
                "plan": None if chosen is None else chosen.as_dict(),
                "nearest": None if refusal is None else {"needed_bytes": refusal.needed, "text": str(refusal)},
                "candidates": rows,
            }
        )
    else:
        show(plans, chosen, request, want.note)
    if refusal is not None:
        raise refusal
    return 0


def show(plans: list[Any], chosen: Any, request: Any, note: str | None) -> None:
    """The table, and the chosen row in words. Contexts nobody needs to fall back to are left out."""
    console = stdout()
    if note:
        console.print(note, markup=False)
    context = chosen.context if chosen is not None else min(plan.context for plan in plans)
    console.print(plan_table([plan for plan in plans if plan.context == context], chosen, request))
    if chosen is not None:
        console.print()
        for line in plan_lines(chosen, request, plans[0]):
            console.print(line, markup=False)
    elif request.budget is not None:
        console.print(f"\nnothing fits {format_bytes(request.budget)}", markup=False)
