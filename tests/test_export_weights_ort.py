"""Weights of exports as ONNX Runtime reads them, and what writing them holds in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.forms import PACKED
from export.weights import Stored, attach, layout, tensors_of, write
from loaders.formats.quant import BITS, BLOCK
from loaders.formats.recipe import Recipe, recipes
from loaders.formats.synthetic import write_random
from loaders.network.matformer import full
from tests import small
from tests.faulty import ROOT
from tests.test_export_weights import CUT, RECIPES, Naive, checkpoint, cut

MIB = 1 << 20
CONTRIB = "com.microsoft"
Arrays = dict[str, np.ndarray[Any, Any]]
EXACT = 2e-6


def run(
    path: Path,
    name: str,
    recipe: Recipe,
    nodes: list[onnx.NodeProto],
    wanted: list[Stored],
    feeds: Arrays,
    constants: Arrays | None = None,
    **entries: str,
) -> tuple[np.ndarray[Any, Any], list[str]]:
    """``y`` of a graph over weights of a small model, and the operators that are left when it is optimized."""
    source = checkpoint(name)
    part = cut(source)
    places = layout(wanted, source, part, recipe)
    write(path / "w.data", places, source, part, recipe)
    inputs = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape) for n, v in feeds.items()
    ]
    held = [TensorProto(name=s.name, data_type=s.dtype, dims=s.shape) for s in wanted]
    held += [numpy_helper.from_array(v, n) for n, v in (constants or {}).items()]
    graph = helper.make_graph(nodes, "g", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], held)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(CONTRIB, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    attach(model, places, "w.data")
    onnx.save(model, path / "m.onnx")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(path / "optimized.onnx")
    for key, value in entries.items():
        options.add_session_config_entry(key.replace("__", "."), value)
    session = onnxruntime.InferenceSession(path / "m.onnx", options, providers=["CPUExecutionProvider"])
    (found,) = session.run(["y"], feeds)
    ops = [node.op_type for node in onnx.load(path / "optimized.onnx", load_external_data=False).graph.node]
    return found, ops


def near(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any], limit: float = EXACT) -> None:
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= limit * np.abs(expected).max()


def matrix(name: str, tensor: str, recipe: Recipe) -> tuple[int, int, int, str, np.ndarray[Any, Any]]:
    """Rows, columns, blocks, format and values of a matrix of a small model."""
    source = checkpoint(name)
    kept = tensors_of(source, cut(source))[tensor]
    rows, cols = kept.shape
    return rows, cols, -(-cols // BLOCK), kept.stored(recipe), Naive(source, cut(source), recipe).values(tensor)


def given(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("precision", list(BITS))
@pytest.mark.parametrize(
    ("name", "tensor"), [("gemma3n", "layers.0.ffn.down"), ("gemma3n", "layers.5.ffn.down"), ("ragged", "embed")]
)
def test_blocks_as_matrices_and_rows(name: str, tensor: str, precision: str, tmp_path: Path) -> None:
    """MatMulNBits and GatherBlockQuantized over the same bytes, columns that fill no block included."""
    recipe = recipes(precision)[-1]
    rows, cols, nb, kind, values = matrix(name, tensor, recipe)
    assert cols % BLOCK
    width = 4 * BITS[kind]
    wanted = [
        Stored("w", TensorProto.UINT8, (rows, nb, width), "codes", (tensor,)),
        Stored("r", TensorProto.UINT8, (rows, nb * width), "codes", (tensor,)),
        Stored("s", TensorProto.FLOAT, (rows, nb), "scales", (tensor,)),
    ]
    facts = {"bits": BITS[kind], "block_size": BLOCK, "domain": CONTRIB}
    product = helper.make_node("MatMulNBits", ["x", "w", "s"], ["y"], K=cols, N=rows, accuracy_level=0, **facts)
    x = given(3, cols)
    near(run(tmp_path, name, recipe, [product], wanted, {"x": x})[0], x @ values.T)
    (tmp_path / "w.data").unlink()
    gather = helper.make_node("GatherBlockQuantized", ["r", "i", "s"], ["y"], gather_axis=0, quantize_axis=1, **facts)
    ids = np.array([[0, rows - 1], [5, 5]], np.int64)
    found, _ = run(tmp_path, name, recipe, [gather], wanted, {"i": ids})
    # Rows come in whole blocks: what is beyond the columns is zero.
    assert found.shape == (2, 2, nb * BLOCK)
    assert np.array_equal(found[..., :cols], values[ids])
    assert not found[..., cols:].any()


@pytest.mark.parametrize("precision", list(BITS))
@pytest.mark.parametrize(("name", "tensor"), [("ragged", "layers.0.ffn.up"), ("gpt2", "embed")])
def test_blocks_by_columns(name: str, tensor: str, precision: str, tmp_path: Path) -> None:
    """The standard's DequantizeLinear and MatMul, which ONNX Runtime makes one MatMulNBits of; inputs are padded."""
    recipe = recipes(precision)[-1]
    rows, cols, nb, kind, values = matrix(name, tensor, recipe)
    wanted = [
        Stored("w", PACKED[kind], (nb * BLOCK, rows), "turned.codes", (tensor,)),
        Stored("s", TensorProto.FLOAT, (nb, rows), "turned.scales", (tensor,)),
    ]
    nodes = [
        helper.make_node("Pad", ["x", "pads"], ["p"]),
        helper.make_node("DequantizeLinear", ["w", "s"], ["d"], axis=0, block_size=BLOCK),
        helper.make_node("MatMul", ["p", "d"], ["y"]),
    ]
    x, pads = given(3, cols), np.array([0, 0, 0, nb * BLOCK - cols], np.int64)
    level = {"session__qdq_matmulnbits_accuracy_level": "0"}
    found, ops = run(tmp_path, name, recipe, nodes, wanted, {"x": x}, {"pads": pads}, **level)
    assert "MatMulNBits" in ops
    assert "DequantizeLinear" not in ops
    near(found, x @ values.T)


def experts(recipe: Recipe) -> tuple[int, int, int, Naive]:
    """How many, their width, and the model's of a small mixture."""
    source = checkpoint("qwen3_moe")
    kept = tensors_of(source, full(source.model))["layers.0.experts.gate"]
    return *kept.shape, Naive(source, full(source.model), recipe)  # type: ignore[return-value]


def mixture(naive: Naive, x: np.ndarray[Any, Any], scores: np.ndarray[Any, Any], k: int) -> np.ndarray[Any, Any]:
    """The experts with the highest scores, by softmax of these."""
    gate, up, down = (naive.values(f"layers.0.experts.{n}") for n in ("gate", "up", "down"))
    out = np.zeros_like(x)
    for t, row in enumerate(x):
        top = np.argsort(-scores[t])[:k]
        weights = np.exp(scores[t][top] - scores[t].max())
        for e, weight in zip(top, weights / weights.sum(), strict=True):
            g = gate[e] @ row
            out[t] += weight * (down[e] @ (g / (1 + np.exp(-g)) * (up[e] @ row)))
    return out


SWIGLU = {"activation_type": "swiglu", "swiglu_fusion": 1, "activation_alpha": 1.0, "activation_beta": 0.0}
PAIR = ("layers.0.experts.gate", "layers.0.experts.up")
DOWN = ("layers.0.experts.down",)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("precision", list(BITS))
def test_experts_in_blocks(precision: str, weighted: bool, tmp_path: Path) -> None:
    """QMoE, its router's logits given, or those and the weights; int8 is exact where weights are not repacked."""
    recipe = recipes(precision)[0]
    n, width, dim, naive = experts(recipe)
    bits = BITS[precision]
    wanted = [
        Stored("w1", TensorProto.UINT8, (n, 2 * width, dim * bits // 8), "codes.interleaved", PAIR),
        Stored("s1", TensorProto.FLOAT, (n, 2 * width, -(-dim // BLOCK)), "scales.interleaved", PAIR),
        Stored("w2", TensorProto.UINT8, (n, dim, width * bits // 8), "codes.trimmed", DOWN),
        Stored("s2", TensorProto.FLOAT, (n, dim, -(-width // BLOCK)), "scales", DOWN),
    ]
    x, scores = given(5, dim), given(5, n)
    inputs, feeds = ["x", "scores", "w1", "s1", "", "w2", "s2"], {"x": x, "scores": scores}
    if weighted:
        inputs += [""] * 7 + ["weights"]
        feeds["weights"] = np.exp(scores)
    facts = {"k": 3, "expert_weight_bits": bits, "block_size": BLOCK, "normalize_routing_weights": 1}
    node = helper.make_node("QMoE", inputs, ["y"], domain=CONTRIB, **facts, **SWIGLU)
    expected = mixture(naive, x, scores, 3)
    as_they_lie = {"session__disable_prepacking": "1"}
    near(run(tmp_path, "qwen3_moe", recipe, [node], wanted, feeds, **as_they_lie)[0], expected)
    (tmp_path / "w.data").unlink()
    near(run(tmp_path, "qwen3_moe", recipe, [node], wanted, feeds)[0], expected, 0.03)


def test_experts_in_float32(tmp_path: Path) -> None:
    n, width, dim, naive = experts(RECIPES[0])
    wanted = [
        Stored("w1", TensorProto.FLOAT, (n, 2 * width, dim), "interleaved", PAIR),
        Stored("w2", TensorProto.FLOAT, (n, dim, width), "values", DOWN),
    ]
    x, scores = given(5, dim), given(5, n)
    inputs = ["x", "scores", "w1", "", "w2"]
    node = helper.make_node("MoE", inputs, ["y"], domain=CONTRIB, k=3, normalize_routing_weights=1, **SWIGLU)
    found, _ = run(tmp_path, "qwen3_moe", RECIPES[0], [node], wanted, {"x": x, "scores": scores})
    near(found, mixture(naive, x, scores, 3))


def test_a_slice_in_float32(tmp_path: Path) -> None:
    """A matrix turned, of a slice: the first columns of the one in the file."""
    rows, cols, _, _, values = matrix("gemma3n", "layers.1.ffn.down", RECIPES[0])
    assert cols == CUT.widths[1]
    wanted = [Stored("w", TensorProto.FLOAT, (cols, rows), "turned", ("layers.1.ffn.down",))]
    x = given(3, cols)
    found, _ = run(tmp_path, "gemma3n", RECIPES[0], [helper.make_node("MatMul", ["x", "w"], ["y"])], wanted, {"x": x})
    near(found, x @ values.T)


# 100 MB of embedding in float32.
LARGE = {**small.LLAMA, "vocab_size": 1 << 15, "hidden_size": 768, "intermediate_size": 64, "num_hidden_layers": 1}
CHILD = """
import sys
from pathlib import Path
from onnx import TensorProto as T
from edge.budget.memory import read_process, reset_peak
from export.weights import Stored, layout, write
from loaders.checkpoint import Checkpoint
from loaders.formats.recipe import Recipe, recipes
from loaders.network.matformer import full
source, out = Checkpoint.open(sys.argv[1]), Path(sys.argv[2])
v, d, nb = 1 << 15, 768, 24
def run(name, recipe, *wanted):
    places = layout(wanted, source, full(source.model), recipe)
    write(out / name, places, source, full(source.model), recipe)
    return places.total
norm = Stored("n", T.FLOAT, (d,), "values", ("norm",))
run("warm", recipes("int4")[1], norm)
assert reset_peak()
before = read_process().rss
kind = recipes("int4")[1]
def one(dtype, shape, form):
    return Stored(form, dtype, shape, form, ("embed",))
total = run("codes", kind, one(T.UINT8, (v, nb, 16), "codes"), one(T.FLOAT, (v, nb), "scales"))
total += run("turned", kind, one(T.INT4, (d, v), "turned.codes"), one(T.FLOAT, (nb, v), "turned.scales"))
total += run("values", Recipe("float32", "float32"), one(T.FLOAT, (v, d), "values"), one(T.FLOAT, (d, v), "turned"))
print(read_process().peak_rss - before, total)
"""


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LARGE))
    write_random(tmp_path / "config.json", tmp_path / "large", dtype="F32")
    command = [sys.executable, "-c", CHILD, str(tmp_path / "large"), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    grown, total = map(int, done.stdout.split())
    assert total > 220 * MIB
    assert 4 * MIB < grown < 100 * MIB
