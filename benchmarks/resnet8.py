"""The classifier of the paper's tables in miniature, a ResNet-8. Not a benchmark itself.

Eight layers with weights along the main path: a 3x3 convolution, three residual blocks of two each that halve
the picture, and a linear one; 78,000 weights. SGD with Nesterov momentum, a rate that rises and falls, 20
epochs of batches of 128. Standard augmentation: shifts by up to two pixels and mirroring. By a `coin`, thrown
for every epoch and image, a copy may stand in for an image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

EPOCHS = 20
BATCH = 128
PEAK_RATE = 0.1
WEIGHT_DECAY = 5e-4
WIDTHS = (16, 16, 32, 64)
SHIFT = 2
MEAN, DEVIATION = 0.286, 0.353
"""Of Fashion-MNIST's pixels in [0, 1]."""


@dataclass(frozen=True, kw_only=True)
class Material:
    """What a classifier is trained on."""

    images: np.ndarray
    """uint8 (N, 28, 28)"""
    labels: np.ndarray
    copies: np.ndarray | None = None
    """uint8 (N, 28, 28): what an image may be replaced with."""
    coin: Callable[[int], np.ndarray] | None = None
    """For an epoch, bool (N,): whose copy is taken."""


class Block(nn.Module):
    """Two convolutions, the first with stride 2, and a projection beside them."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inside, outside, 3, stride=2, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(outside)
        self.second = nn.Conv2d(outside, outside, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(outside)
        self.beside = nn.Conv2d(inside, outside, 1, stride=2, bias=False)
        self.beside_norm = nn.BatchNorm2d(outside)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.first_norm(self.first(x)))
        return functional.relu(self.second_norm(self.second(y)) + self.beside_norm(self.beside(x)))


def build() -> nn.Module:
    """(B, 1, 28, 28) to (B, 10) logits. Draws its weights from the global generator."""
    stem, *outsides = WIDTHS
    layers: list[nn.Module] = [nn.Conv2d(1, stem, 3, padding=1, bias=False), nn.BatchNorm2d(stem), nn.ReLU()]
    inside = stem
    for outside in outsides:
        layers.append(Block(inside, outside))
        inside = outside
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inside, 10))


def weights(net: nn.Module) -> int:
    """How many numbers are learned."""
    return sum(weight.numel() for weight in net.parameters())


def train(material: Material, *, seed: int, augment: bool, epochs: int = EPOCHS) -> nn.Module:
    """Fit a ResNet-8; the same bits on one stack. `seed` is of its weights, its batches and the shifts."""
    pictures = _to_input(material.images)
    copies = None if material.copies is None else _to_input(material.copies)
    labels = torch.from_numpy(material.labels.astype(np.int64))
    per_epoch = len(pictures) // BATCH
    draw = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = build().train().to(memory_format=torch.channels_last)  # a quarter less time on a CPU
    optimizer = torch.optim.SGD(
        net.parameters(), lr=PEAK_RATE, momentum=0.9, nesterov=True, weight_decay=WEIGHT_DECAY
    )
    rate = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=PEAK_RATE, total_steps=epochs * per_epoch, pct_start=0.2
    )
    for epoch in range(epochs):
        shown = pictures
        if copies is not None and material.coin is not None:
            heads = torch.from_numpy(material.coin(epoch))
            shown = torch.where(heads[:, None, None, None], copies, pictures)
        order = torch.randperm(len(pictures), generator=draw)
        for batch in order[: per_epoch * BATCH].view(per_epoch, BATCH):
            x = _moved(shown[batch], draw) if augment else shown[batch]
            x = x.to(memory_format=torch.channels_last)
            loss = functional.cross_entropy(net(x), labels[batch])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            rate.step()
    return net.eval()


def accuracy(net: nn.Module, images: np.ndarray, labels: np.ndarray) -> float:
    """The share of uint8 images (N, 28, 28) whose predicted class is their label."""
    with torch.no_grad():
        predicted = torch.cat([net(part).argmax(1) for part in _to_input(images).split(500)]).numpy()
    return float((predicted == labels).mean())


def _to_input(images: np.ndarray) -> Tensor:
    return torch.tensor(images).float().div(255).sub(MEAN).div(DEVIATION).unsqueeze(1)


def _moved(x: Tensor, draw: torch.Generator) -> Tensor:
    """Every image shifted by up to SHIFT pixels each way, what comes in black, and mirrored by a fair coin."""
    count, _, height, width = x.shape
    wide = functional.pad(x, [SHIFT] * 4, value=-MEAN / DEVIATION)
    top, left = torch.randint(2 * SHIFT + 1, (2, count, 1), generator=draw)
    across = torch.arange(width).expand(count, width)
    across = torch.where(torch.rand(count, 1, generator=draw) < 0.5, across.flip(1), across)
    rows, columns = top + torch.arange(height), left + across
    which = torch.arange(count)[:, None, None]
    return wide[which, 0, rows[:, :, None], columns[:, None, :]].unsqueeze(1)
