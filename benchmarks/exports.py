"""What exported packages compute beside what edge does: every family's configurations, shrunk, in ONNX Runtime.

python -m benchmarks.exports

Writes results/exports.jsonl, a line for each configuration, profile and precision. A difference is the largest of any
two logits, of a prompt read at once, in chunks, and of tokens decoded past every window, as a share of the largest.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from loaders.errors import Unsupported
from loaders.families import family_of
from loaders.formats.quant import BITS
from loaders.weights import Source
from tests.shrink import NAMES, real, shrink

RESULTS = Path(__file__).parent / "results" / "exports.jsonl"
PROFILES = ("ort", "standard")
PRECISIONS = ("float32", "float16", *BITS)
# What float16 may cost, as a share of the largest logit.
ROUNDING = 2e-2
if TYPE_CHECKING:
    from edge.engine.ort import OrtEngine

Ways = dict[str, tuple[np.ndarray, np.ndarray]]


def config_of(name: str) -> dict[str, Any]:
    """A configuration's text part, small."""
    from tests.exported import BLOCKED

    base, keys = BLOCKED.get(name, (name, {}))
    raw = shrink(real(base))
    return {**raw.get("text_config", raw), **keys}


def measured(name: str, folder: Path) -> Iterator[dict[str, Any]]:
    """Every package of a configuration, whose checkpoint is made in ``folder``."""
    import edge
    from tests import makers
    from tests.exported import LENGTH

    config = config_of(name)
    family = family_of(config["model_type"], name)
    checkpoint = makers.make(folder / "checkpoint", config)
    for precision in PRECISIONS:
        kept = "float32" if precision == "float16" else precision
        with edge.load(checkpoint, engine="torch", precision=kept, slice="full", kv="float32") as session:
            ids = makers.prompt(session.model.vocab, LENGTH)
            wanted = session.logits(ids)
            for profile in PROFILES:
                line = {"name": name, "family": family.title, "profile": profile, "precision": precision}
                package = folder / f"{profile}-{precision}"
                yield {**line, **compared(session.source, package, profile, precision, ids, wanted)}


def compared(
    source: Source, folder: Path, profile: str, precision: str, ids: np.ndarray, wanted: np.ndarray
) -> dict[str, Any]:
    """A package's figures, or the words of its refusal."""
    from edge.engine.ort_start import version
    from loaders.formats.package import Package
    from tests.exported import everywhere, export, running, two_levels

    def ask(engine: OrtEngine) -> Ways:
        return everywhere(engine, ids)

    try:
        if precision in BITS:
            found = two_levels(source, folder, profile, precision, ask)
        else:
            export(source, folder, profile, precision)
            with running(folder) as engine:
                found = {"exact": ask(engine)}
    except Unsupported as error:
        return {"refused": str(error)}
    with closing(Package.open(folder)) as package:
        facts = {"min_ort": package.min_ort, "tokens": len(ids), "onnxruntime": version()}
    facts["difference"] = largest(found["exact"], wanted)
    if precision == "float16":
        facts["astray"] = astray(found["exact"], wanted)
    if "shipped" in found:
        every, at = next(iter(found["shipped"].values()))
        facts["shipped"] = largest(found["shipped"], wanted)
        facts["top1"] = float(np.mean(every.argmax(-1) == wanted[at].argmax(-1)))
    return facts


def largest(ways: Ways, wanted: np.ndarray) -> float:
    """The worst of all ways; not rounded up to look better."""
    worst = max(float(np.abs(found - wanted[at]).max()) for found, at in ways.values())
    return float(f"{worst / float(np.abs(wanted).max()):.2e}")


def astray(ways: Ways, wanted: np.ndarray) -> int:
    """How many tokens differ by more than rounding alone explains: those that it sends to another expert."""
    found, at = next(iter(ways.values()))
    return int(np.count_nonzero(np.abs(found - wanted[at]).max(-1) > ROUNDING * np.abs(wanted).max()))


def table(lines: list[dict[str, Any]]) -> str:
    """Families by profiles and precisions, each cell the worst of its configurations, as Markdown."""
    if not lines:
        return "Not measured yet."
    columns = [(profile, precision) for profile in PROFILES for precision in PRECISIONS]
    rows = [
        "| family | " + " | ".join(f"{profile}, {precision}" for profile, precision in columns) + " |",
        "|---" + "|---:" * len(columns) + "|",
    ]
    for family in dict.fromkeys(line["family"] for line in lines):
        mine = [line for line in lines if line["family"] == family]
        cells = [cell([x for x in mine if (x["profile"], x["precision"]) == column]) for column in columns]
        rows.append(f"| {' | '.join((family, *cells))} |")
    return "\n".join([*rows, "", *notes(lines)])


def cell(lines: list[dict[str, Any]]) -> str:
    """The worst difference, and how often the first choice is the same as shipped; or that there is no such package."""
    found = [line for line in lines if "difference" in line]
    if not found:
        return "refused" if lines else "-"
    text = f"{max(line['difference'] for line in found):.0e}"
    shipped = [line["top1"] for line in found if "top1" in line]
    return f"{text}, {min(shipped):.0%}" if shipped else text


def notes(lines: list[dict[str, Any]]) -> Iterator[str]:
    """What the figures are, and the words of refusals."""
    found = [line for line in lines if "difference" in line]
    count = len({line["name"] for line in lines})
    yield (
        f"The largest difference of any two logits as a share of the largest, the worst of a family's configurations "
        f"({count} in all, shrunk, {found[0]['tokens']} tokens) in ONNX Runtime {found[0]['onnxruntime']}: a prompt "
        "read at once and in chunks, and tokens decoded past every window. float16 beside the float32 model; int8 and "
        "int4 beside edge's own over the same blocks, in exact arithmetic, and how often the first choice is the same "
        "as shipped, with activations in 8 bits. Weights are random, so that choices are closer than a trained model's."
    )
    for line in found:
        if line.get("astray"):
            yield ""
            yield (
                f"Beyond {ROUNDING:g} in float16: {line['astray']} of {line['tokens']} tokens of {line['name']} in "
                f"profile {line['profile']}, which rounding sends to another expert."
            )
    refusals = {
        line["refused"]: sorted({x["family"] for x in lines if x.get("refused") == line["refused"]})
        for line in lines
        if "refused" in line
    }
    for words, families in refusals.items():
        yield ""
        yield f"Refused, {', '.join(families)}: `{words}`"


def main() -> int:
    """Measures everything anew."""
    from tests.exported import BLOCKED

    os.environ["OMP_NUM_THREADS"] = "1"
    lines = []
    with tempfile.TemporaryDirectory(prefix="edge-exports-") as place:
        os.environ["EDGE_CACHE"] = f"{place}/cache"
        for i, name in enumerate((*NAMES, *BLOCKED)):
            for line in measured(name, Path(place) / str(i)):
                lines.append(json.dumps(line))
                print(lines[-1], file=sys.stderr, flush=True)
    RESULTS.write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
