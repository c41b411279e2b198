"""What `paper_tables.py` tells: its tables beside the paper's, and its plot. Not a benchmark itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import report
from figures import Line, Panel, draw
from scipy import stats

PUBLISHED = (
    ("CIFAR-10, ResNet-18", "87.8", "81.5 (StyleGAN-XL)", "84.4", "88.4", "preprint, version 1"),
    ("CIFAR-100", "62.7", "26.9 (DLSM)", "55.6", "63.6", "final version, quoted at second hand"),
    ("ImageNet-200, ResNet-18", "66.6", "50.2 (StyleGAN-XL)", "61.8", "70.5", "preprint, version 1"),
    ("ImageNet", "63.3", "39.8 (StyleGAN-XL)", "57.8", "64.4", "final version, quoted at second hand"),
)
"""Top-1 in %, arXiv 2210.12100: data, real, fully synthetic, Boomerang alone, real and Boomerang."""

HEAD = """
# The paper's tables in miniature

{learned} images of Fashion-MNIST's test split to learn from, {tested} others to test; the demo's model
({model:.12}) never saw either. A ResNet-8 of {weights:,} weights, {epochs} epochs, {seeds} seeds, 95 %
intervals over seeds; {cpu_hours:.2f} CPU hours in all. Chance of rank-1 within the class: {chance:.3f}. The
judge, a CNN that learned from the 60,000 of the training split, agrees with {judge:.3f} of the real labels.

![plot](paper_tables.png)
"""

BESIDE = """
What the paper reports (arXiv 2210.12100, top-1 in %), of other data, models and classifiers and without
intervals; its synthetic images are another model's:
"""


def mean_and_half(values: Sequence[float]) -> tuple[float, float]:
    """The mean and half the width of its 95 % interval; infinite of one value."""
    if len(values) < 2:
        return float(np.mean(values)), math.inf
    spread = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return float(np.mean(values)), float(stats.t.ppf(0.975, len(values) - 1)) * spread


def percent(values: Sequence[float], *, signed: bool = False) -> str:
    """Mean and interval as a cell of the table."""
    mean, half = mean_and_half(values)
    told = f"{100 * mean:+.1f}" if signed else f"{100 * mean:.1f}"
    return told if math.isinf(half) else f"{told} ± {100 * half:.1f}"


def panels(record: Mapping[str, Any]) -> list[Panel]:
    """Accuracy over t, the real images at t = 0."""
    table = record["rows"]
    lines = {}
    for learned, coin in (("copies alone", False), ("real and copies by the coin", True)):
        rows = [line for line in table if line["coin"] == coin or line["fraction"] == 0]
        for how, words in (("plain", ""), ("augmented", ", augmented")):
            told = [(line["fraction"], *mean_and_half(line["accuracy"][how])) for line in rows]
            lines[learned + words] = Line(
                points=[(fraction, mean) for fraction, mean, _ in told],
                around=[(mean - half, mean + half) for _, mean, half in told if math.isfinite(half)],
            )
    real = next(line for line in table if line["fraction"] == 0)
    return [
        Panel(
            title="Fashion-MNIST: what is learned from real images and from copies",
            x="t / T of the copies (0: the real images)",
            y="accuracy on real images",
            lines=lines,
            level=("real", float(np.mean(real["accuracy"]["plain"]))),
        )
    ]


def cells(line: Mapping[str, Any], real: Mapping[str, Sequence[float]]) -> list[object]:
    """One line of the table; `real` are the accuracies of the real images' row."""
    copies = "sigma" in line
    found: list[object] = [line["row"]]
    found += [f"{line['sigma']:.3g}", line["evaluations"]] if copies else ["", ""]
    found += [f"{line['agreement']:.3f}", f"{line['rank1_pixels_within_class']:.3f}" if copies else ""]
    for how in ("plain", "augmented"):
        values = line["accuracy"][how]
        apart = [own - base for own, base in zip(values, real[how], strict=True)]
        found += [percent(values), percent(apart, signed=True) if copies else ""]
    return found


def publish(record: Mapping[str, Any], results: Path) -> None:
    """The tables, the plot and the numbers of what is done so far."""
    table = record["rows"]
    real = table[0]["accuracy"]
    header = ["learned from", "sigma", "evaluations", "judge agrees", "rank-1 by pixels, within the class"]
    header += ["accuracy, %", "against real", "with shifts and mirroring, %", "against real"]
    beside = ["data", "real", "fully synthetic", "Boomerang alone", "real and Boomerang", "source"]
    text = [
        HEAD.format(**record, judge=table[0]["agreement"], chance=10 / record["learned"]),
        report.table(header, [cells(line, real) for line in table]),
        BESIDE,
        report.table(beside, PUBLISHED),
    ]
    report.publish("paper_tables", {**record, "published": PUBLISHED}, "\n".join(text), folder=results)
    draw(panels(record), results / "paper_tables.png")
