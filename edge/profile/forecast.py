"""What the planner expects of this machine, to be held beside what is measured."""

from __future__ import annotations

from dataclasses import dataclass

from edge.budget import rates
from edge.budget.disk import DiskSpeed, disk_speed
from edge.budget.machine import raise_bandwidth, read_bandwidth
from edge.budget.plan import Plan
from edge.engine.threads import thread_count
from edge.profile.noise import Around
from loaders.errors import EdgeError


@dataclass
class Forecast:
    """``bandwidth``: bytes per second that the memory reads which decoding reads from, as the planner knows it; None
    where nobody knows. ``rates``: how near the engine comes to that.
    """

    bandwidth: float | None = None
    rates: rates.Rates | None = None
    disk: DiskSpeed | None = None

    def learn(self, plan: Plan, around: Around, threads: int | None) -> None:
        """Memory that has been seen to read faster than was known is as fast for all plans from now on."""
        seen = max(around.before, around.after)
        if plan.device == "cpu" and seen > (self.bandwidth or 0.0):
            self.bandwidth = seen
            raise_bandwidth(threads or thread_count(), seen)

    def tps(self, plan: Plan, depth: int) -> float | None:
        """Tokens per second of decoding after ``depth`` tokens; None where it cannot be said."""
        return plan.predicted_tps(self.bandwidth, rates=self.rates, depth=depth, disk=self.disk)


def forecast(plan: Plan, threads: int | None) -> Forecast:
    """For plans of this engine on this device: measured here before, or now, in seconds."""
    try:
        known = rates.measured(plan.engine, plan.device, threads)
    except EdgeError:  # an engine that cannot be measured so can be profiled all the same
        known = rates.expected(plan.engine, plan.device, threads)
    if plan.device != "cpu":
        return Forecast(None if known is None else known.bandwidth or None, known, disk_speed())
    return Forecast(read_bandwidth(threads), known, disk_speed())
