"""Flow-matching transformers told a prompt, as a `Denoiser`: what Stable Diffusion 3 and Flux have in common.

The state is an autoencoder's latent, and the network predicts the velocity eps - x_0 (arXiv 2403.03206). A
prompt reaches it as a sequence of token states and one pooled vector. Guidance is classifier-free, away from
the negative prompt; a network distilled to take the weight as an input is told it instead (see `flux`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from boomerang_batch.config.pipeline import Prompts
from boomerang_batch.diffusion.denoiser import Condition, Denoiser, DenoiserSpec
from boomerang_batch.diffusion.schedule import NoiseLevels
from boomerang_batch.diffusion.transfer import to_device
from boomerang_batch.errors import ModelError
from boomerang_batch.models.autoencoder import Autoencoder
from boomerang_batch.models.device import Placement
from boomerang_batch.models.flow_levels import FlowChain
from boomerang_batch.models.guidance import guide, with_guidance
from boomerang_batch.models.source import Source
from boomerang_batch.models.text import PromptBook

PATCH = 2
"""Latent elements by tokens, along each side, in every published network of either family."""


@dataclass(frozen=True, kw_only=True)
class Told:
    """What the network is told for one prompt."""

    sequence: Tensor
    """(length, width)."""
    pooled: Tensor
    """(width,)."""


Network = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""The velocity (B, c, h, w) at states (B, c, h, w), tau (B,) float32, sequences (B, length, width) and pooled
vectors (B, width); all on the network's device, all but tau in its dtype."""


@dataclass(frozen=True, kw_only=True)
class FlowDenoiser:
    """A pretrained flow-matching model on its device; implements `Denoiser`."""

    spec: DenoiserSpec
    network: Network
    autoencoder: Autoencoder
    placement: Placement
    book: PromptBook[Told]
    prompts: Prompts
    guided: bool
    """Whether guidance takes a second evaluation, under the negative prompt."""
    twin: Callable[[], Denoiser]
    """Loads the same model in float32."""
    distilled: Callable[[float], Network] | None = None
    """The network under another weight, where it takes that as an input."""

    def encode(self, images: Tensor) -> Tensor:
        """The latents (B, c, h, w) of images (B, 3, H, W) in [-1, 1]."""
        return self.autoencoder.encode(images)

    def decode(self, x_0: Tensor) -> Tensor:
        """The images (B, 3, H, W), near [-1, 1], of latents (B, c, h, w)."""
        return self.autoencoder.decode(x_0)

    def denoise(self, x_t: Tensor, tau: Tensor, conditions: Sequence[Condition]) -> Tensor:
        """The predicted velocity eps - x_0, guidance applied, (B, c, h, w) float32 on x_t's device.

        x_t (B, c, h, w) float32, tau (B,) float64, a prompt per row. None stands for the recipe's own prompt.
        Raises ModelError for a prompt that the recipe did not name where it names one for all.
        """
        at = self.placement
        x = x_t.to(device=at.device, dtype=at.dtype)
        told_tau = to_device(tau, at.device)
        prompts = [self.prompts.text if prompt is None else str(prompt) for prompt in conditions]
        told = self.book.look_up(prompts)
        if not self.guided:
            return self._evaluate(x, told_tau, told).to(x_t.device)
        # One doubled batch, conditional rows first, so that its shape is as fixed as the caller's.
        away = self.book.look_up([self.prompts.negative]) * len(told)
        both = self._evaluate(torch.cat([x, x]), torch.cat([told_tau, told_tau]), told + away)
        conditional, unconditional = both.chunk(2)
        weight, rescale = self.prompts.guidance, self.prompts.rescale
        return guide(conditional, unconditional, weight=weight, rescale=rescale).to(x_t.device)

    def flagged(self, images: Tensor) -> list[bool]:
        """No image: these families bring no safety checker."""
        return [False] * len(images)

    def in_float32(self) -> Denoiser:
        """This model in full precision, loaded when first asked for; itself if it is."""
        return self.twin() if self.placement.is_half else self

    def with_guidance(self, weight: float) -> Denoiser:
        """This model guided by `weight`, its networks and prompts shared."""
        return replace(
            self,
            prompts=self.prompts.model_copy(update={"guidance": weight}),
            network=self.network if self.distilled is None else self.distilled(weight),
            guided=self.distilled is None and weight != 1.0,
            twin=lambda: with_guidance(self.twin(), weight),
        )

    def _evaluate(self, x: Tensor, tau: Tensor, told: Sequence[Told]) -> Tensor:
        sequence = torch.stack([prompt.sequence for prompt in told])
        pooled = torch.stack([prompt.pooled for prompt in told])
        with torch.no_grad():
            return self.network(x, tau, sequence, pooled).float()


def describe(
    source: Source, chain: FlowChain, autoencoder: Autoencoder, *, side: int, largest: int | None = None
) -> DenoiserSpec:
    """A flow-matching denoiser's facts.

    `side`: of the images it was trained on, in pixels; `largest`: most patches along a side that the network
    can place, None for any number.
    """
    levels_of_size = functools.partial(
        _levels_of_size, chain, autoencoder.factor, largest, str(source.network.where)
    )
    return DenoiserSpec(
        channels=autoencoder.channels,
        height=side,
        width=side,
        size_multiple=PATCH * autoencoder.factor,
        latent=True,
        state_factor=autoencoder.factor,
        value_range=(-1.0, 1.0),
        levels=levels_of_size(side, side),
        levels_of_size=levels_of_size,
        prediction="flow",
        clip_range=None,
        fractional_tau=True,
        conditioning="prompt",
        classes=None,
        digest=source.digest,
    )


def _levels_of_size(
    chain: FlowChain, factor: int, largest: int | None, where: str, height: int, width: int
) -> NoiseLevels:
    """The chain for images of this size, in pixels. Raises ModelError for one that the network can't place."""
    rows, columns = height // (PATCH * factor), width // (PATCH * factor)
    if largest is not None and max(rows, columns) > largest:
        raise ModelError(
            f"{where}: an image of {width}x{height} is {max(rows, columns)} patches long, and "
            f"pos_embed_max_size is {largest}; the longest side is {largest * PATCH * factor} pixels"
        )
    return chain.levels(rows * columns)


def open_book(encode: Callable[[str], Told], prompts: Prompts) -> PromptBook[Told]:
    """What the network is told, by prompt.

    Where the recipe itself says all prompts, the text encoders are let go. The empty one is among them: it is
    what fills a batch.
    """
    book = PromptBook(encode)
    book.look_up(["", prompts.text, prompts.negative])
    if prompts.field is None:
        book.release()
    return book


def checked(told: Told, source: Source) -> Told:
    """`told`, of the widths that the network was built for. Raises ModelError where the parts don't fit."""
    config, where = source.network.config, source.network.where
    for field, found in (("joint_attention_dim", told.sequence), ("pooled_projection_dim", told.pooled)):
        if found.shape[-1] != config.get(field):
            raise ModelError(
                f"{where}: {field} is {config.get(field)}, but the text encoders give {found.shape[-1]}; they "
                "don't belong together"
            )
    return told


def check_network(source: Source, *, channels: int, patch_size: int) -> None:
    """Raise ModelError unless the network takes and gives `channels` in patches of patch_size x patch_size."""
    config = source.network.config
    inside = config.get("in_channels")
    outside = config.get("out_channels") or inside
    if (inside, outside) != (channels, channels):
        raise ModelError(
            f"{source.network.where}: in_channels {inside} and out_channels {outside}; for the autoencoder's "
            f"latents both are {channels}, and networks told a mask or a control image are not supported"
        )
    if config.get("patch_size") != patch_size:
        raise ModelError(
            f"{source.network.where}: patch_size {config.get('patch_size')} is not supported; supported is "
            f"{patch_size}"
        )
