"""Panels: their bytes by the description of the format, windows of them, and what readers make of those in packs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loaders import weights
from loaders.checkpoint import Checkpoint
from loaders.errors import Usage
from loaders.formats.pack import Pack
from loaders.formats.panels import (
    BLOCK_BYTES,
    PANEL,
    covering,
    panel_bytes,
    panel_columns,
    panel_count,
    panel_shape,
    panel_window,
    panels,
    rows,
    whole_panels,
)
from loaders.formats.quant import BITS, BLOCK, block_count, code_bytes, dequantize, quantize
from loaders.formats.recipe import recipes
from loaders.formats.safetensors_writer import Writer
from loaders.formats.synthetic import write_random
from loaders.formats.window import Window
from loaders.network.matformer import Part, Slice, full, parts
from loaders.network.tensors import PLE_TABLE, flat, tensors
from loaders.packing import write_pack
from loaders.weights import code_bands, panel_place, panel_rows
from tests import small
from tests.shrink import real, shrink

KINDS = ("int8", "int4")
SEEDS = st.integers(0, 2**32 - 1)
RECIPES = (*recipes("int8"), *recipes("int4"))
# FFNs that end inside a panel and inside a block, and layers left out.
CUT = Slice("cut", (0, 1, 2, 4, 5, 6, 9), (72, 65, 128, 96, 33, 20, 47))


def made(seed: int, height: int, cols: int, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of a random matrix."""
    return quantize(np.random.default_rng(seed).standard_normal((height, cols)).astype(np.float32), kind)


def value(line: bytes, kind: str, row: int, col: int) -> float:
    """One value of a panel, read straight from the description of the format."""
    block, c = line[col // BLOCK * BLOCK_BYTES[kind] :], col % BLOCK
    scale = float(np.frombuffer(block[2 * row : 2 * row + 2], "<f2")[0])
    if kind == "int8":
        return scale * int.from_bytes(block[32 + 64 * (c // 4) + 4 * row + c % 4 :][:1], signed=True)
    byte = block[32 + 64 * (c % 16 // 4) + 4 * row + c % 4]
    return scale * ((byte & 15 if c < 16 else byte >> 4) - 8)


def test_int8_bytes() -> None:
    x = np.zeros((2, 33), np.float32)
    x[0, :6], x[1, 32] = [127, -127, 1, 2, 3, 4], 254
    (line,) = panels(*quantize(x, "int8"), "int8")
    assert len(line) == 2 * 544
    first, second = line[:544].tobytes(), line[544:].tobytes()
    assert first[:32] == b"\x00\x3c" + bytes(30)
    assert second[:32] == bytes(2) + b"\x00\x40" + bytes(28)
    # Columns 0 to 3 of the first row, 15 other rows, columns 4 to 7 of the first row.
    assert first[32:36] == bytes([127, 0x81, 1, 2])
    assert first[36:96] == bytes(60)
    assert first[96:100] == bytes([3, 4, 0, 0])
    assert (second[32:36], second[36:40]) == (bytes(4), bytes([127, 0, 0, 0]))
    assert first[100:] + second[40:] == bytes(444 + 504)


def test_int4_bytes() -> None:
    x = np.zeros((17, 32), np.float32)
    x[0, :2], x[0, 16], x[1, 5], x[16, 31] = [-8, 7], 1, -8, -16
    first, second = (line.tobytes() for line in panels(*quantize(x, "int4"), "int4"))
    assert len(first) == len(second) == 288
    # A row of zeros has the scale that its largest value, 0, wants for a code of -8: -0.
    assert first[:32] == b"\x00\x3c" * 2 + b"\x00\x80" * 14
    # Columns 0 to 3 low and 16 to 19 high, each plus 8.
    assert first[32:36] == bytes([0x90, 0x8F, 0x88, 0x88])
    assert first[32 + 64 + 4 : 32 + 64 + 8] == bytes([0x88, 0x80, 0x88, 0x88])
    assert first[36:96] + first[100:] == b"\x88" * 60 + bytes([0x80 if i == 1 else 0x88 for i in range(188)])
    # Rows that are not there: scale 0, codes of zero.
    assert second[:32] == b"\x00\x40" + bytes(30)
    assert second[32:] == b"\x88" * (3 * 64 + 3) + b"\x08" + b"\x88" * 60


def test_sizes() -> None:
    assert BLOCK_BYTES == {"int8": 544, "int4": 288}
    assert [panel_count(n) for n in (1, 16, 17, 32)] == [1, 1, 2, 2]
    assert (panel_shape((33, 65), "int4"), panel_shape((5, 17, 32), "int8")) == ((3, 3 * 288), (10, 544))
    assert panel_bytes((5, 17, 32), "int8") == 10 * 544


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.integers(1, 50), st.integers(1, 100), st.sampled_from(KINDS))
def test_panels_are_what_is_described_and_come_back(seed: int, height: int, cols: int, kind: str) -> None:
    codes, scales = made(seed, height, cols, kind)
    found = panels(codes, scales, kind)
    assert found.shape == panel_shape((height, cols), kind)
    lines, nb = [line.tobytes() for line in found], block_count(cols)
    slow = [
        [value(lines[r // PANEL], kind, r % PANEL, c) for c in range(nb * BLOCK)] for r in range(len(lines) * PANEL)
    ]
    padded = np.zeros_like(slow, dtype=np.float64)
    padded[:height, :cols] = dequantize(codes, scales, kind, cols)
    np.testing.assert_allclose(slow, padded, rtol=1e-6)
    for count in {height, max(1, height // 2)}:
        back = rows(found, kind, count, cols)
        assert back[0].tobytes() == codes[:count].tobytes()
        assert back[1].tobytes() == scales[:count].tobytes()
    everything = rows(found, kind, len(found) * PANEL, cols)
    assert (everything[1][height:] == 0).all()
    assert set(everything[0][height:].tobytes()) <= {0 if kind == "int8" else 0x88}
    assert panels(*everything, kind).tobytes() == found.tobytes()


@settings(max_examples=60, deadline=None)
@given(st.data(), SEEDS, st.integers(1, 4), st.integers(1, 40), st.sampled_from(KINDS))
def test_bands_of_any_height_make_the_same_panels(
    data: st.DataObject, seed: int, n: int, height: int, kind: str
) -> None:
    """Each matrix of a stack is padded on its own, wherever bands end."""
    codes, scales = made(seed, n * height, 40, kind)
    marks = sorted({0, n * height, *data.draw(st.lists(st.integers(0, n * height), max_size=8))})
    bands = ((codes[a:b], scales[a:b]) for a, b in pairwise(marks))
    found = np.concatenate(list(whole_panels(bands, height, kind)))
    each = [panels(codes[i : i + height], scales[i : i + height], kind) for i in range(0, n * height, height)]
    assert found.shape == panel_shape((n, height, 40), kind)
    assert found.tobytes() == np.concatenate(each).tobytes()


# Windows


def cut(x: np.ndarray, window: Window) -> np.ndarray:
    """A window of an array in memory."""
    assert window.cols is not None
    lines = np.concatenate([x[a:b] for a, b in window.rows])
    return np.ascontiguousarray(np.concatenate([lines[:, a:b] for a, b in window.cols], axis=1))


@st.composite
def ranges(draw: st.DrawFn, most: int) -> tuple[tuple[int, int], ...]:
    """One or two ascending ranges below ``most``, mostly of multiples of 16."""
    ends = st.one_of(st.integers(0, most // 16).map(lambda n: n * 16), st.integers(0, most), st.just(most))
    marks = sorted(draw(st.lists(ends, min_size=4, max_size=4)))
    found = Window.of([(marks[0], marks[1]), (marks[2], marks[3])]).rows
    return found or ((0, most),)


@settings(max_examples=200, deadline=None)
@given(st.data(), SEEDS, st.sampled_from([(1, 70), (3, 32), (3, 20)]), st.sampled_from(KINDS))
def test_a_window_of_panels_is_the_panels_of_the_window(
    data: st.DataObject, seed: int, shape: tuple[int, int], kind: str
) -> None:
    """Where it is one; what it then holds beyond its last row and column is of the whole matrix."""
    n, height = shape
    window = Window(data.draw(ranges(n * height)), data.draw(ranges(150)))
    codes, scales = made(seed, n * height, 150, kind)
    whole = np.concatenate(
        [panels(codes[i : i + height], scales[i : i + height], kind) for i in range(0, n * height, height)]
    )
    found = panel_window(window, (n, height, 150) if n > 1 else (height, 150), kind)
    assert window.cols is not None
    begins = all(a % height % PANEL == 0 for a, _ in window.rows) and all(a % BLOCK == 0 for a, _ in window.cols)
    if n == len(window.rows) == len(window.cols) == 1:
        assert (found is not None) == begins
    if found is None:
        return
    assert begins
    values = cut(dequantize(codes, scales, kind, 150), window)
    taken = cut(whole, found)
    # By matrix, as the slice would have them: rows of one, or all rows of several.
    inside = n == 1 or any(b - a < height for a, b in window.rows)
    lines = rows(taken, kind, len(taken) * PANEL, taken.shape[1] // BLOCK_BYTES[kind] * BLOCK)
    wide = dequantize(*lines, kind, taken.shape[1] // BLOCK_BYTES[kind] * BLOCK)[:, : window.shape[1]]
    if inside and len(window.rows) == 1:
        np.testing.assert_array_equal(wide[: len(values)], values)
    elif not inside:
        kept = wide.reshape(-1, panel_count(height) * PANEL, wide.shape[1])[:, :height]
        np.testing.assert_array_equal(kept.reshape(values.shape), values)


@pytest.mark.parametrize(
    ("window", "shape", "expected"),
    [
        (Window(((0, 20),), ((0, 40),)), (70, 150), Window(((0, 2),), ((0, 2 * 288),))),
        (Window(((16, 70),), ((32, 64),)), (70, 150), Window(((1, 5),), ((288, 576),))),
        (Window(((0, 16), (32, 70)), ((0, 32), (64, 70))), (70, 150), Window(((0, 1), (2, 5)), ((0, 288), (576, 864)))),
        (Window(((0, 60),), ((0, 150),)), (3, 20, 150), Window(((0, 6),), ((0, 5 * 288),))),
        (Window(((20, 60),), ((0, 150),)), (3, 20, 150), Window(((2, 6),), ((0, 5 * 288),))),
        (Window(((36, 40),), ((0, 150),)), (3, 20, 150), Window(((3, 4),), ((0, 5 * 288),))),
        (Window(((8, 20),), ((0, 40),)), (70, 150), None),
        (Window(((0, 8), (16, 24)), ((0, 40),)), (70, 150), None),
        (Window(((0, 16),), ((8, 40),)), (70, 150), None),
        (Window(((0, 16),), ((0, 40), (64, 96))), (70, 150), None),
        (Window(((0, 30),), ((0, 150),)), (3, 20, 150), None),
        (Window(((16, 40),), ((0, 150),)), (3, 20, 150), None),
    ],
)
def test_which_windows_are_in_panels(window: Window, shape: tuple[int, ...], expected: Window | None) -> None:
    assert panel_window(window, shape, "int4") == expected


def test_a_range_may_not_begin_inside_a_block() -> None:
    with pytest.raises(Usage, match="columns from 33"):
        panel_columns(((0, 32), (33, 64)), "int4")
    assert covering(20 + 17, 20 + 19, 20) == ((3, 4), 1)


# Packs


@cache
def source(name: str) -> Checkpoint:
    """A checkpoint; read-only. ``odd``: stacks whose matrices do not fill panels; gemma3n: ple.dim is half a panel."""
    if name == "gemma3n":
        return Checkpoint.open(small.built(name))
    root = Path(small._home().name)
    raw = shrink(real({"odd": "qwen3-30B-A3B", "latent": "moonlight-16B-A3B"}[name]))
    raw["moe_intermediate_size"] = 40
    config = root / f"{name}-panels.json"
    config.write_text(json.dumps(raw))
    write_random(config, root / f"{name}-panels", dtype="F32")
    return Checkpoint.open(root / f"{name}-panels")


@cache
def pack(name: str) -> Pack:
    """A pack of it; read-only."""
    folder = Path(small._home().name, f"{name}-panels.pack")
    write_pack(source(name), folder, room=0)
    return Pack.open(folder)


MODELS = ("gemma3n", "odd", "latent")


def quantized(name: str) -> Iterator[tuple[Any, str, Part]]:
    """(recipe, format, part) of every quantized tensor of a slice."""
    model = pack(name).model
    part = CUT if model.nested is not None else full(model)
    table = tensors(model)
    for recipe in RECIPES:
        for where in parts(model, part).values():
            kind = weights.stored_as(where.name, table[where.name], recipe)
            if kind in BITS and where.name != PLE_TABLE:
                yield recipe, kind, where


def joined(found: Pack | Checkpoint, part: Part, recipe: Any, count: int) -> tuple[np.ndarray, np.ndarray]:
    """All bands of codes and scales."""
    bands = [job() for job in code_bands(found, part, recipe, count)]
    return np.concatenate([codes for codes, _ in bands]), np.concatenate([scales for _, scales in bands])


@pytest.mark.parametrize("name", MODELS)
def test_codes_of_a_pack_are_those_of_its_checkpoint(name: str) -> None:
    """Whatever a window and the size of a band; bytes are read once, but for panels that two ranges have a part in."""
    shared = 0
    for recipe, kind, part in quantized(name):
        wanted = joined(source(name), part, recipe, 1 << 20)
        shards, tensor, _ = pack(name).find(part.name, recipe)
        for count in (1, 1 << 20):
            before = shards.bytes_read
            found = joined(pack(name), part, recipe, count)
            read = shards.bytes_read - before
            assert found[0].shape == (part.window.shape[0], code_bytes(part.window.shape[1], kind))
            assert found[0].tobytes() == wanted[0].tobytes(), (part, kind)
            assert found[1].tobytes() == wanted[1].tobytes(), (part, kind)
            inside = panel_window(part.window, tensors(source(name).model)[part.name], kind)
            if inside is None:
                shared += 1
            else:
                assert read == inside.count <= tensor.nbytes
    assert (shared > 0) == (name == "gemma3n")


@pytest.mark.parametrize("name", MODELS)
def test_places_and_copies_hold_the_window(name: str) -> None:
    """A place, as bytes of the file, has the codes of its rows; panels that are made have them and zeros beyond."""
    places = copies = 0
    for recipe, kind, part in quantized(name):
        shape = tensors(source(name).model)[part.name]
        codes, scales = joined(source(name), part, recipe, 1 << 20)
        height, cols = (shape[-2] if len(shape) > 2 else len(codes)), part.window.shape[1]
        wanted = np.concatenate(
            [panels(codes[i : i + height], scales[i : i + height], kind) for i in range(0, len(codes), height)]
        )
        for found in (pack(name), source(name)):
            out = np.empty(wanted.shape, np.uint8)
            panel_rows(found, part, recipe, out)
            assert out.tobytes() == wanted.tobytes(), (part, kind)
        place = panel_place(pack(name), part, recipe)
        if place is None:
            copies += 1
            assert len(part.window.rows) > 1 or part.window.rows[0][0] % PANEL
            continue
        places += 1
        assert (place.rows, place.cols, place.matrices, place.kind) == (height, cols, len(codes) // height, kind)
        assert (place.panels, place.blocks) == (panel_count(height), block_count(cols))
        assert place.offset % 32 == place.step % 32 == place.matrix % 32 == 0
        file, width = np.fromfile(place.path, np.uint8), place.blocks * BLOCK_BYTES[kind]
        for i in range(place.matrices):
            starts = [place.offset + i * place.matrix + j * place.step for j in range(place.panels)]
            lines = np.stack([file[start : start + width] for start in starts])
            there = dequantize(*rows(lines, kind, height, cols), kind, cols)
            here = slice(i * height, (i + 1) * height)
            np.testing.assert_array_equal(there, dequantize(codes[here], scales[here], kind, cols))
    assert places > 20
    assert (copies > 0) == (name == "gemma3n")


def test_what_the_models_are_for() -> None:
    """Stacks whose matrices do not fill panels, and ranges that begin inside one."""
    odd = tensors(source("odd").model)
    assert {shape[1] % PANEL for shape in odd.values() if len(shape) == 3} >= {8}
    assert any(n.endswith("v_b") for n in tensors(source("latent").model))
    windows = parts(source("gemma3n").model, CUT)
    assert {a % PANEL for a, _ in windows["ple.proj"].window.rows} == {0, 8}
    assert {b % PANEL for n, p in windows.items() if n.endswith("gate") for _, b in p.window.rows} >= {1, 4, 8}


def test_what_has_no_place() -> None:
    model = source("gemma3n").model
    recipe = recipes("int8")[0]
    whole = parts(model, full(model))
    assert panel_place(pack("gemma3n"), whole["layers.0.ffn.up"], recipe) is not None
    assert panel_place(source("gemma3n"), whole["layers.0.ffn.up"], recipe) is None
    assert panel_place(pack("gemma3n"), whole["layers.0.altup.router"], recipe) is None
    some = replace(whole["layers.0.ffn.down"], window=Window(((0, 64),), ((8, 40),)))
    assert panel_place(pack("gemma3n"), some, recipe) is None
    with pytest.raises(Usage, match="columns from 8"):
        panel_rows(pack("gemma3n"), some, recipe, np.empty(panel_shape((64, 32), "int8"), np.uint8))
    with pytest.raises(Usage, match=r"layers\.0\.ffn\.up"):
        panel_rows(pack("gemma3n"), whole["layers.0.ffn.up"], recipe, np.empty((8, 544), np.uint8))


def test_data_begins_at_64_bytes_and_panels_before_the_rest(tmp_path: Path) -> None:
    for length in range(70):
        specs = {"f": ("F32", (3,)), "x" * (length + 1): ("U8", (2, 544)), "b": ("U8", (5,))}
        with Writer(tmp_path / "w", specs, first={"x" * (length + 1)}) as writer:
            for name, (dtype, shape) in specs.items():
                writer.write(name, [np.zeros(shape, {"F32": np.float32}.get(dtype, np.uint8))])
        head = (tmp_path / "w").read_bytes()
        size = 8 + int.from_bytes(head[:8], "little")
        assert size % 64 == 0
        header = json.loads(head[8:size])
        assert [header[n]["data_offsets"][0] for n in ("x" * (length + 1), "f", "b")] == [0, 1088, 1100]


def test_a_pack_that_is_not_aligned_has_no_places(tmp_path: Path) -> None:
    """As another program might write it: read all the same."""
    found = pack("gemma3n")
    recipe, part = recipes("int4")[0], parts(found.model, full(found.model))["layers.0.ffn.up"]
    shards, tensor, kind = found.find(part.name, recipe)
    place = panel_place(found, part, recipe)
    assert place is not None
    moved = replace(tensor, offset=tensor.offset + 8)
    shards.tensors[part.name] = moved
    try:
        assert panel_place(found, part, recipe) is None
    finally:
        shards.tensors[part.name] = tensor
    assert panel_shape(flat(tensors(found.model)[part.name]), kind) == tensor.shape
