"""Profile ``standard``: operators of ONNX alone, as its checker wants them, that compute what edge computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from export import operators
from export.onnx import Lowered, lower
from export.weights import attach, layout, tensors_of, write
from loaders.checkpoint import Checkpoint
from loaders.errors import Unsupported
from loaders.formats.recipe import STEERING, Recipe
from loaders.network.matformer import full
from tests.conftest import Folder, Open
from tests.makers import assert_close, prompt

Array = np.ndarray[Any, Any]
Formats = Callable[[str], str]
NAMES = (
    "llama-3.2-1B", "gemma-3n-E2B", "gemma-3-1B", "gemma-4-E2B", "deepseek-v3", "qwen3-30B-A3B",
    "llama-4-scout-17B-16E", "gpt2", "olmo2-7B",
)  # fmt: skip
LENGTH = 53
FLOAT32 = Recipe("float32", "float32")
# All that the graphs are made of, each in opset 23 or before.
ALLOWED = {
    "Add", "And", "ArgMax", "Attention", "BitShift", "BitwiseAnd", "Cast", "Concat", "ConstantOfShape", "Cos",
    "DequantizeLinear", "Div", "Equal", "Floor", "Gather", "GatherElements", "Gelu", "Gemm", "Greater", "Identity",
    "LayerNormalization", "LessOrEqual", "Log", "Loop", "MatMul", "Max", "Mul", "Neg", "NonZero", "Or", "Pad",
    "RMSNormalization", "Range", "ReduceMax", "ReduceMean", "ReduceSum", "Relu", "Reshape", "RotaryEmbedding",
    "ScatterElements", "ScatterND", "Shape", "Sigmoid", "Sign", "Sin", "Size", "Slice", "Softmax", "Sqrt", "Squeeze",
    "Sub", "Tanh", "TopK", "Transpose", "Unsqueeze", "Where",
}  # fmt: skip


def lowered(source: Checkpoint, formats: Formats, **options: Any) -> Lowered:
    context = min(64, source.model.context)
    return lower(source.model, formats, profile="standard", context=context, **options)


def written(folder: Path, source: Checkpoint, low: Lowered, recipe: Recipe = FLOAT32) -> Path:
    """A graph and its weights in files, which the checker accepts."""
    part = full(source.model)
    places = layout(low.weights, source, part, recipe)
    folder.mkdir(exist_ok=True)
    write(folder / "w.data", places, source, part, recipe)
    attach(low.model, places, "w.data")
    path = folder / "model.onnx"
    onnx.save(low.model, path)
    onnx.checker.check_model(str(path), full_check=True)
    assert {(domain, op) for domain, _, op in operators.operators(low.model)} <= {("", op) for op in ALLOWED}
    return path


class Decoder:
    """A session that carries its caches from pass to pass."""

    def __init__(self, path: Path, low: Lowered, batch: int = 1, **entries: str) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        options.optimized_model_filepath = str(path.with_name("optimized.onnx"))
        for key, value in entries.items():
            options.add_session_config_entry(f"session.{key}", value)
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.low, self.batch, self.path = low, batch, path
        self.reset()

    def reset(self) -> None:
        self.mask = np.ones((self.batch, 0), np.int64)
        self.past: dict[str, Array] = {}
        for cache in self.low.contract.caches:
            dims = (cache.dim, cache.value_dim)
            for name, dim in zip(cache.inputs, dims, strict=False):
                self.past[name] = np.zeros((self.batch, cache.heads, 0, dim), cache.dtype)

    def step(self, ids: Array, rows: Array | None = None, keep: int = 1, mask: Array | None = None) -> Array:
        """ids [batch, n] -> logits [batch, kept, vocab]; ``mask`` of these tokens: 0 for padding."""
        new = np.ones_like(ids) if mask is None else mask
        self.mask = np.concatenate((self.mask, new), 1)
        places = np.maximum(self.mask.cumsum(1) - 1, 0)[:, -ids.shape[1] :]
        feeds = {"input_ids": ids, "attention_mask": self.mask, "position_ids": places, **self.past}
        feeds["num_logits_to_keep"] = np.array(keep)
        if rows is not None:
            feeds["per_layer_inputs"] = rows
        wanted = [output.name for output in self.low.contract.outputs]
        found = dict(zip(wanted, self.session.run(wanted, feeds), strict=True))
        for cache in self.low.contract.caches:
            self.past.update(zip(cache.inputs, (found[name] for name in cache.outputs), strict=True))
        logits: Array = found["logits"]
        return logits

    def steps(self, ids: Array, rows: Array | None, sizes: Sequence[int]) -> Array:
        """The last logits of every pass over the next ``sizes`` tokens."""
        ends = np.cumsum(sizes)
        assert ends[-1] == len(ids)
        self.reset()
        cuts = [(end - size, end) for end, size in zip(ends, sizes, strict=True)]
        return np.concatenate([self.step(ids[None, a:b], part(rows, a, b))[0] for a, b in cuts])

    def optimized(self) -> list[str]:
        """The operators that run."""
        model = onnx.load(self.path.with_name("optimized.onnx"), load_external_data=False)
        return [node.op_type for node in operators.nodes(model.graph)]


def part(rows: Array | None, start: int, stop: int) -> Array | None:
    return None if rows is None else rows[None, start:stop]


def rows_of(source: Checkpoint, ids: Array) -> Array | None:
    """The rows of per-layer embeddings [n, layers, dim]; ids past the table have the first."""
    model = source.model
    if model.ple is None:
        return None
    window = source.where["ple.table"]
    table = window.values(source.shards, window.window).reshape(-1, len(model.layers), model.ple.dim)
    found: Array = table[np.where(ids < len(table), ids, 0)]
    return found


@pytest.fixture
def source_of(folders: Folder) -> Iterator[Callable[[str], Checkpoint]]:
    found: list[Checkpoint] = []

    def source(name: str) -> Checkpoint:
        found.append(Checkpoint.open(folders(name)))
        return found[-1]

    yield source
    for checkpoint in found:
        checkpoint.close()


def sizes(length: int) -> list[int]:
    """Passes of one token and of many, across every window's edge."""
    first = [7, 19, 1, 1, 5, 3]
    return first + [1] * (length - sum(first)) if length > sum(first) else [length - 2, 1, 1]


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_the_checkpoint(
    name: str, source_of: Callable[[str], Checkpoint], opened: Open, tmp_path: Path
) -> None:
    """Of the last token, of all, and of tokens that come in pieces."""
    source = source_of(name)
    low = lowered(source, lambda _: "F32")
    decoder = Decoder(written(tmp_path, source, low), low)
    length = min(LENGTH, source.model.context)
    ids = prompt(source.model.vocab, length)
    rows, wanted = rows_of(source, ids), opened(source.folder).logits(ids)
    assert_close(decoder.step(ids[None], part(rows, 0, length))[0], wanted[-1:])
    decoder.reset()
    assert_close(decoder.step(ids[None], part(rows, 0, length), keep=length)[0], wanted)
    pieces = sizes(length)
    assert_close(decoder.steps(ids, rows, pieces), wanted[np.cumsum(pieces) - 1])
    for cache in low.contract.caches:
        held = {decoder.past[name].shape[2] for name in cache.inputs}
        assert held == {length if cache.span is None else min(length, cache.span - 1)}
        assert cache.span == source.model.layers[cache.layer].attention.span or cache.span is None


@pytest.mark.parametrize("name", ["gemma-3-1B", "llama-4-scout-17B-16E"])
def test_padding_on_the_left_changes_nothing(
    name: str, source_of: Callable[[str], Checkpoint], opened: Open, tmp_path: Path
) -> None:
    """Two prompts of different lengths in one batch, and tokens after them: windows and chunks count from the first."""
    source = source_of(name)
    low = lowered(source, lambda _: "F32")
    decoder = Decoder(written(tmp_path, source, low), low, batch=2)
    session = opened(source.folder)
    long = prompt(source.model.vocab, 44)
    short = prompt(source.model.vocab, 33, seed=2)
    wanted = [session.logits(ids) for ids in (long, short)]
    padded = np.stack((long, np.concatenate((np.zeros(11, np.int64), short))))
    mask = np.ones_like(padded)
    mask[1, :11] = 0
    # The second pass begins inside the padding.
    for start, stop in ((0, 5), (5, 38), *((i, i + 1) for i in range(38, 44))):
        found = decoder.step(padded[:, start:stop], mask=mask[:, start:stop])[:, 0]
        assert np.isfinite(found).all()
        if stop > 11:
            assert_close(found, np.stack((wanted[0][stop - 1], wanted[1][stop - 12])))


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("llama-3.2-1B", Recipe("int8", "int8")),
        ("llama-3.2-1B", Recipe("int4", "int8")),
        ("gemma-3-1B", Recipe("int4", "int4")),
        ("olmo2-7B", Recipe("int4", "int4")),
        ("deepseek-v3", Recipe("int8", "int8")),
        ("qwen3-30B-A3B", Recipe("int8", "int8")),
        ("gpt2", Recipe("int8", "int8")),
    ],
    ids=str,
)
def test_quantized_products_are_fused_and_those_of_the_dequantized_weights(
    name: str, recipe: Recipe, source_of: Callable[[str], Checkpoint], tmp_path: Path
) -> None:
    source = source_of(name)
    tensors = tensors_of(source, full(source.model))
    plain = lowered(source, lambda _: "F32")
    blocks = lowered(source, lambda tensor: tensors[tensor].stored(recipe))
    exact = Decoder(written(tmp_path / "plain", source, plain, recipe), plain)
    path = written(tmp_path / "blocks", source, blocks, recipe)
    found = Decoder(path, blocks, qdq_matmulnbits_accuracy_level="0")
    length = min(LENGTH, source.model.context)
    ids = prompt(source.model.vocab, length)
    rows = rows_of(source, ids)
    wanted = exact.step(ids[None], part(rows, 0, length), keep=length)[0]
    assert_close(found.step(ids[None], part(rows, 0, length), keep=length)[0], wanted)
    left = found.optimized()
    products = [node for node in blocks.model.graph.node if node.op_type == "MatMul"]
    dequantized = {node.output[0] for node in blocks.model.graph.node if node.op_type == "DequantizeLinear"}
    assert left.count("MatMulNBits") == sum(node.input[1] in dequantized for node in products) > 0
    # As it comes, activations are rounded to 8 bits too.
    rounded = Decoder(path, blocks).step(ids[None], part(rows, 0, length), keep=length)[0]
    assert 0.0 < np.median(np.abs(rounded - wanted)) < 0.1 * np.abs(wanted).max()


def test_a_tied_head_of_int8_is_there_once(source_of: Callable[[str], Checkpoint]) -> None:
    """Its embedding is columns of the codes that are multiplied; nibbles cannot be gathered, so int4 has rows too."""
    source = source_of("llama-3.2-1B")
    assert source.model.tied
    for stored, forms in (("int8", {"turned.codes", "turned.scales"}), ("int4", {"codes", "scales"})):
        low = lowered(source, lambda _, stored=stored: stored)
        found = {w.form for w in low.weights if w.sources == ("embed",)}
        assert found == forms | {"turned.codes", "turned.scales"}


def test_a_latent_cache_is_one_input(source_of: Callable[[str], Checkpoint]) -> None:
    low = lowered(source_of("deepseek-v3"), lambda _: "F32")
    for i, cache in enumerate(low.contract.caches):
        assert (cache.inputs, cache.outputs) == ((f"past_key_values.{i}.key",), (f"present.{i}.key",))
        assert cache.value_dim < cache.dim


def test_experts_of_int4_are_refused_by_name(source_of: Callable[[str], Checkpoint]) -> None:
    with pytest.raises(Unsupported, match=r"--precision: experts of int4.*--profile ort") as caught:
        lowered(source_of("qwen3-30B-A3B"), lambda _: "int4")
    assert caught.value.field == "--precision"


@pytest.mark.parametrize(
    ("name", "stored", "version"),
    [
        ("olmo2-7B", "F32", "1.23"),
        ("deepseek-v3", "F32", "1.23"),
        ("llama-3.2-1B", "int4", "1.24"),
        ("llama-3.2-1B", "int8", "1.25"),
    ],
)
def test_the_oldest_runtime_is_what_the_graph_needs(
    name: str, stored: str, version: str, source_of: Callable[[str], Checkpoint]
) -> None:
    assert lowered(source_of(name), lambda _: stored).min_ort == version


@pytest.mark.parametrize("name", ["gemma-3-1B", "qwen3-30B-A3B"])
def test_float16_is_close(name: str, source_of: Callable[[str], Checkpoint], opened: Open, tmp_path: Path) -> None:
    """Matrices and caches of half the size."""
    source = source_of(name)
    tensors = tensors_of(source, full(source.model))

    def stored(tensor: str) -> str:
        return "F32" if len(tensors[tensor].shape) == 1 or tensor.endswith(STEERING) else "F16"

    low = lowered(source, stored, dtype="float16")
    decoder = Decoder(written(tmp_path, source, low, Recipe("float16", "float16")), low)
    assert {cache.dtype for cache in low.contract.caches} == {"float16"}
    ids = prompt(source.model.vocab, LENGTH)
    pieces = sizes(LENGTH)
    wanted = opened(source.folder).logits(ids)[np.cumsum(pieces) - 1]
    assert_close(decoder.steps(ids, None, pieces), wanted, 1e-2)
