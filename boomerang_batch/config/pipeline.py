"""The recipe: what a pipeline file may say, checked, frozen, and reduced to one digest.

A recipe has two blocks. Everything at the top level determines the output's bytes and enters the canonical
form, whose SHA-256 is the recipe digest; the `run:` block is operational and never does. The canonical form
spells out every default and carries `format_version`, so a later release with other defaults still
recognises a run made today. Recipes are data: plain YAML, no code, no unknown or repeated keys.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, ValidationError, model_validator

from boomerang_batch.config import strict_yaml
from boomerang_batch.config.blocks import (
    ENTRY_POINT,
    Autoencoder,
    ClassLabels,
    FieldAction,
    FieldPolicy,
    ImagePolicy,
    ModelSpec,
    Passes,
    Prompts,
    Region,
    RunOptions,
    Sampler,
    Tiles,
    Upscale,
)
from boomerang_batch.config.energy import EnergySpec, Toward
from boomerang_batch.config.forms import Block, FromField, Spread, T, matching, one_or_list
from boomerang_batch.config.messages import explain
from boomerang_batch.config.mixing import MIXING, Interpolate, Unseen, check_mixing
from boomerang_batch.config.targets import Target, check_codes
from boomerang_batch.errors import RecipeError

FORMAT_VERSION: Literal[1] = 1

_Grid = Annotated[
    Annotated[
        Literal[
            "leading", "trailing", "linspace", "step-linear", "step-quadratic", "var-linear", "var-quadratic"
        ],
        Tag("<one>"),
    ]
    | Annotated[tuple[int, ...], Tag("<list>")],
    Discriminator(one_or_list),
]
_BatchSize = Annotated[
    Annotated[int, Field(ge=1, le=4096), Tag("<number>")] | Annotated[Literal["auto"], Tag("<name>")],
    Discriminator(lambda value: "<name>" if value == "auto" else "<number>"),
]


class Recipe(Block):
    """One pipeline file."""

    format_version: Literal[1] = 1
    name: Annotated[
        str,
        matching("[a-z0-9][a-z0-9-]{0,62}", "1 to 63 lower-case letters, digits and hyphens, no hyphen first"),
    ]
    description: str = ""
    purpose: Literal["anonymize", "augment", "enhance"]
    method: Literal["boomerang", "dpm-encoder", "edit-friendly", "interpolate", "unseen"] = "boomerang"
    target: Target | None = Field(None, description="what codes are decoded to; null: to their own image")
    energy: EnergySpec | None = Field(None, description="what guides each step by a gradient; null: nothing")
    interpolate: Interpolate | None = Field(None, description="for method interpolate, which needs it")
    unseen: Unseen | None = Field(None, description="for method unseen, which needs it")
    model: ModelSpec
    t: Annotated[
        Annotated[T, Tag("<one>")] | Annotated[tuple[T, ...], Tag("<list>")], Discriminator(one_or_list)
    ] = Field(description="one for all variants, or a list with one for each")
    steps: int = Field(ge=1, description="size of the full grid, S")
    grid: _Grid = "linspace"
    start: Literal["exact", "snap", "diffusers-strength"] = "exact"
    sampler: Sampler = Sampler()
    passes: Passes = Passes()
    variants: int = Field(1, ge=1, le=1000)
    keep_originals: bool = False
    identity: Literal["key", "shard+key", "content"] = "key"
    seed: int | None = Field(None, ge=0, lt=2**63, description="for purposes other than anonymize")
    images: ImagePolicy = ImagePolicy()
    upscale: Upscale | None = None
    region: Region | None = None
    fields: FieldPolicy = FieldPolicy()
    batch_size: _BatchSize = Field(
        16, description="slots: the fixed shape of every forward pass; auto: probed once and frozen"
    )
    batching: Literal["fixed", "elastic"] = Field(
        "fixed", description="elastic: smaller batches at the very end and when memory runs out"
    )
    run: RunOptions = RunOptions()

    @model_validator(mode="after")
    def _purpose_fits(self) -> Recipe:
        if self.purpose != "anonymize":
            if self.seed is None:
                raise ValueError(f"purpose {self.purpose} needs a seed")
            return self
        if self.seed is not None:
            raise ValueError(
                "purpose anonymize draws its noise under the private dir's secret; a seed in the recipe "
                "would let anyone re-run the candidates: remove seed"
            )
        if self.fields.default not in (None, "drop"):
            raise ValueError(
                "fields.default other than drop would publish whatever comes; list what may travel"
            )
        if self.images.alpha == "keep":
            raise ValueError(
                "images.alpha keep would publish the source's own alpha channel; flatten or refuse"
            )
        if self.keep_originals:
            raise ValueError("keep_originals would publish what purpose anonymize is to hide")
        if self.upscale is not None and self.upscale.consistent:
            raise ValueError(
                "upscale.consistent makes each output shrink to exactly its source, which purpose anonymize "
                "is to hide: remove it"
            )
        for level in self.levels:
            if level.least_noise is not None and level.least_noise[1] == 0:
                raise ValueError(
                    f"t {level.unit[0]} 0 comes to 0 evaluations, which gives back the input: nothing would be "
                    "anonymized; use more, and let a uniform t begin above 0"
                )
        return self

    @model_validator(mode="after")
    def _method_fits(self) -> Recipe:
        check_mixing(self)
        check_codes(self)
        return self

    @model_validator(mode="after")
    def _t_fits(self) -> Recipe:
        if self.start == "diffusers-strength" and any(t.unit[0] != "fraction" for t in self.levels):
            raise ValueError("start diffusers-strength reads t as img2img's strength: give t as a fraction")
        if isinstance(self.t, tuple) and len(self.t) != self.variants:
            raise ValueError(f"t lists {len(self.t)} levels for {self.variants} variants; give one for each")
        return self

    @model_validator(mode="after")
    def _region_fits(self) -> Recipe:
        if self.region is None:
            return self
        if self.images.resize == "cover" and self.images.tiles is None:
            raise ValueError(
                "images.resize cover crops, and what lies outside the region must come back whole; "
                "with region set images.resize to contain, stretch or pad"
            )
        if not self.images.restore_size:
            raise ValueError(
                "region gives back the pixels outside it as they came, which needs their size: "
                "remove images.restore_size: false"
            )
        if self.upscale is not None:
            raise ValueError(
                "region gives back the pixels outside it as they came, and upscale makes all of them anew; "
                "remove one of them"
            )
        if self.region.field in [name.strip() for name in self.images.field.split(";")]:
            raise ValueError(f"region.field {self.region.field} is the image's own field; name the mask's")
        return self

    @property
    def levels(self) -> tuple[T, ...]:
        """How far out each variant goes: one t for all, or one each."""
        return self.t if isinstance(self.t, tuple) else (self.t,)

    @property
    def looks_again(self) -> bool:
        """Whether the way back looks at the source again, and not at x_t alone."""
        away = self.energy is not None and self.energy.away_from is not None
        return away or self.method != "boomerang"

    @property
    def outputs(self) -> int:
        """Outputs made of one sample: variants, times passes where each pass is an output."""
        return self.variants * (self.passes.count if self.passes.outputs == "all" else 1)

    @property
    def decoded_by(self) -> ModelSpec:
        """The model that codes are decoded with: its guidance, or it itself, may be the target's own."""
        target = self.target
        if target is None:
            return self.model
        if target.model is not None:
            return target.model
        return self.model if target.guidance is None else self.model.guided(target.guidance)

    @property
    def drawn_under(self) -> tuple[str, ...]:
        """The fields that say under which class or prompt a sample is drawn, its own or what it becomes."""
        models = (self.model, self.decoded_by)
        labels = (one.class_labels.field for one in models if one.class_labels is not None)
        prompts = (one.prompts.field for one in models if one.prompts is not None)
        toward = None if self.energy is None or self.energy.toward is None else self.energy.toward.field
        target = None if self.target is None else self.target.field
        named = [name for name in (*labels, *prompts, toward, target) if name is not None]
        return tuple(dict.fromkeys(named))

    def variant_of(self, number: int) -> int:
        """The variant that an output's number belongs to: each pass may be an output."""
        return number // (self.passes.count if self.passes.outputs == "all" else 1)

    def canonical(self) -> dict[str, Any]:
        """Every output-determining field, defaults spelled out; what the digest is taken over.

        Of a model's folder only the name: where it lies is its owner's business, and the model digest, which
        is recorded beside, says better which model it is.
        """
        full = self.model_dump(mode="json", exclude={"run", "description", "name"})
        levels = [level.model_dump(mode="json", exclude_unset=True) for level in self.levels]
        full["t"] = levels if isinstance(self.t, tuple) else levels[0]
        for name in ("target", "energy", *MIXING):
            if full[name] is None:
                del full[name]  # which format version 1 has not always had, and runs are known by their digest
        if self.target is not None:
            full["target"] = self.target.canonical()
        for place in (full, full.get("target", {})):
            if "model" in place:
                place["model"]["source"] = _placeless(place["model"])
        return full

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the canonical form as compact JSON with sorted keys."""
        text = json.dumps(self.canonical(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def _placeless(model: dict[str, Any]) -> str:
    """A model's source without where its folder lies."""
    source: str = model["source"]
    known = model["revision"] is not None or source.startswith(("shipped:", ENTRY_POINT))
    return source if known else PurePath(source).name or "."


def parse_recipe(text: str, *, source: str, overrides: Sequence[str] = ()) -> Recipe:
    """Parse a pipeline file's text. `overrides` are `dotted.key=value` pairs, values read as YAML.

    Raises RecipeError naming `source`, the field, and for an unknown key the nearest known one.
    """
    try:
        data = strict_yaml.load(text)
    except ValueError as error:
        raise RecipeError(f"{source}: not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise RecipeError(f"{source}: a recipe is a mapping of fields, this is {type(data).__name__}")
    for override in overrides:
        _apply_override(data, override)
    try:
        # JSON mode lets YAML lists stand for tuples while numbers stay strict: 1 is no bool, "1" no int.
        # Dates, which YAML makes of 2020-01-01, become the text they were.
        return Recipe.model_validate_json(json.dumps(data, default=str))
    except ValidationError as error:
        raise RecipeError(f"{source}: {explain(error.errors(), Recipe)}") from error
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{source}: {' '.join(str(error).split())}") from error


def _apply_override(data: dict[str, Any], override: str) -> None:
    path, equals, value = override.partition("=")
    if not equals or not path:
        raise RecipeError(f"--set {override}: write it as key=value, for example --set t.fraction=0.4")
    *parents, last = path.split(".")
    if parents[:1] == ["t"]:
        data["t"] = {}  # another unit, or a list of them, gives way as a whole
    node = data
    for name in parents:
        if node.get(name) is None:
            node[name] = {}
        if not isinstance(node[name], dict):
            raise RecipeError(f"--set {override}: {name} is a value, not a block")
        node = node[name]
    try:
        node[last] = strict_yaml.load(value)
    except ValueError as error:
        raise RecipeError(f"--set {override}: the value is not valid YAML: {error}") from error


__all__ = [
    "FORMAT_VERSION",
    "Autoencoder",
    "ClassLabels",
    "FieldAction",
    "FieldPolicy",
    "FromField",
    "ImagePolicy",
    "Interpolate",
    "ModelSpec",
    "Passes",
    "Prompts",
    "Recipe",
    "Region",
    "RunOptions",
    "Sampler",
    "Spread",
    "T",
    "Target",
    "Tiles",
    "Toward",
    "Unseen",
    "Upscale",
    "parse_recipe",
]
