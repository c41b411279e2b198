"""The judge that benchmarks share: a small CNN for 28x28 grey images of ten classes.

61,000 weights. Four epochs over Fashion-MNIST's 60,000 training images reached 92.0 % on its 10,000 test
images, in five CPU minutes on one core that other jobs were using too.
"""

from __future__ import annotations

import hashlib
import inspect
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from boomerang_batch.demo.train import read_idx

EPOCHS = 4
BATCH = 128
PEAK_RATE = 4e-3
SEED = 20221012


def build() -> nn.Module:
    """(B, 1, 28, 28) in [0, 1] to (B, 10) logits. Draws its weights from the global generator."""

    def block(inside: int, outside: int) -> list[nn.Module]:
        return [
            nn.Conv2d(inside, outside, 3, padding=1, bias=False),
            nn.BatchNorm2d(outside),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]

    return nn.Sequential(
        *block(1, 24), *block(24, 48), *block(48, 96), nn.Flatten(), nn.Dropout(0.2), nn.Linear(96 * 9, 10)
    )


def to_input(images: np.ndarray) -> torch.Tensor:
    """uint8 (N, 28, 28) to float (N, 1, 28, 28) in [0, 1]."""
    return torch.tensor(images).float().div(255).unsqueeze(1)


def train(images: np.ndarray, labels: np.ndarray, *, epochs: int = EPOCHS, seed: int = SEED) -> nn.Module:
    """Fit the CNN to N >= 128 uint8 images (N, 28, 28) with labels (N,); the same bits on one stack."""
    x, y = to_input(images), torch.from_numpy(labels.astype(np.int64))
    per_epoch = len(x) // BATCH
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # weights, order and dropout
        net = build().train()
        optimizer = torch.optim.AdamW(net.parameters(), lr=PEAK_RATE, weight_decay=0.01)
        rate = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=PEAK_RATE, total_steps=epochs * per_epoch, pct_start=0.25
        )
        for _ in range(epochs):
            for batch in torch.randperm(len(x))[: per_epoch * BATCH].view(per_epoch, BATCH):
                loss = functional.cross_entropy(net(x[batch]), y[batch], label_smoothing=0.05)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                rate.step()
    return net.eval()


def predict(net: nn.Module, images: np.ndarray) -> np.ndarray:
    """The class (N,) of each uint8 image (N, 28, 28)."""
    with torch.no_grad():
        return torch.cat([net(part).argmax(1) for part in to_input(images).split(1000)]).numpy()


def accuracy(net: nn.Module, images: np.ndarray, labels: np.ndarray) -> float:
    """The share of images whose predicted class is their label."""
    return float((predict(net, images) == labels).mean())


def split(data: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of Fashion-MNIST's `train` or `t10k` split, from its gzip'd IDX files."""
    return read_idx(data / f"{name}-images-idx3-ubyte.gz"), read_idx(data / f"{name}-labels-idx1-ubyte.gz")


def real_classifier(data: Path, cache: Path) -> tuple[nn.Module, float]:
    """The CNN trained on the real training split, and its accuracy on the real test split.

    Trained once and kept in `cache`, under a name that changes when this file's network or training does.
    """
    recipe = inspect.getsource(build) + inspect.getsource(train) + f"{EPOCHS} {BATCH} {PEAK_RATE} {SEED}"
    kept = cache / f"classifier-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}.safetensors"
    if kept.is_file():
        with torch.random.fork_rng():
            net = build()
        net.load_state_dict(load_file(kept))
        net.eval()
    else:
        net = train(*split(data, "train"))
        cache.mkdir(parents=True, exist_ok=True)
        save_file(net.state_dict(), kept)
    return net, accuracy(net, *split(data, "t10k"))
