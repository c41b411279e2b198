"""run.json: what OUT is a run of. Written once, compared ever after; a directory never mixes two runs.

It freezes the recipe in canonical form, the manifest's digest and the expected stems, the limit, the model, the
noise key's id and the stack. It names no worker, host or time, so that the same run gives the same bytes
everywhere. Under anonymize the manifest's digest is a MAC and the stems are pseudonyms.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from boomerang_batch import storage
from boomerang_batch.config.pipeline import Recipe
from boomerang_batch.errors import ObjectExistsError, ObjectMissingError, RunMismatchError, VerificationError

RECORD_NAME = "run.json"
SHEET_NAME = "contact-sheet.png"
REPORT_NAME = "report.html"
LOGS_NAME = "logs"
FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """The frozen facts of a run."""

    name: str
    recipe: Mapping[str, Any]
    recipe_digest: str
    manifest_digest: str
    limit: int | None
    shards: tuple[str, ...]
    """Stems of every shard the output must have in the end, sorted."""
    model_digest: str
    noise_key_id: str
    stack: Mapping[str, str]
    accepted_stacks: tuple[Mapping[str, str], ...] = ()
    """Other stacks the run was resumed on, because the user asked for it."""

    def to_bytes(self) -> bytes:
        """The file's content: JSON with sorted keys."""
        data = {"format_version": FORMAT_VERSION, **dataclasses.asdict(self)}
        return (json.dumps(data, indent=2, sort_keys=True) + "\n").encode()


def read_record(out: str) -> RunRecord | None:
    """The record of the run in `out`; None when there is none. Raises RunMismatchError when unreadable."""
    url = storage.join(out, RECORD_NAME)
    try:
        data = json.loads(storage.read_bytes(url))
        if not isinstance(data, dict):
            raise TypeError("it is no JSON object")
        version = data.pop("format_version")
        if version != FORMAT_VERSION:
            raise RunMismatchError(f"{url} has format_version {version}; this release knows {FORMAT_VERSION}")
        data["shards"] = tuple(data["shards"])
        data["accepted_stacks"] = tuple(data["accepted_stacks"])
        record = RunRecord(**data)
        if not all(isinstance(part, dict) for part in (record.recipe, record.stack, *record.accepted_stacks)):
            raise TypeError("recipe and stack are no JSON objects")
        return record
    except ObjectMissingError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise RunMismatchError(f"{url} is not a run record ({error}); use an empty OUT") from error


def require_record(out: str) -> RunRecord:
    """`read_record`, for those who can't do without."""
    record = read_record(out)
    if record is None:
        raise VerificationError(f"{out}: no {RECORD_NAME}, so this is not the output of a run")
    return record


def recorded_recipe(out: str, record: RunRecord) -> Recipe:
    """The recipe of the run in `out`; of its model's folder it has only the name. Raises VerificationError."""
    try:
        return Recipe.model_validate_json(json.dumps({"name": record.name, **record.recipe}))
    except ValidationError as error:
        detail = "run.json holds no recipe that this release knows; use the release that wrote it"
        raise VerificationError(f"{out}: {detail}") from error


def open_record(
    out: str,
    wanted: RunRecord,
    *,
    digest_over: Callable[[Collection[str]], str],
    extend: bool,
    accept_stack: bool,
) -> RunRecord:
    """Make OUT's record, or check that the run in OUT is the one wanted.

    `digest_over` gives the wanted manifest's digest over the shards of some stems alone. `extend` lets a
    manifest add shards; `accept_stack` lets another stack go on, and writes that down. Raises RunMismatchError
    naming everything that differs.
    """
    url = storage.join(out, RECORD_NAME)
    there = read_record(out)
    if there is None:
        try:
            storage.create_only(url, wanted.to_bytes())
        except ObjectExistsError:
            return open_record(out, wanted, digest_over=digest_over, extend=extend, accept_stack=accept_stack)
        return wanted

    merged = dataclasses.replace(wanted, stack=there.stack, accepted_stacks=there.accepted_stacks)
    known_stacks = (there.stack, *there.accepted_stacks)
    if wanted.stack not in known_stacks and accept_stack:
        merged = dataclasses.replace(merged, accepted_stacks=(*there.accepted_stacks, wanted.stack))
    differences = [
        *_manifest_differences(there, wanted, digest_over=digest_over, extend=extend),
        *_differences(there, wanted, accept_stack=accept_stack),
    ]
    if differences:
        raise RunMismatchError(
            f"{out} holds another run: {'; '.join(differences)}. Use an empty OUT, or put back what differs"
        )
    if merged != there:
        storage.publish_bytes(merged.to_bytes(), url)
    return merged


def _manifest_differences(
    there: RunRecord, wanted: RunRecord, *, digest_over: Callable[[Collection[str]], str], extend: bool
) -> Iterator[str]:
    added, gone = set(wanted.shards) - set(there.shards), set(there.shards) - set(wanted.shards)
    if gone and wanted.limit == there.limit:
        yield f"manifest ({len(gone)} shard(s) of the run are not in it)"
    elif added and not extend and wanted.limit == there.limit:
        yield f"manifest ({len(added)} shard(s) more than the run has; --extend accepts that)"
    elif not gone and digest_over(there.shards) != there.manifest_digest:
        yield "manifest (the same stems, but other files)"
    if wanted.limit != there.limit and not (extend and not gone):
        yield f"limit ({there.limit} there, {wanted.limit} now)"


def _differences(there: RunRecord, wanted: RunRecord, *, accept_stack: bool) -> Iterator[str]:
    if wanted.recipe_digest != there.recipe_digest:
        yield "recipe " + ", ".join(_diff(there.recipe, wanted.recipe))
    if wanted.model_digest != there.model_digest:
        whose = "model weights or settings" + (", or the energy's" if "energy" in wanted.recipe else "")
        yield f"{whose} ({there.model_digest[:12]} there, {wanted.model_digest[:12]} now)"
    if wanted.noise_key_id != there.noise_key_id:
        yield f"secret or seed ({there.noise_key_id} there, {wanted.noise_key_id} now)"
    if not accept_stack and wanted.stack not in (there.stack, *there.accepted_stacks):
        yield (
            "stack " + ", ".join(_diff(there.stack, wanted.stack)) + " (--accept-stack goes on, and records it)"
        )


def _diff(there: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name in sorted(there.keys() | wanted.keys()):
        old, new = there.get(name), wanted.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _diff(old, new, f"{prefix}{name}.")
        elif old != new:
            yield f"{prefix}{name} ({old} there, {new} now)"
