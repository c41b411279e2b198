"""One run, from a request to a report: plan, start workers, resume, hand out, close.

The driver trusts storage, not its memory: what is done is what has a marker. It knows no Ray; a pool does the
tasks, here or elsewhere, and both kinds of pool run the same code.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import functools
import itertools
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from boomerang_batch import storage
from boomerang_batch.config.pipeline import Recipe
from boomerang_batch.data.manifest import Manifest
from boomerang_batch.errors import ConfigError, ManifestError, PrivateDirError, RunMismatchError, StorageError
from boomerang_batch.run.commit import MARKER_SUFFIX, read_marker
from boomerang_batch.run.keys import KeyRegistry
from boomerang_batch.run.naming import Naming
from boomerang_batch.run.private import SECRET_VARIABLE, load_secret, prepare_private_dir
from boomerang_batch.run.record import LOGS_NAME, RunRecord, open_record, read_record
from boomerang_batch.run.sheet import publish_sheets
from boomerang_batch.run.tasks import RunReport, RunSpec, ShardReport, Task, WorkerFacts
from boomerang_batch.run.telemetry import Telemetry

_log = logging.getLogger(__name__)


class Pool(Protocol):
    """Who does the tasks."""

    def start(self, *, stop: threading.Event) -> WorkerFacts:
        """Get ready to work; returns what every worker found alike. A `stop` may end it with StoppedError."""
        ...

    def run(
        self, tasks: Sequence[Task], *, stop: threading.Event, progress: Callable[[str, int], None]
    ) -> Iterator[ShardReport]:
        """Do `tasks`, yielding a report for each that came to an end; ends early once `stop` is set."""
        ...

    def close(self) -> None:
        """Let everything go."""
        ...


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
    quiet: bool = False


def execute(request: RunRequest, *, stop: threading.Event) -> RunReport:
    """Do a run, or go on with it. Raises BoomerangError when it can't be begun or storage fails.

    Setting `stop` ends it at a batch boundary; what is committed stays, and the same request resumes.
    """
    started = time.monotonic()
    recipe, out = request.recipe, request.out
    naming = _naming(request)
    tasks = _plan(request, naming)
    storage.make_folder(out)
    storage.sweep(out)
    there = read_record(out)
    if there is None:
        _split(request, tasks)  # refuses what another run left, before anything is written
    stack = there.stack if there else {}
    spec = RunSpec(
        recipe=recipe,
        # Workers may run in another folder.
        out=storage.absolute(out),
        private_dir=request.private_dir and storage.absolute(request.private_dir),
        device=request.device,
        threads=request.threads or int(stack.get("threads", os.cpu_count() or 1)),
        # What was probed once is frozen; another time or machine would come to something else.
        batch_size=int(stack["batch_size"]) if "batch_size" in stack else None,
    )
    pool = _pool(spec, request)
    try:
        facts = pool.start(stop=stop)
        for warning in facts.warnings:
            _log.warning("%s", warning)
        record = _record(request, naming, tasks, facts)
        for home in _homes(request):
            open_record(
                home,
                record,
                digest_over=functools.partial(_digest_over, request, naming),
                extend=request.extend,
                accept_stack=request.accept_stack,
            )
        reports = _work(request, pool, tasks, stop)
    finally:
        pool.close()
        storage.sweep(out)
    return _close(request, naming, tasks, reports, stop, time.monotonic() - started)


def _homes(request: RunRequest) -> list[str]:
    """Where the run's record stands: OUT, and the private dir, whose links must not mix with another run's."""
    private = request.recipe.purpose == "anonymize" and request.private_dir
    return [*([private] if private else []), request.out]


def _work(
    request: RunRequest, pool: Pool, tasks: Sequence[Task], stop: threading.Event
) -> dict[str, ShardReport]:
    """Have everything done that storage does not say is done; the reports by name."""
    out, reports, registry = request.out, {}, KeyRegistry()
    done, todo = _split(request, tasks)
    with Telemetry(shards=len(tasks), quiet=request.quiet) as telemetry:
        try:
            for report in itertools.chain(done, pool.run(todo, stop=stop, progress=telemetry.images_in_flight)):
                reports[report.name] = report
                telemetry.shard(report)
                if report.status in ("done", "there") and request.recipe.identity == "key":
                    repeated = registry.add(out, report.name)
                    if repeated:
                        raise ManifestError(f"{request.manifest.name}: {repeated}")
        finally:
            _publish_log(out, telemetry)
    return reports


def _naming(request: RunRequest) -> Naming:
    """The run's names, with the private dir made on first use."""
    if request.recipe.purpose != "anonymize":
        return Naming(request.recipe, None)
    if request.private_dir is None and SECRET_VARIABLE not in os.environ:
        load_secret(None)  # raises, and says what is missing
    if request.private_dir is None:
        raise PrivateDirError("purpose anonymize writes the table of pseudonyms: give --private-dir DIR")
    prepare_private_dir(request.private_dir, out=request.out)
    return Naming(request.recipe, load_secret(request.private_dir))


def _plan(request: RunRequest, naming: Naming) -> list[Task]:
    entries = request.manifest.shards[: request.limit]
    if not entries:
        raise ManifestError(f"manifest {request.manifest.name} lists no shards")
    for entry in entries:
        if storage.lies_in(entry.url, request.out):
            raise ManifestError(
                f"{entry.url} lies in OUT ({request.out}) and would be overwritten or published; "
                "choose another OUT"
            )
    tasks = [Task(name=naming.stem(entry.stem), url=entry.url, source_stem=entry.stem) for entry in entries]
    # In the order of the outputs' names: logs and file times tell the order of work, and the manifest's would
    # tell which pseudonym is whose.
    return sorted(tasks, key=lambda task: task.name)


def _pool(spec: RunSpec, request: RunRequest) -> Pool:
    if request.address == "inline":
        if request.workers is not None:
            raise ConfigError("--workers counts Ray workers; give --address local or a cluster's address too")
        from boomerang_batch.run.inline import InlinePool

        return InlinePool(spec)
    from boomerang_batch.run.dispatch import RayPool

    return RayPool(
        spec,
        address=request.address,
        workers=request.workers or request.recipe.run.workers,
        max_attempts=request.recipe.run.max_attempts,
    )


def _record(request: RunRequest, naming: Naming, tasks: Sequence[Task], facts: WorkerFacts) -> RunRecord:
    names = tuple(task.name for task in tasks)
    return RunRecord(
        name=request.recipe.name,
        recipe=request.recipe.canonical(),
        recipe_digest=request.recipe.digest,
        manifest_digest=_digest_over(request, naming, names),
        limit=request.limit,
        shards=names,
        model_digest=facts.model_digest,
        noise_key_id=naming.noise_key_id,
        stack=facts.stack,
    )


def _digest_over(request: RunRequest, naming: Naming, names: Collection[str]) -> str:
    """The manifest's digest over the shards whose outputs have these names."""
    wanted = set(names)
    shards = tuple(entry for entry in request.manifest.shards if naming.stem(entry.stem) in wanted)
    return naming.digest(dataclasses.replace(request.manifest, shards=shards).digest.encode())


def _split(request: RunRequest, tasks: Sequence[Task]) -> tuple[list[ShardReport], list[Task]]:
    """What storage says is done, and what is left to do.

    Raises RunMismatchError for a shard that another recipe made; run.json would tell, but it may be lost.
    """
    out = request.out
    names = set(storage.list_names(out))
    done, todo = [], []
    for task in tasks:
        marker = read_marker(out, task.name) if task.name + MARKER_SUFFIX in names else None
        if marker is None:
            todo.append(task)
        elif marker.recipe_digest != request.recipe.digest:
            raise RunMismatchError(f"{out} holds shard {task.name} of another recipe; use an empty OUT")
        else:
            done.append(ShardReport(name=task.name, status="there", counts=marker.counts))
    return done, todo


def _publish_log(out: str, telemetry: Telemetry) -> None:
    """Keep the events under OUT/logs. A run that fails for want of space must not fail over its log too."""
    folder = storage.join(out, LOGS_NAME)
    stamp = dt.datetime.now(dt.UTC).strftime("%Y%m%dT%H%M%S.%fZ")
    try:
        storage.make_folder(folder)
        storage.publish_bytes(telemetry.log(), storage.join(folder, f"{stamp}.jsonl"))
    except StorageError as error:
        _log.warning("the run's log is lost: %s", error)


def _close(
    request: RunRequest,
    naming: Naming,
    tasks: Sequence[Task],
    reports: dict[str, ShardReport],
    stop: threading.Event,
    seconds: float,
) -> RunReport:
    """Count what storage holds now; when nothing is left to do, draw the contact sheets."""
    done, left = _split(request, tasks)
    rows: Counter[str] = Counter()
    for report in done:
        rows.update(report.counts)
    quarantined = [task for task in left if reports.get(task.name, _UNTOUCHED).status == "quarantined"]
    stopped = stop.is_set() and len(left) > len(quarantined)
    if not stopped:
        publish_sheets(request.recipe, request.out, request.private_dir, naming, tasks, done)
    made = [report for report in reports.values() if report.status == "done"]
    return RunReport(
        out=request.out,
        shards={
            "done": len(made),
            "there": len(done) - len(made),
            "quarantined": len(quarantined),
            "left": len(left) - len(quarantined),
        },
        rows=dict(sorted(rows.items())),
        problems=tuple(reports[task.name].reason for task in quarantined),
        seconds=round(seconds, 3),
        stopped=stopped,
    )


_UNTOUCHED = ShardReport(name="", status="untouched")
