"""`boomerang-batch run`: a dataset's twin, or the rest of one."""

from __future__ import annotations

import dataclasses
import json
import logging
from typing import TYPE_CHECKING

import click

from boomerang_batch.cli.inputs import RunFlags, load_recipe, run_options, stop_on_signals
from boomerang_batch.run import log_lines

if TYPE_CHECKING:
    from boomerang_batch.run.tasks import RunReport


@click.command()
@click.argument("pipeline")
@click.argument("manifest")
@click.argument("out")
@click.option(
    "--address",
    default="inline",
    metavar="ADDR",
    show_default=True,
    help="inline: no Ray. local: a Ray of its own on this machine. auto: the Ray cluster this machine or job "
    "belongs to. Else a Ray cluster's address.",
)
@run_options
@click.option(
    "--plan", "planned", metavar="FILE", help="Tell in the end how a plan did that `plan --save` kept."
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.pass_context
def run(
    context: click.Context,
    pipeline: str,
    manifest: str,
    out: str,
    address: str,
    flags: RunFlags,
    planned: str | None,
    as_json: bool,
) -> None:
    """Write to OUT the twin of MANIFEST that PIPELINE describes. The same command again resumes.

    PIPELINE and MANIFEST are files, URLs, or names of shipped ones.

    \b
    Examples:
      boomerang-batch run demo-anonymize demo OUT --private-dir PRIVATE
      boomerang-batch run recipe.yaml shards.yaml s3://bucket/out --address local --set t.fraction=0.6
    """
    from boomerang_batch.audit.gated import judge_of
    from boomerang_batch.data.manifest import load_manifest
    from boomerang_batch.run.discretion import Discretion
    from boomerang_batch.run.driver import execute
    from boomerang_batch.run.logs import KeptLog
    from boomerang_batch.run.request import RunRequest

    log_lines.set_up(flags.log_format)
    plan = None
    if planned is not None:
        from boomerang_batch.run.plan import load_plan

        plan = load_plan(planned)
    recipe = load_recipe(pipeline, flags.overrides)
    anonymize = recipe.purpose == "anonymize"
    with stop_on_signals() as stop, KeptLog(out=out, anonymize=anonymize, private_dir=flags.private_dir) as log:
        if anonymize:
            log_lines.set_up(flags.log_format, Discretion(named=(out, manifest), kept=log.place))
        request = RunRequest(
            recipe=recipe,
            manifest=load_manifest(manifest),
            out=out,
            private_dir=flags.private_dir,
            address=address,
            workers=flags.workers,
            device=flags.device,
            threads=flags.threads,
            limit=flags.limit,
            extend=flags.extend,
            accept_stack=flags.accept_stack,
            only_failed=flags.only_failed,
            wait=flags.if_held == "wait",
            log_format=flags.log_format,
        )
        report = log.report = execute(request, stop=stop, judge=judge_of(request))
    if anonymize:
        report = report.discreet()
    click.echo(json.dumps(dataclasses.asdict(report)) if as_json else summary(report))
    if anonymize and report.exit_code == 3:
        links = f"links in {flags.private_dir} tell of which inputs the failed samples were"
        told = f"{links}, and {log.place} why shards were quarantined" if report.quarantined else links
        click.echo(log_lines.line(logging.WARNING, told, text=told), err=True)
    if plan is not None:
        told = plan.compared_with(report)
        click.echo(log_lines.line(logging.INFO, told) if as_json else told, err=as_json)
    context.exit(report.exit_code)


def summary(report: RunReport) -> str:
    """A run's end for people."""
    shards = ", ".join(f"{count} {what}" for what, count in report.shards.items() if count)
    rows = ", ".join(f"{count} {status}" for status, count in report.rows.items()) or "none"
    lines = [f"{report.out}: shards {shards or 'none'}; samples {rows}; {report.seconds:.1f} s"]
    lines += [f"quarantined: {problem}" for problem in report.problems]
    if report.gave_up:
        lines.append(f"gave up: {report.gave_up}")
    elif report.stopped:
        lines.append("stopped; run the same command to resume")
    elif report.exit_code == 3:
        lines.append(
            "some samples or shards were quarantined; the provenance tells which and why, and the same command "
            "with --only-failed does them again"
        )
    return "\n".join(lines)
