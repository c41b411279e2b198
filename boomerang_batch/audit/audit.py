"""How private and how good is this output? Everything that can be measured of it, from a bounded sample.

Outputs are compared with their sources in the features of several embedders, because a single one reports more
anonymity than there is. Beside every number stand control rows that say what it could be at best and at worst,
and the noise ceiling: what the forward jump alone, before any network, lets through.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from boomerang_batch.audit import compare, controls, readings
from boomerang_batch.audit.findings import ALL, OUTPUTS, Bound, Embedding, Findings, Promise, Reading
from boomerang_batch.audit.gates import judge
from boomerang_batch.audit.pairs import Pairing, gather
from boomerang_batch.audit.recorded import open_rig
from boomerang_batch.audit.records import Records
from boomerang_batch.config.accounting import account, mu
from boomerang_batch.config.blocks import Gates
from boomerang_batch.data.manifest import Manifest
from boomerang_batch.errors import MeasureError
from boomerang_batch.measures import bound as bounds
from boomerang_batch.measures import embedders as known
from boomerang_batch.measures.ceiling import exceeds
from boomerang_batch.measures.intervals import Rate
from boomerang_batch.run.progress import Looks
from boomerang_batch.run.record import require_record
from boomerang_batch.run.scratch import scratch_folder
from boomerang_batch.run.trial import own_secret

DP_DELTA = 1e-5
"""At which the bound's epsilon is told."""
_FITTED_ON = 2000


@dataclass(frozen=True, kw_only=True)
class AuditRequest:
    """What the user asked for."""

    out: str
    manifest: Manifest
    private_dir: str | None = None
    embedders: tuple[str, ...]
    samples: int
    """Outputs that are looked at."""
    redraws: int
    """Of these, how many are drawn anew for the controls that need the model; 0: none."""
    gates: Gates
    model: str | None = None
    """Where the model's folder lies, if run.json does not tell."""
    device: str = "auto"
    threads: int | None = None


def audit(request: AuditRequest) -> Findings:
    """Measure it. Raises MeasureError where the sample is too small, BoomerangError for what is missing."""
    record = require_record(request.out)
    pairing = Pairing(request.out, record, request.manifest, private_dir=request.private_dir)
    recipe = pairing.recipe
    with scratch_folder() as folder:
        records = gather(pairing, samples=request.samples, folder=folder)
        embedders = [known.load(name, fit_on=records.sources[:_FITTED_ON]) for name in request.embedders]
        seen = [compare.Seen.by(embedder, records) for embedder in embedders]
        found, warnings = _compared(records, seen)
        space = controls.Space()
        if request.redraws:
            places = _whole_groups(records, request.redraws)
            with open_rig(
                record, recipe, model=request.model, device=request.device, threads=request.threads
            ) as rig:
                secret = own_secret(recipe, request.private_dir)
                found += controls.redrawn(rig, pairing, records, places, embedders, secret=secret)
                space = controls.model_space(rig, pairing, records, places, folder)
        found += readings.ceiling(space.ceilings[readings.NEAREST]) if space.ceilings else []
        bound = _bound(pairing, records, space)
        findings = Findings(
            name=record.name,
            purpose=recipe.purpose,
            recipe_digest=record.recipe_digest,
            model_digest=record.model_digest,
            noise_key_id=record.noise_key_id,
            audited=len(records.rows),
            outputs=Looks(request.out).look().rows.get("ok", 0),
            embeddings=tuple(
                Embedding(name=one.name, digest=one.digest, licence=one.licence) for one in embedders
            ),
            readings=tuple(found),
            bound=bound,
            worst=tuple(compare.worst(records, seen)),
            warnings=(*warnings, *_warnings(request, pairing, records, space, found)),
        )
    return dataclasses.replace(findings, gates=judge(findings, request.gates))


def _compared(records: Records, seen: Sequence[compare.Seen]) -> tuple[list[Reading], list[str]]:
    """Everything that outputs and sources alone tell, and what could not be told."""
    found, missing = [*compare.pictures(records)], []
    for one in seen:
        found += compare.links(records, one)
        for part in (compare.learned_links, compare.copied, compare.kept):
            try:
                found += part(records, one)
            except MeasureError as error:
                missing.append(str(error))
    return found, missing


def _whole_groups(records: Records, wanted: int) -> list[int]:
    """Records to be drawn anew, group by group, so that candidates stay together; the last group is cut."""
    order = np.argsort(records.groups, kind="stable")
    return [int(place) for place in order[:wanted]]


def _bound(pairing: Pairing, records: Records, space: controls.Space) -> Bound:
    """What may be promised of these records, with their own noise."""
    accounting = account(pairing.recipe, latent=space.latent)
    sigmas: dict[int, float] = {}
    for row in records.rows:
        if row.sigma is not None:
            variant = pairing.recipe.variant_of(row.variant)
            sigmas[variant] = min(row.sigma, sigmas.get(variant, math.inf))
    # Of a variant that is not in the sample the noise is not known, and it counts.
    noise = tuple(sigmas.values()) if len(sigmas) == accounting.observations else ()
    return Bound(
        reasons=accounting.reasons,
        within=accounting.within,
        notes=accounting.notes,
        observations=accounting.observations,
        sigmas=noise,
        dp_delta=DP_DELTA,
        promises=tuple(_promises(space, noise)) if accounting.certified and noise else (),
    )


def _promises(space: controls.Space, noise: Sequence[float]) -> Iterator[Promise]:
    for distance, delta in space.deltas.items():
        if math.isfinite(delta):
            together = mu(delta, noise)
            yield Promise(
                distance=distance,
                delta=delta,
                mu=together,
                accuracy=bounds.two_candidate_accuracy(together),
                epsilon=bounds.epsilon(together, DP_DELTA),
            )


def _warnings(
    request: AuditRequest, pairing: Pairing, records: Records, space: controls.Space, found: Sequence[Reading]
) -> Iterator[str]:
    """What a reader must know before the numbers are believed."""
    recipe = pairing.recipe
    if recipe.purpose == "anonymize" and recipe.sampler.eta < 1:
        yield (
            f"sampler.eta is {recipe.sampler.eta:g}: below 1 the way back adds little noise, or none, "
            "so x_t can be computed from the output and attacks come up to the bound; anonymize with eta 1"
        )
    if not request.redraws:
        yield "nothing was drawn anew: no controls at t = 0 and t = T, no noise ceiling, no re-run attack"
    if space.missing:
        yield space.missing
    sizes = np.bincount(records.groups)
    if np.median(sizes[records.groups]) < 10:
        yield (
            f"most records share all that is known of them with fewer than 10 others (the median has "
            f"{np.median(sizes[records.groups]):.0f}): chance is high among so few, whatever the pictures show"
        )
    for attacker, ceiling in space.ceilings.items():
        yield from _above(found, attacker, ceiling.rank[1])


def _above(found: Sequence[Reading], attacker: str, ceiling: Rate) -> Iterator[str]:
    """A warning for each embedder in which an attacker did better than x_t allows."""
    about = (readings.RANK.format(1), OUTPUTS, attacker, ALL)
    for one in found:
        whole = (one.measure, one.subject, one.attacker, one.stratum) == about
        if whole and math.isfinite(one.value):
            excess = exceeds(Rate(hits=one.value * one.count, trials=one.count), ceiling)
            if excess.exceeds:
                yield (
                    f"{one.name} is {one.value:.3f}, above the noise ceiling of {ceiling.value:.3f} "
                    f"({excess.test}, p = {excess.p_value:.1g}): more than the noised source is in them"
                )
