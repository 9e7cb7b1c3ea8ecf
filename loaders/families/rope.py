"""Rotary positions as configurations spell them: new (rope_parameters) or old (rope_theta and rope_scaling)."""

from __future__ import annotations

import math

from loaders.errors import BadCheckpoint
from loaders.formats.config import Config
from loaders.network.spec import Linear, Llama3Scaling, Proportional, Rope, Yarn

PLAIN = ("default", "llama3")


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
    outer = config.float(base, default=None, low=0.0)
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


def rope_of(sub: Config, dim: int, context: int, theta: float, kinds: tuple[str, ...] = PLAIN) -> Rope:
    """One set of rope parameters; ``theta`` is what holds when it names none."""
    theta = sub.float("rope_theta", default=theta, low=0.0)
    kind = sub.str("rope_type", "type", default="default", choices=kinds)
    if kind == "proportional":
        return Rope(theta, dim, proportional(sub, dim))
    sub.expect("partial_rotary_factor", 1.0, 1)
    if kind == "llama3":
        return Rope(theta, dim, llama3(sub, context))
    if kind == "yarn":
        return Rope(theta, dim, yarn(sub, context))
    return Rope(theta, dim, Linear(sub.float("factor", low=0.0)) if kind == "linear" else None)


def llama3(sub: Config, context: int) -> Llama3Scaling:
    """The four numbers of Llama 3.1."""
    low, high = sub.float("low_freq_factor", low=0.0), sub.float("high_freq_factor", low=0.0)
    if high < low:  # Llama 4 Scout has both at 1: a step where the others have a ramp
        expected = f"at least low_freq_factor={low}"
        raise BadCheckpoint(high, file=sub.file, field=sub.field("high_freq_factor"), expected=expected)
    original = sub.int("original_max_position_embeddings", default=context)
    return Llama3Scaling(sub.float("factor", low=0.0), low, high, original)


def yarn(sub: Config, context: int) -> Yarn:
    """YaRN; cosine and sine grow by what the file says, or by what its two mscales come to."""
    factor = sub.float("factor", low=0.0)
    every = sub.float("mscale_all_dim", default=0.0, low=-1.0)
    one = sub.float("mscale", default=0.0, low=-1.0)
    default = mscale(factor, one) / mscale(factor, every) if one and every else mscale(factor, 1.0)
    return Yarn(
        factor=factor,
        original=sub.int("original_max_position_embeddings", default=context),
        attention=sub.float("attention_factor", default=default, low=0.0),
        fast=sub.float("beta_fast", default=32.0, low=0.0),
        slow=sub.float("beta_slow", default=1.0, low=0.0),
        truncate=sub.bool("truncate", default=True),
    )


def mscale(factor: float, weight: float) -> float:
    """How much attention is sharpened when the context is stretched by ``factor``."""
    return 1.0 if factor <= 1.0 else 0.1 * weight * math.log(factor) + 1.0


def proportional(sub: Config, dim: int) -> Proportional:
    """A share of the angles turns, the rest of the head stands still."""
    sub.expect("factor", 1.0, 1)
    share = sub.float("partial_rotary_factor", default=1.0, low=0.0, high=1.0)
    return Proportional(int(share * dim // 2))
