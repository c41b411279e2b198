"""Pixel-space models: a diffusers UNet2DModel as a `Denoiser`.

Unconditional or class-conditional. With a patch size p the network sees x folded by space-to-depth, (C, H, W)
to (C p^2, H/p, W/p), the Patched Diffusion idea (arXiv 2207.04316). Classifier-free guidance
(arXiv 2207.12598) is o = o_u + w (o_c - o_u), o_u the output under the null label.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from diffusers import UNet2DModel
from torch import Tensor
from torch.nn import functional

from boomerang_batch.config.pipeline import ClassLabels, ModelSpec
from boomerang_batch.diffusion.denoiser import Condition, Denoiser, DenoiserSpec
from boomerang_batch.diffusion.transfer import to_device
from boomerang_batch.models.device import Placement
from boomerang_batch.models.guidance import guide, with_guidance
from boomerang_batch.models.levels import read_chain
from boomerang_batch.models.network import describe
from boomerang_batch.models.source import Source
from boomerang_batch.models.weights import load_weights, place


@dataclass(frozen=True, kw_only=True)
class PixelDenoiser:
    """A pretrained pixel model on its device; implements `Denoiser`."""

    spec: DenoiserSpec
    network: torch.nn.Module
    placement: Placement
    patch_size: int
    class_labels: ClassLabels | None
    twin: Callable[[], Denoiser]
    """Loads the same model in float32."""

    @property
    def device(self) -> torch.device:
        """Where the network runs."""
        return self.placement.device

    def encode(self, images: Tensor) -> Tensor:
        """The images themselves."""
        return images

    def decode(self, x_0: Tensor) -> Tensor:
        """The images themselves."""
        return x_0

    def denoise(self, x_t: Tensor, tau: Tensor, conditions: Sequence[Condition]) -> Tensor:
        """The network's raw output, (B, C, H, W) or with learned variances (B, 2C, H, W), on x_t's device.

        x_t (B, C, H, W) float32, tau (B,) float64, a label per row for a class-conditional model, else None.
        Labels must lie in 0..spec.classes-1; the caller checks, since it knows whose label it is.
        """
        labels = None
        if self.class_labels is not None:
            labels = to_device(torch.tensor(conditions, dtype=torch.int64), self.device)
        folded = functional.pixel_unshuffle(x_t, self.patch_size)
        told = tau.float() if self.spec.fractional_tau else tau.round().long()
        with torch.no_grad():
            output = self._guided(folded, to_device(told, self.device), labels)
        return functional.pixel_shuffle(output, self.patch_size).to(x_t.device)

    def flagged(self, images: Tensor) -> list[bool]:
        """No image: a pixel model brings no safety checker."""
        return [False] * len(images)

    def in_float32(self) -> Denoiser:
        """This model in full precision, loaded when first asked for; itself if it is."""
        return self.twin() if self.placement.is_half else self

    def with_guidance(self, weight: float) -> Denoiser:
        """This model guided by `weight`, which takes a null label; its network is shared."""
        labels = self.class_labels
        return replace(
            self,
            class_labels=None if labels is None else labels.model_copy(update={"guidance": weight}),
            twin=lambda: with_guidance(self.twin(), weight),
        )

    def _guided(self, folded: Tensor, tau: Tensor, labels: Tensor | None) -> Tensor:
        if labels is None or self.class_labels is None or self.class_labels.null_label is None:
            return self._evaluate(folded, tau, labels)
        weight = self.class_labels.guidance
        if weight == 1.0:
            return self._evaluate(folded, tau, labels)
        # One doubled batch, conditional rows first, so that its shape is as fixed as the caller's.
        null = torch.full_like(labels, self.class_labels.null_label)
        both = self._evaluate(torch.cat([folded, folded]), torch.cat([tau, tau]), torch.cat([labels, null]))
        conditional, unconditional = both.chunk(2)
        return guide(conditional, unconditional, weight=weight, channels=folded.shape[1])

    def _evaluate(self, folded: Tensor, tau: Tensor, labels: Tensor | None) -> Tensor:
        """One forward pass; only here are the network's device, dtype and memory layout in force."""
        at = self.placement
        sample = folded.to(device=at.device, dtype=at.dtype, memory_format=at.memory_format)
        output: Tensor = self.network(sample, tau, class_labels=labels).sample
        return output.to(dtype=torch.float32, memory_format=torch.contiguous_format)


def load(source: Source, spec: ModelSpec, placement: Placement) -> PixelDenoiser:
    """The pixel model in `source`. Raises ModelError when it is not supported or is not what `spec` says."""
    chain = read_chain(source.scheduler_config, source=str(source.scheduler))
    described = describe(source, chain, spec)
    return PixelDenoiser(
        spec=described,
        network=place(load_weights(source.network, UNet2DModel, dtype=placement.dtype), placement),
        placement=placement,
        patch_size=spec.patch_size,
        class_labels=spec.class_labels,
        twin=functools.cache(lambda: load(source, spec, placement.in_float32())),
    )
