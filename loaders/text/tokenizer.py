"""tokenizer.json: text to ids, ids to text, and ids to text one at a time."""

from __future__ import annotations

import json
import os
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from loaders.errors import BadCheckpoint, EdgeError, MissingFile, Unsupported, Usage

MAX_FILE = 256 << 20
MAX_TEXT = 16 << 20
REPLACEMENT = "\ufffd"
_SURROGATE = re.compile("[\ud800-\udfff]")
# A BPE model with a prefix panics on some merges, and aborts the process where it cuts a character in two.
_PREFIX = "".join(rf"(?:{c}|\\u00{ord(c):02x})" for c in "continuing_subword_prefix")
_PREFIXED = re.compile(rf'"{_PREFIX}"\s*:\s*"[^"]'.encode(), re.IGNORECASE)


def clean(text: str) -> str:
    """``text`` with every lone surrogate replaced by U+FFFD; the length does not change."""
    return text if text.isascii() else _SURROGATE.sub(REPLACEMENT, text)


@contextmanager
def rust(file: str) -> Iterator[None]:
    """Whatever the tokenizers library raises, panics included, as BadCheckpoint of ``file``."""
    try:
        yield
    except EdgeError:
        raise
    except BaseException as error:
        # A Rust panic is a BaseException of a class that cannot be imported.
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise BadCheckpoint(f"the tokenizer failed: {error}", file=file) from error
        raise


@contextmanager
def silent() -> Iterator[None]:
    """Nothing on descriptor 2: a panic writes lines of its own there before it becomes an exception."""
    try:
        kept = os.dup(2)
    except OSError:  # nobody is listening
        yield
        return
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    os.close(nothing)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def checked_ids(ids: Sequence[int]) -> list[int]:
    """The ids as ints. Raises Usage for one that is negative or beyond 32 bits."""
    ids = [int(i) for i in ids]
    if ids and not (min(ids) >= 0 and max(ids) < 2**32):
        raise Usage("an id out of range", field="ids", expected="0 to 4294967295")
    return ids


class Encoding(Protocol):
    """What encoding gives. ``offsets``: characters; ``special_tokens_mask``: 1 for what the text did not give."""

    @property
    def ids(self) -> list[int]: ...

    @property
    def offsets(self) -> list[tuple[int, int]]: ...

    @property
    def special_tokens_mask(self) -> list[int]: ...


class AnyTokenizer(ABC):
    """A checkpoint's tokenizer, whoever does the work. Calls may come from several threads.

    ``vocab_size``: the highest id plus one. ``special_ids``: every special token; ``special_texts``: their spelling.
    ``control_ids``: those without the unknown-token, which plain text may give too.
    """

    vocab_size: int
    special_ids: frozenset[int]
    special_texts: tuple[str, ...]
    control_ids: frozenset[int]

    @abstractmethod
    def _encoding(self, text: str, *, plain: bool, add: bool) -> Encoding:
        """``plain``: special tokens in the text are text. ``add``: with the tokens that go around a text."""

    @abstractmethod
    def decode(self, ids: Sequence[int], *, specials: bool = False) -> str:
        """The text of ``ids``; special tokens are left out unless ``specials``. Unknown ids give nothing."""

    @abstractmethod
    def id_of(self, token: str) -> int | None:
        """The id of a token, spelt as in the vocabulary; None if there is none."""

    @abstractmethod
    def token_of(self, token_id: int) -> str | None:
        """The spelling of an id in the vocabulary; None if there is none."""

    @abstractmethod
    def decoder_kinds(self) -> list[dict[str, Any]]:
        """The steps of the decoder, as tokenizer.json spells them."""

    def _learn(self, special: dict[int, str], size: int) -> None:
        """Sets the public facts. ``special``: id -> spelling, by id. The tokenizer can already encode."""
        self.vocab_size = size
        self.special_ids = frozenset(special)
        self.special_texts = tuple(text for text in special.values() if text)
        unknown = self._raw("\ufdd0\U000f1234\u0378", plain=True).ids
        self.control_ids = self.special_ids - frozenset(unknown)
        # SentencePiece puts a space before the text; a piece from the middle of a text must not get one.
        self._prefixes = self._after("\n", "a", plain=True) != self._raw("a", plain=True).ids

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        """The ids of a user's text. Special tokens spelt out in it are plain text, never their ids.

        With ``bos`` the tokenizer adds what it adds by itself (the start token). Raises Usage for a text over 16 Mi
        characters, or one that has no encoding without a special token.
        """
        return self._plain(clean(text), bos=bos, start=True)

    def encode_piece(self, text: str, *, plain: bool, start: bool) -> list[int]:
        """The ids of a part of a longer text, nothing added; ``start`` says that it is the first part.

        ``plain`` is as in ``encode``; otherwise as in ``encode_marked``.
        """
        if not text:
            return []
        return self._plain(clean(text), bos=False, start=start) if plain else self._piece(clean(text), False, start)

    def encode_marked(self, text: str) -> list[int]:
        """The ids of a text that a template wrote: special tokens in it are meant. Nothing is added."""
        return list(self._raw(clean(text), plain=False).ids)

    def encode_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """As ``encode_marked``, with the range of characters that each id stands for."""
        encoding = self._raw(clean(text), plain=False)
        return list(encoding.ids), list(encoding.offsets)

    def _raw(self, text: str, *, plain: bool, add: bool = False) -> Encoding:
        if len(text) > MAX_TEXT:
            raise Usage(f"{len(text)} characters of text", expected=f"at most {MAX_TEXT}")
        return self._encoding(text, plain=plain, add=add)

    def _after(self, anchor: str, text: str, *, plain: bool) -> list[int] | None:
        base, ids = self._raw(anchor, plain=plain).ids, self._raw(anchor + text, plain=plain).ids
        return list(ids[len(base) :]) if ids[: len(base)] == base else None

    def _piece(self, text: str, plain: bool, start: bool) -> list[int]:
        if self._prefixes and not start:
            for anchor in ("\n", "a", "."):
                ids = self._after(anchor, text, plain=plain)
                if ids is not None:
                    return ids
        return list(self._raw(text, plain=plain).ids)

    def _plain(self, text: str, *, bos: bool, start: bool) -> list[int]:
        encoding = self._raw(text, plain=True, add=bos)
        ids, mask = list(encoding.ids), encoding.special_tokens_mask
        wrong = [i for i, (t, m) in enumerate(zip(ids, mask, strict=True)) if not m and t in self.control_ids]
        if not wrong:
            return ids if start else self._checked(text)
        # encode_special_tokens stops the matcher, not the model: Unigram spells "<s>" as <s> if its vocabulary holds
        # it. Such a text is cut inside the word, and the parts encoded one by one.
        lead = mask.index(0)
        tail = len(mask) - mask[::-1].index(0)
        out, last = ids[:lead], 0
        for cut in [*(self._cut(encoding.offsets[i]) for i in wrong), len(text)]:
            if cut > last:
                out += self._plain(text[last:cut], bos=False, start=start and last == 0)
                last = cut
        return out + ids[tail:]

    def _checked(self, text: str) -> list[int]:
        ids = self._piece(text, True, False)
        return list(self._raw(text, plain=True).ids) if self.control_ids.intersection(ids) else ids

    @staticmethod
    def _cut(span: tuple[int, int]) -> int:
        if span[1] - span[0] < 2:
            raise Usage("the text holds a character that is a special token of this model", hint="Remove it.")
        return span[0] + 1


class Tokenizer(AnyTokenizer):
    """The tokenizer of the tokenizers library."""

    def __init__(self, inner: Any, file: str = "tokenizer.json") -> None:
        """``inner`` is a ``tokenizers.Tokenizer``, taken over. Raises BadCheckpoint if its ids cannot be used."""
        self._inner, self._file, self._lock = inner, file, threading.RLock()
        with rust(file):
            inner.no_truncation()  # a file may ask for it, and a prompt would be cut without a word
            inner.no_padding()
            added = inner.get_added_tokens_decoder()
            size = max([self._last_id(), *added]) + 1
            self._learn({i: token.content for i, token in added.items() if token.special}, size)
            inner.decode(inner.encode("a").ids)  # what fails at this is better known before the model is loaded

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Tokenizer:
        """The tokenizer in ``folder``.

        Raises MissingFile without a tokenizer.json, BadCheckpoint for a bad one, Unsupported for one with a prefix for
        the parts of a word.
        """
        from loaders.formats.config import read_bytes

        path = Path(folder, "tokenizer.json")
        if not os.path.lexists(path):
            raise MissingFile("not there", file=path, hint="edge needs the tokenizer.json of the checkpoint.")
        data = read_bytes(path, MAX_FILE)
        if _PREFIXED.search(data):
            raise Unsupported(
                "not implemented", file=path, field="continuing_subword_prefix", expected="absent or empty"
            )
        import tokenizers

        with silent():
            with rust(str(path)):
                inner = tokenizers.Tokenizer.from_buffer(data)
            del data
            return cls(inner, str(path))

    def decode(self, ids: Sequence[int], *, specials: bool = False) -> str:
        ids = checked_ids(ids)
        with rust(self._file), self._lock:
            return str(self._inner.decode(ids, skip_special_tokens=not specials))

    def id_of(self, token: str) -> int | None:
        with rust(self._file), self._lock:
            found = self._inner.token_to_id(clean(token))
        return None if found is None else int(found)

    def token_of(self, token_id: int) -> str | None:
        with rust(self._file), self._lock:
            found = self._inner.id_to_token(token_id) if 0 <= token_id < 2**32 else None
        return None if found is None else str(found)

    def decoder_kinds(self) -> list[dict[str, Any]]:
        with rust(self._file), self._lock:
            state = json.loads(self._inner.decoder.__getstate__()) if self._inner.decoder is not None else {}
        steps: list[dict[str, Any]] = state.get("decoders", [state] if state else [])
        return steps

    def _last_id(self) -> int:
        # Counting up needs no copy of the vocabulary (40 MB for 262144 tokens).
        model, left, at = self._inner.model, self._inner.get_vocab_size(False), 0
        limit = 4 * left + 65536
        while left and at < limit:
            left -= model.id_to_token(at) is not None
            at += 1
        if left:
            raise BadCheckpoint(f"{left} tokens have no id of their own below {limit}", file=self._file, field="vocab")
        return at - 1

    def _encoding(self, text: str, *, plain: bool, add: bool) -> Any:
        with rust(self._file), self._lock:
            self._inner.encode_special_tokens = plain
            return self._inner.encode(text, add_special_tokens=add)


class StreamDecoder:
    """Ids in, text out, as soon as it is certain.

    All that ``push`` and ``finish`` return, joined, is exactly ``tokenizer.decode`` of all ids. Two things wait: an
    incomplete UTF-8 character, and a run of SentencePiece byte tokens (one bad byte turns the whole run into U+FFFD).
    For a decoder that edge does not know (WordPiece after a merge, CTC, stripping at the end) everything waits.
    """

    def __init__(self, tokenizer: AnyTokenizer) -> None:
        self._tokenizer = tokenizer
        self._anchor, self._lead = _anchor(tokenizer)
        self._mode = _mode(tokenizer.decoder_kinds()) if self._lead else "hold"
        self._reset()

    def _reset(self) -> None:
        self._window: list[int] = []  # what is still undecided
        self._emitted = 0  # characters of the window's text that are out already
        self._start = True  # decoders strip at the start of a text, so the start is decoded as one

    def push(self, token_id: int) -> str:
        """The new text that ``token_id`` makes certain, or an empty string."""
        if token_id in self._tokenizer.special_ids:
            return ""
        token = self._tokenizer.token_of(token_id)
        if token is None:
            return ""
        self._window.append(token_id)
        is_byte = len(token) == 6 and token[:3] == "<0x" and token[5] == ">"
        if self._mode == "hold" or (self._mode == "runs" and is_byte):
            return ""
        text = self._text(self._window, self._start)
        done = len(text) - (self._mode == "bytes" and text.endswith(REPLACEMENT))
        out, self._emitted = text[self._emitted : done], done
        if done < len(text):
            self._shrink(text)
        elif text or not self._start or len(self._window) > 1024:
            self._window, self._emitted, self._start = [], 0, False
        return out

    def finish(self) -> str:
        """The rest, complete or not. The decoder is then as new."""
        out = self._text(self._window, self._start)[self._emitted :] if self._window else ""
        self._reset()
        return out

    def _text(self, ids: list[int], start: bool) -> str:
        if start:
            return self._tokenizer.decode(ids)
        return self._tokenizer.decode([self._anchor, *ids])[len(self._lead) :]

    def _shrink(self, text: str) -> None:
        # Only the last U+FFFD can still change, and an incomplete character has three bytes at most. A cut inside a
        # character that could still complete gives more U+FFFD apart than together, so equality proves a clean cut.
        for k in range(1, min(5, len(self._window))):
            head, tail = self._text(self._window[:-k], self._start), self._text(self._window[-k:], False)
            if head and tail and head + tail == text:
                self._window, self._emitted, self._start = self._window[-k:], self._emitted - len(head), False
                return


def _mode(steps: list[dict[str, Any]]) -> str:
    """How decoded text depends on what follows: not at all, per UTF-8 character, per run of byte tokens, unknown."""
    mode, fused = "plain", False
    for step in steps:
        kind = step.get("type")
        if kind == "ByteLevel" and not fused and mode == "plain":
            mode, fused = "bytes", True
        elif kind == "ByteFallback" and not fused:
            mode = "runs"
        elif kind == "Fuse":
            fused = True
        elif kind == "Replace":
            if fused and (mode == "bytes" or len(step.get("pattern", {}).get("String", "")) != 1):
                return "hold"
        elif kind == "Strip":
            if fused and (step.get("stop") or step.get("content") == REPLACEMENT):
                return "hold"
        elif kind not in ("Metaspace", "WordPiece") or fused:
            return "hold"
    return mode


def _anchor(tokenizer: AnyTokenizer) -> tuple[int, str]:
    """A token of plain letters to decode others behind, and its text; the text is empty if there is none."""
    letters = (tokenizer.id_of(c) for c in "aeinorst01")
    for at in (*letters, *range(min(tokenizer.vocab_size, 4096))):
        if at is None or at in tokenizer.special_ids:
            continue
        text = tokenizer.decode([at])
        if text.isascii() and text.isalnum() and tokenizer.decode([at, at]).startswith(text):
            return at, text
    return 0, ""
