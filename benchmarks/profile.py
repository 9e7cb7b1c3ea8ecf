"""A Gemma-3n-E2B-shaped model on this machine, from 1 to 4 GB: `edge profile`, its promises held against what came out.

    python -m benchmarks.profile [--out DIR] [--repeat 3] [--against llama.cpp] [--picture-only REPORT]

Writes results/profile.jsonl (timelines left out), which the README's table is made of and, where a browser is
installed, results/profile.png, the page as it opens. Exits with 1 when a budget was broken, a run in a control group
gave other tokens, or the planner was off by more than 5% in memory or 15% in tokens per second.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edge.budget.units import format_bytes
from edge.profile.results import read

HERE = Path(__file__).parent
RESULTS, PICTURE = HERE / "results" / "profile.jsonl", HERE / "results" / "profile.png"
CONFIG, BUDGETS, CONTEXTS = "gemma-3n-E2B", "1GB,1.5GB,2GB,3GB,4GB", "512,4096"
MEMORY, SPEED = 0.05, 0.15
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
PEER = "llama.cpp"


def failures(lines: Sequence[dict[str, Any]]) -> list[str]:
    """What was promised and did not hold, a sentence each."""
    found = []
    for line in lines:
        name = line["case"]
        if line["status"] in ("killed", "failed", "interrupted"):
            found.append(f"{name}: {line['status']}: {line['why']}")
        if line["status"] != "ok" or line["asked"]["engine"] == PEER:
            continue
        memory, boxed = line["memory"], line.get("boxed")
        if not memory["kept"]:
            found.append(f"{name}: a peak of {format_bytes(memory['peak_bytes'])}")
        if boxed is not None and (boxed["status"] != "ok" or not boxed["same_tokens"]):
            found.append(f"{name}: in a control group: {boxed['why'] or 'other tokens'}")
        if abs(line["predicted"]["memory_error"]) > MEMORY:
            found.append(f"{name}: memory planned {line['predicted']['memory_error']:+.1%} off")
        for test, said in line["predicted"]["tests"].items():
            if abs(said["error"]) > SPEED:
                found.append(f"{name}: {test} predicted {said['error']:+.1%} off")
    return found


def profile_table(lines: Sequence[dict[str, Any]] | None = None) -> str:
    """Cases as Markdown."""
    found = read(RESULTS) if lines is None and RESULTS.exists() else lines
    if not found:
        return "Not measured yet."
    rows = [
        "| budget | context | plan | load, cold | first token | prompt, tokens/s | decoding, tokens/s | predicted "
        "| p99 between tokens | reading, of | peak | planned |",
        "|---:|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    rows += [f"| {' | '.join(cells(line))} |" for line in found]
    return "\n".join([*rows, "", note(found)])


def cells(line: dict[str, Any]) -> list[str]:
    """A case's."""
    asked = line["asked"]
    start = [asked.get("budget") or "", f"{asked['context']:,}"]
    if line["status"] == "refused":
        return [*start, f"does not fit: {format_bytes(line['needed_bytes'])} needed", *[""] * 9]
    if line["status"] != "ok":
        return [*start, f"{line['status']}: {line['why']}", *[""] * 9]
    tests, band, memory = line["tests"], line["bandwidth"], line["memory"]
    prompt = [name for name in tests if name.startswith("pp")][-1]
    decode = [name for name in tests if name.startswith("tg")][-1]
    said = line["predicted"]["tests"].get(decode)
    error = line["predicted"]["memory_error"]
    cold = line.get("cold")
    return [
        *start, line["label"].split(", context")[0] if asked["engine"] != PEER else PEER,
        f"{line['warm']['load_s']['mean']:.1f} s" + (f", {cold['load_s']['mean']:.1f} s" if cold else ""),
        f"{line['first_token'][-1][1] if line.get('first_token') else line['warm']['ttft_s']['mean']:.1f} s",
        figure(tests[prompt]), figure(tests[decode]), "" if said is None else f"{said['error']:+.0%}",
        f"{line['latency_ms'][decode]['p99']:.0f} ms", f"{band['achieved_gbps']:.1f} of {band['read_gbps']:.1f} GB/s",
        format_bytes(memory["peak_bytes"]), "" if error is None else f"{error:+.1%}",
    ]  # fmt: skip


def figure(found: dict[str, Any]) -> str:
    """16.4 ± 0.2."""
    return f"{found['mean']:.1f} ± {found['deviation']:.1f}"


def note(lines: Sequence[dict[str, Any]]) -> str:
    """What the figures are of."""
    ours = [line for line in lines if line["asked"]["engine"] != PEER]
    first, ran = ours[0], [line for line in ours if line["status"] == "ok"]
    boxed = [line["boxed"] for line in ran if line.get("boxed")]
    kept = sum(b["status"] == "ok" and b["same_tokens"] for b in boxed)
    again = (
        f" In a control group of the budget's size, cold: the same tokens in {kept} of {len(boxed)}." if boxed else ""
    )
    noisy = sum(line["noise"]["noisy"] for line in ran)
    quiet = f" The machine was noisy in {noisy} of {len(ran)} cases." if noisy else ""
    asked, machine = first["asked"], first["machine"]
    model = f"{first['model']['name']}, {first['model']['weights']} weights"
    return (
        f"{model}, {machine['threads']} threads ({machine['cpu']}), {first['time'][:10]}, edge "
        f"{first['versions']['edge']}. Means of {asked['repeat']} processes, deviations of their values. Decoding: "
        f"{asked['new']} tokens, after the context where it is longer than 512. First token: of "
        "a prompt as long as the context. Predicted and planned: less measured, as a share of it." + again + quiet
    )


def picture(report: Path, output: Path) -> bool:
    """The page as a picture; False where there is no browser."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        return False
    with tempfile.TemporaryDirectory() as profile:
        line = [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--user-data-dir={profile}",
        ]
        line += ["--window-size=1200,1500", "--virtual-time-budget=15000", f"--screenshot={output}"]
        subprocess.run([*line, f"{report.resolve().as_uri()}#picture"], check=True, capture_output=True, timeout=120)
    return True


def main() -> int:
    """Measures, keeps, judges."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where the report goes, a folder that does not exist")
    parser.add_argument("--repeat", default=3, type=int)
    parser.add_argument("--against", choices=(PEER,))
    parser.add_argument("--picture-only", type=Path, metavar="REPORT")
    options = parser.parse_args()
    if options.picture_only is not None:
        return 0 if picture(options.picture_only, PICTURE) else 1
    with tempfile.TemporaryDirectory(prefix="edge-profile-") as place:
        folder = options.out or Path(place) / "report"
        line = [sys.executable, "-m", "edge", "profile", "--config", CONFIG, "--budgets", BUDGETS]
        line += ["--contexts", CONTEXTS, "--repeat", str(options.repeat), "--in-cgroup", "-o", str(folder)]
        line += ["--against", options.against] if options.against else []
        done = subprocess.run(line, check=False)
        lines = read(folder / "results.jsonl")
        if not picture(folder / "report.html", PICTURE):
            print("no browser: no picture", file=sys.stderr)
    RESULTS.write_text("".join(json.dumps({**x, "timeline": None}) + "\n" for x in lines))
    found = failures(lines)
    print(profile_table(lines), *found, sep="\n")
    return 1 if found or done.returncode else 0


if __name__ == "__main__":
    sys.exit(main())
