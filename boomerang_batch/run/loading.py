"""From a recipe to an engine and the walks it takes: the model on its device, tried out before it costs."""

from __future__ import annotations

import time

import torch

from boomerang_batch.config.pipeline import Recipe
from boomerang_batch.diffusion.batch_size import find_batch_size
from boomerang_batch.diffusion.denoiser import Condition, Denoiser
from boomerang_batch.diffusion.engine import Engine
from boomerang_batch.diffusion.guards import check_batching, synthetic_images
from boomerang_batch.models import load_denoiser
from boomerang_batch.models.device import DTYPES, choose_device
from boomerang_batch.run.walks import Walks

_LARGEST_AUTO = 512
_PROBES = 4


def load(recipe: Recipe, *, device: str, threads: int, batch_size: int | None = None) -> tuple[Engine, Walks]:
    """Load the recipe's model and build its engine. Raises ModelError or ConfigError.

    `batch_size` is what `batch_size: auto` came to in this run, if it is known. The model is tried out on
    synthetic samples: one whose output depends on what shares its batch is refused.
    """
    denoiser = load_denoiser(recipe.model, device=device, threads=threads)
    chosen = choose_device(device, dtype=recipe.model.dtype)
    walks = Walks(recipe, denoiser.spec)
    torch.set_num_threads(threads)  # for the trials below, which run in this thread
    size = recipe.batch_size if recipe.batch_size != "auto" else batch_size
    if size is None:
        size = find_batch_size(lambda count: _throughput(denoiser, count, chosen), _LARGEST_AUTO)
    images = synthetic_images(denoiser.spec, _PROBES, device=chosen)
    check_batching(
        denoiser, images, _conditions(denoiser), _taus(denoiser), size, dtype=DTYPES[recipe.model.dtype]
    )
    engine = Engine(
        denoiser,
        batch_size=size,
        device=chosen,
        order=recipe.sampler.order,
        encode_batch=recipe.model.autoencoder.batch_size,
        threads=threads,
        elastic=recipe.batching == "elastic",
    )
    return engine, walks


def _conditions(denoiser: Denoiser) -> list[Condition]:
    """Different labels where there are labels; else nothing, to a text model the recipe's prompt."""
    spec = denoiser.spec
    if spec.conditioning == "label":
        return [index % (spec.classes or 1) for index in range(_PROBES)]
    return [None] * _PROBES


def _taus(denoiser: Denoiser) -> list[float]:
    taus = denoiser.spec.levels.tau
    return [float(taus[(2 * index + 1) * len(taus) // (2 * _PROBES)]) for index in range(_PROBES)]


def _throughput(denoiser: Denoiser, count: int, device: torch.device) -> float:
    """Samples per second in batches of `count`, the better of two after one to warm up."""
    with torch.inference_mode():
        states = denoiser.encode(synthetic_images(denoiser.spec, 1, device=device)).expand(count, -1, -1, -1)
        tau = torch.full((count,), _taus(denoiser)[0], dtype=torch.float64)
        conditions = _conditions(denoiser)[:1] * count
        seconds = []
        for _ in range(3):
            started = time.perf_counter()
            output = denoiser.denoise(states.contiguous(), tau, conditions)
            float(output.flatten()[0])  # waits for the device
            seconds.append(time.perf_counter() - started)
    return count / min(seconds[1:])
