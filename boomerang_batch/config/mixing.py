"""The blocks of methods that mix latents, interpolate and unseen, and what a recipe of theirs must be."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from boomerang_batch.config.forms import Block, FromField

if TYPE_CHECKING:
    from boomerang_batch.config.pipeline import Recipe

MIXING = ("interpolate", "unseen")
"""Methods that turn images into latents by DDIM inversion, one for each image, and decode mixtures of them."""
MOST_ETA = 0.3
"""The most that the paper on unseen images decodes with (arXiv 2310.09213)."""

_Weight = Annotated[float, Field(gt=0, lt=1)]


class Interpolate(Block):
    """What an image is mixed with, and how much of that comes in."""

    partner: Annotated[
        Annotated[Literal["next"], Tag("<name>")] | Annotated[FromField, Tag("<field>")],
        Discriminator(lambda value: "<name>" if isinstance(value, str) else "<field>"),
    ] = Field("next", description="another sample of the shard: the next in a keyed order, or {field: NAME}")
    same: Literal["label"] | None = Field(
        None, description="label: the next of those of the sample's own class"
    )
    weights: tuple[_Weight, ...] = Field(
        (0.5,), min_length=1, description="the partner's share, one for all variants or one for each"
    )

    @model_validator(mode="after")
    def _nothing_idle(self) -> Interpolate:
        if self.same is not None and isinstance(self.partner, FromField):
            raise ValueError("same chooses among possible partners, and partner.field names one: remove same")
        return self


class Unseen(Block):
    """How new latents of a domain are drawn, and which of them will do."""

    weight: float = Field(
        1.0,
        gt=0,
        le=1,
        description="share of the new latent, the rest is the sample's own; 1: the new one alone",
    )
    tolerance: float = Field(
        2.0, gt=0, description="how far from the fit's usual figures, in their standard deviations"
    )
    max_tries: int = Field(100, ge=1, le=65_535, description="candidates looked at before an output fails")
    references: int = Field(10, ge=2, le=64, description="latents that each candidate is compared with")


def check_mixing(recipe: Recipe) -> None:
    """Raise ValueError for a recipe that does not fit its method, or has a block of another one."""
    method = recipe.method
    for name in MIXING:
        if method != name and getattr(recipe, name) is not None:
            raise ValueError(f"{name} is a block for method {name}, and this is method {method}: remove it")
    if method not in MIXING:
        return
    if getattr(recipe, method) is None:
        raise ValueError(f"method {method} needs the block {method}, which may be {{}} for its defaults")
    if recipe.sampler.order != 1 or recipe.sampler.variance != "fixed_small" or recipe.sampler.eta > MOST_ETA:
        raise ValueError(
            f"method {method} decodes latents as DDIM inversion found them, by sampler order 1 and variance "
            f"fixed_small with eta 0, or up to {MOST_ETA:g} as its paper does: set sampler.eta"
        )
    _, value = recipe.levels[0].unit
    if len(recipe.levels) > 1 or not isinstance(value, int | float):
        raise ValueError(f"method {method} mixes latents, which are of one t: give one number")
    if value == 0:
        raise ValueError(f"method {method} mixes latents, and at t 0 there is none: give more")
    for name, unfit in (
        ("passes", recipe.passes.count > 1),
        ("region", recipe.region),
        ("upscale", recipe.upscale),
        ("images.tiles", recipe.images.tiles),
        ("images.sizes", recipe.images.sizes and method == "unseen"),
    ):
        if unfit:
            raise ValueError(f"method {method} goes without {name}: remove it")
    block = recipe.interpolate
    if block is None:
        return
    if len(block.weights) not in (1, recipe.variants):
        raise ValueError(
            f"interpolate lists {len(block.weights)} weights for {recipe.variants} variants; give one for each"
        )
    if recipe.variants > 1 and len(block.weights) == 1 and recipe.sampler.eta == 0:
        raise ValueError("with one weight and eta 0 all variants would be one image; give each its own weight")
    if block.same is not None and recipe.model.class_labels is None:
        raise ValueError("interpolate.same: label goes by model.class_labels, which this recipe has not")
