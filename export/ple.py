"""Per-layer embeddings of a package: the table as a file of rows, and a graph that looks rows up for runtimes that
cannot read it themselves.

The graph's one large initializer is that very file, at the table's offset: nothing is stored twice, and a runtime that
maps it touches the rows it needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto

from export.builder import FLOAT, INT32, INT64, Builder
from loaders.checkpoint import Checkpoint
from loaders.formats.contract import IDS, ROWS
from loaders.formats.facts import TableSpec
from loaders.formats.pack import Pack
from loaders.formats.placed import bands
from loaders.formats.quant import BITS, SCALE_BYTES, quantize_rows
from loaders.formats.safetensors import read_header
from loaders.formats.safetensors_writer import Writer
from loaders.formats.sharded import Notify
from loaders.network.matformer import Slice, parts, sliced
from loaders.network.tensors import PLE_TABLE
from loaders.weights import Source, table_place

TABLE, GRAPH = "ple.safetensors", "embedding.onnx"
OPSET = 21
BAND_BYTES = 4 << 20
TYPES = {"F32": TensorProto.FLOAT, "F16": TensorProto.FLOAT16, "BF16": TensorProto.BFLOAT16}
RAW = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def table_of(source: Source, part: Slice, precision: str) -> TableSpec | None:
    """What the table of a package will be; None for a model without one.

    Records as a pack has them, int8 of a checkpoint; at float32 the rows as they are stored, for a package that is to
    be exact.
    """
    small = sliced(source.model, part)
    if small.ple is None:
        return None
    kind = "int8"
    if isinstance(source, Pack):
        kind = source.ple_kind or kind
    elif precision == "float32":
        placed = source.where[PLE_TABLE]
        kind = placed.dtype if placed.exact and placed.plain is not None else "F32"
    return TableSpec(TABLE, kind, small.ple.rows, len(small.layers), small.ple.dim)


def write_table(path: Path, source: Source, part: Slice, spec: TableSpec, notify: Notify = lambda *_: None) -> None:
    """The table of a slice as a safetensors file with one tensor, streamed; progress in bytes.

    Raises BadCheckpoint (values that are not finite), ReadFailed (full disk, I/O), CannotCreate.
    """
    done = 0

    def counted() -> Iterator[npt.NDArray[np.generic]]:
        nonlocal done
        for piece in pieces(source, part, spec):
            yield piece
            done += piece.nbytes
            notify("exporting", done, spec.nbytes)

    with Writer(path, {PLE_TABLE: spec.stored}) as writer:
        writer.write(PLE_TABLE, counted())


def pieces(source: Source, part: Slice, spec: TableSpec) -> Iterator[npt.NDArray[np.generic]]:
    """The table's bytes in order, a few rows at a time."""
    found = parts(source.model, part)[PLE_TABLE]
    height = max(1, BAND_BYTES // (spec.layers * spec.dim * 4))
    if isinstance(source, Checkpoint) and (spec.kind in BITS or source.where[PLE_TABLE].exact != spec.kind):
        for window in bands(found.window, height):
            values = source.where[PLE_TABLE].values(source.shards, window)
            yield quantize_rows(values.reshape(-1, spec.layers, spec.dim), spec.kind) if spec.kind in BITS else values
        return
    shards, tensor, whole = table_place(source, found)
    for window in bands(whole, height):
        out = np.empty(window.shape, RAW[tensor.itemsize])
        shards.read_window(tensor, window, out)
        yield out


def put_table(model: onnx.ModelProto, path: Path, spec: TableSpec) -> None:
    """Makes a table that is written the graph's initializer of that name."""
    model.graph.initializer.append(initializer(spec, read_header(path)[PLE_TABLE].offset))


def write_graph(path: Path, spec: TableSpec) -> None:
    """``embedding.onnx`` beside a table that is there already."""
    tensor = read_header(path.with_name(spec.file))[PLE_TABLE]
    model = embedding(spec, tensor.offset)
    path.write_bytes(model.SerializeToString(deterministic=True))


def embedding(spec: TableSpec, offset: int) -> onnx.ModelProto:
    """input_ids int64 [batch, tokens] -> per_layer_inputs float32 [batch, tokens, layers, dim], unscaled.

    Ids outside the table use row 0. Values are those of :func:`loaders.formats.quant.dequantize_rows`, bit for bit.
    """
    b = Builder()
    rows(b, b.input(IDS, INT64, ("batch", "tokens")), spec)
    model = b.model(OPSET, "embedding", "Looks up rows of per-layer embeddings.")
    model.graph.initializer.append(initializer(spec, offset))
    return model


def rows(b: Builder, ids: str, spec: TableSpec) -> None:
    """Declares and computes ``per_layer_inputs``."""
    stored = spec.stored[1]
    inside = b.node(
        "And",
        (
            b.node("GreaterOrEqual", (ids, b.constant(0, np.int64))),
            b.node("Less", (ids, b.constant(spec.rows, np.int64))),
        ),
    )
    found = b.node("Gather", (PLE_TABLE, b.node("Where", (inside, ids, b.constant(0, np.int64)))), axis=0)
    last = stored[1] // spec.layers
    found = b.node("Reshape", (found, b.ints(0, 0, spec.layers, last)))
    if spec.kind in BITS:
        found = b.node("Mul", (codes(b, piece(b, found, SCALE_BYTES, last), spec.kind), scales(b, found)))
    elif spec.kind != "F32":
        found = b.node("Cast", (found,), to=FLOAT)
    b.node("Identity", (found,), name=b.output(ROWS, FLOAT, ("batch", "tokens", spec.layers, spec.dim)))


def initializer(spec: TableSpec, offset: int) -> TensorProto:
    """The initializer that is the table, in a file beside the graph."""
    found = TensorProto(
        name=PLE_TABLE,
        data_type=TYPES.get(spec.kind, TensorProto.UINT8),
        dims=spec.stored[1],
        data_location=TensorProto.EXTERNAL,
    )
    location = spec.file.rpartition("/")[2]
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(spec.nbytes))):
        found.external_data.add(key=key, value=value)
    return found


def piece(b: Builder, records: str, start: int, stop: int) -> str:
    """Bytes of every record."""
    return b.node("Slice", (records, b.ints(start), b.ints(stop), b.ints(-1)))


def scales(b: Builder, records: str) -> str:
    """float32 [.., layers, 1]: the float16 at the beginning of each record, out of its two bytes.

    The high byte, which has the sign, the exponent and two bits of the mantissa, says what a scale is with a low byte
    of zero, and what each step of the low byte adds: two tables of 256 numbers, exact where scales are finite.
    """
    low, high = piece(b, records, 0, 1), piece(b, records, 1, 2)
    base, step = half_tables()
    index = b.node("Cast", (high,), to=INT32)
    steps = b.node("Mul", (b.node("Gather", (b.floats(step), index)), b.node("Cast", (low,), to=FLOAT)))
    return b.node("Add", (b.node("Gather", (b.floats(base), index)), steps))


def half_tables() -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """float32 [256] each, by a float16's high byte: its value with a low byte of zero, and what 1 more there adds."""
    high = np.arange(256)
    exponent, mantissa = (high >> 2) & 31, high & 3
    step = 2.0 ** (np.maximum(exponent, 1) - 25) * np.where(high & 128, -1.0, 1.0)
    base = step * (256 * mantissa + np.where(exponent > 0, 1024, 0))
    return base.astype(np.float32), step.astype(np.float32)


def codes(b: Builder, stored: str, kind: str) -> str:
    """float32 [.., dim] of the codes' bytes. Arithmetic on floats, which every build of every runtime has."""
    wide = b.node("Cast", (stored,), to=FLOAT)
    if kind == "int8":
        # Two's complement: bytes from 128 on are 256 less.
        beyond = b.node("Floor", (b.node("Mul", (wide, b.floats(1 / 128))),))
        return b.node("Sub", (wide, b.node("Mul", (beyond, b.floats(256)))))
    high = b.node("Floor", (b.node("Mul", (wide, b.floats(1 / 16))),))
    low = b.node("Sub", (wide, b.node("Mul", (high, b.floats(16)))))
    return b.node("Sub", (b.node("Concat", (low, high), axis=-1), b.floats(8)))
