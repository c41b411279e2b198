"""Where the sources of a run are: by a manifest, or by the links in the private dir.

Under anonymize only the private dir tells which source is whose, and it must be this run's. Otherwise outputs
have their sources' names, and a manifest that lists the run's shards is enough.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from boomerang_batch import storage
from boomerang_batch.config.pipeline import Recipe
from boomerang_batch.data.manifest import Manifest
from boomerang_batch.data.provenance import Row
from boomerang_batch.errors import ConfigError, ManifestError, PrivateDirError
from boomerang_batch.report.facts import Facts, Failure
from boomerang_batch.run.links import read_links
from boomerang_batch.run.naming import Naming
from boomerang_batch.run.private import load_secret, prepare_private_dir
from boomerang_batch.run.record import read_record


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Which sample of which shard an output row was made from."""

    row: Row
    url: str
    key: str


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Where sources are, and the names and digests of the run they belong to."""

    naming: Naming
    urls: Mapping[str, str] = field(default_factory=dict)
    """The input shard of an output shard, by a manifest."""
    private_dir: str | None = None

    def origins(self, shard: str, rows: Sequence[Row]) -> list[Origin]:
        """The origin of each row of a shard; none where nobody tells."""
        known = self.urls.get(shard.partition("~")[0])  # an appendix has its shard's sources
        if self.private_dir is None:
            url = known
            return [Origin(row=row, url=url, key=row.key) for row in rows if url and row.key is not None]
        links = {(link["row_key"], link["variant"]): link for link in self.links(shard)}
        found = []
        for row in rows:
            link = links.get((row.key, row.variant), {})
            if link.get("source_key") is not None:
                url = known or link["source_url"]
                found.append(Origin(row=row, url=url, key=link["source_key"]))
        return found

    def links(self, shard: str) -> list[dict[str, Any]]:
        """The private dir's rows of a shard. Raises PrivateDirError where they are missing."""
        return list(read_links(self.private_dir or "", shard).to_pylist())

    def named(self, failure: Failure) -> Failure:
        """A failure with the name and the sentence that OUT keeps to itself."""
        if self.private_dir is None:
            return failure
        for link in self.links(failure.shard):
            same = (link["row_key"], link["variant"]) == (failure.key, failure.variant)
            if same and link["reason"] == failure.reason:
                key = link["source_key"] or failure.key
                return dataclasses.replace(failure, key=key, detail=link["detail"], shard=link["source_url"])
        return failure


def find_sources(
    facts: Facts, *, out: str, private_dir: str | None, manifest: Manifest | None
) -> Sources | None:
    """Where the run's sources are, as far as the user says; None where nothing was said.

    Raises PrivateDirError for a private dir that is missing or another run's, ManifestError for a manifest of
    other shards.
    """
    if not facts.anonymize:
        if private_dir is not None:
            raise ConfigError(
                f"--private-dir: the run in {out} has the purpose {facts.recipe.purpose} and keeps nothing "
                "private; leave it out"
            )
        if manifest is None:
            return None
        naming = Naming(facts.recipe, None)
        return Sources(naming=naming, urls=_urls(facts, naming, manifest))
    if private_dir is None:
        if manifest is not None:
            raise PrivateDirError(
                f"--against shows sources beside outputs, and the run in {out} anonymizes: such a report may "
                "stand in its private dir alone, which tells whose they are; give --private-dir DIR too"
            )
        return None
    naming = _private_naming(facts.recipe, facts, out=out, private_dir=private_dir)
    urls = {} if manifest is None else _urls(facts, naming, manifest)
    return Sources(naming=naming, urls=urls, private_dir=private_dir)


def _private_naming(recipe: Recipe, facts: Facts, *, out: str, private_dir: str) -> Naming:
    """The names of the run that the private dir belongs to, if that is the one in OUT."""
    if not storage.exists(private_dir):
        raise PrivateDirError(f"{private_dir}: there is no such private dir; give the one that the run used")
    secret = load_secret(private_dir)
    prepare_private_dir(private_dir, out=out)  # which refuses one that lies in OUT, or is open to others
    there, naming = read_record(private_dir), Naming(recipe, secret)
    ours = facts.record
    if (
        there is None
        or (there.recipe_digest, there.noise_key_id) != (ours.recipe_digest, ours.noise_key_id)
        or naming.noise_key_id != ours.noise_key_id
    ):
        raise PrivateDirError(
            f"{private_dir} is not the private dir of the run in {out}: its secret or its run.json is another's"
        )
    return naming


def _urls(facts: Facts, naming: Naming, manifest: Manifest) -> Mapping[str, str]:
    ours = set(facts.record.shards)
    found = {naming.stem(entry.stem): entry.url for entry in manifest.shards}
    found = {shard: url for shard, url in found.items() if shard in ours}
    if not found:
        raise ManifestError(
            f"--against {manifest.name}: none of its shards is one that the run was made from; give the "
            "manifest of the run"
        )
    return found
