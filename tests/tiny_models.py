"""Diffusers folders with small random weights, made in milliseconds, for the tests of several rooms."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DDPMPipeline, DDPMScheduler, ScoreSdeVeScheduler, UNet2DModel

VE_OPTIONS = {"num_train_timesteps": 12, "sigma_min": 0.01, "sigma_max": 50.0}


def network(seed: int = 0, **options: object) -> UNet2DModel:
    """A two-level UNet2DModel on 8x8 RGB, its weights drawn from `seed` without touching the global RNG."""
    settings = {
        "sample_size": 8,
        "in_channels": 3,
        "out_channels": 3,
        "layers_per_block": 1,
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "attention_head_dim": 8,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return UNet2DModel(**settings | options).eval()


def scheduler(**options: object) -> DDPMScheduler:
    """A DDPM scheduler over 20 timesteps."""
    return DDPMScheduler(**{"num_train_timesteps": 20, "beta_end": 0.3} | options)


def save_pipeline(folder: Path, *, unet: UNet2DModel | None = None, noise: DDPMScheduler | None = None) -> Path:
    """A pipeline folder as diffusers itself saves it."""
    DDPMPipeline(unet or network(), noise or scheduler()).save_pretrained(folder)
    return folder


def save_score_model(folder: Path) -> tuple[Path, UNet2DModel, ScoreSdeVeScheduler]:
    """A ScoreSdeVePipeline folder: fourier time embedding, output divided by sigma inside the network."""
    from diffusers import ScoreSdeVePipeline

    unet = network(time_embedding_type="fourier")
    noise = ScoreSdeVeScheduler(**VE_OPTIONS)
    ScoreSdeVePipeline(unet, noise).save_pretrained(folder)
    return folder, unet, noise
