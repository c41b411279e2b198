"""Does leading each image away from its own source buy more privacy than a larger t, at equal use?

    python benchmarks/repelling.py --data FOLDER_WITH_IDX_GZ --threads 1

Fashion-MNIST's test images, which the demo's model has not seen, at several t: plain Boomerang, and led away
from each image's own source by two embedders: what a small classifier that is trained here sees, and blurred
pixels. Linkability is rank-1 among all sources, by embedders that led none of them, though pixels and PCA are
near to the blurred ones. Use is the share whose class a CNN trained on real images still sees. Once without
the class told to the model, where nothing but the image keeps it, and once with. Last, outputs led towards
another class by the small classifier, judged by the CNN. Intervals are Wilson's at 95 %. Writes
results/repelling.md, .json, a plot and a picture, and prints one JSON line.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import classifier
import figures
import numpy as np
import report
import torch
from PIL import Image, ImageDraw, ImageFont
from redraws import outputs_of
from torch import Tensor, nn
from torch.nn import functional

from boomerang_batch.cli.inputs import load_recipe
from boomerang_batch.diffusion.energy import Energy, EnergyGuided
from boomerang_batch.diffusion.engine import Engine
from boomerang_batch.measures import embedders
from boomerang_batch.measures.energies import AwayFromSource, TowardsClass
from boomerang_batch.measures.intervals import Rate, rate
from boomerang_batch.measures.linkability import linkability
from boomerang_batch.run.loading import load

SEED = 20221012
NULL_LABEL = 10
TOWARDS_T = 0.6
JUDGES = ("pixels", "pca", "efficientnet-lite0", "CNN features")


class Small:
    """The classifier that leads: trained on a third of the training set with another seed than the judge."""

    def __init__(self, data: Path) -> None:
        pixels, labels = classifier.split(data, "train")
        self.network = classifier.train(pixels[:20_000], labels[:20_000], epochs=1, seed=7).requires_grad_(
            False
        )

    def embed(self, images: Tensor) -> Tensor:
        """What comes before the last layer, (B, 864)."""
        return features(self.network, _cropped(images))

    def logits(self, images: Tensor) -> Tensor:
        """(B, 10)"""
        return self.network(_cropped(images))


class Blurred:
    """Pixels averaged over 2x2, less their mean, so that the angle is their correlation."""

    def embed(self, images: Tensor) -> Tensor:
        """(B, 196)"""
        small = functional.avg_pool2d(_cropped(images), 2).flatten(1)
        return small - small.mean(1, keepdim=True)


def features(network: nn.Module, images: Tensor) -> Tensor:
    """The judge's or the small classifier's, before dropout and the last layer."""
    return network[:-2](images)


def _cropped(images: Tensor) -> Tensor:
    """The model's 32x32 without the margin that its recipe adds."""
    margin = (images.shape[2] - 28) // 2
    return images[:, :, margin : margin + 28, margin : margin + 28]


def energies(data: Path) -> dict[str, Energy]:
    """What leads, by name."""
    small, digest = Small(data), hashlib.sha256(b"of this benchmark").hexdigest()
    return {
        "a small network": AwayFromSource(made=small, name="small", digest=digest),
        "blurred pixels": AwayFromSource(made=Blurred(), name="blurred", digest=digest),
        "a class": TowardsClass(made=small, name="small", digest=digest, classes=10),
    }


class World:
    """The demo's model, some sources, and all that judges what becomes of them."""

    def __init__(self, args: argparse.Namespace) -> None:
        recipe = load_recipe("demo-augment", ["model.class_labels.guidance=1.0", f"steps={args.steps}"])
        self.engine, self.walks = load(recipe, device="cpu", threads=args.threads)
        self.cnn, self.cnn_accuracy = classifier.real_classifier(args.data, args.cache)
        pixels, labels = classifier.split(args.data, "t10k")
        chosen = np.random.default_rng(SEED).permutation(len(pixels))[: args.samples]
        self.sources, self.labels = pixels[chosen], labels[chosen]
        shown = self.sources[..., None]
        self._known = {name: embedders.load(name, fit_on=shown) for name in JUDGES[:3]}
        self._of_sources = self._features(self.sources)

    def draw(
        self, t: float, *, told: bool, led: tuple[Energy, float] | None = None, about: Any = "source"
    ) -> np.ndarray:
        """The sources redrawn, uint8 (N, 28, 28); led by an energy at a scale."""
        labels = self.labels if told else np.full(len(self.labels), NULL_LABEL)
        engine = self.engine if led is None else self._led(*led)
        walk = self.walks.at("fraction", t)
        outputs = outputs_of(
            engine,
            walk,
            self.sources[..., None],
            range(len(self.sources)),
            seed=SEED,
            policy="pad",
            labels=labels.tolist(),
            about=None if led is None else about,
        )
        if led is not None:
            engine.close()
        return outputs[..., 0]

    def judged(self, outputs: np.ndarray) -> dict[str, Any]:
        """Linkability by every judge, and how many keep their class."""
        found = self._features(outputs)
        groups = np.zeros(len(outputs), np.int64)
        ranks = {
            name: linkability(found[name], source, groups=groups).rank[1]
            for name, source in self._of_sources.items()
        }
        agree = classifier.predict(self.cnn, outputs) == self.labels
        distance = np.square((outputs.astype(float) - self.sources) / 255).mean()
        return {
            "rank1": {name: told(one) for name, one in ranks.items()},
            "agreement": told(rate(agree.astype(float))),
            "distance": round(float(distance), 4),
        }

    def _features(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        found = {name: embedder.embed(pixels[..., None]) for name, embedder in self._known.items()}
        with torch.no_grad():
            found["CNN features"] = features(self.cnn, classifier.to_input(pixels)).numpy()
        return found

    def _led(self, energy: Energy, scale: float) -> Engine:
        model = self.engine.denoiser
        return self.engine.with_denoiser(
            EnergyGuided(model, energy, scale=scale, clip_range=model.spec.clip_range)
        )


def told(share: Rate) -> dict[str, float]:
    """A rate with its interval."""
    return {"value": round(share.value, 3), "low": round(share.low, 3), "high": round(share.high, 3)}


def settings(args: argparse.Namespace) -> list[tuple[str, float, float]]:
    """(what leads, t, scale); plain ones have scale 0."""
    plain = [("nothing", t, 0.0) for t in args.fractions]
    names = ("a small network", "blurred pixels")
    return plain + [(name, t, scale) for name in names for t in args.led for scale in args.scales]


def study(args: argparse.Namespace) -> tuple[dict[str, Any], dict[tuple[bool, str, float, float], np.ndarray]]:
    """Every row, and every output."""
    world, by_name = World(args), energies(args.data)
    rows: list[dict[str, Any]] = []
    drawn = {}
    for is_told in (False, True):
        for name, t, scale in settings(args):
            since = time.process_time()
            led = None if name == "nothing" else (by_name[name], scale)
            outputs = drawn[is_told, name, t, scale] = world.draw(t, told=is_told, led=led)
            spent = round(time.process_time() - since, 1)
            row = {"told": is_told, "led by": name, "t": t, "scale": scale, **world.judged(outputs)}
            rows.append(row | {"cpu_s": spent})
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    wanted = (world.labels + 1) % 10
    towards = []
    for scale in (0.0, *args.scales):
        led = (by_name["a class"], scale) if scale else None
        outputs = drawn[False, "a class", TOWARDS_T, scale] = world.draw(
            TOWARDS_T, told=False, led=led, about=wanted.tolist()
        )
        seen = classifier.predict(world.cnn, outputs) == wanted
        distance = np.square((outputs.astype(float) - world.sources) / 255).mean()
        share = told(rate(seen.astype(float)))
        towards.append({"t": TOWARDS_T, "scale": scale, "seen": share, "distance": round(float(distance), 4)})
        print(json.dumps(towards[-1]), file=sys.stderr, flush=True)
    drawn[False, "source", 0.0, 0.0] = world.sources
    world.engine.close()
    facts = {
        "samples": len(world.sources),
        "steps": args.steps,
        "model": world.engine.denoiser.spec.digest[:12],
        "cnn_accuracy": round(world.cnn_accuracy, 4),
        "agreement_of_sources": round(classifier.accuracy(world.cnn, world.sources, world.labels), 3),
        "rows": rows,
        "towards": towards,
    }
    return facts, drawn


def tables(record: Mapping[str, Any]) -> str:
    """Both tables in words."""

    def share(one: Mapping[str, float]) -> str:
        return f"{one['value']:.2f} ({one['low']:.2f} to {one['high']:.2f})"

    parts = [
        "# Led away from the source, against a larger t",
        f"{record['samples']} test images of Fashion-MNIST, the demo's model, {record['steps']} steps, eta 1. "
        f"Rank-1 among all {record['samples']}, chance {1 / record['samples']:.3f}; of the sources themselves "
        f"the CNN sees {record['agreement_of_sources']:.2f} right.",
        "![Rank-1 over label agreement](repelling.png)",
        "![Sources, plain outputs and led ones](repelling-sheet.png)",
    ]
    for is_told in (False, True):
        parts.append(f"## The model is {'told the class' if is_told else 'told nothing'}")
        parts.append(
            report.table(
                ["led by", "t", "scale", "class kept", *(f"rank-1, {name}" for name in JUDGES), "distance"],
                [
                    [row["led by"], row["t"], row["scale"] or "", share(row["agreement"])]
                    + [share(row["rank1"][name]) for name in JUDGES]
                    + [row["distance"]]
                    for row in record["rows"]
                    if row["told"] == is_told
                ],
            )
        )
    parts.append("## Led towards the next class, the model told nothing")
    parts.append(
        report.table(
            ["t", "scale", "the CNN sees that class", "distance"],
            [
                [row["t"], row["scale"] or "none", share(row["seen"]), row["distance"]]
                for row in record["towards"]
            ],
        )
    )
    return "\n\n".join(parts)


def panels(record: Mapping[str, Any]) -> list[figures.Panel]:
    """Rank-1 over the share that keeps its class, of a model that is told nothing, for two judges."""
    rows = [row for row in record["rows"] if not row["told"]]

    def line(chosen: Sequence[Mapping[str, Any]], judge: str) -> figures.Line:
        ordered = sorted(chosen, key=lambda row: row["agreement"]["value"])
        return figures.Line(
            points=[(row["agreement"]["value"], row["rank1"][judge]["value"]) for row in ordered],
            around=[(row["rank1"][judge]["low"], row["rank1"][judge]["high"]) for row in ordered],
        )

    def lines(judge: str) -> dict[str, figures.Line]:
        found = {"plain, t rising to the left": [row for row in rows if row["led by"] == "nothing"]}
        for row in rows:
            if row["led by"] != "nothing":
                found.setdefault(f"led by {row['led by']}, t {row['t']}", []).append(row)
        return {name: line(chosen, judge) for name, chosen in found.items()}

    return [
        figures.Panel(
            title=f"judged by {judge}",
            x="share that keeps its class",
            y="rank-1",
            lines=lines(judge),
            y_range=(0, 1.05),
        )
        for judge in ("pixels", "efficientnet-lite0")
    ]


def sheet(
    args: argparse.Namespace, drawn: Mapping[tuple[bool, str, float, float], np.ndarray], path: Path
) -> None:
    """Sources, and what became of them, a row each."""
    t, scales = args.led[-1], args.scales
    columns = [("source", (False, "source", 0.0, 0.0))]
    columns += [(f"plain\nt {one}", (False, "nothing", one, 0.0)) for one in args.fractions]
    for name, brief in (("a small network", "network"), ("blurred pixels", "blurred")):
        columns += [(f"{brief}\nt {t}, {scale}", (False, name, t, scale)) for scale in scales]
    columns += [
        (f"next class\nt {TOWARDS_T}, {scale}", (False, "a class", TOWARDS_T, scale)) for scale in scales
    ]
    cell, head, font = 72, 34, ImageFont.load_default(11)
    canvas = Image.new("L", (len(columns) * cell, head + args.shown * cell), 255)
    pen = ImageDraw.Draw(canvas)
    for x, (title, key) in enumerate(columns):
        pen.multiline_text((x * cell + 2, 2), title, fill=0, font=font)
        for y in range(args.shown):
            picture = Image.fromarray(drawn[key][y]).resize((cell - 4, cell - 4), Image.Resampling.NEAREST)
            canvas.paste(picture, (x * cell, head + y * cell))
    canvas.save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder of Fashion-MNIST's four gzip'd IDX files"
    )
    parser.add_argument("--cache", type=Path, default=Path(".cache/benchmarks"))
    parser.add_argument("--samples", type=int, default=120)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.2, 0.4, 0.6, 0.8], help="plain")
    parser.add_argument("--led", type=float, nargs="+", default=[0.2, 0.4], help="t of what is led")
    parser.add_argument("--scales", type=float, nargs="+", default=[0.1, 0.3])
    parser.add_argument("--shown", type=int, default=8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=report.RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    record, drawn = study(args)
    args.out.mkdir(parents=True, exist_ok=True)
    figures.draw(panels(record), args.out / "repelling.png")
    sheet(args, drawn, args.out / "repelling-sheet.png")
    report.publish(
        "repelling", {"machine": report.machine(args.threads), **record}, tables(record), folder=args.out
    )


if __name__ == "__main__":
    main()
