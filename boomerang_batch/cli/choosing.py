"""`boomerang-batch sweep` and `calibrate`: which t, before a dataset is spent on one?"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from boomerang_batch.audit.names import LINKED, PROVEN, USE
from boomerang_batch.cli.inputs import load_recipe, recipe_options

if TYPE_CHECKING:
    from boomerang_batch.audit.calibrate import Calibration
    from boomerang_batch.audit.sweep import Sweep
    from boomerang_batch.audit.tried import Level

_NAMED = {**LINKED, **PROVEN, **USE}
_SHOWN = {
    name: _NAMED[name].brief
    for name in ("rank-1", "certified@median", "label-agreement", "median-psnr-db", "median-ssim")
}
"""What stands in the table of a sweep, and under which head."""


class _Fractions(click.ParamType[tuple[float, ...]]):
    """Numbers of 0 to 1, with commas between them."""

    name = "T,T,..."

    def convert(
        self, value: object, param: click.Parameter | None, context: click.Context | None
    ) -> tuple[float, ...]:
        try:
            found = tuple(float(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value} is not numbers with commas between them, such as .1,.2,.4", param, context)
        if not all(0 <= one <= 1 for one in found):
            self.fail(f"{value}: t as a fraction is 0 to 1", param, context)
        return tuple(sorted(set(found)))


_EMBEDDERS = click.option(
    "--embedder", "embedders", multiple=True, default=("pixels", "pca"), show_default=True, metavar="NAME",
    help="Features to compare in; may be given several times.",
)  # fmt: skip


@click.command("sweep")
@click.argument("pipeline")
@click.argument("manifest")
@click.option("--t", "levels", type=_Fractions(), default="0,.1,.2,.3,.4,.5,.6,.7,.8,.9,1", show_default=True,
              help="Fractions of the chain to go out to.")  # fmt: skip
@click.option("--samples", type=click.IntRange(min=6, max=4000), default=100, show_default=True,
              help="Samples to draw at each t, whole shards of them.")  # fmt: skip
@click.option("--show", type=click.IntRange(min=1, max=64), default=8, show_default=True,
              help="Of these, how many stand in the picture.")  # fmt: skip
@_EMBEDDERS
@click.option("-o", "--output", metavar="FOLDER", default="sweep", show_default=True,
              help="Where grid.png, which shows sources, curves.svg and sweep.json go.")  # fmt: skip
@recipe_options
def sweep_command(
    pipeline: str,
    manifest: str,
    levels: tuple[float, ...],
    samples: int,
    show: int,
    embedders: tuple[str, ...],
    output: str,
    device: str,
    threads: int | None,
    overrides: tuple[str, ...],
) -> None:
    """Draw a few samples of MANIFEST through PIPELINE at several t: pictures, and every measure.

    \b
    Example:
      boomerang-batch sweep demo-anonymize demo --t .2,.4,.6,.8,1
    """
    from boomerang_batch import storage
    from boomerang_batch.audit.sweep import choose, sweep
    from boomerang_batch.data.manifest import load_manifest
    from boomerang_batch.report.panels import picture
    from boomerang_batch.run.cpus import usable_cpus
    from boomerang_batch.run.trial import Rig

    recipe = load_recipe(pipeline, overrides)
    named = recipe.purpose != "anonymize"
    [chosen], left_out = choose(load_manifest(manifest), samples, named=named)
    with Rig(recipe, device=device, threads=threads or usable_cpus()) as rig:
        at = [("fraction", level) for level in levels]
        found = sweep(
            rig,
            recipe,
            chosen,
            at,
            embedders=tuple(dict.fromkeys(embedders)),
            shown=show,
            left_out=left_out,
        )
    curves = [(level, one.readings) for level, one in zip(levels, found.levels, strict=True)]
    made = {
        "grid.png": found.grid,
        "curves.svg": picture(curves, name=found.name, samples=found.samples),
        "sweep.json": (json.dumps(found.facts(), indent=1) + "\n").encode(),
    }
    storage.make_folder(output)
    for name, data in made.items():
        storage.publish_bytes(data, storage.join(output, name))
    click.echo(_table(found))
    click.echo(f"{storage.join(output, 'grid.png')} shows sources first, then t {', '.join(map(str, levels))}")
    click.echo(f"{storage.join(output, 'curves.svg')} shows every measure, sweep.json has the numbers")


@click.command("calibrate")
@click.argument("pipeline")
@click.argument("manifest")
@click.option("--target", required=True, metavar="TARGET",
              help="What to reach: rank1<=.05, tar<=.1, certified@median<=.75 (or @least, @largest), "
                   "distance>=.1, label-agreement>=.9, psnr>=20, ssim>=.5.")  # fmt: skip
@click.option("--samples", type=click.IntRange(min=12, max=4000), default=400, show_default=True,
              help="In all, whole shards: half to search on, half to check the result on.")  # fmt: skip
@_EMBEDDERS
@click.option("--json", "as_json", is_flag=True, help="Print what was found as JSON.")
@recipe_options
@click.pass_context
def calibrate_command(
    context: click.Context,
    pipeline: str,
    manifest: str,
    target: str,
    samples: int,
    embedders: tuple[str, ...],
    as_json: bool,
    device: str,
    threads: int | None,
    overrides: tuple[str, ...],
) -> None:
    """Find the t at which PIPELINE reaches a target on samples of MANIFEST, and check it on others.

    A limit must be kept by the bad end of the 95 % interval. Exit code 4: no t reaches it, or the one found
    fails on the samples it is checked on.

    \b
    Example:
      boomerang-batch calibrate demo-anonymize demo --target 'certified@median<=.75'
    """
    from boomerang_batch.audit.calibrate import Target, calibrate
    from boomerang_batch.audit.sweep import choose
    from boomerang_batch.data.manifest import load_manifest
    from boomerang_batch.run.cpus import usable_cpus
    from boomerang_batch.run.trial import Rig

    wanted, recipe = Target.parse(target), load_recipe(pipeline, overrides)
    named = recipe.purpose != "anonymize"
    (search, check), left_out = choose(load_manifest(manifest), samples, parts=2, named=named)
    with Rig(recipe, device=device, threads=threads or usable_cpus()) as rig:
        found = calibrate(
            rig,
            recipe,
            search,
            check,
            wanted,
            embedders=tuple(dict.fromkeys(embedders)),
            left_out=left_out,
        )
    click.echo(json.dumps(found.facts(), indent=1) if as_json else _calibration(found, target))
    context.exit(0 if found.holds else 4)


def _table(found: Sweep) -> str:
    """A line for each t."""
    rows = [("t", "sigma", *_SHOWN.values())]
    for level in found.levels:
        sigma = "" if level.sigma is None else f"{level.sigma:.3g}"
        rows.append((level.t, sigma, *(_cell(level, measure) for measure in _SHOWN)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"{found.samples} samples of {found.name}; in brackets what guessing comes to"]
    for name, *cells in rows:
        numbers = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        lines.append("   ".join([name.ljust(widths[0]), *numbers]))
    return "\n".join([*lines, *_warned(found.warnings)])


def _cell(level: Level, measure: str) -> str:
    """The worst of a measure's readings over all records: the most that are linked, the fewest labels kept."""
    about = (measure, "outputs", "all")
    there = [one for one in level.readings if (one.measure, one.subject, one.stratum) == about]
    if not there:
        return ""
    worst = (min if measure == "label-agreement" else max)(there, key=lambda one: one.value)
    return f"{worst.value:.3g}" + ("" if worst.chance is None else f" ({worst.chance:.3g})")


def _calibration(found: Calibration, target: str) -> str:
    if found.t is None:
        nearest = found.searched[-1 if found.target.least else 0]
        none = f"no t reaches {target}: at t {nearest.t} there is {found.told(nearest)}"
        return "\n".join([none, *_warned(found.warnings)])
    kind = "the least" if found.target.least else "the largest"
    lines = [f"t fraction={found.t:g} is {kind} that reaches {target} on the samples searched"]
    if found.beside is not None:
        lines.append(f"  at fraction={found.beside:g} it is missed, so what is sought lies between the two")
    for level in found.searched:
        lines.append(f"  {level.t.ljust(14)}  {found.told(level)}")
    if found.checked is not None:
        verdict = "holds" if found.holds else "does NOT hold"
        lines.append(f"on samples that the search has not seen it {verdict}: {found.told(found.checked)}")
        cells = ((name, _cell(found.checked, measure)) for measure, name in _SHOWN.items())
        lines += [f"  {name}: {cell}" for name, cell in cells if cell]
    return "\n".join([*lines, *_warned(found.warnings)])


def _warned(warnings: Sequence[str]) -> list[str]:
    return [f"warning: {one}" for one in warnings]
