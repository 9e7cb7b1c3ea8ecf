"""Layout ``web``: names and files as transformers.js looks for them.

It makes the names of caches from the graph, empty ones from their shapes, and feeds what comes out as present back in
as past. What it cannot find out is in config.json: which kind of model, and how many files of weights a graph has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx

from export.weights import Places
from loaders.errors import Unsupported
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
IDS, SHARED = ("bos_token_id", "eos_token_id", "pad_token_id"), ("tie_word_embeddings", "dtype", "torch_dtype")


def graph_name(precision: str) -> str:
    """The decoder's file."""
    return f"{FOLDER}/model{SUFFIX[precision]}.onnx"


def refuse(model: Model) -> None:
    """Raises Unsupported for models whose embeddings such a package would have to hold in a graph of their own."""
    if model.ple is not None:
        raise Unsupported(
            "per-layer embeddings", field="--layout web", expected="a model without",
            hint="Export with --layout edge",
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


def config(raw: Mapping[str, Any], precision: str, files: Mapping[str, int]) -> dict[str, Any]:
    """config.json of the decoder alone. ``files``: how many files of weights each graph has, by its file's name."""
    kind = TYPE[precision]
    half = {"kv_cache_dtype": {kind: "float16"}} if precision == "float16" else {}
    return {
        **text_part(raw),
        "transformers.js_config": {"dtype": kind, "use_external_data_format": dict(files), **half},
    }


def text_part(raw: Mapping[str, Any]) -> dict[str, Any]:
    """What a multimodal config says of its text model, as that model's own: of another the loader would ask for a
    graph for each part.
    """
    text = raw.get("text_config")
    if not isinstance(text, dict):
        return dict(raw)
    found = {key: raw[key] for key in SHARED if key in raw}
    ids = {key: raw[key] for key in IDS if raw.get(key) is not None}
    names = [name.replace(WHOLE, TEXT) for name in raw.get("architectures") or () if isinstance(name, str)]
    return {**found, **({"architectures": names} if names else {}), **text, **ids}
