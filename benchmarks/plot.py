"""Line plots as PNG with Pillow alone, both axes logarithmic. Not a benchmark itself."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
"""Okabe and Ito's, which the colour-blind can tell apart."""
LEFT, TOP, RIGHT, BOTTOM = 72, 52, 16, 48
DOUBLING = 2


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One plot: its title, what the axes are, and the points of every line."""

    title: str
    x: str
    y: str
    lines: Mapping[str, Sequence[tuple[float, float]]]
    floor: tuple[str, float] | None = None
    """A dashed level and its name."""


def draw(panels: Sequence[Panel], path: Path, *, width: int = 460, height: int = 380) -> None:
    """Write panels side by side, with one legend under all of them."""
    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    colours = dict(zip(names, itertools.cycle(COLOURS), strict=False))
    legend = 22 * -(-len(names) // 3) + 12
    size = (DOUBLING * width * len(panels), DOUBLING * (height + legend))
    canvas = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(canvas)
    for index, panel in enumerate(panels):
        _panel(pen, panel, colours, left=index * width, width=width, height=height)
    for index, name in enumerate(names):
        x, y = 24 + (index % 3) * (width * len(panels) - 24) // 3, height + 6 + 22 * (index // 3)
        pen.line([_at(x, y + 7), _at(x + 26, y + 7)], fill=colours[name], width=2 * DOUBLING)
        _text(pen, x + 34, y, name)
    canvas.resize((size[0] // DOUBLING, size[1] // DOUBLING), Image.Resampling.LANCZOS).save(path)


def _panel(
    pen: ImageDraw.ImageDraw, panel: Panel, colours: Mapping[str, str], *, left: int, width: int, height: int
) -> None:
    points = [point for line in panel.lines.values() for point in line if point[1] > 0]
    levels = [panel.floor[1]] if panel.floor else []
    x_low, x_high = _range([x for x, _ in points])
    y_low, y_high = _range([*(y for _, y in points), *levels])

    def place(x: float, y: float) -> tuple[float, float]:
        across = (math.log(x) - x_low) / (x_high - x_low)
        up = (math.log(y) - y_low) / (y_high - y_low)
        return (
            left + LEFT + across * (width - LEFT - RIGHT),
            height - BOTTOM - up * (height - TOP - BOTTOM),
        )

    _text(pen, left + LEFT, 8, panel.title)
    _text(pen, left + LEFT + (width - LEFT - RIGHT) // 2, height - 18, panel.x, anchor="ma")
    _text(pen, left + LEFT, TOP - 8, panel.y, anchor="ls", size=11)
    for x in sorted({x for x, _ in points}):
        at, _ = place(x, math.exp(y_low))
        pen.line([_at(at, TOP), _at(at, height - BOTTOM)], fill="#eeeeee", width=DOUBLING)
        _text(pen, at, height - BOTTOM + 4, f"{x:g}", anchor="ma", size=11)
    for y in _ticks(math.exp(y_low), math.exp(y_high)):
        _, at = place(math.exp(x_low), y)
        pen.line([_at(left + LEFT, at), _at(left + width - RIGHT, at)], fill="#dddddd", width=DOUBLING)
        _text(pen, left + LEFT - 6, at, f"{y:g}", anchor="rm", size=11)
    corners = [_at(left + LEFT, TOP), _at(left + width - RIGHT, height - BOTTOM)]
    pen.rectangle(corners, outline="#888888", width=DOUBLING)
    if panel.floor:
        _, at = place(math.exp(x_low), panel.floor[1])
        for begin in range(left + LEFT, left + width - RIGHT, 10):
            pen.line([_at(begin, at), _at(begin + 5, at)], fill="#888888", width=DOUBLING)
        _text(pen, left + width - RIGHT - 4, at - 2, panel.floor[0], anchor="rs", size=11)
    for name, line in panel.lines.items():
        placed = [_at(*place(x, y)) for x, y in line if y > 0]
        pen.line(placed, fill=colours[name], width=2 * DOUBLING, joint="curve")
        for x, y in placed:
            pen.ellipse(
                [x - 3 * DOUBLING, y - 3 * DOUBLING, x + 3 * DOUBLING, y + 3 * DOUBLING], fill=colours[name]
            )


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Logarithms of the ends, with a little room."""
    low, high = math.log(min(values)), math.log(max(values))
    room = max(0.05 * (high - low), 0.05)
    return low - room, high + room


def _ticks(low: float, high: float) -> list[float]:
    """Powers of ten in the range; with twice and five times each where there are too few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 2, 5)):
        found = [step * 10.0**power for power in powers for step in steps if low <= step * 10.0**power <= high]
        if len(found) > 2:
            break
    return found


def _at(x: float, y: float) -> tuple[float, float]:
    return x * DOUBLING, y * DOUBLING


def _text(
    pen: ImageDraw.ImageDraw, x: float, y: float, text: str, *, anchor: str = "la", size: int = 13
) -> None:
    pen.text(_at(x, y), text, fill="black", anchor=anchor, font=ImageFont.load_default(size * DOUBLING))
