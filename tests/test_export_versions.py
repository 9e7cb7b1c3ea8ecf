"""The ONNX Runtime that a manifest names is the oldest that computes the package right; so does the newest.

Each release is installed into a virtual environment of its own, where tests/exported_child.py runs the package by its
manifest alone, without a line of edge.
"""

from __future__ import annotations

import os
import subprocess
import venv
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

import edge
from loaders.formats.package import Package
from loaders.formats.quant import BITS
from tests.conftest import Folder
from tests.exported import BLOCKED, LENGTH, as_exact, export, top1, unasked_fixture  # noqa: F401
from tests.makers import assert_close, distance, make, prompt
from tests.shrink import NAMES, real, shrink

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
CHILD = Path(__file__).with_name("exported_child.py")
# What a manifest may name, the first release of it, and the last one before that gets wrong what asks for it.
RELEASES = {
    "1.22": ("1.22.0", None),
    "1.23": ("1.23.0", "1.22.1"),
    "1.24": ("1.24.1", "1.23.0"),
    "1.25": ("1.25.0", "1.24.4"),
    "1.29": ("1.29.0", "1.28.0"),
    "1.31": ("1.31.0", "1.30.0"),
}
# Of blocks in profile standard: right before, but a whole matrix is expanded for every product.
SLOWER = "1.25"
TOLERANCE = {"float32": 1e-4, "float16": 2e-2, **dict.fromkeys(BITS, 1e-3)}


@dataclass(frozen=True)
class Case:
    """A package, and what its manifest has to name."""

    name: str
    needs: str
    profile: str = "ort"
    precision: str = "float32"
    layout: str = "edge"

    def __str__(self) -> str:
        return "-".join((self.name, self.profile, self.precision, self.layout))


CASES = (
    Case("llama-3.2-1B", "1.22"),
    Case("gpt2", "1.22"),
    Case("smollm3-3B", "1.22"),
    Case("llama-3.2-1B", "1.22", precision="float16"),
    Case("llama-3.2-1B", "1.23", precision="int8"),  # rows of blocks in bytes
    Case("llama-3.2-1B", "1.23", precision="int4"),
    Case("mistral-7B-v0.1", "1.24", layout="genai"),  # a window over a whole cache
    Case("mistral-7B-v0.1", "1.24", layout="web"),
    Case("mistral-7B-v0.1", "1.29"),  # a cache of a window
    Case("qwen3-30B-A3B", "1.24"),  # experts
    Case("moonlight-16B-A3B", "1.24"),  # one buffer that is keys and values
    Case("llama-4-scout-17B-16E", "1.24"),  # chunks
    Case("qwen3-moe of blocks", "1.25", precision="int8"),
    Case("qwen3-moe of blocks", "1.25", precision="int4", layout="genai"),
    Case("qwen3-moe of blocks", "1.31", precision="int4"),
    Case("gemma-3n-E2B", "1.31"),  # keys of another layer
    Case("gemma-3n-E2B", "1.31", precision="int4"),
    Case("gemma-4-E2B", "1.31", precision="int8"),
    Case("gpt2", "1.23", "standard"),
    Case("olmo2-7B", "1.23", "standard"),
    Case("moonlight-16B-A3B", "1.23", "standard"),
    Case("gemma-4-E2B", "1.23", "standard"),
    Case("llama-3.2-1B", "1.24", "standard"),  # groups of heads
    Case("mistral-7B-v0.1", "1.24", "standard"),
    Case("qwen3-30B-A3B", "1.24", "standard"),
    Case("gemma-3n-E2B", "1.24", "standard"),
    Case("llama-3.2-1B", "1.24", "standard", "float16"),
    Case("llama-3.2-1B", SLOWER, "standard", "int4"),
    Case("moonlight-16B-A3B", SLOWER, "standard", "int8"),
)
Runtime = Callable[[str], Path]
# Logits [n, vocab], and at which tokens.
Answer = list[tuple[np.ndarray, np.ndarray]]


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    """release -> the python of an environment that has it, and numpy."""

    @cache
    def found(release: str) -> Path:
        folder = tmp_path_factory.mktemp("onnxruntime") / release
        venv.create(folder, with_pip=True)
        python = folder / "bin" / "python"
        wanted = [f"onnxruntime=={release}", f"numpy=={metadata.version('numpy')}"]
        subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted], check=True)
        return python

    return found


def newest() -> str:
    """The release of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return next(line.removeprefix("onnxruntime==") for line in lines if line.startswith("onnxruntime=="))


def answered(python: Path, package: Path, ids: np.ndarray, out: Path, *level: str) -> Answer | None:
    """What a release computes; None where it refuses the package or dies of it. ``level``: see the child."""
    np.save(out.with_suffix(".npy"), ids)
    # The one way to tell the kernel of experts of int8 to take activations as they are.
    env = {**os.environ, "ORT_QMOE_CPU_QNBIT_GEMM": "0", "OMP_NUM_THREADS": "1"}
    command = [python, "-I", CHILD, package, out.with_suffix(".npy"), out, *level]
    done = subprocess.run(command, check=False, env=env, capture_output=True, text=True)
    if done.returncode:
        assert done.returncode < 0 or "onnxruntime_pybind11_state" in done.stderr, done.stderr
        return None
    with np.load(out) as found:
        every = np.arange(len(ids))[-len(found["every"]) :]
        return [(found["every"], every), (found["pieces"], found["pieces_at"])]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_oldest_and_the_newest_runtime_agree(case: Case, runtime: Runtime, folders: Folder, tmp_path: Path) -> None:
    quantized = case.precision in BITS
    precision = case.precision if quantized else "float32"
    if case.name in NAMES:
        folder = folders(case.name)
    else:
        base, keys = BLOCKED[case.name]
        folder = make(tmp_path / "made", {**shrink(real(base)), **keys})
    with edge.load(folder, engine="torch", precision=precision, slice="full", kv="float32") as session:
        ids = prompt(session.model.vocab, LENGTH)
        wanted = session.logits(ids)
        keys = {"layout": case.layout, "check": as_exact if quantized else None}
        export(session.source, tmp_path / "package", case.profile, case.precision, **keys)
    with closing(Package.open(tmp_path / "package")) as package:
        assert package.min_ort == case.needs
    first, before = RELEASES[case.needs]
    for release in (first, newest()):
        found = answered(runtime(release), tmp_path / "package", ids, tmp_path / f"{release}.npz", "0")
        assert found is not None, release
        for logits, at in found:
            assert_close(logits, wanted[at], TOLERANCE[case.precision])
    if before is not None and not (case.profile == "standard" and case.needs == SLOWER):
        found = answered(runtime(before), tmp_path / "package", ids, tmp_path / "before.npz", "0")
        assert found is None or max(distance(x, wanted[at]) for x, at in found) > 10 * TOLERANCE[case.precision]


@pytest.mark.parametrize("precision", list(BITS))
@pytest.mark.parametrize("profile", ["ort", "standard"])
def test_what_is_shipped_is_as_good_in_both(
    profile: str, precision: str, runtime: Runtime, folders: Folder, tmp_path: Path
) -> None:
    """Products of activations in 8 bits: the same first choices."""
    with edge.load(folders("llama-3.1-8B"), engine="torch", precision=precision, kv="float32") as session:
        ids = prompt(session.model.vocab, LENGTH)
        wanted = session.logits(ids)
        export(session.source, tmp_path / "package", profile, precision)
    with closing(Package.open(tmp_path / "package")) as package:
        first = RELEASES[package.min_ort][0]
    for release in (first, newest()):
        found = answered(runtime(release), tmp_path / "package", ids, tmp_path / f"{release}.npz")
        assert found is not None, release
        for logits, at in found:
            assert distance(logits, wanted[at]) < 0.06
            assert top1(logits, wanted[at]) > 0.9
