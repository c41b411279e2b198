"""From a recipe to an engine: the model on its device, the schedule it walks, the sampler that walks it."""

from __future__ import annotations

from boomerang_batch.config.pipeline import Recipe
from boomerang_batch.diffusion.denoiser import DenoiserSpec
from boomerang_batch.diffusion.engine import Engine
from boomerang_batch.diffusion.samplers import Solver, build_solver
from boomerang_batch.diffusion.schedule import Schedule, build_schedule
from boomerang_batch.errors import ConfigError
from boomerang_batch.models import load_denoiser
from boomerang_batch.models.device import choose_device


def load_engine(recipe: Recipe, *, device: str, threads: int) -> Engine:
    """Load the recipe's model and build its engine. Raises ModelError or ConfigError."""
    denoiser = load_denoiser(recipe.model, device=device, threads=threads)
    schedule = recipe_schedule(recipe, denoiser.spec)
    return Engine(
        denoiser,
        schedule,
        recipe_solver(recipe, denoiser.spec, schedule),
        batch_size=recipe.batch_size,
        device=choose_device(device, dtype=recipe.model.dtype),
    )


def recipe_schedule(recipe: Recipe, model: DenoiserSpec) -> Schedule:
    """The nodes the recipe walks on this model's chain. Raises ConfigError for a t that has no meaning here."""
    schedule = build_schedule(
        model.levels,
        grid=recipe.grid,
        steps=recipe.steps,
        t=recipe.t.unit,
        start=recipe.start,
        fractional_tau=model.fractional_tau,
    )
    if recipe.purpose == "anonymize" and schedule.n == 0:
        raise ConfigError("t comes to 0 evaluations, which gives back the input: nothing would be anonymized")
    return schedule


def recipe_solver(recipe: Recipe, model: DenoiserSpec, schedule: Schedule) -> Solver:
    """The recipe's sampler; clipping as the model's own configuration says, unless the recipe overrules it."""
    clip_range = model.clip_range
    if recipe.sampler.clip is not None:
        clip_range = (model.clip_range or max(model.value_range)) if recipe.sampler.clip else None
    return build_solver(
        schedule,
        prediction=model.prediction,
        eta=recipe.sampler.eta,
        order=recipe.sampler.order,
        variance=recipe.sampler.variance,
        data_variance=recipe.sampler.data_variance,
        clip_range=clip_range,
    )
