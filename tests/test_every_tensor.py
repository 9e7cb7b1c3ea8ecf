"""No tensor is read in vain, and a quantized model is exactly the model of its own dequantized weights."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

import edge
from edge.engine.torch import TorchEngine
from edge.engine.torch_blocks import Blocks
from edge.session import Session
from loaders.checkpoint import Checkpoint
from loaders.network.tensors import PLE_TABLE, tensors
from loaders.packing import write_pack
from tests.conftest import Folder, Open
from tests.makers import assert_close, prompt
from tests.shrink import DISTINCT, GEMMA, QUANTIZED

LENGTH = 40
# Enough for every expert to be chosen by somebody; without experts a few tokens say as much.
LONG, SHORT = 120, 9


# Gemma 3n's are zeroed in tests/test_traps.py.
@pytest.mark.parametrize("name", [name for name in DISTINCT if name not in GEMMA])
def test_zeroing_any_tensor_changes_the_logits(name: str, folders: Folder, opened: Open) -> None:
    session = opened(folders(name), engine="native", context=LONG)
    weights = memory(session)
    ids = prompt(session.model.vocab, LONG if any(".experts." in name for name in weights) else SHORT)
    wanted = session.logits(ids)
    assert set(weights) == set(tensors(session.model)) - {PLE_TABLE}
    idle = [label for label, part in pieces(weights) if not matters(session, part, ids, wanted)]
    assert [label for label in idle if not matters_when_chosen(session, label, ids)] == []


def memory(session: Session) -> dict[str, np.ndarray]:
    """The float32 weights [matrices, values] of a run, where they are."""
    named = session.engine.weights.named
    values = {name: (ctypes.c_float * (w.bytes // 4)).from_address(w.data) for name, w in named.items()}
    return {name: np.ctypeslib.as_array(values[name]).reshape(w.count, -1) for name, w in named.items()}


def pieces(weights: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor, and of stacks in the first and the last layer that has some every matrix."""
    layers = [int(name.split(".")[1]) for name, tensor in weights.items() if len(tensor) > 1]
    for name, tensor in weights.items():
        if len(tensor) > 1 and int(name.split(".")[1]) in (min(layers), max(layers)):
            yield from ((f"{name}[{i}]", tensor[i]) for i in range(len(tensor)))
        else:
            yield name, tensor


def matters(session: Session, part: np.ndarray, ids: np.ndarray, wanted: np.ndarray) -> bool:
    """Whether logits change when ``part`` is zero; it is put back."""
    held = part.copy()
    part[...] = 0
    changed = not np.array_equal(session.logits(ids), wanted)
    part[...] = held
    return changed


def matters_when_chosen(session: Session, label: str, ids: np.ndarray) -> bool:
    """The same for an expert that nobody chose, once the router prefers it; False for anything that is no expert."""
    found = re.fullmatch(r"(layers\.\d+\.experts\.)(\w+)\[(\d+)\]", label)
    weights = memory(session)
    if found is None or found[1] + "bias" not in weights:
        return False
    bias, expert = weights[found[1] + "bias"][0], int(found[3])
    held = bias.copy()
    bias[expert] += 10.0
    changed = matters(session, weights[found[1] + found[2]][expert], ids, session.logits(ids))
    bias[...] = held
    return changed


@pytest.fixture(scope="module")
def pack_of(folders: Folder, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """name -> a pack of its shrunk checkpoint, at both precisions."""

    @cache
    def pack(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name) / "pack"
        with closing(Checkpoint.open(folders(name))) as checkpoint:
            write_pack(checkpoint, folder)
        return folder

    return pack


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("name", QUANTIZED)
def test_a_quantized_model_is_that_of_its_dequantized_weights(
    name: str, precision: str, pack_of: Callable[[str], Path]
) -> None:
    """Whole, and a token at a time, which other kernels compute."""
    with edge.load(pack_of(name), engine="torch", precision=precision, kv="float32") as session:
        quantized = [w for w in session.engine.weights.values() if isinstance(w, Blocks)]
        assert any(w.bits == {"int8": 8, "int4": 4}[precision] for w in quantized)
        ids = prompt(session.model.vocab, LENGTH)
        wanted = dequantized(session).logits(ids)
        assert_close(session.logits(ids), wanted)
        session.step(ids[:30])
        assert_close(np.stack([session.step(ids[i : i + 1]) for i in range(30, LENGTH)]), wanted[30:])


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_pack_at_8_bits_is_close_to_the_checkpoint(
    name: str, folders: Folder, opened: Open, pack_of: Callable[[str], Path]
) -> None:
    """Scales, transposed and stacked tensors went where they belong: a wrong one would be far off."""
    exact = opened(folders(name))
    ids = prompt(exact.model.vocab, LENGTH)
    with edge.load(pack_of(name), precision="int8", kv="float32") as session:
        found, wanted = session.logits(ids), exact.logits(ids)
    # A token that is sent to other experts than before is far off, but most are not.
    errors = np.linalg.norm(found - wanted, axis=-1) / np.linalg.norm(wanted, axis=-1)
    assert 0.0 < np.median(errors) < 0.1


def dequantized(session: Session) -> TorchEngine:
    """The same model over float32 weights."""
    shapes = tensors(session.model)

    def plain(name: str, w: torch.Tensor | Blocks) -> torch.Tensor:
        return (w.dequantize() if isinstance(w, Blocks) else w.float()).reshape(shapes[name])

    engine = session.engine
    weights = {name: plain(name, w) for name, w in engine.weights.items()}
    return TorchEngine(
        session.model, weights, engine.rows, context=LENGTH, chunk=LENGTH, kv="float32", device=engine.torch_device
    )
