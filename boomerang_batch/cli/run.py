"""`boomerang-batch run`: a dataset's twin, or the rest of one."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

import click

from boomerang_batch.cli.inputs import load_recipe, recipe_options, stop_on_signals

if TYPE_CHECKING:
    from boomerang_batch.run.tasks import RunReport


@click.command()
@click.argument("pipeline")
@click.argument("manifest")
@click.argument("out")
@click.option("--private-dir", metavar="DIR", help="Secret and tables that link back; anonymize needs it.")
@click.option(
    "--address",
    default="inline",
    metavar="ADDR",
    show_default=True,
    help="inline: no Ray. local: a Ray of its own on this machine. Else a Ray cluster's address.",
)
@click.option("--workers", type=click.IntRange(min=1), help="Ray workers.  [default: one per GPU, else 1]")
@recipe_options
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Only the manifest's first N shards.")
@click.option("--extend", is_flag=True, help="Accept a manifest that adds shards to the run in OUT.")
@click.option("--accept-stack", is_flag=True, help="Resume on another stack, and record that in run.json.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.pass_context
def run(context: click.Context, pipeline: str, manifest: str, out: str, private_dir: str | None, address: str,
        workers: int | None, device: str, threads: int | None, limit: int | None, extend: bool,
        accept_stack: bool, overrides: tuple[str, ...], as_json: bool) -> None:  # fmt: skip
    """Write to OUT the twin of MANIFEST that PIPELINE describes. The same command again resumes.

    PIPELINE and MANIFEST are files, URLs, or names of shipped ones.

    \b
    Examples:
      boomerang-batch run demo-anonymize demo OUT --private-dir PRIVATE
      boomerang-batch run recipe.yaml shards.yaml s3://bucket/out --address local --set t.fraction=0.6
    """
    from boomerang_batch.data.manifest import load_manifest
    from boomerang_batch.run.driver import RunRequest, execute

    with stop_on_signals() as stop:
        report = execute(
            RunRequest(
                recipe=load_recipe(pipeline, overrides),
                manifest=load_manifest(manifest),
                out=out,
                private_dir=private_dir,
                address=address,
                workers=workers,
                device=device,
                threads=threads,
                limit=limit,
                extend=extend,
                accept_stack=accept_stack,
            ),
            stop=stop,
        )
    click.echo(json.dumps(dataclasses.asdict(report)) if as_json else summary(report))
    context.exit(report.exit_code)


def summary(report: RunReport) -> str:
    """A run's end for people."""
    shards = ", ".join(f"{count} {what}" for what, count in report.shards.items() if count)
    rows = ", ".join(f"{count} {status}" for status, count in report.rows.items()) or "none"
    lines = [f"{report.out}: shards {shards or 'none'}; samples {rows}; {report.seconds:.1f} s"]
    lines += [f"quarantined: {problem}" for problem in report.problems]
    if report.stopped:
        lines.append("stopped; run the same command to resume")
    elif report.exit_code == 3:
        lines.append("some samples or shards were quarantined; the provenance tells which and why")
    return "\n".join(lines)
