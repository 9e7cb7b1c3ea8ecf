"""tokenizer.json read piece by piece: its vocabulary and merges never exist as Python objects of their own.

``json.loads`` of a file with 262144 tokens and half a million merges takes 400 MB. Here the two are cut out of the
bytes, the rest (a few added tokens, the pipeline) is parsed as usual, and they are read item by item.
"""

from __future__ import annotations

import json
import re
from array import array
from dataclasses import dataclass
from typing import Any

from loaders.errors import BadCheckpoint, Unsupported
from loaders.formats.config import parse_json

Span = tuple[int, int]

_STRING = rb'"([^"\\\x00-\x1f]*+(?:\\.[^"\\\x00-\x1f]*+)*+)"'
_ANY = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_KEY = re.compile(rb"\s*+" + _STRING + rb"\s*+:\s*+")
_NEXT = re.compile(rb"\s*+([,}\]])")
_OPEN = re.compile(rb"\s*+([{\[])")
_SCALAR = re.compile(_ANY + rb"|[-+.\w]++", re.DOTALL)
_FLAT = rb'[^"\[\]{}]*+(?:' + _ANY + rb'[^"\[\]{}]*+)*+'
# Up to the next bracket that is not that of a flat list: merges are half a million of those.
_NESTED = re.compile(_FLAT + rb"(?:\[" + _FLAT + rb"\]" + _FLAT + rb")*+([\[\]{}])", re.DOTALL)
_ENTRY = re.compile(rb"\s*+" + _STRING + rb"\s*+:\s*+(0|[1-9]\d{0,9})\s*+([,}])")
_PAIR = re.compile(rb"\s*+\[\s*+" + _STRING + rb"\s*+,\s*+" + _STRING + rb"\s*+\]\s*+([,\]])")
_LINE = re.compile(rb"\s*+" + _STRING + rb"\s*+([,\]])")


@dataclass(frozen=True)
class Pieces:
    """``rest``: the file with an empty vocabulary and no merges. The spans are what lay between the brackets."""

    rest: dict[str, Any]
    vocab: Span
    merges: Span


def cut(data: bytes, file: str) -> Pieces:
    """Raises BadCheckpoint for what is not JSON, Unsupported without a BPE model's vocabulary and merges in it."""
    model = _members(data, re.match(rb"(?:\xef\xbb\xbf)?", data).end(), file).get(b"model")  # type: ignore[union-attr]
    inner = _members(data, model[0], file) if model and data[model[0] : model[0] + 1] == b"{" else {}
    spans = [inner.get(b"vocab"), inner.get(b"merges")]
    if any(s is None or data[s[0] : s[0] + 1] != o for s, o in zip(spans, (b"{", b"["), strict=True)):
        parse_json(data, file)  # a file that is not even JSON is said to be that
        raise Unsupported("no vocabulary and merges in it", file=file, field="model", expected="a BPE model")
    (a, b), (c, d) = [(s[0] + 1, s[1] - 1) for s in spans if s]
    (low, high), (low2, high2) = sorted([(a, b), (c, d)])
    rest = parse_json(data[:low] + data[high:low2] + data[high2:], file)
    found = rest.get("model")
    if not isinstance(found, dict) or found.get("vocab") != {} or found.get("merges") != []:
        raise BadCheckpoint("its parts lie one inside another", file=file, field="model")
    return Pieces(rest, (a, b), (c, d))


def _members(data: bytes, at: int, file: str) -> dict[bytes, Span]:
    """Where the values of the object at ``at`` lie; their own insides are only skipped."""
    start, out = _OPEN.match(data, at), dict[bytes, Span]()
    if start is None or start[1] != b"{":
        return out
    at = start.end()
    while (key := _KEY.match(data, at)) is not None:
        end = _skip(data, key.end())
        after = _NEXT.match(data, end)
        if after is None:
            break
        out[key[1]] = (key.end(), end)
        if after[1] != b",":
            break
        at = after.end()
    return out


def _skip(data: bytes, at: int) -> int:
    if data[at : at + 1] not in (b"{", b"["):
        found = _SCALAR.match(data, at)
        return found.end() if found else at
    depth = 1
    for token in _NESTED.finditer(data, at + 1):
        depth += 1 if token[1] in (b"{", b"[") else -1
        if depth == 0:
            return token.end()
    return len(data)


def _text(raw: bytes, file: str) -> bytes:
    if b"\\" in raw:
        try:
            return str(json.loads(b'"' + raw + b'"')).encode()
        except ValueError:  # not an escape, or a lone surrogate
            raise BadCheckpoint("a string with a wrong escape", file=file, field="model") from None
    return raw


def read_vocab(data: bytes, span: Span, file: str) -> dict[bytes, int]:
    """token -> id, in the order of the file. Raises BadCheckpoint, Unsupported for a token that is there twice."""
    out: dict[bytes, int] = {}
    at, end, last = span[0], span[1], b","
    while last == b",":
        found = _ENTRY.match(data, at, end + 1)
        if found is None:
            break
        token, last, at = _text(found[1], file), found[3], found.end()
        if token in out or not token:
            raise Unsupported("a token that is empty or there twice", file=file, field="model.vocab")
        out[token] = int(found[2])
    if (out or data[span[0] : end].strip()) and (at != end + 1 or last != b"}"):
        raise BadCheckpoint(f"no token and id at byte {at}", file=file, field="model.vocab")
    return out


def read_merges(
    data: bytes, span: Span, vocab: dict[bytes, int], file: str
) -> tuple[array[int], array[int], array[int]]:
    """(left, right, merged) ids in order of rank. Raises BadCheckpoint for one that is no merge of two tokens."""
    left, right, merged = array("I"), array("I"), array("I")
    at, end, last = span[0], span[1], b","
    pairs = _PAIR.match(data, at, end + 1) is not None
    while last == b",":
        found = (_PAIR if pairs else _LINE).match(data, at, end + 1)
        if found is None:
            break
        last, at = found[found.lastindex or 0], found.end()
        if pairs:
            a, b = _text(found[1], file), _text(found[2], file)
        else:
            line = _text(found[1], file)
            if line.startswith(b"#version"):
                continue
            a, blank, b = line.partition(b" ")
            if not blank or b" " in b:
                raise BadCheckpoint(f"merge {len(left)} is not two tokens", file=file, field="model.merges")
        try:
            left.append(vocab[a])
            right.append(vocab[b])
            merged.append(vocab[a + b])
        except KeyError:
            raise BadCheckpoint(f"merge {len(merged)} of unknown tokens", file=file, field="model.merges") from None
    if data[span[0] : end].strip() and (at != end + 1 or last != b"]"):
        raise BadCheckpoint(f"no merge at byte {at}", file=file, field="model.merges")
    return left, right, merged
