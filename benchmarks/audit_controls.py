"""Do an audit's controls behave? The shipped demo's images, anonymized at several t, and all control rows.

    python benchmarks/audit_controls.py

What ought to come out: the sources themselves and the recipe at t = 0 are always led back, and so are outputs
by whoever has the run's secret; another image of the same label and the recipe at t = T as often as by chance,
among those that share all that is released with the picture; and no attack goes above the noise ceiling. Rates
have Wilson's 95 % interval, and a row is as it should be where that holds what was expected: one in twenty
misses it by luck. Exits with 1 where more are off than luck explains.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import report

FRACTIONS = (0.3, 0.5, 0.8)
CERTAIN, BY_CHANCE = ("sources", "t = 0", "secret known"), ("unrelated", "t = T")
MISSED_BY_LUCK = 0.25
"""Of the rows by chance; one in twenty is expected, and they are few."""


def audited(fraction: float, folder: Path, words: list[str]) -> dict[str, Any]:
    """The findings of the demo's 1,000 images anonymized at this t."""
    out, private = str(folder / f"out-{fraction:g}"), str(folder / f"private-{fraction:g}")
    tool = [sys.executable, "-m", "boomerang_batch"]
    at = ["--set", f"t.fraction={fraction:g}"]
    subprocess.run([*tool, "run", "demo-anonymize", "demo", out, "--private-dir", private, *at], check=True)
    asked = [*tool, "audit", out, "--private-dir", private, "--against", "demo", "--json", *words]
    return json.loads(subprocess.run(asked, check=True, stdout=subprocess.PIPE).stdout)


def rank_1(findings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every reading of it over all records."""
    for one in findings["readings"]:
        if one["measure"] == "rank-1" and one["stratum"] == "all":
            yield one


def judged(one: dict[str, Any]) -> bool | None:
    """Whether a control is what it should be; None where nothing certain is expected."""
    if one["subject"] in CERTAIN:
        return one["high"] >= 1 - 1e-9 or one["value"] > 0.99
    if one["subject"] in BY_CHANCE:
        return one["low"] <= one["chance"] <= one["high"]
    return None


def lines_of(findings: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of one t."""
    return [
        {
            name: one[name]
            for name in ("subject", "attacker", "features", "value", "low", "high", "chance", "count")
        }
        | {"as_expected": judged(one)}
        for one in rank_1(findings)
    ]


def told(found: dict[float, list[dict[str, Any]]]) -> str:
    """The table: rows are who is asked, in which features; columns are t."""
    rows: dict[tuple[str, str, str], dict[float, dict[str, Any]]] = {}
    for fraction, lines in found.items():
        for line in lines:
            about = (line["subject"], line["attacker"], line["features"])
            rows.setdefault(about, {})[fraction] = line
    header = ["subject", "attacker", "features", "chance", *(f"t = {fraction:g} T" for fraction in found)]
    cells = []
    for (subject, attacker, features), by_t in rows.items():
        chances = [line["chance"] for line in by_t.values() if line["chance"] is not None]
        row = [subject, attacker, features, f"{chances[0]:.2f}" if chances else ""]
        for fraction in found:
            line = by_t.get(fraction)
            row.append("" if line is None else _cell(line))
        cells.append(row)
    return report.table(header, cells)


def _cell(line: dict[str, Any]) -> str:
    off = " (!)" if line["as_expected"] is False else ""
    return f"{line['value']:.3f} [{line['low']:.3f}, {line['high']:.3f}]{off}"


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fractions", type=float, nargs="+", default=FRACTIONS)
    parser.add_argument("--redraw", type=int, default=200, help="outputs drawn anew for the controls")
    parser.add_argument("--embedders", nargs="+", default=("pixels", "pca"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, default=report.RESULTS)
    args = parser.parse_args()
    words = ["--redraw", str(args.redraw), "--threads", str(args.threads)]
    for name in args.embedders:
        words += ["--embedder", name]
    found: dict[float, list[dict[str, Any]]] = {}
    warned: dict[float, list[str]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for fraction in args.fractions:
            findings = audited(fraction, Path(scratch), words)
            found[fraction] = lines_of(findings)
            warned[fraction] = [text for text in findings["warnings"] if "ceiling" in text]
    rows = [line for lines in found.values() for line in lines]
    certain = [line["as_expected"] for line in rows if line["subject"] in CERTAIN]
    by_luck = [line["as_expected"] for line in rows if line["subject"] in BY_CHANCE]
    above = sum(map(len, warned.values()))
    markdown = (
        f"# Control rows of an audit: rank-1 with 95 % intervals\n\n{told(found)}\n\n"
        f"As they should be: {certain.count(True)} of {len(certain)} rows that are certain, "
        f"{by_luck.count(True)} of {len(by_luck)} by chance (the others: !). Attacks above the noise ceiling: "
        f"{above}."
    )
    record = {
        "question": (__doc__ or "").splitlines()[0],
        "machine": report.machine(args.threads),
        "rows": {str(fraction): lines for fraction, lines in found.items()},
        "above_ceiling": {str(fraction): texts for fraction, texts in warned.items()},
    }
    report.publish("audit_controls", record, markdown, folder=args.results)
    fine = all(certain) and by_luck.count(False) <= MISSED_BY_LUCK * len(by_luck) and not above
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
