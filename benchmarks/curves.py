"""Curves with intervals as PNG with Pillow alone, both axes linear. Not a benchmark itself."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from plot import COLOURS, DOUBLING

LEFT, TOP, RIGHT, BOTTOM = 60, 52, 16, 48
LINE = 22


@dataclass(frozen=True, kw_only=True)
class Point:
    """A value, and between what it may lie."""

    x: float
    y: float
    interval: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Points joined by lines."""

    name: str
    points: tuple[Point, ...]
    dashed: bool = False


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One plot: its title, what the axes are, its curves."""

    title: str
    x: str
    y: str
    curves: tuple[Curve, ...]
    level: tuple[str, float] | None = None
    """A dashed level and its name."""
    y_range: tuple[float, float] | None = None
    """Ends of the y axis; else what the curves need."""


def draw(panels: Sequence[Panel], path: Path, *, width: int = 460, height: int = 380) -> None:
    """Write panels side by side, with one legend under all of them."""
    curves = {curve.name: curve for panel in panels for curve in panel.curves}
    colours = dict(zip(curves, itertools.cycle(COLOURS), strict=False))
    columns = max(1, width * len(panels) // 320)
    size = (
        DOUBLING * width * len(panels),
        DOUBLING * (height + LINE * -(-len(curves) // columns) + 12),
    )
    canvas = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(canvas)
    for index, panel in enumerate(panels):
        _panel(pen, panel, colours, left=index * width, width=width, height=height)
    for index, (name, curve) in enumerate(curves.items()):
        x = 24 + (index % columns) * (width * len(panels) - 24) // columns
        y = height + 6 + LINE * (index // columns)
        _line(pen, [_at(x, y + 7), _at(x + 26, y + 7)], colours[name], dashed=curve.dashed)
        _text(pen, x + 34, y, name)
    canvas.resize((size[0] // DOUBLING, size[1] // DOUBLING), Image.Resampling.LANCZOS).save(
        path, optimize=True
    )


def _panel(
    pen: ImageDraw.ImageDraw, panel: Panel, colours: Mapping[str, str], *, left: int, width: int, height: int
) -> None:
    points = [point for curve in panel.curves for point in curve.points]
    ys = [y for point in points for y in (point.y, *(point.interval or ()))]
    x_low, x_high = _range([point.x for point in points])
    y_low, y_high = _range(panel.y_range or [*ys, *([panel.level[1]] if panel.level else [])])

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low)
        up = (y - y_low) / (y_high - y_low)
        return _at(
            left + LEFT + across * (width - LEFT - RIGHT), height - BOTTOM - up * (height - TOP - BOTTOM)
        )

    _text(pen, left + LEFT, 8, panel.title)
    _text(pen, left + LEFT + (width - LEFT - RIGHT) // 2, height - 18, panel.x, anchor="ma")
    _text(pen, left + LEFT, TOP - 8, panel.y, anchor="ls", size=11)
    for y in _ticks(y_low, y_high):
        pen.line([place(x_low, y), place(x_high, y)], fill="#dddddd", width=DOUBLING)
        across, down = place(x_low, y)
        _text(pen, across / DOUBLING - 6, down / DOUBLING, f"{y:g}", anchor="rm", size=11)
    for x in _ticks(x_low, x_high):
        pen.line([place(x, y_low), place(x, y_high)], fill="#eeeeee", width=DOUBLING)
        across, down = place(x, y_low)
        _text(pen, across / DOUBLING, down / DOUBLING + 4, f"{x:g}", anchor="ma", size=11)
    pen.rectangle([*place(x_low, y_high), *place(x_high, y_low)], outline="#888888", width=DOUBLING)
    if panel.level:
        name, y = panel.level
        _line(pen, [place(x_low, y), place(x_high, y)], "#888888", dashed=True)
        across, down = place(x_high, y)
        _text(pen, across / DOUBLING - 4, down / DOUBLING - 2, name, anchor="rs", size=11)
    for curve in panel.curves:
        colour = colours[curve.name]
        _line(pen, [place(point.x, point.y) for point in curve.points], colour, dashed=curve.dashed)
        for point in curve.points:
            x, y = place(point.x, point.y)
            if point.interval is not None:
                pen.line([place(point.x, end) for end in point.interval], fill=colour, width=DOUBLING)
            pen.ellipse([x - 3 * DOUBLING, y - 3 * DOUBLING, x + 3 * DOUBLING, y + 3 * DOUBLING], fill=colour)


def _range(values: Sequence[float]) -> tuple[float, float]:
    """The ends, with a little room."""
    low, high = min(values), max(values)
    room = 0.05 * (high - low) or 0.05
    return low - room, high + room


def _ticks(low: float, high: float) -> Iterator[float]:
    """Round numbers between two, some six of them."""
    rough = (high - low) / 7
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step for step in (power, 2 * power, 5 * power, 10 * power) if step >= rough)
    for index in range(math.ceil(low / step), math.floor(high / step) + 1):
        yield round(index * step, 10)


def _line(
    pen: ImageDraw.ImageDraw, corners: Sequence[tuple[float, float]], colour: str, *, dashed: bool
) -> None:
    if not dashed:
        pen.line(corners, fill=colour, width=2 * DOUBLING, joint="curve")
        return
    for (x0, y0), (x1, y1) in itertools.pairwise(corners):
        length = math.hypot(x1 - x0, y1 - y0)
        for begin in range(0, int(length), 10 * DOUBLING):
            ends = (begin / length, min(begin + 5 * DOUBLING, length) / length)
            pen.line(
                [(x0 + (x1 - x0) * end, y0 + (y1 - y0) * end) for end in ends], fill=colour, width=2 * DOUBLING
            )


def _at(x: float, y: float) -> tuple[float, float]:
    return x * DOUBLING, y * DOUBLING


def _text(
    pen: ImageDraw.ImageDraw, x: float, y: float, text: str, *, anchor: str = "la", size: int = 13
) -> None:
    pen.text(_at(x, y), text, fill="black", anchor=anchor, font=ImageFont.load_default(size * DOUBLING))
