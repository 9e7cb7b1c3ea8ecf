"""Quantized weights in torch: against numpy for both widths and odd shapes, and in a whole model."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.engine import torch_blocks
from edge.engine.kv import KVCache
from edge.engine.torch_blocks import BLOCK, Blocks
from edge.engine.torch_ops import TorchOps
from loaders.errors import Usage
from loaders.network import decoder_of
from loaders.network.tensors import PLE_TABLE, tensors
from tests.shrink import parse, real, shrink

CPU = torch.device("cpu")
SHAPES = ((1, 1), (3, 31), (4, 32), (5, 33), (7, 96), (41, 70), (64, 256))
Floats = npt.NDArray[np.float64]


def made(rows: int, cols: int, bits: int, seed: int = 0) -> tuple[Blocks, Floats]:
    """Random blocks, the extreme codes among them, and the matrix they stand for, packed here byte by byte."""
    random = np.random.default_rng(seed)
    nb, most = -(-cols // BLOCK), 1 << (bits - 1)
    codes = random.integers(-most, most, (rows, nb * BLOCK))
    codes[0, 0], codes[-1, cols - 1] = -most, most - 1
    codes[:, cols:] = 0
    scales = random.normal(0, 0.02, (rows, nb)).astype(np.float16)
    packed = np.zeros((rows, nb * 4 * bits), np.uint8)
    for block in range(nb):
        values = codes[:, block * BLOCK : (block + 1) * BLOCK]
        for j in range(4 * bits):
            if bits == 8:
                packed[:, block * 32 + j] = values[:, j] % 256
            else:
                packed[:, block * 16 + j] = (values[:, j] + 8) + 16 * (values[:, j + 16] + 8)
    dense = (codes * np.repeat(scales.astype(np.float64), BLOCK, axis=1))[:, :cols]
    return Blocks(torch.from_numpy(packed), torch.from_numpy(scales), bits, rows, cols), dense


def close(found: torch.Tensor, wanted: Floats, most: float = 1e-6) -> None:
    """Equal up to ``most`` of the largest value."""
    assert found.shape == wanted.shape
    assert np.abs(found.double().numpy() - wanted).max() <= most * np.abs(wanted).max()


# ------------------------------------------------------------------------------------------------------------- matrices


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_values(rows: int, cols: int, bits: int) -> None:
    """Each value is code * scale, exactly; in bfloat16 it is that, rounded once."""
    blocks, dense = made(rows, cols, bits)
    assert blocks.shape == (rows, cols)
    assert blocks.nbytes == rows * -(-cols // 32) * (4 * bits + 2)
    whole = blocks.dequantize()
    assert np.array_equal(whole.numpy(), dense.astype(np.float32))
    for first, stop in ((0, rows), (rows // 2, rows), (0, rows // 2), (rows, rows)):
        assert torch.equal(blocks.dequantize(first, stop), whole[first:stop])
        assert torch.equal(blocks.dequantize(first, stop, torch.bfloat16), whole[first:stop].bfloat16())


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    cols=st.integers(1, 100),
    bits=st.sampled_from([4, 8]),
    t=st.integers(0, 12),
    tile=st.integers(1, 5000),
    seed=st.integers(0, 1000),
)
def test_products(rows: int, cols: int, bits: int, t: int, tile: int, seed: int) -> None:
    """Any tile: rows that do not fill the last one are rows like others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_blocks, "TILE_BYTES", 4 * tile)
        blocks, dense = made(rows, cols, bits, seed)
        x = torch.randn((t, cols), generator=torch.Generator().manual_seed(seed))
        scratch = torch.full((blocks.step * blocks.width,), float("nan"))
        assert scratch.numel() <= max(tile, blocks.width)
        for found in (blocks.product(x), blocks.product(x, scratch), blocks.product(x.t().contiguous().t(), scratch)):
            wanted = x.double().numpy() @ dense.T
            size = np.abs(x.double().numpy()) @ np.abs(dense).T
            assert found.shape == wanted.shape
            assert found.dtype == torch.float32
            assert (np.abs(found.double().numpy() - wanted) <= 1e-6 * size + 1e-12).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_lookups(rows: int, cols: int, bits: int) -> None:
    """Repeated ids, in any order, or none."""
    blocks, dense = made(rows, cols, bits)
    ids = torch.randint(0, rows, (9,), generator=torch.Generator().manual_seed(1))
    assert np.array_equal(blocks.rows_at(ids).numpy(), dense[ids].astype(np.float32))
    assert blocks.rows_at(ids[:0]).shape == (0, cols)
    with pytest.raises(IndexError):
        blocks.rows_at(torch.tensor([rows]))


def test_refuses_other_tensors() -> None:
    """A matrix is what it says, or none."""
    codes, scales = torch.zeros((4, 32), dtype=torch.uint8), torch.ones((4, 2), dtype=torch.float16)
    assert Blocks(codes, scales, 4, 4, 40).shape == (4, 40)
    wrong = (
        (codes, scales, 8, 4, 40),
        (codes, scales, 4, 4, 65),
        (codes, scales, 4, 4, 32),
        (codes, scales, 4, 5, 40),
        (codes, scales, 16, 4, 40),
        (codes, scales, 4, 0, 40),
        (codes.view(torch.int8), scales, 4, 4, 40),
        (codes, scales.float(), 4, 4, 40),
        (codes.t().contiguous().t(), scales, 4, 4, 40),
    )
    for arguments in wrong:
        with pytest.raises(Usage):
            Blocks(*arguments)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------ operators


@pytest.mark.parametrize("bits", [4, 8])
def test_operators(bits: int) -> None:
    """Any leading shape, one scratch tile for all matrices and for 16-bit ones."""
    ops = TorchOps(CPU)
    blocks, dense = made(41, 70, bits)
    other, plain = made(9, 300, bits)
    for shape in ((1, 70), (6, 70), (2, 3, 70)):
        x = torch.randn(shape)
        close(ops.linear(x, blocks), x.double().numpy() @ dense.T)
        tile = ops.tile
        y = torch.randn((3, 300))
        close(ops.linear(y, other), y.double().numpy() @ plain.T)
        close(ops.tiled(y, torch.from_numpy(plain).half()), y.double().numpy() @ plain.T, 1e-3)
        assert ops.tile is tile
    ids = torch.tensor([40, 0, 7])
    assert np.array_equal(ops.embed(blocks, ids).numpy(), dense[ids].astype(np.float32))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", ["gemma-3n-E2B", "qwen3-0.6B"])
@torch.inference_mode()
def test_a_model_computes_with_the_dequantized_weights(name: str, bits: int) -> None:
    """Prefill, then token by token: the same logits to 1e-5 of the largest."""
    model = parse(shrink(real(name)))
    quantized: dict[str, torch.Tensor | Blocks] = {}
    widened: dict[str, torch.Tensor] = {}
    random = torch.Generator().manual_seed(0)
    for at, (key, shape) in enumerate(tensors(model).items()):
        if key == PLE_TABLE:
            continue
        if len(shape) == 2:
            blocks, dense = made(*shape, bits, at)
            scale = (dense.std() * shape[1] ** 0.5) or 1.0
            blocks = Blocks(blocks.codes, (blocks.scales / scale).half(), bits, *shape)
            quantized[key], widened[key] = blocks, blocks.dequantize()
        else:
            quantized[key] = widened[key] = torch.rand(shape, generator=random) + 0.5
    ids = torch.randint(0, model.vocab, (24,), generator=random)
    ple = None
    if model.ple is not None:
        ple = torch.randn((24, len(model.layers), model.ple.dim), generator=random)
    found, wanted = (logits(model, weights, ids, ple) for weights in (quantized, widened))
    assert torch.isfinite(wanted).all()
    assert wanted.std() > 0
    close(found, wanted.double().numpy(), 1e-5)


def logits(model, weights, ids: torch.Tensor, ple: torch.Tensor | None) -> torch.Tensor:  # type: ignore[no-untyped-def]
    """Of every position: 20 at once, the rest one by one."""
    ops, cache, out = TorchOps(CPU), KVCache(model, len(ids), torch.float32, CPU), []
    decoder = decoder_of(model)
    for start, stop in ((0, 20), *((i, i + 1) for i in range(20, len(ids)))):
        cache.begin(stop - start)
        ops.begin()
        part = None if ple is None else ple[start:stop]
        out.append(decoder(ops, model, weights.__getitem__, ids[start:stop], part, cache, want="all"))
        cache.end()
    return torch.cat(out)
