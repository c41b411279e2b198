"""The pictures of a report: outputs, and pairs with the worst cases first."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from boomerang_batch.audit.findings import Case
from boomerang_batch.report import likeness
from boomerang_batch.report.facts import Facts
from boomerang_batch.report.pictures import Album, Shown, thumbnail
from boomerang_batch.report.sections import Pair, Section
from boomerang_batch.report.words import percent, plural

SHOWN = 12
_WORST = {
    "anonymize": "Of the {} looked at, these are nearest to their sources.",
    "augment": "Of the {} looked at, these are furthest from their sources.",
    "enhance": "Of the {} looked at, these are furthest from their sources.",
}


def sections(facts: Facts, album: Album, audited: Album | None, cases: Sequence[Case]) -> list[Section]:
    """The worst pairs, where there are pairs, and a sample that nobody picked.

    `audited` are the outputs of an audit's worst `cases`.
    """
    pairs = [one for one in album.shown if one.before is not None]
    sample = _evenly(pairs or album.shown, SHOWN)
    thing = "pair" if pairs else "output"
    chosen = f"{plural(len(sample), thing)} from shards all over the run, chosen by their names alone."
    told = (chosen if sample else "There is no output yet to be shown.", *_gaps(album))
    title = "A sample nobody picked" if pairs or audited else "What came out"
    drawn = likeness.curve(compared := likeness.with_others(pairs))
    picked = dataclasses.replace(_section("pictures", title, told, sample), curves=(drawn,) if drawn else ())
    if facts.anonymize and compared:
        nearer = percent(sum(own < other for own, other in compared) / len(compared))
        words = (
            "Asked which of two sources an output was made from, its own or another's, this difference alone "
            f"is right for {nearer} of {plural(len(compared), 'output')}; chance is 50 %. Better methods are "
            "right more often."
        )
        picked = dataclasses.replace(picked, prose=(*picked.prose, words))
    if audited is not None and audited.shown:
        return [_by_audit(audited, cases), picked]
    if not pairs:
        return [picked]
    by_difference = sorted(pairs, key=lambda one: one.difference or 0.0, reverse=not facts.anonymize)
    prose = (
        _WORST[facts.recipe.purpose].format(plural(len(pairs), "pair"))
        + " The difference is the root mean square over all pixels, in percent of the range of values.",
    )
    return [_section("worst", "Worst cases first", prose, by_difference[:SHOWN]), picked]


def _by_audit(audited: Album, cases: Sequence[Case]) -> Section:
    """The outputs that an audit found worst, in its order."""
    shown = {(one.shard, one.row.key, one.row.variant): one for one in audited.shown}
    pairs = []
    for case in cases:
        one = shown.get((case.shard, case.key, case.variant))
        if one is not None:
            pair = _pair(one)
            pairs.append(dataclasses.replace(pair, notes=(case.says, *pair.notes)))
    prose = (f"The {plural(len(pairs), 'output')} that the audit found worst.", *_gaps(audited))
    return Section(anchor="worst", title="Worst cases first", prose=prose, pairs=tuple(pairs))


def _gaps(album: Album) -> tuple[str, ...]:
    found: tuple[str, ...] = ()
    if album.unread:
        found += (
            f"The sources of {plural(album.unread, 'shard')} can't be read; their outputs stand without.",
        )
    if album.foreign:
        found += (
            f"{plural(album.foreign, 'source')} found under the right name had other bytes than the output was "
            "made from, and stayed out.",
        )
    return found


def _section(anchor: str, title: str, prose: tuple[str, ...], shown: Sequence[Shown]) -> Section:
    return Section(anchor=anchor, title=title, prose=prose, pairs=tuple(map(_pair, shown)))


def _pair(one: Shown) -> Pair:
    told = [] if one.difference is None else [f"{percent(one.difference)} different"]
    told += [] if one.row.label is None else [f"label {one.row.label}"]
    named = [] if one.source_key in (None, one.row.key) else [f"source {one.source_key}"]
    return Pair(
        key=one.row.key or "",
        after=thumbnail(one.after),
        before=None if one.before is None else thumbnail(one.before),
        notes=(*((", ".join(told),) if told else ()), *named),
    )


def _evenly(shown: Sequence[Shown], count: int) -> list[Shown]:
    count = min(count, len(shown))
    return [shown[index * len(shown) // count] for index in range(count)]
