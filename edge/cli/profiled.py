"""Results for a terminal: a row for each case."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from edge.budget.units import format_bytes
from edge.profile.results import number
from loaders.errors import printable

# Columns that a narrow terminal does without, the first to go first.
SPARE = ("J/token", "p50/p99 ms", "load cold", "GB/s", "predicted", "planned")


def table(lines: Sequence[dict[str, Any]], leave_out: Sequence[str] = ()) -> Table:
    """Cases as rows; tests, which not every case has, as columns by llama-bench's names."""
    tests = list(dict.fromkeys(name for line in lines for name in line.get("tests") or {}))
    names = ["case", "plan", "load cold", "load", "first token", *tests, "p50/p99 ms", "GB/s", "peak", "planned"]
    names += ["predicted", "J/token"]
    shown = [name for name in names if name not in leave_out]
    found = Table(box=None, pad_edge=False, header_style="bold")
    for name in shown:
        found.add_column(name, justify="left" if name in ("case", "plan") else "right", overflow="fold")
    for line in lines:
        cells = row(line, tests)
        found.add_row(*(Text(cells.get(name, "")) for name in shown), style=None if line["status"] == "ok" else "dim")
    return found


def blank(lines: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """Columns that no case has anything in."""
    cells = [row(line, ()) for line in lines]
    return tuple(name for name in SPARE if not any(found.get(name) for found in cells))


def row(line: dict[str, Any], tests: Sequence[str]) -> dict[str, str]:
    """The cells of a case."""
    about = {"case": printable(line["case"]), "plan": printable(plan_text(line))}
    if line["status"] == "refused":
        return {**about, "plan": f"does not fit: needs {format_bytes(line.get('needed_bytes') or 0)}"}
    cells = dict(about)
    for name in tests:
        cells[name] = speed((line.get("tests") or {}).get(name))
    cells["load cold"], cells["load"] = seconds(line.get("cold"), "load_s"), seconds(line.get("warm"), "load_s")
    cells["first token"] = seconds(line.get("warm"), "ttft_s")
    return cells | figures(line)


def plan_text(line: dict[str, Any]) -> str:
    """A plan's label without its context, which the case names."""
    context = (line.get("plan") or {}).get("context")
    return (line.get("label") or "").replace(f", context {context}", "", 1)


def figures(line: dict[str, Any]) -> dict[str, str]:
    """Memory, latency, bytes and joules, as far as there are any."""
    cells = {}
    memory, band = line.get("memory"), line.get("bandwidth")
    if memory:
        peak = memory.get("device_peak_bytes") or memory["peak_bytes"]
        cells["peak"] = format_bytes(peak)
        error = (line.get("predicted") or {}).get("memory_error")
        cells["planned"] = "" if error is None else f"{error:+.1%}"
    if band:
        of = f" of {band['read_gbps']:,.1f}" if band["read_gbps"] else ""
        cells["GB/s"] = f"{band['achieved_gbps']:,.1f}{of}"
    latency = next(iter((line.get("latency_ms") or {}).values()), None)
    if latency:
        cells["p50/p99 ms"] = f"{latency['p50']:.3g}/{latency['p99']:.3g}"
    errors = [t["error"] for t in ((line.get("predicted") or {}).get("tests") or {}).values()]
    cells["predicted"] = ", ".join(f"{e:+.0%}" for e in errors)
    joules = (line.get("energy") or {}).get("joules_per_token")
    cells["J/token"] = f"{joules:.3g}" if number(joules) else ""
    return cells


def notes(lines: Sequence[dict[str, Any]]) -> list[str]:
    """What else is to be said, a line each."""
    return [f"{printable(line['case'])}: {remark}" for line in lines for remark in remarks(line)]


def remarks(line: dict[str, Any]) -> list[str]:
    """What is to be said of a case, the worst first."""
    ended = line["status"] in ("ok", "refused")
    found = [] if ended else [f"{line['status']}: {printable(line.get('why') or '')}"]
    if (line.get("memory") or {}).get("kept") is False:
        found.append("BUDGET BROKEN")
    boxed = line.get("boxed")
    if boxed:
        good = boxed["status"] == "ok" and boxed["same_tokens"]
        found.append("same tokens in a control group" if good else f"IN A CONTROL GROUP: {boxed_why(boxed)}")
    if (line.get("noise") or {}).get("noisy"):
        found.append("noisy: " + "; ".join(map(printable, line["noise"]["why"])))
    return found


def boxed_why(boxed: dict[str, Any]) -> str:
    """Why a run in a control group does not count."""
    return printable(boxed.get("why") or "other tokens")


def speed(found: dict[str, Any] | None) -> str:
    """16.4 ± 0.2."""
    if not found:
        return ""
    digits = 0 if found["mean"] >= 1000 else 1 if found["mean"] >= 10 else 2
    spread = f" ± {found['deviation']:.{digits}f}" if len(found["values"]) > 1 else ""
    return f"{found['mean']:,.{digits}f}{spread}"


def seconds(start: dict[str, Any] | None, name: str) -> str:
    """1.84 s."""
    return f"{start[name]['mean']:.3g} s" if start else ""
