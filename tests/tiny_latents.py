"""Latent UNet pipelines with small random weights, as diffusers builds them: Stable Diffusion 1/2 and XL, LDM.

Images are 16x16 at the trained size and their latents 8x8; a UNet halves those once.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    LDMPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    VQModel,
)
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPConfig, CLIPImageProcessor

from tests import tiny_models, tiny_transformers
from tests.tiny_transformers import SIDE, seeded

_CLIP_WIDTH = 8
_EYE = 16
"""Pixels that the safety checker looks at, along each side."""


_CHAIN = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
"""What Stable Diffusion was trained on."""


def scheduler(**options: object) -> DDIMScheduler:
    """Stable Diffusion's chain, with the settings that make DDIM end at its lowest noise level."""
    return DDIMScheduler(**_CHAIN | {"clip_sample": False, "set_alpha_to_one": False} | options)


def euler(**options: object) -> EulerDiscreteScheduler:
    """Stable Diffusion's chain as XL's own files have it."""
    return EulerDiscreteScheduler(**_CHAIN | {"timestep_spacing": "leading"} | options)


def unet(seed: int = 1, *, width: int = _CLIP_WIDTH, **options: object) -> UNet2DConditionModel:
    """A two-level network told prompts of `width`."""
    settings = {
        "sample_size": SIDE // 2,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "cross_attention_dim": width,
    }
    return seeded(lambda: UNet2DConditionModel(**settings | options), seed).eval()


def vae(seed: int = 2, **options: object) -> AutoencoderKL:
    """RGB images to four channels of half the side."""
    plain = {"latent_channels": 4, "scaling_factor": 1.5, "shift_factor": None, "force_upcast": False}
    return tiny_transformers.autoencoder(
        seed, **plain | {"use_quant_conv": True, "use_post_quant_conv": True} | options
    )


def stable_diffusion(
    *, noise: Any = None, safety: StableDiffusionSafetyChecker | None = None, **network: object
) -> StableDiffusionPipeline:
    """Stable Diffusion 1 or 2."""
    return StableDiffusionPipeline(
        vae=vae(),
        text_encoder=loud(tiny_transformers.clip(3)),
        tokenizer=tiny_transformers.clip_tokenizer(),
        unet=unet(**network),
        scheduler=noise or scheduler(),
        safety_checker=safety,
        feature_extractor=None if safety is None else image_processor(),
        requires_safety_checker=safety is not None,
    )


def stable_diffusion_xl(*, noise: Any = None, **settings: Any) -> StableDiffusionXLPipeline:
    """Stable Diffusion XL: two text encoders side by side, the second one's pooled embedding, six size ids."""
    network = unet(
        width=2 * _CLIP_WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + _CLIP_WIDTH,
        use_linear_projection=True,
    )
    return StableDiffusionXLPipeline(
        vae=vae(force_upcast=True),
        text_encoder=loud(tiny_transformers.clip(3)),
        text_encoder_2=loud(tiny_transformers.projecting_clip(4)),
        tokenizer=tiny_transformers.clip_tokenizer(),
        tokenizer_2=tiny_transformers.clip_tokenizer(),
        unet=network,
        scheduler=noise or scheduler(),
        add_watermarker=False,
        **settings,
    )


def vq(seed: int = 2, **options: object) -> VQModel:
    """RGB images to three channels of half the side, of 16 code vectors."""
    settings = {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 4,
        "latent_channels": 3,
        "num_vq_embeddings": 16,
        "scaling_factor": 1.0,
    }
    return seeded(lambda: VQModel(**settings | options), seed).eval()


def ldm(autoencoder: AutoencoderKL | VQModel, noise: Any = None, **network: object) -> LDMPipeline:
    """An unconditional latent pipeline."""
    channels = autoencoder.config.latent_channels
    plain = tiny_models.network(in_channels=channels, out_channels=channels, **network)
    return LDMPipeline(vqvae=autoencoder, unet=plain, scheduler=noise or scheduler())


def loud(model: Any) -> Any:
    """The model with weights large enough that prompts tell."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def safety_checker(threshold: float, special: float = 1.0) -> StableDiffusionSafetyChecker:
    """A checker whose concepts are random directions, all with one threshold of the cosine."""
    vision = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": _EYE,
        "patch_size": 8,
    }
    config = CLIPConfig(vision_config=vision, projection_dim=8)
    checker = loud(seeded(lambda: StableDiffusionSafetyChecker(config), 6)).eval()
    checker.concept_embeds_weights.data.fill_(threshold)
    checker.special_care_embeds_weights.data.fill_(special)
    return checker


def image_processor() -> CLIPImageProcessor:
    """What shows images to `safety_checker`."""
    return CLIPImageProcessor(size={"shortest_edge": _EYE}, crop_size={"height": _EYE, "width": _EYE})
