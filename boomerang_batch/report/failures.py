"""What came to nothing, and why: counts by reason, and a few of each."""

from __future__ import annotations

from collections.abc import Sequence

from boomerang_batch.data.provenance import BAD
from boomerang_batch.report.facts import Facts, Failure
from boomerang_batch.report.sections import Points, Section, Table, Verdict
from boomerang_batch.report.words import percent, plural

_REASONS, _EXAMPLES, _NAMES = 40, 60, 10
_STATUS = {
    "failed": "read, but no output could be made",
    "unreadable": "could not be read",
    "dropped": "made, and left out as the recipe wants",
}


def section(facts: Facts, examples: Sequence[Failure]) -> Section:
    """Failures first by their number. `examples` name what the report's reader may know."""
    without, rows = sum(facts.reasons.values()), sum(facts.progress.rows.values())
    bad = sum(count for (status, _), count in facts.reasons.items() if status in BAD)
    undone = [stem for stem in facts.record.shards if stem not in set(facts.done)]
    if not without and not undone:
        text = f"Nothing: all {plural(rows, 'picture')} came to their end" if rows else "Nothing so far"
        return Section(anchor="failures", title="What failed", verdict=Verdict(fine=True, text=text))
    by_count = sorted(facts.reasons.items(), key=lambda reason: (-reason[1], reason[0]))
    counts = tuple(
        (reason, _STATUS.get(status, status), f"{count:,}", percent(count / rows))
        for (status, reason), count in by_count[:_REASONS]
    )
    told = [plural(bad, "picture") + " failed"] if bad else []
    told += [plural(without - bad, "output") + " left out on purpose"] if without - bad else []
    told += [plural(len(undone), "shard") + " not done"] if undone else []
    return Section(
        anchor="failures",
        title="What failed",
        verdict=Verdict(fine=False, text=", ".join(told)),
        prose=("Each has a row with its reason in the provenance beside the outputs.",) if without else (),
        tables=(Table(caption="Why", head=("Reason", "What it means", "Rows", "Share"), rows=counts, words=2),)
        if counts
        else (),
        points=(_shards(facts, undone),) if undone else (),
        details=(_table(facts, examples[:_EXAMPLES]),) if examples else (),
    )


def _shards(facts: Facts, undone: Sequence[str]) -> Points:
    named = ", ".join(undone[:_NAMES])
    more = f" and {len(undone) - _NAMES:,} more" if len(undone) > _NAMES else ""
    sentences = [f"Not done: {named}{more}. The same command goes on with them."]
    if facts.progress.quarantined:
        sentences.append(
            f"The last run gave up {plural(facts.progress.quarantined, 'shard')} of them; its log says why."
        )
    return Points(heading="Shards", sentences=tuple(sentences))


def _table(facts: Facts, examples: Sequence[Failure]) -> Table:
    told = any(example.detail for example in examples)
    rows = (
        (
            example.reason,
            example.shard,
            "–" if example.key is None else example.key,
            f"{example.variant}",
            *((example.detail or "–",) if told else ()),
        )
        for example in examples
    )
    head = ("Reason", "Shard", "Key", "Variant", *(("What is said",) if told else ()))
    return Table(caption="Some of each", head=head, rows=tuple(rows), words=9)
