"""B1 to B5: tokenizer.json. The rest of B, chat templates and hostile prompts, is in test_template.py."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from tests.mutations import (
    MIB,
    PLAIN_TOKEN,
    RUN,
    SAY,
    TOKENIZER,
    Case,
    Change,
    closed_to_all,
    cut,
    edited,
    every,
    instead,
    keys,
    linked,
    removed,
    sparse,
    without_privileges,
    written,
)
from tests.small import TOKENS, VOCAB


def bad(id: str, change: Change, *words: str, code: int = 65) -> Case:
    """A tokenizer.json that is refused by name."""
    return Case(id, change, code, (TOKENIZER, *words), (RUN,), warm=True)


def runs(id: str, change: Change) -> Case:
    """A tokenizer.json that is odd, and does no harm."""
    return Case(id, change, 0, ('"tokens": [',), (SAY,), warm=True)


def model(**values: Any) -> Change:
    """Another model inside tokenizer.json."""
    return keys(TOKENIZER, model={"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"], **values})


def vocab(change: Callable[[dict[str, Any]], object]) -> Change:
    """Other ids in the vocabulary."""
    return edited(TOKENIZER, lambda data: change(data["model"]["vocab"]))


def token(id: int, content: str, special: bool = True) -> Change:
    """One more token."""
    one = {"id": id, "content": content, "special": special, **PLAIN_TOKEN}
    return edited(TOKENIZER, lambda data: data["added_tokens"].append(one))


TEMPLATE = {"type": "TemplateProcessing", "pair": [], "special_tokens": {}}
UNKNOWN = [{"SpecialToken": {"id": "<nobody>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]

TOO_MANY = (f"{VOCAB + 1} tokens", f"vocab_size={VOCAB}")

FILES: list[Case] = [
    bad("B1-missing", removed(TOKENIZER), "not there", code=66),
    bad("B1-empty", written(TOKENIZER, b"")),
    bad("B1-truncated", cut(TOKENIZER, lambda size: size // 2)),
    bad("B1-truncated-by-one", cut(TOKENIZER, lambda size: size - 1)),
    bad("B1-500MB", sparse(TOKENIZER, 500 * MIB, b'{"version": "'), "larger than 256 MiB limit"),
    bad("B1-folder", instead(TOKENIZER, lambda path: path.mkdir()), "a folder", code=66),
    bad("B1-fifo", instead(TOKENIZER, os.mkfifo), "a FIFO", code=66),
    bad("B1-device", linked(TOKENIZER, "/dev/zero"), "a device", code=66),
    bad("B1-lfs", written(TOKENIZER, "version https://git-lfs.github.com/spec/v1\n")),
    bad("B1-html", written(TOKENIZER, "<!DOCTYPE html>")),
    bad("B1-not-utf8", written(TOKENIZER, b'{"version": "\xff"}')),
    bad("B1-utf16", written(TOKENIZER, "{}".encode("utf-16"))),
    bad("B1-list", written(TOKENIZER, "[]")),
    bad("B1-empty-object", written(TOKENIZER, "{}")),
    bad("B1-deep", written(TOKENIZER, b'{"model":' * 100_000)),
    bad("B1-control-characters", model(type="\x1b[31m\n")),
    Case("B1-unreadable", closed_to_all(TOKENIZER), 77, (TOKENIZER, "Permission denied"), (RUN,), warm=True,
         inside=without_privileges),
]  # fmt: skip

# Each of these panics in the Rust side, at a place of its own.
PANICS: dict[str, dict[str, Any]] = {
    "charsmap": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "charsmap-short": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAAAA=="}},
    "replace": {"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "x"}},
    "prepend": {"normalizer": {"type": "Prepend", "prepend": ""}},
    "length-0": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "unknown-special": {"post_processor": {**TEMPLATE, "single": UNKNOWN}},
    "strip": {"decoder": {"type": "Strip", "content": "a", "start": 1, "stop": 1}},
    "strip-100": {"decoder": {"type": "Strip", "content": "a", "start": 100, "stop": 100}},
}
PADDING = {"direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}
PREFIX = "continuing_subword_prefix"
RUST: list[Case] = [
    *(bad(f"B2-{id}", keys(TOKENIZER, **values)) for id, values in PANICS.items()),
    # The first panics. The second aborts the process: the error message would be cut inside a character.
    bad("B2-prefix-longer-than-a-merge", model(continuing_subword_prefix="####"), PREFIX, code=78),
    bad("B2-prefix-inside-a-character", model(continuing_subword_prefix="x", merges=["a é"], vocab={"a": 0, "é": 1}),
        PREFIX, code=78),
    bad("B2-prefix-spelt-otherwise", written(TOKENIZER, r'{"model": {"c\u006Fntinuing_subword_prefix" : "x"}}'), PREFIX,
        code=78),
    # What a file asks for here is switched off before it is tried: the first would abort, the second panic.
    runs("B2-padding-of-a-terabyte-works", keys(TOKENIZER, padding={**PADDING, "strategy": {"Fixed": 10**12}})),
    runs("B2-stride-works", keys(TOKENIZER, truncation={"direction": "Right", "max_length": 4, "stride": 9,
                                                        "strategy": "LongestFirst"})),
]  # fmt: skip

VOCABULARIES: list[Case] = [
    bad("B3-negative", vocab(lambda v: v.update(a=-1))),
    bad("B3-fraction", vocab(lambda v: v.update(a=1.5))),
    bad("B3-text", vocab(lambda v: v.update(a="1"))),
    bad("B3-2^32", vocab(lambda v: v.update(a=2**32))),
    bad("B3-2^31", vocab(lambda v: v.update(a=2**31)), "vocab", "no id of their own"),
    bad("B3-twice", vocab(lambda v: v.update(a=v["b"])), "vocab", "no id of their own"),
    bad("B3-gap-past-the-embedding", vocab(lambda v: v.update(zzz=VOCAB)), *TOO_MANY),
    # Padded vocabularies have gaps; an id that stands for nothing decodes to nothing.
    runs("B3-gap-works", vocab(lambda v: v.update(zzz=VOCAB - 1))),
    bad("B4-absent-token", edited(TOKENIZER, lambda d: d["model"]["merges"].append(["zz", "yy"]))),
    bad("B4-absent-result", edited(TOKENIZER, lambda d: d["model"]["merges"].append(["!", "!"]))),
    bad("B4-one-part", edited(TOKENIZER, lambda d: d["model"]["merges"].append(["a"]))),
    bad("B4-no-merge", edited(TOKENIZER, lambda d: d["model"]["merges"].append("ab"))),
    runs("B5-empty-content-works", token(TOKENS, "")),
    runs("B5-megabyte-works", token(TOKENS, "x" * 10**6)),
    bad("B5-special-past-the-embedding", every(vocab(lambda v: v.update(zz=VOCAB)), token(VOCAB, "zz")), *TOO_MANY),
    # An id that the vocabulary does not have is not believed: the token gets the next free one.
    runs("B5-id-of-its-own-works", token(2**32 - 1, "<last>")),
    bad("B5-negative", token(-5, "<x>")),
    bad("B5-no-content", edited(TOKENIZER, lambda d: d["added_tokens"].append({"id": TOKENS}))),
]  # fmt: skip

CASES = [*FILES, *RUST, *VOCABULARIES]
