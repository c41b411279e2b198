"""Shards of 256x256 JPEG and a run that changes nothing, for io_path.py and memory.py. Not a benchmark itself.

At t = 0, which is the identity, the denoiser is never asked, and all that is left of a run is reading,
decoding, placing, encoding, hashing and writing. At a small t the network is asked too. It is tiny, and what it
predicts is no noise at all, so that it gives back what it is given.
"""

from __future__ import annotations

import io
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image

from boomerang_batch.config.pipeline import parse_recipe
from boomerang_batch.data.manifest import load_manifest
from boomerang_batch.run.driver import execute
from boomerang_batch.run.request import RunRequest

SIDE = 256
PATCH = 16
QUALITY = 95
DISTINCT = 64


def save_model(folder: Path) -> None:
    """An unconditional 256x256 RGB network of random weights, patched so that it takes next to no memory."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=SIDE // PATCH,
            in_channels=3 * PATCH**2,
            out_channels=3 * PATCH**2,
            layers_per_block=1,
            block_out_channels=(4, 4),
            norm_num_groups=4,
            add_attention=False,
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
        )
        torch.nn.init.zeros_(unet.conv_out.weight)
        torch.nn.init.zeros_(unet.conv_out.bias)
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(folder)


def jpegs(*, grain: float, quality: int = QUALITY) -> list[bytes]:
    """Pictures with a photograph's kind of spectrum: noise of every scale, less of the fine. 4:4:4 JPEG.

    grain: the share of the finest noise, and so the files' size: .12 gives about 40 kB each, 1 about 120 kB.
    """
    draw = np.random.default_rng(0)
    found = []
    for _ in range(DISTINCT):
        total = np.zeros((SIDE, SIDE, 3))
        for level in range(2, 9):
            fine = Image.fromarray(draw.integers(0, 256, (2**level, 2**level, 3), dtype=np.uint8))
            layer = np.asarray(fine.resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float64) - 127.5
            total += layer * (grain if level == 8 else 2.0 ** (2 - level))
        pixels = np.clip(127.5 + total * 0.7, 0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=quality, subsampling=0)
        found.append(buffer.getvalue())
    return found


def write_shard(path: Path, pictures: list[bytes], count: int, *, first: int = 0) -> None:
    """A tar of `count` samples, the pictures over and over under keys of their own."""
    with webdataset.TarWriter(str(path), encoder=False) as tar:
        for index in range(first, first + count):
            tar.write({"__key__": f"image{index:07d}", "jpg": pictures[index % len(pictures)], "cls": b"0"})


def write_manifest(path: Path, shards: list[Path]) -> Path:
    """A manifest of these shards, beside them."""
    lines = "".join(f"  - {shard.resolve()}\n" for shard in shards)
    path.write_text(f"format_version: 1\nname: identity\nshards:\n{lines}")
    return path


def run_identity(model: Path, manifest: Path, out: Path, *, timestep: int = 0, batch: int = 16) -> int:
    """The tool's own run of the identity, inline on one thread; returns the number of images.

    At a timestep of 1 to 100 each image takes one evaluation.
    """
    text = f"""
name: identity
purpose: augment
seed: 1
model: {{source: {model}, patch_size: {PATCH}}}
t: {{timestep: {timestep}}}
steps: 10
images: {{format: jpeg, quality: {QUALITY}}}
batch_size: {batch}
"""
    request = RunRequest(
        recipe=parse_recipe(text, source="identity"),
        manifest=load_manifest(str(manifest)),
        out=str(out),
        device="cpu",
        threads=1,
        quiet=True,
    )
    report: Any = execute(request, stop=threading.Event())
    if report.exit_code:
        raise SystemExit(f"the run ended with {report.exit_code}: {report}")
    return int(report.rows["ok"])
