"""Pretrained models as denoisers. Only this package imports diffusers; the rest sees `Denoiser`."""

from boomerang_batch.models.families import load_denoiser

__all__ = ["load_denoiser"]
