"""A network's configuration checked against the recipe, and its weights read into a module.

What a model can't do, or the recipe forgot to say, is refused here, before any weight is read. Loading is
strict: a tensor that is missing, left over or of another shape is an error, never a random initialisation.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DModel
from safetensors import SafetensorError

from boomerang_batch.config.pipeline import ModelSpec
from boomerang_batch.diffusion.denoiser import DenoiserSpec
from boomerang_batch.errors import ModelError
from boomerang_batch.models.levels import Chain
from boomerang_batch.models.source import Source


def describe(source: Source, chain: Chain, spec: ModelSpec) -> DenoiserSpec:
    """The denoiser's facts, from its configurations and the recipe.

    Raises ModelError when the network is of a kind that is not supported or the recipe contradicts it.
    """
    config, where = source.network_config, f"{source.network / 'config.json'}"
    height, width = _sample_size(config, where)
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
    return DenoiserSpec(
        channels=_pixel_channels(config, where, spec.patch_size),
        height=height * spec.patch_size,
        width=width * spec.patch_size,
        value_range=chain.value_range,
        levels=chain.levels,
        prediction=chain.prediction,
        clip_range=chain.clip_range,
        fractional_tau=embedding != "learned",
        classes=_classes(config, where, spec),
        digest=source.digest,
    )


def load_network(source: Source, *, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The network on the CPU, in `dtype` and evaluation mode. Raises ModelError naming what does not fit."""
    try:
        network, report = UNet2DModel.from_pretrained(
            str(source.network),
            variant=source.variant,
            use_safetensors=True,
            local_files_only=True,
            low_cpu_mem_usage=False,
            torch_dtype=dtype,
            output_loading_info=True,
        )
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(
            f"{source.network}: the weights don't load into the configured network: {reason}"
        ) from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := [str(name) for name in report.get(problem, [])]:
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise ModelError(
                f"{source.network}: weights and config.json don't belong together: "
                f"{problem.replace('_', ' ')} {shown}"
            )
    module: torch.nn.Module = network.requires_grad_(False).eval()
    # Loaded tensors lie wherever the file's header left them, and CPU kernels choose by alignment: the last
    # bits of a result would depend on that. Fresh copies are aligned alike in every process.
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = tensor.data.clone()
    return module


def _sample_size(config: dict[str, Any], where: str) -> tuple[int, int]:
    size = config.get("sample_size")
    sides = [size, size] if isinstance(size, int) else size
    if not isinstance(sides, list) or len(sides) != 2 or not all(isinstance(side, int) for side in sides):
        raise ModelError(
            f"{where}: sample_size is {size!r}; it must be the side, or [height, width], of the training"
        )
    return sides[0], sides[1]


def _pixel_channels(config: dict[str, Any], where: str, patch_size: int) -> int:
    """Channels of a pixel, once space-to-depth is undone: 1 or 3."""
    inside, outside = config.get("in_channels"), config.get("out_channels")
    if not isinstance(inside, int) or not isinstance(outside, int):
        raise ModelError(
            f"{where}: in_channels or out_channels is missing; write what the network was built with"
        )
    if outside == 2 * inside:
        raise ModelError(
            f"{where}: out_channels {outside} is twice in_channels, a network that also predicts variances; "
            "learned variances are not supported"
        )
    if outside != inside:
        raise ModelError(
            f"{where}: out_channels {outside} differs from in_channels {inside}; they must be equal"
        )
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
