"""Where canonical tensors lie in files and what is read of them: any layout against plain slicing, fp8 to the bit."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from loaders.checkpoint import SCALE
from loaders.formats.placed import FP8, FP8_BLOCK, RAW, Block, Piece, Placed, fp8_values
from loaders.formats.safetensors import Shards, Tensor
from loaders.formats.window import Window
from loaders.layout import Names, Place, Spot, files, spots
from loaders.network.spec import Attention, Experts, Gated, Layer, Model, Router
from loaders.network.tensors import tensors

Array = npt.NDArray[np.float32]
TORCH = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, FP8: torch.float8_e4m3fn}


def numbers(shape: tuple[int, ...], dtype: str, seed: int) -> torch.Tensor:
    """Random values in a storage type; of fp8 any code but the two that are no numbers."""
    rng = np.random.default_rng(seed)
    if dtype == FP8:
        codes = rng.choice(np.delete(np.arange(256), [127, 255]), shape).astype(np.uint8)
        return torch.from_numpy(codes).view(torch.float8_e4m3fn)
    return torch.from_numpy(rng.standard_normal(shape).astype(np.float32)).to(TORCH[dtype])


def scales(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """float32 [blocks down, blocks across], no powers of two among them."""
    size = tuple(-(-n // FP8_BLOCK) for n in shape)
    return torch.from_numpy(np.random.default_rng(seed + 1).uniform(1e-3, 3.0, size).astype(np.float32))


def dequantized(value: torch.Tensor, scale: torch.Tensor | None) -> Array:
    """What a stored tensor means, by torch's own conversion and one product in float32."""
    found: Array = value.float().numpy()
    if scale is None:
        return found
    high, wide = found.shape
    grid = scale.numpy().repeat(FP8_BLOCK, 0).repeat(FP8_BLOCK, 1)[:high, :wide]
    return found * grid


@dataclass
class Stored:
    """A file, the meaning of each tensor in it, and how many values of each were read."""

    shards: Shards
    meaning: dict[str, Array]
    read: dict[str, int]

    def place(self, names: Names, table: dict[str, tuple[int, ...]], canonical: str, offset: float = 0.0) -> Placed:
        """A canonical tensor as the layout says it lies."""
        pieces = []
        for spot in spots(names, table, canonical):
            tensor = self.shards.tensors[spot.name]
            assert tensor.shape == spot.shape
            pieces.append(Piece(tensor, spot.block, self.shards.tensors.get(spot.name + SCALE)))
        return Placed(table[canonical], tuple(pieces), offset)


def store(folder: Path, values: dict[str, torch.Tensor], seed: int = 0) -> Stored:
    """Writes tensors, those in fp8 with scales, and watches what is read of them."""
    meaning, held = {}, dict(values)
    for name, value in values.items():
        scale = scales(tuple(value.shape), seed) if value.dtype == torch.float8_e4m3fn else None
        meaning[name] = dequantized(value, scale)
        if scale is not None:
            held[name + SCALE] = scale
    save_file(held, folder / "model.safetensors")
    shards, read = Shards.open(folder), dict.fromkeys(held, 0)
    inner = shards.read_window

    def watched(tensor: Tensor, window: Window, out: npt.NDArray[Any]) -> None:
        read[tensor.name] += window.count
        inner(tensor, window, out)

    shards.read_window = watched  # type: ignore[method-assign]
    return Stored(shards, meaning, read)


@pytest.fixture
def folder() -> Iterator[Path]:
    """An empty folder for one example."""
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


# --------------------------------------------------------------------------------------------------------------- fp8


def test_every_code_of_e4m3() -> None:
    wanted = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(fp8_values(), wanted, equal_nan=True)
    assert np.array_equal(np.signbit(fp8_values()[[0, 128]]), [False, True])
    assert fp8_values()[126] == 448.0
    assert fp8_values()[1] == 2.0**-9


@pytest.mark.parametrize("shape", [(1, 1), (128, 128), (129, 127), (300, 260), (5, 513)])
def test_fp8_values_are_exact(shape: tuple[int, int], folder: Path) -> None:
    stored = store(folder, {"x": numbers(shape, FP8, 3)})
    placed = stored.place({"x": "x"}, {"x": shape}, "x")
    assert placed.plain is None
    assert placed.exact is None
    assert placed.nbytes == stored.shards.total_bytes
    assert np.array_equal(placed.values(stored.shards, placed.window), stored.meaning["x"])
    assert stored.shards.bytes_read == stored.shards.total_bytes


def test_a_window_across_four_blocks_reads_four_scales(folder: Path) -> None:
    stored = store(folder, {"x": numbers((400, 400), FP8, 4)})
    placed = stored.place({"x": "x"}, {"x": (400, 400)}, "x")
    found = placed.values(stored.shards, Window(((120, 130),), ((250, 260),)))
    assert np.array_equal(found, stored.meaning["x"][120:130, 250:260])
    assert stored.read == {"x": 100, "x" + SCALE: 4}


def test_raw_codes_are_read_as_they_are(folder: Path) -> None:
    value = numbers((130, 140), FP8, 5)
    stored = store(folder, {"x": value})
    out = np.empty((140, 130), RAW[FP8])
    turned = Placed((140, 130), (Piece(stored.shards.tensors["x"], Block(0, (0, 130), (0, 140), True)),))
    turned.read(stored.shards, turned.window, out)
    assert np.array_equal(out, value.view(torch.uint8).numpy().T)


# ----------------------------------------------------------------------------------------------------------- layouts


@dataclass
class Case:
    """A layout, the shapes of the canonical tensors in it, and the type they are stored in."""

    places: dict[str, Place]
    table: dict[str, tuple[int, ...]]
    dtype: str
    seed: int

    def canonical(self, meaning: dict[str, Array], name: str) -> Array:
        """The canonical tensor [rows, columns], cut out of whole stored ones."""
        place, shape = self.places["layers.{}." + name], self.table["layers.7." + name]
        planes = shape[0] if len(shape) == 3 else 1
        whole = [meaning[place.name.format(7, p if place.each else 0)] for p in range(planes)]
        if len(shape) == 3 and not place.each:
            size = len(whole[0]) // planes
            whole = [whole[0][p * size : (p + 1) * size] if place.together else whole[0][p] for p in range(planes)]
        start = 0
        for other in place.beside:
            out, inputs = self.table["layers.7." + other][-2:]
            turned = self.places["layers.{}." + other].transposed
            size = inputs if turned != place.across else out
            if other == name:
                cut = [w[:, start : start + size] if place.across else w[start : start + size] for w in whole]
                return np.concatenate([c.T if place.transposed else c for c in cut])
            start += size
        return np.concatenate([w.T if place.transposed else w for w in whole])


SIZES = st.sampled_from([1, 2, 5, 31, 127, 128, 129, 150])


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Up to three tensors in one stored matrix, or in one for each plane, or in a stack."""
    planes = draw(st.sampled_from([None, 1, 2, 3]))
    way = draw(st.sampled_from(["each", "together", "stack"])) if planes else "each"
    across = draw(st.booleans())
    dtype = draw(st.sampled_from(["F32", "BF16", "F16"] + [FP8] * 2 * (way != "stack")))
    order = ("a", "b", "c")[: draw(st.integers(1, 3))]
    common, places, table = draw(SIZES), {}, {}
    for name in order:
        own, turned = draw(SIZES), draw(st.booleans())
        # Stored, the tensors agree in the axis along which they do not follow one another.
        high, wide = (common, own) if across else (own, common)
        shape = (wide, high) if turned else (high, wide)
        table[f"layers.7.{name}"] = (planes, *shape) if planes else shape
        places["layers.{}." + name] = Place(
            "layers.{}.x.{}" if planes and way == "each" else "layers.{}.x",
            beside=order if len(order) > 1 or draw(st.booleans()) else (),
            across=across,
            transposed=turned,
            each=planes is not None and way == "each",
            together=way == "together",
        )
    return Case(places, table, dtype, draw(st.integers(0, 99)))


@st.composite
def ranges(draw: st.DrawFn, size: int) -> tuple[tuple[int, int], ...]:
    """One or two ranges of a length, in order."""
    cuts = sorted(draw(st.lists(st.integers(0, size), min_size=2, max_size=4, unique=True)))
    pairs = tuple(zip(cuts[::2], cuts[1::2], strict=False))
    return pairs or ((0, size),)


@given(cases(), st.data())
@settings(max_examples=120, deadline=None)
def test_any_window_of_any_layout(case: Case, data: st.DataObject) -> None:
    """What is read is what slicing gives, and nothing else is read."""
    name = data.draw(st.sampled_from([n.removeprefix("layers.7.") for n in case.table]))
    with tempfile.TemporaryDirectory() as path:
        shapes = {spot.name: spot.shape for n in case.table for spot in spots(case.places, case.table, n)}
        values = {n: numbers(shape, case.dtype, case.seed + i) for i, (n, shape) in enumerate(shapes.items())}
        stored = store(Path(path), values, case.seed)
        shape = case.table["layers.7." + name]
        placed = stored.place(case.places, case.table, "layers.7." + name)
        wanted = case.canonical(stored.meaning, name)
        assert wanted.shape == (int(np.prod(shape[:-1])), shape[-1])
        assert placed.shape == shape
        assert np.array_equal(placed.values(stored.shards, placed.window), wanted)
        steps = [read() for read in placed.steps(stored.shards, data.draw(SIZES))]
        assert np.array_equal(np.concatenate(steps), wanted)
        window = Window(data.draw(ranges(wanted.shape[0])), data.draw(ranges(wanted.shape[1])))
        index = np.ix_(
            *(np.concatenate([np.arange(a, b) for a, b in axis]) for axis in (window.rows, window.cols or ()))
        )
        stored.read.update(dict.fromkeys(stored.read, 0))
        assert np.array_equal(placed.values(stored.shards, window), wanted[index])
        assert sum(n for t, n in stored.read.items() if not t.endswith(SCALE)) == window.count
        if case.dtype == FP8:
            assert placed.exact is None
            return
        assert placed.exact == case.dtype
        out = np.empty(window.shape, RAW[case.dtype])
        placed.read(stored.shards, window, out)
        kept = torch.from_numpy(wanted[index].copy()).to(TORCH[case.dtype])
        bits = kept.view({2: torch.int16, 4: torch.int32}[kept.element_size()]).numpy()
        assert np.array_equal(out.view(bits.dtype), bits)


def test_heads_of_a_latent_expansion() -> None:
    """For each head its rows of the key, transposed, then its rows of the value."""
    places = {
        f"layers.{{}}.{name}": Place("kv_b.{}", beside=("k", "v"), together=True, transposed=name == "k")
        for name in "kv"
    }
    table = {"layers.1.k": (3, 4, 5), "layers.1.v": (3, 2, 4)}
    assert list(spots(places, table, "layers.1.k")) == [
        Spot("kv_b.1", (21, 4), Block(0, (first, first + 5), (0, 4), True)) for first in (0, 7, 14)
    ]
    assert list(spots(places, table, "layers.1.v")) == [
        Spot("kv_b.1", (21, 4), Block(0, (first, first + 2), (0, 4))) for first in (5, 12, 19)
    ]


def test_vectors_beside_one_another(folder: Path) -> None:
    """Biases of one stored projection; ``offset`` is added to what the file holds."""
    places = {f"layers.{{}}.{name}": Place("bias.{}", beside=("q", "k", "v")) for name in "qkv"}
    table = {"layers.0.q": (6,), "layers.0.k": (2,), "layers.0.v": (2,)}
    stored = store(folder, {"bias.0": numbers((10,), "BF16", 1)})
    whole = stored.meaning["bias.0"]
    for name, part in (("q", whole[:6]), ("k", whole[6:8]), ("v", whole[8:])):
        placed = stored.place(places, table, f"layers.0.{name}")
        assert placed.plain is None
        assert placed.nbytes == 2 * len(part)
        assert np.array_equal(placed.values(stored.shards, placed.window), part)
        assert np.array_equal(placed.values(stored.shards, Window(((1, 2),), None)), part[1:2])
        raised = stored.place(places, table, f"layers.0.{name}", 1.0)
        assert np.array_equal(raised.values(stored.shards, raised.window), part + np.float32(1.0))


def test_plain_exact_and_bytes(folder: Path) -> None:
    """``plain`` is the stored tensor itself or nothing: a part of one, wherever it ends, is not it."""
    values = {"x": numbers((6, 4), "BF16", 1), "y": numbers((6, 4), "F32", 2), "z": numbers((6, 4), FP8, 3)}
    stored = store(folder, values)
    x, y, z = (stored.shards.tensors[name] for name in "xyz")

    def placed(tensor: Tensor, rows: tuple[int, int], cols: tuple[int, int], offset: float = 0.0, **how: Any) -> Placed:
        scale = stored.shards.tensors.get(tensor.name + SCALE)
        shape = (rows[1] - rows[0], cols[1] - cols[0])
        return Placed(shape, (Piece(tensor, Block(0, rows, cols, **how), scale),), offset)

    whole = placed(x, (0, 6), (0, 4))
    assert (whole.plain, whole.exact, whole.dtype, whole.nbytes) == (x, "BF16", "BF16", 48)
    assert whole == Placed.of(x)
    for rows, cols in (((3, 6), (0, 4)), ((0, 3), (0, 4)), ((0, 6), (2, 4)), ((0, 6), (0, 2))):
        part = placed(x, rows, cols)
        assert (part.plain, part.exact, part.nbytes) == (None, "BF16", 2 * part.shape[0] * part.shape[1])
        wanted = stored.meaning["x"][slice(*rows), slice(*cols)]
        assert np.array_equal(part.values(stored.shards, part.window), wanted)
    assert (placed(x, (0, 6), (0, 4), transposed=True).plain, placed(x, (0, 6), (0, 4), 1.0).exact) == (None, None)
    assert placed(x, (0, 6), (0, 4), 1.0).plain is None
    scaled = placed(z, (0, 6), (0, 4))
    assert (scaled.plain, scaled.exact, scaled.dtype, scaled.nbytes) == (None, None, FP8, 24 + 4)
    mixed = Placed((2, 6, 4), (whole.pieces[0], Piece(y, Block(0, (0, 6), (0, 4)))))
    assert (mixed.plain, mixed.exact, mixed.dtype, mixed.nbytes) == (None, None, "F32", 48 + 96)
    both = np.concatenate([stored.meaning["x"], stored.meaning["y"]])
    assert np.array_equal(mixed.values(stored.shards, mixed.window), both)


def test_files_names_each_stored_tensor_once() -> None:
    """The names and shapes of a checkpoint that holds a model, whatever lies in what."""
    experts = Experts(3, 2, 5, "silu", Router("softmax"), Gated(7, "silu"))
    model = Model("x", 11, 4, (Layer(Attention(2, 1, 2, 1.0, None), experts),), 1e-6, True, 64)
    names: dict[str, str | Place] = {name.replace("layers.0.", "layers.{}."): name for name in tensors(model)}
    fused = ("attn.q", "attn.k", "attn.v")
    names |= {f"layers.{{}}.{name}": Place("h.{}.qkv", beside=fused, across=True, transposed=True) for name in fused}
    halves = ("experts.gate", "experts.up")
    names |= {
        f"layers.{{}}.{name}": Place("h.{}.gate_up", beside=halves, transposed=True, across=True) for name in halves
    }
    names["layers.{}.experts.down"] = Place("h.{}.{}.down", each=True)
    found = {name: filed.shape for name, filed in files(names, model).items()}
    assert found["h.0.qkv"] == (4, 8)
    assert found["h.0.gate_up"] == (3, 4, 10)
    assert [found[f"h.0.{e}.down"] for e in range(3)] == [(4, 5)] * 3
    assert not {"layers.0.attn.q", "layers.0.experts.gate", "h.0.3.down"} & set(found)
    assert sum(int(np.prod(s)) for s in found.values()) == sum(int(np.prod(s)) for s in tensors(model).values())
