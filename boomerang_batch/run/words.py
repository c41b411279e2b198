"""Numbers as people say them, on bars and screens."""

from __future__ import annotations


def span(seconds: float) -> str:
    """A span of time."""
    for unit, size_s in (("s", 1), ("min", 60), ("h", 3600)):
        if round(seconds / size_s) < 100:
            return f"{seconds / size_s:.0f} {unit}"
    return f"{seconds / 86400:.0f} days"


def pace(images_per_s: float) -> str:
    """How fast images come, without the unit: as many digits as mean something."""
    return f"{images_per_s:,.0f}" if images_per_s >= 10 else f"{images_per_s:.2g}"
