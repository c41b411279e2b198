"""Energy guidance: at each step the model's estimate of x_0 is moved a little to where an energy is lower.

    x0h  <-  x0h - scale * r * g / rms(g),   g = gradient of the energy,   r = sigma / sqrt(alpha^2 + sigma^2)

The gradient is taken at the estimate, through the energy and not through the network (manifold preserving
guidance, arXiv 2311.16424, algorithm 1; the "backward" guidance of arXiv 2302.07121). Its length is taken out,
as FreeDoM does (arXiv 2303.09833), so that `scale` means the same for any energy and any size of image: the
root mean square of a step's move in units of r. That is how unsure x_0 still is at this noise, the posterior's
standard deviation for data of unit variance (as in pseudoinverse-guided diffusion, ICLR 2023). So moves are
large where the image is still open, and next to nothing where it is finished.

A denoiser that is guided is a denoiser again: it answers with the network's own kind of prediction, of the
moved estimate, and samplers, slots and codes know nothing of it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from boomerang_batch.diffusion.denoiser import Condition, Denoiser, DenoiserSpec, Guided
from boomerang_batch.diffusion.samplers import readings
from boomerang_batch.diffusion.schedule import level_at_tau
from boomerang_batch.diffusion.transfer import to_device, upload
from boomerang_batch.errors import ModelError

_ROUNDING = 1e-9
"""Of a node's fraction, which is told by its tau."""


class Energy(Protocol):
    """A differentiable score of images, lower where they are more wanted."""

    @property
    def name(self) -> str:
        """What messages call it."""
        ...

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of all that decides on it."""
        ...

    @property
    def classes(self) -> int | None:
        """How many classes a sample may be about; None where samples are about an image."""
        ...

    def reference(self, about: int | Tensor) -> Tensor:
        """What `of` is given of a sample about a class, or about an image (C, H, W) in 0..1; see Guided."""
        ...

    def of(self, images: Tensor, references: Tensor) -> Tensor:
        """The energies (B,) of images (B, C, H, W) float32 in 0..1, each with its reference.

        Row b depends on row b of both alone.
        """
        ...


class EnergyGuided:
    """A pixel model's denoiser whose samples an energy may guide; implements `Denoiser`.

    Those whose condition is no `Guided` come out as they would without it, to the last bit.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        energy: Energy,
        *,
        scale: float,
        within: tuple[float, float] = (0.0, 1.0),
        clip_range: float | None = None,
    ) -> None:
        """`within`: the fractions of the noise chain in which it guides, as t's fraction counts; `clip_range`
        as the solver clamps x0h, so that nothing of a move is lost in what is clamped away.
        """
        self._denoiser = denoiser
        self._energy = energy
        self._scale = scale
        self._within = within
        self._clip_range = clip_range
        described = json.dumps([denoiser.spec.digest, energy.digest], separators=(",", ":"))
        self._spec = dataclasses.replace(
            denoiser.spec,
            guided_classes=energy.classes,
            digest=hashlib.sha256(described.encode()).hexdigest(),
        )
        # Asked once for each draw, in a batch of one; forgotten with it.
        self._references: WeakKeyDictionary[Guided, Tensor] = WeakKeyDictionary()

    @property
    def model(self) -> Denoiser:
        """What it guides."""
        return self._denoiser

    @property
    def energy(self) -> Energy:
        """What guides it."""
        return self._energy

    @property
    def spec(self) -> DenoiserSpec:
        """The model's, with a digest that tells the energy too."""
        return self._spec

    def encode(self, images: Tensor) -> Tensor:
        """Images to states."""
        return self._denoiser.encode(images)

    def decode(self, x_0: Tensor) -> Tensor:
        """States to images."""
        return self._denoiser.decode(x_0)

    def flagged(self, images: Tensor) -> list[bool]:
        """What the safety checker says."""
        return self._denoiser.flagged(images)

    def in_float32(self) -> Denoiser:
        """The same with the network in full precision; the energy always is."""
        exact = self._denoiser.in_float32()
        if exact is self._denoiser:
            return self
        return EnergyGuided(
            exact, self._energy, scale=self._scale, within=self._within, clip_range=self._clip_range
        )

    def denoise(self, x_t: Tensor, tau: Tensor, conditions: Sequence[Condition]) -> Tensor:
        """The network's output for states x_t, as if it had estimated what guided samples are moved to.

        Raises ModelError where the energy doesn't keep its contract; where it gives NaN, so does this.
        """
        told = [one.condition if isinstance(one, Guided) else one for one in conditions]
        output = self._denoiser.denoise(x_t, tau, told)
        factor = self._spec.state_factor
        levels = self._spec.levels_at(x_t.shape[2] * factor, x_t.shape[3] * factor)
        alpha, sigma, fraction = level_at_tau(levels, tau)
        acts = within(fraction, self._within)
        acts &= torch.tensor([isinstance(one, Guided) for one in conditions])
        if not acts.any():
            return output

        channels = x_t.shape[1]
        from_x, from_output = readings(self._spec.prediction, alpha, sigma)
        reach = self._scale * sigma / (alpha**2 + sigma**2).sqrt()
        columns = to_device(torch.stack([from_x, from_output, reach, acts.double()]), x_t.device)
        from_x, from_output, reach, acts = (column.to(x_t.dtype).view(-1, 1, 1, 1) for column in columns)
        mean = output[:, :channels]
        estimate = from_x * x_t + from_output * mean
        bound = torch.inf if self._clip_range is None else self._clip_range
        begin = estimate.clamp(-bound, bound)
        move = -reach * _unit(self.gradient(begin, conditions))
        moved = torch.where(acts > 0, mean + (begin + move - estimate) / from_output, mean)
        return torch.cat([moved, output[:, channels:]], dim=1)

    def gradient(self, x_0: Tensor, conditions: Sequence[Condition]) -> Tensor:
        """Where the energy of each image x_0 (B, C, H, W) in the value range grows; NaN where it has none.

        Rows that are not guided mean nothing.

        Images are clamped to the value range for the energy, and the gradient taken as if they were not. Raises
        ModelError.
        """
        # Callers are in inference mode, whose tensors autograd may not have: a clone is an ordinary one.
        with torch.inference_mode(False), torch.enable_grad():
            images = self._shown(x_0.clone()).requires_grad_()
            energies = self._energy.of(images, self._referenced(conditions, x_0.device))
            self._check(energies, len(images))
            (gradient,) = torch.autograd.grad(energies.sum(), images)
        spoilt = ~energies.detach().isfinite().view(-1, 1, 1, 1)
        return gradient.masked_fill(spoilt, torch.nan)

    def _referenced(self, conditions: Sequence[Condition], device: torch.device) -> Tensor:
        """What each row is compared with, (B, ...); zeros for those that are not guided."""
        found = [self._reference(one, device) if isinstance(one, Guided) else None for one in conditions]
        nothing = torch.zeros_like(next(one for one in found if one is not None))
        return torch.stack([nothing if one is None else one for one in found])

    def _reference(self, guided: Guided, device: torch.device) -> Tensor:
        if guided not in self._references:
            about = guided.about
            if isinstance(about, Tensor):
                about = self._shown(upload(about, device))
            with torch.no_grad():
                found = self._energy.reference(about)
            self._references[guided] = found if found.device == device else to_device(found, device)
        return self._references[guided]

    def _shown(self, images: Tensor) -> Tensor:
        """Images in the value range as energies see them, in 0..1."""
        low, high = self._spec.value_range
        return ((images.float() - low) / (high - low)).clamp(0, 1)

    def _check(self, energies: object, count: int) -> None:
        who = f"energy {self._energy.name}"
        if not isinstance(energies, Tensor) or energies.shape != (count,) or energies.dtype != torch.float32:
            given = f"{energies.dtype} {tuple(energies.shape)}" if isinstance(energies, Tensor) else energies
            raise ModelError(f"{who} comes to {given} for {count} images; it must be float32 ({count},)")
        if not energies.requires_grad:
            raise ModelError(
                f"{who} has no gradient: it must compute on the images with torch, without no_grad and detach"
            )


def within(fractions: Tensor, ends: tuple[float, float]) -> Tensor:
    """Which fractions of a chain, of nodes, an energy leads at whose range has these ends; (B,) bool."""
    low, high = ends
    return (fractions >= low - _ROUNDING) & (fractions <= high + _ROUNDING)


def _unit(gradient: Tensor) -> Tensor:
    """Each row with a root mean square of 1; zeros stay zeros, and NaN and infinity become NaN."""
    peak = gradient.abs().amax((1, 2, 3), keepdim=True)
    shape = gradient / torch.where(peak == 0, 1, peak)  # whose squares neither over- nor underflow
    rms = shape.square().mean((1, 2, 3), keepdim=True).sqrt()
    return shape / torch.where(rms == 0, 1, rms)
