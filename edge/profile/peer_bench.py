"""llama.cpp's own benchmark: what it is asked for, and what it answers."""

from __future__ import annotations

import json
import math
from typing import Any

from edge.profile.results import figure, number

# Answers that are looked at; there are three at most.
MOST = 64


def commands(program: str, file: str, prompt: int, new: int, depth: int, threads: int, repeat: int) -> list[list[str]]:
    """A process for the prompts and decoding, and one for decoding after ``depth`` tokens: each of one option's values
    goes with each of another's. No layer goes to a GPU.
    """
    common = [program, "-m", file, "-t", str(threads), "-r", str(repeat), "-ngl", "0", "-o", "json"]
    found = [[*common, "-p", f"{prompt},{depth}" if depth else str(prompt), "-n", str(new)]]
    return [*found, [*common, "-p", "0", "-n", str(new), "-d", str(depth)]] if depth else found


def parsed(text: str) -> tuple[dict[str, Any], str]:
    """(figures by the tests' names, version) of an answer. Raises ValueError for what is none."""
    try:
        answers = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("no JSON") from None
    if not isinstance(answers, list) or not 0 < len(answers) <= MOST or not all(isinstance(a, dict) for a in answers):
        raise ValueError("no list of tests")
    return {name(answer): speeds(answer) for answer in answers}, version(answers[0])


def name(answer: dict[str, Any]) -> str:
    """As llama-bench's table has it. Raises ValueError."""
    counts = [answer.get(key, 0) for key in ("n_prompt", "n_gen", "n_depth")]
    if any(type(count) is not int or not 0 <= count < 2**31 for count in counts) or bool(counts[0]) == bool(counts[1]):
        raise ValueError(f"no test: n_prompt, n_gen, n_depth {counts!r:.60}")
    prompt, new, depth = counts
    return (f"pp{prompt}" if prompt else f"tg{new}") + (f" @ d{depth}" if depth else "")


def speeds(answer: dict[str, Any]) -> dict[str, Any]:
    """Tokens a second. Raises ValueError."""
    values = answer.get("samples_ts")
    if not isinstance(values, list) or not values or not all(number(v) and 0 < v < math.inf for v in values):
        raise ValueError(f"samples_ts {values!r:.60}")
    return figure(values)


def version(answer: dict[str, Any]) -> str:
    """The build that answered."""
    build, commit = answer.get("build_number"), answer.get("build_commit")
    return f"llama-bench {build} ({commit})" if build is not None and commit is not None else "llama-bench"
