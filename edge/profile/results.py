"""``results.jsonl``: a line for each case, added as soon as it has ended. What is read back is somebody's file."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loaders.errors import BadCheckpoint, CannotCreate, NotPermitted, ReadFailed, Unsupported
from loaders.formats.atomic import BROKEN
from loaders.formats.config import parse_json, read_bytes

SCHEMA = 1
RESULTS, REPORT = "results.jsonl", "report.html"
MOST_BYTES, MOST_LINES, MOST = 64 << 20, 10_000, 1 << 63
STATUSES = ("ok", "refused", "killed", "failed", "interrupted")
# What a line has whatever became of its case.
ALWAYS = {"case": str, "status": str, "model": dict, "machine": dict, "asked": dict}
# What else may be there, and null.
SOMETIMES = {
    **dict.fromkeys(("why", "time", "label"), str),
    **dict.fromkeys(("versions", "plan", "tests", "latency_ms", "cold", "warm", "memory", "timeline"), dict),
    **dict.fromkeys(("bandwidth", "ple", "storage", "energy", "predicted", "noise", "boxed"), dict),
    "first_token": list,
}


def figure(values: Sequence[float]) -> dict[str, Any]:
    """Mean, sample deviation (0 of one value) and the values themselves, of at least one."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "deviation": deviation, "values": [float(v) for v in values]}


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """p50, p95 and p99 in milliseconds: the smallest value that so many are not above (nearest rank)."""
    ordered = sorted(seconds)
    return {f"p{p}": ordered[max(0, math.ceil(p / 100 * len(ordered)) - 1)] * 1000 for p in (50, 95, 99)}


def claim(folder: Path) -> Path:
    """A folder for a report, made where it was not there; its results.jsonl, which is not.

    Raises CannotCreate where it holds a report already: what took an hour to measure is not written over.
    NotPermitted.
    """
    try:
        folder.mkdir(exist_ok=True)
        for name in (RESULTS, REPORT):
            if os.path.lexists(folder / name) and (name == REPORT or os.path.getsize(folder / name)):
                raise CannotCreate("exists already", file=folder / name, hint="Give another folder with -o")
        # An empty one is what a killed process has left.
        with open(folder / RESULTS, "a"):
            pass
    except PermissionError as e:
        raise NotPermitted(e.strerror, file=folder) from None
    except OSError as e:
        kind = ReadFailed if e.errno in BROKEN else CannotCreate
        raise kind(e.strerror or type(e).__name__, file=folder, expected="a folder to write into") from None
    return folder / RESULTS


def append(path: Path, line: dict[str, Any]) -> None:
    """Adds a line, whole and on the disk. Raises ReadFailed for a full disk, and leaves no part of it."""
    data = json.dumps(line, allow_nan=False, separators=(",", ":")).encode() + b"\n"
    before = None
    try:
        with open(path, "ab") as file:
            before = file.tell()
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as e:
        if before is not None:
            os.truncate(path, before)
        raise ReadFailed(e.strerror or type(e).__name__, file=path) from None


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a file, each checked as far as others rely on it.

    Raises MissingFile; BadCheckpoint naming line and field; Unsupported for another schema.
    """
    found: list[dict[str, Any]] = []
    for number, data in enumerate(read_bytes(path, MOST_BYTES).split(b"\n"), 1):
        if not data.strip():
            continue
        if number > MOST_LINES:
            raise BadCheckpoint("more lines", file=path, expected=f"at most {MOST_LINES}")
        where = f"{path}, line {number}"
        line = parse_json(data, where)
        check(line, where)
        found.append(line)
    if not found:
        raise BadCheckpoint("no results", file=path, expected="lines that `edge profile -o` has written")
    return found


def check(line: dict[str, Any], where: str) -> None:
    """Raises BadCheckpoint for what is no line of results, Unsupported for one of another schema."""
    schema = line.get("schema")
    if type(schema) is int and schema > SCHEMA:
        raise Unsupported(f"schema {schema}", file=where, expected=f"at most {SCHEMA}", hint="A newer edge wrote this")
    if schema != SCHEMA or type(schema) is not int:
        raise BadCheckpoint(schema, file=where, field="schema", expected=SCHEMA)
    for fields, needed in ((ALWAYS, True), (SOMETIMES, False)):
        for name, kind in fields.items():
            value = line.get(name)
            if (needed or value is not None) and not isinstance(value, kind):
                raise BadCheckpoint(f"{value!r:.60}", file=where, field=name, expected=kind.__name__)
    if line["status"] not in STATUSES:
        raise BadCheckpoint(line["status"], file=where, field="status", expected=f"one of {', '.join(STATUSES)}")
    for name, found in (line.get("tests") or {}).items():
        check_figure(found, where, f"tests.{name}")
    asked = line["asked"]
    for name in ("budget_bytes", "context"):
        if asked.get(name) is not None and type(asked[name]) is not int:
            raise BadCheckpoint(f"{asked[name]!r:.60}", file=where, field=f"asked.{name}", expected="a whole number")


def check_figure(found: Any, where: str, field: str) -> None:
    """Raises BadCheckpoint for what is not mean, deviation and values."""
    numbers = isinstance(found, dict) and isinstance(found.get("values"), list)
    if not numbers or not all(number(v) for v in (found.get("mean"), found.get("deviation"), *found["values"])):
        raise BadCheckpoint(f"{found!r:.60}", file=where, field=field, expected="mean, deviation and values, numbers")


def number(value: Any) -> bool:
    """A finite number and no bool."""
    return (type(value) is float and math.isfinite(value)) or (type(value) is int and abs(value) < MOST)
