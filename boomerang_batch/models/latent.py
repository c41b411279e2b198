"""Latent models told no prompt: a diffusers UNet2DModel on the latents of an autoencoder (LDMPipeline).

Unconditional or class-conditional, with a KL or a VQ autoencoder (arXiv 2112.10752).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from diffusers import UNet2DModel
from torch import Tensor

from boomerang_batch.config.pipeline import ModelSpec
from boomerang_batch.models.autoencoder import Autoencoder, load_autoencoder
from boomerang_batch.models.device import Placement
from boomerang_batch.models.levels import read_chain
from boomerang_batch.models.network import describe
from boomerang_batch.models.pixel import PixelDenoiser
from boomerang_batch.models.source import Source
from boomerang_batch.models.weights import load_weights, place


@dataclass(frozen=True, kw_only=True)
class LatentDenoiser(PixelDenoiser):
    """A UNet2DModel whose pixels are latents."""

    autoencoder: Autoencoder

    def encode(self, images: Tensor) -> Tensor:
        """The scaled latents of images; see `Autoencoder`."""
        return self.autoencoder.encode(images)

    def decode(self, x_0: Tensor) -> Tensor:
        """The images of scaled latents."""
        return self.autoencoder.decode(x_0)


def load(source: Source, spec: ModelSpec, placement: Placement) -> LatentDenoiser:
    """The latent model in `source`. Raises ModelError when it is not supported or is not what `spec` says."""
    chain = read_chain(source.scheduler_config, source=str(source.scheduler))
    part = source.parts[str(source.layout.autoencoder)]
    autoencoder = load_autoencoder(part, spec.autoencoder, placement)
    described = describe(source, chain, spec, autoencoder)
    return LatentDenoiser(
        spec=described,
        network=place(load_weights(source.network, UNet2DModel, dtype=placement.dtype), placement),
        placement=placement,
        patch_size=1,
        class_labels=spec.class_labels,
        twin=functools.cache(lambda: load(source, spec, placement.in_float32())),
        autoencoder=autoencoder,
    )
