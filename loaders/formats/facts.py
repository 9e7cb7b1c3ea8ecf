"""What the manifest of an exported package says, as data: how a model was written down, for what, and how well."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from loaders.errors import BadCheckpoint
from loaders.formats import manifest as manifests
from loaders.formats.config import Config, short, show
from loaders.formats.contract import Contract, sound
from loaders.formats.quant import BITS, record_bytes
from loaders.formats.safetensors import ITEMSIZE
from loaders.network.matformer import Slice

PROFILES, LAYOUTS = ("ort", "standard"), ("edge", "genai", "web")
# What the head may be kept in at each precision.
HEADS = {"float32": ("float32",), "float16": ("float16",), "int8": ("int8",), "int4": ("int8", "int4")}
TABLES = (*BITS, "BF16", "F16", "F32")
MOST_CONTEXTS, MOST_COMPONENTS, MOST_TEXT = 64, 64, 600
RELEASE = re.compile(r"[0-9]{1,4}(\.[0-9]{1,4}){1,2}", re.ASCII)
TOKENS = re.compile(r"[1-9][0-9]{0,9}", re.ASCII)
# What a manifest holds besides.
OTHERS = ("format", "version", "family", "spec", "files", "seal")


@dataclass(frozen=True)
class TableSpec:
    """The per-layer-embedding table: ``rows`` of ``layers`` times ``dim`` values, each in the format ``kind``."""

    file: str
    kind: str
    rows: int
    layers: int
    dim: int

    @property
    def stored(self) -> tuple[str, tuple[int, int]]:
        """Its tensor's (dtype, shape), by safetensors: records of :func:`quantize_rows`, or values."""
        if self.kind in BITS:
            return "U8", (self.rows, self.layers * record_bytes(self.dim, self.kind))
        return self.kind, (self.rows, self.layers * self.dim)

    @property
    def nbytes(self) -> int:
        """Bytes of the table."""
        dtype, shape = self.stored
        return math.prod(shape) * ITEMSIZE[dtype]

    @classmethod
    def parse(cls, entry: Config) -> TableSpec:
        """Of the manifest's key ``ple``. Raises BadCheckpoint."""
        kind = entry.str("kind", choices=TABLES)
        found = cls(entry.str("file"), kind, *(entry.int(key) for key in ("rows", "layers", "dim")))
        if kind == "int4" and found.dim % 2:
            raise bad(found.dim, entry.file, entry.field("dim"), "an even width for int4")
        return found


@dataclass(frozen=True)
class Facts:
    """What a manifest says besides the model's family and spec and the list of files: those are found in the folder.

    ``edge``: the version that wrote it; ``fingerprint``: of the source (64 hexadecimal digits); ``source``: its name;
    ``slice``: what was taken of it; ``head``: as in :class:`Recipe`; ``context``: tokens that caches are made for;
    ``min_ort``: the oldest ONNX Runtime; ``graph``: the decoder's file; ``memory``: context -> {"bytes": {component:
    int}, "total_bytes": int}; ``parity``: how it compared with the reference, None while nobody looked.
    """

    edge: str
    fingerprint: str
    source: str
    slice: Slice
    precision: str
    head: str
    profile: str
    layout: str
    context: int
    opset: int
    min_ort: str
    graph: str
    contract: Contract
    ple: TableSpec | None = None
    memory: Mapping[str, Any] = field(default_factory=dict)
    parity: Mapping[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON, as :meth:`parse` takes it."""
        part = {"name": self.slice.name, "keep": list(self.slice.keep), "widths": list(self.slice.widths)}
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "contract"}
        own = {"source": {"name": self.source}, "slice": part, "ple": self.ple and dict(self.ple.__dict__)}
        return {**found, **own, **self.contract.as_dict()}

    @classmethod
    def parse(cls, config: Config) -> Facts:
        """From a manifest; what it says of files and the model is not looked at. Raises BadCheckpoint."""
        with sound():
            part, source, table = config.sub("slice"), config.sub("source"), config.sub("ple", default=None)
            precision = config.str("precision", choices=tuple(HEADS))
            found = cls(
                edge=text(config, "edge"),
                fingerprint=text(config, "fingerprint", manifests.HEX),
                source=text(source, "name"),
                slice=Slice(text(part, "name"), part.ints("keep", low=0), part.ints("widths")),
                precision=precision,
                head=config.str("head", choices=HEADS[precision]),
                profile=config.str("profile", choices=PROFILES),
                layout=config.str("layout", choices=LAYOUTS),
                context=config.int("context"),
                opset=config.int("opset", high=1000),
                min_ort=text(config, "min_ort", RELEASE),
                graph=text(config, "graph"),
                contract=Contract.parse(config),
                ple=None if table is None else TableSpec.parse(table),
                memory=memory(config),
                parity=config.raw("parity"),
            )
            for key in OTHERS:
                config.raw(key)
            config.finish()
        if not isinstance(found.parity, dict | None):
            raise bad(show(found.parity), config.file, "parity", "an object or null")
        return found


def text(config: Config, key: str, pattern: re.Pattern[str] | None = None) -> str:
    """A short printable string. Raises BadCheckpoint."""
    found: str = config.str(key)
    if not (0 < len(found) <= MOST_TEXT and found.isprintable() and (pattern is None or pattern.fullmatch(found))):
        expected = f"1 to {MOST_TEXT} printable characters" if pattern is None else pattern.pattern
        raise bad(f'"{short(found)}"', config.file, config.field(key), expected)
    return found


def memory(config: Config) -> dict[str, Any]:
    """Planned bytes by context. Raises BadCheckpoint."""
    table = config.sub("memory")
    if len(table.data) > MOST_CONTEXTS:
        raise bad(f"{len(table.data)} contexts", config.file, "memory", f"at most {MOST_CONTEXTS}")
    for key in table.data:
        entry = table.sub(key)
        parts = entry.sub("bytes")
        if not TOKENS.fullmatch(key) or len(parts.data) > MOST_COMPONENTS:
            raise bad(f'"{short(key)}"', config.file, "memory", "tokens -> bytes of components")
        for component in parts.data:
            parts.int(component, low=0, high=2**60)
        entry.int("total_bytes", low=0, high=2**60)
    found: dict[str, Any] = table.data
    return found


def plain_spec(value: Any) -> Any:
    """A spec as data for JSON: of a dataclass its type and its fields."""
    if is_dataclass(value):
        return {"type": type(value).__name__, **{f.name: plain_spec(getattr(value, f.name)) for f in fields(value)}}
    return [plain_spec(item) for item in value] if isinstance(value, tuple) else value


def same_spec(value: Any, found: Any) -> bool:
    """Whether data is :func:`plain_spec` of ``value``, but for fields that another version did not know."""
    if is_dataclass(value):
        known = {f.name: f.default for f in fields(value)}
        if not isinstance(found, dict) or found.get("type") != type(value).__name__ or found.keys() - known - {"type"}:
            return False
        items = ((getattr(value, name), name, default) for name, default in known.items())
        return all(same_spec(v, found[name]) if name in found else v == default for v, name, default in items)
    if isinstance(value, tuple):
        return isinstance(found, list) and len(found) == len(value) and all(map(same_spec, value, found))
    return isinstance(value, bool) == isinstance(found, bool) and bool(value == found)


def bad(found: object, file: str, at: str, expected: str) -> BadCheckpoint:
    """A manifest that says what cannot be."""
    return BadCheckpoint(found, file=file, field=at, expected=expected)
