"""What people see: tables and lines on stderr, results on stdout. Colour and progress only on a terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from edge.budget.plan import WHERE, Plan, Request, usual_kv
from edge.budget.quality import MEASURED, Quality
from edge.budget.units import format_bytes
from edge.generate import Timing
from edge.session import Session
from edge.store.packages import Opened, weighty
from loaders.formats.measured import Measured
from loaders.formats.sharded import Notify

# Tokens per second of a plan, or None where nobody knows.
Speed = Callable[[Plan], float | None]
MOST_ROWS = 24
# A slice may be spelt out layer by layer: a row shows the beginning.
MOST_NAME = 40
# Wider than any table.
WIDEST = 1000


def stderr() -> Console:
    """Plain text when stderr is not a terminal, and wide enough then for a table not to wrap."""
    console = Console(stderr=True, highlight=False)
    return console if console.is_terminal else Console(stderr=True, highlight=False, width=160, no_color=True)


def stdout() -> Console:
    """The same for results."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=160, no_color=True)


def fits(table: Table, console: Console) -> bool:
    """Whether a table is shown without a cut."""
    return console.measure(table, options=console.options.update(width=WIDEST)).maximum <= console.width


def print_json(value: Any) -> None:
    """One object and nothing else."""
    unicode = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    sys.stdout.write(json.dumps(value, ensure_ascii=not unicode, allow_nan=False) + "\n")


def safe(text: str) -> str:
    """Model text for a terminal: whatever could move a cursor or set a clipboard is dropped."""
    return "".join(c for c in text if c in "\n\t" or c.isprintable() or (c.isspace() and c not in "\r\x0b\x0c"))


@contextmanager
def progress(console: Console, wanted: bool) -> Iterator[Notify]:
    """A bar for loading and long prompts, gone when it is done; nothing off a terminal."""
    if not (wanted and console.is_terminal):
        yield lambda what, done, total: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    with Progress(*columns, console=console, transient=True) as bar:
        tasks: dict[str, Any] = {}

        def notify(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total, visible=done < total)

        yield notify


def weights_note(source: Opened) -> list[str]:
    """What to know of figures that come from a config.json alone; nothing of others."""
    if weighty(source):
        return []
    lacking = "" if (source.folder / "tokenizer.json").exists() else ", and no tokenizer is counted"
    return [f"no weights here: bytes are those of the config's shapes in {source.dtype}{lacking}"]


def plan_lines(plan: Plan, request: Request, best: Plan) -> list[str]:
    """What was chosen and, when it is not the best there is, what that would have needed."""
    have = "no budget" if request.budget is None else f"{format_bytes(request.budget)} budget"
    lines = [f"plan: {plan.label()}: {format_bytes(plan.total_bytes)} of {have}"]
    if plan.host_bytes:
        limit = f" of {format_bytes(request.ram_budget)}" if request.ram_budget is not None else ""
        lines[0] += f" on the GPU, {format_bytes(plan.host_total_bytes)}{limit} on the host"
    if request.context is not None and plan.context < request.context:
        lines.append(f"      context {request.context} cut to {plan.context}, the longest this model was made for")
    pairs = (
        ("slice", best.slice, plan.slice),
        ("precision", best.recipe.label, plan.recipe.label),
        ("PLE table", best.ple, plan.ple),
        ("keys and values", best.kv, plan.kv),
        ("context", best.context, plan.context),
    )
    changed = [f"{what} {before} -> {after}" for what, before, after in pairs if before != after]
    if changed:
        lines.append(f"      to fit: {', '.join(changed)} ({best.label()} needs {format_bytes(best.total_bytes)})")
    return lines


def plan_table(
    plans: Sequence[Plan],
    chosen: Plan | None,
    request: Request,
    speed: Speed | None = None,
    *,
    parts: bool = True,
) -> Table:
    """One row per slice, precision and tier, at its longest chunk and its most precise keys and values that fit: the
    best, and those around the chosen one.

    ``speed`` adds what decoding comes to, where that is known. Without ``parts`` a narrower one, of totals.
    """
    best = plans[0].quality
    title = f"~{best.origin}" if best.basis is None else "quality"
    table = Table(box=None, pad_edge=False, header_style="bold", caption=loss_note(best), caption_justify="left")
    tiers = ("PLE",) if any(plan.ple != "none" for plan in plans) else ()
    for name in ("", "slice", "precision", *tiers):
        table.add_column(name, no_wrap=True)
    told = speed is not None and any(speed(plan) is not None for plan in plans)
    names = [name for name in plans[0].bytes if parts and any(plan.bytes.get(name) for plan in plans)]
    for name in ("context", title, *names, "total", *(("tokens/s ~",) if told else ()), "fits"):
        table.add_column(name, justify="right", no_wrap=True)
    for plan in shortened(distinct(plans, request, kv=False), chosen):
        if plan is None:
            table.add_row("", "...")
            continue
        over = plan.over(request)
        quality = quality_text(plan.quality, best)
        cells = [component(plan, name) for name in names]
        reach = (speed_text(speed(plan)),) if told and speed is not None else ()
        table.add_row(
            "->" if plan is chosen else "",
            clipped(plan.slice), plan.recipe.label, *((plan.ple,) if tiers else ()), str(plan.context), quality, *cells,
            format_bytes(plan.total_bytes), *reach,
            "yes" if over <= 0 else f"{format_bytes(over)} over",
            style="bold" if plan is chosen else ("dim" if over > 0 else None),
        )  # fmt: skip
    return table


def quality_text(quality: Quality, best: Quality) -> str:
    """A cell of the column: what is not measured for this very row has a ~ where the column's title has none."""
    if quality.origin == MEASURED:
        return f"loss {'' if quality.exact else '~'}{-quality.score:.3f}"
    figure = f"{quality.score:.1f}%" if quality.origin == "MMLU" else parameters(quality.score)
    return figure if best.basis is None else f"~{figure}"


def loss_note(best: Quality) -> str | None:
    """What losses are of, below the table that shows them."""
    if best.basis is None:
        return None
    return f"loss: nats per token, {measured_on(best.basis)}; ~ is estimated"


def measured_on(result: Measured) -> str:
    """The text, by the first digits of its sum."""
    return f"measured on {result.tokens:,} tokens of text {result.text[:8]}, context {result.context}"


def clipped(name: str) -> str:
    """A slice's name in a row."""
    return name if len(name) <= MOST_NAME else name[: MOST_NAME - 3] + "..."


def component(plan: Plan, name: str) -> str:
    """Bytes of a component, and what keys and values are in where it is not what they usually are."""
    kind = f"{plan.kv} " if name == "kv" and plan.kv != usual_kv(plan.recipe, plan.engine) else ""
    return kind + format_bytes(plan.bytes.get(name, 0))


def speed_text(tps: float | None) -> str:
    """Tokens per second: 0.85, 15.3, 1,950."""
    if tps is None:
        return "-"
    return f"{tps:,.0f}" if tps >= 100 else f"{tps:.3g}"


def shortened(plans: Sequence[Plan], chosen: Plan | None) -> list[Plan | None]:
    """At most MOST_ROWS rows: the first few, then those around the chosen plan; None where some are left out.

    Where nothing fits, the end is shown: there lie the smallest.
    """
    if len(plans) <= MOST_ROWS:
        return list(plans)
    at = next((i for i, plan in enumerate(plans) if plan is chosen), len(plans) - 1)
    head = MOST_ROWS // 4
    first = max(head, min(at - MOST_ROWS // 3, len(plans) - (MOST_ROWS - head)))
    rows: list[Plan | None] = [*plans[:head]]
    if first > head:
        rows.append(None)
    rows += plans[first : first + MOST_ROWS - head]
    if first + MOST_ROWS - head < len(plans):
        rows.append(None)
    return rows


def parameters(billions: float) -> str:
    """1.03T, 1.91B, 27.1M."""
    if billions >= 999.995:
        return f"{billions / 1000:.2f}T"
    return f"{billions:.2f}B" if billions >= 0.1 else f"{billions * 1000:.1f}M"


def distinct(plans: Sequence[Plan], request: Request, *, kv: bool = True) -> list[Plan]:
    """Plans without those that differ in the chunk only, or without ``kv`` also in the format of keys and values: the
    first that fits, else the smallest.
    """
    best: dict[tuple[Any, ...], Plan] = {}
    for plan in plans:
        key = (plan.part, plan.recipe, plan.ple, plan.kv if kv else None, plan.context)
        held = best.get(key)
        if held is None or (held.over(request) > 0 and plan.over(request) < held.over(request)):
            best[key] = plan
    return list(best.values())


def parts_text(components: dict[str, dict[str, int]]) -> str:
    """What each component was given, and what it took where the ledger counted something else."""
    parts = []
    for name, c in components.items():
        if c["planned"] or c["peak"]:
            other = "" if abs(c["peak"] - c["planned"]) * 20 <= c["planned"] else f" (took {format_bytes(c['peak'])})"
            parts.append(f"{name} {format_bytes(c['planned'])}{other}")
    return ", ".join(parts)


def statistics(session: Session, timing: Timing) -> list[tuple[str, str]]:
    """What a run took, for people: name and figure."""
    memory, plan, ple = session.memory(), session.plan, session.ple
    peak, budget = memory["peak_bytes"], memory["budget_bytes"]
    on_gpu = memory["device_peak_bytes"] is not None
    shown = memory["device_peak_bytes"] if on_gpu else peak
    of = f" of {format_bytes(budget)} budget ({shown / budget:.0%})" if budget else ""
    prompt = timing.prompt_tokens - timing.cached_tokens
    lines = [
        ("load", f"{session.load_s:.2f} s"),
        ("prefill", f"{prompt} tokens, {timing.prefill_tps:.1f} tokens/s, first token after {timing.ttft_s:.2f} s"),
        (
            "decode",
            f"{timing.new_tokens} tokens, {timing.decode_tps:.1f} tokens/s, reading {timing.read_gbps:.2f} GB/s",
        ),
        ("peak memory", f"{format_bytes(shown)}{of}, {format_bytes(plan.total_bytes)} planned"),
    ]
    lines.append(
        (
            "of it",
            f"{format_bytes(memory['anonymous_bytes'])} anonymous and {format_bytes(memory['file_backed_bytes'])} of "
            f"files now; planned {parts_text(memory['components'])}",
        )
    )
    if on_gpu:
        lines.append(("host memory", f"{format_bytes(peak)} peak, {format_bytes(plan.host_total_bytes)} planned"))
    if ple is not None:
        read = f"{format_bytes(ple.bytes_read)} read from storage" if plan.ple == "ssd" else "none read from storage"
        waited = f", {ple.hit_rate:.0%} of them cached, {ple.wait_s * 1000:.0f} ms waited" if plan.ple == "ssd" else ""
        lines.append(("PLE", f"{ple.rows} rows {WHERE[plan.ple]}, {read}{waited}"))
    return lines
