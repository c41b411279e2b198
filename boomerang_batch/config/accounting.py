"""What may be said about the privacy of a recipe's outputs; `features` says it of every field.

Under a secret, all that an output shows of its source is x_t = alpha_t x_0 + sigma_t eps, one draw of the
Gaussian mechanism; the way back is post-processing. With Delta the distance of two candidates where noise is
added (pixels in the model's range, or latents) and sigma_t relative to the clean signal, whoever has to decide
between them is right with probability at most Phi(mu / 2), mu = Delta / sigma_t; independent observations add
up to mu = Delta sqrt(sum_i 1 / sigma_i^2) (Gaussian differential privacy, arXiv 1905.02383). This is certified
for what does no more than that, and for nothing else.

What no field turns on: a draw retried in float32 uses the same noise, and one of the two outputs is released; a
flag of the safety checker is a function of the output. Normals come from 32 bits, so beyond 6.66 sigma there
are none: a total variation of 3e-11 for each element, which is left out of every figure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from boomerang_batch.config.features import ALWAYS, FEATURES, KNOWN
from boomerang_batch.config.pipeline import Recipe


@dataclass(frozen=True, kw_only=True)
class Accounting:
    """What may be said about the privacy of a recipe's outputs."""

    reasons: tuple[str, ...]
    """Why there is no certified bound, a sentence each; empty where there is one."""
    in_pictures: tuple[str, ...]
    """Those of the reasons for which pictures show more than x_t to whoever has them alone, and no seed."""
    within: tuple[str, ...]
    """What is known of each record besides: candidates, galleries and chance are to be taken among records
    that agree in all of it."""
    notes: tuple[str, ...]
    """What the bound supposes, and what it does not say."""
    observations: int
    """How often independent noise is laid over the source: once for each variant. Passes, tiles and retries
    look at what is noised already."""
    least_noise: tuple[tuple[str, float], ...]
    """For each observation the (unit, value) of the least t it may have, to be resolved on the model's chain by
    the recipe's grid and start; empty where nobody can say."""
    region_only: bool
    """Whether Delta is over the region alone, between images that agree outside it."""

    @property
    def certified(self) -> bool:
        """Whether `mu` of these observations is a bound for any attack."""
        return not self.reasons


def account(recipe: Recipe, *, latent: bool | None = None) -> Accounting:
    """The privacy accounting of a recipe.

    `latent` says whether its model works on an autoencoder's latents; None, not known, counts as yes.
    """
    features = FEATURES.values()
    levels = [level.least_noise for level in recipe.levels]
    known = [level for level in levels if level is not None]
    if len(known) < len(levels):
        known = []
    reasons = [(feature.reason(recipe, latent is not False), feature.in_picture) for feature in features]
    notes = (feature.note(recipe) for feature in features)
    within = (name for feature in features for name in feature.within(recipe))
    return Accounting(
        reasons=tuple(reason for reason, _ in reasons if reason),
        in_pictures=tuple(reason for reason, in_picture in reasons if reason and in_picture),
        within=(*KNOWN, *dict.fromkeys(within)),
        notes=(*ALWAYS, *(note for note in notes if note)),
        observations=recipe.variants,
        least_noise=tuple(known * recipe.variants if len(known) == 1 else known),
        region_only=recipe.region is not None,
    )


def mu(delta: float, sigmas: Sequence[float]) -> float:
    """delta * sqrt(sum 1 / sigma_i^2): how far apart two candidates are in all observations taken together.

    delta >= 0 is their distance where noise is added; sigmas >= 0 relative to the clean signal, one for each
    observation. Infinite where one has no noise.
    """
    if not delta >= 0 or not all(sigma >= 0 for sigma in sigmas):
        raise ValueError(f"distance {delta} and noise levels {list(sigmas)} must be at least 0")
    if delta == 0:
        return 0.0
    if 0 in sigmas:
        return math.inf
    return math.sqrt(math.fsum((delta / sigma) ** 2 for sigma in sigmas))
