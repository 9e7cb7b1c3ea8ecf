"""A pack: a checkpoint in edge's own form, from which every budget is served.

    PACK/               manifest.json, config.json, tokenizer and defaults as they were, vocab.bin
    PACK/base/          what is the same at every quantized precision: norms, steering, int8 embeddings
    PACK/int8, int4/    the matrices of the core; int4 also holds the embedding at int4, for budgets that force it
    PACK/ple/           the per-layer-embedding table, one record a token

Each folder has a manifest of its own and is there whole or not at all. A pack holds the full model: every slice is a
set of windows into it. Weights are safetensors; a quantized tensor is U8, its codes and scales in the panels of
:mod:`loaders.formats.panels`, and lies before all others, from a multiple of 32 bytes of the file on.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loaders.errors import MissingFile, Unsupported
from loaders.families import Family, family_of
from loaders.formats import manifest as manifests
from loaders.formats.config import Config, read_json, short
from loaders.formats.measured import Measured, parse
from loaders.formats.panels import panel_bytes, panel_shape
from loaders.formats.quant import BITS, record_bytes
from loaders.formats.recipe import Recipe, recipes, stored_as, stored_bytes
from loaders.formats.safetensors import Shards, Tensor
from loaders.formats.window import Window
from loaders.network.spec import Model
from loaders.network.tensors import PLE_TABLE, flat, tensors

WEIGHTS = "weights.safetensors"
VOCAB = "vocab.bin"
ROOT, BASE, PLE = "root", "base", "ple"
PARTS = (BASE, *BITS, PLE)
# Of the root manifest: what was measured of the model's slices.
MEASURED = "measured"
SMALL = 1 << 20


def part_of(name: str, shape: tuple[int, ...], recipe: Recipe) -> str:
    """The part that holds a tensor at a recipe."""
    if name == PLE_TABLE:
        return PLE
    stored = stored_as(name, shape, recipe)
    same = {stored_as(name, shape, recipes(precision)[0]) for precision in BITS}
    return BASE if same == {stored} else recipe.precision


def contents(model: Model, part: str) -> dict[str, str]:
    """Canonical name -> format of every tensor a part holds; for the table, of its records."""
    table = tensors(model)
    if part == PLE:
        return {PLE_TABLE: "int8"} if PLE_TABLE in table else {}
    found: dict[str, str] = {}
    for precision in BITS:
        for recipe in recipes(precision):
            for name, shape in table.items():
                if part_of(name, shape, recipe) == part:
                    found[name] = stored_as(name, shape, recipe)
    return found


def parts_for(model: Model, precisions: tuple[str, ...] = tuple(BITS)) -> tuple[str, ...]:
    """The parts that runs at these precisions read."""
    return (BASE, *precisions, *((PLE,) if model.ple is not None else ()))


def stored_tensors(model: Model, part: str, ple: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (dtype, shape) of every tensor in a part's file."""
    table = tensors(model)
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, stored in contents(model, part).items():
        shape = table[name]
        if name == PLE_TABLE:
            assert model.ple is not None
            found[name] = ("U8", (shape[0], len(model.layers) * record_bytes(model.ple.dim, ple)))
        elif stored in BITS:
            found[name] = ("U8", panel_shape(shape, stored))
        else:
            found[name] = (stored, flat(shape))
    return found


@dataclass
class Pack:
    """An opened pack: manifests and headers read and checked, weights not. ``ple_kind`` is the table's format,
    ``measured`` the losses it has of its slices.
    """

    folder: Path
    raw_config: dict[str, Any]
    family: Family
    model: Model
    manifest: dict[str, Any]
    parts: dict[str, Shards]
    manifests: dict[str, dict[str, Any]]
    measured: tuple[Measured, ...] = ()

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Pack:
        """Raises MissingFile, BadCheckpoint or Unsupported, naming the file and what does not agree."""
        folder = Path(folder)
        manifest = manifests.read(folder, ROOT, PARTS)
        # A digit of a config that fell over would still run; weights are too large to be summed each time.
        manifests.verify(folder, manifest, SMALL)
        path = folder / "config.json"
        raw = read_json(path)
        config = Config(raw, str(path))
        family = family_of(config.raw("model_type"), str(path))
        model = family.parse(config)
        config.finish()
        measured = measured_in(manifest, folder, model)
        pack = cls(folder, raw, family, model, manifest, {}, {}, measured)
        try:
            for part in PARTS:
                if os.path.lexists(folder / part):
                    pack.attach(part)
        except BaseException:
            pack.close()
            raise
        return pack

    def attach(self, part: str) -> None:
        """Takes in a part that lies in the folder, its manifest, size and tensor table checked."""
        folder = self.folder / part
        found = manifests.read(folder, part)
        if found.get("fingerprint") != self.manifest.get("fingerprint"):
            raise manifests.damaged("of another checkpoint", folder / manifests.NAME, "fingerprint")
        if part == PLE and str(found.get("ple")) not in BITS:
            raise manifests.damaged(short(repr(found.get("ple"))), folder / manifests.NAME, "ple", "int8 or int4")
        shards = Shards.open(folder)
        wanted = stored_tensors(self.model, part, found.get("ple", "int8"))
        there = {name: (t.dtype, t.shape) for name, t in shards.tensors.items()}
        if there != wanted:
            wrong = min(n for n in there.keys() | wanted.keys() if there.get(n) != wanted.get(n))
            raise manifests.damaged(f"holds {there.get(wrong)}", folder / WEIGHTS, short(wrong), f"{wanted.get(wrong)}")
        self.parts[part], self.manifests[part] = shards, found
        hold(shards)

    @property
    def precisions(self) -> tuple[str, ...]:
        """What the pack can be run at, best first."""
        needed = parts_for(self.model, ())
        whole = all(part in self.parts for part in needed)
        return tuple(p for p in BITS if p in self.parts) if whole else ()

    @property
    def dtype(self) -> str:
        """What the best core in it is stored as."""
        return next(iter(self.precisions), "nothing")

    @property
    def ple_kind(self) -> str | None:
        """int8 or int4: the format of the table's records."""
        kind: str | None = self.manifests.get(PLE, {}).get("ple")
        return kind

    @property
    def source(self) -> str:
        """The folder it was made of, for people."""
        found = self.manifest.get("source")
        return str(found.get("path", "")) if isinstance(found, dict) else ""

    @property
    def stored(self) -> dict[str, int]:
        """Canonical name -> bytes on disk, at the best precision the pack holds."""
        recipe = recipes(next(iter(self.precisions), "int8"))[0]
        table = {n: (s, stored_as(n, s, recipe)) for n, s in tensors(self.model).items() if n != PLE_TABLE}
        found = {n: panel_bytes(s, kind) if kind in BITS else stored_bytes(s, kind) for n, (s, kind) in table.items()}
        if PLE in self.parts:
            found[PLE_TABLE] = self.table()[1].nbytes
        return found

    def require(self, part: str) -> Shards:
        """The shards of a part. Raises MissingFile where the pack was made without it."""
        if part not in self.parts:
            raise MissingFile("not in this pack", file=self.folder / part, hint="Pack the checkpoint with it")
        return self.parts[part]

    def find(self, name: str, recipe: Recipe) -> tuple[Shards, Tensor, str]:
        """Where a tensor lies at a recipe: (shards, panels or values, format)."""
        shape = tensors(self.model)[name]
        shards = self.require(part_of(name, shape, recipe))
        return shards, shards.tensors[name], stored_as(name, shape, recipe)

    def table(self) -> tuple[Shards, Tensor]:
        """The per-layer-embedding records."""
        shards = self.require(PLE)
        return shards, shards.tensors[PLE_TABLE]

    def verify(self) -> int:
        """Reads every file and compares its sum; bytes read. Raises BadCheckpoint naming the file."""
        total = manifests.verify(self.folder, self.manifest)
        return total + sum(manifests.verify(self.folder / part, m) for part, m in self.manifests.items())

    def sizes(self) -> Mapping[str, int]:
        """Bytes on disk, by part."""
        found = {ROOT: self.manifest, **self.manifests}
        return {part: sum(f["bytes"] for f in m["files"].values()) for part, m in found.items()}

    def close(self) -> None:
        """Closes every descriptor."""
        for shards in self.parts.values():
            shards.close()


def measured_in(manifest: dict[str, Any], folder: Path, model: Model) -> tuple[Measured, ...]:
    """The results in a root manifest. Raises BadCheckpoint, Unsupported."""
    return parse(manifest.get(MEASURED, []), folder / manifests.NAME, model)


def hold(shards: Shards) -> None:
    """Opens both descriptors of a part's file by reading nothing: the pack may be removed while a run reads it."""
    tensor = next(iter(shards.tensors.values()))
    window = Window((), ((0, 1),) if len(tensor.shape) > 1 else None)
    shards.read_into(tensor, bytearray())
    shards.read_window(tensor, window, np.empty(window.shape, f"u{tensor.itemsize}"))


def refuse_precision(pack: Pack, precision: str) -> Unsupported:
    """A pack cannot be run at what it does not hold."""
    held = " and ".join(pack.precisions) or "no complete core"
    return Unsupported(
        f"this pack holds {held}", file=pack.folder, field=f"--precision {precision}", hint="Run the checkpoint itself"
    )
