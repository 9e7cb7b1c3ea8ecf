"""One line of results as the report reads it: what is missing or of another type is None, never an error."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from edge.profile.report.words import short_size, size, spaced, whole

OURS = ("native", "torch", "ort")
ORDER = ("runtime", "tokenizer", "compiler", "staging", "weights", "ple", "kv", "activations")
TEST = re.compile(r"(pp|tg)(\d{1,9})(?: @ d(\d{1,9}))?", re.ASCII)
LARGEST = 1e18


@dataclass(frozen=True)
class Figure:
    """A mean and the deviation of the sample; both finite, the mean above zero."""

    mean: float
    deviation: float


@dataclass(frozen=True)
class Test:
    """A test by llama-bench's name: ``tg128 @ d4096`` is 128 tokens decoded after 4096."""

    name: str
    kind: str
    tokens: int
    depth: int


def test_of(name: str) -> Test:
    """The parts of a name; kind is empty for a name of another form."""
    match = TEST.fullmatch(name)
    if match is None:
        return Test(name, "", 0, 0)
    return Test(name, {"pp": "prefill", "tg": "decode"}[match[1]], int(match[2]), int(match[3] or 0))


def finite(value: object) -> float | None:
    """A number that can be drawn, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < LARGEST and math.isfinite(value) else None


def positive(value: object) -> float | None:
    """A number above zero, else None: nothing runs at zero tokens a second."""
    number = finite(value)
    return number if number is not None and number > 0 else None


def figure_of(value: object) -> Figure | None:
    """``{"mean", "deviation"}``, or a bare number."""
    if not isinstance(value, Mapping):
        mean = positive(value)
        return None if mean is None else Figure(mean, 0.0)
    mean = positive(value.get("mean"))
    return None if mean is None else Figure(mean, max(finite(value.get("deviation")) or 0.0, 0.0))


def mapping(value: object) -> dict[str, Any]:
    """The value where it is a mapping of names, else an empty one."""
    return {k: v for k, v in value.items() if isinstance(k, str)} if isinstance(value, Mapping) else {}


def sequence(value: object) -> Sequence[Any]:
    """The value where it is a list, else an empty one."""
    return value if isinstance(value, list | tuple) else ()


@dataclass(frozen=True, eq=False)
class Case:
    """A line. ``place`` is its position in the file; sorted and coloured by budget elsewhere."""

    line: Mapping[str, Any]
    place: int = 0

    def get(self, *path: str) -> Any:
        """What lies at a path of names, None where any is missing."""
        found: Any = self.line
        for name in path:
            found = found.get(name) if isinstance(found, Mapping) else None
        return found

    def number(self, *path: str) -> float | None:
        """A finite number, zero and below included."""
        return finite(self.get(*path))

    def above(self, *path: str) -> float | None:
        """A number above zero."""
        return positive(self.get(*path))

    def text(self, *path: str) -> str:
        """A string; empty where there is none."""
        found = self.get(*path)
        return found if isinstance(found, str) else ""

    @cached_property
    def status(self) -> str:
        return self.text("status") or "ok"

    @cached_property
    def name(self) -> str:
        return self.text("case") or f"case {self.place + 1}"

    @cached_property
    def engine(self) -> str:
        return self.text("asked", "engine") or self.text("plan", "engine")

    @cached_property
    def device(self) -> str:
        return self.text("asked", "device") or self.text("plan", "device") or "cpu"

    @cached_property
    def peer(self) -> bool:
        """Whether another runtime was measured."""
        return self.engine not in ("", *OURS) and self.get("plan") is None and self.budget_bytes is None

    @cached_property
    def budget_bytes(self) -> float | None:
        return self.above("asked", "budget_bytes")

    @cached_property
    def budget(self) -> str:
        """2 GB; ``no budget``; of a peer its name."""
        if self.peer:
            return self.engine
        typed = spaced(self.text("asked", "budget"))
        if self.budget_bytes is None:
            return "no budget"
        return typed if typed and not typed.isdigit() else short_size(self.budget_bytes)

    @cached_property
    def context(self) -> float | None:
        return self.above("plan", "context") or self.above("asked", "context")

    @cached_property
    def asked_context(self) -> float | None:
        return self.above("asked", "context") or self.context

    @cached_property
    def brief(self) -> str:
        """Slice and precision: full in int4."""
        words = self.text("label").partition(", PLE table")[0].partition(", context")[0]
        made = " in ".join(filter(None, [self.text("plan", "slice"), self.text("plan", "precision")]))
        return words or made

    @cached_property
    def tests(self) -> dict[str, Figure]:
        found = {name: figure_of(value) for name, value in mapping(self.get("tests")).items()}
        return {name: figure for name, figure in found.items() if figure is not None}

    def of_kind(self, kind: str) -> list[tuple[Test, Figure]]:
        """Tests of a kind, shallow first."""
        both = [(test_of(name), figure) for name, figure in self.tests.items()]
        return sorted((p for p in both if p[0].kind == kind), key=lambda p: (p[0].depth, p[0].tokens))

    @cached_property
    def decode(self) -> Figure | None:
        """Decoding at its shallowest: the number people ask for."""
        found = self.of_kind("decode")
        return found[0][1] if found else None

    @cached_property
    def first_token(self) -> list[tuple[float, float]]:
        """(prompt tokens, seconds), short prompts first."""
        pairs = []
        for pair in sequence(self.get("first_token")):
            numbers = [positive(v) for v in sequence(pair)]
            if len(numbers) == 2 and numbers[0] and numbers[1]:
                pairs.append((numbers[0], numbers[1]))
        return sorted(pairs)

    @cached_property
    def wait(self) -> float | None:
        """Seconds to the first token of the first prompt, files in the page cache."""
        figure = figure_of(self.get("warm", "ttft_s"))
        if figure is not None:
            return figure.mean
        return self.first_token[-1][1] if self.first_token else None

    @cached_property
    def wait_tokens(self) -> float | None:
        """How long the prompt of ``wait`` is."""
        if figure_of(self.get("warm", "ttft_s")) is not None:
            return min(512.0, self.context) if self.context else 512.0
        return self.first_token[-1][0] if self.first_token else None

    @cached_property
    def on_device(self) -> bool:
        """Whether the budget counts a device's memory and not the process's."""
        return self.device not in ("", "cpu")

    @cached_property
    def peak(self) -> float | None:
        """Bytes held against the budget, at their most."""
        device = self.above("memory", "device_peak_bytes") if self.on_device else None
        return device or self.above("memory", "peak_bytes")

    @cached_property
    def kept(self) -> bool | None:
        """Whether the peak stayed within the budget, by the numbers and not by what the line says of itself."""
        if self.peak is None or self.budget_bytes is None:
            return None
        return self.peak <= self.budget_bytes and self.get("memory", "kept") is not False

    @cached_property
    def noisy(self) -> bool:
        return self.get("noise", "noisy") is True

    @cached_property
    def bytes_per_token(self) -> float | None:
        return self.above("bandwidth", "bytes_per_token") or self.above("plan", "bytes_per_token")

    @cached_property
    def reading_share(self) -> float | None:
        """Of what memory can deliver, the part that decoding reads."""
        can, done = self.above("bandwidth", "read_gbps"), self.above("bandwidth", "achieved_gbps")
        if done is None and self.decode and self.bytes_per_token:
            done = self.decode.mean * self.bytes_per_token / 1e9
        return done / can if can and done else None

    def counted(self, component: str) -> bool:
        """Whether the budget counts a component: on a GPU not what lies in the host's memory."""
        return not self.on_device or component in mapping(self.get("plan", "bytes"))

    @cached_property
    def components(self) -> dict[str, float]:
        """The most bytes each component held; planned ones where nothing was measured."""
        held = {n: mapping(v).get("peak") for n, v in mapping(self.get("memory", "components")).items()}
        found = {name: positive(v) for name, v in (held or mapping(self.get("plan", "bytes"))).items()}
        return {name: found[name] or 0.0 for name in ordered(found) if found[name]}

    @cached_property
    def trouble(self) -> str:
        """What is wrong with this case, in a word; empty where nothing is."""
        if self.status != "ok":
            return self.status
        return "over budget" if self.kept is False else "noisy" if self.noisy else ""

    def title(self, many: bool = True) -> str:
        """2 GB, 4,096 tokens; ``many``: whether the file has more than one context to tell apart."""
        if self.peer:
            return self.name
        end = f", {whole(self.asked_context)} tokens" if many and self.asked_context else ""
        return self.budget + end

    def needs(self) -> str:
        """What a refused case would take."""
        needed = self.above("needed_bytes")
        return f"needs {size(needed)}" if needed else "does not fit"


def ordered(names: Mapping[str, object] | Sequence[str]) -> list[str]:
    """Components from the bottom of the stack up; those not known of last, by name."""
    return sorted(names, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))
