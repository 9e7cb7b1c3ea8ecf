"""Weights of exports: every form against numpy, from checkpoints and from packs of them, and read by ONNX Runtime."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from export import weights
from export.forms import FORMS, PACKED, neighbours, turned_nibbles, turned_odd
from export.weights import Places, Stored, attach, layout, write
from loaders.checkpoint import Checkpoint
from loaders.errors import BadCheckpoint, CannotCreate, ReadFailed, Unsupported, Usage
from loaders.formats.buffers import from_float32, to_float32
from loaders.formats.pack import Pack
from loaders.formats.quant import BITS, BLOCK, dequantize, nibbles, quantize
from loaders.formats.recipe import Recipe, recipes
from loaders.formats.synthetic import write_random
from loaders.network.matformer import Slice, full, parts
from loaders.packing import write_pack
from loaders.weights import Kept, Source
from tests import small
from tests.shrink import real, shrink

MIB = 1 << 20
RAGGED = {**small.LLAMA, "hidden_size": 80, "head_dim": 16, "intermediate_size": 136}
# Columns that end inside a block, at the first column of one, and before the first block's end.
CUT = Slice("cut", (0, 1, 2, 4, 5, 6, 9), (72, 65, 128, 96, 33, 20, 47))
MODELS = ("gemma3n", "ragged", "qwen3_moe", "gpt2", "llama4")
OTHERS = [[str(i)] for i in range(40) if i not in (0, 1, 3, 5)]
RECIPES = (Recipe("float32", "float32"), Recipe("bf16", "bf16"), *recipes("int8"), *recipes("int4"))


@cache
def folder(name: str) -> Path:
    """A checkpoint, made once; read-only."""
    root = Path(small._home().name)
    if name == "gemma3n":
        return small.built("gemma3n")
    if name == "ragged":
        return small.write(root / "ragged-export", RAGGED, "BF16")
    config = root / f"{name}.json"
    given_name = {"qwen3_moe": "qwen3-30B-A3B", "gpt2": "gpt2", "llama4": "llama-4-scout-17B-16E"}[name]
    raw = shrink(real(given_name))
    if name == "qwen3_moe":  # experts of more than a block, the last one not full
        raw["moe_intermediate_size"] = 40
    config.write_text(json.dumps(raw))
    write_random(config, root / f"{name}-export", dtype="F32")
    return root / f"{name}-export"


@cache
def checkpoint(name: str) -> Checkpoint:
    return Checkpoint.open(folder(name))


@cache
def pack(name: str) -> Pack:
    output = Path(small._home().name, f"{name}-export.pack")
    write_pack(checkpoint(name), output)
    return Pack.open(output)


def cut(source: Source) -> Slice:
    return CUT if source.model.nested is not None else full(source.model)


def every(source: Source, part: Slice, recipe: Recipe) -> list[Stored]:
    """Every form that every tensor of some layers can take, and every pair of gate and up."""
    found = []
    tensors = {n: k for n, k in weights.tensors_of(source, part).items() if n.split(".")[1:2] not in OTHERS}
    for name, kept in tensors.items():
        for form in FORMS:
            sources: tuple[str, ...] = (name,)
            if FORMS[form].sources == 2:
                if not name.endswith("gate") or name.replace("gate", "up") not in tensors:
                    continue
                sources = (name, name.replace("gate", "up"))
            found += [s for s in stored(form, sources, kept, recipe) if s is not None]
    return found


def stored(form: str, sources: tuple[str, ...], kept: Kept, recipe: Recipe) -> Iterator[Stored]:
    """What a form of a tensor can be declared as."""
    kind, *lead, cols = kept.stored(recipe), *kept.shape
    blocks = -(-cols // BLOCK)
    if FORMS[form].quantized and (kind not in BITS or cols * BITS[kind] % 8):
        return
    if lead and FORMS[form].sources == 2:
        lead[-1] *= 2
    types = (TensorProto.FLOAT, TensorProto.FLOAT16)
    base = FORMS[form].base
    shape: tuple[int, ...]
    if base == "values":
        shape = (*lead, cols)
    elif not lead:
        return
    elif base == "turned":
        shape = (*lead[:-1], cols, lead[-1])
    elif base == "codes":
        types, shape = (TensorProto.UINT8,), (*lead, blocks, 4 * BITS[kind])
    elif base == "codes.trimmed":
        types, shape = (TensorProto.UINT8,), (*lead, cols * BITS[kind] // 8)
    elif base == "scales":
        shape = (*lead, blocks)
    elif base == "turned.codes":
        types, shape = (PACKED[kind],), (*lead[:-1], blocks * BLOCK, lead[-1])
    else:
        shape = (*lead[:-1], blocks, lead[-1])
    for dtype in types:
        yield Stored(f"{sources[0]}.{form}.{dtype}", dtype, shape, form, sources)


def exported(
    path: Path, wanted: Sequence[Stored], source: Source, part: Slice, recipe: Recipe, limit: int | None = None
) -> tuple[onnx.ModelProto, Places, dict[str, str]]:
    """A model of nothing but initializers, its weights written beside it; without them loaded."""
    places = layout(wanted, source, part, recipe, limit)
    sums = write(path, places, source, part, recipe)
    declared = [TensorProto(name=s.name, data_type=s.dtype, dims=s.shape) for s in wanted]
    model = helper.make_model(helper.make_graph([], "weights", [], [], declared))
    attach(model, places, path.name)
    return model, places, sums


def read(model: onnx.ModelProto, path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Every initializer as onnx reads it."""
    onnx.external_data_helper.load_external_data_for_model(model, str(path.parent))
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


class Naive:
    """The same by quantizing whole tensors of the full model and indexing."""

    def __init__(self, source: Checkpoint, part: Slice, recipe: Recipe) -> None:
        self.source, self.windows, self.recipe = source, parts(source.model, part), recipe
        self.tensors = weights.tensors_of(source, part)

    def taken(self, x: np.ndarray[Any, Any], name: str, per: int = 1) -> np.ndarray[Any, Any]:
        """The window of a whole tensor, columns counted in ``per``."""
        window = self.windows[name].window
        x = np.concatenate([x[a:b] for a, b in window.rows])
        if window.cols is not None:
            x = np.concatenate([x[:, a // per : -(-b // per)] for a, b in window.cols], axis=1)
        return x

    @cache  # noqa: B019
    def blocks(self, name: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Codes [.., out, nb, 32], columns beyond the tensor's zero, and scales [.., out, nb]."""
        kept = self.tensors[name]
        kind = kept.stored(self.recipe)
        codes, scales = quantize(self.values_of(kept.source), kind)
        ones = np.ones_like(scales)
        whole = dequantize(codes, ones, kind, ones.shape[1] * BLOCK)
        found = self.taken(whole[:, : kept.full[-1]], name)
        *lead, cols = kept.shape
        nb = -(-cols // BLOCK)
        padded = np.pad(found, ((0, 0), (0, nb * BLOCK - cols))).astype(np.int32)
        return padded.reshape(*lead, nb, BLOCK), self.taken(scales, name, BLOCK).reshape(*lead, nb)

    def values_of(self, name: str) -> np.ndarray[Any, Any]:
        placed = self.source.where[name]
        return placed.values(self.source.shards, placed.window)

    def values(self, name: str) -> np.ndarray[Any, Any]:
        """float32 in the canonical shape."""
        kept = self.tensors[name]
        kind = kept.stored(self.recipe)
        if kind in BITS:
            codes, scales = self.blocks(name)
            wide = codes * scales.astype(np.float32)[..., None]
            return wide.reshape(*kept.shape[:-1], -1)[..., : kept.shape[-1]]
        whole = self.values_of(kept.source)
        if kind == "BF16":
            whole = to_float32(from_float32(whole, "BF16"), "BF16")
        return self.taken(whole, name).reshape(kept.shape)

    def of(self, s: Stored) -> np.ndarray[Any, Any]:
        """What an initializer holds, of its shape."""
        base = FORMS[s.form].base
        found = [self.one(name, base, self.tensors[name].stored(self.recipe)) for name in s.sources]
        x = (
            found[0]
            if len(found) == 1
            else np.stack(found, axis=-2).reshape(*found[0].shape[:-2], -1, found[0].shape[-1])
        )
        if s.dtype == TensorProto.FLOAT16:
            x = x.astype(np.float16)
        return x.reshape(s.shape)

    def one(self, name: str, base: str, kind: str) -> np.ndarray[Any, Any]:
        if base in ("values", "turned"):
            values = self.values(name)
            return values if base == "values" else np.swapaxes(values, -1, -2)
        codes, scales = self.blocks(name)
        if base in ("scales", "turned.scales"):
            return scales if base == "scales" else np.swapaxes(scales, -1, -2)
        lines = codes.reshape(*codes.shape[:-2], -1)
        if base == "turned.codes":
            return np.swapaxes(lines, -1, -2)
        unsigned = (lines + (128 if kind == "int8" else 8)).astype(np.uint8)
        if base == "codes.trimmed":
            unsigned = unsigned[..., : self.tensors[name].shape[-1]]
        return unsigned if kind == "int8" else unsigned[..., 0::2] | unsigned[..., 1::2] << 4


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.label.replace(", head ", "-"))
@pytest.mark.parametrize("name", MODELS)
def test_every_form_of_every_tensor(name: str, recipe: Recipe, tmp_path: Path) -> None:
    """By numpy, to the bit; a pack of the checkpoint gives the same file."""
    source = checkpoint(name)
    part = cut(source)
    wanted = every(source, part, recipe)
    model, _, sums = exported(tmp_path / "w", wanted, source, part, recipe)
    found, naive = read(model, tmp_path / "w"), Naive(source, part, recipe)
    for s in wanted:
        expected = naive.of(s)
        assert found[s.name].shape == s.shape
        assert np.array_equal(found[s.name].astype(expected.dtype), expected), s
    if recipe.precision in BITS:
        assert {"codes", "turned.codes", "scales", "turned.scales"} <= {s.form for s in wanted}
        assert exported(tmp_path / "p", wanted, pack(name), part, recipe)[2] == {"p": sums["w"]}


def test_what_the_models_are_for() -> None:
    """Stacks, matrices stored the other way round, columns that end inside a block, odd rows."""
    assert any(p.plane_bytes for p in checkpoint("gpt2").where.values())
    assert any(p.plane_bytes and len(p.shape) == 3 for p in checkpoint("llama4").where.values())
    windows = parts(checkpoint("gemma3n").model, CUT)
    assert {w.window.cols[0][1] % BLOCK for n, w in windows.items() if n.endswith("down") and w.window.cols} >= {1, 8}
    odd = [k for k in weights.tensors_of(checkpoint("gpt2"), cut(checkpoint("gpt2"))).values() if k.shape[0] % 2]
    assert any(k.stored(RECIPES[-1]) == "int4" for k in odd)
    assert any(
        len(k.shape) == 3 for k in weights.tensors_of(checkpoint("qwen3_moe"), cut(checkpoint("qwen3_moe"))).values()
    )


@pytest.mark.parametrize("name", ["gemma3n", "gpt2", "llama4"])
def test_bands_do_not_show(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, recipe = checkpoint(name), recipes("int4")[1]
    part = cut(source)
    wanted = [s for s in every(source, part, recipe) if "layers" not in s.name or "layers.1." in s.name]
    whole = exported(tmp_path / "whole", wanted, source, part, recipe)[2]["whole"]
    monkeypatch.setattr(weights, "BAND", 2000)
    monkeypatch.setattr(weights, "TALL", 3000)
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[: max(1, len(data) * 2 // 3)], at))
    assert exported(tmp_path / "bands", wanted, source, part, recipe)[2] == {"bands": whole}
    assert exported(tmp_path / "pack", wanted, pack(name), part, recipe)[2] == {"pack": whole}


def test_equal_contents_share_a_place_whatever_their_shapes(tmp_path: Path) -> None:
    source, recipe = checkpoint("ragged"), recipes("int4")[0]
    vocab = source.model.vocab
    wanted = [
        Stored("gather", TensorProto.UINT8, (vocab, 96), "codes", ("embed",)),
        Stored("head", TensorProto.UINT8, (vocab, 3, 32), "codes", ("embed",)),
        Stored("other", TensorProto.UINT8, (vocab, 3, 32), "codes", ("head",)),
        Stored("scales", TensorProto.FLOAT, (vocab * 3,), "scales", ("embed",)),
        Stored("half", TensorProto.FLOAT16, (vocab, 3), "scales", ("embed",)),
    ]
    model, places, _ = exported(tmp_path / "w", wanted, source, full(source.model), recipe)
    gather, head, other, scales, half = (places.of(s) for s in wanted)
    assert gather == head
    assert len({gather, other, scales, half}) == 4
    assert places.total == (tmp_path / "w").stat().st_size == half.offset + half.length
    assert gather.length == vocab * 96
    assert all(p.offset % 64 == 0 for p in places.places.values())
    found = read(model, tmp_path / "w")
    assert np.array_equal(found["gather"].reshape(-1), found["head"].reshape(-1))


def test_large_tensors_begin_at_64_kib_and_files_end_at_the_limit(tmp_path: Path) -> None:
    source, recipe = checkpoint("ragged"), recipes("int8")[0]
    part = full(source.model)
    wanted = [s for s in every(source, part, recipe) if s.form in ("values", "turned.codes", "scales")]
    model, places, sums = exported(tmp_path / "w.data", wanted, source, part, recipe, limit=100_000)
    names = places.files("w.data")
    assert names[:3] == ("w.data", "w.data_1", "w.data_2")
    assert len(names) > 5
    assert tuple((tmp_path / n).stat().st_size for n in names) == places.sizes
    largest = max(p.length for p in places.places.values())
    assert all(size <= max(100_000, largest) for size in places.sizes)
    assert sums == {n: hashlib.sha256((tmp_path / n).read_bytes()).hexdigest() for n in names}
    found, naive = read(model, tmp_path / "w.data"), Naive(source, part, recipe)
    assert all(np.array_equal(found[s.name].astype(np.float32), naive.of(s).astype(np.float32)) for s in wanted)
    wide = [s for s in wanted if s.dtype == TensorProto.FLOAT and s.form == "values"]
    offsets = layout([wide[1], *wide], source, part, RECIPES[0]).places
    assert all(p.offset % (65536 if p.length >= MIB else 64) == 0 for p in offsets.values())


def test_progress_counts_every_byte(tmp_path: Path) -> None:
    source, recipe = checkpoint("gemma3n"), recipes("int4")[0]
    places = layout(every(source, CUT, recipe), source, CUT, recipe)
    seen: list[tuple[str, int, int]] = []
    write(tmp_path / "w", places, source, CUT, recipe, lambda *now: seen.append(now))
    total = sum(p.length for p in places.places.values())
    assert {(what, of) for what, _, of in seen} == {("exporting", total)}
    assert [done for _, done, _ in seen] == sorted({done for _, done, _ in seen})
    assert seen[-1][1] == total


@pytest.mark.parametrize(
    "stored",
    [
        Stored("n", TensorProto.FLOAT, (3, 2), "values", ("norm",)),
        Stored("n", TensorProto.FLOAT, (80, 1), "turned", ("norm",)),
        Stored("n", TensorProto.UINT8, (80,), "values", ("norm",)),
        Stored("n", TensorProto.UINT8, (80, 1, 16), "codes", ("norm",)),
        Stored("n", TensorProto.INT4, (160, 96), "turned.codes", ("embed",)),
        Stored("n", TensorProto.FLOAT, (80,), "value", ("norm",)),
        Stored("n", TensorProto.FLOAT, (80,), "values", ("norm", "norm")),
        Stored("n", TensorProto.FLOAT, (80,), "values", ("norms",)),
        Stored("n", TensorProto.FLOAT, (160,), "interleaved", ("layers.0.ffn.gate", "norm")),
    ],
)
def test_a_graph_that_does_not_agree_is_refused(stored: Stored) -> None:
    source = checkpoint("ragged")
    with pytest.raises(Usage, match=r"^n: "):
        layout([stored], source, full(source.model), recipes("int4")[0])


def test_an_initializer_that_the_model_lacks(tmp_path: Path) -> None:
    source = checkpoint("ragged")
    norm = Stored("n", TensorProto.FLOAT, (80,), "values", ("norm",))
    places = layout([norm], source, full(source.model), RECIPES[0])
    model = helper.make_model(helper.make_graph([], "g", [], [], [TensorProto(name="n", data_type=1, dims=[81])]))
    with pytest.raises(Usage, match=r"^n: "):
        attach(model, places, "w")


def test_a_half_of_int4_codes() -> None:
    """A row of an odd number of them does not end at a byte."""
    kept = Kept("layers.0.experts.down", (4, 64, 33), (4, 64, 33))
    stored_one = Stored("n", TensorProto.UINT8, (4, 64, 17), "codes.trimmed", ("x",))
    with pytest.raises(Unsupported, match="33 int4 codes"):
        weights.checked(stored_one, {"x": kept}, recipes("int4")[0])


def test_values_that_float16_does_not_hold(tmp_path: Path) -> None:
    """Refused by the tensor's name, and no file is left; so are weights that are not finite, where blocks are made."""
    rows = np.full((small.VOCAB, 80), 7e4, np.float32)
    changed = edited(tmp_path / "large", rows)
    half = Recipe("float16", "float16")
    wanted = [Stored("e", TensorProto.FLOAT16, rows.shape, "values", ("embed",))]
    with pytest.raises(BadCheckpoint, match="embed: values up to 70000"):
        exported(tmp_path / "w", wanted, changed, full(changed.model), half)
    rows[3, 7] = np.nan
    changed = edited(tmp_path / "nan", rows)
    codes = [Stored("e", TensorProto.UINT8, (small.VOCAB, 96), "codes", ("embed",))]
    with pytest.raises(BadCheckpoint, match=r"embed_tokens\.weight: a value that is not finite"):
        exported(tmp_path / "w", codes, changed, full(changed.model), recipes("int8")[0])
    assert not (tmp_path / "w").exists()


def edited(path: Path, rows: np.ndarray[Any, Any]) -> Checkpoint:
    """The checkpoint with other embeddings."""
    found = Checkpoint.open(small.write(path, RAGGED))
    tensor = found.where["embed"].plain
    assert tensor is not None
    with open(tensor.shard, "r+b") as file:
        file.seek(tensor.offset)
        file.write(rows.tobytes())
    found.close()
    return Checkpoint.open(path)


def test_float16_rounds_what_is_stored_once(tmp_path: Path) -> None:
    source, half = checkpoint("gemma3n"), Recipe("float16", "float16")
    wanted = [s for s in every(source, CUT, RECIPES[0]) if s.dtype == TensorProto.FLOAT16]
    found = read(exported(tmp_path / "w", wanted, source, CUT, half)[0], tmp_path / "w")
    naive = Naive(source, CUT, RECIPES[0])
    assert all(np.array_equal(found[s.name], naive.of(s)) for s in wanted)


def test_a_full_disk_and_a_name_that_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, recipe = checkpoint("ragged"), recipes("int8")[0]
    part = full(source.model)
    wanted = every(source, part, recipe)
    (tmp_path / "taken_1").write_text("mine")
    with pytest.raises(CannotCreate, match="taken_1"):
        exported(tmp_path / "taken", wanted, source, part, recipe, limit=100_000)
    assert (tmp_path / "taken_1").read_text() == "mine"
    real, left = os.pwrite, iter(range(40))

    def full_disk(fd: int, data: Any, at: int) -> int:
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data, at)

    monkeypatch.setattr(os, "pwrite", full_disk)
    with pytest.raises(ReadFailed, match="No space left"):
        exported(tmp_path / "w", wanted, source, part, recipe)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["taken_1"]


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 9), blocks=st.integers(1, 4), seed=st.integers(0, 2**32 - 1))
def test_orders_of_nibbles(rows: int, blocks: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(-8, 8, (rows, blocks * BLOCK)).astype(np.int8)
    codes = nibbles(values.reshape(-1, BLOCK)).reshape(rows, -1)
    biased = (values + 8).astype(np.uint8)
    assert np.array_equal(neighbours(codes), biased[:, 0::2] | biased[:, 1::2] << 4)
    lines = (values.T & 15).astype(np.uint8).reshape(-1)
    packed = lines[0::2] | lines[1::2] << 4
    assert np.array_equal(turned_odd(codes), packed)
    if rows % 2 == 0:
        assert np.array_equal(turned_nibbles(codes).reshape(-1), packed)
    assert np.array_equal(codes, nibbles(values.reshape(-1, BLOCK)).reshape(rows, -1))
