"""From a recipe to an engine and the walks it takes: the model on its device, tried out before it costs.

The trial takes the planned batch, so memory that is too small for it shows before the first sample.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from boomerang_batch.config.energy import EnergySpec
from boomerang_batch.config.pipeline import ModelSpec, Recipe
from boomerang_batch.data.images import Pixels, to_model_values
from boomerang_batch.diffusion.batch_size import find_batch_size, is_out_of_memory, largest_that_fits
from boomerang_batch.diffusion.denoiser import Condition, Denoiser, DenoiserSpec, Guided, Told
from boomerang_batch.diffusion.energy import Energy, EnergyGuided, within
from boomerang_batch.diffusion.engine import Engine
from boomerang_batch.diffusion.parity import check_autoencoder, check_batching, synthetic_images
from boomerang_batch.diffusion.schedule import NoiseLevels, level_at_tau
from boomerang_batch.diffusion.threads import run_apart, use_threads
from boomerang_batch.diffusion.transfer import to_device
from boomerang_batch.errors import ConfigError, ModelError
from boomerang_batch.installed import attempt
from boomerang_batch.measures.energies import load as load_energy
from boomerang_batch.models import load_denoiser
from boomerang_batch.models.device import DTYPES, choose_device
from boomerang_batch.run.canvas import check_fit
from boomerang_batch.run.stack import fingerprint
from boomerang_batch.run.walks import Walks, clip_range, examples

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
    model = load_denoiser(recipe.model, device=device, threads=threads)
    chosen = choose_device(device, dtype=recipe.model.dtype)
    check_fit(recipe, model.spec)
    denoiser = model
    if recipe.energy is not None:
        denoiser = guided(model, load_energy(recipe.energy, device=chosen), recipe, recipe.energy)
    use_threads(threads)  # an installed factory may have changed it
    walks = Walks(recipe, denoiser.spec)
    size = recipe.batch_size if recipe.batch_size != "auto" else batch_size
    samples = probes(recipe, denoiser.spec, chosen)
    if size is None:
        size = find_batch_size(lambda count: _throughput(denoiser, samples[0], count, recipe), _LARGEST_AUTO)
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
    return tuple(_warnings(recipe, model))


def _warnings(recipe: Recipe, model: DenoiserSpec) -> Iterator[str]:
    if recipe.upscale is not None and model.latent:
        yield (
            "upscale with a latent model: the Boomerang paper (arXiv 2210.12100) saw super-resolution fail "
            "with one, for its autoencoder keeps no fine detail; take a pixel model"
        )
    if recipe.energy is not None:
        low, high = recipe.energy.range
        levels = model.levels_at(model.height, model.width)
        for t, walk in examples(recipe, model):
            fractions = level_at_tau(levels, walk.schedule.tau[1:])[2]
            if not within(fractions, recipe.energy.range).any():
                yield f"energy.range {low:g}..{high:g}: no step of t {t} lies in it, so nothing is led there"


def guided(model: Denoiser, energy: Energy, recipe: Recipe, asked: EnergySpec) -> EnergyGuided:
    """The model, led by an energy as it is `asked` for. Raises ConfigError where it can't be."""
    if model.spec.latent:
        raise ConfigError(
            "energy: this model works on an autoencoder's latents, and an energy sees images; take a model of "
            "pixels, or remove energy"
        )
    return EnergyGuided(
        model,
        energy,
        scale=asked.scale,
        within=asked.range,
        clip_range=clip_range(recipe, model.spec),
    )


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

    Where an energy leads, on the model alone and then on what the energy makes of it. Raises ModelError also
    where memory runs out.
    """
    energy = recipe.energy
    if energy is None or not isinstance(denoiser, EnergyGuided):
        return _try_out(denoiser, asked, recipe, samples, size)
    _try_out(denoiser.model, asked, recipe, samples, size)

    def check() -> None:
        _try_out(denoiser, asked, recipe, samples, size, energy)
        for images in samples:
            conditions = _conditions(denoiser.spec, asked, images, energy)
            if not denoiser.gradient(images.flip(0), conditions).isfinite().all():
                raise ModelError("it gives NaN or infinity, or a gradient of these")

    try:
        attempt(check, "it failed on images of noise", error=ModelError)
    except ModelError as error:
        raise ModelError(f"energy.source {energy.source}: {error}") from error


def _try_out(
    denoiser: Denoiser,
    asked: ModelSpec,
    recipe: Recipe,
    samples: Sequence[Tensor],
    size: int,
    energy: EnergySpec | None = None,
) -> None:
    """With an energy, of guided samples where it leads."""
    dtype = DTYPES[asked.dtype]

    def check(count: int) -> None:
        for images in samples:
            check_batching(
                denoiser,
                images,
                _conditions(denoiser.spec, asked, images, energy),
                _taus(denoiser.spec.levels_at(*images.shape[2:]), energy),
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


def _conditions(
    spec: DenoiserSpec, asked: ModelSpec, images: Tensor, energy: EnergySpec | None
) -> list[Condition]:
    """What the samples of a trial are drawn under; with an energy, each led somewhere of its own."""
    told = _told(spec, asked)
    if energy is None:
        return [*told]
    classes = spec.guided_classes
    about = [*images] if classes is None else [index % classes for index in range(len(told))]
    return [Guided(condition=one, about=about) for one, about in zip(told, about, strict=True)]


def _told(spec: DenoiserSpec, asked: ModelSpec) -> list[Told]:
    """Different labels or prompts where samples have their own; else nothing: the one prompt for all."""
    prompts = asked.prompts
    if spec.conditioning == "label":
        return [index % (spec.classes or 1) for index in range(_PROBES)]
    if spec.conditioning == "prompt" and prompts is not None and prompts.field is not None:
        return [f"a photograph of {'very ' * index}fine weather" for index in range(_PROBES)]
    return [None] * _PROBES


def _taus(levels: NoiseLevels, energy: EnergySpec | None) -> list[float]:
    """From all over a model's chain; with an energy, from where that leads. Raises ConfigError if nowhere."""
    low, high = (0.0, 1.0) if energy is None else energy.range
    count = len(levels)
    inside = [tau for j, tau in enumerate(levels.tau.tolist(), 1) if low <= j / count <= high]
    if not inside:
        raise ConfigError(
            f"energy.range {low:g}..{high:g} lies between two of the {count} levels of this model's chain, so "
            "nothing would be led; widen it"
        )
    return [inside[(2 * index + 1) * len(inside) // (2 * _PROBES)] for index in range(_PROBES)]


def _throughput(denoiser: Denoiser, images: Tensor, count: int, recipe: Recipe) -> float:
    """Samples like `images` per second in batches of `count`, the better of two after one to warm up."""
    with torch.inference_mode():
        states = denoiser.encode(images[:1]).expand(count, -1, -1, -1)
        tau = torch.full((count,), _taus(denoiser.spec.levels, recipe.energy)[0], dtype=torch.float64)
        conditions = _conditions(denoiser.spec, recipe.model, images, recipe.energy)[:1] * count
        seconds = []
        for _ in range(3):
            started = time.perf_counter()
            output = denoiser.denoise(states.contiguous(), tau, conditions)
            float(output.flatten()[0])  # waits for the device
            seconds.append(time.perf_counter() - started)
    return count / min(seconds[1:])
