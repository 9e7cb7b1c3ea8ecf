"""Every family as a package in ONNX Runtime: the torch engine's logits, however the tokens are fed.

Packages are written by the real writer and run by the real engine. Weights and numbers are such that no mechanism is
idle: norms far from one, windows shorter than the prompt, rotations scaled, experts chosen, several sizes in one model.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import edge
from export import ort_target
from export.operators import nodes
from loaders.checkpoint import Checkpoint
from loaders.errors import Unsupported
from loaders.formats.pack import Pack
from loaders.network.spec import Experts
from tests.conftest import Folder
from tests.exported import (
    BLOCKED,
    LENGTH,
    assert_everywhere,
    export,
    running,
    top1,
    two_levels,
    unasked_fixture,  # noqa: F401
)
from tests.makers import Tensors, assert_close, distance, make, prompt
from tests.shrink import DISTINCT, NAMES, real, shrink
from tests.test_parity import DERIVED

PROFILES = ("ort", "standard")
# What no published configuration has: (its base, keys of the shrunk config).
CHANGED: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: DERIVED[name] for name in ("gemma-uneven", "qwen3-window", "llama-mha")},
    "gemma-3-scale": ("gemma-3-1B", {"query_pre_attn_scalar": 29}),
    "mistral-heads": ("mistral-7B-v0.1", {"head_dim": 24, "num_key_value_heads": 1}),
    "qwen3-short": ("qwen3-0.6B", {"use_sliding_window": True, "sliding_window": 1, "max_window_layers": 2}),
}
# Matrices three times larger, norms as they were.
TRIPLED = ("llama-3.2-1B", "qwen3-0.6B", "qwen3-30B-A3B", "gemma-3-1B", "moonlight-16B-A3B")
# One of each kind of weight: the others at this price are in the slow set.
QUANTIZED = ("llama-3.2-1B", "gemma-3n-E2B", "qwen3-moe of blocks", "moonlight of blocks")
SLICED = ("half+skip-first-shared", "ffn=200x3,133x8,40x1,64x{rest}", "skip=1,3,6,{last}")


def tripled(tensors: Tensors) -> Tensors:
    """All but vectors, tables of tokens and what AltUp mixes its streams by, which grows with every layer."""
    alone = ("norm", "embed", "wte", "wpe", "_coefs")
    return {
        name: tensor if tensor.ndim < 2 or any(part in name for part in alone) else 3 * tensor
        for name, tensor in tensors.items()
    }


@dataclass(frozen=True)
class Wanted:
    """A checkpoint and what the torch engine says to ids [LENGTH]: logits float32 [LENGTH, vocab]."""

    folder: Path
    ids: np.ndarray
    logits: np.ndarray


Asked = Callable[..., Wanted]


@pytest.fixture(scope="module")
def wanted(folders: Folder, tmp_path_factory: pytest.TempPathFactory) -> Asked:
    """(name, and options of a load) -> what is right; made once each."""

    @cache
    def folder(name: str) -> Path:
        if name in NAMES:
            return folders(name)
        base, keys = {**CHANGED, **BLOCKED}.get(name, (name.removeprefix("3 x "), {}))
        raw = shrink(real(base))
        change = tripled if name.startswith("3 x ") else None
        return make(tmp_path_factory.mktemp("made"), {**raw.get("text_config", raw), **keys}, change=change)

    @cache
    def find(name: str, precision: str = "float32", part: str = "full") -> Wanted:
        with edge.load(folder(name), engine="torch", precision=precision, slice=part, kv="float32") as session:
            ids = prompt(session.model.vocab, LENGTH)
            return Wanted(session.source.folder, ids, session.logits(ids))

    return find


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread: these models are too small for a second."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def everyone() -> list[Any]:
    """All configurations; those that have no mechanism the others have not are in the slow set."""
    published = [name if name in DISTINCT else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
    return [*published, *CHANGED, *(f"3 x {name}" for name in TRIPLED)]


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("name", everyone())
def test_every_family_in_float32(name: str, profile: str, wanted: Asked, tmp_path: Path) -> None:
    right = wanted(name)
    with closing(Checkpoint.open(right.folder)) as checkpoint:
        export(checkpoint, tmp_path / "package", profile)
    if profile == "standard":
        assert_standard(tmp_path / "package")
    with running(tmp_path / "package") as engine:
        assert_everywhere(engine, right.ids, right.logits)


def assert_standard(package: Path) -> None:
    """No operator that is not ONNX's own, and nothing that its checker finds."""
    graph = package / "model.onnx"
    onnx.checker.check_model(str(graph), full_check=True)
    model = onnx.load(graph, load_external_data=False)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 23)]
    assert {node.domain for node in nodes(model.graph)} == {""}


@pytest.mark.parametrize("layout", ["web", "genai"])
@pytest.mark.parametrize("name", ["llama-3.2-1B", "gemma-3-1B", "moonlight-16B-A3B"])
def test_layouts_of_other_runtimes_compute_the_same(name: str, layout: str, wanted: Asked, tmp_path: Path) -> None:
    right = wanted(name)
    with closing(Checkpoint.open(right.folder)) as checkpoint:
        export(checkpoint, tmp_path / "package", layout=layout)
    with running(tmp_path / "package") as engine:
        assert_everywhere(engine, right.ids, right.logits)


@pytest.mark.parametrize("context", [1, 16, 17, 33])
def test_a_context_that_ends_within_the_window(context: int, wanted: Asked, tmp_path: Path) -> None:
    right = wanted("gemma-3-1B")
    with closing(Checkpoint.open(right.folder)) as checkpoint:
        for profile in PROFILES:
            export(checkpoint, tmp_path / profile, profile, context=context)
            with running(tmp_path / profile) as engine:
                assert_close(engine.logits(right.ids[:context]), right.logits[:context])


@pytest.mark.parametrize(("part", "profile"), [*((part, "ort") for part in SLICED), (SLICED[0], "standard")])
def test_slices(part: str, profile: str, wanted: Asked, tmp_path: Path) -> None:
    """A slice is a smaller model of its own, without what it leaves out."""
    whole = wanted("gemma-3n-E4B")
    with closing(Checkpoint.open(whole.folder)) as checkpoint:
        layers = len(checkpoint.model.layers)
        part = part.format(rest=layers - 12, last=layers - 3)
        right = wanted("gemma-3n-E4B", "float32", part)
        export(checkpoint, tmp_path / "package", profile, part=part)
        whole_bytes = sum(t.nbytes for t in checkpoint.where.values())
    assert sum(path.stat().st_size for path in (tmp_path / "package").iterdir()) < whole_bytes
    with running(tmp_path / "package") as engine:
        assert engine.package.slice.keep == tuple(range(len(engine.package.model.layers)))
        assert_everywhere(engine, right.ids, right.logits)
    assert distance(right.logits, whole.logits) > 0.01, "the slice is no smaller model"


def cases(precisions: tuple[str, ...]) -> list[Any]:
    """(name, profile, precision) of one configuration of each family and set of mechanisms; most of them slow."""
    found = []
    for name in dict.fromkeys((*QUANTIZED, *BLOCKED, *DISTINCT)):
        for profile in PROFILES:
            for precision in precisions:
                fast = name in QUANTIZED and (profile, precision) in FAST
                found.append(pytest.param(name, profile, precision, marks=() if fast else pytest.mark.slow))
    return found


FAST = (("ort", "int4"), ("standard", "int8"))
# Of int4 there is no way to take one expert's blocks out of a stack.
UNEXPRESSED = "experts of int4 in profile standard"


@pytest.mark.parametrize(("name", "profile", "precision"), cases(("int8", "int4")))
def test_quantized(name: str, profile: str, precision: str, wanted: Asked, tmp_path: Path) -> None:
    """In exact arithmetic the torch engine's logits over the same blocks; as shipped not far from them."""
    right = wanted(name, precision)
    with closing(Pack.open(right.folder)) as pack:
        experts = any(isinstance(layer.ffn, Experts) for layer in pack.model.layers)
        if (profile, precision) == ("standard", "int4") and experts:
            with pytest.raises(Unsupported, match=f"{UNEXPRESSED}.*--profile ort"):
                export(pack, tmp_path / "package", profile, precision)
            assert not any(tmp_path.iterdir())
            return
        found = two_levels(pack, tmp_path / "package", profile, precision, lambda engine: engine.logits(right.ids))
    if profile == "standard":
        assert_standard(tmp_path / "package")
    assert_close(found["exact"], right.logits, 1e-3)
    largest, least = SHIPPED[experts or pack.model.altup is not None]
    assert distance(found["shipped"], right.logits) < largest
    assert top1(found["shipped"], found["exact"]) >= least


# Activations in 8 bits, of models whose weights are random: (largest difference, same first choices). Where a small
# difference chooses another expert, or other units, what follows is another.
SHIPPED = {False: (0.06, 0.9), True: (0.6, 0.6)}


@pytest.mark.parametrize(("name", "profile", "precision"), cases(("float16",)))
def test_float16(name: str, profile: str, precision: str, wanted: Asked, tmp_path: Path) -> None:
    """Of all tokens but those that rounding sends to another expert."""
    right = wanted(name)
    with closing(Checkpoint.open(right.folder)) as checkpoint:
        export(checkpoint, tmp_path / "package", profile, precision)
        experts = any(isinstance(layer.ffn, Experts) for layer in checkpoint.model.layers)
    with running(tmp_path / "package") as engine:
        found = engine.logits(right.ids)
    off = np.abs(found - right.logits).max(-1) / np.abs(right.logits).max()
    assert np.isfinite(found).all()
    assert np.count_nonzero(off > 2e-2) <= 2 * experts
    assert np.median(off) < 1e-2


def test_quantized_checkpoints_and_their_packs_are_the_same_package(wanted: Asked, tmp_path: Path) -> None:
    right = wanted("moonlight-16B-A3B", "int4")
    with closing(Pack.open(right.folder)) as pack, closing(Checkpoint.open(wanted("moonlight-16B-A3B").folder)) as made:
        for source, folder in ((pack, "one"), (made, "other")):
            export(source, tmp_path / folder, precision="int4")
    for name in ("model.onnx", "model.onnx.data"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


def test_quantized_slices(wanted: Asked, tmp_path: Path) -> None:
    """Windows of blocks, widths that end within one among them."""
    right = wanted("gemma-3n-E4B", "int4", "half+skip-first-shared")
    with closing(Pack.open(right.folder)) as pack:
        part, ask = "half+skip-first-shared", lambda engine: engine.logits(right.ids)
        found = two_levels(pack, tmp_path / "package", "ort", "int4", ask, part)
    assert_close(found["exact"], right.logits, 1e-3)


def test_large_matrices_are_multiplied_in_bands(wanted: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which lie in the file as they did: a table that shares its bytes with a head is still stored once."""
    right = wanted("gemma-3n-E2B", "int4")
    with closing(Pack.open(right.folder)) as pack:
        export(pack, tmp_path / "whole", precision="int4")
        monkeypatch.setattr(ort_target, "MOST", 3000)
        found = two_levels(pack, tmp_path / "bands", "ort", "int4", lambda engine: engine.logits(right.ids))
    products = list(nodes(onnx.load(tmp_path / "bands" / "model.onnx", load_external_data=False).graph))
    heads = [n for n in products if n.op_type == "MatMulNBits" and n.input[1].startswith("embed.")]
    assert len(heads) > 2
    assert {n.op_type for n in products if n.input and n.input[0] == heads[0].output[0]} == {"Concat"}
    data = [(tmp_path / name / "model.onnx.data").stat().st_size for name in ("whole", "bands")]
    assert data[0] == data[1]
    assert_close(found["exact"], right.logits, 1e-3)


def test_heads_that_no_fused_operator_takes(wanted: Asked, tmp_path: Path) -> None:
    """Of a multiple of 8 values: refused by name in one profile, computed in the other."""
    folder = make(tmp_path / "made", {**shrink(real("mistral-7B-v0.1")), "head_dim": 20})
    with edge.load(folder, engine="torch", precision="float32") as session:
        ids = prompt(session.model.vocab, LENGTH)
        logits = session.logits(ids)
        with pytest.raises(Unsupported, match="heads of 20 values"):
            export(session.source, tmp_path / "ort")
        assert not (tmp_path / "ort").exists()
        export(session.source, tmp_path / "standard", "standard")
    with running(tmp_path / "standard") as engine:
        assert_everywhere(engine, ids, logits)
