"""Train a small classifier on photographs and their Boomerang copies, as the paper's data augmentation does.

    python examples/train_with_boomerang.py --out augmented

First it makes a copy of each of 100 shipped photographs of clothes (under OUT; a second time they are there
already), then it trains: in each epoch a coin decides for each photograph whether it or one of its copies is
shown, with the label of the photograph. Every epoch is one line of JSON. Well under a minute on two cores.
"""

from __future__ import annotations

import argparse
import io
import json
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from boomerang_batch.cli.inputs import load_recipe
from boomerang_batch.data.manifest import load_manifest
from boomerang_batch.loader import Augment
from boomerang_batch.run.driver import execute
from boomerang_batch.run.request import RunRequest

SHARDS = 2
TEST_SHARDS = 6
# Few steps and no guidance: this is to be looked at, not to win.
CHEAPER = ("steps=6", "model.class_labels.guidance=1.0", "variants=1", "keep_originals=false")


def make_copies(out: str) -> None:
    """A copy of every sample of the first shards; what is there already is not made again."""
    recipe = load_recipe("demo-augment", CHEAPER)
    request = RunRequest(recipe=recipe, manifest=load_manifest("demo"), out=out, device="cpu", limit=SHARDS)
    execute(request, stop=threading.Event())


def to_example(sample: dict[str, Any]) -> tuple[torch.Tensor, int]:
    """(image (1, 28, 28) in [0, 1], label) of a sample, whether original or copy."""
    grey = np.asarray(Image.open(io.BytesIO(sample["png"])).convert("L"), dtype=np.float32)
    return torch.from_numpy(grey / 255)[None], int(sample["cls"])


def reader(urls: Sequence[str], *stages: Any) -> webdataset.WebDataset:
    """A webdataset pipeline; `stages` stand right behind the reader."""
    return webdataset.WebDataset(list(urls), shardshuffle=False, empty_check=False).compose(*stages)


def classifier() -> nn.Module:
    """(B, 1, 28, 28) to (B, 10) logits."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 10),
    )


def accuracy(model: nn.Module, loader: DataLoader[Any]) -> float:
    """Share of labels that the model gets right."""
    with torch.no_grad():
        right = [(model(images).argmax(1) == labels).float() for images, labels in loader]
    return float(torch.cat(right).mean())


def main() -> None:
    """Make the copies, then train."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", default="augmented", help="folder for the copies")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--p", type=float, default=0.5, help="probability of a copy")
    parser.add_argument("--workers", type=int, default=2, help="of DataLoader")
    arguments = parser.parse_args()
    make_copies(arguments.out)

    urls = [shard.url for shard in load_manifest("demo").shards]
    augment = Augment(arguments.out, p=arguments.p)
    training = reader(urls[:SHARDS], augment).shuffle(1000, seed=0).map(to_example)
    loader: DataLoader[Any] = DataLoader(training, batch_size=20, num_workers=arguments.workers)
    test: DataLoader[Any] = DataLoader(reader(urls[-TEST_SHARDS:]).map(to_example), batch_size=100)

    torch.manual_seed(0)
    model = classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for epoch in range(arguments.epochs):
        augment.set_epoch(epoch)  # else every epoch would show the same copies
        losses = []
        for images, labels in loader:
            loss = cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        counts = augment.counts
        line = {
            "epoch": epoch,
            "loss": round(sum(losses) / len(losses), 4),
            "accuracy": round(accuracy(model, test), 4),
            "originals": counts.originals,
            "copies": counts.copies,
            "fallbacks": counts.fallbacks,
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
