"""Train a small denoiser of faces for the faces benchmark. Not a benchmark itself.

    python benchmarks/olivetti.py .cache/olivetti
    OMP_NUM_THREADS=1 nice -n 19 python benchmarks/face_model.py train --minutes 60
    python benchmarks/face_model.py export .cache/face-model/model
    python benchmarks/face_model.py score .cache/face-model/model

A UNet on 64x64 grey faces folded by space-to-depth into (16, 16, 16), v-prediction on the cosine schedule, as
the shipped demo's. It sees 200 photographs, all of 20 people, mirrored at random and moved by up to two pixels:
so few that it will learn them by heart to some degree, which the benchmark counts. Resumable: checkpoints once
a minute, and batch, noise and timesteps keyed by the step. The rate stays flat until the last fifth of
`--minutes`, which later calls may prolong. `--export-every` keeps the exported model current while it trains.
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
import olivetti
import torch
from photo_model import loss_of, rate_at, save
from torch.nn import functional

from boomerang_batch.demo.train import build_scheduler

FOLD = 4
BATCH = 16
MARGIN = 2
EMA_DECAY = 0.998
SEED = 20221014
CHECKPOINT_S = 60.0
BLOCK_OUT_CHANNELS = (64, 96, 128)


def build_network() -> Any:
    """The untrained UNet2DModel: (B, 16, 16, 16) in, v of the same shape out."""
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=olivetti.SIDE // FOLD,
        in_channels=FOLD**2,
        out_channels=FOLD**2,
        layers_per_block=1,
        block_out_channels=BLOCK_OUT_CHANNELS,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=32,
        norm_num_groups=16,
    )


def fold(images: np.ndarray) -> torch.Tensor:
    """uint8 (N, 64, 64, 1) to float (N, 16, 16, 16) in [-1, 1]."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    return functional.pixel_unshuffle(pixels.div(127.5).sub(1), FOLD)


def batch_at(step: int, faces: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Batch `step`: faces (every epoch its own order), timesteps (stratified) and noise."""
    epoch, slot = divmod(step, len(faces) // BATCH)
    order = np.random.default_rng((SEED, epoch)).permutation(len(faces))
    draw = np.random.default_rng((SEED, epoch, slot))
    moved = []
    for index in order[slot * BATCH : (slot + 1) * BATCH]:
        wide = np.pad(faces[index], ((MARGIN, MARGIN), (MARGIN, MARGIN), (0, 0)), mode="edge")
        top, left = draw.integers(2 * MARGIN + 1, size=2)
        face = wide[top : top + olivetti.SIDE, left : left + olivetti.SIDE]
        moved.append(face[:, ::-1] if draw.random() < 0.5 else face)
    x_0 = fold(np.stack(moved))
    noise = torch.Generator().manual_seed(SEED * 1_000_003 + step)
    strata = (torch.arange(BATCH) + torch.rand(BATCH, generator=noise)) / BATCH
    return x_0, (strata * 1000).long(), torch.randn(x_0.shape, generator=noise)


def train(faces: np.ndarray, work: Path, budget_s: float, export_every_s: float) -> None:
    """Train until `budget_s` CPU seconds are spent, those of earlier calls counted."""
    work.mkdir(parents=True, exist_ok=True)
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
    print(f"{weights} weights, {len(faces)} faces, from step {step}", flush=True)

    running: list[float] = []
    before, since = spent, time.process_time()
    kept, exported = time.monotonic(), spent
    while spent < budget_s:
        loss = loss_of(net, *batch_at(step, faces)).mean()
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
        if time.monotonic() - kept >= CHECKPOINT_S or spent >= budget_s:
            kept = time.monotonic()
            state = {"net": net.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict()}
            save(checkpoint, state | {"step": step, "seconds": spent, "curve": curve})
            if spent - exported >= export_every_s or spent >= budget_s:
                exported = spent
                export(work, work / "model")


def export(work: Path, out: Path) -> None:
    """Write the averaged weights as a diffusers folder."""
    state = torch.load(work / "checkpoint.pt", weights_only=True)
    with torch.random.fork_rng():
        net = build_network()
    net.load_state_dict(state["ema"])
    net.save_pretrained(out / "unet", safe_serialization=True)
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


def score(model: Path, groups: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """PSNR in dB of x_0 guessed from x_t in one evaluation, for each group of faces at several t.

    How much better the training faces are guessed than others tells how far they are known by heart.
    """
    from diffusers import UNet2DModel

    net = UNet2DModel.from_pretrained(model / "unet", torch_dtype=torch.float32).eval()
    alpha_bar = build_scheduler().alphas_cumprod.float()
    found: dict[str, dict[str, float]] = {}
    for name, faces in groups.items():
        x_0 = fold(faces)
        found[name] = {}
        for step in (50, 200, 400, 600, 800):
            eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(step))
            alpha, sigma = alpha_bar[step].sqrt(), (1 - alpha_bar[step]).sqrt()
            x_t = alpha * x_0 + sigma * eps
            with torch.no_grad():
                v = torch.cat([net(part, torch.full((len(part),), step)).sample for part in x_t.split(32)])
            error = ((alpha * x_t - sigma * v).clamp(-1, 1) - x_0).square().mean().item() / 4
            found[name][str(step)] = round(-10 * math.log10(error), 2)
        print(f"{name}: {found[name]}", file=sys.stderr)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faces", type=Path, default=Path(".cache/olivetti"))
    parser.add_argument("--work", type=Path, default=Path(".cache/face-model"))
    verbs = parser.add_subparsers(dest="verb", required=True)
    trained = verbs.add_parser("train")
    trained.add_argument("--minutes", type=float, default=60.0, help="of CPU time, earlier calls included")
    trained.add_argument("--export-every", type=float, default=5.0, help="into WORK/model, CPU minutes")
    verbs.add_parser("export").add_argument("model", type=Path)
    verbs.add_parser("score").add_argument("model", type=Path)
    args = parser.parse_args()
    seen, unseen = olivetti.trained_and_held_out(olivetti.read(args.faces))
    if args.verb == "train":
        train(seen.images, args.work, args.minutes * 60, args.export_every * 60)
    elif args.verb == "export":
        export(args.work, args.model)
    else:
        print(json.dumps(score(args.model, {"trained on": seen.images, "held out": unseen.images})))


if __name__ == "__main__":
    main()
