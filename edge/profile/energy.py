"""Joules, from whatever counts them: the processor's RAPL counters, a battery while it empties, a GPU's driver.

Counters run on from before; a meter tells what was used since it was opened. RAPL's wrap around after minutes under
load: ask more often than that.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from edge.budget.nvml import device_used, total_energy, visible
from edge.profile.cpu import batteries, hypervisor, number, text

POWERCAP, SUPPLIES = Path("/sys/class/powercap"), Path("/sys/class/power_supply")
MICRO = 1e-6
HOUR = 3600.0


class Lost(Exception):
    """A counter that does not go on, and why, in one line."""


@dataclass
class Zone:
    """A RAPL counter: microjoules that begin again after ``most``."""

    folder: Path
    most: int
    last: int
    joules: float = 0.0

    def read(self) -> float:
        """Joules since it was opened. Raises Lost."""
        now = number(self.folder / "energy_uj")
        if now is None:
            raise Lost(f"{self.folder.name}: its counter can no longer be read")
        step = now - self.last
        if step < 0:
            step += self.most + 1
            if step < 0 or not self.most:
                raise Lost(f"{self.folder.name}: its counter went backwards")
        self.last = now
        self.joules += step * MICRO
        return self.joules


@dataclass
class Meter:
    """``source`` names what counts; None without one, and then ``why`` says why, in one line."""

    source: str | None = None
    why: str | None = None
    count: Callable[[], float] | None = field(default=None, repr=False)
    total: float = 0.0

    @staticmethod
    def open(
        device: str = "cpu", index: int | None = None, powercap: Path = POWERCAP, supplies: Path = SUPPLIES
    ) -> Meter:
        """What can be counted for a device: 'cuda' asks the driver for a GPU, CUDA's first; never raises."""
        if device == "cuda":
            return nvml(visible() if index is None else index)
        zones, no_rapl = rapl(powercap)
        if zones:
            names = " + ".join(text(zone.folder / "name") or zone.folder.name for zone in zones)
            return Meter(f"RAPL {names}", None, lambda: sum(zone.read() for zone in zones))
        cells = batteries(supplies)
        if not cells:
            return Meter(why=no_rapl)
        try:
            start = sum(charge(cell) for cell in cells)
        except Lost as lost:
            return Meter(why=f"{no_rapl}; {lost}")
        names = " + ".join(cell.name for cell in cells)
        source = f"battery {names} (all of the machine, in coarse steps)"
        return Meter(source, None, lambda: start - sum(charge(cell) for cell in cells))

    def joules(self) -> float | None:
        """Joules since it was opened, never fewer than before; None once its counter is lost, and ``why`` says why."""
        if self.count is None:
            return None
        try:
            self.total = max(self.total, self.count())
        except Lost as lost:
            self.source, self.why, self.count = None, str(lost), None
            return None
        return self.total


def rapl(powercap: Path) -> tuple[list[Zone], str]:
    """The counters that together are all there is and nothing twice, or none and why.

    Packages, and the memory beside each of them, which a package does not count; cores and graphics are parts of it.
    The platform's counter, which holds the packages, only where there are none.
    """
    if not sys.platform.startswith("linux"):
        return [], f"no energy counters are known on {sys.platform}"
    try:
        found = sorted(path for path in powercap.iterdir() if path.name.startswith("intel-rapl"))
    except OSError:
        found = []
    named = [(path, text(path / "name") or "") for path in found]
    # The same package may be seen through memory as well.
    direct = [(path, name) for path, name in named if not path.name.startswith("intel-rapl-mmio")] or named
    packages = [path for path, name in direct if name.startswith("package")]
    packages = packages or [path for path, name in direct if name == "psys"]
    if not packages:
        reason = "a virtual machine has none" if hypervisor() else "this processor or its driver has none"
        return [], f"no counters in {powercap} ({reason})"
    zones = [opened(path) for path in packages]
    if None in zones:
        return [], refusal(packages[zones.index(None)])
    memory = [
        opened(path) for path, name in direct if name == "dram" and path.name.rpartition(":")[0] in names(packages)
    ]
    return [zone for zone in (*zones, *memory) if zone is not None], ""


def names(folders: list[Path]) -> set[str]:
    """The last parts of paths."""
    return {folder.name for folder in folders}


def opened(folder: Path) -> Zone | None:
    """A counter as it stands; None where it cannot be read."""
    now = number(folder / "energy_uj")
    return None if now is None else Zone(folder, number(folder / "max_energy_range_uj") or 0, now)


def refusal(folder: Path) -> str:
    """Why a counter that is there cannot be read."""
    try:
        (folder / "energy_uj").read_bytes()
    except PermissionError:
        return "reading RAPL needs root"
    except OSError as error:
        return f"RAPL {folder.name}: {error.strerror}"
    return f"RAPL {folder.name}: what it counts is no number"


def charge(cell: Path) -> float:
    """Joules in a battery that empties. Raises Lost for one that does not, or does not say."""
    state = text(cell / "status")
    if state != "Discharging":
        raise Lost(f"battery {cell.name} is not in use" + (f" ({state.lower()})" if state else ""))
    energy = number(cell / "energy_now")
    if energy is not None:
        return energy * MICRO * HOUR
    amount, voltage = number(cell / "charge_now"), number(cell / "voltage_now")
    if amount is None or voltage is None:
        raise Lost(f"battery {cell.name} does not say what it holds")
    return amount * MICRO * voltage * MICRO * HOUR


def nvml(index: int) -> Meter:
    """A GPU's whole board, by its driver."""
    start = total_energy(index)
    if start is None:
        known = device_used(index) is not None
        return Meter(why="this GPU does not count its energy" if known else "no NVIDIA driver to ask")

    def count() -> float:
        now = total_energy(index)
        if now is None:
            raise Lost("the GPU's driver no longer tells its energy")
        return now - start

    return Meter(f"NVML GPU {index} (the whole board)", None, count)
