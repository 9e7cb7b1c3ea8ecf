"""C1 to C23: safetensors files, their index, and what stands beside them."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.mutations import (
    INDEX,
    MIB,
    RUN,
    SAY,
    SHARD,
    SHOW,
    Case,
    Change,
    added,
    bytes_of,
    closed_to_all,
    cut,
    edited,
    entry,
    every,
    header,
    header_text,
    instead,
    linked,
    nothing,
    packed,
    removed,
    sharded,
    sparse,
    unpacked,
    without_privileges,
    written,
)

EMBED, NORM = "model.embed_tokens.weight", "model.norm.weight"
ROUTER = "model.layers.0.altup.modality_router.weight"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def bad(id: str, change: Change, *words: str, code: int = 65, **more: Any) -> Case:
    """A shard that is refused; the words come after its name."""
    return Case(id, change, code, (SHARD, *words), **more)


def tensor(id: str, change: Change, *words: str, code: int = 65) -> Case:
    """A shard that is refused for one tensor, by its name."""
    return Case(id, change, code, (SHARD, NORM, *words))


def works(id: str, change: Change, *words: str, **more: Any) -> Case:
    """A folder that is described, with these words in the description."""
    return Case(id, change, 0, words or ('"family": "gemma3n"',), (SHOW,), **more)


def runs(id: str, change: Change, **more: Any) -> Case:
    """A model that speaks."""
    return Case(id, change, 0, ('"tokens": [',), (SAY,), warm=True, **more)


def length(n: int) -> Change:
    """A shard that claims a header of ``n`` bytes."""
    return bytes_of(SHARD, lambda data: n.to_bytes(8, "little") + data[8:])


def shaped(id: str, shape: object, *words: str) -> Case:
    """C5: a shape that cannot be."""
    return tensor(f"C5-{id}", entry(NORM, shape=shape), *words)


def offsets(id: str, change: Callable[[int, int], object], *words: str) -> Case:
    """C4: other data_offsets, made from the right ones."""
    return tensor(
        f"C4-{id}", header(lambda head: head[NORM].update(data_offsets=change(*head[NORM]["data_offsets"]))), *words
    )


def million_tensors() -> bytes:
    """A sound file of a million tensors of one byte each."""
    entries = (f'"{i}":{{"dtype":"U8","shape":[1],"data_offsets":[{i},{i + 1}]}}' for i in range(10**6))
    return packed(("{" + ",".join(entries) + "}").encode(), bytes(10**6))


def flipped(find: bytes, bit: int) -> Change:
    """One bit of the first byte of ``find``, which stands in the header, is another."""

    def flip(data: bytes) -> bytes:
        at = data.index(find)
        return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]

    return bytes_of(SHARD, flip)


def indexed(change: Callable[[dict[str, Any]], object]) -> Change:
    """Two shards, and an index that ``change`` works on."""
    return every(sharded(), edited(INDEX, change))


def mapped(shard: object) -> Change:
    """Two shards, and an index that looks for one tensor somewhere else."""
    return indexed(lambda index: index["weight_map"].update({NORM: shard}))


def shard_name(id: str, shard: object, *closed: str) -> Case:
    """C16: a name that is no plain file name; sound shards wait wherever it may lead."""

    def decoys(folder: Path) -> None:
        for place in closed:
            path = folder.parent / place
            if not os.path.isabs(place) and not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes((folder / FIRST).read_bytes())

    words = (INDEX, f"weight_map.{NORM}", "a shard name must be a plain file name")
    return Case(f"C16-{id}", every(mapped(shard), decoys), 65, words, closed=closed)


class Canary:
    """Unpickling it leaves a file behind."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, ("was_here", "w"))


def pickled(name: str) -> Change:
    """Only a pickle that would leave a trace."""
    return every(removed(SHARD), written(name, lambda: pickle.dumps(Canary())))


def with_extras(data: bytes, count: int) -> bytes:
    """A shard with tensors that no config has a place for."""
    head, rest = unpacked(data)
    at = len(rest)
    for i in range(count):
        head[f"extra.{i}"] = {"dtype": "U8", "shape": [1], "data_offsets": [at + i, at + i + 1]}
    return packed(head, rest + bytes(count))


def link_into_blobs(folder: Path) -> None:
    """As in the cache of the Hugging Face hub: the shards are links to files named by their hash, in another folder."""
    sharded()(folder)
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for number, name in enumerate((FIRST, SECOND)):
        (folder / name).rename(blobs / f"{number:064x}")
        (folder / name).symlink_to(f"../blobs/{number:064x}")


def fifteen_hundred(folder: Path) -> None:
    """Every tensor in a shard of its own, and parts that a text model never reads in the rest."""
    sharded(None)(folder)
    index = json.loads((folder / INDEX).read_text())
    for i in range(1500 - len(index["weight_map"])):
        name, shard = f"model.vision_tower.{i}", f"vision-{i:05}.safetensors"
        (folder / shard).write_bytes(packed({name: {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}, b"x"))
        index["weight_map"][name] = shard
    (folder / INDEX).write_text(json.dumps(index))


def few_descriptors() -> None:
    """``ulimit -n 256``."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))


def big_endian() -> None:
    """A host on which the bytes of a file mean something else."""
    pytest.MonkeyPatch().setattr(sys, "byteorder", "big")


def once_opened(change: Change) -> Callable[[], None]:
    """The change comes when the headers have been accepted, and nothing else has been read."""

    def inside() -> None:
        from loaders.checkpoint import Checkpoint

        original = Checkpoint.open

        def opened(folder: str | Path) -> Checkpoint:
            found = original(folder)
            change(Path(folder))
            return found

        pytest.MonkeyPatch().setattr(Checkpoint, "open", opened)

    return inside


def once_loaded(change: Change) -> Callable[[], None]:
    """The change comes when the weights are in memory, and only rows of the table are still to be read."""

    def inside() -> None:
        from edge import engine

        original = engine.load

        def loaded(*args: Any, **options: Any) -> Any:
            found = original(*args, **options)
            change(Path("model"))
            return found

        pytest.MonkeyPatch().setattr(engine, "load", loaded)

    return inside


def changed(id: str, inside: Callable[[], None], *words: str, ple: str = "ram") -> Case:
    """C18: a shard that changes while the model runs."""
    say = (*SAY, "--ple", ple)
    return bad(id, nothing, *words, code=74, commands=(say,), warm=True, inside=inside, changes_the_model=True)


def copied(path: Path) -> None:
    """The same bytes in another file."""
    path.with_suffix(".new").write_bytes(path.read_bytes())
    path.with_suffix(".new").rename(path)


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 163984\n"
WRAPS = [4194305, 4194305, 211106198978564]
EMPTY = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
HALF = lambda size: size // 2  # noqa: E731
LESS = lambda size: size - 1  # noqa: E731

LENGTHS: list[Case] = [
    *(bad(f"C1-{n}", written(SHARD, bytes(n)), f"file too short, {n} bytes") for n in (0, 1, 7)),
    bad("C1-8", written(SHARD, bytes(8)), "header length 0"),
    *(bad(f"C2-{id}", length(n), f"header length {n}") for id, n in
      {"0": 0, "1": 1, "2^63": 2**63, "2^64-1": 2**64 - 1, "limit": 100_000_001}.items()),
    bad("C2-past-the-file", length(10**6), f"header needs {10**6 + 8}", "download incomplete"),
    bad("C2-past-a-huge-file", sparse(SHARD, 2 << 30, (100_000_001).to_bytes(8, "little") + b"{"), "header length"),
    bad("C2-as-long-as-allowed", sparse(SHARD, 101_000_000, (10**8).to_bytes(8, "little") + b"{"), "or none, in 10000"),
    bad("C3-not-utf8", header_text(lambda text: text.replace(b"norm", b"no\xff\xfe")), "not UTF-8 at line 1"),
    bad("C3-not-json", header_text(lambda text: b"{nonsense}"), "not JSON", "column 2"),
    bad("C3-list", header_text(lambda text: b"[" + text + b"]"), "does not start with '{'"),
    bad("C3-space", header_text(lambda text: b" " + text), "does not start with '{'"),
    bad("C3-bom", header_text(lambda text: b"\xef\xbb\xbf" + text), "does not start with '{'"),
    bad("C3-deep", header_text(lambda text: b'{"a":' * 50_000), "nested too deeply"),
    bad("C3-trailing", header_text(lambda text: text + b"{}"), "Extra data"),
    bad("C3-nan", header_text(lambda text: text.replace(b"[0,", b"[NaN,", 1).replace(b"[0, ", b"[NaN, ", 1)), "NaN"),
    *(bad(f"C3-metadata-{id}", header(lambda head, value=value: head.update(__metadata__=value)), "__metadata__",
          "strings only") for id, value in {"number": {"n": 1}, "list": [], "nested": {"a": {}}}.items()),
]  # fmt: skip

ENTRIES: list[Case] = [
    offsets("swapped", lambda a, b: [b, a], "0 <= begin <= end"),
    offsets("negative", lambda a, b: [-8, 0], "[-8, 0]", "0 <= begin <= end"),
    offsets("float", lambda a, b: [float(a), b], "two integers"),
    offsets("bool", lambda a, b: [True, b], "two integers"),
    offsets("one", lambda a, b: [a], "two integers"),
    offsets("three", lambda a, b: [a, b, b], "two integers"),
    offsets("text", lambda a, b: f"{a},{b}", "two integers"),
    offsets("null", lambda a, b: None, "two integers"),
    offsets("overlap", lambda a, b: [a - 4, b - 4], "overlap"),
    offsets("hole", lambda a, b: [a + 1, b + 1], "hole"),
    offsets("same-place", lambda a, b: [0, b - a], ""),
    # What is named is the tensor after the hole that this one leaves.
    bad("C4-past-the-end", entry(NORM, data_offsets=[2**40, 2**40 + 64]), "hole"),
    bad("C4-past-2^64", entry(NORM, data_offsets=[2**64, 2**64 + 64]), "hole"),
    shaped("negative", [-1, 4], "[-1, 4]", "integers from 1 to"),
    shaped("two-negatives", [-4, -8], "[-4, -8]"),
    shaped("2^64", [2, 18446744073709551614], "18446744073709551614"),
    shaped("wraps-to-4", WRAPS, "211106198978564"),
    shaped("wraps-in-range", [2**30, 2**30, 17], "span 64 bytes"),
    shaped("many", [1] * 10_000, "a list of 10000", "at most 8"),
    shaped("floats", [1e3] * 1000, "a list of 1000"),
    shaped("float", [32.0], "[32.0]"),
    shaped("bool", [True, 32], "[true, 32]"),
    shaped("null", None, "null"),
    shaped("text", "32", '"32"'),
    tensor("C6-more", entry(NORM, shape=[33]), "span 64 bytes", "66 for BF16 [33]"),
    tensor("C6-less", entry(NORM, shape=[31]), "span 64 bytes", "62 for BF16 [31]"),
    tensor("C6-dtype", entry(NORM, dtype="F32"), "span 64 bytes", "128 for F32 [32]"),
    tensor("C6-huge", header(lambda head: head[NORM]["data_offsets"].__setitem__(1, 2**62)), "span"),
    *(tensor(f"C7-{dtype}", entry(NORM, dtype=dtype), "dtype", str(dtype), "one of F64")
      for dtype in ("F4", "F6_E2M3", "bf16", "object", "", 1)),
    tensor("C7-list", entry(NORM, dtype=["BF16"]), "dtype"),
    tensor("C7-sub-byte-odd-length", entry(NORM, dtype="F4", shape=[127]), '"F4"'),
    tensor("C8-zero-size", entry(NORM, shape=[0, 4]), "[0, 4]", "integers from 1"),
    bad("C8-shares-a-place", header(lambda head: head.update(zero=EMPTY)), "zero: shape [0]"),
    bad("C9-million", written(SHARD, million_tensors), "too many entries", "100000 tensors",
        commands=(RUN,)),
    bad("C9-nested", header_text(lambda text: b'{"a":[' + b"0," * 2_000_001 + b"0]}"), "too many entries"),
    bad("C9-long-name", header(lambda head: head.update({"x" * MIB: [1]})), "xxx"),
    bad("C9-escape-in-a-name", header(lambda head: head.update({"\x1b[31m\n": [1]})), r"\x1b[31m\n: [1]"),
    tensor("C10-twice", header_text(lambda text: text.replace(ROUTER.encode(), NORM.encode())), "duplicate key"),
    Case("C10-two-shards", every(sharded(), added(EMBED, "U8", [1], b"x", SECOND)), 65,
         (SECOND, EMBED, f"also in {FIRST}", "each tensor once")),
    tensor("extra-field", entry(NORM, stride=[1]), "an object of 4 keys"),
    tensor("no-dtype", header(lambda head: head[NORM].pop("dtype")), "an object of 2 keys"),
]  # fmt: skip

DOWNLOADS: list[Case] = [
    bad("C11-one-byte", bytes_of(SHARD, lambda data: data + b"\0"), "1 trailing bytes"),
    bad("C11-zip", bytes_of(SHARD, lambda data: data + b"PK\x03\x04" * 9), "36 trailing bytes"),
    bad("C11-pickle", bytes_of(SHARD, lambda data: data + pickle.dumps(Canary())), "trailing bytes"),
    bad("C12-by-one", cut(SHARD, LESS), "header needs", "download incomplete", "Fetch it again"),
    bad("C12-half", cut(SHARD, HALF), "header needs", "download incomplete", "Fetch it again"),
    bad("C12-in-the-header", cut(SHARD, lambda size: 1000), "shard is 1000 bytes", "download incomplete"),
    Case("C12-second-shard", every(sharded(), cut(SECOND, HALF)), 65, (SECOND, "download incomplete")),
    bad("C13-lfs", written(SHARD, LFS), "a git-LFS pointer", "git lfs pull"),
    bad("C13-html", written(SHARD, "<!DOCTYPE html><html><body>503</body></html>"), "an HTML page"),
    bad("C13-gzip", bytes_of(SHARD, gzip.compress), "gzip-compressed"),
    bad("C13-zip", written(SHARD, b"PK\x03\x04" + bytes(2000)), "a zip archive or a pickle"),
    bad("C13-gguf", written(SHARD, b"GGUF\x03\0\0\0" + bytes(2000)), "a GGUF file"),
    # A bit of a name is another name; a bit of the structure is no structure.
    bad("C14-brace", flipped(b"{", 1), "does not start with '{'"),
    bad("C14-quote", flipped(b'"dtype"', 0), "not JSON"),
    Case("C14-name", flipped(b"norm.weight", 0), 65, ("no such tensor", "norm.weight")),
    bad("C14-length", length(2**40 + 900), "header length"),
    # Without a hash from elsewhere nobody can know that a weight is another.
    runs("C14-data-works", bytes_of(SHARD, lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])),
    Case("C15-missing", every(sharded(), removed(SECOND)), 66, (SECOND, "No such file", "Fetch it again")),
    works("C15-extra-works", every(sharded(), written("other.safetensors", "?")), "1 safetensors files not used"),
    works("C15-total-size-works", indexed(lambda index: index["metadata"].update(total_size=1)), "says total_size 1"),
    Case("C15-absent-tensor", indexed(lambda index: index["weight_map"].update(ghost=FIRST)), 65,
         (FIRST, "ghost", "though the index says so")),
    Case("C15-wrong-shard", indexed(lambda index: index["weight_map"].update({EMBED: SECOND})), 65, (SECOND, EMBED)),
    *(Case(f"C15-weight-map-{id}", indexed(lambda index, value=value: index.update(weight_map=value)), 65,
           (INDEX, "weight_map", "an object of shard names"))
      for id, value in {"null": None, "list": [], "empty": {}, "text": "x"}.items()),
    Case("C15-index-empty", written(INDEX, ""), 65, (INDEX, "empty file")),
    Case("C15-index-fifo", instead(INDEX, os.mkfifo), 66, (INDEX, "a FIFO")),
    Case("C15-index-huge", sparse(INDEX, 1 << 30, b"{"), 65, (INDEX, "larger than 64 MiB limit")),
    Case("C15-no-weights", removed(SHARD), 66, ("model", "no weights", "*.safetensors")),
]  # fmt: skip

NAMES: list[Case] = [
    shard_name("parent", "../outside.safetensors", "outside.safetensors"),
    shard_name("absolute", "/etc/passwd", "/etc/passwd"),
    shard_name("inside", "a/b.safetensors", "model/a/b.safetensors"),
    shard_name("around", "a/../../outside.safetensors", "outside.safetensors"),
    shard_name("backslash", "a\\b.safetensors", "model/a\\b.safetensors"),
    shard_name("drive", "C:\\x.safetensors", "model/C:\\x.safetensors"),
    shard_name("empty", ""),
    shard_name("dot", "."),
    shard_name("dots", ".."),
    shard_name("hidden", ".x.safetensors", "model/.x.safetensors"),
    shard_name("nul", "x\0.safetensors"),
    shard_name("nul-at-the-end", f"{FIRST}\0"),
    shard_name("newline", "x.safetensors\n", "model/x.safetensors\n"),
    shard_name("10MB", "x" * 10**7),
    shard_name("pickle", "pytorch_model.bin", "model/pytorch_model.bin"),
    shard_name("number", 1),
    shard_name("null", None),
    shard_name("list", [FIRST]),
    shard_name("object", {"file": FIRST}),
    works("C17-hub-cache-works", link_into_blobs),
    *(bad(f"C17-{id}", linked(SHARD, target), word, code=66) for id, target, word in (
        ("loop", SHARD, "symbolic links"), ("device", "/dev/zero", "a device"), ("dangling", "gone", "No such file"),
        ("folder", "..", "a folder"))),
    bad("C17-fifo", every(lambda folder: os.mkfifo(folder / "fifo"), linked(SHARD, "fifo")), "a FIFO", code=66),
    bad("C17-unreadable", closed_to_all(SHARD), "Permission denied", code=77, inside=without_privileges),
]  # fmt: skip

RUNNING: list[Case] = [
    changed("C18-truncated", once_opened(cut(SHARD, HALF)), "changed since it was opened"),
    changed("C18-replaced", once_opened(lambda folder: copied(folder / SHARD)), "changed since it was opened"),
    changed("C18-removed", once_opened(removed(SHARD)), "No such file"),
    changed("C18-touched", once_opened(lambda folder: os.utime(folder / SHARD, (0, 0))), "changed since it was opened"),
    changed("C18-truncated-later", once_loaded(cut(SHARD, lambda size: 9000)), "read at offset", "wanted", ple="ssd"),
]  # fmt: skip

CONTENTS: list[Case] = [
    Case("C19-missing", header(lambda head: head.update({"model.layers.0.gone": head.pop(NORM)})), 65,
         (NORM, "no such tensor", "[32]")),
    Case("C19-no-embedding", header(lambda head: head.update(gone=head.pop(EMBED))), 65,
         ("model", "embed_tokens.weight", "no token embedding")),
    Case("C19-two-embeddings", added("x.embed_tokens.weight", "BF16", [1], b"xx"), 65,
         ("model", "embed_tokens.weight", "2 token embeddings")),
    tensor("C19-shape", entry(NORM, shape=[16, 2]), "shape [16, 2]", "[32] by config.json"),
    bad("C19-transposed", header(lambda head: head[EMBED]["shape"].reverse()), EMBED, "by config.json"),
    tensor("C19-int64", entry(NORM, dtype="I64", shape=[8]), "shape [8]"),
    tensor("C19-int16", entry(NORM, dtype="I16"), "I16", "one of BF16, F16, F32"),
    tensor("C19-float8", header(lambda head: head.update(
        {NORM: {"dtype": "F8_E4M3", "shape": [32], "data_offsets": head[NORM]["data_offsets"]}})), "span 64 bytes"),
    Case("C20-one", added("model.layers.0.extra", "U8", [1], b"x"), 65, ("model.layers.0.extra", "no place for")),
    Case("C20-ten-thousand", bytes_of(SHARD, lambda data: with_extras(data, 10_000)), 65,
         ("extra.0", "and 9990 more"), (RUN,)),
    *(Case(f"C21-{name}", pickled(name), 78, (name, "pickle checkpoints are not loaded; convert to safetensors"),
           closed=(f"model/{name}",))
      for name in ("pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "consolidated.00.pth")),
    works("C21-beside-safetensors-works", written("pytorch_model.bin", lambda: pickle.dumps(Canary())),
          closed=("model/pytorch_model.bin",)),
    runs("C22-works", fifteen_hundred, inside=few_descriptors),
    Case("C23-big-endian", nothing, 78, ("model", "big-endian host"), inside=big_endian),
    runs("C23-unaligned-works", header_text(lambda text: text + b" " * (1 + -len(text) % 8))),
]  # fmt: skip

CASES = [*LENGTHS, *ENTRIES, *DOWNLOADS, *NAMES, *RUNNING, *CONTENTS]
