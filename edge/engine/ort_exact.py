"""Sessions that multiply by activations as they are, where others round them to 8 bits to be fast: for comparisons."""

from __future__ import annotations

from pathlib import Path

import onnxruntime as ort

from edge.engine.ort_start import ERRORS, PROVIDERS, options, refused

# Of products that the session itself makes of dequantized blocks; others say theirs in the graph.
LEVEL = "session.qdq_matmulnbits_accuracy_level"


def open_exact(graph: Path, file: Path, *, packed: bool = True) -> ort.InferenceSession:
    """A session of ``graph``; errors name ``file``. Weights that are not ``packed`` stay as they are in the file.

    Raises BadCheckpoint, Unsupported, OverBudget.
    """
    chosen = options()
    chosen.add_session_config_entry(LEVEL, "0")
    if not packed:
        chosen.add_session_config_entry("session.disable_prepacking", "1")
    try:
        return ort.InferenceSession(str(graph), chosen, providers=PROVIDERS)
    except (*ERRORS, MemoryError) as error:
        raise refused(error, file) from None
