"""One run, from a request to a report: plan, start workers, resume, hand out, close.

The driver trusts storage, not its memory: what is done is what has a marker. It knows no Ray; a pool does the
tasks, here or elsewhere, and both kinds of pool run the same code.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import functools
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from boomerang_batch import storage
from boomerang_batch.errors import ConfigError, StorageError
from boomerang_batch.run import journal, lease, phases
from boomerang_batch.run.appendix import failed_tasks, is_appendix
from boomerang_batch.run.budget import Spending
from boomerang_batch.run.cpus import usable_cpus
from boomerang_batch.run.discretion import PLAIN
from boomerang_batch.run.keys import KeyWatch
from boomerang_batch.run.lease import Lease
from boomerang_batch.run.markers import Markers, Told
from boomerang_batch.run.naming import Naming
from boomerang_batch.run.record import LOGS_NAME, open_record, read_record
from boomerang_batch.run.request import (
    RunRequest,
    expected_record,
    list_tasks,
    manifest_digest_over,
    open_naming,
    paths_told,
    record_homes,
    refuse_secrets,
)
from boomerang_batch.run.sheet import publish_sheets
from boomerang_batch.run.survey import survey
from boomerang_batch.run.tasks import RunReport, RunSpec, ShardReport, Task, WorkerFacts
from boomerang_batch.run.telemetry import Telemetry

_PUBLISH_LOG_EVERY_S = 60.0
"""From afar it is what tells a run's pace."""

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


def execute(
    request: RunRequest, *, stop: threading.Event, judge: Callable[[], None] | None = None
) -> RunReport:
    """Do a run, or go on with it. Raises BoomerangError when it can't be begun or storage fails.

    Setting `stop` ends it at a batch boundary; what is committed stays, and the same request resumes. `judge`
    is called once OUT has as many outputs as the recipe's gate asks for, or all, and before more are begun; it
    raises GateError where they won't do. Raises LeaseError where another run is at work on OUT.
    """
    refuse_secrets(request.recipe)
    phases.refuse(request)
    for told in paths_told(request.recipe):
        _log.warning("%s", told, extra=PLAIN)
    naming = open_naming(request)
    tasks = list_tasks(request, naming)
    storage.make_folder(request.out)
    with lease.held(request.out, wait=request.wait, stop=stop) as holding:
        return _execute(request, naming, tasks, holding, stop, judge)


def _execute(
    request: RunRequest,
    naming: Naming,
    tasks: Sequence[Task],
    holding: Lease,
    stop: threading.Event,
    judge: Callable[[], None] | None,
) -> RunReport:
    started = time.monotonic()
    recipe, out = request.recipe, request.out
    storage.sweep(out)
    there = read_record(out)
    markers = Markers(out)
    if there is None:
        survey(out, markers, tasks, recipe.digest)  # refuses what another run left, before anything is written
    stack = there.stack if there else {}
    spec = RunSpec(
        recipe=recipe,
        # Workers may run in another folder.
        out=storage.absolute(out),
        private_dir=request.private_dir and storage.absolute(request.private_dir),
        device=request.device,
        threads=request.threads or int(stack.get("threads", usable_cpus())),
        epoch=holding.epoch,
        # What was probed once is frozen; another time or machine would come to something else.
        batch_size=int(stack["batch_size"]) if "batch_size" in stack else None,
        reached=storage.reached(),
        log_format=request.log_format,
    )
    pool = _pool(spec, request)
    try:
        facts = pool.start(stop=stop)
        for warning in facts.warnings:
            _log.warning("%s", warning, extra=PLAIN)  # of recipe and model
        record = expected_record(request, naming, tasks, facts)
        mixed = there is not None and (there.accepted_stacks or facts.stack != there.stack)
        if mixed and request.accept_stack:  # else it is refused, or nothing changes
            holding.let_uploads_end(stop)
        for home in record_homes(request):
            open_record(
                home,
                record,
                digest_over=functools.partial(manifest_digest_over, request, naming),
                extend=request.extend,
                accept_stack=request.accept_stack,
            )
        reports, gave_up = _work(request, pool, tasks, markers, stop, judge)
    finally:
        pool.close()
        storage.sweep(out)
    lease.require(out, holding.epoch)
    report = _close(request, naming, tasks, reports, markers, stopped=stop.is_set())
    return dataclasses.replace(report, gave_up=gave_up, seconds=round(time.monotonic() - started, 3))


def _work(
    request: RunRequest,
    pool: Pool,
    tasks: Sequence[Task],
    markers: Markers,
    stop: threading.Event,
    judge: Callable[[], None] | None,
) -> tuple[dict[str, ShardReport], str]:
    """Have everything done that storage does not say is done; the reports by name, and why the run gave up."""
    out, reports = request.out, {}
    spending, gave_up = Spending(request.recipe.run.on_error), ""
    stamp, published_at = dt.datetime.now(dt.UTC).strftime("%Y%m%dT%H%M%S.%fZ"), time.monotonic()
    before = survey(out, markers, tasks, request.recipe.digest)
    todo = [*before.todo]
    if request.only_failed:
        names = {report.name for report in before.done if report.counts.get("failed")}
        private = request.private_dir if request.recipe.purpose == "anonymize" else None
        todo += failed_tasks(out, private, [task for task in tasks if task.name in names])
    comparing = request.recipe.identity == "key" and (bool(todo) or not markers.compared)
    with (
        Telemetry(shards=len(tasks), quiet=request.quiet) as telemetry,
        KeyWatch(storage.absolute(out)) as keys,
    ):
        telemetry.resumed(before.done)
        for report in before.done if comparing else ():
            keys.add(report.name)
        try:
            work = _begun(
                request,
                pool,
                todo,
                before.done,
                tasks=tasks,
                stop=stop,
                progress=telemetry.images_in_flight,
                judge=judge,
            )
            for report in work:
                reports[report.name] = report
                telemetry.shard(report)
                if report.status == "done":
                    markers.remember(
                        report.name, Told(request.recipe.digest, report.counts, report.marker_bytes)
                    )
                if time.monotonic() - published_at > _PUBLISH_LOG_EVERY_S:
                    _publish_logs(out, stamp, telemetry, markers)
                    published_at = time.monotonic()
                gave_up = gave_up or spending.add(report)
                if gave_up or report.status == "stopped":  # of itself: another run has taken OUT over
                    stop.set()
                if comparing and report.status in ("done", "there") and not is_appendix(report.name):
                    keys.add(report.name)
            all_over = all(task.name in reports and reports[task.name].status != "stopped" for task in todo)
            if comparing and all_over and not gave_up:
                keys.finish(stop)
                markers.compared = True
        finally:
            _publish_logs(out, stamp, telemetry, markers)
    untouched = {task.name: ShardReport(name=task.name, status="left") for task in todo}
    return untouched | reports, gave_up


def _begun(
    request: RunRequest,
    pool: Pool,
    todo: Sequence[Task],
    done: Sequence[ShardReport],
    *,
    tasks: Sequence[Task],
    stop: threading.Event,
    progress: Callable[[str, int], None],
    judge: Callable[[], None] | None,
) -> Iterator[ShardReport]:
    """Reports of all that is to do of `tasks`, or of what must come before and could not be done.

    Where a gate is to judge, only as many are begun before as it takes.
    """
    if todo and not (yield from phases.before_outputs(request, pool, tasks, stop=stop)):
        return
    left, gate = list(todo), request.recipe.run.gate
    if gate is not None and judge is not None:
        there = sum(report.counts.get("ok", 0) for report in done)
        at_once = request.workers or request.recipe.run.workers or 1
        while left and there < gate.samples and not stop.is_set():
            for report in pool.run(left[:at_once], stop=stop, progress=progress):
                there += report.counts.get("ok", 0) if report.status == "done" else 0
                yield report
            left = left[at_once:]
        if not stop.is_set():
            judge()
    if left and not stop.is_set():
        yield from pool.run(left, stop=stop, progress=progress)


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


def _publish_logs(out: str, stamp: str, telemetry: Telemetry, markers: Markers) -> None:
    """Keep under OUT/logs the events so far, and what the markers say.

    A run that fails for want of space must not fail over its log.
    """
    folder = storage.join(out, LOGS_NAME)
    try:
        storage.make_folder(folder)
        storage.publish_bytes(telemetry.log(), storage.join(folder, f"{stamp}.jsonl"))
        markers.save()
    except StorageError as error:
        _log.warning("the run's log is lost: %s", error, extra=PLAIN)


def _close(
    request: RunRequest,
    naming: Naming,
    tasks: Sequence[Task],
    reports: dict[str, ShardReport],
    markers: Markers,
    *,
    stopped: bool,
) -> RunReport:
    """Count what storage holds now; when nothing is left to do, draw the contact sheets."""
    after = survey(request.out, markers, tasks, request.recipe.digest)
    rows: Counter[str] = Counter()
    for report in after.done:
        rows.update(report.counts)
    # Of shards storage tells whether they are done; an appendix that was not made leaves its shard as it was.
    status = {name: report.status for name, report in reports.items()}
    undone = {task.name for task in after.todo}
    undone |= {name for name, what in status.items() if is_appendix(name) and what not in ("done", "there")}
    quarantined = sorted(name for name in undone if status.get(name) == "quarantined")
    stopped = stopped and len(undone) > len(quarantined)
    if not stopped:
        publish_sheets(request.recipe, request.out, request.private_dir, naming, tasks, after.done)
    journal.sweep(journal.home(request.recipe.purpose, request.out, request.private_dir), after.committed)
    made = [name for name, report in reports.items() if report.status == "done"]
    mended = sum(map(is_appendix, made))
    return RunReport(
        out=request.out,
        shards={
            "done": len(made) - mended,
            "there": len(after.done) - len(made) + mended,
            "mended": mended,
            "quarantined": len(quarantined),
            "left": len(undone) - len(quarantined),
        },
        rows=dict(sorted(rows.items())),
        quarantined=tuple(quarantined),
        problems=tuple(reports[name].reason for name in quarantined),
        stopped=stopped,
    )
