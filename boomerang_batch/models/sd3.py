"""Stable Diffusion 3 and 3.5: SD3Transformer2DModel as a `Denoiser` (arXiv 2403.03206).

The network is told tau = 1000 s. A prompt is the states of two CLIPs beside each other, padded to T5's width,
followed by T5's; the pooled vector is both CLIPs' projections. A folder without T5 has zeros in its place, as
the model was trained to expect.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor
from torch.nn import functional

from boomerang_batch.config.pipeline import ModelSpec, Prompts
from boomerang_batch.errors import ModelError
from boomerang_batch.models.autoencoder import load_autoencoder
from boomerang_batch.models.device import Placement
from boomerang_batch.models.flow import (
    PATCH,
    FlowDenoiser,
    Network,
    Told,
    check_network,
    checked,
    describe,
    open_book,
)
from boomerang_batch.models.flow_levels import read_flow_chain
from boomerang_batch.models.network import integer
from boomerang_batch.models.source import Source
from boomerang_batch.models.text import load_text_encoders
from boomerang_batch.models.weights import load_weights, place

_T5_LENGTH = 256
"""Tokens of T5's part of a prompt, diffusers' default."""
_CLIP_LAYER = -2


def load(source: Source, spec: ModelSpec, placement: Placement) -> FlowDenoiser:
    """The model in `source`. Raises ModelError when it is not supported or is not what `spec` says."""
    prompts = spec.prompts or Prompts()
    autoencoder = load_autoencoder(source.parts["vae"], spec.autoencoder, placement)
    check_network(source, channels=autoencoder.latent_channels, patch_size=PATCH)
    config, where = source.network.config, str(source.network.where)
    described = describe(
        source,
        read_flow_chain(source.scheduler_config, source=str(source.scheduler), lowest_node="chain"),
        autoencoder,
        side=integer(config, "sample_size", where) * autoencoder.factor,
        largest=integer(config, "pos_embed_max_size", where),
    )
    book = open_book(_reader(source, placement), prompts)
    network = load_weights(source.network, SD3Transformer2DModel, dtype=placement.dtype)
    return FlowDenoiser(
        spec=described,
        network=_calling(place(network, placement)),
        autoencoder=autoencoder,
        placement=placement,
        book=book,
        prompts=prompts,
        guided=prompts.guidance != 1.0,
        twin=functools.cache(lambda: load(source, spec, placement.in_float32())),
    )


def _calling(module: torch.nn.Module) -> Network:
    def call(x: Tensor, tau: Tensor, sequence: Tensor, pooled: Tensor) -> Tensor:
        velocity: Tensor = module(
            hidden_states=x, timestep=tau, encoder_hidden_states=sequence, pooled_projections=pooled
        ).sample
        return velocity

    return call


def _reader(source: Source, placement: Placement) -> Callable[[str], Told]:
    """What the network is told for a prompt, by the text encoders."""
    first, second, t5 = load_text_encoders(source, placement, lengths=(None, None, _T5_LENGTH))
    if first is None or second is None:
        raise ModelError(
            f"{source.network.folder.parent}: model_index.json lists no text_encoder or no text_encoder_2, and "
            "Stable Diffusion 3 needs both; only text_encoder_3 may be missing"
        )
    clips = (first, second)
    width = integer(source.network.config, "joint_attention_dim", str(source.network.where))

    def read(prompt: str) -> Told:
        said = [clip.encode(prompt, layer=_CLIP_LAYER) for clip in clips]
        beside = torch.cat([one.hidden for one in said], dim=-1)
        after = beside.new_zeros(_T5_LENGTH, width) if t5 is None else t5.encode(prompt).hidden
        room = after.shape[-1] - beside.shape[-1]
        if room < 0:
            raise ModelError(
                f"{source.network.folder.parent}: both CLIPs together give {beside.shape[-1]} numbers a token "
                f"and T5's part of a prompt has {after.shape[-1]}; the parts don't belong together"
            )
        padded = functional.pad(beside, (0, room))
        pooled = torch.cat([one.pooled for one in said if one.pooled is not None])
        return checked(Told(sequence=torch.cat([padded, after]), pooled=pooled), source)

    return read
