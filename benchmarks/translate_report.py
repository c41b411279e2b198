"""What `translate.py` tells: its tables and its plot. Not a benchmark itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import report
from figures import Line, Panel, draw

SCORES = {
    "agreement": "taken for the target",
    "ssim": "SSIM",
    "edges": "edge overlap",
    "found": "source found again",
}
SHOWN = ("agreement", "ssim", "found")
"""In the plot."""

HEAD = """
# Garments that become another

{each} garments of each direction, from Fashion-MNIST's test split; the demo's model, {steps}-step grid. The
judge, a CNN that learned from the real training split, is right on {judge_accuracy:.3f} of the real test split.
Distance: the median of the mean squared difference to the source, per pixel of [0, 1]. Edges: where Sobel's
slope is above {edge:g} of the range a pixel. Found again: of the {each} sources its own is the nearest, pixel
by pixel. Evaluations are of one image, encoding included; a guided one counts once and costs two.

![plot](translate.png)

Pictures: the first garments, by [Boomerang](translate_boomerang.png), [dpm-encoder](translate_dpm_encoder.png)
and [edit-friendly](translate_edit_friendly.png). Fashion-MNIST is under the MIT licence
(`boomerang_batch/demo/shards/LICENSE`).
"""


def panels(record: Mapping[str, Any]) -> list[Panel]:
    """Of the first pair, both directions: every score over the distance."""
    pair = record["pairs"][0]
    points = pair["views"]["both"]["points"]
    names = " and ".join(name.lower() for name in pair["classes"])

    def curves(score: str) -> dict[str, Line]:
        found = {}
        for arm, line in points.items():
            values = [point[score] for point in line]
            rates = isinstance(values[0], Mapping)
            found[arm] = Line(
                points=[
                    (point["distance"], value["value"] if rates else value)
                    for point, value in zip(line, values, strict=True)
                ],
                around=[(value["low"], value["high"]) for value in values] if rates else (),
            )
        return found

    return [
        Panel(
            title=f"{title[0].upper()}{title[1:]}, {names}",
            x="median squared distance to the source",
            y=title,
            lines=curves(score),
            y_range=(0, 1.02),
        )
        for score, title in ((score, SCORES[score]) for score in SHOWN)
    ]


def told(estimate: Mapping[str, float], *, signed: bool = False) -> str:
    """A number with its interval."""
    form = "{:+.2f} ({:+.2f} to {:+.2f})" if signed else "{:.2f} ({:.2f} to {:.2f})"
    return form.format(estimate["value"], estimate["low"], estimate["high"])


def equal_table(view: Mapping[str, Any]) -> str:
    """The arms at equal distance, and what each is above Boomerang under equal guidance."""
    rows = []
    for distance, lines in view["equal"].items():
        for line in lines:
            cells = [distance, line["arm"]]
            for score in SCORES:
                more = line.get(f"{score}_more")
                cells += [told(line[score]), told(more, signed=True) if more else ""]
            rows.append(cells)
    header = ["distance", "method"]
    for title in SCORES.values():
        header += [title, "above Boomerang"]
    return report.table(header, rows)


def points_table(view: Mapping[str, Any]) -> str:
    """Every point of every curve; at t = 0 stand the sources."""
    rows = []
    for arm, points in view["points"].items():
        for point in points:
            cells = [arm, f"{point['t']:g}", point["evaluations"], f"{point['distance']:.4f}"]
            rows.append(
                [
                    *cells,
                    told(point["agreement"]),
                    f"{point['ssim']:.3f}",
                    f"{point['edges']:.3f}",
                    f"{point['found']:.2f}",
                ]
            )
    return report.table(["method", "t / T", "evaluations", "distance", *SCORES.values()], rows)


def publish(record: Mapping[str, Any], results: Path) -> None:
    """The tables, the plot and the numbers."""
    text = [HEAD.format(**record)]
    for pair in record["pairs"]:
        real = ", ".join(
            f"{share:.2f} of real ones as {name}" for name, share in pair["judge_agrees_on_real"].items()
        )
        text += [f"## {' and '.join(pair['classes'])}", "", f"The judge takes {real}.", ""]
        for name, view in pair["views"].items():
            title = "both directions" if name == "both" else name
            text += [f"At equal distance, {title}:", "", equal_table(view), ""]
        text += ["All points, both directions:", "", points_table(pair["views"]["both"]), ""]
    report.publish("translate", dict(record), "\n".join(text), folder=results)
    draw(panels(record), results / "translate.png")
