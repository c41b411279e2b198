"""Latent transformer pipelines of diffusers with small random weights: DiT, Stable Diffusion 3 and Flux.

Images are 16x16 at the trained size, their latents 8x8, patches 2x2 of those. Tokenizers are built here,
offline: a word becomes its letters.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import TypeVar

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

SIDE = 16
"""Pixels of the trained size."""
CLASSES = 1000
"""DiTPipeline writes its null label, 1000, into its code."""

_CLIP_WIDTH, _T5_WIDTH = 8, 24
Made = TypeVar("Made")


def seeded(build: Callable[[], Made], seed: int) -> Made:
    """What `build` makes, its weights drawn from `seed` without touching the global RNG."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build()


def autoencoder(seed: int = 0, **options: object) -> AutoencoderKL:
    """RGB images to latents of half the side; 16 channels, scale and shift of the kind Flux has."""
    settings = {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 4,
        "latent_channels": 16,
        "sample_size": SIDE,
        "scaling_factor": 1.5,
        "shift_factor": 0.1,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
    return seeded(lambda: AutoencoderKL(**settings | options), seed).eval()


def clip_tokenizer() -> CLIPTokenizer:
    """Byte-level, no merges."""
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)}, merges=[], model_max_length=77
    )


def t5_tokenizer() -> T5TokenizerFast:
    """A unigram model of printable ASCII."""
    letters = [character for character in string.printable if not character.isspace()]
    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *letters]
    return T5TokenizerFast(vocab=[(piece, -1.0) for piece in pieces], extra_ids=0, model_max_length=512)


def _clip_config() -> CLIPTextConfig:
    tokenizer = clip_tokenizer()
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=_CLIP_WIDTH,
        intermediate_size=16,
        projection_dim=_CLIP_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def clip(seed: int = 0) -> CLIPTextModel:
    """A text encoder whose pooled output is not projected."""
    return seeded(lambda: CLIPTextModel(_clip_config()), seed).eval()


def projecting_clip(seed: int = 0) -> CLIPTextModelWithProjection:
    """A text encoder whose pooled output is projected."""
    return seeded(lambda: CLIPTextModelWithProjection(_clip_config()), seed).eval()


def t5(seed: int = 0) -> T5EncoderModel:
    """A T5 encoder."""
    config = T5Config(
        vocab_size=len(t5_tokenizer()),
        d_model=_T5_WIDTH,
        d_kv=8,
        d_ff=16,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return seeded(lambda: T5EncoderModel(config), seed).eval()


def dit(seed: int = 0, **options: object) -> DiTPipeline:
    """Class-conditional, learned variance, the chain of DiT-XL."""
    settings = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 2,
        "sample_size": SIDE // 2,
        "num_embeds_ada_norm": CLASSES,
    }
    return DiTPipeline(
        transformer=seeded(lambda: DiTTransformer2DModel(**settings | options), seed).eval(),
        vae=autoencoder(latent_channels=4, scaling_factor=0.8, shift_factor=None),
        scheduler=DDIMScheduler(beta_schedule="linear", beta_end=0.02, clip_sample=False),
    )


def sd3(seed: int = 0, *, with_t5: bool = True, **scheduler: object) -> StableDiffusion3Pipeline:
    """Two projecting CLIPs, T5 or none, a fixed shift."""
    transformer = seeded(
        lambda: SD3Transformer2DModel(
            sample_size=SIDE // 2,
            patch_size=2,
            in_channels=16,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=_T5_WIDTH,
            caption_projection_dim=16,
            pooled_projection_dim=2 * _CLIP_WIDTH,
            out_channels=16,
            pos_embed_max_size=8,
        ),
        seed,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0} | scheduler),
        vae=autoencoder(),
        text_encoder=projecting_clip(1),
        tokenizer=clip_tokenizer(),
        text_encoder_2=projecting_clip(2),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5() if with_t5 else None,
        tokenizer_3=t5_tokenizer() if with_t5 else None,
    )


def flux(seed: int = 0, *, guidance_embeds: bool = True, **scheduler: object) -> FluxPipeline:
    """CLIP's pooled output and T5, packed latents, a shift that grows with the image unless told otherwise."""
    transformer = seeded(
        lambda: FluxTransformer2DModel(
            patch_size=1,
            in_channels=64,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=_T5_WIDTH,
            pooled_projection_dim=_CLIP_WIDTH,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=(4, 6, 6),
        ),
        seed,
    )
    dynamic = {"use_dynamic_shifting": True, "base_image_seq_len": 16, "max_image_seq_len": 64, "shift": 3.0}
    return FluxPipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(**dynamic | scheduler),
        vae=autoencoder(),
        text_encoder=clip(1),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5(),
        tokenizer_2=t5_tokenizer(),
    )
