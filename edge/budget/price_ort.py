"""What a run of an exported package in ONNX Runtime costs in bytes: from the graph's nodes and its weights' shapes.

Figures are those of ONNX Runtime on x86: matrices are packed into memory of the library's own when a session is made,
and their pages in the file are let go; what no kernel packs is read where the file is mapped, and counts as it is
touched. Packed matrices that were baked into a file are the same bytes in another place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from loaders.formats.contract import CacheSpec, Contract
from loaders.formats.onnx_file import ATTRIBUTE, GRAPH, MODEL, NODE, External
from loaders.formats.package import Package
from loaders.formats.protobuf import Span, Wire
from loaders.formats.quant import BLOCK
from loaders.network.spec import AnyAttention, Experts, FeedForward, Gated, LatentAttention, Plain

FLOAT, FLOATS = 4, {"float32": 4, "float16": 2}
# What is read row by row, as the kernel maps it: at least so much for each row.
AROUND, PAGE = 64 << 10, 4 << 10
GATHERS = ("Gather", "GatherBlockQuantized")
PRODUCTS = ("MatMul", "Gemm")
DEQUANTIZE, CODES = "DequantizeLinear", {"int4": 4, "uint4": 4, "int8": 8, "uint8": 8}
# What turning such a weight round takes beside two copies of it.
REORDER = 4 << 20
DECISIVE = ("accuracy_level", "expert_weight_bits", "axis", "gather_axis")
# What the library keeps for each node: its kernel, its names, where its values go. Each weight costs a page more.
NODE_BYTES = 5600
# What a pass holds besides values of its tokens: blocks that the allocator keeps, packing of activations.
SCRATCH = 3 << 20
# Bytes per query and key while a mask of chunks is made.
MASKS = 8
# The accuracy level from which on activations are rounded to 8 bits, which is packed for.
INT8 = 4
# Slots that a window's buffer has beyond its window.
SPARE = 16


@dataclass(frozen=True)
class Use:
    """One node that reads a weight: its operator, which input the weight is, and those of its attributes that decide
    how it is packed.
    """

    op: str
    place: int
    attributes: Mapping[str, int]


def uses(graph: bytes, file: str) -> dict[str, list[Use]]:
    """Value -> the nodes of the main graph that read it."""
    wire, found = Wire(graph, file), dict[str, list[Use]]()
    for number, a, b in wire.fields((0, len(graph)), MODEL):
        if number != 7:
            continue
        for inner, c, d in wire.fields((a, b), GRAPH):
            if inner == 1:
                for name, use in read_node(wire, (c, d)):
                    found.setdefault(name, []).append(use)
    return found


def read_node(wire: Wire, span: Span) -> list[tuple[str, Use]]:
    """What one node reads, and how."""
    op, names, attributes = "", list[str](), dict[str, int]()
    for number, a, b in wire.fields(span, NODE):
        if number == 1:
            names.append(wire.text(a, b, NODE.name))
        elif number == 4:
            op = wire.text(a, b, NODE.name)
        elif number == 5:
            found = {n: (x, y) for n, x, y in wire.fields((a, b), ATTRIBUTE) if n in (1, 3)}
            name = wire.text(*found.get(1, (0, 0)), ATTRIBUTE.name)
            if name in DECISIVE and 3 in found:
                attributes[name] = found[3][0]
    return [(name, Use(op, place, attributes)) for place, name in enumerate(names)]


@dataclass(frozen=True)
class Held:
    """A weight as a session holds it. ``packed``: bytes in the library's own memory; ``mapped``: of the file, touched;
    ``rows``: bytes of a row where only rows are, 0 elsewhere; ``passing``: while it is packed, or used.
    """

    weight: External
    packed: int = 0
    mapped: int = 0
    rows: int = 0
    passing: int = 0
    experts: bool = False


def held(weight: External, readers: list[Use]) -> Held:
    """What a session makes of a weight."""
    ops = {use.op for use in readers}
    gathered = any(by_row(use) for use in readers)
    rows = weight.length // max(1, weight.dims[0]) if gathered and weight.dims else 0
    for use in readers:
        packed = packed_bytes(weight, use)
        if packed is not None:
            passing = packed if weight.dtype == "float16" else weight.length
            if use.op == DEQUANTIZE:
                passing = 2 * weight.length + REORDER
            elif (use.op, use.place) == ("MatMulNBits", 1):
                # Scales are copied on their way.
                passing += math.prod(weight.dims[:2]) * FLOAT
            return Held(weight, packed, rows=rows, passing=passing, experts=use.op == "QMoE")
    if rows and all(by_row(use) for use in readers):
        return Held(weight, rows=rows)
    if any(use.op == "MatMulNBits" and use.place == 1 for use in readers):
        # Widened as a whole, again and again.
        return Held(weight, mapped=weight.length, passing=weight.length * FLOAT)
    return Held(weight, mapped=pages(weight.length), experts=bool(ops & {"QMoE", "MoE"}))


def by_row(use: Use) -> bool:
    """Whether a node looks up rows of a weight, and touches no others."""
    axis = use.attributes.get("axis", 0) + use.attributes.get("gather_axis", 0)
    return use.op in GATHERS and use.place != 1 and axis == 0


def packed_bytes(weight: External, use: Use) -> int | None:
    """Bytes of a weight's packed form; None for what is read as it lies in the file."""
    fast = use.attributes.get("accuracy_level", 0) >= INT8
    place, dims = (use.op, use.place), weight.dims
    if place == ("MatMulNBits", 1) and len(dims) == 3:
        bits = dims[2] * 8 // BLOCK
        return in_blocks(weight.length * 8 // max(1, bits), bits) if fast else weight.length if bits == 4 else None
    if place in (("QMoE", 2), ("QMoE", 5)):
        bits = use.attributes.get("expert_weight_bits", 4)
        return in_blocks(weight.length * 8 // max(1, bits), bits) if fast or bits == 8 else weight.length
    if place == (DEQUANTIZE, 0) and len(dims) == 2 and weight.dtype in CODES:
        # What is dequantized to be multiplied is turned round, and then as above.
        return in_blocks(math.prod(dims), CODES[weight.dtype])
    return math.prod(dims) * FLOAT if use.op in PRODUCTS and use.place == 1 and len(dims) == 2 else None


def in_blocks(count: int, bits: int) -> int:
    """Bytes of ``count`` codes, with a scale and a sum of each block in float32."""
    return count * bits // 8 + 2 * FLOAT * count // BLOCK


def pages(length: int) -> int:
    """Whole pages."""
    return -(-length // PAGE) * PAGE


def capacity(cache: CacheSpec, context: int) -> int:
    """Tokens that the buffer of a cache is made for."""
    if cache.kind == "window" and cache.span is not None:
        return cache.span + min(SPARE, max(0, context - cache.span))
    return context


def cache_bytes(contract: Contract, context: int) -> int:
    """Of all caches. What grows is there twice while a pass turns its past into its present."""
    total = 0
    for cache in contract.caches:
        tokens = capacity(cache, context)
        if cache.kind == "growing" and cache.span is not None:
            tokens = min(tokens, cache.span)
        sides = (cache.dim, cache.value_dim)[: len(cache.inputs)] if cache.kind != "latent" else (cache.dim,)
        twice = 2 if cache.kind == "growing" else 1
        total += twice * tokens * cache.heads * sum(sides) * FLOATS[cache.dtype]
    return total


def activation_bytes(package: Package, chunk: int, context: int, kept: int = 1) -> int:
    """What a pass over ``chunk`` tokens holds at once, with the logits of the last ``kept``; every layer runs for all.

    GroupQueryAttention over float32 works in tiles; over float16, and Attention, write down all scores of a pass.
    """
    model = package.model
    naive = kept_in(package.contract) == "float16" or ("", "Attention") in package.onnx.operators
    streams = 2 * model.altup.streams if model.altup else 1 if len(model.layers[0].norms) < 3 else 2
    ple = len(model.layers) * model.ple.dim if model.ple else 0
    inner = masks = 0
    for _, _, layer in model.runs:
        scores = context * layer.attention.heads if naive else 0
        attending = attention_values(layer.attention) + scores
        inner = max(inner, attending, ffn_values(model.dim, layer.ffn))
        if layer.attention.chunk is not None and layer.attention.chunk < context:
            masks = MASKS * chunk * context
    values = streams * model.dim + max(inner + 2 * ple, 5 * ple)
    logits = kept * model.vocab * FLOAT * (2 if model.softcap is None else 4)
    return SCRATCH + FLOAT * chunk * values + masks + logits


def attention_values(a: AnyAttention) -> int:
    """Values per token that attention holds at once."""
    if isinstance(a, LatentAttention):
        return a.heads * (a.nope_dim + a.rope.dim + 2 * a.entry + a.v_dim) + (a.q_rank or 0)
    return 4 * a.head_dim * (a.heads + a.kv_heads)


def ffn_values(dim: int, f: FeedForward) -> int:
    """Values per token that a feed-forward holds at once: gate, up and their product, or two without a gate."""
    if isinstance(f, Plain):
        return 2 * f.width
    if isinstance(f, Gated):
        return 3 * f.width
    shared = dim + 3 * f.shared.width if f.shared else 0
    return max(f.active * (dim + 3 * f.width) + 2 * dim + 6 * f.experts, shared)


def logits_bytes(package: Package, tokens: int, chunk: int) -> int:
    """What computing the logits of all of ``tokens`` takes: themselves, a pass that has those of a chunk, a cache."""
    kept = min(chunk, tokens)
    working = activation_bytes(package, kept, tokens, kept)
    return tokens * package.model.vocab * FLOAT + working + cache_bytes(package.contract, tokens)


def kept_in(contract: Contract) -> str:
    """The type of keys and values."""
    return next((cache.dtype for cache in contract.caches), "float32")


class OrtPrices:
    """Bytes by component of a run of one package."""

    def __init__(self, package: Package) -> None:
        self.package = package

    @cached_property
    def weights(self) -> tuple[Held, ...]:
        """Every external weight, as a session holds it."""
        readers = uses(self.package.graph.read_bytes(), str(self.package.graph))
        return tuple(held(weight, readers.get(weight.name, [])) for weight in self.package.weights_facts)

    @property
    def kv(self) -> str:
        """What keys and values are kept in."""
        return kept_in(self.package.contract)

    def components(self, context: int, chunk: int, table: int) -> dict[str, int]:
        """What a run holds besides the runtime's own floor and the tokenizer; ``table`` is what a tier keeps."""
        kv = cache_bytes(self.package.contract, context)
        rows = sum(touched(weight, chunk) for weight in self.weights)
        working = activation_bytes(self.package, chunk, context)
        # While weights are packed nothing else is there yet.
        return {
            "weights": self.weights_bytes(chunk),
            "ple": table,
            "kv": kv,
            "activations": max(working, self.passing_bytes - kv - rows - table),
        }

    @property
    def packed_bytes(self) -> int:
        """In memory of the library's own, where nothing was baked."""
        return sum(weight.packed for weight in self.weights)

    @property
    def passing_bytes(self) -> int:
        """The most that packing one weight takes beside what is held."""
        return max((weight.passing for weight in self.weights), default=0)

    @property
    def baked_bytes(self) -> int:
        """The most that is there while a session finds its packed weights in a file: it packs each again to compare."""
        largest = max((weight.passing + weight.packed for weight in self.weights), default=0)
        return sum(weight.packed + weight.mapped for weight in self.weights) + largest

    @property
    def baking_bytes(self) -> int:
        """What writing packed weights down holds: tables as a whole, and float16 matrices once more as float32."""
        held = sum(w.packed + w.mapped + (w.weight.length if w.rows else 0) for w in self.weights)
        return held + sum(w.packed for w in self.weights if w.weight.dtype == "float16") + self.passing_bytes

    def weights_bytes(self, chunk: int) -> int:
        """All that is packed, mapped, or touched by a chunk's rows."""
        kept = self.package.onnx.nodes * NODE_BYTES + len(self.weights) * PAGE
        return kept + sum(w.packed + w.mapped + touched(w, chunk) for w in self.weights)

    def bytes_per_token(self) -> int:
        """Weights that one decoded token reads: all but rows it does not look up, and experts it does not meet."""
        active, count = next(((f.active, f.experts) for f in self.mixtures), (1, 1))
        return sum(w.rows or (w.packed + w.mapped) * (active if w.experts else count) // count for w in self.weights)

    @property
    def experts_bytes(self) -> int:
        """All experts, whether a token meets them or not."""
        return sum(w.packed + w.mapped for w in self.weights if w.experts)

    @property
    def mixtures(self) -> list[Experts]:
        """Of the layers that have a choice of experts."""
        return [layer.ffn for layer in self.package.model.layers if isinstance(layer.ffn, Experts)]

    def rows(self) -> Iterator[External]:
        """The weights of which only rows are read."""
        return (weight.weight for weight in self.weights if weight.rows)


def touched(weight: Held, chunk: int) -> int:
    """Bytes of a table that the rows of a chunk bring in."""
    return min(pages(weight.weight.length), chunk * (pages(weight.rows) + AROUND)) if weight.rows else 0
