"""Recipes and numbers as sentences, for readers who know neither diffusion nor this tool."""

from __future__ import annotations

import math
from collections.abc import Sequence

from boomerang_batch.config.pipeline import FromField, Recipe, Spread, T

MADE = {
    "anonymize": "replaced by new ones, so that nobody can be told by them",
    "augment": "varied, to be trained on beside the originals",
    "enhance": "redrawn, to be better ones",
}
"""What a run of each purpose does to pictures: `<so many> pictures were ...`."""

_UNITS = {
    "fraction": "{} of the way from the picture to pure noise",
    "timestep": "timestep {} of the model's noise chain",
    "sigma": "noise of {} times the picture's scale",
    "snr": "a signal-to-noise ratio of {}",
}


def how_far(recipe: Recipe) -> str:
    """The t asked for."""
    asked = [_level(level) for level in recipe.levels]
    return asked[0] if len(asked) == 1 else "; ".join(f"variant {n}: {one}" for n, one in enumerate(asked))


def noise(sigmas: Sequence[float]) -> str:
    """How strong noise is, least and most of several."""
    low, high = min(sigmas), max(sigmas)
    if high == 0:
        return "no noise at all: the model's autoencoder alone, if it has one, changed anything"
    times = number(low) if number(low) == number(high) else f"{number(low)} to {number(high)}"
    shares = sorted({percent(1 / (1 + sigma * sigma)) for sigma in (low, high)}, key=_leading)
    share = shares[0] if len(shares) == 1 else f"{shares[0]} to {shares[-1]}"
    return (
        f"noise of σ {times}, its standard deviation where the picture's own scale is 1: of what the model was "
        f"given, the picture made up about {share} of the power at most, and chance the rest"
    )


def walk_back(recipe: Recipe) -> str:
    """The sampler."""
    if recipe.sampler.eta == 0:
        return "without fresh noise (eta 0)"
    return f"with fresh noise at each step (eta {recipe.sampler.eta:g})"


def plural(count: int, one: str, many: str = "") -> str:
    """`1 shard`, `2 shards`."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def number(value: float) -> str:
    """As many digits as mean something."""
    if not math.isfinite(value):
        return "none" if math.isnan(value) else "without limit"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def percent(share: float) -> str:
    """A share of one, never rounded to all or nothing that it is not."""
    if math.isnan(share):
        return "none"
    if 0 < share < 0.0005:
        return "less than 0.1 %"
    if 0.9995 <= share < 1:
        return "more than 99.9 %"
    return f"{share * 100:.1f}".removesuffix(".0") + " %"


def sentence(text: str) -> str:
    """With a capital, and a full stop."""
    return text[:1].upper() + text[1:].rstrip(".") + "."


def _level(level: T) -> str:
    unit, value = level.unit
    if isinstance(value, FromField):
        return _UNITS[unit].format(f"what each sample's field {value.field} says")
    if isinstance(value, Spread):
        low, high = value.uniform
        return _UNITS[unit].format(f"{_value(unit, low)} to {_value(unit, high)}, drawn for each output,")
    return _UNITS[unit].format(_value(unit, value))


def _value(unit: str, value: float) -> str:
    return percent(value) if unit == "fraction" else f"{value:g}"


def _leading(text: str) -> float:
    return float(text.rpartition("than ")[2].split()[0])
