"""The README of a package: what is in it, and programs that run it, with the very names, types and shapes it has."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from export.snippets import SLACK, kotlin, python, swift
from loaders.formats.contract import EMBEDS, CacheSpec, Contract, TensorSpec
from loaders.formats.package import Facts


def readme(title: str, facts: Facts, files: Sequence[str], prompt: Sequence[int], stops: Sequence[int]) -> str:
    """Markdown. ``files``: all of the package; ``prompt``: some ids to begin with; ``stops``: where to stop."""
    parts = [
        f"# {title}\n\n{about(facts)}",
        "## Files\n\n" + "\n".join(f"* `{name}`: {purpose(name)}" for name in sorted({*files, "README.md"})),
        "## Inputs and outputs\n\n" + tables(facts.contract),
        "## Keys and values\n\n" + caching(facts),
        "## Several sequences at once\n\n" + batching(facts),
        "## Python\n\n" + fenced("python", python(facts, prompt, stops)),
    ]
    if all(cache.kind != "growing" for cache in facts.contract.caches):
        parts.append("## Kotlin (Android)\n\n" + fenced("kotlin", kotlin(facts)))
        if all(cache.dtype == "float32" for cache in facts.contract.caches):
            parts.append("## Swift (iOS, macOS)\n\n" + fenced("swift", swift(facts)))
    return "\n\n".join(parts) + "\n"


def about(facts: Facts) -> str:
    """What it is, in a paragraph."""
    slice_ = "the whole model" if facts.slice.name == "full" else f"slice {facts.slice.name}"
    head = f", head {facts.head}" if facts.head != facts.precision else ""
    apart = facts.contract.input(EMBEDS) is not None
    runs = "Programs like the one below run it" if apart else "`edge run FOLDER` runs it; so do the programs below"
    return (
        f"{facts.source}, {slice_}, {facts.precision}{head}, up to {facts.context} tokens: written by edge {facts.edge}"
        f" for ONNX Runtime {facts.min_ort} or newer (profile {facts.profile}, opset {facts.opset}).\n\n"
        f"{runs}. Weights are mapped from the files beside the graph."
    )


def purpose(name: str) -> str:
    """What a file is for."""
    known = {
        "README.md": "this text",
        "config.json": "the model's configuration, as the slice has it",
        "embedding.onnx": "token ids in, rows of `ple.safetensors` out, for runtimes that cannot read that themselves",
        "ple.safetensors": "per-layer embeddings, one row a token: only the rows that are needed are read",
        "required_operators.config": "operators, for a reduced build of ONNX Runtime (`--include_ops_by_config`)",
        "vocab.bin": "the tokenizer as edge maps it",
    }
    if name in known:
        return known[name]
    if ".onnx_data" in name or name.endswith(".onnx.data"):
        return "weights"
    if name.rpartition("/")[2].startswith("embed_tokens"):
        return "token ids in, embeddings out"
    return "the decoder" if name.endswith(".onnx") else "as it came with the model"


def tables(contract: Contract) -> str:
    """Inputs and outputs; of the caches one line for each run of equal ones."""
    return "\n\n".join(
        f"| {side} | type | shape |\n|---|---|---|\n" + "\n".join(rows(specs, side == "input", contract.caches))
        for side, specs in (("input", contract.inputs), ("output", contract.outputs))
    )


def rows(specs: Iterable[TensorSpec], inputs: bool, caches: Sequence[CacheSpec]) -> Iterable[str]:
    """Lines of a table."""
    held = {name for cache in caches for name in (cache.inputs if inputs else cache.outputs)}
    plain = [spec for spec in specs if spec.name not in held]
    for spec in plain:
        note = f", {spec.default} where it is left out" if spec.optional else ""
        yield f"| `{spec.name}` | {spec.dtype} | {shape(spec)}{note} |"
    by_name = {spec.name: spec for spec in specs}
    lead = [(cache.inputs if inputs else cache.outputs) for cache in caches]
    kinds = [tuple((by_name[n].dtype, dimensions(by_name[n])) for n in names) for names in lead]
    for _, run in groupby(range(len(lead)), key=lambda i: kinds[i]):
        first, *rest = run
        last = rest[-1] if rest else first
        for i, name in enumerate(lead[first]):
            more = f" to `{lead[last][i]}`" if rest else ""
            yield f"| `{name}`{more} | {by_name[name].dtype} | {shape(by_name[name])} |"


def dimensions(spec: TensorSpec) -> tuple[int | str, ...]:
    """A shape in which the names of lengths of caches are all one."""
    return tuple("past" if isinstance(d, str) and d.startswith(("past", "present")) else d for d in spec.shape)


def shape(spec: TensorSpec) -> str:
    """[batch, tokens]."""
    return "[" + ", ".join(str(d) for d in spec.shape) + "]"


def caching(facts: Facts) -> str:
    """How caches of each kind that is there are bound."""
    found = {cache.kind for cache in facts.contract.caches}
    said = {
        "full": f"Buffers of {facts.context} tokens, zeroed once, bound as past and as present at once: tokens are "
        "written in place.",
        "window": f"Layers with a sliding window have buffers of the window and {SLACK} more tokens, bound likewise; "
        "what falls out of the window is overwritten.",
        "latent": "Latent layers have one buffer for both: bind it as key and as value, as past and as present.",
        "growing": "What comes out as present goes in as past with the next tokens; the first past has a length of 0.",
    }
    return "\n".join(text for kind, text in said.items() if kind in found)


def batching(facts: Facts) -> str:
    """How a batch is made: what GroupQueryAttention takes, or the masks of the standard profile."""
    filled = "with tokens for which `attention_mask` is 0; `position_ids` count from 0 at a sequence's own first token."
    if facts.profile == "standard":
        return f"Shorter sequences of a batch are filled up in front, {filled}"
    passes = "Of more than one sequence the prompt goes in as a whole, and then one token of each at a time."
    if any(cache.kind == "window" for cache in facts.contract.caches):
        return f"Sequences of a batch have the same length. {passes}"
    wrong = "In front, where some programs put them, they would be taken for text."
    return f"Shorter sequences of a batch are filled up behind, {filled} {wrong} {passes}"


def fenced(language: str, code: str) -> str:
    """A block of code."""
    return f"```{language}\n{code.strip()}\n```"
