"""Measures put into readings: the one place that knows what each number is called in an audit."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from boomerang_batch.audit.findings import ALL, OUTPUTS, Reading
from boomerang_batch.measures.ceiling import Ceiling
from boomerang_batch.measures.copies import Copies
from boomerang_batch.measures.fidelity import Fidelity
from boomerang_batch.measures.intervals import Rate, bootstrap
from boomerang_batch.measures.likeness import Likeness
from boomerang_batch.measures.linkability import Linkability

RANK, ONE_TO_ONE, AUC, TAR = "rank-{}", "one-to-one", "auc", "tar@far={:g}"
NEAREST, TRAINED, RE_RUN = "nearest", "trained", "re-run"
CEILING = "noise ceiling"
JUMP = "forward jump"
"""The noised sources themselves, matched as outputs are: no bound, but something to set beside."""
EQUAL_DB = 60.0
"""What the PSNR of an equal pair counts as, which is infinite: less than a level of 255 off everywhere."""
LABEL_AGREEMENT, FD, KD = "label-agreement", "fd", "kd"


class _Interval(Protocol):
    @property
    def value(self) -> float: ...
    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...


def linked(
    found: Linkability, *, subject: str = OUTPUTS, attacker: str = NEAREST, features: str, stratum: str = ALL
) -> Iterator[Reading]:
    """How well an attacker led `subject` back to the sources."""

    def reading(measure: str, figure: _Interval, chance: float | None, count: int) -> Reading:
        return Reading(
            measure=measure,
            subject=subject,
            attacker=attacker,
            features=features,
            stratum=stratum,
            value=figure.value,
            low=_told(figure.low),
            high=_told(figure.high),
            chance=chance,
            count=count,
        )

    for k, rate in found.rank.items():
        yield reading(RANK.format(k), rate, _told(found.chance[k]), rate.trials)
    yield reading(ONE_TO_ONE, found.one_to_one, _told(found.chance.get(1, math.nan)), found.one_to_one.trials)
    yield reading(AUC, found.auc, 0.5, found.records)
    for far, accepts in found.tar.items():
        if accepts.rate.trials:  # else there are too few impostors for such a rate
            yield reading(TAR.format(far), accepts.rate, far, accepts.rate.trials)
    missed = Rate(hits=found.misses, trials=found.misses + found.records)
    if found.misses:
        yield reading("misses", missed, None, missed.trials)


def ceiling(found: Ceiling, *, attacker: str) -> Iterator[Reading]:
    """What the forward jump alone allows any attack among the candidates that this attacker has."""
    for k, rate in found.rank.items():
        yield _rate(RANK.format(k), rate, subject=CEILING, attacker=attacker, chance=_told(found.chance[k]))
    chance = _told(found.chance.get(1, math.nan))
    yield _rate(ONE_TO_ONE, found.one_to_one, subject=JUMP, attacker=attacker, chance=chance)


def copied(found: Copies, *, features: str, stratum: str = ALL) -> Iterator[Reading]:
    """Whether outputs are copies of sources, of each other, of training images."""
    spread = functools.partial(_spread, features=features, stratum=stratum)
    rate = functools.partial(_rate, features=features, stratum=stratum)
    yield from spread("dcr", found.closest)
    yield from spread("nndr", found.ratio)
    yield from spread("own-by-nearest-other", _ratio(found.own, found.other))
    yield from spread("dcr", found.baseline, subject=found.baseline_of)
    # Five in a hundred of images that are no copies are as near.
    yield rate("copies", found.below, chance=0.05)
    yield rate("own-is-closest", found.own_is_closest)
    yield rate("near-duplicates", found.near_duplicates, chance=0.05)
    if found.training is not None:
        yield from spread("dcr-to-training", found.training.closest)
        yield from spread("dcr-to-training", found.training.baseline, subject="sources")
        yield rate("training-copies", found.training.below, chance=0.05)
        yield rate("training-swaps", found.training.swaps)


def faithful(found: Fidelity, *, stratum: str = ALL, subject: str = OUTPUTS) -> Iterator[Reading]:
    """Whether the outputs together look like the sources together."""
    values = {
        FD: (found.frechet, None),
        KD: (found.kernel.value, found.kernel.error),
        "precision": (found.manifold.precision, None),
        "recall": (found.manifold.recall, None),
        "density": (found.manifold.density, None),
        "coverage": (found.manifold.coverage, None),
    }
    for measure, (value, error) in values.items():
        if value is not None:
            known = error is not None and math.isfinite(error)
            yield Reading(
                measure=measure,
                subject=subject,
                features=found.features,
                stratum=stratum,
                value=value,
                low=value - 1.96 * error if known and error is not None else None,
                high=value + 1.96 * error if known and error is not None else None,
                count=found.made,
            )


def alike(found: Likeness, *, stratum: str = ALL, subject: str = OUTPUTS) -> Iterator[Reading]:
    """How like its source each output is, and how much detail it has."""
    fine = found.gain_db[:, found.gain_db.shape[1] * 2 // 3 :].mean(axis=1)
    like = np.minimum(found.psnr_db, EQUAL_DB)
    for measure, values in (("psnr-db", like), ("ssim", found.ssim), ("fine-detail-db", fine)):
        yield from _spread(measure, values[np.isfinite(values)], stratum=stratum, subject=subject)


def share(measure: str, rate: Rate) -> Reading:
    """A share of all records."""
    return _rate(measure, rate)


def rate_of(
    measure: str, hits: NDArray[np.bool_], *, subject: str = OUTPUTS, features: str = "", stratum: str = ALL
) -> Reading:
    """A share of records."""
    return _rate(
        measure,
        Rate(hits=int(hits.sum()), trials=len(hits)),
        subject=subject,
        features=features,
        stratum=stratum,
    )


def _rate(
    measure: str,
    rate: Rate,
    *,
    subject: str = OUTPUTS,
    attacker: str = "",
    features: str = "",
    stratum: str = ALL,
    chance: float | None = None,
) -> Reading:
    return Reading(
        measure=measure,
        subject=subject,
        attacker=attacker,
        features=features,
        stratum=stratum,
        value=rate.value,
        low=_told(rate.low),
        high=_told(rate.high),
        chance=chance,
        count=rate.trials,
    )


def _spread(
    measure: str,
    values: NDArray[np.float64],
    *,
    subject: str = OUTPUTS,
    features: str = "",
    stratum: str = ALL,
) -> Iterator[Reading]:
    """The median of a number that each record has, with its interval."""
    if not len(values):
        return
    found = bootstrap(lambda index: float(np.median(values[index])), len(values), resamples=200)
    yield Reading(
        measure=f"median-{measure}",
        subject=subject,
        features=features,
        stratum=stratum,
        value=found.value,
        low=_told(found.low),
        high=_told(found.high),
        count=len(values),
    )


def _ratio(one: NDArray[np.float64], other: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.divide(one, other, out=np.ones(len(one)), where=other > 0)


def _told(number: float) -> float | None:
    return number if math.isfinite(number) else None
