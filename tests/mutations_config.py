"""A1 to A20: config.json, generation_config.json, and the name of the folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.mutations import (
    BASES,
    CONFIG,
    DIR,
    EVERY,
    GENERATION,
    MIB,
    PLAIN_TOKEN,
    RUN,
    SAY,
    SHARD,
    SHOW,
    TOKENIZER,
    Case,
    Change,
    added,
    bytes_of,
    closed_to_all,
    config,
    edited,
    every,
    instead,
    keys,
    linked,
    nothing,
    removed,
    sparse,
    spelt,
    unpacked,
    without_privileges,
    written,
)
from tests.small import TOKENS, VOCAB

EMBED = "model.embed_tokens.weight"
BASE = BASES["gemma3n"]
WHOLE = json.dumps(BASE)
PER_LAYER = ("intermediate_size", "layer_types", "activation_sparsity_pattern")


def key(id: str, code: int, name: str, value: Any, *words: str, **more: Any) -> Case:
    """One key of config.json with another value; None removes what was said."""
    return Case(id, config(**{name: value}), code, (CONFIG, name, *words), **more)


def text(id: str, data: str | bytes, code: int, *words: str, **more: Any) -> Case:
    """Another text as config.json."""
    return Case(id, written(CONFIG, data), code, (CONFIG, *words), **more)


def spelling(id: str, name: str, value: str, *words: str, **more: Any) -> Case:
    """A value of a key of config.json, spelt by hand."""
    return Case(id, spelt(CONFIG, name, value), 65, (CONFIG, *words), **more)


def layers(count: int) -> Change:
    """A config of so many layers, every list of the right length."""

    def change(data: dict[str, Any]) -> None:
        data.update({name: (data[name] + data[name][-1:] * 9)[:count] for name in PER_LAYER}, num_hidden_layers=count)
        data.update(num_kv_shared_layers=1)

    return edited(CONFIG, change)


def refused(id: str, change: Change, *words: str, **more: Any) -> Case:
    """A change that makes bad data."""
    return Case(id, change, 65, words, **more)


def works(id: str, change: Change, *words: str, **more: Any) -> Case:
    """A change that does no harm: the model is described, its words in the output."""
    return Case(id, change, 0, words or ('"family": "gemma3n"',), (SHOW,), **more)


def runs(id: str, change: Change, *words: str, **more: Any) -> Case:
    """A change with which the model still speaks."""
    return Case(id, change, 0, ('"tokens": [', *words), (SAY,), warm=True, **more)


def files(name: str, commands: tuple[tuple[str, ...], ...]) -> list[Case]:
    """A1 for one file: whatever may stand under its name that is no file one can read."""
    tag = "A1" if name == CONFIG else "A1-generation"

    def case(id: str, change: Change, code: int, *words: str, inside: Callable[[], object] | None = None) -> Case:
        return Case(f"{tag}-{id}", change, code, (name, *words), commands, inside=inside)

    return [
        case("empty", written(name, b""), 65, "empty file"),
        case("spaces", written(name, b" \n" * 99), 65, "white space"),
        case("folder", instead(name, lambda path: path.mkdir()), 66, "a folder", "a regular file"),
        case("fifo", instead(name, os.mkfifo), 66, "a FIFO"),
        case("unreadable", closed_to_all(name), 77, "Permission denied", inside=without_privileges),
        case("dangling", linked(name, "nowhere"), 66, "No such file"),
        case("loop", linked(name, name), 66, "symbolic links"),
        case("device", linked(name, "/dev/zero"), 66, "a device"),
        case("huge", sparse(name, 2 << 30), 65, f"{2 << 30} bytes, larger than 8 MiB limit"),
        case("lfs", written(name, "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), 65, "git-LFS pointer"),
        case("html", written(name, "<!DOCTYPE html><html>404</html>"), 65, "an HTML page"),
    ]


def stops(tag: str, name: str, change: Callable[..., Change]) -> list[Case]:
    """Stop tokens that no vocabulary has; ``change`` writes them to a file."""
    values = {"-1": -1, "fraction": 1.5, "text": "<eos>", "true": True, "2^40": 2**40, "null-inside": [1, None]}
    values |= {"million": [1] * 10**6, "vocab": VOCAB, "vocab-in-a-list": [1, VOCAB]}
    return [
        Case(f"{tag}-eos-{id}", change(name, eos_token_id=value), 65, (name, "eos_token_id"), (RUN,))
        for id, value in values.items()
    ]


def one_more_token(folder: Path) -> None:
    """A tokenizer with one token more than the embedding has rows."""
    extra = [{"id": i, "content": f"<extra{i}>", "special": True, **PLAIN_TOKEN} for i in range(TOKENS, VOCAB + 1)]
    edited(TOKENIZER, lambda data: data["added_tokens"].extend(extra))(folder)


def copied_head(folder: Path) -> None:
    """The embedding a second time, as the head of a tied model."""
    head, data = unpacked((folder / SHARD).read_bytes())
    begin, end = head[EMBED]["data_offsets"]
    added("lm_head.weight", "BF16", [VOCAB, 32], data[begin:end])(folder)


def nowhere(id: str, path: str, *words: str) -> list[Case]:
    """A path that is no model. What could be there differs between commands, so each has a case of its own."""
    return [
        Case(f"A20-{id}-{verb}", nothing, 66, words, (tuple(path if arg == DIR else arg for arg in (verb, *rest)),))
        for verb, *rest in EVERY
    ]


FREE = tuple(arg for arg in SAY if arg not in ("-c", "32"))
WRONG_NUMBERS: dict[str, Any] = {
    **{"0": 0, "-1": -1, "1.5": 1.5, "text": "24", "true": True, "10^9": 10**9, "2^63": 2**63, "-2^63": -(2**63)},
    **{"list": [2], "object": {}, "whole-float": 2.0},
}
COUNTS = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
YARN = {"rope_type": "yarn", "factor": 2.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
EVIL = {
    "auto_map": {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil--repo.Config"},
    "trust_remote_code": True,
    "_attn_implementation": "evil/repo",
    "_attn_implementation_internal": "evil/repo",
}
CANARY = "open(__file__ + '.was_here', 'w')\n"
EVIL_FILES = tuple(f"model/{name}.py" for name in ("evil", "modeling_evil", "sitecustomize", "edge", "numpy", "torch"))
LOOK_ALIKES = every(*(written(path.removeprefix("model/"), CANARY) for path in EVIL_FILES))
ODD_NAMES = {
    **{"help": "--help", "newline": "line\nbreak", "escape": "\x1b[31mred\x1b]0;title\x07", "emoji": "🎉👩‍👩‍👧"},
    **{"not-utf8": os.fsdecode(b"caf\xe9\xff"), "markup": "[red]x[/red]", "bidi": "\u202ecod", "longest": "x" * 255},
}


def odd_name(id: str, name: str) -> list[Case]:
    """A folder of an odd name works; what is wrong in it is told without the terminal being told anything."""
    place = ("--", DIR)
    sound = Case(f"A20-{id}-works", nothing, 0, ('"family": "gemma3n"',), (("inspect", "--json", *place),), folder=name)
    broken = Case(
        f"A20-{id}-refused", written(CONFIG, "{"), 65, (CONFIG, "line 1"), (("inspect", *place),), folder=name
    )
    return [sound, broken]


SYNTAX: list[Case] = [
    Case("A1-missing", removed(CONFIG), 66, (CONFIG, "No such file")),
    *files(CONFIG, EVERY),
    runs("A1-generation-missing-works", removed(GENERATION)),
    *files(GENERATION, (RUN,)),
    text("A2-not-json", "hello", 65, "not JSON", "line 1 column 1"),
    text("A2-python", str(BASE), 65, "not JSON", "line 1 column 2"),
    text("A2-truncated", WHOLE[:-20], 65, "not JSON", "line 1 column"),
    text("A2-truncated-line", json.dumps(BASE, indent=1)[:200], 65, "not JSON", "column"),
    text("A2-utf16", WHOLE.encode("utf-16"), 65, "not UTF-8 at line 1 column 1"),
    text("A2-utf32", WHOLE.encode("utf-32-le"), 65, "not JSON"),
    text("A2-latin1", '{"model_type": "caf\xe9"}'.encode("latin-1"), 65, "not UTF-8 at line 1 column"),
    works("A2-bom-works", bytes_of(CONFIG, lambda data: b"\xef\xbb\xbf" + data)),
    text("A2-two-boms", b"\xef\xbb\xbf\xef\xbb\xbf" + WHOLE.encode(), 65, "not JSON"),
    text("A2-trailing", WHOLE + "}", 65, "Extra data"),
    text("A2-two-objects", WHOLE + WHOLE, 65, "Extra data"),
    text("A2-comment", "// a comment\n" + WHOLE, 65, "not JSON"),
    text("A2-trailing-comma", WHOLE[:-1] + ",}", 65, "not JSON"),
    text("A2-nul", WHOLE.replace("{", "{\0", 1), 65, "not JSON"),
    text("A3-list", f"[{WHOLE}]", 65, "a list of 1", "a JSON object at the top level"),
    *(text(f"A3-{v}", v, 65, v, "a JSON object at the top level") for v in ('"gemma3n"', "1", "1.5", "null", "true")),
    refused("A4-string", sparse(CONFIG, 200 * MIB, b'{"model_type": "', b'"}'), CONFIG, "larger than 8 MiB limit"),
    text("A4-spaces-below-the-limit", b" " * (8 * MIB), 65, "white space"),
    Case("A4-string-below-the-limit", config(model_type="x" * (7 * MIB)), 78, (CONFIG, "model_type", "xxx")),
    text("A5-lists", "[" * 100_000, 65, "nested too deeply"),
    text("A5-objects", '{"a":' * 100_000, 65, "nested too deeply"),
    spelling("A5-value", "architectures", "[" * 100_000 + "]" * 100_000, "nested too deeply"),
    spelling("A6-digits", "hidden_size", "9" * 5000, "an integer of thousands of digits"),
    spelling("A6-negative", "hidden_size", "-" + "9" * 5000, "an integer of thousands of digits"),
    spelling("A6-just-legal", "hidden_size", "9" * 4000, "hidden_size", "an integer from 1"),
    *(
        spelling(f"A7-{value}", "rms_norm_eps", value, f"number {value}", "finite")
        for value in ("NaN", "Infinity", "-Infinity", "1e999", "-1e999")
    ),
    spelling("A7-in-a-list", "activation_sparsity_pattern", "[0.5, NaN, 0, 0, 0]", "number NaN"),
    spelling("A7-where-nobody-looks", "transformers_version", "[Infinity]", "number Infinity"),
    text("A8-twice", WHOLE[:-1] + ', "hidden_size": 32}', 65, "hidden_size", "duplicate key"),
    text("A8-twice-inside", WHOLE[:-1] + ', "rope_scaling": {"factor": 1, "factor": 2}}', 65, "factor", "duplicate"),
]  # fmt: skip

NUMBERS: list[Case] = [
    *(key(f"A9-{name}-{tag}", 65, name, value) for name in COUNTS for tag, value in WRONG_NUMBERS.items()),
    key("A9-num_hidden_layers-null", 65, "num_hidden_layers", None, "missing"),
    key("A9-vocab_size-null", 65, "vocab_size", None, "missing"),
    refused("A9-most-layers", config(num_hidden_layers=4096), "model.layers.2.", "layers=4096", base="llama"),
    refused("A9-widest", config(intermediate_size=1 << 20), SHARD, "mlp.gate_proj", "[1048576, 32]", base="llama"),
    key("A10-dim", 65, "hidden_size", 33, "num_attention_heads=2", base="llama"),
    key("A10-more-kv", 65, "num_key_value_heads", 4, "num_attention_heads=2"),
    refused("A10-kv-divides", config(num_attention_heads=4, num_key_value_heads=3), CONFIG,
            "num_key_value_heads", "num_attention_heads=4"),
    key("A10-head-dim-0", 65, "head_dim", 0),
    key("A10-head-dim-odd", 65, "head_dim", 15, "even"),
    refused("A10-head-dim-other", config(head_dim=8), SHARD, "self_attn.q_proj", "[16, 32] by config.json"),
    refused("A11-fewer", layers(4), SHARD, "embed_tokens_per_layer", "[316, 32] by config.json"),
    refused("A11-more", layers(7), SHARD, "embed_tokens_per_layer", "[316, 56] by config.json"),
    refused("A11-llama-fewer", config(num_hidden_layers=1), "model.layers.1.", "those of 1 layers", base="llama"),
    refused("A11-llama-more", config(num_hidden_layers=3), "model.layers.2.", "num_hidden_layers=3", base="llama"),
    refused("A12-vocab-more", config(vocab_size=VOCAB + 1), SHARD, EMBED, f"[{VOCAB + 1}, 32] by config.json"),
    refused("A12-vocab-less", config(vocab_size=VOCAB - 1), SHARD, EMBED, f"[{VOCAB - 1}, 32] by config.json"),
    # 320 tokens for 328 rows: uploads pad their embedding.
    works("A12-tokenizer-smaller-works", nothing, f'"vocab": {VOCAB}'),
    refused("A12-tokenizer-larger", one_more_token, TOKENIZER, f"{VOCAB + 1} tokens",
            f"vocab_size={VOCAB}", commands=(RUN,), warm=True),
    key("A13-theta-0", 65, "rope_theta", 0),
    key("A13-theta-negative", 65, "rope_theta", -10000.0),
    key("A13-theta-text", 65, "rope_theta", "10000"),
    spelling("A13-theta-1e400", "rope_theta", "1e400", "number 1e400"),
    spelling("A13-theta-digits", "rope_theta", "1" + "0" * 400, "rope_theta", "finite"),
    key("A13-scaling-unknown", 78, "rope_scaling", YARN, "rope_scaling.rope_type", "yarn"),
    key("A13-scaling-no-type", 78, "rope_scaling", {"factor": 2.0}, "unknown key", "factor"),
    key("A13-scaling-list", 65, "rope_scaling", [1, 2]),
    key("A13-factor-0", 65, "rope_scaling", {**LLAMA3, "factor": 0}, "rope_scaling.factor"),
    key("A13-factor-missing", 65, "rope_scaling", {**LLAMA3, "factor": None}, "rope_scaling.factor", "missing"),
    key("A13-factors-crossed", 65, "rope_scaling", {**LLAMA3, "high_freq_factor": 0.5}, "high_freq_factor"),
    # Nothing is sized by the context that a config claims: the planner takes one that fits the budget.
    Case("A14-works", config(max_position_embeddings=10**12), 0, ('"tokens": [',), (FREE,), warm=True),
    key("A14-2^63", 65, "max_position_embeddings", 2**63),
    key("A14-0", 65, "max_position_embeddings", 0),
]  # fmt: skip

MECHANISMS: list[Case] = [
    *(key(f"A15-{name}", 78, "model_type", name, "gemma4_text, gpt2") for name in ("bert", "Llama", "../x")),
    *(key(f"A15-{name}", 78, "model_type", v) for name, v in {"list": ["llama"], "number": 1, "null": None}.items()),
    key("A15-key", 78, "mystery_norm", True, "unknown key mystery_norm"),
    Case("A15-keys", config(**{f"mystery_{i}": i for i in range(1000)}), 78, (CONFIG, "mystery_0", "and 990 more")),
    Case("A15-long-key", config(**{"x" * 100_000: 1}), 78, (CONFIG, "unknown key xxx")),
    Case("A15-escape-in-a-key", config(**{"\x1b[31m\n": 1}), 78, (CONFIG, r"unknown key \x1b[31m\n")),
    works("A16-code-inspected", every(config(**EVIL), LOOK_ALIKES), closed=EVIL_FILES),
    runs("A16-code-run", every(config(**EVIL), LOOK_ALIKES), closed=EVIL_FILES),
    *(
        Case(f"A16-quantized-{tag}", config(quantization_config=value), 78, (CONFIG, "quantization_config"))
        for tag, value in {"awq": {"quant_method": "awq"}, "evil": {"quant_method": "evil/repo"}, "text": "x"}.items()
    ),
    key("A16-attention-bias", 78, "attention_bias", True, "not implemented"),
    # The type of each tensor is in the shards; what the config says of it is read by nobody.
    *(works(f"A17-dtype-{v}-works", config(torch_dtype=v)) for v in ("object", "float128", 7)),
    *stops("A17", GENERATION, keys),
    *stops("A17-config", CONFIG, lambda name, **values: every(removed(GENERATION), keys(name, **values))),
    refused("A18-other-head", added("lm_head.weight", "BF16", [VOCAB, 32], bytes(VOCAB * 64)), SHARD,
            "lm_head.weight", "differs from the token embedding"),
    refused("A18-head-of-another-shape", added("lm_head.weight", "BF16", [1, 32], bytes(64)), SHARD, "lm_head.weight"),
    works("A18-copied-head-works", copied_head, '"ignored_tensors": 1'),
    refused("A18-no-head", config(tie_word_embeddings=False), "lm_head.weight", "no such tensor", f"[{VOCAB}, 32]"),
    refused("A18-no-head-llama", config(tie_word_embeddings=True), SHARD, "lm_head.weight", "differs", base="llama"),
    key("A18-text", 65, "tie_word_embeddings", "yes", "true or false"),
    key("A19-short", 65, "layer_types", BASE["layer_types"][:-1], "a list of 4", "a list of 5"),
    key("A19-long", 65, "layer_types", BASE["layer_types"] * 2, "a list of 10"),
    key("A19-unknown-kind", 78, "layer_types", ["linear_attention"] * 5, "linear_attention"),
    key("A19-widths-short", 65, "intermediate_size", [64] * 4, "a list of 5"),
    key("A19-width-0", 65, "intermediate_size", [64, 64, 0, 64, 64], "intermediate_size[2]"),
    key("A19-window-0", 65, "sliding_window", 0),
    key("A19-window-negative", 65, "sliding_window", -8),
    key("A19-sparsity", 65, "activation_sparsity_pattern", 1.0),
    key("A19-all-shared", 65, "num_kv_shared_layers", 5, "num_hidden_layers=5"),
    key("A19-none-to-share", 65, "num_kv_shared_layers", 3, "full_attention"),
    refused("A19-ple-width", config(hidden_size_per_layer_input=9), SHARD, "embed_tokens_per_layer", "by config.json"),
    refused("A19-ple-rows", config(vocab_size_per_layer_input=99), SHARD, "embed_tokens_per_layer", "[99, 40]"),
    key("A19-streams", 65, "altup_active_idx", 4, "from 0 to 3"),
]  # fmt: skip

FOLDERS: list[Case] = [
    *nowhere("missing", "nowhere", "nowhere", "no such f"),
    *nowhere("file", f"model/{SHARD}", SHARD, "no such folder"),
    *nowhere("newline", "line\nbreak", r"line\nbreak"),
    *nowhere("escape", "\x1b[31mred", r"\x1b[31mred"),
    *nowhere("emoji", "🎉", "🎉"),
    *nowhere("not-utf8", os.fsdecode(b"caf\xe9"), r"caf\udce9"),
    *nowhere("too-long", "x" * 300, "xxx"),
    *nowhere("4096-bytes", "y/" * 2048, "y/y/y/"),
    *nowhere("empty", "", CONFIG),
    *(case for id, name in ODD_NAMES.items() for case in odd_name(id, name)),
]

CASES = [*SYNTAX, *NUMBERS, *MECHANISMS, *FOLDERS]
