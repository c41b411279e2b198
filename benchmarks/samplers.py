"""How many evaluations does each sampler need?

    python benchmarks/samplers.py --images 200

Error against evaluations, in closed form and on the demo's model. Every walk starts at relative noise 1 (half
the cosine chain) and takes n evenly spaced nodes. Three questions:

Gaussian data, where the exact denoiser is linear and the law of the output given its image is known: a
stochastic sampler has gain G = rho = s2 / (s2 + sigma^2) and variance V = s2 (1 - rho^2), a deterministic one
sqrt(rho) and s2 (1 - rho). The error is the 2-Wasserstein distance of the two laws over the output's
deviation from its image.

A mixture of three Gaussians on a line, where the exact denoiser is not linear: the 1-Wasserstein distance of
outputs to the data itself, which every exact sampler leaves as it is. Two independent sets of that size
differ by the floor; deterministic samplers can come below it, for their outputs are no independent set.

The demo's model, relative to the root mean square change that 200 evaluations make: deterministic samplers by
the root mean square difference of their outputs to 200 evaluations of DPM-Solver++(2M) from the same noise;
DDPM, whose further noise is another where the nodes are, by how much larger or smaller its root mean square
change is. The floor is that number between two seeds of 200 evaluations.

Flow samplers walk a flow-matching chain, VE Euler a variance-exploding one whose nodes are even in the
logarithm of the noise, so these are in the closed forms alone. (On one chain DDIM and Euler are the same step.)
All steps are the project's own.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import figures
import report
import torch
from sampler_errors import (
    POINTS,
    REFERENCE,
    SAMPLERS,
    Demo,
    demo_errors,
    gaussian_error,
    mixture_error,
    mixture_points,
    wasserstein,
)

EVALUATIONS = (2, 3, 5, 8, 12, 20, 35, 60, 100)
ROUNDING = 1e-7


def rows(errors: dict[str, dict[int, float]], evaluations: Sequence[int]) -> str:
    """A table: samplers down, evaluations across."""
    body = [[name, *(f"{line[n]:.2g}" for n in evaluations)] for name, line in errors.items()]
    return report.table(["sampler", *map(str, evaluations)], body)


def panels(record: dict[str, Any]) -> list[figures.Panel]:
    """The same as plots. What is exact up to rounding is left out of them."""
    told = (
        ("gaussian", "Gaussian, closed form", "2-Wasserstein to the exact law, relative", None),
        (
            "mixture",
            "Mixture of three, exact denoiser",
            "1-Wasserstein to the data",
            ("floor", "mixture_floor"),
        ),
        (
            "demo",
            "The demo's model",
            f"relative error against {REFERENCE} evaluations",
            ("floor of DDPM", "demo_floor_of_stochastic"),
        ),
    )
    return [
        figures.Panel(
            title=title,
            x="evaluations",
            y=y,
            lines={
                name: figures.Line(points=[(int(n), error) for n, error in line.items() if error > ROUNDING])
                for name, line in record[part].items()
            },
            level=(floor[0], record[floor[1]]) if floor else None,
            log="xy",
        )
        for part, title, y, floor in told
        if part in record
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200, help="of the demo; 0: closed forms alone")
    parser.add_argument("--evaluations", type=int, nargs="+", default=list(EVALUATIONS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, default=report.RESULTS)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    counts = args.evaluations
    gaussian = {name: {n: gaussian_error(sampler, n) for n in counts} for name, sampler in SAMPLERS.items()}
    usable = {name: sampler for name, sampler in SAMPLERS.items() if sampler.variance != "optimal"}
    mixture = {name: {n: mixture_error(sampler, n) for n in counts} for name, sampler in usable.items()}
    # What two independent sets of exact samples are apart: the best any sampler can measure here.
    points = mixture_points(2 * POINTS).flatten()
    mixture_floor = wasserstein(points[:POINTS], points[POINTS:])
    record: dict[str, Any] = {
        "question": __doc__.splitlines()[0],
        "machine": report.machine(args.threads),
        "gaussian": gaussian,
        "mixture": mixture,
        "mixture_floor": mixture_floor,
    }
    text = [
        "# Error against evaluations",
        "",
        "From relative noise 1 (t = 500 of 1000 on the cosine chain). ![plot](samplers.png)",
        "",
        "Gaussian data, 2-Wasserstein distance to the exact law over the deviation from the image:",
        "",
        rows(gaussian, counts),
        "",
        f"Mixture of three Gaussians, 1-Wasserstein distance to the data (floor {mixture_floor:.2g}):",
        "",
        rows(mixture, counts),
    ]
    if args.images:
        errors, floor = demo_errors(Demo(args.images, args.threads), counts)
        record |= {"demo": errors, "demo_floor_of_stochastic": floor, "demo_images": args.images}
        text += [
            "",
            f"The demo's model, {args.images} images, relative to what {REFERENCE} evaluations change:",
            f"difference of outputs (deterministic), error of the change's size (DDPM; floor {floor:.2g}):",
            "",
            rows(errors, counts),
        ]
    report.publish("samplers", record, "\n".join(text), folder=args.results)
    figures.draw(panels(record), args.results / "samplers.png")


if __name__ == "__main__":
    main()
