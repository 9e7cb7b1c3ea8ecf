"""The bytes of quantized matrices: fixed by hand, compared with a naive reference, and held to error bounds.

With s the float16 scale that is stored, an int8 value is ``round(x / s) * s``. The largest value m of a block wants
m / 127, and float16 keeps 11 bits of that, so s is off by at most a factor 1 + 2**-11 as long as it is normal, 2**-14
or more. Then m / s is at most 127 * (1 + 2**-11) = 127.07, which still rounds to 127: nothing is clipped by more than
that, and every error is at most s / 2 (and one float32 rounding of x * (1 / s)). Against the ideal step m / 127 this
is half a step and 2**-12 of a step more. A subnormal s is off by up to 2**-25 instead, which 127 times make up to
127 * 2**-25 at the largest value.

An int4 block takes the best of several scales, the first of which is m / -8, so its squared error is at most that of
the nearest codes there; float32 sums of 32 terms may rank two that are closer than 1e-5 of the block's energy wrongly.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loaders.errors import BadCheckpoint, Unsupported
from loaders.formats.quant import (
    BLOCK,
    block_count,
    code_bytes,
    dequantize,
    dequantize_rows,
    nibbles,
    quantize,
    quantize_rows,
    quantized_bytes,
    record_bytes,
)

KINDS = ("int8", "int4")
SEEDS = st.integers(0, 2**32 - 1)
# Powers of two that bring a block's values from subnormal scales to almost too large ones.
SIZES = st.integers(-26, 14)


def row(*values: float, cols: int = BLOCK) -> np.ndarray:
    """float32 [1, cols]: the values, then zeros."""
    x = np.zeros((1, cols), np.float32)
    x[0, : len(values)] = values
    return x


def half(value: float) -> bytes:
    """A float16, little-endian."""
    return np.array(value, "<f2").tobytes()


def test_int8_bytes() -> None:
    codes, scales = quantize(row(127, -127, 1, -1, 0.4, -0.6, 63.5, 64.5), "int8")
    # Nearest, halves to even: 63.5 and 64.5 both become 64. Two's complement.
    assert codes.tobytes() == bytes([127, 0x81, 1, 0xFF, 0, 0xFF, 64, 64]) + bytes(24)
    assert scales.tobytes() == half(1) == b"\x00\x3c"
    codes, scales = quantize(row(0, 0, -254), "int8")
    assert codes.tobytes() == bytes([0, 0, 0x81]) + bytes(29)
    assert scales.tobytes() == b"\x00\x40"


def test_int4_bytes() -> None:
    # The largest value gets code -8: its scale is positive for a negative one ...
    codes, scales = quantize(row(-8, 7, 1, -1), "int4")
    # Byte j holds value j low and value j + 16 high, each plus 8; zeros are 0x88.
    assert codes.tobytes() == bytes([0x80, 0x8F, 0x89, 0x87]) + b"\x88" * 12
    assert scales.tobytes() == half(1)
    # ... and negative for a positive one.
    codes, scales = quantize(row(8, -7, -1, 1), "int4")
    assert codes.tobytes() == bytes([0x80, 0x8F, 0x89, 0x87]) + b"\x88" * 12
    assert scales.tobytes() == half(-1) == b"\x00\xbc"


def test_int4_order_of_nibbles() -> None:
    x = row(*[-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7] * 2)
    x[0, 16:] = x[0, 31:15:-1]
    codes, scales = quantize(x, "int4")
    assert codes.tobytes() == bytes(low | (15 - low) << 4 for low in range(16))
    assert scales.tobytes() == half(1)
    assert nibbles(x.astype(np.int8)).tobytes() == codes.tobytes()


def test_a_clipped_largest_value_where_that_is_nearer() -> None:
    """One value of 8 and 31 of -1.5: under -8/8 = -1 each of those is off by half; a scale of -8/8.6 is off by less."""
    x = row(8, *[-1.5 * 8 / 8.6] * 31)
    codes, scales = quantize(x, "int4")
    error = float(((dequantize(codes, scales, "int4", BLOCK) - x) ** 2).sum())
    nearest = float(((np.rint(x / -1) * -1 - x) ** 2).sum())
    assert error < nearest / 2
    assert scales[0, 0] != half(-1)


def test_columns_beyond_the_last_are_zero_codes() -> None:
    for kind, zero in (("int8", 0), ("int4", 0x8)):
        codes, scales = quantize(np.full((2, 33), -8, np.float32), kind)
        assert scales.shape == (2, 2)
        assert codes.shape == (2, code_bytes(33, kind))
        tail = codes.reshape(2, 2, -1)[:, 1]
        if kind == "int8":
            assert (tail[:, 1:] == zero).all()
        else:
            assert (tail[:, 1:] == zero | zero << 4).all()
            assert (tail[:, 0] >> 4 == zero).all()
        assert (dequantize(codes, scales, kind, 33) == -8).all() or kind == "int8"


def test_one_column() -> None:
    x = np.array([[3.0], [-3.0], [0.0]], np.float32)
    for kind in KINDS:
        codes, scales = quantize(x, kind)
        assert codes.shape == (3, 32 if kind == "int8" else 16)
        np.testing.assert_allclose(dequantize(codes, scales, kind, 1), x, rtol=2**-11)


def test_records_of_rows() -> None:
    """Two layers of four values: a float16 scale, then codes, layer after layer."""
    x = np.array([[[127, -1, 0, 2], [-4, 3, 1, 0]]], np.float32)
    assert quantize_rows(x, "int8").tobytes() == (
        half(1) + bytes([127, 0xFF, 0, 2]) + half(4 / 127) + bytes([0x81, 95, 32, 0])
    )
    y = np.array([[[8, -7, -1, 2], [-8, 7, 1, 0]]], np.float32)
    # int4: value j low, value j + dim / 2 high.
    assert quantize_rows(y, "int4").tobytes() == (
        half(-1) + bytes([0 | 9 << 4, 15 | 6 << 4]) + half(1) + bytes([0 | 9 << 4, 15 | 8 << 4])
    )
    np.testing.assert_array_equal(dequantize_rows(quantize_rows(y, "int4"), 2, 4, "int4"), y)
    assert (record_bytes(4, "int8"), record_bytes(4, "int4")) == (6, 4)
    with pytest.raises(Unsupported, match="width 5"):
        record_bytes(5, "int4")


def test_sizes() -> None:
    assert [block_count(n) for n in (1, 31, 32, 33)] == [1, 1, 1, 2]
    assert (code_bytes(33, "int8"), code_bytes(33, "int4")) == (64, 32)
    assert quantized_bytes((3, 33), "int8") == 3 * (64 + 4)
    assert quantized_bytes((3, 33), "int4") == 3 * (32 + 4)


# A reference that knows one value at a time


def naive_codes(block: np.ndarray, kind: str, scale: float) -> list[int]:
    """The nearest codes under a scale, halves to even."""
    low, high = (-127, 127) if kind == "int8" else (-8, 7)
    return [min(max(round(float(np.float32(v) * np.float32(1 / scale))), low), high) if scale else 0 for v in block]


def naive_value(codes: bytes, scales: np.ndarray, kind: str, r: int, c: int, cols: int) -> float:
    """One value, read straight from the description of the format."""
    row_bytes, block, place = code_bytes(cols, kind), c // BLOCK, c % BLOCK
    if kind == "int8":
        code = int.from_bytes(codes[r * row_bytes + c : r * row_bytes + c + 1], signed=True)
    else:
        byte = codes[r * row_bytes + block * 16 + place % 16]
        code = (byte >> 4 if place >= 16 else byte & 15) - 8
    return float(np.float32(code) * np.float32(scales[r, block]))


@st.composite
def matrices(draw: st.DrawFn) -> np.ndarray:
    """float32 of odd sizes and all magnitudes, with zeros, outliers and whole zero blocks among the values."""
    rows, cols = draw(st.integers(1, 6)), draw(st.integers(1, 100))
    rng = np.random.default_rng(draw(SEEDS))
    x = rng.standard_normal((rows, cols)) * 2.0 ** draw(SIZES)
    if draw(st.booleans()):
        x *= np.exp(2 * rng.standard_normal((1, cols)))
    x[rng.random((rows, cols)) < draw(st.sampled_from([0.0, 0.3, 0.97]))] = 0
    return np.clip(x, -5e5, 5e5).astype(np.float32)


@settings(max_examples=60, deadline=None)
@given(matrices(), st.sampled_from(KINDS))
def test_the_fast_form_is_the_naive_one(x: np.ndarray, kind: str) -> None:
    rows, cols = x.shape
    codes, scales = quantize(x, kind)
    fast = dequantize(codes, scales, kind, cols)
    raw = codes.tobytes()
    slow = [[naive_value(raw, scales, kind, r, c, cols) for c in range(cols)] for r in range(rows)]
    np.testing.assert_array_equal(fast, np.array(slow, np.float32))
    for r in range(rows):
        for b in range(scales.shape[1]):
            block, scale = x[r, b * BLOCK : (b + 1) * BLOCK].astype(np.float64), float(scales[r, b])
            if kind == "int8":
                assert scale == float(np.float16(np.float32(np.abs(block).max()) / np.float32(127)))
            # Whatever the scale, codes are the nearest under it.
            found = fast[r, b * BLOCK : (b + 1) * BLOCK]
            nearest = np.array(naive_codes(block, kind, scale)) * scale
            assert (np.abs(found - block) <= np.abs(nearest - block) + abs(scale) * 1e-4).all()


@settings(max_examples=100, deadline=None)
@given(matrices())
def test_an_int8_value_is_off_by_half_a_step(x: np.ndarray) -> None:
    """See the beginning of this file."""
    codes, scales = quantize(x, "int8")
    error = np.abs(dequantize(codes, scales, "int8", x.shape[1]).astype(np.float64) - x)
    step = np.repeat(scales.astype(np.float64), BLOCK, axis=1)[:, : x.shape[1]]
    most = blockwise(np.abs(x.astype(np.float64)), np.max)
    subnormal = step < 2.0**-14
    assert (error <= 0.5001 * step + np.where(subnormal, 127.5 * 2.0**-25, 0)).all()
    # And against the step that exact scales would have.
    assert (error[~subnormal] <= (0.5 + 2.0**-11) * most[~subnormal] / 127).all()


def blockwise(x: np.ndarray, reduce: np.ufunc | object) -> np.ndarray:
    """Each value replaced by its block's."""
    out = np.empty_like(x)
    for start in range(0, x.shape[1], BLOCK):
        out[:, start : start + BLOCK] = reduce(x[:, start : start + BLOCK], axis=1, keepdims=True)  # type: ignore[operator]
    return out


def nearest_int4(x: np.ndarray, size: int = BLOCK) -> np.ndarray:
    """float64: the nearest codes under max / -8, the plain way."""
    out = np.zeros(x.shape)
    for start in range(0, x.shape[1], size):
        block = x[:, start : start + size].astype(np.float64)
        top = np.take_along_axis(block, np.abs(block).argmax(axis=1)[:, None], 1)
        scale = (top / -8).astype(np.float32).astype(np.float16).astype(np.float64)
        q = np.divide(block, scale, out=np.zeros_like(block), where=scale != 0)
        out[:, start : start + size] = np.clip(np.rint(q), -8, 7) * scale
    return out


@settings(max_examples=100, deadline=None)
@given(matrices(), st.booleans(), SEEDS)
def test_an_int4_block_is_at_least_as_near_as_the_nearest_under_max(x: np.ndarray, weighted: bool, seed: int) -> None:
    """See the beginning of this file; with column weights the error is weighted too."""
    weights = np.random.default_rng(seed).exponential(size=x.shape[1]).astype(np.float32) if weighted else None
    codes, scales = quantize(x, "int4", weights)
    w = 1.0 if weights is None else weights.astype(np.float64)
    wide = x.astype(np.float64)
    found = blockwise(w * (dequantize(codes, scales, "int4", x.shape[1]) - wide) ** 2, np.sum)
    nearest = blockwise(w * (nearest_int4(x) - wide) ** 2, np.sum)
    energy = blockwise(w * wide**2, np.sum)
    assert (found <= nearest + 1e-5 * energy).all()


def test_int4_gains_on_normal_weights() -> None:
    """At least 3% less squared error than nearest, of plain and of weighted error."""
    x = np.random.default_rng(1).standard_normal((256, 1024)).astype(np.float32)
    plain = float(((nearest_int4(x) - x) ** 2).sum())
    assert squared(x, *quantize(x, "int4")) < 0.97 * plain
    weights = np.exp(np.random.default_rng(2).standard_normal(1024)).astype(np.float32)
    heavy = float((weights * (nearest_int4(x) - x) ** 2).sum())
    with_weights = squared(x, *quantize(x, "int4", weights), weights)
    assert with_weights < 0.97 * heavy
    assert with_weights < squared(x, *quantize(x, "int4"), weights)


def squared(x: np.ndarray, codes: np.ndarray, scales: np.ndarray, weights: np.ndarray | float = 1.0) -> float:
    """The weighted squared error of int4 codes."""
    return float((weights * (dequantize(codes, scales, "int4", x.shape[1]).astype(np.float64) - x) ** 2).sum())


def test_importance_moves_the_error_to_columns_that_do_not_count() -> None:
    x = np.random.default_rng(3).standard_normal((2000, 32)).astype(np.float32)
    plain, even = (dequantize(*quantize(x, "int4", w), "int4", 32) for w in (None, np.ones(32, np.float32)))
    np.testing.assert_array_equal(plain, even)
    weights = np.where(np.arange(32) < 4, 100.0, 1.0).astype(np.float32)
    chosen = dequantize(*quantize(x, "int4", weights), "int4", 32)
    before, after = (((v.astype(np.float64) - x) ** 2).mean(axis=0) for v in (plain, chosen))
    assert after[:4].mean() < 0.85 * before[:4].mean()
    assert after[4:].mean() > before[4:].mean()
    # Only columns that do not count: any scale will do, and it is one that means something.
    np.testing.assert_array_equal(
        dequantize(*quantize(x, "int4", np.zeros(32, np.float32)), "int4", 32), nearest_int4(x).astype(np.float32)
    )
    # A scale of int8 has next to nothing to gain.
    np.testing.assert_array_equal(quantize(x, "int8", weights)[0], quantize(x, "int8")[0])


# Rows of per-layer embeddings


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.integers(1, 5), st.integers(1, 4), st.sampled_from([2, 8, 50]), st.sampled_from(KINDS))
def test_layers_of_records_are_windows(seed: int, t: int, layers: int, dim: int, kind: str) -> None:
    x = np.random.default_rng(seed).standard_normal((t, layers, dim)).astype(np.float32)
    records, size = quantize_rows(x, kind), record_bytes(dim, kind)
    assert records.shape == (t, layers * size)
    for i in range(layers):
        alone = quantize_rows(x[:, i : i + 1], kind)
        np.testing.assert_array_equal(records[:, i * size : (i + 1) * size], alone)
    found = dequantize_rows(records, layers, dim, kind).astype(np.float64)
    if kind == "int8":
        most = np.abs(x).max(axis=2, keepdims=True)
        assert (np.abs(found - x) <= (0.5 + 2**-11) / 127 * most + 1e-7).all()
    else:
        flat = x.reshape(-1, dim)
        error = ((found.reshape(-1, dim) - flat) ** 2).sum(axis=1)
        assert (error <= ((nearest_int4(flat, dim) - flat) ** 2).sum(axis=1) + 1e-5 * (flat**2).sum(axis=1)).all()


def test_strips_do_not_show() -> None:
    """More rows than are worked on at once, and rows longer than that, are what they are alone."""
    rng = np.random.default_rng(5)
    for shape in ((700, 96), (2, 70_000)):
        x = rng.standard_normal(shape).astype(np.float32)
        for kind in KINDS:
            codes, scales = quantize(x, kind)
            for r in (0, shape[0] // 2, shape[0] - 1):
                alone = quantize(x[r : r + 1], kind)
                np.testing.assert_array_equal(codes[r : r + 1], alone[0])
                np.testing.assert_array_equal(scales[r : r + 1], alone[1])
    rows = rng.standard_normal((300, 30, 8)).astype(np.float32)
    np.testing.assert_array_equal(quantize_rows(rows, "int8")[299], quantize_rows(rows[299:], "int8")[0])
    strided = rng.standard_normal((64, 64)).astype(np.float32).T[::2]
    assert quantize(strided, "int4")[0].tobytes() == quantize(strided.copy(), "int4")[0].tobytes()


# What is out of the ordinary


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_and_what_is_too_small_become_zero(kind: str) -> None:
    for value in (0.0, -0.0, 1e-45, 1e-12, -1e-9):
        codes, scales = quantize(np.full((2, 40), value, np.float32), kind)
        assert (scales == 0).all()
        assert (dequantize(codes, scales, kind, 40) == 0).all()
        assert set(codes.tobytes()) == ({0} if kind == "int8" else {0x88})


@pytest.mark.parametrize("kind", KINDS)
def test_subnormal_scales_still_mean_something(kind: str) -> None:
    x = row(*[2.0**-16, -(2.0**-17), 3e-6])
    codes, scales = quantize(x, kind)
    assert 0 < abs(float(scales[0, 0])) < 2**-14
    assert np.abs(dequantize(codes, scales, kind, BLOCK) - x).max() <= 2.0**-19


@pytest.mark.parametrize(("kind", "most"), [("int8", 127 * 65504.0), ("int4", 8 * 65504.0)])
def test_values_up_to_what_a_scale_can_say(kind: str, most: float) -> None:
    for value in (most, -most):
        x = row(value, value / 2, 1.0)
        codes, scales = quantize(x, kind)
        assert abs(float(scales[0, 0])) == 65504
        np.testing.assert_allclose(dequantize(codes, scales, kind, BLOCK)[0, :2], x[0, :2], rtol=0.01)
    with pytest.raises(BadCheckpoint, match="values up to"):
        quantize(row(most * 1.001), kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [(0, 0), (3, 39), (69, 17)])
def test_what_is_not_finite_is_refused(kind: str, value: float, place: tuple[int, int]) -> None:
    x = np.ones((70, 40), np.float32)
    x[place] = value
    with pytest.raises(BadCheckpoint, match="not finite"):
        quantize(x, kind)
    with pytest.raises(BadCheckpoint, match="not finite"):
        quantize_rows(x.reshape(70, 5, 8), kind)
