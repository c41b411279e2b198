"""Curves as inline SVG that follows the page's colours; lines are told apart by their dashes too."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from boomerang_batch.report.markup import Html, element, join
from boomerang_batch.report.sections import Curve, Line

WIDTH, HEIGHT = 560, 300
_MAX_POINTS = 240


@dataclass(frozen=True, kw_only=True)
class Plot:
    """Where numbers stand in a drawing: its size and margins, in the drawing's units, and the axes' ticks."""

    width: int = WIDTH
    height: int = HEIGHT
    left: int = 56
    right: int = 16
    top: int = 14
    bottom: int = 46
    x: Sequence[float]
    y: Sequence[float]
    percent: bool
    """Whether y is a share, 0..1, to be written as a percentage."""

    def across(self, x: float) -> str:
        """How far from the left."""
        return _place(x, (self.x[0], self.x[-1]), self.left, self.width - self.right)

    def down(self, y: float) -> str:
        """How far from the top."""
        return _place(y, (self.y[0], self.y[-1]), self.height - self.bottom, self.top)

    def at(self, x: float, y: float) -> str:
        """Both, as a list of points has them."""
        return join(self.across(x), ",", self.down(y))


def drawing(curve: Curve, *, name: str) -> Html:
    """The SVG of a curve. `name` is unique on the page; its title and description are read aloud."""
    points = [point for line in curve.lines for point in line.points]
    plot = Plot(
        x=ticks(min(x for x, _ in points), max(x for x, _ in points)),
        y=ticks(curve.y_from, 1.0 if curve.y_percent else max(y for _, y in points)),
        percent=curve.y_percent,
    )
    return element(
        "svg",
        element("title", curve.title, id=f"{name}-title"),
        element("desc", f"{_described(curve)} The numbers stand in the table below.", id=f"{name}-desc"),
        axes(plot, x_name=curve.x),
        *(
            element(
                "polyline",
                class_=f"line line-{number}",
                points=" ".join(plot.at(x, y) for x, y in _drawn(line)),
                vector_effect="non-scaling-stroke",
            )
            for number, line in enumerate(curve.lines, 1)
        ),
        class_="chart",
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_labelledby=f"{name}-title {name}-desc",
    )


def legend(curve: Curve) -> Html | None:
    """Which line is which; None where there is only one."""
    if len(curve.lines) == 1:
        return None
    samples = (
        element(
            "svg",
            element("line", class_=f"line line-{number}", x1=0, y1=6, x2=34, y2=6),
            viewBox="0 0 34 12",
            width=34,
            height=12,
            aria_hidden="true",
        )
        for number in range(1, len(curve.lines) + 1)
    )
    rows = (element("li", sample, line.name) for sample, line in zip(samples, curve.lines, strict=True))
    return element("ul", *rows, class_="legend")


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from at most `low` to at least `high`."""
    size = max(abs(low), abs(high), 1.0)
    if high - low < 1e-9 * size:  # one value, but for rounding
        high = low + size
    spread = high - low
    rough = spread / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * power for unit in (1, 2, 2.5, 5, 10) if unit * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def axes(plot: Plot, *, x_name: str) -> Html:
    """The axes with their ticks and the name of x; that of y stands wherever there is room for it."""
    left, right, floor = plot.left, plot.width - plot.right, plot.height - plot.bottom
    parts: list[Html] = []
    for y in plot.y:
        down = plot.down(y)
        parts.append(element("line", class_="grid", x1=left, x2=right, y1=down, y2=down))
        label = f"{y:.0%}" if plot.percent else f"{y:,g}"
        parts.append(element("text", label, x=left - 8, y=f"{float(down) + 4:.1f}", class_="tick end"))
    for x in plot.x:
        across = plot.across(x)
        parts.append(element("line", class_="axis", x1=across, x2=across, y1=floor, y2=floor + 5))
        parts.append(element("text", f"{x:,g}", x=across, y=floor + 19, class_="tick middle"))
    parts.append(element("line", class_="axis", x1=left, x2=right, y1=floor, y2=floor))
    parts.append(element("text", x_name, x=right, y=plot.height - 6, class_="name end"))
    return element("g", *parts, aria_hidden="true")


def _drawn(line: Line) -> list[tuple[float, float]]:
    """The points to draw: not too many, and corners where y jumps."""
    stride = max(1, math.ceil(len(line.points) / _MAX_POINTS))
    kept = [*line.points[::stride]]
    if kept[-1] != line.points[-1]:
        kept.append(line.points[-1])
    if not line.steps:
        return kept
    corners = [kept[0]]
    for (_, before), (x, y) in itertools.pairwise(kept):
        corners += [(x, before), (x, y)]
    return corners


def _described(curve: Curve) -> str:
    names = ", ".join(line.name for line in curve.lines)
    return f"{curve.y} over {curve.x}: {names}." if names else f"{curve.y} over {curve.x}."


def _place(value: float, span: tuple[float, float], start: int, end: int) -> str:
    low, high = span
    return f"{start + (value - low) / (high - low) * (end - start):.1f}"
