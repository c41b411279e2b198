"""`boomerang-batch demo`: the whole tool on real images, with nothing to prepare."""

from __future__ import annotations

import click

from boomerang_batch.cli.inputs import load_recipe, stop_on_signals
from boomerang_batch.cli.run import summary


@click.command()
@click.argument("out", default="demo-out")
@click.pass_context
def demo(context: click.Context, out: str) -> None:
    """Anonymize 1,000 shipped photographs of clothes into OUT, and verify the result.

    The private dir is OUT-private beside it. Takes about two minutes on two cores.
    """
    from boomerang_batch import storage
    from boomerang_batch.data.manifest import load_manifest
    from boomerang_batch.run.driver import execute
    from boomerang_batch.run.record import SHEET_NAME
    from boomerang_batch.run.request import RunRequest
    from boomerang_batch.run.sheet import PAIRS_NAME
    from boomerang_batch.run.verify import verify

    private_dir = out.rstrip("/") + "-private"
    with stop_on_signals() as stop:
        report = execute(
            RunRequest(
                recipe=load_recipe("demo-anonymize"),
                manifest=load_manifest("demo"),
                out=out,
                private_dir=private_dir,
            ),
            stop=stop,
        )
    click.echo(summary(report))
    if report.exit_code:
        context.exit(report.exit_code)
    verification = verify(out, deep=True)
    for problem in verification.problems:
        click.echo(f"problem: {problem}", err=True)
    if verification.problems:
        context.exit(1)
    click.echo(f"""\
verified: every byte of {verification.shards} shards is what the records say

Look at
  {storage.join(out, SHEET_NAME)}  what came out
  {storage.join(private_dir, PAIRS_NAME)}  before and after, for your eyes only
  {storage.join(out, "run.json")}  the frozen recipe, model and stack
Then try
  boomerang-batch verify {out} --deep
  boomerang-batch doctor demo-anonymize
  boomerang-batch run demo-augment demo demo-augmented
  boomerang-batch pack YOUR_FOLDER shards, and run a pipeline on shards/manifest.yaml""")
