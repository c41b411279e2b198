"""Where an image came from and how it was made, in plain words, from its provenance row and what leads back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from boomerang_batch.audit.origin import Origin, find_origins, require_links
from boomerang_batch.config.energy import EnergySpec
from boomerang_batch.config.mixing import MIXING
from boomerang_batch.config.pipeline import Recipe, Target
from boomerang_batch.config.targets import BY_CODES
from boomerang_batch.data.provenance import Row
from boomerang_batch.run.naming import member_key
from boomerang_batch.run.record import recorded_recipe, require_record

_CODE = "its code begins there, and each step was fed that code's own noise"
_BEGINS = {
    "interpolate": "DDIM inversion led the source and its partner up to there, and what lies between the two "
    "was led down again: the image shows both",
    "unseen": "a new latent was drawn there, like those that DDIM inversion found of all samples of the run, "
    "and led down; the source gave its place, and what unseen.weight leaves of its own latent",
}
"""What the walk back began from, by method."""
_MIXED_BY = {
    "interpolate": "seed or secret tells who is whose partner, and draws what noise eta adds",
    "unseen": "seed or secret draws the new latents, and what noise eta adds; whoever has it and all sources "
    "can draw them again",
}
_OF_SEVERAL = " (of each variant, in their order)"


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """All that can be told about one row, in words by subject and as it is recorded."""

    origin: Origin
    words: Mapping[str, str]

    def facts(self) -> dict[str, Any]:
        """As JSON has it."""
        origin = self.origin
        return {
            "shard": origin.shard,
            "source": {"key": origin.source_key, "url": origin.source_url, "offset": origin.offset},
            "noise_share": noise_share(origin.row.sigma),
            "row": dataclasses.asdict(origin.row) | {"detail": origin.detail},
            "words": dict(self.words),
        }


def explain(out: str, *, key: str, private_dir: str | None, shard: str | None = None) -> list[Explanation]:
    """Every row that `key` stands for, explained.

    Raises PrivateDirError where OUT is anonymized and its private dir is not given, ConfigError for a key that
    is none.
    """
    record = require_record(out)
    require_links(out, record, private_dir)
    recipe = recorded_recipe(out, record)
    origins = find_origins(out, record, key=key, private_dir=private_dir, shard=shard)
    return [Explanation(origin=origin, words=dict(_words(origin, recipe))) for origin in origins]


def noise_share(sigma: float | None) -> float | None:
    """How much of the power of what the walk back began from was noise, where the source's counts as 1."""
    return None if sigma is None else sigma**2 / (1 + sigma**2)


def _words(origin: Origin, recipe: Recipe) -> Iterator[tuple[str, str]]:
    row = origin.row
    member = member_key(recipe, row.key or "", row.variant)
    yield "image", f"{member} in shard {origin.shard}, variant {row.variant}"
    yield "status", _status(origin)
    yield "source", _source(origin)
    if row.status == "ok" and recipe.method in MIXING and origin.detail:
        yield "mixed", f"{origin.detail}{_OF_SEVERAL * (origin.detail.count('; ') > 0)}"
    if row.status == "ok":
        yield "distance", _distance(row, recipe)
        yield "walk", _walk(row, recipe)
        yield "model", f"{recipe.model.source}, digest {row.model_digest[:16]}"
        yield "told", _told(row, recipe)
        if recipe.energy is not None:
            yield "led", _led(recipe.energy)
        yield "noise", _noise(row, recipe)
    if row.status in ("ok", "original"):
        yield "dropped", _dropped(row, recipe)
    yield "recipe", f"purpose {recipe.purpose}, digest {row.recipe_digest[:16]}; made by {row.versions}"


def _status(origin: Origin) -> str:
    row = origin.row
    mended = "; made anew in an appendix after it had failed" if origin.shard != origin.stem else ""
    why = f"{row.reason}{f': {origin.detail}' if origin.detail else ''}"
    return {
        "ok": f"ok: an image of {row.width}x{row.height} pixels was made{mended}",
        "original": "original: the source's own bytes, kept beside what was made of it",
        "failed": f"failed, so there is no image ({why})",
        "unreadable": f"unreadable: the source's tar is broken there ({why})",
        "dropped": f"dropped: an image was made and left out, as the recipe wants ({why})",
    }[row.status]


def _source(origin: Origin) -> str:
    if origin.source_url is None:
        return f"sample {origin.source_key} of the manifest's shard {origin.stem}"
    return f"sample {origin.source_key} in {origin.source_url}, from byte {origin.offset}"


def _distance(row: Row, recipe: Recipe) -> str:
    if row.node is None:
        if row.evaluations == 0:
            return "none: the region to change is empty, so these are the source's own pixels"
        return "OUT does not tell: each sample's own field said how far, and that field does not travel"
    if recipe.method != "boomerang" and row.node:
        return f"t {row.t}, node {row.node}: {_BEGINS.get(recipe.method, _CODE)}"
    if row.node and recipe.looks_again:
        return (
            f"t {row.t}, node {row.node}: noise was laid over the source there, and each step back looked at "
            "the source again, to lead away from it"
        )
    if row.node == 0 or row.sigma is None:
        return f"t {row.t}: none; the image was decoded and written again, and no noise was added"
    share = noise_share(row.sigma) or 0.0
    each = ", in each pass" if (row.passes or 1) > 1 else ""
    region = "; only the region that the recipe names was changed" if recipe.region is not None else ""
    return (
        f"t {row.t}, node {row.node}: noise of sigma {row.sigma:.4g} (times the clean signal's scale) was laid "
        f"over the source{each}, so of the power that the walk back began from {share:.1%} was noise and "
        f"{1 - share:.1%} the source's, whose own counts as 1{region}"
    )


def _walk(row: Row, recipe: Recipe) -> str:
    if row.evaluations is None:
        made = "a number of network calls that OUT does not tell"
    else:
        made = f"{row.evaluations} network call{'s' * (row.evaluations != 1)}"
    passes = f" in {row.passes} passes" if (row.passes or 1) > 1 else ""
    drawn = row.eta != 0 and recipe.method not in BY_CODES
    fresh = "new noise at each step back" if drawn else "no new noise on the way back"
    refine = recipe.target.refine if recipe.target is not None else None
    if refine is not None:
        unit, value = refine.t.t.unit
        fresh += f", and then Boomerang on the result, from t {unit}={value} with eta {refine.eta:g}"
    computed = "" if row.dtype is None else f"; computed in {row.dtype}"
    flagged = {True: "; the safety checker objects to it", False: "; the safety checker has no objection"}
    return f"{made}{passes} with sampler {row.sampler}, eta {row.eta:g}: {fresh}{computed}" + flagged.get(
        bool(row.flagged), ""
    ) * (row.flagged is not None)


def _told(row: Row, recipe: Recipe) -> str:
    target = recipe.target
    if target is not None and target.tells:
        return f"{_became(row, target)}; its code was found under what its source is"
    labels, prompts = recipe.decoded_by.class_labels, recipe.decoded_by.prompts
    if labels is not None:
        if row.label is None:
            return (
                f"a label, from field {labels.field}; OUT does not tell which, for that field does not travel"
            )
        return f"label {row.label}, from field {labels.field}"
    if prompts is None:
        return "nothing: the model takes no label and no prompt"
    if prompts.field is not None:
        return f"the sample's own text, from field {prompts.field}"
    return f"the prompt {prompts.text!r}" if prompts.text else "an empty prompt"


def _became(row: Row, target: Target) -> str:
    if target.field is None:
        return (
            f"label {target.label}, as all"
            if target.prompt is None
            else f"the prompt {target.prompt!r}, as all"
        )
    return (
        f"{'what it was to become' if row.label is None else f'label {row.label}'}, from field {target.field}"
    )


def _led(energy: EnergySpec) -> str:
    to = "away from the source"
    if energy.toward is not None:
        to = f"to class {energy.toward.label}"
    if energy.toward is not None and energy.toward.field is not None:
        to = f"to the class in field {energy.toward.field}"
    low, high = energy.range
    return (
        f"{to}, by {energy.source} with scale {energy.scale:g} between {low:g} and {high:g} of the noise chain"
    )


def _noise(row: Row, recipe: Recipe) -> str:
    if recipe.method in MIXING:
        return f"key id {row.noise_key_id}: {_MIXED_BY[recipe.method]}"
    by = {"key": "its key", "shard+key": "its shard and key", "content": "its bytes"}[recipe.identity]
    if recipe.purpose == "anonymize":
        return (
            f"key id {row.noise_key_id}: keyed by the private dir's secret and, of the sample, {by}; without "
            "the secret nobody can draw it again"
        )
    return (
        f"key id {row.noise_key_id}: keyed by the recipe's public seed and, of the sample, {by}; whoever has "
        "the source can draw it again"
    )


def _dropped(row: Row, recipe: Recipe) -> str:
    """What did not come along from the source, as the recipe says; which fields it had, it alone tells."""
    listed, keys = recipe.fields.fields, recipe.fields.json_keys
    default = recipe.fields.default or ("drop" if recipe.purpose == "anonymize" else "keep")
    image = (
        "of the image file nothing"
        if row.status == "original"
        else "of the image file all metadata (EXIF, GPS, XMP, IPTC, profile, comments, thumbnail)"
    )
    kept = sorted(name for name, action in listed.items() if action == "keep")
    masked = sorted(name for name, action in listed.items() if action == "pseudonymize")
    gone = sorted(name for name, action in listed.items() if action == "drop")
    if keys:
        kept.append(
            f"json's {', '.join(sorted(name for name, what in keys.items() if what != 'drop')) or 'none'}"
        )
    if default == "drop":
        beside = (
            f"every other field but {', '.join([*kept, *masked])}" if kept or masked else "every other field"
        )
    else:
        beside = f"of the other fields {', '.join(gone) or 'nothing'}"
        if default == "pseudonymize":
            beside += ", and those not listed as keep came along as pseudonyms"
    pseudonyms = f"; {', '.join(masked)} came along as pseudonyms" if masked else ""
    return f"{image}; {beside}{pseudonyms}"
