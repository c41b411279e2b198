"""Does enlarging with Boomerang give photographs their fine detail back, and at what price?

    python benchmarks/photographs.py .cache/photographs ...
    python benchmarks/photo_model.py export .cache/photo-model/model
    python benchmarks/super_resolution.py --threads 2

Photographs that the model never saw, cut to 256x256 and reduced by 2, 4 and 8 (areas averaged), enlarged
again by the tool's own runs: `upscale` with bicubic, tiles of 64x64, several t and up to 3 passes (a
cascade), all in one run per factor, and once more with `consistent: true`. Scored against the photograph
beside bicubic alone: PSNR, SSIM of the luma, high-frequency energy (the power above the reduced image's
Nyquist frequency over the photograph's own, 1 being right), the root mean square error of the spectrum up
there in dB over 12 bands, and how far the output's reduction lies from the input. Theory and the paper agree
that PSNR can only fall with t: what is bought with it is the energy. The pictures show photographs under CC0
alone; no other photograph is published.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import report
from picture_scores import Pixels, scores
from PIL import Image, ImageDraw, ImageFont
from whole_runs import png, run_on

from boomerang_batch.config.pipeline import parse_recipe
from boomerang_batch.data.upscale import reduced

SIDE = 256
FACTORS = (2, 4, 8)
FRACTIONS = (0.05, 0.1, 0.2, 0.3)
PASSES = 3
OVERLAP = 16
CC0 = ("chelsea", "coffee", "rocket")
SHOWN = 128


def test_photographs(folder: Path) -> dict[str, Pixels]:
    """The middle 256x256 of every held-out photograph, by name."""
    found = {}
    for path in sorted((folder / "test").glob("*.png")):
        with Image.open(path) as image:
            left, top = (image.width - SIDE) // 2, (image.height - SIDE) // 2
            found[path.stem] = np.array(image.convert("RGB").crop((left, top, left + SIDE, top + SIDE)))
    if not found:
        raise SystemExit(f"no photographs in {folder}/test: run benchmarks/photographs.py first")
    return found


def reduce(pixels: Pixels, factor: int) -> Pixels:
    """Averaged over blocks of factor x factor."""
    return np.rint(reduced(pixels, factor)).astype(np.uint8)


def resize(pixels: Pixels, factor: int, filter: Image.Resampling) -> Pixels:
    """Enlarged by Pillow."""
    image = Image.fromarray(pixels)
    return np.array(image.resize((image.width * factor, image.height * factor), filter))


def recipe_text(args: argparse.Namespace, factor: int, *, consistent: bool) -> str:
    """One run: every t a variant, every pass an output."""
    levels = ", ".join(f"{{fraction: {fraction}}}" for fraction in args.fractions)
    return f"""
name: super-resolution
purpose: enhance
seed: 20221012
model: {{source: {args.model}, patch_size: 2, channels_last: true}}
t: [{levels}]
variants: {len(args.fractions)}
steps: {args.steps}
grid: trailing
sampler: {{eta: 1.0}}
passes: {{count: {args.passes}, outputs: all}}
upscale: {{factor: {factor}, filter: bicubic, consistent: {str(consistent).lower()}}}
images: {{tiles: {{overlap: {OVERLAP}}}, format: png}}
batch_size: {args.batch_size}
"""


def enlarge(
    args: argparse.Namespace, small: Mapping[str, Pixels], factor: int, *, consistent: bool
) -> dict[tuple[float, int], dict[str, Pixels]]:
    """What the tool makes of the reduced photographs: by (fraction, pass), by name."""
    recipe = parse_recipe(recipe_text(args, factor, consistent=consistent), source="super-resolution")
    shards = {"small": {key: {"png": png(pixels)} for key, pixels in small.items()}}
    with tempfile.TemporaryDirectory(prefix="super-resolution-") as scratch:
        done = run_on(recipe, shards, Path(scratch), device=args.device, threads=args.threads)["small"]
    found: dict[tuple[float, int], dict[str, Pixels]] = {}
    for (key, number), output in done.items():
        variant, pass_index = divmod(
            number, args.passes
        )  # numbered variant by variant, within one pass by pass
        found.setdefault((args.fractions[variant], pass_index + 1), {})[key] = output.pixels
    if any(made.keys() != small.keys() for made in found.values()):
        raise SystemExit("the run's outputs are not those of the photographs")
    return found


def picture(rows: Sequence[Sequence[tuple[str, Pixels]]]) -> Image.Image:
    """Labelled pictures in rows, the middle of each at twice its size."""
    cell, label = 2 * SHOWN, 20
    sheet = Image.new("RGB", (max(map(len, rows)) * (cell + 4), len(rows) * (cell + label)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    begin = (SIDE - SHOWN) // 2
    for y, row in enumerate(rows):
        for x, (name, pixels) in enumerate(row):
            middle = Image.fromarray(pixels[begin : begin + SHOWN, begin : begin + SHOWN])
            sheet.paste(
                middle.resize((cell, cell), Image.Resampling.NEAREST), (x * (cell + 4), y * (cell + label))
            )
            pen.text((x * (cell + 4) + 4, y * (cell + label) + cell + 2), name, fill="black", font=font)
    return sheet


def best_spectrum(
    table: Mapping[tuple[float, int], Mapping[str, float]], passes: Sequence[int]
) -> tuple[float, int]:
    """The operating point whose spectrum comes closest to the photograph's."""
    allowed = [point for point in table if point[1] in passes]
    return min(allowed, key=lambda point: table[point]["spectrum_error_db"])


def study(
    args: argparse.Namespace, truth: Mapping[str, Pixels], factor: int
) -> tuple[list[dict[str, Any]], list[list[tuple[str, Pixels]]]]:
    """All scores of one factor, and the rows of its picture."""
    small = {key: reduce(pixels, factor) for key, pixels in truth.items()}
    lines: list[dict[str, Any]] = []
    plain = {}
    for name, filter in (("nearest", Image.Resampling.NEAREST), ("bicubic", Image.Resampling.BICUBIC)):
        plain[name] = {key: resize(pixels, factor, filter) for key, pixels in small.items()}
        lines.append({"factor": factor, "method": name, **scores(plain[name], truth, small, factor)})
    shown = [
        [(f"reduced by {factor}", plain["nearest"][key]), ("bicubic", plain["bicubic"][key])]
        for key in args.shown
    ]
    for consistent in (False, True):
        made = enlarge(args, small, factor, consistent=consistent)
        table = {point: scores(outputs, truth, small, factor) for point, outputs in sorted(made.items())}
        for (fraction, passes), line in table.items():
            method = "vanilla" if passes == 1 else f"cascade of {passes}"
            lines.append(
                {
                    "factor": factor,
                    "method": method + (", consistent" if consistent else ""),
                    "t_fraction": fraction,
                    **line,
                }
            )
            print(json.dumps(lines[-1]), file=sys.stderr, flush=True)
        for allowed, name in (((1,), "vanilla"), (range(2, args.passes + 1), "cascade")):
            if not allowed:
                continue
            point = best_spectrum(table, allowed)
            label = f"{name}, t {point[0]:g} x{point[1]}" + (", consistent" if consistent else "")
            for row, key in zip(shown, args.shown, strict=True):
                row.append((label, made[point][key]))
    for row, key in zip(shown, args.shown, strict=True):
        row.append((f"photograph ({key}, CC0)", truth[key]))
    return lines, shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", type=Path, default=Path(".cache/photographs"))
    parser.add_argument("--model", type=Path, default=Path(".cache/photo-model/model"))
    parser.add_argument("--factors", type=int, nargs="+", default=list(FACTORS))
    parser.add_argument(
        "--fractions", type=float, nargs="+", default=list(FRACTIONS), help="of T, each a variant"
    )
    parser.add_argument("--passes", type=int, default=PASSES)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--limit", type=int, help="only the first photographs")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, default=report.RESULTS)
    args = parser.parse_args()
    args.model = args.model.resolve()

    everything = test_photographs(args.photographs)
    shown_first = sorted(everything, key=lambda key: key not in CC0)
    truth = {key: everything[key] for key in shown_first[: args.limit]}
    args.shown = [key for key in CC0 if key in truth]
    lines, shown = [], []
    for factor in args.factors:
        of_factor, rows = study(args, truth, factor)
        lines += of_factor
        shown += rows
    args.results.mkdir(parents=True, exist_ok=True)
    if shown:
        picture(shown).save(args.results / "super_resolution.png", optimize=True)
    training = json.loads((args.model / "training.json").read_text())
    columns = {
        "factor": "reduced by",
        "method": "method",
        "t_fraction": "t, fraction",
        "psnr_db": "PSNR, dB",
        "ssim": "SSIM",
        "high_frequency_energy": "high-frequency energy",
        "spectrum_error_db": "spectrum error, dB",
        "off_the_input": "off the input",
    }
    text = [
        "# Enlarging photographs",
        "",
        f"{len(truth)} photographs of {SIDE}x{SIDE}; a model trained for {training['steps']} steps of "
        f"{training['batch']} patches; {args.steps}-step grid. Energy 1 is right; off the input: how far the "
        "output's reduction lies from it, in levels of 255. The picture has the t of least spectrum error.",
        "",
        "![picture](super_resolution.png)",
        "",
        report.table(list(columns.values()), [[line.get(name, "") for name in columns] for line in lines]),
    ]
    record = {
        "question": __doc__.splitlines()[0],
        "machine": report.machine(args.threads),
        "photographs": sorted(truth),
        "training": {name: training[name] for name in ("steps", "batch", "seconds")},
        "lines": lines,
    }
    report.publish("super_resolution", record, "\n".join(text), folder=args.results)


if __name__ == "__main__":
    main()
