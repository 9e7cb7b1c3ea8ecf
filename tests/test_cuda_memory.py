"""What of a GPU's budget can be tested without one: weights that share one allocation, and refusals in one line."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edge.budget.plan import Floor, Request, enumerate_plans
from edge.budget.price import CUDA_SCRATCH
from edge.engine.cuda_memory import refusals
from edge.engine.torch_weights import ALIGNED, DTYPE, RAW_BITS, Arena, to_device
from loaders.errors import OverBudget
from loaders.formats.window import Window
from loaders.weights import Stream
from tests.shrink import CONFIGS

CPU = torch.device("cpu")


def stream(shape: tuple[int, ...], dtype: str, value: int) -> Stream:
    """An array filled with one value, read in whole or in bands."""
    return Stream(Window.full(shape), dtype, lambda window, out: out.fill(value))


@given(
    st.lists(
        st.tuples(st.lists(st.integers(1, 40), min_size=1, max_size=2), st.sampled_from(sorted(DTYPE))),
        min_size=1,
        max_size=12,
    )
)
def test_weights_share_one_allocation_and_no_byte_of_it(arrays: list[tuple[list[int], str]]) -> None:
    wanted = [stream(tuple(shape), dtype, i + 1) for i, (shape, dtype) in enumerate(arrays)]
    arena = Arena((s.window.count * DTYPE[s.dtype].itemsize for s in wanted), CPU)
    made = [to_device(s, CPU, arena) for s in wanted]
    for i, (s, tensor) in enumerate(zip(wanted, made, strict=True)):
        assert (tensor.dtype, tuple(tensor.shape)) == (DTYPE[s.dtype], s.window.shape)
        assert tensor.is_contiguous()
        assert (tensor.data_ptr() - arena.memory.data_ptr()) % ALIGNED == 0
        assert np.all(tensor.view(RAW_BITS[s.dtype]).numpy() == i + 1), "written over by a later one"
    assert arena.used == arena.memory.nbytes < sum(t.nbytes for t in made) + ALIGNED * len(made)


def test_what_a_device_refuses_is_over_budget_in_one_line() -> None:
    with pytest.raises(OverBudget) as found, refusals():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has\nmore lines")
    assert str(found.value.found) == "CUDA out of memory"
    assert "\n" not in str(found.value)


def test_quantized_prefills_on_a_gpu_are_priced_with_their_tiles() -> None:
    from loaders.sketch import sketch

    source = sketch(CONFIGS / "gemma-3n-E2B.json")
    floor, held = Floor(1 << 30, 600 << 20), {}
    for precision in ("bf16", "int8"):
        request = Request(device="cuda", precision=precision, context=4096, ple="ram")
        plans = enumerate_plans(source, request, floor)
        held[precision] = {p.chunk: p.bytes["activations"] for p in plans if p.kv == "bf16"}
    tile, product = 32 << 20, 2 * 8192
    for chunk, found in held["int8"].items():
        assert found - held["bf16"][chunk] == tile + product * chunk
        assert held["bf16"][chunk] > CUDA_SCRATCH
