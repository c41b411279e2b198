"""`boomerang-batch doctor`: what a recipe means on this machine, before anything is spent on it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from boomerang_batch.cli.inputs import load_recipe, recipe_options

if TYPE_CHECKING:
    from collections.abc import Iterator

    from boomerang_batch.diffusion.schedule import Schedule


@click.command()
@click.argument("pipeline")
@recipe_options
def doctor(pipeline: str, device: str, threads: int | None, overrides: tuple[str, ...]) -> None:
    """Load PIPELINE's model here and show its nodes, the stack, and whether batches are independent."""
    from boomerang_batch.run.cpus import usable_cpus
    from boomerang_batch.run.loading import load, warnings
    from boomerang_batch.run.stack import fingerprint
    from boomerang_batch.run.walks import examples

    recipe = load_recipe(pipeline, overrides)
    threads = threads or usable_cpus()
    # Loading tries the model out, too: one whose output depends on what shares its batch is refused.
    engine, _ = load(recipe, device=device, threads=threads)
    model = engine.denoiser.spec

    click.echo(f"recipe      {recipe.name}  {recipe.purpose}  digest {recipe.digest[:12]}")
    labels = "unconditional" if model.conditioning == "none" else f"conditioned on a {model.conditioning}"
    space = "latent of" if model.latent else "pixels of"
    size = f"{space} {model.channels}x{model.height}x{model.width} in {list(model.value_range)}"
    clip = "no clipping" if model.clip_range is None else f"x_0 clipped to {model.clip_range:g}"
    click.echo(f"model       {size}, {model.prediction}, {labels}, {clip}, digest {model.digest[:12]}")
    for t, walk in examples(recipe, model):
        click.echo(f"t           {t} by {recipe.start}: {walk.n} evaluations of {recipe.steps} steps")
        for line in _nodes(walk.schedule):
            click.echo(line)
    for name, what in fingerprint(
        device=engine.device, dtype=recipe.model.dtype, batch_size=engine.batch_size, threads=threads
    ).items():
        click.echo(f"{name:16s}{what}")
    click.echo("parity          one sample beside padding and beside others: equal to the last bit")
    for warning in warnings(recipe, model):
        click.echo(f"warning         {warning}")


def _nodes(schedule: Schedule) -> Iterator[str]:
    """The nodes of a walk as a table, the start first."""
    yield "   node        tau      sigma        SNR  evaluations"
    for i in range(schedule.n, -1, -1):
        sigma = float(schedule.sigma[i] / schedule.alpha[i])
        snr = f"{sigma**-2:10.4g}" if sigma else "       inf"
        tau = f"{float(schedule.tau[i]):10.2f}" if i else "         -"
        note = "  <- start" if i == schedule.n else ""
        yield f"   {i:4d} {tau} {sigma:10.4g} {snr}  {i:11d}{note}"
