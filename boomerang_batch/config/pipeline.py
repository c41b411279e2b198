"""The recipe: what a pipeline file may say, checked, frozen, and reduced to one digest.

A recipe has two blocks. Everything at the top level determines the output's bytes and enters the canonical
form, whose SHA-256 is the recipe digest; the `run:` block is operational and never does. The canonical form
spells out every default and carries `format_version`, so a later release with other defaults still
recognises a run made today. Recipes are data: plain YAML, no code, no unknown or repeated keys.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from boomerang_batch.config import strict_yaml
from boomerang_batch.errors import RecipeError

FORMAT_VERSION: Literal[1] = 1

FieldAction = Literal["keep", "drop", "pseudonymize"]


class _Block(BaseModel):
    """Strict, frozen, and closed: an unknown key is an error, never a silent default."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class ClassLabels(_Block):
    """How a class-conditional model gets its label."""

    field: str = Field("cls", description="field that holds the integer label")
    null_label: int | None = Field(None, ge=0, description="the label trained to mean 'no class'")
    guidance: float = Field(1.0, ge=0, description="classifier-free guidance weight; 1 means none")

    @model_validator(mode="after")
    def _guidance_needs_a_null_label(self) -> ClassLabels:
        if self.guidance != 1.0 and self.null_label is None:
            raise ValueError("guidance other than 1 needs null_label, the label trained to mean 'no class'")
        return self


class ModelSpec(_Block):
    """Which pretrained model, and how its tensors are laid out."""

    source: str = Field(description="a diffusers folder, a hub id, or shipped:demo/model")
    revision: str | None = Field(
        None, pattern=r"^[0-9a-f]{40}$", description="commit of a hub id; required for one"
    )
    subfolder: str | None = Field(None, description="the network's folder when it is not found by itself")
    patch_size: int = Field(1, ge=1, le=16, description="space-to-depth factor the network was trained with")
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    channels_last: bool = False
    class_labels: ClassLabels | None = None


class T(_Block):
    """How far out to go, with its unit. Exactly one of the four.

    fraction of the training chain in [0, 1] (paper: t_Boom / T), timestep in 0..T as the paper counts it
    (timestep t uses array index t-1; 0 is the identity), sigma = noise std relative to the clean signal, or
    snr = 1 / sigma^2.
    """

    fraction: float | None = Field(None, ge=0, le=1)
    timestep: int | None = Field(None, ge=0)
    sigma: float | None = Field(None, ge=0)
    snr: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _exactly_one_unit(self) -> T:
        if len(self.model_fields_set) != 1 or None in self.unit:
            raise ValueError("t needs exactly one unit: fraction, timestep, sigma or snr")
        return self

    @property
    def unit(self) -> tuple[str, float]:
        """The unit's name and the value given."""
        (name,) = self.model_fields_set
        return name, getattr(self, name)


class Sampler(_Block):
    """The reverse process. eta=1 with fixed_small is the paper's; eta=0 is DDIM, order 2 DPM-Solver++(2M)."""

    eta: float = Field(1.0, ge=0, le=1)
    order: Literal[1, 2] = 1
    variance: Literal["fixed_small", "fixed_large", "optimal"] = "fixed_small"
    data_variance: float | None = Field(
        None, gt=0, description="per-element variance of the data, for `optimal`"
    )
    clip: bool | None = Field(
        None, description="clamp predicted x_0; null: as the model's scheduler config says"
    )

    @model_validator(mode="after")
    def _parts_fit(self) -> Sampler:
        if self.order == 2 and self.eta != 0:
            raise ValueError(f"order 2 (DPM-Solver++(2M)) is defined for eta 0 only; eta is {self.eta}")
        if self.variance != "fixed_small" and self.eta != 1.0:
            raise ValueError(f"variance {self.variance} is defined for eta 1 only; eta is {self.eta}")
        if (self.variance == "optimal") != (self.data_variance is not None):
            raise ValueError("data_variance goes with variance: optimal, and that one needs it")
        return self


class ImagePolicy(_Block):
    """Which member is the image, how it meets the model's size, and how the output is encoded."""

    field: str = Field(
        "jpg;png;jpeg;webp", description="image field; alternatives by ;, a sample must have just one"
    )
    resize: Literal["cover", "contain", "stretch", "pad"] = "cover"
    restore_size: bool = Field(True, description="give back exactly the input's width and height")
    alpha: Literal["refuse", "keep", "black", "white"] = Field(
        "refuse", description="transparency: refuse the sample, carry the channel over, or flatten"
    )
    max_pixels: int = Field(50_000_000, ge=1, description="larger images are refused before decoding")
    format: Literal["input", "png", "jpeg", "webp"] = "input"
    quality: int = Field(95, ge=1, le=100, description="for jpeg and lossy webp; jpeg is always 4:4:4")


class FieldPolicy(_Block):
    """What travels beside the image. A null default means drop under anonymize, keep otherwise."""

    default: FieldAction | None = None
    fields: Mapping[str, FieldAction] = Field(default_factory=dict, description="per field; labels say keep")
    json_keys: Mapping[str, FieldAction] = Field(
        default_factory=dict,
        description="per top-level key of the json field; unlisted ones follow `default`",
    )


class RunOptions(_Block):
    """Operational: none of this can change a byte of the output."""

    workers: int | None = Field(None, ge=1, description="Ray actors; null: one per GPU, else one")
    max_attempts: int = Field(3, ge=1, description="attempts of a shard before it is quarantined")


class Recipe(_Block):
    """One pipeline file."""

    format_version: Literal[1] = 1
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")
    description: str = ""
    purpose: Literal["anonymize", "augment", "enhance"]
    method: Literal["boomerang"] = "boomerang"
    model: ModelSpec
    t: T
    steps: int = Field(ge=1, description="size of the full grid, S")
    grid: Literal["leading", "trailing", "linspace", "step-linear", "step-quadratic"] | tuple[int, ...] = (
        "linspace"
    )
    start: Literal["exact", "snap", "diffusers-strength"] = "exact"
    sampler: Sampler = Sampler()
    variants: int = Field(1, ge=1, le=1000)
    keep_originals: bool = False
    identity: Literal["key", "shard+key", "content"] = "key"
    seed: int | None = Field(None, ge=0, lt=2**63, description="for purposes other than anonymize")
    images: ImagePolicy = ImagePolicy()
    fields: FieldPolicy = FieldPolicy()
    batch_size: int = Field(16, ge=1, le=4096, description="fixed shape of every forward pass")
    run: RunOptions = RunOptions()

    @model_validator(mode="after")
    def _purpose_fits(self) -> Recipe:
        if self.purpose == "anonymize" and self.seed is not None:
            raise ValueError(
                "purpose anonymize draws its noise under the private dir's secret; a seed in the recipe "
                "would let anyone re-run the candidates: remove seed"
            )
        if self.purpose == "anonymize" and self.fields.default not in (None, "drop"):
            raise ValueError(
                "fields.default other than drop would publish whatever comes; list what may travel"
            )
        if self.purpose == "anonymize" and self.images.alpha == "keep":
            raise ValueError(
                "images.alpha keep would publish the source's own alpha channel; flatten or refuse"
            )
        if self.purpose == "anonymize" and self.keep_originals:
            raise ValueError("keep_originals would publish what purpose anonymize is to hide")
        if self.purpose != "anonymize" and self.seed is None:
            raise ValueError(f"purpose {self.purpose} needs a seed")
        if self.start == "diffusers-strength" and self.t.unit[0] != "fraction":
            raise ValueError("start diffusers-strength reads t as img2img's strength: give t as a fraction")
        return self

    def canonical(self) -> dict[str, Any]:
        """Every output-determining field, defaults spelled out; what the digest is taken over.

        Of a model's folder only the name: where it lies is its owner's business, and the model digest, which
        is recorded beside, says better which model it is.
        """
        full = self.model_dump(mode="json", exclude={"run", "description", "name"})
        full["t"] = dict([self.t.unit])
        if self.model.revision is None and not self.model.source.startswith("shipped:"):
            full["model"]["source"] = PurePath(self.model.source).name or "."
        return full

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the canonical form as compact JSON with sorted keys."""
        text = json.dumps(self.canonical(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


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
        problems = "; ".join(_explain(problem) for problem in error.errors())
        raise RecipeError(f"{source}: {problems}") from error
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{source}: {_one_line(error)}") from error


def _apply_override(data: dict[str, Any], override: str) -> None:
    path, equals, value = override.partition("=")
    if not equals or not path:
        raise RecipeError(f"--set {override}: write it as key=value, for example --set t.fraction=0.4")
    *parents, last = path.split(".")
    node = data
    for name in parents:
        child = node.setdefault(name, {})
        if not isinstance(child, dict):
            raise RecipeError(f"--set {override}: {name} is a value, not a block")
        node = child
    if parents == ["t"]:
        node.clear()  # another unit replaces the recipe's own
    try:
        node[last] = strict_yaml.load(value)
    except ValueError as error:
        raise RecipeError(f"--set {override}: the value is not valid YAML: {error}") from error


def _explain(problem: Any) -> str:
    """One pydantic problem in the user's words."""
    # Where a field takes one of several types, pydantic adds the type to the path: tuple[int, ...].
    place = ".".join(str(part) for part in problem["loc"] if "[" not in str(part))
    if problem["type"] == "extra_forbidden":
        *parents, unknown = problem["loc"]
        near = difflib.get_close_matches(str(unknown), _known_keys(parents), n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(_known_keys(parents))}"
        return f"unknown key {place}{hint}"
    if problem["loc"] == ("t",) and problem["type"] == "model_type":
        return "t needs its unit, for example t: {fraction: 0.4}; or timestep, sigma, snr"
    if problem["type"] == "missing":
        return f"{place} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    given = problem.get("input")
    if problem["type"] == "float_type" and isinstance(given, str) and _is_number(given):
        return f"{place}: YAML reads {given} as text; write it with a decimal point, like 1.0e-3"
    shown = "" if isinstance(given, dict) else f" (given: {given!r})"
    return f"{place}: {message}{shown}" if place else message


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _known_keys(parents: Sequence[str | int]) -> list[str]:
    block: Any = Recipe
    for name in parents:
        annotation = block.model_fields[str(name)].annotation
        options = getattr(annotation, "__args__", (annotation,))
        block = next(option for option in options if isinstance(option, type) and issubclass(option, BaseModel))
    return sorted(block.model_fields)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


__all__ = [
    "FORMAT_VERSION",
    "ClassLabels",
    "FieldAction",
    "FieldPolicy",
    "ImagePolicy",
    "ModelSpec",
    "Recipe",
    "RunOptions",
    "Sampler",
    "T",
    "parse_recipe",
]
