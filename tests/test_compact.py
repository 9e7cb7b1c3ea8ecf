"""The compact tokenizer: what the tokenizers library gives, to the id, from a mapped file and little memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from loaders.errors import Usage
from loaders.text.compact import CompactTokenizer
from loaders.text.template import encode_chat
from loaders.text.tokenizer import AnyTokenizer, StreamDecoder, Tokenizer
from loaders.text.vocab import compile_vocab
from tests.shared import DEMO, TALE
from tests.test_template import CHATML, CHATS, GEMMA, LLAMA, ours, user
from tests.test_tokenizer import NASTY, SPECIALS

ROOT = Path(__file__).resolve().parent.parent
BYTES = [f"<0x{b:02X}>" for b in range(256)]
TEXTS = [
    "the quick brown fox's 123 don't we'll\n\n  x",
    "user and model take a turn 2024 1234567",
    "start of turn, end of turn\n\n",
    "ça coûte 3 €, 日本語 🎉 e\u0301 ẹ\u0301 한국어",
    "    indented\tcode(x)\r\n  {return;}",
]
# The parts that published patterns are put together from.
ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
WORDS = rf"{ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{REST}"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
LEAD = r"[^\r\n\p{L}\p{N}]?"
CASED = (
    rf"{LEAD}{UPPER}*{LOWER}+{ENDINGS}?|{LEAD}{UPPER}+{LOWER}*{ENDINGS}?|\p{{N}}{{1,3}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{REST}"
)
OWNED = rf"{ENDINGS}|{LEAD}+\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
MARKED = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
HAN = rf"{MARKED}| ?[\p{{P}}\p{{S}}]+[\r\n]*|{REST}"
PLAIN_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def bos(inner: Any, *before: Any) -> Any:
    special = [("<bos>", inner.token_to_id("<bos>"))]
    step = processors.TemplateProcessing(single="<bos> $A", pair="<bos> $A $B", special_tokens=special)
    inner.post_processor = processors.Sequence([*before, step])
    return inner


def split(*patterns: str) -> Any:
    return pre_tokenizers.Sequence([*(pre_tokenizers.Split(Regex(p), "isolated") for p in patterns), PLAIN_BYTES])


def byte_level(pre: Any, *, norm: Any = None, whole: bool = False, trim: Any = None, extra: Sequence[Any] = ()) -> Any:
    inner = tokenizers.Tokenizer(models.BPE(ignore_merges=whole))
    inner.normalizer, inner.pre_tokenizer, inner.decoder = norm, pre, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": SPECIALS, "initial_alphabet": alphabet, "show_progress": False}
    inner.train_from_iterator(TEXTS * 3, trainers.BpeTrainer(vocab_size=420, **options))
    inner.add_tokens(list(extra))
    trimming = [] if trim is None else [processors.ByteLevel(trim_offsets=True, add_prefix_space=trim)]
    return bos(inner, *trimming)


def blanks(norm: Any, pre: Any, decoder: Any, extra: Sequence[Any] = (), known: int = 256, **options: Any) -> Any:
    """A vocabulary with ▁ for a blank and the first ``known`` byte tokens."""
    learner = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    learner.normalizer = normalizers.Replace(" ", "▁")
    learner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    first = [*SPECIALS, "<unk>", *BYTES[:known]]
    trainer = trainers.BpeTrainer(vocab_size=known + 420, special_tokens=first, limit_alphabet=60, show_progress=False)
    learner.train_from_iterator(TEXTS * 3, trainer)
    learnt = json.loads(learner.to_str())["model"]
    merges = [tuple(pair) for pair in learnt["merges"]]
    options = {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True, **options}
    inner = tokenizers.Tokenizer(models.BPE(learnt["vocab"], merges, **options))
    inner.normalizer, inner.pre_tokenizer, inner.decoder = norm, pre, decoder
    inner.add_special_tokens([*SPECIALS, "<unk>"])
    inner.add_tokens(list(extra))
    return bos(inner)


def fused(*more: Any) -> Any:
    return decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *more])


RUNS = [*("\n" * n for n in range(1, 6)), *("▁" * n for n in range(2, 6))]
TAGS = [*(f"<unused{i}>" for i in range(30)), "<table>", "<td>", "</td>", "\t", "[multimodal]"]
TO_BLANK = normalizers.Replace(" ", "▁")
FLAGGED = [
    AddedToken("word", single_word=True),
    AddedToken("<l>", lstrip=True, normalized=False),
    AddedToken("<r>", rstrip=True, normalized=False),
    AddedToken("<lr>", lstrip=True, rstrip=True, special=True),
    AddedToken("<<l>>"),
]
COMPOSED = [AddedToken("<think>", normalized=False), AddedToken("é!"), AddedToken("e\u0301?")]


def gemma(pre: Any = None) -> Any:
    extra = [AddedToken(text, normalized=False) for text in [*RUNS, *TAGS]]
    return blanks(TO_BLANK, pre, fused(), extra)


def meta(scheme: str, cut: bool) -> Any:
    return pre_tokenizers.Metaspace(prepend_scheme=scheme, split=cut)


def undecoded() -> Any:
    data = json.loads(byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False)).to_str())
    return tokenizers.Tokenizer.from_str(json.dumps({**data, "decoder": None, "post_processor": None}))


def digits(alone: bool) -> Any:
    steps = [pre_tokenizers.Digits(individual_digits=alone), pre_tokenizers.ByteLevel(add_prefix_space=not alone)]
    return pre_tokenizers.Sequence(steps)


STRIP = decoders.Strip(" ", 1, 0)
ENDS = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="never")])
PIPELINES: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "prefix": lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True), trim=True),
    "llama3": lambda: byte_level(split(WORDS), whole=True, trim=False),
    "qwen": lambda: byte_level(split(WORDS.replace("{1,3}", "")), norm=normalizers.NFC(), extra=COMPOSED),
    "cased": lambda: byte_level(split(CASED), norm=normalizers.NFC(), trim=True),
    "owned": lambda: byte_level(split(OWNED)),
    "deepseek": lambda: byte_level(split(r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", HAN)),
    "smollm": lambda: byte_level(digits(True)),
    "flags": lambda: byte_level(digits(False), extra=FLAGGED),
    "undecoded": undecoded,
    "gemma": lambda: gemma(pre_tokenizers.Split(" ", "merged_with_previous")),
    "gemma4": gemma,
    "llama2": lambda: blanks(normalizers.Sequence([normalizers.Prepend("▁"), TO_BLANK]), None, fused(STRIP), ["norm"]),
    "mistral": lambda: blanks(None, meta("first", False), fused(STRIP), known=100),
    "always": lambda: blanks(None, meta("always", True), decoders.Metaspace(), byte_fallback=False, fuse_unk=False),
    "never": lambda: blanks(None, meta("never", True), ENDS, byte_fallback=False, unk_token=None),
}
every = pytest.mark.parametrize("name", list(PIPELINES))


@cache
def compiled(name: str) -> bytes:
    return compile_vocab(PIPELINES[name]().to_str().encode(), name)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[AnyTokenizer, CompactTokenizer]]:
    folder = tmp_path_factory.mktemp("compact")

    @cache
    def make(name: str) -> tuple[AnyTokenizer, CompactTokenizer]:
        return Tokenizer(PIPELINES[name]()), opened(folder / name, compiled(name))

    return make


Both = Callable[[str], tuple[AnyTokenizer, CompactTokenizer]]


def opened(path: Path, data: bytes) -> CompactTokenizer:
    path.write_bytes(data)
    return CompactTokenizer.open(path)


# The same as the library


PIECES = [
    *"abcdefghijklmnopqrstuvwxyz 0123456789", *" \n\r\t'<>/.,_▁Ġ-{}()", *["'s", "'LL", "'ſ", " the", " quick", "don't"],
    *["  ", "\n\n", "\r\n", " " * 40, "a" * 60, "\n" * 9, "🎉" * 7, "word", " word ", "sword", "<l>", " <r> ", "<lr>"],
    *["<<l>>", "é!", "e\u0301?", "e\u0301!", "<think>", "norm", *SPECIALS, "<unk>", "<0x41>", "<0xE2>", "<unused7>"],
    *["<table>", "<unused99>", "<bos", "</td>", "▁▁", "▁▁▁", "[multimodal]", "日本語", "한국어", "ẹ\u0301"],
    *["o\u0302\u0323", "\u1100\u1161\u11a8", "가\u11a8", "👩\u200d💻", *"🎉\u200b\ufeff\ufffd\ud800\udfff\U0010ffff"],
    *"\x00\x1c\x85\xa0\u1680\u180e\u2028\u202f\u3000\ufdd0\u0378ßſKﬆǄŉⅧ²½㊀𝟘١ÅΩ\u0374",  # blanks, folds, digits
    *"\u0f73\u0344\u0958\u2adc\u1ab0\u08d3\u0301\u0323\u05b0\U0001d15e\U00011935\U00011930",  # marks, some of them new
]  # fmt: skip
TEXT = st.lists(st.sampled_from(PIECES) | st.characters() | st.characters(min_codepoint=0x300), max_size=14).map(
    "".join
)


def streamed(tokenizer: AnyTokenizer, ids: list[int]) -> list[str]:
    stream = StreamDecoder(tokenizer)
    return [*map(stream.push, ids), stream.finish()]


def answers(tokenizer: AnyTokenizer, text: str) -> list[Any]:
    ids = tokenizer.encode(text)
    marked, spans = tokenizer.encode_spans(text)
    pieces = [tokenizer.encode_piece(text, plain=p, start=False) for p in (False, True)]
    decoded = [tokenizer.decode(ids), tokenizer.decode(marked), tokenizer.decode(marked, specials=True)]
    return [ids, marked, spans, pieces, decoded, streamed(tokenizer, ids)]


@every
@given(text=TEXT)
@settings(max_examples=20, deadline=None)
def test_ids_spans_and_text_are_the_librarys(both: Both, name: str, text: str) -> None:
    library, compact = both(name)
    assert answers(compact, text) == answers(library, text)


@every
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_any_ids_decode_and_stream_as_in_the_library(both: Both, name: str, data: st.DataObject) -> None:
    library, compact = both(name)
    ids = data.draw(st.lists(st.integers(0, compact.vocab_size + 1), max_size=30))
    assert compact.decode(ids) == library.decode(ids)
    assert compact.decode(ids, specials=True) == library.decode(ids, specials=True)
    assert streamed(compact, ids) == streamed(library, ids)


@every
def test_facts_are_the_librarys(both: Both, name: str) -> None:
    library, compact = both(name)
    for fact in ("vocab_size", "special_ids", "special_texts", "control_ids"):
        assert getattr(compact, fact) == getattr(library, fact)
    assert compact.decoder_kinds() == library.decoder_kinds()
    for at in range(-1, compact.vocab_size + 2):
        assert compact.token_of(at) == library.token_of(at)
    for token in [*PIPELINES[name]().get_vocab(True), "no such token", "", "\ud800"]:
        assert compact.id_of(token) == library.id_of(token)


@every
def test_long_runs_and_long_texts(both: Both, name: str) -> None:
    library, compact = both(name)
    for text in (" " * 5000, "a" * 5000, "\n" * 700, "🎉" * 900, "e\u0301" * 900, "".join(TEXTS) * 30, "<unk>" * 99):
        assert compact.encode(text) == library.encode(text)
        assert compact.encode_spans(text) == library.encode_spans(text)


def chatted(tokenizer: Any, source: str, chat: list[dict[str, str]]) -> list[int] | str:
    try:
        return encode_chat(ours(source), tokenizer, chat)
    except Usage as error:
        return str(error)


@pytest.mark.parametrize("name", ["gpt2", "llama3", "qwen", "gemma", "llama2", "mistral"])
@pytest.mark.parametrize("source", [GEMMA, LLAMA, CHATML], ids=["gemma", "llama", "chatml"])
def test_chats_are_the_librarys(both: Both, name: str, source: str) -> None:
    library, compact = both(name)
    for chat in [*CHATS, user(NASTY, "fine", NASTY), user("<end_of", "_turn>", "<start_of_turn")]:
        assert chatted(compact, source, chat) == chatted(library, source, chat)


def test_too_much_text_and_ids_out_of_range_are_refused(both: Both) -> None:
    _, compact = both("gpt2")
    with pytest.raises(Usage):
        compact.encode("a" * (16 << 20) + "a")
    for wrong in (-1, 2**40):
        with pytest.raises(Usage):
            compact.decode([wrong])


def test_the_trained_checkpoint(tmp_path: Path) -> None:
    library = Tokenizer.open(DEMO)
    compact = opened(tmp_path / "vocab", compile_vocab((DEMO / "tokenizer.json").read_bytes(), "demo"))
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "README.md", Path(__file__), TALE))
    assert compact.encode(text) == library.encode(text)
    assert compact.decode(compact.encode(text)) == text
