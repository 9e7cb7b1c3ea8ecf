"""Every family against transformers: the same logits, however the tokens are fed and wherever the weights lie."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import edge
from edge.session import Session
from loaders.checkpoint import Checkpoint
from loaders.errors import BadCheckpoint
from loaders.rewrite import write_slice
from loaders.slices import resolve
from tests import makers
from tests.conftest import Folder, Open
from tests.makers import Tensors, assert_close, distance, expected, make, prompt, reference, variant
from tests.shrink import DISTINCT, GEMMA, NAMES, parse, real, shrink

# Configs that no published file has, but that a family reads.
DERIVED: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma-untied": ("gemma-3n-E2B", {"tie_word_embeddings": False}),
    "gemma-active-2": ("gemma-3n-E2B", {"altup_active_idx": 2}),
    "gemma-3-streams": ("gemma-3n-E2B", {"altup_num_inputs": 3}),
    "gemma-unscaled": ("gemma-3n-E2B", {"altup_correct_scale": False}),
    "gemma-no-sharing": ("gemma-3n-E2B", {"num_kv_shared_layers": 0}),
    "gemma-null-sparsity": ("gemma-3n-E2B", {"activation_sparsity_pattern": None}),
    "gemma-uneven": (
        "gemma-3n-E2B",
        {
            "intermediate_size": [96 + 16 * (i % 3) for i in range(15)],
            "activation_sparsity_pattern": [0.5, 0.9, 0.0] * 5,
            "layer_types": (["full_attention"] * 2 + ["sliding_attention"] * 3) * 3,
            "num_kv_shared_layers": 6,
        },
    ),
    "llama-mha": ("llama-3.2-1B", {"num_key_value_heads": 8, "rope_scaling": None, "tie_word_embeddings": False}),
    "qwen3-window": ("qwen3-0.6B", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 3}),
}
EVERYTHING = (*NAMES, *DERIVED)
# Published inside a multimodal model, or of kinds no other test of the files has.
NESTED = ("gemma-3-4B", "gemma-4-E2B", "mistral-small-3.1-24B", "llama-4-maverick-17B-128E", "deepseek-v3")
TIERS = ("ram", "device", "ssd")
LENGTH = 53  # more than three windows of 16


@pytest.fixture(scope="module")
def folder_of(folders: Folder, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """name -> checkpoint, of published configs and derived ones."""

    @cache
    def folder(name: str) -> Path:
        if name in NAMES:
            return folders(name)
        base, keys = DERIVED[name]
        return make(tmp_path_factory.mktemp(name), {**shrink(real(base)), **keys})

    return folder


@pytest.fixture(scope="module")
def session_of(folder_of: Callable[[str], Path]) -> Iterator[Callable[..., Session]]:
    """(name, tier, engine) -> a loaded session, its cache empty and its chunk as planned."""

    @cache
    def load(name: str, tier: str, engine: str) -> Session:
        return edge.load(folder_of(name), engine=engine, precision="float32", slice="full", ple=tier)

    made: list[Session] = []

    def session(name: str, tier: str = "auto", chunk: int | None = None, engine: str = "native") -> Session:
        found = load(name, tier, engine)
        made.append(found)
        found.reset()
        found.engine.chunk = found.plan.chunk if chunk is None else chunk
        return found

    yield session
    for found in made:
        found.close()


@pytest.fixture(scope="module")
def wanted(folder_of: Callable[[str], Path]) -> Callable[[str], tuple[np.ndarray, np.ndarray]]:
    """name -> (ids, transformers' logits for them)."""

    @cache
    def find(name: str) -> tuple[np.ndarray, np.ndarray]:
        model = reference(folder_of(name))
        ids = prompt(model.config.vocab_size, LENGTH)
        return ids, expected(model, ids)

    return find


def fed(session: Session, ids: np.ndarray, sizes: list[int]) -> tuple[np.ndarray, list[int]]:
    """Logits at the end of each piece, with the positions they belong to."""
    assert sum(sizes) == len(ids)
    ends = np.cumsum(sizes)
    found = [session.step(ids[end - size : end]) for size, end in zip(sizes, ends, strict=True)]
    assert session.engine.position == len(ids)
    return np.stack(found), [int(end) - 1 for end in ends]


Sessions = Callable[..., Session]
Wanted = Callable[[str], tuple[np.ndarray, np.ndarray]]


@pytest.mark.parametrize(
    ("name", "chunk", "engine"),
    [
        *product(NAMES, (64, 7), ("native",)),
        *product(NAMES, (17,), ("native", "torch")),
        *product(DERIVED, (11,), ("native",)),
    ],
)
def test_every_position_in_chunks(name: str, chunk: int, engine: str, session_of: Sessions, wanted: Wanted) -> None:
    ids, logits = wanted(name)
    assert_close(session_of(name, chunk=chunk, engine=engine).logits(ids), logits)


STEPWISE = [1] * LENGTH
PIECES = {
    "stepwise": STEPWISE,
    "whole": [LENGTH],
    "prefill-then-steps": [35, *STEPWISE[35:]],
    "round-the-window": [15, 1, 1, 1, 20, 1, 14],
    "windows": [16, 16, 16, 5],
    "uneven": [1, 17, 1, 33, 1],
}


WINDOWED = ("prefill-then-steps", "round-the-window")


@pytest.mark.parametrize(
    ("name", "pieces", "engine"),
    [
        *product(NAMES, PIECES, ("native",)),
        *product(NAMES, WINDOWED, ("torch",)),
        *product(DERIVED, WINDOWED, ("native",)),
    ],
)
def test_pieces(name: str, pieces: str, engine: str, session_of: Sessions, wanted: Wanted) -> None:
    ids, logits = wanted(name)
    found, at = fed(session_of(name, engine=engine), ids, PIECES[pieces])
    assert_close(found, logits[at])


@pytest.mark.parametrize("name", EVERYTHING)
def test_chunked_prefill_skips_what_only_the_last_chunk_needs(name: str, session_of: Sessions, wanted: Wanted) -> None:
    ids, logits = wanted(name)
    session = session_of(name, chunk=7)
    found, at = fed(session, ids, [40, 1, 12])
    assert_close(found, logits[at])


@pytest.mark.parametrize("name", GEMMA)
@pytest.mark.parametrize("tier", TIERS)
def test_tiers(name: str, tier: str, session_of: Sessions, wanted: Wanted) -> None:
    ids, logits = wanted(name)
    session = session_of(name, tier, chunk=11)
    assert session.plan.ple == tier
    whole = session.logits(ids)
    assert_close(whole, logits)
    assert np.array_equal(whole, session_of(name, "ram", chunk=11).logits(ids)), "a tier changed a bit"
    session = session_of(name, tier)
    for i, token in enumerate(ids[:24].tolist()):
        session.prefetch(token)
        assert_close(session.step([token])[None], logits[i : i + 1])


@pytest.mark.parametrize("name", DISTINCT)
def test_recorded_decode_step(name: str, opened: Open, folder_of: Callable[[str], Path], wanted: Wanted) -> None:
    """The step of fixed shapes that a GPU records, run eagerly: past the window and past a bucket."""
    ids, logits = wanted(name)
    session = opened(folder_of(name), engine="torch")
    session.engine.graphs = True
    found, at = fed(session, ids, [10] + [1] * 30 + [5] + [1] * (LENGTH - 45))
    assert session.engine.steps
    assert_close(found, logits[at])


SLICES = (
    "half",
    "quarter",
    "skip-first-shared",
    "half+skip-first-shared",
    "ffn=200x3,133x8,40x1,64x{rest}",
    "skip=1,3,6,{shared}",
)


@pytest.mark.parametrize("name", GEMMA)
@pytest.mark.parametrize("slice_", SLICES)
def test_slices(name: str, slice_: str, opened: Open, folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    """A slice read as windows, against transformers on the same slice written out."""
    source = folder_of(name)
    layers = len(parse(json.loads((source / "config.json").read_text())).layers)
    text = slice_.format(rest=layers - 12, shared=layers - 3)
    session = opened(source, slice=text)
    written = tmp_path / "slice"
    write_slice(session.checkpoint, session.plan.part, written)
    model = reference(written)
    assert model.config.num_hidden_layers == len(session.model.layers)
    ids = prompt(session.model.vocab, 40)
    logits = expected(model, ids)
    assert_close(session.logits(ids), logits)
    found, at = fed(session, ids, [18] + [1] * 22)
    assert_close(found, logits[at])
    assert np.array_equal(opened(written).logits(ids), session.logits(ids)), "written and live slices differ"
    assert distance(opened(source).logits(ids), logits) > 0.01, "the slice is no smaller model"


def test_written_slices_read_their_own_config(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(folder_of("gemma-3n-E4B"))
    part = resolve(checkpoint.model, checkpoint.family, "half+skip-first-shared")
    write_slice(checkpoint, part, tmp_path / "out")
    from loaders.network.matformer import sliced

    again = Checkpoint.open(tmp_path / "out").model
    assert again.layers == sliced(checkpoint.model, part).layers
    checkpoint.close()


@pytest.mark.parametrize("name", ["gemma-3n-E4B", "llama-3.1-8B", "qwen3-8B", "gpt2", *NESTED])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_16_bit_files_run_in_float32(name: str, dtype: torch.dtype, opened: Open, tmp_path: Path) -> None:
    raw = shrink(real(name))
    folder = make(tmp_path / "half", raw.get("text_config", raw), dtype=dtype)
    session = opened(folder)
    assert session.checkpoint.dtype == {torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]
    ids = prompt(session.model.vocab, 24)
    assert_close(session.logits(ids), expected(reference(folder), ids))
    if session.model.ple is not None:
        assert np.array_equal(opened(folder, ple="ssd").logits(ids), session.logits(ids))


@pytest.mark.parametrize(
    "name", ["gemma-3n-E4B", "llama-3.2-3B", "qwen3-8B", "gpt2", "gemma-3-1B", "moonlight-16B-A3B"]
)
def test_bf16_is_the_same_model_less_exactly(name: str, opened: Open, folder_of: Callable[[str], Path]) -> None:
    """Rounding to bfloat16 costs digits, not mechanisms: most of the greedy choices stay."""
    folder = folder_of(name)
    exact, rounded = opened(folder), opened(folder, precision="bf16")
    ids = prompt(exact.model.vocab, 40)
    a, b = exact.logits(ids), rounded.logits(ids)
    assert 1e-4 < distance(b, a) < 0.35
    assert np.mean(a.argmax(-1) == b.argmax(-1)) > 0.7


@pytest.mark.parametrize("name", ["gemma-3n-E2B", "llama-3.1-8B", "qwen3-0.6B"])
def test_shards(name: str, opened: Open, folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    raw = shrink(real(name))
    folder = make(tmp_path / "sharded", raw, shard_size="300KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    session = opened(folder)
    ids = prompt(session.model.vocab, 20)
    assert np.array_equal(session.logits(ids), opened(folder_of(name)).logits(ids))


@pytest.mark.parametrize("name", NAMES)
def test_the_config_that_transformers_saves(
    name: str, opened: Open, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """Both spellings of one model: ours in the file that was published, theirs in the one they write today."""
    raw = shrink(real(name))
    folder = make(tmp_path / "saved", raw.get("text_config", raw), saved_config=True)
    published = json.loads((folder_of(name) / "config.json").read_text())
    saved = json.loads((folder / "config.json").read_text())
    rotates = any(layer.attention.rope for layer in parse(saved).layers)
    assert ("rope_parameters" in saved) == rotates
    assert parse(saved) == parse(published)
    ids = prompt(parse(saved).vocab, 20)
    assert np.array_equal(opened(folder).logits(ids), opened(folder_of(name)).logits(ids))


PREFIXES = {"bare": "", "text": "model.", "nested": "model.language_model.", "early": "language_model.model."}


@pytest.mark.parametrize("name", ["gemma-3n-E2B", "llama-3.1-8B", "qwen3-0.6B", *NESTED])
@pytest.mark.parametrize("prefix", PREFIXES.values(), ids=PREFIXES.keys())
def test_prefixes(name: str, prefix: str, opened: Open, folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    head = "language_model.lm_head.weight" if prefix == "language_model.model." else "lm_head.weight"
    folder = variant(folder_of(name), tmp_path / "renamed", makers.prefixed(prefix, head))
    session = opened(folder)
    assert session.checkpoint.where["embed"].name == prefix + "embed_tokens.weight"
    ids = prompt(session.model.vocab, 20)
    assert np.array_equal(session.logits(ids), opened(folder_of(name)).logits(ids))


def test_multimodal_upload(opened: Open, folder_of: Callable[[str], Path], wanted: Wanted, tmp_path: Path) -> None:
    """The published layout: nested config, nested names, towers that are counted and left alone."""
    raw = shrink(real("gemma-3n-E4B"))
    folder = make(tmp_path / "multimodal", raw, change=makers.multimodal())
    session = opened(folder)
    assert session.checkpoint.raw_config["model_type"] == "gemma3n"
    assert session.checkpoint.skipped_bytes == makers.tower_bytes()
    ids, logits = wanted("gemma-3n-E4B")
    assert_close(session.logits(ids), logits)
    text = sum(t.nbytes for t in session.checkpoint.where.values())
    assert session.checkpoint.shards.bytes_read == text


def with_unused_keys(tensors: Tensors) -> Tensors:
    """Keys and values of the layers that share, as the published files carry them."""
    generator = torch.Generator().manual_seed(9)
    found = dict(tensors)
    for name, t in tensors.items():
        if ".self_attn.k_" in name or ".self_attn.v_proj" in name:
            _, _, layer, rest = name.split(".", 3)
            for shared in range(10, 15):
                found[f"model.layers.{shared}.{rest}"] = torch.randn(t.shape, generator=generator)
            assert int(layer) < 10
    return found


def test_keys_of_sharing_layers_may_be_there(
    opened: Open, folder_of: Callable[[str], Path], wanted: Wanted, tmp_path: Path
) -> None:
    folder = variant(folder_of("gemma-3n-E2B"), tmp_path / "unused", with_unused_keys)
    session = opened(folder)
    assert len(session.checkpoint.ignored) == 15
    ids, logits = wanted("gemma-3n-E2B")
    assert_close(session.logits(ids), logits)
    assert_close(expected(reference(folder), ids), logits)


def with_head(change: Callable[[torch.Tensor], torch.Tensor], embed: str = "model.embed_tokens.weight") -> Any:
    """Adds a head made from the embedding."""
    return lambda tensors: {**tensors, "lm_head.weight": change(tensors[embed].clone())}


def nudged(row: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """One value of one row is another."""

    def change(t: torch.Tensor) -> torch.Tensor:
        t[row, 0] += 1.0
        return t

    return change


@pytest.mark.parametrize("name", ["gemma-3n-E2B", "llama-3.2-1B", "qwen3-0.6B"])
def test_tied_head_may_be_there_as_a_copy(
    name: str, opened: Open, folder_of: Callable[[str], Path], wanted: Wanted, tmp_path: Path
) -> None:
    session = opened(variant(folder_of(name), tmp_path / "copy", with_head(lambda t: t)))
    ids, logits = wanted(name)
    assert_close(session.logits(ids), logits)
    assert session.checkpoint.ignored == ("lm_head.weight",)


@pytest.mark.parametrize("name", ["gemma-3n-E2B", "llama-3.2-1B", "qwen3-0.6B"])
@pytest.mark.parametrize(
    "change",
    [nudged(0), nudged(-1), torch.neg, lambda t: t[:-1], lambda t: t.half()],
    ids=["first-row", "last-row", "all", "shape", "dtype"],
)
def test_tied_head_that_differs_is_refused(
    name: str, change: Callable[[torch.Tensor], torch.Tensor], folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = variant(folder_of(name), tmp_path / "other", with_head(change))
    with pytest.raises(BadCheckpoint, match=r"lm_head\.weight: differs from the token embedding") as info:
        Checkpoint.open(folder)
    assert info.value.exit_code == 65


@pytest.mark.parametrize("name", ["gemma-3n-E2B", "llama-3.2-1B", "qwen3-8B"])
def test_greedy_text_equals_transformers(
    name: str, opened: Open, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """From text to tokens to text, each token chosen by transformers over the whole sequence anew."""
    folder = makers.tokenizer(variant(folder_of(name), tmp_path / "text", lambda t: t, eos_token_id=1, bos_token_id=0))
    session, model = opened(folder), reference(folder)
    ids = session.tokenizer.encode("the cat and the hat")
    events = list(session.generate("the cat and the hat", max_tokens=16))
    for event in events[:-1]:
        ids.append(int(expected(model, np.array(ids))[-1].argmax()))
        assert event.token == ids[-1]
    if events[-1].finish == "stop":
        assert int(expected(model, np.array(ids))[-1].argmax()) == 1
    else:
        assert len(events) == 17
    text = session.tokenizer.decode([e.token for e in events if e.token is not None])
    assert "".join(e.text for e in events) == text


@pytest.mark.parametrize("name", NAMES)
def test_logits_leave_the_conversation_alone(name: str, session_of: Sessions, wanted: Wanted) -> None:
    ids, logits = wanted(name)
    session = session_of(name, chunk=6)
    session.step(ids[:22])
    other = session.logits(ids[::-1])
    assert session.engine.position == 22
    assert session.tokens == ids[:22].tolist()
    assert_close(session.step(ids[22:])[None], logits[-1:])
    assert np.array_equal(other, session.logits(ids[::-1]))


@pytest.mark.parametrize("name", NAMES)
def test_reset_forgets_everything(name: str, session_of: Sessions, wanted: Wanted) -> None:
    ids, logits = wanted(name)
    session = session_of(name)
    session.step(ids[::-1])
    session.reset()
    assert_close(session.step(ids[:30])[None], logits[29:30])


@pytest.mark.parametrize("name", [*GEMMA, "llama-3.2-1B", "qwen3-0.6B"])
@pytest.mark.parametrize("context", [1, 2, 16, 17])
def test_context_shorter_than_the_prompt_is_a_smaller_cache(
    name: str, context: int, opened: Open, folder_of: Callable[[str], Path], wanted: Wanted
) -> None:
    ids, logits = wanted(name)
    session = opened(folder_of(name), context=context)
    assert session.room == context
    for i in range(context):
        assert_close(session.step(ids[i : i + 1])[None], logits[i : i + 1])
    assert session.room == 0
    assert_close(session.logits(ids[:context]), logits[:context])
