"""`boomerang-batch manifest`: build, check and show lists of input shards."""

from __future__ import annotations

import click


@click.group()
def manifest() -> None:
    """Lists of input shards."""


@manifest.command()
@click.argument("shards", nargs=-1, required=True)
@click.argument("out")
def build(shards: tuple[str, ...], out: str) -> None:
    """Scan SHARDS (paths, globs, brace ranges, URLs) into the manifest OUT (.parquet or .jsonl).

    Reads every byte once and records sizes, sample counts and digests.
    """
    from boomerang_batch.data.manifest_build import build_manifest

    built = build_manifest(list(shards), out)
    samples = sum(entry.samples or 0 for entry in built.shards)
    click.echo(f"{out}: {len(built.shards)} shards, {samples} samples")


@manifest.command()
@click.argument("manifest")
@click.pass_context
def check(context: click.Context, manifest: str) -> None:
    """Check that every shard of MANIFEST is there, is what it says, and repeats no key."""
    from boomerang_batch.data.manifest import load_manifest
    from boomerang_batch.data.manifest_build import check_manifest

    loaded = load_manifest(manifest)
    problems = check_manifest(loaded)
    for problem in problems:
        click.echo(f"problem: {problem}")
    verdict = f"{len(problems)} problem(s)" if problems else "all well"
    click.echo(f"{manifest}: {len(loaded.shards)} shards: {verdict}")
    context.exit(1 if problems else 0)


@manifest.command()
@click.argument("manifest")
def show(manifest: str) -> None:
    """Print the shards MANIFEST stands for, one a line."""
    from boomerang_batch.data.manifest import load_manifest

    for entry in load_manifest(manifest).shards:
        facts = (entry.samples, entry.size_bytes)
        notes = [f"{value} {unit}" for value, unit in zip(facts, ("samples", "bytes"), strict=True) if value]
        click.echo("  ".join([entry.stem, entry.url, *notes]))
