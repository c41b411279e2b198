"""What a report is made of, whoever found it out: sections of prose, tables, curves and pictures.

Plain text everywhere; how it looks is `page`'s, and escaping with it. An audit's findings become a report by
being turned into these.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows under a head. The first column names the row."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: int = 1
    """How many columns are words, from the first on; the others are numbers."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a curve: points (x, y), x ascending."""

    name: str
    points: tuple[tuple[float, float], ...]
    steps: bool = False
    """Whether y stays what it was until the next point."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A drawing of lines over one x, and its numbers for who can't see it or wants them."""

    title: str
    """What it shows, in a sentence."""
    x: str
    y: str
    lines: tuple[Line, ...]
    table: Table
    y_percent: bool = False
    """Whether y is a share, 0..1, to be written as a percentage."""
    y_from: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Thumbnail:
    """A small encoded picture."""

    data: bytes
    mime: str
    width: int
    height: int


@dataclass(frozen=True, kw_only=True)
class Pair:
    """An output, with its source beside it where that may be shown."""

    key: str
    after: Thumbnail
    before: Thumbnail | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Points:
    """Sentences under one heading, as a list."""

    heading: str
    sentences: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a section comes to, in a few words: fine, something to look at, or (None) to be weighed."""

    fine: bool | None
    text: str


@dataclass(frozen=True, kw_only=True)
class Section:
    """One heading and what stands below it, in this order."""

    anchor: str
    """Its name in links: small letters and hyphens."""
    title: str
    verdict: Verdict | None = None
    prose: tuple[str, ...] = ()
    pairs: tuple[Pair, ...] = ()
    curves: tuple[Curve, ...] = ()
    tables: tuple[Table, ...] = ()
    points: tuple[Points, ...] = ()
    details: tuple[Table, ...] = ()
    """Tables that few will want: folded away."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """The whole of it."""

    title: str
    lead: str
    """The report in two or three sentences."""
    figures: tuple[tuple[str, str], ...]
    """(what, how much): the numbers to see first."""
    sections: tuple[Section, ...]
    notice: str = ""
    """What a reader must know before passing it on."""
    private: bool = False
    """Whether it must not be passed on."""
    imprint: tuple[str, ...] = field(default_factory=tuple)
    """What made it, and of what."""
