"""The recorded graph: known operators, shapes that hold, and the engine's own numbers when it is replayed."""

from __future__ import annotations

import inspect
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pytest
import torch

from edge.engine.kv import KVCache
from edge.engine.torch_ops import TorchOps
from edge.session import Session
from loaders.network.graph import Graph, Node, Recorder, broadcast, record, replay, reshaped
from loaders.network.ops import Ops, Want
from loaders.network.tensors import PLE_TABLE, tensors
from tests.conftest import Folder, Open
from tests.makers import assert_close, expected, prompt, reference
from tests.shrink import NAMES, parse, real, shrink

CPU = torch.device("cpu")
OPS = {name for name, _ in inspect.getmembers(Ops, inspect.isfunction) if not name.startswith("_")}
KNOWN = OPS | {"append", "add", "sub", "mul", "div"}
WANTS: tuple[Want, ...] = ("all", "last", "none")


class Watched:
    """TorchOps that notes the shape of what each operator returns."""

    def __init__(self, inner: TorchOps) -> None:
        self.inner, self.shapes = inner, []

    def __getattr__(self, name: str) -> Any:
        true = getattr(self.inner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            out = true(*args, **kwargs)
            self.shapes.append((name, tuple(out.shape)))
            return out

        return call


class Player:
    """Runs graphs where an engine would run its network."""

    def __init__(self, session: Session, context: int) -> None:
        self.session, self.model = session, session.model
        self.ops, self.cache = TorchOps(CPU), KVCache(session.model, context, torch.float32, CPU)
        self.graphs: dict[Want, Graph] = {want: record(session.model, want=want) for want in WANTS}

    @torch.inference_mode()
    def run(self, ids: np.ndarray, want: Want, ops: Any = None) -> np.ndarray | None:
        """One pass."""
        self.cache.begin(len(ids))
        self.ops.begin()
        inputs = {"ids": torch.from_numpy(ids)}
        if self.model.ple is not None:
            inputs["ple"] = self.session.engine.ple(ids)
        weights = self.session.engine.weights.__getitem__
        out = replay(self.graphs[want], ops or self.ops, weights, inputs, self.cache)
        self.cache.end()
        return None if out is None else out.numpy()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("want", WANTS)
def test_graphs_are_well_formed(name: str, want: Want) -> None:
    model = parse(shrink(real(name)))
    graph = record(model, want=want)
    assert {node.op for node in graph.nodes} <= KNOWN
    table = tensors(model)
    assert all(table[weight] == shape for weight, shape in graph.weights.items())
    if want != "none":
        assert set(graph.weights) == set(table) - {PLE_TABLE}
    known = {**graph.inputs, **graph.weights}
    used: set[str] = set()
    for node in graph.nodes:
        names = [x for x in node.inputs if isinstance(x, str)]
        assert all(x in known for x in names), f"{node.op} uses what was not made yet"
        assert node.output not in known
        used.update(names)
        known[node.output] = node.shape
        check_shape(node, [known[x] if isinstance(x, str) else None for x in node.inputs])
    appended = [node.attrs["layer"] for node in graph.nodes if node.op == "append"]
    assert appended == [i for i, layer in enumerate(model.layers) if layer.attention.kv_from is None]
    rows = {"all": "t", "last": 1}
    if want == "none":
        assert graph.output == ""
        assert graph.nodes[-1].op == "append"
    else:
        assert graph.nodes[-1].output == graph.output
        assert graph.nodes[-1].shape == (rows[want], model.vocab)
        assert {n.output for n in graph.nodes} - used == {graph.output}, "computed in vain"
    assert used >= set(graph.weights)


def check_shape(node: Node, shapes: list[Any]) -> None:
    """The shape an operator's output must have, said once more."""
    a = shapes[0]
    rest: dict[str, Any] = {
        "linear": lambda: (*a[:-1], shapes[1][0]),
        "matmul": lambda: (a[0], a[1], shapes[1][2]),
        "embed": lambda: (shapes[1][0], a[1]),
        "attention": lambda: (a[0], a[1] * a[2]),
        "append": lambda: ("kv", *a[1:]),
        "rms": lambda: (*a[:-1], 1),
        "last": lambda: (1, *a[1:]),
        "slice": lambda: tuple(
            node.attrs["stop"] - node.attrs["start"] if i == node.attrs["axis"] else n for i, n in enumerate(a)
        ),
        "reshape": lambda: (a[0], *node.attrs["shape"][1:]),
        "concat": lambda: tuple(sum(s[i] for s in shapes) if i == node.attrs["axis"] else n for i, n in enumerate(a)),
    }
    if node.op in ("add", "sub", "mul", "div"):
        given = [s for s in shapes if s is not None]
        width = max(len(s) for s in given)
        padded = [(1,) * (width - len(s)) + tuple(s) for s in given]
        wanted = tuple(next((n for n in sizes if n != 1), 1) for sizes in zip(*padded, strict=True))
    else:
        wanted = rest.get(node.op, lambda: a)()
    assert node.shape == wanted, node
    if node.op == "linear":
        assert a[-1] == shapes[1][1]


@pytest.mark.parametrize("name", NAMES)
def test_only_the_last_position_runs_the_layers_that_share(name: str) -> None:
    """After the last layer that writes keys nothing but that position is left, and nothing runs for "none"."""
    model = parse(shrink(real(name)))
    graphs = {want: record(model, want=want) for want in WANTS}
    after = [n for n in graphs["last"].nodes if n.op == "last"]
    assert after
    place = graphs["last"].nodes.index(after[-1])
    tail = graphs["last"].nodes[place + 1 :]
    assert tail
    assert all(n.shape[0] == 1 for n in tail)
    assert all(n.shape[0] in ("t", "kv") for n in graphs["all"].nodes)
    assert len(graphs["none"].nodes) < place
    owners = [layer.attention.kv_from is None for layer in model.layers]
    assert sum(n.op == "attention" for n in graphs["all"].nodes) == len(owners)
    assert sum(n.op == "attention" for n in graphs["none"].nodes) == model.last_writer
    assert all(n.op != "attention" or n.shape[0] == "t" for n in graphs["last"].nodes[:place])


@pytest.mark.parametrize("name", NAMES)
def test_replay_is_the_engine(name: str, folders: Folder, opened: Open) -> None:
    """Op by op, past the window, whatever is wanted: the same bits."""
    session = opened(folders(name))
    ids = prompt(session.model.vocab, 48)
    player = Player(session, 64)
    session.reset()
    at = 0
    plan: list[tuple[int, Want]] = [(9, "all"), (11, "none"), (1, "none"), (5, "last"), *[(1, "last")] * 12]
    for size, want in [*plan, (4, "all"), (1, "all"), (5, "last")]:
        part = ids[at : at + size]
        wanted, found = session.engine.forward(part, want), player.run(part, want)
        if want == "none":
            assert found is None
            assert wanted.shape == (0, session.model.vocab)
        else:
            assert found is not None
            assert np.array_equal(found, wanted)
        at += size
    assert at == len(ids)


@pytest.mark.parametrize("name", ["gemma-3n-E4B", "llama-3.1-8B", "qwen3-0.6B"])
def test_replay_against_transformers(name: str, folders: Folder, opened: Open) -> None:
    session, model = opened(folders(name)), reference(folders(name))
    ids = prompt(session.model.vocab, 40)
    logits, player = expected(model, ids), Player(session, 40)
    first = player.run(ids[:25], "all")
    assert first is not None
    assert_close(first, logits[:25])
    for i in range(25, 40):
        found = player.run(ids[i : i + 1], "last")
        assert found is not None
        assert_close(found, logits[i : i + 1])


@pytest.mark.parametrize("name", ["gemma-3n-E2B", "llama-3.2-1B", "qwen3-0.6B"])
@pytest.mark.parametrize("want", ["all", "last"])
def test_recorded_shapes_are_the_shapes_computed(name: str, want: Want, folders: Folder, opened: Open) -> None:
    session = opened(folders(name))
    player = Player(session, 64)
    watched = Watched(player.ops)
    player.run(prompt(session.model.vocab, 7), want, watched)
    recorded = [(n.op, tuple(7 if s == "t" else s for s in n.shape)) for n in player.graphs[want].nodes if n.op in OPS]
    assert recorded == watched.shapes


def test_a_changed_node_changes_the_logits(folders: Folder, opened: Open) -> None:
    """Replay reads the graph, not the model."""
    session = opened(folders("gemma-3n-E2B"))
    ids = prompt(session.model.vocab, 20)
    truth = Player(session, 20).run(ids, "all")
    for op, attrs in (("attention", {"scale": 0.5}), ("norm", {"eps": 0.5}), ("gaussian_topk", {"cut": 0.1})):
        player = Player(session, 20)
        nodes = player.graphs["all"].nodes
        at = next(i for i, node in enumerate(nodes) if node.op == op)
        nodes[at] = replace(nodes[at], attrs={**nodes[at].attrs, **attrs})
        found = player.run(ids, "all")
        assert truth is not None
        assert found is not None
        assert np.abs(found - truth).max() > 1e-3


def test_full_size_records_in_less_than_a_second() -> None:
    model = parse(real("gemma-3n-E4B"))
    record(model)
    start = perf_counter()
    graph = record(model)
    assert perf_counter() - start < 1.0
    assert len(graph.weights) == len(tensors(model)) - 1
    assert sum(node.op == "attention" for node in graph.nodes) == 35
    assert graph.inputs == {"positions": ("t",), "ids": ("t",), "ple": ("t", 35, 256)}


def test_recording_needs_no_library_and_no_weights() -> None:
    """In a process of its own: no torch, and no memory to speak of for a model of 16 GB."""
    code = """
import resource, sys
from tests.shrink import parse, real
from loaders.network.graph import record
model = parse(real("gemma-3n-E4B"))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
graph = record(model)
assert len(graph.nodes) > 1000
assert not {"torch", "transformers", "onnx"} & set(sys.modules), "recording imports a library"
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    root = Path(__file__).parent.parent
    out = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    assert int(out.stdout) < 32 * 1024


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(AssertionError, match="arithmetic"):
        broadcast(("t", 3), (1, 4))
    with pytest.raises(AssertionError, match="reshape"):
        reshaped(("t", 6), (-1, 4))
    with pytest.raises(AssertionError, match="reshape"):
        reshaped(("t", 6), (6, -1))
    assert broadcast(("t", 1, 3), (4, 1)) == ("t", 4, 3)
    assert reshaped(("t", 6), (-1, 2, 3)) == ("t", 2, 3)
    recorder = recorder_of()
    embed = recorder.weight("embed")
    x = recorder.embed(embed, recorder.input("ids", ("t",)))
    with pytest.raises(AssertionError, match="linear"):
        recorder.linear(x, recorder.weight("layers.0.ffn.down"))
    with pytest.raises(AssertionError, match="norm"):
        recorder.norm(recorder.slice(x, 1, 0, 3), recorder.weight("norm"), 1e-6)
    with pytest.raises(KeyError):
        recorder.weight("layers.0.attn.bias")
