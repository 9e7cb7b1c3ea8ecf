"""Records a network as a small static graph: the same definition the engines compute, written down.

A recorded value knows its shape, in which the token axis is the string ``"t"`` (or 1 once only the last token is
left). Graphs hold names and shapes only, no weights: recording a model takes milliseconds and no memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from loaders.network import decoder_of
from loaders.network.ops import Cache, Ops, Want, Weights
from loaders.network.spec import Activation, Experts, Model, Rope, Router, Temperature
from loaders.network.tensors import tensors

Dim = int | str
Dims = tuple[Dim, ...]
TOKENS = "t"
# Not "positions": that is the name of a weight where positions are learned.
POSITIONS = "token_positions"


@dataclass(frozen=True)
class Node:
    """``output = op(*inputs, **attrs)``. Inputs are value names, or Python floats for scalar operands."""

    op: str
    inputs: tuple[str | float, ...]
    attrs: dict[str, Any]
    output: str
    shape: Dims


@dataclass
class Graph:
    """Nodes in execution order. ``inputs`` and ``weights`` map names to shapes; ``output`` names the logits."""

    inputs: dict[str, Dims] = field(default_factory=dict)
    weights: dict[str, tuple[int, ...]] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)
    output: str = ""


@dataclass(frozen=True)
class Recorded:
    """A value of the graph, with arithmetic."""

    recorder: Recorder
    name: str
    shape: Dims

    def __add__(self, other: Recorded | float) -> Recorded:
        return self.recorder.binary("add", self, other)

    def __sub__(self, other: Recorded | float) -> Recorded:
        return self.recorder.binary("sub", self, other)

    def __mul__(self, other: Recorded | float) -> Recorded:
        return self.recorder.binary("mul", self, other)

    def __truediv__(self, other: Recorded | float) -> Recorded:
        return self.recorder.binary("div", self, other)


class Recorder:
    """Implements Ops, Cache and the weights lookup by writing nodes."""

    def __init__(self, model: Model) -> None:
        self.graph, self._table = Graph(), tensors(model)
        self.positions = self.input(POSITIONS, (TOKENS,))

    def input(self, name: str, shape: Dims) -> Recorded:
        self.graph.inputs[name] = shape
        return Recorded(self, name, shape)

    def weight(self, name: str) -> Recorded:
        check(name not in self.graph.inputs, "weight", name)
        self.graph.weights[name] = self._table[name]
        return Recorded(self, name, self._table[name])

    def node(self, op: str, inputs: Sequence[Recorded | float], shape: Dims, /, **attrs: Any) -> Recorded:
        names = tuple(x.name if isinstance(x, Recorded) else x for x in inputs)
        output = f"%{len(self.graph.nodes)}"
        self.graph.nodes.append(Node(op, names, attrs, output, shape))
        return Recorded(self, output, shape)

    def binary(self, op: str, a: Recorded, b: Recorded | float) -> Recorded:
        shape = broadcast(a.shape, b.shape) if isinstance(b, Recorded) else a.shape
        return self.node(op, (a, b), shape)

    def embed(self, table: Recorded, ids: Recorded) -> Recorded:
        return self.node("embed", (table, ids), (ids.shape[0], table.shape[1]))

    def linear(self, x: Recorded, weight: Recorded) -> Recorded:
        check(x.shape[-1] == weight.shape[1], "linear", x.shape, weight.shape)
        return self.node("linear", (x, weight), (*x.shape[:-1], weight.shape[0]))

    def head_linear(self, x: Recorded, weight: Recorded) -> Recorded:
        check(x.shape[1:] == (weight.shape[0], weight.shape[2]), "head_linear", x.shape, weight.shape)
        return self.node("head_linear", (x, weight), (x.shape[0], weight.shape[0], weight.shape[1]))

    def matmul(self, a: Recorded, b: Recorded) -> Recorded:
        check(a.shape[2] == b.shape[1] and a.shape[0] == b.shape[0], "matmul", a.shape, b.shape)
        return self.node("matmul", (a, b), (a.shape[0], a.shape[1], b.shape[2]))

    def norm(self, x: Recorded, weight: Recorded | None, eps: float) -> Recorded:
        check(weight is None or weight.shape == x.shape[-1:], "norm", x.shape, weight and weight.shape)
        return self.node("norm", (x,) if weight is None else (x, weight), x.shape, eps=eps)

    def layer_norm(self, x: Recorded, weight: Recorded, bias: Recorded, eps: float) -> Recorded:
        check(weight.shape == bias.shape == x.shape[-1:], "layer_norm", x.shape, weight.shape, bias.shape)
        return self.node("layer_norm", (x, weight, bias), x.shape, eps=eps)

    def rms(self, x: Recorded, floor: float) -> Recorded:
        return self.node("rms", (x,), (*x.shape[:-1], 1), floor=floor)

    def rope(self, x: Recorded, positions: Recorded, rope: Rope) -> Recorded:
        check(x.shape[0] == positions.shape[0] and rope.dim <= int(x.shape[-1]), "rope", x.shape, positions.shape)
        return self.node("rope", (x, positions), x.shape, rope=rope)

    def temperature(self, x: Recorded, positions: Recorded, temperature: Temperature) -> Recorded:
        check(x.shape[0] == positions.shape[0], "temperature", x.shape, positions.shape)
        return self.node("temperature", (x, positions), x.shape, temperature=temperature)

    def attention(
        self,
        q: Recorded,
        kv: Recorded,
        positions: Recorded,
        scale: float,
        window: int | None,
        chunk: int | None = None,
    ) -> Recorded:
        check(q.shape[0] == positions.shape[0], "attention", q.shape, positions.shape)
        check(int(q.shape[1]) % int(kv.shape[1]) == 0, "attention", q.shape, kv.shape)
        # A handle's shape ends with the size of its values, which need not be that of its keys.
        shape = (q.shape[0], int(q.shape[1]) * int(kv.shape[-1]))
        return self.node("attention", (q, kv, positions), shape, scale=scale, window=window, chunk=chunk)

    def route(self, logits: Recorded, bias: Recorded | None, experts: int, active: int, router: Router) -> Recorded:
        check(logits.shape[-1] == experts >= active, "route", logits.shape, active)
        check(bias is None or bias.shape == (experts,), "route", logits.shape, bias and bias.shape)
        inputs = (logits,) if bias is None else (logits, bias)
        return self.node("route", inputs, logits.shape, experts=experts, active=active, router=router)

    def experts(
        self, x: Recorded, weights: Recorded, gate: Recorded, up: Recorded, down: Recorded, spec: Experts
    ) -> Recorded:
        check(weights.shape == (x.shape[0], spec.experts), "experts", x.shape, weights.shape)
        wide, narrow = (spec.experts, spec.width, x.shape[1]), (spec.experts, x.shape[1], spec.width)
        check((gate.shape, up.shape, down.shape) == (wide, wide, narrow), "experts", gate.shape, up.shape, down.shape)
        return self.node("experts", (x, weights, gate, up, down), x.shape, spec=spec)

    def activation(self, x: Recorded, kind: Activation) -> Recorded:
        return self.node("activation", (x,), x.shape, kind=kind)

    def gaussian_topk(self, x: Recorded, cut: float) -> Recorded:
        return self.node("gaussian_topk", (x,), x.shape, cut=cut)

    def tanh(self, x: Recorded) -> Recorded:
        return self.node("tanh", (x,), x.shape)

    def reshape(self, x: Recorded, shape: Sequence[int]) -> Recorded:
        return self.node("reshape", (x,), reshaped(x.shape, shape), shape=tuple(shape))

    def slice(self, x: Recorded, axis: int, start: int, stop: int) -> Recorded:
        shape = (*x.shape[:axis], stop - start, *x.shape[axis + 1 :])
        return self.node("slice", (x,), shape, axis=axis, start=start, stop=stop)

    def concat(self, xs: Sequence[Recorded], axis: int) -> Recorded:
        rest = {(*x.shape[:axis], *x.shape[axis + 1 :]) for x in xs}
        check(len(rest) == 1, "concat", *(x.shape for x in xs))
        total = sum(int(x.shape[axis]) for x in xs)
        return self.node("concat", xs, (*xs[0].shape[:axis], total, *xs[0].shape[axis + 1 :]), axis=axis)

    def last(self, x: Recorded) -> Recorded:
        return self.node("last", (x,), (1, *x.shape[1:]))

    def append(self, layer: int, k: Recorded, v: Recorded, window: int | None, chunk: int | None = None) -> Recorded:
        check(k.shape == v.shape, "append", k.shape, v.shape)
        return self.node("append", (k, v), ("kv", *v.shape[1:]), layer=layer, window=window, chunk=chunk)

    def append_latent(self, layer: int, entry: Recorded, rank: int) -> Recorded:
        check(len(entry.shape) == 2 and 0 < rank < int(entry.shape[1]), "append_latent", entry.shape, rank)
        return self.node("append_latent", (entry,), ("kv", 1, rank), layer=layer, rank=rank)


def record(model: Model, *, want: Want = "last") -> Graph:
    """The graph of one forward pass: inputs ``ids``, ``token_positions`` and (with PLE) ``ple``; output logits."""
    recorder = Recorder(model)
    ids = recorder.input("ids", (TOKENS,))
    ple = None
    if model.ple is not None:
        ple = recorder.input("ple", (TOKENS, len(model.layers), model.ple.dim))
    out = decoder_of(model)(recorder, model, recorder.weight, ids, ple, recorder, want=want)
    recorder.graph.output = "" if out is None else out.name
    return recorder.graph


def replay(graph: Graph, op: Ops, w: Weights, inputs: dict[str, Any], cache: Cache) -> Any:
    """Executes a graph node by node on any backend: what a lowering must reproduce."""
    result: Any
    values: dict[str, Any] = {**inputs, POSITIONS: cache.positions}
    arithmetic = {
        "add": lambda a, b: a + b,
        "sub": lambda a, b: a - b,
        "mul": lambda a, b: a * b,
        "div": lambda a, b: a / b,
    }

    def value(name: str | float) -> Any:
        if not isinstance(name, str):
            return name
        return w(name) if name in graph.weights else values[name]

    for node in graph.nodes:
        args = [value(x) for x in node.inputs]
        if node.op in arithmetic:
            result = arithmetic[node.op](*args)
        elif node.op == "append":
            k, v = args
            result = cache.append(node.attrs["layer"], k, v, node.attrs["window"], node.attrs["chunk"])
        elif node.op == "append_latent":
            result = cache.append_latent(node.attrs["layer"], args[0], node.attrs["rank"])
        elif node.op == "concat":
            result = op.concat(args, **node.attrs)
        elif node.op in ("norm", "route") and len(args) == 1:
            result = getattr(op, node.op)(args[0], None, **node.attrs)
        else:
            result = getattr(op, node.op)(*args, **node.attrs)
        values[node.output] = result
    return values.get(graph.output)


def check(ok: bool, op: str, *shapes: object) -> None:
    """A shape that does not fit is a bug in the network's definition, not in a file."""
    if not ok:
        raise AssertionError(f"{op}: shapes {shapes} do not fit")


def broadcast(a: Dims, b: Dims) -> Dims:
    """The shape of an element-wise operation; axes of different sizes must be 1 on one side."""
    width = max(len(a), len(b))
    a, b = (1,) * (width - len(a)) + a, (1,) * (width - len(b)) + b
    for x, y in zip(a, b, strict=True):
        check(x == y or 1 in (x, y), "arithmetic", a, b)
    return tuple(y if x == 1 else x for x, y in zip(a, b, strict=True))


def reshaped(shape: Dims, wanted: Sequence[int]) -> Dims:
    """``wanted`` with its -1 resolved to whatever the token axis is."""
    tokens, sizes = shape[0], 1
    for size in shape[1:]:
        sizes *= int(size)
    fixed = 1
    for size in wanted:
        fixed *= size if size != -1 else 1
    check(wanted[0] == -1 and fixed == sizes and -1 not in wanted[1:], "reshape", shape, tuple(wanted))
    return (tokens, *wanted[1:])
