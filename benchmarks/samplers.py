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

Flow samplers walk a flow-matching chain and so are in the closed forms alone. All steps are the project's own.
"""

from __future__ import annotations

import argparse
import io
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peer_jobs
import peer_loops
import plot
import report
import torch
from PIL import Image
from torch import Tensor

from boomerang_batch.config.pipeline import ClassLabels, ModelSpec
from boomerang_batch.diffusion.boomerang import KeyedNoise, boomerang
from boomerang_batch.diffusion.denoiser import Condition, Denoiser
from boomerang_batch.diffusion.noise import noise_key, seed_material
from boomerang_batch.diffusion.samplers import Solver, build_solver, jump, step
from boomerang_batch.diffusion.schedule import NoiseLevels, Schedule, build_schedule, flow_levels, vp_levels
from boomerang_batch.models import load_denoiser

EVALUATIONS = (2, 3, 5, 8, 12, 20, 35, 60, 100)
REFERENCE = 200
TRAIN_STEPS = 1000
DATA_VARIANCE = 0.25
MIXTURE = ((0.3, -0.7, 0.1), (0.4, 0.1, 0.15), (0.3, 0.8, 0.05))
"""Weight, mean and standard deviation of each part."""
POINTS = 20_000
ROUNDING = 1e-7


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """One way to walk back, in the recipe's terms."""

    kind: str
    eta: float
    order: int = 1
    variance: str = "fixed_small"


SAMPLERS = {
    "DDPM, ancestral": Sampler(kind="vp", eta=1.0),
    "DDPM, optimal variance": Sampler(kind="vp", eta=1.0, variance="optimal"),
    "DDIM": Sampler(kind="vp", eta=0.0),
    "DPM-Solver++(2M)": Sampler(kind="vp", eta=0.0, order=2),
    "flow ancestral": Sampler(kind="flow", eta=1.0),
    "flow Euler": Sampler(kind="flow", eta=0.0),
}


def chain(kind: str) -> NoiseLevels:
    """The cosine chain, or flow matching without a shift."""
    if kind == "flow":
        s = torch.arange(1, TRAIN_STEPS + 1, dtype=torch.float64) / TRAIN_STEPS
        return flow_levels(s, s * TRAIN_STEPS)
    from boomerang_batch.demo.train import build_scheduler

    return vp_levels(build_scheduler().alphas_cumprod)


def walk(levels: NoiseLevels, sampler: Sampler, n: int, *, prediction: str) -> tuple[Schedule, Solver]:
    """n evaluations from half the chain, evenly spaced."""
    half = TRAIN_STEPS // 2
    grid = tuple(round(half * i / n) - 1 for i in range(1, n + 1))
    schedule = build_schedule(levels, grid=grid, steps=n, t=("timestep", half), start="exact")
    solver = build_solver(
        schedule,
        prediction=prediction,
        eta=sampler.eta,
        order=sampler.order,
        variance=sampler.variance,
        data_variance=DATA_VARIANCE if sampler.variance == "optimal" else None,
    )
    if schedule.n != n:
        raise SystemExit(f"asked for {n} evaluations, got {schedule.n}")
    return schedule, solver


def walk_back(
    schedule: Schedule,
    solver: Solver,
    x_t: Tensor,
    clean: Callable[[Tensor, float, float], Tensor],
    draws: Callable[[int], Tensor],
) -> Tensor:
    """The project's step from the last node down, with `clean` (x_t, alpha, sigma) as the denoiser."""
    before = None
    for i in range(schedule.n, 0, -1):
        rows = solver.table[torch.full((len(x_t),), i)]
        output = clean(x_t, float(schedule.alpha[i]), float(schedule.sigma[i]))
        x_t, before = step(rows, x_t, output, draws(i), before)
    return x_t


def gaussian_error(sampler: Sampler, n: int) -> float:
    """2-Wasserstein distance of the output's law given its image to the exact one, for Gaussian data.

    The walk is linear, so unit impulses tell all: one in the image, in the jump's noise, in each step's.
    """
    schedule, solver = walk(chain(sampler.kind), sampler, n, prediction="sample")
    impulses = torch.eye(n + 2, dtype=torch.float64).view(n + 2, n + 2, 1, 1)
    start = torch.full((n + 2,), schedule.n)
    x_t = jump(solver.table[start], impulses[:, :1], impulses[:, 1:2])

    def clean(x: Tensor, alpha: float, sigma: float) -> Tensor:
        return x * alpha * DATA_VARIANCE / (alpha**2 * DATA_VARIANCE + sigma**2)

    response = walk_back(schedule, solver, x_t, clean, lambda i: impulses[:, 1 + i : 2 + i]).flatten()
    gain, deviation = float(response[0]), float(response[1:].norm())
    rho = DATA_VARIANCE / (DATA_VARIANCE + schedule.relative_sigma**2)
    exact_gain, exact_variance = (rho, 1 - rho**2) if sampler.eta else (math.sqrt(rho), 1 - rho)
    exact_deviation = math.sqrt(exact_variance * DATA_VARIANCE)
    distance = math.hypot((gain - exact_gain) * math.sqrt(DATA_VARIANCE), deviation - exact_deviation)
    return distance / math.sqrt((1 - exact_gain) ** 2 * DATA_VARIANCE + exact_deviation**2)


def mixture_points(count: int) -> Tensor:
    """`count` points of the mixture, (count, 1, 1, 1), in a random order."""
    draw = np.random.default_rng(0)
    part = draw.choice(len(MIXTURE), size=count, p=[weight for weight, _, _ in MIXTURE])
    _, mean, deviation = (np.array(column)[part] for column in zip(*MIXTURE, strict=True))
    return torch.from_numpy(mean + deviation * draw.standard_normal(count)).view(-1, 1, 1, 1)


def mixture_error(sampler: Sampler, n: int) -> float:
    """1-Wasserstein distance of outputs to their sources as sets."""
    schedule, solver = walk(chain(sampler.kind), sampler, n, prediction="sample")
    x_0 = mixture_points(POINTS)
    weight, mean, variance = torch.tensor([(w, m, d**2) for w, m, d in MIXTURE], dtype=torch.float64).T

    def clean(x: Tensor, alpha: float, sigma: float) -> Tensor:
        spread = alpha**2 * variance + sigma**2
        share = (weight.log() - 0.5 * spread.log() - (x - alpha * mean).square() / (2 * spread)).softmax(-1)
        return (share * (mean + alpha * variance / spread * (x - alpha * mean))).sum(-1, keepdim=True)

    draw = torch.Generator().manual_seed(1)
    eps = torch.randn(x_0.shape, generator=draw, dtype=torch.float64)
    x_t = jump(solver.table[torch.full((POINTS,), n)], x_0, eps)
    made = walk_back(
        schedule, solver, x_t, clean, lambda _: torch.randn(x_0.shape, generator=draw, dtype=torch.float64)
    )
    return wasserstein(made.flatten(), x_0.flatten())


def wasserstein(first: Tensor, second: Tensor) -> float:
    """The 1-Wasserstein distance of two sets of as many numbers."""
    return float((first.sort(-1).values - second.sort(-1).values).abs().mean())


class Demo:
    """The shipped model and the demo's first images."""

    def __init__(self, count: int, threads: int) -> None:
        labels = ClassLabels(null_label=peer_jobs.NULL_LABEL, guidance=1.0)
        spec = ModelSpec(source=peer_jobs.MODEL, patch_size=2, channels_last=True, class_labels=labels)
        self.denoiser: Denoiser = load_denoiser(spec, device="cpu", threads=threads)
        samples = peer_jobs.demo_samples(count)
        pictures = [Image.open(io.BytesIO(sample.fields["png"])).convert("L") for sample in samples]
        self.x_0 = torch.stack([peer_loops.to_x_0(picture) for picture in pictures])
        self.labels: list[Condition] = [int(sample.fields["cls"]) for sample in samples]

    def outputs(self, sampler: Sampler, n: int, *, seed: int = 0) -> Tensor:
        """What n evaluations make of the images, without clamping, under a seed of their noise."""
        schedule, solver = walk(self.denoiser.spec.levels, sampler, n, prediction=self.denoiser.spec.prediction)
        made = []
        for first in range(0, len(self.x_0), 50):
            x_0 = self.x_0[first : first + 50]
            keys = [
                noise_key(seed_material(seed), identity=str(first + i).encode(), variant=0)
                for i in range(len(x_0))
            ]
            conditions = self.labels[first : first + 50]
            made.append(boomerang(x_0, self.denoiser, schedule, solver, KeyedNoise(keys, x_0), conditions))
        return torch.cat(made)

    def change(self, made: Tensor) -> float:
        """How far outputs lie from their sources, root mean square."""
        return rms(made - self.x_0)


def rms(values: Tensor) -> float:
    """Root mean square."""
    return float(values.square().mean().sqrt())


def demo_errors(demo: Demo, evaluations: Sequence[int]) -> tuple[dict[str, dict[int, float]], float]:
    """Errors of each sampler of the model's own chain, and the floor of the stochastic ones."""
    found: dict[str, dict[int, float]] = {}
    floor = 0.0
    # One reference for all deterministic samplers: they solve one equation, and 2M solves it best.
    exact = demo.outputs(SAMPLERS["DPM-Solver++(2M)"], REFERENCE)
    for name, sampler in SAMPLERS.items():
        if sampler.kind != "vp" or sampler.variance == "optimal":  # the demo's data variance is no one number
            continue
        if sampler.eta:
            change, other = (demo.change(demo.outputs(sampler, REFERENCE, seed=seed)) for seed in (0, 1))
            floor = abs(other / change - 1)
        found[name] = {}
        for n in evaluations:
            made = demo.outputs(sampler, n)
            error = (
                abs(demo.change(made) / change - 1) if sampler.eta else rms(made - exact) / demo.change(exact)
            )
            found[name][n] = round(error, 6)
            print(f"{name}, {n} evaluations: {error:.5f}", file=sys.stderr, flush=True)
    return found, floor


def rows(errors: dict[str, dict[int, float]], evaluations: Sequence[int]) -> str:
    """A table: samplers down, evaluations across."""
    body = [[name, *(f"{line[n]:.2g}" for n in evaluations)] for name, line in errors.items()]
    return report.table(["sampler", *map(str, evaluations)], body)


def panel(title: str, y: str, errors: dict[str, dict[int, float]], floor: float | None = None) -> plot.Panel:
    """The same as a plot. What is exact up to rounding is left out of it."""
    lines = {
        name: [(n, error) for n, error in line.items() if error > ROUNDING]
        for name, line in errors.items()
        if max(line.values()) > ROUNDING
    }
    return plot.Panel(title=title, x="evaluations", y=y, lines=lines, floor=("floor", floor) if floor else None)


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
    panels = [
        panel("Gaussian, closed form", "2-Wasserstein to the exact law, relative", gaussian),
        panel("Mixture of three, exact denoiser", "1-Wasserstein to the data", mixture, mixture_floor),
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
        panels.append(
            panel("The demo's model", f"relative error against {REFERENCE} evaluations", errors, floor)
        )
    args.results.mkdir(parents=True, exist_ok=True)
    plot.draw(panels, args.results / "samplers.png")
    report.publish("samplers", record, "\n".join(text), folder=args.results)


if __name__ == "__main__":
    main()
