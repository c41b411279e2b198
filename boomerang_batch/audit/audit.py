"""How private and how good is this output? Everything that can be measured of it, from a bounded sample.

Outputs are compared with their sources in the features of several embedders, because a single one reports more
anonymity than there is. Beside every number stand control rows that say what it could be at best and at worst,
and the noise ceilings: what the forward jump alone, before any network, lets through to each attacker.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from boomerang_batch.audit import compare, controls, readings
from boomerang_batch.audit.bounding import bound, cautions, noise_of, promised_noise
from boomerang_batch.audit.classify import given_agreement, require_labels
from boomerang_batch.audit.findings import ALL, OUTPUTS, Embedding, Findings, Reading
from boomerang_batch.audit.gates import check_limits, judge
from boomerang_batch.audit.others import Given, Others, read_others
from boomerang_batch.audit.pairs import Pairing, gather
from boomerang_batch.audit.recorded import open_rig
from boomerang_batch.audit.records import Records
from boomerang_batch.config.blocks import Gates
from boomerang_batch.data.manifest import Manifest
from boomerang_batch.errors import ConfigError, MeasureError
from boomerang_batch.measures import classifiers as makers
from boomerang_batch.measures import embedders as known
from boomerang_batch.measures.ceiling import exceeds
from boomerang_batch.measures.given import Introduced
from boomerang_batch.measures.intervals import Rate
from boomerang_batch.run.progress import Looks
from boomerang_batch.run.record import require_record
from boomerang_batch.run.scratch import scratch_folder
from boomerang_batch.run.trial import own_secret

_FITTED_ON = 2000


@dataclass(frozen=True, kw_only=True)
class AuditRequest:
    """What the user asked for."""

    out: str
    manifest: Manifest
    private_dir: str | None = None
    embedders: tuple[str, ...]
    classifiers: tuple[str, ...] = ()
    """To tell labels by, beside those that are trained."""
    samples: int
    """Outputs that are looked at, and images of the training set and the hold-out, of each at most as many."""
    redraws: int
    """Of the outputs, how many are drawn anew for the controls that need the model; 0: none."""
    gates: Gates
    training: Manifest | None = None
    """The model's own training images, to look for copies of."""
    holdout: Manifest | None = None
    """Real images that were no sources, by which to tell what is near."""
    model: str | None = None
    """Where the model's folder lies, if run.json does not tell."""
    device: str = "auto"
    threads: int | None = None


def audit(request: AuditRequest) -> Findings:
    """Measure it. Raises MeasureError where the sample is too small, BoomerangError for what is missing.

    What a gate had nothing to go by stands in the findings, which are worth having all the same; but where the
    records alone show it, nothing is measured and that is the error.
    """
    record = require_record(request.out)
    pairing = Pairing(request.out, record, request.manifest, private_dir=request.private_dir)
    recipe = pairing.recipe
    classifiers = _classifiers(request)
    with scratch_folder() as folder:
        records = gather(pairing, samples=request.samples, folder=folder)
        check_limits(request.gates, records)
        require_labels(classifiers, records)
        given = _others(request, pairing, records, folder)
        left_out = [words for one in given.values() for words in one.left_out]
        others = Others(**{name: one.pictures for name, one in given.items()})
        embedders = [known.load(name, fit_on=records.sources[:_FITTED_ON]) for name in request.embedders]
        seen = [compare.Seen.by(embedder, records) for embedder in embedders]
        found, missing = _compared(records, seen, others)
        for classifier in classifiers:
            found += given_agreement(classifier, records)
        space = controls.Space()
        if request.redraws and recipe.method == "boomerang":  # the noise of codes is drawn from the source
            places = _whole_groups(records, request.redraws)
            with open_rig(
                record, recipe, model=request.model, device=request.device, threads=request.threads
            ) as rig:
                secret = own_secret(recipe, request.private_dir)
                drawn, candidates = controls.redrawn(rig, pairing, records, places, embedders, secret=secret)
                found += drawn
                space = controls.model_space(rig, pairing, records, candidates, folder)
        for attacker, ceiling in space.ceilings.items():
            found += readings.ceiling(ceiling, attacker=attacker)
        remembered = given["training"].sources if "training" in given else 0
        noise = promised_noise(noise_of(recipe, records.rows), space.least_noise)
        findings = Findings(
            name=record.name,
            purpose=recipe.purpose,
            recipe_digest=record.recipe_digest,
            model_digest=record.model_digest,
            noise_key_id=record.noise_key_id,
            audited=len(records.rows),
            outputs=Looks(request.out).look().rows.get("ok", 0),
            embeddings=_introduced(embedders),
            classifiers=_introduced(classifiers),
            training=0 if others.training is None else len(others.training),
            holdout=0 if others.holdout is None else len(others.holdout),
            unread={name: one.unread for name, one in given.items()},
            readings=tuple(found),
            bound=bound(recipe, noise, latent=space.latent, deltas=space.deltas, remembered=remembered),
            worst=tuple(compare.worst(records, seen)),
            warnings=(*left_out, *missing, *_warnings(request, pairing, records, space, found)),
        )
    return judge(findings, request.gates)


def _classifiers(request: AuditRequest) -> list[makers.Classifier]:
    """Those that were given. Raises ConfigError where one can't be loaded, or told from an embedder."""
    for name in request.classifiers:
        if name in request.embedders:
            raise ConfigError(
                f"--classifier {name}: it has the name of an embedder that is asked for, whose own classifier "
                "goes by it; leave one of the two out, or register it under another name"
            )
    return [makers.load(name) for name in request.classifiers]


def _introduced(made: Sequence[Introduced]) -> tuple[Embedding, ...]:
    return tuple(Embedding(name=one.name, digest=one.digest, licence=one.licence) for one in made)


def _others(request: AuditRequest, pairing: Pairing, records: Records, folder: Path) -> dict[str, Given]:
    """The real images that were given beside the sources, by which they are: `training` or `holdout`."""
    return {
        name: read_others(
            manifest,
            f"--{name}",
            recipe=pairing.recipe,
            records=records,
            samples=request.samples,
            folder=folder,
        )
        for name, manifest in (("training", request.training), ("holdout", request.holdout))
        if manifest is not None
    }


def _compared(
    records: Records, seen: Sequence[compare.Seen], others: Others
) -> tuple[list[Reading], list[str]]:
    """Everything that outputs and other images alone tell, and what could not be told."""
    found, missing = [*compare.pictures(records)], []
    copied = functools.partial(compare.copied, others=others)
    for one in seen:
        found += compare.links(records, one)
        for part in (compare.learned_links, copied, compare.kept):
            try:
                found += part(records, one)
            except MeasureError as error:
                missing.append(f"in the features {one.embedder.name}: {error}")
    return found, missing


def _whole_groups(records: Records, wanted: int) -> list[int]:
    """Records to be drawn anew, group by group, so that candidates stay together; the last group is cut."""
    order = np.argsort(records.groups, kind="stable")
    return [int(place) for place in order[:wanted]]


def _warnings(
    request: AuditRequest, pairing: Pairing, records: Records, space: controls.Space, found: Sequence[Reading]
) -> Iterator[str]:
    """What a reader must know before the numbers are believed."""
    recipe = pairing.recipe
    yield from cautions(recipe)
    if not request.redraws or recipe.method != "boomerang":
        why = "" if recipe.method == "boomerang" else f", which method {recipe.method} can't be asked for"
        yield (
            f"nothing was drawn anew{why}: no controls at t = 0 and t = T, no noise ceiling, no re-run attack"
        )
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
    """A warning for each embedder in which an attacker did better than x_t allows.

    Where an embedder found nothing in some, his candidates are fewer than the ceiling's, and it is not his.
    """
    about = (readings.RANK.format(1), OUTPUTS, attacker, ALL)
    for one in found:
        whole = (one.measure, one.subject, one.attacker, one.stratum) == about
        if whole and one.count == ceiling.trials and math.isfinite(one.value):
            excess = exceeds(Rate(hits=one.value * one.count, trials=one.count), ceiling)
            if excess.exceeds:
                yield (
                    f"{one.name} is {one.value:.3f}, above the noise ceiling of {ceiling.value:.3f} "
                    f"({excess.test}, p = {excess.p_value:.1g}): more than the noised source is in them"
                )
