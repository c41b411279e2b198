"""What `faces.py` tells: its tables and its plot. Not a benchmark itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import face_attacks
import numpy as np
import report
from curves import Curve, Panel, Point, draw

HEAD = """
# Faces that Boomerang redrew

200 photographs of 20 people. The model was trained for {steps} steps of {batch} ({minutes:.0f} CPU minutes)
on 200 photographs of 20 others, so few that it learns them by heart to some degree: the last column.
{grid}-step grid, eta 1. Chance: .005 for the very photograph among 200, .05 for others of its person (100 in
the gallery, 5 of them right); .01 and .1 for the attacker who has learned from one half of the people and is
tried on the other. Memorized swaps: nearer to a training face, or its mirror image, than 95 % of the sources
are, and nearer than to its own source; so of images that have nothing to do with either 5 % may count. The
ceilings, of all 200 and of the learned attacker's 100, bind attacks on the very photograph that look at one
output at a time, by anyone who does not know the noise. They do not bind the matching of all outputs at once,
beside which that of the noise alone stands, nor say anything of other photographs of the person.

![plot](faces.png)
"""


def greatest_rise(values: Sequence[float]) -> float:
    """By how much a value at most exceeds an earlier one; 0 where they only fall; nan counts for nothing."""
    known = np.array([value for value in values if not math.isnan(value)])
    return float(np.max(known - np.minimum.accumulate(known), initial=0.0))


def curve(
    name: str, lines: Sequence[Mapping[str, Any]], embedder: str, *path: str, dashed: bool = False
) -> Curve:
    """One rate over t."""
    points = []
    for line in lines:
        rate = line["embedders"][embedder]
        for step in path:
            rate = rate[step]
        if rate["trials"]:
            points.append(Point(x=line["fraction"], y=rate["value"], interval=(rate["low"], rate["high"])))
    return Curve(name=name, points=tuple(points), dashed=dashed)


def plot(lines: Sequence[Mapping[str, Any]], used: Sequence[str], path: Path) -> None:
    """Same photograph, other photographs, memorized swaps: each over t."""
    by_t = [line for line in lines if "sigma" in line]
    limit = Curve(
        name="noise ceiling (the very photograph alone)",
        points=tuple(Point(x=line["fraction"], y=line["ceiling"]["value"]) for line in by_t),
        dashed=True,
    )
    first = by_t[0]["embedders"][used[0]]
    panels = [
        Panel(
            title="Is the very photograph found?",
            x="t / T",
            y="rank-1 among 200",
            curves=(limit, *(curve(name, by_t, name, "same_photo", "rank1") for name in used)),
            level=("chance", first["same_photo"]["chance"]),
            y_range=(0, 1),
        ),
        Panel(
            title="Are others of the person, without it?",
            x="t / T",
            y="rank-1 among 100, 5 of them right",
            curves=tuple(curve(name, by_t, name, "other_photos", "rank1") for name in used),
            level=("chance", first["other_photos"]["chance"]),
            y_range=(0, 1),
        ),
        Panel(
            title="Is a training face drawn instead?",
            x="t / T",
            y="nearer to one than strangers, and than its source",
            curves=tuple(curve(name, by_t, name, "memorized", "swapped") for name in used),
            y_range=(0, 1),
        ),
    ]
    draw(panels, path, width=400)


def cell(rate: Mapping[str, float]) -> str:
    """A rate with its interval."""
    return f"{rate['value']:.3f} ({rate['low']:.2f} to {rate['high']:.2f})"


def tables(lines: Sequence[Mapping[str, Any]], used: Sequence[str]) -> str:
    """One table of the worst case, one of each embedder."""

    def worst(line: Mapping[str, Any], *path: str) -> str:
        def at(name: str) -> Mapping[str, float]:
            rate = line["embedders"][name]
            for step in path:
                rate = rate[step]
            return rate

        name = max((name for name in used if at(name)["trials"]), key=lambda name: at(name)["value"])
        return f"{cell(at(name))} {name}"

    header = ["row", "sigma", "ceiling", "the very photograph", "one to one: noise alone", "outputs"]
    header += ["ceiling of a half", "the very photograph, learned attacker"]
    header += ["others of the person", "the same, learned attacker", "memorized swaps"]
    summary = []
    for line in lines:
        limits = {
            name: f"{line[name]['value']:.3f}" if name in line else ""
            for name in ("ceiling", "ceiling_one_to_one", "ceiling_halves")
        }
        row = [line["row"], f"{line['sigma']:.3g}" if "sigma" in line else ""]
        row += [limits["ceiling"], worst(line, "same_photo", "rank1")]
        row += [limits["ceiling_one_to_one"], worst(line, "same_photo", "one_to_one")]
        row += [limits["ceiling_halves"], worst(line, "learned_same_photo", "rank1")]
        row += [worst(line, "other_photos", "rank1"), worst(line, "learned_other_photos", "rank1")]
        summary.append([*row, worst(line, "memorized", "swapped")])
    text = [
        "Of the worst embedder, rank-1 but for one-to-one matching (95 % intervals):",
        "",
        report.table(header, summary),
    ]
    columns = ["row", "misses", "rank-1", "rank-5", "AUC", f"TAR at FAR {face_attacks.FAR:g}", "one to one"]
    columns += ["learned: rank-1", "others: rank-1", "others: AUC", "others, learned: rank-1"]
    columns += ["near a training face", "and nearer than its source"]
    for name in used:
        rows = []
        for line in lines:
            found = line["embedders"][name]
            same, other = found["same_photo"], found["other_photos"]
            numbers = [same["rank1"], same["rank5"], same["auc"], same["tar"], same["one_to_one"]]
            numbers += [found["learned_same_photo"]["rank1"], other["rank1"], other["auc"]]
            numbers += [found["learned_other_photos"]["rank1"], *found["memorized"].values()]
            values = (number if isinstance(number, float) else number["value"] for number in numbers)
            rows.append([line["row"], found["misses"], *(f"{value:.3f}" for value in values)])
        text += ["", f"By {name}:", "", report.table(columns, rows)]
    return "\n".join(text)


def publish(record: Mapping[str, Any], used: Sequence[str], results: Path) -> None:
    """The tables, the plot and the numbers."""
    lines, trained = record["rows"], record["training"]
    by_t = [line for line in lines if "sigma" in line]
    rises = {
        f"{name}, {kind.replace('_', ' ')}": greatest_rise(
            [line["embedders"][name][kind]["rank1"]["value"] for line in by_t]
        )
        for name in used
        for kind in ("same_photo", "other_photos", "learned_same_photo", "learned_other_photos")
    }
    told = [f"{name} {rise:.3f}" for name, rise in rises.items() if rise > 0]
    text = [
        HEAD.format(**trained, minutes=trained["seconds"] / 60, grid=record["steps"]),
        tables(lines, used),
        "",
        f"Greatest rise of a rank-1 with t: {'; '.join(told) or 'none'}.",
    ]
    text += [f"\nLeft out: {reason}." for reason in record["left_out"].values()]
    plot(lines, used, results / "faces.png")
    report.publish("faces", {**record, "greatest_rise": rises}, "\n".join(text), folder=results)
