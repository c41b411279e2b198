"""`boomerang-batch pack`: a folder of images into shards."""

from __future__ import annotations

import click


@click.command()
@click.argument("folder")
@click.argument("out")
@click.option(
    "--samples-per-shard",
    type=click.IntRange(min=1),
    default=1000,
    show_default=True,
    metavar="N",
    help="The last shard may hold fewer.",
)
def pack(folder: str, out: str, samples_per_shard: int) -> None:
    """Pack the images in FOLDER into WebDataset shards in OUT, with a manifest.

    FOLDER holds images, or one folder of images per class; then each sample gets its class as `cls`.
    """
    from boomerang_batch.data.pack import pack_folder

    packed = pack_folder(folder, out, samples_per_shard=samples_per_shard)
    classes = f", {len(packed.classes)} classes" if packed.classes else ""
    click.echo(f"{out}: {len(packed.manifest.shards)} shards{classes}, and manifest.yaml")
    if packed.left_out:
        click.echo(f"{len(packed.left_out)} file(s) left out; see the warnings above", err=True)
