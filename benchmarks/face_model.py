"""Train a small denoiser of faces for the faces benchmark. Not a benchmark itself.

    python benchmarks/olivetti.py .cache/olivetti
    OMP_NUM_THREADS=1 nice -n 19 python benchmarks/face_model.py train --minutes 60
    python benchmarks/face_model.py export .cache/face-model/model
    python benchmarks/face_model.py score .cache/face-model/model

A UNet on 64x64 grey faces folded by space-to-depth into (16, 16, 16), v-prediction on the cosine schedule, as
the shipped demo's. It sees 200 photographs, all of 20 people, mirrored at random and moved by up to two pixels:
so few that it will learn them by heart to some degree, which the benchmark counts, and `score` shows by how
much better they are guessed than others. How it is trained: denoiser_training.py. `--export-every` keeps the
exported model current meanwhile.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import denoiser_training
import numpy as np
import olivetti
import torch
from denoiser_training import Batch, Plan, strata_and_noise
from torch.nn import functional

FOLD = 4
BATCH = 16
MARGIN = 2
SEED = 20221014
SCORED_AT = (50, 200, 400, 600, 800)
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


def batch_at(plan: Plan, faces: np.ndarray, step: int) -> Batch:
    """Batch `step`: faces (every epoch its own order), timesteps (stratified) and noise."""
    epoch, slot = divmod(step, len(faces) // plan.batch)
    order = np.random.default_rng((plan.seed, epoch)).permutation(len(faces))
    draw = np.random.default_rng((plan.seed, epoch, slot))
    moved = []
    for index in order[slot * plan.batch : (slot + 1) * plan.batch]:
        wide = np.pad(faces[index], ((MARGIN, MARGIN), (MARGIN, MARGIN), (0, 0)), mode="edge")
        top, left = draw.integers(2 * MARGIN + 1, size=2)
        face = wide[top : top + olivetti.SIDE, left : left + olivetti.SIDE]
        moved.append(face[:, ::-1] if draw.random() < 0.5 else face)
    x_0 = fold(np.stack(moved))
    strata, noise = strata_and_noise(plan, step, x_0)
    return x_0, (strata * 1000).long(), noise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faces", type=Path, default=Path(".cache/olivetti"))
    parser.add_argument("--work", type=Path, default=Path(".cache/face-model"))
    denoiser_training.verbs(parser, minutes=60.0)
    args = parser.parse_args()
    seen, unseen = olivetti.trained_and_held_out(olivetti.read(args.faces))
    plan = Plan(build=build_network, seed=SEED, batch=BATCH, work=args.work)
    if args.verb == "train":
        batches = partial(batch_at, plan, seen.images)
        denoiser_training.train(
            plan, batches, budget_s=args.minutes * 60, export_every_s=args.export_every * 60
        )
    elif args.verb == "export":
        denoiser_training.export(plan, args.model)
    else:
        groups = {"trained on": fold(seen.images), "held out": fold(unseen.images)}
        print(json.dumps(denoiser_training.score(args.model, groups, SCORED_AT)))


if __name__ == "__main__":
    main()
