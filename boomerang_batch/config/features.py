"""What every field of a recipe means for privacy: the one place where features state their accounting.

`accounting` puts together what is stated here, by the theory in its docstring; audits read the result. A test
fails for a field of the recipe that has no entry. x_t is the source after its noise, alpha_t x_0 + sigma_t eps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from boomerang_batch.config.blocks import ENTRY_POINT
from boomerang_batch.config.pipeline import FromField, Recipe

_METHODS_WITH_A_BOUND = frozenset({"boomerang"})


@dataclass(frozen=True, kw_only=True)
class Feature:
    """How one field of the recipe is accounted for."""

    says: str
    """The accounting, for every value the field may have."""
    reason: Callable[[Recipe, bool], str | None] = lambda recipe, latent: None
    """Why this recipe (on a latent model or not) has no certified bound."""
    in_picture: bool = False
    """Whether that is because a picture shows more of its source than x_t, to whoever looks at it alone."""
    note: Callable[[Recipe], str | None] = lambda recipe: None
    within: Callable[[Recipe], Iterable[str]] = lambda recipe: ()


KNOWN = ("the shard", "grey or colour")
"""What no field turns off: a shard's records stay together, and a grey picture stays grey."""

ALWAYS = (
    "This is the only release: another recipe under the same secret draws noise of its own, which adds up like "
    "a further variant.",
    "The model's weights don't depend on the record: a model that was trained on it may remember it.",
    "A bound is for each record, not for a person of whom there are several.",
    "That a record failed is told, and why, though never its pixels.",
)


def _field_policy(recipe: Recipe) -> Iterable[str]:
    for listed, kind in ((recipe.fields.fields, "the field"), (recipe.fields.json_keys, "the json key")):
        for name, action in listed.items():
            if action == "keep":
                yield f"{kind} {name}"
            if action == "pseudonymize":
                yield f"which records share a value of {kind} {name}"


def _t_from_field(recipe: Recipe, latent: bool) -> str | None:
    values = (level.unit[1] for level in recipe.levels)
    fields = sorted({value.field for value in values if isinstance(value, FromField)})
    if not fields:
        return None
    return (
        f"t comes from the field {', '.join(fields)}: how noisy an output is tells of the record's own "
        "value, and no least noise is promised; give one number, or draw it with uniform"
    )


def _if(condition: Callable[[Recipe], bool], text: str) -> Callable[[Recipe, bool], str | None]:
    return lambda recipe, latent: text if condition(recipe) else None


def _not_in_output(*paths: str) -> dict[str, Feature]:
    return dict.fromkeys(paths, Feature(says="is not in the output"))


def _fixed_before(*paths: str) -> dict[str, Feature]:
    says = "is the same for all records and fixed before any is seen; published with the recipe"
    return dict.fromkeys(paths, Feature(says=says))


def _post_processing(*paths: str) -> dict[str, Feature]:
    says = "works on what was made of x_t: post-processing, which tells nothing more of the source"
    return dict.fromkeys(paths, Feature(says=says))


def _before_noise(*paths: str) -> dict[str, Feature]:
    says = "is done before noise is added: distances are taken between images after it"
    return dict.fromkeys(paths, Feature(says=says))


_UNITS = ("fraction", "timestep", "sigma", "snr")

_OF_CODES = Feature(says="goes with methods that look at the source at every step: no certified bound")

_FEATURES: Mapping[str, Feature] = {
    **_not_in_output(
        "format_version",
        "description",
        "run.workers",
        "run.max_attempts",
        "run.start_timeout_s",
        "run.load_deadline_s",
        "run.step_deadline_s",
        "run.journal_every",
        "run.on_error.max_failed_samples",
        "run.on_error.max_failed_shards",
        "run.gate.max_rank1",
        "run.gate.max_tar",
        "run.gate.max_fd",
        "run.gate.min_label_agreement",
        "run.gate.samples",
        "run.gate.embedders",
    ),
    "purpose": Feature(
        says="anonymize alone hides names, and drops what is not listed",
        reason=_if(
            lambda recipe: recipe.purpose != "anonymize",
            "the purpose is not anonymize: keys and fields travel, and name each output's source",
        ),
    ),
    "seed": Feature(
        says="a published seed is no noise: whoever has it re-runs each candidate and compares",
        reason=_if(
            lambda recipe: recipe.seed is not None,
            "the noise is drawn from a published seed, with which anyone can re-run the candidates",
        ),
    ),
    "method": Feature(
        says="boomerang noises the source once for each variant; others look at it at every step",
        reason=_if(
            lambda recipe: recipe.method not in _METHODS_WITH_A_BOUND,
            "the method looks at the source again after noising it",
        ),
        in_picture=True,
    ),
    **dict.fromkeys(
        (
            *(f"target.{name}" for name in ("label", "prompt", "guidance")),
            *(f"target.{name}" for name in ("trials", "select", "classifier", "shift.by", "shift.over")),
            *(f"target.refine.{name}" for name in ("steps", "eta", *(f"t.{unit}" for unit in _UNITS))),
        ),
        _OF_CODES,
    ),
    "target.field": Feature(
        says="is used for each record, so candidates are records of one target; no certified bound",
        within=lambda recipe: (
            [f"the target in {recipe.target.field}"]
            if recipe.target and recipe.target.field is not None
            else []
        ),
    ),
    # Led to a class a step is a function of x_t, weights and class, so it tells no more of the source than x_t
    # does. Led away from the source it looks at the source itself, at every step.
    "energy.toward.label": Feature(
        says="works on what was made of x_t: post-processing, which tells nothing more of the source",
        note=lambda recipe: (
            "The installed energy is trusted: it must look at the images that it is given alone."
            if recipe.energy is not None and recipe.energy.source.startswith(ENTRY_POINT)
            else None
        ),
    ),
    "energy.toward.field": Feature(
        says="is used for each record, so the bound holds among records of one class to be led to",
        within=lambda recipe: (
            [f"the label in {toward.field}"]
            if recipe.energy and (toward := recipe.energy.toward) and toward.field is not None
            else []
        ),
    ),
    "energy.away_from": Feature(
        says="looks at the source at every step, to lead away from it: no certified bound",
        reason=_if(
            lambda recipe: recipe.energy is not None and recipe.energy.away_from is not None,
            "the energy looks at the source again after noising it, at every step, to lead away from it",
        ),
        in_picture=True,
    ),
    **dict.fromkeys(
        ("interpolate.partner", "interpolate.partner.field", "interpolate.same"),
        Feature(says="says which other record each output shows beside its own: no certified bound for either"),
    ),
    "interpolate.weights": Feature(
        says="says how much of each of two records an output shows: no certified bound for either",
        note=lambda recipe: (
            "An image between two persons' is a picture of both: either may be recognized in it, and whoever "
            "knows one of them sees what the other brought."
            if recipe.interpolate is not None
            else None
        ),
    ),
    **dict.fromkeys(
        ("unseen.weight", "unseen.tolerance", "unseen.max_tries", "unseen.references"),
        Feature(
            says="new latents follow a fit of all records and are held against some of them: no certified bound"
        ),
    ),
    # What the mechanism is.
    **dict.fromkeys(
        (f"t.{unit}" for unit in _UNITS),
        Feature(says="sets sigma of each observation; of a list every variant has its own: sum 1 / sigma_i^2"),
    ),
    **dict.fromkeys(
        (f"t.{unit}.uniform" for unit in _UNITS),
        Feature(says="is drawn by the secret noise key, whatever the record; counts as the least noise in it"),
    ),
    **dict.fromkeys(
        (f"t.{unit}.field" for unit in _UNITS),
        Feature(says="may depend on the record, and shows in its noise: no certified bound"),
    ),
    "t.fraction.field": Feature(
        says="may depend on the record, and shows in its noise: no certified bound",
        reason=_t_from_field,
        in_picture=True,
    ),
    **dict.fromkeys(
        ("steps", "grid", "start"),
        Feature(
            says="decides on which node t lands: the bound takes sigma of that node, not of the t asked for"
        ),
    ),
    "variants": Feature(says="K variants are K observations under independent noise: mu grows by sqrt(K)"),
    "identity": Feature(
        says="names a record for its noise; two records under one name would share it",
        note=lambda recipe: (
            "Equal images give equal outputs, which tells that they are equal."
            if recipe.identity == "content"
            else None
        ),
    ),
    **_post_processing("passes.count", "passes.outputs"),  # later passes start from the first one's output
    # The way back.
    **_post_processing("sampler.order", "sampler.variance", "sampler.clip"),
    "sampler.eta": Feature(
        says="is post-processing at any value; without fresh noise it can be undone, and attacks get there",
        note=lambda recipe: (
            f"eta {recipe.sampler.eta:g} adds less noise on the way back than eta 1 (at 0 none, and x_t can be "
            "computed from the output): attacks come closer to the bound; prefer eta 1."
            if recipe.sampler.eta < 1 and recipe.method in _METHODS_WITH_A_BOUND
            else None
        ),
    ),
    **_fixed_before("name", "sampler.data_variance"),
    # The model, which must not know the record.
    "model.source": Feature(
        says="is supposed not to have been trained on the record",
        note=lambda recipe: (
            "The installed denoiser is trusted: encode sees the source, and denoise must look at x_t alone."
            if recipe.model.source.startswith(ENTRY_POINT)
            else None
        ),
    ),
    **_fixed_before(
        "energy.source",
        "energy.options",
        "energy.scale",
        "energy.range",
        "model.options",
        "model.revision",
        "model.subfolder",
        "model.patch_size",
        "model.dtype",
        "model.channels_last",
        "model.compile",
        "model.prompts.text",
        "model.prompts.negative",
        "model.prompts.guidance",
        "model.prompts.rescale",
        "model.class_labels.null_label",
        "model.class_labels.guidance",
        "batch_size",
        "batching",
    ),
    "model.class_labels.field": Feature(
        says="is used for each record, so the bound holds among records of one label",
        within=lambda recipe: [f"the label in {c.field}"] if (c := recipe.model.class_labels) else [],
    ),
    "model.prompts.field": Feature(
        says="is used for each record, so the bound holds among records of one prompt, and says nothing of "
        "what the prompt itself gives away",
        within=lambda recipe: (
            [f"the prompt in {c.field}"] if (c := recipe.model.prompts) and c.field is not None else []
        ),
    ),
    **_before_noise(
        "model.autoencoder.scale",
        "model.autoencoder.float32",
        "model.autoencoder.batch_size",
        "images.field",
        "images.resize",
        "images.max_pixels",
        "upscale.factor",
        "upscale.filter",
    ),
    **_post_processing("model.safety"),  # its verdict is on the output, not on the source
    # What of the source comes along.
    "keep_originals": Feature(
        says="publishes the sources",
        reason=_if(lambda recipe: recipe.keep_originals, "the originals are kept beside their variants"),
    ),
    "images.restore_size": Feature(
        says="gives the output its source's size, which is thereby known",
        within=lambda recipe: (
            ["width and height"] if recipe.images.restore_size or recipe.images.tiles is not None else []
        ),
    ),
    "images.sizes": Feature(
        says="an output's size tells its bucket",
        within=lambda recipe: ["the size bucket"] if recipe.images.sizes else [],
    ),
    "images.format": Feature(
        says="input gives the output its source's format, which is thereby known",
        within=lambda recipe: ["the image format"] if recipe.images.format == "input" else [],
    ),
    **_post_processing("images.quality"),
    "images.alpha": Feature(
        says="flattened or refused it is done before noise is added; kept it is the source's own",
        reason=_if(
            lambda recipe: recipe.images.alpha == "keep", "the source's alpha channel is carried over as it is"
        ),
        in_picture=True,
    ),
    "images.tiles.overlap": Feature(
        says="tiles of pixels share one noise field and are one observation, distances being taken with the "
        "margins that mirror small pictures; a latent model encodes each tile apart, and where two overlap "
        "different latents under equal noise leave their difference bare",
        reason=lambda recipe, latent: (
            "tiles are encoded apart, and where they overlap the difference of their latents is without noise"
            if recipe.images.tiles is not None and latent
            else None
        ),
        in_picture=True,
    ),
    "upscale.consistent": Feature(
        says="projects onto the source again, after the noise",
        reason=_if(
            lambda recipe: recipe.upscale is not None and recipe.upscale.consistent,
            "upscale.consistent looks at the source again: each output shrinks to exactly its source",
        ),
        in_picture=True,
    ),
    **dict.fromkeys(
        ("region.field", "region.json_key"),
        Feature(
            says="the bound is for the region's pixels alone; the outside is published as it is, and steers "
            "the way back from a picture in which the region is blank",
            within=lambda recipe: ["the region and all outside it"] if recipe.region else [],
        ),
    ),
    "region.feather": Feature(says="blends outside the region only, where all is published anyway"),
    "fields.default": Feature(
        says="other than drop, whatever comes travels",
        reason=_if(
            lambda recipe: recipe.fields.default in ("keep", "pseudonymize"),
            "fields.default lets fields travel that nobody listed",
        ),
    ),
    "fields.fields": Feature(says="what travels is known of the record", within=_field_policy),
    "fields.json_keys": Feature(says="what travels is known of the record", within=_field_policy),
}

FEATURES: Mapping[str, Feature] = {
    **_FEATURES,
    **{f"target.{path}": _OF_CODES for path in _FEATURES if path.startswith("model.")},
}
"""Every field of the recipe by its dotted path, with its accounting. A new field needs its own entry."""
