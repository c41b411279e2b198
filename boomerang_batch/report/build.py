"""From what is known of a run to its report, and the report to where it belongs.

Under anonymize OUT's report is made without ever reading a source or the private dir; the one that shows pairs
is another file, in the private dir. For other purposes there is one report, with pairs where sources are at
hand. Times stand in the timeline alone: all else is the same however often a run was resumed.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence

from boomerang_batch import storage
from boomerang_batch.audit.findings import Case, Findings
from boomerang_batch.data.manifest import Manifest
from boomerang_batch.report import failures, gallery, making, measured, privacy, timeline
from boomerang_batch.report.facts import Facts, read_facts
from boomerang_batch.report.page import render
from boomerang_batch.report.pictures import Album, Named, look, look_up
from boomerang_batch.report.sections import Report
from boomerang_batch.report.sources import Sources, find_sources
from boomerang_batch.report.timeline import Stretch
from boomerang_batch.report.words import number
from boomerang_batch.run.record import REPORT_NAME


def publish(
    out: str, *, private_dir: str | None, manifest: Manifest | None, audit: str | None = None
) -> list[str]:
    """Make and publish the report of the run in OUT, and of what its private dir tells; where they are.

    `audit` is the file of an audit's findings; without, one in the folder that a report goes to is taken.
    Raises VerificationError where OUT holds no run, PrivateDirError where pairs are asked for that only a
    private dir can tell, and ConfigError for the manifest or the audit of something else.
    """
    facts = read_facts(out)
    sources = find_sources(facts, out=out, private_dir=private_dir, manifest=manifest)
    stretches = timeline.read_stretches(out)
    made: list[tuple[str, bytes]] = []
    for home, known in ((private_dir, sources), (out, None)) if facts.anonymize else ((out, sources),):
        if home is not None:
            findings = measured.find_audit(facts, given=audit, homes=(home, out))
            album = look(out, facts.recipe, facts.done, known)
            worst = _look_up(out, facts, findings, known)
            report = build(facts, album, stretches, known, findings=findings, worst=worst)
            made.append((storage.join(home, REPORT_NAME), render(report)))
    for place, page in made:
        storage.publish_bytes(page, place)
    return [place for place, _ in made]


def build(
    facts: Facts,
    album: Album,
    stretches: list[Stretch],
    sources: Sources | None,
    *,
    findings: Findings | None = None,
    worst: Album | None = None,
) -> Report:
    """The report of these findings. Without `sources` it names nothing that OUT does not name."""
    if facts.anonymize and sources is None:
        bare = (dataclasses.replace(one, before=None, source_key=None) for one in album.shown)
        album, worst = Album(shown=tuple(bare)), None
    named = [example if sources is None else sources.named(example) for example in facts.examples]
    sections = (
        *gallery.sections(facts, album, worst, findings.worst if findings else ()),
        *measured.sections(findings),
        privacy.section(facts, findings),
        failures.section(facts, named),
        timeline.section(stretches),
        making.section(facts),
    )
    return Report(
        title=facts.record.name,
        lead=making.lead(facts),
        figures=tuple(_figures(facts, findings)),
        sections=tuple(section for section in sections if section is not None),
        notice=_notice(facts, sources),
        private=facts.anonymize and sources is not None,
        imprint=making.imprint(facts),
    )


def _look_up(out: str, facts: Facts, findings: Findings | None, sources: Sources | None) -> Album | None:
    """The outputs that an audit found worst, where the report's reader may know which they are."""
    cases = findings.worst[: gallery.SHOWN] if findings else ()
    if not cases or (facts.anonymize and sources is None):
        return None
    return look_up(out, facts.recipe, _by_shard(cases), sources)


def _by_shard(cases: Sequence[Case]) -> dict[str, frozenset[Named]]:
    found: dict[str, set[Named]] = defaultdict(set)
    for case in cases:
        found[case.shard].add((case.key, case.variant))
    return {shard: frozenset(names) for shard, names in found.items()}


def _notice(facts: Facts, sources: Sources | None) -> str:
    if not facts.anonymize:
        return ""
    if sources is not None:
        return (
            "Private. This report shows sources, names them, and says which output is whose. Keep it in the "
            "private dir, and publish the one in OUT instead."
        )
    return "This report shows outputs alone, and nothing that leads back to their sources."


def _figures(facts: Facts, findings: Findings | None) -> list[tuple[str, str]]:
    seen = facts.progress
    found = [("Pictures made", f"{facts.outputs:,}"), ("Without output", f"{sum(facts.reasons.values()):,}")]
    found.append(("Shards done", f"{seen.done:,} of {seen.shards or 0:,}"))
    if facts.sigmas:
        low = min(one for one, _ in facts.sigmas.values())
        high = max(one for _, one in facts.sigmas.values())
        same = number(low) == number(high)
        found.append(("Noise σ", number(low) if same else f"{number(low)}–{number(high)}"))
    found.append(privacy.in_short(facts, findings))
    return found
