"""What codes are decoded to, another class, prompt or model, and how; and what a recipe with codes must be."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from boomerang_batch.config.blocks import ModelSpec
from boomerang_batch.config.forms import Block, T

if TYPE_CHECKING:
    from boomerang_batch.config.pipeline import Recipe

BY_CODES = ("dpm-encoder", "edit-friendly")
"""Methods that keep what a walk must be fed to end in an image, and feed it."""


class Level(Block):
    """How far out to go, as `T` says it, the same number for all. Exactly one of the four."""

    fraction: float | None = Field(None, ge=0, le=1)
    timestep: int | None = Field(None, ge=0)
    sigma: float | None = Field(None, ge=0)
    snr: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _exactly_one_unit(self) -> Level:
        if list(dict(self).values()).count(None) != 3:
            raise ValueError("t needs exactly one unit: fraction, timestep, sigma or snr")
        return self

    @property
    def t(self) -> T:
        """The same as a recipe's t."""
        return T.model_validate(self.model_dump(exclude_none=True))


class Refine(Block):
    """Boomerang itself on what was decoded."""

    t: Level = Field(description="how far out, in one of the units")
    steps: int | None = Field(None, ge=1, description="size of the full grid; null: the recipe's")
    eta: float = Field(1.0, ge=0, le=1)


class Shift(Block):
    """What is added to a code's noise maps."""

    by: tuple[float, ...] = Field(
        min_length=1, max_length=64, description="one number for each channel of the state, in noise of a step"
    )
    over: tuple[float, float] = Field(
        (0.0, 1.0), description="from which share of the walk to which; 0 is its end, the image"
    )

    @model_validator(mode="after")
    def _ascends(self) -> Shift:
        if not 0 <= self.over[0] < self.over[1] <= 1:
            raise ValueError("over takes the lower and the higher share of the walk, from 0 to 1")
        return self


class Target(Block):
    """What a code is decoded to, instead of to its own image."""

    label: int | None = Field(None, ge=0, description="the class that all become")
    prompt: str | None = Field(None, description="the prompt that all are decoded under")
    field: str | None = Field(None, description="field that holds each sample's own class or prompt to become")
    guidance: float | None = Field(
        None, ge=0, description="classifier-free guidance weight while decoding; null: the model's own"
    )
    model: ModelSpec | None = Field(None, description="another model to decode with; null: `model`")
    shift: Shift | None = Field(None, description="what moves the colours of what is decoded; null: nothing")
    trials: int = Field(1, ge=1, le=256, description="codes drawn of each variant, of which the best is kept")
    select: Literal["nearest", "class"] = Field(
        "nearest", description="the best: that comes nearest to the source, or is surest of the target's class"
    )
    classifier: str | None = Field(None, description="installed classifier to ask, with select: class")
    refine: Refine | None = Field(None, description="Boomerang on what was decoded; null: none")

    @model_validator(mode="after")
    def _one_target(self) -> Target:
        told = 3 - [self.label, self.prompt, self.field].count(None)
        if told > 1 or (not self.tells and self.model is None and self.shift is None):
            raise ValueError("a target is one of label, prompt and field, or another model, or a shift")
        return self

    @model_validator(mode="after")
    def _trials_have_a_judge(self) -> Target:
        if self.trials == 1 and (self.select != "nearest" or self.classifier is not None):
            raise ValueError("select and classifier choose among several trials: set trials, or remove them")
        if (self.select == "class") != (self.classifier is not None):
            raise ValueError("classifier goes with select: class, and that one needs it: name an installed one")
        return self

    @model_validator(mode="after")
    def _model_is_whole(self) -> Target:
        if self.model is None:
            return self
        if self.guidance is not None:
            raise ValueError(
                "guidance is of the model itself, and another model has its own: say it in model.class_labels "
                "or model.prompts of the target"
            )
        if self.model.safety != "unchecked":
            raise ValueError(
                "outputs are shown to the recipe's own model.safety: remove safety from the target"
            )
        return self

    @property
    def tells(self) -> bool:
        """Whether it says what samples become, and not with what or in which colours alone."""
        return [self.label, self.prompt, self.field].count(None) < 3

    def canonical(self) -> dict[str, Any]:
        """What of it enters the recipe's canonical form: what came later only where it says something."""
        full = self.model_dump(mode="json")
        defaults = {name: field.default for name, field in type(self).model_fields.items()}
        said = {name: value for name, value in full.items() if name in _FIRST or value != defaults[name]}
        if self.refine is not None:
            said["refine"]["t"] = self.refine.t.model_dump(mode="json", exclude_none=True)
        return said


_FIRST = frozenset({"label", "prompt", "field"})
"""What a target has always had; runs are known by their digest."""


def check_codes(recipe: Recipe) -> None:
    """Raise ValueError for a recipe that does not fit its method, or has a target that nothing will be."""
    method, target = recipe.method, recipe.target
    if method not in BY_CODES:
        if target is not None:
            raise ValueError(
                f"target is what codes are decoded to, and {method} makes none: take method "
                f"{' or '.join(BY_CODES)}"
            )
        return
    if recipe.sampler.order != 1 or recipe.sampler.variance != "fixed_small":
        raise ValueError(
            f"method {method} is defined for sampler order 1 and variance fixed_small: a code holds the noise "
            "of just these steps"
        )
    if method == "dpm-encoder" and recipe.sampler.eta == 0:
        raise ValueError("method dpm-encoder draws its path with the sampler's noise: eta must be above 0")
    for name, unfit in (
        ("passes", recipe.passes.count > 1),
        ("region", recipe.region),
        ("upscale", recipe.upscale),
    ):
        if unfit:
            raise ValueError(f"method {method} goes without {name}: remove it")
    if target is not None and target.guidance is not None:
        try:
            recipe.model.guided(target.guidance)
        except ValueError as error:
            raise ValueError(f"target.guidance: {error}") from error
    if recipe.purpose == "anonymize":
        _check_hides(method, target)


def _check_hides(method: str, target: Target | None) -> None:
    """Raise ValueError where a code would give its image back, or what is nearest to it."""
    if target is None:
        raise ValueError(f"method {method} without a target gives back the input: nothing would be anonymized")
    if target.model is not None:
        raise ValueError(
            "target.model: how near another model leads back to a source nobody can tell beforehand, so "
            "purpose anonymize decodes with the model itself"
        )
    if not target.tells:
        raise ValueError(
            "target.shift alone gives back the input in other colours: say what it is to become, by label, "
            "prompt or field"
        )
    if target.trials > 1 and target.select == "nearest":
        raise ValueError(
            "target.select nearest keeps, of several trials, what is most like the source, which purpose "
            "anonymize is to hide: take select: class, or one trial"
        )
