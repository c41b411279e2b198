"""How the benchmarks train small denoisers: v-prediction on the cosine schedule. Not a benchmark itself.

For scripts that say what the network is and what it sees. Resumable: a checkpoint about once a minute, and
all that is random keyed by the step. The rate stays flat until the last fifth of the budget, which later calls
may prolong.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from boomerang_batch.demo.learning import CURVE_STEPS, Learner, export_pipeline
from boomerang_batch.demo.train import build_scheduler

PEAK_RATE = 8e-4
WARMUP_STEPS = 200
DECAY_SHARE = 0.2
EMA_DECAY = 0.998
CHECKPOINT_S = 60.0

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""x_0 (B, C, H, W) in [-1, 1], timesteps (B,) and noise of the shape of x_0."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One model: how it is built and trained, and where."""

    build: Callable[[], Any]
    """The untrained UNet2DModel, which says v."""
    seed: int
    batch: int
    work: Path
    half: bool = False
    """Whether it is exported in half precision."""


def verbs(parser: argparse.ArgumentParser, *, minutes: float) -> None:
    """What such a script can be asked for: `train`, `export` and `score`, with their options."""
    found = parser.add_subparsers(dest="verb", required=True)
    trained = found.add_parser("train")
    trained.add_argument("--minutes", type=float, default=minutes, help="of CPU time, earlier calls included")
    trained.add_argument("--export-every", type=float, default=5.0, help="into WORK/model, CPU minutes")
    found.add_parser("export").add_argument("model", type=Path)
    found.add_parser("score").add_argument("model", type=Path)


def strata_and_noise(plan: Plan, step: int, x_0: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a step: one number (B,) in each of B equal parts of [0, 1), for timesteps, and noise like `x_0`."""
    draw = torch.Generator().manual_seed(plan.seed * 1_000_003 + step)
    strata = (torch.arange(plan.batch) + torch.rand(plan.batch, generator=draw)) / plan.batch
    return strata, torch.randn(x_0.shape, generator=draw)


def train(plan: Plan, batch_at: Callable[[int], Batch], *, budget_s: float, export_every_s: float) -> None:
    """Train until `budget_s` CPU seconds are spent, those of earlier calls counted; export into WORK/model."""
    learner = Learner(
        plan.build, _checkpoint(plan), seed=plan.seed, ema_decay=EMA_DECAY, weight_decay=0.01, grad_clip=1.0
    )
    weights = sum(weight.numel() for weight in learner.net.parameters())
    print(f"{weights} weights, from step {learner.step}", flush=True)
    began = time.process_time() - learner.seconds
    kept, exported = time.monotonic(), learner.seconds
    while learner.seconds < budget_s:
        loss = _loss(learner.net, *batch_at(learner.step)).mean()
        learner.learn(loss, rate=_rate(learner.step, learner.seconds, budget_s))
        learner.seconds = spent = time.process_time() - began
        if learner.step % CURVE_STEPS == 0:
            told = f"loss {learner.curve[-1][1]:.4f} {spent:.0f}/{budget_s:.0f} s"
            print(f"step {learner.step} {told}", flush=True)
        if time.monotonic() - kept >= CHECKPOINT_S or spent >= budget_s:
            kept = time.monotonic()
            learner.keep()
            if spent - exported >= export_every_s or spent >= budget_s:
                exported = spent
                export(plan, plan.work / "model")


def export(plan: Plan, out: Path) -> None:
    """Write the averaged weights of the last checkpoint as a diffusers folder, with what the loss did."""
    state = torch.load(_checkpoint(plan), weights_only=True)
    with torch.random.fork_rng():
        net = plan.build()
    net.load_state_dict(state["ema"])
    record = {
        "steps": state["step"],
        "batch": plan.batch,
        "seconds": round(state["seconds"]),
        "loss": state["curve"],
    }
    export_pipeline(net.half() if plan.half else net, build_scheduler(), record, out)


def score(
    model: Path, groups: Mapping[str, torch.Tensor], timesteps: Sequence[int]
) -> dict[str, dict[str, float]]:
    """PSNR in dB of x_0 guessed from x_t in one evaluation, for each group of x_0 at several t."""
    from diffusers import UNet2DModel

    net = UNet2DModel.from_pretrained(model / "unet", torch_dtype=torch.float32).eval()
    alpha_bar = build_scheduler().alphas_cumprod.float()
    found: dict[str, dict[str, float]] = {name: {} for name in groups}
    for name, x_0 in groups.items():
        for step in timesteps:
            eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(step))
            alpha, sigma = alpha_bar[step].sqrt(), (1 - alpha_bar[step]).sqrt()
            x_t = alpha * x_0 + sigma * eps
            with torch.no_grad():
                v = torch.cat([net(part, torch.full((len(part),), step)).sample for part in x_t.split(32)])
            guess, noisy = (alpha * x_t - sigma * v).clamp(-1, 1), x_t / alpha
            found[name][str(step)] = _psnr(guess, x_0)
            line = f"{name}, t {step}: noise at {_psnr(noisy, x_0)} dB, guess at {_psnr(guess, x_0)} dB"
            print(line, file=sys.stderr)
    return found


def _checkpoint(plan: Plan) -> Path:
    return plan.work / "checkpoint.pt"


def _loss(net: Any, x_0: torch.Tensor, t: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    """Mean squared error (B,) of v = alpha * eps - sigma * x_0."""
    alpha_bar = build_scheduler().alphas_cumprod.float()[t].view(-1, 1, 1, 1)
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    x_t = (alpha * x_0 + sigma * eps).contiguous(memory_format=torch.channels_last)
    return (net(x_t, t).sample - (alpha * eps - sigma * x_0)).square().mean((1, 2, 3))


def _rate(step: int, spent_s: float, budget_s: float) -> float:
    """Warm-up by steps, flat, then linear to zero over the last fifth of the time."""
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    left = max(0.0, budget_s - spent_s) / (DECAY_SHARE * budget_s)
    return PEAK_RATE * warm * min(1.0, left)


def _psnr(guess: torch.Tensor, truth: torch.Tensor) -> float:
    """In dB, of values in [-1, 1]."""
    return round(-10 * math.log10((guess - truth).square().mean().item() / 4), 2)
