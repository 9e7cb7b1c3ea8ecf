"""Angles per position of every kind of rotary embedding, in one place for all engines."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from loaders.network.spec import Linear, Llama3Scaling, Proportional, Rope, Yarn

Angles = npt.NDArray[np.float32]


def frequencies(rope: Rope) -> Angles:
    """Angles per position, float32 [dim / 2]: pair i turns by ``frequencies[i]`` from one token to the next."""
    exponents = np.arange(0, rope.dim, 2, dtype=np.float32) / np.float32(rope.dim)
    return scaled(np.power(np.float32(rope.theta), exponents), rope)


def scaled(powers: Angles, rope: Rope) -> Angles:
    """The same from theta^(2i / dim), float32 [dim / 2], for those who have their own way of raising to a power."""
    scaling, found = rope.scaling, np.float32(1.0) / powers
    if isinstance(scaling, Llama3Scaling):
        return llama3(found, scaling)
    if isinstance(scaling, Yarn):
        return yarn(powers, rope, scaling)
    if isinstance(scaling, Linear):
        return found / np.float32(scaling.factor)
    if isinstance(scaling, Proportional):
        return np.where(np.arange(len(found)) < scaling.angles, found, np.float32(0.0))
    return found


def amplitude(rope: Rope) -> float:
    """What cosine and sine are multiplied by."""
    return rope.scaling.attention if isinstance(rope.scaling, Yarn) else 1.0


def llama3(found: Angles, s: Llama3Scaling) -> Angles:
    """Long wavelengths are stretched, middle ones blended."""
    turns = np.float32(s.original) * found / np.float32(2 * math.pi)
    # Llama 4 Scout has both ends in one place: a step instead of a ramp.
    width = s.high - s.low if s.high != s.low else 1e-6
    blend = np.clip((turns - np.float32(s.low)) / np.float32(width), 0.0, 1.0)
    out: Angles = (np.float32(1.0) - blend) * found / np.float32(s.factor) + blend * found
    return out


def yarn(powers: Angles, rope: Rope, s: Yarn) -> Angles:
    """Pairs that turn often within the original context stay, those that turn rarely are stretched."""

    def pair(turns: float) -> float:
        """The pair, as a real number, that turns so often in the original context."""
        return rope.dim * math.log(s.original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair(s.fast), pair(s.slow)
    if s.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    # Without truncation both ends may be one place: a step instead of a ramp.
    width = high - low if high != low else 0.001
    ramp = np.clip((np.arange(rope.dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(width), 0.0, 1.0)
    kept, stretched = np.float32(1.0) / powers, np.float32(1.0) / (np.float32(s.factor) * powers)
    out: Angles = stretched * ramp + kept * (np.float32(1.0) - ramp)
    return out
