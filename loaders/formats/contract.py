"""What goes into an exported graph and what comes out of it, as data: the names that a runtime binds.

A contract comes from a file. Before anything is bound by it, it is compared with what the graph declares and with the
model whose keys and values are to be kept.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from loaders.errors import BadCheckpoint, Unsupported
from loaders.formats.config import Config, show
from loaders.formats.onnx_file import Graph, Value
from loaders.network.spec import Attention, LatentAttention, Model

DTYPES = ("int64", "int32", "float32", "float16")
FLOATS = ("float32", "float16")
# What a decoder's inputs and its output are called, of those that are not a cache's.
IDS, EMBEDS, MASK, POSITION_IDS, ROWS, KEEP = (
    "input_ids", "inputs_embeds", "attention_mask", "position_ids", "per_layer_inputs", "num_logits_to_keep",
)  # fmt: skip
LOGITS = "logits"
KINDS = ("full", "window", "latent", "growing")
PADDED = 8
MOST_TENSORS, MOST_DIMS, MOST_DIM = 4096, 8, 2**31 - 1
TENSOR_NAME = re.compile(r"[A-Za-z_][\w.\-/:]{0,199}", re.ASCII)
SYMBOL = re.compile(r"[A-Za-z_][\w +\-*/]{0,79}", re.ASCII)

Shape = tuple[int | str, ...]


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of the graph. ``shape``: numbers, and names of what differs from call to call.

    ``optional``: an input that may be left out; it then has the value ``default``.
    """

    name: str
    dtype: str
    shape: Shape
    optional: bool = False
    default: int | float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON, without the name."""
        found: dict[str, Any] = {"dtype": self.dtype, "shape": list(self.shape)}
        return {**found, "optional": True, "default": self.default} if self.optional else found


@dataclass(frozen=True)
class CacheSpec:
    """The keys and values of one layer: names in the graph, and the shape [batch, heads, tokens, dim] behind them.

    ``kind`` "full": one buffer of the context's length, written in place, is past and present. "window": the same of
    min(context, span + 16) tokens. "latent": one buffer is past and present of keys and of values. "growing": past goes
    in, present comes out longer. ``dim`` is that of a key, ``value_dim`` that of a value; ``span``: the tokens of it
    that are ever read (None: all).
    """

    layer: int
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    heads: int
    dim: int
    value_dim: int
    dtype: str = "float32"
    span: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**self.__dict__, "inputs": list(self.inputs), "outputs": list(self.outputs)}


@dataclass(frozen=True)
class Contract:
    """All of a graph's inputs and outputs, those of its caches among them."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    caches: tuple[CacheSpec, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON, as :meth:`parse` takes it."""
        sides = {"inputs": self.inputs, "outputs": self.outputs}
        tensors = {side: {spec.name: spec.as_dict() for spec in specs} for side, specs in sides.items()}
        return {**tensors, "caches": [cache.as_dict() for cache in self.caches]}

    @classmethod
    def parse(cls, config: Config) -> Contract:
        """From the keys inputs, outputs and caches of a manifest. Tensors are in no order that means anything.

        Raises BadCheckpoint naming the key: types, ranges, names, and caches that agree with the tensors they name.
        """
        with sound():
            found = cls(_tensors(config, "inputs"), _tensors(config, "outputs"), _caches(config))
            found.check(config.file)
        return found

    def input(self, name: str) -> TensorSpec | None:
        """The input of that name."""
        return next((spec for spec in self.inputs if spec.name == name), None)

    def output(self, name: str) -> TensorSpec | None:
        """The output of that name."""
        return next((spec for spec in self.outputs if spec.name == name), None)

    def ordered(self, inputs: Sequence[str], outputs: Sequence[str]) -> Contract:
        """The same in the order of a graph that has exactly these."""
        left, right = ({spec.name: spec for spec in specs} for specs in (self.inputs, self.outputs))
        return replace(self, inputs=tuple(left[n] for n in inputs), outputs=tuple(right[n] for n in outputs))

    def check(self, file: str) -> None:
        """Raises BadCheckpoint where a cache names a tensor that is not there, or not so, or is another's."""
        layers, names = set(), set()
        for i, cache in enumerate(self.caches):
            at = f"caches[{i}]"
            if cache.layer in layers:
                raise _bad(cache.layer, file, f"{at}.layer", "one cache for each layer")
            layers.add(cache.layer)
            for side, specs in (("inputs", self.inputs), ("outputs", self.outputs)):
                for key, name in zip(("key", "value"), getattr(cache, side), strict=False):
                    spec = next((s for s in specs if s.name == name), None)
                    if spec is None or (side, name) in names:
                        raise _bad(show(name), file, f"{at}.{side}", f"one of the {side}, once")
                    names.add((side, name))
                    _check_cache(cache, spec, key, file, f"{at}.{side}")


@contextmanager
def sound() -> Iterator[None]:
    """Of a file that edge wrote, also what nobody implements is an error of the file."""
    try:
        yield
    except Unsupported as e:
        raise BadCheckpoint(e.found, file=e.file, field=e.field, expected=e.expected) from None


def _tensors(config: Config, key: str) -> tuple[TensorSpec, ...]:
    table = config.sub(key)
    if not 1 <= len(table.data) <= MOST_TENSORS:
        raise _bad(f"{len(table.data)} tensors", config.file, key, f"1 to {MOST_TENSORS}")
    return tuple(_tensor(table, name) for name in table.data)


def _tensor(table: Config, name: str) -> TensorSpec:
    if not TENSOR_NAME.fullmatch(name):
        raise _bad(f"tensor {show(name)}", table.file, table.at, "letters, digits, _ . - / and :")
    entry = table.sub(name)
    dtype, optional = entry.str("dtype", choices=DTYPES), entry.bool("optional", default=False)
    shape, default = entry.raw("shape"), entry.raw("default")
    entry.finish()
    if not isinstance(shape, list) or len(shape) > MOST_DIMS or not all(map(_dimension, shape)):
        raise _bad(show(shape), table.file, entry.field("shape"), f"at most {MOST_DIMS} sizes or their names")
    if type(default) not in ((int, float, type(None)) if optional else (type(None),)) or (default is None and optional):
        raise _bad(show(default), table.file, entry.field("default"), "a number, and of optional inputs alone")
    if optional and table.at != "inputs":
        raise _bad("an output", table.file, entry.field("optional"), "inputs alone")
    return TensorSpec(name, dtype, tuple(shape), optional, default)


def _dimension(size: object) -> bool:
    if isinstance(size, str):
        return SYMBOL.fullmatch(size) is not None
    return type(size) is int and 0 <= size <= MOST_DIM


def _caches(config: Config) -> tuple[CacheSpec, ...]:
    found = config.raw("caches")
    if not isinstance(found, list) or len(found) > MOST_TENSORS:
        raise _bad(show(found), config.file, "caches", f"a list of at most {MOST_TENSORS}")
    return tuple(_cache(value, config.file, f"caches[{i}]") for i, value in enumerate(found))


def _cache(value: object, file: str, at: str) -> CacheSpec:
    if not isinstance(value, dict):
        raise _bad(show(value), file, at, "an object")
    entry = Config(value, file, at)
    found = CacheSpec(
        layer=entry.int("layer", low=0, high=MOST_TENSORS),
        kind=entry.str("kind", choices=KINDS),
        inputs=entry.strings("inputs"),
        outputs=entry.strings("outputs"),
        heads=entry.int("heads"),
        dim=entry.int("dim"),
        value_dim=entry.int("value_dim"),
        dtype=entry.str("dtype", choices=FLOATS),
        span=entry.int("span", default=None),
    )
    entry.finish()
    sizes = (1, 2) if found.kind == "growing" else (2,)
    if len(found.inputs) not in sizes or len(found.outputs) != len(found.inputs):
        raise _bad(f"{len(found.inputs)} inputs, {len(found.outputs)} outputs", file, at, "a key and a value of each")
    if found.kind == "window" and found.span is None:
        raise _bad("no span", file, at, "one: its kind is window")
    return found


def _check_cache(cache: CacheSpec, spec: TensorSpec, key: str, file: str, at: str) -> None:
    """A tensor of a cache: floats of [batch, heads, tokens, dim], or [batch, tokens, dim] where there is one head."""
    if spec.dtype != cache.dtype or spec.optional:
        raise _bad(f"{spec.name} is {spec.dtype}", file, at, cache.dtype)
    # A latent is key and value in one buffer of the key's width, of which a value is the first part.
    dims = (cache.dim,) if key == "key" else (cache.dim, cache.value_dim)
    rank = len(spec.shape)
    heads = spec.shape[1] if rank == 4 else 1
    if rank not in (3, 4) or heads != cache.heads or spec.shape[-1] not in dims:
        raise _bad(f"{spec.name} is {show(list(spec.shape))}", file, at, f"{cache.heads} heads of {dims[-1]}")


def _bad(found: object, file: str, field: str, expected: str) -> BadCheckpoint:
    return BadCheckpoint(found, file=file, field=field, expected=expected)


def agree_graph(contract: Contract, graph: Graph, file: str) -> Contract:
    """The contract in the order of the graph. Raises BadCheckpoint for the first thing that the two say differently."""
    for side in ("inputs", "outputs"):
        specs = {spec.name: spec for spec in getattr(contract, side)}
        values: dict[str, Value] = {value.name: value for value in getattr(graph, side)}
        if len(values) != len(getattr(graph, side)):
            raise _bad("a name twice", file, f"graph.{side}", "each name once")
        if odd := specs.keys() ^ values.keys():
            where = "the graph" if min(odd) in values else "the manifest"
            raise _bad(f"{show(min(odd))} is in {where} alone", file, side, "the same in both")
        for name, spec in specs.items():
            _agree_tensor(spec, values[name], graph, file, f"{side}.{name}")
    return contract.ordered([value.name for value in graph.inputs], [value.name for value in graph.outputs])


def _agree_tensor(spec: TensorSpec, value: Value, graph: Graph, file: str, at: str) -> None:
    if value.dtype != spec.dtype:
        raise _bad(f"{value.dtype} in the graph", file, at, spec.dtype)
    shape = value.shape
    if shape is None or len(shape) != len(spec.shape):
        raise _bad(f"shape {show(shape)} in the graph", file, at, show(spec.shape))
    for here, there in zip(spec.shape, shape, strict=True):
        if isinstance(here, int) != isinstance(there, int) or (isinstance(here, int) and here != there):
            raise _bad(f"shape {show(shape)} in the graph", file, at, show(spec.shape))
    held = graph.inline.get(spec.name)
    fixed = spec.name in graph.inline or any(weight.name == spec.name for weight in graph.external)
    if fixed != spec.optional or held != spec.default:
        raise _bad(f"{show(held) if fixed else 'no default'} in the graph", file, at, f"default {show(spec.default)}")


def agree_model(contract: Contract, model: Model, file: str) -> None:
    """Raises BadCheckpoint where the caches are not those of the model's layers, or other sizes are another model's."""
    owners = [i for i, layer in enumerate(model.layers) if layer.attention.kv_from is None]
    layers = sorted(cache.layer for cache in contract.caches)
    if layers != owners:
        raise _bad(f"of layers {show(layers)}", file, "caches", f"of layers {show(owners)}, which have keys and values")
    for i, cache in enumerate(contract.caches):
        _agree_cache(cache, model.layers[cache.layer].attention, file, f"caches[{i}]")
    logits, rows = contract.output(LOGITS), contract.input(ROWS)
    if logits is None or logits.dtype not in FLOATS or logits.shape[-1:] != (model.vocab,):
        raise _bad(show(logits and logits.shape), file, "outputs.logits", f"floats, {model.vocab} of them")
    if rows is not None and (model.ple is None or rows.shape[2:] != (len(model.layers), model.ple.dim)):
        raise _bad(show(rows.shape), file, "inputs.per_layer_inputs", "rows of the model's table")


def _agree_cache(cache: CacheSpec, attention: Attention | LatentAttention, file: str, at: str) -> None:
    found = (cache.heads, cache.dim, cache.value_dim)
    wanted: tuple[tuple[int, int, int], ...]
    if isinstance(attention, LatentAttention):
        a = attention
        split = (a.heads, a.nope_dim + a.rope.dim, a.v_dim)
        # As long as it is, or padded to whole vectors of what fused operators take.
        entries = dict.fromkeys((a.entry, -(-a.entry // PADDED) * PADDED))
        wanted = tuple((1, entry, value) for entry in entries for value in (a.kv_rank, entry))
        wanted += () if cache.kind == "latent" else (split,)
    else:
        wanted = ((attention.kv_heads, attention.head_dim, attention.head_dim),)
    if found not in wanted or (cache.kind == "latent" and not isinstance(attention, LatentAttention)):
        raise _bad(
            f"{cache.kind}, heads and widths {show(found)}", file, at, f"{show(wanted[0])} in layer {cache.layer}"
        )
    if cache.span not in (None, attention.span):
        raise _bad(cache.span, file, f"{at}.span", f"{attention.span or 'none'} in layer {cache.layer}")
