"""Writes an exported package: graph, weights, text and manifest in a folder that appears whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx

from export import genai, operators, ple, web, weights
from export.onnx import Lowered, contract, lower
from export.readme import readme
from export.snippets import kept as cached
from loaders.checkpoint import Checkpoint
from loaders.errors import Usage
from loaders.formats import manifest as manifests
from loaders.formats.atomic import fresh_folder
from loaders.formats.config import read_bytes
from loaders.formats.contract import CacheSpec, Contract
from loaders.formats.facts import Facts, TableSpec
from loaders.formats.manifest import digest
from loaders.formats.pack import VOCAB, Pack, refuse_precision
from loaders.formats.package import describe
from loaders.formats.quant import BITS
from loaders.formats.recipe import STEERING, Recipe, recipes
from loaders.formats.sharded import Notify
from loaders.network.matformer import Slice, full, sliced
from loaders.network.spec import Gated, Model
from loaders.packing import check_vocab, compiled_vocab, fingerprint, put, shifted
from loaders.rewrite import COMPANIONS
from loaders.text.compact import CompactTokenizer
from loaders.text.generation import read_generation
from loaders.weights import Source, kept

PRECISIONS = ("float32", "float16", *BITS)
# Tokens of a pass, in figures of memory.
PASS = 128
CONTEXTS = (512, 4096, 32768, 131072)
SIZES = {"float32": 4, "float16": 2}
PROMPT = "Once upon a time"
# Makes a package compute with activations as they are (True), or as it is shipped (False).
Exact = Callable[[bool], None]
Check = Callable[[Path, Exact], dict[str, Any]]


@dataclass(frozen=True)
class Options:
    """How a package is written. ``edge``: the version that writes it."""

    edge: str
    context: int
    precision: str = "int4"
    profile: str = "ort"
    layout: str = "edge"
    # Embeddings are looked up by a graph of their own.
    apart: bool = False

    @property
    def recipe(self) -> Recipe:
        """How weights are kept."""
        return Recipe("float16", "float16") if self.precision == "float16" else recipes(self.precision)[0]

    @property
    def graph(self) -> str:
        """The decoder's file."""
        return web.graph_name(self.precision, apart=self.apart) if self.layout == "web" else "model.onnx"

    @property
    def data(self) -> str:
        """The first file of weights, beside the graph."""
        name = self.graph.rpartition("/")[2]
        return f"{name}_data" if self.layout == "web" else f"{name}.data"


@dataclass(frozen=True)
class Written:
    """What came of an export. ``bytes``: of all files; ``operators``: the ONNX Runtime that named them, or None."""

    facts: Facts
    bytes: int
    operators: str | None


def write(
    source: Source,
    part: Slice,
    output: Path,
    options: Options,
    check: Check | None = None,
    notify: Notify = lambda *_: None,
) -> Written:
    """Writes a slice of ``source`` as a package. ``check`` is given the finished folder under another name; what it
    returns is written down, and what it raises ends the export without a package.

    Raises Unsupported (what the profile cannot express, a precision that a pack does not hold), Usage (an option that
    makes no sense), CannotCreate, NotPermitted, ReadFailed (full disk), BadCheckpoint. The source is only read.
    """
    refuse(source, options)
    small = sliced(source.model, part)
    options = replace(options, apart=options.layout == "web" and small.ple is not None)
    kinds = formats(source, part, small, options)
    lowered = lowered_for(small, kinds, options)
    limit = web.BYTES if options.layout == "web" else None
    places = weights.layout(lowered.weights, source, part, options.recipe, limit)
    if options.layout == "web":
        web.refuse_files(places)
    weights.attach(lowered.model, places, options.data)
    table = ple.table_of(source, part, options.precision)
    apart = None
    if options.apart and table is not None:
        apart = Apart.of(source, part, small, kinds, options, table)
        table = apart.table
    total = places.total + (0 if table is None else table.nbytes) + (0 if apart is None else apart.places.total)
    facts = facts_of(source, part, small, lowered, options, table, places.total)
    with fresh_folder(output, total) as folder:
        writing = Writing(folder, source, part, options, notify)
        writing.weights(places, table, apart, total)
        put(folder / options.graph, lowered.model.SerializeToString(deterministic=True))
        files = {options.graph: len(places.sizes), **({} if apart is None else {apart.graph: apart.files})}
        version = writing.describe(facts, small, files)
        put(folder / manifests.NAME, describe(folder, facts))
        if check is not None:
            facts = replace(facts, parity=check(folder, lambda exact: writing.level(lowered.model, exact)))
            reseal(folder, parity=facts.parity)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return Written(facts, size, version)


def lowered_for(small: Model, formats: Callable[[str], str], options: Options) -> Lowered:
    """The graph, named as the layout has it. Raises Unsupported for what profile or layout cannot express."""
    dtype = "float16" if options.precision == "float16" else "float32"
    found = lower(small, formats, profile=options.profile, layout=options.layout, context=options.context, dtype=dtype)
    if options.layout == "genai":
        genai.refuse(found.contract)
    if options.layout == "web":
        web.rename(found.model)
        found = replace(found, contract=contract(found.model, list(found.contract.caches)))
    return found


def refuse(source: Source, options: Options) -> None:
    """Raises Usage and Unsupported for options that no export could follow, before anything is read."""
    if options.precision not in PRECISIONS:
        raise Usage(options.precision, field="--precision", expected=", ".join(PRECISIONS))
    if not 1 <= options.context <= source.model.context:
        found = f"{options.context} tokens"
        raise Usage(found, field="--context", expected=f"1 to {source.model.context}, what the model was made for")
    if isinstance(source, Pack) and options.precision not in source.precisions:
        raise refuse_precision(source, options.precision)


def formats(source: Source, part: Slice, small: Model, options: Options) -> Callable[[str], str]:
    """The format of each tensor of the slice. In float16 all that is a matrix and steers nothing is F16."""
    tensors = kept(source.model, part, small)
    half = options.precision == "float16"
    recipe = recipes("float32")[0] if half else options.recipe

    def found(name: str) -> str:
        tensor = tensors[name]
        if half:
            return "F32" if len(tensor.shape) == 1 or name.endswith(STEERING) else "F16"
        return tensor.stored(recipe)

    return found


@dataclass(frozen=True)
class Apart:
    """The graph that looks up embeddings for a decoder in a browser; the table is the last of its files of weights."""

    graph: str
    model: onnx.ModelProto
    places: weights.Places
    table: TableSpec

    @classmethod
    def of(
        cls, source: Source, part: Slice, small: Model, kinds: Callable[[str], str], options: Options, table: TableSpec
    ) -> Apart:
        """From shapes alone. Raises Unsupported for what is too large."""
        name = web.embedding_of(Path(options.graph)).as_posix()
        model, found = web.embedding(small, kinds, table, options.profile, options.context, options.precision)
        places = weights.layout(found, source, part, options.recipe, web.BYTES)
        web.refuse_files(places)
        web.refuse_table(table)
        web.rename(model)
        weights.attach(model, places, f"{name.rpartition('/')[2]}_data")
        return cls(name, model, places, replace(table, file=f"{name}_data_{len(places.sizes)}"))

    @property
    def files(self) -> int:
        """Of weights."""
        return len(self.places.sizes) + 1

    def write(self, folder: Path) -> None:
        """The graph, beside a table that is there already."""
        ple.put_table(self.model, folder / self.table.file, self.table)
        put(folder / self.graph, self.model.SerializeToString(deterministic=True))


@dataclass(frozen=True)
class Writing:
    """A package under way in ``folder``."""

    folder: Path
    source: Source
    part: Slice
    options: Options
    notify: Notify

    def weights(self, places: weights.Places, table: TableSpec | None, apart: Apart | None, total: int) -> None:
        """All that is large, one band after another."""
        path = (self.folder / self.options.graph).with_name(self.options.data)
        path.parent.mkdir(exist_ok=True)
        recipe = self.options.recipe
        weights.write(path, places, self.source, self.part, recipe, shifted(self.notify, 0, total))
        done = places.total
        if apart is not None:
            path = self.folder / f"{apart.graph}_data"
            weights.write(path, apart.places, self.source, self.part, recipe, shifted(self.notify, done, total))
            done += apart.places.total
        if table is not None:
            later = shifted(self.notify, done, total)
            ple.write_table(self.folder / table.file, self.source, self.part, table, later)
            if apart is None:
                ple.write_graph(self.folder / ple.GRAPH, table)
            else:
                apart.write(self.folder)
        self.notify("exporting", total, total)

    def describe(self, facts: Facts, small: Model, counts: dict[str, int]) -> str | None:
        """Text, operators, what the layout asks for and the README; the version of ONNX Runtime that named the
        operators. ``counts``: of files of weights, by graph.
        """
        config = self.text(counts)
        defaults = read_generation(self.source.folder, self.source.raw_config)
        if self.options.layout == "genai":
            for name, data in genai.files(self.folder, facts, small, config, defaults):
                (self.folder / name).write_bytes(data)
        graphs = [path for path in (*(self.folder / name for name in counts), self.folder / ple.GRAPH) if path.exists()]
        needed, version = operators.required(graphs)
        put(self.folder / operators.FILE, needed.encode())
        files = [path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file()]
        text = readme(f"{facts.source} for ONNX Runtime", facts, files, self.prompt(small), defaults.stop_ids)
        put(self.folder / "README.md", text.encode())
        return version

    def text(self, counts: dict[str, int]) -> dict[str, Any]:
        """The slice's config, tokenizer and defaults as they were, and the tokenizer in the form that edge maps; the
        config.
        """
        config, family = self.source.raw_config, self.source.family
        if self.part != full(self.source.model):
            assert family.sliced_config is not None
            config = family.sliced_config(config, self.source.model, self.part)
        if self.options.layout == "web":
            files = {name.rpartition("/")[2]: count for name, count in counts.items()}
            config = web.config(config, self.options.precision, files, apart=self.options.apart)
        put(self.folder / "config.json", json.dumps(config, indent=2).encode())
        for name, limit in COMPANIONS.items():
            if (self.source.folder / name).exists():
                put(self.folder / name, read_bytes(self.source.folder / name, limit))
        if compiled_vocab(self.source.folder, self.folder / VOCAB):
            size = CompactTokenizer.open(self.folder / VOCAB).vocab_size
            check_vocab(size, self.source.model, self.source.folder)
        return config

    def prompt(self, small: Model) -> list[int]:
        """The beginning of a text in the model's tokens, or some ids where edge's own encoder does not cover them."""
        if (self.folder / VOCAB).exists():
            return CompactTokenizer.open(self.folder / VOCAB).encode(PROMPT)
        return list(range(1, min(4, small.vocab)))

    def level(self, model: onnx.ModelProto, exact: bool) -> None:
        """The graph with products of activations as they are, or of activations in 8 bits: sealed either way."""
        changed = onnx.ModelProto()
        changed.CopyFrom(model)
        if exact:
            for node in operators.nodes(changed.graph):
                for attribute in node.attribute:
                    if attribute.name == "accuracy_level":
                        attribute.i = 0
        path = self.folder / self.options.graph
        path.write_bytes(changed.SerializeToString(deterministic=True))
        facts = {"bytes": path.stat().st_size, "sha256": digest(path)}
        reseal(self.folder, files={self.options.graph: facts})


def reseal(folder: Path, files: dict[str, Any] | None = None, **changed: Any) -> None:
    """A manifest with other facts, or other sums of some files; what is large is not read again."""
    path = folder / manifests.NAME
    manifest = json.loads(path.read_bytes())
    manifest["files"].update(files or {})
    path.write_bytes(manifests.sealed({**manifest, **changed}))


def facts_of(
    source: Source, part: Slice, small: Model, lowered: Lowered, options: Options, table: TableSpec | None, size: int
) -> Facts:
    """What the manifest says. ``size``: bytes of the weights."""
    mark = fingerprint(source) if isinstance(source, Checkpoint) else str(source.manifest["fingerprint"])
    name = source.folder.absolute().name
    if isinstance(source, Pack) and isinstance(source.manifest.get("source"), dict):
        name = str(source.manifest["source"].get("name", name))
    contexts = [c for c in CONTEXTS if c < options.context] + [options.context]
    return Facts(
        edge=options.edge,
        fingerprint=mark,
        source=name,
        slice=part,
        precision=options.recipe.precision,
        head=options.recipe.head,
        profile=options.profile,
        layout=options.layout,
        context=options.context,
        opset=lowered.opset,
        min_ort=lowered.min_ort,
        graph=options.graph,
        contract=lowered.contract,
        ple=table,
        memory={str(c): memory(small, lowered.contract, size, c) for c in contexts},
    )


def memory(model: Model, contract: Contract, weights: int, context: int) -> dict[str, Any]:
    """What a run at a context holds: weights as they lie in the file, caches, and values of a pass of PASS tokens.

    Without what the runtime holds itself, and what it adds when it packs weights anew.
    """
    parts = {
        "weights": weights,
        "kv": sum(cache_bytes(cache, context) for cache in contract.caches),
        "activations": activation_bytes(model),
    }
    return {"bytes": parts, "total_bytes": sum(parts.values())}


def cache_bytes(cache: CacheSpec, context: int) -> int:
    """Bytes of one cache full of tokens; of one that grows past and present are there at once."""
    values = cache.dim if cache.kind == "latent" or len(cache.inputs) == 1 else cache.dim + cache.value_dim
    copies = 2 if cache.kind == "growing" else 1
    return copies * cache.heads * values * SIZES[cache.dtype] * cached(cache, context)


def activation_bytes(model: Model) -> int:
    """The widest layer's values of a pass, float32, and the logits of one token."""
    streams = 1 if model.altup is None else model.altup.streams
    rows = 0 if model.ple is None else 2 * len(model.layers) * model.ple.dim

    def width(i: int) -> int:
        ffn = model.layers[i].ffn
        wide = (ffn.width, getattr(getattr(ffn, "shared", None), "width", 0), getattr(ffn, "active", 1) * ffn.width)
        return model.layers[i].attention.inner + (3 if isinstance(ffn, Gated) else 2) * max(wide)

    widest = max(width(i) for i in range(len(model.layers)))
    return 4 * (PASS * (widest + (streams + 3) * model.dim + rows) + model.vocab)
