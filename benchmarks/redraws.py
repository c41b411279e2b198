"""What several benchmarks need of the engine: many images, redrawn at one t, a part at a time and kept.

A part that is kept is not drawn again, so a benchmark that was stopped goes on where it was. What a kept part
depends on is in the name of its folder: digests of the recipe, the model and the sources, and t. Noise is keyed
by an image's number, under the recipe's seed so that the benchmark can be repeated; what attacks the outputs in
a benchmark is not told it, as nobody is told the secret of a run that anonymizes.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from boomerang_batch.config.pipeline import Recipe
from boomerang_batch.data import geometry, images
from boomerang_batch.diffusion.denoiser import Guided
from boomerang_batch.diffusion.draws import Draw, Walk
from boomerang_batch.diffusion.engine import Engine
from boomerang_batch.diffusion.noise import noise_key, seed_material
from boomerang_batch.run.loading import load

PART = 250


@dataclass(frozen=True, kw_only=True)
class Redrawn:
    """Outputs (N, H, W, C) uint8 of sources at one t, and what they took."""

    images: np.ndarray
    fraction: float
    sigma: float
    evaluations: int
    cpu_s: float


def outputs_of(
    engine: Engine,
    walk: Walk,
    sources: np.ndarray,
    numbers: Sequence[int],
    *,
    seed: int,
    policy: geometry.ResizePolicy,
    labels: Sequence[int] | None = None,
    about: Sequence[int] | Literal["source"] | None = None,
) -> np.ndarray:
    """What the walk makes of those of uint8 `sources` (N, H, W, C) that have these numbers.

    about: for an engine that an energy guides, the class that each is led to, or away from its own source.
    """
    model = engine.denoiser.spec
    placed = {
        number: geometry.place(sources[number], size=(model.height, model.width), policy=policy)
        for number in numbers
    }

    def draw(number: int) -> Draw:
        image = torch.from_numpy(images.to_model_values(placed[number][0], model.value_range))
        condition = None if labels is None else int(labels[number])
        led = (
            None
            if about is None
            else Guided(condition=condition, about=image if about == "source" else int(about[number]))
        )
        return Draw(
            tag=number,
            image=image,
            noise_key=noise_key(seed_material(seed), identity=str(number).encode(), variant=0),
            walk=walk,
            condition=condition if led is None else led,
        )

    outputs = {}
    for drawn in engine.run(map(draw, numbers)):
        number = drawn.draw.tag
        pixels = images.to_pixels(drawn.image.numpy(), model.value_range)
        outputs[number] = geometry.restore(pixels, placed[number][1])
    return np.stack([outputs[number] for number in numbers])


class Redrawer:
    """One model, loaded once; a recipe's settings but for its t."""

    def __init__(self, recipe: Recipe, cache: Path, *, threads: int) -> None:
        self._recipe = recipe
        self._engine, self._walks = load(recipe, device="cpu", threads=threads)
        self._cache = cache

    @property
    def digest(self) -> str:
        """The model's."""
        return self._engine.denoiser.spec.digest

    def close(self) -> None:
        """End the engine's thread."""
        self._engine.close()

    def redraw(self, sources: np.ndarray, fraction: float, *, labels: Sequence[int] | None = None) -> Redrawn:
        """What Boomerang makes of uint8 `sources` (N, H, W, C) at t = `fraction` of T."""
        walk = self._walks.at("fraction", fraction)
        given = hashlib.sha256(sources.tobytes() + np.array([] if labels is None else labels).tobytes())
        names = (self._recipe.digest[:8], self.digest[:8], given.hexdigest()[:8], f"t{fraction:g}")
        folder = self._cache / "-".join(names)
        folder.mkdir(parents=True, exist_ok=True)
        parts, cpu_s = [], 0.0
        for begin in range(0, len(sources), PART):
            kept = folder / f"{begin:06d}.npz"
            if not kept.is_file():
                numbers = range(begin, min(begin + PART, len(sources)))
                since = time.process_time()
                made = outputs_of(
                    self._engine,
                    walk,
                    sources,
                    numbers,
                    seed=self._recipe.seed or 0,
                    policy=self._recipe.images.resize,
                    labels=labels,
                )
                scratch = kept.with_suffix(".tmp.npz")
                np.savez(scratch, images=made, cpu_s=time.process_time() - since)
                scratch.replace(kept)
            with np.load(kept) as part:
                parts.append(part["images"])
                cpu_s += float(part["cpu_s"])
        return Redrawn(
            images=np.concatenate(parts),
            fraction=fraction,
            sigma=float(walk.schedule.relative_sigma),
            evaluations=walk.n,
            cpu_s=cpu_s,
        )
