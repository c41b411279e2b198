"""Pretrained models as denoisers. Only this package imports diffusers; the rest sees `Denoiser`."""

from boomerang_batch.models.families import load_denoiser
from boomerang_batch.models.guidance import with_guidance

__all__ = ["load_denoiser", "with_guidance"]
