"""Layout ``web``: names and files as transformers.js looks for them.

It makes the names of caches from the graph, empty ones from their shapes, and feeds what comes out as present back in
as past. What it cannot find out is in config.json: which kind of model, and how many files of weights a graph has.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx

from export import ple
from export.lowering import Formats
from export.onnx import TARGETS, lower_embedding
from export.weights import Places, Stored
from loaders.errors import Unsupported
from loaders.formats.contract import IDS
from loaders.formats.facts import TableSpec
from loaders.network.spec import Model

FOLDER = "onnx"
# By precision: the end of a file's name, and what the loader calls that.
SUFFIX = {"float32": "", "float16": "_fp16", "int8": "_int8", "int4": "_q4"}
TYPE = {"float32": "fp32", "float16": "fp16", "int8": "int8", "int4": "q4"}
# A file that is read whole into one buffer has to be shorter than 2 GiB.
BYTES = 2 * 10**9
MOST_FILES = 100
# The one symbol in the shape of a cache that is not taken for 0.
BATCH = "batch_size"
WHOLE, TEXT = "ForConditionalGeneration", "ForCausalLM"
# What a multimodal config says of its text part outside of it: ids that count before those inside, and the rest.
SPECIAL, SHARED = ("bos_token_id", "eos_token_id", "pad_token_id"), ("tie_word_embeddings", "dtype", "torch_dtype")


def graph_name(precision: str, *, apart: bool = False) -> str:
    """The decoder's file; ``apart``: it is given embeddings that another graph looks up."""
    return f"{FOLDER}/{'decoder_model_merged' if apart else 'model'}{SUFFIX[precision]}.onnx"


def embedding_of(decoder: Path) -> Path:
    """The graph that looks embeddings up for a decoder, beside it."""
    return decoder.with_name(decoder.name.replace("decoder_model_merged", "embed_tokens"))


def embedding(
    model: Model, formats: Formats, table: TableSpec, profile: str, context: int, precision: str
) -> tuple[onnx.ModelProto, list[Stored]]:
    """input_ids -> inputs_embeds and per_layer_inputs, and the weights of the former; :func:`ple.initializer` is to be
    added once the table is written.
    """
    dtype = "float16" if precision == "float16" else "float32"
    b, found = lower_embedding(model, formats, profile=profile, context=context, dtype=dtype)
    ple.rows(b, IDS, table)
    return b.model(TARGETS[profile].opset, "embed_tokens", "Looks up embeddings and rows of per-layer ones."), found


def refuse_table(table: TableSpec) -> None:
    """Raises Unsupported for a table that no browser could load: it is one tensor."""
    if table.nbytes > BYTES:
        raise Unsupported(
            f"per-layer embeddings of {table.nbytes} bytes", field="--layout web", expected=f"at most {BYTES}",
            hint="Export a pack with --precision int4, or with --layout edge",
        )  # fmt: skip


def refuse_files(places: Places) -> None:
    """Raises Unsupported for weights that a browser could not load: one too large for a buffer, or too many files."""
    found = None
    if max(places.sizes) > BYTES:
        found = f"a tensor of {max(places.sizes)} bytes"
    elif len(places.sizes) > MOST_FILES:
        found = f"{len(places.sizes)} files of weights"
    if found is not None:
        raise Unsupported(
            found, field="--layout web", expected=f"at most {BYTES} bytes a tensor and {MOST_FILES} files",
            hint="Export with --precision int4, or --layout edge",
        )  # fmt: skip


def rename(proto: onnx.ModelProto) -> None:
    """Gives the batch the name that the loader knows."""
    for value in (*proto.graph.input, *proto.graph.output):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param == "batch":
                size.dim_param = BATCH


def config(raw: Mapping[str, Any], precision: str, files: Mapping[str, int], *, apart: bool = False) -> dict[str, Any]:
    """config.json of the decoder alone. ``files``: how many files of weights each graph has, by its file's name."""
    part = whole(raw) if apart else text_part(raw)
    kind = TYPE[precision]
    half = {"kv_cache_dtype": {kind: "float16"}} if precision == "float16" else {}
    return {
        **part,
        "transformers.js_config": {"dtype": kind, "use_external_data_format": dict(files), **half},
    }


def whole(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The same as part of a multimodal model's: only of those the loader knows that embeddings lie apart."""
    if isinstance(raw.get("text_config"), dict):
        return dict(raw)
    kind = str(raw.get("model_type", "")).removesuffix("_text")
    ids = {key: raw[key] for key in SPECIAL if key in raw}
    return {**ids, "architectures": [f"{kind.capitalize()}{WHOLE}"], "model_type": kind, "text_config": dict(raw)}


def text_part(raw: Mapping[str, Any]) -> dict[str, Any]:
    """What a multimodal config says of its text model, as that model's own: of another the loader would ask for a
    graph for each part.
    """
    text = raw.get("text_config")
    if not isinstance(text, dict):
        return dict(raw)
    found = {key: raw[key] for key in SHARED if key in raw}
    ids = {key: raw[key] for key in SPECIAL if raw.get(key) is not None}
    names = [name.replace(WHOLE, TEXT) for name in raw.get("architectures") or () if isinstance(name, str)]
    return {**found, **({"architectures": names} if names else {}), **text, **ids}
