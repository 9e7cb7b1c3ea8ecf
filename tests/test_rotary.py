"""Rotary positions: angles beside transformers' and beside their formulas, rotations beside complex numbers."""

from __future__ import annotations

import cmath
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from edge.engine import torch_ops
from edge.engine.torch_ops import TorchOps
from loaders.families.rope import rope_of
from loaders.formats.config import Config
from loaders.network import rotary
from loaders.network.rotary import amplitude
from loaders.network.spec import Linear, Llama3Scaling, Proportional, Rope, Yarn
from tests.makers import theirs
from tests.shrink import NAMES, parse, real

CPU = torch.device("cpu")
CONTEXT = 8192
KINDS = ("default", "llama3", "yarn", "linear", "proportional")
Floats = npt.NDArray[np.float64]


def op() -> TorchOps:
    """Operators at the start of a pass."""
    return TorchOps(CPU)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def apart(found: Any, wanted: torch.Tensor) -> int:
    """The largest number of float32 values from one to the other; both are positive or zero."""
    a, b = np.asarray(found), wanted.numpy()
    assert a.dtype == b.dtype == np.float32
    assert a.shape == b.shape
    return int(np.abs(a.view(np.int32).astype(np.int64) - b.view(np.int32)).max())


# -------------------------------------------------------------------------------------------------------------- angles


def default(theta: float, dim: int) -> torch.Tensor:
    """As every modeling file of transformers has it."""
    powers: torch.Tensor = theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim)
    return 1.0 / powers


def of_config(name: str) -> Iterator[tuple[Rope, torch.Tensor, float]]:
    """Every rotation of a published config: ours, and transformers' angles and amplitude."""
    raw = real(name)
    text = raw.get("text_config", raw)
    if text.get("attn_temperature_tuning") == 4:
        text["attn_temperature_tuning"] = True  # transformers refuses the 4 that is published
    _, config = theirs(raw)
    seen = set()
    for i, layer in enumerate(parse(raw).layers):
        rope, parameters, options = layer.attention.rope, config.rope_parameters, {}
        if rope is None or rope in seen:
            continue
        seen.add(rope)
        if "rope_type" not in parameters:
            parameters, options = parameters[config.layer_types[i]], {"layer_type": config.layer_types[i]}
        if parameters["rope_type"] == "default":
            yield rope, default(parameters["rope_theta"], rope.dim), 1.0
        else:
            yield rope, *ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, device="cpu", **options)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "gpt2"])
def test_angles_of_published_configs(name: str) -> None:
    """Torch's bit for bit, for far into a text the last bit can be seen; YaRN's are divided in another order."""
    found = list(of_config(name))
    assert len(found) == (2 if name.startswith("gemma") else 1)
    for rope, wanted, size in found:
        assert apart(torch_ops.frequencies(rope), wanted) <= isinstance(rope.scaling, Yarn)
        assert apart(rotary.frequencies(rope), wanted) <= 2
        assert amplitude(rope) == size


def test_published_configs_have_every_kind() -> None:
    kinds = {type(rope.scaling) for name in NAMES if name != "gpt2" for rope, _, _ in of_config(name)}
    assert kinds == {type(None), Llama3Scaling, Yarn, Linear, Proportional}


def stretched(kind: str, factor: float = 1.0, original: int = CONTEXT, **keys: Any) -> dict[str, Any]:
    return {"rope_type": kind, "factor": factor, "original_max_position_embeddings": original, **keys}


CASES: dict[str, tuple[float, int, dict[str, Any]]] = {
    "llama 3.2": (5e5, 64, stretched("llama3", 32.0, low_freq_factor=1.0, high_freq_factor=4.0)),
    "llama 3.1": (5e5, 128, stretched("llama3", 8.0, low_freq_factor=1.0, high_freq_factor=4.0)),
    "llama 3, short": (5e5, 16, stretched("llama3", 32.0, 128, low_freq_factor=1.0, high_freq_factor=4.0)),
    "llama 3, uneven": (1e4, 32, stretched("llama3", 3.0, 100, low_freq_factor=0.5, high_freq_factor=7.0)),
    "llama 3, a step": (5e5, 128, stretched("llama3", 16.0, low_freq_factor=1.0, high_freq_factor=1.0)),
    "yarn": (1e4, 64, stretched("yarn", 40.0, 4096)),
    "yarn, deepseek": (1e4, 64, stretched("yarn", 40.0, 4096, mscale=1.0, mscale_all_dim=1.0)),
    "yarn, kimi: a step": (5e4, 64, stretched("yarn", 32.0, 4096, beta_fast=1.0, beta_slow=1.0)),
    "yarn, not cut, a step": (5e4, 64, stretched("yarn", 32.0, 4096, truncate=False, beta_fast=1.0, beta_slow=1.0)),
    "yarn, mscales": (1e4, 64, stretched("yarn", 40.0, 4096, mscale=1.0, mscale_all_dim=0.707)),
    "yarn, mscale alone": (1e4, 64, stretched("yarn", 40.0, 4096, mscale=0.707)),
    "yarn, mscale_all_dim alone": (1e4, 64, stretched("yarn", 40.0, 4096, mscale_all_dim=0.707)),
    "yarn, a zero": (1e4, 64, stretched("yarn", 40.0, 4096, mscale=0.707, mscale_all_dim=0.0)),
    "yarn, factor of one": (1e4, 64, stretched("yarn", 1.0, 4096, mscale=2.0, mscale_all_dim=0.5)),
    "yarn, said": (1e4, 64, stretched("yarn", 40.0, 4096, attention_factor=0.9, mscale=1.0, mscale_all_dim=0.5)),
    "yarn, not cut": (1e4, 64, stretched("yarn", 40.0, 4096, truncate=False)),
    "yarn, not cut, ends": (1.5e5, 64, stretched("yarn", 32.0, 4096, truncate=False, beta_fast=40.0, beta_slow=0.5)),
    "yarn, wider than the head": (10.0, 8, stretched("yarn", 4.0, 65_536, beta_fast=200.0, beta_slow=0.01)),
    "linear": (1e6, 256, stretched("linear", 8.0)),
    "linear, uneven": (1e6, 128, stretched("linear", 2.7)),
    "proportional": (1e6, 512, {"rope_type": "proportional", "partial_rotary_factor": 0.25}),
    "proportional, odd": (1e4, 24, {"rope_type": "proportional", "partial_rotary_factor": 0.3}),
    "proportional, all": (1e4, 24, {"rope_type": "proportional", "partial_rotary_factor": 1.0}),
}


@pytest.mark.parametrize("case", CASES)
def test_angles_as_configs_spell_them(case: str) -> None:
    theta, dim, keys = CASES[case]
    parameters = {**keys, "rope_theta": theta}
    config = LlamaConfig(
        head_dim=dim,
        hidden_size=dim,
        num_attention_heads=1,
        max_position_embeddings=CONTEXT,
        rope_parameters=parameters,
    )
    wanted, size = ROPE_INIT_FUNCTIONS[keys["rope_type"]](config, device="cpu")
    sub = Config(dict(parameters), "config.json")
    rope = rope_of(sub, dim, CONTEXT, 1.0, KINDS)
    assert rope.theta == theta
    assert amplitude(rope) == size
    found = torch_ops.frequencies(rope)
    # Where a ramp blends, errors of both ends add up.
    blended = keys["rope_type"] in ("llama3", "yarn")
    assert apart(found, wanted) <= (1 if blended else 0)
    assert apart(rotary.frequencies(rope), wanted) <= 2
    if keys["rope_type"] != "proportional":
        assert np.allclose(found, formula(rope), rtol=3e-6, atol=0.0)


def formula(rope: Rope) -> list[float]:
    """Pair by pair in float64, each of the cases it is written with."""
    plain = [rope.theta ** (-2 * i / rope.dim) for i in range(rope.dim // 2)]
    s = rope.scaling
    if isinstance(s, Linear):
        return [f / s.factor for f in plain]
    if isinstance(s, Llama3Scaling):
        out = []
        for f in plain:
            wavelength = 2 * math.pi / f
            if wavelength > s.original / s.low:
                out.append(f / s.factor)
            elif wavelength < s.original / s.high:
                out.append(f)
            else:
                smooth = (s.original / wavelength - s.low) / (s.high - s.low)
                out.append((1 - smooth) * f / s.factor + smooth * f)
        return out
    assert isinstance(s, Yarn)
    first, last = (
        rope.dim * math.log(s.original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))
        for turns in (s.fast, s.slow)
    )
    if s.truncate:
        first, last = float(math.floor(first)), float(math.ceil(last))
    first, last = max(first, 0.0), min(last, rope.dim - 1.0)
    out = []
    for i, f in enumerate(plain):
        kept = 1.0 if i <= first else 0.0 if i >= last else (last - i) / (last - first)
        out.append(f * kept + f / s.factor * (1 - kept))
    return out


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("llama 3")])
def test_llama3_has_three_bands(case: str) -> None:
    """What turns often stays as it is, to the bit; what turns rarely is divided; a step has nothing between."""
    theta, dim, keys = CASES[case]
    s = Llama3Scaling(
        keys["factor"], keys["low_freq_factor"], keys["high_freq_factor"], keys["original_max_position_embeddings"]
    )
    plain, found = torch_ops.frequencies(Rope(theta, dim)), torch_ops.frequencies(Rope(theta, dim, s))
    turns = s.original * plain.double() / (2 * math.pi)
    high, low = turns > s.high, turns < s.low
    assert high.any()
    assert low.any()
    assert torch.equal(found[high], plain[high])
    assert torch.equal(found[low], plain[low] / s.factor)
    middle = found[~high & ~low] / plain[~high & ~low]
    assert len(middle) > 0 or s.high == s.low
    assert bool(((1 / s.factor <= middle) & (middle <= 1.0)).all())


def test_plain_angles_bit_for_bit() -> None:
    for theta, dim in ((10_000.0, 256), (1_000_000.0, 256), (500_000.0, 64), (150_000.0, 10), (10_000.0, 2)):
        assert torch.equal(torch_ops.frequencies(Rope(theta, dim)), default(theta, dim))
        assert apart(rotary.frequencies(Rope(theta, dim)), default(theta, dim)) <= 2


# ----------------------------------------------------------------------------------------------------------- rotations


def turned(x: Floats, positions: Sequence[int], angles: Sequence[float], rope: Rope) -> Floats:
    """Each pair is a complex number, turned by its angle times the position; values past ``rope.dim`` stay."""
    out, half = x.copy(), rope.dim // 2
    for t, position in enumerate(positions):
        for h in range(x.shape[1]):
            for i, angle in enumerate(angles):
                a, b = (2 * i, 2 * i + 1) if rope.interleaved else (i, i + half)
                z = complex(x[t, h, a], x[t, h, b]) * cmath.exp(1j * angle * position) * amplitude(rope)
                out[t, h, a], out[t, h, b] = z.real, z.imag
    return out


SCALINGS = (None, Yarn(8.0, 64, 1.25), Linear(3.0), Proportional(2), Llama3Scaling(4.0, 1.0, 4.0, 64))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim", [8, 12])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_rotations_are_those_of_complex_numbers(dim: int, interleaved: bool, scaling: Any) -> None:
    """Near and far, over the whole head of 12 and over its first 8 values."""
    rope, x = Rope(10_000.0, dim, scaling, interleaved), random(5, 3, 12)
    angles = torch_ops.frequencies(rope).double().tolist()
    for start in (0, 5, 900, 100_000):
        positions = list(range(start, start + 5))
        found = op().rope(x, torch.tensor(positions), rope)
        assert found.dtype == torch.float32
        wanted = turned(x.double().numpy(), positions, angles, rope)
        # Angles are float32: one of p radians is off by up to p / 2^24.
        error = np.abs(found.double().numpy() - wanted).max()
        assert error <= 2e-6 + 1.5 * start / 2**24 * float(x.abs().max()) * 2
        assert torch.equal(found[..., dim:], x[..., dim:])
        if isinstance(scaling, Proportional):
            assert torch.equal(found[..., 4:8] if interleaved else found[..., 2 : dim // 2], (
                x[..., 4:8] if interleaved else x[..., 2 : dim // 2]
            ))  # fmt: skip


@pytest.mark.parametrize("start", [0, 4096, 100_000, 10_000_000])
def test_far_rotations_bit_for_bit(start: int) -> None:
    """Cosines and sines are transformers' own, wherever in a text."""
    config = LlamaConfig(head_dim=64, hidden_size=64, num_attention_heads=1, rope_theta=500_000.0)
    positions = torch.arange(start, start + 7)
    wanted = LlamaRotaryEmbedding(config)(torch.zeros(1), positions[None])
    for found, theirs_ in zip(op().rotation(positions, Rope(500_000.0, 64)), wanted, strict=True):
        assert torch.equal(found[:, 0], theirs_[0, :, :32])


def test_interleaved_pairs_are_halves_in_another_order() -> None:
    order = torch.arange(12).view(6, 2).t().flatten()
    x, positions, rope = random(4, 2, 12), torch.arange(3, 7), Rope(100.0, 12)
    found = op().rope(x, positions, replace(rope, interleaved=True))
    assert torch.equal(found[..., order], op().rope(x[..., order], positions, rope))


def test_rotations_are_worked_out_again_for_every_pass() -> None:
    ops, rope, x = op(), Rope(10_000.0, 4), random(1, 1, 4)
    first = ops.rope(x, torch.tensor([3]), rope)
    ops.begin()
    assert not torch.equal(ops.rope(x, torch.tensor([4]), rope), first)
    assert torch.equal(ops.rope(x, torch.tensor([4]), rope), op().rope(x, torch.tensor([4]), rope))
    for other in (Rope(500.0, 4), replace(rope, interleaved=True), replace(rope, scaling=Linear(2.0))):
        assert torch.equal(ops.rope(x, torch.tensor([4]), other), op().rope(x, torch.tensor([4]), other))
        assert not torch.equal(ops.rope(x, torch.tensor([4]), other), ops.rope(x, torch.tensor([4]), rope))


@given(
    st.integers(0, 3000), st.integers(0, 3000), st.integers(0, 60),
    st.sampled_from(SCALINGS), st.booleans(), st.sampled_from((6, 8)), st.integers(0, 1000),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_products_depend_on_the_distance_alone(
    one: int, two: int, distance: int, scaling: Any, interleaved: bool, dim: int, seed: int
) -> None:
    rope = Rope(100.0, dim, scaling, interleaved)
    q, k = random(1, 1, 8, seed=seed), random(1, 1, 8, seed=seed + 1)

    def product(query: int, key: int) -> float:
        a, b = (op().rope(x, torch.tensor([p]), rope) for x, p in ((q, query), (k, key)))
        return float((a.double() * b.double()).sum())

    # Two angles of up to 3060 radians, each off by 2^-13.
    tolerance = 2 * 2**-12 * float(q.norm() * k.norm()) * amplitude(rope) ** 2
    assert product(one + distance, one) == pytest.approx(product(two + distance, two), abs=tolerance)
    # The other way round is another angle; the length of a vector stays.
    length = float(op().rope(q, torch.tensor([one]), rope)[..., :dim].norm())
    assert length == pytest.approx(amplitude(rope) * float(q[..., :dim].norm()), rel=1e-5)
