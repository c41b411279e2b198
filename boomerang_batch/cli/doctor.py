"""`boomerang-batch doctor`: what a recipe means on this machine, before anything is spent on it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from boomerang_batch.cli.inputs import load_recipe, recipe_options

if TYPE_CHECKING:
    from boomerang_batch.diffusion.engine import Engine


@click.command()
@click.argument("pipeline")
@recipe_options
def doctor(pipeline: str, device: str, threads: int | None, overrides: tuple[str, ...]) -> None:
    """Load PIPELINE's model here and show its nodes, the stack, and whether batches are independent."""
    import os

    from boomerang_batch.run.loading import load_engine
    from boomerang_batch.run.stack import fingerprint

    recipe = load_recipe(pipeline, overrides)
    threads = threads or os.cpu_count() or 1
    engine = load_engine(recipe, device=device, threads=threads)
    model, schedule = engine.denoiser.spec, engine.schedule

    click.echo(f"recipe      {recipe.name}  {recipe.purpose}  digest {recipe.digest[:12]}")
    labels = "unconditional" if model.classes is None else f"{model.classes} class embeddings"
    size = f"{model.channels}x{model.height}x{model.width} in {list(model.value_range)}"
    clip = "no clipping" if model.clip_range is None else f"x_0 clipped to {model.clip_range:g}"
    click.echo(f"model       {size}, {model.prediction}, {labels}, {clip}, digest {model.digest[:12]}")
    unit, value = recipe.t.unit
    click.echo(
        f"t           {unit} {value:g} by {recipe.start}: {schedule.n} evaluations of {recipe.steps} steps"
    )
    click.echo("   node        tau      sigma        SNR  evaluations")
    for i in range(schedule.n, -1, -1):
        sigma = float(schedule.sigma[i] / schedule.alpha[i])
        snr = f"{sigma**-2:10.4g}" if sigma else "       inf"
        tau = f"{float(schedule.tau[i]):10.2f}" if i else "         -"
        note = "  <- start" if i == schedule.n else ""
        click.echo(f"   {i:4d} {tau} {sigma:10.4g} {snr}  {i:11d}{note}")
    for name, what in fingerprint(
        device=engine.device, dtype=recipe.model.dtype, batch_size=recipe.batch_size, threads=threads
    ).items():
        click.echo(f"{name:16s}{what}")
    click.echo(_parity(engine))


def _parity(engine: Engine) -> str:
    """Draw one sample among two sets of neighbours; its bits must not notice."""
    import torch

    from boomerang_batch.diffusion.engine import Draw

    model = engine.denoiser.spec
    shape = (model.channels, model.height, model.width)
    label = None if model.classes is None else 0

    def draw(number: int) -> Draw:
        values = torch.linspace(*model.value_range, torch.Size(shape).numel()).view(shape).roll(number, -1)
        return Draw(tag=number, x_0=values, noise_key=number.to_bytes(16, "big"), label=label)

    if engine.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(engine.device)
    last = engine.batch_size - 1
    (first, *_) = [x_0 for _, x_0 in engine.run([draw(7)])]
    others = [draw(100 + number) for number in range(last)]
    *_, moved = [x_0 for _, x_0 in engine.run([*others, draw(7)])]
    verdict = "equal to the last bit" if torch.equal(first, moved) else "DIFFERENT: do not trust resumes here"
    memory = ""
    if engine.device.type == "cuda":
        memory = f"; peak memory {torch.cuda.max_memory_allocated(engine.device) / 2**20:.0f} MiB"
    return f"parity          one sample alone and among {last} neighbours: {verdict}{memory}"
