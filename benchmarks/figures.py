"""Figures of the benchmarks as PNG, drawn by matplotlib. Not a benchmark itself.

Equal numbers give equal files on one version of matplotlib: no date or version goes in, and nobody's own
matplotlib settings count. Lines differ by their markers as well as by their colours.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if importlib.util.find_spec("matplotlib") is None:  # at once, not after hours of measuring
    raise SystemExit("the figures need matplotlib: pip install 'boomerang-batch[benchmarks]'")

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
"""Okabe and Ito's, which the colour-blind can tell apart."""
MARKERS = "os^DvPX*"
DASHES = ("--", "-.", ":")
GREY = "#666666"
STYLE = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": "medium",
    "figure.constrained_layout.w_pad": 0.1,
    "font.size": 9.5,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "savefig.dpi": 100,
}
PANEL_INCHES, ALONE_INCHES, HEIGHT_INCHES = 4.4, 6.6, 4.2


@dataclass(frozen=True, kw_only=True)
class Line:
    """Points (x, y) joined by lines."""

    points: Sequence[tuple[float, float]]
    around: Sequence[tuple[float, float]] = ()
    """Between what the y of each may lie, shown as a band."""
    theory: bool = False
    """What should be rather than what was measured: black, dashed, over the others."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One plot: its title, what the axes are, and its lines by name."""

    title: str
    x: str
    y: str
    lines: Mapping[str, Line]
    band: str = "95 % interval"
    """What the bands around lines are."""
    level: tuple[str, float] | None = None
    """A dotted level and its name."""
    log: str = ""
    """The logarithmic axes: "x", "y", "xy" or none."""
    y_range: tuple[float, float | None] | None = None
    """Ends of the y axis, the upper one if it is known; else what the lines need."""


def draw(panels: Sequence[Panel], path: Path) -> None:
    """Write panels side by side, with one legend under all of them."""
    # Only now, so that it is in no process whose memory or start is measured.
    from matplotlib import style
    from matplotlib.figure import Figure

    width = ALONE_INCHES if len(panels) == 1 else PANEL_INCHES * len(panels)
    looks = _looks({name: line for panel in panels for name, line in panel.lines.items() if line.points})
    with style.context(["default", STYLE]):
        figure = Figure(figsize=(width, HEIGHT_INCHES), layout="constrained")
        shown: dict[str, Any] = {}
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            shown |= _draw_panel(axes, panel, looks)
        names = sorted(shown, key=[*looks, *shown].index)
        columns = max(1, int(15 * width / (8 + max(map(len, names)))))
        handles = [shown[name] for name in names]
        figure.legend(handles, names, loc="outside lower center", ncols=min(columns, len(names)))
        figure.savefig(path, metadata={"Software": None}, pil_kwargs={"optimize": True})


def _looks(lines: Mapping[str, Line]) -> dict[str, dict[str, Any]]:
    """How each line is drawn, the same in every panel."""
    measured = zip(itertools.cycle(COLOURS), itertools.cycle(MARKERS), strict=False)
    dashes = itertools.cycle(DASHES)
    looks: dict[str, dict[str, Any]] = {}
    for name, line in lines.items():
        if line.theory:
            looks[name] = {"color": "black", "linestyle": next(dashes), "linewidth": 1.2, "zorder": 3}
        else:
            colour, marker = next(measured)
            looks[name] = {"color": colour, "marker": marker, "markersize": 5}
    return looks


def _draw_panel(axes: Any, panel: Panel, looks: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Returns what stands for each line in a legend, and for the bands."""
    shown = {}
    axes.set(title=panel.title, xlabel=panel.x, ylabel=panel.y)
    for name, line in panel.lines.items():
        if not line.points:
            continue
        x, y = zip(*line.points, strict=True)
        [shown[name]] = axes.plot(x, y, **looks[name])
        if any(low < high for low, high in line.around):
            low, high = zip(*line.around, strict=True)
            axes.fill_between(x, low, high, color=looks[name]["color"], alpha=0.18, linewidth=0)
            [shown[panel.band]] = axes.fill([], [], color=GREY, alpha=0.25, linewidth=0)
    if panel.level:
        name, level = panel.level
        axes.axhline(level, color=GREY, linestyle=":", zorder=1)
        axes.text(1.01, level, name, color=GREY, va="center", transform=axes.get_yaxis_transform())
    for letter in panel.log:
        axes.set(**{f"{letter}scale": "log"})
        _written_out(getattr(axes, f"{letter}axis"))
    if panel.y_range:
        axes.set_ylim(*panel.y_range)
    return shown


def _written_out(axis: Any) -> None:
    """Ticks of a logarithmic axis: powers of ten as plain numbers, with twice and five times each where few."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = axis.get_view_interval()
    steps = (1, 2, 5) if math.log10(high / low) < 3 else (1,)
    axis.set_major_locator(LogLocator(subs=steps, numticks=20))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}"))
    axis.set_minor_locator(NullLocator())
