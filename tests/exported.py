"""Exported packages of small models, by the real writer, and the real engine over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge.engine.ort import OrtEngine, open_session
from edge.engine.ort_exact import open_exact
from edge.engine.ort_pages import Pages
from edge.engine.ort_ple import open_rows
from export import operators
from export.package import Exact, Options, Written, write
from loaders.formats.package import Package
from loaders.network.matformer import Slice
from loaders.slices import resolve
from loaders.weights import Source
from tests.makers import distance

# More than three windows of 16 or 17, and past the end of the buffers that hold one.
CONTEXT, LENGTH = 64, 53
ROW_CACHE = 1 << 20
# Experts of whole blocks, as published ones are and shrunk ones are not: (base, keys of the shrunk config).
BLOCKED: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-moe of blocks": ("qwen3-30B-A3B", {"moe_intermediate_size": 96}),
    "moonlight of blocks": ("moonlight-16B-A3B", {"moe_intermediate_size": 32}),
    "deepseek of blocks": ("deepseek-v3", {"moe_intermediate_size": 32, "hidden_size": 128}),
    "scout of blocks": ("llama-4-scout-17B-16E", {"intermediate_size": 64}),
}
# How the tokens are fed: sizes of passes. A last logit is compared after each.
PASSES = {
    "prefill": [LENGTH],
    "pieces": [1, 17, 1, 29, 5],
    "decode past the window": [14, *[1] * (LENGTH - 14)],
}


@pytest.fixture(name="unasked", scope="module", autouse=True)
def unasked_fixture() -> Iterator[None]:
    """Writes lists of operators without a process that asks ONNX Runtime: no figure here depends on them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operators, "optimized", lambda graphs: None)
        yield


def export(
    source: Source,
    folder: Path,
    profile: str = "ort",
    precision: str = "float32",
    part: str = "full",
    **keys: Any,
) -> Written:
    """A package of a source's slice; ``keys``: layout, context, check."""
    options = Options("0", keys.pop("context", CONTEXT), precision, profile, keys.pop("layout", "edge"))
    return write(source, slice_of(source, part), folder, options, **keys)


def slice_of(source: Source, name: str) -> Slice:
    """The slice that a name means."""
    return resolve(source.model, source.family, name)


@contextmanager
def running(folder: Path, *, exact: bool = False) -> Iterator[OrtEngine]:
    """The engine over a package. ``exact``: what a graph cannot say about products, the session is told."""
    with closing(Package.open(folder)) as package:
        session = open_exact(package) if exact else open_session(package.graph, package.graph)
        rows = None if package.facts.ple is None else open_rows(package, "ssd", ROW_CACHE)
        pages = Pages([], CONTEXT)
        with closing(OrtEngine(package, session, rows, pages, context=package.context, chunk=CONTEXT)) as engine:
            yield engine


def assert_everywhere(engine: OrtEngine, ids: np.ndarray, wanted: np.ndarray, tolerance: float = 1e-4) -> None:
    """All logits of ids [LENGTH] at once and in chunks, and the last ones of every way of feeding them."""
    for way, (found, at) in everywhere(engine, ids).items():
        assert distance(found, wanted[at]) <= tolerance, way


def everywhere(engine: OrtEngine, ids: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Way of feeding ids [LENGTH] -> logits float32 [n, vocab], and of which tokens they are."""
    ways = {}
    for chunk in (7, CONTEXT):
        engine.chunk = chunk
        ways[f"all in chunks of {chunk}"] = engine.logits(ids), np.arange(len(ids))
    for way, sizes in PASSES.items():
        engine.reset()
        ends = np.cumsum(sizes)
        found = [engine.forward(ids[e - n : e], "last") for n, e in zip(sizes, ends, strict=True)]
        assert engine.position == len(ids), way
        ways[way] = np.concatenate(found), ends - 1
    return ways


def two_levels(
    source: Source,
    folder: Path,
    profile: str,
    precision: str,
    ask: Callable[[OrtEngine], Any],
    part: str = "full",
) -> dict[str, Any]:
    """What ``ask`` finds of a quantized package whose products take activations as they are ("exact"), and of the same
    package as it is shipped ("shipped").
    """
    found = {}

    def check(made: Path, level: Exact) -> dict[str, Any]:
        level(True)
        with running(made, exact=True) as engine:
            found["exact"] = ask(engine)
        level(False)
        with running(made) as engine:
            found["shipped"] = ask(engine)
        return {}

    export(source, folder, profile, precision, part, check=check)
    return found


def as_exact(made: Path, level: Exact) -> dict[str, Any]:
    """A check that leaves a package computing with activations as they are."""
    level(True)
    return {}


def top1(found: np.ndarray, wanted: np.ndarray) -> float:
    """How often the likeliest token is the same."""
    return float(np.mean(found.argmax(-1) == wanted.argmax(-1)))
