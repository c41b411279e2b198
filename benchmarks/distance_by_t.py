"""How far does t carry an image, and does it stay what it was? The demo's photographs, a recipe, several t.

    python benchmarks/distance_by_t.py --data FOLDER_WITH_IDX_GZ --samples 200
    python benchmarks/distance_by_t.py --data FOLDER_WITH_IDX_GZ --samples 1000 --as-is

For each t, at equal noise keys: noise level, evaluations, mean and median squared distance to the source (per
pixel, pixels in [0, 1]), and the share whose class a CNN trained on real images still sees. `--as-is` takes the
recipe's own t, the operating point of `boomerang-batch demo`, and exits with 1 when agreement is below .8 or
the median distance below that between nearest neighbours of one class. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path

import classifier
import numpy as np
import torch
from redraws import outputs_of

from boomerang_batch import storage
from boomerang_batch.cli.inputs import load_recipe
from boomerang_batch.config.pipeline import Recipe
from boomerang_batch.data import images
from boomerang_batch.data.fields import read_label
from boomerang_batch.data.manifest import load_manifest
from boomerang_batch.data.shards import Sample, read_samples
from boomerang_batch.run.loading import load

FRACTIONS = (0.0, 0.1, 0.2, 0.4, 0.6, 0.8)
SEED = 20221012


def demo_images(recipe: Recipe, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `count` demo samples: uint8 (N, 28, 28) and labels (N,)."""
    pixels, labels = [], []
    for entry in load_manifest("demo").shards:
        with storage.open_read(entry.url) as stream:
            for sample in read_samples(stream, shard=entry.url):
                if isinstance(sample, Sample) and len(pixels) < count:
                    picture = images.decode(sample.fields["png"], field="png", channels=1, policy=recipe.images)
                    pixels.append(picture.pixels[:, :, 0])
                    labels.append(read_label(sample, "cls"))
    return np.stack(pixels), np.array(labels)


def twins(recipe: Recipe, sources: np.ndarray, labels: np.ndarray, threads: int) -> tuple[np.ndarray, dict]:
    """The recipe's outputs for `sources`, uint8 (N, 28, 28), and what they took."""
    engine, walks = load(recipe, device="cpu", threads=threads)
    walk = walks.at(*recipe.levels[0].unit)
    since = time.monotonic()
    numbers = range(len(sources))
    outputs = outputs_of(
        engine, walk, sources[..., None], numbers, seed=SEED, policy="pad", labels=labels.tolist()
    )[..., 0]
    engine.close()
    facts = {
        "sigma": round(walk.schedule.relative_sigma, 4),
        "evaluations": walk.n,
        "ms_per_image": round((time.monotonic() - since) / len(sources) * 1000, 1),
    }
    return outputs, facts


def squared_distance(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Mean squared difference per image, (N,), of uint8 images taken as [0, 1]."""
    return np.square((first.astype(np.float64) - second) / 255).mean((1, 2))


def neighbour_distance(sources: np.ndarray, labels: np.ndarray) -> float:
    """Median over images of the squared distance to the nearest other one of the same class."""
    nearest = []
    for index, source in enumerate(sources):
        others = sources[(labels == labels[index]) & (np.arange(len(sources)) != index)]
        nearest.append(squared_distance(others, np.broadcast_to(source, others.shape)).min())
    return float(np.median(nearest))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder of Fashion-MNIST's four gzip'd IDX files"
    )
    parser.add_argument("--cache", type=Path, default=Path(".cache/benchmarks"))
    parser.add_argument("--recipe", help="default: demo-augment, or demo-anonymize with --as-is")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--as-is", action="store_true", help="only the recipe's own t, and its bars")
    args = parser.parse_args()

    args.recipe = args.recipe or ("demo-anonymize" if args.as_is else "demo-augment")
    judge, judge_accuracy = classifier.real_classifier(args.data, args.cache)
    recipe = load_recipe(args.recipe, args.overrides)
    sources, labels = demo_images(recipe, args.samples)
    report = {
        "recipe": args.recipe,
        "overrides": args.overrides,
        "samples": len(sources),
        "judge_accuracy": round(judge_accuracy, 4),
        "agreement_of_sources": round(classifier.accuracy(judge, sources, labels), 4),
        "median_neighbour_distance": round(neighbour_distance(sources, labels), 5),
        "machine": f"{platform.machine()}, {args.threads} threads, torch {torch.__version__}",
        "rows": [],
    }
    settings = [()] if args.as_is else [(f"t.fraction={fraction}",) for fraction in FRACTIONS]
    print("        t  sigma  evals  mean sq.dist  median  agreement", file=sys.stderr)
    for overrides in settings:
        chosen = load_recipe(args.recipe, [*args.overrides, *overrides])
        outputs, facts = twins(chosen, sources, labels, args.threads)
        distance = squared_distance(outputs, sources)
        row = {"t": "=".join(map(str, chosen.t.unit)), **facts}
        row |= {"mean": round(float(distance.mean()), 5), "median": round(float(np.median(distance)), 5)}
        row["agreement"] = round(classifier.accuracy(judge, outputs, labels), 4)
        report["rows"].append(row)
        print(
            f"{row['t']:>12} {row['sigma']:6.3f} {row['evaluations']:6d} {row['mean']:13.5f} "
            f"{row['median']:7.5f} {row['agreement']:9.3f}",
            file=sys.stderr,
        )
    print(json.dumps(report))
    if args.as_is:
        (row,) = report["rows"]
        fit = row["agreement"] >= 0.8 and row["median"] >= report["median_neighbour_distance"]
        sys.exit(0 if fit else 1)


if __name__ == "__main__":
    main()
