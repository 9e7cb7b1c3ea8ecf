"""What the kernel says about the processor: its name, what it can do, and what holds it back. Nothing is measured."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

PROC, SYS = Path("/proc"), Path("/sys")
MOST = 1 << 20
# What kernels of ours or of other libraries are made for, in the words of /proc/cpuinfo.
X86 = (
    "sse4_2", "avx", "f16c", "fma", "avx2", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16",
    "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16",
)  # fmt: skip
ARM = ("neon", "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2", "sme")
# ARM cores have numbers where others have names.
PARTS = {
    0xD03: "Cortex-A53", 0xD05: "Cortex-A55", 0xD07: "Cortex-A57", 0xD08: "Cortex-A72", 0xD0A: "Cortex-A75",
    0xD0B: "Cortex-A76", 0xD0C: "Neoverse-N1", 0xD40: "Neoverse-V1", 0xD41: "Cortex-A78", 0xD42: "Cortex-A78AE",
    0xD44: "Cortex-X1", 0xD46: "Cortex-A510", 0xD47: "Cortex-A710", 0xD48: "Cortex-X2", 0xD49: "Neoverse-N2",
    0xD4F: "Neoverse-V2", 0xD80: "Cortex-A520", 0xD81: "Cortex-A720", 0xD85: "Cortex-X925", 0xD87: "Cortex-A725",
}  # fmt: skip
# These drivers' powersave is what others call schedutil or ondemand.
OWN_MIND = ("intel_pstate", "amd-pstate-epp", "amd_pstate_epp")
THRIFTY = ("power", "balance_power")


def text(path: Path) -> str | None:
    """A small file of the kernel's, stripped; None where it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(MOST).decode("utf-8", "replace").strip().strip("\0")
    except (OSError, ValueError):
        return None


def number(path: Path) -> int | None:
    """A whole number, at least 0; None for anything else."""
    found = text(path) or ""
    return int(found) if found.isascii() and found.isdigit() and len(found) < 20 else None


def cpuinfo(proc: Path = PROC) -> dict[str, str]:
    """The first processor's lines: name -> value, names in lower case."""
    first = (text(proc / "cpuinfo") or "").split("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip().lower(): value.strip() for name, _, value in pairs}


def cpu_name(proc: Path = PROC) -> str:
    """As its maker calls it, or the board it is on; its architecture where nobody says."""
    lines = cpuinfo(proc)
    board = text(proc / "device-tree" / "model")
    part = lines.get("cpu part", "")
    core = None
    with suppress(ValueError):
        core = PARTS.get(int(part, 16))
    name = lines.get("model name") or (apple() if sys.platform == "darwin" else "") or core
    if board and name:
        return f"{name} ({board})"
    return name or board or platform.processor() or platform.machine() or "unknown"


def apple() -> str:
    """The name on a Mac; empty where it cannot be asked."""
    line = ["sysctl", "-n", "machdep.cpu.brand_string"]
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(line, capture_output=True, text=True, timeout=5, check=False).stdout.strip()
    return ""


def flags(proc: Path = PROC) -> list[str]:
    """What it can do of what matters here."""
    lines = cpuinfo(proc)
    has = set(f"{lines.get('flags', '')} {lines.get('features', '')}".split())
    return [flag for flag in (*X86, *ARM) if flag in has]


def hypervisor(proc: Path = PROC, sys_root: Path = SYS) -> str | None:
    """What this virtual machine runs in, as far as it tells; None on a machine of its own."""
    virtual = "hypervisor" in cpuinfo(proc).get("flags", "").split()
    kind = text(sys_root / "hypervisor" / "type")
    tree = text(proc / "device-tree" / "hypervisor" / "compatible")
    if not virtual and not kind and not tree:
        return None
    product = text(sys_root / "class" / "dmi" / "id" / "product_name")
    return kind or tree or product or "unknown"


def cores() -> tuple[int | None, int]:
    """Physical cores, None where the system does not tell, and logical ones."""
    return psutil.cpu_count(logical=False), os.cpu_count() or 1


def frequency(sys_root: Path = SYS) -> dict[str, Any] | None:
    """How the first CPU's clock is governed; None where nobody governs it, as in a virtual machine."""
    folder = sys_root / "devices" / "system" / "cpu" / "cpu0" / "cpufreq"
    governor = text(folder / "scaling_governor")
    if governor is None:
        return None
    kilohertz = {name: number(folder / name) for name in ("scaling_max_freq", "cpuinfo_max_freq")}
    return {
        "governor": governor,
        "driver": text(folder / "scaling_driver"),
        "preference": text(folder / "energy_performance_preference"),
        "allowed_mhz": megahertz(kilohertz["scaling_max_freq"]),
        "most_mhz": megahertz(kilohertz["cpuinfo_max_freq"]),
    }


def megahertz(kilohertz: int | None) -> int | None:
    """None stays None."""
    return None if kilohertz is None else kilohertz // 1000


def held_back(clock: dict[str, Any]) -> str | None:
    """What of a governed clock makes a run slower, in a line; None where nothing does."""
    governor, preference = clock["governor"], clock["preference"]
    if governor == "powersave" and clock["driver"] not in OWN_MIND:
        return "the CPU's governor is powersave: the clock stays low. `cpupower frequency-set -g performance` as root"
    if preference in THRIFTY:
        return f"the CPU's energy preference is {preference}: the clock rises late"
    allowed, most = clock["allowed_mhz"], clock["most_mhz"]
    if allowed and most and allowed < most * 0.95:
        return f"the CPU's clock may not exceed {allowed} of {most} MHz"
    return None


def power(sys_root: Path = SYS) -> str | None:
    """'battery' or 'mains'; None where there is no battery."""
    for supply in batteries(sys_root / "class" / "power_supply"):
        return "battery" if text(supply / "status") == "Discharging" else "mains"
    return None


def batteries(supplies: Path) -> list[Path]:
    """Those of the machine, not those of its mice."""
    with suppress(OSError):
        found = sorted(supplies.glob("BAT*"))
        return [path for path in found if text(path / "scope") != "Device" and text(path / "present") != "0"]
    return []
