"""`boomerang-batch regenerate` and `explain`: one image of an output, made again, and told about."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from boomerang_batch.cli.inputs import rig_options

if TYPE_CHECKING:
    from boomerang_batch.audit.origin import Origin
    from boomerang_batch.audit.regenerate import Regenerated

_SHARD_HELP = "OUT's shard, where several have the key."


@click.command()
@click.argument("out")
@click.option("--key", required=True, metavar="K", help="As the provenance has it, or the source's.")
@click.option("--variant", type=int, metavar="V", help="Number of the output.  [default: the only one]")
@click.option("--shard", metavar="STEM", help=_SHARD_HELP)
@click.option("--private-dir", metavar="DIR", help="Secret and links of the run; anonymize needs it.")
@click.option("--against", metavar="MANIFEST", help="The run's manifest; needed unless the links tell.")
@click.option("-o", "--output", metavar="FILE", help="Where to put the image that was made.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
@rig_options
@click.pass_context
def regenerate(context: click.Context, out: str, key: str, variant: int | None, shard: str | None,
               private_dir: str | None, against: str | None, output: str | None, as_json: bool,
               model: str | None, device: str, threads: int | None) -> None:  # fmt: skip
    """Make one image of OUT again from its source, and tell whether it is the same.

    Exit code 0: identical, or within tolerance. 1: it differs, or OUT is harmed. 2: no output of that key was
    made, or its source can't be found.

    \b
    Examples:
      boomerang-batch regenerate OUT --key 3f0c... --private-dir PRIVATE
      boomerang-batch regenerate OUT --key img00007 --variant 1 --against manifest.yaml -o again.png
    """
    from boomerang_batch import storage
    from boomerang_batch.audit import regenerate as audit
    from boomerang_batch.data.manifest import load_manifest
    from boomerang_batch.errors import ConfigError

    if output is not None and list(storage.lying_in(out, [output])):
        raise ConfigError(f"{output} lies in OUT ({out}), to which nothing is added; put it elsewhere")
    made = audit.regenerate(
        out,
        key=key,
        variant=variant,
        shard=shard,
        private_dir=private_dir,
        against=None if against is None else load_manifest(against),
        model=model,
        device=device,
        threads=threads,
    )
    if output is not None and made.image is not None:
        storage.publish_bytes(made.image, output)
    click.echo(json.dumps(made.facts()) if as_json else _said(made, key))
    context.exit(1 if made.verdict == "differs" else 0)


@click.command()
@click.argument("out")
@click.option("--key", required=True, metavar="K", help="As the provenance has it, or the source's.")
@click.option("--shard", metavar="STEM", help=_SHARD_HELP)
@click.option("--private-dir", metavar="DIR", help="Secret and links of the run; anonymize needs it.")
@click.option("--json", "as_json", is_flag=True, help="Print the explanations as JSON.")
def explain(out: str, key: str, shard: str | None, private_dir: str | None, as_json: bool) -> None:
    """Tell where an image of OUT came from and how it was made, in plain words."""
    from boomerang_batch.audit import explain as audit

    told = audit.explain(out, key=key, private_dir=private_dir, shard=shard)
    if as_json:
        click.echo(json.dumps([one.facts() for one in told]))
        return
    paragraphs = []
    for one in told:
        lines = [_meant(one.origin, key)]
        lines += [f"  {subject:<9} {words}" for subject, words in one.words.items()]
        paragraphs.append("\n".join(lines))
    click.echo("\n\n".join(paragraphs))


def _said(made: Regenerated, key: str) -> str:
    if made.verdict == "identical":
        verdict = f"identical, all {len(made.image or b''):,} bytes"
    elif made.verdict == "identical pixels":
        verdict = "identical pixels, in other bytes"
    elif made.max_difference is None:
        verdict = made.verdict
    else:
        verdict = (
            f"{made.verdict}: pixels differ by up to {made.max_difference} of 255 levels, "
            f"PSNR {made.psnr_db:.1f} dB (tolerance: {made.tolerance})"
        )
    heading = "why" if made.verdict == "differs" else "though"
    return "\n".join(
        [f"{_meant(made.origin, key)}: {verdict}", *(f"{heading}: {reason}" for reason in made.why)]
    )


def _meant(origin: Origin, key: str) -> str:
    """Which image is meant, and which kind of key named it."""
    row = origin.row
    if origin.source_url is None:
        return f"key {row.key}, variant {row.variant}, shard {origin.shard}"
    source = f"made of {origin.source_key} in {origin.source_url}"
    if key == row.key:
        return f"the pseudonym {key}, variant {row.variant}, in shard {origin.shard}, {source}"
    return f"the source's key {key}, variant {row.variant}: {row.key} in shard {origin.shard}, {source}"
