"""Autoencoders: images to the latents that a latent model works on, and back.

Latents are z = (mode - shift) * scale with the mode of the encoder's distribution (arXiv 2112.10752), so that
an encoding depends on its image alone; decoding undoes it. A VQModel's latents are those before quantization;
its decoder quantizes. Scale and shift are the component's own configuration; a wrong scale gives garbage
quietly, which is why the first latents are looked at.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, VQModel
from torch import Tensor

from boomerang_batch.config.pipeline import Autoencoder as Options
from boomerang_batch.errors import ModelError
from boomerang_batch.models.device import Placement
from boomerang_batch.models.parts import Part
from boomerang_batch.models.weights import load_weights

_logger = logging.getLogger(__name__)

_KINDS = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny, "VQModel": VQModel}
_DEFAULT_SCALE = {"AutoencoderKL": 0.18215, "AutoencoderTiny": 1.0, "VQModel": 0.18215}
_USUAL_STD = (0.5, 2.0)
_LOOKED_AT = 8
_warned: set[str] = set()


@dataclass(kw_only=True)
class Autoencoder:
    """An autoencoder on its device. Not thread-safe while its first latents are looked at."""

    module: Any
    placement: Placement
    """With the dtype that the autoencoder itself runs in."""
    scale: Tensor
    """(1, 1 or c, 1, 1) float32, as shift."""
    shift: Tensor
    channels: int
    """Of an image."""
    latent_channels: int
    factor: int
    """Pixels by latent elements, along each side."""
    where: str
    _unseen: int = field(default=_LOOKED_AT, init=False)

    def encode(self, images: Tensor) -> Tensor:
        """The latents (B, c, H / factor, W / factor) float32 of images (B, C, H, W) in [-1, 1]."""
        with torch.no_grad():
            encoded = self.module.encode(self._placed(images))
            mode = encoded.latent_dist.mode() if "latent_dist" in encoded else encoded.latents
        latents = (mode.float() - self.shift) * self.scale
        if self._unseen:
            self._unseen -= 1
            self._look_at(latents)
        return latents.to(images.device, memory_format=torch.contiguous_format)

    def decode(self, latents: Tensor) -> Tensor:
        """The images (B, C, H, W) float32, near [-1, 1], of latents (B, c, H / factor, W / factor)."""
        z = latents.to(self.placement.device).float() / self.scale + self.shift
        with torch.no_grad():
            images: Tensor = self.module.decode(self._placed(z)).sample
        return images.to(latents.device, torch.float32, memory_format=torch.contiguous_format)

    def _placed(self, tensor: Tensor) -> Tensor:
        return tensor.to(
            device=self.placement.device,
            dtype=self.placement.dtype,
            memory_format=self.placement.memory_format,
        )

    def _look_at(self, latents: Tensor) -> None:
        std = float(latents.std())
        if _USUAL_STD[0] <= std <= _USUAL_STD[1] or self.where in _warned:
            return
        _warned.add(self.where)
        _logger.warning(
            "%s: encoded latents have a standard deviation of %.3g, and diffusion models are trained near 1; "
            "unless the images are flat, set model.autoencoder.scale (now %.5g) to the scale of the training",
            self.where,
            std,
            float(self.scale.mean()),
        )


def load_autoencoder(part: Part, options: Options, placement: Placement) -> Autoencoder:
    """The autoencoder in a component folder.

    It runs in the model's dtype, but in float32 where the recipe or its configuration (force_upcast) says so.
    Raises ModelError when it is of a kind that is not supported or its weights don't fit.
    """
    config, where = part.config, str(part.where)
    name = config.get("_class_name")
    if name not in _KINDS:
        raise ModelError(
            f"{where}: autoencoder _class_name {name!r} is not supported; supported are {', '.join(_KINDS)}"
        )
    if options.float32 or (placement.is_half and config.get("force_upcast")):
        placement = placement.in_float32()
    module = load_weights(part, _KINDS[name], dtype=placement.dtype)
    module = module.to(device=placement.device)
    module = module.to(memory_format=placement.memory_format)  # type: ignore[call-overload]
    scale, shift = _affine(config, name, options)
    blocks = config.get("encoder_block_out_channels") or module.config.block_out_channels
    return Autoencoder(
        module=module,
        placement=placement,
        scale=scale.to(placement.device),
        shift=shift.to(placement.device),
        channels=int(module.config.in_channels),
        latent_channels=int(config.get("vq_embed_dim") or module.config.latent_channels),
        factor=2 ** (len(blocks) - 1),
        where=where,
    )


def _affine(config: dict[str, Any], name: str, options: Options) -> tuple[Tensor, Tensor]:
    """scale and shift, each (1, 1 or c, 1, 1): latents = (mode - shift) * scale.

    Where the configuration has a mean and a std for each channel, scale is divided by the std, as
    Stable Diffusion XL pipelines do.
    """
    factor = options.scale if options.scale is not None else config.get("scaling_factor")
    scale = torch.tensor(float(_DEFAULT_SCALE[name] if factor is None else factor)).view(1, 1, 1, 1)
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None:
        return scale / torch.tensor(std).view(1, -1, 1, 1), torch.tensor(mean).view(1, -1, 1, 1)
    return scale, torch.tensor(float(config.get("shift_factor") or 0.0)).view(1, 1, 1, 1)
