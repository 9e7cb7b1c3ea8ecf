"""Lines of results as a run writes them, made up: five budgets, two contexts, one of every ending, a peer and a GPU.

Same arguments, same lines. Numbers are near those of Gemma 3n E2B on two cores, so that pages made of them look real.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

GB = 10**9
MIB = 1 << 20
READ = 30.1
PARTS = {
    1.5: ("full in int4, head int4, PLE table on SSD", 1_263_000_000, 1_401_098_624),
    2.0: ("full in int4, PLE table on SSD", 1_660_000_000, 1_669_534_080),
    3.0: ("full in int8, PLE table on SSD", 2_540_000_000, 2_570_000_000),
    4.0: ("full in int8, PLE table on SSD", 2_540_000_000, 2_570_000_000),
}
MODEL = {
    "name": "gemma-3n-E2B",
    "family": "Gemma 3n text",
    "parameters": 4_439_711_744,
    "fingerprint": "5f1c2a9be07d",
    "weights": "synthetic",
}
MACHINE = {
    "cpu": "AMD EPYC 9B14",
    "cores": 2,
    "threads": 2,
    "memory_bytes": 25_276_510_208,
    "vector": "avx512",
    "gpu": None,
    "system": "Linux 6.18 x86_64",
}
VERSIONS = {
    "edge": "0.1.0", "commit": "abc1234", "python": "3.11.2", "numpy": "2.4.6", "onnxruntime": "1.32.0", "torch": None,
}  # fmt: skip


def figure(dice: random.Random, mean: float, spread: float = 0.015, count: int = 5) -> dict[str, Any]:
    """A mean of ``count`` draws, their sample deviation, and the draws."""
    values = [mean * dice.gauss(1, spread) for _ in range(count)]
    middle = sum(values) / count
    deviation = (sum((v - middle) ** 2 for v in values) / (count - 1)) ** 0.5 if count > 1 else 0.0
    return {"mean": middle, "deviation": deviation, "values": values}


def head(budget: float | None, context: int, **asked: Any) -> dict[str, Any]:
    """What every line has, whatever became of it."""
    name = f"{budget:g}GB" if budget else None
    return {
        "schema": 1,
        "case": f"{name}, {context} tokens",
        "status": "ok",
        "why": None,
        "time": "2026-11-26T08:00:00Z",
        "model": dict(MODEL),
        "machine": dict(MACHINE),
        "versions": dict(VERSIONS),
        "asked": {
            "budget": name,
            "budget_bytes": int(budget * GB) if budget else None,
            "context": context,
            "device": "cpu",
            "engine": "native",
            "threads": 2,
            "repeat": 5,
            "new": 128,
            **asked,
        },
        "noise": {"noisy": False, "why": [], "others_cores": 0.03},
    }


def parts(budget: float, context: int) -> dict[str, int]:
    """Planned bytes by component."""
    return {
        "runtime": 46_137_344,
        "tokenizer": 27_300_000,
        "weights": PARTS[budget][1],
        "ple": 16_777_216,
        "kv": 6_200_000 + context * 11_200,
        "activations": 28_400_000,
    }


def predicted(tests: dict[str, Any]) -> dict[str, Any]:
    """What the planner might have said of each test."""
    errors = (0.06, -0.03, 0.09, -0.05)
    pairs = zip(tests.items(), errors, strict=False)
    return {name: {"tps": f["mean"] * (1 + error), "error": error} for (name, f), error in pairs}


def timeline(
    dice: random.Random, planned: dict[str, int], marks: list[tuple[float, str]], points: int = 400
) -> dict[str, Any]:
    """Loading in the first stretch, steady after it; resident memory a little under what is counted."""
    loaded, end = marks[0][0], marks[-1][0]
    seconds = [round(i * end / (points - 1), 3) for i in range(points)]

    def grown(name: str, at: float) -> int:
        if name == "runtime":
            return int(planned[name] * min(1, at / 0.3))
        if name == "weights":
            return int(planned[name] * min(1, max(0, at - 0.3) / (loaded - 0.3)))
        if name == "kv":
            return int(planned[name] * (at >= loaded))
        if name == "activations":
            return int(planned[name] * (at >= loaded) * 0.95)
        return planned[name] if at > 0.4 else 0

    stack = {name: [grown(name, at) for at in seconds] for name in planned}
    sums = [sum(values) for values in zip(*stack.values(), strict=True)]
    rss = [int(total * (0.985 + dice.random() * 0.004)) for total in sums]
    return {
        "seconds": seconds,
        "rss": rss,
        "anonymous": [int(v * 0.985) for v in rss],
        "file": [int(v * 0.015) for v in rss],
        "device": None,
        "components": stack,
        "marks": [[at, name] for at, name in marks],
    }


def measured(budget: float, context: int, seed: int = 0) -> dict[str, Any]:
    """A case that ran to its end."""
    dice = random.Random(f"{budget} {context} {seed}")
    label, _, moved = PARTS[budget]
    decode, prefill = READ * GB / moved * dice.uniform(0.88, 0.95), {1.5: 63.1, 2: 72.6, 3: 64.2, 4: 66.0}[budget]
    planned = parts(budget, context)
    deep = context > 512
    tests = {"pp512": figure(dice, prefill), "tg128": figure(dice, decode)}
    marks = [(2.1, "loaded"), (2.1 + 512 / prefill, "pp512"), (2.1 + 512 / prefill + 128 / decode, "tg128")]
    if deep:
        tests |= {f"pp{context}": figure(dice, prefill * 0.9), f"tg128 @ d{context}": figure(dice, decode * 0.83)}
        marks.append((marks[-1][0] + context / prefill / 0.9, f"pp{context}"))
        marks.append((marks[-1][0] + 128 / decode / 0.83, f"tg128 @ d{context}"))
    line = timeline(dice, planned, marks)
    peak, total = max(line["rss"]), sum(planned.values())
    waits = [
        [n, n / prefill / (0.7 + 0.3 * min(n, 512) / 512)]
        for n in (64, 128, 256, 512, 1024, 2048, 4096)
        if n <= context
    ]
    wait = 512 / prefill
    slow = {name: 1000 / f["mean"] for name, f in tests.items() if name.startswith("tg")}
    out = head(budget, context)
    tier = "ram" if "RAM" in label else "ssd"
    out |= {
        "plan": {
            "slice": "full",
            "precision": label.split()[2].rstrip(","),
            "ple": tier,
            "kv": "bf16",
            "context": context,
            "chunk": 256,
            "engine": "native",
            "device": "cpu",
            "bytes": planned,
            "total_bytes": total,
            "head": "int4" if "head int4" in label else "int8",
            "bytes_per_token": moved,
        },
        "label": f"{label}, context {context}",
        "tests": tests,
        "latency_ms": {n: {"p50": v * 0.99, "p95": v * 1.06, "p99": v * 1.31} for n, v in slow.items()},
        "first_token": waits,
        "cold": {
            "load_s": figure(dice, 6.7),
            "ttft_s": figure(dice, wait * 1.04),
            "bytes_read": total,
            "cached_share": 0.0,
        },
        "warm": {"load_s": figure(dice, 2.1), "ttft_s": figure(dice, wait), "bytes_read": 0, "cached_share": 1.0},
        "memory": {
            "planned_bytes": total,
            "peak_bytes": peak,
            "anonymous_bytes": int(peak * 0.985),
            "file_bytes": int(peak * 0.015),
            "pss_bytes": int(peak * 0.99),
            "device_peak_bytes": None,
            "host_planned_bytes": None,
            "components": {n: {"planned": v, "peak": max(line["components"][n])} for n, v in planned.items()},
            "kept": peak <= budget * GB,
        },
        "timeline": line,
        "bandwidth": {
            "before_gbps": READ * 0.99,
            "after_gbps": READ,
            "read_gbps": READ,
            "bytes_per_token": moved,
            "achieved_gbps": tests["tg128"]["mean"] * moved / GB,
        },
        "ple": {
            "tier": tier,
            "rows": 1152,
            "hit_rate": 0.41,
            "bytes_per_token": 9216.0 if tier == "ssd" else 0.0,
            "wait_s": 0.02,
        },
        "storage": {"bytes_per_token": 12_288.0 if tier == "ssd" else 0.0},
        "energy": {"source": None, "joules_per_token": None, "why": "the kernel offers no RAPL counters here"},
        "predicted": {
            "memory_error": total / peak - 1,
            "tests": predicted(tests),
        },
        "boxed": None,
    }
    return out


def refused(budget: float = 1.0, context: int = 4096) -> dict[str, Any]:
    """A budget that nothing fits."""
    need = 1_362_000_000 if context > 512 else 1_341_000_000
    return head(budget, context) | {
        "status": "refused",
        "needed_bytes": need,
        "label": f"full in int4, head int4, PLE table on SSD, context {context}",
        "why": f"nothing fits --budget {budget:g}GB; the nearest needs {need / GB:.2f} GB",
        "plan": None,
    }


def killed(budget: float = 3.0, context: int = 4096) -> dict[str, Any]:
    """A case that was ended from outside while it measured: partial results."""
    line = measured(budget, context)
    line |= {"status": "killed", "why": "signal 9 after 31.4 s", "first_token": line["first_token"][:4], "cold": None}
    kept = ("pp512", "tg128")
    line["tests"] = {name: line["tests"][name] for name in kept}
    line["latency_ms"] = {"tg128": line["latency_ms"]["tg128"]}
    line["timeline"]["marks"] = line["timeline"]["marks"][:3]
    cut = sum(s < line["timeline"]["marks"][-1][0] + 6 for s in line["timeline"]["seconds"])
    for name in ("seconds", "rss", "anonymous", "file"):
        line["timeline"][name] = line["timeline"][name][:cut]
    line["timeline"]["components"] = {n: v[:cut] for n, v in line["timeline"]["components"].items()}
    return line


def noisy(budget: float = 4.0, context: int = 4096) -> dict[str, Any]:
    """A case beside which something else ran."""
    why = "memory read 18.2 GB/s before and 30.1 after"
    line = measured(budget, context) | {"noise": {"noisy": True, "why": [why], "others_cores": 0.9}}
    line["bandwidth"] |= {"before_gbps": 18.2}
    return line


def boxed(budget: float = 2.0, context: int = 4096) -> dict[str, Any]:
    """A case repeated inside a control group whose hard limit is its budget."""
    line = measured(budget, context)
    tests = {n: figure(random.Random(n), f["mean"] * 0.98) for n, f in line["tests"].items()}
    line["boxed"] = {
        "status": "ok",
        "why": None,
        "limit_bytes": int(budget * GB),
        "peak_bytes": line["memory"]["peak_bytes"] + 9 * MIB,
        "oom_kills": 0,
        "same_tokens": True,
        "tests": tests,
    }
    return line


def peer(context: int = 4096) -> dict[str, Any]:
    """llama.cpp on the same machine: no budget, no plan."""
    dice = random.Random("peer")
    line = measured(2.0, context)
    own = {"engine": "llama.cpp", "budget": None, "budget_bytes": None}
    tests = {"pp512": 50.4, "tg128": 11.3, "pp4096": 44.0, "tg128 @ d4096": 7.2}
    line |= {
        "case": "llama.cpp Q4_0",
        "label": "llama.cpp b6123, Q4_0",
        "plan": None,
        "asked": line["asked"] | own,
        "predicted": None,
        "tests": {name: figure(dice, mean) for name, mean in tests.items()},
        "ple": None,
        "timeline": None,
        "boxed": None,
        "latency_ms": {"tg128": {"p50": 88.0, "p95": 92.1, "p99": 101.0}},
        "first_token": [],
        "cold": None,
        "warm": None,
        "memory": {"peak_bytes": 2_870_000_000, "anonymous_bytes": 795_000_000, "file_bytes": 2_075_000_000},
        "bandwidth": None,
    }
    return line


def gpu(budget: float = 2.0, context: int = 4096) -> dict[str, Any]:
    """A case on a GPU: the budget counts the device's memory, the host's is beside it."""
    dice = random.Random("gpu")
    line = measured(budget, context)
    device = [int(v * 0.97) + 120 * MIB if v > 200 * MIB else v for v in line["timeline"]["rss"]]
    line["timeline"] |= {"device": device, "rss": [min(v, 420 * MIB) for v in line["timeline"]["rss"]]}
    line["asked"] |= {"device": "cuda", "engine": "torch"}
    line["plan"] |= {"device": "cuda", "engine": "torch"}
    line["case"] += " on cuda"
    line["machine"]["gpu"] = "NVIDIA H100 80GB HBM3"
    line["memory"] |= {
        "device_peak_bytes": max(device),
        "peak_bytes": 420 * MIB,
        "host_planned_bytes": 430 * MIB,
    }
    means = {"pp512": 9100.0, "tg128": 138.0, "pp4096": 14800.0, "tg128 @ d4096": 127.0}
    line["tests"] = {name: figure(dice, mean) for name, mean in means.items()}
    line["latency_ms"] = {n: {"p50": 1000 / m, "p95": 1050 / m, "p99": 1210 / m} for n, m in means.items() if "tg" in n}
    line["first_token"] = [[n, 0.03 + n / 14800] for n in (64, 128, 256, 512, 1024, 2048, 4096)]
    line["warm"] |= {"ttft_s": figure(dice, 0.061)}
    line["cold"] |= {"ttft_s": figure(dice, 0.07)}
    line["bandwidth"] |= {"before_gbps": 2900.0, "after_gbps": 2910.0, "read_gbps": 2905.0, "achieved_gbps": 138 * 1.67}
    line["energy"] = {"source": "NVML", "joules_per_token": 1.31, "why": None}
    line["predicted"]["tests"] = {}
    return line


def sample(contexts: tuple[int, ...] = (512, 4096)) -> list[dict[str, Any]]:
    """Five budgets: the first refused, one boxed, one killed, one noisy; then llama.cpp."""
    lines = []
    for context in contexts:
        deep = context == max(contexts)
        lines += [
            refused(1.0, context),
            measured(1.5, context),
            boxed(2.0, context) if deep else measured(2.0, context),
            killed(3.0, context) if deep else measured(3.0, context),
            noisy(4.0, context) if deep else measured(4.0, context),
        ]
    return [*lines, peer(max(contexts))]


def everything() -> list[dict[str, Any]]:
    """The sample, and the same model on a GPU."""
    return [*sample(), gpu()]


def many(count: int = 40) -> list[dict[str, Any]]:
    """As many cases as asked for, at budgets of their own."""
    lines = []
    for place in range(count):
        line = measured((1.5, 2.0, 3.0, 4.0)[place // 2 % 4], (512, 4096)[place % 2], place)
        budget = 4e9 + place // 2 * 2e8
        line["asked"] |= {"budget": f"{budget / GB:.1f}GB", "budget_bytes": int(budget)}
        line["case"] = f"case {place}"
        lines.append(line)
    return lines


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    """results.jsonl."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path
