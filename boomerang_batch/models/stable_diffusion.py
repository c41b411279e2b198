"""Stable Diffusion 1, 2 and XL: a diffusers UNet2DConditionModel on latents, told a prompt.

arXiv 2112.10752; XL (arXiv 2307.01952) has two text encoders, a pooled embedding, and is told the image's
size. Guidance is one call on doubled rows, the prompts' first; with weight 1 there is only the prompts' half.
An empty prompt of a model with force_zeros_for_empty_prompt is zeros, which is how XL was trained to be told
nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from boomerang_batch.config.pipeline import ModelSpec, Prompts
from boomerang_batch.diffusion.denoiser import Condition, Denoiser, DenoiserSpec
from boomerang_batch.diffusion.transfer import to_device
from boomerang_batch.errors import ModelError
from boomerang_batch.models.autoencoder import Autoencoder, load_autoencoder
from boomerang_batch.models.device import Placement
from boomerang_batch.models.guidance import guide, with_guidance
from boomerang_batch.models.levels import Chain, read_chain
from boomerang_batch.models.network import check_latents, sample_size, size_multiple
from boomerang_batch.models.safety import SafetyChecker, load_safety_checker
from boomerang_batch.models.source import Source
from boomerang_batch.models.text import PromptBook, TextEncoder, load_text_encoders
from boomerang_batch.models.weights import load_weights, place

_PENULTIMATE = -2


@dataclass(frozen=True, kw_only=True)
class Told:
    """What the network is told for one prompt."""

    hidden: Tensor
    """(length, width) for cross-attention."""
    pooled: Tensor | None
    """(width,), XL only."""


@dataclass(frozen=True, kw_only=True)
class StableDiffusionDenoiser:
    """A Stable Diffusion model on its device; implements `Denoiser`."""

    spec: DenoiserSpec
    network: torch.nn.Module
    placement: Placement
    autoencoder: Autoencoder
    prompts: Prompts
    book: PromptBook[Told]
    safety: SafetyChecker | None
    twin: Callable[[], Denoiser]
    """Loads the same model in float32."""

    def encode(self, images: Tensor) -> Tensor:
        """The scaled latents of images; see `Autoencoder`."""
        return self.autoencoder.encode(images)

    def decode(self, x_0: Tensor) -> Tensor:
        """The images of scaled latents."""
        return self.autoencoder.decode(x_0)

    def denoise(self, x_t: Tensor, tau: Tensor, conditions: Sequence[Condition]) -> Tensor:
        """The network's raw output (B, c, h, w) float32 under a prompt per row, guidance applied.

        None stands for the recipe's own prompt. Raises ModelError for a prompt that the recipe did not name
        where it names one for all.
        """
        prompts = [self.prompts.text if prompt is None else str(prompt) for prompt in conditions]
        guided = self.prompts.guidance != 1.0
        if guided:
            prompts += [self.prompts.negative] * len(prompts)
            x_t, tau = torch.cat([x_t, x_t]), torch.cat([tau, tau])
        output = self._evaluate(x_t, tau, self.book.look_up(prompts))
        if guided:
            conditional, unconditional = output.chunk(2)
            output = guide(
                conditional, unconditional, weight=self.prompts.guidance, rescale=self.prompts.rescale
            )
        return output.to(x_t.device)

    def flagged(self, images: Tensor) -> list[bool]:
        """Which of images (B, 3, H, W) in [-1, 1] the model's safety checker flags; none without one."""
        return [False] * len(images) if self.safety is None else self.safety.flagged(images)

    def in_float32(self) -> Denoiser:
        """This model in full precision, loaded when first asked for; itself if it is."""
        return self.twin() if self.placement.is_half else self

    def with_guidance(self, weight: float) -> Denoiser:
        """This model guided by `weight`, its networks and prompts shared."""
        return replace(
            self,
            prompts=self.prompts.model_copy(update={"guidance": weight}),
            twin=lambda: with_guidance(self.twin(), weight),
        )

    def _evaluate(self, x_t: Tensor, tau: Tensor, told: Sequence[Told]) -> Tensor:
        """One forward pass; only here are the network's device, dtype and memory layout in force."""
        at = self.placement
        sample = x_t.to(device=at.device, dtype=at.dtype, memory_format=at.memory_format)
        hidden = torch.stack([one.hidden for one in told]).to(at.dtype)
        added = None
        if told[0].pooled is not None:
            pooled = torch.stack([one.pooled for one in told if one.pooled is not None]).to(at.dtype)
            height, width = (side * self.autoencoder.factor for side in x_t.shape[2:])
            # The original size, the crop's top left corner, and the size wanted.
            ids = to_device(torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32), at.device)
            added = {"text_embeds": pooled, "time_ids": ids.to(at.dtype).expand(len(told), -1)}
        with torch.no_grad():
            output: Tensor = self.network(
                sample, to_device(tau, at.device), encoder_hidden_states=hidden, added_cond_kwargs=added
            ).sample
        return output.to(dtype=torch.float32, memory_format=torch.contiguous_format)


def load(source: Source, spec: ModelSpec, placement: Placement) -> StableDiffusionDenoiser:
    """The model in `source`. Raises ModelError when it is not supported or is not what `spec` says."""
    chain = read_chain(source.scheduler_config, source=str(source.scheduler))
    autoencoder = load_autoencoder(source.parts["vae"], spec.autoencoder, placement)
    described = _describe(source, chain, autoencoder)
    encoders = load_text_encoders(source, placement)
    present = [encoder for encoder in encoders if encoder is not None]
    if len(present) < len(encoders) or not present:
        names = ", ".join(name for name, _ in source.layout.text if name not in source.parts)
        raise ModelError(
            f"{source.network.folder.parent}: model_index.json lists no {names}, which this family needs"
        )
    encode = functools.partial(_encode_xl, present, _zeros(source)) if len(present) > 1 else None
    book = PromptBook(encode or functools.partial(_encode, present[0]))
    prompts = spec.prompts or Prompts()
    # The empty prompt too: it is what slots without a sample are told.
    _check_width(source, book.look_up(["", prompts.text, prompts.negative])[0])
    if prompts.field is None:
        book.release()
    safety = None
    if source.layout.safety in source.parts:
        checker = source.parts[str(source.layout.safety)]
        safety = load_safety_checker(checker, source.data["feature_extractor"], placement)
    return StableDiffusionDenoiser(
        spec=replace(described, safety=safety is not None),
        network=place(load_weights(source.network, UNet2DConditionModel, dtype=placement.dtype), placement),
        placement=placement,
        autoencoder=autoencoder,
        prompts=prompts,
        book=book,
        safety=safety,
        twin=functools.cache(lambda: load(source, spec, placement.in_float32())),
    )


def _encode(encoder: TextEncoder, prompt: str) -> Told:
    """Stable Diffusion 1 and 2: the text encoder's output."""
    return Told(hidden=encoder.encode(prompt).hidden, pooled=None)


def _encode_xl(encoders: Sequence[TextEncoder], zeros: bool, prompt: str) -> Told:
    """XL: both encoders' penultimate layers side by side, and the last one's pooled embedding."""
    both = [encoder.encode(prompt, layer=_PENULTIMATE) for encoder in encoders]
    hidden, pooled = torch.cat([one.hidden for one in both], dim=-1), both[-1].pooled
    if pooled is None:
        raise ModelError("the last text encoder of an XL model must have a pooled embedding; this one has none")
    empty = zeros and not prompt
    return Told(
        hidden=torch.zeros_like(hidden) if empty else hidden,
        pooled=torch.zeros_like(pooled) if empty else pooled,
    )


def _zeros(source: Source) -> bool:
    return bool(source.index.get("force_zeros_for_empty_prompt", True))


def _describe(source: Source, chain: Chain, autoencoder: Autoencoder) -> DenoiserSpec:
    """The denoiser's facts; refuses networks that want to be told more than a prompt."""
    config, where = source.network.config, str(source.network.where)
    double = len(source.layout.text) > 1
    wanted: dict[str, Any] = {
        "addition_embed_type": "text_time" if double else None,
        "class_embed_type": None,
        "encoder_hid_dim_type": None,
        "time_cond_proj_dim": None,
        "time_embedding_type": "positional",
    }
    for field, value in wanted.items():
        if config.get(field, wanted[field] if field == "time_embedding_type" else None) != value:
            raise ModelError(
                f"{where}: {field} {config.get(field)!r} is not supported for {source.pipeline}; it must be "
                f"{value!r}"
            )
    if source.index.get("requires_aesthetics_score"):
        raise ModelError(
            f"{source.network.folder.parent}: requires_aesthetics_score: refiners are not supported"
        )
    channels = config.get("in_channels", 4)
    if config.get("out_channels", 4) != channels or chain.learned_variance:
        raise ModelError(
            f"{where}: out_channels {config.get('out_channels')} differs from in_channels {channels}, or the "
            "scheduler's variance_type is learned_range; of Stable Diffusion only plain models are supported"
        )
    check_latents(channels, where, autoencoder)
    height, width = sample_size(config, where)
    levels = chain.levels
    if not double:
        # diffusers' own pipelines overrule older files: one step of offset, no clamping.
        levels = replace(levels, steps_offset=1)
    return DenoiserSpec(
        channels=autoencoder.channels,
        height=height * autoencoder.factor,
        width=width * autoencoder.factor,
        size_multiple=size_multiple(config, autoencoder),
        latent=True,
        state_factor=autoencoder.factor,
        value_range=chain.value_range,
        levels=levels,
        prediction=chain.prediction,
        clip_range=None,
        fractional_tau=True,
        conditioning="prompt",
        classes=None,
        digest=source.digest,
    )


def _check_width(source: Source, told: Told) -> None:
    """Refuse text encoders of another width than the network's cross-attention."""
    width = source.network.config.get("cross_attention_dim", 1280)
    if isinstance(width, int) and told.hidden.shape[-1] != width:
        raise ModelError(
            f"{source.network.where}: cross_attention_dim {width}, but the text encoders give "
            f"{told.hidden.shape[-1]}; they don't belong together"
        )
