"""Rotary positions as configurations spell them: new (rope_parameters) or old (rope_theta and rope_scaling)."""

from __future__ import annotations

import math

from loaders.errors import BadCheckpoint
from loaders.families.common import FULL, SLIDING
from loaders.formats.config import REQUIRED, Config, Required
from loaders.network.spec import Linear, Llama3Scaling, Proportional, Rope, Yarn

PLAIN = ("default", "llama3")
# Published bases go to 10^9 and factors to 40. Beyond these, angles or their logarithms are no numbers any more.
LEAST_BASE, MOST_BASE = 1.0, 1e15
LEAST, MOST = 1e-3, 1e6


def rope(config: Config, dim: int, context: int, theta: float = 10_000.0, kinds: tuple[str, ...] = PLAIN) -> Rope:
    """Rotary positions over ``dim`` values, in either spelling. A type outside ``kinds`` is Unsupported."""
    new = config.sub("rope_parameters", default=None)
    return agreed(config, new, "rope_theta", "rope_scaling", dim, context, theta, kinds)


def agreed(
    config: Config,
    new: Config | None,
    base: str,
    scaling: str | None,
    dim: int,
    context: int,
    theta: float,
    kinds: tuple[str, ...] = PLAIN,
) -> Rope:
    """One rotation from both spellings. Files may carry the old one beside the new; the two must then agree."""
    outer = config.float(base, default=None, low=LEAST_BASE, high=MOST_BASE)
    old = config.sub(scaling, default=None) if scaling is not None else None
    theta = theta if outer is None else outer
    if new is None:
        return Rope(theta, dim) if old is None else rope_of(old, dim, context, theta, kinds)
    found = rope_of(new, dim, context, theta, kinds)
    if outer is not None and found.theta != outer:
        raise BadCheckpoint(
            outer, file=config.file, field=config.field(base), expected=f"{found.theta} as in rope_parameters"
        )
    if old is not None and rope_of(old, dim, context, found.theta, kinds) != found:
        raise BadCheckpoint("other than rope_parameters", file=config.file, field=config.field(str(scaling)))
    return found


def two_ropes(text: Config, dim: int, context: int, kinds: tuple[str, ...] = PLAIN) -> dict[str, Rope]:
    """Two bases: a short one for sliding layers, which the old spelling never stretches, a long one for full."""
    both = text.sub("rope_parameters", default=None)
    new = {kind: None if both is None else both.sub(kind, default=None) for kind in (SLIDING, FULL)}
    return {
        SLIDING: agreed(text, new[SLIDING], "rope_local_base_freq", None, dim, context, 10_000.0, kinds),
        FULL: agreed(text, new[FULL], "rope_theta", "rope_scaling", dim, context, 1_000_000.0, kinds),
    }


def rope_of(sub: Config, dim: int, context: int, theta: float, kinds: tuple[str, ...] = PLAIN) -> Rope:
    """One set of rope parameters; ``theta`` is what holds when it names none."""
    theta = sub.float("rope_theta", default=theta, low=LEAST_BASE, high=MOST_BASE)
    kind = sub.str("rope_type", "type", default="default", choices=kinds)
    if kind == "proportional":
        return Rope(theta, dim, proportional(sub, dim))
    sub.expect("partial_rotary_factor", 1.0, 1)
    if kind == "llama3":
        return Rope(theta, dim, llama3(sub, context))
    if kind == "yarn":
        return Rope(theta, dim, yarn(sub, context))
    return Rope(theta, dim, Linear(number(sub, "factor")) if kind == "linear" else None)


def llama3(sub: Config, context: int) -> Llama3Scaling:
    """The four numbers of Llama 3.1."""
    low, high = number(sub, "low_freq_factor"), number(sub, "high_freq_factor")
    if high < low:  # Llama 4 Scout has both at 1: a step where the others have a ramp
        expected = f"at least low_freq_factor={low}"
        raise BadCheckpoint(high, file=sub.file, field=sub.field("high_freq_factor"), expected=expected)
    original = sub.int("original_max_position_embeddings", default=context)
    return Llama3Scaling(number(sub, "factor"), low, high, original)


def yarn(sub: Config, context: int) -> Yarn:
    """YaRN; cosine and sine grow by what the file says, or by what its two mscales come to."""
    factor = number(sub, "factor")
    every, one = weight(sub, "mscale_all_dim"), weight(sub, "mscale")
    default = mscale(factor, one) / mscale(factor, every) if one and every else mscale(factor, 1.0)
    return Yarn(
        factor=factor,
        original=sub.int("original_max_position_embeddings", default=context),
        attention=number(sub, "attention_factor", default),
        fast=number(sub, "beta_fast", 32.0),
        slow=number(sub, "beta_slow", 1.0),
        truncate=sub.bool("truncate", default=True),
    )


def number(sub: Config, key: str, default: float | Required = REQUIRED) -> float:
    """A factor that leaves angles finite."""
    return sub.float(key, default=default, low=LEAST, high=MOST)


def weight(sub: Config, key: str) -> float:
    """One of YaRN's two mscales; 0 stands for none."""
    found = sub.float(key, default=0.0, high=MOST)
    if found < 0.0:
        raise BadCheckpoint(found, file=sub.file, field=sub.field(key), expected="0 or more")
    return found


def mscale(factor: float, weight: float) -> float:
    """How much attention is sharpened when the context is stretched by ``factor``."""
    return 1.0 if factor <= 1.0 else 0.1 * weight * math.log(factor) + 1.0


def proportional(sub: Config, dim: int) -> Proportional:
    """A share of the angles turns, the rest of the head stands still."""
    sub.expect("factor", 1.0, 1)
    share = sub.float("partial_rotary_factor", default=1.0, low=0.0, high=1.0)
    return Proportional(int(share * dim // 2))
