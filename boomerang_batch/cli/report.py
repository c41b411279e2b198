"""`boomerang-batch report`: what a run did, as a page to be read and passed on."""

from __future__ import annotations

import click


@click.command()
@click.argument("out")
@click.option(
    "--private-dir",
    metavar="DIR",
    help="Also write DIR/report.html, which shows sources; for a run that anonymizes.",
)
@click.option("--against", metavar="MANIFEST", help="Where the sources are, to be shown beside outputs.")
@click.option(
    "--audit",
    metavar="FILE",
    help="What `audit` found.  [default: audit.json in DIR for its report, or in OUT]",
)
def report(out: str, private_dir: str | None, against: str | None, audit: str | None) -> None:
    """Write OUT/report.html: what was run, what came out, what is promised, and what failed.

    One file that asks no server for anything. Of a run that anonymizes it shows outputs alone and may be
    published with them; sources beside outputs go to the private dir. Other runs show sources where
    --against leads to them, or originals were kept.
    """
    from boomerang_batch.data.manifest import load_manifest
    from boomerang_batch.report.build import publish

    manifest = load_manifest(against) if against is not None else None
    for place in publish(out, private_dir=private_dir, manifest=manifest, audit=audit):
        click.echo(place)
