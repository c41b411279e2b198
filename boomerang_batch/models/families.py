"""Which model families are supported: one table, from the diffusers pipeline's name to what loads it.

A family says which folders of the pipeline it needs (its layout) and gives a loader. To add one, write a
loader `load(source, spec, placement) -> Denoiser` and a row here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from boomerang_batch.config.blocks import ENTRY_POINT, Autoencoder
from boomerang_batch.config.pipeline import ModelSpec
from boomerang_batch.diffusion.denoiser import Denoiser
from boomerang_batch.errors import ModelError
from boomerang_batch.models import dit, flux, latent, pixel, sd3, stable_diffusion
from boomerang_batch.models.device import Placement, choose_placement, settle_numerics
from boomerang_batch.models.plugins import load_installed
from boomerang_batch.models.source import Layout, Source, find_source


@dataclass(frozen=True, kw_only=True)
class Family:
    """Pipelines that are loaded alike."""

    layout: Layout
    load: Callable[[Source, ModelSpec, Placement], Denoiser]


_PIXEL = Family(layout=Layout(network="unet", network_class="UNet2DModel"), load=pixel.load)
_LATENT = Family(
    layout=Layout(network="unet", network_class="UNet2DModel", autoencoder="vqvae"), load=latent.load
)
_STABLE_DIFFUSION = Family(
    layout=Layout(
        network="unet",
        network_class="UNet2DConditionModel",
        autoencoder="vae",
        text=(("text_encoder", "tokenizer"),),
        safety="safety_checker",
    ),
    load=stable_diffusion.load,
)
_STABLE_DIFFUSION_XL = Family(
    layout=Layout(
        network="unet",
        network_class="UNet2DConditionModel",
        autoencoder="vae",
        text=(("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")),
    ),
    load=stable_diffusion.load,
)
_DIT = Family(
    layout=Layout(
        network="transformer",
        network_class="DiTTransformer2DModel",
        former_class="Transformer2DModel",
        autoencoder="vae",
    ),
    load=dit.load,
)
_STABLE_DIFFUSION_3 = Family(
    layout=Layout(
        network="transformer",
        network_class="SD3Transformer2DModel",
        autoencoder="vae",
        text=(
            ("text_encoder", "tokenizer"),
            ("text_encoder_2", "tokenizer_2"),
            ("text_encoder_3", "tokenizer_3"),
        ),
    ),
    load=sd3.load,
)
_FLUX = Family(
    layout=Layout(
        network="transformer",
        network_class="FluxTransformer2DModel",
        autoencoder="vae",
        text=(("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")),
    ),
    load=flux.load,
)

FAMILIES: dict[str | None, Family] = {
    None: _PIXEL,  # a bare network, without model_index.json
    "DDIMPipeline": _PIXEL,
    "DDPMPipeline": _PIXEL,
    "DiTPipeline": _DIT,
    "FluxImg2ImgPipeline": _FLUX,
    "FluxPipeline": _FLUX,
    "LDMPipeline": _LATENT,
    "ScoreSdeVePipeline": _PIXEL,
    "StableDiffusion3Img2ImgPipeline": _STABLE_DIFFUSION_3,
    "StableDiffusion3Pipeline": _STABLE_DIFFUSION_3,
    "StableDiffusionImg2ImgPipeline": _STABLE_DIFFUSION,
    "StableDiffusionPipeline": _STABLE_DIFFUSION,
    "StableDiffusionXLImg2ImgPipeline": _STABLE_DIFFUSION_XL,
    "StableDiffusionXLPipeline": _STABLE_DIFFUSION_XL,
}


def find_model(spec: ModelSpec) -> Source:
    """The files of the model a recipe names. Raises ModelError when it can't be found or is not supported."""
    return find_source(spec, {pipeline: family.layout for pipeline, family in FAMILIES.items()})


def load_denoiser(spec: ModelSpec, *, device: str, threads: int | None) -> Denoiser:
    """Load the model a recipe names onto `device` (cpu, cuda or auto).

    Sets this process's PyTorch numerics to repeatable ones, with `threads` intra-op threads (None: unchanged).
    Raises ModelError for a model that can't be found or read, is not supported, or is not what `spec` says.
    """
    if spec.source.startswith(ENTRY_POINT):
        return load_installed(spec, device=device, threads=threads)
    placement = choose_placement(spec, device)
    source = find_model(spec)
    _check_conditioning(source, spec)
    settle_numerics(placement.device, threads=threads)
    return FAMILIES[source.pipeline].load(source, spec, placement)


def _check_conditioning(source: Source, spec: ModelSpec) -> None:
    """Refuse what the recipe asks of a family that has no such thing."""
    layout, where = source.layout, source.network.folder
    if spec.prompts is not None and not layout.text:
        raise ModelError(f"{where}: the model takes no prompts; remove model.prompts from the recipe")
    if spec.class_labels is not None and layout.text:
        raise ModelError(
            f"{where}: the model takes prompts, not labels; remove model.class_labels from the recipe, and "
            "see model.prompts"
        )
    if layout.autoencoder is None and spec.autoencoder != Autoencoder():
        raise ModelError(f"{where}: the model has no autoencoder; remove model.autoencoder from the recipe")
    if spec.patch_size != 1 and layout.autoencoder is not None:
        raise ModelError(
            f"{where}: model.patch_size {spec.patch_size} is for networks of pixels; this one works on an "
            "autoencoder's latents: remove it"
        )
