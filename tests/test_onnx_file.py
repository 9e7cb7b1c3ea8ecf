"""The walker over ONNX files, beside onnx itself: what it accepts is what onnx reads, and all else is refused."""

from __future__ import annotations

import time
import tracemalloc
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from loaders.errors import BadCheckpoint
from loaders.formats import onnx_file, protobuf
from tests.packaged import DATA, error_of, raw_graph, weight


def read(data: bytes) -> onnx_file.Graph:
    """Walked."""
    return onnx_file.read(data, "model.onnx")


def agrees(graph: onnx_file.Graph, data: bytes) -> None:
    """With what onnx makes of the same bytes: what was accepted is what will be run."""
    proto = onnx.ModelProto.FromString(data)
    outside = [t for t in proto.graph.initializer if t.data_location == TensorProto.EXTERNAL]
    facts = [{e.key: e.value for e in t.external_data} for t in outside]
    assert [(w.name, w.dims, w.location, str(w.offset), str(w.length)) for w in graph.external] == [
        (t.name, tuple(t.dims), f["location"], f["offset"], f["length"]) for t, f in zip(outside, facts, strict=True)
    ]
    assert {t.name for t in proto.graph.initializer} == {w.name for w in graph.external} | graph.inline.keys()
    assert [v.name for v in graph.inputs] == [v.name for v in proto.graph.input]
    assert [v.name for v in graph.outputs] == [v.name for v in proto.graph.output]
    for value, other in zip(graph.inputs, proto.graph.input, strict=True):
        kind = other.type.tensor_type
        assert value.dtype == onnx_file.TYPES.get(kind.elem_type, (f"type {kind.elem_type}",))[0]
        if value.shape is not None:
            assert [d or None for d in value.shape] == [d.dim_param or d.dim_value or None for d in kind.shape.dim]
    assert not proto.functions
    assert not proto.graph.sparse_initializer


def test_the_walker_reads_what_onnx_reads() -> None:
    agrees(read(raw_graph()), raw_graph())


SCHEMAS = {
    onnx.ModelProto: onnx_file.MODEL, onnx.OperatorSetIdProto: onnx_file.OPSET,
    onnx.StringStringEntryProto: onnx_file.PAIR, onnx.GraphProto: onnx_file.GRAPH, onnx.NodeProto: onnx_file.NODE,
    onnx.AttributeProto: onnx_file.ATTRIBUTE, onnx.TensorProto: onnx_file.TENSOR,
    onnx.ValueInfoProto: onnx_file.VALUE, onnx.TypeProto: onnx_file.TYPE, onnx.TypeProto.Tensor: onnx_file.TENSOR_TYPE,
    onnx.TensorShapeProto: onnx_file.SHAPE, onnx.TensorShapeProto.Dimension: onnx_file.DIMENSION,
}  # fmt: skip


@pytest.mark.parametrize("proto", SCHEMAS, ids=lambda p: p.DESCRIPTOR.name)
def test_messages_are_those_of_onnx(proto: Any) -> None:
    """Every field that is known to onnx is known here, with its wire type, or refused under its own name."""
    wires = {1: protobuf.F64, 2: protobuf.F32, 3: protobuf.INT, 4: protobuf.INT, 5: protobuf.INT, 14: protobuf.INT}
    schema = SCHEMAS[proto]
    for field in proto.DESCRIPTOR.fields:
        if field.number in schema.refused:
            assert schema.refused[field.number] == field.name
            assert not any(tag >> 3 == field.number for tag in schema.tags)
            continue
        wire = wires.get(field.type, protobuf.BYTES)
        times = protobuf.MANY if field.is_repeated else protobuf.ONCE
        wanted = {field.number << 3 | wire: times}
        if field.is_repeated and wire != protobuf.BYTES:
            wanted[field.number << 3 | protobuf.BYTES] = protobuf.PACKED
        assert {tag: n for tag, n in schema.tags.items() if tag >> 3 == field.number} == wanted, field.name
    assert {tag >> 3 for tag in schema.tags} <= {field.number for field in proto.DESCRIPTOR.fields}


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("kind", onnx_file.TYPES)
def test_tensors_of_every_type(kind: int, listed: bool) -> None:
    """As onnx writes them: raw, or value by value."""
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    for shape in ((), (1,), (2, 3), (0, 4), (5,)):
        values = np.ones(shape, dtype)
        if listed:
            found = helper.make_tensor("t", kind, shape, values.flatten().tolist())
        else:
            found = numpy_helper.from_array(values, "t")
        proto = helper.make_model(helper.make_graph([], "g", [], [], [found]))
        value = read(proto.SerializeToString()).inline["t"]
        assert value in ((1, None) if shape in ((), (1,)) else (None,))
        assert value == 1 or values.size != 1 or found.data_type not in (1, 7)


def test_dims_that_come_one_by_one() -> None:
    """Writers differ in that; negative numbers and defaults too."""
    body = b"\x08\x02\x08\x03" + b"\x10\x07" + b"\x42\x01t" + b"\x4a" + bytes([48]) + bytes(48)
    packed = b"\x0a\x02\x02\x03" + body[4:]
    for tensor_bytes in (body, packed):
        graph = b"\x2a" + bytes([len(tensor_bytes)]) + tensor_bytes
        assert read(b"\x3a" + bytes([len(graph)]) + graph).inline == {"t": None}
    minus = helper.make_tensor("t", TensorProto.INT64, [], [-5])
    proto = helper.make_model(helper.make_graph([], "g", [], [], [minus]))
    assert read(proto.SerializeToString()).inline == {"t": -5}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "no graph"),
        (b"\x3a", "cut off"),
        (b"\x3a\x05\x00", "5 bytes where 1 are left"),
        (b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", "bytes where 0"),
        (b"\x08\x80", "cut off"),
        (b"\x08\x80\x00\x3a\x00", "overlong"),
        (b"\x88\x00\x01\x3a\x00", "overlong"),
        (b"\x3a\x80\x00", "overlong"),
        (b"\x08" + b"\xff" * 9 + b"\x02\x3a\x00", "overlong"),
        (b"\x08" + b"\x80" * 10 + b"\x01\x3a\x00", "overlong"),
        (b"\x08" + b"\xff" * 30, "overlong"),
        (b"\x38\x01", "wire type 0"),
        (b"\x3b\x3c", "wire type 3"),
        (b"\x3c", "wire type 4"),
        (b"\x3d\x00\x00\x00\x00", "wire type 5"),
        (b"\x3e", "wire type 6"),
        (b"\x00\x00", "unknown field 0"),
        (b"\x78\x00", "unknown field 15"),
        (b"\xf8\xff\xff\xff\xff\x01\x00", "unknown field"),
        (b"\x3a\x00\x3a\x00", "second time"),
        (b"\x3a\x02\x0a\x05", "cut off|5 bytes where 0"),
        (b"\x3a\x04\x0a\x02\x22\x05\x12\x05hello", "5 bytes where 0"),
        (b"\x3a\x05\x0a\x03\x22\x01\xff", "UTF-8"),
        (b"\x3a\x09\x2a\x07\x0a\x01\x80\x10\x01\x42\x00", "cut off"),
        (b"\x3a\x09\x2a\x07\x22\x03abc\x10\x01", "multiple of 4"),
    ],
)
def test_bytes_that_are_no_model(data: bytes, words: str) -> None:
    with pytest.raises(BadCheckpoint, match=words) as caught:
        read(data)
    assert "\n" not in str(caught.value)


def test_a_model_cut_short_anywhere() -> None:
    """Not even at the end of a field does it say what it said: something declared is gone, or there is no graph."""
    data = raw_graph()
    for size in range(0, len(data), 7):
        try:
            assert read(data[:size]) != read(data)
        except BadCheckpoint:
            continue


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_bytes_of_a_graph(data: st.DataObject) -> None:
    """Flipped, cut out, doubled or put in: refused, or read as onnx reads it."""
    whole = bytearray(raw_graph())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(whole) - 1))
        end = min(len(whole), at + data.draw(st.integers(0, 12)))
        match data.draw(st.integers(0, 3)):
            case 0:
                whole[at] ^= 1 << data.draw(st.integers(0, 7))
            case 1:
                del whole[at:end]
            case 2:
                whole[at:at] = whole[at:end]
            case 3:
                whole[at:end] = data.draw(st.binary(max_size=12))
        if not whole:
            return
    error = error_of(lambda: agrees(read(bytes(whole)), bytes(whole)))
    assert error is None or error.exit_code == 65


def large(nodes: int) -> bytes:
    """A graph like a model's: every node has attributes, every other one a weight."""
    made = [
        helper.make_node(
            "MatMulNBits", [f"x{i}", f"w{i}.codes", f"w{i}.scales"], [f"x{i + 1}"], f"layers.{i}.node",
            domain="com.microsoft", K=64, N=64, bits=4, block_size=32, accuracy_level=4,
        )
        for i in range(nodes)
    ]  # fmt: skip
    weights = [weight(f"w{i}.codes", TensorProto.UINT8, (64, 2, 16), 2048 * i, 2048, DATA) for i in range(nodes)]
    return helper.make_model(helper.make_graph(made, "g", [], [], weights)).SerializeToString()


def test_a_large_graph_is_read_at_once() -> None:
    data = large(1000)
    times = []
    for _ in range(5):
        begun = time.process_time()
        found = read(data)
        times.append(time.process_time() - begun)
    assert (found.nodes, len(found.external)) == (1000, 1000)
    assert min(times) < 0.15


def test_what_is_kept_is_a_small_multiple_of_the_file() -> None:
    """Of what makes the most objects of the fewest bytes, too."""
    tiny = b"\x0a\x00" * 60_000  # nodes of nothing
    graph = b"\x3a" + varint(len(tiny)) + tiny
    for data in (graph, large(100)):
        tracemalloc.start()
        read(data)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 6 * len(data) + (1 << 18)


def varint(value: int) -> bytes:
    """As the wire has it."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def test_more_than_anybody_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protobuf, "MOST_FIELDS", 1000)
    with pytest.raises(BadCheckpoint, match="more than 1000 fields"):
        read(large(200))
    listed = helper.make_tensor("t", TensorProto.INT64, [2000], list(range(2000)))
    with pytest.raises(BadCheckpoint, match="more than 1000 fields"):
        read(helper.make_model(helper.make_graph([], "g", [], [], [listed])).SerializeToString())
    monkeypatch.setattr(onnx_file, "MOST_BYTES", 10)
    with pytest.raises(BadCheckpoint, match="at most 10"):
        read(large(1))


def test_nesting_is_no_stack_overflow() -> None:
    data = b""
    for _ in range(3000):
        body = b"\x32" + varint(len(data)) + data  # attribute.g
        body = b"\x2a" + varint(len(body)) + body  # node.attribute
        data = b"\x0a" + varint(len(body)) + body  # graph.node
    with pytest.raises(BadCheckpoint, match="nested"):
        read(b"\x3a" + varint(len(data)) + data)
