"""The least t that reaches a target, found on one sample of a manifest and checked on another.

A target names a measure and a limit: `rank1<=.05`. It is reached where the bad end of the 95 % interval keeps
the limit, over every attacker and embedder. But for chance privacy only grows with t and use only falls, so t
is found by halving: the least that is private enough, or the most that is useful enough. The sample that was
searched on flatters the t found on it: the check is made on samples that no search has seen. A certified target
could be found without drawing, but goes the same way, for what it costs in use only drawing tells.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from boomerang_batch.audit.bounding import CERTIFIED, LARGEST, uncertified
from boomerang_batch.audit.findings import ALL, OUTPUTS, Reading
from boomerang_batch.audit.readings import LABEL_AGREEMENT, RANK, TAR, TRAINED
from boomerang_batch.audit.sweep import FORMAT_VERSION, plain
from boomerang_batch.audit.tried import DISTANCE, Level, Trials
from boomerang_batch.config.pipeline import Recipe
from boomerang_batch.errors import ConfigError, MeasureError
from boomerang_batch.run.trial import Chosen, Rig, at_t

_RISES = "distance"
"""The one measure that more noise makes larger."""
_MEASURES = {
    "rank1": RANK.format(1),
    "tar": TAR.format(0.01),
    **{name: name for name in CERTIFIED.values()},
    _RISES: DISTANCE,
    "label-agreement": LABEL_AGREEMENT,
    "psnr": "median-psnr-db",
    "ssim": "median-ssim",
}
_LINKS = ("rank1", "tar")
_TARGET = re.compile(r"\s*([a-z0-9@-]+)\s*(<=|>=)\s*([0-9.]+)\s*")
STEPS = 20
"""Into how many steps the whole of t is cut: t is found to one of these."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """What is to be reached."""

    name: str
    at_most: bool
    limit: float

    @staticmethod
    def parse(text: str) -> Target:
        """From `rank1<=.05`. Raises ConfigError with what there is."""
        match = _TARGET.fullmatch(text)
        if match is None or match[1] not in _MEASURES:
            raise ConfigError(
                f"--target {text}: write a measure, <= or >=, and a limit, such as rank1<=.05; measures are "
                f"{', '.join(_MEASURES)}"
            )
        try:
            limit = float(match[3])
        except ValueError as error:
            raise ConfigError(f"--target {text}: {match[3]} is no number") from error
        if match[1] != "psnr" and not 0 <= limit <= 1:
            raise ConfigError(f"--target {text}: {match[1]} is between 0 and 1, so {match[3]} says nothing")
        return Target(name=match[1], at_most=match[2] == "<=", limit=limit)

    @property
    def least(self) -> bool:
        """Whether it is reached from some t on, and not up to some t."""
        return self.at_most != (self.name == _RISES)

    def readings(self, found: Level) -> list[Reading]:
        """Those it is about. Raises MeasureError where there is none."""
        there = [
            one
            for one in found.readings
            if (one.measure, one.subject, one.stratum) == (_MEASURES[self.name], OUTPUTS, ALL)
        ]
        if not there:
            raise MeasureError(
                f"nothing tells {self.name} of {found.t}: take more samples, or samples with labels"
            )
        if self.name in _LINKS and not any(one.attacker == TRAINED for one in there):
            raise MeasureError(
                f"too few samples at {found.t} to train an attacker on, without whom {self.name} flatters: "
                "take more"
            )
        return there

    def reached(self, found: Level) -> bool:
        """Whether the bad end of every reading keeps the limit."""
        return all(self._kept(one) for one in self.readings(found))

    def badness(self, one: Reading) -> float:
        """The bad end of a reading, the larger the worse; infinite where it is none."""
        end = one.high if self.at_most else one.low
        value = one.value if end is None else end
        return math.inf if math.isnan(value) else value if self.at_most else -value

    def _kept(self, one: Reading) -> bool:
        return self.badness(one) <= (self.limit if self.at_most else -self.limit)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What was found."""

    target: Target
    t: float | None
    """As a fraction; None where no t reaches the target."""
    beside: float | None
    """The nearest t tried that misses it, so that what is sought lies between; None where all reach it."""
    searched: tuple[Level, ...]
    """Every t that was tried, ascending."""
    checked: Level | None
    """The t found, on samples that the search has not seen."""
    holds: bool
    """Whether the target is reached there too."""
    warnings: tuple[str, ...]

    def told(self, level: Level) -> str:
        """What the target's measure is at one t, in words, the worst reading of all."""
        worst = max(self.target.readings(level), key=self.target.badness)
        known = worst.low is not None and worst.high is not None
        beside = [f"{worst.low:.3g} to {worst.high:.3g}"] if known else []
        beside += [] if worst.chance is None else [f"by chance {worst.chance:.3g}"]
        return f"{worst.name} {worst.value:.3g}" + (f" ({', '.join(beside)})" if beside else "")

    def facts(self) -> dict[str, object]:
        """Everything, as JSON has it."""
        return {"format_version": FORMAT_VERSION, **plain(asdict(self))}


def calibrate(
    rig: Rig,
    recipe: Recipe,
    search: Sequence[Chosen],
    check: Sequence[Chosen],
    target: Target,
    *,
    embedders: Sequence[str],
    left_out: Sequence[str] = (),
) -> Calibration:
    """Find t on the samples of `search` and check it on those of `check`.

    `left_out`: what `choose` has to say of the samples.
    Raises MeasureError where there are too few, ConfigError for a bound that this recipe has not.
    """
    _require_bound(rig, recipe, target)
    trials = Trials(rig, recipe, embedders=embedders)
    tried_at: dict[int, Level] = {}

    def reached(step: int) -> bool:
        _, tried_at[step] = trials.at("fraction", step / STEPS, search)
        return target.reached(tried_at[step])

    found, beside = _halve(reached, least=target.least)
    checked = None if found is None else trials.at("fraction", found / STEPS, check)[1]
    searched = tuple(tried_at[step] for step in sorted(tried_at))
    return Calibration(
        target=target,
        t=None if found is None else found / STEPS,
        beside=None if beside is None else beside / STEPS,
        searched=searched,
        checked=checked,
        holds=checked is not None and target.reached(checked),
        warnings=(*left_out, *trials.warnings((*searched, *([] if checked is None else [checked])))),
    )


def _require_bound(rig: Rig, recipe: Recipe, target: Target) -> None:
    """Raises ConfigError for a certified target where nothing is certified, saying why."""
    if target.name not in CERTIFIED.values():
        return
    latent = rig.model.latent
    reasons = uncertified(at_t(recipe, "fraction", 1), latent=latent)
    if not reasons and latent and target.name == CERTIFIED[LARGEST]:
        reasons = ("latents have no largest distance; take the median",)
    if reasons:
        raise ConfigError(
            f"--target {target.name}: there is no such bound for this recipe: {'; '.join(reasons)}"
        )


def _halve(reached: Callable[[int], bool], *, least: bool) -> tuple[int | None, int | None]:
    """The step that reaches the target and is nearest to one that misses it, and that one.

    Reached it is from some step on, of which the least is sought, or up to some step, of which the last.
    """
    good, bad = (STEPS, 1) if least else (1, STEPS)
    if not reached(good):
        return None, good
    if reached(bad):
        return bad, None
    while abs(good - bad) > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if reached(middle) else (good, middle)
    return good, bad
