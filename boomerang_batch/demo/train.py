"""Train the demo's denoiser: a class-conditional, patched UNet on Fashion-MNIST's training split.

One command, resumable at every checkpoint:

    python -m boomerang_batch.demo.train --data FOLDER_WITH_IDX_GZ --work .cache/demo-train --steps 9000

The network sees 28x28 pixels padded to 32x32 and folded by space-to-depth into (4, 16, 16), the Patched
Diffusion idea, and predicts v (arXiv 2202.00512) on the cosine schedule (arXiv 2102.09672). The learning
rate warms up, stays flat and decays over the last fifth, so a run can be prolonged by a larger `--steps`.
`--export` writes the averaged weights as a diffusers folder: fp16 safetensors, settings and loss curve.
"""

from __future__ import annotations

import argparse
import gzip
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional

from boomerang_batch.demo.learning import CURVE_STEPS, Learner, export_pipeline

if TYPE_CHECKING:
    from numpy.typing import NDArray

CHECKPOINT = "checkpoint.pt"
SETTINGS: dict[str, Any] = {
    "block_out_channels": [48, 96, 128],
    "layers_per_block": 1,
    "attention_head_dim": 32,
    "norm_num_groups": 16,
    "patch_size": 2,
    "padded_size": 32,
    "classes": 10,
    "label_drop": 0.15,
    "train_timesteps": 1000,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
    "batch_size": 64,
    "learning_rate": 5e-4,
    "warmup_steps": 300,
    "decay_share": 0.2,
    "weight_decay": 0.01,
    "ema_decay": 0.9985,
    "grad_clip": 1.0,
    "seed": 20221012,
}


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Read one gzip'd IDX file of unsigned bytes (the format of MNIST and Fashion-MNIST)."""
    raw = gzip.decompress(path.read_bytes())
    shape = np.frombuffer(raw, ">u4", count=raw[3], offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape.tolist())


def fold(pixels: NDArray[np.uint8]) -> torch.Tensor:
    """uint8 (N, 28, 28) to float (N, 4, 16, 16) in [-1, 1]: pad with black, then space-to-depth."""
    margin = (SETTINGS["padded_size"] - pixels.shape[-1]) // 2
    x_0 = torch.from_numpy(pixels.copy()).float().div(127.5).sub(1).unsqueeze(1)
    x_0 = functional.pad(x_0, [margin] * 4, value=-1.0)
    return functional.pixel_unshuffle(x_0, SETTINGS["patch_size"])


def build_network() -> Any:
    """The untrained UNet2DModel: folded pixels in, v out, and a class row more for the null label."""
    from diffusers import UNet2DModel

    folded = SETTINGS["patch_size"] ** 2
    return UNet2DModel(
        sample_size=SETTINGS["padded_size"] // SETTINGS["patch_size"],
        in_channels=folded,
        out_channels=folded,
        layers_per_block=SETTINGS["layers_per_block"],
        block_out_channels=tuple(SETTINGS["block_out_channels"]),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=SETTINGS["attention_head_dim"],
        norm_num_groups=SETTINGS["norm_num_groups"],
        num_class_embeds=SETTINGS["classes"] + 1,
    )


def build_scheduler() -> Any:
    """The noise scheduler, whose configuration travels with the model."""
    from diffusers import DDPMScheduler

    return DDPMScheduler(
        num_train_timesteps=SETTINGS["train_timesteps"],
        beta_schedule=SETTINGS["beta_schedule"],
        prediction_type=SETTINGS["prediction_type"],
        variance_type="fixed_small",
        clip_sample=True,
    )


def learning_rate(step: int, steps: int) -> float:
    """Warm-up, flat, then linear to zero over the last `decay_share` of the run."""
    warm = min(1.0, (step + 1) / SETTINGS["warmup_steps"])
    left = (steps - step) / max(1.0, SETTINGS["decay_share"] * steps)
    return float(SETTINGS["learning_rate"] * warm * min(1.0, left))


def batch_at(step: int, count: int) -> NDArray[np.int64]:
    """The indices of batch `step`: each epoch its own permutation, so a resumed run sees the same data."""
    size: int = SETTINGS["batch_size"]
    epoch, slot = divmod(step, count // size)
    order = np.random.default_rng((SETTINGS["seed"], epoch)).permutation(count)
    return order[slot * size : (slot + 1) * size]


def train(data: Path, work: Path, steps: int, checkpoint_every: int) -> None:
    """Train up to step `steps`, going on from the checkpoint in `work` if there is one."""
    images = fold(read_idx(data / "train-images-idx3-ubyte.gz"))
    labels = torch.from_numpy(read_idx(data / "train-labels-idx1-ubyte.gz").astype(np.int64))
    learner = Learner(
        build_network,
        work / CHECKPOINT,
        seed=SETTINGS["seed"],
        ema_decay=SETTINGS["ema_decay"],
        weight_decay=SETTINGS["weight_decay"],
        grad_clip=SETTINGS["grad_clip"],
    )
    alpha_bar = build_scheduler().alphas_cumprod.float()
    began = time.monotonic() - learner.seconds
    while (step := learner.step) < steps:
        # Draw this step's batch, timesteps (stratified over the batch) and noise from the step's own seed.
        draw = torch.Generator().manual_seed(SETTINGS["seed"] * 1_000_003 + step)
        index = torch.from_numpy(batch_at(step, len(images)))
        x_0, label = images[index], labels[index].clone()
        size = len(index)
        strata = (torch.arange(size) + torch.rand(size, generator=draw)) / size
        t = (strata * SETTINGS["train_timesteps"]).long()
        label[torch.rand(size, generator=draw) < SETTINGS["label_drop"]] = SETTINGS["classes"]
        eps = torch.randn(x_0.shape, generator=draw)

        # Predict v = alpha * eps - sigma * x_0 from x_t = alpha * x_0 + sigma * eps.
        alpha = alpha_bar[t].sqrt().view(-1, 1, 1, 1)
        sigma = (1 - alpha_bar[t]).sqrt().view(-1, 1, 1, 1)
        x_t = (alpha * x_0 + sigma * eps).contiguous(memory_format=torch.channels_last)
        loss = functional.mse_loss(learner.net(x_t, t, label).sample, alpha * eps - sigma * x_0)
        learner.learn(loss, rate=learning_rate(step, steps))

        learner.seconds = time.monotonic() - began
        done = learner.step
        if done % CURVE_STEPS == 0:
            told = f"loss {learner.curve[-1][1]:.4f} {learner.seconds / done:.2f} s/step"
            print(f"step {done}/{steps} {told}", flush=True)
        if done % checkpoint_every == 0 or done == steps:
            learner.keep()


def export(work: Path, out: Path) -> None:
    """Write the averaged weights as a diffusers folder, with what was set and what the loss did."""
    state = torch.load(work / CHECKPOINT, weights_only=True)
    net = build_network()
    net.load_state_dict(state["ema"])
    record: dict[str, object] = {"settings": SETTINGS, "steps": state["step"]}
    record |= {
        "seconds": round(state["seconds"]),
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
    }
    record["loss"] = state["curve"]
    export_pipeline(net.half(), build_scheduler(), record, out)


def main() -> None:
    """Read the command line; train or export."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with Fashion-MNIST's four idx.gz files"
    )
    parser.add_argument("--work", type=Path, default=Path(".cache/demo-train"), help="checkpoints")
    parser.add_argument("--steps", type=int, default=9000)
    parser.add_argument("--checkpoint-every", type=int, default=250)
    parser.add_argument("--export", type=Path, metavar="FOLDER", help="write the model here and stop")
    args = parser.parse_args()
    if args.export:
        export(args.work, args.export)
    else:
        train(args.data, args.work, args.steps, args.checkpoint_every)


if __name__ == "__main__":
    main()
