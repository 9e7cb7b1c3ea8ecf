"""The recorded graph: known operators, shapes that hold, and the engine's own numbers when it is replayed."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable
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
from loaders.network import decoder_of
from loaders.network.graph import Graph, Node, Recorded, Recorder, broadcast, record, replay, reshaped
from loaders.network.ops import Ops, Want
from loaders.network.spec import Experts, Model, Rope, Router, Temperature
from loaders.network.tensors import PLE_TABLE, tensors
from tests.conftest import Folder, Open
from tests.makers import assert_close, expected, prompt, reference
from tests.shrink import DISTINCT, NAMES, parse, real, shrink

CPU = torch.device("cpu")
OPS = {name for name, _ in inspect.getmembers(Ops, inspect.isfunction) if not name.startswith("_")}
APPENDS = {"append", "append_latent"}
KNOWN = OPS | APPENDS | {"add", "sub", "mul", "div"}
WANTS: tuple[Want, ...] = ("all", "last", "none")
Rows = Callable[[np.ndarray], torch.Tensor | None]


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
    """Runs graphs where an engine would run its network, which it can run too."""

    def __init__(self, model: Model, weights: dict[str, Any], rows: Rows, context: int) -> None:
        self.model, self.weights, self.rows = model, weights, rows
        self.ops, self.cache = TorchOps(CPU), KVCache(model, context, torch.float32, CPU)
        self.graphs: dict[Want, Graph] = {want: record(model, want=want) for want in WANTS}

    @torch.inference_mode()
    def run(self, ids: np.ndarray, want: Want, ops: Any = None, direct: bool = False) -> np.ndarray | None:
        """One pass, of the graph or of the decoder itself."""
        self.cache.begin(len(ids))
        self.ops.begin()
        tokens, ple, weights = torch.from_numpy(ids), self.rows(ids), self.weights.__getitem__
        if direct:
            out = decoder_of(self.model)(self.ops, self.model, weights, tokens, ple, self.cache, want=want)
        else:
            inputs = {"ids": tokens, **({} if ple is None else {"ple": ple})}
            out = replay(self.graphs[want], ops or self.ops, weights, inputs, self.cache)
        self.cache.end()
        return None if out is None else out.numpy()


def player_of(session: Session, context: int) -> Player:
    """With the weights that an engine has loaded."""
    return Player(session.model, session.engine.weights, session.engine.ple, context)


def small(name: str) -> Model:
    return parse(shrink(real(name)))


def made(name: str, context: int) -> Player:
    """A shrunk model with random weights: matrices by the number of their inputs, vectors around one."""
    model, generator = small(name), torch.Generator().manual_seed(0)
    weights = {}
    for tensor, shape in tensors(model).items():
        scale = shape[-1] ** -0.5 if len(shape) > 1 and tensor not in ("embed", "positions") else 0.5
        weights[tensor] = torch.randn(shape, generator=generator) * scale + float(len(shape) == 1)
    table = weights.pop(PLE_TABLE, None)

    def rows(ids: np.ndarray) -> torch.Tensor | None:
        return (
            None if table is None else table[torch.from_numpy(ids) % len(table)].view(len(ids), len(model.layers), -1)
        )

    return Player(model, weights, rows, context)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("want", WANTS)
def test_graphs_are_well_formed(name: str, want: Want) -> None:
    model = small(name)
    graph = record(model, want=want)
    assert {node.op for node in graph.nodes} <= KNOWN
    table = tensors(model)
    assert all(table[weight] == shape for weight, shape in graph.weights.items())
    if want != "none":
        assert set(graph.weights) == set(table) - {PLE_TABLE}
    assert not graph.inputs.keys() & graph.weights.keys()
    known = {**graph.inputs, **graph.weights}
    used: set[str] = set()
    for node in graph.nodes:
        names = [x for x in node.inputs if isinstance(x, str)]
        assert all(x in known for x in names), f"{node.op} uses what was not made yet"
        assert node.output not in known
        used.update(names)
        known[node.output] = node.shape
        check_shape(node, [known[x] if isinstance(x, str) else None for x in node.inputs])
    appended = [node.attrs["layer"] for node in graph.nodes if node.op in APPENDS]
    assert appended == [i for i, layer in enumerate(model.layers) if layer.attention.kv_from is None]
    rows = {"all": "t", "last": 1}
    if want == "none":
        assert graph.output == ""
        assert graph.nodes[-1].op in APPENDS
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
        "head_linear": lambda: (a[0], *shapes[1][:2]),
        "embed": lambda: (shapes[1][0], a[1]),
        "attention": lambda: (a[0], a[1] * shapes[1][-1]),
        "append": lambda: ("kv", *a[1:]),
        "append_latent": lambda: ("kv", 1, node.attrs["rank"]),
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
    if node.op in ("linear", "head_linear"):
        assert a[-1] == shapes[1][-1]


@pytest.mark.parametrize("name", NAMES)
def test_only_the_last_position_runs_the_layers_that_share(name: str) -> None:
    """After the last layer that writes keys nothing but that position is left, and nothing runs for "none"."""
    model = small(name)
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


PLAN: tuple[tuple[int, Want], ...] = (
    *((9, "all"), (11, "none"), (1, "none"), (5, "last"), *[(1, "last")] * 12),
    *((4, "all"), (1, "all"), (5, "last")),
)


@pytest.mark.parametrize("name", DISTINCT)
def test_replay_is_the_decoder(name: str) -> None:
    """Op by op, past the window and the chunk, whatever is wanted: the same bits."""
    other = made(name, 48)
    same(made(name, 48), PLAN, lambda part, want: other.run(part, want, direct=True))


@pytest.mark.parametrize("name", ["gemma-3n-E2B", "deepseek-v3"])
def test_replay_is_the_engine(name: str, folders: Folder, opened: Open) -> None:
    session = opened(folders(name), engine="torch")
    session.reset()
    same(player_of(session, 64), PLAN[:6], session.engine.forward)


def same(player: Player, plan: tuple[tuple[int, Want], ...], direct: Callable[[np.ndarray, Want], Any]) -> None:
    """Passes of so many tokens, each compared bit for bit with what ``direct`` returns."""
    vocab = player.model.vocab
    ids = prompt(vocab, sum(size for size, _ in plan))
    for size, want in plan:
        part, ids = ids[:size], ids[size:]
        wanted, found = direct(part, want), player.run(part, want)
        if want == "none":
            assert found is None
            assert wanted is None or wanted.shape == (0, vocab)
        else:
            assert found is not None
            assert found.shape == (size if want == "all" else 1, vocab)
            assert found.std() > 1e-3
            assert np.array_equal(found, wanted)


@pytest.mark.parametrize("name", ["gemma-3n-E2B", "qwen3-0.6B", "gpt2", "deepseek-v3", "llama-4-scout-17B-16E"])
def test_replay_against_transformers(name: str, folders: Folder, opened: Open) -> None:
    session, model = opened(folders(name), engine="torch"), reference(folders(name))
    ids = prompt(session.model.vocab, 40)
    logits, player = expected(model, ids), player_of(session, 40)
    first = player.run(ids[:25], "all")
    assert first is not None
    assert_close(first, logits[:25])
    for i in range(25, 40):
        found = player.run(ids[i : i + 1], "last")
        assert found is not None
        assert_close(found, logits[i : i + 1])


@pytest.mark.parametrize("name", DISTINCT)
@pytest.mark.parametrize("want", ["all", "last"])
def test_recorded_shapes_are_the_shapes_computed(name: str, want: Want) -> None:
    player = made(name, 64)
    watched = Watched(player.ops)
    player.run(prompt(player.model.vocab, 7), want, watched)
    recorded = [(n.op, tuple(7 if s == "t" else s for s in n.shape)) for n in player.graphs[want].nodes if n.op in OPS]
    assert recorded == watched.shapes


CHANGES: dict[str, tuple[tuple[str, dict[str, Any]], ...]] = {
    "gemma-3n-E2B": (("attention", {"scale": 0.5}), ("norm", {"eps": 0.5}), ("gaussian_topk", {"cut": 0.1})),
    "gpt2": (("layer_norm", {"eps": 0.5}), ("activation", {"kind": "silu"})),
    "deepseek-v3": (("route", {"router": Router("sigmoid", bias=True)}), ("rope", {"rope": Rope(1e4, 16)})),
    "llama-4-scout-17B-16E": (
        ("temperature", {"temperature": Temperature(0.5, 4)}),
        ("attention", {"chunk": 4}),
        ("route", {"active": 3}),
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_node_changes_the_logits(name: str) -> None:
    """Replay reads the graph, not the model."""
    player = made(name, 20)
    ids, nodes = prompt(player.model.vocab, 20), player.graphs["all"].nodes
    truth = player.run(ids, "all")
    for op, attrs in CHANGES[name]:
        player.cache.reset()
        at = next(i for i, node in enumerate(nodes) if node.op == op)
        held, nodes[at] = nodes[at], replace(nodes[at], attrs={**nodes[at].attrs, **attrs})
        found = player.run(ids, "all")
        assert truth is not None
        assert found is not None
        assert np.abs(found - truth).max() > 1e-3, op
        nodes[at] = held


@pytest.mark.parametrize("name", ["gemma-3n-E4B", "deepseek-v3", "kimi-k2", "qwen3-235B-A22B"])
def test_full_size_records_in_less_than_a_second(name: str) -> None:
    model = parse(real(name))
    record(model)
    start = perf_counter()
    graph = record(model)
    assert perf_counter() - start < 1.0
    assert graph.weights == {tensor: shape for tensor, shape in tensors(model).items() if tensor != PLE_TABLE}
    assert sum(node.op == "attention" for node in graph.nodes) == len(model.layers)
    rows = {"ple": ("t", 35, 256)} if model.ple is not None else {}
    assert graph.inputs == {"token_positions": ("t",), "ids": ("t",), **rows}


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
    recorder = Recorder(small("llama-3.2-1B"))
    embed = recorder.weight("embed")
    x = recorder.embed(embed, recorder.input("ids", ("t",)))
    with pytest.raises(AssertionError, match="linear"):
        recorder.linear(x, recorder.weight("layers.0.ffn.down"))
    with pytest.raises(AssertionError, match="norm"):
        recorder.norm(recorder.slice(x, 1, 0, 3), recorder.weight("norm"), 1e-6)
    with pytest.raises(KeyError):
        recorder.weight("layers.0.attn.bias")


T = "t"
TURN = Rope(1e4, 8)
MIXTURE = Experts(6, 2, 5, "silu", Router("softmax"))
# An operator: shapes of arguments, and what else it takes, that fit; and such that do not.
MISFITS: dict[str, tuple[tuple[Any, ...], list[tuple[Any, ...]]]] = {
    "head_linear": (((T, 3, 4), (3, 7, 4)), [((T, 3, 7), (3, 7, 4)), ((T, 2, 4), (3, 7, 4)), ((T, 4), (3, 7, 4))]),
    "layer_norm": (((T, 4), (4,), (4,), 1e-5), [((T, 4), (3,), (3,), 1e-5), ((T, 4), (4,), (1,), 1e-5)]),
    "temperature": (((T, 2, 4), (T,), Temperature(0.1, 8)), [((T, 2, 4), (1,), Temperature(0.1, 8))]),
    "rope": (((T, 2, 8), (T,), TURN), [((T, 2, 8), (1,), TURN), ((T, 2, 6), (T,), TURN)]),
    "route": (
        ((T, 6), (6,), 6, 2, MIXTURE.router),
        [((T, 5), None, 6, 2, MIXTURE.router), ((T, 6), (1,), 6, 2, None), ((T, 6), None, 6, 7, None)],
    ),
    "experts": (
        ((T, 4), (T, 6), (6, 5, 4), (6, 5, 4), (6, 4, 5), MIXTURE),
        [
            ((T, 4), (1, 6), (6, 5, 4), (6, 5, 4), (6, 4, 5), MIXTURE),
            ((T, 4), (T, 2), (6, 5, 4), (6, 5, 4), (6, 4, 5), MIXTURE),
            ((T, 4), (T, 6), (6, 4, 5), (6, 5, 4), (6, 4, 5), MIXTURE),
            ((T, 4), (T, 6), (6, 5, 4), (5, 5, 4), (6, 4, 5), MIXTURE),
            ((T, 4), (T, 6), (6, 5, 4), (6, 5, 4), (6, 5, 4), MIXTURE),
        ],
    ),
    "append": ((0, (T, 2, 4), (T, 2, 4), None, 8), [(0, (T, 2, 4), (T, 2, 3), None, 8), (0, (1, 2, 4), (T, 2, 4), 8)]),
    "append_latent": ((0, (T, 12), 8), [(0, (T, 12), 12), (0, (T, 12), 0), (0, (T, 1, 12), 8)]),
    "attention": (
        ((T, 6, 4), ("kv", 2, 4), (T,), 1.0, None, 8),
        [((T, 6, 4), ("kv", 4, 4), (T,), 1.0, None), ((1, 6, 4), ("kv", 2, 4), (T,), 1.0, None)],
    ),
}


@pytest.mark.parametrize("op", MISFITS)
def test_every_operator_knows_what_fits(op: str) -> None:
    fits, misfits = MISFITS[op]

    def recorded(arguments: tuple[Any, ...]) -> Recorded:
        found = Recorder(small("llama-3.2-1B"))
        out: Recorded = getattr(found, op)(
            *(found.input(f"x{i}", a) if isinstance(a, tuple) else a for i, a in enumerate(arguments))
        )
        return out

    assert recorded(fits).recorder.graph.nodes[0].op == op
    for misfit in misfits:
        with pytest.raises(AssertionError, match=f"{op}: shapes"):
            recorded(misfit)


def test_pieces_that_are_joined_must_agree() -> None:
    found = Recorder(small("llama-3.2-1B"))
    xs = [found.input(name, shape) for name, shape in {"a": (T, 3), "b": (T, 4), "c": (1, 4)}.items()]
    assert found.concat(xs[:2], 1).shape == (T, 7)
    with pytest.raises(AssertionError, match="concat"):
        found.concat(xs[1:], 1)


def test_inputs_and_weights_have_different_names() -> None:
    """A learned table of positions, and the positions it is read at."""
    found = Recorder(small("gpt2"))
    found.input("embed", (T,))
    with pytest.raises(AssertionError, match="weight"):
        found.weight("embed")
    second = record(small("gpt2")).nodes[1]
    assert (second.op, second.inputs) == ("embed", ("positions", "token_positions"))
