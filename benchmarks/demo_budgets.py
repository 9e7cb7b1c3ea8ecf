"""The same prompt under three budgets: the least that anything fits, one where everything fits, one in between.

Run by ``python -m benchmarks.quality --budgets``, with the demo model and the command line itself.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PROMPT, NEW = "Once upon a time", 64
MB = 10**6
# What is resident before a run begins moves by pages from one process to the next.
SPARE = MB // 2
WONT_FIT = 80


def edge(*args: str) -> subprocess.CompletedProcess[str]:
    """The command line, with what it says on stderr."""
    line = [sys.executable, "-m", "edge", *args]
    return subprocess.run(line, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)


def planned(*args: str) -> dict[str, Any]:
    """What ``edge plan --json`` prints, whether or not anything fits."""
    done = edge("plan", "--device", "cpu", "--json", *args)
    if done.returncode not in (0, WONT_FIT):
        raise SystemExit(done.stderr.strip())
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def budgets() -> list[int]:
    """Three, in whole megabytes, whose plans differ in slice or precision."""
    edge("run", "--device", "cpu", "-n", "1", PROMPT)  # what is resident before a run is remembered by the first
    least = up(planned("--budget", "1")["nearest"]["needed_bytes"] + SPARE)
    most = up(planned()["plan"]["total_bytes"] + SPARE)
    ends = {chosen(least), chosen(most)}
    for share in (0.5, 0.4, 0.6, 0.3, 0.7, 0.2, 0.8, 0.1, 0.9):
        middle = up(least + int((most - least) * share))
        if chosen(middle) not in ends:
            return [least, middle, most]
    raise SystemExit("two plans at most between the least budget and one where everything fits")


def up(nbytes: int) -> int:
    """To a whole megabyte."""
    return -(-nbytes // MB) * MB


def chosen(budget: int) -> tuple[str, str, str]:
    """Slice and precision that a budget gives."""
    plan = planned("--budget", str(budget))["plan"]
    return plan["slice"], plan["precision"], plan["head"]


def run(budget: int) -> dict[str, Any]:
    """One budget: the plan's line as people see it, the plan, the peak and the text."""
    args = ("run", "--budget", f"{budget // MB}MB", "--device", "cpu", "-s", "1", "-n", str(NEW), PROMPT)
    loud, plain = edge(*args), edge(*args, "--json")
    for done in (loud, plain):
        if done.returncode:
            raise SystemExit(done.stderr.strip())
    found = json.loads(plain.stdout)
    said = re.search(r"^plan: .*\n(?: +.*\n)*", loud.stderr, re.MULTILINE)
    if said is None or found["text"] != loud.stdout.removesuffix("\n"):
        raise SystemExit("two runs of the same line differ")
    return {
        "case": f"budget {budget // MB}MB", "budget_bytes": budget, "prompt": PROMPT, "new": NEW,
        "said": said[0].rstrip().splitlines(), "plan": found["plan"], "peak_bytes": found["memory"]["peak_bytes"],
        "decode_tps": found["timing"]["decode_tps"], "text": found["text"],
    }  # fmt: skip


def record(path: Path) -> None:
    """Writes one line of JSON for each budget."""
    about = {"machine": platform.processor() or platform.machine(), "cores": len(os.sched_getaffinity(0))}
    lines = [{**run(budget), **about, "date": time.strftime("%Y-%m-%d")} for budget in budgets()]
    for line in lines:
        print(f"{line['case']}: {line['said'][0]}; peak {line['peak_bytes']}", file=sys.stderr)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
