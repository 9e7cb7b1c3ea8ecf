"""The native engine compiled for 64-bit ARM and run under an emulator, with every cross compiler that is here.

None is installed with the project: ``pip install ziglang`` or ``apt-get install g++-aarch64-linux-gnu`` brings one, and
``apt-get install qemu-user-static`` the emulator. Without either these tests fail and say so.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
NATIVE = ROOT / "edge/engine/native"
MAIN = ROOT / "tests/native/kernels_main.cpp"
SOURCES = [*sorted(NATIVE.glob("kernels_*.cpp")), *(NATIVE / name for name in ("program.cpp", "check.cpp", "pool.cpp"))]
# Processors without dot products of bytes, with them, and with those of matrices.
PROCESSORS = {"cortex-a53": ["asimd"], "cortex-a76": ["neon", "asimd"], "max": ["i8mm", "neon", "asimd"]}

pytestmark = pytest.mark.slow


def zig(target: str) -> list[str] | None:
    """As a C compiler: it compiles C++ too, and does not build a C++ library first."""
    if importlib.util.find_spec("ziglang") is None:
        return None
    return [sys.executable, "-m", "ziglang", "cc", "-target", target]


def gcc() -> list[str] | None:
    path = shutil.which("aarch64-linux-gnu-g++")
    return [path] if path else None


def emulator() -> str:
    found = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    assert found, "no emulator of 64-bit ARM: apt-get install qemu-user-static"
    return found


def flags() -> list[str]:
    """Those that the extension is compiled with."""
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
    modules = project["tool"]["setuptools"]["ext-modules"]
    return next(m["extra-compile-args"] for m in modules if m["name"] == "edge.engine.native._native")


def objects(compiler: list[str], folder: Path) -> list[str]:
    """Every source and the test's main, compiled without a warning."""

    def one(source: Path) -> str:
        out = folder / f"{source.stem}.o"
        # zig says that its own -c is unused.
        quiet = ["-Wno-unused-command-line-argument"] if "ziglang" in compiler else []
        command = [*compiler, *flags(), "-Wall", "-Wextra", "-Werror", *quiet, "-DEDGE_WHOLE", "-I", str(NATIVE)]
        run = subprocess.run(
            [*command, "-c", str(source), "-o", str(out)], capture_output=True, text=True, timeout=1800, check=False
        )
        assert run.returncode == 0, f"{source.name}: {run.stderr}"
        return str(out)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, [*SOURCES, MAIN]))


COMPILERS = {name: command for name, command in {"zig": zig("aarch64-linux-musl"), "gcc": gcc()}.items() if command}


@pytest.fixture(scope="module", params=list(COMPILERS) or ["none"])
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The test's main for 64-bit ARM Linux, by every compiler that is here."""
    assert COMPILERS, "no cross compiler: pip install ziglang, or apt-get install g++-aarch64-linux-gnu"
    compiler = COMPILERS[request.param]
    folder = tmp_path_factory.mktemp("arm")
    subprocess.run(
        [*compiler, "-static", *objects(compiler, folder), "-lm", "-pthread", "-o", str(folder / "kernels")],
        check=True,
        timeout=900,
    )
    return folder / "kernels"


@pytest.mark.parametrize("processor", list(PROCESSORS))
def test_arm_kernels(program: Path, processor: str) -> None:
    run = subprocess.run(
        [emulator(), "-cpu", processor, str(program)], capture_output=True, text=True, timeout=900, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    lines, expected = run.stdout.splitlines(), {"any", *PROCESSORS[processor]}
    assert {line.removesuffix(" ok") for line in lines if line.endswith(" ok")} == expected
    assert {line.removesuffix(" whole") for line in lines if line.endswith(" whole")} == expected
    # What the engine itself chooses from, best first.
    assert lines[-1].split() == ["engine:", *PROCESSORS[processor], "any"]


def test_macos_library(tmp_path: Path) -> None:
    """Nothing runs it here: that it compiles and that every name is found when it is linked."""
    compiler = zig("aarch64-macos")
    assert compiler, "no compiler for macOS: pip install ziglang"
    made = objects(compiler, tmp_path)
    subprocess.run([*compiler, *made, "-o", str(tmp_path / "kernels")], check=True, timeout=900)
