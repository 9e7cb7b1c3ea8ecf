"""A source's tokenizer: the mapped one of its pack where edge's encoder covers it, the tokenizers library elsewhere."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from edge.budget.memory import trim
from edge.store import packs
from edge.store.packages import Opened
from loaders.errors import CannotCreate, NotPermitted, ReadFailed
from loaders.formats.pack import VOCAB, Pack
from loaders.formats.package import Package
from loaders.packing import check_vocab
from loaders.text.compact import CompactTokenizer, resident_bytes
from loaders.text.tokenizer import AnyTokenizer, Tokenizer

# What the mapped form of a vocabulary takes is known once it is there; before, the size of its text is an upper bound.
NOT_YET_MAPPED = 4 << 20


def text_folder(source: Opened) -> Path | None:
    """Where a mapped vocabulary lies, the pack's folder made if need be; None where the cache cannot be written."""
    if isinstance(source, Pack | Package):
        return source.folder
    if not (source.folder / "tokenizer.json").exists():
        return None
    try:
        if packs.cached(source) is None:
            apart(lambda: packs.ensure(source, (), notify=lambda *_: None).close())
        with packs.pack_closed(packs.ensure(source, (), notify=lambda *_: None)) as pack:
            folder = pack.folder
    except (CannotCreate, NotPermitted, ReadFailed):
        return None
    trim()
    return folder


def apart(work: Callable[[], None]) -> None:
    """Does ``work`` in a child whose memory goes with it: a compiler of vocabularies would stay in every later figure.

    Only where forking is cheap and safe, before an engine's threads; elsewhere, and where it fails, nothing is done.
    """
    if sys.platform != "linux" or "torch" in sys.modules:
        return
    child = os.fork()
    if child == 0:
        with suppress(BaseException):
            work()
        os._exit(0)
    os.waitpid(child, 0)


def open_tokenizer(source: Opened, folder: Path | None, needed: bool) -> AnyTokenizer | None:
    """The tokenizer, checked against the model; None where there is none and it is not ``needed``.

    Raises BadCheckpoint for one that does not go with the model, MissingFile where it is needed and absent.
    """
    tokenizer: AnyTokenizer
    if folder is not None and (folder / VOCAB).exists():
        tokenizer = CompactTokenizer.open(folder / VOCAB)
    elif needed or (source.folder / "tokenizer.json").exists():
        tokenizer = Tokenizer.open(source.folder)
    else:
        return None
    check_vocab(tokenizer.vocab_size, source.model, source.folder)
    return tokenizer


def tokenizer_bytes(source: Opened) -> int:
    """What the tokenizer will keep in memory, from its files alone; a guess while a checkpoint has no pack."""
    folder = source.folder if isinstance(source, Pack | Package) else packs.cached(source)
    if folder is not None and (folder / VOCAB).exists():
        return resident_bytes(folder / VOCAB)
    path = source.folder / "tokenizer.json"
    return path.stat().st_size + NOT_YET_MAPPED if path.exists() else 0
