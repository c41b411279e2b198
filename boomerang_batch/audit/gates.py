"""Limits that findings must keep. A broken gate ends a command with exit code 4, which is never success.

A limit is held by the end of the 95 % interval on the bad side, over every attacker, embedder and classifier:
what was not measured well enough to be sure of does not pass for good. So a gate of .05 takes some hundred
records.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from boomerang_batch.audit.findings import Findings, Gate, Reading
from boomerang_batch.audit.readings import FD, LABEL_AGREEMENT, NEAREST, RANK, TAR, TRAINED
from boomerang_batch.config.blocks import Gates
from boomerang_batch.errors import MeasureError

_ATTACKERS = {RANK.format(1): (NEAREST, TRAINED), TAR.format(0.01): (NEAREST,)}
"""Who must have been tried. The re-run attack needs the model; others may lack impostors for such a rate."""


def judge(findings: Findings, limits: Gates) -> tuple[Gate, ...]:
    """Every reading that a limit is about, judged. Raises MeasureError where a limit has nothing to go by."""
    found: list[Gate] = []
    for name, limit, measure, high_is_bad in (
        ("max_rank1", limits.max_rank1, RANK.format(1), True),
        ("max_tar", limits.max_tar, TAR.format(0.01), True),
        ("max_fd", limits.max_fd, FD, True),
        ("min_label_agreement", limits.min_label_agreement, LABEL_AGREEMENT, False),
    ):
        if limit is None:
            continue
        # Where a guess is always right, as among a single candidate, nothing can be told.
        readings = [one for one in findings.of(measure) if one.chance is None or one.chance < 1]
        _require(findings, name, readings, attackers=_ATTACKERS.get(measure, ("",)))
        found += _judged(name, limit, readings, high_is_bad=high_is_bad)
    return tuple(found)


def _require(findings: Findings, gate: str, readings: Sequence[Reading], *, attackers: Sequence[str]) -> None:
    """What was not measured keeps no limit. Raises MeasureError naming what is missing."""
    there = {(one.features, one.attacker) for one in readings}
    for embedding in findings.embeddings:
        for attacker in attackers:
            if (embedding.name, attacker) not in there:
                by = f" by the attacker {attacker}" if attacker else ""
                raise MeasureError(
                    f"gate {gate}: nothing was measured of it in the features {embedding.name}{by}; audit a "
                    "larger sample, or other features"
                )


def _judged(name: str, limit: float, readings: Sequence[Reading], *, high_is_bad: bool) -> list[Gate]:
    gates = []
    for reading in readings:
        end = reading.high if high_is_bad else reading.low
        bad_end = reading.value if end is None else end
        kept = bad_end <= limit if high_is_bad else bad_end >= limit
        gates.append(
            Gate(
                gate=name,
                limit=limit,
                reading=reading.name,
                value=reading.value,
                bad_end=bad_end,
                broken=not kept or math.isnan(bad_end),
            )
        )
    return gates
