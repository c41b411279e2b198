"""Limits that findings must keep. A broken gate ends a command with exit code 4, which is never success.

A limit is held by the end of the 95 % interval on the bad side, over every attacker and embedder: what was not
measured well enough to be sure of does not pass for good. So a gate of .05 takes some hundred records.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from boomerang_batch.audit.findings import Findings, Gate, Reading
from boomerang_batch.audit.readings import FD, LABEL_AGREEMENT, RANK
from boomerang_batch.config.blocks import Gates
from boomerang_batch.errors import MeasureError


def judge(findings: Findings, limits: Gates) -> tuple[Gate, ...]:
    """Every reading that a limit is about, judged. Raises MeasureError where a limit has nothing to go by."""
    found: list[Gate] = []
    for name, limit, measure, high_is_bad in (
        ("max_rank1", limits.max_rank1, RANK.format(1), True),
        ("max_tar", limits.max_tar, "tar@far=0.01", True),
        ("max_fd", limits.max_fd, FD, True),
        ("min_label_agreement", limits.min_label_agreement, LABEL_AGREEMENT, False),
    ):
        if limit is None:
            continue
        readings = findings.of(measure)
        if not readings:
            raise MeasureError(
                f"gate {name}: nothing of it was measured ({measure}); audit against the manifest, and with a "
                "larger sample"
            )
        found += _judged(name, limit, readings, high_is_bad=high_is_bad)
    return tuple(found)


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
