"""`submit`, `logs`, `stop` and `list`: runs as jobs of a Ray cluster. `status` has a module of its own."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from boomerang_batch.cli.inputs import RunFlags, load_recipe, run_options

if TYPE_CHECKING:
    from boomerang_batch.run.jobs.cluster import Cluster
    from boomerang_batch.run.jobs.job import Job


def cluster_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options of every command that asks a cluster: --address, --token-file."""
    options = (
        click.option(
            "--address",
            metavar="URL",
            help="The dashboard of the cluster, http://HEAD:8265.  [default: as Ray finds it, by "
            "RAY_API_SERVER_ADDRESS, RAY_ADDRESS or on this machine]",
        ),
        click.option(
            "--token-file",
            metavar="FILE",
            help="The cluster's token.  [default: RAY_AUTH_TOKEN, or the file RAY_AUTH_TOKEN_PATH]",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


@click.command()
@click.argument("pipeline")
@click.argument("manifest")
@click.argument("out")
@run_options
@cluster_options
@click.option("--shared-files", is_flag=True, help="Local paths are the same on every machine of the cluster.")
@click.option("--wait", is_flag=True, help="Wait for the end, and exit as the run does.")
@click.option("--follow", is_flag=True, help="Like --wait, with the job's log on stderr.")
@click.pass_context
def submit(
    context: click.Context,
    pipeline: str,
    manifest: str,
    out: str,
    flags: RunFlags,
    address: str | None,
    token_file: str | None,
    shared_files: bool,
    wait: bool,
    follow: bool,
) -> None:
    """Have a Ray cluster do what `run` does, and print the job's id.

    Asking again for the same recipe, manifest and OUT gives the job that is at work on it; once that has
    ended, a new one resumes. The cluster's machines need this package installed.

    Recipe and manifest files of this machine are sent along. Other local paths (OUT, the private dir,
    shards, a model) are taken only if the cluster's head runs on this machine, or with --shared-files. No
    secret is ever sent: the private dir holds it, or BOOMERANG_SECRET on the cluster's machines.

    \b
    Examples:
      boomerang-batch submit demo-augment s3://bucket/shards.parquet s3://bucket/out --address http://head:8265
      boomerang-batch submit recipe.yaml shards.yaml OUT --private-dir PRIVATE --shared-files --wait
    """
    from boomerang_batch.data.manifest import load_manifest
    from boomerang_batch.run.jobs.cluster import Cluster
    from boomerang_batch.run.jobs.request import Wish, job_request

    # What is wrong with the recipe or the manifest is found here, not by a job half a minute later.
    wish = Wish(
        pipeline=pipeline,
        manifest=manifest,
        out=out,
        private_dir=flags.private_dir,
        limit=flags.limit,
        options=flags.words(),
        recipe=load_recipe(pipeline, flags.overrides),
        shards=load_manifest(manifest),
    )
    cluster = Cluster(address, token_file=token_file)
    shared = shared_files or cluster.runs_here()
    job, is_new = cluster.submit(job_request(wish, shared=shared, done=_done(out)))
    click.echo(job.id)
    hint = f"`boomerang-batch status {job.id} --watch` shows how far it is"
    click.echo(f"submitted; {hint}" if is_new else f"it is at work already; {hint}", err=True)
    if not (wait or follow):
        return
    try:
        if follow:
            job = cluster.follow(job.id, lambda text: click.echo(text, nl=False, err=True))
        else:
            job = cluster.wait(job.id, told=lambda now: click.echo(f"{now.id}: {now.state.lower()}", err=True))
    except KeyboardInterrupt:
        click.echo(f"no longer waiting; {job.id} goes on: `boomerang-batch stop {job.id}` ends it", err=True)
        raise
    click.echo(ending(job), err=True)
    if job.message and job.exit_code and not follow:
        click.echo(job.message, err=True)
    context.exit(job.exit_code or 0)


@click.command()
@click.argument("job_id", metavar="[ID]", required=False)
@click.option("-f", "--follow", is_flag=True, help="Go on until the job has ended.")
@cluster_options
def logs(job_id: str | None, follow: bool, address: str | None, token_file: str | None) -> None:
    """Print what the driver of the job ID, or of the newest one, has said.

    This log dies with the cluster's head. What is kept is in OUT/logs, and under anonymize in the private
    dir's logs.
    """
    from boomerang_batch.run.jobs.cluster import Cluster

    cluster = Cluster(address, token_file=token_file)
    chosen = chosen_job(cluster, job_id)
    if follow:
        cluster.follow(chosen.id, lambda text: click.echo(text, nl=False))
    else:
        click.echo(cluster.log(chosen.id), nl=False)


@click.command()
@click.argument("job_id", metavar="[ID]", required=False)
@cluster_options
def stop(job_id: str | None, address: str | None, token_file: str | None) -> None:
    """Stop the job ID, or the only one at work: it ends at a batch boundary, and can be resumed.

    Waits for that, two minutes at most, and says what is done and what is left.
    """
    from boomerang_batch.errors import ConfigError
    from boomerang_batch.run.jobs.cluster import Cluster

    cluster = Cluster(address, token_file=token_file)
    if job_id is None:
        at_work = [job for job in cluster.jobs() if not job.ended]
        if len(at_work) > 1:
            raise ConfigError(f"several jobs are at work; say which: {', '.join(job.id for job in at_work)}")
        if not at_work:
            raise ConfigError(f"no job of this tool is at work at {cluster.address}")
        job_id = at_work[0].id
    job = cluster.job(job_id)
    if job.ended:
        click.echo(f"it had ended before: {ending(job)}")
        return
    job = cluster.stop(job.id)
    click.echo(f"{ending(job)}{_left(job)}")


@click.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print them as JSON.")
@cluster_options
def list_jobs(as_json: bool, address: str | None, token_file: str | None) -> None:
    """List this tool's jobs on the cluster, the newest first."""
    from boomerang_batch.run.jobs.cluster import Cluster

    jobs = Cluster(address, token_file=token_file).jobs()
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(job) | {"exit_code": job.exit_code} for job in jobs]))
        return
    for job in jobs:
        began = time.strftime("%Y-%m-%d %H:%M", time.localtime(job.began_s)) if job.began_s else "-"
        click.echo(f"{job.id:<18} {state_of(job):<22} {began:<16} {job.recipe}")
        click.echo(f"{'':<18} {job.out}")


def chosen_job(cluster: Cluster, job_id: str | None) -> Job:
    """The job of that id, or the newest. Raises ConfigError when there is none."""
    from boomerang_batch.errors import ConfigError

    if job_id is not None:
        return cluster.job(job_id)
    jobs = cluster.jobs()
    if not jobs:
        raise ConfigError(
            f"there is no job of this tool at {cluster.address}; `boomerang-batch submit` makes one"
        )
    return jobs[0]


def state_of(job: Job) -> str:
    """A job's state in a few words, with the exit code that tells more."""
    state = job.state.lower()
    return state if job.exit_code in (None, 0) else f"{state}, exit code {job.exit_code}"


def ending(job: Job) -> str:
    """How a job ended, for people."""
    meaning = {
        0: "finished",
        2: "refused, for what its log says",
        3: "finished, with quarantined samples or shards; the provenance tells which and why",
        75: "stopped; the same submit resumes",
    }
    return f"{job.id}: {meaning.get(job.exit_code or 0, 'failed')}"


def _done(out: str) -> int | None:
    """Shards that OUT has by now; None where it can't be seen from here."""
    from boomerang_batch.errors import StorageError
    from boomerang_batch.run.progress import done_shards

    try:
        return done_shards(out)
    except StorageError:
        return None


def _left(job: Job) -> str:
    """What storage says that a stopped job has done and left, as the end of a sentence."""
    from boomerang_batch.errors import BoomerangError
    from boomerang_batch.run.progress import Looks

    try:
        progress = Looks(job.out).look() if job.out else None
    except BoomerangError as error:
        return f" (what is done can't be seen from here: {error})"
    if progress is None or progress.left is None:
        return ""
    return f"; {progress.done} of {progress.shards} shards are done, {progress.left} left"
