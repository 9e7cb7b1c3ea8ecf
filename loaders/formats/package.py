"""An exported package: a model as an ONNX graph, checked whole before anything runs it.

    PACKAGE/            manifest.json, config.json of the exported (sliced) model, tokenizer and defaults
    PACKAGE/*.onnx      the graph; its weights lie in external files beside it
    PACKAGE/ple.safetensors   the per-layer-embedding table, which stays outside of the graph

In the layout for the web graphs and weights lie in PACKAGE/onnx/. Whoever made a package is not known, and sums tell
damage, not intent. So nothing in it is taken for more than it can be: no file but its own is read, no weight lies
outside of its file, and what the manifest says of inputs, outputs and caches is what graph and config say.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loaders.errors import CannotCreate, ReadFailed
from loaders.families import Family, family_of
from loaders.formats import manifest as manifests
from loaders.formats import onnx_file
from loaders.formats.config import Config, parse_json, read_bytes, read_json, short, show
from loaders.formats.contract import CacheSpec, Contract, TensorSpec, agree_graph, agree_model
from loaders.formats.facts import Facts, TableSpec, bad, plain_spec, same_spec
from loaders.formats.measured import Measured
from loaders.formats.onnx_file import External, Graph
from loaders.formats.recipe import Recipe
from loaders.formats.safetensors import Shards, Tensor
from loaders.formats.sharded import Notify
from loaders.network.matformer import Slice, full
from loaders.network.spec import Model
from loaders.network.tensors import PLE_TABLE, tensors

__all__ = ["CacheSpec", "Contract", "Facts", "Package", "TableSpec", "TensorSpec", "describe", "is_package"]

PACKAGE = manifests.Kind(
    "edge package", 1, "package", "The package is damaged: export it again", "Export the model again",
    folders=("onnx",), own=True,
)  # fmt: skip
CONFIG = "config.json"
# What is in config.json for other runtimes.
FOREIGN_KEYS = ("transformers.js_config",)
DTYPES = {"float32": "F32", "float16": "F16"}
DOMAINS = ("", "com.microsoft")
SMALL = 1 << 20


def is_package(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder says it is an exported package; what else is wrong with it is for :meth:`Package.open`."""
    return manifests.says(folder, PACKAGE)


def describe(folder: Path, facts: Facts) -> bytes:
    """The manifest of a folder whose other files are all there, as they are read back from it, but for hidden ones.

    Raises what opening the package would raise of these facts, MissingFile for a folder that has no place in a package,
    CannotCreate for a manifest larger than anybody reads.
    """
    model = read_model(folder)[2]
    names = manifests.foreign(folder, {manifests.NAME}, [p for p in PACKAGE.folders if (folder / p).is_dir()])
    plain = {**facts.as_dict(), "family": model.family, "spec": plain_spec(model)}
    data = manifests.describe(folder, names, PACKAGE, **plain)
    if len(data) > manifests.MOST:
        raise CannotCreate(f"{len(data)} bytes", file=folder / manifests.NAME, expected=f"at most {manifests.MOST}")
    agree(folder, parse_json(data, str(folder / manifests.NAME)), model)
    return data


@dataclass
class Package:
    """An opened package: manifest, graph and headers read and checked, weights not.

    ``model`` is the exported model, ``onnx`` what its graph declares, ``shards`` hold the per-layer-embedding table.
    ``measured``: nothing is known of a package's slices, it has but one.
    """

    folder: Path
    raw_config: dict[str, Any]
    family: Family
    model: Model
    manifest: dict[str, Any]
    facts: Facts
    onnx: Graph
    shards: Shards | None = None
    measured: tuple[Measured, ...] = ()

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Package:
        """Checks all but the sums of files larger than 1 MiB, which :meth:`verify` does.

        Raises MissingFile, BadCheckpoint or Unsupported (another version, or a model that edge does not know), naming
        the file and what does not agree.
        """
        folder = Path(folder)
        manifest = manifests.opened(folder, PACKAGE)
        manifests.verify(folder, manifest, SMALL, PACKAGE)
        raw, family, model = read_model(folder)
        facts = agree(folder, manifest, model)
        graphs = {name: walk(folder, name, manifest) for name in manifest["files"] if name.endswith(".onnx")}
        graph = graphs[facts.graph]
        agree_operators(facts, graph, str(folder / facts.graph))
        facts = replace(facts, contract=agree_graph(facts.contract, graph, str(folder / manifests.NAME)))
        return cls(folder, raw, family, model, manifest, facts, graph, open_table(folder, facts.ple))

    @property
    def contract(self) -> Contract:
        """Inputs and outputs, in the order of the graph."""
        return self.facts.contract

    @property
    def graph(self) -> Path:
        """The decoder's file."""
        return self.folder / self.facts.graph

    @property
    def slice(self) -> Slice:
        """All of the exported model."""
        return full(self.model)

    @property
    def source_slice(self) -> Slice:
        """What was taken of the model it was made of."""
        return self.facts.slice

    @property
    def source(self) -> str:
        """The name of what it was made of, for people."""
        return self.facts.source

    @property
    def precision(self) -> str:
        """float32, float16, int8 or int4."""
        return self.facts.precision

    @property
    def precisions(self) -> tuple[str, ...]:
        """What it can be run at: that alone."""
        return (self.facts.precision,)

    @property
    def head(self) -> str:
        """The format of the embedding and the head."""
        return self.facts.head

    @property
    def recipe(self) -> Recipe:
        """How its weights are kept."""
        return Recipe(self.facts.precision, self.facts.head)

    @property
    def profile(self) -> str:
        """ort or standard."""
        return self.facts.profile

    @property
    def layout(self) -> str:
        """edge, genai or web."""
        return self.facts.layout

    @property
    def context(self) -> int:
        """Tokens that caches are made for."""
        return self.facts.context

    @property
    def min_ort(self) -> str:
        """The oldest ONNX Runtime that gives its answers."""
        return self.facts.min_ort

    @property
    def dtype(self) -> str:
        """What the core is stored as: F32, F16, int8 or int4."""
        return DTYPES.get(self.facts.precision, self.facts.precision)

    @property
    def ple_kind(self) -> str | None:
        """The format of the table's rows: int8, int4, BF16, F16 or F32."""
        return None if self.facts.ple is None else self.facts.ple.kind

    @property
    def seal(self) -> str:
        """64 hexadecimal digits that stand for every byte of it, once :meth:`verify` has found them as they were."""
        return str(self.manifest["seal"])

    @property
    def weights_facts(self) -> tuple[External, ...]:
        """Every initializer that lies in an external file; those that share a place share its bytes."""
        return self.onnx.external

    @property
    def stored(self) -> dict[str, int]:
        """Canonical name -> bytes in the files. What was made of several tensors counts as that of the first there."""
        table = tensors(self.model)
        found, seen = dict.fromkeys(table, 0), set[tuple[str, int]]()
        parents: dict[str, str] = {}
        for name in table:
            for end in [i for i, c in enumerate(name) if c == "."]:
                parents.setdefault(name[:end], name)
        for weight in self.onnx.external:
            name = weight.name
            while name and name not in table and name not in parents:
                name = name.rpartition(".")[0]
            name = parents.get(name, name) or "embed"
            if (weight.location, weight.offset) not in seen:
                found[name] += weight.length
                seen.add((weight.location, weight.offset))
        return found if self.facts.ple is None else {**found, PLE_TABLE: self.facts.ple.nbytes}

    def table(self) -> tuple[Shards, Tensor]:
        """The per-layer-embedding rows, of a model that has them."""
        assert self.shards is not None
        return self.shards, self.shards.tensors[PLE_TABLE]

    def verify(self, notify: Notify = lambda *_: None) -> int:
        """Reads every file and compares its sum; bytes read. Raises BadCheckpoint naming the file."""
        total, done = sum(self.sizes().values()), 0

        def progress(size: int) -> None:
            nonlocal done
            done += size
            notify("verifying", done, total)

        return manifests.verify(self.folder, self.manifest, None, PACKAGE, progress)

    def sizes(self) -> dict[str, int]:
        """Bytes on disk, by file."""
        return {name: facts["bytes"] for name, facts in self.manifest["files"].items()}

    def stamp(self) -> str:
        """64 hexadecimal digits that change when any file is touched: what a verified package may be remembered by.

        Raises ReadFailed for a file that is gone.
        """
        found = hashlib.sha256(self.seal.encode())
        for name in sorted(self.manifest["files"]):
            try:
                s = os.lstat(self.folder / name)
            except OSError as e:
                raise ReadFailed(f"changed since it was opened: {e.strerror}", file=self.folder / name) from None
            found.update(f"{name} {s.st_dev} {s.st_ino} {s.st_size} {s.st_mtime_ns} {s.st_ctime_ns}\n".encode())
        return found.hexdigest()

    def close(self) -> None:
        """Closes every descriptor."""
        if self.shards is not None:
            self.shards.close()


def read_model(folder: Path) -> tuple[dict[str, Any], Family, Model]:
    """What config.json says. Raises MissingFile, BadCheckpoint, Unsupported."""
    path = folder / CONFIG
    raw = read_json(path)
    config = Config(raw, str(path))
    family = family_of(config.raw("model_type"), str(path))
    model = family.parse(config)
    config.ignore(*FOREIGN_KEYS)
    config.finish()
    return raw, family, model


def agree(folder: Path, manifest: dict[str, Any], model: Model) -> Facts:
    """What a manifest says, once it agrees with the model and names files that are there. Raises BadCheckpoint."""
    file = str(folder / manifests.NAME)
    facts, files = Facts.parse(Config(manifest, file)), manifest["files"]
    if not same_spec(model, manifest.get("spec")) or manifest.get("family") != manifest["spec"]["family"]:
        raise bad("another model", file, "spec", f"the one in {CONFIG}")
    for at, name in (
        ("files", CONFIG),
        ("graph", facts.graph),
        *((("ple.file", facts.ple.file),) if facts.ple else ()),
    ):
        if name not in files:
            raise bad(show(name), file, at, "a file of this package")
    if facts.context > model.context:
        raise bad(facts.context, file, "context", f"at most {model.context}, what the model was made for")
    if not facts.graph.endswith(".onnx"):
        raise bad(show(facts.graph), file, "graph", "name.onnx")
    keep, widths = facts.slice.keep, tuple(layer.ffn.width for layer in model.layers)
    if facts.slice.widths != widths or len(keep) != len(widths) or list(keep) != sorted(set(keep)):
        raise bad(facts.slice.describe(), file, "slice", f"{len(widths)} layers of the widths in {CONFIG}")
    table = facts.ple and (facts.ple.rows, facts.ple.layers, facts.ple.dim)
    if table != (model.ple and (model.ple.rows, len(model.layers), model.ple.dim)):
        raise bad(show(table), file, "ple", f"the table of {CONFIG}")
    agree_model(facts.contract, model, file)
    return facts


def walk(folder: Path, name: str, manifest: dict[str, Any]) -> Graph:
    """A graph, of the sum it should have, whose operators are known and whose weights lie in the package's own files.

    Raises BadCheckpoint.
    """
    path, files = folder / name, manifest["files"]
    data = read_bytes(path, onnx_file.MOST_BYTES)
    manifests.compare(path, hashlib.sha256(data).hexdigest(), files[name]["sha256"], PACKAGE)
    graph, file = onnx_file.read(data, path), str(path)
    if odd := {*graph.opsets, *(domain for domain, _ in graph.operators)} - set(DOMAINS):
        raise bad(f"operators of {show(min(odd))}", file, "graph", "of ai.onnx and com.microsoft")
    for weight in graph.external:
        at = f"graph.initializer {short(weight.name)}"
        plain = manifests.PLAIN_NAME.fullmatch(weight.location)
        there = files.get(name[: name.rfind("/") + 1] + weight.location) if plain else None
        if there is None:
            raise bad(f"location {show(weight.location)}", file, at, "the plain name of a file of this package")
        if weight.offset + weight.length > there["bytes"]:
            found = f"bytes {weight.offset} to {weight.offset + weight.length}"
            raise bad(f"{found} of {weight.location}", file, at, f"within its {there['bytes']}")
    return graph


def agree_operators(facts: Facts, graph: Graph, file: str) -> None:
    """Raises BadCheckpoint for operators that the manifest promised not to need."""
    if graph.opsets.get("") != facts.opset:
        raise bad(f"opset {graph.opsets.get('')}", file, "opset_import", f"{facts.opset}, by the manifest")
    contrib = sorted(op for domain, op in graph.operators if domain)
    if facts.profile == "standard" and contrib:
        raise bad(f"com.microsoft's {show(contrib[0])}", file, "graph", "ai.onnx alone: the profile is standard")


def open_table(folder: Path, spec: TableSpec | None) -> Shards | None:
    """The per-layer-embedding table, of the type and shape it is said to have. Raises BadCheckpoint."""
    if spec is None:
        return None
    # In the layout for the web it is a file of weights among others, under their kind of name.
    shards = Shards.of(folder / spec.file) if "/" in spec.file else Shards.open(folder)
    there = {name: (t.shard, t.dtype, t.shape) for name, t in shards.tensors.items()}
    if there != {PLE_TABLE: (os.path.join(folder, spec.file), *spec.stored)}:
        shards.close()
        dtype, shape = spec.stored
        found = ", ".join(f"{short(name)} {dtype} {show(shape)}" for name, (_, dtype, shape) in [*there.items()][:2])
        raise PACKAGE.bad(found, folder / spec.file, PLE_TABLE, f"{dtype} {show(shape)} alone")
    return shards
