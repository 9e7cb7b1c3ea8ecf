"""Sessions that multiply by activations as they are, where others round them to 8 bits to be fast: for comparisons."""

from __future__ import annotations

import onnxruntime as ort

from edge.engine.ort_start import options, started
from loaders.formats.package import Package

# Of products that the session itself makes of dequantized blocks; others say theirs in the graph.
LEVEL = "session.qdq_matmulnbits_accuracy_level"


def open_exact(package: Package) -> ort.InferenceSession:
    """A session of a package's graph. Raises BadCheckpoint, Unsupported, OverBudget."""
    chosen = options()
    chosen.add_session_config_entry(LEVEL, "0")
    if package.precision == "int8" and ("com.microsoft", "QMoE") in package.onnx.operators:
        # The kernel of 8-bit experts rounds activations, unless weights stay as they are in the file.
        chosen.add_session_config_entry("session.disable_prepacking", "1")
    return started(package.graph, package.graph, chosen)
