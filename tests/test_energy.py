"""Joules from fake trees of /sys and a fake driver: what is counted, nothing twice, and why there is none."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.budget import nvml
from edge.profile import energy
from edge.profile.energy import Meter

MOST = 262143328850


class Tree:
    """What the kernel shows of counters and batteries."""

    def __init__(self, root: Path) -> None:
        self.powercap, self.supplies = root / "powercap", root / "power_supply"

    def zone(self, folder: str, name: str, microjoules: object, most: object = MOST) -> None:
        path = self.powercap / folder
        path.mkdir(parents=True, exist_ok=True)
        (path / "name").write_text(f"{name}\n")
        (path / "energy_uj").write_text(f"{microjoules}\n")
        (path / "max_energy_range_uj").write_text(f"{most}\n")

    def battery(self, name: str = "BAT0", **lines: object) -> None:
        path = self.supplies / name
        path.mkdir(parents=True, exist_ok=True)
        for line, value in lines.items():
            (path / line).write_text(f"{value}\n")

    def open(self) -> Meter:
        return Meter.open(powercap=self.powercap, supplies=self.supplies)


@pytest.fixture(name="tree")
def tree_fixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    monkeypatch.setattr(energy, "hypervisor", lambda: None)
    return Tree(tmp_path)


# RAPL


def test_packages_and_their_memory_are_summed_and_their_parts_are_not(tree: Tree) -> None:
    def at(step: int) -> None:
        tree.zone("intel-rapl:0", "package-0", 10**6 + step * 1_000_000)
        tree.zone("intel-rapl:0:0", "core", 5 + step * 10**9)
        tree.zone("intel-rapl:0:1", "dram", step * 200_000)
        tree.zone("intel-rapl:1", "package-1", step * 30_000)
        tree.zone("intel-rapl:1:0", "uncore", step * 10**9)
        tree.zone("intel-rapl:2", "psys", step * 10**9)
        tree.zone("intel-rapl-mmio:0", "package-0", step * 1_000_000)

    at(0)
    (tree.powercap / "intel-rapl").mkdir()
    (tree.powercap / "dtpm").mkdir()
    meter = tree.open()
    assert (meter.source, meter.why) == ("RAPL package-0 + package-1 + dram", None)
    assert meter.joules() == 0.0
    at(1)
    assert meter.joules() == pytest.approx(1.23)
    assert meter.joules() == pytest.approx(1.23)
    at(3)
    assert meter.joules() == pytest.approx(3.69)


def test_the_platform_counts_where_no_package_does(tree: Tree) -> None:
    tree.zone("intel-rapl:0", "psys", 7)
    meter = tree.open()
    tree.zone("intel-rapl:0", "psys", 2_000_007)
    assert (meter.source, meter.joules()) == ("RAPL psys", pytest.approx(2.0))


def test_a_package_seen_only_through_memory_counts(tree: Tree) -> None:
    tree.zone("intel-rapl-mmio:0", "package-0", 0)
    assert tree.open().source == "RAPL package-0"


@given(st.lists(st.integers(0, MOST), min_size=1, max_size=30), st.integers(0, MOST))
def test_a_counter_that_begins_again_goes_on(steps: list[int], start: int) -> None:
    """Whatever it stood at: steps of less than its range add up."""
    zone = energy.Zone(Path("unread"), MOST, start)
    at, total = start, 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(energy, "number", lambda path: at)
        for step in steps:
            at, total = (at + step) % (MOST + 1), total + step
            assert zone.read() == pytest.approx(total / 1e6)


def test_a_counter_that_went_backwards_is_lost(tree: Tree) -> None:
    tree.zone("intel-rapl:0", "package-0", 9, most="nonsense")
    meter = tree.open()
    tree.zone("intel-rapl:0", "package-0", 8)
    assert meter.joules() is None
    assert (meter.source, meter.why) == (None, "intel-rapl:0: its counter went backwards")


@pytest.mark.parametrize("nonsense", ["", "-5", "x", "9" * 4000, "1.5", "\x00", "²"])
def test_a_counter_that_turns_to_nonsense_is_lost_for_good(tree: Tree, nonsense: str) -> None:
    tree.zone("intel-rapl:0", "package-0", 1)
    meter = tree.open()
    tree.zone("intel-rapl:0", "package-0", nonsense)
    assert meter.joules() is None
    assert meter.why is not None
    assert "can no longer be read" in meter.why
    tree.zone("intel-rapl:0", "package-0", 5)
    assert meter.joules() is None
    assert tree.open().why is None


def test_why_there_is_none_is_one_honest_line(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    where = tree.powercap
    assert tree.open().why == f"no counters in {where} (this processor or its driver has none)"
    monkeypatch.setattr(energy, "hypervisor", lambda: "KVM")
    assert tree.open().why == f"no counters in {where} (a virtual machine has none)"
    tree.zone("intel-rapl:0", "package-0", "text")
    assert tree.open().why == "RAPL intel-rapl:0: what it counts is no number"
    os.unlink(where / "intel-rapl:0" / "energy_uj")
    assert tree.open().why == "RAPL intel-rapl:0: No such file or directory"
    monkeypatch.setattr(energy.sys, "platform", "darwin")
    assert tree.open().why == "no energy counters are known on darwin"


def test_reading_rapl_may_need_root(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests may be root: the refusal is the system's all the same."""
    tree.zone("intel-rapl:0", "package-0", 1)
    tree.zone("intel-rapl:1", "package-1", 1)

    def refused(path: Path, *args: Any, **options: Any) -> Any:
        if path.name == "energy_uj" and path.parent.name == "intel-rapl:1":
            raise PermissionError(13, "Permission denied")
        return before(path, *args, **options)

    before = Path.open
    monkeypatch.setattr(Path, "open", refused)
    monkeypatch.setattr(Path, "read_bytes", lambda path: refused(path, "rb").read())
    assert tree.open() == Meter(why="reading RAPL needs root")
    tree.battery(status="Discharging", energy_now=1)
    assert "battery BAT0" in (tree.open().source or "")
    tree.battery(status="Full")
    assert tree.open().why == "reading RAPL needs root; battery BAT0 is not in use (full)"


# Batteries


def test_a_battery_counts_while_it_empties(tree: Tree) -> None:
    tree.battery(status="Discharging", energy_now=50_000_000)
    tree.battery("BAT1", status="Discharging", charge_now=2_000_000, voltage_now=10_000_000)
    tree.battery("BAT2", status="Discharging", energy_now=5, scope="Device")
    tree.battery("AC", online=0)
    meter = tree.open()
    assert meter.source == "battery BAT0 + BAT1 (all of the machine, in coarse steps)"
    assert meter.joules() == 0.0
    tree.battery(energy_now=49_990_000)
    assert meter.joules() == pytest.approx(36.0)
    tree.battery("BAT1", charge_now=1_999_000)
    assert meter.joules() == pytest.approx(72.0)
    tree.battery(energy_now=49_999_000)
    assert meter.joules() == pytest.approx(72.0), "never less than before"
    tree.battery(status="Charging")
    assert meter.joules() is None
    assert meter.why == "battery BAT0 is not in use (charging)"


@pytest.mark.parametrize("lines", [{}, {"status": "Discharging"}, {"status": "Discharging", "energy_now": "x"}])
def test_a_battery_that_says_nothing_is_none(tree: Tree, lines: dict[str, object]) -> None:
    tree.battery(**lines)
    meter = tree.open()
    assert meter.joules() is None
    assert meter.why is not None
    assert "battery BAT0" in meter.why
    assert "\n" not in meter.why


# A GPU's driver


class Driver:
    """What is asked of libnvidia-ml, answered by hand."""

    energy: int | None = 5_000
    memory = True

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:
        count._obj.value = 1
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: int, handle: Any) -> int:
        handle._obj.value = 7 + index
        return 0 if index == 0 else 2

    def nvmlDeviceGetMemoryInfo(self, handle: ctypes.c_void_p, memory: Any) -> int:
        assert handle.value == 7
        memory._obj.total, memory._obj.used = 8 << 30, 1 << 30
        return 0 if self.memory else 3

    def nvmlDeviceGetName(self, handle: ctypes.c_void_p, text: Any, most: int) -> int:
        text.value = b"Some GPU \xff"
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Any, total: Any) -> int:
        if self.energy is None:
            return 3
        total._obj.value = self.energy
        return 0


@pytest.fixture(name="driver")
def driver_fixture(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    driver = Driver()
    monkeypatch.setattr(nvml, "_library", lambda: driver)
    return driver


def test_a_gpu_counts_its_board(driver: Driver) -> None:
    meter = Meter.open(device="cuda")
    assert (meter.source, meter.joules()) == ("NVML GPU 0 (the whole board)", 0.0)
    driver.energy = 7_500
    assert meter.joules() == 2.5
    driver.energy = None
    assert meter.joules() is None
    assert meter.why == "the GPU's driver no longer tells its energy"


def test_a_gpu_that_does_not_count_says_so(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    driver.energy = None
    assert Meter.open(device="cuda") == Meter(why="this GPU does not count its energy")
    monkeypatch.delattr(Driver, "nvmlDeviceGetTotalEnergyConsumption")
    assert Meter.open(device="cuda") == Meter(why="this GPU does not count its energy")
    monkeypatch.setattr(nvml, "_library", lambda: None)
    assert Meter.open(device="cuda") == Meter(why="no NVIDIA driver to ask")


def test_what_a_driver_does_not_know_is_unknown(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """An old driver lacks functions, and a GPU that shares the host's memory has none of its own."""
    assert nvml.gpus() == [nvml.Gpu(0, "Some GPU \ufffd", "unknown", 8 << 30, 1 << 30)]
    assert (nvml.device_used(), nvml.device_used(1), nvml.total_energy(1)) == (1 << 30, None, None)
    driver.memory = False
    assert nvml.gpus()[0].memory is None
    monkeypatch.setattr(nvml, "_library", lambda: None)
    assert (nvml.gpus(), nvml.device_count(), nvml.device_used()) == ([], 0, None)
