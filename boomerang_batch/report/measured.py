"""An audit's findings as sections: who is linked to a source, what is copied, what use is left.

Under anonymize what OUT's report tells of an audit are numbers over many records alone: which outputs are most
like their sources would tell an attacker where to begin.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from boomerang_batch import storage
from boomerang_batch.audit.findings import ALL, AUDIT_NAME, OUTPUTS, Findings, Gate, Reading, load_findings
from boomerang_batch.audit.names import COPIES, LINKED, USE, Measure
from boomerang_batch.errors import ConfigError
from boomerang_batch.report.facts import Facts
from boomerang_batch.report.sections import Curve, Line, Points, Section, Table, Verdict
from boomerang_batch.report.words import number, percent, plural, sentence

_CEILING = "noise ceiling"
_CEILING_SAYS = (
    "The noise ceiling is how often the noised picture itself, before the model has seen it, is found by the "
    "best method there is, among the candidates that the worst method had. Whoever does not know the noise, "
    "takes one output at a time and has the same candidates can't do better on average. Among fewer candidates "
    "it would be higher."
)
_ROWS = 60
_GATES_OF_LINKS = frozenset({"max_rank1", "max_tar"})


def find_audit(facts: Facts, *, given: str | None, homes: Iterable[str]) -> Findings | None:
    """The audit in the file given, else in the first of these folders that has one.

    Raises MeasureError for what is no audit, and ConfigError for that of another run.
    """
    places = [given] if given else [storage.join(home, AUDIT_NAME) for home in homes]
    place = next((place for place in places if given or storage.exists(place)), None)
    if place is None:
        return None
    findings, record = load_findings(place), facts.record
    shards = {case.shard.partition("~")[0] for case in findings.worst}
    ours = (record.recipe_digest, record.model_digest, record.noise_key_id)
    theirs = (findings.recipe_digest, findings.model_digest, findings.noise_key_id)
    if theirs != ours or not shards <= set(record.shards):
        raise ConfigError(f"{place} is the audit of another run; audit this output, or remove it")
    return findings


def sections(findings: Findings | None) -> list[Section]:
    """What was measured."""
    if findings is None:
        return []
    linked, copies, use = (_readings(findings, measures) for measures in (LINKED, COPIES, USE))
    found = (
        _linked(findings, linked) if linked else None,
        _section("copies", "What is copied", copies, COPIES, prose=_no_copies(findings)),
        _section("use", "What use is left", use, USE, more=_classes(findings)),
    )
    return [section for section in found if section is not None]


def _section(
    anchor: str,
    title: str,
    readings: Sequence[Reading],
    measures: Mapping[str, Measure],
    *,
    prose: str = "",
    more: Table | None = None,
) -> Section | None:
    """The worst of each measure, and then all, beside what they are for other pictures; None without any."""
    outputs = [one for one in readings if one.subject == OUTPUTS]
    if not outputs:
        return None
    tables = [_table("The worst of each measure", _worst(outputs, measures), measures)]
    tables += [more] if more else []
    details = (_table("Every measure", readings, measures),)
    return Section(
        anchor=anchor, title=title, prose=(prose,) if prose else (), tables=tuple(tables), details=details
    )


def _no_copies(findings: Findings) -> str:
    """By which pictures it is told what is near."""
    if findings.holdout:
        baseline = f"{plural(findings.holdout, 'real picture')} that were no sources, a hold-out"
    else:
        baseline = "the sources themselves, each compared with the others"
    words = f"What is near to a source by chance is told by other pictures: {baseline}."
    if not findings.training:
        return words
    trained = plural(findings.training, "picture")
    return f"{words} Outputs were also compared with {trained} that the model was trained on."


def _worst(readings: Sequence[Reading], measures: Mapping[str, Measure]) -> list[Reading]:
    """Of each measure the reading that is worst."""
    found: dict[tuple[str, str], Reading] = {}
    for one in readings:
        measure = measures[one.measure]
        what = (one.measure, one.features if measure.of_features else "")
        before = found.setdefault(what, one)
        sign = -1 if measure.less_is_worse else 1
        if sign * one.value > sign * before.value:
            found[what] = one
    return list(found.values())


def _linked(findings: Findings, readings: Sequence[Reading]) -> Section:
    outputs = [one for one in readings if one.subject == OUTPUTS]
    controls = [one for one in readings if one.subject != OUTPUTS and one.measure == "rank-1"]
    tables = [_table("The worst of each measure", _worst(outputs, LINKED), LINKED)]
    if controls:
        caption = "The same at the first guess where the answer is known"
        tables.append(_table(caption, controls, LINKED))
    ranks = _ranks(readings)
    cautions = (*map(sentence, findings.unjudged), *findings.warnings)
    return Section(
        anchor="linked",
        title="Who can be found again",
        verdict=_verdict(findings, outputs),
        prose=(
            f"{findings.audited:,} of {plural(findings.outputs, 'output')} were audited: each was "
            "compared, by every method listed, with the sources it could have been made from. An interval "
            "holds the true share 19 times in 20. Another method may find more than these.",
            *([_CEILING_SAYS] if ranks and any(line.name == _CEILING for line in ranks.lines) else []),
        ),
        curves=(ranks,) if ranks else (),
        tables=tuple(tables) if outputs or controls else (),
        details=(_table("Every measure", readings, LINKED),),
        points=(Points(heading="Take care", sentences=cautions),) if cautions else (),
    )


def _verdict(findings: Findings, outputs: Sequence[Reading]) -> Verdict | None:
    # A limit is judged for every attacker and embedder.
    broken = dict.fromkeys(_gate(gate) for gate in findings.gates if gate.broken)
    if broken:
        return Verdict(fine=False, text=f"{plural(len(broken), 'limit')} broken: {', '.join(broken)}")
    if findings.unjudged:
        return Verdict(fine=False, text="Limits were set that could not be judged")
    if kept := dict.fromkeys(_gate(gate) for gate in findings.gates if gate.gate in _GATES_OF_LINKS):
        return Verdict(fine=True, text=f"Every limit was kept: {', '.join(kept)}")
    first = [one for one in outputs if one.measure == "rank-1"]
    if not first:
        return None
    worst = max(first, key=lambda one: one.value)
    chance = "" if worst.chance is None else f", where guessing comes to {percent(worst.chance)}"
    return Verdict(fine=None, text=f"At worst {percent(worst.value)} are led back to their own source{chance}")


def _gate(gate: Gate) -> str:
    return f"{gate.gate} {gate.limit:g}"


def _ranks(readings: Sequence[Reading]) -> Curve | None:
    """Shares found within the first k guesses: the worst method, what noise allows it at most, and chance."""
    first = [one for one in readings if one.measure == "rank-1" and one.subject == OUTPUTS]
    if not first:
        return None
    worst = max(first, key=lambda one: one.value)
    found: dict[str, dict[float, float]] = {"outputs, the worst method": {}, _CEILING: {}, "chance": {}}
    for one in readings:
        guesses = re.fullmatch(r"rank-([0-9]+)", one.measure)
        if guesses and (one.subject, one.attacker, one.features) == (OUTPUTS, worst.attacker, worst.features):
            found["outputs, the worst method"][float(guesses[1])] = one.value
            if one.chance is not None:
                found["chance"][float(guesses[1])] = one.chance
        elif guesses and (one.subject, one.attacker, one.count) == (_CEILING, worst.attacker, worst.count):
            found[_CEILING][float(guesses[1])] = (
                one.value
            )  # of the same candidates: others' bounds nothing here
    lines = tuple(
        Line(name=name, points=tuple(sorted(points.items())))
        for name, points in found.items()
        if len(points) > 1
    )
    if not lines or len(found["outputs, the worst method"]) < 2:
        return None
    rows = tuple(
        (f"{k:g}", *(percent(found[line.name][k]) if k in found[line.name] else "–" for line in lines))
        for k, _ in lines[0].points
    )
    title = "How often a source is found within so many guesses"
    return Curve(
        title=title,
        x="guesses",
        y="found",
        lines=lines,
        y_percent=True,
        table=Table(caption=title, head=("Guesses", *(line.name.capitalize() for line in lines)), rows=rows),
    )


def _classes(findings: Findings) -> Table | None:
    """Labels that are kept least, worst first."""
    found = [
        one
        for one in findings.readings
        if one.measure == "label-agreement" and one.subject == OUTPUTS and one.stratum != ALL
    ]
    found.sort(key=lambda one: (one.value, one.stratum))
    rows = tuple((one.stratum, one.features or "–", *_numbers(one, USE[one.measure])) for one in found[:_ROWS])
    head = ("Of", "By", "Keep their label", "95 % interval", "By chance", "Records")
    return Table(caption="By class, the worst first", head=head, rows=rows) if rows else None


def _readings(findings: Findings, measures: Iterable[str]) -> list[Reading]:
    order = {name: place for place, name in enumerate(measures)}
    found = [one for one in findings.readings if one.measure in order and one.stratum == ALL]
    return sorted(found, key=lambda one: (order[one.measure], -one.value if one.value == one.value else 0.0))


def _table(caption: str, readings: Sequence[Reading], measures: Mapping[str, Measure]) -> Table:
    def of(one: Reading) -> str:
        subject = "" if one.subject == OUTPUTS else one.subject
        return ", ".join(filter(None, (subject, one.attacker, one.features))) or "–"

    return Table(
        caption=caption,
        head=("What", "Of, by, in", "Value", "95 % interval", "By chance", "Records"),
        rows=tuple(
            (measures[one.measure].says, of(one), *_numbers(one, measures[one.measure]))
            for one in readings[:_ROWS]
        ),
        words=2,
    )


def _numbers(one: Reading, measure: Measure) -> tuple[str, str, str, str]:
    write = percent if measure.share else number
    low, high = ("" if end is None else write(end) for end in (one.low, one.high))
    between = f"{low.removesuffix(' %') if measure.share else low} to {high}" if low and high else "–"
    chance = "–" if one.chance is None else write(one.chance)
    return write(one.value), between, chance, f"{one.count:,}"
