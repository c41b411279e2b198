"""From a recipe to an engine and the walks it takes: the model on its device, tried out before it costs.

The trial takes the planned batch, so memory that is too small for it shows before the first sample.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from boomerang_batch.config.pipeline import ModelSpec, Recipe
from boomerang_batch.data.images import Pixels, to_model_values
from boomerang_batch.diffusion.batch_size import find_batch_size, is_out_of_memory, largest_that_fits
from boomerang_batch.diffusion.denoiser import Condition, Denoiser, DenoiserSpec
from boomerang_batch.diffusion.engine import Engine
from boomerang_batch.diffusion.parity import check_autoencoder, check_batching, synthetic_images
from boomerang_batch.diffusion.schedule import NoiseLevels
from boomerang_batch.diffusion.threads import run_apart, use_threads
from boomerang_batch.diffusion.transfer import to_device
from boomerang_batch.errors import ModelError
from boomerang_batch.models import load_denoiser
from boomerang_batch.models.device import DTYPES, choose_device
from boomerang_batch.run.canvas import check_fit
from boomerang_batch.run.stack import fingerprint
from boomerang_batch.run.walks import Walks

_LARGEST_AUTO = 512
_PROBES = 4


def load(recipe: Recipe, *, device: str, threads: int, batch_size: int | None = None) -> tuple[Engine, Walks]:
    """Load the recipe's model and build its engine. Raises ModelError or ConfigError.

    `batch_size` is what `batch_size: auto` came to in this run, if it is known. The model is tried out on
    synthetic samples of each size it is to draw: one whose output depends on what shares its batch is refused.
    """
    # In a thread that ends. OpenMP gives each thread that computes helpers of its own, for as long as it lives,
    # and where all of them together outnumber the cores, the engine's go to sleep at every barrier: a latent
    # model's run took a sixth longer.
    return run_apart(
        lambda: _load(recipe, device=device, threads=threads, batch_size=batch_size), name="boomerang-load"
    )


def _load(recipe: Recipe, *, device: str, threads: int, batch_size: int | None) -> tuple[Engine, Walks]:
    denoiser = load_denoiser(recipe.model, device=device, threads=threads)
    use_threads(threads)  # an installed factory may have changed it
    chosen = choose_device(device, dtype=recipe.model.dtype)
    check_fit(recipe, denoiser.spec)
    walks = Walks(recipe, denoiser.spec)
    size = recipe.batch_size if recipe.batch_size != "auto" else batch_size
    samples = probes(recipe, denoiser.spec, chosen)
    if size is None:
        size = find_batch_size(lambda count: _throughput(denoiser, samples[0], count), _LARGEST_AUTO)
    try_out(denoiser, recipe.model, recipe, samples, size)
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


def stack_of(engine: Engine, recipe: Recipe, *, threads: int) -> dict[str, str]:
    """The fingerprint of what `engine`, loaded for `recipe`, computes with."""
    return fingerprint(
        device=engine.device, dtype=recipe.model.dtype, batch_size=engine.batch_size, threads=threads
    )


def flags_of(engine: Engine, recipe: Recipe) -> Callable[[Pixels], bool] | None:
    """What asks the model's safety checker about an output's pixels (H, W, 3); None where nobody is to ask."""
    return None if recipe.model.safety == "unchecked" else functools.partial(_flagged, engine)


def _flagged(engine: Engine, pixels: Pixels) -> bool:
    values = torch.from_numpy(to_model_values(pixels, engine.denoiser.spec.value_range))
    return any(engine.denoiser.flagged(to_device(values[None], engine.device)))


def warnings(recipe: Recipe, model: DenoiserSpec) -> tuple[str, ...]:
    """What is allowed, but rarely what the user wants, of this recipe on this model; a sentence each."""
    if recipe.upscale is not None and model.latent:
        return (
            "upscale with a latent model: the Boomerang paper (arXiv 2210.12100) saw super-resolution fail "
            "with one, for its autoencoder keeps no fine detail; take a pixel model",
        )
    return ()


def probes(recipe: Recipe, model: DenoiserSpec, device: torch.device) -> list[Tensor]:
    """Synthetic images (k, C, H, W) of each size that the model is to draw.

    Raises ConfigError or ModelError for a size that it can't.
    """
    sizes = _image_sizes(recipe, model)
    for image in sizes:
        model.levels_at(*image)  # which refuses a size the model can't draw
    return [synthetic_images(model, _PROBES, size=image, device=device) for image in sizes]


def _image_sizes(recipe: Recipe, model: DenoiserSpec) -> list[tuple[int, int]]:
    """(height, width) of all that the model will be shown, the largest first."""
    own = (model.height, model.width)
    sizes = [(height, width) for width, height in recipe.images.sizes] or [own]
    return sorted(sizes, key=lambda size: size[0] * size[1], reverse=True)


def try_out(denoiser: Denoiser, asked: ModelSpec, recipe: Recipe, samples: Sequence[Tensor], size: int) -> None:
    """The checks of `parity` for every size of image, on what was `asked` for and its batches of `size`.

    Raises ModelError also where memory runs out.
    """
    dtype = DTYPES[asked.dtype]

    def check(count: int) -> None:
        for images in samples:
            taus = _taus(denoiser.spec.levels_at(*images.shape[2:]))
            check_batching(
                denoiser,
                images,
                _conditions(denoiser, asked),
                taus,
                count,
                dtype=dtype,
                compiled=asked.compile,
            )

    for images in samples:
        check_autoencoder(denoiser, images, asked.autoencoder.batch_size, dtype=dtype)

    try:
        check(size)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    else:
        return
    # Out of the except clause, whose traceback would keep the failed call's tensors alive.
    if recipe.batching == "elastic" and size > 1 and largest_that_fits(check, size // 2) == size // 2:
        return  # the engine will meet the same shortage, and halve its batch
    fitting = largest_that_fits(check, size // 2)
    advice = f"set batch_size: {fitting}" if fitting else "not even 1 fits: use a smaller size or dtype"
    raise ModelError(f"memory runs out with batch_size: {size}; {advice}")


def _conditions(denoiser: Denoiser, asked: ModelSpec) -> list[Condition]:
    """Different labels or prompts where samples have their own; else nothing: the one prompt for all."""
    spec, prompts = denoiser.spec, asked.prompts
    if spec.conditioning == "label":
        return [index % (spec.classes or 1) for index in range(_PROBES)]
    if spec.conditioning == "prompt" and prompts is not None and prompts.field is not None:
        return [f"a photograph of {'very ' * index}fine weather" for index in range(_PROBES)]
    return [None] * _PROBES


def _taus(levels: NoiseLevels) -> list[float]:
    """From all over a model's chain."""
    count = len(levels.tau)
    return [float(levels.tau[(2 * index + 1) * count // (2 * _PROBES)]) for index in range(_PROBES)]


def _throughput(denoiser: Denoiser, images: Tensor, count: int) -> float:
    """Samples like `images` per second in batches of `count`, the better of two after one to warm up."""
    with torch.inference_mode():
        states = denoiser.encode(images[:1]).expand(count, -1, -1, -1)
        tau = torch.full((count,), _taus(denoiser.spec.levels)[0], dtype=torch.float64)
        conditions: list[Condition] = [0 if denoiser.spec.conditioning == "label" else None] * count
        seconds = []
        for _ in range(3):
            started = time.perf_counter()
            output = denoiser.denoise(states.contiguous(), tau, conditions)
            float(output.flatten()[0])  # waits for the device
            seconds.append(time.perf_counter() - started)
    return count / min(seconds[1:])
