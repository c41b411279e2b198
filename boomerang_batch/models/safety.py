"""A pipeline's own safety checker: which images it flags, and nothing else; no image is ever blackened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from boomerang_batch.errors import ModelError
from boomerang_batch.models.device import Placement
from boomerang_batch.models.parts import Part
from boomerang_batch.models.weights import load_weights

KIND = "StableDiffusionSafetyChecker"


class SafetyChecker:
    """diffusers' StableDiffusionSafetyChecker with its image processor."""

    def __init__(self, module: Any, processor: Any, placement: Placement) -> None:
        self._module = module
        self._processor = processor
        self._placement = placement

    def flagged(self, images: Tensor) -> list[bool]:
        """For each of images (B, 3, H, W) float32 in [-1, 1], whether it comes too near a banned concept."""
        pixels = ((images / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()
        seen = self._processor(list(pixels.numpy()), return_tensors="pt").pixel_values
        module = self._module
        with torch.no_grad():
            pooled = module.vision_model(seen.to(self._placement.device, self._placement.dtype))[1]
            shown = module.visual_projection(pooled)
            special = _nearness(shown, module.special_care_embeds, module.special_care_embeds_weights)
            # An image near a concept that wants special care is held to thresholds lower by 0.01.
            lower = 0.01 * (special > 0).any(dim=1, keepdim=True)
            concepts = _nearness(shown, module.concept_embeds, module.concept_embeds_weights, lower)
        flags: list[bool] = (concepts > 0).any(dim=1).tolist()
        return flags


def _nearness(shown: Tensor, concepts: Tensor, thresholds: Tensor, lower: Tensor | float = 0.0) -> Tensor:
    """Cosines (B, n) of images to concepts, above their thresholds, to three decimals as the checker counts."""
    cosines = functional.normalize(shown) @ functional.normalize(concepts).T
    return (cosines.float() - thresholds.float() + lower).round(decimals=3)


def load_safety_checker(part: Part, processor: Path, placement: Placement) -> SafetyChecker:
    """The safety checker of a component folder. Raises ModelError when it is not one, or does not load."""
    name = (part.config.get("architectures") or [None])[0]
    if name != KIND:
        raise ModelError(
            f"{part.where}: safety checker {name!r} (architectures) is not supported; supported is {KIND}"
        )
    try:
        import transformers
        from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    except ImportError as error:
        raise ModelError(
            "model.safety needs transformers: pip install 'boomerang-batch[text]', or set it to unchecked"
        ) from error
    module = load_weights(part, StableDiffusionSafetyChecker, dtype=placement.dtype)
    # Where there are two, the one that resizes with Pillow, so that flags don't depend on what is installed.
    pillow = "CLIPImageProcessorPil"
    kind = getattr(transformers, pillow if hasattr(transformers, pillow) else "CLIPImageProcessor")
    try:
        reader = kind.from_pretrained(str(processor), local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{processor}: the image processor does not load: {error}") from error
    return SafetyChecker(module.to(device=placement.device), reader, placement)
