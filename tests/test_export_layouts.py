"""Layouts genai and web: what other runtimes read, and graphs that answer when they are fed the way those feed them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import edge
from export import genai, operators, web, weights
from export import package as packages
from export.onnx import lower
from loaders.checkpoint import Checkpoint
from loaders.errors import Unsupported
from loaders.formats.contract import CacheSpec, Contract
from loaders.formats.facts import TableSpec
from loaders.formats.package import Package
from loaders.network.matformer import full
from loaders.text.generation import GenerationDefaults, read_generation
from tests.shrink import NAMES, parse, real
from tests.small import BOS, EOS, VOCAB, built

CONTEXT, LENGTH = 64, 21
NEAR = 1e-5
SAYS_NOTHING = GenerationDefaults(None, (), None, None, None, None, None)


@pytest.fixture(autouse=True, scope="module")
def plain() -> Iterator[None]:
    """No ONNX Runtime is asked for its operators: that takes longer than all the rest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operators, "optimized", lambda graphs: None)
        yield


def write(folder: Path, name: str, layout: str, **options: Any) -> Path:
    source = Checkpoint.open(built(name))
    packages.write(
        source, full(source.model), folder, packages.Options("0", CONTEXT, "float32", layout=layout, **options)
    )
    source.close()
    return folder


@pytest.fixture(scope="module", name="made")
def made_fixture(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """(model, layout) -> a package in float32, written when it is first asked for."""
    home, found = tmp_path_factory.mktemp("layouts"), dict[str, Path]()

    def made(name: str, layout: str) -> Path:
        key = f"{name}-{layout}"
        if key not in found:
            found[key] = write(home / key, name, layout)
        return found[key]

    return made


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_bytes())
    return found


@pytest.fixture(scope="module", name="ids")
def ids_fixture() -> np.ndarray:
    return np.random.default_rng(0).integers(5, VOCAB, LENGTH)


def expected(name: str, ids: np.ndarray) -> np.ndarray:
    """edge's own logits [t, vocab]."""
    with edge.load(built(name), precision="float32", kv="float32") as model:
        return model.logits(ids)


def near(found: np.ndarray, wanted: np.ndarray) -> None:
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= NEAR * np.abs(wanted).max()


# genai


def sides(path: Path) -> tuple[set[str], set[str]]:
    """Names of a graph's inputs and outputs."""
    graph = onnx.load(path, load_external_data=False).graph
    return {value.name for value in graph.input}, {value.name for value in graph.output}


@pytest.mark.parametrize("name", ["llama", "gemma3n"])
def test_genai_finds_every_input_and_output_by_the_names_it_is_told(made: Callable[..., Path], name: str) -> None:
    folder = made(name, "genai")
    decoder = read(folder / "genai_config.json")["model"]["decoder"]
    found = []
    for side in ("inputs", "outputs"):
        names = decoder[side].values()
        found.append({n % i if "%d" in n else n for n in names for i in range(decoder["num_hidden_layers"])})
    inputs, outputs = sides(folder / decoder["filename"])
    assert inputs == found[0] | ({"per_layer_inputs"} if name == "gemma3n" else set())
    assert outputs == found[1]
    Package.open(folder).close()


def test_genai_config_is_the_models(made: Callable[..., Path]) -> None:
    config = read(made("llama", "genai") / "genai_config.json")
    model, decoder, search = config["model"], config["model"]["decoder"], config["search"]
    assert (model["type"], model["vocab_size"], model["context_length"]) == ("decoder", VOCAB, CONTEXT)
    # The model names no padding: what stops a text fills it up.
    assert (model["bos_token_id"], model["eos_token_id"], model["pad_token_id"]) == (BOS, [EOS, 4], EOS)
    assert [decoder[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads")] == [64, 4, 2]
    assert (decoder["head_size"], decoder["num_hidden_layers"]) == (16, 3)
    assert (search["do_sample"], search["max_length"], search["past_present_share_buffer"]) == (False, CONTEXT, True)


def test_genai_runs_per_layer_embeddings_as_a_stage_before_the_decoder(made: Callable[..., Path]) -> None:
    folder = made("gemma3n", "genai")
    model = read(folder / "genai_config.json")["model"]
    assert (model["type"], model["decoder"]["num_hidden_layers"]) == ("decoder-pipeline", 6)
    stages = [stage for entry in model["decoder"]["pipeline"] for stage in entry.values()]
    for stage in stages:
        assert sides(folder / stage["filename"]) == (set(stage["inputs"]), set(stage["outputs"]))
    assert set(stages[0]["outputs"]) <= set(stages[1]["inputs"])


def test_genai_samples_as_the_model_wants_to_be_sampled(made: Callable[..., Path]) -> None:
    package = Package.open(made("llama", "genai"))
    package.close()
    said = replace(SAYS_NOTHING, temperature=0.6, top_k=20, top_p=0.95, repetition_penalty=1.1)
    found = genai.search(package.facts, said, package.model)
    assert found["do_sample"] is True
    assert [found[key] for key in ("temperature", "top_k", "top_p", "repetition_penalty")] == [0.6, 20, 0.95, 1.1]
    # It refuses more than there are tokens.
    assert genai.search(package.facts, replace(said, top_k=VOCAB + 1), package.model)["top_k"] == VOCAB


@pytest.mark.parametrize(
    ("config", "pad"),
    [({"pad_token_id": 3}, 3), ({"text_config": {"pad_token_id": 3}}, 3), ({"pad_token_id": -1}, 9), ({}, 9)],
)
def test_genai_pads_with_an_id_that_there_is(config: dict[str, Any], pad: int) -> None:
    assert genai.padding(config, [9], parse(real("llama-3.2-1B"))) == pad
    assert genai.padding({"pad_token_id": 10**9}, [], parse(real("llama-3.2-1B"))) == 0


def test_genai_leaves_a_tokenizer_as_it_is_where_its_class_is_known(made: Callable[..., Path], tmp_path: Path) -> None:
    package = Package.open(made("llama", "genai"))
    package.close()
    assert read(package.folder / "tokenizer_config.json") == {"tokenizer_class": "PreTrainedTokenizerFast"}

    def names() -> set[str]:
        found = genai.files(tmp_path, package.facts, package.model, {}, SAYS_NOTHING)
        return {name for name, _ in found}

    assert names() == {"genai_config.json"}  # no tokenizer at all
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    assert names() == {"genai_config.json", "tokenizer_config.json"}
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GemmaTokenizer"}')
    assert names() == {"genai_config.json"}


@pytest.mark.parametrize(
    ("names", "span", "found"),
    [(("k",), None, "one cache for keys and values"), (("k", "v"), 8, "a cache of 7 tokens")],
)
def test_genai_refuses_caches_it_cannot_keep(names: tuple[str, ...], span: int | None, found: str) -> None:
    cache = CacheSpec(3, "growing", names, names, 1, 8, 8, "float32", span)
    with pytest.raises(Unsupported, match=f"--layout genai.*{found} in layer 3"):
        genai.refuse(Contract((), (), (cache,)))


class Buffers:
    """A package of layout genai and its buffers, as the runtime has them: one for past and present."""

    def __init__(self, folder: Path, batch: int) -> None:
        self.session = ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
        self.io, self.batch = self.session.io_binding(), batch
        for spec in self.session.get_inputs():
            if spec.name.startswith("past"):
                _, heads, _, dim = spec.shape
                value = ort.OrtValue.ortvalue_from_numpy(np.zeros((batch, heads, CONTEXT, dim), np.float32))
                self.io.bind_ortvalue_input(spec.name, value)
                self.io.bind_ortvalue_output(spec.name.replace("past_key_values", "present"), value)

    def step(self, ids: np.ndarray, mask: np.ndarray, positions: np.ndarray) -> np.ndarray:
        for name, value in (("input_ids", ids), ("attention_mask", mask), ("position_ids", positions)):
            self.io.bind_cpu_input(name, value.astype(np.int64))
        self.io.bind_output("logits", "cpu")
        self.session.run_with_iobinding(self.io)
        found: np.ndarray = self.io.get_outputs()[-1].numpy()
        assert found.shape == (self.batch, 1, VOCAB)
        return found[:, 0]


def test_genai_graph_answers_every_sequence_of_a_batch_at_its_own_end(
    made: Callable[..., Path], ids: np.ndarray
) -> None:
    """Shorter texts are filled up behind: their last token is not in the last column, and the next goes after it."""
    folder, lengths = made("llama", "genai"), (LENGTH - 1, 9)
    wanted = expected("llama", ids)
    rows, mask = np.full((2, LENGTH - 1), EOS), np.zeros((2, LENGTH - 1), int)
    for row, length in enumerate(lengths):
        rows[row, :length], mask[row, :length] = ids[:length], 1
    run = Buffers(folder, 2)
    places = np.where(mask, np.arange(LENGTH - 1), 0)
    near(run.step(rows, mask, places), wanted[np.array(lengths) - 1])
    after = np.array(lengths)[:, None]
    found = run.step(ids[after], np.concatenate([mask, np.ones((2, 1), int)], 1), after)
    near(found, wanted[np.array(lengths)])


def test_genai_takes_a_profile_whose_caches_grow(ids: np.ndarray, tmp_path: Path) -> None:
    """Of models without windows: past and present are then two, and the logits still those of the end alone."""
    folder = write(tmp_path / "p", "llama", "genai", profile="standard")
    assert read(folder / "genai_config.json")["search"]["past_present_share_buffer"] is False
    session = ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    feeds = {"input_ids": ids[None], "attention_mask": np.ones((1, LENGTH), np.int64)}
    feeds["position_ids"] = np.arange(LENGTH)[None]
    for spec in session.get_inputs():
        if spec.name.startswith("past"):
            feeds[spec.name] = np.zeros((1, spec.shape[1], 0, spec.shape[3]), np.float32)
    near(session.run(["logits"], feeds)[0][0], expected("llama", ids)[-1:])


# web


def opened(folder: Path, base: str) -> ort.InferenceSession:
    """A graph of a package, whose files of weights are those that config.json says."""
    files = read(folder / "config.json")["transformers.js_config"]["use_external_data_format"]
    for i in range(files[f"{base}.onnx"]):
        assert (folder / "onnx" / f"{base}.onnx_data{f'_{i}' if i else ''}").is_file()
    return ort.InferenceSession(folder / "onnx" / f"{base}.onnx", providers=["CPUExecutionProvider"])


class Js:
    """Runs a package as transformers.js does: files by the kind of model, names and shapes from the sessions, what is
    present as past.
    """

    def __init__(self, folder: Path, first: int = 0) -> None:
        self.total, self.first, self.embed = 0, first, None
        apart = read(folder / "config.json")["architectures"][0].endswith("ForConditionalGeneration")
        self.session = opened(folder, "decoder_model_merged" if apart else "model")
        if apart:
            self.embed = opened(folder, "embed_tokens")
        self.inputs = {spec.name for spec in self.session.get_inputs()}
        self.past = {}
        for spec in self.session.get_inputs():
            if spec.name.startswith("past_key_values."):
                shape = [d if isinstance(d, int) else {"batch_size": 1}.get(d, 0) for d in spec.shape]
                self.past[spec.name] = np.zeros(shape, np.float32)

    def step(self, ids: np.ndarray, keep: int) -> np.ndarray:
        """Logits [kept, vocab]; ``keep`` 0 is all."""
        self.total += len(ids)
        feeds = {
            "input_ids": ids[None],
            "attention_mask": np.ones((1, self.total), np.int64),
            "position_ids": np.arange(self.total - len(ids), self.total)[None] + self.first,
            "num_logits_to_keep": np.array(keep, np.int64),
        }
        if self.embed is not None:
            names = ["inputs_embeds", "per_layer_inputs"]
            given = {"input_ids": feeds.pop("input_ids")}
            feeds |= dict(zip(names, self.embed.run(names, given), strict=True))
        assert feeds.keys() | self.past.keys() == self.inputs
        names = [spec.name for spec in self.session.get_outputs()]
        found = dict(zip(names, self.session.run(names, feeds | self.past), strict=True))
        logits: np.ndarray = found.pop("logits")
        self.past = {name.replace("present", "past_key_values"): value for name, value in found.items()}
        return logits[0]


@pytest.mark.parametrize("name", ["llama", "gemma3n"])
def test_web_package_run_as_transformers_js_runs_it(made: Callable[..., Path], name: str, ids: np.ndarray) -> None:
    """Windows of 8, keys of other layers, chunks, single tokens; all logits and the last one's."""
    folder, wanted = made(name, "web"), expected(name, ids)
    near(Js(folder).step(ids, 0), wanted)
    js = Js(folder)
    for start, stop, keep in ((0, 11, 1), (11, 12, 1), (12, 17, 3), (17, 18, 0), (18, LENGTH, 0)):
        near(js.step(ids[start:stop], keep), wanted[stop - (keep or stop - start) : stop])
    # Of Gemma 3 it counts positions from 1: only their differences matter.
    near(Js(folder, first=1).step(ids, 1), wanted[-1:])
    package = Package.open(folder)
    package.close()
    # What a browser has today is older than the fused operator's way of reading another layer's keys.
    assert package.min_ort == {"llama": "1.22", "gemma3n": "1.24"}[name]


def test_web_graph_in_float16_reads_shared_keys(ids: np.ndarray, tmp_path: Path) -> None:
    source = Checkpoint.open(built("gemma3n"))
    lowered = lower(source.model, lambda _: "F32", layout="web", context=CONTEXT, dtype="float16")
    source.close()
    assert {cache.dtype for cache in lowered.contract.caches} == {"float16"}
    widened = [node for node in lowered.model.graph.node if node.op_type == "Cast" and "present." in node.input[0]]
    assert len(widened) == 4  # keys and values of the two layers that others read, once each


def test_web_package_is_where_transformers_js_looks(made: Callable[..., Path]) -> None:
    folder = made("llama", "web")
    config = read(folder / "config.json")
    assert config["transformers.js_config"] == {"dtype": "fp32", "use_external_data_format": {"model.onnx": 1}}
    assert sorted(path.name for path in (folder / "onnx").iterdir()) == ["model.onnx", "model.onnx_data"]
    package = Package.open(folder)
    package.close()
    assert package.graph == folder / "onnx" / "model.onnx"
    caches = [spec for spec in package.contract.inputs if spec.name.startswith("past")]
    assert {spec.shape[0] for spec in caches} == {"batch_size"}
    assert {spec.name for spec in caches} == {
        f"past_key_values.{i}.{part}" for i in range(config["num_hidden_layers"]) for part in ("key", "value")
    }


def test_web_weights_are_split_into_files_of_the_names_that_are_fetched(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(web, "BYTES", 100_000)
        folder = write(tmp_path / "p", "llama", "web")
    names = sorted(path.name for path in (folder / "onnx").iterdir())
    count = len(names) - 1
    assert count > 2
    assert set(names) == {"model.onnx", "model.onnx_data", *(f"model.onnx_data_{i}" for i in range(1, count))}
    assert all((folder / "onnx" / name).stat().st_size <= 100_000 for name in names)
    assert read(folder / "config.json")["transformers.js_config"]["use_external_data_format"] == {"model.onnx": count}


@pytest.mark.parametrize(
    ("sizes", "found"), [((5, web.BYTES + 1), "a tensor of"), ((1,) * 101, "101 files of weights")]
)
def test_web_refuses_weights_no_browser_loads(sizes: tuple[int, ...], found: str) -> None:
    web.refuse_files(weights.Places((), {}, (web.BYTES,) * 100))
    with pytest.raises(Unsupported, match=f"--layout web: {found}"):
        web.refuse_files(weights.Places((), {}, sizes))


def test_web_table_of_per_layer_embeddings_is_a_file_of_weights_of_the_graph_that_reads_it(
    made: Callable[..., Path],
) -> None:
    folder = made("gemma3n", "web")
    names = ("decoder_model_merged.onnx", "embed_tokens.onnx")
    tables = {f"{names[0]}_data", f"{names[1]}_data", f"{names[1]}_data_1"}
    assert {path.name for path in (folder / "onnx").iterdir()} == {*names, *tables}
    assert not list(folder.glob("*.safetensors"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(web, "BYTES", 1000)
        with pytest.raises(Unsupported, match=r"--layout web: per-layer embeddings of \d+ bytes"):
            web.refuse_table(TableSpec("x", "int8", 10, 4, 64))


def test_edge_does_not_run_a_decoder_that_is_given_embeddings(made: Callable[..., Path]) -> None:
    with pytest.raises(Unsupported, match=r"given embeddings.*--layout edge"), edge.load(made("gemma3n", "web")):
        pass


@pytest.mark.parametrize("name", NAMES)
def test_web_config_is_the_text_models_own(name: str) -> None:
    """Of a multimodal config transformers.js would want a graph for each part."""
    raw = real(name)
    found = web.config(raw, "int4", {"model_q4.onnx": 3})
    assert found.pop("transformers.js_config") == {"dtype": "q4", "use_external_data_format": {"model_q4.onnx": 3}}
    assert "text_config" not in found
    assert not any("Conditional" in kind for kind in found["architectures"])
    assert parse(found) == parse(raw)
    assert read_generation("nowhere", found) == read_generation("nowhere", raw)


@pytest.mark.parametrize("name", [name for name in NAMES if parse(real(name)).ple is not None])
def test_web_config_is_a_multimodal_models_where_embeddings_lie_apart(name: str) -> None:
    """Of no other kind does transformers.js load two graphs; of the text alone it then asks for these two."""
    raw = real(name)
    found = web.config(raw, "int4", {}, apart=True)
    del found["transformers.js_config"]
    assert found["architectures"][0].endswith("ForConditionalGeneration")
    assert found["model_type"] in ("gemma3n", "gemma4")
    assert parse(found) == parse(raw)
    assert read_generation("nowhere", found) == read_generation("nowhere", raw)


def test_web_config_says_that_caches_are_of_float16() -> None:
    found = web.config(real("qwen3-0.6B"), "float16", {})["transformers.js_config"]
    assert (found["dtype"], found["kv_cache_dtype"]) == ("fp16", {"fp16": "float16"})
