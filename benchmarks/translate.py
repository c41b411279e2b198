"""Do codes turn a garment into another, and keep more of it than Boomerang does at equal distance?

    OMP_NUM_THREADS=1 python benchmarks/translate.py --data FOLDER_WITH_IDX_GZ
    OMP_NUM_THREADS=1 python benchmarks/translate.py --data FOLDER_WITH_IDX_GZ --quick

Garments of Fashion-MNIST's test split, which the demo's model never saw, are told to become another class: by
`dpm-encoder` and `edit-friendly` under a target, and by Boomerang with the changed label, in whole runs of the
tool, each at several t. A change is easy for who may change much, so what is compared is compared at equal
distance: along each method's curve over t, between whose points is interpolated. Measured is the share that an
independent classifier takes for the target, the median squared distance to the source (per pixel of [0, 1]),
and what is kept of its structure: SSIM, and the overlap of both images' edges. Intervals are 95 %: Wilson's
for shares, else the bootstrap over garments. Runs are kept in `--cache` and go on where they were stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import classifier
import numpy as np
import report
import torch
import translate_report
from picture_scores import EDGE
from translate_scores import at_equal_distance, curve_of, points_of
from whole_runs import Samples, run_on

from boomerang_batch.config.pipeline import Recipe, parse_recipe
from boomerang_batch.data.images import contact_sheet
from boomerang_batch.demo import make_shards

PAIRS = ((6, 3),)
"""Shirt and dress; each class becomes the other."""
EACH = 100
"""Garments of each direction."""
DISTANCES = (0.01, 0.02, 0.04, 0.06)
STEPS = 15
CHOICE_SEED = 20221018
SHOWN = 6
BECOMES = "to.cls"
"""The field that says what a garment is to become."""

RECIPE = """
name: translate
purpose: augment
seed: 20221018
model:
  source: shipped:demo/model
  patch_size: 2
  channels_last: true
  class_labels: {{field: {told}, null_label: 10, guidance: {guidance}}}
t: [{levels}]
variants: {variants}
steps: {steps}
grid: trailing
images: {{resize: pad}}
batch_size: 50
{method}
"""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One curve: a method, its settings, and the t of its points."""

    name: str
    method: str
    fractions: tuple[float, ...]
    eta: float = 1.0
    guidance: float = 1.0
    """Under the target; codes are drawn without."""

    @property
    def picture(self) -> str:
        """Its part of a file's name."""
        return self.method.replace("-", "_") + (f"_{self.guidance:g}" if self.guidance != 1 else "")

    def recipe(self, steps: int) -> Recipe:
        """All t in one run, each a variant."""
        plain = self.method == "boomerang"
        lines = [f"sampler: {{eta: {self.eta}}}"]
        if not plain:
            told = f"field: {BECOMES}" + (f", guidance: {self.guidance}" if self.guidance != 1 else "")
            lines += [f"method: {self.method}", f"target: {{{told}}}"]
        text = RECIPE.format(
            told=BECOMES if plain else "cls",
            guidance=self.guidance if plain else 1.0,
            levels=", ".join(f"{{fraction: {fraction}}}" for fraction in self.fractions),
            variants=len(self.fractions),
            steps=steps,
            method="\n".join(lines),
        )
        return parse_recipe(text, source=f"translate: {self.name}")


NEAR, FAR = (0.2, 0.35, 0.5, 0.65, 0.8, 0.9), (0.8, 0.88, 0.94, 1.0)
PLAIN = Arm(name="Boomerang, label changed", method="boomerang", fractions=NEAR)
BESIDE = {
    Arm(name="dpm-encoder", method="dpm-encoder", fractions=FAR, eta=0.1): PLAIN,
    Arm(name="edit-friendly", method="edit-friendly", fractions=FAR): PLAIN,
}
"""Every arm that goes by codes, and the one it is compared with."""
GUIDED = Arm(name="Boomerang, guidance 3", method="boomerang", fractions=(0.35, 0.5, 0.65, 0.8), guidance=3.0)
GUIDED_BESIDE = {
    dataclasses.replace(arm, name=f"{arm.name}, guidance 3", fractions=(0.6, 0.8, 0.94), guidance=3.0): GUIDED
    for arm in BESIDE
}
"""The same under a guided target; the codes are drawn without."""


@dataclass(frozen=True, kw_only=True)
class Garments:
    """Images of two classes, each to become the other."""

    pixels: np.ndarray
    """(N, 28, 28) uint8, the first half of the one class."""
    targets: np.ndarray
    """(N,)"""
    shards: dict[str, Samples]
    """One for each direction, in the order of `pixels`."""


def garments(images: np.ndarray, labels: np.ndarray, pair: tuple[int, int], each: int) -> Garments:
    """`each` of a class of the test split, drawn by lot."""
    chosen: list[int] = []
    shards: dict[str, Samples] = {}
    for source, target in (pair, pair[::-1]):
        of_class = np.random.default_rng((CHOICE_SEED, source)).permutation(np.flatnonzero(labels == source))
        numbers = np.sort(of_class[:each]).tolist()
        shards[f"{word(source)}-to-{word(target)}"] = {
            key: {**fields, BECOMES: str(target).encode()}
            for key, fields in make_shards.samples(images, labels, numbers)
        }
        chosen += numbers
    return Garments(pixels=images[chosen], targets=np.repeat(pair[::-1], each), shards=shards)


def word(label: int) -> str:
    """A class's name as part of a file's."""
    return make_shards.CLASS_NAMES[label].lower().replace("/", "-").replace(" ", "-")


def translated(arm: Arm, given: Garments, args: argparse.Namespace) -> tuple[np.ndarray, list[int]]:
    """uint8 (T, N, 28, 28) for the arm's t, and the evaluations of an image at each."""
    recipe = arm.recipe(args.steps)
    content = hashlib.sha256(repr(given.shards).encode()).hexdigest()
    folder = args.cache / f"{recipe.digest[:8]}-{content[:8]}"
    made = run_on(recipe, given.shards, folder, threads=args.threads)
    outputs = {number: output for by_key in made.values() for number, output in by_key.items()}
    keys = [key for samples in given.shards.values() for key in samples]
    codes = 1 if arm.method == "boomerang" else 2  # rows tell what decoding took, and encoding takes as many
    variants = range(len(arm.fractions))
    evaluations = [codes * outputs[keys[0], variant].row.evaluations for variant in variants]
    return np.stack(
        [[outputs[key, variant].pixels[..., 0] for key in keys] for variant in variants]
    ), evaluations


def picture(arm: Arm, given: Garments, made: np.ndarray, path: Path) -> None:
    """The first garments of either direction, each with what became of it by t."""
    half = len(given.pixels) // 2
    rows = [
        [cell for begin in (0, half) for cell in (given.pixels[begin + row], *made[:, begin + row])]
        for row in range(SHOWN)
    ]
    heads = 2 * ["source", *(f"t {fraction:g}" for fraction in arm.fractions)]
    path.write_bytes(contact_sheet([[cell[..., None] for cell in row] for row in rows], heads=heads, cell=56))


def study(pair: tuple[int, int], judge: torch.nn.Module, args: argparse.Namespace) -> dict[str, Any]:
    """All numbers of one pair of classes: of both directions together, and of each."""
    images, labels = classifier.split(args.data, "t10k")
    given = garments(images, labels, pair, args.each)
    compared = BESIDE | GUIDED_BESIDE if args.guided else BESIDE
    arms = [*dict.fromkeys(compared.values()), *compared]
    curves, costs = {}, {}
    for arm in arms:
        made, costs[arm.name] = translated(arm, given, args)
        curves[arm.name] = curve_of(judge, made, given.pixels, given.targets)
        if pair == PAIRS[0]:
            picture(arm, given, made, args.results / f"translate_{arm.picture}.png")
        print(f"{arm.name}: done", file=sys.stderr, flush=True)
    whole, half = np.arange(len(given.pixels)), len(given.pixels) // 2
    directions = (name.replace("-", " ") for name in given.shards)
    views = {"both": whole, **dict(zip(directions, (whole[:half], whole[half:]), strict=True))}
    points = {
        view: {arm.name: points_of(curves[arm.name], arm.fractions, costs[arm.name], chosen) for arm in arms}
        for view, chosen in views.items()
    }
    beside = {arm.name: other.name for arm, other in compared.items()}
    of_class = {make_shards.CLASS_NAMES[label]: labels == label for label in pair}
    real = {name: classifier.accuracy(judge, images[own], labels[own]) for name, own in of_class.items()}
    return {
        "classes": list(of_class),
        "judge_agrees_on_real": real,
        "views": {
            view: {
                "points": points[view],
                "equal": {
                    str(distance): at_equal_distance(curves, beside, distance, chosen) for distance in DISTANCES
                },
            }
            for view, chosen in views.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of Fashion-MNIST's four IDX files")
    parser.add_argument("--cache", type=Path, default=Path(".cache/translate"))
    parser.add_argument("--judge", type=Path, default=Path(".cache/benchmarks"), help="where the judge is kept")
    parser.add_argument("--results", type=Path, default=report.RESULTS)
    parser.add_argument("--guided", action="store_true", help="under guidance 3 too, which takes as long again")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="8 garments of a class, 8 steps, into CACHE/quick")
    args = parser.parse_args()
    args.each, args.steps = EACH, STEPS
    if args.quick:
        args.each, args.steps = SHOWN + 2, 8
        args.cache = args.results = args.cache / "quick"
    args.results.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    judge, accuracy = classifier.real_classifier(args.data, args.judge)
    record = {
        "question": (__doc__ or "").splitlines()[0],
        "machine": report.machine(args.threads),
        "each": args.each,
        "steps": args.steps,
        "judge_accuracy": accuracy,
        "edge": EDGE,
        "pairs": [study(pair, judge, args) for pair in PAIRS],
    }
    translate_report.publish(record, args.results)


if __name__ == "__main__":
    main()
