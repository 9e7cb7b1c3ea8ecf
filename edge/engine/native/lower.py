"""Lowers a recorded graph to the instructions of program.h: steps over views of buffers that have no place yet.

Rewrites go by structure, never by a model's name: activations into the arithmetic that reads them, products of one
value into one step, arithmetic in place of an operand that dies there, pieces straight to where they are put together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from edge.engine.native.library import BLOCK, QUANT_FLOATS, Activation, Arithmetic, Kind, Op
from edge.engine.native.placing import Placing
from edge.engine.native.values import OUTPUT, SCRATCH, Buffer, Key, Layout, Values, reshaped, spread, whole
from loaders.network.graph import Graph, Node
from loaders.network.rotary import amplitude
from loaders.network.spec import Linear, Llama3Scaling, Proportional, Rope, Yarn
from loaders.network.tensors import PLE_TABLE

KINDS = {"F32": Kind.F32, "BF16": Kind.BF16, "F16": Kind.F16, "int8": Kind.INT8, "int4": Kind.INT4}
ACTIVATIONS = {"silu": Activation.SILU, "gelu_tanh": Activation.GELU_TANH, "tanh": Activation.TANH}
OPERATIONS = {op.name.lower(): op for op in Arithmetic}
QUANTIZED = (Kind.INT8, Kind.INT4)
# Products of one step.
TOGETHER = 4
# What a product waits for: nothing that takes long may happen between two that are done together.
SLOW = frozenset(("attention", "experts", "head_linear", "matmul", "last", "embed"))
# A product so much smaller than what it is of is done as soon as that is there.
SMALL = 8

Turn = tuple[float, int, Llama3Scaling | Yarn | Linear | Proportional | None]


def turn(rope: Rope) -> Turn:
    """What its cosines and sines depend on."""
    return rope.theta, rope.dim, rope.scaling


class Step(NamedTuple):
    """An instruction as program.h has it. Weights are places in the table of weights and constants, -1 for none."""

    op: Op
    views: tuple[Layout | None, ...]
    weights: tuple[int, ...] = ()
    numbers: tuple[int, ...] = ()
    reals: tuple[float, ...] = ()


class Lowering(Placing):
    """One graph on its way. ``table``: weights, and frequencies by :func:`turn` -> place; ``stored``: formats."""

    def __init__(
        self, graph: Graph, table: dict[str, int], turns: dict[Turn, int], stored: Callable[[str], str]
    ) -> None:
        super().__init__(Values(graph))
        self.table, self.turns, self.stored = table, turns, stored
        self.steps: list[Step] = []
        self.formats: dict[str, Kind] = {}
        self.done: set[str] = set()
        self.quants: dict[Key, Layout] = {}
        self.rotations: dict[tuple[Turn, bool], Layout] = {}
        self.caches: dict[str, int] = {}
        self.layers: list[int] = []
        self.products: dict[Key, list[int]] = {}

    def run(self) -> list[Step]:
        """All steps. Raises AssertionError for an operator it does not know."""
        live, known, methods = self.values.live, self.values, {}
        for i, node in enumerate(self.nodes):
            if live[i] and node.op == "linear":
                self.products.setdefault(known.key[str(node.inputs[0])], []).append(i)
        for i, node in enumerate(self.nodes):
            name = node.output
            if not live[i] or name in known.views or name in known.fused or name in known.positions:
                continue
            if node.op not in methods:
                method = getattr(self, f"lower_{node.op}", None)
                assert method is not None, f"the native engine has no {node.op}"
                methods[node.op] = method
            methods[node.op](i, node)
        if self.graph.output:
            self.deliver(self.graph.output)
        return self.steps

    def deliver(self, name: str) -> None:
        """The output, where the caller wants it; most is computed there."""
        found = self.layout(name)
        if found.buffer is None or found.buffer.space != OUTPUT:
            self.step(Op.COPY, found, self.output())

    def step(
        self,
        op: Op,
        *views: Layout | None,
        weights: tuple[int, ...] = (),
        numbers: tuple[int, ...] = (),
        reals: tuple[float, ...] = (),
    ) -> None:
        self.steps.append(Step(op, views, weights, numbers, reals))

    # Values

    def source(self, name: str | float) -> Layout:
        """Where a value is that a step reads."""
        found = self.layouts.get(name)  # type: ignore[arg-type]
        if found is None:
            assert isinstance(name, str)
            if "ple" not in self.layouts and self.values.key[name][0] == "ple":
                self.ple()
            found = self.layout(name)
        return found

    def ple(self) -> None:
        """Rows that come with the pass, unpacked where they are first read."""
        out = self.own("ple", False)
        self.bind("ple", out)
        self.step(Op.PLE_ROWS, out, numbers=(self.kind(PLE_TABLE),))

    def kind(self, name: str) -> Kind:
        """The format of a weight."""
        if name not in self.formats:
            self.formats[name] = KINDS[self.stored(name)]
        return self.formats[name]

    def kind_of(self, node: Node) -> Kind:
        """The format of a product's weight."""
        return self.kind(str(node.inputs[1]))

    def quantized(self, name: str | float) -> Layout:
        """A value as products with quantized weights read it: made once."""
        key = self.values.key[str(name)]
        if key not in self.quants:
            x = self.source(name)
            width = quant_floats(x.m)
            assert x.buffer is not None
            out = Layout(Buffer(x.n * width, x.buffer.one), 0, x.n, width, width)
            self.step(Op.QUANTIZE, x, out)
            self.quants[key] = out
        return self.quants[key]

    def factor(self, node: Node) -> Layout:
        """What a product multiplies, in the form that its weight wants."""
        x = node.inputs[0]
        return self.quantized(x) if self.kind_of(node) in QUANTIZED else self.source(x)

    def simple(
        self, i: int, node: Node, op: Op, *, reals: tuple[float, ...] = (), numbers: tuple[int, ...] = ()
    ) -> None:
        """One value to one of the same shape, with or without weights; in place where it may be."""
        x, *weights = node.inputs
        places = tuple(self.table[str(w)] for w in weights if w not in self.values.positions)
        source = self.source(x)
        self.step(op, source, self.out(i, node, x), weights=places, numbers=numbers, reals=reals)

    # Operators

    def lower_embed(self, i: int, node: Node) -> None:
        table, ids = node.inputs
        numbers = (int(ids in self.values.positions),)
        self.step(Op.EMBED, self.out(i, node), weights=(self.table[str(table)],), numbers=numbers)

    def lower_linear(self, i: int, node: Node) -> None:
        if node.output in self.done:
            return
        assert len(node.shape) == 2, f"linear of shape {node.shape}"
        x, group = self.factor(node), self.together(i)
        outs = [self.out(j, self.nodes[j]) for j in group]
        places = tuple(self.table[str(self.nodes[j].inputs[1])] for j in group)
        self.done.update(self.nodes[j].output for j in group)
        self.step(Op.LINEAR, x, *outs, weights=places, numbers=(len(group),))

    def together(self, i: int) -> list[int]:
        """Products of the same value and format that node i does on its way: those with nothing between but what
        becomes of the others, and small ones wherever they are.
        """
        node = self.nodes[i]
        key, kind = self.values.key[str(node.inputs[0])], self.kind_of(node)
        group, made, near, before = [i], {node.output}, True, i
        for j in self.products[key]:
            other = self.nodes[j]
            if j <= i or other.output in self.done or self.kind_of(other) != kind:
                continue
            near = near and all(self.follows(self.nodes[k], made) for k in range(before + 1, j) if self.values.live[k])
            if near or int(other.shape[-1]) * SMALL <= key[-1]:
                group.append(j)
                if len(group) == TOGETHER:
                    break
            before = j
            made.add(other.output)
        return group

    def follows(self, node: Node, made: set[str]) -> bool:
        """Whether a node is a quick one that needs what was made, which then counts among that. Views do not count."""
        derived = any(x in made for x in node.inputs)
        if derived:
            made.add(node.output)
        if node.output in self.values.views:
            return True
        return derived and node.op not in SLOW and (node.op != "linear" or node.output in self.done)

    def lower_head_linear(self, i: int, node: Node) -> None:
        weights = (self.table[str(node.inputs[1])],)
        self.step(Op.HEAD_LINEAR, self.factor(node), self.out(i, node), weights=weights)

    def lower_matmul(self, i: int, node: Node) -> None:
        a, b = (self.source(x) for x in node.inputs)
        self.step(Op.MATMUL, a, b, self.out(i, node))

    def lower_norm(self, i: int, node: Node) -> None:
        self.simple(i, node, Op.NORM, reals=(node.attrs["eps"],))

    def lower_layer_norm(self, i: int, node: Node) -> None:
        self.simple(i, node, Op.LAYER_NORM, reals=(node.attrs["eps"],))

    def lower_rms(self, i: int, node: Node) -> None:
        self.step(Op.RMS, self.source(node.inputs[0]), self.out(i, node), reals=(node.attrs["floor"],))

    def lower_rope(self, i: int, node: Node) -> None:
        rope, x = node.attrs["rope"], self.source(node.inputs[0])
        turned = self.rotation(rope, node.shape[0] == 1)
        numbers = (rope.dim, int(rope.interleaved))
        self.step(Op.ROPE, x, self.out(i, node, node.inputs[0]), turned, numbers=numbers)

    def rotation(self, rope: Rope, one: bool) -> Layout:
        """Cosines and sines of a pass, made once for all layers that rotate alike."""
        key = (turn(rope), one)
        if key not in self.rotations:
            out = whole(Buffer(rope.dim, one), 1, rope.dim)
            self.step(Op.ROTATION, out, weights=(self.turns[turn(rope)],), reals=(amplitude(rope),))
            self.rotations[key] = out
        return self.rotations[key]

    def lower_temperature(self, i: int, node: Node) -> None:
        t = node.attrs["temperature"]
        self.simple(i, node, Op.TEMPERATURE, numbers=(t.floor,), reals=(t.scale,))

    def lower_append(self, i: int, node: Node) -> None:
        self.cached(node, self.source(node.inputs[0]), self.source(node.inputs[1]))

    def lower_append_latent(self, i: int, node: Node) -> None:
        self.cached(node, self.source(node.inputs[0]))

    def cached(self, node: Node, *views: Layout) -> None:
        """Keys and values go to the next cache."""
        self.caches[node.output] = len(self.layers)
        self.step(Op.APPEND, *views, numbers=(len(self.layers),))
        self.layers.append(node.attrs["layer"])

    def lower_attention(self, i: int, node: Node) -> None:
        q, kv = self.source(node.inputs[0]), str(node.inputs[1])
        heads, values = self.values.dims[kv]
        out = reshaped(self.out(i, node), q.n, values)
        cache = self.caches[kv]
        assert q.n % heads == 0, f"{q.n} heads over {heads}"
        # No place, but what its size depends on.
        scratch = Layout(Buffer(0, True, SCRATCH), cache, q.n, 0, values)
        numbers = (cache, node.attrs["window"] or 0, node.attrs["chunk"] or 0)
        self.step(Op.ATTENTION, q, out, scratch, numbers=numbers, reals=(node.attrs["scale"],))

    def lower_route(self, i: int, node: Node) -> None:
        logits, *bias = node.inputs
        r, places = node.attrs["router"], tuple(self.table[str(b)] for b in bias)
        numbers = (node.attrs["active"], int(r.score == "sigmoid"), int(r.normalized), r.groups, r.active_groups)
        x = self.source(logits)
        self.step(Op.ROUTE, x, self.out(i, node), weights=places, numbers=numbers, reals=(r.scale,))

    def lower_experts(self, i: int, node: Node) -> None:
        spec, (x, weights, *names) = node.attrs["spec"], node.inputs
        wide, narrow = (self.kind(str(names[k])) in QUANTIZED for k in (0, 2))
        floats = experts_scratch(int(node.shape[1]), spec.width, spec.active, spec.experts, wide, narrow)
        scratch = whole(Buffer(floats, node.shape[0] == 1), 1, floats)
        views = (self.source(x), self.source(weights), self.out(i, node), scratch)
        numbers = (spec.active, ACTIVATIONS[spec.activation], int(spec.router.on_input))
        self.step(Op.EXPERTS, *views, weights=tuple(self.table[str(n)] for n in names), numbers=numbers)

    def lower_activation(self, i: int, node: Node) -> None:
        self.simple(i, node, Op.ACTIVATION, numbers=(self.activation(node),))

    lower_tanh = lower_activation

    def activation(self, node: Node) -> Activation:
        return ACTIVATIONS[node.attrs.get("kind", node.op)]

    def lower_gaussian_topk(self, i: int, node: Node) -> None:
        self.simple(i, node, Op.GAUSSIAN_TOPK, reals=(node.attrs["cut"],))

    def lower_add(self, i: int, node: Node) -> None:
        a, b = node.inputs
        if b in self.values.fused:
            a, b = b, a
        first = Activation.NONE
        if a in self.values.fused:
            held = self.values.fused[str(a)]
            a, first = held.inputs[0], self.activation(held)
        assert a in self.values.key, f"{node.op} of {a} and another"
        if b in self.values.key:
            self.both(i, node, str(a), str(b), first)
        elif isinstance(b, str):
            self.vector(i, node, str(a), b, first)
        else:
            x, numbers = self.source(a), (OPERATIONS[node.op], 1, first)
            self.step(Op.BINARY, x, None, self.out(i, node, a), numbers=numbers, reals=(b,))

    lower_sub = lower_mul = lower_div = lower_add

    def both(self, i: int, node: Node, a: str, b: str, first: Activation) -> None:
        """Arithmetic of two values: what repeats along m is the second, where there is a choice."""
        x, y = (spread(self.source(name), *self.values.dims[node.output]) for name in (a, b))
        if x.unit == 0 and y.unit == 1 and not first and node.op in ("add", "mul"):
            a, b, x, y = b, a, y, x
        self.step(Op.BINARY, x, y, self.out(i, node, a, b), numbers=(OPERATIONS[node.op], 0, first))

    def vector(self, i: int, node: Node, a: str, b: str, first: Activation) -> None:
        """Arithmetic of a value and a weight, of which there is one for each of m, or one for all."""
        shape = self.graph.weights[b]
        assert len(shape) == 1, f"{node.op} of a matrix"
        x = self.source(a)
        out = self.out(i, node, a)
        if shape[0] != x.m:
            # Rows of one value each: a vector is as long as a row.
            assert shape[0] == x.n == out.n == 1, f"{node.op} of {x.m} and {shape[0]}"
            x, out = (Layout(v.buffer, v.at, v.m, 1, 1) for v in (x, out))
        self.step(Op.BINARY, x, None, out, weights=(self.table[b],), numbers=(OPERATIONS[node.op], 2, first))

    def lower_last(self, i: int, node: Node) -> None:
        source = self.source(node.inputs[0])
        self.step(Op.COPY, source, self.out(i, node))

    def lower_reshape(self, i: int, node: Node) -> None:
        """One that is no view."""
        source = self.source(node.inputs[0])
        out = self.out(i, node)
        flat = reshaped(out, source.n, source.m)
        assert flat is not None, f"reshape to {node.shape}"
        self.step(Op.COPY, source, flat)

    def lower_concat(self, i: int, node: Node) -> None:
        """Pieces that do not lie where they belong are copied there."""
        sources = [self.source(x) for x in node.inputs]
        for source, to in zip(sources, self.gathered(node, sources), strict=True):
            if source != to:
                self.step(Op.COPY, source, to)


def quant_floats(m: int) -> int:
    """Floats of m quantized values."""
    return -(-m // BLOCK) * QUANT_FLOATS


def experts_scratch(dim: int, width: int, active: int, experts: int, wide: bool, narrow: bool) -> int:
    """Floats of EXPERTS' scratch for a token; ``wide``, ``narrow``: whether inputs of dim, of width are quantized."""
    inputs = quant_floats(dim) if wide else dim
    inner = quant_floats(width) if narrow else width
    return active * (inputs + 2 * width + inner + dim) + 4 * experts + 64
