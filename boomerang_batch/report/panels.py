"""The curves of a sweep as a picture of their own: one small panel for each measure, over t.

A line for each embedder and attacker with its 95 % interval as a band, and what chance comes to. Embedders are
told apart by colour and mark, attackers by dashes. An SVG that loads nothing and follows the reader's colours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from boomerang_batch.audit.findings import ALL, OUTPUTS, Reading
from boomerang_batch.audit.names import COPIES, LINKED, PROVEN, USE, Measure
from boomerang_batch.report.chart import Plot, axes, ticks
from boomerang_batch.report.markup import Html, element, raw
from boomerang_batch.report.words import number, percent, plural

Levels = Sequence[tuple[float, Sequence[Reading]]]
"""(t as a fraction of the chain, what was read there), t ascending."""

_COLUMNS, _WIDTH, _HEIGHT, _GAP, _MARGIN = 4, 300, 224, 20, 28
_HEAD, _HEADING = 96, 44
_CHARACTER = 6.8
"""About how wide a character of the legend is."""
_X = "t, as a fraction of the chain"
_MARKS = (
    "M-3,0a3,3 0 1,0 6,0a3,3 0 1,0 -6,0z",
    "M-2.6,-2.6h5.2v5.2h-5.2z",
    "M0,-3.8L3.8,0L0,3.8L-3.8,0z",
    "M0,-3.6L3.5,2.6L-3.5,2.6z",
)
_STYLE = Path(__file__).with_name("panels.css").read_text("utf-8")
_GROUPS: Mapping[str, Mapping[str, Measure]] = {
    "Who is linked to a source": LINKED,
    "What is proven": PROVEN,
    "What is copied": COPIES,
    "What use is left": USE,
}
_ELSE = "What else was measured"


@dataclass(frozen=True, kw_only=True)
class _Panel:
    """One measure, and its lines by embedder and attacker: (t, reading), t ascending."""

    name: str
    title: str
    about: Measure
    lines: Mapping[tuple[str, str], Sequence[tuple[float, Reading]]]

    def told(self, value: float) -> str:
        """One of its numbers, in words."""
        return percent(value) if self.about.share else number(value)


@dataclass(frozen=True, kw_only=True)
class _Styles:
    """Which embedder and attacker looks how, the same in all panels."""

    features: Sequence[str]
    attackers: Sequence[str]

    def colour(self, features: str) -> str:
        return f"c{1 + self.features.index(features) % 4}" if features in self.features else "c0"

    def line(self, attacker: str) -> str:
        return f"line by-{1 + self.attackers.index(attacker) % 3}" if attacker in self.attackers else "line"

    def mark(self, features: str) -> str:
        return _MARKS[self.features.index(features) % 4] if features in self.features else _MARKS[0]


def picture(levels: Levels, *, name: str, samples: int) -> bytes:
    """The SVG file of all measures of the outputs as a whole."""
    found = [one for _, readings in levels for one in readings if _told(one)]
    styles = _Styles(
        features=[*dict.fromkeys(one.features for one in found if one.features)],
        attackers=[*dict.fromkeys(one.attacker for one in found if one.attacker)],
    )
    parts, down, place = [], _HEAD, 0
    for heading, panels in _grouped(levels):
        parts.append(element("text", heading, x=_MARGIN, y=down + 24, class_="h2"))
        down += _HEADING
        for index, panel in enumerate(panels):
            left = _MARGIN + index % _COLUMNS * (_WIDTH + _GAP)
            top = down + index // _COLUMNS * (_HEIGHT + _GAP)
            place += 1
            parts.append(_drawn(panel, styles, name=f"panel-{place}", at=f"translate({left},{top})"))
        down += math.ceil(len(panels) / _COLUMNS) * (_HEIGHT + _GAP)
    width, height = 2 * _MARGIN + _COLUMNS * (_WIDTH + _GAP) - _GAP, down + _MARGIN - _GAP
    title = f"{name}: every measure at {plural(len(levels), 'value')} of t"
    says = f"{plural(samples, 'sample')} at each t; bands hold the true value 19 times in 20"
    return element(
        "svg",
        element("title", title, id="title"),
        element("desc", f"{says}. Each panel's numbers are in its description, and in sweep.json.", id="desc"),
        element("style", raw(_STYLE)),
        element("rect", width=width, height=height, class_="paper"),
        element("text", title, x=_MARGIN, y=38, class_="h1"),
        element("text", says, x=_MARGIN, y=58),
        _legend(styles),
        *parts,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {width} {height}",
        width=width,
        height=height,
        role="group",
        lang="en",
        aria_labelledby="title desc",
    ).encode()


def _grouped(levels: Levels) -> Iterator[tuple[str, list[_Panel]]]:
    """The panels under each heading, in the order that measures have there; what nobody has named comes last.

    Where a measure has the scale of its features, each embedder has a panel of its own.
    """
    lines: dict[str, dict[tuple[str, str], list[tuple[float, Reading]]]] = {}
    for t, readings in levels:
        for one in filter(_told, readings):
            lines.setdefault(one.measure, {}).setdefault((one.features, one.attacker), []).append((t, one))
    named = {measure for measures in _GROUPS.values() for measure in measures}
    others = {measure: Measure(says="", brief=measure) for measure in lines if measure not in named}
    for heading, measures in {**_GROUPS, _ELSE: others}.items():
        panels: list[_Panel] = []
        for name, about in measures.items():
            there = lines.get(name, {})
            parts = [{who: line} for who, line in there.items()] if about.of_features else [there]
            for part in filter(None, parts):
                features = ", ".join(features for features, _ in part) if about.of_features else ""
                title = ", ".join(filter(None, (about.brief, features)))
                panels.append(_Panel(name=name, title=title, about=about, lines=part))
        if panels:
            yield heading, panels


def _drawn(panel: _Panel, styles: _Styles, *, name: str, at: str) -> Html:
    every = [one for line in panel.lines.values() for _, one in line]
    ends = [end for one in every for end in (one.value, one.low, one.high, one.chance) if end is not None]
    plot = Plot(
        width=_WIDTH,
        height=_HEIGHT,
        left=46,
        right=10,
        top=46,
        bottom=46,
        x=ticks(0, 1),
        y=ticks(0, 1, 4) if panel.about.share else ticks(min(0, *ends), max(0, *ends), 4),
        percent=panel.about.share,
    )
    return element(
        "g",
        element("title", f"{panel.title}: {panel.about.says}".removesuffix(": "), id=f"{name}-title"),
        element("desc", " ".join(_spoken(panel)), id=f"{name}-desc"),
        element("text", panel.title, x=0, y=14, class_="h3", aria_hidden="true"),
        element("text", panel.about.says, x=0, y=31, class_="says", aria_hidden="true"),
        axes(plot, x_name=_X),
        *(_band(plot, line, styles.colour(features)) for (features, _), line in panel.lines.items()),
        *(element("path", class_="chance", d=d) for d in dict.fromkeys(_chances(plot, panel))),
        *(
            _line(plot, line, styles, features=features, attacker=attacker)
            for (features, attacker), line in panel.lines.items()
        ),
        transform=at,
        data_measure=panel.name,
        role="img",
        aria_labelledby=f"{name}-title {name}-desc",
    )


def _line(
    plot: Plot, line: Sequence[tuple[float, Reading]], styles: _Styles, *, features: str, attacker: str
) -> Html:
    points = [(t, one.value) for t, one in line]
    marks = (
        element("path", class_="mark", d=styles.mark(features), transform=f"translate({plot.at(t, value)})")
        for t, value in points
    )
    return element(
        "g",
        element(
            "polyline",
            class_=styles.line(attacker),
            points=" ".join(plot.at(t, value) for t, value in points),
        ),
        *marks,
        class_=styles.colour(features),
    )


def _band(plot: Plot, line: Sequence[tuple[float, Reading]], colour: str) -> Html | None:
    known = [(t, one.low, one.high) for t, one in line if one.low is not None and one.high is not None]
    if not known:
        return None
    there = [plot.at(t, high) for t, _, high in known]
    back = [plot.at(t, low) for t, low, _ in reversed(known)]
    return element("path", class_=f"band {colour}", d=f"M{'L'.join([*there, *back])}z")


def _chances(plot: Plot, panel: _Panel) -> Iterator[str]:
    """What guessing comes to, for each line that says so: a trained attacker chooses among fewer."""
    for line in panel.lines.values():
        points = [plot.at(t, one.chance) for t, one in line if one.chance is not None]
        if points:
            yield f"M{'L'.join(points)}"


def _legend(styles: _Styles) -> Html:
    entries: list[tuple[Html, str]] = []
    for one in styles.features:
        entries.append((_sample("line", styles.mark(one), colour=styles.colour(one)), one))
    for one in styles.attackers:
        entries.append((_sample(styles.line(one), colour="grey"), f"{one} attacker"))
    entries.append((element("rect", x=0, y=-6, width=34, height=12, class_="band grey"), "95 % interval"))
    entries.append((_sample("chance", colour="grey"), "by chance"))
    parts, left = [], _MARGIN
    for drawn, name in entries:
        label = element("text", name, x=42, y=4)
        parts.append(element("g", drawn, label, transform=f"translate({left},80)"))
        left += round(42 + len(name) * _CHARACTER + 24)
    return element("g", *parts, aria_hidden="true")


def _sample(line: str, mark: str | None = None, *, colour: str) -> Html:
    drawn = element("path", class_="mark", d=mark, transform="translate(17,0)") if mark else None
    return element("g", element("path", class_=line, d="M0,0h34"), drawn, class_=colour)


def _spoken(panel: _Panel) -> Iterator[str]:
    """A sentence for each line, with all its numbers."""
    for (features, attacker), line in panel.lines.items():
        who = ", ".join(filter(None, (features, attacker)))
        told = "; ".join(f"{panel.told(one.value)}{_between(panel, one)} at t {t:g}" for t, one in line)
        yield f"{who}: {told}." if who else f"{told}."


def _between(panel: _Panel, one: Reading) -> str:
    if one.low is None or one.high is None:
        return ""
    return f" ({panel.told(one.low)} to {panel.told(one.high)})"


def _told(one: Reading) -> bool:
    """Of the outputs as a whole, a number, and not one that guessing comes to in any case."""
    whole = (one.subject, one.stratum) == (OUTPUTS, ALL)
    return whole and math.isfinite(one.value) and (one.chance is None or one.chance < 1)
