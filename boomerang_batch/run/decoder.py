"""What codes are decoded with: the model that drew them, it under another guidance, or another model.

A code is states and what steps add to them, so whatever model walks the same nodes in states of the same shape
can decode it, whatever it predicts and however it is told the time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from boomerang_batch.config.pipeline import ModelSpec, Recipe, Sampler
from boomerang_batch.config.targets import Refine, Shift
from boomerang_batch.diffusion.denoiser import Denoiser, DenoiserSpec
from boomerang_batch.diffusion.energy import EnergyGuided
from boomerang_batch.diffusion.engine import Engine
from boomerang_batch.diffusion.threads import run_apart, use_threads
from boomerang_batch.errors import ConfigError
from boomerang_batch.measures.classifiers import CheckedClassifier
from boomerang_batch.measures.classifiers import load as load_classifier
from boomerang_batch.models import load_denoiser, with_guidance
from boomerang_batch.run.canvas import check_fit
from boomerang_batch.run.loading import guided, probes, try_out
from boomerang_batch.run.walks import Walks

_EQUAL = 1e-6
"""Levels that differ by a smaller share are the same ones, rounded elsewhere."""


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """What a code is decoded with."""

    asked: ModelSpec
    model: DenoiserSpec
    walks: Walks
    refining: Walks | None = None
    """Of what was decoded, where that is refined."""
    judge: CheckedClassifier | None = None
    """Who says which of several codes is the best."""

    def digest(self, source: DenoiserSpec) -> str:
        """What a run knows its models by: the digest of the one that it has, or of all of them."""
        judges = [] if self.judge is None else [self.judge.digest]
        every = list(dict.fromkeys([source.digest, self.model.digest, *judges]))
        return every[0] if len(every) == 1 else hashlib.sha256(json.dumps(every).encode()).hexdigest()


def load_decoder(recipe: Recipe, encoding: Engine, *, device: str, threads: int) -> tuple[Engine, Decoder]:
    """What a recipe's codes are decoded with, and the engine for it, beside the one they are drawn on.

    It is the very same engine where the target changes neither model nor guidance. Raises ConfigError for a
    model that can't decode the other's codes, and ModelError as loading does.
    """
    asked, target, engine = recipe.decoded_by, recipe.target, encoding
    if asked != recipe.model:
        engine = run_apart(
            lambda: _load(recipe, asked, encoding, device=device, threads=threads), name="boomerang-load"
        )
    model = engine.denoiser.spec
    if target is not None and target.shift is not None:
        _check_shift(target.shift, engine.denoiser, probes(recipe, model, engine.device)[0])
    judge = None
    if target is not None and target.classifier is not None:
        judge = _judge(target.classifier, target.label, model)
    return engine, Decoder(
        asked=asked,
        model=model,
        walks=Walks(recipe, model),
        refining=None if target is None or target.refine is None else _refining(recipe, target.refine, model),
        judge=judge,
    )


def _judge(name: str, label: int | None, model: DenoiserSpec) -> CheckedClassifier:
    """The installed classifier of this name, once it has told something of a picture.

    Raises ConfigError where there is none, MeasureError where it can't tell.
    """
    judge = load_classifier(name, where="target.classifier")
    grey = np.full((1, model.height, model.width, 3), 128, dtype=np.uint8)
    judge.probability(grey, str(label or 0))
    return judge


def _refining(recipe: Recipe, refine: Refine, model: DenoiserSpec) -> Walks:
    sampler = Sampler(eta=refine.eta, clip=recipe.sampler.clip)
    changes = {"t": refine.t.t, "steps": refine.steps or recipe.steps, "sampler": sampler}
    try:
        return Walks(recipe.model_copy(update=changes), model)
    except ConfigError as error:
        raise ConfigError(f"target.refine: {error}") from error


def _load(recipe: Recipe, asked: ModelSpec, encoding: Engine, *, device: str, threads: int) -> Engine:
    led = encoding.denoiser
    source = led.model if isinstance(led, EnergyGuided) else led
    if recipe.target is None or recipe.target.model is None:
        denoiser = with_guidance(source, _weight(asked))
    else:
        denoiser = load_denoiser(asked, device=device, threads=threads)
        use_threads(threads)  # an installed factory may have changed it
        check_fit(recipe, denoiser.spec)
        check_decodes(denoiser.spec, source.spec)
    samples = probes(recipe, denoiser.spec, encoding.device)
    if denoiser.spec.latent:
        _check_states(denoiser, source, samples)
    if isinstance(led, EnergyGuided) and recipe.energy is not None:
        denoiser = guided(denoiser, led.energy, recipe, recipe.energy)
    try_out(denoiser, asked, recipe, samples, encoding.batch_size)
    return encoding.with_denoiser(denoiser, encode_batch=asked.autoencoder.batch_size)


def check_decodes(model: DenoiserSpec, source: DenoiserSpec) -> None:
    """Raise ConfigError, with all that differs, unless `model` can decode what `source` encodes."""
    differing = list(_differences(model, source))
    if differing:
        raise ConfigError(
            f"target.model can't decode the codes of the recipe's model: {'; '.join(differing)}. Take two "
            "models that were trained on one noise schedule and one shape of image"
        )


def _differences(model: DenoiserSpec, source: DenoiserSpec) -> Iterator[str]:
    facts: tuple[tuple[str, Callable[[DenoiserSpec], Any]], ...] = (
        ("image channels", lambda spec: spec.channels),
        ("image size", lambda spec: f"{spec.width}x{spec.height}"),
        ("latent states", lambda spec: spec.latent),
        ("pixels a state element", lambda spec: spec.state_factor),
        ("value range", lambda spec: spec.value_range),
        ("kind of chain", lambda spec: spec.levels.kind),
        ("training timesteps", lambda spec: len(spec.levels)),
    )
    for name, fact in facts:
        if fact(model) != fact(source):
            yield f"{name} ({fact(model)} of the target's model, {fact(source)} of the recipe's)"
    ours, theirs = source.levels, model.levels
    if ours.kind == theirs.kind and len(ours) == len(theirs):
        # Where noise meets the signal: at the ends of a chain one of the two may be next to nothing.
        apart = torch.maximum((ours.alpha - theirs.alpha).abs(), (ours.sigma - theirs.sigma).abs())
        size = torch.maximum(ours.alpha, ours.sigma)
        at = int((apart / size).argmax())
        if float(apart[at]) > _EQUAL * float(size[at]):
            yield (
                f"noise levels (at timestep {at + 1} sigma is {float(theirs.relative_sigma[at]):.4g} of the "
                f"target's model, {float(ours.relative_sigma[at]):.4g} of the recipe's)"
            )


def _check_shift(shift: Shift, denoiser: Denoiser, images: torch.Tensor) -> None:
    with torch.inference_mode():
        channels = denoiser.encode(images[:1]).shape[1]
    if len(shift.by) != channels:
        raise ConfigError(
            f"target.shift.by has {len(shift.by)} numbers, and the model's states have {channels} channels: "
            "give one for each"
        )


def _check_states(denoiser: Denoiser, source: Denoiser, samples: list[torch.Tensor]) -> None:
    with torch.inference_mode():
        theirs, ours = (tuple(one.encode(samples[0][:1]).shape[1:]) for one in (denoiser, source))
    if theirs != ours:
        raise ConfigError(
            f"target.model's latents are {theirs}, those of the recipe's model {ours}: codes fit one shape only"
        )


def _weight(asked: ModelSpec) -> float:
    block = asked.class_labels or asked.prompts
    return 1.0 if block is None else block.guidance
