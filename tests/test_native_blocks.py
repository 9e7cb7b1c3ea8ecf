"""The C kernels against numpy: every format, every path, nothing read or written outside.

A missing compiled file is a failure here: without it nothing below would be tested.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.engine.native import blocks
from edge.engine.native.blocks import BLOCK, Matrix
from loaders.errors import Unsupported, Usage

ROOT = Path(__file__).resolve().parent.parent
BITS = (4, 8, 16)
GUARD = np.float32(-12345.0)


class Stored(NamedTuple):
    """A matrix as it is stored, and the float32 weights it stands for, padding included: [rows, width]."""

    codes: np.ndarray
    scales: np.ndarray | None
    weights: np.ndarray


def stored(bits: int, rows: int, cols: int, seed: int = 0, scales: np.ndarray | None = None) -> Stored:
    rng = np.random.default_rng(seed)
    if bits == 16:
        codes = (rng.standard_normal((rows, cols), np.float32).view(np.uint32) >> 16).astype(np.uint16)
        return Stored(codes, None, (codes.astype(np.uint32) << 16).view(np.float32))
    count = -(-cols // BLOCK)
    values = rng.integers(-8, 8, (rows, count, BLOCK)) if bits == 4 else rng.integers(-128, 128, (rows, count, BLOCK))
    values.reshape(rows, -1)[:, cols:] = 0
    if scales is None:
        scales = (rng.standard_normal((rows, count)) * 0.1).astype(np.float16)
    with np.errstate(invalid="ignore"):
        weights = (values.astype(np.float32) * scales.astype(np.float32)[:, :, None]).reshape(rows, -1)
    if bits == 8:
        return Stored(values.astype(np.int8).reshape(rows, -1), scales, weights)
    packed = (values[..., :16] + 8) | (values[..., 16:] + 8) << 4
    return Stored(packed.astype(np.uint8).reshape(rows, -1), scales, weights)


def vectors(t: int, width: int, cols: int, seed: int = 1) -> np.ndarray:
    """x [t, width], zero from cols on, with a gap between its rows."""
    x = np.full((t, width + 5), np.nan, np.float32)
    x[:, :width] = np.random.default_rng(seed).standard_normal((t, width))
    x[:, cols:width] = 0
    return x


def matrix(m: Stored, bits: int, cols: int) -> Matrix:
    return Matrix.of(m.codes, m.scales, bits, cols)


def multiply(w: Matrix, x: np.ndarray, t: int) -> np.ndarray:
    """y [t, rows]; fails if a float before or behind it changed."""
    out = np.full(t * w.rows + 32, GUARD, np.float32)
    w.multiply(x.ctypes.data, t, x.strides[0] // 4, out[16:].ctypes.data)
    return guarded(out).reshape(t, w.rows)


def dequantize(w: Matrix, first: int, stop: int) -> np.ndarray:
    out = np.full((stop - first) * w.width + 32, GUARD, np.float32)
    w.dequantize(first, stop, out[16:].ctypes.data)
    return guarded(out).reshape(stop - first, w.width)


def gather(w: Matrix, ids: list[int]) -> np.ndarray:
    out = np.full(len(ids) * w.width + 32, GUARD, np.float32)
    array = np.array(ids, np.int64)
    w.gather(array.ctypes.data, len(ids), out[16:].ctypes.data)
    return guarded(out).reshape(len(ids), w.width)


def guarded(out: np.ndarray) -> np.ndarray:
    assert (out[:16] == GUARD).all()
    assert (out[-16:] == GUARD).all()
    return out[16:-16]


def close(y: np.ndarray, x: np.ndarray, weights: np.ndarray) -> bool:
    """Within what reordering a float32 sum can do."""
    x, weights = x[:, : weights.shape[1]].astype(np.float64), weights.astype(np.float64)
    return bool((np.abs(y - x @ weights.T) <= 1e-6 * (np.abs(x) @ np.abs(weights).T) + 1e-30).all())


@pytest.fixture(params=["auto", "portable"])
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    yield blocks.use(request.param)
    blocks.use("auto")
    blocks.threads(0)


def test_the_kernels_were_compiled() -> None:
    assert blocks.why_not() is None
    assert blocks.available()


def test_the_best_path_is_the_default_where_the_machine_has_it() -> None:
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:
        flags = []
    assert blocks.use("auto") == ("avx2" if {"avx2", "fma", "f16c"} <= set(flags) else "portable")


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("cols", [1, 7, 31, 32, 33, 64, 8 * BLOCK, 9 * BLOCK + 5, 2048 + 96])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 37])
def test_products_are_those_of_the_weights(path: str, bits: int, rows: int, cols: int) -> None:
    m = stored(bits, rows, cols)
    w = matrix(m, bits, cols)
    for t in (1, 2, 3, 4, 5, 8, 11):
        x = vectors(t, w.width, cols)
        assert close(multiply(w, x, t), x, m.weights), t


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("cols", [1, 32, 33, 9 * BLOCK + 5])
def test_rows_come_back_exactly(path: str, bits: int, cols: int) -> None:
    m = stored(bits, 13, cols)
    w = matrix(m, bits, cols)
    for first, stop in [(0, 13), (0, 0), (5, 6), (12, 13), (13, 13)]:
        assert np.array_equal(dequantize(w, first, stop), m.weights[first:stop])
    ids = [12, 0, 0, 7, 12]
    assert np.array_equal(gather(w, ids), m.weights[ids])
    assert gather(w, []).size == 0


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(BITS), st.integers(1, 12), st.integers(1, 700), st.integers(1, 9), st.integers(0, 2**32), st.data()
)
def test_a_window_is_the_matrix_it_shows(
    bits: int, rows: int, cols: int, t: int, seed: int, data: st.DataObject
) -> None:
    """Some rows, first columns of a wider matrix, in place and as a copy: the same bits on either path."""
    m = stored(bits, rows, cols, seed)
    first = data.draw(st.integers(0, rows - 1))
    stop = data.draw(st.integers(first + 1, rows))
    few = data.draw(st.integers(1, cols))
    held = few if bits == 16 else -(-few // BLOCK) * (BLOCK * bits // 8)
    window = Stored(
        m.codes[first:stop, :held],
        None if m.scales is None else m.scales[first:stop, : -(-few // BLOCK)],
        m.weights[first:stop, : few if bits == 16 else -(-few // BLOCK) * BLOCK],
    )
    copy = Stored(window.codes.copy(), None if window.scales is None else window.scales.copy(), window.weights)
    for wanted in ("portable", "auto"):
        blocks.use(wanted)
        w, c = matrix(window, bits, few), matrix(copy, bits, few)
        x = vectors(t, w.width, few, seed)
        y = multiply(w, x, t)
        assert np.array_equal(y, multiply(c, x, t))
        assert np.array_equal(dequantize(w, 0, w.rows), window.weights)
        assert close(y, x, window.weights)


@pytest.mark.parametrize("bits", [4, 8])
def test_every_scale_there_is(path: str, bits: int) -> None:
    """All 65536 of fp16: zeros, subnormals, infinities and NaN among them."""
    scales = np.arange(1 << 16, dtype=np.uint16).view(np.float16).reshape(-1, 64)
    m = stored(bits, scales.shape[0], 64 * BLOCK, scales=scales)
    w = matrix(m, bits, 64 * BLOCK)
    out = dequantize(w, 0, w.rows)
    assert np.array_equal(out, m.weights, equal_nan=True)
    finite = np.isfinite(scales).all(1)
    x = vectors(1, w.width, w.width)
    y = multiply(w, x, 1)
    assert close(y[:, finite], x, m.weights[finite])
    assert not np.isfinite(y[:, ~finite]).any()
    assert np.isnan(y[:, np.isnan(scales).any(1)]).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_shows_where_it_does_in_numpy(path: str, bits: int, bad: float) -> None:
    cols = 5 * BLOCK
    m = stored(bits, 9, cols)
    w = matrix(m, bits, cols)
    for t, place in [(1, 0), (3, 77), (4, cols - 1)]:
        x = vectors(t, cols, cols)
        x[t - 1, place] = bad
        with np.errstate(invalid="ignore"):
            reference = x[:, :cols] @ m.weights.T
        y = multiply(w, x, t)
        assert np.array_equal(np.isfinite(y), np.isfinite(reference))
        assert np.array_equal(np.isnan(y), np.isnan(reference))


@pytest.mark.parametrize("value", [0x7F80, 0xFF80, 0x7FC1, 0x0001, 0x8000])
def test_bf16_keeps_every_kind_of_number(path: str, value: int) -> None:
    codes = np.full((3, 37), value, np.uint16)
    out = dequantize(Matrix.of(codes, None, 16, 37), 0, 3)
    assert (out.view(np.uint32) == value << 16).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("rows", "cols"), [(1003, 512), (259, 4096), (64, 20000)])
def test_threads_change_no_bit(path: str, bits: int, rows: int, cols: int) -> None:
    m = stored(bits, rows, cols)
    w = matrix(m, bits, cols)
    x = vectors(5, w.width, cols)
    ids = list(range(rows - 1, -1, -3))
    results = []
    for count in (1, 2, 3):
        assert blocks.threads(count), "torch is loaded: its pool must be found"
        results.append((multiply(w, x, 1), multiply(w, x, 5), dequantize(w, 1, rows), gather(w, ids)))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert a.tobytes() == b.tobytes()
    assert close(results[0][1], x, m.weights)


ALONE = """
import sys
import numpy as np
sys.modules["edge.engine"] = type(sys)("edge.engine")
sys.modules["edge.engine"].__path__ = [sys.argv[1]]
from edge.engine.native import blocks
codes, scales = np.arange(1 << 20, dtype=np.uint8).reshape(1024, 1024), np.ones((1024, 64), np.float16)
x, y = np.sin(np.arange(2048, dtype=np.float32)), np.zeros(1024, np.float32)
assert not blocks.threads(0)
blocks.Matrix.of(codes, scales, 4, 2048).multiply(x.ctypes.data, 1, 0, y.ctypes.data)
assert "torch" not in sys.modules
sys.stdout.buffer.write(y.tobytes())
"""


def test_without_torch_it_runs_serially_and_says_the_same() -> None:
    done = run_python(ALONE, str(ROOT / "edge/engine"))
    codes, scales = np.arange(1 << 20, dtype=np.uint8).reshape(1024, 1024), np.ones((1024, 64), np.float16)
    x, y = np.sin(np.arange(2048, dtype=np.float32)), np.zeros(1024, np.float32)
    Matrix.of(codes, scales, 4, 2048).multiply(x.ctypes.data, 1, 0, y.ctypes.data)
    assert done.stdout == y.tobytes(), done.stderr.decode()


# Every buffer ends where memory ends: one byte further is a segmentation fault.
CLIFF = """
import ctypes, mmap, sys
import numpy as np
from tests.test_native_blocks import BITS, blocks, matrix, stored, vectors
libc, page, kept = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE, []
def at_the_cliff(a):
    a = np.ascontiguousarray(a)
    size = -(-a.nbytes // page) * page
    area = mmap.mmap(-1, size + page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    assert libc.mprotect(ctypes.c_void_p(start + size), ctypes.c_size_t(page), 0) == 0
    kept.append(area)
    out = np.frombuffer(area, a.dtype, a.size, size - a.nbytes).reshape(a.shape)
    out[...] = a
    return out
for path in ("portable", "auto"):
    blocks.use(path)
    for bits in BITS:
        for rows, cols in [(1, 1), (3, 31), (5, 33), (6, 257), (9, 1001)]:
            m = stored(bits, rows, cols)
            m = m._replace(codes=at_the_cliff(m.codes), scales=None if bits == 16 else at_the_cliff(m.scales))
            w = matrix(m, bits, cols)
            for t in (1, 2, 3, 4, 6):
                x = at_the_cliff(vectors(t, w.width, cols)[:, :w.width])
                y = at_the_cliff(np.zeros((t, rows), np.float32))
                w.multiply(x.ctypes.data, t, w.width, y.ctypes.data)
            out = at_the_cliff(np.zeros((rows, w.width), np.float32))
            w.dequantize(0, rows, out.ctypes.data)
            assert np.array_equal(out, m.weights)
            w.gather(at_the_cliff(np.arange(rows)).ctypes.data, rows, out.ctypes.data)
if len(sys.argv) > 1:
    print(ctypes.string_at(out.ctypes.data + out.nbytes, 1))
print("THE END")
"""


def test_nothing_is_read_or_written_past_an_end() -> None:
    done = run_python(CLIFF)
    assert done.stdout == b"THE END\n", done.stderr.decode()
    assert run_python(CLIFF, "and one byte further").returncode < 0


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, timeout=120, check=False)


HOSTILE: list[dict[str, Any]] = [
    *({"bits": bits} for bits in (0, 2, 5, 32, -4)),
    *({"rows": rows} for rows in (0, -1, 9, 1 << 62, 1 << 70)),
    *({"cols": cols} for cols in (0, -1, 97, 1 << 40, 1 << 70)),
    *({"code_stride": stride} for stride in (0, -48, 47, 49, 1 << 62)),
    *({"scale_stride": stride} for stride in (0, -3, 2, 4, 1 << 62)),
    *({"code_bytes": size} for size in (0, -1, 8 * 48 - 1, 1 << 62)),
    *({"scale_bytes": size} for size in (0, -1, 8 * 6 - 1, 1 << 62)),
    *({"codes_ptr": at} for at in (0, -16, 1 << 64)),
    *({"scales_ptr": at} for at in (0, -16, 4097, 1 << 64)),
    *({"bits": 16, **bad} for bad in ({"codes_ptr": 4097}, {"code_stride": 193}, {"code_bytes": 8 * 192 - 1})),
]
SOUND = {
    **{"codes_ptr": 4096, "scales_ptr": 8192, "bits": 4, "rows": 8, "cols": 96},
    **{"code_stride": 48, "scale_stride": 3, "code_bytes": 8 * 48, "scale_bytes": 8 * 6},
}
BF16 = {"bits": 16, "scales_ptr": 0, "code_stride": 192, "code_bytes": 8 * 192, "scale_bytes": 0}


@pytest.mark.parametrize("change", HOSTILE, ids=str)
def test_a_size_that_cannot_be_is_refused(change: dict[str, Any]) -> None:
    sound = {**SOUND, **(BF16 if change.get("bits") == 16 else {})}
    Matrix(**sound)
    with pytest.raises(Usage):
        Matrix(**{**sound, **change})


def test_arrays_of_another_kind_are_refused() -> None:
    m = stored(8, 4, 64)
    assert m.scales is not None
    wrong: list[tuple[np.ndarray, np.ndarray | None, int]] = [
        (m.codes.view(np.uint8), m.scales, 8),
        (m.codes, m.scales, 4),
        (m.codes, m.scales, 3),
        (m.codes, None, 8),
        (m.codes[0], m.scales, 8),
        (m.codes[:, ::2], m.scales, 8),
        (m.codes[::-1], m.scales, 8),
        (m.codes, m.scales[:3], 8),
        (m.codes, m.scales[:, :1], 8),
        (m.codes, m.scales[::-1], 8),
        (m.codes, m.scales.astype(np.float32), 8),
        (m.codes[:0], m.scales[:0], 8),
    ]
    for codes, scales, bits in wrong:
        with pytest.raises(Usage):
            Matrix.of(codes, scales, bits, 64)


def test_calls_that_cannot_be_are_refused_and_write_nothing() -> None:
    m = stored(4, 6, 64)
    w = matrix(m, 4, 64)
    x, out = vectors(2, 64, 64), np.full(6 * 64, GUARD, np.float32)
    a, b = x.ctypes.data, out.ctypes.data
    for arguments in [(a, 0, 64, b), (a, -1, 64, b), (a, 2, 63, b), (a, 2, -64, b), (0, 1, 64, b), (a, 1, 64, 0)]:
        with pytest.raises(Usage):
            w.multiply(*arguments)
    for arguments3 in [(-1, 2, b), (0, 7, b), (3, 2, b), (0, 1, 0), (1 << 63, 1 << 64, b)]:
        with pytest.raises(Usage):
            w.dequantize(*arguments3)
    for bad in (-1, 6, 1 << 62, -(1 << 63)):
        ids = np.array([0, bad, 1], np.int64)
        with pytest.raises(Usage, match="place 1"):
            w.gather(ids.ctypes.data, 3, b)
    assert (out == GUARD).all()
    with pytest.raises(Usage):
        blocks.use("sse")
    with pytest.raises(Usage):
        blocks.threads(-1)


def test_without_the_compiled_file_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_opened", lambda: (None, "install a C compiler"))
    assert not blocks.available()
    assert blocks.why_not() == "install a C compiler"
    with pytest.raises(Unsupported, match="install a C compiler"):
        Matrix(**SOUND)


def built(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The build of a copy of what is compiled."""
    shutil.copytree(ROOT / "edge/engine/native", folder / "edge/engine/native", ignore=shutil.ignore_patterns("*.so"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder)
    command = [sys.executable, "-c", "from setuptools import setup; setup()", *arguments]
    env = {**os.environ, **environment}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=240, check=False)


def test_without_a_compiler_everything_else_is_built(tmp_path: Path) -> None:
    done = built(tmp_path, "build", "--build-lib", "out", CC="/bin/false")
    assert done.returncode == 0, done.stderr
    assert "_blocks" in done.stderr + done.stdout
    assert (tmp_path / "out/edge/engine/native/blocks.py").is_file()
    assert not list((tmp_path / "out").rglob("_blocks*"))


@pytest.mark.slow
def test_the_wheel_holds_the_compiled_file(tmp_path: Path) -> None:
    done = built(tmp_path, "bdist_wheel")
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert any("native/_blocks" in name for name in zipfile.ZipFile(wheel).namelist())
