"""Trials: a recipe run on chosen samples, its outputs given back, and nothing written that is kept.

Everything between reading a shard and committing one is the run's own code, and a sample keeps the stem and key
that name it; so with the run's own secret, on the run's own stack, the outputs have the bytes that OUT has. The
model is loaded once and serves recipes that differ in t, seed or purpose. Inputs and outputs wait in a scratch
folder that others can't enter and that is gone afterwards; the secret, and what links the two, stay in memory.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError

from boomerang_batch.config.messages import explain
from boomerang_batch.config.pipeline import FieldPolicy, Recipe
from boomerang_batch.data.fields import image_field
from boomerang_batch.data.images import decode
from boomerang_batch.data.shards import Sample
from boomerang_batch.diffusion.threads import run_apart, use_threads
from boomerang_batch.diffusion.transfer import to_device
from boomerang_batch.errors import ConfigError, PrivateDirError, RecipeError, StorageError
from boomerang_batch.run.canvas import Layout, check_fit
from boomerang_batch.run.chosen import Chosen, Outcome, Renamed, outcomes, scratch_full, write_chosen
from boomerang_batch.run.drawing import Drawing
from boomerang_batch.run.ledger import Ledger
from boomerang_batch.run.loading import flags_of, load, stack_of, warnings
from boomerang_batch.run.naming import Naming
from boomerang_batch.run.private import load_secret
from boomerang_batch.run.scratch import scratch_folder, sweep_scratch
from boomerang_batch.run.shard_drawing import ShardDrawing
from boomerang_batch.run.tasks import Task, WorkerFacts
from boomerang_batch.run.walks import Walks

__all__ = ["Chosen", "Outcome", "Rig", "at_t", "fresh_noise", "own_secret"]

_SECRET_BYTES = 32
_TAR_NAME = "chosen"


class Rig:
    """A loaded model to try recipes on, open as long as the `with` block."""

    def __init__(self, recipe: Recipe, *, device: str, threads: int, batch_size: int | None = None) -> None:
        """`batch_size` is what `batch_size: auto` came to in the run to be repeated, if there was one.

        Raises ModelError and its kin.
        """
        sweep_scratch()
        self._engine, _ = load(recipe, device=device, threads=threads, batch_size=batch_size)
        self._recipe = recipe
        self._drawing = Drawing(self._engine, dtype=recipe.model.dtype)
        self.model = model = self._engine.denoiser.spec
        stack = stack_of(self._engine, recipe, threads=threads)
        self.facts = WorkerFacts(model_digest=model.digest, stack=stack, warnings=warnings(recipe, model))

    def __enter__(self) -> Rig:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._drawing.close()

    def run(
        self,
        recipe: Recipe,
        samples: Iterable[Chosen],
        *,
        secret: bytes | None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> Iterator[Outcome]:
        """Every wanted output of the samples, in their order; begun when the first is asked for.

        `secret` keys the noise under anonymize and is None otherwise; see `own_secret` and `fresh_noise`.
        Samples of all shards are drawn together, so that the device is full; the guard against one output for
        two samples looks at all of them. Raises ConfigError at once for a recipe that this model wasn't loaded
        for, and on the way StoppedError, StorageError where the scratch disk fails, and what the engine raises.
        """
        if recipe.method != "boomerang":
            raise ConfigError(
                f"method {recipe.method} goes by codes, which a trial does not draw: sweep, calibrate, "
                "regenerate and an audit's --redraw know boomerang alone"
            )
        if _loaded_by(recipe) != _loaded_by(self._recipe):
            raise ConfigError(
                "a trial's recipe must agree with the one its model was loaded for in model, energy, "
                "batch_size, batching, images.sizes and sampler.order; load it anew"
            )
        if (secret is None) == (recipe.purpose == "anonymize"):
            raise PrivateDirError("a trial has a secret when its recipe's purpose is anonymize, and only then")
        model = self._engine.denoiser.spec
        check_fit(recipe, model)
        return self._run(recipe, Walks(recipe, model), Naming(recipe, secret), samples, stopped)

    def states(self, recipe: Recipe, samples: Iterable[Chosen]) -> Iterator[tuple[Chosen, NDArray[np.float32]]]:
        """Each sample with its x_0 where noise is added: (d,), pixels in the model's range, or latents.

        All pieces of a sample stand in one row. Raises SampleError for a sample that has none.
        """
        denoiser = self._engine.denoiser
        layout, policy = Layout(recipe, denoiser.spec), recipe.images
        for sample in samples:
            read = Sample(key=sample.key, offset=0, fields=sample.fields)
            field = image_field(read, policy)
            picture = decode(sample.fields[field], field=field, channels=denoiser.spec.channels, policy=policy)
            pieces = [piece.image[None] for piece in layout.lay_out(picture, sample.fields).pieces]
            with torch.inference_mode():
                encoded = [denoiser.encode(to_device(piece, self._engine.device)).cpu() for piece in pieces]
            yield sample, np.concatenate([state.numpy().ravel() for state in encoded]).astype(np.float32)

    def _run(
        self,
        recipe: Recipe,
        walks: Walks,
        naming: Naming,
        samples: Iterable[Chosen],
        stopped: Callable[[], bool],
    ) -> Iterator[Outcome]:
        with scratch_folder() as scratch:
            tar, spool = scratch / f"{_TAR_NAME}.tar", scratch / "spool"
            places = write_chosen(tar, samples)
            if not places:
                return
            transform = Renamed(
                recipe,
                self._engine.denoiser.spec,
                walks,
                naming,
                self.facts.stack,
                flags=flags_of(self._engine, recipe),
                places=places,
            )
            # In the order of the samples, and not of pseudonyms: nobody publishes this.
            with Ledger(spool, by_pseudonym=False) as ledger:
                spool.unlink()  # a killed process leaves its folder behind, but not pseudonyms beside inputs
                self._draw(transform, ledger, tar, stopped)
                yield from outcomes(ledger, transform)

    def _draw(self, transform: Renamed, ledger: Ledger, tar: Path, stopped: Callable[[], bool]) -> None:
        task = Task(name=_TAR_NAME, url=str(tar), source_stem=_TAR_NAME, only=transform.wanted())
        drawing = ShardDrawing(
            task,
            ledger,
            drawing=self._drawing,
            transform=transform,
            journal=None,
            keep_originals=False,
            shown="a chosen sample",
            about={},
            stopped=stopped,
            progress=lambda finished: None,
        )

        def draw() -> None:
            use_threads(1)  # as a run does, and in a thread that ends: the caller keeps its own number
            drawing.run()

        try:
            run_apart(draw, name="boomerang-trial")
        except StorageError:
            raise
        except OSError as error:
            raise scratch_full(error) from error


def at_t(recipe: Recipe, unit: str, value: float) -> Recipe:
    """The recipe with one t for all variants.

    At t 0 nothing is anonymized, so under that purpose the recipe becomes one that augments: the same image, by
    way of the autoencoder where there is one. Raises RecipeError for a t that can't be.
    """
    # By way of JSON, as a recipe is read, so that a t that makes no sense is refused.
    data = recipe.model_dump(mode="json", exclude={"t"}) | {"t": {unit: value}}
    if value == 0 and recipe.purpose == "anonymize":
        data |= {"purpose": "augment", "seed": 0, "fields": FieldPolicy(default="drop").model_dump(mode="json")}
    try:
        return Recipe.model_validate_json(json.dumps(data))
    except ValidationError as error:
        raise RecipeError(f"t {unit}={value:g}: {explain(error.errors(), Recipe)}") from error


def own_secret(recipe: Recipe, private_dir: str | None) -> bytes | None:
    """What to give `Rig.run` for the noise of the run itself. Raises PrivateDirError where it is missing."""
    return load_secret(private_dir) if recipe.purpose == "anonymize" else None


def fresh_noise(recipe: Recipe) -> tuple[Recipe, bytes | None]:
    """The recipe, and a secret to give `Rig.run` with it, under noise that nobody has used before."""
    if recipe.purpose == "anonymize":
        return recipe, secrets.token_bytes(_SECRET_BYTES)
    return recipe.model_copy(update={"seed": secrets.randbelow(2**63)}), None


def _loaded_by(recipe: Recipe) -> tuple[Any, ...]:
    """What loading looks at, but for where the model lies: run.json doesn't tell that."""
    model = recipe.model.model_dump(mode="json", exclude={"source", "revision"})
    energy = recipe.energy and (recipe.energy, recipe.sampler.clip)
    return model, energy, recipe.batch_size, recipe.batching, recipe.images.sizes, recipe.sampler.order
