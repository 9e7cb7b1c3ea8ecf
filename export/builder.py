"""An ONNX graph under construction: nodes in order, small constants inside, weights as promises of external data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from export.weights import Band, Stored

MICROSOFT = "com.microsoft"
IR_VERSION = 10
FLOAT, FLOAT16, INT32, INT64, BOOL = (
    TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL,
)  # fmt: skip
Shape = Sequence[int | str]


class Builder:
    """Collects a graph. Every name it gives is new; equal constants, and equal ways to a weight, are there once."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self.inline: list[TensorProto] = []
        self.weights: dict[str, Stored] = {}
        self.scope = ""

    def node(self, op: str, inputs: Sequence[str], /, *, domain: str = "", name: str = "", **attrs: Any) -> str:
        """Appends a node with one output; the output's name. An input "" is one that is left out."""
        return self.nodes_with(op, inputs, (name or self.fresh(op),), domain=domain, **attrs)[0]

    def nodes_with(
        self, op: str, inputs: Sequence[str], outputs: Sequence[str], /, *, domain: str = "", **attrs: Any
    ) -> tuple[str, ...]:
        """Appends a node with outputs of these names; "" is one that is left out."""
        label = f"{self.scope}{op}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), list(outputs), name=label, domain=domain, **attrs))
        return tuple(outputs)

    def fresh(self, op: str) -> str:
        """A name for the output of the next node."""
        return f"{self.scope}{op.lower()}_{len(self.nodes)}"

    def constant(self, value: npt.ArrayLike, dtype: npt.DTypeLike) -> str:
        """A small constant, held in the graph itself."""
        array = np.asarray(value, dtype)
        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self.constants:
            name = f"constant_{len(self.constants)}"
            self.inline.append(numpy_helper.from_array(array, name))
            self.constants[key] = name
        return self.constants[key]

    def floats(self, value: npt.ArrayLike) -> str:
        """A float32 constant."""
        return self.constant(value, np.float32)

    def ints(self, *values: int) -> str:
        """An int64 vector: shapes, axes, ends of slices."""
        return self.constant(values, np.int64)

    def weight(
        self, name: str, dtype: int, shape: Sequence[int], form: str, *sources: str, band: Band | None = None
    ) -> str:
        """An initializer whose bytes are written later; ``name`` is the same for the same form of the same tensors."""
        if name not in self.weights:
            self.weights[name] = Stored(name, dtype, tuple(shape), form, sources, band)
        return name

    def input(self, name: str, dtype: int, shape: Shape) -> str:
        """Declares an input."""
        self.inputs.append(helper.make_tensor_value_info(name, dtype, list(shape)))
        return name

    def output(self, name: str, dtype: int, shape: Shape) -> str:
        """Declares an output."""
        self.outputs.append(helper.make_tensor_value_info(name, dtype, list(shape)))
        return name

    def model(self, opset: int, name: str, about: str) -> onnx.ModelProto:
        """The whole of it. Weights are there by name, type and shape; :func:`export.weights.attach` says where."""
        promised = [
            TensorProto(name=w.name, data_type=w.dtype, dims=w.shape, data_location=TensorProto.EXTERNAL)
            for w in self.weights.values()
        ]
        graph = helper.make_graph(self.nodes, name, self.inputs, self.outputs, [*self.inline, *promised])
        domains = {node.domain for node in self.nodes}
        imports = [helper.make_opsetid("", opset)]
        imports += [helper.make_opsetid(domain, 1) for domain in sorted(domains) if domain]
        model = helper.make_model(graph, opset_imports=imports, ir_version=IR_VERSION, producer_name="edge")
        model.doc_string = about
        return model
