"""Boomerang as a user of diffusers would write it: a loop, or a loop over batches. Arms of peers.py.

    python benchmarks/peer_loops.py ARM JOB.json OUT

Reads tars with webdataset, decodes with Pillow, adds noise and denoises with diffusers' own network and
scheduler, writes tars with webdataset. The last line on stdout is the result; its seconds run from the first
sample asked for to the last shard closed, with the model loaded and warm before. ARM is one of

    one-by-one         a batch of one image
    batched            batches of job["batch"] images, as they come; where t differs, a batch runs from its
                       largest t and rows that start later wait (masked)
    batched-active     the same, but the network sees only the rows that have started
    batched-sorted     every image read first, sorted by its evaluations, then run as batched-active

Guidance, sampler, evaluations, weights, memory layout and number of threads are those of the recipe beside it.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peer_arm
import torch
import webdataset
from diffusers import DDPMScheduler, UNet2DModel
from PIL import Image
from torch import Tensor
from torch.nn import functional

ARMS = ("one-by-one", "batched", "batched-active", "batched-sorted")
MARGIN = 2


@dataclass(frozen=True, kw_only=True)
class Item:
    """One sample read: its image as (1, 32, 32) in [-1, 1], its label, and where its walk starts."""

    key: str
    x_0: Tensor
    label: int
    start: int
    """Train index, one of the scheduler's timesteps."""


class Model:
    """The network and its scheduler, loaded as diffusers' documentation shows."""

    def __init__(self, job: dict[str, Any]) -> None:
        torch.set_num_threads(job["threads"])
        folder = Path(job["model"])
        self.network = UNet2DModel.from_pretrained(
            folder / "unet", torch_dtype=torch.float32, low_cpu_mem_usage=False
        ).eval()
        self.network = self.network.to(memory_format=torch.channels_last)
        self.scheduler = DDPMScheduler.from_pretrained(folder / "scheduler", timestep_spacing="trailing")
        self.scheduler.set_timesteps(job["steps"])
        self.timesteps = [int(timestep) for timestep in self.scheduler.timesteps]  # descending
        self.guidance = job["guidance"]
        self.null_label = job["null_label"]

    def warm_up(self, batch: int) -> None:
        """One call of the shape to come, which costs more than the later ones."""
        with torch.inference_mode():
            labels = torch.zeros(batch, dtype=torch.int64)
            self.predict(torch.zeros(batch, 1, 28 + 2 * MARGIN, 28 + 2 * MARGIN), self.timesteps[-1], labels)

    def predict(self, x_t: Tensor, timestep: int, labels: Tensor) -> Tensor:
        """The network's guided output, (B, 1, 32, 32): both halves of guidance in one doubled batch."""
        folded = functional.pixel_unshuffle(x_t, 2)
        twice = torch.cat([folded, folded]).contiguous(memory_format=torch.channels_last)
        told = torch.cat([labels, torch.full_like(labels, self.null_label)])
        labelled, unlabelled = self.network(twice, timestep, class_labels=told).sample.chunk(2)
        return functional.pixel_shuffle(unlabelled + self.guidance * (labelled - unlabelled), 2)

    def boomerang(
        self, items: list[Item], *, active_only: bool, noise: Tensor | None = None
    ) -> tuple[Tensor, int]:
        """Outputs (B, 1, 32, 32) of a batch whose walks may start at different timesteps; and rows evaluated.

        Rows wait at their noised start until the walk of the whole batch comes by.
        """
        x_0 = torch.stack([item.x_0 for item in items])
        labels = torch.tensor([item.label for item in items])
        start = torch.tensor([item.start for item in items])
        noise = torch.randn_like(x_0) if noise is None else noise
        x_t = self.scheduler.add_noise(x_0, noise, start)
        rows = 0
        with torch.inference_mode():
            for timestep in (timestep for timestep in self.timesteps if timestep <= int(start.max())):
                active = start >= timestep
                if active_only and not bool(active.all()):
                    output = self.predict(x_t[active], timestep, labels[active])
                    x_t[active] = self.scheduler.step(output, timestep, x_t[active]).prev_sample
                    rows += int(active.sum())
                else:
                    output = self.predict(x_t, timestep, labels)
                    stepped = self.scheduler.step(output, timestep, x_t).prev_sample
                    x_t = torch.where(active.view(-1, 1, 1, 1), stepped, x_t)
                    rows += len(items)
        return x_t, rows


def to_x_0(image: Image.Image) -> Tensor:
    """A 28x28 grey image as (1, 32, 32) in [-1, 1], padded with black."""
    pixels = torch.from_numpy(np.asarray(image, np.float32) / 127.5 - 1)
    return functional.pad(pixels[None], [MARGIN] * 4, value=-1.0)


def to_image(x_0: Tensor) -> Image.Image:
    """(1, 32, 32) in [-1, 1] as a 28x28 grey image."""
    inner = x_0[0, MARGIN:-MARGIN, MARGIN:-MARGIN]
    return Image.fromarray(((inner.clamp(-1, 1) + 1) * 127.5).round().byte().numpy())


def evaluations(item: Item, timesteps: list[int]) -> int:
    """Network calls that this image needs."""
    return sum(timestep <= item.start for timestep in timesteps)


def read(shards: list[str]) -> Iterator[Item]:
    """The samples of the shards, in order."""
    for sample in webdataset.WebDataset(shards, shardshuffle=False, empty_check=False).decode("pill"):
        yield Item(
            key=sample["__key__"],
            x_0=to_x_0(sample["png"]),
            label=int(sample["cls"]),
            start=int(sample["timestep"]) - 1,
        )


def batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of `size` items; the last may be shorter."""
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def run(arm: str, job: dict[str, Any], out: Path) -> dict[str, Any]:
    """Do the job and say how long it took."""
    model = Model(job)
    size = 1 if arm == "one-by-one" else job["batch"]
    out.mkdir(parents=True, exist_ok=True)
    model.warm_up(size)
    images = rows = needed = 0
    since = time.monotonic()
    source: Iterable[Item] = read(job["shards"])
    if arm == "batched-sorted":
        source = sorted(source, key=lambda item: item.start)
    with webdataset.ShardWriter(f"{out}/out-%06d.tar", maxcount=job["per_shard"], verbose=0) as writer:
        for batch in batches(source, size):
            x_0, evaluated = model.boomerang(batch, active_only=arm in ("batched-active", "batched-sorted"))
            for item, result in zip(batch, x_0, strict=True):
                buffer = io.BytesIO()
                to_image(result).save(buffer, "PNG")
                writer.write({"__key__": item.key, "png": buffer.getvalue(), "cls": item.label})
            images += len(batch)
            rows += evaluated
            needed += sum(evaluations(item, model.timesteps) for item in batch)
    seconds = time.monotonic() - since
    return {"images": images, "seconds": round(seconds, 3), "evaluations": needed, "rows_evaluated": rows}


if __name__ == "__main__":
    peer_arm.main(__doc__, ARMS, run)
