"""ONNX files read without onnx: what a graph declares and which operators it asks for, nothing of what it computes.

What a package has no use for is refused by name: functions, training, sparse tensors, tensors of strings, and data
outside of the file anywhere but in the main graph's initializers.
"""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from loaders.errors import BadCheckpoint
from loaders.formats.config import MIB, short
from loaders.formats.protobuf import F32, F64, INT, Span, Wire, message, signed, texts

Scalar = int | float
Shape = tuple[int | str | None, ...]

MOST_BYTES = 32 * MIB
MOST_DIMS, MOST_DIM = 8, 2**40
MOST_DEPTH = 8
# What data_type says: a name, and the bits of a value.
TYPES = {
    **{1: ("float32", 32), 2: ("uint8", 8), 3: ("int8", 8), 4: ("uint16", 16), 5: ("int16", 16), 6: ("int32", 32)},
    **{7: ("int64", 64), 9: ("bool", 8), 10: ("float16", 16), 11: ("float64", 64), 12: ("uint32", 32)},
    **{13: ("uint64", 64), 16: ("bfloat16", 16), 21: ("uint4", 4), 22: ("int4", 4)},
}
# Fields of a tensor that list its values one by one: their wire type. All other types are listed in field 5, as int32.
LISTS = {4: F32, 5: INT, 7: INT, 10: F64, 11: INT}
LISTED = {"float32": 4, "int64": 7, "float64": 10, "uint32": 11, "uint64": 11}
UNPACKED = {"float32": "<f", "float64": "<d", "float16": "<e", "int64": "<q", "int32": "<i"}
NUMBER = re.compile(r"0|[1-9][0-9]{0,17}", re.ASCII)
PLACE = {"location", "offset", "length"}

MODEL = message(
    "ModelProto", {1: INT, 5: INT, **texts(2, 3, 4, 6, 7)}, texts(8, 14),
    training_info=20, functions=25, configuration=26,
)  # fmt: skip
OPSET = message("OperatorSetIdProto", {2: INT, **texts(1)})
PAIR = message("StringStringEntryProto", texts(1, 2))
GRAPH = message(
    "GraphProto", texts(2, 10), texts(1, 5, 11, 12, 13, 16), quantization_annotation=14, sparse_initializer=15
)
NODE = message("NodeProto", texts(3, 4, 6, 7), texts(1, 2, 5, 9), overload=8, device_configurations=10)
ATTRIBUTE = message(
    "AttributeProto", {2: F32, 3: INT, 20: INT, **texts(1, 4, 5, 6, 13)}, {7: F32, 8: INT, **texts(9, 10, 11)},
    tp=14, type_protos=15, ref_attr_name=21, sparse_tensor=22, sparse_tensors=23,
)  # fmt: skip
TENSOR = message(
    "TensorProto", {2: INT, 14: INT, **texts(8, 9, 12)}, {1: INT, **LISTS, **texts(13, 16)}, segment=3, string_data=6
)
VALUE = message("ValueInfoProto", texts(1, 2, 3), texts(4))
TYPE = message(
    "TypeProto", texts(1, 6), sequence_type=4, map_type=5, opaque_type=7, sparse_tensor_type=8, optional_type=9
)
TENSOR_TYPE = message("Tensor", {1: INT, **texts(2)})
SHAPE = message("TensorShapeProto", {}, texts(1))
DIMENSION = message("Dimension", {1: INT, **texts(2, 3)})


@dataclass(frozen=True)
class Value:
    """A declared input or output. ``shape`` holds numbers, names, or None for what was left open; None: all of it."""

    name: str
    dtype: str
    shape: Shape | None


@dataclass(frozen=True)
class External:
    """An initializer whose ``length`` bytes, which are what its dims need, lie at ``offset`` of the file ``location``.

    Nothing is known of the file: what the location may be is for whoever opens it.
    """

    name: str
    dtype: str
    dims: tuple[int, ...]
    location: str
    offset: int
    length: int


@dataclass(frozen=True)
class Graph:
    """What a model file declares. ``inline``: initializers in the file itself, with their value where it is one number.

    ``opsets``: domain -> version. ``operators``: (domain, type) of every node, nested ones too. ONNX's domain is "".
    """

    ir_version: int
    opsets: Mapping[str, int]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    external: tuple[External, ...]
    inline: Mapping[str, Scalar | None]
    operators: frozenset[tuple[str, str]]
    metadata: Mapping[str, str]
    nodes: int


def read(data: bytes, file: str | os.PathLike[str]) -> Graph:
    """What the bytes of a model file declare.

    Raises BadCheckpoint, naming the message, what is wrong with it and where.
    """
    if len(data) > MOST_BYTES:
        raise BadCheckpoint(f"{len(data)} bytes", file=file, expected=f"at most {MOST_BYTES}")
    return Walker(Wire(data, os.fspath(file))).model()


def own(domain: str) -> str:
    """ONNX's own domain has two names."""
    return "" if domain == "ai.onnx" else domain


class Walker:
    """Goes through a file once; collects what the main graph declares, and every graph's operators."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.inputs: list[Value] = []
        self.outputs: list[Value] = []
        self.external: dict[str, External] = {}
        self.inline: dict[str, Scalar | None] = {}
        self.operators: set[tuple[str, str]] = set()
        self.nodes = 0

    def model(self) -> Graph:
        """All of it."""
        wire, version, opsets, graph = self.wire, 0, dict[str, int](), None
        metadata: list[Span] = []
        for number, a, b in wire.fields((0, len(wire.data)), MODEL):
            if number == 1:
                version = a
            elif number == 7:
                graph = a, b
            elif number == 8:
                domain, opset = self.opset((a, b))
                if domain in opsets:
                    raise wire.bad(f'opset of "{short(domain)}" twice', a, MODEL.name)
                opsets[domain] = opset
            elif number == 14:
                metadata.append((a, b))
        if graph is None:
            raise BadCheckpoint("no graph", file=wire.file, field=MODEL.name, expected="an ONNX model")
        self.graph(graph, 0)
        return Graph(
            version, opsets, tuple(self.inputs), tuple(self.outputs), tuple(self.external.values()), self.inline,
            frozenset(self.operators), pairs(wire, metadata, MODEL.name), self.nodes,
        )  # fmt: skip

    def opset(self, span: Span) -> tuple[str, int]:
        """(domain, version)."""
        domain, version = "", 0
        for number, a, b in self.wire.fields(span, OPSET):
            if number == 1:
                domain = own(self.wire.text(a, b, OPSET.name))
            else:
                version = a
        return domain, version

    def graph(self, span: Span, depth: int) -> None:
        """A graph; one inside an attribute declares nothing that counts here."""
        if depth > MOST_DEPTH:
            raise self.wire.bad("graphs nested too deeply", span[0], GRAPH.name, f"{MOST_DEPTH} levels")
        for number, a, b in self.wire.fields(span, GRAPH):
            if number == 1:
                self.node((a, b), depth)
            elif number == 5:
                self.initializer((a, b), depth)
            elif number in (11, 12, 13):
                value = read_value(self.wire, (a, b))
                if depth == 0 and number != 13:
                    (self.inputs if number == 11 else self.outputs).append(value)

    def node(self, span: Span, depth: int) -> None:
        """Notes its operator, and walks what its attributes hold."""
        domain = op = ""
        for number, a, b in self.wire.fields(span, NODE):
            if number == 5:
                self.attribute((a, b), depth)
            elif number == 4:
                op = self.wire.text(a, b, NODE.name)
            elif number == 7:
                domain = own(self.wire.text(a, b, NODE.name))
        self.operators.add((domain, op))
        self.nodes += 1

    def attribute(self, span: Span, depth: int) -> None:
        """Only tensors and graphs are looked into."""
        for number, a, b in self.wire.fields(span, ATTRIBUTE):
            if number in (5, 10):
                self.inside((a, b))
            elif number in (6, 11):
                self.graph((a, b), depth + 1)

    def initializer(self, span: Span, depth: int) -> None:
        """Of the main graph: kept by name. Of another: looked at."""
        if depth:
            self.inside(span)
            return
        tensor = TensorReader(self.wire, span)
        if tensor.name in self.external or tensor.name in self.inline:
            raise self.wire.bad(f'initializer "{short(tensor.name)}" twice', span[0], GRAPH.name)
        if tensor.external:
            self.external[tensor.name] = tensor.place()
        else:
            self.inline[tensor.name] = tensor.value()

    def inside(self, span: Span) -> None:
        """A tensor that must lie in the file itself."""
        tensor = TensorReader(self.wire, span)
        if tensor.external:
            found = f'"{short(tensor.name)}" in an external file'
            raise self.wire.bad(found, span[0], TENSOR.name, "initializers of the main graph alone")
        tensor.value()


class TensorReader:
    """The fields of one tensor, its type and dims checked."""

    def __init__(self, wire: Wire, span: Span) -> None:
        self.wire, self.at = wire, span[0]
        self.name, self.location = "", 0
        self.raw: Span | None = None
        self.dims: list[int] = []
        self.listed: dict[int, int] = {}
        self.first: tuple[int, int] = (0, -1)
        self.entries: list[Span] = []
        kind = 0
        for number, a, b in wire.fields(span, TENSOR):
            if number == 8:
                self.name = wire.text(a, b, TENSOR.name)
            elif number == 2:
                kind = a
            elif number in (1, -1):
                self.add_dims([a] if number == 1 else (n for n, _ in wire.numbers((a, b), INT, TENSOR.name)))
            elif number == 9:
                self.raw = (a, b)
            elif number == 13:
                self.entries.append((a, b))
            elif number == 14:
                self.location = a
            elif abs(number) in LISTS:
                here = [(a, b)] if number > 0 else wire.numbers((a, b), LISTS[-number], TENSOR.name)
                self.add_values(abs(number), here)
        if kind not in TYPES:
            raise self.bad(f"data_type {kind}", "one of " + " ".join(map(str, TYPES)))
        self.dtype, bits = TYPES[kind]
        self.count = math.prod(self.dims)
        self.nbytes = (self.count * bits + 7) // 8
        self.external = self.location == 1

    def bad(self, found: str, expected: str) -> BadCheckpoint:
        """Something in this tensor."""
        label = f'{TENSOR.name} "{short(self.name)}"'
        return self.wire.bad(found, self.at, label, expected)

    def add_dims(self, found: Iterable[int]) -> None:
        """More of its shape."""
        for size in found:
            self.dims.append(size)
            if len(self.dims) > MOST_DIMS or size > MOST_DIM:
                raise self.bad(
                    f"dims {[signed(n) for n in self.dims]}", f"at most {MOST_DIMS} sizes from 0 to {MOST_DIM}"
                )

    def add_values(self, field: int, found: Iterable[tuple[int, int]]) -> None:
        """Counts values listed one by one; the very first is kept."""
        for place in found:
            if not self.listed:
                self.first = place
            self.listed[field] = self.listed.get(field, 0) + 1

    def place(self) -> External:
        """Where the bytes lie."""
        if self.raw is not None or self.listed:
            raise self.bad("values here and in an external file", "one of them")
        facts = pairs(self.wire, self.entries, f'{TENSOR.name} "{short(self.name)}"')
        if facts.keys() != PLACE:
            raise self.bad(f"external_data of {short(' '.join(sorted(facts)))}", "location, offset and length")
        numbers = []
        for key in ("offset", "length"):
            if not NUMBER.fullmatch(facts[key]):
                raise self.bad(f'{key} "{short(facts[key])}"', "a number of bytes")
            numbers.append(int(facts[key]))
        offset, length = numbers
        if length != self.nbytes:
            raise self.bad(f"length {length}", f"{self.nbytes} for {self.dtype} {self.dims}")
        return External(self.name, self.dtype, tuple(self.dims), facts["location"], offset, length)

    def value(self) -> Scalar | None:
        """The value of a tensor of one number, None of others; as many values as the dims say are there."""
        if self.location or self.entries:
            raise self.bad(f"data_location {self.location} with {len(self.entries)} entries", "0, or 1 with some")
        if self.raw is not None:
            first, last = self.raw
            if last - first != self.nbytes or self.listed:
                raise self.bad(f"{last - first} bytes of raw_data", f"{self.nbytes} for {self.dtype} {self.dims}")
            layout = UNPACKED.get(self.dtype) if self.count == 1 else None
            return None if layout is None else struct.unpack_from(layout, self.wire.data, first)[0]
        field = LISTED.get(self.dtype, 5)
        wanted = self.nbytes if self.dtype in ("int4", "uint4") else self.count
        if self.listed != ({field: wanted} if wanted else {}):
            raise self.bad(f"values listed as {self.listed}", f"{wanted} in field {field}")
        if self.count != 1 or self.dtype not in ("int64", "int32", "float32"):
            return None
        first, last = self.first
        return struct.unpack_from("<f", self.wire.data, first)[0] if last >= 0 else signed(first)


def pairs(wire: Wire, spans: Iterable[Span], where: str) -> dict[str, str]:
    """Keys and values, each key once."""
    found: dict[str, str] = {}
    for span in spans:
        entry = {number: wire.text(a, b, PAIR.name) for number, a, b in wire.fields(span, PAIR)}
        if entry.get(1, "") in found:
            raise wire.bad(f'key "{short(entry.get(1, ""))}" twice', span[0], where)
        found[entry.get(1, "")] = entry.get(2, "")
    return found


def read_value(wire: Wire, span: Span) -> Value:
    """What a graph declares of a value."""
    name, dtype = "", 0
    shape: Shape | None = None
    for number, a, b in wire.fields(span, VALUE):
        if number == 1:
            name = wire.text(a, b, VALUE.name)
        elif number == 2:
            tensor = next(((c, d) for part, c, d in list(wire.fields((a, b), TYPE)) if part == 1), None)
            for part, c, d in wire.fields(tensor, TENSOR_TYPE) if tensor else ():
                if part == 1:
                    dtype = c
                else:
                    shape = tuple([read_size(wire, (e, f)) for _, e, f in wire.fields((c, d), SHAPE)])
    return Value(name, TYPES[dtype][0] if dtype in TYPES else f"type {dtype}", shape)


def read_size(wire: Wire, span: Span) -> int | str | None:
    """One dimension: a number, a name, or neither."""
    found: list[int | str] = []
    for number, a, b in wire.fields(span, DIMENSION):
        if number == 1:
            if a > MOST_DIM:
                raise wire.bad(f"size {signed(a)}", span[0], DIMENSION.name, f"0 to {MOST_DIM}")
            found.append(a)
        elif number == 2:
            found.append(wire.text(a, b, DIMENSION.name))
    if len(found) > 1:
        raise wire.bad("a number and a name", span[0], DIMENSION.name, "one of them")
    return found[0] if found and found[0] != "" else None
