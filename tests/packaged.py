"""Small exported packages. Their graphs compute nothing of use; what they declare is what real ones declare."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from loaders.errors import BadCheckpoint, EdgeError
from loaders.families import family_of
from loaders.formats import manifest as manifests
from loaders.formats.config import Config
from loaders.formats.package import (
    CacheSpec,
    Contract,
    Facts,
    Package,
    TableSpec,
    TensorSpec,
    describe,
)
from loaders.formats.quant import quantize_rows
from loaders.formats.safetensors_writer import Writer
from loaders.network.matformer import full
from loaders.network.spec import Model
from loaders.network.tensors import PLE_TABLE
from tests import small

GRAPH, DATA, TABLE = "model.onnx", "model.onnx.data", "ple.safetensors"
# A layer that keeps a window alone, one that others read, and the rest.
WINDOWED = (0, 1)
FILLER = 300_000  # floats: the data file is too large to be summed when a package is opened
Change = Callable[[Any], object]
MAKERS = {"gemma3n": small.GEMMA3N, "llama": small.LLAMA}


def spec_of(name: str) -> Model:
    """The model of a small config."""
    return family_of(MAKERS[name]["model_type"], "").parse(Config(MAKERS[name], "config.json"))


def contract_of(model: Model) -> Contract:
    """As the exporter has it: caches of owned layers, rows of the table, how many logits."""
    ints = [TensorSpec(name, "int64", ("batch", "tokens")) for name in ("input_ids", "position_ids")]
    inputs = [*ints, TensorSpec("attention_mask", "int64", ("batch", "total"))]
    outputs = [TensorSpec("logits", "float32", ("batch", "kept", model.vocab))]
    if model.ple is not None:
        inputs.append(TensorSpec("per_layer_inputs", "float32", ("batch", "tokens", len(model.layers), model.ple.dim)))
    inputs.append(TensorSpec("num_logits_to_keep", "int64", (), True, 1))
    caches = []
    for layer, attention in enumerate(layer.attention for layer in model.layers):
        if attention.kv_from is not None:
            continue
        i, window = len(caches), layer in WINDOWED and attention.span
        names = [tuple(f"{side}.{i}.{key}" for key in ("key", "value")) for side in ("past_key_values", "present")]
        shape = ("batch", attention.kv_heads, f"past_{i}", attention.head_dim)
        inputs += [TensorSpec(name, "float32", shape) for name in names[0]]
        outputs += [TensorSpec(name, "float32", shape) for name in names[1]]
        sizes = (attention.kv_heads, attention.head_dim, attention.head_dim)
        kind, span = ("window", attention.span) if window else ("full", None)
        caches.append(CacheSpec(layer, kind, names[0], names[1], *sizes, "float32", span))
    return Contract(tuple(inputs), tuple(outputs), tuple(caches))


def weight(name: str, dtype: int, dims: tuple[int, ...], offset: int, length: int, location: str) -> TensorProto:
    """An external initializer."""
    found = TensorProto(name=name, data_type=dtype, dims=dims, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        found.external_data.add(key=key, value=str(value))
    return found


def graph_of(model: Model, contract: Contract, location: str = DATA) -> onnx.ModelProto:
    """Declares all of a contract, has weights outside, constants inside, and a graph in a graph."""
    types = {"int64": TensorProto.INT64, "float32": TensorProto.FLOAT}
    inputs, outputs = (
        [helper.make_tensor_value_info(s.name, types[s.dtype], list(s.shape)) for s in specs]
        for specs in (contract.inputs, contract.outputs)
    )
    embed = 4 * model.vocab * model.dim
    weights = [
        weight("embed", TensorProto.FLOAT, (model.vocab, model.dim), 0, embed, location),
        weight("head.turned", TensorProto.FLOAT, (model.dim, model.vocab), 0, embed, location),
        weight("layers.0.attn.q.codes", TensorProto.UINT8, (model.dim, 2, 16), embed, model.dim * 32, location),
        weight("layers.0.attn.k.codes", TensorProto.INT4, (7, 3), embed + 64, 11, location),
        weight(
            "layers.1.ffn.gate_up.scales", TensorProto.FLOAT, (FILLER,), embed + model.dim * 32, 4 * FILLER, location
        ),
    ]
    inner = helper.make_graph(
        [helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.arange(6, dtype=np.int64)))],
        "inner",
        [],
        [helper.make_tensor_value_info("c", TensorProto.INT64, [6])],
    )
    nodes = [
        helper.make_node("Gather", ["embed", "input_ids"], ["x"], axis=0),
        helper.make_node("MatMulNBits", ["x", "codes"], ["y"], domain="com.microsoft", K=64, N=64, bits=4),
        helper.make_node("If", ["yes"], ["z"], then_branch=inner, else_branch=inner),
        helper.make_node("Cast", ["x"], ["w"], domain="ai.onnx", to=1),
    ]
    keep = numpy_helper.from_array(np.asarray(1, np.int64), "num_logits_to_keep")
    yes = helper.make_tensor("yes", TensorProto.BOOL, [], [True])
    graph = helper.make_graph(nodes, "decoder", inputs, outputs, [keep, yes, *weights], value_info=inputs[:1])
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    proto = helper.make_model(graph, opset_imports=imports, ir_version=10, producer_name="edge")
    helper.set_model_props(proto, {"made by": "a test"})
    return proto


def facts_of(model: Model, **changes: Any) -> Facts:
    """What a manifest says of it."""
    ple = model.ple and TableSpec(TABLE, "int8", model.ple.rows, len(model.layers), model.ple.dim)
    plan = {"512": {"bytes": {"weights": 5, "cache": 7}, "total_bytes": 12}}
    found = Facts(
        "0.1.0", "ab" * 32, "a model", replace(full(model), name="all of it"), "int4", "int8", "ort", "edge", 512, 21,
        "1.29", GRAPH, contract_of(model), ple, plan, {"largest": 1e-6},
    )  # fmt: skip
    return replace(found, **changes)


def write(folder: Path, name: str, place: str = "", kind: str = "int8", **changes: Any) -> Facts:
    """A package in a new folder; graph and weights in ``place``."""
    model = spec_of(name)
    facts = facts_of(model, graph=place + GRAPH, **changes)
    if facts.ple is not None:
        facts = replace(facts, ple=replace(facts.ple, kind=kind))
    (folder / place).mkdir(parents=True)
    config = {**MAKERS[name], **({"transformers.js_config": {"dtype": "q4"}} if place else {})}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(small.tokenizer_json())
    size = 4 * model.vocab * model.dim + 32 * model.dim + 4 * FILLER
    (folder / place / DATA).write_bytes(np.random.default_rng(0).bytes(size))
    (folder / place / GRAPH).write_bytes(graph_of(model, facts.contract).SerializeToString())
    if facts.ple is not None:
        dtype, shape = facts.ple.stored
        with Writer(folder / TABLE, {PLE_TABLE: (dtype, shape)}) as writer:
            rows = table_of(model)
            writer.write(PLE_TABLE, [quantize_rows(rows, kind) if dtype == "U8" else rows.astype(np.float16)])
    (folder / manifests.NAME).write_bytes(describe(folder, facts))
    return facts


def table_of(model: Model) -> np.ndarray:
    """float32 [rows, layers, dim]."""
    assert model.ple is not None
    shape = (model.ple.rows, len(model.layers), model.ple.dim)
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


@cache
def sound(name: str = "gemma3n") -> tuple[tempfile.TemporaryDirectory[str], Path]:
    """A package that nobody changes; the temporary folder goes with the process."""
    home = tempfile.TemporaryDirectory()
    write(Path(home.name, name), name)
    return home, Path(home.name, name)


def raw_graph() -> bytes:
    """The bytes of a sound graph."""
    return (sound()[1] / GRAPH).read_bytes()


def opened(folder: Path) -> None:
    """Opened, verified and closed."""
    found = Package.open(folder)
    try:
        found.verify()
    finally:
        found.close()


def refused(folder: Path, *words: str, by: type[EdgeError] = BadCheckpoint) -> None:
    """When opened, in one line that says these things."""
    with pytest.raises(by) as caught:
        Package.open(folder)
    assert type(caught.value) is by
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(folder))
    for word in words:
        assert word in str(caught.value), str(caught.value)


def error_of(act: Callable[[], object]) -> EdgeError | None:
    """What ``act`` raises, of one line; anything but an EdgeError is a bug."""
    try:
        act()
    except EdgeError as error:
        return error if "\n" not in str(error) else pytest.fail(str(error))
    return None


def reseal(folder: Path, change: Change = lambda m: None) -> None:
    """By somebody who knows how it is done: sizes, sums and seal are right again, then ``change``, sealed."""
    path = folder / manifests.NAME
    data = json.loads(path.read_bytes())
    for name in data["files"]:
        if (folder / name).is_file():
            raw = (folder / name).read_bytes()
            data["files"][name] = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    change(data)
    path.write_bytes(manifests.sealed(data))


def edit(folder: Path, change: Change) -> None:
    """A graph that was changed, in a package that is sealed again."""
    proto = onnx.load(str(folder / GRAPH), load_external_data=False)
    change(proto)
    (folder / GRAPH).write_bytes(proto.SerializeToString())
    reseal(folder)
