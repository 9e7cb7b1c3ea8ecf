"""Text -> tokenizer.json and token ids: ``python -m benchmarks.demo_model.prepare CORPUS -o DATA``.

CORPUS holds ``tales.txt.xz`` and ``heldout.txt.xz``. The tokenizer sees the tales alone: the held-out books are for
evaluation, of the vocabulary too.
"""

from __future__ import annotations

import argparse
import json
import lzma
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from benchmarks.demo_model.shape import CONFIG, read_config

SPECIAL = ("<pad>", "<eos>", "<bos>")
BOS = SPECIAL.index("<bos>")
# Pieces of text for the tokenizer's threads. Cut after line ends that no blanks stand beside, as in this corpus, they
# give the tokens of the whole.
PIECE = 1 << 20


def paragraphs(text: str) -> Iterator[str]:
    """``text`` in pieces of about PIECE characters, cut after line ends."""
    start = 0
    while start < len(text):
        cut = text.find("\n", start + PIECE)
        stop = len(text) if cut < 0 else cut + 1
        yield text[start:stop]
        start = stop


def train_tokenizer(text: str, vocab: int) -> Tokenizer:
    """A byte-level BPE of ``vocab`` entries that puts <bos> before a text, as the model sees it in training."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(paragraphs(text), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B:1", special_tokens=[("<bos>", BOS)]
    )
    return tokenizer


def encode(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """The ids of a text, without special tokens, uint16 [n]."""
    pieces = tokenizer.encode_batch_fast(list(paragraphs(text)), add_special_tokens=False)
    return np.concatenate([np.array(piece.ids, np.uint16) for piece in pieces])


def read(path: Path) -> str:
    """A text of the corpus."""
    with lzma.open(path, "rt", encoding="utf-8") as file:
        return file.read()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", type=Path, help="the folder with tales.txt.xz and heldout.txt.xz")
    parser.add_argument("-o", "--out", type=Path, required=True, help="where the prepared data goes")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    tales, heldout = read(args.corpus / "tales.txt.xz"), read(args.corpus / "heldout.txt.xz")
    tokenizer = train_tokenizer(tales, read_config(CONFIG)["vocab_size"])
    compact = json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, separators=(",", ":"))
    (args.out / "tokenizer.json").write_text(compact + "\n", encoding="utf-8")
    for name, text in (("tales", tales), ("heldout", heldout)):
        ids = encode(tokenizer, text)
        np.save(args.out / f"{name}.npy", ids)
        size = len(text.encode())
        print(f"{name}: {size} bytes, {len(ids)} tokens, {size / len(ids):.3f} bytes a token")


if __name__ == "__main__":
    main()
