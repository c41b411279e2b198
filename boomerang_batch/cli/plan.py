"""`boomerang-batch plan`: what a run will take, before it is spent."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from boomerang_batch.cli.inputs import load_recipe, recipe_options

if TYPE_CHECKING:
    from boomerang_batch.run.plan import Plan


@click.command()
@click.argument("pipeline")
@click.argument("manifest")
@click.option("--workers", "--gpus", type=click.IntRange(min=1), default=1, show_default=True,
              help="Workers like this machine's, each with a GPU where this one has one.")  # fmt: skip
@click.option("--price-per-gpu-hour", "price", type=click.FloatRange(min=0), help="Of one worker.")
@click.option(
    "--probe", type=click.IntRange(min=1), metavar="K", help="Samples to run.  [default: two batches]"
)
@click.option("--save", metavar="FILE", help="Where to keep the plan, for `run --plan`.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
@recipe_options
def plan(pipeline: str, manifest: str, workers: int, price: float | None, probe: int | None, save: str | None,
         as_json: bool, device: str, threads: int | None, overrides: tuple[str, ...]) -> None:  # fmt: skip
    """Run a few samples of MANIFEST through PIPELINE here, and tell what all of them will take.

    \b
    Examples:
      boomerang-batch plan demo-anonymize demo
      boomerang-batch plan recipe.yaml s3://bucket/manifest.parquet --gpus 16 --price-per-gpu-hour 2.5
    """
    from boomerang_batch import storage
    from boomerang_batch.data.manifest import load_manifest
    from boomerang_batch.run.cpus import usable_cpus
    from boomerang_batch.run.plan import make_plan

    made = make_plan(
        load_recipe(pipeline, overrides),
        load_manifest(manifest),
        samples=probe,
        workers=workers,
        price_per_hour=price,
        device=device,
        threads=threads or usable_cpus(),
    )
    text = json.dumps(made.facts(), indent=2)
    if save is not None:
        storage.publish_bytes((text + "\n").encode(), save)
    click.echo(text if as_json else describe(made))


def describe(plan: Plan) -> str:
    """A plan for people."""
    probe = plan.probe
    about = "about " if plan.estimated else ""
    lines = [
        f"probe        {probe.samples} samples in {probe.seconds:.1f} s, in batches of {probe.batch_size}",
        f"device       {probe.device}",
        f"manifest     {plan.shards} shards, {about}{plan.samples} samples, {plan.outputs} outputs",
        f"evaluations  {plan.evaluations}",
        f"speed        {plan.images_per_s:.2f} images/s a worker",
        f"time         {_duration(plan.wall_s)} with {min(plan.workers, plan.shards)} worker(s), "
        f"{probe.load_s:.0f} s of it to load the model; {plan.worker_hours:.2f} worker hours",
    ]
    if plan.cost is not None:
        lines.append(f"cost         {plan.cost:.2f}")
    lines.append(
        f"output       {_size(plan.output_bytes)}; scratch disk of each worker {_size(plan.spool_bytes)}"
    )
    if probe.failed:
        lines.append(f"failed       {probe.failed} outputs of the probe; run them to see why")
    if plan.workers > plan.shards:
        lines.append(f"note         {plan.workers} workers, but {plan.shards} shard(s): pack smaller shards")
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _size(count: int) -> str:
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"
