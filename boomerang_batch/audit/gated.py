"""A recipe's gate within its run: the first outputs are audited before the rest is made.

They are real outputs, and they stay: nothing is drawn for the gate alone, so it costs no GPU time and works
wherever the run does. Judging is repeated when a run goes on, for it takes seconds and remembers nothing.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from boomerang_batch.config.blocks import RunGate
from boomerang_batch.errors import ConfigError, GateError, MeasureError
from boomerang_batch.measures import embedders as known
from boomerang_batch.run.discretion import PLAIN
from boomerang_batch.run.request import RunRequest

if TYPE_CHECKING:
    from boomerang_batch.audit.findings import Gate

_log = logging.getLogger(__name__)


def judge_of(request: RunRequest) -> Callable[[], None] | None:
    """What judges the outputs of this run so far; None where its recipe has no gate. Raises ConfigError."""
    gate = request.recipe.run.gate
    unknown = [] if gate is None else [name for name in gate.embedders if name not in known.names()]
    if unknown:
        raise ConfigError(
            f"run.gate.embedders: there is no embedder {unknown[0]}; there are {', '.join(known.names())}"
        )
    return None if gate is None else functools.partial(_judge, request, gate)


def _judge(request: RunRequest, gate: RunGate) -> None:
    """Raises GateError with every limit that is broken, MeasureError for one that nothing tells of."""
    from boomerang_batch.audit.audit import AuditRequest, audit  # which imports torch

    found = audit(
        AuditRequest(
            out=request.out,
            manifest=request.manifest,
            private_dir=request.private_dir,
            embedders=gate.embedders,
            samples=gate.samples,
            redraws=0,
            gates=gate,
        )
    )
    broken = [one for one in found.gates if one.broken]
    if broken:
        raise GateError(
            f"the gate is broken by the first {found.audited} outputs: {'; '.join(map(_said, broken))}. What "
            "is done stays; change the recipe and use an empty OUT, or the limits in run.gate and go on"
        )
    if found.unjudged:
        raise MeasureError("; ".join(found.unjudged))
    kept = "; ".join(map(_said, found.gates))
    _log.info("the gate is kept by the first %d outputs: %s", found.audited, kept, extra=PLAIN)


def _said(gate: Gate) -> str:
    return f"{gate.gate} {gate.limit:g}: {gate.reading} is {gate.value:.3g} and may be {gate.bad_end:.3g}"
