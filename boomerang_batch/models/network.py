"""What a UNet2DModel is, from its configuration, checked against the recipe before any weight is read.

What a model can't do, or the recipe forgot to say, is refused here.
"""

from __future__ import annotations

from typing import Any

from boomerang_batch.config.pipeline import ModelSpec
from boomerang_batch.diffusion.denoiser import DenoiserSpec
from boomerang_batch.errors import ModelError
from boomerang_batch.models.autoencoder import Autoencoder
from boomerang_batch.models.levels import Chain
from boomerang_batch.models.source import Source


def describe(
    source: Source, chain: Chain, spec: ModelSpec, autoencoder: Autoencoder | None = None
) -> DenoiserSpec:
    """The denoiser's facts, from its configurations and the recipe; `autoencoder` for a network of latents.

    Raises ModelError when the network is of a kind that is not supported or the recipe contradicts it.
    """
    config, where = source.network.config, str(source.network.where)
    height, width = sample_size(config, where)
    embedding = config.get("time_embedding_type", "positional")
    if embedding == "fourier" and chain.levels.kind != "ve":
        raise ModelError(
            f"{where}: time_embedding_type fourier divides the output by what the network is told, which a "
            f"{source.scheduler_config['_class_name']} starts at 0; it needs a variance-exploding scheduler"
        )
    if embedding == "learned":
        rows = config.get("num_train_timesteps") or 0
        if rows < len(chain.levels) or chain.levels.kind != "vp":
            raise ModelError(
                f"{where}: the learned time embedding has {rows} rows (num_train_timesteps), the scheduler "
                f"{len(chain.levels)} noise levels; every level needs its row"
            )
    inside = _state_channels(config, where, learned_variance=chain.learned_variance)
    if autoencoder is None:
        channels, scale = _pixel_channels(inside, where, spec.patch_size), spec.patch_size
    else:
        channels, scale = autoencoder.channels, autoencoder.factor
        check_latents(inside, where, autoencoder)
    return DenoiserSpec(
        channels=channels,
        height=height * scale,
        width=width * scale,
        size_multiple=None if autoencoder is None else size_multiple(config, autoencoder),
        latent=autoencoder is not None,
        state_factor=1 if autoencoder is None else autoencoder.factor,
        value_range=chain.value_range,
        levels=chain.levels,
        prediction=chain.prediction,
        learned_variance=chain.learned_variance,
        clip_range=chain.clip_range,
        fractional_tau=embedding != "learned",
        conditioning="none" if spec.class_labels is None else "label",
        classes=_classes(config, where, spec),
        digest=source.digest,
    )


def sample_size(config: dict[str, Any], where: str) -> tuple[int, int]:
    """(height, width) that the network was trained on, in its own elements."""
    size = config.get("sample_size")
    sides = [size, size] if isinstance(size, int) else size
    if not isinstance(sides, list) or len(sides) != 2 or not all(isinstance(side, int) for side in sides):
        raise ModelError(
            f"{where}: sample_size is {size!r}; it must be the side, or [height, width], of the training"
        )
    return sides[0], sides[1]


def integer(config: dict[str, Any], field: str, where: str) -> int:
    """A number from 1 up that a configuration must have."""
    value = config.get(field)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(f"{where}: {field} is {value!r}; it must be a whole number, 1 or more")
    return value


def size_multiple(config: dict[str, Any], autoencoder: Autoencoder) -> int:
    """What a latent UNet's images must be multiples of: every level but the last halves the latents."""
    levels = config.get("block_out_channels") or [0] * 4
    return autoencoder.factor * 2 ** (len(levels) - 1)


def check_latents(channels: int, where: str, autoencoder: Autoencoder) -> None:
    """Raise ModelError unless the network takes the autoencoder's latents."""
    if channels != autoencoder.latent_channels:
        raise ModelError(
            f"{where}: in_channels {channels}, but {autoencoder.where} makes latents of "
            f"{autoencoder.latent_channels} channels; the two don't belong together, or the network is for "
            "inpainting, which is not supported"
        )


def _state_channels(config: dict[str, Any], where: str, *, learned_variance: bool) -> int:
    """Channels of the network's input; its output has as many, or twice as many with learned variances."""
    inside, outside = config.get("in_channels"), config.get("out_channels")
    if not isinstance(inside, int) or not isinstance(outside, int):
        raise ModelError(
            f"{where}: in_channels or out_channels is missing; write what the network was built with"
        )
    if outside == 2 * inside and not learned_variance:
        raise ModelError(
            f"{where}: out_channels {outside} is twice in_channels, a network that also predicts variances, "
            "but the scheduler says nothing of it; if they interpolate between the two fixed ones, write "
            "variance_type: learned_range into its scheduler_config.json"
        )
    if learned_variance and outside != 2 * inside:
        raise ModelError(
            f"{where}: out_channels {outside} is not twice in_channels {inside}, as the scheduler's "
            "variance_type learned_range needs"
        )
    if outside not in (inside, 2 * inside):
        raise ModelError(
            f"{where}: out_channels {outside} differs from in_channels {inside}; they must be equal"
        )
    return inside


def _pixel_channels(inside: int, where: str, patch_size: int) -> int:
    """Channels of a pixel, once space-to-depth is undone: 1 or 3."""
    channels, rest = divmod(inside, patch_size**2)
    if rest or channels not in (1, 3):
        raise ModelError(
            f"{where}: in_channels {inside} at model.patch_size {patch_size} gives {inside / patch_size**2:g} "
            "channels a pixel, and images have 1 or 3; set model.patch_size to the space-to-depth factor the "
            "network was trained with"
        )
    return channels


def _classes(config: dict[str, Any], where: str, spec: ModelSpec) -> int | None:
    """Rows of the class embedding, or None; the recipe must say the same."""
    if config.get("class_embed_type") is not None:
        raise ModelError(
            f"{where}: class_embed_type {config['class_embed_type']!r} is not supported; supported is a class "
            "embedding by num_class_embeds"
        )
    classes = config.get("num_class_embeds")
    if classes is None:
        if spec.class_labels is not None:
            raise ModelError(
                f"{where}: the network is unconditional; remove model.class_labels from the recipe"
            )
        return None
    if spec.class_labels is None:
        raise ModelError(
            f"{where}: the network is class-conditional ({classes} labels); say in the recipe where they come "
            "from, for example model.class_labels: {field: cls}"
        )
    null_label = spec.class_labels.null_label
    if null_label is not None and null_label >= classes:
        raise ModelError(
            f"model.class_labels.null_label {null_label}: the network has {classes} labels, 0..{classes - 1}"
        )
    return int(classes)
