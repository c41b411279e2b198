"""Findings as a page of text: the verdict on gates first, then who is linked, the bound, copies, use."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from boomerang_batch.audit.findings import ALL, OUTPUTS, Bound, Findings, Reading
from boomerang_batch.audit.names import COPIES, LINKED, USE, Measure
from boomerang_batch.audit.readings import CEILING, JUMP, LABEL_AGREEMENT, RANK

_WORST_SHOWN = 5


def describe(findings: Findings) -> str:
    """The page."""
    head = (
        f"{findings.name}: {findings.audited} of {findings.outputs} outputs audited, in the features of "
        f"{', '.join(one.name for one in findings.embeddings)}"
    )
    if findings.classifiers:
        head += f"; labels told by {', '.join(one.name for one in findings.classifiers)} too"
    lines = [head]
    for gate in findings.gates:
        kept = "BROKEN" if gate.broken else "kept"
        lines.append(
            f"gate {gate.gate} {gate.limit:g}: {kept} by {gate.reading}: {_short(gate.value)}, and may be "
            f"{_short(gate.bad_end)}"
        )
    lines += [f"NOT JUDGED: {one}" for one in findings.unjudged]
    copies = f"copies: nearer than 95 % of {_no_copies(findings)}"
    for title, measures in (("linked to their sources", LINKED), (copies, COPIES), ("use", USE)):
        lines += ["", title, *_table(findings, measures)]
    lines += ["", "certified bound", *_bound(findings.bound)]
    labelled = _classes(findings)
    lines += ["", "classes that lose their label most", *labelled] if labelled else []
    if findings.worst:
        lines += ["", "closest to their own sources"]
        lines += [f"  {case.key} in {case.shard}: {case.says}" for case in findings.worst[:_WORST_SHOWN]]
    lines += ["", *(f"warning: {warning}" for warning in findings.warnings)] if findings.warnings else []
    return "\n".join(lines)


def _no_copies(findings: Findings) -> str:
    """What is near by chance, by which nearness is told, and what besides the sources was looked at."""
    baseline = (
        f"{findings.holdout:,} images of the hold-out are to a source"
        if findings.holdout
        else "sources are to each other"
    )
    if not findings.training:
        return baseline
    return f"{baseline}; {findings.training:,} of the model's training images were looked at"


def _table(findings: Findings, measures: Mapping[str, Measure]) -> Iterator[str]:
    """A line for each reading over all records."""
    rows = [
        (one.measure, one.subject, one.attacker, one.features, _with_interval(one), _chance(one))
        for measure, about in measures.items()
        for one in findings.readings
        if one.measure == measure and not about.detail and one.stratum == ALL and _tells(one)
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(6)] if rows else []
    for row in rows:
        yield "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _tells(one: Reading) -> bool:
    """Whether a line is worth reading: controls by the first measure alone, and nothing that has to be."""
    further = one.measure in LINKED and one.measure != RANK.format(1)
    control = one.subject not in (OUTPUTS, CEILING, JUMP) and further
    return not control and (one.chance is None or one.chance < 1)


def _classes(findings: Findings) -> list[str]:
    """The labels that fewest outputs keep, worst first."""
    found = [
        one
        for one in findings.readings
        if one.measure == LABEL_AGREEMENT and one.subject == OUTPUTS and one.stratum != ALL
    ]
    found.sort(key=lambda one: one.value)
    return [f"  {one.stratum}  {one.features}  {_with_interval(one)}" for one in found[:_WORST_SHOWN]]


def _bound(bound: Bound) -> Iterator[str]:
    if bound.reasons:
        yield from (f"  none: {reason}" for reason in bound.reasons)
        return
    if not bound.promises:
        yield "  there is one; its figures need the model: leave out --redraw 0"
    for one in bound.promises:
        yield (
            f"  of two candidates at the {one.distance} distance ({_short(one.delta)}) nobody names the "
            f"source more often than {one.accuracy:.4f} of the time (mu {_short(one.mu)}, epsilon "
            f"{_short(one.epsilon)} at delta {bound.dp_delta:g})"
        )
    yield f"  among records that agree in {', '.join(bound.within)}"
    yield from (f"  {note}" for note in bound.notes)


def _with_interval(one: Reading) -> str:
    if one.low is None or one.high is None:
        return _short(one.value)
    return f"{_short(one.value)} ({_short(one.low)} to {_short(one.high)})"


def _chance(one: Reading) -> str:
    return "" if one.chance is None else f"by chance {_short(one.chance)}"


def _short(number: float) -> str:
    return f"{number:.3g}" if math.isfinite(number) else str(number)
