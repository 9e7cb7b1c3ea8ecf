"""Scoring a text: every token once, in windows, the loss that a plain computation and transformers give."""

from __future__ import annotations

import gzip
import hashlib
import lzma
import math
import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Inner
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from edge import corpus, evaluate
from edge.budget.pricing import pass_bytes
from edge.corpus import Text, read_text
from edge.session import Session
from loaders.errors import BadCheckpoint, EdgeError, MissingFile, OverBudget, Usage
from loaders.text.tokenizer import Tokenizer
from tests import makers
from tests.shared import DEMO, TALE
from tests.small import BOS, TEXTS, VOCAB, gemma3n_fixture, llama_fixture  # noqa: F401

Open = Callable[..., Session]
Folder = Callable[[str], Path]
STORY = "\n".join(TEXTS * 3)


def some(count: int, vocab: int = VOCAB, lead: tuple[int, ...] = (BOS,)) -> Text:
    """Random tokens, each as long as its number says."""
    ids = np.random.default_rng(count).integers(5, vocab, count).astype(np.int32)
    return Text(ids, 1 + ids % 4, "0" * 64, lead)


def surprise(logits: np.ndarray, token: int) -> float:
    """Minus the log probability of one token, in float64."""
    row = logits.astype(np.float64)
    return float(np.log(np.exp(row - row.max()).sum()) + row.max() - row[token])


def plainly(logits: Callable[[np.ndarray], np.ndarray], text: Text, context: int, stride: int) -> float:
    """Nats per token: the logits of whole windows, whatever of them counts."""
    ids, lead, losses, begin = text.ids, list(text.lead), [], 0
    while len(losses) + (not lead) < len(ids):
        window = np.array([*lead, *ids[begin : begin + context - len(lead)]], np.int64)
        rows = logits(window)
        for i in range(1, len(window)):
            if begin + i - len(lead) == len(losses) + (not lead):
                losses.append(surprise(rows[i - 1], window[i]))
        begin += stride
    return sum(losses) / len(losses)


# Windows


@given(st.integers(2, 400), st.integers(3, 60), st.data(), st.integers(0, 2))
def test_every_token_is_scored_once_with_enough_before_it(count: int, context: int, data: Any, before: int) -> None:
    stride = data.draw(st.integers(1, context))
    found = list(evaluate.windows(count, context, stride, before))
    scored = [i for _, first, end in found for i in range(first, end)]
    assert scored == list(range(int(not before), count))
    for start, first, end in found:
        assert start <= first < end <= count
        assert before + end - start <= context
        assert before + first - start >= 1
    assert all(before + first - start >= context - stride for start, first, _ in found[1:])
    assert all(1 <= b[0] - a[0] <= stride for a, b in pairwise(found))


@pytest.mark.parametrize(("context", "stride"), [(33, 33), (33, 16), (9, 1)])
@pytest.mark.parametrize("lead", [(BOS,), (), (BOS, 7)])
def test_the_loss_is_that_of_a_plain_computation(
    opened: Open, gemma3n: Path, context: int, stride: int, lead: tuple[int, ...]
) -> None:
    session, text = opened(gemma3n, context=64), some(50 if stride > 1 else 12, lead=lead)
    context = max(context, len(lead) + 1)
    score = evaluate.evaluate(session, text, context=context, stride=stride)
    with pytest.raises(Usage):
        evaluate.evaluate(session, text, context=context, stride=context + 1)
    step = min(stride, context - max(1, len(lead)))
    assert score.loss == pytest.approx(plainly(session.logits, text, context, step), abs=1e-5)
    assert (score.tokens, score.context, score.stride) == (len(text.ids) - (not lead), context, stride)
    assert score.bytes == text.sizes[int(not lead) :].sum()
    assert score.seconds > 0
    assert score.tps == score.tokens / score.seconds
    assert (score.kl, score.top1) == (None, None)


@pytest.mark.parametrize("tokens", [1, 5])
def test_pieces_of_any_size_give_the_same(
    opened: Open, gemma3n: Path, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, text = opened(gemma3n, context=32), some(40)
    whole = evaluate.evaluate(session, text)
    monkeypatch.setattr(evaluate, "SCORES", tokens * VOCAB * 4)
    monkeypatch.setattr(evaluate, "TILE", 100)
    assert evaluate.piece_size(session, spare=True) == tokens
    assert evaluate.evaluate(session, text, reference=session).loss == pytest.approx(whole.loss, abs=1e-5)
    assert (whole.context, whole.stride) == (32, 16)


def test_the_context_is_at_most_1024_unless_asked_for() -> None:
    assert evaluate.span(2000, some(9), None, None) == (1024, 512)
    assert evaluate.span(2000, some(9), 2000, None) == (2000, 1000)
    assert evaluate.span(30, some(9), None, 30) == (30, 30)
    assert evaluate.span(30, some(9), 2, None) == (2, 1)


@pytest.mark.parametrize(("context", "stride"), [(65, None), (1, None), (0, None), (16, 17), (16, 0), (None, -1)])
def test_a_window_that_cannot_be_is_refused(context: int | None, stride: int | None) -> None:
    with pytest.raises(Usage):
        evaluate.span(64, some(9), context, stride)


def test_progress_ends_with_all_tokens(opened: Open, gemma3n: Path) -> None:
    seen: list[tuple[int, int]] = []
    evaluate.evaluate(
        opened(gemma3n, context=64), some(100), notify=lambda what, done, total: seen.append((done, total))
    )
    assert seen == sorted(seen)
    assert seen[-1] == (100, 100)


# Agreement


@pytest.mark.parametrize("name", ["gemma-3n-E4B", "qwen3-0.6B"])
def test_transformers_gives_the_same_loss(folders: Folder, opened: Open, name: str) -> None:
    session = opened(folders(name), context=64)
    text, theirs = some(110, session.model.vocab), makers.reference(folders(name))
    score = evaluate.evaluate(session, text, context=64, stride=48)
    want = plainly(lambda ids: makers.expected(theirs, ids), text, 64, 48)
    assert score.loss == pytest.approx(want, abs=1e-4)


def test_transformers_gives_the_same_loss_of_a_story(opened: Open) -> None:
    session = opened(DEMO, context=256)
    text = read_text(TALE, session.tokenizer, 150)
    score = evaluate.evaluate(session, text, context=96, stride=64)
    theirs = makers.reference(DEMO)
    assert score.loss == pytest.approx(plainly(lambda ids: makers.expected(theirs, ids), text, 96, 64), abs=1e-4)
    assert 2 < score.loss < 4


def test_a_long_text_is_encoded_as_it_is_whole(tmp_path: Path) -> None:
    tokenizer, tale = Tokenizer.open(DEMO), TALE.read_text(encoding="utf-8")
    whole = "".join(f"{chapter}.\n{tale}" for chapter in range(5 * corpus.PIECE // 2 // len(tale)))
    (tmp_path / "long.xz").write_bytes(lzma.compress(whole.encode(), preset=0))
    ids = tokenizer.encode(whole, bos=False)
    for most in (None, 40_000):
        text = read_text(tmp_path / "long.xz", tokenizer, most)
        assert text.ids.tolist() == ids[:most]
        assert text.sha256 == hashlib.sha256(whole.encode()[: text.bytes]).hexdigest()


def test_a_session_agrees_with_itself(opened: Open, gemma3n: Path) -> None:
    session, twin, text = opened(gemma3n, context=32), opened(gemma3n, context=40), some(40)
    for reference in (session, twin):
        score = evaluate.evaluate(session, text, reference=reference)
        assert (score.kl, score.top1) == (0.0, 1.0)
        assert score.loss == evaluate.evaluate(session, text).loss


def test_fewer_bits_are_further_away(opened: Open, gemma3n: Path) -> None:
    exact, text = opened(gemma3n, context=64), some(50)
    int8, int4 = (
        evaluate.evaluate(opened(gemma3n, context=64, precision=precision), text, reference=exact)
        for precision in ("int8", "int4")
    )
    assert 0 < int8.kl < int4.kl
    assert int4.top1 <= int8.top1 <= 1


def test_the_divergence_is_its_definition(opened: Open, gemma3n: Path) -> None:
    exact, other = opened(gemma3n, context=64), opened(gemma3n, context=64, slice="half")
    text = some(40)
    ids = np.array([BOS, *text.ids])
    p, q = (
        (rows := s.logits(ids)[:-1].astype(np.float64)) - np.log(np.exp(rows).sum(1))[:, None] for s in (exact, other)
    )
    score = evaluate.evaluate(other, text, reference=exact)
    assert score.kl == pytest.approx((np.exp(p) * (p - q)).sum(1).mean(), rel=1e-4)
    assert score.top1 == (p.argmax(1) == q.argmax(1)).mean()


def test_another_vocabulary_is_no_reference(opened: Open, gemma3n: Path, folders: Folder) -> None:
    with pytest.raises(Usage, match="another vocabulary"):
        evaluate.evaluate(opened(gemma3n), some(9), reference=opened(folders("qwen3-0.6B")))


def test_perplexity_and_bits_say_the_same(opened: Open, gemma3n: Path, tmp_path: Path) -> None:
    session = opened(gemma3n, context=64)
    (tmp_path / "story.txt").write_text(STORY)
    text = read_text(tmp_path / "story.txt", session.tokenizer)
    score = evaluate.evaluate(session, text)
    assert score.bytes == len(STORY.encode())
    assert score.tokens == len(text.ids)
    assert math.log2(score.perplexity) * score.tokens == pytest.approx(score.bits_per_byte * score.bytes)
    assert evaluate.Score(1, 1, 1e4, None, None, 1.0, 2, 1).perplexity == math.inf
    found = evaluate.measured_of(session, score, text)
    assert (found.name, found.keep, found.widths) == ("full", tuple(range(12)), (128,) * 12)
    assert (found.precision, found.head, found.context) == ("float32", "float32", 64)
    assert (found.loss, found.bits_per_byte, found.tokens) == (score.loss, score.bits_per_byte, score.tokens)
    assert (found.text, found.kl, found.top1) == (hashlib.sha256(STORY.encode()).hexdigest(), None, None)


# What a run keeps


def test_the_cache_is_empty_before_and_after(opened: Open, gemma3n: Path) -> None:
    session = opened(gemma3n, context=32)
    first = evaluate.evaluate(session, some(40)).loss
    session.step([5, 6, 7])
    assert evaluate.evaluate(session, some(40)).loss == first
    assert (session.engine.position, session.tokens) == (0, [])


@pytest.mark.parametrize("engine", ["native", "torch"])
def test_pieces_take_what_was_planned(opened: Open, gemma3n: Path, engine: str) -> None:
    total = opened(gemma3n, context=512, engine=engine).plan.total_bytes
    session = opened(gemma3n, context=512, engine=engine, budget=total + (32 << 20))
    model, plan = session.model, session.plan
    size = evaluate.piece_size(session, spare=False)
    assert 1 <= size <= plan.chunk
    held = pass_bytes(session.source, model, plan, size, every=True)
    assert size == 1 or held <= plan.bytes["activations"]
    assert evaluate.piece_size(session, spare=True) == plan.chunk
    evaluate.evaluate(session, some(100))
    assert session.ledger.held() == session.ledger.planned


def test_a_budget_that_is_broken_ends_it(opened: Open, gemma3n: Path) -> None:
    session = opened(gemma3n, context=64, budget="64GB")
    session.watch._over, session.watch._peak = True, 65 * 10**9
    with pytest.raises(OverBudget):
        evaluate.evaluate(session, some(100))
    assert session.engine.position == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_no_score(
    opened: Open, gemma3n: Path, bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = opened(gemma3n, context=64)
    forward = session.engine.forward
    monkeypatch.setattr(session.engine, "forward", lambda *args: forward(*args) * np.float32(0) + np.float32(bad))
    with pytest.raises(BadCheckpoint, match="not finite"):
        evaluate.evaluate(session, some(9))


# Texts


@pytest.fixture(name="words")
def words_fixture(gemma3n: Path) -> Tokenizer:
    return Tokenizer.open(gemma3n)


def packed_xz(data: bytes) -> bytes:
    half = len(data) // 2
    return lzma.compress(data[:half]) + bytes(8) + lzma.compress(data[half:])


@pytest.mark.parametrize(
    ("name", "pack"), [("a.txt", bytes), ("a.xz", packed_xz), ("a.gz", gzip.compress), ("a", lzma.compress)]
)
@pytest.mark.parametrize("small", [False, True])
def test_a_text_is_its_tokens_and_its_bytes(
    words: Tokenizer,
    tmp_path: Path,
    name: str,
    pack: Callable[[bytes], bytes],
    small: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = STORY.encode()
    (tmp_path / name).write_bytes(pack(data))
    if small:
        for limit, value in (("BLOCK", 7), ("PIECE", 40), ("AROUND", 20)):
            monkeypatch.setattr(corpus, limit, value)
    text = read_text(tmp_path / name, words)
    assert text.ids.tolist() == words.encode(STORY, bos=False)
    assert (text.sha256, text.bytes, text.lead) == (hashlib.sha256(data).hexdigest(), len(data), (BOS,))
    ends = np.cumsum(text.sizes)
    for i in range(0, len(ends), 7):
        assert words.decode(text.ids[: i + 1].tolist()).encode() == data[: ends[i]].decode(errors="replace").encode()


@given(st.text(), st.integers(1, 30))
def test_no_text_loses_a_byte(tmp_path_factory: pytest.TempPathFactory, text: str, piece: int) -> None:
    words = Tokenizer(Inner.from_str(SPACED))
    file = tmp_path_factory.getbasetemp() / "any.txt"
    text = "once upon " + text.encode("utf-8", "replace").decode()
    file.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "PIECE", piece)
        patch.setattr(corpus, "AROUND", 8)
        found = read_text(file, words)
    assert found.bytes == len(text.encode())
    assert (found.sizes >= 0).all()
    assert found.sha256 == hashlib.sha256(text.encode()).hexdigest()


def spaced() -> str:
    """A tokenizer that lowers case, drops blanks at the end and puts one at the start."""
    inner = Inner(models.BPE(unk_token="<unk>"))
    inner.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase(), normalizers.Strip()])
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    inner.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>"], show_progress=False))
    return inner.to_str()


SPACED = spaced()


def test_a_limit_of_tokens_cuts_the_text(words: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "long.txt"
    file.write_text(STORY * 9)
    os.truncate(file, corpus.MOST_BYTES + 1)  # zeros, none of them on the disk
    text = read_text(file, words, 50)
    ids = words.encode(STORY * 9, bos=False)
    assert text.ids.tolist() == ids[:50]
    assert text.sha256 == hashlib.sha256((STORY * 9).encode()[: text.bytes]).hexdigest()
    with pytest.raises(BadCheckpoint, match=r"67108865 bytes \(expected at most 64 MiB of text\).*--tokens"):
        read_text(file, words)


def test_what_is_unpacked_has_a_limit(words: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "MOST_BYTES", 100_000)
    for pack in (lzma.compress, gzip.compress):
        (tmp_path / "bomb").write_bytes(pack(b"word " * 10**6))
        with pytest.raises(BadCheckpoint, match="--tokens"):
            read_text(tmp_path / "bomb", words)
        assert len(read_text(tmp_path / "bomb", words, 20).ids) == 20
    (tmp_path / "bomb").write_bytes(lzma.compress(b"a word"))
    monkeypatch.setattr(corpus, "XZ_MEMORY", 1 << 16)
    with pytest.raises(BadCheckpoint, match="cannot be unpacked"):
        read_text(tmp_path / "bomb", words)


def test_a_text_without_an_end_of_a_word_is_not_encoded_whole(
    words: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "MAX_TEXT", 1 << 18)
    (tmp_path / "zeros").write_bytes(b"0" * (1 << 19))
    with pytest.raises(BadCheckpoint, match="at which to cut it"):
        read_text(tmp_path / "zeros", words)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (None, MissingFile, "No such file"),
        (b"", BadCheckpoint, "no token"),
        (b"a", BadCheckpoint, "one token"),
        (b"once upon \xff time", BadCheckpoint, "byte 10 is not UTF-8"),
        ("caf\u00e9".encode()[:-1], BadCheckpoint, "byte 3 is not UTF-8"),
        (b"0123456\xe3\x81x", BadCheckpoint, "byte 7 is not UTF-8"),
        (lzma.compress(b"once upon \xff time"), BadCheckpoint, "byte 10 is not UTF-8"),
        (lzma.compress(b"once upon a time" * 99)[:-20], BadCheckpoint, "cannot be unpacked"),
        (lzma.compress(b"once upon a time") + b"more", BadCheckpoint, "cannot be unpacked"),
        (gzip.compress(b"once upon a time" * 99, mtime=0)[:-20], BadCheckpoint, "cannot be unpacked"),
        (gzip.compress(b"once upon a time", mtime=0)[:12] + bytes(20), BadCheckpoint, "cannot be unpacked"),
    ],
)
def test_what_is_no_text_is_refused(
    words: Tokenizer,
    tmp_path: Path,
    data: bytes | None,
    error: type[EdgeError],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(corpus, "BLOCK", 8)
    file = tmp_path / "text"
    if data is not None:
        file.write_bytes(data)
    with pytest.raises(error, match=message) as info:
        read_text(file, words)
    assert str(info.value).startswith(str(file))
    assert "\n" not in str(info.value)
