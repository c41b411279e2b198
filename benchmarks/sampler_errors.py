"""How far are outputs of a sampler from what they should be? What samplers.py asks. Not a benchmark itself."""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import peer_jobs
import peer_loops
import torch
from PIL import Image
from torch import Tensor

from boomerang_batch.config.pipeline import ClassLabels, ModelSpec
from boomerang_batch.diffusion.boomerang import KeyedNoise, boomerang
from boomerang_batch.diffusion.denoiser import Condition, Denoiser
from boomerang_batch.diffusion.noise import noise_key, seed_material
from boomerang_batch.diffusion.samplers import Solver, build_solver, jump, step
from boomerang_batch.diffusion.schedule import (
    NoiseLevels,
    Schedule,
    build_schedule,
    flow_levels,
    ve_levels,
    vp_levels,
)
from boomerang_batch.models import load_denoiser

REFERENCE = 200
TRAIN_STEPS = 1000
DATA_VARIANCE = 0.25
MIXTURE = ((0.3, -0.7, 0.1), (0.4, 0.1, 0.15), (0.3, 0.8, 0.05))
"""Weight, mean and standard deviation of each part."""
POINTS = 20_000


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
    "flow DPM-Solver++(2M)": Sampler(kind="flow", eta=0.0, order=2),
    "VE Euler": Sampler(kind="ve", eta=0.0),
}


def chain(kind: str) -> NoiseLevels:
    """The cosine chain, flow matching without a shift, or the geometric variance-exploding chain.

    All have relative noise 1 at half their length.
    """
    if kind == "flow":
        s = torch.arange(1, TRAIN_STEPS + 1, dtype=torch.float64) / TRAIN_STEPS
        return flow_levels(s, s * TRAIN_STEPS)
    if kind == "ve":
        return ve_levels(torch.logspace(-2, 2, TRAIN_STEPS, dtype=torch.float64), torch.arange(TRAIN_STEPS))
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
