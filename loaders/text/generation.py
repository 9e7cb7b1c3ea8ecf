"""What a checkpoint says about its own generation: where to stop, and how it likes to be sampled."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loaders.errors import BadCheckpoint

MAX_FILE = 8 << 20
MAX_STOPS = 64
MAX_ID = 2**31


@dataclass(frozen=True)
class GenerationDefaults:
    """None means that the checkpoint says nothing."""

    bos_id: int | None
    stop_ids: tuple[int, ...]
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None


def read_generation(folder: str | os.PathLike[str], config: dict[str, Any]) -> GenerationDefaults:
    """The defaults of the checkpoint in ``folder``; ``config`` is its config.json, already read.

    generation_config.json wins over config.json, config.json over its text_config. The sampling fields are None
    unless generation_config.json also says ``do_sample: true``. Raises BadCheckpoint for a wrong type or range, an id
    beyond the vocabulary included: a model would never stop at it.
    """
    from loaders.formats.config import read_json

    path = Path(folder, "generation_config.json")
    own: dict[str, Any] = read_json(path, MAX_FILE) if os.path.lexists(path) else {}
    inner = config.get("text_config")
    files = [(path, own), (Path(folder, "config.json"), config)]
    if isinstance(inner, dict):
        files.append((Path(folder, "config.json"), inner))
    vocab = next((v for _, data in files[:0:-1] if type(v := data.get("vocab_size")) is int), MAX_ID)

    def ids(key: str) -> tuple[int, ...]:
        for file, data in files:
            value = data.get(key)
            if value is not None:
                return _ids(file, key, value, min(vocab, MAX_ID))
        return ()

    bos = ids("bos_token_id")
    if len(bos) > 1:
        raise BadCheckpoint(f"{len(bos)} ids", file=path, field="bos_token_id", expected="one id")
    sample = own.get("do_sample")
    if sample is not None and type(sample) is not bool:
        raise BadCheckpoint(repr(sample), file=path, field="do_sample", expected="true or false")

    def number(key: str, low: float, high: float, *, open_low: bool = False) -> float | None:
        value = own.get(key) if sample else None
        if value is None:
            return None
        good = type(value) in (int, float) and math.isfinite(value) and low <= value <= high
        if not good or (open_low and value == low):
            raise BadCheckpoint(repr(value), file=path, field=key, expected=f"a number from {low:g} to {high:g}")
        return float(value)

    k = own.get("top_k") if sample else None
    if k is not None and (type(k) is not int or not -1 <= k < MAX_ID):
        raise BadCheckpoint(repr(k), file=path, field="top_k", expected="a whole number from 0")
    return GenerationDefaults(
        bos_id=bos[0] if bos else None,
        stop_ids=ids("eos_token_id"),
        temperature=number("temperature", 0.0, 100.0),
        top_k=max(k, 0) if k is not None else None,  # some write -1 for off
        top_p=number("top_p", 0.0, 1.0, open_low=True),
        min_p=number("min_p", 0.0, 1.0),
        repetition_penalty=number("repetition_penalty", 0.01, 100.0),
    )


def _ids(file: Path, key: str, value: Any, vocab: int) -> tuple[int, ...]:
    items = value if isinstance(value, list) else [value]
    if len(items) > MAX_STOPS:
        raise BadCheckpoint(f"{len(items)} ids", file=file, field=key, expected=f"at most {MAX_STOPS}")
    for item in items:
        if type(item) is not int or not 0 <= item < vocab:
            raise BadCheckpoint(repr(item)[:80], file=file, field=key, expected=f"token ids from 0 to {vocab - 1}")
    return tuple(dict.fromkeys(items))
