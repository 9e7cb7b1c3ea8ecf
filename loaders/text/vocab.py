"""tokenizer.json -> a compiled vocabulary. The only part of the compact tokenizer that needs the tokenizers library."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import numpy.typing as npt

from loaders.errors import BadCheckpoint, Unsupported
from loaders.formats.config import show
from loaders.text import compact_unicode
from loaders.text.compact_file import HIDDEN, MAX_IDS, MODEL, PRESENT, pack
from loaders.text.compact_json import cut, read_merges, read_vocab
from loaders.text.compact_regex import WHITE, used
from loaders.text.tokenizer import clean, rust, silent

MAX_CONTENT = 1024  # characters of an added token
Json = dict[str, Any]
Numbers = npt.NDArray[np.uint32]
BYTE_LEVEL = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # of use_regex
_FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")


def compile_vocab(data: bytes, file: str) -> bytes:
    """``data``, a whole tokenizer.json, as a file for ``CompactTokenizer.open``. ``file`` is for messages.

    Raises BadCheckpoint for a file that is damaged, Unsupported for one with a part that only the tokenizers library
    can do; the part is named.
    """
    pieces = cut(data, file)
    given = _added_tokens(pieces.rest.pop("added_tokens", None) or [], file)
    inner = _empty(pieces.rest, file)
    # as the library spells it, every default filled in
    compiler = _Compiler(file, {**json.loads(inner.to_str()), "added_tokens": given}, inner.normalizer)
    meta = compiler.pipeline()
    vocab = read_vocab(data, pieces.vocab, file)
    last = max(vocab.values(), default=-1)
    if last >= min(4 * len(vocab) + 65536, MAX_IDS) or len(set(vocab.values())) != len(vocab):
        raise Unsupported("ids with large gaps, or one id for two tokens", file=file, field="model.vocab")
    meta["model"] = compiler.model(vocab)
    left, right, merged = (np.frombuffer(a, np.uint32) for a in read_merges(data, pieces.merges, vocab, file))
    tokens, forms = compiler.added(given, vocab)
    ids = max([last, *tokens]) + 1
    if max([*meta["post"]["before"], *meta["post"]["after"], 0]) >= max(ids, 1):
        raise Unsupported("an id beyond the vocabulary", file=file, field="post_processor")
    strings, flags = [b""] * ids, np.zeros(ids, np.uint8)
    for token, at in vocab.items():
        strings[at] = token
    flags[list(vocab.values())] = PRESENT | MODEL
    del vocab
    special = {token["content"] for token in tokens.values() if token["special"]}
    for at, entry in tokens.items():
        strings[at] = entry["content"].encode()
        flags[at] |= PRESENT | (HIDDEN if forms.get(at, entry["content"]) in special else 0)
    meta["cut"] = compiler.cuts(meta, strings, merged)
    meta["added"] = [[at, entry["content"], *(entry[f] for f in _FLAGS)] for at, entry in sorted(tokens.items())]
    meta["forms"] = [[at, form] for at, form in sorted(forms.items())]
    kept = _last_of_each(left, right)
    arrays: dict[str, bytes | npt.NDArray[Any]] = {
        "meta": json.dumps(meta, separators=(",", ":")).encode(),
        "flags": flags,
        "blob": _joined(strings, file),
        "ends": np.cumsum([len(s) for s in strings]).astype(np.uint32),
        "order": np.array(sorted(np.flatnonzero(flags).tolist(), key=strings.__getitem__), np.uint32),
        "rows": np.append(0, np.cumsum(np.bincount(left[kept], minlength=ids))).astype(np.uint32),
        "right": right[kept],
        "rank": kept.astype(np.uint32),
        "new": merged[kept],
    }
    return pack(arrays, ids, len(kept), len(tokens))


def _joined(strings: list[bytes], file: str) -> bytes:
    for token in strings:
        try:
            token.decode()
        except UnicodeDecodeError as error:
            raise BadCheckpoint(f"a token is not UTF-8: {error.reason}", file=file, field="model.vocab") from None
    return b"".join(strings)


def _added_tokens(given: Any, file: str) -> list[Json]:
    tokens: list[Any] = given if isinstance(given, list) else [None]
    for token in tokens:
        sound = isinstance(token, dict) and isinstance(token.get("content"), str) and type(token.get("id")) is int
        if not sound or any(not isinstance(token.get(flag), bool) for flag in _FLAGS):
            raise BadCheckpoint(show(token), file=file, field="added_tokens", expected="id, content and five flags")
        if clean(token["content"]) != token["content"]:
            raise BadCheckpoint("a lone surrogate", file=file, field="added_tokens")
    return tokens


def _last_of_each(left: Numbers, right: Numbers) -> npt.NDArray[np.intp]:
    """Where each pair stands, sorted by (left, right): of a pair that is there twice, the library takes the last."""
    key = left.astype(np.uint64) << np.uint64(32) | right
    order = np.argsort(key, kind="stable")
    key = key[order]
    return order[np.append(key[1:] != key[:-1], True)] if len(key) else order


def _empty(rest: Json, file: str) -> Any:
    """The library's own reading of all but vocabulary, merges and added tokens."""
    import tokenizers

    with silent(), rust(file):
        return tokenizers.Tokenizer.from_str(json.dumps({**rest, "added_tokens": []}))


class _Compiler:
    """Turns the parts of a tokenizer.json into what ``loaders.text.compact`` can do, or says which it cannot."""

    def __init__(self, file: str, rest: Json, normalizer: Any) -> None:
        self.file, self.rest, self._normalizer = file, rest, normalizer

    def no(self, field: str, found: object) -> Unsupported:
        text = found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)
        return Unsupported(text[:200], file=self.file, field=field, hint="The tokenizers library can do it.")

    def pipeline(self) -> Json:
        """Everything but the model and the added tokens."""
        normalizer = [self._normalise(step) for step in self._flat("normalizer", "normalizers")]
        pre = [simple for step in self._flat("pre_tokenizer", "pretokenizers") for simple in self._pre(step)]
        if ["bytes"] in pre[:-1]:
            raise self.no("pre_tokenizer", "steps after ByteLevel")
        if ["nfc"] in normalizer and (len(normalizer) > 1 or any(step[0] == "prefix" and step[2] for step in pre)):
            raise self.no("normalizer", "NFC together with steps that count characters")
        return {
            "normalizer": normalizer,
            "pre": pre,
            "classes": self._classes(normalizer, pre),
            "decoder": self._decoder(),
            "post": self._post(),
        }

    def _flat(self, part: str, inner: str) -> list[Json]:
        def walk(step: Any) -> list[Json]:
            if step is None:
                return []
            return [s for x in step[inner] for s in walk(x)] if step["type"] == "Sequence" else [step]

        return walk(self.rest[part])

    def _classes(self, normalizer: list[list[str]], pre: list[list[Any]]) -> dict[str, list[tuple[int, int]]]:
        needed = {name for step in pre if step[0] == "split" for name in self._used(step[1])}
        tables = compact_unicode.classes() if needed else {}
        classes = {name: tables[name] for name in sorted(needed)}
        if any(step[0] == "digits" for step in pre):
            classes["digits"] = compact_unicode.digits()
        if ["nfc"] in normalizer:
            classes["inert"] = compact_unicode.inert()
        if any(token.get("single_word") for token in self.rest["added_tokens"]):
            classes["word"] = compact_unicode.letters()
        return classes

    def _used(self, pattern: str) -> set[str]:
        try:
            compact_unicode.proved(pattern)
        except Unsupported as error:
            raise self.no("pre_tokenizer", str(error.found)) from None
        return used(pattern)

    def _normalise(self, step: Json) -> list[str]:
        kind, old = step["type"], step.get("pattern", {}).get("String", "")
        if kind == "NFC":
            return ["nfc"]
        if kind == "Prepend" and step["prepend"]:
            return ["prepend", step["prepend"]]
        if kind == "Replace" and len(old) == len(step["content"]) == 1:
            return ["replace", old, step["content"]]
        raise self.no("normalizer", step)

    def _pre(self, step: Json) -> list[list[Any]]:
        kind, pattern = step["type"], step.get("pattern", {})
        if kind == "ByteLevel":
            first = [["prefix", " ", False]] if step["add_prefix_space"] else []
            return [*first, *([["split", BYTE_LEVEL]] if step["use_regex"] else []), ["bytes"]]
        if kind == "Digits":
            return [["digits", step["individual_digits"]]]
        if kind == "Metaspace":
            blank, scheme = step["replacement"], step["prepend_scheme"]
            first = [] if scheme == "never" else [["prefix", blank, scheme == "first"]]
            return [["replace", " ", blank], *first, *([["before", blank]] if step["split"] else [])]
        if kind == "Split" and step["invert"] is False:
            if "Regex" in pattern and step["behavior"] == "Isolated":
                return [["split", pattern["Regex"]]]
            if len(pattern.get("String", "")) == 1 and step["behavior"] == "MergedWithPrevious":
                return [["after", pattern["String"]]]
        raise self.no("pre_tokenizer", step)

    def _decoder(self) -> list[Json] | None:
        whole: Any = self.rest["decoder"]
        if whole is None:
            return None
        steps: list[Json] = whole.get("decoders", [whole])
        for step in steps:
            kind = step["type"]
            replaces = kind == "Replace" and step["pattern"].get("String")
            strips = kind == "Strip" and step["stop"] == 0
            if not (replaces or strips or kind in ("ByteLevel", "ByteFallback", "Fuse", "Metaspace")):
                raise self.no("decoder", step)
        return steps

    def _post(self) -> Json:
        before: list[int] = []
        after: list[int] = []
        trim: list[bool] = []
        for step in self._flat("post_processor", "processors"):
            if step["type"] == "ByteLevel":
                trim += [step["add_prefix_space"]] if step["trim_offsets"] else []
                continue
            single = [piece.get("SpecialToken") for piece in step.get("single", [])]
            if step["type"] != "TemplateProcessing" or single.count(None) != 1 or before or after:
                raise self.no("post_processor", step)
            if any(piece.get("Sequence", {"id": "A"})["id"] != "A" for piece in step["single"]):
                raise self.no("post_processor", step)
            known = step["special_tokens"]
            if lost := [piece["id"] for piece in single if piece and piece["id"] not in known]:
                found = f"{show(lost[0])} is none of its special tokens"
                raise BadCheckpoint(found, file=self.file, field="post_processor")
            ids: list[list[int]] = [known[piece["id"]]["ids"] if piece else [] for piece in single]
            at = single.index(None)
            before, after = [i for own in ids[:at] for i in own], [i for own in ids[at:] for i in own]
        return {"before": before, "after": after, "trim": trim}

    def model(self, vocab: dict[bytes, int]) -> Json:
        """The flags of the BPE model."""
        model = self.rest["model"]
        for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            if model[key]:
                raise self.no(f"model.{key}", show(model[key]))
        unknown: Any = model["unk_token"]
        if unknown is not None and unknown.encode() not in vocab:
            raise self.no("model.unk_token", "not in the vocabulary")
        self.every_byte = model["byte_fallback"] and all(f"<0x{b:02X}>".encode() in vocab for b in range(256))
        return {
            "unknown": -1 if unknown is None else vocab[unknown.encode()],
            "fuse": model["fuse_unk"],
            "fallback": model["byte_fallback"],
            "whole": model["ignore_merges"],
        }

    def cuts(self, meta: Json, strings: list[bytes], merged: Numbers) -> list[str] | None:
        """[blank, the characters that a merge may join to a blank behind them]; None if text may not be cut there."""
        steps = [*meta["normalizer"], *meta["pre"]]
        blank = next((step[2] for step in steps if step[0] == "replace"), None)
        if blank is None or not self.every_byte or meta["model"]["whole"]:
            return None
        pattern = re.compile(f"([^{re.escape(blank)}]){re.escape(blank)}")
        made = {at for at in merged.tolist() if strings[at].rfind(blank.encode()) > 0}
        glued = {c for at in made for c in pattern.findall(strings[at].decode(errors="replace"))}
        return [blank, "".join(sorted(glued))] if len(glued) <= 4096 else None

    def added(self, given: list[Json], vocab: dict[bytes, int]) -> tuple[dict[int, Json], dict[int, str]]:
        """id -> added token, and id -> what the normalizer makes of it where that is something else."""
        out: dict[int, Json] = {}
        following = len(vocab)
        for token in given:
            content = token["content"]
            if not content:
                continue
            old = vocab.get(content.encode())
            at = following if old is None else old
            if at != token["id"] or at in out or at >= MAX_IDS:
                raise self.no("added_tokens", f"id {token['id']} of {show(content)}, which the library makes {at}")
            following += old is None
            out[at] = token
        forms = {}
        for at, token in out.items():
            form = token["content"]
            if token["normalized"] and self._normalizer is not None:
                form = self._normalizer.normalize_str(form)
            if not 0 < len(form) <= MAX_CONTENT:
                raise self.no("added_tokens", f"{len(form)} characters in id {at}")
            if form != token["content"]:
                forms[at] = form
        self._clear(out, forms)
        return out, forms

    def _clear(self, tokens: dict[int, Json], forms: dict[int, str]) -> None:
        for kind in (False, True):
            some = {at: token for at, token in tokens.items() if token["normalized"] is kind}
            texts = [forms[at] if at in forms else str(token["content"]) for at, token in some.items()]
            if len(set(texts)) < len(texts):
                raise self.no("added_tokens", "two that look the same")
            if any(token["rstrip"] for token in some.values()) and any(text[0] in WHITE for text in texts):
                raise self.no("added_tokens", "rstrip next to a token that begins with a blank")
