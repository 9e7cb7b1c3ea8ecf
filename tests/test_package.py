"""Exported packages: what is read back is what was described, and what was tampered with is refused in one line."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from loaders.errors import BadCheckpoint, EdgeError, MissingFile, Unsupported
from loaders.families import family_of
from loaders.formats import facts as facts_module
from loaders.formats import manifest as manifests
from loaders.formats import onnx_file
from loaders.formats.config import Config
from loaders.formats.contract import agree_model
from loaders.formats.pack import Pack
from loaders.formats.package import (
    CacheSpec,
    Contract,
    Package,
    TensorSpec,
    describe,
    is_package,
)
from loaders.formats.quant import dequantize_rows
from loaders.formats.recipe import Recipe
from loaders.formats.safetensors_writer import Writer
from loaders.network.matformer import Slice, full
from loaders.network.spec import LatentAttention, Rope
from loaders.network.tensors import PLE_TABLE, tensors
from tests import small
from tests.packaged import (
    DATA,
    FILLER,
    GRAPH,
    MAKERS,
    TABLE,
    Change,
    contract_of,
    edit,
    error_of,
    facts_of,
    opened,
    raw_graph,
    refused,
    reseal,
    sound,
    spec_of,
    table_of,
    weight,
    write,
)


@pytest.fixture(autouse=True)
def restored(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a property left in the shared package is put right."""
    yield
    if "shared" in request.fixturenames:
        shutil.copytree(sound()[1], request.getfixturevalue("shared"), dirs_exist_ok=True)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """One to be changed."""
    return Path(shutil.copytree(sound()[1], tmp_path / "package"))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that a property changes again and again."""
    return Path(shutil.copytree(sound()[1], tmp_path_factory.mktemp("shared") / "package"))


# What was written is what is read


def test_round_trip(package: Path) -> None:
    model = spec_of("gemma3n")
    facts = facts_of(model)
    found = Package.open(package)
    assert (found.model, found.facts, found.contract) == (model, facts, facts.contract)
    assert found.family is family_of("gemma3n", "")
    assert (found.slice, found.source_slice) == (full(model), replace(full(model), name="all of it"))
    assert (found.recipe, found.precisions, found.dtype) == (Recipe("int4", "int8"), ("int4",), "int4")
    assert (found.profile, found.layout, found.context, found.min_ort) == ("ort", "edge", 512, "1.29")
    assert (found.graph, found.ple_kind, found.measured) == (package / GRAPH, "int8", ())
    assert found.raw_config == small.GEMMA3N
    assert found.onnx.metadata == {"made by": "a test"}
    assert found.onnx.operators == {
        ("", "Gather"), ("com.microsoft", "MatMulNBits"), ("", "If"), ("", "Cast"), ("", "Constant"),
    }  # fmt: skip
    assert found.onnx.nodes == 6
    shards, tensor = found.table()
    raw = np.empty(tensor.shape, np.uint8)
    shards.read_into(tensor, raw)
    assert model.ple is not None
    rows = dequantize_rows(raw, len(model.layers), model.ple.dim, "int8")
    assert np.abs(rows - table_of(model)).max() < 0.05
    done: list[tuple[int, int]] = []
    size = sum(path.stat().st_size for path in package.iterdir() if path.name != manifests.NAME)
    assert found.verify(lambda what, n, total: done.append((n, total))) == size == sum(found.sizes().values())
    assert done[-1] == (size, size)
    found.close()


def test_weights_are_listed_and_counted_once() -> None:
    found = Package.open(sound()[1])
    model = found.model
    by_name = {w.name: w for w in found.weights_facts}
    assert by_name["embed"] == onnx_file.External(
        "embed", "float32", (model.vocab, model.dim), DATA, 0, 4 * model.vocab * model.dim
    )
    assert (by_name["layers.0.attn.k.codes"].dtype, by_name["layers.0.attn.k.codes"].length) == ("int4", 11)
    stored = found.stored
    assert stored.keys() == tensors(model).keys()
    assert stored["embed"] == by_name["embed"].length
    assert stored["layers.0.attn.q"] == model.dim * 32
    assert sum(v for name, v in stored.items() if name.startswith("layers.1.ffn")) == 4 * FILLER
    assert stored[PLE_TABLE] == found.table()[1].nbytes
    found.close()


def test_without_a_table(tmp_path: Path) -> None:
    write(tmp_path / "p", "llama")
    found = Package.open(tmp_path / "p")
    assert (found.ple_kind, found.shards) == (None, None)
    found.close()


@pytest.mark.parametrize("kind", ["int4", "F16"])
def test_other_kinds_of_table(tmp_path: Path, kind: str) -> None:
    write(tmp_path / "p", "gemma3n", kind=kind)
    found = Package.open(tmp_path / "p")
    assert found.ple_kind == kind
    assert found.table()[1].dtype == {"int4": "U8", "F16": "F16"}[kind]
    found.close()


def test_the_layout_for_the_web(tmp_path: Path) -> None:
    """Graph and weights a folder further down; a key of config.json that is not for us."""
    write(tmp_path / "p", "gemma3n", "onnx/", layout="web")
    opened(tmp_path / "p")
    (tmp_path / "p" / "onnx" / "more").write_text("x")
    refused(tmp_path / "p", "onnx/more: not a file of this package")


def test_it_is_a_package_and_not_a_pack(tmp_path: Path) -> None:
    folder = sound()[1]
    assert is_package(folder)
    assert not manifests.is_pack(folder)
    assert not is_package(tmp_path)
    with pytest.raises(EdgeError, match="format"):
        Pack.open(folder)
    (tmp_path / manifests.NAME).write_text('{"format": "edge pack"}')
    assert not is_package(tmp_path)
    refused(tmp_path, "format")


def test_the_stamp_is_of_every_file(package: Path) -> None:
    found = Package.open(package)
    before = found.stamp()
    assert before == found.stamp()
    for name in found.manifest["files"]:
        os.utime(package / name)
        assert found.stamp() != before
        before = found.stamp()
    os.unlink(package / DATA)
    with pytest.raises(EdgeError, match="changed"):
        found.stamp()
    found.close()


@pytest.mark.parametrize(
    "changes",
    [
        {"graph": "other.onnx"},
        {"graph": "config.json"},
        {"ple": None},
        {"slice": Slice("x", (0,), (128,))},
        {"fingerprint": "x"},
        {"profile": "best"},
        {"head": "float32"},
        {"min_ort": "latest"},
        {"contract": contract_of(spec_of("llama"))},
    ],
)
def test_what_nobody_could_open_is_not_described(package: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(BadCheckpoint):
        describe(package, facts_of(spec_of("gemma3n"), **changes))


def test_a_contract_reads_back_from_json() -> None:
    found = contract_of(spec_of("gemma3n"))
    again = Contract.parse(Config(json.loads(json.dumps(found.as_dict())), "x"))
    assert again == found
    assert found.input("input_ids") == found.inputs[0]
    assert (found.output("logits"), found.output("x")) == (found.outputs[0], None)


# Files that are not what was written

FILES = ("config.json", "tokenizer.json", GRAPH, DATA, TABLE, manifests.NAME)


@pytest.mark.parametrize("name", FILES)
def test_any_byte_that_fell_over(package: Path, name: str) -> None:
    whole = (package / name).read_bytes()
    rng = np.random.default_rng(len(name))
    for at in (0, len(whole) - 1, *rng.integers(0, len(whole), 6)):
        flipped = bytearray(whole)
        flipped[at] ^= 1 << int(rng.integers(8))
        if name == manifests.NAME and flipped[at : at + 1].isspace() and whole[at : at + 1].isspace():
            continue
        (package / name).write_bytes(flipped)
        with pytest.raises(EdgeError) as caught:
            opened(package)
        assert caught.value.exit_code in ((65, 78) if name == manifests.NAME else (65,))
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)
        if name not in (manifests.NAME, DATA):  # the only one above a MiB: the others are summed when opened
            refused(package, name, "sha256")


@pytest.mark.parametrize("name", FILES)
def test_any_file_of_another_length_or_kind(package: Path, tmp_path: Path, name: str) -> None:
    path, whole = package / name, (package / name).read_bytes().rstrip()
    for data in (b"", whole[:1], whole[: len(whole) // 2], whole[:-1], whole + b"\0x"):
        path.write_bytes(data)
        refused(package, name)
    for make in (path.mkdir, lambda: os.mkfifo(path)):
        path.unlink() if path.is_file() else None
        make()
        refused(package, name, "regular file", by=MissingFile)
        path.rmdir() if path.is_dir() else path.unlink()
    refused(package, name, by=MissingFile)
    other = tmp_path / "other"
    other.write_bytes(whole)
    path.symlink_to(other)
    refused(package, name, "symbolic link")
    path.unlink()
    path.symlink_to(tmp_path / "nothing")
    refused(package, name, by=MissingFile) if name == manifests.NAME else refused(package, name, "symbolic link")
    path.unlink()
    os.link(other, path)
    refused(package, name, "hard links")


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", "extra.onnx", "onnx", "x"])
def test_a_file_too_many(package: Path, name: str) -> None:
    (package / name).mkdir() if name == "onnx" else (package / name).write_text("x")
    refused(package, f"{name}: not a file of this package")
    (package / ".DS_Store").write_text("hidden files are not looked at")
    (package / name).rmdir() if name == "onnx" else (package / name).unlink()
    opened(package)


def test_a_folder_of_graphs_that_is_a_link(tmp_path: Path) -> None:
    write(tmp_path / "p", "llama", "onnx/", layout="web")
    (tmp_path / "p" / "onnx").rename(tmp_path / "elsewhere")
    (tmp_path / "p" / "onnx").symlink_to(tmp_path / "elsewhere")
    refused(tmp_path / "p", "onnx: a symbolic link")


def test_no_folder_and_no_manifest(tmp_path: Path) -> None:
    refused(tmp_path, manifests.NAME, by=MissingFile)
    refused(tmp_path / "no", by=MissingFile)


# Manifests that are not what was written


def test_an_edited_manifest(package: Path) -> None:
    data = json.loads((package / manifests.NAME).read_bytes())
    data["context"] += 1
    (package / manifests.NAME).write_text(json.dumps(data))
    refused(package, "seal", "export it again")


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_version(package: Path, version: object) -> None:
    reseal(package, lambda m: m.update(version=version))
    refused(package, "package version", "Export the model again", by=Unsupported)


def put(*path: Any, value: Any) -> Change:
    """Sets a value deep in a manifest."""

    def change(manifest: Any) -> None:
        for key in path[:-1]:
            manifest = manifest[key]
        manifest[path[-1]] = value

    return change


def drop(*path: Any) -> Change:
    """Takes one out."""

    def change(manifest: Any) -> None:
        for key in path[:-1]:
            manifest = manifest[key]
        del manifest[path[-1]]

    return change


def renamed(name: str) -> Change:
    """The weights under another name."""
    return lambda m: m["files"].update({name: m["files"].pop(DATA)})


KEY = "past_key_values.0.key"
HOSTILE: list[tuple[Change, str]] = [
    *((renamed(n), "file name") for n in ("../x", "/etc/passwd", "a/b", "onnx/", "onnx/../x", "onnx/.x", "onnx")),
    *((renamed(n), "file name") for n in (".x", "..", "", "manifest.json", "x\0y", "x" * 300, "a\nb", "C:x")),
    (put("files", value={}), "files"),
    (put("files", DATA, "bytes", value=-1), "bytes"),
    (put("files", DATA, "bytes", value=2**70), DATA),
    (put("files", DATA, "sha256", value="x"), "sha256"),
    (drop("files", "config.json"), "config.json: not a file"),
    (drop("files", DATA), f"{DATA}: not a file"),
    (put("graph", value="tokenizer.json"), "graph"),
    (put("graph", value="../model.onnx"), "graph"),
    (put("graph", value=5), "graph"),
    (put("more", value=1), "more"),
    (drop("context"), "context"),
    (put("context", value=0), "context"),
    (put("context", value=2**40), "context"),
    (put("context", value=2**30), "context"),
    (put("context", value=True), "context"),
    (put("opset", value=20), "opset"),
    (put("profile", value="standard"), "com.microsoft"),
    (put("profile", value="mine"), "profile"),
    (put("layout", value=[]), "layout"),
    (put("precision", value="int2"), "precision"),
    (put("precision", value="float32"), "head"),
    (put("head", value="F32"), "head"),
    (put("min_ort", value="1.29; rm"), "min_ort"),
    (put("fingerprint", value="../../x"), "fingerprint"),
    (put("edge", value="a\nb"), "edge"),
    (put("source", value="x"), "source"),
    (put("source", "path", value="/x"), "source.path"),
    (put("family", value="llama"), "spec"),
    (put("spec", value=None), "spec"),
    (put("spec", "dim", value=65), "spec"),
    (put("spec", "tied", value=1), "spec"),
    (put("spec", "layers", 3, "attention", "kv_heads", value=4), "spec"),
    (put("spec", "layers", 3, "attention", "new", value=4), "spec"),
    (put("slice", "keep", 0, value=3), "slice"),
    (put("slice", "widths", 0, value=3), "slice"),
    (put("slice", "keep", value=[]), "slice"),
    (put("memory", value=[]), "memory"),
    (put("memory", "512", "bytes", "weights", value=-5), "memory"),
    (put("memory", "0", value={"bytes": {}, "total_bytes": 0}), "memory"),
    (put("parity", value=5), "parity"),
    (put("ple", value=None), "ple"),
    (put("ple", "file", value="../ple.safetensors"), "ple.file"),
    (put("ple", "file", value="tokenizer.json"), "tokenizer.json"),
    (put("ple", "kind", value="int4"), TABLE),
    (put("ple", "kind", value="F64"), "ple.kind"),
    (put("ple", "rows", value=315), "ple"),
    (put("ple", "dim", value=2**31), "ple.dim"),
]
CONTRACTS: list[tuple[Change, str]] = [
    (put("inputs", value={}), "inputs"),
    (put("inputs", value=[]), "inputs"),
    (drop("inputs", "input_ids"), "input_ids"),
    (drop("inputs", KEY), "caches[0].inputs"),
    (drop("outputs", "logits"), "logits"),
    (drop("outputs", "present.1.value"), "caches[1].outputs"),
    (put("inputs", "more", value={"dtype": "int64", "shape": []}), "more"),
    (put("inputs", "a\nb", value={"dtype": "int64", "shape": []}), "inputs"),
    (put("inputs", "input_ids", "dtype", value="int32"), "input_ids"),
    (put("inputs", "input_ids", "dtype", value="string"), "dtype"),
    (put("inputs", "input_ids", "dtype", value=7), "dtype"),
    (put("inputs", "input_ids", "shape", value=["batch"]), "input_ids"),
    (put("inputs", "input_ids", "shape", value=["batch", 7]), "input_ids"),
    (put("inputs", "input_ids", "shape", value=["batch", -1]), "shape"),
    (put("inputs", "input_ids", "shape", value=["batch", 2**40]), "shape"),
    (put("inputs", "input_ids", "shape", value=["batch", "to\nkens"]), "shape"),
    (put("inputs", "input_ids", "shape", value=None), "shape"),
    (put("inputs", "input_ids", "optional", value=True), "default"),
    (put("inputs", "input_ids", value={"dtype": "int64", "shape": ["a", "b"], "optional": True, "default": 0}), "ids"),
    (put("inputs", "num_logits_to_keep", "default", value=2), "num_logits_to_keep"),
    (put("inputs", "num_logits_to_keep", value={"dtype": "int64", "shape": []}), "num_logits_to_keep"),
    (put("inputs", "num_logits_to_keep", "more", value=2), "more"),
    (put("outputs", "logits", "optional", value=True), "logits"),
    (put("outputs", "logits", "shape", 2, value=5), "logits"),
    (put("inputs", KEY, "shape", 1, value=4), "caches[0]"),
    (put("inputs", KEY, "dtype", value="float16"), "caches[0]"),
    (put("inputs", "per_layer_inputs", "shape", 2, value=11), "per_layer_inputs"),
    (put("caches", value=None), "caches"),
    (put("caches", value=[]), "caches"),
    (put("caches", 0, value=[]), "caches[0]"),
    (put("caches", 0, "layer", value=1), "caches[1].layer"),
    (put("caches", 0, "layer", value=11), "caches"),
    (put("caches", 0, "layer", value=-1), "caches[0].layer"),
    (put("caches", 0, "kind", value="best"), "caches[0].kind"),
    (put("caches", 0, "kind", value="latent"), "caches[0]"),
    (put("caches", 2, "kind", value="window"), "caches[2]"),
    (put("caches", 0, "span", value=9), "caches[0].span"),
    (put("caches", 2, "span", value=8), "caches[2].span"),
    (put("caches", 0, "heads", value=2**30), "caches[0]"),
    (put("caches", 0, "value_dim", value=8), "caches[0]"),
    (put("caches", 0, "dim", value=2**60), "caches[0].dim"),
    (put("caches", 0, "dtype", value="float16"), "caches[0]"),
    (put("caches", 0, "inputs", value=[KEY, KEY]), "caches[0].inputs"),
    (put("caches", 1, "inputs", value=[KEY, "past_key_values.1.value"]), "caches[1].inputs"),
    (put("caches", 0, "inputs", value=[KEY]), "caches[0]"),
    (put("caches", 0, "inputs", value=["input_ids", KEY]), "caches[0].inputs"),
    (put("caches", 0, "more", value=0), "caches[0].more"),
]


@pytest.mark.parametrize(("change", "words"), [*HOSTILE, *CONTRACTS])
def test_a_hostile_manifest(package: Path, change: Change, words: str) -> None:
    reseal(package, change)
    refused(package, words)


def test_spec_fields_that_an_older_version_did_not_know(package: Path) -> None:
    """Their default is what it meant."""
    reseal(package, drop("spec", "lookahead"))
    opened(package)
    reseal(package, drop("spec", "context"))
    refused(package, "spec")


def test_another_model_in_config(package: Path) -> None:
    config = {**small.GEMMA3N, "sliding_window": 9}
    (package / "config.json").write_text(json.dumps(config))
    reseal(package)
    refused(package, "spec")
    (package / "config.json").write_text(json.dumps({**small.GEMMA3N, "model_type": "bert"}))
    reseal(package)
    refused(package, "bert", by=Unsupported)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=5,
)
SHARED = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@SHARED
@given(data=st.data())
def test_any_value_of_a_manifest(shared: Path, data: st.DataObject) -> None:
    """Sealed. What is not refused is not a crash either."""
    whole = json.loads((sound()[1] / manifests.NAME).read_bytes())
    place: Any = whole
    while isinstance(place, dict | list) and place:
        keys = sorted(place) if isinstance(place, dict) else range(len(place))
        key = data.draw(st.sampled_from(list(keys)))
        inner = place[key]
        if not isinstance(inner, dict | list) or not inner or data.draw(st.integers(0, 4)) == 0:
            place[key] = data.draw(JSON)
            break
        place = inner
    (shared / manifests.NAME).write_bytes(manifests.sealed(whole))
    error = error_of(lambda: Package.open(shared).close())
    assert error is None or error.exit_code in (65, 66, 78)


# Graphs that are not what was written


def entry(key: str, value: str | None, name: str = "embed") -> Change:
    """One entry of an initializer's external_data; None takes it out."""

    def change(proto: onnx.ModelProto) -> None:
        tensor = next(t for t in proto.graph.initializer if t.name == name)
        found = [e for e in tensor.external_data if e.key == key]
        if value is None:
            tensor.external_data.remove(found[0])
        elif found:
            found[0].value = value
        else:
            tensor.external_data.add(key=key, value=value)

    return change


def tensor(act: Change, name: str = "embed") -> Change:
    """Something done to an initializer."""
    return lambda proto: act(next(t for t in proto.graph.initializer if t.name == name))


def outside(name: str = "hidden") -> TensorProto:
    """A tensor whose bytes are wherever its author likes."""
    return weight(name, TensorProto.UINT8, (8,), 0, 8, "/etc/passwd")


def nested(proto: onnx.ModelProto, deep: int = 1) -> None:
    """An external initializer in a graph in a graph."""
    graph = onnx.GraphProto(name="g", initializer=[outside()])
    for _ in range(deep):
        graph = onnx.GraphProto(node=[helper.make_node("Loop", [], ["a"], body=graph)])
    proto.graph.node.append(helper.make_node("Loop", [], ["b"], body=graph))


def constant(proto: onnx.ModelProto, many: bool = False, inner: bool = False) -> None:
    """An external tensor as an attribute."""
    node = helper.make_node("Constant", [], ["q"])
    attribute = node.attribute.add(name="value", type=onnx.AttributeProto.TENSOR)
    attribute.tensors.append(outside()) if many else attribute.t.CopyFrom(outside())
    if inner:
        proto.graph.node[2].attribute[0].g.node.append(node)
    else:
        proto.graph.node.append(node)


def inline(dims: tuple[int, ...], dtype: int = TensorProto.FLOAT, **values: Any) -> Change:
    """An initializer in the file."""
    return lambda p: p.graph.initializer.append(TensorProto(name="new", data_type=dtype, dims=dims, **values))


def dims(*sizes: int) -> Change:
    """The embedding, of other dims."""

    def act(found: TensorProto) -> None:
        del found.dims[:]
        found.dims.extend(sizes)

    return tensor(act)


def typed(name: str, dtype: int) -> Change:
    """An input of another type."""

    def change(proto: onnx.ModelProto) -> None:
        value = next(v for v in [*proto.graph.input, *proto.graph.output] if v.name == name)
        value.type.tensor_type.elem_type = dtype

    return change


def sized(name: str, axis: int, size: int) -> Change:
    """An input or output of another size."""

    def change(proto: onnx.ModelProto) -> None:
        value = next(v for v in [*proto.graph.input, *proto.graph.output] if v.name == name)
        value.type.tensor_type.shape.dim[axis].dim_value = size

    return change


VOCAB, DIM = small.VOCAB, 64
GRAPHS: dict[str, tuple[Change, str]] = {
    **{
        f"location {n!r}": (entry("location", n), "location")
        for n in ("../x", "/etc/passwd", "sub/x", "./model.onnx.data", "", ".", "..", ".hidden", "other.data", "x\0y")
    },
    **{f"location {n!r}": (entry("location", n), "location") for n in ("a\\b", "C:x", "x" * 900, "model.onnx.data ")},
    "location of the manifest": (entry("location", manifests.NAME), "location"),
    "location beyond any name": (entry("location", "x" * 2000), "bytes of text"),
    "no location": (entry("location", None), "external_data"),
    "no offset": (entry("offset", None), "external_data"),
    "no length": (entry("length", None), "external_data"),
    "a checksum": (entry("checksum", "x"), "external_data"),
    "prepacked": (entry("prepacked_0", "x|0|9"), "external_data"),
    "location twice": (tensor(lambda t: t.external_data.add(key="location", value="../x")), "twice"),
    "offset past the end": (entry("offset", str(10**9)), "bytes 1000000000"),
    "offset one too far": (entry("offset", str(4 * FILLER + DIM * 32 + 1)), f"{DATA}"),
    "offset beyond any number": (entry("offset", "9" * 30), "offset"),
    "offset of 64 bits": (entry("offset", str(2**64 - 1)), "offset"),
    **{f"offset {n!r}": (entry("offset", n), "offset") for n in ("-1", "x", "", "1.0", "0x10", " 1", "+1", "01", "１")},
    **{
        f"length {n!r}": (entry("length", n), "length")
        for n in ("-1", "0", "x", "", str(4 * VOCAB * DIM - 1), "9" * 18)
    },
    "other dims": (dims(VOCAB, DIM + 1), "length"),
    "no dims": (dims(), "length"),
    "huge dims": (dims(2**39, 2**39, 2**39), "length"),
    "dims beyond any": (dims(2**62, 4), "dims"),
    "negative dims": (dims(-VOCAB, -DIM), "dims"),
    "nine dims": (dims(*[1] * 7, VOCAB, DIM), "dims"),
    "another type": (tensor(lambda t: setattr(t, "data_type", TensorProto.FLOAT16)), "length"),
    "strings": (tensor(lambda t: setattr(t, "data_type", TensorProto.STRING)), "data_type 8"),
    "no type": (tensor(lambda t: t.ClearField("data_type")), "data_type 0"),
    "type 99": (tensor(lambda t: setattr(t, "data_type", 99)), "data_type 99"),
    "type -1": (tensor(lambda t: setattr(t, "data_type", -1)), "data_type"),
    "values inside too": (tensor(lambda t: setattr(t, "raw_data", b"1234")), "external file"),
    "listed inside too": (tensor(lambda t: t.float_data.append(1)), "external file"),
    "outside, but not said so": (tensor(lambda t: setattr(t, "data_location", 0)), "data_location"),
    "data_location 2": (
        tensor(lambda t: setattr(t, "data_location", 1) or t.ClearField("external_data")),
        "external_data",
    ),
    "segments": (tensor(lambda t: setattr(t.segment, "begin", 0)), "segment"),
    "twice the same": (lambda p: p.graph.initializer.append(p.graph.initializer[2]), "twice"),
    "in a nested graph": (nested, "main graph"),
    "in a nested graph, deeper": (lambda p: nested(p, 5), "main graph"),
    "in graphs without end": (lambda p: nested(p, 12), "nested"),
    "in a constant": (constant, "main graph"),
    "in a list of constants": (lambda p: constant(p, many=True), "main graph"),
    "in a constant of a nested graph": (lambda p: constant(p, inner=True), "main graph"),
    "inside without values": (inline((2**30, 2**10)), "values listed"),
    "inside, too few": (inline((3,), raw_data=b"12345678"), "raw_data"),
    "inside, too many": (inline((1,), float_data=[1, 2]), "values listed"),
    "inside, both": (inline((1,), raw_data=b"1234", float_data=[1]), "raw_data"),
    "inside, in another list": (inline((1,), int64_data=[1]), "values listed"),
    "inside, strings": (inline((1,), TensorProto.STRING, string_data=[b"x"]), "string_data"),
    "functions": (lambda p: p.functions.add(name="f", domain="com.microsoft"), "functions"),
    "training": (lambda p: p.training_info.add(), "training_info"),
    "sparse": (lambda p: p.graph.sparse_initializer.add(), "sparse_initializer"),
    "sparse attribute": (
        lambda p: p.graph.node[0].attribute.add(name="s").sparse_tensor.dims.append(1),
        "sparse_tensor",
    ),
    "reference": (lambda p: p.graph.node[0].attribute.add(name="s", ref_attr_name="x"), "ref_attr_name"),
    "overload": (lambda p: setattr(p.graph.node[0], "overload", "x"), "overload"),
    "a domain": (lambda p: setattr(p.graph.node[0], "domain", "com.example"), "com.example"),
    "a domain of a nested graph": (
        lambda p: setattr(p.graph.node[2].attribute[1].g.node[0], "domain", "com.example"),
        "com.example",
    ),
    "training's domain": (lambda p: setattr(p.graph.node[0], "domain", "ai.onnx.preview.training"), "ai.onnx.preview"),
    "an imported domain": (lambda p: p.opset_import.add(domain="com.example", version=1), "com.example"),
    "opset twice": (lambda p: p.opset_import.add(domain="ai.onnx", version=5), "twice"),
    "another opset": (lambda p: setattr(p.opset_import[0], "version", 22), "opset"),
    "no graph": (lambda p: p.ClearField("graph"), "no graph"),
    "an input more": (lambda p: p.graph.input.append(helper.make_tensor_value_info("more", 7, [1])), "more"),
    "an input twice": (lambda p: p.graph.input.append(p.graph.input[0]), "twice"),
    "an input less": (lambda p: p.graph.input.pop(), "graph"),
    "an output less": (lambda p: p.graph.output.pop(), "present"),
    "another type of input": (typed("input_ids", TensorProto.INT32), "input_ids"),
    "a type that is none": (typed("input_ids", 77), "type 77"),
    "another type of cache": (typed(KEY, TensorProto.FLOAT16), KEY),
    "another type of logits": (typed("logits", TensorProto.DOUBLE), "logits"),
    "other heads": (sized(KEY, 1, 1), KEY),
    "a size for a name": (sized("input_ids", 0, 1), "input_ids"),
    "a vast size": (sized("logits", 2, 2**50), "size"),
    "a negative size": (sized("logits", 2, -1), "size -1"),
    "no shape": (lambda p: p.graph.input[0].type.tensor_type.ClearField("shape"), "shape"),
    "a sequence": (lambda p: p.graph.input[0].type.sequence_type.elem_type.SetInParent(), "sequence_type"),
    "no default": (lambda p: p.graph.initializer.pop(0), "num_logits_to_keep"),
    "another default": (
        tensor(lambda t: setattr(t, "raw_data", struct.pack("<q", 10**12)), "num_logits_to_keep"),
        "num_logits_to_keep",
    ),
    "a default for another": (
        lambda p: p.graph.initializer.append(helper.make_tensor("input_ids", TensorProto.INT64, [1], [0])),
        "input_ids",
    ),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_a_hostile_graph(package: Path, name: str) -> None:
    change, words = GRAPHS[name]
    edit(package, change)
    refused(package, words)


def test_a_graph_that_is_only_written_again(package: Path) -> None:
    """What the catalogue changes is all that is wrong with what it made."""
    edit(package, lambda p: None)
    opened(package)


def test_a_second_graph_is_looked_at_too(package: Path) -> None:
    """Other runtimes load it."""
    proto = onnx.load(str(package / GRAPH), load_external_data=False)
    (package / "embedding.onnx").write_bytes(proto.SerializeToString())
    (package / manifests.NAME).write_bytes(describe(package, facts_of(spec_of("gemma3n"))))
    opened(package)
    entry("location", "../x")(proto)
    (package / "embedding.onnx").write_bytes(proto.SerializeToString())
    reseal(package)
    refused(package, "embedding.onnx", "location")


def test_a_table_of_another_shape(package: Path) -> None:
    for specs in (
        {"other": ("U8", (3, 4))},
        {PLE_TABLE: ("U8", (3, 4))},
        {PLE_TABLE: ("U8", (3, 4)), "b": ("F32", (2,))},
    ):
        with Writer(package / TABLE, specs) as writer:
            for name, (dtype, shape) in specs.items():
                writer.write(name, [np.zeros(shape, {"U8": np.uint8, "F32": np.float32}[dtype])])
        reseal(package)
        refused(package, TABLE, PLE_TABLE)


def test_a_table_in_the_place_of_the_table(package: Path) -> None:
    """Listed and sealed: a name that readers of folders prefer."""
    shutil.copy(package / TABLE, package / "model.safetensors")
    reseal(package, lambda m: m["files"].update({"model.safetensors": m["files"][TABLE]}))
    refused(package, TABLE)


@SHARED
@given(at=st.integers(0, len(raw_graph()) - 1), bit=st.integers(0, 7))
def test_any_bit_of_a_graph_in_a_package_that_is_sealed_again(shared: Path, at: int, bit: int) -> None:
    whole = bytearray(raw_graph())
    whole[at] ^= 1 << bit
    (shared / GRAPH).write_bytes(whole)
    manifest = json.loads((sound()[1] / manifests.NAME).read_bytes())
    manifest["files"][GRAPH]["sha256"] = hashlib.sha256(whole).hexdigest()
    (shared / manifests.NAME).write_bytes(manifests.sealed(manifest))
    error = error_of(lambda: Package.open(shared).close())
    assert error is None or error.exit_code == 65


def test_a_latent_cache_is_one_buffer_for_both() -> None:
    """Shapes of a contract; a growing one may be of keys alone."""
    wide = ("batch", 1, "past", 24)
    inputs = tuple(TensorSpec(f"past.{key}", "float16", wide) for key in ("key", "value"))
    outputs = tuple(TensorSpec(f"present.{key}", "float16", wide) for key in ("key", "value"))
    names = [tuple(spec.name for spec in specs) for specs in (inputs, outputs)]
    latent = CacheSpec(0, "latent", names[0], names[1], 1, 24, 16, "float16")
    for spec in (latent, replace(latent, kind="growing", inputs=names[0][:1], outputs=names[1][:1])):
        contract = Contract(inputs, outputs, (spec,))
        assert Contract.parse(Config(json.loads(json.dumps(contract.as_dict())), "x")) == contract
    for broken in (replace(latent, dim=23), replace(latent, inputs=names[0][:1], outputs=names[1][:1])):
        with pytest.raises(BadCheckpoint, match=r"caches\[0\]"):
            Contract.parse(Config(Contract(inputs, outputs, (broken,)).as_dict(), "x"))


def test_a_latent_cache_is_that_of_the_model() -> None:
    """Padded to whole vectors at most."""
    attention = LatentAttention(2, None, 16, 16, 12, 0.2, Rope(1e4, 4))
    base = spec_of("llama")
    model = replace(base, layers=(replace(base.layers[0], attention=attention),))
    logits = TensorSpec("logits", "float32", ("batch", "kept", model.vocab))

    def agrees(kind: str, heads: int, dim: int, value_dim: int) -> bool:
        cache = CacheSpec(0, kind, ("k", "v"), ("k", "v"), heads, dim, value_dim)
        error = error_of(lambda: agree_model(Contract((), (logits,), (cache,)), model, "x"))
        return error is None

    for sizes in ((1, 20, 16), (1, 20, 20), (1, 24, 16), (1, 24, 24)):
        assert agrees("latent", *sizes)
        assert agrees("growing", *sizes)
    for sizes in ((1, 32, 16), (2, 20, 16), (1, 20, 8), (1, 24, 20)):
        assert not agrees("latent", *sizes)
    assert agrees("growing", 2, 20, 12)
    assert not agrees("latent", 2, 20, 12)


def test_specs_as_data() -> None:
    for name in MAKERS:
        model = spec_of(name)
        plain = json.loads(json.dumps(facts_module.plain_spec(model)))
        assert facts_module.same_spec(model, plain)
        assert not facts_module.same_spec(replace(model, layers=model.layers[:-1]), plain)
        assert not facts_module.same_spec(model, {**plain, "type": "Layer"})
