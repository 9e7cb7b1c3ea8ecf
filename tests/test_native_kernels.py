"""The integer products of every kind of kernels this machine can run, against their definition, to the bit.

``native/kernels_main.cpp`` does the work, compiled with sanitizers that see what is read or written outside. A machine
without a C++ compiler fails here: without one nothing below would be tested.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NATIVE = ROOT / "edge/engine/native"
MAIN = ROOT / "tests/native/kernels_main.cpp"
CPU = Path("/proc/cpuinfo")
# What it must name for the kernels to run.
NEEDS = {
    "any": set[str](),
    "avx2": {"avx2", "fma", "f16c"},
    "avxvnni": {"avx2", "fma", "f16c", "avx_vnni"},
    "avx512": {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"},
    "asimd": {"asimd"},
    "neon": {"asimddp"},
    "i8mm": {"asimddp", "i8mm"},
}


def compiler() -> str:
    found = next((path for name in ("g++", "c++", "clang++") if (path := shutil.which(name))), None)
    assert found, "no C++ compiler: install g++"
    return found


def flags_of_cpu() -> set[str]:
    """What the machine can do, in Linux's words."""
    lines = CPU.read_text().splitlines()
    return {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.split(":")[1].split()}


def tried(out: str) -> set[str]:
    return {line.removesuffix(" ok") for line in out.splitlines() if line.endswith(" ok")}


def test_every_kind_of_kernels_multiplies_as_defined(tmp_path: Path) -> None:
    program = tmp_path / "kernels"
    # Without optimization: sanitizers triple the time it takes otherwise.
    command = [
        compiler(), "-O0", "-g0", "-std=c++17", "-ffp-contract=off", "-fno-exceptions", "-fno-rtti", "-Wno-psabi",
        "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-I", str(NATIVE), str(MAIN), "-o", str(program),
    ]  # fmt: skip
    subprocess.run(command, check=True, timeout=300)
    run = subprocess.run([str(program)], capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "any" in tried(run.stdout)
    if CPU.exists():
        assert tried(run.stdout) == {name for name, flags in NEEDS.items() if flags <= flags_of_cpu()}
