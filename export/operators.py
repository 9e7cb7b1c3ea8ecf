"""Which operators a package needs, in the form that reduced builds of ONNX Runtime read.

A graph is run as ONNX Runtime rewrites it, and what it puts in belongs to the list too; so it is asked, in a process of
its own: nothing here imports it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import onnx

FILE = "required_operators.config"
SECONDS = 600
# Weights stay mapped: nothing is packed. Products of dequantized blocks are not fused, as that would convert them all
# in memory; what they are fused into is known.
UNFUSED = ("QDQSelectorActionTransformer", "MatMulNBitsFusion")
DEQUANTIZED, FUSED = ("", "DequantizeLinear"), ("com.microsoft", 1, "MatMulNBits")
CHILD = """
import json
import sys
import onnxruntime
graphs, unfused = map(json.loads, sys.argv[1:])
for graph, found in graphs:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.optimized_model_filepath = found
    onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"], disabled_optimizers=unfused)
print(onnxruntime.__version__)
"""

Operator = tuple[str, int, str]


def required(graphs: Sequence[Path]) -> tuple[str, str | None]:
    """(text of the file, version of the ONNX Runtime that was asked): operators of graphs as they are and as they run.

    The version is None where there is no ONNX Runtime to ask: operators are then those of the graphs as they are.
    """
    needed = {op for path in graphs for op in operators(onnx.load(path, load_external_data=False))}
    found, version = optimized(graphs) or (set(), None)
    return text(needed | found, version), version


def text(needed: Iterable[Operator], version: str | None) -> str:
    """One line ``domain;opset;Operator,Operator`` for each domain, below a comment."""
    grouped: dict[tuple[str, int], set[str]] = defaultdict(set)
    for domain, opset, op in needed:
        grouped[domain or "ai.onnx", opset].add(op)
    origin = "as they are" if version is None else f"as they are and as ONNX Runtime {version} runs them"
    lines = [f"# Operators of this package's graphs, {origin}; for build.py --include_ops_by_config"]
    lines += [f"{domain};{opset};{','.join(sorted(ops))}" for (domain, opset), ops in sorted(grouped.items())]
    return "\n".join(lines) + "\n"


def operators(model: onnx.ModelProto) -> set[Operator]:
    """(domain, opset, operator) of every node, those of nested graphs too."""
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    return {(node.domain, opsets.get(node.domain, 1), node.op_type) for node in nodes(model.graph)}


def nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Every node, at any depth."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from nodes(inner)


def optimized(graphs: Sequence[Path]) -> tuple[set[Operator], str] | None:
    """Operators of graphs as ONNX Runtime would run them here, and its version; None where it cannot be asked."""
    with tempfile.TemporaryDirectory(prefix="edge-operators-") as place:
        pairs = [(os.path.abspath(path), os.path.join(place, f"{i}.onnx")) for i, path in enumerate(graphs)]
        command = [sys.executable, "-c", CHILD, json.dumps(pairs), json.dumps(UNFUSED)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True)
            found = {op for _, path in pairs for op in operators(onnx.load(path, load_external_data=False))}
        except (OSError, subprocess.SubprocessError):
            return None
    if any((domain, op) == DEQUANTIZED for domain, _, op in found):
        found.add(FUSED)
    return found, done.stdout.strip()
