"""`boomerang-batch verify`: is an output what its records say?"""

from __future__ import annotations

import dataclasses
import json

import click


@click.command()
@click.argument("out")
@click.option("--deep", is_flag=True, help="Re-read every byte: all digests, every image decoded.")
@click.option("--private-dir", help="Where the run's codes lie under anonymize, to check them too.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
@click.pass_context
def verify(context: click.Context, out: str, deep: bool, private_dir: str | None, as_json: bool) -> None:
    """Check the output in OUT: complete, unharmed, no key missing or doubled; and the codes it was made of."""
    from boomerang_batch.run import verify as verification

    found = verification.verify(out, deep=deep, private_dir=private_dir)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(found)))
    else:
        for problem in found.problems:
            click.echo(f"problem: {problem}")
        rows = ", ".join(f"{count} {status}" for status, count in found.rows.items()) or "none"
        verdict = f"{len(found.problems)} problem(s)" if found.problems else "all well"
        click.echo(f"{out}: {found.shards} shards, samples {rows}: {verdict}{' (deep)' if deep else ''}")
    context.exit(1 if found.problems else 0)
