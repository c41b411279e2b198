"""What an audit draws anew, to set its numbers beside: the recipe at t = 0 and at t = T, and the re-run attack.

Linkability means something only between its ends. At t = 0 nothing hides but the autoencoder; at t = T nothing
shows but what was told the model. The re-run attacker knows recipe and model, draws every candidate anew and
compares: with the run's secret the candidate is met exactly, without it under other noise, which is why the
noise needs a secret.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from boomerang_batch.audit import bounding
from boomerang_batch.audit.findings import OUTPUTS, Reading
from boomerang_batch.audit.pairs import Pairing, chosen_samples
from boomerang_batch.audit.readings import NEAREST, RE_RUN, TRAINED, linked
from boomerang_batch.audit.records import Records
from boomerang_batch.config.accounting import account
from boomerang_batch.config.pipeline import Recipe
from boomerang_batch.data import images
from boomerang_batch.measures.attackers import training_half
from boomerang_batch.measures.ceiling import Ceiling, noise_ceiling
from boomerang_batch.measures.embedders import Embedder
from boomerang_batch.measures.linkability import linkability
from boomerang_batch.run.trial import Outcome, Rig, at_t, fresh_noise

AT_0, AT_T, SECRET_KNOWN = "t = 0", "t = T", "secret known"


@dataclass(frozen=True, kw_only=True)
class Redrawn:
    """Outputs of some records, drawn anew."""

    places: NDArray[np.int64]
    """(m,): which records have one."""
    outputs: NDArray[np.uint8]
    """(m, H, W, 3), of the records' size."""


def redraw(
    rig: Rig,
    recipe: Recipe,
    pairing: Pairing,
    records: Records,
    places: Sequence[int],
    *,
    secret: bytes | None,
) -> Redrawn:
    """Draw the records in `places` by another recipe, or under another secret; those that fail are left out."""
    where = {
        (*records.samples[records.identities[place]], records.rows[place].variant): place for place in places
    }
    found: dict[int, images.Pixels] = {}
    for outcome in rig.run(recipe, chosen_samples(pairing, records, places), secret=secret):
        if outcome.image is not None:
            place = where[outcome.stem, outcome.key, outcome.row.variant]
            found[place] = images.resize(_decoded(outcome, recipe), records.outputs.shape[1:3])
    done = [place for place in places if place in found]
    shape = (0, *records.outputs.shape[1:])
    outputs = np.stack([found[place] for place in done]) if done else np.zeros(shape, np.uint8)
    return Redrawn(places=np.array(done, dtype=np.int64), outputs=outputs)


@dataclass(frozen=True, kw_only=True)
class Space:
    """What is known of the records where noise is added."""

    latent: bool | None = None
    """Whether that is an autoencoder's latents; None where no model was loaded."""
    ceilings: Mapping[str, Ceiling] = field(default_factory=dict)
    """The noise ceiling among the candidates that each attacker has: all, those that the trained one has not
    learned from, those that the re-run one has drawn. Among fewer it is higher: each bounds its own attacker
    alone."""
    deltas: Mapping[str, float] = field(default_factory=dict)
    """How far candidates are apart, by which distance it is."""
    missing: str = ""
    """Why there is no ceiling, though a model was loaded."""
    least_noise: tuple[float, ...] = ()
    """Of each observation, whatever the records at hand have; empty where nobody can say."""


def redrawn(
    rig: Rig,
    pairing: Pairing,
    records: Records,
    places: Sequence[int],
    embedders: Sequence[Embedder],
    *,
    secret: bytes | None,
) -> tuple[list[Reading], NDArray[np.int64]]:
    """Linkability of the controls at both ends of t, and of the re-run attack with and without the secret.

    And (m,) which records he had for candidates who does not know the secret.
    """
    found: list[Reading] = []
    recipe = pairing.recipe
    nothing, (anew, other_secret) = at_t(recipe, "fraction", 0), fresh_noise(recipe)
    ends = {AT_0: (nothing, None), AT_T: (at_t(anew, "fraction", 1), other_secret)}
    for subject, (other, key) in ends.items():
        drawn = redraw(rig, other, pairing, records, places, secret=key)
        found += _of_sources(drawn, records, embedders, subject=subject)
    attacks = {SECRET_KNOWN: (recipe, secret), OUTPUTS: (anew, other_secret)}
    for subject, (other, key) in attacks.items():
        drawn = redraw(rig, other, pairing, records, places, secret=key)
        found += _of_candidates(drawn, records, embedders, subject=subject)
    return found, drawn.places  # of the last one, who has no secret


def model_space(rig: Rig, pairing: Pairing, records: Records, places: NDArray[np.int64], folder: Path) -> Space:
    """The noise ceilings and the distances of candidates; `places` are those of the re-run attacker."""
    latent = rig.model.latent
    if more := account(pairing.recipe, latent=latent).in_pictures:
        return Space(latent=latent, missing=f"no noise ceiling: {'; '.join(more)}")
    if pairing.recipe.region is not None:
        return Space(latent=latent, missing="no noise ceiling: noise lies in each record's region alone")
    sigmas = np.array([row.sigma for row in records.rows], dtype=np.float64)  # None becomes NaN
    if np.isnan(sigmas).any():
        return Space(latent=latent, missing="no noise ceiling: provenance does not tell every output's noise")
    every = np.arange(len(records.rows))
    x_0 = states(rig, pairing, records, every.tolist(), folder)
    deltas = bounding.distances(x_0, groups=records.groups, model=rig.model)
    among = {
        NEAREST: every,
        TRAINED: np.flatnonzero(~training_half(records.identities)),
        RE_RUN: np.sort(places),
    }
    ceilings = {
        attacker: noise_ceiling(x_0 if at is every else x_0[at], sigmas[at], groups=records.groups[at])
        for attacker, at in among.items()
        if len(at)
    }
    least = bounding.least_noise(pairing.recipe, rig.model)
    return Space(latent=latent, ceilings=ceilings, deltas=deltas, least_noise=least)


def _of_sources(
    redrawn: Redrawn, records: Records, embedders: Sequence[Embedder], *, subject: str
) -> Iterator[Reading]:
    """The redrawn images against the records' sources."""
    at = redrawn.places
    if len(at):
        for embedder in embedders:
            found = linkability(
                embedder.embed(redrawn.outputs),
                embedder.embed(records.sources[at]),
                groups=records.groups[at],
                identities=records.identities[at],
            )
            yield from linked(found, subject=subject, features=embedder.name)


def _of_candidates(
    redrawn: Redrawn, records: Records, embedders: Sequence[Embedder], *, subject: str
) -> Iterator[Reading]:
    """The released outputs against every candidate drawn anew."""
    at = redrawn.places
    if len(at):
        for embedder in embedders:
            found = linkability(
                embedder.embed(records.outputs[at]),
                embedder.embed(redrawn.outputs),
                groups=records.groups[at],
                identities=records.identities[at],
            )
            yield from linked(found, subject=subject, attacker=RE_RUN, features=embedder.name)


def states(
    rig: Rig, pairing: Pairing, records: Records, places: Sequence[int], folder: Path
) -> NDArray[np.float32]:
    """x_0 of the records in `places` where noise is added, (m, d), on disk; short ones filled with zeros."""
    at: dict[tuple[str, str], list[int]] = {}
    for index, place in enumerate(places):
        at.setdefault(records.samples[records.identities[place]], []).append(index)
    return bounding.states(rig, pairing.recipe, chosen_samples(pairing, records, places), at, folder=folder)


def _decoded(outcome: Outcome, recipe: Recipe) -> images.Pixels:
    return images.decode(
        outcome.image or b"", field=outcome.field or "", channels=3, policy=recipe.images
    ).pixels
