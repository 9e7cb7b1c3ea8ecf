"""Profile ``standard``: operators of ONNX itself, opset 23, for any runtime that has them.

Keys and values of earlier tokens go in and come out longer. Who sees whom is a mask of booleans, made once a pass for
all layers that see alike. Blocks of int8 and int4 are dequantized in the layout that ONNX Runtime fuses with the
product behind it: codes [in, out] in blocks along the first axis. It fuses int4 since 1.23, int8 since 1.25.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from onnx import GraphProto, TensorProto, helper

from export.builder import BOOL, FLOAT, FLOAT16, INT64
from export.lowering import END, Choices, Lowering, View
from loaders.errors import Unsupported
from loaders.formats.contract import CacheSpec
from loaders.formats.quant import BITS, BLOCK, block_count
from loaders.network.graph import TOKENS, Graph, Node
from loaders.network.spec import Activation, Experts, Model, Rope

CODES = {"int8": TensorProto.INT8, "int4": TensorProto.INT4}
# What the codes of a row have been raised by to be unsigned.
RAISED = {"int8": 128.0, "int4": 8.0}


@dataclass(frozen=True)
class Sight:
    """Which keys a query sees, and of how many tokens caches keep for that: layers that agree share a mask."""

    window: int | None
    chunk: int | None

    @property
    def span(self) -> int | None:
        """Tokens after which a cache stops growing."""
        return self.window if self.window is not None else self.chunk

    @property
    def kept(self) -> str:
        """What the graph calls the number of tokens in such a cache."""
        return "" if self.span is None else f"_{self.span}"


@dataclass
class Handle:
    """Keys and values of a layer. ``new``: this pass's, [batch, tokens, heads * dim]. ``whole``: all that the pass may
    see, [batch, heads, tokens, dim], once the layer's own attention has put them together; a latent has keys alone.
    """

    cache: CacheSpec
    sight: Sight
    new: tuple[str, ...]
    whole: tuple[str, ...] = ()


class StandardLowering(Lowering):
    """Attention, RMSNormalization, RotaryEmbedding, DequantizeLinear, and a Loop over the experts that were chosen."""

    profile: ClassVar[str] = "standard"
    opset: ClassVar[int] = 23
    oldest: ClassVar[str] = "1.23"

    def __init__(self, model: Model, graph: Graph, choices: Choices) -> None:
        super().__init__(model, graph, choices)
        self.handles: dict[str, Handle] = {}

    # Products

    def lower_embed(self, node: Node) -> None:
        name, ids = str(node.inputs[0]), self.get(node.inputs[1])
        stored, shape = self.stored(name), self.graph.weights[name]
        multiplied = any(n.op == "linear" and n.inputs[1] == name for n in self.graph.nodes)
        if stored == "int8" and multiplied:
            self.bind(node, self.columns(name, ids))
        elif stored in BITS:
            self.bind(node, self.rows(name, ids, stored))
        else:
            half = stored == "F16"
            label, kind = (f"{name}.half", FLOAT16) if half else (name, FLOAT)
            found = self.b.node("Gather", (self.b.weight(label, kind, shape, "values", name), ids), axis=0)
            self.bind(node, self.b.node("Cast", (found,), to=FLOAT) if half else found)

    def columns(self, name: str, ids: str) -> str:
        """Rows of a table that is there for a product, turned: its columns. They have names of their own, for one place
        in the file: ONNX Runtime does not fuse a product of what others read too.
        """
        pair = [self.b.node("Gather", (x, ids), axis=1) for x in self.turned(name, "int8", f"{name}.columns")]
        values = self.b.node("Transpose", (self.dequantized(*pair),), perm=(1, 0))
        return self.first(values, self.graph.weights[name][1], 1)

    def rows(self, name: str, ids: str, stored: str) -> str:
        """Rows of a table of unsigned codes: no runtime has to gather nibbles. float32 [n, dim]."""
        b, (rows, dim) = self.b, self.graph.weights[name]
        blocks, bits = block_count(dim), BITS[stored]
        codes = b.weight(f"{name}.rows", TensorProto.UINT8, (rows, blocks, BLOCK * bits // 8), "codes", name)
        scales = b.weight(f"{name}.row_scales", FLOAT, (rows, blocks, 1), "scales", name)
        found = b.node("Gather", (codes, ids), axis=0)
        if stored == "int4":
            low = b.node("BitwiseAnd", (found, b.constant(15, np.uint8)))
            high = b.node("BitShift", (found, b.constant(4, np.uint8)), direction="RIGHT")
            both = [b.node("Unsqueeze", (x, b.ints(-1))) for x in (low, high)]
            found = b.node("Reshape", (b.node("Concat", both, axis=-1), b.ints(-1, blocks, BLOCK)))
        centred = b.node("Sub", (b.node("Cast", (found,), to=FLOAT), b.floats(RAISED[stored])))
        values = b.node("Mul", (centred, b.node("Gather", (scales, ids), axis=0)))
        return self.first(b.node("Reshape", (values, b.ints(-1, blocks * BLOCK))), dim, 1)

    def first(self, x: str, count: int, axis: int) -> str:
        """The first ``count`` of an axis that fills up blocks."""
        if count % BLOCK == 0:
            return x
        return self.b.node("Slice", (x, self.b.ints(0), self.b.ints(count), self.b.ints(axis)))

    def turned(self, name: str, stored: str, label: str = "") -> tuple[str, str]:
        """Codes [.., in, out], the last block filled up, and scales [.., blocks, out]."""
        *stack, rows, cols = self.graph.weights[name]
        blocks = block_count(cols)
        label, shape = label or name, (*stack, blocks * BLOCK, rows)
        codes = self.b.weight(f"{label}.codes", CODES[stored], shape, "turned.codes", name)
        return codes, self.b.weight(f"{label}.scales", FLOAT, (*stack, blocks, rows), "turned.scales", name)

    def dequantized(self, codes: str, scales: str) -> str:
        """Float32 [in, out]."""
        return self.b.node("DequantizeLinear", (codes, scales), axis=0, block_size=BLOCK)

    def filled(self, x: str, cols: int) -> str:
        """x [n, cols] with the columns of whole blocks: zeros, as their codes are."""
        missing = -cols % BLOCK
        return self.b.node("Pad", (x, self.b.ints(0, missing), "", self.b.ints(1))) if missing else x

    def lower_linear(self, node: Node) -> None:
        source, name = (str(x) for x in node.inputs)
        rows, cols = self.graph.weights[name]
        stored, x = self.stored(name), self.flat(source, cols)
        if stored == "F16":
            out = self.half_product(x, name)
        elif stored in BITS:
            key = ("filled", x)
            if key not in self.memo:
                self.memo[key] = self.filled(x, cols)
            out = self.b.node("MatMul", (self.memo[key], self.dequantized(*self.turned(name, stored))))
            if stored == "int8":
                # Right before, but not fused: a whole matrix would be expanded for every product.
                self.needs("1.25")
        else:
            weight = self.b.weight(name, FLOAT, (rows, cols), "values", name)
            out = self.b.node("Gemm", (x, weight), transB=1)
        self.bind(node, out, (TOKENS, rows))

    def lower_activation(self, node: Node) -> None:
        self.bind(node, self.activated(self.get(node.inputs[0]), node.attrs["kind"]))

    def activated(self, x: str, kind: Activation) -> str:
        """Element by element."""
        if kind == "silu":
            return self.b.node("Mul", (x, self.b.node("Sigmoid", (x,))))
        return self.b.node("Gelu", (x,), approximate="tanh")

    def lower_norm(self, node: Node) -> None:
        x, size = self.get(node.inputs[0]), int(node.shape[-1])
        weight = self.weight(str(node.inputs[1])) if len(node.inputs) > 1 else self.b.floats(np.ones(size))
        attrs: dict[str, Any] = {"axis": -1, "epsilon": node.attrs["eps"], "stash_type": 1}
        self.bind(node, self.b.node("RMSNormalization", (x, weight), **attrs))

    # Positions

    def lower_rope(self, node: Node) -> None:
        source, positions = (str(x) for x in node.inputs)
        rope: Rope = node.attrs["rope"]
        heads, dim = (int(d) for d in node.shape[1:])
        key = ("turns", positions, rope)
        if (*key, 0) not in self.memo:
            for i, values in enumerate(self.rotation(positions, rope)):
                self.memo[(*key, i)] = self.b.node("Reshape", (values, self.by_batch((rope.dim // 2,))))
        attrs: dict[str, Any] = {"interleaved": int(rope.interleaved), "num_heads": heads}
        if rope.dim != dim:
            attrs["rotary_embedding_dim"] = rope.dim
        inputs = (self.by_token(source, heads * dim), self.memo[(*key, 0)], self.memo[(*key, 1)])
        out = self.b.node("RotaryEmbedding", inputs, **attrs)
        self.values[node.output] = View(out, ("b", TOKENS, heads * dim), node.shape)

    # Attention and its cache

    def lower_append(self, node: Node) -> None:
        heads, dim = (int(d) for d in node.shape[1:])
        # Of a context that the window does not leave, everything is seen.
        window, chunk = (n if n is None or n < self.choices.context else None for n in self.reach(node))
        new = tuple(self.cast(self.by_token(str(x), heads * dim)) for x in node.inputs)
        self.handles[node.output] = self.handle(node, heads, dim, dim, Sight(window, chunk), new)

    def reach(self, node: Node) -> tuple[int | None, int | None]:
        """Window and chunk as the layer has them."""
        return node.attrs["window"], node.attrs["chunk"]

    def lower_append_latent(self, node: Node) -> None:
        entry = str(node.inputs[0])
        size = int(self.values[entry].shape[-1])
        new = (self.cast(self.by_token(entry, size)),)
        self.handles[node.output] = self.handle(node, 1, size, node.attrs["rank"], Sight(None, None), new)

    def handle(self, node: Node, heads: int, dim: int, value_dim: int, sight: Sight, new: tuple[str, ...]) -> Handle:
        """Declares past and present of a layer: as many of each as ``new`` are."""
        i, kinds = len(self.caches), ("key", "value")[: len(new)]
        inputs = tuple(f"past_key_values.{i}.{kind}" for kind in kinds)
        outputs = tuple(f"present.{i}.{kind}" for kind in kinds)
        for name in inputs:
            self.b.input(name, self.choices.cached, ("batch", heads, f"past{sight.kept}", dim))
        for name in outputs:
            self.b.output(name, self.choices.cached, ("batch", heads, f"present{sight.kept}", dim))
        dtype = "float16" if self.choices.half else "float32"
        spec = CacheSpec(node.attrs["layer"], "growing", inputs, outputs, heads, dim, value_dim, dtype, sight.span)
        self.caches.append(spec)
        return Handle(spec, sight, new)

    def lower_attention(self, node: Node) -> None:
        q, kv = (str(x) for x in node.inputs[:2])
        handle, heads = self.handles[kv], int(self.values[q].shape[1])
        mask = self.mask_for(handle, cut=node.shape[0] != TOKENS)
        if 1 < handle.cache.heads < heads:
            # 1.23.0 gives queries the keys of other groups.
            self.needs("1.24")
        if len(handle.new) == 1 or handle.whole:
            self.attend(node, q, handle, mask)
            return
        cache = handle.cache
        whole = cache.outputs if cache.span is None else tuple(f"{name}.whole" for name in cache.outputs)
        inputs = (self.cast(self.by_token(q, heads * cache.dim)), *handle.new, mask, *cache.inputs)
        attrs = {"q_num_heads": heads, "kv_num_heads": cache.heads, "scale": node.attrs["scale"]}
        outputs = (self.b.fresh("Attention"), *whole)
        out = self.b.nodes_with("Attention", inputs, outputs, **attrs)[0]
        handle.whole = whole
        self.trim(handle)
        self.values[node.output] = View(self.wide(out), ("b", TOKENS, heads * cache.value_dim), node.shape)

    def attend(self, node: Node, q: str, handle: Handle, mask: str) -> None:
        """Attention over keys that are together already, or over latents, whose first values are the values."""
        b, cache, heads = self.b, handle.cache, int(self.values[q].shape[1])
        if not handle.whole:
            new = b.node("Unsqueeze", (handle.new[0], b.ints(1)))
            handle.whole = (b.node("Concat", (cache.inputs[0], new), name=cache.outputs[0], axis=2),)
        keys, values = handle.whole[0], handle.whole[-1]
        if keys == values:
            values = b.node("Slice", (keys, b.ints(0), b.ints(cache.value_dim), b.ints(3)))
        split = b.node("Reshape", (self.values[q].name, self.by_batch((heads, cache.dim))))
        turned = self.cast(b.node("Transpose", (split,), perm=(0, 2, 1, 3)))
        out = b.node("Attention", (turned, keys, values, mask), scale=node.attrs["scale"])
        out = b.node("Transpose", (self.wide(out),), perm=(0, 2, 1, 3))
        self.values[node.output] = View(out, ("b", TOKENS, heads, cache.value_dim), node.shape)

    def wide(self, x: str) -> str:
        """What attention gives, as float32."""
        return self.b.node("Cast", (x,), to=FLOAT) if self.choices.half else x

    def trim(self, handle: Handle) -> None:
        """Lets go of tokens that no later one will see: a window holds the query itself too."""
        span, b = handle.cache.span, self.b
        if span is not None:
            start = b.ints(1 - span if span > 1 else END)
            for whole, name in zip(handle.whole, handle.cache.outputs, strict=True):
                b.node("Slice", (whole, start, b.ints(END), b.ints(2)), name=name)

    # Who sees whom

    def mask_for(self, handle: Handle, *, cut: bool) -> str:
        """Booleans [batch, 1, queries, keys]. ``cut``: queries are those whose logits are wanted, alone."""
        key = ("mask", handle.sight)
        if key not in self.memo:
            self.memo[key] = self.mask_over(handle)
        if not cut:
            return self.memo[key]
        if (*key, "cut") not in self.memo:
            queries = self.last_of(self.b.node("Squeeze", (self.memo[key], self.b.ints(1))))
            self.memo[(*key, "cut")] = self.b.node("Unsqueeze", (queries, self.b.ints(1)))
        return self.memo[(*key, "cut")]

    def mask_over(self, handle: Handle) -> str:
        """Keys up to the query's, within its window and its chunk, and of tokens that are none but padding."""
        b, sight = self.b, handle.sight
        total, past, queries = self.numbers()
        held = b.node("Shape", (handle.cache.inputs[0],), start=2, end=3)
        first = b.node("Sub", (past, held))
        keys = b.node("Range", (self.scalar(first), self.scalar(total), b.constant(1, np.int64)))
        seen = b.node("LessOrEqual", (keys, queries))
        if sight.window is not None:
            far = b.node("Sub", (queries, b.constant(sight.window, np.int64)))
            seen = b.node("And", (seen, b.node("Greater", (keys, far))))
        if sight.chunk is not None:
            seen = b.node("And", (seen, self.same_chunk(queries, keys, sight.chunk)))
        real = b.node("Slice", (self.mask, first, b.ints(END), b.ints(1)))
        real = b.node("Unsqueeze", (b.node("Cast", (real,), to=BOOL), b.ints(1, 2)))
        # Padding sees itself: of no keys at all the mean is not a number, and it would be a key of later layers.
        return b.node("And", (seen, b.node("Or", (real, b.node("Equal", (keys, queries))))))

    def numbers(self) -> tuple[str, str, str]:
        """Tokens altogether and before this pass, int64 [1]; places of this pass's tokens, int64 [tokens, 1]."""
        if "numbers" not in self.memo:
            b, memo = self.b, self.memo
            memo["total"] = b.node("Shape", (self.mask,), start=1, end=2)
            memo["past"] = b.node("Sub", (memo["total"], b.node("Shape", (self.ids,), start=1, end=2)))
            ends = (self.scalar(memo["past"]), self.scalar(memo["total"]), b.constant(1, np.int64))
            memo["numbers"] = b.node("Unsqueeze", (b.node("Range", ends), b.ints(1)))
        return self.memo["total"], self.memo["past"], self.memo["numbers"]

    def scalar(self, x: str) -> str:
        """A vector of one number as that number."""
        return self.b.node("Squeeze", (x,))

    def same_chunk(self, queries: str, keys: str, chunk: int) -> str:
        """Booleans [batch, 1, queries, keys]. Chunks count from a sequence's first token, not from its padding."""
        b, size = self.b, self.b.constant(chunk, np.int64)
        start = b.node("ArgMax", (self.mask,), axis=1, keepdims=1)
        start = b.node("Unsqueeze", (start, b.ints(1, 2)))
        pieces = [b.node("Div", (b.node("Sub", (x, start)), size)) for x in (queries, keys)]
        return b.node("Equal", pieces)

    # Experts

    def lower_experts(self, node: Node) -> None:
        x, weights = self.get(node.inputs[0]), self.get(node.inputs[1])
        names = [str(name) for name in node.inputs[2:]]
        spec: Experts = node.attrs["spec"]
        if any(self.stored(name) == "int4" for name in names):
            raise Unsupported(
                "experts of int4 in profile standard", field="--precision", expected="int8 or float32",
                hint="Export with --profile ort, which has an operator for them",
            )  # fmt: skip
        if spec.router.on_input:
            x, weights = self.on_input(x, weights, spec)
        b = self.b
        most = b.node("ReduceMax", (weights, b.ints(0)), keepdims=0)
        chosen = b.node("Squeeze", (b.node("NonZero", (most,)), b.ints(0)))
        none = b.node("ConstantOfShape", (b.node("Shape", (x,)),))
        body = self.one_expert(x, weights, chosen, names, spec)
        self.bind(node, b.node("Loop", (b.node("Size", (chosen,)), "", none), body=body))

    def one_expert(self, x: str, weights: str, chosen: str, names: list[str], spec: Experts) -> GraphProto:
        """What a step of the loop does: one expert's matrices, for all tokens that chose it, added to the sum."""
        b, outside, scope = self.b, self.b.nodes, self.b.scope
        b.nodes, b.scope = [], f"{names[0].rpartition('.')[0]}.body."
        step, go, total = (f"{b.scope}{name}" for name in ("step", "go", "sum"))
        expert = b.node("Gather", (chosen, step), axis=0)
        shares = b.node("Gather", (weights, expert), axis=1)
        where = b.node("NonZero", (shares,))
        tokens = b.node("Squeeze", (where, b.ints(0)))
        mine = b.node("Gather", (x, tokens), axis=0)
        gate, up = (self.expert_product(mine, name, expert) for name in names[:2])
        hidden = b.node("Mul", (self.activated(gate, spec.activation), up))
        share = b.node("Unsqueeze", (b.node("Gather", (shares, tokens), axis=0), b.ints(1)))
        out = b.node("Mul", (self.expert_product(hidden, names[2], expert), share))
        inputs = (total, b.node("Transpose", (where,), perm=(1, 0)), out)
        added = b.node("ScatterND", inputs, reduction="add")
        on = b.node("Identity", (go,))
        size = self.spec.dim
        info = helper.make_tensor_value_info
        takes = [info(step, INT64, []), info(go, BOOL, []), info(total, FLOAT, [None, size])]
        gives = [info(on, BOOL, []), info(added, FLOAT, [None, size])]
        body = helper.make_graph(b.nodes, f"{b.scope}expert", takes, gives)
        b.nodes, b.scope = outside, scope
        return body

    def expert_product(self, x: str, name: str, expert: str) -> str:
        """x [n, in] times one expert's matrix of a stack, the only one that is touched."""
        experts, rows, cols = self.graph.weights[name]
        stored, b = self.stored(name), self.b
        if stored in BITS:
            pair = [b.node("Gather", (stack, expert), axis=0) for stack in self.turned(name, stored)]
            return b.node("MatMul", (self.filled(x, cols), self.dequantized(*pair)))
        half = stored == "F16"
        stack = b.weight(name, FLOAT16 if half else FLOAT, (experts, cols, rows), "turned", name)
        weight = b.node("Gather", (stack, expert), axis=0)
        return b.node("MatMul", (x, b.node("Cast", (weight,), to=FLOAT) if half else weight))
