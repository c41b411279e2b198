"""How far out each variant goes: the recipe's t, drawn, read or given, resolved on the model's chain.

A drawn t is a function of the variant's noise key alone, like every other draw. Equal values share one walk.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from boomerang_batch.config.pipeline import FromField, Recipe, Spread
from boomerang_batch.diffusion.codes import inverted
from boomerang_batch.diffusion.denoiser import DenoiserSpec
from boomerang_batch.diffusion.engine import Walk
from boomerang_batch.diffusion.noise import Purpose, uniform
from boomerang_batch.diffusion.samplers import build_solver
from boomerang_batch.diffusion.schedule import Schedule, build_schedule
from boomerang_batch.errors import ConfigError, SampleError

_KEPT_WALKS = 4096


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """One variant's t and where it leads."""

    t: str
    """As rows tell it: fraction=0.4."""
    walk: Walk
    field: str | None
    """The field of the sample that said it: rows must not tell t where that field may not travel."""


class Walks:
    """Every walk of one recipe on one model. Raises ConfigError for a t or sampler without meaning there."""

    def __init__(self, recipe: Recipe, model: DenoiserSpec) -> None:
        self._recipe = recipe
        self._model = model
        self._walk = functools.lru_cache(_KEPT_WALKS)(self._build)
        self.inverted = functools.lru_cache(_KEPT_WALKS)(self._inverted)
        self._check()

    def resolve(
        self, variant: int, *, noise_key: bytes, fields: Mapping[str, bytes], size: tuple[int, int]
    ) -> Resolved:
        """Where `variant` of a sample with these `fields` goes, as an image of `size` (height, width).

        Raises SampleError `missing-t` or `bad-t` for a t that a field should tell.
        """
        levels = self._recipe.levels
        unit, value = levels[variant if len(levels) > 1 else 0].unit
        field = None
        if isinstance(value, FromField):
            field = value.field.lower()  # as the reader gives fields
            number = _read(fields, field, unit)
        elif isinstance(value, Spread):
            number = _drawn(value, unit, noise_key)
        else:
            number = value
        try:
            walk = self._walk(unit, number, size)
        except ConfigError as error:
            told = str(error) if field is None else f"field {field}: {error}"
            raise SampleError("bad-t", told) from error
        if walk.n == 0 and self._recipe.purpose == "anonymize":
            raise SampleError("bad-t", f"t {unit}={number:g} gives back the input: nothing would be anonymized")
        return Resolved(t=f"{unit}={number!r}", walk=walk, field=field)

    def at(self, unit: str, value: float) -> Walk:
        """The walk of a given t at the model's own size. Raises ConfigError."""
        return self._walk(unit, _whole(unit, value), (self._model.height, self._model.width))

    def _check(self) -> None:
        """Build what can be told beforehand, so that a bad recipe fails before it costs anything."""
        for unit, value in (level.unit for level in self._recipe.levels):
            for number in _known_numbers(value):
                walk = self.at(unit, number)
                if walk.n == 0 and self._recipe.purpose == "anonymize":
                    raise ConfigError(
                        f"t {unit}={number:g} comes to 0 evaluations, which gives back the input: "
                        "nothing would be anonymized"
                    )
            if isinstance(value, Spread):
                self._check_beginning(unit, value)

    def _check_beginning(self, unit: str, spread: Spread) -> None:
        """0 is the identity, but just above it may be less than the chain's least noise."""
        low, high = spread.uniform
        if unit == "timestep":
            return
        try:
            self.at(unit, math.nextafter(low, high))
        except ConfigError as error:
            raise ConfigError(f"t.{unit}.uniform begins at {low:g}, just above which {error}") from error

    def _build(self, unit: str, value: float, size: tuple[int, int]) -> Walk:
        recipe, model = self._recipe, self._model
        schedule = build_schedule(
            model.levels_at(*size),
            grid=recipe.grid,
            steps=recipe.steps,
            t=(unit, value),
            start=recipe.start,
            fractional_tau=model.fractional_tau,
        )
        return self._on(schedule, eta=recipe.sampler.eta)

    def _inverted(self, walk: Walk) -> Walk:
        """The walk of eta 0 that leads from an image up to where `walk` begins."""
        return self._on(inverted(walk.schedule), eta=0.0)

    def _on(self, schedule: Schedule, *, eta: float) -> Walk:
        recipe, model, sampler = self._recipe, self._model, self._recipe.sampler
        if sampler.variance == "learned" and not model.learned_variance:
            raise ConfigError("sampler.variance learned: this model has learned none; take fixed_small")
        if sampler.clip and model.latent:
            raise ConfigError("sampler.clip bounds pixels, and this model's states are latents: remove it")
        solver = build_solver(
            schedule,
            prediction=model.prediction,
            eta=eta,
            order=sampler.order,
            variance=sampler.variance,
            data_variance=sampler.data_variance,
            clip_range=clip_range(recipe, model),
        )
        return Walk(schedule, solver)


def clip_range(recipe: Recipe, model: DenoiserSpec) -> float | None:
    """What |x0h| is clamped to; None: it is not."""
    if recipe.sampler.clip is None:
        return model.clip_range
    return (model.clip_range or max(model.value_range)) if recipe.sampler.clip else None


def examples(recipe: Recipe, model: DenoiserSpec) -> Iterator[tuple[str, Walk]]:
    """Every t that can be told beforehand, in words, with its walk at the model's own size."""
    walks = Walks(recipe, model)
    for unit, value in (level.unit for level in recipe.levels):
        for number in _known_numbers(value):
            yield f"{unit}={number!r}", walks.at(unit, number)


def _known_numbers(value: float | Spread | FromField) -> tuple[float, ...]:
    """What can be told of a t before any sample is seen: itself, or the ends of its spread."""
    if isinstance(value, Spread):
        return value.uniform
    return () if isinstance(value, FromField) else (value,)


def _drawn(spread: Spread, unit: str, noise_key: bytes) -> float:
    low, high = spread.uniform
    share = uniform(noise_key, purpose=Purpose.T_DRAW)
    if unit == "timestep":
        return int(low) + int(share * (high - low + 1))
    return low + share * (high - low)


def _read(fields: Mapping[str, bytes], field: str, unit: str) -> float:
    data = fields.get(field)
    if data is None:
        raise SampleError("missing-t", f"there is no field {field} to read t from, only {', '.join(fields)}")
    shown = data[:20].decode("utf-8", "backslashreplace")
    try:
        return _whole(unit, _finite(float(data.decode("ascii"))))
    except (ValueError, ConfigError) as error:
        raise SampleError("bad-t", f"field {field} holds {shown!r}, not a {unit} for t") from error


def _finite(number: float) -> float:
    if not math.isfinite(number):
        raise ValueError("no number that t could be")
    return number


def _whole(unit: str, value: float) -> float:
    """Timesteps are whole numbers."""
    if unit != "timestep":
        return value
    if value != int(value):
        raise ConfigError(f"t timestep={value:g}: timesteps are whole numbers")
    return int(value)
