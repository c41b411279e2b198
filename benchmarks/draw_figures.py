"""Draw the figures of finished benchmarks again. Not a benchmark itself.

    python benchmarks/draw_figures.py

A figure shows what stands in the result file beside it, so a new look needs no new measurement.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import attack_theory
import driver_scaling
import face_report
import figures
import paper_report
import report
import resume
import samplers
import translate_report

PANELS = {
    "attack_theory": attack_theory.panels,
    "driver_scaling": driver_scaling.panels,
    "faces": face_report.panels,
    "paper_tables": paper_report.panels,
    "resume": resume.panels,
    "samplers": samplers.panels,
    "translate": translate_report.panels,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=report.RESULTS)
    results = parser.parse_args().results
    for name, panels in PANELS.items():
        numbers = results / f"{name}.json"
        if numbers.is_file():
            figures.draw(panels(json.loads(numbers.read_text())), results / f"{name}.png")
            print(results / f"{name}.png")


if __name__ == "__main__":
    main()
