"""The pipeline of a compiled vocabulary: checked, then made into steps. The file may come from anyone."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from loaders.errors import BadCheckpoint, Unsupported
from loaders.formats.config import parse_json
from loaders.text import bpe
from loaders.text.compact_file import Vocab
from loaders.text.compact_regex import MAX_PATTERN, Ranges, charset, translate, used

Json = dict[str, Any]
_ID, _CHAR, _TEXT = "an id", "a character", "a text"
_FORM: Json = {
    "normalizer": [list],
    "pre": [list],
    "classes": {},
    "decoder": Any,
    "post": {"before": [_ID], "after": [_ID], "trim": [bool]},
    "model": {"unknown": int, "fuse": bool, "fallback": bool, "whole": bool},
    "cut": Any,
    "added": [(_ID, _TEXT, bool, bool, bool, bool, bool)],
    "forms": [(_ID, _TEXT)],
}
_STEPS: dict[str, tuple[Any, ...]] = {
    "nfc": (),
    "prepend": (_TEXT,),
    "replace": (_CHAR, _CHAR),
    "prefix": (_CHAR, bool),
    "split": (str,),
    "digits": (bool,),
    "after": (_CHAR,),
    "before": (_CHAR,),
    "bytes": (),
}
_DECODERS: dict[str, Json] = {
    "ByteLevel": {},
    "ByteFallback": {},
    "Fuse": {},
    "Metaspace": {"replacement": _CHAR, "prepend_scheme": str},
    "Replace": {"pattern": {"String": _TEXT}, "content": str},
    "Strip": {"content": _CHAR, "start": int},
}


@dataclass(frozen=True)
class Pipeline:
    """What the meta section says, ready to run."""

    normalizers: tuple[Callable[[str, bpe.Origin], bpe.Stretch], ...]
    normalize: tuple[Callable[[str], str], ...]  # the same, for the text alone
    steps: tuple[bpe.Step, ...]
    model: bpe.Model
    before: list[int]
    after: list[int]
    trim: list[bool]  # for each trimming of offsets whether a blank was put first
    decoder: list[Json] | None
    raw: bpe.Matcher
    normalized: bpe.Matcher
    forms: dict[int, str]
    special: dict[int, str]


def read_pipeline(vocab: Vocab) -> Pipeline:
    """Raises BadCheckpoint for anything that no compiler wrote."""
    try:
        return _Reader(vocab, parse_json(vocab.meta, vocab.file)).pipeline()
    except (Unsupported, re.error, OverflowError, RecursionError) as error:
        raise BadCheckpoint(f"a pattern that cannot be: {error}", file=vocab.file, field="meta") from None


class _Reader:
    def __init__(self, vocab: Vocab, meta: Json) -> None:
        self.vocab, self.meta = vocab, meta
        self.need(self.fits(meta, _FORM) and len(meta["added"]) == vocab.head.added, "its form")

    def need(self, sound: bool, what: object) -> None:
        if not sound:
            raise BadCheckpoint(f"{what} cannot be", file=self.vocab.file, field="meta")

    def fits(self, value: Any, form: Any) -> bool:
        """Whether a JSON value has the form: a type, _ID, _CHAR, _TEXT, or lists, tuples and dicts of forms."""
        if isinstance(form, dict):
            return isinstance(value, dict) and all(k in value and self.fits(value[k], f) for k, f in form.items())
        if isinstance(form, list | tuple):
            forms = form if isinstance(form, tuple) else form * len(value) if isinstance(value, list) else ()
            return isinstance(value, list) and len(value) == len(forms) and all(map(self.fits, value, forms))
        if form == _ID:
            return type(value) is int and 0 <= value < self.vocab.ids
        if form in (_CHAR, _TEXT):
            sound = isinstance(value, str) and 0 < len(value) <= (1 if form == _CHAR else 4096)
            return sound and not re.search("[\ud800-\udfff]", value)
        return form is Any or (type(value) is form and (form is not int or -1 <= value < 2**31))

    def pipeline(self) -> Pipeline:
        meta, model = self.meta, self.meta["model"]
        self.classes: dict[str, Ranges] = {name: self.ranges(r) for name, r in meta["classes"].items()}
        normalizer, pre = self.steps("normalizer"), self.steps("pre")
        self.need(model["unknown"] < self.vocab.ids, "the unknown token")
        self.need(["bytes"] not in pre[:-1], "the order of steps")
        steps = [self.step(step) for step in pre if step != ["bytes"]]
        if meta["cut"] is not None:
            self.need(self.fits(meta["cut"], (_CHAR, str)), "the cut")
            blank, glued = meta["cut"]
            pattern = f"(?<!{charset((ord(c), ord(c)) for c in blank + glued)}){re.escape(blank)}"
            steps.append(bpe.cut(re.compile(pattern)))
        raw, normalized, special = self.added()
        decoder = meta["decoder"]
        self.need(decoder is None or (isinstance(decoder, list) and all(map(self.decodes, decoder))), "the decoder")
        return Pipeline(
            tuple(self.normalizer(step)[0] for step in normalizer),
            tuple(self.normalizer(step)[1] for step in normalizer),
            tuple(steps),
            bpe.Model(self.vocab, model["unknown"], model["fuse"], model["fallback"], model["whole"], ["bytes"] in pre),
            **meta["post"],
            decoder=decoder,
            raw=raw,
            normalized=normalized,
            forms=dict(meta["forms"]),
            special=special,
        )

    def ranges(self, given: Any) -> Ranges:
        self.need(self.fits(given, [(int, int)]), "a class")
        self.need(all(0 <= low <= high <= 0x10FFFF for low, high in given), "a class")
        return [(low, high) for low, high in given]

    def known(self, name: str) -> Ranges:
        self.need(name in self.classes, f"no class {name}:")
        return self.classes[name]

    def steps(self, part: str) -> list[list[Any]]:
        for step in self.meta[part]:
            sound = bool(step) and isinstance(step[0], str) and step[0] in _STEPS
            self.need(sound and self.fits(step[1:], _STEPS[step[0]]), f"a step of the {part}")
        steps: list[list[Any]] = self.meta[part]
        return steps

    def normalizer(self, step: list[Any]) -> tuple[Callable[[str, bpe.Origin], bpe.Stretch], Callable[[str], str]]:
        kind, *more = step
        if kind == "nfc":
            composer = bpe.Composer(self.known("inert"))
            return composer.both, composer.text
        self.need(kind in ("prepend", "replace"), f"{kind} as a normalizer")
        work = partial(bpe.prepend if kind == "prepend" else bpe.replace, *more)
        return work, lambda text: work(text, range(len(text)))[0]

    def step(self, step: list[Any]) -> bpe.Step:
        kind, *more = step
        if kind == "split":
            self.need(len(more[0]) <= MAX_PATTERN and used(more[0]) <= self.classes.keys(), "a pattern")
            return bpe.isolate(re.compile(translate(more[0], self.classes)))
        if kind == "digits":
            return bpe.isolate(re.compile(charset(self.known("digits")) + ("" if more[0] else "+")))
        if kind in ("after", "before"):
            char = re.escape(more[0])
            pattern = f"[^{char}]*{char}|[^{char}]+" if kind == "after" else f"{char}[^{char}]*|[^{char}]+"
            return bpe.isolate(re.compile(pattern))
        self.need(kind in ("replace", "prefix"), f"{kind} as a step")
        return bpe.replaced(*more) if kind == "replace" else bpe.prefix(*more)

    def decodes(self, step: Any) -> bool:
        kind = step.get("type") if isinstance(step, dict) else None
        return isinstance(kind, str) and kind in _DECODERS and self.fits(step, _DECODERS[kind])

    def added(self) -> tuple[bpe.Matcher, bpe.Matcher, dict[int, str]]:
        tables: tuple[dict[str, bpe.Added], ...] = ({}, {})
        special, forms = dict[int, str](), dict(self.meta["forms"])
        for at, content, hidden, left, right, single, normalized in self.meta["added"]:
            form = forms.get(at, content) if normalized else content
            tables[normalized][form] = bpe.Added(at, hidden, left, right, single)
            if hidden:
                special[at] = content
        word = self.classes.get("word", ())
        self.need(bool(word) or not any(entry[5] for entry in self.meta["added"]), "single words without letters")
        return bpe.Matcher(tables[0], word), bpe.Matcher(tables[1], word), special
