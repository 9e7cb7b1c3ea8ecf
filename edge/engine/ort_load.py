"""Realises the plan of an exported package: a session over mapped weights, the table's rows, caches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edge.budget.memory import Ledger, read_process, trim
from edge.budget.plan import Plan
from edge.budget.price_ort import OrtPrices
from edge.engine.ort import OrtEngine, open_session
from edge.engine.ort_bake import DATA, baked, places
from edge.engine.ort_pages import Pages, Region, cool
from edge.engine.ort_ple import open_rows
from edge.engine.ort_start import require
from edge.store.ple import Counters
from loaders.formats.package import Package
from loaders.formats.sharded import Notify

# Tables up to this size are left where they are: to read rows again costs more than they do.
AT_HAND = 16 << 20
# The share of a plan that a run may take more, and still be as planned.
TOLERANCE = 25


def load_package(
    package: Package, plan: Plan, ledger: Ledger, notify: Notify, room: int | None
) -> tuple[OrtEngine, Counters | None]:
    """``room``: bytes of memory that baking may take, None without a limit.

    Raises Unsupported (an older library than the package needs), BadCheckpoint, OverBudget.
    """
    require(package.min_ort, package.graph)
    prices = OrtPrices(package)
    planned = plan.total_bytes + plan.total_bytes // TOLERANCE - read_process().rss
    graph = baked(package, prices, planned, room, notify)
    tables = [weight.name for weight in prices.rows()]
    ledger.take("weights", plan.bytes["weights"])
    notify("loading", 0, 1)
    regions = regions_of(package, graph, tables)
    session = open_session(graph or package.graph, package.graph, optimized=graph is not None)
    trim()
    pages = Pages(regions, plan.chunk)
    # Packing a head that shares a table's place has read all of it: what is not counted on may not stay.
    cool(region for region in regions if region[2] > AT_HAND)
    rows = None
    if package.facts.ple is not None:
        # Only now: what packing takes in passing has gone.
        ledger.take("ple", plan.bytes["ple"])
        rows = open_rows(package, plan.ple, plan.bytes["ple"])
    ledger.take("kv", plan.bytes["kv"])
    ledger.take("activations", plan.bytes["activations"])
    engine = OrtEngine(package, session, rows, pages, context=plan.context, chunk=plan.chunk)
    notify("loading", 1, 1)
    return engine, None if rows is None else rows.counters


def regions_of(package: Package, graph: Path | None, names: Sequence[str]) -> list[Region]:
    """Where weights lie in the files that a session maps: the package's, or those of a baked ``graph``."""
    if graph is not None:
        found = places(graph)
        return [(graph.with_name(DATA), *found[name]) for name in names if name in found]
    folder, weights = package.graph.parent, {weight.name: weight for weight in package.weights_facts}
    return [(folder / weights[n].location, weights[n].offset, weights[n].length) for n in names]
