"""Train a small denoiser of photographs for the super-resolution benchmark. Not a benchmark itself.

    python benchmarks/photographs.py .cache/photographs ...
    OMP_NUM_THREADS=1 nice -n 19 python benchmarks/photo_model.py train --minutes 75
    python benchmarks/photo_model.py export .cache/photo-model/model
    python benchmarks/photo_model.py score .cache/photo-model/model

A UNet on 64x64 RGB patches folded by space-to-depth into (12, 32, 32), v-prediction on the cosine schedule,
as the shipped demo's. Patches come from photographs at full and at half size, mirrored at random. All
timesteps drawn lie in the lower half of the chain, most of them low in it, for that is where enlarging images
uses them: this model does not generate from pure noise. How it is trained: denoiser_training.py.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import denoiser_training
import numpy as np
import torch
from denoiser_training import Batch, Plan, strata_and_noise
from PIL import Image
from torch.nn import functional

SIDE = 64
FOLD = 2
BATCH = 16
HIGHEST = 500
"""Timesteps at and above this are never trained on; the chain has 1000."""
SEED = 20221013
SCORED, SCORED_AT = 256, (20, 50, 100, 200, 300, 400)
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


def batch_at(plan: Plan, photographs: list[torch.Tensor], step: int) -> Batch:
    """Batch `step`: patches, timesteps (stratified, more of the low ones) and noise."""
    x_0 = patches(photographs, plan.batch, np.random.default_rng((plan.seed, step)))
    strata, noise = strata_and_noise(plan, step, x_0)
    return x_0, (strata**1.5 * HIGHEST).long(), noise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", type=Path, default=Path(".cache/photographs"))
    parser.add_argument("--work", type=Path, default=Path(".cache/photo-model"))
    denoiser_training.verbs(parser, minutes=75.0)
    args = parser.parse_args()
    plan = Plan(build=build_network, seed=SEED, batch=BATCH, work=args.work, half=True)
    if args.verb == "train":
        batches = partial(batch_at, plan, load_photographs(args.photographs / "train"))
        denoiser_training.train(
            plan, batches, budget_s=args.minutes * 60, export_every_s=args.export_every * 60
        )
    elif args.verb == "export":
        denoiser_training.export(plan, args.model)
    else:
        held_out = load_photographs(args.photographs / "test")
        groups = {"held out": patches(held_out, SCORED, np.random.default_rng(SEED))}
        print(json.dumps(denoiser_training.score(args.model, groups, SCORED_AT)))


if __name__ == "__main__":
    main()
