"""DiT: a class-conditional transformer on latents, with learned variance (arXiv 2212.09748).

To us it is one more network of latents under a label. Its output is the noise and, in as many channels again,
where the log variance lies. Guidance leads all channels of the noise away from the null label's, as diffusers
does (the authors' own sampler guides the first three only); the variance stays the label's.
"""

from __future__ import annotations

import functools

from diffusers import DiTTransformer2DModel

from boomerang_batch.config.pipeline import ModelSpec
from boomerang_batch.diffusion.denoiser import DenoiserSpec
from boomerang_batch.errors import ModelError
from boomerang_batch.models.autoencoder import Autoencoder, load_autoencoder
from boomerang_batch.models.device import Placement
from boomerang_batch.models.latent import LatentDenoiser
from boomerang_batch.models.levels import read_chain
from boomerang_batch.models.network import check_latents, integer, sample_size
from boomerang_batch.models.source import Source
from boomerang_batch.models.weights import load_weights, place


def load(source: Source, spec: ModelSpec, placement: Placement) -> LatentDenoiser:
    """The DiT in `source`. Raises ModelError when it is not supported or is not what `spec` says."""
    autoencoder = load_autoencoder(source.parts["vae"], spec.autoencoder, placement)
    described = _describe(source, spec, autoencoder)
    return LatentDenoiser(
        spec=described,
        network=place(load_weights(source.network, DiTTransformer2DModel, dtype=placement.dtype), placement),
        placement=placement,
        patch_size=1,
        class_labels=spec.class_labels,
        twin=functools.cache(lambda: load(source, spec, placement.in_float32())),
        autoencoder=autoencoder,
    )


def _describe(source: Source, spec: ModelSpec, autoencoder: Autoencoder) -> DenoiserSpec:
    config, where = source.network.config, str(source.network.where)
    # DiTTransformer2DModel was part of Transformer2DModel once, which published files still say they are.
    norm = config.get("norm_type", "ada_norm_zero")
    if norm != "ada_norm_zero":
        raise ModelError(f"{where}: norm_type {norm!r} is not supported; a DiT has ada_norm_zero")
    channels = integer(config, "in_channels", where)
    check_latents(channels, where, autoencoder)
    outside = config.get("out_channels") or channels
    if outside not in (channels, 2 * channels):
        raise ModelError(
            f"{where}: out_channels {outside}; a DiT gives in_channels {channels}, or twice as many with a "
            "learned variance"
        )
    height, width = sample_size(config, where)
    chain = read_chain(source.scheduler_config, source=str(source.scheduler))
    return DenoiserSpec(
        channels=autoencoder.channels,
        height=height * autoencoder.factor,
        width=width * autoencoder.factor,
        size_multiple=None,  # the network puts its patches together as a square, whatever the image was
        latent=True,
        state_factor=autoencoder.factor,
        value_range=chain.value_range,
        levels=chain.levels,
        prediction=chain.prediction,
        learned_variance=outside == 2 * channels,
        clip_range=chain.clip_range,
        fractional_tau=True,
        conditioning="label",
        classes=_classes(config, where, spec),
        digest=source.digest,
    )


def _classes(config: dict[str, object], where: str, spec: ModelSpec) -> int:
    """Rows of the class embedding, the null label last; the recipe must say the same."""
    null_label = integer(config, "num_embeds_ada_norm", where)
    if spec.class_labels is None:
        raise ModelError(
            f"{where}: the network is class-conditional ({null_label + 1} labels, the last for no class); say "
            f"in the recipe where they come from: model.class_labels: {{field: cls, null_label: {null_label}}}"
        )
    if spec.class_labels.null_label not in (None, null_label):
        raise ModelError(
            f"model.class_labels.null_label {spec.class_labels.null_label}: what means 'no class' to this "
            f"network is {null_label}; write that"
        )
    return null_label + 1
