"""Writes the generated parts of README.md, or with --check says whether they are what the code would write.

python -m benchmarks.readme [--check]
"""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.exports import table
from benchmarks.peers import peers_table
from benchmarks.profile import profile_table
from edge.budget.plan import Floor, Plan, Request, enumerate_plans, pick
from edge.budget.units import format_bytes
from edge.budget.wanted import TIERS
from edge.cli.layers import CACHES, cache_kind
from edge.cli.show import parameters, plan_lines, plan_table
from loaders.families import Family, families
from loaders.formats.recipe import Recipe
from loaders.network.matformer import sliced
from loaders.network.spec import Experts, Model
from loaders.network.tensors import active, core, total
from loaders.sketch import sketch
from loaders.slices import candidates
from tests import shrink

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
CONFIGS = ROOT / "loaders" / "configs"
MIB = 1 << 20
# The floor of the example plan; a real one is measured where edge runs.
EXAMPLE_FLOOR = Floor(host=46 * MIB, tokenizer=26 * MIB)
EXAMPLE_BANDWIDTH = 30e9


def supported() -> str:
    """One row per family of the registry, from the configurations that are parsed at full size and from the tests."""
    parsed: dict[str, list[tuple[str, Model]]] = {}
    for path in sorted(CONFIGS.glob("*.json")):
        checkpoint = sketch(path)
        parsed.setdefault(checkpoint.family.title, []).append((path.stem, checkpoint.model))
    lines = [
        "| family | `model_type` | parsed at full size: parameters | float32 | int8, int4 | caches | more |",
        "|---|---|---|---|---|---|---|",
    ]
    for family in families().values():
        found = parsed.get(family.title, [])
        models = [model for _, model in found]
        cells = (
            family.title,
            ", ".join(f"`{t}`" for t in family.model_types),
            ", ".join(f"{name} ({sizes(model)})" for name, model in found) or "-",
            verified([name for name, _ in found], shrink.NAMES),
            verified([name for name, _ in found], getattr(shrink, "QUANTIZED", ())),
            ", ".join(caches(models)) or "-",
            more(family, models) or "-",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def sizes(model: Model) -> str:
    """Parameters, and those that one token meets where they are fewer."""
    whole, met = parameters(total(model) / 1e9), parameters(active(model) / 1e9)
    return whole if total(model) == active(model) else f"{whole}, {met} active"


def verified(names: Sequence[str], tested: Sequence[str]) -> str:
    """How many of a family's configurations, shrunk, a test compares."""
    count = sum(name in tested for name in names)
    return f"{count} of {len(names)}" if count else "-"


def caches(models: Sequence[Model]) -> list[str]:
    """The ways in which layers keep keys and values."""
    return sorted({cache_kind(layer.attention) for model in models for layer in model.layers}, key=CACHES.index)


def more(family: Family, models: Sequence[Model]) -> str:
    """What only some families have."""
    found = []
    if any(isinstance(layer.ffn, Experts) for model in models for layer in model.layers):
        found.append("experts")
    if family.sliced_config:
        found.append("slices")
    if any(model.ple is not None for model in models):
        found.append(f"PLE: {', '.join(TIERS)}")
    return "; ".join(found)


def slices() -> str:
    """The published slices of E4B."""
    checkpoint = sketch(CONFIGS / "gemma-3n-E4B.json")
    lines = [
        "| `--slice` | parameters without embeddings | MMLU (published, pre-trained) | what it keeps |",
        "|---|---:|---:|---|",
    ]
    for item in candidates(checkpoint.model, checkpoint.family):
        size = core(sliced(checkpoint.model, item.slice)) / 1e9
        lines.append(f"| `{item.slice.name}` | {size:.2f}B | {item.mmlu:.1f} | {item.slice.describe()} |")
    return "\n".join(lines)


def plan() -> str:
    """What `edge plan` prints for E4B on a machine with 3 GB to give."""
    checkpoint = sketch(CONFIGS / "gemma-3n-E4B.json")
    request = Request(budget=3 * 10**9, engine="native")
    plans = enumerate_plans(checkpoint, request, EXAMPLE_FLOOR)
    chosen = pick(plans, request)
    out = io.StringIO()

    def speed(plan: Plan) -> float | None:
        return plan.predicted_tps(EXAMPLE_BANDWIDTH)

    console = Console(file=out, width=160, no_color=True, highlight=False)
    console.print(plan_table([p for p in plans if p.context == chosen.context], chosen, request, speed))
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    return "\n".join(
        ["```", "$ edge plan ./gemma-3n-E4B --budget 3GB", *lines, "", *plan_lines(chosen, request, plans[0]), "```"]
    )


def budgets() -> str:
    """What budgets came to on a CPU, from benchmarks/budgets.py."""
    lines = [
        "| model | budget | plan | peak | of the plan | prefill, tokens/s | decode, tokens/s | reading, of |",
        "|---|---:|---|---:|---:|---:|---:|---:|",
    ]
    for r in lines_of("budgets"):
        if "needed_bytes" in r:
            lines.append(f"| {r['model']} | {r['budget']} | refused: needs {format_bytes(r['needed_bytes'])} |||||")
            continue
        lines.append(
            f"| {r['model']} | {r['budget']} | {r['label']} | {format_bytes(r['peak_bytes'])} "
            f"| {r['peak_bytes'] / r['planned_bytes']:.1%} | {r['prefill_tps']:.1f} | {r['decode_tps']:.2f} "
            f"| {r['read_gbps']:.1f} of {r['memory_gbps']:.0f} GB/s |"
        )
    return "\n".join(lines)


def lines_of(name: str) -> list[dict[str, Any]]:
    """The results of one benchmark; none before it ran."""
    path = ROOT / "benchmarks" / "results" / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def quality() -> str:
    """Every slice at every precision, from benchmarks/quality.py."""
    found = lines_of("quality")
    rows = [line for line in found if line["case"] == "slice"]
    if not rows:
        return "Not measured yet."
    best = next(row["loss"] for row in rows if (row["slice"], row["precision"]) == ("full", "bf16"))
    lines = [
        "| slice | precision | planned | peak | weights | loss | to full | KL | top-1 | tokens/s |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        timed = "decode_tps" in row
        peak, tps = (format_bytes(row["peak_bytes"]), f"{row['decode_tps']:.0f}") if timed else ("-", "-")
        recipe, planned = Recipe(row["precision"], row["head"]), format_bytes(row["planned_bytes"])
        lines.append(
            f"| `{row['slice']}` | {recipe.label} | {planned} | {peak} "
            f"| {format_bytes(row['weights_bytes'])} | {row['loss']:.4f} | {row['loss'] / best - 1:+.2%} "
            f"| {row['kl']:.4f} | {row['top1']:.1%} | {tps} |"
        )
    return "\n".join([*lines, "", *quality_notes(found, best)])


def quality_notes(found: Sequence[dict[str, Any]], best: float) -> Iterator[str]:
    """What the table is of, and what is not in it."""
    first = found[0]
    edges = f"{first['tokens']:,} tokens of `{first['file']}` ({first['text'][:8]}), in windows of {first['context']:,}"
    machine = f"{first['cores']} cores ({first['machine']}), {first['date']}"
    yield (
        f"{edges} that do not overlap; {machine}. Loss: nats per token; to full: against the full model's in bf16. "
        "KL, in nats, and top-1, how often the likeliest token is the same: against the full model in float32. "
        "Tokens/s: greedy decoding in a process of its own, whose peak is shown."
    )
    tables = {row["table"]: row["loss"] for row in found if row["case"] == "table"}
    if tables:
        zeroed, rounded = tables["zeroed"], tables["int8"]
        yield ""
        yield (
            f"Of the full model in bf16 with its per-layer table zeroed: {zeroed:.4f} ({zeroed / best - 1:+.1%}); "
            f"with the table alone in int8: {rounded:.4f} ({rounded / best - 1:+.2%})."
        )


def demo_budgets() -> str:
    """One prompt under three budgets, from benchmarks/demo_budgets.py."""
    found = lines_of("demo_budgets")
    return "\n\n".join(map(told, found)) if found else "Not measured yet."


def told(line: dict[str, Any]) -> str:
    """A run of the demo as a terminal shows it, its text in lines of a README's width."""
    budget, peak = line["budget_bytes"], line["peak_bytes"]
    command = f'$ edge run --budget {budget // 10**6}MB -s 1 -n {line["new"]} "{line["prompt"]}"'
    said = [part for plan in line["said"] for part in textwrap.wrap(plan, 110, subsequent_indent=" " * 8)]
    text = textwrap.wrap(line["text"].strip(), 110)
    figures = f"peak memory: {format_bytes(peak)} of {format_bytes(budget)} budget ({peak / budget:.0%})"
    return "\n".join(["```", command, *said, *text, figures, "```"])


def cpu() -> str:
    """edge beside transformers on a CPU, from benchmarks/run.py."""
    lines = [
        "| model | case | peak | of the plan | prefill, tokens/s | x transformers | decode, tokens/s | x transformers |"
    ]
    lines.append("|---|---|---:|---:|---:|---:|---:|---:|")
    peers: dict[str, dict[str, Any]] = {}
    for r in lines_of("cpu") + lines_of("moe"):
        if r["case"] == "transformers":
            peers[r["model"]] = r
        peer = peers[r["model"]]
        plan = f"{r['peak_bytes'] / r['planned_bytes']:.0%}" if "planned_bytes" in r else "-"
        pp, tg = (r[k] / peer[k] for k in ("prefill_tps", "decode_tps"))
        model = f"{r['model']}, {r['prompt']} + {r['new']} tokens"
        case = r["case"] if r["precision"] == "bf16" else f"{r['case']} {r['precision']}"
        lines.append(
            f"| {model} | {case} | {r['peak_bytes'] / 1e6:,.0f} MB | {plan} "
            f"| {r['prefill_tps']:.1f} | {pp:.2f}x | {r['decode_tps']:.2f} | {tg:.2f}x |"
        )
    return "\n".join(lines)


def gpu() -> str:
    """The tiers of the table on a GPU, from benchmarks/gpu.py."""
    found = {r["case"]: r for r in lines_of("gpu")}
    wall = found["device read bandwidth"]["gbps"]
    lines = [
        "| PLE tier | device memory | of the plan | gather of a row | decode, tokens/s | prefill of 2048, tokens/s |"
    ]
    lines.append("|---|---:|---:|---:|---:|---:|")
    for tier in ("device", "ram", "ssd"):
        run, gather = found[f"run {tier}"], found[f"gather {tier}"]
        kernel = f"{gather['kernel_us']:.1f} us" if "kernel_us" in gather else "-"
        lines.append(
            f"| {tier} | {run['peak_device']:.2f} GB | {run['peak_device'] / run['planned_device']:.1%} | {kernel} "
            f"| {run['decode_graph_tps']:.0f} | {run['prefill2048_tps']:,.0f} |"
        )
    eager = found["run ram"]
    lines.append("")
    lines.append(
        f"{eager['gpu']}, whose memory reads {wall:,.0f} GB/s; decoding reaches {eager['of_bandwidth']:.0%} of that, "
        f"{eager['decode_graph_tps'] / eager['decode_eager_tps']:.1f} times what launching operator by operator does."
    )
    return "\n".join([*lines, "", *gpu_budgets(found)])


def gpu_budgets(found: dict[str, dict[str, Any]]) -> list[str]:
    """Budgets and pinned precisions, from benchmarks/gpu_budgets.py."""
    names = ("budget 2GB", "least that fits", *(f"budget {size}GB" for size in "346"), "budget 4GB, RAM 3GB")
    lines = [
        "| budget | plan | device peak | of the plan | host peak | of the plan | decode, tokens/s "
        "| of the bandwidth | prefill, tokens/s |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name in (*names, "no more than planned", "int4", "int8", "bf16"):
        r = found.get(name)
        if r is None:
            continue
        title = (
            f"{r['budget'] / 1e9:.2f}".rstrip("0").rstrip(".")
            + " GB"
            + {"budget 4GB, RAM 3GB": ", RAM 3 GB"}.get(name, "")
        )
        title += f", {name}" if not name.startswith("budget") else ""
        if "needed" in r:
            lines.append(f"| {title} | refused: {r['needed'] / 1e9:.2f} GB needed | {r['peak_device']:.2f} GB |||||||")
            continue
        head = "" if r["head"] == r["precision"] else f", head {r['head']}"
        lines.append(
            f"| {title} | {r['precision']}{head}, table {r['ple']}, context {r['context']} "
            f"| {r['peak_device']:.2f} GB | {1 + r['off']:.1%} | {r['peak_host']:.2f} GB | {1 + r['host_off']:.1%} "
            f"| {r['decode_tps']:.0f} | {r['of_bandwidth']:.0%} | {r['prefill_tps']:,.0f} |"
        )
    wall = found["int4"]
    seen = f"{wall['gpu']}, whose memory reads {wall['wall_gbps']:,.0f} GB/s in the same run."
    return [*lines, "", f"{seen} Peaks are the whole device's, read from outside the run every few milliseconds."]


def exports() -> str:
    """Every family as a package, from benchmarks/exports.py."""
    return table(lines_of("exports"))


def usage() -> str:
    """The help of the main command."""
    command = [sys.executable, "-m", "edge", "run", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=plain_terminal()).stdout
    return "```\n" + "\n".join(line.rstrip() for line in text.replace("python -m edge", "edge").splitlines()) + "\n```"


def plain_terminal() -> dict[str, str]:
    """The environment with a fixed width, so that help wraps alike everywhere."""
    return {**os.environ, "COLUMNS": "100", "NO_COLOR": "1"}


BLOCKS: dict[str, Callable[[], str]] = {
    "supported": supported,
    "slices": slices,
    "plan": plan,
    "usage": usage,
    "peers": peers_table,
    "profile": profile_table,
    "budgets": budgets,
    "quality": quality,
    "demo-budgets": demo_budgets,
    "cpu": cpu,
    "gpu": gpu,
    "exports": exports,
}


def rendered(text: str) -> str:
    """The README with every block as the code would write it now."""
    for name, make in BLOCKS.items():
        pattern = re.compile(rf"(<!-- generated: {name} -->\n)(?:(?!<!--).)*?(\n<!-- end -->)", re.DOTALL)
        if not pattern.search(text):
            raise SystemExit(f"README.md has no block {name!r}")
        made = make()
        text = pattern.sub(lambda m, made=made: m[1] + made + m[2], text)  # type: ignore[misc]
    return text


def main() -> int:
    """0 when the README was written, or is what it should be."""
    before = README.read_text()
    after = rendered(before)
    if "--check" in sys.argv[1:]:
        if before != after:
            print("README.md is stale: run python -m benchmarks.readme", file=sys.stderr)
        return int(before != after)
    README.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
