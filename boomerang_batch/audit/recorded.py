"""The model of a recorded run, loaded again as the run had it."""

from __future__ import annotations

from boomerang_batch import storage
from boomerang_batch.config.blocks import ENTRY_POINT
from boomerang_batch.config.pipeline import Recipe
from boomerang_batch.errors import ModelError
from boomerang_batch.run.cpus import usable_cpus
from boomerang_batch.run.record import RunRecord
from boomerang_batch.run.trial import Rig
from boomerang_batch.shipped import SCHEME


def open_rig(record: RunRecord, recipe: Recipe, *, model: str | None, device: str, threads: int | None) -> Rig:
    """Load the model of a recorded run, with its batch shape and, unless told, its threads.

    `model` says where it is; without, only a shipped, an installed and a pinned one are found. Raises
    ModelError.
    """
    spec = recipe.model
    if model is not None:
        # A folder is what it is; a hub id needs the commit that was recorded.
        revision = None if storage.exists(model) else spec.revision
        spec = spec.model_copy(update={"source": model, "revision": revision})
    elif spec.revision is None and not spec.source.startswith((SCHEME, ENTRY_POINT)):
        raise ModelError(
            f"run.json tells only the name of the model's folder, {spec.source}; say where it is with --model"
        )
    shape = record.stack.get("batch_size")
    return Rig(
        recipe.model_copy(update={"model": spec}),
        device=device,
        threads=threads or int(record.stack.get("threads", usable_cpus())),
        batch_size=None if shape is None else int(shape),
    )
