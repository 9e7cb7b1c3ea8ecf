"""A third opinion: torch's own exporter traces the torch engine's decoder, and ONNX Runtime runs what it saw.

Neither the lowering nor any of its operators has a part in that graph; all three must agree.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from edge.engine.kv import Keys
from edge.engine.torch_ops import TorchOps
from loaders.checkpoint import Checkpoint
from loaders.network import decoder_of
from loaders.network.spec import Model
from loaders.network.tensors import PLE_TABLE
from tests.conftest import Folder, Open
from tests.exported import LENGTH, export, running, unasked_fixture  # noqa: F401
from tests.makers import assert_close, prompt

# Gemma 3n's thousands of nodes take torch half a minute to trace.
NAMES = ["llama-3.2-1B", pytest.param("gemma-3n-E2B", marks=pytest.mark.slow)]


class OnePass:
    """The network's Cache for a text that is read once, at its beginning."""

    def __init__(self, tokens: int) -> None:
        self.positions = torch.arange(tokens)

    def append(
        self, layer: int, k: torch.Tensor, v: torch.Tensor, window: int | None, chunk: int | None = None
    ) -> Keys:
        return Keys(k.transpose(0, 1), v.transpose(0, 1), 0, k.shape[0])


class Traceable(torch.nn.Module):
    """The decoder of the torch engine over float32 weights: ids [t], and rows, -> logits [t, vocab]."""

    def __init__(self, model: Model, weights: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.model, self.ops = model, TorchOps(torch.device("cpu"))
        for name, tensor in weights.items():
            self.register_buffer(name.replace(".", "-"), tensor)

    def forward(self, ids: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        self.ops.begin()
        cache = OnePass(ids.shape[0])
        found: torch.Tensor = decoder_of(self.model)(
            self.ops, self.model, lambda name: getattr(self, name.replace(".", "-")), ids, rows, cache, want="all"
        )
        return found


def values(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Every tensor."""
    return {
        name: torch.from_numpy(t.values(checkpoint.shards, t.window).reshape(t.shape).copy())
        for name, t in checkpoint.where.items()
    }


def traced(checkpoint: Checkpoint, ids: np.ndarray) -> np.ndarray:
    """Logits float32 [t, vocab] of the graph that torch's exporter makes."""
    model, weights = checkpoint.model, values(checkpoint)
    arguments = [torch.from_numpy(ids)]
    if model.ple is not None:
        table = weights.pop(PLE_TABLE).reshape(-1, len(model.layers), model.ple.dim)
        arguments.append(table[torch.where(arguments[0] < len(table), arguments[0], 0)])
    network = Traceable(model, weights).eval()
    with torch.no_grad():
        network(*arguments)  # constants that it makes once are there before it is traced
        program = torch.onnx.export(network, tuple(arguments), dynamo=True, optimize=False, verbose=False)
    assert program is not None
    proto: onnx.ModelProto = program.model_proto
    assert {node.domain for node in proto.graph.node} <= {"", "pkg.torch.onnx"}
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    given = {i.name: a.numpy() for i, a in zip(session.get_inputs(), arguments, strict=True)}
    found = session.run(None, given)[0]
    assert isinstance(found, np.ndarray)
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_a_trace_of_the_torch_engine_agrees(name: str, folders: Folder, opened: Open, tmp_path: Path) -> None:
    with closing(Checkpoint.open(folders(name))) as checkpoint:
        ids = prompt(checkpoint.model.vocab, LENGTH)
        third = traced(checkpoint, ids)
        assert_close(third, opened(folders(name)).logits(ids))
        for profile in ("ort", "standard"):
            export(checkpoint, tmp_path / profile, profile)
            with running(tmp_path / profile) as engine:
                assert_close(engine.logits(ids), third)
