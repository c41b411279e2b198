"""The seam between data and denoising: draws in, drawn samples out, in batches of one fixed shape.

A fixed shape is what makes each result independent of its neighbours: kernels choose their algorithm by
shape, so a lone last sample computed in a smaller batch would differ in its last bits. The tail of the stream
is padded and the padding thrown away. Results come out in the order their draws went in.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from boomerang_batch.diffusion.boomerang import KeyedNoise, boomerang
from boomerang_batch.diffusion.denoiser import Denoiser
from boomerang_batch.diffusion.samplers import Solver
from boomerang_batch.diffusion.schedule import Schedule

_PADDING_KEY = bytes(16)


@dataclass(frozen=True, kw_only=True)
class Draw:
    """One variant of one sample, to be drawn. `tag` is the caller's and comes back untouched."""

    tag: Any
    x_0: Tensor
    """(C, H, W) float32 in the denoiser's value range."""
    noise_key: bytes
    label: int | None = None


class Engine:
    """A denoiser with a schedule and a batch shape. Safe to use from several threads; batches take turns."""

    def __init__(
        self,
        denoiser: Denoiser,
        schedule: Schedule,
        solver: Solver,
        *,
        batch_size: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.denoiser = denoiser
        self.schedule = schedule
        self.solver = solver
        self.batch_size = batch_size
        self.device = torch.device(device)
        self._turn = threading.Lock()

    def run(self, draws: Iterable[Draw]) -> Iterator[tuple[Draw, Tensor]]:
        """Yield each draw with its result, (C, H, W) float32 on the CPU. Consumes lazily, batch by batch."""
        for batch in _batches(draws, self.batch_size):
            yield from zip(batch, self._run_batch(batch), strict=False)

    def _run_batch(self, batch: list[Draw]) -> Tensor:
        missing = self.batch_size - len(batch)
        x_0 = torch.stack([draw.x_0 for draw in batch] + [torch.zeros_like(batch[0].x_0)] * missing).to(
            self.device
        )
        keys = [draw.noise_key for draw in batch] + [_PADDING_KEY] * missing
        labels = None
        if batch[0].label is not None:
            labels = torch.tensor([draw.label for draw in batch] + [0] * missing, device=self.device)
        with self._turn, torch.inference_mode():
            return boomerang(
                x_0, self.denoiser, self.schedule, self.solver, KeyedNoise(keys, x_0), labels
            ).cpu()


def _batches(draws: Iterable[Draw], size: int) -> Iterator[list[Draw]]:
    iterator = iter(draws)
    while batch := list(itertools.islice(iterator, size)):
        yield batch
