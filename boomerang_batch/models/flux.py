"""Flux: FluxTransformer2DModel as a `Denoiser`.

The network sees 2x2 patches of the latent as tokens, each with its row and column, and is told s, which it
multiplies by 1000 itself. Packing is internal: the state stays (c, h, w). A prompt is T5's states, with CLIP's
pooled state as the pooled vector.

Guidance: a network distilled for it (guidance_embeds, FLUX.1 [dev]) takes model.prompts.guidance as an input in
every evaluation, and there is no negative prompt; the recipe's default of 1 tells it 1, where diffusers tells
3.5 for generation and 7 for img2img unless asked otherwise. Other networks (FLUX.1 [schnell]) are guided
classifier-free like the other families, off by default.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from diffusers import FluxTransformer2DModel
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

_T5_LENGTH = 512
"""Tokens of a prompt, diffusers' default."""
_TIME_SCALE = 1000
"""By which the network multiplies the time it is told."""


def load(source: Source, spec: ModelSpec, placement: Placement) -> FlowDenoiser:
    """The model in `source`. Raises ModelError when it is not supported or is not what `spec` says."""
    prompts = spec.prompts or Prompts()
    distilled = bool(source.network.config.get("guidance_embeds"))
    if distilled and (prompts.negative or prompts.rescale):
        raise ModelError(
            f"{source.network.where}: guidance_embeds: the network takes guidance as an input, so there is "
            "nothing for model.prompts.negative or model.prompts.rescale to act on; remove them"
        )
    autoencoder = load_autoencoder(source.parts["vae"], spec.autoencoder, placement)
    # Its tokens are patches already, so the network itself makes none.
    check_network(source, channels=autoencoder.latent_channels * PATCH**2, patch_size=1)
    chain = read_flow_chain(source.scheduler_config, source=str(source.scheduler), lowest_node="step")
    # Its own configuration does not say what size it was trained on.
    vae = source.parts["vae"]
    described = describe(source, chain, autoencoder, side=integer(vae.config, "sample_size", str(vae.where)))
    book = open_book(_reader(source, placement), prompts)
    network = place(load_weights(source.network, FluxTransformer2DModel, dtype=placement.dtype), placement)
    return FlowDenoiser(
        spec=described,
        network=_calling(network, prompts.guidance if distilled else None),
        autoencoder=autoencoder,
        placement=placement,
        book=book,
        prompts=prompts,
        guided=not distilled and prompts.guidance != 1.0,
        twin=functools.cache(lambda: load(source, spec, placement.in_float32())),
        distilled=functools.partial(_calling, network) if distilled else None,
    )


def pack(x: Tensor) -> Tensor:
    """Tokens (B, h/2 * w/2, 4c) of latents (B, c, h, w): a patch's elements by channel, row, column."""
    return functional.pixel_unshuffle(x, PATCH).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Latents (B, c, height, width) of tokens; undoes `pack`."""
    folded = tokens.transpose(1, 2).reshape(len(tokens), -1, height // PATCH, width // PATCH)
    return functional.pixel_shuffle(folded, PATCH)


def token_places(height: int, width: int, device: torch.device) -> Tensor:
    """(h/2 * w/2, 3) float32: zero, row and column of each token of a latent of height x width."""
    rows = torch.arange(height // PATCH, device=device)
    columns = torch.arange(width // PATCH, device=device)
    places = torch.cartesian_prod(rows, columns).float()
    return functional.pad(places, (1, 0))


def _calling(module: torch.nn.Module, guidance: float | None) -> Network:
    """`guidance`: the input of a distilled network, None for one without."""

    def call(x: Tensor, tau: Tensor, sequence: Tensor, pooled: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        tokens: Tensor = module(
            hidden_states=pack(x),
            timestep=tau / _TIME_SCALE,
            guidance=None if guidance is None else tau.new_full((len(x),), guidance),
            encoder_hidden_states=sequence,
            pooled_projections=pooled,
            txt_ids=tau.new_zeros(sequence.shape[1], 3),
            img_ids=token_places(height, width, x.device),
        ).sample
        return unpack(tokens, height, width)

    return call


def _reader(source: Source, placement: Placement) -> Callable[[str], Told]:
    """What the network is told for a prompt, by the text encoders."""
    clip, t5 = load_text_encoders(source, placement, lengths=(None, _T5_LENGTH))
    if clip is None or t5 is None:
        raise ModelError(
            f"{source.network.folder.parent}: model_index.json lists no text_encoder or no text_encoder_2, and "
            "Flux needs both"
        )
    both = clip, t5

    def read(prompt: str) -> Told:
        pooled, states = both[0].encode(prompt).pooled, both[1].encode(prompt).hidden
        if pooled is None:
            raise ModelError(
                f"{source.parts['text_encoder'].where}: Flux needs a CLIP here, which pools its states"
            )
        return checked(Told(sequence=states, pooled=pooled), source)

    return read
