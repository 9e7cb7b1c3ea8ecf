"""Writes a model down as ONNX: records its graph and lowers it to a profile's operators."""

from __future__ import annotations

from dataclasses import dataclass

import onnx

from export.builder import Builder
from export.lowering import Choices, Formats, Lowering
from export.ort_target import OrtLowering
from export.standard_target import StandardLowering
from export.weights import Stored
from loaders.errors import Usage
from loaders.formats.contract import CacheSpec, Contract, TensorSpec
from loaders.network.graph import record
from loaders.network.spec import Model

TARGETS: dict[str, type[Lowering]] = {"ort": OrtLowering, "standard": StandardLowering}
DTYPES = {1: "float32", 7: "int64", 10: "float16"}


@dataclass(frozen=True)
class Lowered:
    """A graph without its weights, and what they are: ``weights`` are the initializers to be written."""

    model: onnx.ModelProto
    weights: list[Stored]
    contract: Contract
    min_ort: str
    opset: int


def lower(
    model: Model,
    formats: Formats,
    *,
    profile: str = "ort",
    layout: str = "edge",
    context: int,
    dtype: str = "float32",
    accuracy_level: int = 4,
) -> Lowered:
    """The decoder of ``model`` for up to ``context`` tokens.

    ``formats``: canonical tensor name -> F32, F16, BF16, int8 or int4; ``dtype``: of caches, and in float16 of the
    products. Raises Unsupported for what the profile cannot express, by name; Usage for an unknown profile.
    """
    if profile not in TARGETS:
        raise Usage(profile, field="--profile", expected=" or ".join(TARGETS))
    target = TARGETS[profile]
    growing = profile == "standard" or layout == "web"
    choices = Choices(formats, context, layout, growing, dtype == "float16", accuracy_level)
    lowering = target(model, record(model, want="last"), choices)
    lowering.run()
    proto = lowering.b.model(target.opset, model.family, f"{model.family}, {len(model.layers)} layers, by edge")
    return Lowered(
        proto, list(lowering.b.weights.values()), contract(proto, lowering.caches), lowering.min_ort, target.opset
    )


def lower_embedding(
    model: Model, formats: Formats, *, profile: str = "ort", context: int, dtype: str = "float32"
) -> tuple[Builder, list[Stored]]:
    """What turns ids into the inputs_embeds of a decoder of layout web, still under construction, and its weights."""
    choices = Choices(formats, context, "web", True, dtype == "float16")
    lowering = TARGETS[profile](model, record(model, want="last"), choices)
    lowering.run_embedding()
    return lowering.b, list(lowering.b.weights.values())


def contract(proto: onnx.ModelProto, caches: list[CacheSpec]) -> Contract:
    """What goes in and comes out, from the graph's own declarations."""
    defaults = {
        t.name: onnx.numpy_helper.to_array(t)
        for t in proto.graph.initializer
        if not t.external_data and t.data_location != onnx.TensorProto.EXTERNAL
    }

    def spec(value: onnx.ValueInfoProto) -> TensorSpec:
        kind = value.type.tensor_type
        shape = tuple(d.dim_param or d.dim_value for d in kind.shape.dim)
        default = defaults[value.name].item() if value.name in defaults else None
        return TensorSpec(value.name, DTYPES[kind.elem_type], shape, value.name in defaults, default)

    return Contract(
        tuple(spec(v) for v in proto.graph.input), tuple(spec(v) for v in proto.graph.output), tuple(caches)
    )
