"""Finished states on their way out: decoded in batches of one shape, copied to the host, handed over.

A CUDA device is left to work: what a round of the engine finished is handed over a round later, when the device
is busy with the next one. That also keeps the host from running further ahead than one round.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from boomerang_batch.diffusion.batch_size import in_fixed_batches
from boomerang_batch.diffusion.codes import Code
from boomerang_batch.diffusion.denoiser import Denoiser
from boomerang_batch.diffusion.draws import Draw, Finished
from boomerang_batch.diffusion.transfer import Mark, to_host


@dataclass(frozen=True, kw_only=True)
class _Round:
    """What left the device together."""

    parcels: list[tuple[list[Finished], Tensor]]
    """Finished draws with their images (k, C, H, W) on the host."""
    codes: list[Finished]
    """Those that drew a path, with their codes on the host."""
    sent: Mark


class Outbox:
    """Not thread-safe: the engine's one thread owns it."""

    def __init__(self, denoiser: Denoiser, *, decode_batch: int, device: torch.device) -> None:
        self._denoiser = denoiser
        self._decode_batch = decode_batch if denoiser.spec.latent else 1
        self._device = device
        self._behind = 1 if device.type == "cuda" else 0
        self._undecoded: list[Finished] = []
        self._rounds: deque[_Round] = deque()

    @property
    def empty(self) -> bool:
        """Whether nothing is on its way out."""
        return not self._undecoded and not self._rounds

    def drop(self, unwanted: Callable[[Draw], bool]) -> None:
        """Forget the states that nobody waits for."""
        self._undecoded = [one for one in self._undecoded if not unwanted(one.draw)]

    def send(self, finished: Sequence[Finished], *, urgent: Callable[[Finished], bool]) -> None:
        """End a round: decode full batches, others where `urgent` says so of one in them, and send them off."""
        codes = [dataclasses.replace(one, code=_on_host(one.code)) for one in finished if one.code is not None]
        waiting = [*self._undecoded, *(one for one in finished if one.code is None)]
        self._undecoded, parcels = [], []
        for shape in dict.fromkeys(one.x_0.shape for one in waiting):
            alike = [one for one in waiting if one.x_0.shape == shape]
            full = len(alike) // self._decode_batch * self._decode_batch
            if any(urgent(one) for one in alike[full:]):
                full = len(alike)
            self._undecoded += alike[full:]
            if full:
                parcels.append((alike[:full], to_host(self._decode([one.x_0 for one in alike[:full]]))))
        self._rounds.append(_Round(parcels=parcels, codes=codes, sent=Mark(self._device)))

    def receive(self, *, everything: bool = False) -> list[tuple[Finished, Tensor]]:
        """What has reached the host, each with its image (C, H, W); `everything` waits for the device.

        Of a draw with a path that is the image it came with.
        """
        arrived = []
        while len(self._rounds) > (0 if everything else self._behind):
            round_ = self._rounds.popleft()
            round_.sent.wait()
            arrived += [(one, one.draw.image) for one in round_.codes]
            for finished, images in round_.parcels:
                # Copies: a result that is kept would keep its whole batch, pinned memory on top.
                arrived += [(one, image.clone()) for one, image in zip(finished, images, strict=True)]
        return arrived

    def _decode(self, states: list[Tensor]) -> Tensor:
        batch = torch.stack(states)
        if not self._denoiser.spec.latent:
            return batch
        return in_fixed_batches(self._denoiser.decode, batch, self._decode_batch)


def _on_host(code: Code) -> Code:
    residuals = None if code.residuals is None else to_host(code.residuals)
    return Code(x_n=to_host(code.x_n), residuals=residuals)
