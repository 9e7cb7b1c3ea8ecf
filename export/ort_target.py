"""Profile ``ort``: what ONNX Runtime has fused forms for, opset 21 and com.microsoft.

Attention and cache are one GroupQueryAttention. Keys and values are written in place where one buffer is bound to past
and present; a sliding layer keeps a window of them, unless others read it; a latent layer is multi-query attention over
one buffer that is keys and values in one (arXiv 2405.04434). Facts about operators were measured on their kernels.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from export.builder import FLOAT, FLOAT16, INT32, MICROSOFT
from export.lowering import LOWEST, Choices, Lowering, View
from export.rewrite import uncut
from export.shared_attention import shared_attention
from export.weights import Band
from loaders.errors import Unsupported
from loaders.formats.contract import CacheSpec
from loaders.formats.quant import BITS, BLOCK, block_count
from loaders.network.graph import TOKENS, Graph, Node
from loaders.network.spec import Experts, Model, Rope

# The least whose softmax is taken in place of a weight of zero.
LEAST = 1e-30
UINT8 = 2
# GroupQueryAttention takes heads of a multiple of so many values.
WHOLE = 8
# A kernel packs a matrix while it still holds it: larger ones are multiplied by bands of whole groups of rows.
MOST, EVEN = 64 << 20, 64


def band_rows(rows: int, row: int) -> int:
    """Rows of a band: all, or equal shares of at most MOST bytes each, ``row`` bytes a row."""
    count = -(-rows * row // MOST)
    return -(-rows // (count * EVEN)) * EVEN


def padded(size: int) -> int:
    """The smallest head that holds ``size`` values."""
    return -(-size // WHOLE) * WHOLE


class OrtLowering(Lowering):
    """com.microsoft's GroupQueryAttention, MatMulNBits, QMoE, RotaryEmbedding and norms."""

    profile: ClassVar[str] = "ort"
    opset: ClassVar[int] = 21
    oldest: ClassVar[str] = "1.22"

    def __init__(self, model: Model, graph: Graph, choices: Choices) -> None:
        super().__init__(model, uncut(graph), choices)
        # Of each handle on a cache: what the layer's own attention appends, None once that is done.
        self.fresh: dict[str, tuple[str, str] | None] = {}
        self.cache_of: dict[str, CacheSpec] = {}
        # Sums that the norm which reads them first computes.
        self.pending: dict[str, Node] = {}
        # Of latent ones, how much of a value counts.
        self.ranks: dict[str, int] = {}
        # The window and the chunk that its queries are held to.
        self.spans: dict[str, tuple[int | None, int | None]] = {}
        self.donors = {
            name for name, nodes in self.uses.items() if sum(n.op == "attention" for n in nodes) > 1 and nodes
        }

    # Products

    def lower_embed(self, node: Node) -> None:
        name, ids = str(node.inputs[0]), self.get(node.inputs[1])
        stored = self.stored(name)
        rows, dim = self.graph.weights[name]
        if stored not in BITS:
            kind = FLOAT16 if stored == "F16" else FLOAT
            table = self.b.weight(f"{name}.half" if stored == "F16" else name, kind, (rows, dim), "values", name)
            found = self.b.node("Gather", (table, ids), axis=0)
            self.bind(node, self.b.node("Cast", (found,), to=FLOAT) if stored == "F16" else found)
            return
        blocks = block_count(dim)
        codes = self.b.weight(f"{name}.rows", UINT8, (rows, blocks * BLOCK * BITS[stored] // 8), "codes", name)
        scales = self.b.weight(f"{name}.scales", FLOAT, (rows, blocks), "scales", name)
        self.needs("1.23")  # before, rows had other codes
        attrs = {"bits": BITS[stored], "block_size": BLOCK, "gather_axis": 0, "quantize_axis": 1}
        found = self.b.node("GatherBlockQuantized", (codes, ids, scales), domain=MICROSOFT, **attrs)
        if dim % BLOCK:
            found = self.b.node("Slice", (found, self.b.ints(0), self.b.ints(dim), self.b.ints(1)))
        self.bind(node, found)

    def lower_linear(self, node: Node) -> None:
        source, name = (str(x) for x in node.inputs)
        rows, cols = self.graph.weights[name]
        stored = self.stored(name)
        x = self.flat(source, cols)
        out = self.half_product(x, name) if stored == "F16" else None
        if stored in BITS:
            out = self.quantized_product(x, name, rows, cols, stored)
        elif out is None:
            weight = self.b.weight(name, FLOAT, (rows, cols), "values", name)
            out = self.b.node("Gemm", (x, weight), transB=1)
        self.bind(node, out, ("t", rows))

    def quantized_product(self, x: str, name: str, rows: int, cols: int, stored: str) -> str:
        """x float32 [n, in] times blocks of int8 or int4, by bands of rows where there are many."""
        step = band_rows(rows, block_count(cols) * BLOCK * BITS[stored] // 8)
        if step >= rows:
            return self.band_product(x, name, rows, cols, stored, None)
        bands = [Band(first, min(first + step, rows), rows) for first in range(0, rows, step)]
        return self.b.node("Concat", [self.band_product(x, name, rows, cols, stored, band) for band in bands], axis=1)

    def band_product(self, x: str, name: str, rows: int, cols: int, stored: str, band: Band | None) -> str:
        """x times some rows of a matrix, or all."""
        bits, blocks = BITS[stored], block_count(cols)
        label = name if band is None else f"{name}.{band.first}"
        rows = rows if band is None else band.stop - band.first
        codes = self.b.weight(f"{label}.codes", UINT8, (rows, blocks, BLOCK * bits // 8), "codes", name, band=band)
        scales = self.b.weight(f"{label}.scales", FLOAT, (rows, blocks), "scales", name, band=band)
        attrs = {"K": cols, "N": rows, "bits": bits, "block_size": BLOCK}
        attrs["accuracy_level"] = self.choices.accuracy_level
        return self.b.node("MatMulNBits", (x, codes, scales), domain=MICROSOFT, **attrs)

    def lower_activation(self, node: Node) -> None:
        x = self.get(node.inputs[0])
        if node.attrs["kind"] == "silu":
            self.bind(node, self.b.node("QuickGelu", (x,), domain=MICROSOFT, alpha=1.0))
        else:
            self.bind(node, self.b.node("Gelu", (x,), approximate="tanh"))

    # Norms

    def lower_add(self, node: Node) -> None:
        first = self.uses.get(node.output, [None])[0]
        rows = all(isinstance(x, str) and self.values.get(x) is not None for x in node.inputs)
        same = rows and all(self.values[str(x)].shape == node.shape for x in node.inputs)
        # The first to read a sum norms it: one operator does both.
        if same and len(node.shape) == 2 and first is not None and first.op == "norm" and len(first.inputs) == 2:
            self.pending[node.output] = node
        else:
            super().lower_add(node)

    def lower_norm(self, node: Node) -> None:
        source = str(node.inputs[0])
        size = int(node.shape[-1])
        weight = self.weight(str(node.inputs[1])) if len(node.inputs) > 1 else self.b.floats(np.ones(size))
        if source in self.values:
            attrs = {"axis": -1, "epsilon": node.attrs["eps"], "stash_type": 1}
            self.bind(node, self.b.node("SimplifiedLayerNormalization", (self.get(source), weight), **attrs))
            return
        pending = self.pending[source]
        name = self.b.fresh("SkipNorm")
        outputs = (name, "", "", f"{name}.sum")
        inputs = [*(self.get(x) for x in pending.inputs), weight]
        self.b.nodes_with(
            "SkipSimplifiedLayerNormalization", inputs, outputs, domain=MICROSOFT, epsilon=node.attrs["eps"]
        )
        self.bind(pending, f"{name}.sum")
        self.bind(node, name)

    # Positions

    def lower_rope(self, node: Node) -> None:
        source, positions = (str(x) for x in node.inputs)
        rope: Rope = node.attrs["rope"]
        _, heads, dim = (int(d) if d != "t" else 0 for d in node.shape)
        cos, sin = self.rotation(positions, rope)
        attrs = {"interleaved": int(rope.interleaved), "num_heads": heads}
        if rope.dim != dim:
            attrs["rotary_embedding_dim"] = rope.dim
        x = self.by_token(source, heads * dim)
        out = self.b.node("RotaryEmbedding", (x, self.rows_of(positions), cos, sin), domain=MICROSOFT, **attrs)
        self.values[node.output] = View(out, ("b", "t", heads * dim), node.shape)

    def rows_of(self, positions: str) -> str:
        """Which row of a pass's rotations each token has, int64 [batch, tokens]."""
        key = ("rows", positions)
        if key not in self.memo:
            b = self.b
            count = b.node("Squeeze", (b.node("Shape", (self.get(positions),)),))
            rows = b.node("Range", (b.constant(0, np.int64), count, b.constant(1, np.int64)))
            self.memo[key] = b.node("Reshape", (rows, self.by_batch(())))
        return self.memo[key]

    # Attention and its cache

    def lengths(self) -> tuple[str, str]:
        """GroupQueryAttention's two ways of asking how many tokens there are: int32 [batch] less one, and the most."""
        if "lengths" not in self.memo:
            b = self.b
            total = b.node("ReduceSum", (self.mask, b.ints(1)), keepdims=0)
            less = b.node("Cast", (b.node("Sub", (total, b.ints(1))),), to=INT32)
            most = b.node("Cast", (b.node("Squeeze", (b.node("Shape", (self.mask,), start=1, end=2),)),), to=INT32)
            self.memo["lengths"], self.memo["less"], self.memo["most"] = "", less, most
        return self.memo["less"], self.memo["most"]

    def lower_append(self, node: Node) -> None:
        k, v = (str(x) for x in node.inputs)
        _, heads, dim = node.shape
        window, chunk = node.attrs["window"], node.attrs["chunk"]
        window = None if window is None or window >= self.choices.context else window
        chunk = None if chunk is None or chunk >= self.choices.context else chunk
        if int(dim) % WHOLE:
            expected, hint = f"a multiple of {WHOLE}", "Export with --profile standard"
            raise Unsupported(f"heads of {dim} values", field="attention", expected=expected, hint=hint)
        kept = window if self.windowed(node, window) else None
        self.cache(node, int(heads), int(dim), int(dim), "full" if kept is None else "window", kept)
        width = int(heads) * int(dim)
        self.fresh[node.output] = (self.cast(self.by_token(k, width)), self.cast(self.by_token(v, width)))
        self.spans[node.output] = (window, chunk)

    def windowed(self, node: Node, window: int | None) -> bool:
        """Whether a sliding layer's buffer holds a window alone: not where others read it, nor where a runtime has one
        size for all.
        """
        return (
            window is not None
            and node.output not in self.donors
            and not self.choices.growing
            and self.choices.layout == "edge"
        )

    def lower_append_latent(self, node: Node) -> None:
        entry, rank = str(node.inputs[0]), node.attrs["rank"]
        size = padded(int(self.values[entry].shape[-1]))
        alone = self.choices.layout == "edge"
        self.cache(node, 1, size, rank if alone else size, "latent" if alone else "full", None)
        self.ranks[node.output] = rank
        new = self.cast(self.wide(entry, 1, size))
        self.fresh[node.output] = (new, new)
        self.spans[node.output] = (None, None)

    def wide(self, name: str, heads: int, size: int) -> str:
        """A value [n, heads * dim] as [batch, tokens, heads * size], each head filled up with zeros: they add nothing
        to a score, and what they add to a sum is cut off.
        """
        view = self.values[name]
        missing = size - int(view.shape[-1])
        if not missing:
            return self.by_token(name, heads * size)
        x = self.b.node("Pad", (self.get(name), self.b.ints(0, missing), "", self.b.ints(-1)))
        return self.b.node("Reshape", (x, self.by_batch((heads * size,))))

    def cache(self, node: Node, heads: int, dim: int, value_dim: int, kind: str, span: int | None) -> None:
        """Declares past and present of a handle's layer."""
        i = len(self.caches)
        inputs = (f"past_key_values.{i}.key", f"past_key_values.{i}.value")
        outputs = (f"present.{i}.key", f"present.{i}.value")
        if self.choices.growing:
            kind = "growing"
        past, present = (f"past_{i}", f"present_{i}") if span or self.choices.growing else ("past", "present")
        for name in inputs:
            self.b.input(name, self.choices.cached, ("batch", heads, past, dim))
        for name in outputs:
            self.b.output(name, self.choices.cached, ("batch", heads, present, dim))
        dtype = "float16" if self.choices.half else "float32"
        spec = CacheSpec(node.attrs["layer"], kind, inputs, outputs, heads, dim, value_dim, dtype, span)
        self.caches.append(spec)
        self.cache_of[node.output] = spec

    def lower_attention(self, node: Node) -> None:
        q, kv = str(node.inputs[0]), str(node.inputs[1])
        cache, new = self.cache_of[kv], self.fresh[kv]
        heads, dim = int(self.values[q].shape[1]), cache.dim
        if new is None and kv not in self.donors:
            raise Unsupported("a cache that is read twice", field="attention")
        out = self.attend(node, q, cache, new, heads, dim)
        self.fresh[kv] = None
        out = self.b.node("Cast", (out,), to=FLOAT) if self.choices.half else out
        if kv in self.ranks:
            whole = self.b.node("Reshape", (out, self.b.ints(-1, heads, dim)))
            ends = (self.b.ints(0), self.b.ints(self.ranks[kv]), self.b.ints(2))
            self.bind(node, self.b.node("Slice", (whole, *ends)), ("t", heads, self.ranks[kv]))
        else:
            self.values[node.output] = View(out, ("b", "t", heads * dim), node.shape)

    def attend(self, node: Node, q: str, cache: CacheSpec, new: tuple[str, str] | None, heads: int, dim: int) -> str:
        """The fused operator; without ``new`` keys it reads what an earlier layer left in this pass."""
        window, chunk = self.spans[str(node.inputs[1])]
        attrs = {"num_heads": heads, "kv_num_heads": cache.heads, "scale": node.attrs["scale"]}
        if window is not None:
            # Before, a window had one key more.
            self.needs("1.24")
            attrs["local_window_size"] = window
        if cache.kind == "window":
            self.needs("1.29")
            attrs["sliding_window_cache"] = 1
        if new is None and self.choices.layout == "web":
            cut = node.shape[0] != TOKENS
            return shared_attention(
                self, self.by_token(q, heads * dim), cache, heads, window=window, scale=node.attrs["scale"], cut=cut
            )
        if new is None:
            # From 1.27 on it is said to work; until 1.30 it reads where there is nothing, and crashes.
            self.needs("1.31")
        past, keys = (cache.inputs, new) if new is not None else (cache.outputs, self.nothing(cache))
        inputs = [self.cast(self.wide(q, heads, dim)), *keys, *past, *self.lengths()]
        if chunk is not None:
            inputs += ["", "", "", self.chunk_bias(str(node.inputs[2]), chunk)]
        outputs = (self.b.fresh("Attention"), *(cache.outputs if new is not None else ()))
        return self.b.nodes_with("GroupQueryAttention", inputs, outputs, domain=MICROSOFT, **attrs)[0]

    def nothing(self, cache: CacheSpec) -> tuple[str, str]:
        """No keys and values: [batch, 0, width]."""
        width = cache.heads * cache.dim
        key = ("nothing", width)
        if key not in self.memo:
            b = self.b
            shape = b.node("Concat", (self.batch, b.ints(0, width)), axis=0)
            zero = b.constant([0], np.float16 if self.choices.half else np.float32)
            self.memo[key] = b.node("Expand", (zero, shape))
        return self.memo[key], self.memo[key]

    def chunk_bias(self, positions: str, chunk: int) -> str:
        """What hides keys of other chunks, float32 [batch, 1, tokens, total]. Sequences begin at their first token."""
        key = ("chunk", positions, chunk)
        if key not in self.memo:
            b = self.b
            size = b.constant(chunk, np.int64)
            total = b.node("Squeeze", (b.node("Shape", (self.mask,), start=1, end=2),))
            keys = b.node("Range", (b.constant(0, np.int64), total, b.constant(1, np.int64)))
            mine = b.node("Reshape", (self.get(positions), self.by_batch((1,))))
            same = b.node("Equal", (b.node("Div", (mine, size)), b.node("Div", (keys, size))))
            bias = b.node("Where", (same, b.floats(0.0), b.floats(LOWEST)))
            bias = b.node("Unsqueeze", (bias, b.ints(1)))
            self.memo[key] = self.cast(bias)
        return self.memo[key]

    # Experts

    def lower_experts(self, node: Node) -> None:
        x, weights = self.get(node.inputs[0]), self.get(node.inputs[1])
        names = [str(name) for name in node.inputs[2:]]
        spec: Experts = node.attrs["spec"]
        if spec.activation != "silu":
            raise Unsupported(f"experts with {spec.activation}", field="experts", expected="silu")
        if spec.router.on_input:
            x, weights = self.on_input(x, weights, spec)
        kinds = {self.stored(name) for name in names}
        whole = all(self.graph.weights[name][-1] % BLOCK == 0 for name in names)
        attrs = {
            "k": spec.active, "activation_type": "swiglu", "activation_alpha": 1.0, "activation_beta": 0.0,
            "swiglu_fusion": 1,
        }  # fmt: skip
        if len(kinds) == 1 and kinds <= set(BITS) and whole:
            self.bind(node, self.quantized_experts(x, weights, names, spec, kinds.pop(), attrs))
        else:
            self.bind(node, self.float_experts(x, weights, names, spec, attrs))

    def quantized_experts(
        self, x: str, weights: str, names: list[str], spec: Experts, stored: str, attrs: dict[str, object]
    ) -> str:
        """QMoE: only the chosen experts are computed."""
        gate, up, down = names
        bits, dim = BITS[stored], self.spec.dim
        scope = gate.rsplit(".", 1)[0]

        def matrix(name: str, form: str, rows: int, cols: int, *sources: str) -> tuple[str, str]:
            tail = form.partition("codes")[2]
            codes = self.b.weight(f"{name}.codes", UINT8, (spec.experts, rows, cols * bits // 8), form, *sources)
            shape = (spec.experts, rows, cols // BLOCK)
            return codes, self.b.weight(f"{name}.scales", FLOAT, shape, f"scales{tail}", *sources)

        first = matrix(f"{scope}.gate_up", "codes.interleaved", 2 * spec.width, dim, gate, up)
        second = matrix(down, "codes", dim, spec.width, down)
        inputs = (x, weights, *first, "", *second, "", "", "", "", "", "", "", weights)
        self.needs("1.25")
        extra = {"expert_weight_bits": bits, "block_size": BLOCK, "normalize_routing_weights": 0}
        if stored == "int4" and self.choices.layout == "edge":
            # Without it weights are widened for each token: four times as slow, before 1.31 forty times.
            self.needs("1.31")
            extra["accuracy_level"] = self.choices.accuracy_level
        return self.b.node("QMoE", inputs, domain=MICROSOFT, **attrs, **extra)

    def float_experts(self, x: str, weights: str, names: list[str], spec: Experts, attrs: dict[str, object]) -> str:
        """MoE takes logits and makes weights of them by softmax: of logarithms it gives the weights over their sum."""
        gate, up, down = names
        b, dim, scope = self.b, self.spec.dim, gate.rsplit(".", 1)[0]
        first = b.weight(f"{scope}.gate_up", FLOAT, (spec.experts, 2 * spec.width, dim), "interleaved", gate, up)
        second = b.weight(down, FLOAT, (spec.experts, dim, spec.width), "values", down)
        # Of 1.23 the first release has no kernel for CPUs.
        self.needs("1.24")
        logits = b.node("Log", (b.node("Max", (weights, b.floats(LEAST))),))
        out = b.node("MoE", (x, logits, first, "", second), domain=MICROSOFT, normalize_routing_weights=1, **attrs)
        return b.node("Mul", (out, self.total(weights)))
