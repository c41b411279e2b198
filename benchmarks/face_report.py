"""What `faces.py` tells: its tables and its plot. Not a benchmark itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import face_attacks
import numpy as np
import report
from figures import Line, Panel, draw

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


def panels(record: Mapping[str, Any]) -> list[Panel]:
    """Same photograph, other photographs, memorized swaps: each over t."""
    by_t = [line for line in record["rows"] if "sigma" in line]
    limit = Line(points=[(line["fraction"], line["ceiling"]["value"]) for line in by_t], theory=True)
    first = next(iter(by_t[0]["embedders"].values()))

    def curves(*path: str) -> dict[str, Line]:
        found = {}
        for name in by_t[0]["embedders"]:
            rates = [(line["fraction"], rate_of(line, name, *path)) for line in by_t]
            known = [(fraction, rate) for fraction, rate in rates if rate["trials"]]
            found[name] = Line(
                points=[(fraction, rate["value"]) for fraction, rate in known],
                around=[(rate["low"], rate["high"]) for _, rate in known],
            )
        return found

    return [
        Panel(
            title="Is the very photograph found?",
            x="t / T",
            y="rank-1 among 200",
            lines={**curves("same_photo", "rank1"), "noise ceiling (the very photograph alone)": limit},
            level=("chance", first["same_photo"]["chance"]),
            y_range=(0, 1.02),
        ),
        Panel(
            title="Are others of the person, without it?",
            x="t / T",
            y="rank-1 among 100, 5 of them right",
            lines=curves("other_photos", "rank1"),
            level=("chance", first["other_photos"]["chance"]),
            y_range=(0, 1.02),
        ),
        Panel(
            title="Is a training face drawn instead?",
            x="t / T",
            y="share of memorized swaps",
            lines=curves("memorized", "swapped"),
            y_range=(0, 1.02),
        ),
    ]


def rate_of(line: Mapping[str, Any], embedder: str, *path: str) -> Mapping[str, float]:
    """One rate of a row."""
    rate = line["embedders"][embedder]
    for step in path:
        rate = rate[step]
    return rate


def cell(rate: Mapping[str, float]) -> str:
    """A rate with its interval."""
    return f"{rate['value']:.3f} ({rate['low']:.2f} to {rate['high']:.2f})"


def tables(lines: Sequence[Mapping[str, Any]], used: Sequence[str]) -> str:
    """One table of the worst case, one of each embedder."""

    def worst(line: Mapping[str, Any], *path: str) -> str:
        rates = {name: rate_of(line, name, *path) for name in used}
        name = max((name for name in used if rates[name]["trials"]), key=lambda name: rates[name]["value"])
        return f"{cell(rates[name])} {name}"

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
    report.publish("faces", {**record, "greatest_rise": rises}, "\n".join(text), folder=results)
    draw(panels(record), results / "faces.png")
