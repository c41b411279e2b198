"""Curves as inline SVG that follows the page's colours; lines are told apart by their dashes too."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from boomerang_batch.report.markup import Html, element, join
from boomerang_batch.report.sections import Curve, Line

WIDTH, HEIGHT = 560, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 16, 14, 46
_MAX_POINTS = 240


def drawing(curve: Curve, *, name: str) -> Html:
    """The SVG of a curve. `name` is unique on the page; its title and description are read aloud."""
    points = [point for line in curve.lines for point in line.points]
    x_ticks = ticks(min(x for x, _ in points), max(x for x, _ in points))
    y_ticks = ticks(curve.y_from, 1.0 if curve.y_percent else max(y for _, y in points))
    x_span, y_span = (x_ticks[0], x_ticks[-1]), (y_ticks[0], y_ticks[-1])
    return element(
        "svg",
        element("title", curve.title, id=f"{name}-title"),
        element("desc", f"{_described(curve)} The numbers stand in the table below.", id=f"{name}-desc"),
        _axes(curve, x_ticks, y_ticks, x_span, y_span),
        *(
            element(
                "polyline",
                class_=f"line line-{number}",
                points=" ".join(_at(x, y, x_span, y_span) for x, y in _drawn(line)),
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


def _axes(
    curve: Curve,
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    x_span: tuple[float, float],
    y_span: tuple[float, float],
) -> Html:
    floor = HEIGHT - _BOTTOM
    parts: list[Html] = []
    for y in y_ticks:
        height = _place(y, y_span, floor, _TOP)
        parts.append(element("line", class_="grid", x1=_LEFT, x2=WIDTH - _RIGHT, y1=height, y2=height))
        label = f"{y:.0%}" if curve.y_percent else f"{y:,g}"
        parts.append(element("text", label, x=_LEFT - 8, y=f"{float(height) + 4:.1f}", class_="tick end"))
    for x in x_ticks:
        across = _place(x, x_span, _LEFT, WIDTH - _RIGHT)
        parts.append(element("line", class_="axis", x1=across, x2=across, y1=floor, y2=floor + 5))
        parts.append(element("text", f"{x:,g}", x=across, y=floor + 19, class_="tick middle"))
    parts.append(element("line", class_="axis", x1=_LEFT, x2=WIDTH - _RIGHT, y1=floor, y2=floor))
    parts.append(element("text", curve.x, x=WIDTH - _RIGHT, y=HEIGHT - 6, class_="name end"))
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


def _at(x: float, y: float, x_span: tuple[float, float], y_span: tuple[float, float]) -> str:
    across = _place(x, x_span, _LEFT, WIDTH - _RIGHT)
    return join(across, ",", _place(y, y_span, HEIGHT - _BOTTOM, _TOP))


def _place(value: float, span: tuple[float, float], start: int, end: int) -> str:
    low, high = span
    return f"{start + (value - low) / (high - low) * (end - start):.1f}"
