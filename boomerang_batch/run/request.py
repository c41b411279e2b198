"""What the user asked for, and what follows from it before any work: names, tasks and the run's record."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from boomerang_batch import storage
from boomerang_batch.config.energy import EnergySpec
from boomerang_batch.config.pipeline import ModelSpec, Recipe
from boomerang_batch.data.manifest import Manifest
from boomerang_batch.errors import ManifestError, PrivateDirError, RecipeError
from boomerang_batch.run.log_lines import Format
from boomerang_batch.run.naming import Naming
from boomerang_batch.run.private import SECRET_VARIABLE, load_secret, prepare_private_dir
from boomerang_batch.run.record import RunRecord
from boomerang_batch.run.tasks import Task, WorkerFacts

_SECRET_NAME = re.compile(
    r"(^|[_-])(token|secret|password|passwd|credentials?|(api|access|private|secret)[_-]?key)$", re.IGNORECASE
)


@dataclass(frozen=True, kw_only=True)
class RunRequest:
    """What the user asked for."""

    recipe: Recipe
    manifest: Manifest
    out: str
    private_dir: str | None = None
    address: str = "inline"
    workers: int | None = None
    device: str = "auto"
    threads: int | None = None
    limit: int | None = None
    extend: bool = False
    accept_stack: bool = False
    only_failed: bool = False
    """Whether samples that failed are done again, beside shards that are not done yet."""
    wait: bool = False
    """Whether to wait for another run that holds OUT."""
    quiet: bool = False
    log_format: Format = "text"
    """Of workers' log lines; this process's log is set up by whoever owns the process."""


def refuse_secrets(recipe: Recipe) -> None:
    """Refuse what an option for an installed model would tell in run.json, or in a job. Raises RecipeError.

    Options are recorded as they are, for whoever audits or regenerates must load the same model by them; a
    digest would say that they differ, and not what they were.
    """
    for place, name, value in _texts_told(recipe):
        if value and (_SECRET_NAME.search(name) or storage.without_secrets(value) != value):
            raise RecipeError(
                f"{place} looks like a secret, and options stand in OUT/run.json; let the model's package read "
                "it from the environment or from a file, and name that variable or file instead"
            )


def paths_told(recipe: Recipe) -> Iterator[str]:
    """What the user should hear of options that show a path of this machine in an OUT to be published."""
    for place, _, value in _texts_told(recipe):
        if recipe.purpose == "anonymize" and value.startswith(("/", "~", "file:")):
            yield (
                f"{place} is a path of this machine and stands in OUT/run.json; if nobody is to "
                "see it, name the file so that the model's package finds it by itself"
            )


def models_of(recipe: Recipe) -> dict[str, ModelSpec]:
    """Every model that a recipe names, by where it does."""
    other = None if recipe.target is None else recipe.target.model
    return {"model": recipe.model} if other is None else {"model": recipe.model, "target.model": other}


def _texts_told(recipe: Recipe) -> Iterator[tuple[str, str, str]]:
    """(place, name, value) of every option for an installed model or energy that is a text."""
    models: dict[str, ModelSpec | EnergySpec] = {**models_of(recipe)}
    if recipe.energy is not None:
        models["energy"] = recipe.energy
    for place, model in models.items():
        for name, value in model.options.items():
            if isinstance(value, str):
                yield f"{place}.options.{name}", name, value


def open_naming(request: RunRequest) -> Naming:
    """The run's names, with the private dir made on first use."""
    if request.recipe.purpose != "anonymize":
        return Naming(request.recipe, None)
    if request.private_dir is None and SECRET_VARIABLE not in os.environ:
        load_secret(None)  # raises, and says what is missing
    if request.private_dir is None:
        raise PrivateDirError("purpose anonymize writes the table of pseudonyms: give --private-dir DIR")
    prepare_private_dir(request.private_dir, out=request.out)
    return Naming(request.recipe, load_secret(request.private_dir))


def list_tasks(request: RunRequest, naming: Naming) -> list[Task]:
    """A task for every shard, in the order of the outputs' names. Raises ManifestError for input inside OUT."""
    entries = request.manifest.shards[: request.limit]
    if not entries:
        raise ManifestError(f"manifest {request.manifest.name} lists no shards")
    for url in storage.lying_in(request.out, (entry.url for entry in entries)):
        raise ManifestError(
            f"{url} lies in OUT ({request.out}) and would be overwritten or published; choose another OUT"
        )
    tasks = [
        Task(
            name=naming.stem(entry.stem),
            url=entry.url,
            source_stem=entry.stem,
            size_bytes=entry.size_bytes,
            digest=entry.digest,
        )
        for entry in entries
    ]
    # In the order of the outputs' names: logs and file times tell the order of work, and the manifest's would
    # tell which pseudonym is whose.
    return sorted(tasks, key=lambda task: task.name)


def expected_record(
    request: RunRequest, naming: Naming, tasks: Sequence[Task], facts: WorkerFacts
) -> RunRecord:
    """What run.json must say."""
    names = tuple(task.name for task in tasks)
    return RunRecord(
        name=request.recipe.name,
        recipe=request.recipe.canonical(),
        recipe_digest=request.recipe.digest,
        manifest_digest=manifest_digest_over(request, naming, names),
        limit=request.limit,
        shards=names,
        model_digest=facts.model_digest,
        noise_key_id=naming.noise_key_id,
        stack=facts.stack,
    )


def manifest_digest_over(request: RunRequest, naming: Naming, names: Collection[str]) -> str:
    """The manifest's digest over the shards whose outputs have these names."""
    wanted = set(names)
    shards = tuple(entry for entry in request.manifest.shards if naming.stem(entry.stem) in wanted)
    return naming.digest(dataclasses.replace(request.manifest, shards=shards).digest.encode())


def record_homes(request: RunRequest) -> list[str]:
    """Where the run's record stands: OUT, and the private dir, whose links must not mix with another run's."""
    private = request.recipe.purpose == "anonymize" and request.private_dir
    return [*([private] if private else []), request.out]
