"""The row file of a package, and the graph that looks rows up in it: bit for bit what edge's own reader finds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.store.ple import in_table
from export.ple import GRAPH, TABLE, embedding, half_tables, table_of, write_graph, write_table
from loaders.checkpoint import Checkpoint
from loaders.formats.buffers import to_float32
from loaders.formats.facts import TableSpec
from loaders.formats.pack import Pack
from loaders.formats.placed import RAW
from loaders.formats.quant import BITS, dequantize_rows, quantize_rows, record_bytes
from loaders.formats.safetensors import Shards
from loaders.formats.safetensors_writer import Writer
from loaders.network.matformer import Slice, full
from loaders.network.tensors import PLE_TABLE
from loaders.packing import write_pack
from loaders.slices import resolve
from tests.small import VOCAB, built, gemma3n_fixture  # noqa: F401

Found = onnxruntime.InferenceSession


def session(folder: Path) -> Found:
    return onnxruntime.InferenceSession(folder / GRAPH, providers=["CPUExecutionProvider"])


def looked_up(graph: Found, ids: np.ndarray) -> np.ndarray:
    found = graph.run(None, {"input_ids": ids})[0]
    assert isinstance(found, np.ndarray)
    return found


def written(folder: Path, table: np.ndarray, rows: TableSpec) -> Found:
    """A graph over a table of our own making."""
    with Writer(folder / TABLE, {PLE_TABLE: (rows.stored[0], table.shape)}) as writer:
        writer.write(PLE_TABLE, [table])
    write_graph(folder / GRAPH, rows)
    return session(folder)


def test_every_finite_scale_is_what_numpy_makes_of_its_bytes() -> None:
    base, step = half_tables()
    bits = np.arange(1 << 16).astype(np.uint16)
    wanted = bits.view(np.float16).astype(np.float32)
    finite = np.isfinite(wanted)
    found = base[bits >> 8] + step[bits >> 8] * (bits & 255).astype(np.float32)
    assert np.array_equal(found[finite], wanted[finite])
    assert finite.sum() == 63488, "subnormal and negative ones among them"


@pytest.mark.parametrize("kind", list(BITS))
def test_every_code_with_every_scale(tmp_path: Path, kind: str) -> None:
    """Each finite scale is there, negative and subnormal, with codes that take every value of a byte."""
    dim, layers = 64, 8
    bits = np.arange(1 << 16).astype(np.uint16)
    scales = bits[np.isfinite(bits.view(np.float16))].reshape(-1, layers)
    records = np.empty((len(scales), layers, record_bytes(dim, kind)), np.uint8)
    records[..., :2] = scales[..., None].view(np.uint8)
    size = records.shape[2] - 2
    records[..., 2:] = (np.arange(scales.size * size) * 37 % 256).reshape(len(scales), layers, size)
    assert {*records[0, :, 2:].ravel()} == set(range(256))
    flat = records.reshape(len(scales), -1)
    graph = written(tmp_path, flat, TableSpec(TABLE, kind, len(scales), layers, dim))
    found = looked_up(graph, np.arange(len(scales))[None])[0]
    assert np.array_equal(found, dequantize_rows(flat, layers, dim, kind))


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(list(BITS)), st.integers(1, 5), st.integers(1, 40).map(lambda n: 2 * n),
    st.lists(st.integers(-(2**62), 2**62) | st.integers(-3, 12), min_size=1, max_size=8), st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_any_ids_any_shape(
    tmp_path_factory: pytest.TempPathFactory, kind: str, layers: int, dim: int, ids: list[int], seed: int
) -> None:
    """Ids outside the table use row 0, as edge's reader does."""
    rng = np.random.default_rng(seed)
    values = (rng.standard_normal((9, layers, dim)) * 10.0 ** rng.integers(-8, 4, (9, layers, 1))).astype(np.float32)
    records = quantize_rows(values, kind)
    graph = written(tmp_path_factory.mktemp("rows"), records, TableSpec(TABLE, kind, 9, layers, dim))
    wanted = dequantize_rows(records[in_table(np.array(ids), 9)], layers, dim, kind)
    assert np.array_equal(looked_up(graph, np.array([ids, ids[::-1]])), np.stack([wanted, wanted[::-1]]))


def rows_in(folder: Path, source: Checkpoint | Pack, part: Slice, precision: str) -> tuple[TableSpec, np.ndarray]:
    """Writes table and graph of a slice; what the file holds."""
    rows = table_of(source, part, precision)
    assert rows is not None
    seen: list[tuple[int, int]] = []
    write_table(folder / TABLE, source, part, rows, lambda what, done, total: seen.append((done, total)))
    assert seen[-1] == (rows.nbytes, rows.nbytes)
    write_graph(folder / GRAPH, rows)
    with Shards.open(folder) as shards:
        tensor = shards.tensors[PLE_TABLE]
        assert (tensor.dtype, tensor.shape) == rows.stored
        raw = np.empty(tensor.shape, np.uint8 if tensor.dtype == "U8" else RAW[tensor.dtype])
        shards.read_into(tensor, raw)
    return rows, raw


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packs")
    for ple in BITS:
        checkpoint = Checkpoint.open(built("gemma3n"))
        write_pack(checkpoint, folder / ple, ("int4",), ple=ple)
        checkpoint.close()
    return folder


@pytest.mark.parametrize("name", ["full", "skip-first-shared"])
@pytest.mark.parametrize("kind", list(BITS))
def test_records_of_a_pack_are_kept_as_they_are(tmp_path: Path, packed: Path, kind: str, name: str) -> None:
    pack = Pack.open(packed / kind)
    part = resolve(pack.model, pack.family, name)
    rows, raw = rows_in(tmp_path, pack, part, "int4")
    assert rows.kind == kind
    shards, tensor = pack.table()
    whole = np.empty(tensor.shape, np.uint8)
    shards.read_into(tensor, whole)
    pack.close()
    layers = len(pack.model.layers)
    assert np.array_equal(raw.reshape(rows.rows, rows.layers, -1), whole.reshape(rows.rows, layers, -1)[:, part.keep])
    ids = np.arange(VOCAB)[None]
    wanted = dequantize_rows(raw[in_table(ids[0], rows.rows)], rows.layers, rows.dim, kind)
    assert np.array_equal(looked_up(session(tmp_path), ids)[0], wanted)


def test_a_checkpoint_gives_the_records_its_pack_has(tmp_path: Path, packed: Path) -> None:
    pack, checkpoint = Pack.open(packed / "int8"), Checkpoint.open(built("gemma3n"))
    part = resolve(pack.model, pack.family, "half+skip-first-shared")
    found = []
    for i, source in enumerate((pack, checkpoint)):
        (tmp_path / str(i)).mkdir()
        found.append(rows_in(tmp_path / str(i), source, part, "float16"))
        source.close()
    assert found[0][0] == found[1][0]
    assert np.array_equal(found[0][1], found[1][1])


@pytest.mark.parametrize(("name", "kind"), [("gemma3n", "F32"), ("gemma3n-bf16", "BF16")])
def test_float32_keeps_rows_as_they_are_stored(tmp_path: Path, name: str, kind: str) -> None:
    checkpoint = Checkpoint.open(built(name))
    part = resolve(checkpoint.model, checkpoint.family, "skip-first-shared")
    rows, raw = rows_in(tmp_path, checkpoint, part, "float32")
    assert rows.kind == kind
    placed = checkpoint.where[PLE_TABLE]
    whole = placed.values(checkpoint.shards, placed.window).reshape(rows.rows, -1, rows.dim)[:, part.keep]
    checkpoint.close()
    assert np.array_equal(to_float32(raw, kind).reshape(whole.shape), whole)
    ids = np.array([[0, 5, rows.rows - 1, rows.rows, -1]])
    assert np.array_equal(looked_up(session(tmp_path), ids)[0], whole[in_table(ids[0], rows.rows)])


def test_the_graph_holds_no_table_and_only_standard_operators(tmp_path: Path, packed: Path) -> None:
    pack = Pack.open(packed / "int4")
    rows, _ = rows_in(tmp_path, pack, full(pack.model), "int4")
    pack.close()
    assert (tmp_path / GRAPH).stat().st_size < 8192
    model = onnx.load(tmp_path / GRAPH, load_external_data=False)
    assert {node.domain for node in model.graph.node} == {""}
    onnx.checker.check_model(str(tmp_path / GRAPH), full_check=True)
    large = [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    assert [t.name for t in large] == [PLE_TABLE]
    facts = {e.key: e.value for e in large[0].external_data}
    assert facts["location"] == TABLE
    assert int(facts["offset"]) + int(facts["length"]) == (tmp_path / TABLE).stat().st_size
    assert int(facts["length"]) == rows.nbytes


def test_a_model_without_per_layer_embeddings_has_no_table() -> None:
    checkpoint = Checkpoint.open(built("llama"))
    assert table_of(checkpoint, full(checkpoint.model), "float32") is None
    checkpoint.close()
    assert embedding(TableSpec(TABLE, "F16", 4, 1, 2), 64).graph.initializer[-1].data_type == onnx.TensorProto.FLOAT16
