"""OpenVINO in a process of its own, on the graph that openvino-genai makes of llama.cpp's file (llama, qwen2, qwen3).

Started by benchmarks/peers.py in the environment of benchmarks/peers-constraints.txt: --make GGUF FOLDER, or ASKED.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from time import perf_counter

import numpy as np
import openvino as ov
from openvino import opset13

from benchmarks.peers_measure import Asked, asked, measure, report

GRAPH = "openvino_model.xml"


def make(gguf: Path, folder: Path) -> None:
    """Writes the graph of a file into a folder that exists.

    The reader saves it beside the file before it asks for a tokenizer, of which there is none.
    """
    from openvino_genai import LLMPipeline

    link = folder / "model.gguf"
    link.symlink_to(gguf.resolve())
    try:
        LLMPipeline(str(link), "CPU", enable_save_ov_model=True)
    except (IndexError, RuntimeError) as error:
        if not (folder / GRAPH).exists():
            raise SystemExit(f"openvino-genai does not read {gguf}: {error}") from error
    finally:
        link.unlink()


class OpenVino:
    """A compiled model and its state. As OpenVINO comes, but for the threads; logits of the last token alone."""

    def __init__(self, what: Asked) -> None:
        core = ov.Core()
        model = core.read_model(what.file)
        only_last(model)
        settings = {"INFERENCE_NUM_THREADS": what.threads, "PERFORMANCE_HINT": "LATENCY"}
        self.compiled = core.compile_model(model, "CPU", settings)
        self.request = self.compiled.create_infer_request()
        self.at = 0

    def feed(self, ids: Sequence[int]) -> None:
        end = self.at + len(ids)
        given = {
            "input_ids": np.array([ids], np.int64),
            "attention_mask": np.ones((1, end), np.int64),
            "position_ids": np.arange(self.at, end, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        self.request.infer(given)
        self.at = end

    def reset(self) -> None:
        self.request.reset_state()
        self.at = 0

    def settings(self) -> str:
        """What it chose."""
        names = ("INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION", "DYNAMIC_QUANTIZATION_GROUP_SIZE")
        found = {name: self.compiled.get_property(name) for name in names}
        return ", ".join(
            f"{name} {getattr(value, 'get_type_name', lambda v=value: v)()}" for name, value in found.items()
        )


def only_last(model: ov.Model) -> None:
    """As openvino-genai does: the head multiplies the last token's state, not the whole prompt's."""
    node = model.output(0).get_node()
    while node.get_type_name() != "MatMul":
        node = node.input_value(0).get_node()
    state = node.input_value(0)
    last = opset13.slice(state, np.array([-1]), np.array([np.iinfo(np.int64).max]), np.array([1]), np.array([1]))
    node.input(0).replace_source_output(last.output(0))
    model.validate_nodes_and_infer_types()


def main() -> None:
    """Makes a graph, or measures what the command line asks for."""
    if sys.argv[1] == "--make":
        make(Path(sys.argv[2]), Path(sys.argv[3]))
        return
    what, start = asked(), perf_counter()
    engine = OpenVino(what)
    facts = {"load_s": perf_counter() - start, "version": f"openvino {version('openvino')}", "plan": engine.settings()}
    report({**facts, **measure(engine, what)})


if __name__ == "__main__":
    main()
