"""One output made again from its provenance row and its source, and compared with the one in OUT.

The recipe, the stack and the model's digest come from run.json, the source from a manifest or the private dir's
links, the noise from the secret or the seed. What differs from the record is listed whether or not it shows.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from boomerang_batch import storage
from boomerang_batch.audit.origin import Origin, find_origins, is_private, require_links
from boomerang_batch.audit.recorded import open_rig
from boomerang_batch.audit.sameness import Tolerance, differences, distance, tolerance_for
from boomerang_batch.config.pipeline import Recipe
from boomerang_batch.data import images
from boomerang_batch.data.images import Picture
from boomerang_batch.data.manifest import Manifest, ShardEntry, find_shards
from boomerang_batch.data.provenance import pixel_digest
from boomerang_batch.data.shards import Sample, read_samples
from boomerang_batch.errors import ConfigError, ManifestError, SampleError, VerificationError
from boomerang_batch.run.commit import TAR_SUFFIX
from boomerang_batch.run.naming import ORIGINAL, Naming, member_key
from boomerang_batch.run.record import RunRecord, recorded_recipe, require_record
from boomerang_batch.run.trial import Chosen, Outcome, own_secret

Verdict = Literal["identical", "identical pixels", "within tolerance", "differs"]


@dataclass(frozen=True, kw_only=True)
class Regenerated:
    """What became of an output that was made again."""

    origin: Origin
    verdict: Verdict
    why: tuple[str, ...]
    """What is not as the record says, a sentence each; it may be harmless."""
    max_difference: int | None = None
    """Of any pixel, in levels of 255; None where the two can't be compared."""
    psnr_db: float | None = None
    """Infinite for equal pixels."""
    tolerance: Tolerance
    image: bytes | None = None
    """As it was made now, encoded."""

    def facts(self) -> dict[str, Any]:
        """As JSON has it, without the image."""
        origin = self.origin
        return {
            "shard": origin.shard,
            "key": origin.row.key,
            "variant": origin.row.variant,
            "source_key": origin.source_key,
            "source_url": origin.source_url,
            "verdict": self.verdict,
            "why": list(self.why),
            "max_difference": self.max_difference,
            "psnr_db": None if self.psnr_db is None or math.isinf(self.psnr_db) else self.psnr_db,
            "tolerance": dataclasses.asdict(self.tolerance),
        }


def regenerate(
    out: str,
    *,
    key: str,
    variant: int | None = None,
    shard: str | None = None,
    private_dir: str | None = None,
    against: Manifest | None = None,
    model: str | None = None,
    device: str = "auto",
    threads: int | None = None,
) -> Regenerated:
    """Make the output of `key` again. `model` is where its folder lies, `shard` which of several has the key.

    Raises ConfigError for a key that has no output to make again, PrivateDirError and ManifestError where the
    source can't be found, and what loading a model and reading storage raise.
    """
    record = require_record(out)
    recipe = recorded_recipe(out, record)
    require_links(out, record, private_dir)
    if not is_private(record) and against is None:
        raise ConfigError(
            f"{out} does not tell where its sources are; give the run's manifest with --against MANIFEST"
        )
    found = find_origins(out, record, key=key, private_dir=private_dir, shard=shard)
    origin = _one(found, key=key, variant=variant)
    naming = Naming(recipe, own_secret(recipe, private_dir))
    chosen = _source(origin, naming, record, against)
    published = _published(out, origin, recipe)
    with open_rig(record, recipe, model=model, device=device, threads=threads) as rig:
        (outcome,) = rig.run(recipe, [chosen], secret=own_secret(recipe, private_dir))
        why = tuple(differences(origin.row, outcome, record, recipe, naming, rig.facts))
    return _compared(origin, published, outcome, recipe, why)


def _one(found: list[Origin], *, key: str, variant: int | None) -> Origin:
    """The one row that is meant, which must have an output that was made."""
    meant = [one for one in found if variant in (None, one.row.variant)]
    made = [one for one in meant if one.row.variant != ORIGINAL] if variant is None else meant
    numbers = ", ".join(str(number) for number in sorted({one.row.variant for one in found}))
    if not meant:
        raise ConfigError(f"key {key} has no variant {variant}; there is --variant {numbers}")
    stems = sorted({one.stem for one in meant})
    if len(stems) > 1:
        raise ConfigError(
            f"key {key} is in several shards; say which with --shard: {', '.join(stems[:8])}"
            f"{' ...' if len(stems) > 8 else ''}"
        )
    if not made or made[0].row.status == "original":
        raise ConfigError(
            f"key {key}: variant -1 is the kept original, the source's own bytes, which nobody made; "
            "name an output with --variant"
        )
    if len(made) > 1:
        raise ConfigError(f"key {key} has several outputs; say which with --variant: {numbers}")
    (origin,) = made
    if origin.row.status != "ok":
        again = "run it again with --only-failed" if origin.row.status == "failed" else "see its row"
        raise ConfigError(
            f"key {key}, variant {origin.row.variant} has no output to make again: its row says "
            f"{origin.row.status}, {origin.row.reason}; {again}"
        )
    return origin


def _source(origin: Origin, naming: Naming, record: RunRecord, manifest: Manifest | None) -> Chosen:
    """The sample that the output was made of."""
    entry = _entry(origin, naming, record, manifest)
    shown = storage.without_secrets(entry.url)
    with storage.open_read(entry.url) as stream:
        for item in read_samples(stream, shard=shown):
            if isinstance(item, Sample) and item.key == origin.source_key:
                return Chosen(stem=entry.stem, key=item.key, fields=item.fields, numbers=(origin.row.variant,))
    raise ManifestError(
        f"{shown} has no sample {origin.source_key} that can be read, of which {origin.row.key} was made; "
        "put the shard back as it was, or name the manifest it is in now with --against"
    )


def _entry(origin: Origin, naming: Naming, record: RunRecord, manifest: Manifest | None) -> ShardEntry:
    """The input shard: from the manifest by name, or as the links tell."""
    if manifest is not None:
        for entry in manifest.shards:
            # By name first; under another secret names tell nothing, but places do.
            if naming.stem(entry.stem) == origin.stem or (
                origin.source_url is not None and storage.without_secrets(entry.url) == origin.source_url
            ):
                return entry
        raise ManifestError(
            f"manifest {manifest.name} does not list the shard that {origin.shard} was made of; "
            "give the one that the run read"
        )
    (entry,) = find_shards([origin.source_url or ""], ".")
    if naming.stem(entry.stem) != origin.stem and naming.noise_key_id == record.noise_key_id:
        raise ManifestError(
            f"{origin.source_url} had an id of its own in the run's manifest; give that with --against MANIFEST"
        )
    return entry


def _published(out: str, origin: Origin, recipe: Recipe) -> tuple[str, bytes]:
    """The output image as OUT has it: its field and bytes. They need not be those that the row tells of."""
    url = storage.join(out, origin.shard + TAR_SUFFIX)
    key = member_key(recipe, origin.row.key or "", origin.row.variant)
    with storage.open_read(url) as stream:
        for item in read_samples(stream, shard=url):
            if isinstance(item, Sample) and item.key == key:
                # The writer puts the image first.
                return next(iter(item.fields.items()))
    raise VerificationError(f"{url} has no sample {key}, which its provenance tells of; run verify --deep")


def _compared(
    origin: Origin, published: tuple[str, bytes], outcome: Outcome, recipe: Recipe, why: tuple[str, ...]
) -> Regenerated:
    """The verdict. What OUT has must be what its row says, or it proves nothing."""
    row, (field, there) = origin.row, published
    now = outcome.image
    tolerance = tolerance_for(row, there)
    before = _decoded(there, field, recipe)
    if before is None or pixel_digest(before) != row.pixel_digest:
        harmed = "OUT's own image is not the one its row tells of: run verify --deep"
        return Regenerated(origin=origin, verdict="differs", why=(harmed, *why), tolerance=tolerance, image=now)
    if now is None:
        return Regenerated(origin=origin, verdict="differs", why=why, tolerance=tolerance)
    after = images.decode(now, field=outcome.field or field, channels=None, policy=recipe.images)
    difference, psnr_db = distance(after, before)
    verdict: Verdict = "differs"
    if there == now:
        verdict = "identical"
    elif difference == 0:
        verdict = "identical pixels"
    elif difference is not None and psnr_db is not None and tolerance.takes(difference, psnr_db):
        verdict = "within tolerance"
    if verdict == "differs" and not why:
        why = ("nothing on record explains it: neither stack, model, recipe, noise nor source differ",)
    return Regenerated(
        origin=origin,
        verdict=verdict,
        why=why,
        max_difference=difference,
        psnr_db=psnr_db,
        tolerance=tolerance,
        image=now,
    )


def _decoded(data: bytes, field: str, recipe: Recipe) -> Picture | None:
    try:
        return images.decode(data, field=field, channels=None, policy=recipe.images)
    except SampleError:
        return None
