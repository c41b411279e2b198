"""Pixel-space models: a diffusers UNet2DModel as a `Denoiser`.

Unconditional or class-conditional. With a patch size p the network sees x folded by space-to-depth, (C, H, W)
to (C p^2, H/p, W/p), the Patched Diffusion idea (arXiv 2207.04316). Classifier-free guidance
(arXiv 2207.12598) is o = o_u + w (o_c - o_u), o_u the output under the null label.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from boomerang_batch.config.pipeline import ClassLabels, ModelSpec
from boomerang_batch.diffusion.denoiser import Denoiser, DenoiserSpec
from boomerang_batch.errors import ModelError
from boomerang_batch.models.device import DTYPES, choose_device, settle_numerics
from boomerang_batch.models.levels import read_chain
from boomerang_batch.models.network import describe, load_network
from boomerang_batch.models.source import find_source


@dataclass(frozen=True, kw_only=True)
class PixelDenoiser:
    """A pretrained pixel model on its device; implements `Denoiser`."""

    spec: DenoiserSpec
    network: torch.nn.Module
    device: torch.device
    dtype: torch.dtype
    memory_format: torch.memory_format
    patch_size: int
    class_labels: ClassLabels | None

    def denoise(self, x_t: Tensor, tau: Tensor, labels: Tensor | None) -> Tensor:
        """The network's raw output, (B, C, H, W) float32, on x_t's device.

        x_t (B, C, H, W) float32, tau (B,) float64, labels (B,) int64, or None for an unconditional model.
        Labels must lie in 0..spec.classes-1; the caller checks, since it knows whose label it is.
        """
        if (labels is None) != (self.class_labels is None):
            raise ModelError("labels go with a class-conditional model, and only with one")
        folded = functional.pixel_unshuffle(x_t, self.patch_size)
        told = tau.float() if self.spec.fractional_tau else tau.round().long()
        with torch.no_grad():
            output = self._guided(folded, told, labels)
        return functional.pixel_shuffle(output, self.patch_size).to(x_t.device)

    def _guided(self, folded: Tensor, tau: Tensor, labels: Tensor | None) -> Tensor:
        if labels is None or self.class_labels is None or self.class_labels.null_label is None:
            return self._evaluate(folded, tau, labels)
        weight = self.class_labels.guidance
        if weight == 1.0:
            return self._evaluate(folded, tau, labels)
        # One doubled batch, conditional rows first, so that its shape is as fixed as the caller's.
        null = torch.full_like(labels, self.class_labels.null_label)
        both = self._evaluate(torch.cat([folded, folded]), torch.cat([tau, tau]), torch.cat([labels, null]))
        conditional, unconditional = both.chunk(2)
        return unconditional + weight * (conditional - unconditional)

    def _evaluate(self, folded: Tensor, tau: Tensor, labels: Tensor | None) -> Tensor:
        """One forward pass; only here are the network's device, dtype and memory layout in force."""
        sample = folded.to(device=self.device, dtype=self.dtype, memory_format=self.memory_format)
        labels = None if labels is None else labels.to(self.device)
        output: Tensor = self.network(sample, tau.to(self.device), class_labels=labels).sample
        return output.to(dtype=torch.float32, memory_format=torch.contiguous_format)


def load_denoiser(spec: ModelSpec, *, device: str, threads: int | None) -> Denoiser:
    """Load the model a recipe names onto `device` (cpu, cuda or auto).

    Sets this process's PyTorch numerics to repeatable ones, with `threads` intra-op threads (None: unchanged).
    Raises ModelError for a model that can't be found or read, is not supported, or is not what `spec` says.
    """
    chosen = choose_device(device, dtype=spec.dtype)
    source = find_source(spec)
    chain = read_chain(source.scheduler_config, source=str(source.scheduler))
    described = describe(source, chain, spec)
    settle_numerics(chosen, threads=threads)
    dtype = DTYPES[spec.dtype]
    memory_format = torch.channels_last if spec.channels_last else torch.contiguous_format
    network = load_network(source, dtype=dtype).to(device=chosen)
    network = network.to(memory_format=memory_format)  # type: ignore[call-overload]
    return PixelDenoiser(
        spec=described,
        network=network,
        device=chosen,
        dtype=dtype,
        memory_format=memory_format,
        patch_size=spec.patch_size,
        class_labels=spec.class_labels,
    )
