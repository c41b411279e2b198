"""The blocks a recipe is made of, one class for each, with what a block alone can tell to be wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, model_validator

from boomerang_batch.config.forms import Block, Scalar, matching

FieldAction = Literal["keep", "drop", "pseudonymize"]

ENTRY_POINT = "entry-point:"
"""Prefix of a model source that names an installed entry point."""


class ClassLabels(Block):
    """How a class-conditional model gets its label."""

    field: str = Field("cls", description="field that holds the integer label")
    null_label: int | None = Field(None, ge=0, description="the label trained to mean 'no class'")
    guidance: float = Field(1.0, ge=0, description="classifier-free guidance weight; 1 means none")

    @model_validator(mode="after")
    def _guidance_needs_a_null_label(self) -> ClassLabels:
        if self.guidance != 1.0 and self.null_label is None:
            raise ValueError("guidance other than 1 needs null_label, the label trained to mean 'no class'")
        return self


class Prompts(Block):
    """What a text-conditional model is told: one text for all, or each sample's caption."""

    text: str = Field("", description="the prompt; empty means unconditional")
    field: str | None = Field(None, description="field that holds each sample's own prompt, instead of text")
    negative: str = Field("", description="what guidance leads away from")
    guidance: float = Field(1.0, ge=0, description="classifier-free guidance weight; 1 means none")
    rescale: float = Field(0.0, ge=0, le=1, description="guidance rescale phi (arXiv 2305.08891, eq. 15)")

    @model_validator(mode="after")
    def _one_source(self) -> Prompts:
        if self.field is not None and self.text:
            raise ValueError("prompts come from text or from a field, not from both")
        return self

    @model_validator(mode="after")
    def _nothing_idle(self) -> Prompts:
        if self.guidance == 1.0 and (self.negative or self.rescale):
            raise ValueError(
                "negative and rescale act on guidance, and there is none: set guidance, or remove them"
            )
        return self


class Autoencoder(Block):
    """How a latent model's autoencoder is used."""

    scale: float | None = Field(None, gt=0, description="latents = (encoded - shift) * scale; null: its config")
    float32: bool = Field(False, description="run it in float32 whatever model.dtype says")
    batch_size: int = Field(1, ge=1, le=256, description="fixed shape of its forward passes")


class ModelSpec(Block):
    """Which pretrained model, and how its tensors are laid out."""

    source: str = Field(
        description="a diffusers folder, a hub id, shipped:demo/model, or entry-point:NAME of an installed one"
    )
    options: Mapping[str, Scalar] = Field(
        default_factory=dict, description="what an entry point's factory is given"
    )
    revision: Annotated[str | None, matching("[0-9a-f]{40}", "a commit's 40 hex digits, no branch or tag")] = (
        Field(None, description="commit of a hub id; required for one")
    )
    subfolder: str | None = Field(None, description="the network's folder when it is not found by itself")
    patch_size: int = Field(1, ge=1, le=16, description="space-to-depth factor the network was trained with")
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    channels_last: bool = False
    compile: bool = Field(False, description="torch.compile the network for its one shape")
    class_labels: ClassLabels | None = None
    prompts: Prompts | None = None
    autoencoder: Autoencoder = Autoencoder()
    safety: Literal["unchecked", "keep", "drop", "quarantine"] = Field(
        "unchecked", description="what becomes of outputs that the model's own safety checker flags"
    )

    @model_validator(mode="after")
    def _one_condition(self) -> ModelSpec:
        if self.prompts is not None and self.class_labels is not None:
            raise ValueError(
                "a model is told a class or a text, not both; remove class_labels or prompts, "
                "whichever it was not trained with"
            )
        return self

    @model_validator(mode="after")
    def _entry_points_get_options_alone(self) -> ModelSpec:
        if not self.source.startswith(ENTRY_POINT):
            if self.options:
                raise ValueError("options go to an entry point's factory; source names none, so remove them")
            return self
        ignored = [
            name
            for name, known in type(self).model_fields.items()
            if name not in _ENTRY_POINT_KEYS and getattr(self, name) != known.default
        ]
        for name, known in Autoencoder.model_fields.items():
            if name != "batch_size" and getattr(self.autoencoder, name) != known.default:
                ignored.append(f"autoencoder.{name}")
        for name, block in (("class_labels", self.class_labels), ("prompts", self.prompts)):
            if block is not None and block.guidance != 1.0:
                ignored.append(f"{name}.guidance")
        if ignored:
            raise ValueError(
                f"an entry point's factory is given options and a device, so {', '.join(ignored)} would say "
                "nothing; tell it by options"
            )
        return self

    def guided(self, weight: float) -> ModelSpec:
        """The same model under another weight of guidance. Raises ValueError where it can't be guided."""
        if self.source.startswith(ENTRY_POINT):
            raise ValueError("an installed model's guidance is its factory's business: tell it by options")
        labels, prompts = self.class_labels, self.prompts
        if labels is not None and (labels.null_label is not None or weight == 1):
            return self.model_copy(update={"class_labels": labels.model_copy(update={"guidance": weight})})
        if prompts is not None:
            return self.model_copy(update={"prompts": prompts.model_copy(update={"guidance": weight})})
        raise ValueError("guidance needs class_labels with a null_label, or prompts")


_ENTRY_POINT_KEYS = frozenset({"source", "options", "class_labels", "prompts", "autoencoder", "safety"})
"""What means something for a model that an installed factory makes."""


class Sampler(Block):
    """The reverse process. eta=1 with fixed_small is the paper's; eta=0 is DDIM, order 2 DPM-Solver++(2M)."""

    eta: float = Field(1.0, ge=0, le=1)
    order: Literal[1, 2] = 1
    variance: Literal["fixed_small", "fixed_large", "optimal", "learned"] = Field(
        "fixed_small", description="learned: as predicted by a model that was trained to"
    )
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


class Passes(Block):
    """A cascade: Boomerang applied to its own output, `count` times."""

    count: int = Field(1, ge=1, le=64)
    outputs: Literal["last", "all"] = Field("last", description="all: every pass is an output of its own")


class Tiles(Block):
    """Images larger than the model's size in overlapping tiles that share one noise field."""

    overlap: int = Field(
        ge=1, description="pixels by which neighbouring tiles overlap, where seams are blended"
    )


class Upscale(Block):
    """Super-resolution: enlarge first, then let Boomerang put in what enlarging can't."""

    factor: int = Field(ge=2, le=16)
    filter: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bicubic"
    consistent: bool = Field(
        False, description="project the output onto the images whose reduction is the input"
    )


class Region(Block):
    """Only a part of each image is changed; the rest returns with the pixels it came with."""

    field: str = Field(min_length=1, description="a mask image (white: change), or json with boxes")
    json_key: str | None = Field(
        None, description="key of the boxes [left, top, right, bottom] in a json field"
    )
    feather: int = Field(0, ge=0, description="pixels outside the region over which the seam is blended")


_Side = Annotated[int, Field(ge=1, le=65_535)]


class ImagePolicy(Block):
    """Which member is the image, how it meets the model's size, and how the output is encoded."""

    field: str = Field(
        "jpg;png;jpeg;webp", description="image field; alternatives by ;, a sample must have just one"
    )
    resize: Literal["cover", "contain", "stretch", "pad"] = "cover"
    restore_size: bool = Field(True, description="give back exactly the input's width and height")
    sizes: tuple[tuple[_Side, _Side], ...] = Field(
        (), max_length=16, description="[width, height] of the buckets; each image goes to the best fitting one"
    )
    tiles: Tiles | None = None
    alpha: Literal["refuse", "keep", "black", "white"] = Field(
        "refuse", description="transparency: refuse the sample, carry the channel over, or flatten"
    )
    max_pixels: int = Field(50_000_000, ge=1, description="larger images are refused before decoding")
    format: Literal["input", "png", "jpeg", "webp"] = "input"
    quality: int = Field(95, ge=1, le=100, description="for jpeg and lossy webp; jpeg is always 4:4:4")

    @model_validator(mode="after")
    def _sizes_or_tiles(self) -> ImagePolicy:
        if self.sizes and self.tiles is not None:
            raise ValueError("sizes and tiles are two answers to images of other sizes; remove one of them")
        if len(set(self.sizes)) != len(self.sizes):
            raise ValueError("sizes lists one size twice; remove the repeat")
        return self


class FieldPolicy(Block):
    """What travels beside the image. A null default means drop under anonymize, keep otherwise."""

    default: FieldAction | None = None
    fields: Mapping[str, FieldAction] = Field(default_factory=dict, description="per field; labels say keep")
    json_keys: Mapping[str, FieldAction] = Field(
        default_factory=dict,
        description="per top-level key of the json field; unlisted ones follow `default`",
    )


class ErrorBudget(Block):
    """How much may fail before a run gives up. Null: as much as there is."""

    max_failed_samples: int | None = Field(None, ge=0, description="rows with a status that is no success")
    max_failed_shards: int | None = Field(None, ge=0, description="shards quarantined whole")


class Gates(Block):
    """Limits on what an audit may find; each is held by the bad end of a 95 % interval."""

    max_rank1: float | None = Field(
        None, ge=0, le=1, description="share of outputs that any attacker leads back to their own source"
    )
    max_tar: float | None = Field(
        None, ge=0, le=1, description="share accepted as their source at a false-accept rate of .01"
    )
    max_fd: float | None = Field(
        None, ge=0, description="Frechet distance to the sources, in the features of each embedder"
    )
    min_label_agreement: float | None = Field(
        None, ge=0, le=1, description="share of outputs that keep their label, by a classifier of their sources"
    )


class RunGate(Gates):
    """Gates that a run's first outputs must keep, before the rest is spent."""

    samples: int = Field(200, ge=3, description="outputs that are made and judged before the rest is")
    embedders: tuple[str, ...] = Field(("pixels", "pca"), min_length=1, description="features to compare in")


class RunOptions(Block):
    """Operational: none of this can change a byte of the output."""

    workers: int | None = Field(None, ge=1, description="Ray actors; null: one per GPU, else one")
    max_attempts: int = Field(3, ge=1, description="attempts of a shard before it is quarantined")
    start_timeout_s: float | None = Field(
        None, gt=0, description="seconds within which a first Ray worker must be ready; null: for ever"
    )
    load_deadline_s: float = Field(
        3600.0, gt=0, description="seconds to load the model before a Ray worker counts as hung"
    )
    step_deadline_s: float = Field(
        900.0, gt=0, description="seconds for one network call before a Ray worker's device counts as hung"
    )
    journal_every: int = Field(
        500, ge=0, description="samples that a lost worker costs at most; 0: as many as its shards hold"
    )
    on_error: ErrorBudget = ErrorBudget()
    gate: RunGate | None = Field(None, description="limits that the first outputs must keep; null: none")
