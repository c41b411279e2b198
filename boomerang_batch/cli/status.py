"""`boomerang-batch status`: how far a job or an OUT is. Counting is run/progress's; here it is shown."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from boomerang_batch.cli.jobs import chosen_job, cluster_options, state_of
from boomerang_batch.run.words import pace, span

if TYPE_CHECKING:
    from rich.console import RenderableType

    from boomerang_batch.run.jobs.cluster import Cluster
    from boomerang_batch.run.jobs.job import Job
    from boomerang_batch.run.progress import Beginning, Looks, Progress

_LOOK_EVERY_S = 5.0
_LOOKS_KEPT = 120


@dataclass(frozen=True, kw_only=True)
class View:
    """What is known at one moment of a job, of an OUT, or of both."""

    out: str
    job: Job | None = None
    progress: Progress | None = None
    images_per_s: float | None = None
    eta_s: float | None = None
    note: str = ""

    @property
    def over(self) -> bool:
        """Whether nothing more will come."""
        if self.job is not None:
            return self.job.ended
        return self.progress is not None and self.progress.left == 0


@click.command()
@click.argument("what", metavar="[ID | OUT]", required=False)
@click.option("--watch", is_flag=True, help="Look every 5 s until the end, and exit as the job does.")
@click.option("--json", "as_json", is_flag=True, help="Print each look as a line of JSON.")
@cluster_options
@click.pass_context
def status(
    context: click.Context,
    what: str | None,
    watch: bool,
    as_json: bool,
    address: str | None,
    token_file: str | None,
) -> None:
    """Show how far a job is: its state, and what storage has of its output.

    Without an argument the newest job of the cluster. An ID begins with bb-; anything else is an OUT, path
    or URL, whose progress is counted without asking any cluster.
    """
    from boomerang_batch.run.jobs.job import is_id

    cluster, job = None, None
    if what is None or is_id(what):
        from boomerang_batch.run.jobs.cluster import Cluster

        cluster = Cluster(address, token_file=token_file)
        job = chosen_job(cluster, what)
    views = look(cluster, job, job.out if job is not None else str(what))
    if not watch:
        click.echo(_json(next(views)) if as_json else "\n".join(text_of(next(views))))
        return
    with contextlib.suppress(KeyboardInterrupt), _shown(as_json) as show:
        for view in views:
            show(view)
            if view.over:
                context.exit(view.job.exit_code or 0 if view.job is not None else 0)
            time.sleep(_LOOK_EVERY_S)


def look(cluster: Cluster | None, job: Job | None, out: str) -> Iterator[View]:
    """View after view, each as of now. A store that fails meanwhile is a note, and not the end."""
    from boomerang_batch.errors import BoomerangError
    from boomerang_batch.run.progress import Looks, eta_s, images_per_s

    looks = Looks(out)
    kept: deque[Progress] = deque(maxlen=_LOOKS_KEPT)
    while True:
        note, seen = "", None
        try:
            seen = _seen(looks, out, job)
        except BoomerangError as error:
            if job is None and not kept:
                raise
            note = str(error)
        if seen is None:
            yield View(out=out, job=job, note=note or "OUT isn't there yet, or can't be seen from this machine")
        else:
            kept.append(seen)
            until = _until_last_commit(kept)
            rate = None if job is not None and job.ended else images_per_s(until, _beginning(job))
            left_s = eta_s(seen, rate)
            if left_s is not None:
                left_s = max(left_s - (seen.at_s - until[-1].at_s), 0.0)
            yield View(out=out, job=job, progress=seen, images_per_s=rate, eta_s=left_s)
        if job is not None and cluster is not None:
            # Before the next look, so that the look after its end shows all that came of it.
            job = cluster.patient_job(job.id)


def _until_last_commit(kept: Iterable[Progress]) -> list[Progress]:
    """The looks up to the one that first saw as much done as the last.

    Between two commits storage tells nothing, but work goes on: counted to this moment the pace would sink and
    the time left grow.
    """
    *before, last = kept
    first = next(look for look in (*before, last) if look.done == last.done)
    return [
        *(look for look in before if look.done < last.done),
        dataclasses.replace(first, session=last.session),
    ]


def _beginning(job: Job | None) -> Beginning | None:
    """When the job began and with how much done, where the job tells."""
    from boomerang_batch.run.progress import Beginning

    if job is None or job.began_s is None or "done" not in job.metadata:
        return None
    return Beginning(at_s=job.began_s, done=int(job.metadata["done"]))


def _seen(looks: Looks, out: str, job: Job | None) -> Progress | None:
    """A look at OUT; None where a job's OUT is a folder that this machine doesn't have."""
    from boomerang_batch import storage
    from boomerang_batch.errors import ConfigError

    if storage.is_local(out) and not storage.exists(out):
        if job is None:
            raise ConfigError(f"{out}: there is no such folder, and it is no job's id (bb-...)")
        return None
    return looks.look()


def rows_of(view: View) -> list[tuple[str, str]]:
    """What the screen tells: (what, text)."""
    rows = []
    if view.job is not None:
        rows.append(
            ("job", f"{view.job.id}  {state_of(view.job)}{_since(view.job)}  {view.job.recipe}".rstrip())
        )
    rows.append(("out", view.out))
    if view.progress is not None:
        seen = view.progress
        of = f"of {seen.shards} done" if seen.shards is not None else "done, of how many run.json will tell"
        quarantined = f", {seen.quarantined} quarantined" if seen.quarantined else ""
        rows.append(("shards", f"{seen.done} {of}{quarantined}"))
        rows.append(("samples", ", ".join(f"{n} {name}" for name, n in seen.rows.items()) or "none"))
    if view.images_per_s is not None:
        left = f", about {span(view.eta_s)} left" if view.eta_s else ""
        rows.append(("pace", f"{pace(view.images_per_s)} images/s{left}"))
    if view.job is not None and view.job.state == "FAILED" and view.job.message.strip():
        rows.append(("said", view.job.message.strip().splitlines()[-1]))
    if view.note:
        rows.append(("note", view.note))
    return rows


def text_of(view: View) -> list[str]:
    """The screen as plain lines."""
    return [f"{what:<8} {text}" for what, text in rows_of(view)]


def screen_of(view: View) -> RenderableType:
    """The screen for a terminal, however narrow: long words are folded."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    for what, text in rows_of(view):
        table.add_row(what, Text(text))
    if view.progress is None or not view.progress.shards:
        return table
    return Group(table, ProgressBar(total=view.progress.shards, completed=view.progress.done, width=60))


def line_of(view: View) -> str:
    """One look in one line, for logs."""
    parts = [view.job.state.lower()] if view.job is not None else []
    if view.progress is not None:
        total = "?" if view.progress.shards is None else view.progress.shards
        parts += [f"{view.progress.done}/{total} shards", f"{view.progress.images} images"]
        parts += [f"{view.progress.failed} failed"] if view.progress.failed else []
        parts += [f"{view.progress.quarantined} quarantined"] if view.progress.quarantined else []
    parts += [f"{pace(view.images_per_s)} images/s"] if view.images_per_s is not None else []
    parts += [f"{span(view.eta_s)} left"] if view.eta_s else []
    return "  ".join([*parts, *([view.note] if view.note else [])])


def _since(job: Job) -> str:
    if job.began_s is None:
        return ""
    until = job.ended_s if job.ended_s is not None else time.time()
    return f" {'after' if job.ended else 'for'} {span(max(until - job.began_s, 0.0))}"


def facts_of(view: View) -> Mapping[str, Any]:
    """One look for programs."""
    seen, job = view.progress, view.job
    return {
        "job": job and {**dataclasses.asdict(job), "exit_code": job.exit_code},
        "out": view.out,
        "shards": seen
        and {"all": seen.shards, "done": seen.done, "quarantined": seen.quarantined, "left": seen.left},
        "rows": seen and dict(seen.rows),
        "images": seen and seen.images,
        "failed": seen and seen.failed,
        "images_per_s": view.images_per_s,
        "eta_s": view.eta_s,
        "note": view.note,
    }


def _json(view: View) -> str:
    return json.dumps(facts_of(view))


@contextlib.contextmanager
def _shown(as_json: bool) -> Iterator[Any]:
    """How a watch shows its views: JSON lines, a live screen on a terminal, or a line for whatever is new."""
    if as_json:
        yield lambda view: click.echo(_json(view))
    elif sys.stdout.isatty():
        from rich.console import Console
        from rich.live import Live

        with Live(console=Console(), auto_refresh=False) as live:
            yield lambda view: live.update(screen_of(view), refresh=True)
    else:
        said: list[str] = [""]

        def say(view: View) -> None:
            line = line_of(view)
            if line != said[-1]:
                said.append(line)
                click.echo(line)

        yield say
