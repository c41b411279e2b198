"""The certified bound in figures: how far candidates are apart, and what the noise over them makes of that.

`config/accounting` says whether a recipe has a bound and `measures/bound` what mu comes to; here the two meet
the distances and the noise of real records, those of an audit and those of a trial alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from boomerang_batch.audit.findings import Bound, Promise, Reading
from boomerang_batch.audit.records import Records
from boomerang_batch.config.accounting import account, mu
from boomerang_batch.config.pipeline import Recipe
from boomerang_batch.data.provenance import Row
from boomerang_batch.diffusion.denoiser import DenoiserSpec
from boomerang_batch.measures import bound as bounds
from boomerang_batch.measures.distances import pair_distances
from boomerang_batch.run.scratch import scratch_folder
from boomerang_batch.run.trial import Chosen, Rig
from boomerang_batch.run.walks import Walks

LEAST, MEDIAN, LARGEST = "least", "median", "largest possible"
"""Which distance of two candidates a promise is for: among the records, or of any two pictures there can be."""
CERTIFIED = {LEAST: "certified@least", MEDIAN: "certified@median", LARGEST: "certified@largest"}
"""As a measure of a trial: the most that any attack can be right about two candidates at this distance."""
DP_DELTA = 1e-5
"""At which the bound's epsilon is told."""


def bound(
    recipe: Recipe,
    noise: Sequence[float],
    *,
    latent: bool | None,
    deltas: Mapping[str, float],
    remembered: int = 0,
) -> Bound:
    """What may be promised of outputs with this noise, for two candidates at each distance.

    `noise` has the least sigma of each observation; of fewer nothing is promised, for the others count too.
    `remembered`: how many sources the model is known to have been trained on; with any there is no bound.
    """
    accounting = account(recipe, latent=latent)
    reasons = accounting.reasons
    if remembered:
        reasons += (
            f"the model was trained on {remembered} of the audited sources and may remember them, where the "
            "bound supposes that its weights don't depend on the record",
        )
    known = tuple(noise) if len(noise) == accounting.observations else ()
    return Bound(
        reasons=reasons,
        within=accounting.within,
        notes=accounting.notes,
        observations=accounting.observations,
        sigmas=known,
        dp_delta=DP_DELTA,
        promises=tuple(_promises(deltas, known)) if known and not reasons else (),
    )


def noise_of(recipe: Recipe, rows: Iterable[Row]) -> tuple[float, ...]:
    """The least noise of each variant that there is a row of."""
    found: dict[int, float] = {}
    for row in rows:
        if row.sigma is not None:
            variant = recipe.variant_of(row.variant)
            found[variant] = min(row.sigma, found.get(variant, math.inf))
    return tuple(found.values())


def least_noise(recipe: Recipe, model: DenoiserSpec) -> tuple[float, ...]:
    """The least noise that each observation may have, whatever a sample had; empty where nobody can say."""
    walks = Walks(recipe, model)
    levels = account(recipe, latent=model.latent).least_noise
    return tuple(walks.at(unit, value).schedule.relative_sigma for unit, value in levels)


def promised_noise(found: Sequence[float], least: Sequence[float]) -> tuple[float, ...]:
    """What the bound counts of the noise `found` in a sample, where a record may have as little as `least`."""
    return tuple(map(min, sorted(found), sorted(least))) if len(found) == len(least) else tuple(found)


def distances(x_0: NDArray[np.float32], *, groups: NDArray[np.int64], model: DenoiserSpec) -> dict[str, float]:
    """How far candidates x_0 (n, d) of a group (n,) are apart where noise is added, by which distance it is."""
    apart = pair_distances(x_0, groups=groups)
    found = {LEAST: apart.least, MEDIAN: apart.median}
    if not model.latent:
        low, high = model.value_range
        found[LARGEST] = (high - low) * math.sqrt(x_0.shape[1])
    return found


def states(
    rig: Rig,
    recipe: Recipe,
    samples: Iterable[Chosen],
    at: Mapping[tuple[str, str], Sequence[int]],
    *,
    folder: Path,
) -> NDArray[np.float32]:
    """x_0 of samples where noise is added, (n, d), on disk; short ones filled with zeros.

    `at` has the rows of each by its (stem, key), n of them in all.
    """
    found = np.zeros((sum(map(len, at.values())), 0), np.float32)
    for sample, state in rig.states(recipe, samples):
        if len(state) > found.shape[1]:
            found = _widened(found, len(state), folder)
        found[at[sample.stem, sample.key], : len(state)] = state
    return found


def cautions(recipe: Recipe) -> Iterator[str]:
    """What of a recipe must be known before numbers of its privacy are believed, however they were measured."""
    # The other methods have no bound that an attack could come up to, and those that mix latents no eta 1.
    if recipe.purpose == "anonymize" and recipe.method == "boomerang" and recipe.sampler.eta < 1:
        yield (
            f"sampler.eta is {recipe.sampler.eta:g}: below 1 the way back adds little noise, or none, "
            "so x_t can be computed from the output and attacks come up to the bound; anonymize with eta 1"
        )
    if recipe.purpose == "anonymize" and recipe.method == "interpolate":
        yield (
            "each output shows a second record, its partner: links are counted to the own source alone, and "
            "who is found as a partner is not among them"
        )


def uncertified(recipe: Recipe, *, latent: bool) -> tuple[str, ...]:
    """Why a trial has no certified accuracy to tell, a sentence each; empty where it has one."""
    reasons = account(recipe, latent=latent).reasons
    if recipe.region is not None:
        reasons += ("the bound is for each record's region alone, whose candidates are not known",)
    return reasons


def certified(rig: Rig, recipe: Recipe, samples: Sequence[Chosen], records: Records) -> Iterator[Reading]:
    """The certified accuracy of a trial at each distance of its records; nothing where there is no bound.

    The recipe has one t for all variants, as `at_t` makes it, for of each sample only one was drawn.
    """
    if uncertified(recipe, latent=rig.model.latent):
        return
    at: dict[tuple[str, str], list[int]] = {}
    for place, identity in enumerate(records.identities):
        at.setdefault(records.samples[identity], []).append(place)
    came = [sample for sample in samples if (sample.stem, sample.key) in at]
    with scratch_folder() as folder:
        x_0 = states(rig, recipe, came, at, folder=folder)
        deltas = distances(x_0, groups=records.groups, model=rig.model)
    noise = noise_of(recipe, records.rows) * recipe.variants
    for promise in bound(recipe, noise, latent=rig.model.latent, deltas=deltas).promises:
        yield Reading(
            measure=CERTIFIED[promise.distance],
            value=promise.accuracy,
            chance=0.5,
            count=len(records.rows),
        )


def _promises(deltas: Mapping[str, float], noise: Sequence[float]) -> Iterator[Promise]:
    for distance, delta in deltas.items():
        if math.isfinite(delta):
            together = mu(delta, noise)
            yield Promise(
                distance=distance,
                delta=delta,
                mu=together,
                accuracy=bounds.two_candidate_accuracy(together),
                epsilon=bounds.epsilon(together, DP_DELTA),
            )


def _widened(found: NDArray[np.float32], width: int, folder: Path) -> NDArray[np.float32]:
    """The same rows with room for more, in a file of their own."""
    wide = np.lib.format.open_memmap(
        folder / f"states-{width}.npy", mode="w+", dtype=np.float32, shape=(len(found), width)
    )
    wide[:, : found.shape[1]] = found
    return wide
