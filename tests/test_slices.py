"""Slices of one checkpoint: what they are called, how large they are, and that only their bytes are read."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import edge
from edge.session import Session
from loaders.checkpoint import Checkpoint
from loaders.errors import BadCheckpoint, CannotCreate, MissingFile, Unsupported, Usage
from loaders.families import gemma3n_slices
from loaders.families.gemma3n import FAMILY
from loaders.families.llama import FAMILY as LLAMA
from loaders.formats.window import Window
from loaders.network.matformer import Slice, full, parts, sliced
from loaders.network.spec import Model
from loaders.network.tensors import PLE_TABLE, core, tensors, total
from loaders.rewrite import write_slice
from loaders.slices import candidates, resolve
from tests.conftest import Folder, Open
from tests.makers import assert_close, expected, make, prompt, reference, variant
from tests.shrink import parse, real, shrink

E4B, E2B = parse(real("gemma-3n-E4B")), parse(real("gemma-3n-E2B"))
WIDE, NARROW = 16384, 8192
NO_SKIP = tuple(range(35))
DROPPED = tuple(i for i in range(35) if not 20 <= i < 25)

# name -> (billions as published, MMLU, layers kept, wide layers); the notes' section 3.2, written out again.
PUBLISHED = {
    "full": (3.98, 62.3, NO_SKIP, [*range(35)]),
    "E2B": (1.91, 50.9, DROPPED, []),
    "E1.96B": (1.96, 53.4, DROPPED, [4]),
    "E2.49B": (2.49, 54.5, NO_SKIP, [20, 21, 22, 23, 24]),
    "E2.54B": (2.54, 55.4, NO_SKIP, [4, 20, 21, 22, 23, 24]),
    "E2.69B": (2.69, 57.7, NO_SKIP, [4, 9, 14, 19, 20, 21, 22, 23, 24]),
    "E2.73B": (2.73, 57.1, NO_SKIP, [*range(15, 25)]),
    "E2.98B-block": (2.98, 59.5, NO_SKIP, [*range(10, 25)]),
    "E2.98B": (2.98, 59.5, NO_SKIP, [*range(15, 25), *range(30, 35)]),
    "E3.18B": (3.18, 61.8, NO_SKIP, [4, *range(9, 25), 29, 34]),
    "E3.24B": (3.24, 60.7, NO_SKIP, [*range(10, 30)]),
    "E3.39B": (3.39, 63.0, NO_SKIP, [4, *range(9, 30), 34]),
    "E3.49B": (3.49, 61.4, NO_SKIP, [*range(5, 30)]),
    "E3.59B": (3.59, 63.4, NO_SKIP, [*range(4, 30), 34]),
    "E3.79B-block": (3.74, 62.0, NO_SKIP, [*range(5, 35)]),
    "E3.79B": (3.79, 63.4, NO_SKIP, [*range(4, 35)]),
}
# Keys, values and key norms of one sharing layer: in the published files and counts, and of no use.
UNUSED = 2 * 512 * 2048 + 256


def closed_form(layers: int, widths: int) -> int:
    """Core parameters by the notes' closed form."""
    return layers * 11_821_648 + 6144 * widths + layers * 524_288 + 25_168_128


def published_core(model: Model) -> int:
    """Ours, and what the published counts include besides."""
    return core(model) + UNUSED * sum(layer.attention.kv_from is not None for layer in model.layers)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_slices_to_the_digit(name: str) -> None:
    billions, mmlu, keep, wide = PUBLISHED[name]
    part = resolve(E4B, FAMILY, name)
    assert part == resolve(E4B, FAMILY, name.lower())
    assert part.name == name
    assert part.keep == keep
    assert part.widths == tuple(WIDE if i in wide else NARROW for i in keep)
    small = sliced(E4B, part)
    exact = published_core(small)
    assert exact == closed_form(len(keep), sum(part.widths))
    # Names were rounded by hand; none is off by more than a hundredth and a half of it.
    assert abs(exact / 1e9 - billions) < 0.02
    assert tensors(small)[PLE_TABLE] == (262_144, 256 * len(keep))
    scores = {s.slice.name: s.mmlu for s in gemma3n_slices.slices(E4B)}
    assert scores[name] == mmlu


def test_every_published_name_and_no_other() -> None:
    assert [s.slice.name for s in gemma3n_slices.slices(E4B)] == list(PUBLISHED)
    assert candidates(E4B, FAMILY) == gemma3n_slices.slices(E4B)
    assert gemma3n_slices.slices(E2B) == ()


def test_official_counts() -> None:
    assert published_core(E2B) == 1_905_495_648
    assert published_core(E4B) == 3_980_491_248
    for model, text, unused in ((E2B, 4_456_156_768, 20_974_080), (E4B, 6_866_696_688, 31_461_120)):
        assert total(model) + unused == text
        assert unused == UNUSED * sum(layer.attention.kv_from is not None for layer in model.layers)
    assert math.prod(tensors(E2B)[PLE_TABLE]) == 2_013_265_920
    assert math.prod(tensors(E4B)[PLE_TABLE]) == 2_348_810_240
    assert math.prod(tensors(E4B)["embed"]) == 537_395_200
    assert math.prod(tensors(E2B)["ple.proj"]) == 15_728_640
    layer = {k: math.prod(v) for k, v in tensors(E2B).items() if k.startswith("layers.0.")}
    assert sum(v for k, v in layer.items() if ".attn." in k) == 10_486_272
    assert sum(v for k, v in layer.items() if ".laurel." in k) == 264_192
    assert sum(v for k, v in layer.items() if ".altup." in k) == 12_368
    assert sum(v for k, v in layer.items() if ".norm." in k and ".altup." not in k) == 8_192
    assert sum(v for k, v in layer.items() if ".ple." in k) == 1_050_624
    assert sum(v for k, v in layer.items() if ".ffn." in k) == 6144 * NARROW


def test_e2b_of_e4b_is_e2b() -> None:
    part = resolve(E4B, FAMILY, "E2B")
    small = sliced(E4B, part)
    assert tensors(small) == tensors(E2B)
    assert small.layers == E2B.layers
    windows = parts(E4B, part)
    # Columns 0 to 5119 and 6400 to 8959: the block of each dropped layer is left out of every row.
    assert windows[PLE_TABLE].window == Window(((0, 262_144),), ((0, 5120), (6400, 8960)))
    assert windows["ple.proj"].window == Window(((0, 5120), (6400, 8960)), ((0, 2048),))
    assert windows["layers.20.ffn.gate"].name == "layers.25.ffn.gate"
    assert windows["layers.20.ffn.gate"].window == Window(((0, NARROW),), ((0, 2048),))
    assert windows["layers.20.ffn.down"].window == Window(((0, 2048),), ((0, NARROW),))
    assert {a.attention.kv_from for a in small.layers} == {None, 18, 19}


def test_closed_form_of_what_nobody_published() -> None:
    assert published_core(sliced(E4B, resolve(E4B, FAMILY, "half"))) == closed_form(35, 35 * NARROW)
    part = resolve(E4B, FAMILY, "skip=0-3,31+ffn=" + ",".join(f"{4096 + 8 * i}" for i in range(30)))
    assert published_core(sliced(E4B, part)) == closed_form(30, sum(4096 + 8 * i for i in range(30)))


SPELLINGS = {
    "full": full(E4B),
    "half": Slice("half", NO_SKIP, (NARROW,) * 35),
    "quarter": Slice("quarter", NO_SKIP, (4096,) * 35),
    "skip-first-shared": Slice("skip-first-shared", DROPPED, (WIDE,) * 30),
    "half+skip-first-shared": Slice("", DROPPED, (NARROW,) * 30),
    "skip-first-shared+half": Slice("", DROPPED, (NARROW,) * 30),
    "skip=20-24": Slice("", DROPPED, (WIDE,) * 30),
    "skip=20,21,22,23,24+half": Slice("", DROPPED, (NARROW,) * 30),
    "skip=24,20-23,21": Slice("", DROPPED, (WIDE,) * 30),
    "ffn=8192x20,16384x15": Slice("", NO_SKIP, (NARROW,) * 20 + (WIDE,) * 15),
    "skip=20-24+ffn=8192x29,100": Slice("", DROPPED, (NARROW,) * 29 + (100,)),
}


@pytest.mark.parametrize("text", SPELLINGS)
def test_spellings(text: str) -> None:
    part, wanted = resolve(E4B, FAMILY, text), SPELLINGS[text]
    assert part.name == text
    assert (part.keep, part.widths) == (wanted.keep, wanted.widths)


REFUSED = {
    "E9B": "no slice 'E9B'",
    "": "no slice ''",
    "half+": "no slice 'half+'",
    "skip=18": "layer 18 is dropped",
    "skip=19": "layer 19 is dropped",
    "skip=18,19": "layer 18 is dropped",
    "half+skip=0-19": "layer 18 is dropped",
    "skip=0-34": "widths",
    "skip=35": "'35' (expected layers from 0 to 34)",
    "skip=5-3": "'5-3'",
    "skip=": "''",
    "skip=a": "'a'",
    "skip=-1": "'-1'",
    "ffn=8192": "1 widths (expected one for each of 35 layers)",
    "ffn=8192x36": "36 widths",
    "ffn=0x35": "width 0 in layer 0",
    "ffn=16385x35": "width 16385 in layer 0 (expected 1 to 16384)",
    "ffn=8192y35": "'8192y35'",
    "ffn=-1x35": "'-1x35'",
}


@pytest.mark.parametrize("text", REFUSED)
def test_slices_that_are_refused(text: str) -> None:
    with pytest.raises(Usage) as info:
        resolve(E4B, FAMILY, text)
    assert info.value.exit_code == 2
    assert REFUSED[text] in str(info.value)
    assert "--slice" in str(info.value)


def test_a_source_may_go_when_nobody_reads_it() -> None:
    """Without the sharing layers of a kind, their source is a layer like any other."""
    everyone = "skip=19,24,29,34"
    small = sliced(E4B, resolve(E4B, FAMILY, everyone))
    assert len(small.layers) == 31
    assert {layer.attention.kv_from for layer in small.layers} == {None, 18}
    assert all(small.layers[i].attention.window for i in range(15, 31))


def test_slices_of_a_model_that_is_no_matformer(folders: Folder, tmp_path: Path) -> None:
    model = parse(shrink(real("llama-3.2-1B")))
    assert resolve(model, LLAMA, "full") == full(model)
    assert [s.slice for s in candidates(model, LLAMA)] == [full(model)]
    for text in ("half", "skip=1", "E2B", "skip-first-shared"):
        with pytest.raises(Usage, match=r"llama models are not MatFormers|no slice") as info:
            resolve(model, LLAMA, text)
        assert info.value.exit_code == 2
    checkpoint = Checkpoint.open(folders("llama-3.2-1B"))
    with pytest.raises(Unsupported, match="has no slices") as unsupported:
        write_slice(checkpoint, full(model), tmp_path / "out")
    assert unsupported.value.exit_code == 78
    assert not list(tmp_path.iterdir())
    checkpoint.close()


def test_slice_files(tmp_path: Path) -> None:
    """The two lists of the published recipe."""
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"layers_to_skip": [20, 21, 22, 23, 24], "ffn_hidden_dims": [NARROW] * 29 + [WIDE]}))
    part = resolve(E4B, FAMILY, str(path))
    assert part == Slice("mine", DROPPED, (NARROW,) * 29 + (WIDE,))
    path.write_text(json.dumps({"layers_to_skip": []}))
    assert resolve(E4B, FAMILY, str(path)) == Slice("mine", NO_SKIP, (WIDE,) * 35)
    path.write_text(json.dumps({"ffn_hidden_dims": [NARROW] * 35}))
    assert resolve(E4B, FAMILY, str(path)) == Slice("mine", NO_SKIP, (NARROW,) * 35)


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ({"layers_to_skip": [19]}, Usage, "layer 19 is dropped"),
        ({"layers_to_skip": [35]}, BadCheckpoint, "layers_to_skip"),
        ({"layers_to_skip": [-1]}, BadCheckpoint, "layers_to_skip"),
        ({"layers_to_skip": [20], "ffn_hidden_dims": [NARROW] * 35}, BadCheckpoint, "a list of 34"),
        ({"ffn_hidden_dims": [WIDE + 1] * 35}, Usage, "width 16385"),
        ({"ffn_hidden_dims": [0] * 35}, BadCheckpoint, "ffn_hidden_dims"),
        ({"layers_to_skip": [20], "more": 1}, Unsupported, "unknown key more"),
    ],
)
def test_slice_files_that_are_refused(
    content: dict[str, object], error: type[Exception], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(content))
    with pytest.raises(error) as info:
        resolve(E4B, FAMILY, str(path))
    assert message in str(info.value)


def test_slice_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MissingFile) as info:
        resolve(E4B, FAMILY, str(tmp_path / "none.json"))
    assert info.value.exit_code == 66


SMALL = {name: parse(shrink(real(name))) for name in ("gemma-3n-E4B", "gemma-3n-E2B")}


@st.composite
def valid(draw: st.DrawFn, model: Model, narrowest: int = 1) -> Slice:
    """Any slice that keeps the layers whose keys others read."""
    count = len(model.layers)
    dropped = draw(st.sets(st.integers(0, count - 1), max_size=count - 1))
    keep = [i for i in range(count) if i not in dropped]
    sources = {model.layers[i].attention.kv_from for i in keep} - {None}
    keep = sorted({*keep, *(i for i in sources if i is not None)})
    widths = [draw(st.integers(narrowest, model.layers[i].ffn.width)) for i in keep]
    return Slice("random", tuple(keep), tuple(widths))


@pytest.mark.parametrize("name", SMALL)
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_windows_of_any_slice_have_the_slices_shapes(name: str, data: st.DataObject) -> None:
    model = SMALL[name]
    part = data.draw(valid(model))
    small = sliced(model, part)
    whole, wanted, found = tensors(model), tensors(small), parts(model, part)
    assert {k: v.window.shape for k, v in found.items()} == wanted
    for canonical, piece in found.items():
        rows, cols = piece.window.rows, piece.window.cols
        assert all(0 <= a < b <= whole[piece.name][0] for a, b in rows)
        assert (cols is None) == (len(whole[piece.name]) == 1)
        assert all(0 <= a < b <= whole[piece.name][1] for a, b in cols or ())
        if canonical.startswith("layers."):
            _, layer, rest = canonical.split(".", 2)
            assert piece.name == f"layers.{part.keep[int(layer)]}.{rest}"
        else:
            assert piece.name == canonical
    for i, source in enumerate(part.keep):
        a, b = small.layers[i], model.layers[source]
        assert a.ffn.sparsity == b.ffn.sparsity
        assert a.attention.window == b.attention.window
        there = b.attention.kv_from
        assert a.attention.kv_from == (None if there is None else part.keep.index(there))
    # Slicing to everything is the model itself, and a slice of a slice is a slice.
    assert sliced(model, full(model)) == model
    assert sliced(small, full(small)).layers == small.layers


@pytest.fixture(scope="module")
def written(folders: Folder, tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    """part -> (a session of the slice in its source, a checkpoint folder of the slice)."""
    root, made = tmp_path_factory.mktemp("written"), []

    @cache
    def write(part: Slice) -> tuple[Session, Path]:
        recipe = root / f"{len(made)}.json"
        dropped = [i for i in range(20) if i not in part.keep]
        recipe.write_text(json.dumps({"layers_to_skip": dropped, "ffn_hidden_dims": part.widths}))
        session = edge.load(folders("gemma-3n-E4B"), precision="float32", slice=str(recipe))
        made.append(session)
        folder = root / f"slice-{len(made)}"
        write_slice(session.checkpoint, session.plan.part, folder)
        return session, folder

    yield write
    for session in made:
        session.close()


@given(data=st.data())
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_slice_equals_its_written_model(written: object, data: st.DataObject) -> None:
    """Against transformers, which knows nothing of windows. Few units in a sparse layer make rounding loud."""
    part = data.draw(valid(SMALL["gemma-3n-E4B"], narrowest=96))
    assert callable(written)
    session, folder = written(part)
    ids = prompt(session.model.vocab, 24)
    found = session.logits(ids)
    assert_close(found, expected(reference(folder), ids))
    with edge.load(folder, precision="float32", slice="full") as again:
        assert again.model.layers == session.model.layers
        assert np.array_equal(again.logits(ids), found)


def window_bytes(session: Session) -> dict[str, int]:
    """Bytes of each window in the file."""
    found = parts(session.checkpoint.model, session.plan.part)
    return {
        name: p.window.count * session.checkpoint.where[p.name].pieces[0].tensor.itemsize for name, p in found.items()
    }


PARTS = ["full", "half", "quarter+skip-first-shared", "skip=0,11+ffn=100x18"]


@pytest.mark.parametrize("text", PARTS)
@pytest.mark.parametrize("tier", ["ram", "ssd"])
def test_only_the_bytes_of_the_slice_are_read(text: str, tier: str, folders: Folder, opened: Open) -> None:
    session = opened(folders("gemma-3n-E4B"), slice=text, ple=tier)
    sizes = window_bytes(session)
    wanted = sum(sizes.values()) - (sizes[PLE_TABLE] if tier == "ssd" else 0)
    assert session.checkpoint.shards.bytes_read == wanted
    if text != "full":
        assert wanted < session.checkpoint.shards.total_bytes
    ple = session.model.ple
    assert ple is not None
    row = len(session.model.layers) * ple.dim * 4
    ids = np.array([3, 9, 3, ple.rows + 1, 0, 300, 9])
    session.logits(ids)
    unique = {3, 9, 0, 300}
    assert session.ple is not None
    assert session.ple.rows == len(ids)
    if tier == "ssd":
        assert session.ple.bytes_read == len(unique) * row
        assert session.checkpoint.shards.bytes_read == wanted + len(unique) * row
        session.logits(ids)
        assert session.ple.bytes_read == len(unique) * row, "rows that were kept are read again"
    else:
        assert session.ple.bytes_read == 0
        assert session.checkpoint.shards.bytes_read == wanted


def poison(folder: Path, part: Slice) -> None:
    """Turns every value outside the slice into NaN, in the file."""
    checkpoint = Checkpoint.open(folder)
    model, found = checkpoint.model, parts(checkpoint.model, part)
    places = {p.name: p.window for p in found.values()}
    path = folder / "model.safetensors"
    data = np.memmap(path, np.uint8, "r+")
    for name, shape in tensors(model).items():
        where = checkpoint.where[name].pieces[0].tensor
        values = data[where.offset : where.offset + where.nbytes].view(np.float32).reshape(shape)
        kept = np.zeros(shape, bool)
        window = places.get(name, Window((), ()))
        for a, b in window.rows:
            for c, d in window.cols or ((0, shape[-1]),):
                kept[(slice(a, b), slice(c, d))[: len(shape)]] = True
        values[~kept] = np.nan
    data.flush()
    checkpoint.close()


@pytest.mark.parametrize("text", PARTS[1:])
def test_values_outside_the_slice_do_not_matter(text: str, folders: Folder, opened: Open, tmp_path: Path) -> None:
    source = folders("gemma-3n-E4B")
    good = opened(source, slice=text)
    ids = prompt(good.model.vocab, 20)
    folder = variant(source, tmp_path / "poisoned", lambda t: t)
    poison(folder, good.plan.part)
    assert np.array_equal(opened(folder, slice=text).logits(ids), good.logits(ids))
    assert np.isnan(opened(folder, slice="full").logits(ids)).any()


def test_writing_a_slice_of_16_bit_shards(opened: Open, tmp_path: Path) -> None:
    """Stored bits are copied, not converted, out of several files into one."""
    import torch

    raw = shrink(real("gemma-3n-E4B"))
    source = make(tmp_path / "source", raw["text_config"], dtype=torch.bfloat16, shard_size="400KB")
    assert len(list(source.glob("*.safetensors"))) > 2
    (source / "tokenizer.json").write_text('{"not": "read"}')
    checkpoint = Checkpoint.open(source)
    part = resolve(checkpoint.model, checkpoint.family, "half+skip=2")
    nbytes = write_slice(checkpoint, part, tmp_path / "out")
    with pytest.raises(CannotCreate):
        write_slice(checkpoint, part, tmp_path / "out")
    again = Checkpoint.open(tmp_path / "out")
    assert nbytes == again.shards.total_bytes
    assert again.dtype == "BF16"
    assert again.model.layers == sliced(checkpoint.model, part).layers
    for name, piece in parts(checkpoint.model, part).items():
        assert np.array_equal(again.read_raw(name), checkpoint.read_raw(piece.name, piece.window))
    assert (tmp_path / "out" / "tokenizer.json").read_text() == '{"not": "read"}'
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]
    again.close()
    checkpoint.close()
