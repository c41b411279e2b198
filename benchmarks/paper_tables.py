"""The paper's tables in miniature: what is a classifier worth that learned from Boomerang's images?

    python benchmarks/paper_tables.py --data FOLDER_WITH_IDX_GZ
    python benchmarks/paper_tables.py --data FOLDER_WITH_IDX_GZ --quick

Images that the diffusion model never saw: it was trained on Fashion-MNIST's training split, and here half of
the test split (5,000 images, balanced) is redrawn and learned from while the other half tests. Rows: the real
images; their Boomerang copies at four t, of the same labels; images from t = T, which are fully synthetic by
the same model; real images and copies by the keyed fair coin, anew for every epoch and image. Each without and
with standard augmentation, five seeds, 95 % intervals by Student's t; differences from the real images' row are
of equal seeds, that is of equal first weights and batches. The model is told the class and not guided
(weight 1); at most 25 evaluations. Beside it what the paper reports, of other datasets, models and classifiers:
the same question, not the same experiment.

Cost, measured on one thread of a 2-core x86-64: 24 CPU minutes of drawing, 80 trainings of 50 s, 1.5 CPU hours
in all. Every part of 250 copies and
every classifier is kept in `--cache` and not made again, so it can be stopped at any time; the sum of CPU
time is kept too, and over `--cpu-hours` it stops. Seeds come one after the other, and the tables are written
after each.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import classifier
import numpy as np
import paper_report
import report
import resnet8
import torch
from redraws import Redrawer, Redrawn

from boomerang_batch.config.pipeline import parse_recipe
from boomerang_batch.loader import AugmentedDataset

EACH = 500
"""Images of a class to learn from; as many test."""
FRACTIONS = (0.2, 0.4, 0.6, 0.8)
COIN_FRACTIONS = (0.2, 0.4)
STEPS = 25
SEEDS = 5
SPLIT_SEED = 20221015

RECIPE = """
name: paper-tables
purpose: augment
seed: 20221015
model:
  source: shipped:demo/model
  patch_size: 2
  channels_last: true
  class_labels: {{field: cls, null_label: 10, guidance: 1.0}}
t: {{fraction: 1.0}}
steps: {steps}
grid: trailing
sampler: {{eta: 1.0}}
images: {{resize: pad}}
batch_size: 50
"""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the table: what its classifiers learn from."""

    name: str
    material: resnet8.Material
    redrawn: Redrawn | None = None
    """The copies in it."""


def halves(data: Path, each: int) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """(images, labels) of the test split to learn from, `each` of a class, and all of its other half."""
    images, labels = classifier.split(data, "t10k")
    learned, tested = [], []
    for label in range(10):
        of_class = np.random.default_rng((SPLIT_SEED, label)).permutation(np.flatnonzero(labels == label))
        learned.append(of_class[:EACH][:each])
        tested.append(of_class[EACH:])
    first, second = np.sort(np.concatenate(learned)), np.sort(np.concatenate(tested))
    return (images[first], labels[first]), (images[second], labels[second])


def coin_of(seed: int, count: int) -> Callable[[int], np.ndarray]:
    """The tool's own coins of one training: bool (count,) for an epoch, by the loader that users get."""
    shown = AugmentedDataset(
        range(count), dict.fromkeys(range(count), (True,)), join=lambda _, copy: copy, seed=seed
    )

    def heads(epoch: int) -> np.ndarray:
        shown.set_epoch(epoch)
        return np.array([shown[index] is True for index in range(count)])

    return heads


def rows_of(images: np.ndarray, labels: np.ndarray, copies: Mapping[float, Redrawn]) -> list[Row]:
    """All rows, the real images first; a coin is set for each training."""
    rows = [Row(name="real", material=resnet8.Material(images=images, labels=labels))]
    for fraction in FRACTIONS:
        made = copies[fraction]
        alone = resnet8.Material(images=made.images[..., 0], labels=labels)
        rows.append(Row(name=f"Boomerang, t = {fraction:g} T", material=alone, redrawn=made))
    made = copies[1.0]
    synthetic = resnet8.Material(images=made.images[..., 0], labels=labels)
    rows.append(Row(name="fully synthetic, t = T", material=synthetic, redrawn=made))
    for fraction in COIN_FRACTIONS:
        made = copies[fraction]
        mixed = resnet8.Material(images=images, labels=labels, copies=made.images[..., 0])
        rows.append(
            Row(name=f"real and Boomerang by the coin, t = {fraction:g} T", material=mixed, redrawn=made)
        )
    return rows


class Runs:
    """Every training that was done, by name, in files of their own; and the CPU time of all of them."""

    def __init__(self, folder: Path, budget_s: float, drawing_s: float) -> None:
        self._folder = folder
        self._budget_s = budget_s
        self._drawing_s = drawing_s
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def spent_s(self) -> float:
        """CPU seconds, drawing included."""
        kept = (json.loads(path.read_text())["cpu_s"] for path in self._folder.glob("*.json"))
        return self._drawing_s + sum(kept)

    def accuracy(self, row: Row, test: tuple[np.ndarray, np.ndarray], **settings: Any) -> float:
        """What was measured of this training, measured now if it never was. Exits over the budget."""
        seed, augment, epochs = settings["seed"], settings["augment"], settings["epochs"]
        material = row.material
        given = hashlib.sha256(inspect.getsource(resnet8).encode())
        for array in (material.images, material.labels, material.copies, *test):
            given.update(b"none" if array is None else array.tobytes())
        name = f"{given.hexdigest()[:12]}-{'augmented' if augment else 'plain'}-e{epochs}-s{seed}"
        kept = self._folder / f"{name}.json"
        if not kept.is_file():
            if self.spent_s > self._budget_s:
                raise SystemExit(f"{self.spent_s:.0f} CPU seconds are spent, --cpu-hours is reached")
            since = time.process_time()
            coin = None if material.copies is None else coin_of(seed, len(material.images))
            net = resnet8.train(
                resnet8.Material(
                    images=material.images, labels=material.labels, copies=material.copies, coin=coin
                ),
                seed=seed,
                augment=augment,
                epochs=epochs,
            )
            found = {"row": row.name, **settings, "accuracy": resnet8.accuracy(net, *test)}
            found["cpu_s"] = round(time.process_time() - since, 2)
            kept.with_suffix(".tmp").write_text(json.dumps(found) + "\n")
            kept.with_suffix(".tmp").replace(kept)
            print(json.dumps(found), file=sys.stderr, flush=True)
        return json.loads(kept.read_text())["accuracy"]


def distances(sources: np.ndarray, outputs: np.ndarray) -> float:
    """The median squared distance between equal places, per pixel of [0, 1]."""
    apart = np.square((sources.astype(np.float32) - outputs) / 255).mean((1, 2))
    return float(np.median(apart))


def matched(sources: np.ndarray, outputs: np.ndarray, labels: np.ndarray) -> float:
    """Rank-1 by pixels within the class: whose own source is the nearest."""
    hits = 0
    for label in np.unique(labels):
        own = labels == label
        x = outputs[own].reshape(own.sum(), -1).astype(np.float64)
        y = sources[own].reshape(own.sum(), -1).astype(np.float64)
        apart = np.square(y).sum(1)[None] - 2 * x @ y.T  # but for what is equal along a line
        hits += int((apart.argmin(1) == np.arange(len(x))).sum())
    return hits / len(labels)


def facts_of(row: Row, sources: np.ndarray, judge: Any) -> dict[str, Any]:
    """What else there is to say of a row: its noise, its cost, and how near its copies are."""
    if row.redrawn is None:
        return {"agreement": classifier.accuracy(judge, sources, row.material.labels)}
    outputs = row.redrawn.images[..., 0]
    return {
        "sigma": row.redrawn.sigma,
        "evaluations": row.redrawn.evaluations,
        "agreement": classifier.accuracy(judge, outputs, row.material.labels),
        "median_distance": distances(sources, outputs),
        "rank1_pixels_within_class": matched(sources, outputs, row.material.labels),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of Fashion-MNIST's four IDX files")
    parser.add_argument("--cache", type=Path, default=Path(".cache/paper-tables"))
    parser.add_argument("--judge", type=Path, default=Path(".cache/benchmarks"), help="where the judge is kept")
    parser.add_argument("--results", type=Path, default=report.RESULTS)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument(
        "--cpu-hours", type=float, default=8.0, help="of drawing and training, earlier calls too"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="30 images of a class, 5 steps, 6 epochs, 2 seeds, into CACHE/quick",
    )
    args = parser.parse_args()
    each, steps, epochs = EACH, STEPS, resnet8.EPOCHS
    if args.quick:
        each, steps, epochs, args.seeds = 30, 5, 6, 2
        args.cache = args.results = args.cache / "quick"
    torch.set_num_threads(args.threads)

    (images, labels), test = halves(args.data, each)
    recipe = parse_recipe(RECIPE.format(steps=steps), source="paper-tables")
    redrawer = Redrawer(recipe, args.cache / "copies", threads=args.threads)
    copies = {}
    for fraction in (*FRACTIONS, 1.0):
        copies[fraction] = redrawer.redraw(images[..., None], fraction, labels=labels.tolist())
        print(f"t = {fraction:g} T: {copies[fraction].cpu_s:.0f} CPU seconds", file=sys.stderr, flush=True)
    redrawer.close()
    judge, _ = classifier.real_classifier(args.data, args.judge)
    drawing_s = sum(made.cpu_s for made in copies.values())
    runs = Runs(args.cache / "runs", args.cpu_hours * 3600, drawing_s)
    rows = rows_of(images, labels, copies)
    question = (__doc__ or "").splitlines()[0]
    facts: dict[str, Any] = {
        "learned": len(images),
        "tested": len(test[0]),
        "model": redrawer.digest,
        "weights": resnet8.weights(resnet8.build()),
        "epochs": epochs,
        "steps": steps,
        "drawing_cpu_s": round(drawing_s),
    }
    table: list[dict[str, Any]] = []
    for row in rows:
        line = {"row": row.name, "fraction": row.redrawn.fraction if row.redrawn else 0.0}
        line |= {"coin": row.material.copies is not None, **facts_of(row, images, judge)}
        table.append(line | {"accuracy": {"plain": [], "augmented": []}})
    for seed in range(args.seeds):
        for row, line in zip(rows, table, strict=True):
            for how in ("plain", "augmented"):
                found = runs.accuracy(row, test, seed=seed, augment=how == "augmented", epochs=epochs)
                line["accuracy"][how].append(found)
        facts |= {"cpu_hours": round(runs.spent_s / 3600, 3), "seeds": seed + 1}
        record = {"question": question, "machine": report.machine(args.threads), **facts, "rows": table}
        paper_report.publish(record, args.results)


if __name__ == "__main__":
    main()
