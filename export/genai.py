"""Layout ``genai``: what onnxruntime-genai reads beside the graph, so that it runs a package as its own models.

It knows no family: type "decoder" is any graph with its names of inputs. A graph that takes per-layer embeddings is the
second stage of type "decoder-pipeline", after the one that looks them up.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from loaders.errors import Unsupported
from loaders.formats.contract import IDS, LOGITS, MASK, POSITION_IDS, ROWS, Contract
from loaders.formats.facts import Facts
from loaders.network.spec import Model
from loaders.text.generation import GenerationDefaults

CONFIG, TOKENIZER = "genai_config.json", "tokenizer_config.json"
# What it fills up with zeros to bind, or draws from, where a model says nothing: its own defaults, said aloud.
TOP_K, TOP_P, TEMPERATURE = 50, 1.0, 1.0
# Buffers of an arena are never given back; weights are mapped either way.
SESSION = {"log_id": "edge", "provider_options": [], "enable_cpu_mem_arena": False, "enable_mem_pattern": False}
# Reads tokenizer.json as it is, whatever wrote it.
ANY_TOKENIZER = "PreTrainedTokenizerFast"


def refuse(contract: Contract) -> None:
    """Raises Unsupported for caches that the runtime cannot keep: it has one of keys and one of values for each layer,
    as long as the text.
    """
    for cache in contract.caches:
        found = f"one cache for keys and values in layer {cache.layer}" if len(cache.inputs) == 1 else None
        if cache.kind == "growing" and cache.span is not None:
            found = f"a cache of {cache.span - 1} tokens in layer {cache.layer}"
        if found is not None:
            raise Unsupported(
                found, field="--layout genai", expected="keys and values of every token", hint="Export --profile ort"
            )


def files(
    folder: Path, facts: Facts, model: Model, config: Mapping[str, Any], defaults: GenerationDefaults
) -> Iterator[tuple[str, bytes]]:
    """Names and bytes of what goes into a package whose other files are in ``folder`` already.

    ``config``: the model's config.json; ``defaults``: what it says of generation.
    """
    yield CONFIG, dump({"model": described(facts, model, config, defaults), "search": search(facts, defaults, model)})
    path = folder / TOKENIZER
    said = json.loads(path.read_bytes()) if path.exists() else {}
    if "tokenizer_class" not in said and (folder / "tokenizer.json").exists():
        yield TOKENIZER, dump({**said, "tokenizer_class": ANY_TOKENIZER})


def dump(value: Any) -> bytes:
    """JSON for people."""
    return json.dumps(value, indent=2).encode()


def described(facts: Facts, model: Model, config: Mapping[str, Any], defaults: GenerationDefaults) -> dict[str, Any]:
    """The object ``model``. Ids that the model does not name are left out, but for padding, which is asked for."""
    stops = list(defaults.stop_ids)
    ids: dict[str, Any] = {"pad_token_id": padding(config, stops, model)}
    if stops:
        ids["eos_token_id"] = stops
    if defaults.bos_id is not None:
        ids["bos_token_id"] = defaults.bos_id
    kind = "decoder" if facts.ple is None else "decoder-pipeline"
    return {
        "type": kind,
        "vocab_size": model.vocab,
        "context_length": facts.context,
        **ids,
        "decoder": decoder(facts, model),
    }


def padding(config: Mapping[str, Any], stops: list[int], model: Model) -> int:
    """What shorter texts of a batch are filled up with: by the config, or where a text stops."""
    inner = config.get("text_config")
    said = [config.get("pad_token_id"), inner.get("pad_token_id") if isinstance(inner, dict) else None, *stops]
    return next((i for i in said if type(i) is int and 0 <= i < model.vocab), 0)


def decoder(facts: Facts, model: Model) -> dict[str, Any]:
    """The object ``model.decoder``. Sizes of layers that are unlike the first are read from the graph."""
    contract, cache = facts.contract, facts.contract.caches[0]
    attention = model.layers[0].attention
    plain = (IDS, MASK, POSITION_IDS)
    found = {
        "filename": facts.graph,
        "session_options": SESSION,
        "hidden_size": model.dim,
        "head_size": cache.dim,
        "num_attention_heads": attention.heads,
        "num_hidden_layers": len(contract.caches),
        "num_key_value_heads": cache.heads,
        "inputs": {
            **{name: name for name in plain},
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": LOGITS,
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    return found if facts.ple is None else {**found, "pipeline": pipeline(facts)}


def pipeline(facts: Facts) -> list[dict[str, Any]]:
    """Rows of per-layer embeddings first, then the decoder."""
    from export.ple import GRAPH

    contract = facts.contract
    rows = {"filename": GRAPH, "inputs": [IDS], "outputs": [ROWS]}
    rest = {
        "filename": facts.graph,
        "inputs": [spec.name for spec in contract.inputs],
        "outputs": [spec.name for spec in contract.outputs],
    }
    return [{name: {**stage, "session_options": SESSION}} for name, stage in (("embedding", rows), ("decoder", rest))]


def search(facts: Facts, defaults: GenerationDefaults, model: Model) -> dict[str, Any]:
    """The object ``search``: greedy unless the model wants to be sampled. Caches are taken at ``max_length``."""
    drawn = (defaults.temperature, defaults.top_k, defaults.top_p)
    k, p = defaults.top_k, defaults.top_p
    return {
        "do_sample": any(value is not None for value in drawn),
        "max_length": facts.context,
        "min_length": 0,
        "num_beams": 1,
        "num_return_sequences": 1,
        "past_present_share_buffer": all(cache.kind == "full" for cache in facts.contract.caches),
        "repetition_penalty": 1.0 if defaults.repetition_penalty is None else defaults.repetition_penalty,
        "temperature": TEMPERATURE if defaults.temperature is None else defaults.temperature,
        "top_k": min(TOP_K if k is None else k, model.vocab),
        "top_p": TOP_P if p is None else p,
    }
