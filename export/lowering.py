"""Lowers the recorded graph to ONNX, node by node: what all targets share. Targets add what they have fused forms for.

A value is [n, ...] with n = batch * tokens, as it was recorded; only rotation and attention see [batch, tokens, ...].
A reshape emits nothing until someone needs the shape.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from export.builder import FLOAT, FLOAT16, INT64, Builder
from loaders.errors import Unsupported
from loaders.formats.contract import EMBEDS, IDS, KEEP, LOGITS, MASK, POSITION_IDS, ROWS, CacheSpec
from loaders.network.graph import POSITIONS, Dims, Graph, Node
from loaders.network.rotary import amplitude, frequencies
from loaders.network.spec import Experts, Model, Rope, Router, Temperature

Formats = Callable[[str], str]
END = np.iinfo(np.int64).max
# What is added to a sum of sigmoids before dividing by it.
TINY = 1e-20
LOWEST = float(np.finfo(np.float32).min)


@dataclass(frozen=True)
class Choices:
    """What a lowering is for. ``formats``: canonical name -> F32, F16, BF16, int8 or int4. ``growing``: caches come out
    longer than they went in, instead of being written in place. ``half``: matrices and caches are float16.
    """

    formats: Formats
    context: int
    layout: str = "edge"
    growing: bool = False
    half: bool = False
    accuracy_level: int = 4

    @property
    def cached(self) -> int:
        """The type of keys and values."""
        return FLOAT16 if self.half else FLOAT


@dataclass
class View:
    """A value under an ONNX name, whose shape there is ``actual``, and that is to be seen as ``shape``."""

    name: str
    actual: Dims
    shape: Dims


def embeds(node: Node) -> bool:
    """Whether it is what tokens become first."""
    return node.op == "embed" and node.inputs[1] == "ids"


class Lowering(ABC):
    """One graph on its way. Subclasses say how a target multiplies, norms, rotates and attends."""

    profile: ClassVar[str]
    opset: ClassVar[int]
    # The ONNX Runtime that computes the plainest graph right.
    oldest: ClassVar[str]

    def __init__(self, model: Model, graph: Graph, choices: Choices) -> None:
        self.spec, self.graph, self.choices = model, graph, choices
        self.b = Builder()
        self.values: dict[str, View] = {}
        self.shaped: dict[tuple[str, Dims], str] = {}
        self.caches: list[CacheSpec] = []
        self.memo: dict[Any, str] = {}
        self.min_ort = self.oldest
        self.uses: dict[str, list[Node]] = {}
        for node in graph.nodes:
            for name in node.inputs:
                if isinstance(name, str):
                    self.uses.setdefault(name, []).append(node)

    def needs(self, version: str) -> None:
        """What was just lowered is computed right from this ONNX Runtime on."""
        self.min_ort = max(self.min_ort, version, key=lambda v: [int(x) for x in v.split(".")])

    # The inputs and the output

    def run(self) -> None:
        """Lowers everything."""
        b = self.b
        # Whoever looks up rows of one table in a browser looks up those of the other too, in a graph of its own.
        outside = self.choices.layout == "web" and self.spec.ple is not None
        if outside:
            self.ids = b.input(EMBEDS, FLOAT, ("batch", "tokens", self.spec.dim))
        else:
            self.ids = b.input(IDS, INT64, ("batch", "tokens"))
        self.mask = b.input(MASK, INT64, ("batch", "total"))
        self.positions = b.input(POSITION_IDS, INT64, ("batch", "tokens"))
        if not outside:
            self.values["ids"] = View(b.node("Reshape", (self.ids, b.ints(-1))), ("t",), ("t",))
        self.values[POSITIONS] = View(b.node("Reshape", (self.positions, b.ints(-1))), ("t",), ("t",))
        if self.spec.ple is not None:
            shape = (len(self.spec.layers), self.spec.ple.dim)
            rows = b.input(ROWS, FLOAT, ("batch", "tokens", *shape))
            flat = b.node("Reshape", (rows, b.ints(-1, *shape)))
            self.values["ple"] = View(flat, ("t", *shape), ("t", *shape))
        for node in self.graph.nodes:
            scopes = [x for x in node.inputs if isinstance(x, str) and x.startswith("layers.")]
            b.scope = scopes[0].rsplit(".", 1)[0] + "." if scopes else b.scope
            if outside and embeds(node):
                self.bind(node, self.ids, ("b", "t", self.spec.dim))
            else:
                getattr(self, f"lower_{node.op}")(node)
        b.scope = ""
        out = self.get(self.graph.output)
        # onnxruntime-genai takes a 1 here for what it is: logits of one token, however many went in.
        b.output(LOGITS, FLOAT, ("batch", 1 if self.choices.layout == "genai" else "kept", self.spec.vocab))
        b.node("Reshape", (out, self.by_batch((self.spec.vocab,))), name=LOGITS)

    def run_embedding(self) -> None:
        """Lowers what a decoder of layout web is given: input_ids -> inputs_embeds float32 [batch, tokens, dim]."""
        b, dim = self.b, self.spec.dim
        self.ids = b.input(IDS, INT64, ("batch", "tokens"))
        self.values["ids"] = View(b.node("Reshape", (self.ids, b.ints(-1))), ("t",), ("t",))
        node = next(node for node in self.graph.nodes if embeds(node))
        self.lower_embed(node)
        b.output(EMBEDS, FLOAT, ("batch", "tokens", dim))
        b.node("Reshape", (self.get(node.output), self.by_batch((dim,))), name=EMBEDS)

    @abstractmethod
    def lower_embed(self, node: Node) -> None:
        """Rows of a table."""

    @cached_property
    def batch(self) -> str:
        """How many sequences, int64 [1]."""
        return self.b.node("Shape", (self.ids,), start=0, end=1)

    @cached_property
    def kept(self) -> str:
        """Minus the number of last tokens whose logits are wanted, int64 [1]: where they start."""
        asked = self.b.input(KEEP, INT64, ())
        return self.b.node("Neg", (self.b.node("Reshape", (asked, self.b.ints(1))),))

    @cached_property
    def ends(self) -> str:
        """Where among this pass's tokens each sequence's last one is, int64 [batch, 1, 1]: shorter ones are filled up
        behind, with tokens that the mask leaves out.
        """
        b = self.b
        before = b.node("Sub", [b.node("Shape", (x,), start=1, end=2) for x in (self.mask, self.ids)])
        total = b.node("ReduceSum", (self.mask, b.ints(1)), keepdims=1)
        last = b.node("Sub", (b.node("Sub", (total, before)), b.ints(1)))
        return b.node("Unsqueeze", (b.node("Max", (last, b.ints(0))), b.ints(-1)))

    def by_batch(self, rest: Sequence[int]) -> str:
        """The shape [batch, -1, *rest], int64."""
        key = ("by_batch", tuple(rest))
        if key not in self.memo:
            self.memo[key] = self.b.node("Concat", (self.batch, self.b.ints(-1, *rest)), axis=0)
        return self.memo[key]

    # Values

    def bind(self, node: Node, name: str, actual: Dims | None = None) -> None:
        """``name`` is what ``node`` computes; its shape in ONNX is ``actual`` where that is another."""
        self.values[node.output] = View(name, actual or node.shape, node.shape)

    def get(self, name: str | float) -> str:
        """A value or a weight in the shape it was recorded with, or a number."""
        if not isinstance(name, str):
            return self.b.floats(name)
        if name in self.graph.weights:
            return self.weight(name)
        view = self.values[name]
        return self.seen(view, view.shape)

    def seen(self, view: View, shape: Dims) -> str:
        """A value as [n, ...] of ``shape``."""
        if view.actual[1:] == shape[1:] and len(view.actual) == len(shape):
            return view.name
        key = (view.name, shape)
        if key not in self.shaped:
            target = self.b.ints(-1, *(int(d) for d in shape[1:]))
            self.shaped[key] = self.b.node("Reshape", (view.name, target))
        return self.shaped[key]

    def by_token(self, name: str, width: int) -> str:
        """A value as [batch, tokens, width]."""
        view = self.values[name]
        if view.actual[:1] == ("b",):
            return view.name
        key = (view.name, ("b", width))
        if key not in self.shaped:
            self.shaped[key] = self.b.node("Reshape", (view.name, self.by_batch((width,))))
        return self.shaped[key]

    def flat(self, name: str, width: int) -> str:
        """A value as a matrix of rows of ``width``."""
        return self.seen(self.values[name], ("t", width))

    def weight(self, name: str) -> str:
        """A weight as the values it has, float32."""
        return self.b.weight(name, FLOAT, self.graph.weights[name], "values", name)

    def stored(self, name: str) -> str:
        """The format of a weight."""
        return self.choices.formats(name)

    # What any target computes alike

    def lower_add(self, node: Node) -> None:
        self.arithmetic(node, "Add")

    def lower_sub(self, node: Node) -> None:
        self.arithmetic(node, "Sub")

    def lower_mul(self, node: Node) -> None:
        self.arithmetic(node, "Mul")

    def lower_div(self, node: Node) -> None:
        self.arithmetic(node, "Div")

    def arithmetic(self, node: Node, op: str) -> None:
        self.bind(node, self.b.node(op, [self.get(x) for x in node.inputs]))

    def lower_reshape(self, node: Node) -> None:
        view = self.values[str(node.inputs[0])]
        self.values[node.output] = View(view.name, view.actual, node.shape)

    def lower_slice(self, node: Node) -> None:
        axis, start, stop = (node.attrs[k] for k in ("axis", "start", "stop"))
        ends = (self.b.ints(start), self.b.ints(stop), self.b.ints(axis))
        self.bind(node, self.b.node("Slice", (self.get(node.inputs[0]), *ends)))

    def lower_concat(self, node: Node) -> None:
        self.bind(node, self.b.node("Concat", [self.get(x) for x in node.inputs], axis=node.attrs["axis"]))

    def lower_last(self, node: Node) -> None:
        source, b = str(node.inputs[0]), self.b
        rest = tuple(int(d) for d in node.shape[1:])
        whole = b.node("Reshape", (self.get(source), self.by_batch(rest)))
        self.bind(node, b.node("Reshape", (self.last_of(whole), b.ints(-1, *rest))))

    def last_of(self, x: str) -> str:
        """What of [batch, tokens, ...] belongs to tokens whose logits are wanted."""
        if self.choices.layout == "genai":
            return self.b.node("GatherND", (x, self.ends), batch_dims=1)
        return self.b.node("Slice", (x, self.kept, self.b.ints(END), self.b.ints(1)))

    def lower_tanh(self, node: Node) -> None:
        self.bind(node, self.b.node("Tanh", (self.get(node.inputs[0]),)))

    def lower_matmul(self, node: Node) -> None:
        self.bind(node, self.b.node("MatMul", [self.get(x) for x in node.inputs]))

    def lower_head_linear(self, node: Node) -> None:
        source, name = (str(x) for x in node.inputs)
        heads, rows, cols = self.graph.weights[name]
        b = self.b
        # Each head times its own matrix: ONNX Runtime has no quantized form, and these are few.
        weight = b.weight(f"{name}.turned", FLOAT, (heads, cols, rows), "turned", name)
        x = b.node("Transpose", (self.get(source),), perm=(1, 0, 2))
        self.bind(node, b.node("Transpose", (b.node("MatMul", (x, weight)),), perm=(1, 0, 2)))

    def half_product(self, x: str, name: str) -> str:
        """x float32 [n, in] times a float16 weight [out, in] transposed, as float32."""
        weight = self.b.weight(f"{name}.half", FLOAT16, self.graph.weights[name], "values", name)
        key = ("half", x)
        if key not in self.memo:
            self.memo[key] = self.b.node("Cast", (x,), to=FLOAT16)
        return self.b.node("Cast", (self.b.node("Gemm", (self.memo[key], weight), transB=1),), to=FLOAT)

    def cast(self, x: str) -> str:
        """As caches keep it."""
        return self.b.node("Cast", (x,), to=FLOAT16) if self.choices.half else x

    def lower_layer_norm(self, node: Node) -> None:
        inputs = [self.get(x) for x in node.inputs]
        self.bind(node, self.b.node("LayerNormalization", inputs, axis=-1, epsilon=node.attrs["eps"]))

    def mean(self, x: str) -> str:
        """Over the last axis, which stays with size 1."""
        return self.b.node("ReduceMean", (x, self.b.ints(-1)), keepdims=1)

    def lower_rms(self, node: Node) -> None:
        b, x = self.b, self.get(node.inputs[0])
        square = self.mean(b.node("Mul", (x, x)))
        if node.attrs["floor"]:
            square = b.node("Max", (square, b.floats(node.attrs["floor"])))
        self.bind(node, b.node("Sqrt", (square,)))

    def lower_gaussian_topk(self, node: Node) -> None:
        b, x = self.b, self.get(node.inputs[0])
        mean = self.mean(x)
        apart = b.node("Sub", (x, mean))
        deviation = b.node("Sqrt", (self.mean(b.node("Mul", (apart, apart))),))
        threshold = b.node("Mul", (deviation, b.floats(node.attrs["cut"])))
        self.bind(node, b.node("Relu", (b.node("Sub", (apart, threshold)),)))

    def lower_temperature(self, node: Node) -> None:
        x, positions = (str(name) for name in node.inputs)
        self.bind(node, self.b.node("Mul", (self.get(x), self.growth(positions, node.attrs["temperature"]))))

    def growth(self, positions: str, t: Temperature) -> str:
        """What queries at ``positions`` are multiplied by, float32 [n, 1, 1]; the same for all layers of a pass."""
        key = ("growth", positions, t)
        if key not in self.memo:
            b = self.b
            after = b.node("Add", (self.as_floats(positions), b.floats(1.0)))
            steps = b.node("Floor", (b.node("Div", (after, b.floats(t.floor))),))
            log = b.node("Log", (b.node("Add", (steps, b.floats(1.0))),))
            grown = b.node("Add", (b.node("Mul", (log, b.floats(t.scale))), b.floats(1.0)))
            self.memo[key] = b.node("Reshape", (grown, b.ints(-1, 1, 1)))
        return self.memo[key]

    def as_floats(self, positions: str) -> str:
        """Positions as float32 [n, 1]."""
        key = ("floats", positions)
        if key not in self.memo:
            wide = self.b.node("Cast", (self.get(positions),), to=FLOAT)
            self.memo[key] = self.b.node("Reshape", (wide, self.b.ints(-1, 1)))
        return self.memo[key]

    def rotation(self, positions: str, rope: Rope) -> tuple[str, str]:
        """Cosines and sines float32 [n, dim / 2] of a pass's positions: computed once, for any length of context."""
        key = ("rotation", positions, rope)
        if key not in self.memo:
            b = self.b
            angles = b.node("Mul", (self.as_floats(positions), b.floats(frequencies(rope)[None])))
            pair = [b.node(op, (angles,)) for op in ("Cos", "Sin")]
            if amplitude(rope) != 1.0:
                pair = [b.node("Mul", (x, b.floats(amplitude(rope)))) for x in pair]
            self.memo[(*key, "cos")], self.memo[(*key, "sin")] = pair
            self.memo[key] = ""
        return self.memo[(*key, "cos")], self.memo[(*key, "sin")]

    def lower_route(self, node: Node) -> None:
        b, router = self.b, node.attrs["router"]
        logits = self.get(node.inputs[0])
        bias = self.get(node.inputs[1]) if len(node.inputs) > 1 else None
        softmax = router.score == "softmax"
        scores = b.node("Softmax", (logits,), axis=-1) if softmax else b.node("Sigmoid", (logits,))
        choice = scores if bias is None else b.node("Add", (scores, bias))
        if bias is None and not softmax:
            # Sigmoids of large logits are all 1: the logits still tell them apart.
            choice = logits
        if router.groups > 1:
            choice = self.best_groups(choice, node.attrs["experts"], router)
        chosen = self.top(choice, node.attrs["active"])[1]
        counts = b.node("GatherElements", (scores, chosen), axis=1)
        if router.normalized:
            total = b.node("Add", (self.total(counts), b.floats(TINY)))
            counts = b.node("Div", (counts, total))
        if router.scale != 1.0:
            counts = b.node("Mul", (counts, b.floats(router.scale)))
        none = b.node("ConstantOfShape", (b.node("Shape", (scores,)),))
        self.bind(node, b.node("ScatterElements", (none, chosen, counts), axis=1))

    def total(self, x: str, *, keep: int = 1) -> str:
        """The sum over the last axis."""
        return self.b.node("ReduceSum", (x, self.b.ints(-1)), keepdims=keep)

    def top(self, x: str, k: int) -> tuple[str, str]:
        """The k largest of the last axis, and where they are."""
        name = self.b.fresh("TopK")
        values, indices = self.b.nodes_with(
            "TopK", (x, self.b.ints(k)), (f"{name}.values", f"{name}.indices"), axis=-1, largest=1, sorted=1
        )
        return values, indices

    def best_groups(self, choice: str, experts: int, router: Router) -> str:
        """``choice`` [n, experts] with all but the best groups' at -inf: those whose two best experts sum highest."""
        b, size = self.b, experts // router.groups
        grouped = b.node("Reshape", (choice, b.ints(-1, router.groups, size)))
        totals = self.total(self.top(grouped, min(2, size))[0], keep=0)
        chosen = self.top(totals, router.active_groups)[1]
        zeros = b.node("ConstantOfShape", (b.node("Shape", (totals,)),))
        ones = b.node("Add", (b.node("Mul", (b.node("Cast", (chosen,), to=FLOAT), b.floats(0.0))), b.floats(1.0)))
        marked = b.node("Cast", (b.node("ScatterElements", (zeros, chosen, ones), axis=1),), to=9)
        open_groups = b.node("Unsqueeze", (marked, b.ints(-1)))
        kept = b.node("Where", (open_groups, grouped, b.floats(-np.inf)))
        return b.node("Reshape", (kept, b.ints(-1, experts)))

    def on_input(self, x: str, weights: str, spec: Experts) -> tuple[str, str]:
        """(x, weights) where what the router says multiplies what an expert reads: of one, that is a number."""
        if spec.active != 1:
            raise Unsupported(
                f"{spec.active} active experts with weights on what they read", field="experts", expected="one"
            )
        b = self.b
        return b.node("Mul", (x, self.total(weights))), b.node("Sign", (weights,))
