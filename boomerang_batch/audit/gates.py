"""Limits that findings must keep. A broken gate ends a command with exit code 4, which is never success.

A limit is held by the end of the 95 % interval on the bad side, over every attacker, embedder and classifier:
what was not measured well enough to be sure of does not pass for good. So a gate of .05 takes some hundred
records. Nor does what was not measured at all: such a limit is not broken, but neither is it kept, and a
command that was to judge it has failed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from boomerang_batch.audit.classify import no_agreement
from boomerang_batch.audit.findings import Findings, Gate, Reading
from boomerang_batch.audit.readings import FD, LABEL_AGREEMENT, NEAREST, RANK, TAR, TRAINED
from boomerang_batch.audit.records import Records
from boomerang_batch.config.blocks import Gates
from boomerang_batch.errors import MeasureError
from boomerang_batch.measures.attackers import LEAST_PAIRS, training_half
from boomerang_batch.measures.verification import LEAST_FALSE_ACCEPTS, false_accepts

_FAR = 0.01
_MORE = "audit a larger sample"
_ATTACKERS = {RANK.format(1): (NEAREST, TRAINED), TAR.format(_FAR): (NEAREST,)}
"""Who must have been tried. The re-run attack needs the model; others may lack impostors for such a rate."""


def check_limits(limits: Gates, records: Records) -> None:
    """Raises MeasureError for a limit that nothing will be measured of among these records, before any is."""
    sizes = np.bincount(records.groups)
    missing = {
        "max_rank1": _no_links(records, sizes),
        "max_tar": _too_few_strangers(sizes),
        "min_label_agreement": no_agreement(records.labels, records.identities),
    }
    for name, why in missing.items():
        if why and getattr(limits, name) is not None:
            raise MeasureError(f"gate {name}: nothing can be measured of it: {why}")


def judge(findings: Findings, limits: Gates) -> Findings:
    """The findings, with every reading that a limit is about judged, and what limits have nothing to go by."""
    gates: list[Gate] = []
    unjudged: list[str] = []
    for name, limit, measure, high_is_bad in (
        ("max_rank1", limits.max_rank1, RANK.format(1), True),
        ("max_tar", limits.max_tar, TAR.format(_FAR), True),
        ("max_fd", limits.max_fd, FD, True),
        ("min_label_agreement", limits.min_label_agreement, LABEL_AGREEMENT, False),
    ):
        if limit is None:
            continue
        # Where a guess is always right, as among a single candidate, nothing can be told.
        readings = [one for one in findings.of(measure) if one.chance is None or one.chance < 1]
        unjudged += _unmeasured(findings, name, readings, attackers=_ATTACKERS.get(measure, ("",)))
        gates += _judged(name, limit, readings, high_is_bad=high_is_bad)
    return dataclasses.replace(findings, gates=tuple(gates), unjudged=tuple(unjudged))


def _no_links(records: Records, sizes: NDArray[np.int64]) -> str | None:
    pairs = int(training_half(records.identities).sum())
    if pairs < LEAST_PAIRS:
        return (
            f"half of the records are {pairs} pairs to train an attacker on, which takes {LEAST_PAIRS}; {_MORE}"
        )
    if sizes.max(initial=0) < 2:
        return f"no two records share all that is known of them, so a guess is always right; {_MORE}"
    return None


def _too_few_strangers(sizes: NDArray[np.int64]) -> str | None:
    strangers = int((sizes * (sizes - 1)).sum())
    if false_accepts(_FAR, strangers) < LEAST_FALSE_ACCEPTS:
        return f"{strangers} pairs of strangers are too few to accept {_FAR:g} of; {_MORE}"
    return None


def _unmeasured(
    findings: Findings, gate: str, readings: Sequence[Reading], *, attackers: Sequence[str]
) -> Iterator[str]:
    """What was not measured keeps no limit: a sentence for each embedder and attacker that is missing."""
    there = {(one.features, one.attacker) for one in readings}
    for embedding in findings.embeddings:
        for attacker in attackers:
            if (embedding.name, attacker) not in there:
                by = f" by the attacker {attacker}" if attacker else ""
                yield (
                    f"gate {gate}: nothing was measured of it in the features {embedding.name}{by}; {_MORE}, "
                    "or other features"
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
