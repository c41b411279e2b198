"""Is the demo's model good enough? Its quality bar, measured.

    python benchmarks/demo_quality.py --data FOLDER_WITH_IDX_GZ --guidance 2 --steps 20 --sheet sheet.png

Fully generated samples (t = T, from pure noise, labels balanced) at a guidance weight and a number of steps:
a CNN trained on real images (>= 90 % on the real test images, or the judge itself is unfit) must agree with the
class asked for in >= 85 %, and a CNN trained on generated samples only must reach >= 70 % on the real test
images. Prints a report for people on stderr and one JSON line on stdout; exits with 1 where a bar is missed.
Samples are kept in `--cache` by model and settings, so a longer run goes on from a shorter one.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

import classifier
import numpy as np
import torch

from boomerang_batch.config.pipeline import ClassLabels, ModelSpec
from boomerang_batch.data.images import contact_sheet, to_pixels
from boomerang_batch.diffusion.engine import Draw, Engine, Walk
from boomerang_batch.diffusion.noise import noise_key, seed_material
from boomerang_batch.diffusion.samplers import build_solver
from boomerang_batch.diffusion.schedule import build_schedule
from boomerang_batch.models import load_denoiser

CLASSES = 10
NULL_LABEL = 10
BARS = {"judge_accuracy": 0.90, "agreement": 0.85, "generated_only_accuracy": 0.70}


def generate(args: argparse.Namespace, count: int) -> tuple[np.ndarray, np.ndarray, dict]:
    """`count` samples: uint8 (N, 28, 28), the labels asked for (N,), and what made them."""
    spec = ModelSpec(
        source=args.model,
        patch_size=2,
        class_labels=ClassLabels(null_label=NULL_LABEL, guidance=args.guidance),
    )
    denoiser = load_denoiser(spec, device=args.device, threads=args.threads)
    schedule = build_schedule(
        denoiser.spec.levels, grid=args.grid, steps=args.steps, t=("fraction", 1.0), start="exact"
    )
    solver = build_solver(
        schedule, prediction=denoiser.spec.prediction, eta=args.eta, clip_range=denoiser.spec.clip_range
    )
    settings = {name: getattr(args, name) for name in ("guidance", "steps", "grid", "eta", "seed")}
    settings |= {"model_digest": denoiser.spec.digest, "evaluations": schedule.n}
    name = f"samples-{denoiser.spec.digest[:12]}-g{args.guidance:g}-{args.grid}{args.steps}-eta{args.eta:g}"
    kept = args.cache / f"{name}-seed{args.seed}.npy"
    images = np.load(kept) if kept.is_file() else np.empty((0, 28, 28), np.uint8)

    # Nothing is left of x_0 but alpha_T of it, and it is 0: what is denoised is pure noise.
    blank = torch.zeros(denoiser.spec.channels, denoiser.spec.height, denoiser.spec.width)
    draws = (
        Draw(
            tag=index,
            image=blank,
            noise_key=noise_key(seed_material(args.seed), identity=str(index).encode(), variant=0),
            walk=Walk(schedule, solver),
            condition=index % CLASSES,
        )
        for index in range(len(images), count)
    )
    engine = Engine(denoiser, batch_size=args.batch_size, threads=args.threads)
    made, since = {}, time.monotonic()
    for drawn in engine.run(draws):
        margin = (denoiser.spec.height - 28) // 2
        inner = drawn.image[:, margin : margin + 28, margin : margin + 28].numpy()
        made[drawn.draw.tag] = to_pixels(inner, denoiser.spec.value_range)[:, :, 0]
        if len(made) % 100 == 0:
            print(f"{len(images) + len(made)}/{count} samples", file=sys.stderr, flush=True)
    engine.close()
    if made:
        settings["seconds_per_sample"] = round((time.monotonic() - since) / len(made), 4)
        images = np.concatenate([images, np.stack([made[index] for index in sorted(made)])])
        args.cache.mkdir(parents=True, exist_ok=True)
        np.save(kept, images)
    return images[:count], np.arange(count) % CLASSES, settings


def measure(args: argparse.Namespace) -> dict:
    judge, judge_accuracy = classifier.real_classifier(args.data, args.cache)
    print(f"judge: {judge_accuracy:.4f} on real test images", file=sys.stderr, flush=True)
    images, labels, settings = generate(args, max(args.samples, args.train_samples))
    if args.sheet:
        rows = [[image[:, :, None] for image in row] for row in images[:64].reshape(-1, 8, 28, 28)]
        args.sheet.write_bytes(contact_sheet(rows, cell=56))
    hits = classifier.predict(judge, images[: args.samples]) == labels[: args.samples]
    by_class = [round(float(hits[labels[: args.samples] == label].mean()), 3) for label in range(CLASSES)]
    # About as many steps as the judge gets in two epochs, however few the samples.
    epochs = max(classifier.EPOCHS, round(120_000 / args.train_samples))
    pupil = classifier.train(images[: args.train_samples], labels[: args.train_samples], epochs=epochs)
    return {
        "samples": args.samples,
        "judge_accuracy": round(judge_accuracy, 4),
        "agreement": round(float(hits.mean()), 4),
        "agreement_by_class": by_class,
        "train_samples": args.train_samples,
        "generated_only_accuracy": round(classifier.accuracy(pupil, *classifier.split(args.data, "t10k")), 4),
        **settings,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": args.device,
        "machine": platform.machine(),
        "commit": subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
        ).stdout.strip(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with Fashion-MNIST's idx.gz files")
    parser.add_argument("--model", default="shipped:demo/model", help="a diffusers folder")
    parser.add_argument("--guidance", type=float, default=1.0, help="classifier-free guidance weight")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--grid", default="linspace")
    parser.add_argument("--eta", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--samples", type=int, default=2000, help="samples that the judge looks at")
    parser.add_argument("--train-samples", type=int, default=5000, help="samples that a CNN is trained on")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sheet", type=Path, help="write the first 64 samples here as one PNG")
    parser.add_argument("--cache", type=Path, default=Path(".cache/benchmarks"))
    args = parser.parse_args()
    result = measure(args)
    missed = [name for name, bar in BARS.items() if result[name] < bar]
    for name, bar in BARS.items():
        print(f"{name}: {result[name]:.4f} (bar {bar})", file=sys.stderr)
    print(json.dumps(result))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
