"""Train a small denoiser of photographs for the super-resolution benchmark. Not a benchmark itself.

    python benchmarks/photographs.py .cache/photographs ...
    OMP_NUM_THREADS=1 nice -n 19 python benchmarks/photo_model.py train --minutes 75
    python benchmarks/photo_model.py export .cache/photo-model/model
    python benchmarks/photo_model.py score .cache/photo-model/model

A UNet on 64x64 RGB patches folded by space-to-depth into (12, 32, 32), v-prediction on the cosine schedule,
as the shipped demo's. Patches come from photographs at full and at half size, mirrored at random. All
timesteps drawn lie in the lower half of the chain, most of them low in it, for that is where enlarging images
uses them: this model does not generate from pure noise. Resumable: checkpoints, and batch, noise and
timesteps keyed by the step. The rate stays flat until the last fifth of `--minutes`, which later calls may
prolong.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from boomerang_batch.demo.train import build_scheduler

SIDE = 64
FOLD = 2
BATCH = 16
HIGHEST = 500
"""Timesteps at and above this are never trained on; the chain has 1000."""
PEAK_RATE = 8e-4
WARMUP_STEPS = 200
DECAY_SHARE = 0.2
EMA_DECAY = 0.998
SEED = 20221013
CHECKPOINT_EVERY = 100
BLOCK_OUT_CHANNELS = (48, 80, 112)


def build_network() -> Any:
    """The untrained UNet2DModel: (B, 12, 32, 32) in, v of the same shape out; any multiple of 8 pixels goes."""
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=SIDE // FOLD,
        in_channels=3 * FOLD**2,
        out_channels=3 * FOLD**2,
        layers_per_block=1,
        block_out_channels=BLOCK_OUT_CHANNELS,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        attention_head_dim=28,
        norm_num_groups=16,
    )


def load_photographs(folder: Path) -> list[torch.Tensor]:
    """Each photograph of `folder` as uint8 (3, H, W), and again at half its size."""
    found = []
    for path in sorted(folder.glob("*.png")):
        with Image.open(path) as image:
            pixels = image.convert("RGB")
        for version in (pixels, pixels.resize((pixels.width // 2, pixels.height // 2), Image.Resampling.BOX)):
            if min(version.size) >= SIDE:
                found.append(torch.from_numpy(np.array(version)).permute(2, 0, 1).contiguous())
    if not found:
        raise SystemExit(f"no photographs in {folder}: run benchmarks/photographs.py first")
    return found


def patches(photographs: list[torch.Tensor], count: int, draw: np.random.Generator) -> torch.Tensor:
    """`count` folded patches (count, 12, 32, 32) in [-1, 1], drawn in proportion to area."""
    area = np.array([pixels.shape[1] * pixels.shape[2] for pixels in photographs], np.float64)
    made = []
    for index in draw.choice(len(photographs), size=count, p=area / area.sum()):
        pixels = photographs[index]
        top = draw.integers(pixels.shape[1] - SIDE + 1)
        left = draw.integers(pixels.shape[2] - SIDE + 1)
        patch = pixels[:, top : top + SIDE, left : left + SIDE].float()
        made.append(patch.flip(2) if draw.random() < 0.5 else patch)
    return functional.pixel_unshuffle(torch.stack(made).div(127.5).sub(1), FOLD)


def batch_at(step: int, photographs: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Batch `step`: patches, timesteps (stratified, more of the low ones) and noise."""
    x_0 = patches(photographs, BATCH, np.random.default_rng((SEED, step)))
    draw = torch.Generator().manual_seed(SEED * 1_000_003 + step)
    strata = (torch.arange(BATCH) + torch.rand(BATCH, generator=draw)) / BATCH
    return x_0, (strata**1.5 * HIGHEST).long(), torch.randn(x_0.shape, generator=draw)


def loss_of(net: Any, x_0: torch.Tensor, t: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    """Mean squared error (B,) of v = alpha * eps - sigma * x_0."""
    alpha_bar = build_scheduler().alphas_cumprod.float()[t].view(-1, 1, 1, 1)
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    x_t = (alpha * x_0 + sigma * eps).contiguous(memory_format=torch.channels_last)
    return (net(x_t, t).sample - (alpha * eps - sigma * x_0)).square().mean((1, 2, 3))


def rate_at(step: int, spent_s: float, budget_s: float) -> float:
    """Warm-up by steps, flat, then linear to zero over the last fifth of the time."""
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    left = max(0.0, budget_s - spent_s) / (DECAY_SHARE * budget_s)
    return PEAK_RATE * warm * min(1.0, left)


def save(path: Path, state: dict[str, Any]) -> None:
    """Replace the checkpoint whole."""
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def train(folder: Path, work: Path, budget_s: float) -> None:
    """Train until `budget_s` CPU seconds are spent, those of earlier calls counted."""
    work.mkdir(parents=True, exist_ok=True)
    photographs = load_photographs(folder / "train")
    torch.manual_seed(SEED)
    net = build_network().to(memory_format=torch.channels_last).train()
    ema = copy.deepcopy(net).eval()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1.0, betas=(0.9, 0.99), weight_decay=0.01)
    step, spent, curve = 0, 0.0, []
    checkpoint = work / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        net.load_state_dict(state["net"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent, curve = state["step"], state["seconds"], state["curve"]
    weights = sum(weight.numel() for weight in net.parameters())
    print(f"{weights} weights, {len(photographs)} photographs and halves, from step {step}", flush=True)

    running: list[float] = []
    before, since = spent, time.process_time()
    while spent < budget_s:
        loss = loss_of(net, *batch_at(step, photographs)).mean()
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, spent, budget_s)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        decay = min(EMA_DECAY, (step + 1) / (step + 10))
        with torch.no_grad():
            for average, weight in zip(ema.parameters(), net.parameters(), strict=True):
                average.lerp_(weight, 1 - decay)
        running.append(loss.item())
        step, spent = step + 1, before + time.process_time() - since
        if step % 50 == 0:
            curve.append([step, round(float(np.mean(running)), 5)])
            running.clear()
            print(f"step {step} loss {curve[-1][1]:.4f} {spent:.0f}/{budget_s:.0f} s", flush=True)
        if step % CHECKPOINT_EVERY == 0 or spent >= budget_s:
            state = {"net": net.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict()}
            save(checkpoint, state | {"step": step, "seconds": spent, "curve": curve})


def export(work: Path, out: Path) -> None:
    """Write the averaged weights as a diffusers folder, in half precision."""
    state = torch.load(work / "checkpoint.pt", weights_only=True)
    net = build_network()
    net.load_state_dict(state["ema"])
    net.half().save_pretrained(out / "unet", safe_serialization=True)
    build_scheduler().save_pretrained(out / "scheduler")
    index = {"_class_name": "DDPMPipeline", "scheduler": ["diffusers", "DDPMScheduler"]}
    (out / "model_index.json").write_text(
        json.dumps(index | {"unet": ["diffusers", "UNet2DModel"]}, indent=2) + "\n"
    )
    record = {
        "steps": state["step"],
        "batch": BATCH,
        "seconds": round(state["seconds"]),
        "loss": state["curve"],
    }
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n")


def score(folder: Path, model: Path, count: int = 256) -> dict[str, float]:
    """PSNR in dB of x_0 guessed from x_t in one evaluation, on the held-out photographs, at several t."""
    from diffusers import UNet2DModel

    net = UNet2DModel.from_pretrained(model / "unet", torch_dtype=torch.float32).eval()
    x_0 = patches(load_photographs(folder / "test"), count, np.random.default_rng(SEED))
    alpha_bar = build_scheduler().alphas_cumprod.float()
    found = {}
    for step in (20, 50, 100, 200, 300, 400):
        t = torch.full((count,), step)
        eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(step))
        alpha, sigma = alpha_bar[step].sqrt(), (1 - alpha_bar[step]).sqrt()
        with torch.no_grad():
            v = torch.cat(
                [
                    net(alpha * x + sigma * e, when).sample
                    for x, e, when in zip(x_0.split(32), eps.split(32), t.split(32), strict=True)
                ]
            )
        guess = alpha * (alpha * x_0 + sigma * eps) - sigma * v
        error = (guess.clamp(-1, 1) - x_0).square().mean().item() / 4
        noise = ((sigma / alpha).item() / 2) ** 2
        found[str(step)] = round(-10 * math.log10(error), 2)
        print(
            f"t {step}: noise at {-10 * math.log10(noise):.2f} dB, guess at {found[str(step)]:.2f} dB",
            file=sys.stderr,
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", type=Path, default=Path(".cache/photographs"))
    parser.add_argument("--work", type=Path, default=Path(".cache/photo-model"))
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("train").add_argument(
        "--minutes", type=float, default=75.0, help="of CPU time, earlier calls included"
    )
    verbs.add_parser("export").add_argument("model", type=Path)
    verbs.add_parser("score").add_argument("model", type=Path)
    args = parser.parse_args()
    if args.verb == "train":
        train(args.photographs, args.work, args.minutes * 60)
    elif args.verb == "export":
        export(args.work, args.model)
    else:
        print(json.dumps(score(args.photographs, args.model)))


if __name__ == "__main__":
    main()
