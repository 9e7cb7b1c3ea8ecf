"""Compiled vocabularies: what is refused when one is made or opened, and how little memory an open one takes."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from loaders.errors import BadCheckpoint, EdgeError, MissingFile, Unsupported
from loaders.text.compact import CompactTokenizer, resident_bytes
from loaders.text.compact_file import HEAD, SECTIONS
from loaders.text.tokenizer import Tokenizer
from loaders.text.vocab import compile_vocab
from tests.test_compact import BYTES, PIPELINES, compiled, gemma, opened, streamed
from tests.test_tokenizer import NASTY, SPECIALS, wordlevel

# Compiling


def edited(name: str, **changes: Any) -> bytes:
    data = json.loads(PIPELINES[name]().to_str())
    for key, value in changes.items():
        at = data
        *path, last = key.split("__")
        for part in path:
            at = at[part]
        at[last] = value
    return json.dumps(data).encode()


LOWERCASE = {"type": "Lowercase"}
OTHER_SPLIT = {"type": "Split", "pattern": {"Regex": r"\p{L}+"}, "behavior": "Removed", "invert": False}
UNKNOWN_PATTERN = {"type": "Split", "pattern": {"Regex": r"(a+)+\b"}, "behavior": "Isolated", "invert": False}
OTHER_ID = {"id": 9999, "content": "<new>", "special": True}
OTHER_ID |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
CANNOT: list[tuple[str, dict[str, Any]]] = [
    ("normalizer", {"normalizer": LOWERCASE}),
    ("pre_tokenizer", {"pre_tokenizer": OTHER_SPLIT}),
    ("pre_tokenizer", {"pre_tokenizer": UNKNOWN_PATTERN}),
    ("decoder", {"decoder": {"type": "CTC", "pad_token": "a", "word_delimiter_token": "b", "cleanup": True}}),
    ("decoder", {"decoder": {"type": "Strip", "content": " ", "start": 0, "stop": 1}}),
    ("post_processor", {"post_processor": {"type": "BertProcessing", "sep": ["<eos>", 1], "cls": ["<bos>", 2]}}),
    ("model.dropout", {"model__dropout": 0.5}),
    ("model.end_of_word_suffix", {"model__end_of_word_suffix": "</w>"}),
    ("model.unk_token", {"model__unk_token": "<none>"}),
    ("added_tokens", {"added_tokens": [OTHER_ID]}),
]


@pytest.mark.parametrize(("field", "changes"), CANNOT)
def test_what_is_not_covered_is_named(field: str, changes: dict[str, Any]) -> None:
    with pytest.raises(Unsupported) as caught:
        compile_vocab(edited("gpt2", **changes), "tokenizer.json")
    assert caught.value.field == field


def test_other_models_and_bad_files_are_refused() -> None:
    with pytest.raises(Unsupported):
        compile_vocab(wordlevel().to_str().encode(), "tokenizer.json")
    whole = PIPELINES["gemma"]().to_str().encode()
    broken = [b"", b"[]", b"{", whole[:-1], whole[: len(whole) // 2], whole.replace(b'"merges":[[', b'"merges":[5,[')]
    broken += [whole.replace(b"ick", b"\xff\xff"), edited("gemma", model__merges=[["no", "such"]])]
    broken += [edited("gpt2", added_tokens=[{"id": 0}]), edited("gpt2", normalizer={"type": "What"})]
    for data in broken:
        with pytest.raises((BadCheckpoint, Unsupported)):
            compile_vocab(data, "tokenizer.json")


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("turned", [True, False])
def test_every_spelling_of_the_json_compiles_to_the_same(indent: int | None, legacy: bool, turned: bool) -> None:
    vocab = {t: i for i, t in enumerate(['"', "\\", "[{", "}]", "é", '"\\', "é\n", "\n", '"\\é\n', "[{}]"])}
    merges: list[Any] = [['"', "\\"], ["é", "\n"], ['"\\', "é\n"], ["[{", "}]"]]
    data = json.loads(gemma().to_str()) | {"added_tokens": [], "post_processor": None}
    plain = {**data["model"], "unk_token": None, "vocab": vocab, "merges": merges}
    want = compile_vocab(json.dumps({**data, "model": plain}, ensure_ascii=False).encode(), "a")
    model = {**plain, "merges": [" ".join(pair) for pair in merges] if legacy else merges}
    model = dict(reversed(model.items())) if turned else model
    assert compile_vocab(json.dumps({**data, "model": model}, indent=indent).encode(), "b") == want


# Damaged and hostile files


def sealed(data: bytes) -> bytes:
    out = bytearray(data)
    struct.pack_into("<I", out, 8, zlib.crc32(memoryview(out)[12:]))
    return bytes(out)


PLACES = f"<{2 * len(SECTIONS)}Q"


def places(data: bytes) -> tuple[int, ...]:
    """Offset and length of each section."""
    return struct.unpack_from(PLACES, data, HEAD.size - struct.calcsize(PLACES))


def usable(path: Path, data: bytes) -> bool:
    """Whether it opens; whatever it then says, nothing but edge's own errors may come out."""
    try:
        tokenizer = opened(path, data)
        ids = tokenizer.encode_spans(NASTY + " the quick 123 \u0301é!")[0]
        assert streamed(tokenizer, ids)
        tokenizer.decode(range(tokenizer.vocab_size))
    except EdgeError:
        return False
    return True


def test_not_there_and_not_one(tmp_path: Path) -> None:
    with pytest.raises(MissingFile):
        CompactTokenizer.open(tmp_path / "none")
    for data in (b"", b"EDGEBPE\0", bytes(HEAD.size), b"{}" * 500):
        with pytest.raises(BadCheckpoint):
            opened(tmp_path / "bad", data)
        with pytest.raises(BadCheckpoint):
            resident_bytes(tmp_path / "bad")


@pytest.mark.parametrize("name", ["qwen", "gemma"])
def test_cut_files_are_refused(tmp_path: Path, name: str) -> None:
    data = compiled(name)
    for size in {*range(0, HEAD.size + 40, 5), *range(0, len(data), len(data) // 49), len(data) - 1}:
        for cut in (data[:size], sealed(data[:size]) if size > 12 else b"", data[:size] + data[size + 1 :]):
            with pytest.raises(BadCheckpoint):
                opened(tmp_path / "cut", cut)
    with pytest.raises(BadCheckpoint):
        opened(tmp_path / "long", sealed(data + b"\0"))


@pytest.mark.parametrize("name", ["qwen", "gemma", "flags"])
@given(data=st.data())
@settings(max_examples=50, deadline=None)
def test_a_changed_byte_is_noticed_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "changed"
    good = compiled(name)
    numbers = places(good)
    spans = zip(numbers[::2], numbers[1::2], strict=True)
    start, length = data.draw(st.sampled_from([(0, HEAD.size), *spans]))
    at = start + data.draw(st.integers(0, max(length - 1, 0)))
    bad = bytearray(good)
    bad[at] = data.draw(st.integers(0, 255).filter(lambda b: b != good[at]))
    with pytest.raises(BadCheckpoint):
        opened(path, bytes(bad))
    usable(path, sealed(bytes(bad)))  # one that took the trouble to get the checksum right


ODD = st.sampled_from(
    [None, True, -1, 2**31, 10**30, 1.5, "", "a", "\ud800", "(", r"\p{Xx}", [], {}, [[]], [["split", "("]]]
)


@pytest.mark.parametrize("name", ["qwen", "gemma", "flags", "mistral"])
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_a_hostile_pipeline_is_refused_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    good = compiled(name)
    start, length, *rest = places(good)
    pipeline = json.loads(good[start : start + length])
    at: Any = pipeline
    while True:
        key = data.draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
        if not isinstance(at[key], dict | list) or not at[key] or data.draw(st.integers(0, 3)) == 0:
            break
        at = at[key]
    at[key] = data.draw(ODD)
    spelt = json.dumps(pipeline).encode()
    spelt += b" " * (-(len(spelt) - length) % 8)  # the other sections move by whole words
    moved = [offset + len(spelt) - length if n % 2 == 0 else offset for n, offset in enumerate(rest)]
    head = bytearray(good[: HEAD.size])
    struct.pack_into(PLACES, head, HEAD.size - struct.calcsize(PLACES), start, len(spelt), *moved)
    usable(tmp_path_factory.getbasetemp() / "hostile", sealed(bytes(head) + spelt + good[start + length :]))


# Memory


def gemma_sized() -> dict[str, Any]:
    """262144 tokens and as many merges as they allow: stems, pairs of stems, each put together in several ways."""
    stems = [a + b + c for a in "bcdfghklmnprstvwz" for b in "aeiou" for c in "lmnrst"]
    data = json.loads(gemma().to_str())
    words = [*SPECIALS, "<unk>", *BYTES, *(f"<unused{i}>" for i in range(6000)), *map(chr, range(0x4E00, 0x5600))]
    vocab = {word: at for at, word in enumerate([*words, *"abcdefghijklmnopqrstuvwxyz0123456789.,▁"])}
    pairs = [pair for s in stems for pair in ((s[0], s[1]), (s[:2], s[2]), (s[1], s[2]), (s[0], s[1:]), ("▁", s))]
    pairs += [(s, c) for s in stems for c in "bcdfghklmnprstvwz"]
    twice = ((x, y) for x in stems for y in stems)
    pairs += [p for x, y in twice for p in ((x, y), (x + y[0], y[1:]), ("▁" + x, y), ("▁", x + y))]
    merges = []
    for a, b in pairs:
        if len(vocab) < 262_144 or a + b in vocab:
            vocab.setdefault(a + b, len(vocab))
            merges.append((a, b))
    assert len(merges) > 480_000
    data["model"] |= {"vocab": vocab, "merges": merges}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [t for t in vocab if t in SPECIALS or t.startswith("<un")]
    data["added_tokens"] = [{"id": vocab[t], "content": t, "special": t in SPECIALS, **flags} for t in added]
    return data


CHILD = """
import re, sys
import numpy
def peak(): return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10
before = peak()
from loaders.text.compact import CompactTokenizer
tokenizer = CompactTokenizer.open(sys.argv[1])
text = " ".join(sys.argv[2].split() * 4000)
ids = tokenizer.encode(text)
assert tokenizer.decode(ids) == text and "tokenizers" not in sys.modules
print(peak() - before, len(ids))
"""


def test_a_gemma_sized_vocabulary_takes_little_memory(tmp_path: Path) -> None:
    data = json.dumps(gemma_sized(), ensure_ascii=False).encode()
    path = tmp_path / "vocab"
    compact = opened(path, compile_vocab(data, "gemma"))
    assert compact.vocab_size == 262_144
    text = "the balbel  bin  mon zut<unused7>\n丁下 123 wesbal, é 🎉"
    out = subprocess.run([sys.executable, "-c", CHILD, path, text], capture_output=True, text=True, check=True).stdout
    grown, count = map(int, out.split())
    assert count > 50_000
    assert grown < 60 << 20
    assert path.stat().st_size < resident_bytes(path) == resident_bytes(compact) < 40 << 20
    library = Tokenizer(tokenizers.Tokenizer.from_buffer(data))
    assert compact.encode_spans(text * 20) == library.encode_spans(text * 20)
