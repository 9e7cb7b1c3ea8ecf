"""safetensors: impossible files are refused by name (cases C1 to C22), sound ones are read byte for byte."""

from __future__ import annotations

import errno
import gzip
import json
import os
import random
import signal
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loaders.errors import (
    BadCheckpoint,
    CannotCreate,
    EdgeError,
    MissingFile,
    NotPermitted,
    ReadFailed,
    Unsupported,
    Usage,
)
from loaders.formats.buffers import from_float32, to_float32
from loaders.formats.safetensors import (
    INDEX,
    ITEMSIZE,
    MAX_OPEN,
    Shards,
    Tensor,
    Window,
    read_header,
)
from loaders.formats.safetensors_writer import Writer

REPO = Path(__file__).parent.parent
MIB = 1 << 20
DTYPES = {"F64": "f8", "F32": "f4", "F16": "f2", "I64": "i8", "I32": "i4", "I16": "i2", "I8": "i1", "U8": "u1"}
some = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
Header = dict[str, Any]


@contextmanager
def refused(kind: type[EdgeError], *words: str) -> Iterator[None]:
    """The exact class, and a message of one line that holds every word."""
    with pytest.raises(kind) as caught:
        yield
    assert type(caught.value) is kind
    message = str(caught.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == [], message


@contextmanager
def small() -> Iterator[None]:
    """No claim in a file may size an allocation."""
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 * MIB


def tiny() -> tuple[Header, bytes]:
    header: Header = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    }
    return header, bytes(range(32))


def encode(header: object, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(field: str, value: object, name: str = "b") -> Callable[[Header], object]:
    return lambda h: h[name].update({field: value})


def length(n: int) -> bytes:
    return n.to_bytes(8, "little") + encode(*tiny())[8:]


SOUND = encode(*tiny())
TEXT = json.dumps(tiny()[0]).encode()
NOT_NAMED: list[tuple[str, bytes, list[str]]] = [
    ("C1 empty", b"", ["file too short, 0 bytes"]),
    ("C1 one", b"\0", ["file too short, 1 bytes"]),
    ("C1 seven", bytes(7), ["file too short, 7 bytes"]),
    ("C1 eight", bytes(8), ["header length 0"]),
    ("C2 zero", length(0), ["header length 0"]),
    ("C2 one", length(1), ["header length 1"]),
    ("C2 sign bit", length(2**63), [f"header length {2**63}"]),
    ("C2 all bits", length(2**64 - 1), [f"header length {2**64 - 1}"]),
    ("C2 limit", length(100_000_001), ["header length 100000001"]),
    ("C2 beyond the file", length(100_000_000), ["header needs 100000008", "download incomplete"]),
    ("C3 not UTF-8", encode(TEXT.replace(b"pt", b"\xff\xfe"), bytes(32)), ["not UTF-8"]),
    ("C3 not JSON", encode(b"{nonsense}", b""), ["not JSON", "column 2"]),
    ("C3 list", encode(b"[]", b""), ["does not start with '{'"]),
    ("C3 space", encode(b" " + TEXT, bytes(32)), ["does not start with '{'"]),
    ("C3 BOM", encode(b"\xef\xbb\xbf" + TEXT, bytes(32)), ["does not start with '{'"]),
    ("C3 deep", encode(b'{"a":' * 50_000, b""), ["nested too deeply"]),
    ("C3 trailing", encode(TEXT + b"{}", bytes(32)), ["Extra data"]),
    ("C3 metadata number", encode({"__metadata__": {"n": 1}}, b""), ["__metadata__", "strings only"]),
    ("C3 metadata list", encode({"__metadata__": []}, b""), ["__metadata__", "strings only"]),
    ("C9 colons", encode(b'{"a":[' + b'{"":0},' * 900_000 + b"0]}", b""), ["too many entries", "100000 tensors"]),
    ("C9 commas", encode(b'{"a":[' + b"0," * 2_000_001 + b"0]}", b""), ["too many entries", "100000 tensors"]),
    ("C10 twice", encode(TEXT.replace(b'"b"', b'"a"'), bytes(32)), ["a: duplicate key"]),
    ("C11 one byte", SOUND + b"\0", ["1 trailing bytes", f"expected {len(SOUND)} bytes"]),
    ("C11 zip", SOUND + b"PK\x03\x04" * 9, ["36 trailing bytes"]),
    (
        "C12 one byte less",
        SOUND[:-1],
        [f"shard is {len(SOUND) - 1} bytes, header needs {len(SOUND)}", "Fetch it again"],
    ),
    ("C12 header cut", SOUND[:60], ["shard is 60 bytes", "download incomplete", "Fetch it again"]),
    ("C13 LFS", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", ["git-LFS pointer"]),
    ("C13 HTML", b"<!DOCTYPE html><html><body>503</body></html>", ["HTML page"]),
    ("C13 HTML short", b"<html>", ["HTML page"]),
    ("C13 gzip", gzip.compress(SOUND), ["gzip"]),
    ("C13 zip", b"PK\x03\x04" + bytes(2000), ["zip archive or a pickle"]),
    ("C13 GGUF", b"GGUF\x03\0\0\0" + b"\xff" * 50, ["GGUF"]),
]

MUTATIONS: list[tuple[str, Callable[[Header], object], list[str]]] = [
    ("C4 swapped", entry("data_offsets", [32, 24]), ["[32, 24]", "begin <= end"]),
    ("C4 negative", entry("data_offsets", [-8, 0]), ["[-8, 0]", "0 <= begin"]),
    ("C4 float", entry("data_offsets", [24.0, 32]), ["[24.0, 32]", "two integers"]),
    ("C4 bool", entry("data_offsets", [True, 32]), ["[true, 32]", "two integers"]),
    ("C4 one", entry("data_offsets", [24]), ["[24]", "two integers"]),
    ("C4 three", entry("data_offsets", [24, 32, 32]), ["two integers"]),
    ("C4 text", entry("data_offsets", "24,32"), ['"24,32"', "two integers"]),
    ("C4 overlap", entry("data_offsets", [20, 28]), ["overlap", "expected 24"]),
    ("C4 same place", entry("data_offsets", [0, 8]), ["overlap"]),
    ("C4 hole", entry("data_offsets", [25, 33]), ["hole", "expected 24"]),
    ("C4 past the end", entry("data_offsets", [2**40, 2**40 + 8]), ["hole"]),
    ("C4 past 2^64", entry("data_offsets", [2**64, 2**64 + 8]), ["hole"]),
    ("C5 negative", entry("shape", [-1, 4]), ["[-1, 4]", "from 1 to 2147483647"]),
    ("C5 two negatives", entry("shape", [-2, -2]), ["[-2, -2]"]),
    ("C5 2^64", entry("shape", [2, 18446744073709551614]), ["18446744073709551614"]),
    ("C5 wraps to 4", entry("shape", [4194305, 4194305, 211106198978564]), ["211106198978564"]),
    ("C5 wraps in range", entry("shape", [2**30, 2**30, 2**4 + 1]), ["span 8 bytes"]),
    ("C5 many", entry("shape", [1] * 10_000), ["a list of 10000", "at most 8"]),
    ("C5 nine", entry("shape", [4] + [1] * 8), ["a list of 9", "at most 8"]),
    ("C5 float", entry("shape", [4.0]), ["[4.0]"]),
    ("C5 bool", entry("shape", [True, 4]), ["[true, 4]"]),
    ("C5 null", entry("shape", None), ["null", "a list"]),
    ("C5 nested", entry("shape", [[4]]), ["shape a list of 1"]),
    ("C6 more", entry("shape", [5]), ["span 8 bytes", "10 for BF16 [5]"]),
    ("C6 less", entry("shape", [3]), ["span 8 bytes", "6 for BF16 [3]"]),
    ("C6 dtype", entry("dtype", "F32"), ["span 8 bytes", "16 for F32 [4]"]),
    ("C6 huge", entry("data_offsets", [24, 2**62]), ["span"]),
    ("C7 F4", entry("dtype", "F4"), ['dtype "F4"', "BF16"]),
    ("C7 lower case", entry("dtype", "bf16"), ['dtype "bf16"']),
    ("C7 list", entry("dtype", ["BF16"]), ['dtype ["BF16"]']),
    ("C7 number", entry("dtype", 1), ["dtype 1"]),
    ("C8 zero size", entry("shape", [0, 4]), ["[0, 4]", "from 1"]),
    ("C8 zero size, own place", lambda h: h["b"].update(shape=[0], data_offsets=[24, 24]), ["[0]", "from 1"]),
    ("extra field", entry("stride", [1]), ["an object of 4 keys", "dtype, shape and data_offsets only"]),
    ("no dtype", lambda h: h["b"].pop("dtype"), ["an object of 2 keys"]),
    ("not an object", lambda h: h.update(b=[1]), ["[1]"]),
]


@pytest.mark.parametrize(("data", "words"), [m[1:] for m in NOT_NAMED], ids=[m[0] for m in NOT_NAMED])
def test_bad_files(data: bytes, words: list[str], tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with small(), refused(BadCheckpoint, "model.safetensors: ", *words):
        read_header(path)
    with refused(BadCheckpoint, "model.safetensors: ", *words):
        Shards.open(tmp_path)


@pytest.mark.parametrize(("mutate", "words"), [m[1:] for m in MUTATIONS], ids=[m[0] for m in MUTATIONS])
def test_bad_tensors_are_named(mutate: Callable[[Header], object], words: list[str], tmp_path: Path) -> None:
    header, data = tiny()
    mutate(header)
    path = tmp_path / "model.safetensors"
    path.write_bytes(encode(header, data))
    with small(), refused(BadCheckpoint, "model.safetensors: b: ", *words):
        read_header(path)


def test_c9_too_many_tensors(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    item = b'"%d":{"dtype":"U8","shape":[1],"data_offsets":[%d,%d]}'
    text = b"{" + b",".join(item % (i, i, i + 1) for i in range(100_001)) + b"}"
    path.write_bytes(encode(text, bytes(100_001)))
    with refused(BadCheckpoint, "100001 tensors", "at most 100000"):
        read_header(path)
    path.write_bytes(encode(b"{" + b",".join([item % (1, 0, 1)] * 250_000) + b"}", b""))
    with refused(BadCheckpoint, "too many entries"):
        read_header(path)


def test_names_from_files_are_escaped_and_cut(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for name, shown in (("\x1b[31m\n", "\\x1b[31m\\n: "), ("x" * 1_000_000, "x" * 79 + "…: ")):
        path.write_bytes(encode({name: {"dtype": "F4", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)))
        with refused(BadCheckpoint, shown):
            read_header(path)
    path.write_bytes(encode(b'{"\\ud800": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}', bytes(1)))
    with refused(BadCheckpoint, "\\ud800: ", "not Unicode"):
        read_header(path)


def test_c14_no_flipped_header_bit_is_worse_than_a_refusal(tmp_path: Path) -> None:
    """Some flips still describe a file (another name, another dtype of that size); all others are refused."""
    path, start = tmp_path / "model.safetensors", len(SOUND) - 32
    taken = 0
    for bit in range(start * 8):
        data = bytearray(SOUND)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        try:
            tensors = read_header(path)
        except BadCheckpoint:
            continue
        taken += 1
        assert sorted((t.offset, t.nbytes) for t in tensors.values()) == [(start, 24), (start + 24, 8)]
    assert 0 < taken < start * 4


def test_a_sound_header(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(SOUND)
    start = len(SOUND) - 32
    assert read_header(path) == {
        "a": Tensor("a", "F32", (2, 3), str(path), start, 24),
        "b": Tensor("b", "BF16", (4,), str(path), start + 24, 8),
    }
    assert read_header(path)["b"].itemsize == 2
    path.write_bytes(encode(b"{}", b""))
    assert read_header(path) == {}
    with refused(BadCheckpoint, "no tensors"):
        Shards.open(tmp_path)
    path.write_bytes(encode(TEXT + b"  \n", bytes(32)))
    assert len(read_header(path)) == 2


def test_a_length_that_looks_like_gzip_is_sound(tmp_path: Path) -> None:
    text = json.dumps(tiny()[0]).encode().ljust(0x8B1F)
    (tmp_path / "model.safetensors").write_bytes(encode(text, bytes(range(32))))
    with Shards.open(tmp_path) as shards:
        assert shards.tensors["a"].offset % 2  # C23
        out = np.empty((2, 3), np.float32)
        shards.read_window(shards.tensors["a"], Window.full((2, 3)), out)
    assert out.tobytes() == bytes(range(24))


def test_c23_big_endian_hosts_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.safetensors").write_bytes(SOUND)
    monkeypatch.setattr(sys, "byteorder", "big")
    with refused(Unsupported, tmp_path.name, "big-endian host"):
        Shards.open(tmp_path)


# against the library

arrays = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(lambda n: n != "__metadata__"),
    st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(1, 5), max_size=4), st.integers(0, 2**32)),
    min_size=1,
    max_size=6,
)


def made(spec: tuple[str, list[int], int]) -> np.ndarray:
    dtype, shape, seed = spec
    size = int(np.prod(shape)) * ITEMSIZE[dtype]
    return np.frombuffer(random.Random(seed).randbytes(size), DTYPES[dtype]).reshape(shape)


@some
@given(arrays)
def test_what_the_library_writes_is_read(tmp_path: Path, specs: dict[str, tuple[str, list[int], int]]) -> None:
    wanted = {name: made(spec) for name, spec in specs.items()}
    safetensors.numpy.save_file(wanted, tmp_path / "model.safetensors", {"k": "v"})
    with Shards.open(tmp_path) as shards:
        assert shards.tensors.keys() == wanted.keys()
        for name, array in wanted.items():
            tensor = shards.tensors[name]
            assert (tensor.dtype, tensor.shape) == (specs[name][0], array.shape)
            got = np.empty(array.shape, array.dtype)
            shards.read_into(tensor, got)
            assert got.tobytes() == array.tobytes()
        assert shards.bytes_read == shards.total_bytes == sum(a.nbytes for a in wanted.values())


@some
@given(arrays, st.integers(1, 7))
def test_what_is_written_the_library_reads(
    tmp_path: Path, specs: dict[str, tuple[str, list[int], int]], piece: int
) -> None:
    path = tmp_path / "model.safetensors"
    wanted = {name: made(spec) for name, spec in specs.items()}
    with Writer(path, {name: (spec[0], spec[1]) for name, spec in specs.items()}) as writer:
        for name, array in wanted.items():
            data = array.tobytes()
            writer.write(name, (data[i : i + piece] for i in range(0, len(data), piece)))
    for loaded in (safetensors.numpy.load_file(path), safetensors.torch.load_file(path)):
        assert loaded.keys() == wanted.keys()
        for name, array in wanted.items():
            assert np.asarray(loaded[name]).tobytes() == array.tobytes()
    with safetensors.safe_open(path, "np") as f:
        assert f.metadata() == {"format": "pt"}
    assert os.listdir(tmp_path) == ["model.safetensors"]


@some
@given(st.data())
def test_what_the_library_refuses_is_refused(tmp_path: Path, data: st.DataObject) -> None:
    """Random damage: whatever is accepted here, the library accepts too, with the same tensors."""
    path = tmp_path / "model.safetensors"
    damaged = bytearray(SOUND)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(SOUND) - 1))] = data.draw(st.sampled_from(b'0123456789{}[],:" ab\x00\xff'))
    path.write_bytes(damaged)
    try:
        accepted: dict[str, Tensor] | None = read_header(path)
    except BadCheckpoint:
        accepted = None
    theirs = None
    if accepted is not None:
        theirs = {name for name, _ in safetensors.deserialize(bytes(damaged))}
    assert theirs == (None if accepted is None else set(accepted))


# folders


def save(path: Path, **shapes: list[int]) -> None:
    specs = {name: ("U8", shape) for name, shape in shapes.items()}
    with Writer(path, specs) as writer:
        for name, (_, shape) in specs.items():
            writer.write(name, [name[:1].encode() * int(np.prod(shape))])


def two_shards(folder: Path, **changes: object) -> None:
    folder.mkdir(exist_ok=True)
    save(folder / "m-1.safetensors", a=[4], b=[2])
    save(folder / "m-2.safetensors", c=[3])
    weight_map = {"a": "m-1.safetensors", "b": "m-1.safetensors", "c": "m-2.safetensors", **changes}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 9}, "weight_map": weight_map}))


def read(shards: Shards, name: str) -> bytes:
    buffer = bytearray(shards.tensors[name].nbytes)
    shards.read_into(shards.tensors[name], buffer)
    return bytes(buffer)


def test_an_indexed_folder(tmp_path: Path) -> None:
    two_shards(tmp_path)
    with Shards.open(tmp_path) as shards:
        assert {n: read(shards, n) for n in shards.tensors} == {"a": b"aaaa", "b": b"bb", "c": b"ccc"}
        assert (shards.folder, shards.total_bytes, shards.bytes_read) == (str(tmp_path), 9, 9)
        assert shards.notes == ()


def test_folders_without_index(tmp_path: Path) -> None:
    save(tmp_path / "consolidated.safetensors", a=[1])
    assert list(Shards.open(tmp_path).tensors) == ["a"]
    save(tmp_path / "x.safetensors", b=[1])
    save(tmp_path / "y.safetensors", c=[1])
    (tmp_path / "._x.safetensors").write_bytes(b"not one")
    shards = Shards.open(str(tmp_path))
    assert list(shards.tensors) == ["b", "c"]
    assert "consolidated" in shards.notes[0]
    save(tmp_path / "model.safetensors", d=[1])
    shards = Shards.open(tmp_path)
    assert list(shards.tensors) == ["d"]
    assert "3 safetensors files not used" in shards.notes[0]


def test_folders_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with refused(MissingFile, tmp_path.name, "no weights", "*.safetensors"):
        Shards.open(tmp_path)
    (tmp_path / "file").touch()
    for folder in (tmp_path / "nowhere", tmp_path / "file", "nul\0"):
        with refused(MissingFile, "a checkpoint folder"):
            Shards.open(folder)

    def fail(_: object) -> list[str]:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "listdir", fail)
    with refused(NotPermitted, tmp_path.name, "Permission denied"):
        Shards.open(tmp_path)


def test_c10_c15_index_and_shards_disagree(tmp_path: Path) -> None:
    two_shards(tmp_path, d="m-2.safetensors")
    with refused(BadCheckpoint, "m-2.safetensors: d: not in this shard"):
        Shards.open(tmp_path)
    two_shards(tmp_path, b="m-2.safetensors")
    with refused(BadCheckpoint, "m-2.safetensors: b: not in this shard"):
        Shards.open(tmp_path)
    two_shards(tmp_path, d="m-3.safetensors")
    with refused(MissingFile, "m-3.safetensors: ", "a shard", "Fetch it again"):
        Shards.open(tmp_path)
    two_shards(tmp_path)
    save(tmp_path / "m-2.safetensors", c=[3], b=[2])
    with refused(BadCheckpoint, "m-2.safetensors: b: also in m-1.safetensors"):
        Shards.open(tmp_path)


def test_c15_oddities_are_noted(tmp_path: Path) -> None:
    two_shards(tmp_path)
    save(tmp_path / "m-9.safetensors", z=[1])
    index = json.loads((tmp_path / INDEX).read_text())
    index["metadata"]["total_size"] = 10
    (tmp_path / INDEX).write_text(json.dumps(index))
    shards = Shards.open(tmp_path)
    assert "z" not in shards.tensors
    assert [n for n in shards.notes if "m-9.safetensors" in n]
    assert [n for n in shards.notes if "total_size 10, the shards hold 9" in n]


EVIL = [
    *(
        "../m-1.safetensors",
        "/etc/passwd",
        "a/m-1.safetensors",
        "a\\m-1.safetensors",
        "",
        ".",
        "..",
        "m-1.safetensors\0",
    ),
    *("C:\\m-1.safetensors", "C:m-1.safetensors", "m\0.safetensors", "x" * 10_000_000, 1, None, ["m-1.safetensors"]),
    *(".safetensors", "pytorch_model.bin", "..safetensors", "m-1.safetensors\n", "a/../../m-1.safetensors"),
]


@pytest.mark.parametrize("name", EVIL, ids=range(len(EVIL)))
def test_c16_a_shard_name_is_a_plain_file_name(name: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "m-1.safetensors", d=[1])
    folder = tmp_path / "model"
    two_shards(folder, d=name)
    opened: list[str] = []
    real = os.open

    def spy(path: Any, *rest: Any) -> int:
        opened.append(os.fspath(path))
        return real(path, *rest)

    monkeypatch.setattr(os, "open", spy)
    with refused(BadCheckpoint, INDEX + ": weight_map.d: ", "a shard name must be a plain file name"):
        Shards.open(folder)
    assert opened == [str(folder / INDEX)]


@pytest.mark.parametrize("weight_map", [None, [], {}, "x"])
def test_an_index_without_weight_map(weight_map: object, tmp_path: Path) -> None:
    two_shards(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with refused(BadCheckpoint, INDEX + ": weight_map: ", "an object of shard names"):
        Shards.open(tmp_path)


def test_c17_links(tmp_path: Path) -> None:
    two_shards(tmp_path / "blobs")
    folder = tmp_path / "snapshots"
    folder.mkdir()
    for name in os.listdir(tmp_path / "blobs"):
        os.symlink(f"../blobs/{name}", folder / name)
    with Shards.open(folder) as shards:
        assert read(shards, "c") == b"ccc"
    os.mkfifo(tmp_path / "fifo")
    for target in ("m-2.safetensors", os.devnull, "../fifo", "../blobs"):
        (folder / "m-2.safetensors").unlink()
        os.symlink(target, folder / "m-2.safetensors")
        with refused(MissingFile, "m-2.safetensors"):
            Shards.open(folder)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "consolidated.00.pth"]
)
def test_c21_pickles_are_never_opened(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04canary")
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(os, "open", lambda *_: pytest.fail("opened"))
    with refused(Unsupported, name, "pickle checkpoints are not loaded; convert to safetensors"):
        Shards.open(tmp_path)


def script(code: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=REPO, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


MANY = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
from loaders.formats.safetensors import Shards
with Shards.open(sys.argv[1]) as shards:
    most = 0
    for t in shards.tensors.values():
        b = bytearray(1)
        shards.read_into(t, b)
        assert b == b"t", b
        most = max(most, len(os.listdir("/dev/fd")))
print(len(shards.tensors), most, len(os.listdir("/dev/fd")))
"""


def test_c22_many_shards_few_descriptors(tmp_path: Path) -> None:
    for i in range(1500):
        header = {f"t{i}": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}
        (tmp_path / f"m-{i:05}.safetensors").write_bytes(encode(header, b"t"))
    count, most, after = map(int, script(MANY, tmp_path).split())
    assert count == 1500
    assert MAX_OPEN < most < MAX_OPEN + 10
    assert after < 10


# reading


@pytest.fixture
def matrix(tmp_path: Path) -> Iterator[tuple[Shards, np.ndarray]]:
    values = np.random.default_rng(0).integers(0, 2**16, (9, 11), np.uint16)
    with Writer(tmp_path / "model.safetensors", {"pad": ("U8", [3]), "m": ("BF16", [9, 11])}) as writer:
        writer.write("pad", [b"abc"])
        writer.write("m", values)
    with Shards.open(tmp_path) as shards:
        yield shards, values


def ranges(n: int) -> st.SearchStrategy[list[tuple[int, int]]]:
    pairs = st.tuples(st.integers(0, n), st.integers(0, n)).map(lambda p: (min(p), max(p)))
    return st.lists(pairs, min_size=1, max_size=4)


def picked(parts: list[tuple[int, int]]) -> list[int]:
    return [i for a, b in parts for i in range(a, b)]


@some
@given(rows=ranges(9), cols=ranges(11))
def test_a_window_is_a_slice(
    matrix: tuple[Shards, np.ndarray], rows: list[tuple[int, int]], cols: list[tuple[int, int]]
) -> None:
    shards, values = matrix
    window, before = Window.of(rows, cols), shards.bytes_read
    wanted = values[np.ix_(picked(rows), picked(cols))]
    assert (window.shape, window.count) == (wanted.shape, wanted.size)
    out = np.full(window.shape, 7, np.uint16)
    shards.read_window(shards.tensors["m"], window, out)
    assert np.array_equal(out, wanted)
    assert shards.bytes_read - before == wanted.nbytes


def test_windows_read_nothing_else(matrix: tuple[Shards, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    shards, _ = matrix
    tensor, real = shards.tensors["m"], os.preadv
    calls: list[tuple[int, int]] = []

    def spy(fd: int, buffers: list[memoryview], offset: int) -> int:
        calls.append((offset - tensor.offset, sum(len(b) for b in buffers)))
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", spy)
    shards.read_window(tensor, Window(((2, 5),), ((0, 11),)), np.empty((3, 11), np.uint16))
    assert calls == [(44, 66)]
    calls.clear()
    shards.read_window(tensor, Window(((0, 2),), ((1, 3), (10, 11))), np.empty((2, 3), np.uint16))
    assert calls == [(2, 4), (20, 2), (24, 4), (42, 2)]


def test_strided_reads_have_their_own_descriptor(
    matrix: tuple[Shards, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, _ = matrix
    advised: list[int] = []
    if not hasattr(os, "posix_fadvise"):  # macOS
        monkeypatch.setattr(os, "POSIX_FADV_RANDOM", 1, raising=False)
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, *_: advised.append(fd), raising=False)
    used: list[int] = []
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, *rest: used.append(fd) or real(fd, *rest))
    read(shards, "m")
    assert advised == []
    shards.read_window(shards.tensors["m"], Window(((0, 1),), ((0, 2),)), np.empty((1, 2), np.uint16))
    assert advised == used[1:]
    assert used[0] != used[1]


def test_window_helpers() -> None:
    assert Window.of([(0, 2), (2, 2), (2, 5), (7, 8), (8, 9)], [(0, 1)]) == Window(((0, 5), (7, 9)), ((0, 1),))
    assert Window.of([(3, 5), (0, 3)]) == Window(((3, 5), (0, 3)), None)
    assert Window.full((4,)) == Window(((0, 4),), None)
    assert Window.full((4, 5)) == Window(((0, 4),), ((0, 5),))
    assert Window.full((4, 5, 6)) == Window(((0, 4),), ((0, 30),))
    assert Window.full(()).shape == (1,)
    assert Window.full((4, 5)).count == 20
    assert Window.of([(1, 1)], [(0, 3)]).count == 0


def test_other_dimensions(tmp_path: Path) -> None:
    cube = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    saved = {"cube": cube, "line": cube[0, 0].copy(), "dot": np.array(5, np.float32)}
    safetensors.numpy.save_file(saved, tmp_path / "model.safetensors")
    with Shards.open(tmp_path) as shards:
        out = np.empty((1, 3, 4), np.float32)
        shards.read_window(shards.tensors["cube"], Window(((1, 2),), ((0, 12),)), out)
        assert np.array_equal(out, cube[1:])
        part = np.empty((2, 2), np.uint32)
        shards.read_window(shards.tensors["cube"], Window(((0, 2),), ((5, 7),)), part)
        assert np.array_equal(part.view(np.float32), cube.reshape(2, 12)[:, 5:7])
        line = np.empty(2, np.float32)
        shards.read_window(shards.tensors["line"], Window(((1, 3),), None), line)
        assert np.array_equal(line, [1, 2])
        for dot in (np.empty((), np.float32), np.empty(1, np.float32)):
            shards.read_window(shards.tensors["dot"], Window.full(()), dot)
            assert dot == 5


def test_reads_outside_a_tensor_are_refused(matrix: tuple[Shards, np.ndarray]) -> None:
    shards, _ = matrix
    tensor = shards.tensors["m"]
    for start, n in ((-1, 4), (0, 199), (197, 2), (2**70, 1)):
        with refused(Usage, "model.safetensors: m: bytes", "within [9, 11]"):
            shards.read_into(tensor, bytearray(n), start)
    forged = Tensor("m", "BF16", (9, 11), tensor.shard, 0, 198)
    with refused(Usage, "of these shards"):
        shards.read_into(forged, bytearray(4))
    with refused(Usage, "read-only"):
        shards.read_into(tensor, memoryview(b"1234"))
    with refused(Usage, "C-contiguous"):
        shards.read_into(tensor, np.empty((4, 4), np.uint8)[:, :2])
    shards.read_into(tensor, bytearray(0), 198)
    bad = [
        Window(((0, 10),), ((0, 11),)),
        Window(((-1, 1),), ((0, 11),)),
        Window(((3, 2),), ((0, 11),)),
        Window(((0, 1),), ((0, 12),)),
        Window(((0, 1),), None),
    ]
    for window in [*bad, Window(((0, 9),), ((0, 11), (11, 12)))]:
        with refused(Usage, "m: rows", "within [9, 11]"):
            shards.read_window(tensor, window, np.empty((1, 1), np.uint16))
    for out in (np.empty((9, 10), np.uint16), np.empty((9, 11), np.uint8), np.empty(99, np.uint16)):
        with refused(Usage, "expected [9, 11] of 2"):
            shards.read_window(tensor, Window.full((9, 11)), out)
    assert shards.bytes_read == 0


def test_partial_reads_go_on(matrix: tuple[Shards, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    shards, values = matrix
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, b, at: real(fd, [b[0][:5]], at))
    assert read(shards, "m") == values.tobytes()
    out = np.empty((9, 7), np.uint16)
    shards.read_window(shards.tensors["m"], Window(((0, 9),), ((2, 9),)), out)
    assert np.array_equal(out, values[:, 2:9])


def test_the_end_of_the_file_and_errors(matrix: tuple[Shards, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    shards, _ = matrix
    tensor, real = shards.tensors["m"], os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, b, at: real(fd, [b[0][:50]], at) if at < tensor.offset + 99 else 0)
    with refused(ReadFailed, "model.safetensors: ", f"offset {tensor.offset}", "100 bytes read, 198 wanted"):
        read(shards, "m")

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with refused(ReadFailed, "model.safetensors: ", f"offset {tensor.offset}", "Input/output error"):
        read(shards, "m")
    with refused(ReadFailed, f"offset {tensor.offset + 4}"):
        shards.read_window(tensor, Window(((0, 1),), ((2, 3),)), np.empty((1, 1), np.uint16))
    assert shards.bytes_read == 0


def test_c18_changed_before_the_first_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for change in (
        lambda: save(path, a=[4]),
        lambda: os.truncate(path, 20),
        lambda: os.utime(path, (1, 1)),
        path.unlink,
    ):
        save(path, a=[4])
        with Shards.open(tmp_path) as shards:
            change()
            with refused(ReadFailed, "model.safetensors: changed since it was opened"):
                read(shards, "a")


def test_c18_truncated_while_running(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save(path, a=[40], b=[40])
    with Shards.open(tmp_path) as shards:
        assert read(shards, "a") == b"a" * 40
        os.truncate(path, shards.tensors["b"].offset + 10)
        with refused(ReadFailed, "model.safetensors: ", str(shards.tensors["b"].offset), "10 bytes read, 40 wanted"):
            read(shards, "b")


def test_threads_and_few_descriptors(tmp_path: Path) -> None:
    names = [chr(0x100 + i) for i in range(3 * MAX_OPEN)]
    for i, name in enumerate(names):
        header = {name: {"dtype": "U8", "shape": [2, 8], "data_offsets": [0, 16]}}
        (tmp_path / f"m-{i}.safetensors").write_bytes(encode(header, bytes([i]) * 16))
    before = len(os.listdir("/dev/fd"))
    shards = Shards.open(tmp_path)
    wrong: list[object] = []

    def work(seed: int) -> None:
        try:
            for name in random.Random(seed).sample(names, len(names)):
                out = np.empty((2, 3), np.uint8)
                shards.read_window(shards.tensors[name], Window(((0, 2),), ((1, 4),)), out)
                if set(out.ravel()) | set(read(shards, name)) != {ord(name) - 0x100}:
                    wrong.append(name)
        except EdgeError as e:
            wrong.append(e)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert shards.bytes_read == 8 * len(names) * 22
    assert len(os.listdir("/dev/fd")) <= before + MAX_OPEN
    shards.close()
    shards.close()
    assert len(os.listdir("/dev/fd")) == before
    with refused(Usage, "closed"):
        read(shards, names[0])


def test_close_waits_for_a_running_read(matrix: tuple[Shards, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    shards, values = matrix
    real = os.preadv

    def closing(fd: int, buffers: list[memoryview], offset: int) -> int:
        shards.close()
        return real(fd, [buffers[0][:40]], offset)

    before = len(os.listdir("/dev/fd"))
    monkeypatch.setattr(os, "preadv", closing)
    assert read(shards, "m") == values.tobytes()
    assert len(os.listdir("/dev/fd")) == before


# numbers


def test_conversions_are_those_of_torch() -> None:
    raw = np.arange(2**16, dtype=np.uint16)
    for dtype, kind in (("BF16", torch.bfloat16), ("F16", torch.float16)):
        wanted = torch.from_numpy(raw.view(np.int16).copy()).view(kind).float().numpy()
        assert np.array_equal(to_float32(raw, dtype), wanted, equal_nan=True)
        back = from_float32(wanted, dtype)
        sound = ~np.isnan(wanted)
        assert back.dtype == np.uint16
        assert np.array_equal(back[sound], raw[sound])
        assert np.isnan(to_float32(back, dtype)[~sound]).all()
    bits = np.random.default_rng(1).integers(0, 2**32, 200_000, np.uint64).astype(np.uint32)
    halves = (np.arange(2**15, dtype=np.uint32) << np.uint32(16)) | np.uint32(0x8000)  # ties
    x = np.concatenate([bits, halves, halves + np.uint32(1), halves - np.uint32(1)]).view(np.float32)
    x = np.concatenate([x, np.array([0xFFFFFFFF, 0x7F800001, 0x7F7FFFFF], np.uint32).view(np.float32)])
    for dtype, kind in (("BF16", torch.bfloat16), ("F16", torch.float16)):
        wanted = torch.from_numpy(x).to(kind).float().numpy()
        assert np.array_equal(to_float32(from_float32(x, dtype), dtype), wanted, equal_nan=True)
    assert to_float32(from_float32(x, "F32"), "F32") is not None
    assert np.array_equal(to_float32(x.view(np.uint32), "F32"), x, equal_nan=True)
    assert to_float32(np.uint16([[0x3F80]]), "BF16").shape == (1, 1)
    for convert in (to_float32, from_float32):
        with refused(Unsupported, "dtype I64", "BF16, F16 or F32"):
            convert(x, "I64")


# writing


def test_mixed_types_are_aligned_and_order_is_free(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    x = np.float32([1, 2, 3])
    with Writer(path, {"odd": ("U8", [3]), "half": ("F16", [1]), "x": ("F32", [3])}, {}) as writer:
        writer.write("odd", iter([b"a", bytearray(b"b"), memoryview(b"c")]))
        writer.write("x", [x[:1], b"", x[1:]])
        writer.write("half", [np.float16([4])])
    header = read_header(path)
    assert all(t.offset % t.itemsize == 0 for t in header.values())
    loaded = safetensors.torch.load_file(path)
    assert loaded["x"].tolist() == [1, 2, 3]
    assert loaded["half"].tolist() == [4]
    assert bytes(loaded["odd"].tolist()) == b"abc"
    assert oct(path.stat().st_mode & 0o600) == "0o600"


def test_wrong_use_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    specs = {"a": ("U8", [4]), "b": ("U8", [4])}
    wrong: list[tuple[list[tuple[str, list[bytes]]], str]] = [
        ([("a", [b"123"])], "a: 3 bytes (expected 4)"),
        ([("a", [b"1234", b"5"])], "a: more than 4 bytes"),
        ([("a", [b"1234"]), ("a", [b"1234"])], "a: not in the specs, or written already"),
        ([("c", [b"1234"])], "c: not in the specs"),
        ([("a", [b"1234"])], "b: never written"),
    ]
    for calls, words in wrong:
        with refused(Usage, "model.safetensors: " + words), Writer(path, specs) as writer:
            for name, chunks in calls:
                writer.write(name, chunks)
        assert os.listdir(tmp_path) == []
    for spec in (("F4", [1]), ("U8", [0]), ("U8", [-1])):
        with refused(Usage, "model.safetensors: a: "):
            Writer(path, {"a": spec})


def test_a_failed_source_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save(path, old=[1])
    before = path.read_bytes()

    def source() -> Iterator[bytes]:
        yield b"12"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Writer(path, {"a": ("U8", [4])}) as writer:
        writer.write("a", source())
    assert os.listdir(tmp_path) == ["model.safetensors"]
    assert path.read_bytes() == before


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG, errno.EIO])
@pytest.mark.parametrize("call", ["pwrite", "fsync", "replace"])
def test_failed_writes_leave_nothing(call: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, fail)
    with refused(ReadFailed, "model.safetensors: ", os.strerror(number)):
        save(tmp_path / "model.safetensors", a=[4])
    assert os.listdir(tmp_path) == []


def test_a_full_disk_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    real = os.pwrite
    left = [200]

    def until_full(fd: int, data: memoryview, offset: int) -> int:
        if not left[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        n = real(fd, data[: min(7, left[0])], offset)  # partial writes on the way
        left[0] -= n
        return n

    monkeypatch.setattr(os, "pwrite", until_full)
    with refused(ReadFailed, "model.safetensors: write at offset 200", "No space left"):
        save(path, a=[1000])
    assert os.listdir(tmp_path) == []
    left[0] = 10_000
    save(path, a=[1000])
    with Shards.open(tmp_path) as shards:
        assert read(shards, "a") == b"a" * 1000


def test_a_limit_on_file_size(tmp_path: Path) -> None:
    code = """
import resource, sys
from loaders.errors import ReadFailed
from loaders.formats.safetensors_writer import Writer
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    with Writer(sys.argv[1], {"a": ("U8", [4000])}) as w:
        w.write("a", [bytes(4000)])
except ReadFailed as e:
    print(e)
"""
    assert "File too large" in script(code, tmp_path / "model.safetensors")
    assert os.listdir(tmp_path) == []


def test_cannot_create(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "model.safetensors").mkdir()
    for path in (tmp_path / "nowhere" / "x", tmp_path / "file" / "x", tmp_path / "model.safetensors"):
        with refused(CannotCreate, path.name, "cannot create"):
            save(path, a=[1])
    for number, kind in ((errno.EROFS, CannotCreate), (errno.EACCES, CannotCreate), (errno.ENOSPC, ReadFailed)):
        with monkeypatch.context() as patch, refused(kind, "x: cannot create", os.strerror(number)):
            failure = OSError(number, os.strerror(number))
            patch.setattr(os, "open", lambda *_, e=failure: (_ for _ in ()).throw(e))
            save(tmp_path / "x", a=[1])
    assert sorted(os.listdir(tmp_path)) == ["file", "model.safetensors"]


def test_a_killed_writer_leaves_no_checkpoint(tmp_path: Path) -> None:
    code = """
import os, signal, sys
from loaders.formats.safetensors_writer import Writer
with Writer(sys.argv[1], {"a": ("U8", [4])}) as w:
    w.write("a", [b"1234"])
    os.kill(os.getpid(), signal.SIGKILL)
"""
    path = tmp_path / "model.safetensors"
    done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=REPO, check=False)
    assert done.returncode == -signal.SIGKILL
    left = os.listdir(tmp_path)
    assert [n for n in left if not (n.startswith(".model.safetensors.") and n.endswith(".tmp"))] == []
    with refused(MissingFile, "no weights"):
        Shards.open(tmp_path)


def test_temporary_files_of_the_same_name(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    (tmp_path / f".model.safetensors.{os.getpid()}.tmp").write_bytes(b"left by another process")
    save(path, a=[4])
    assert os.listdir(tmp_path) == ["model.safetensors"]
    first, second = Writer(path, {"b": ("U8", [1])}), Writer(path, {"c": ("U8", [1])})
    first.__enter__()
    with second:
        first.write("b", [b"b"])
        with refused(ReadFailed, "another writer took the temporary file"):
            first.__exit__(None, None, None)
        second.write("c", [b"c"])
    assert list(read_header(path)) == ["c"]
    assert os.listdir(tmp_path) == ["model.safetensors"]
