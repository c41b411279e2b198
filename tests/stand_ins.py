"""Denoisers put in a model's place at the runner's door, to know their answer or to break them on purpose."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from boomerang_batch.config.pipeline import Recipe, parse_recipe
from boomerang_batch.diffusion.denoiser import Condition, DenoiserSpec
from tests.oracles import Oracle, linear_levels

SIDE = 8
VARIANCE = 0.3


def _shrunk(x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    return alpha * VARIANCE / (alpha**2 * VARIANCE + sigma**2) * x


class Pixelwise(Oracle):
    """E[x_0 | x_t] of pixels that are independent N(0, VARIANCE), at any size.

    What it says of a pixel depends on that pixel alone, so tiles, buckets and batches can't matter.
    """

    def __init__(self, *, channels: int = 1, side: int = SIDE, **spec: object) -> None:
        super().__init__(_shrunk, (channels, side, side), linear_levels(100, 1e-3, 0.1))
        self._spec = dataclasses.replace(self._spec, **{"size_multiple": 1} | spec)
        self.batches: list[int] = []

    @property
    def spec(self) -> DenoiserSpec:
        return self._spec

    def denoise(self, x_t: Tensor, tau: Tensor, conditions: Sequence[Condition]) -> Tensor:
        self.batches.append(len(x_t))
        return super().denoise(x_t, tau, conditions)

    def flagged(self, images: Tensor) -> list[bool]:
        return [False] * len(images)

    def in_float32(self) -> Pixelwise:
        return self


def install(monkeypatch: pytest.MonkeyPatch, denoiser: object) -> None:
    """Whatever model a recipe names, `denoiser` is what loading gives."""

    def load(spec: object, *, device: str, threads: int | None) -> object:
        torch.use_deterministic_algorithms(True)
        return denoiser

    monkeypatch.setattr("boomerang_batch.run.loading.load_denoiser", load)


RECIPE = """
name: stand-in
purpose: augment
seed: 7
model: {source: nowhere}
t: {fraction: 0.4}
steps: 5
images: {resize: pad}
batch_size: 4
"""


def recipe(*overrides: str) -> Recipe:
    """`RECIPE`, parsed, with overrides as --set takes them."""
    return parse_recipe(RECIPE, source="test recipe", overrides=overrides)
