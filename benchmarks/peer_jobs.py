"""The jobs that all arms of peers.py get, and the proof that they do the same one. Not a benchmark itself."""

from __future__ import annotations

import io
import json
import math
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import peer_loops
import torch
import webdataset
from PIL import Image
from torch import Tensor

from boomerang_batch import shipped, storage
from boomerang_batch.config.pipeline import ClassLabels, ModelSpec
from boomerang_batch.data.manifest import load_manifest
from boomerang_batch.data.shards import Sample, read_samples
from boomerang_batch.diffusion.boomerang import KeyedNoise, boomerang
from boomerang_batch.diffusion.samplers import build_solver
from boomerang_batch.diffusion.schedule import build_schedule
from boomerang_batch.models import load_denoiser

STEPS = 20
TIMESTEPS = 1000
STRIDE = TIMESTEPS // STEPS
EQUAL_T = 500
GUIDANCE = 1.5
NULL_LABEL = 10
PER_SHARD = 250
MODEL = "shipped:demo/model"
LARGEST_FLOAT_DIFFERENCE = 1e-4


def demo_samples(count: int) -> list[Sample]:
    """The first `count` demo samples; the shipped ones over again where there are not enough."""
    found: list[Sample] = []
    for entry in load_manifest("demo").shards:
        with storage.open_read(entry.url) as stream:
            found += [item for item in read_samples(stream, shard=entry.url) if isinstance(item, Sample)]
    return [found[index % len(found)] for index in range(count)]


def write_job(folder: Path, name: str, *, images: int, threads: int) -> dict[str, Any]:
    """Shards with a timestep beside every image, their manifest, and the job's facts.

    Mixed t is uniform in (.1, .8), rounded to the grid's nodes so that all arms can do the same evaluations.
    """
    folder.mkdir(parents=True)
    draw = np.random.default_rng(20221012)
    samples = demo_samples(images)
    drawn = [STRIDE * round(draw.uniform(0.1, 0.8) * STEPS) for _ in range(images)]
    timesteps = [EQUAL_T] * images if name == "equal t" else drawn
    shards = []
    for first in range(0, images, PER_SHARD):
        path = folder / f"in-{first // PER_SHARD:05d}.tar"
        shards.append(str(path))
        with webdataset.TarWriter(str(path), encoder=False) as tar:
            for index in range(first, min(images, first + PER_SHARD)):
                fields = {field: samples[index].fields[field] for field in ("png", "cls")}
                fields["timestep"] = str(timesteps[index]).encode()
                tar.write({"__key__": f"image{index:06d}", **fields})
    manifest = folder / "manifest.yaml"
    manifest.write_text(f"format_version: 1\nname: peers\nshards: {json.dumps(shards)}\n")
    return {
        "name": name,
        "shards": shards,
        "manifest": str(manifest),
        "model": shipped.resolve(MODEL),
        "t": str(EQUAL_T) if name == "equal t" else "{field: timestep}",
        "steps": STEPS,
        "guidance": GUIDANCE,
        "null_label": NULL_LABEL,
        "threads": threads,
        "images": images,
        "evaluations": sum(timestep // STRIDE for timestep in timesteps),
        "per_shard": PER_SHARD,
    }


def read_images(shards: Sequence[Path | str]) -> dict[str, tuple[np.ndarray, int]]:
    """Every sample's pixels and label by key."""
    pixels, labels = {}, {}
    for path in shards:
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, field = member.name.partition(".")
                data = tar.extractfile(member).read()  # type: ignore[union-attr]
                if field == "png":
                    pixels[key] = np.asarray(Image.open(io.BytesIO(data)).convert("L"), np.float64) / 255
                elif field == "cls":
                    labels[key] = int(data)
    return {key: (pixels[key], labels[key]) for key in pixels}


def compare_outputs(job: dict[str, Any], out: Path) -> dict[str, float]:
    """Mean squared distance of an arm's outputs to their sources, and its standard error.

    Raises SystemExit when keys, labels or sizes are not those of the job.
    """
    sources = read_images(job["shards"])
    outputs = read_images(sorted(out.rglob("*.tar")))
    by_source = {key.partition("~")[0].partition("-v")[0]: value for key, value in outputs.items()}
    if len(outputs) != len(sources) or by_source.keys() != sources.keys():
        raise SystemExit(f"{out}: {len(outputs)} outputs for {len(sources)} sources, or other keys")
    distances = []
    for key, (pixels, label) in by_source.items():
        source, expected = sources[key]
        if label != expected or pixels.shape != source.shape:
            raise SystemExit(f"{out}: {key} has label {label} and shape {pixels.shape}")
        distances.append(float(np.square(pixels - source).mean()))
    return {
        "mean_squared_distance": round(float(np.mean(distances)), 6),
        "standard_error": round(float(np.std(distances)) / math.sqrt(len(distances)), 6),
    }


def same_mathematics(threads: int) -> float:
    """The largest difference between the tool's outputs and the diffusers loop's, given the same noise.

    24 images at three different t: the tool walks one t at a time, the loop does too, and takes all of them in
    one batch, as `batched` does and as `batched-active` does.
    """
    job = {"model": shipped.resolve(MODEL), "steps": STEPS, "threads": threads}
    loop = peer_loops.Model(job | {"guidance": GUIDANCE, "null_label": NULL_LABEL})
    labels = ClassLabels(null_label=NULL_LABEL, guidance=GUIDANCE)
    spec = ModelSpec(source=MODEL, patch_size=2, channels_last=True, class_labels=labels)
    denoiser = load_denoiser(spec, device="cpu", threads=threads)
    samples = demo_samples(24)
    x_0 = torch.stack(
        [peer_loops.to_x_0(Image.open(io.BytesIO(one.fields["png"])).convert("L")) for one in samples]
    )
    labels = [int(one.fields["cls"]) for one in samples]
    steps = torch.tensor([(2, EQUAL_T // STRIDE, 16)[index % 3] for index in range(len(samples))])
    noise = KeyedNoise([bytes([index] * 16) for index in range(len(samples))], x_0)

    def tool(rows: Tensor, count: int) -> Tensor:
        schedule = build_schedule(
            denoiser.spec.levels, grid="trailing", steps=STEPS, t=("timestep", count * STRIDE), start="exact"
        )
        solver = build_solver(schedule, prediction="v_prediction", eta=1.0, clip_range=denoiser.spec.clip_range)
        chosen = KeyedNoise([bytes([int(index)] * 16) for index in rows], x_0[rows])
        told = [labels[int(index)] for index in rows]
        return boomerang(x_0[rows], denoiser, schedule, solver, chosen, told)

    def looped(rows: Tensor, *, active_only: bool) -> Tensor:
        items = [
            peer_loops.Item(
                key=str(index), x_0=x_0[index], label=labels[index], start=int(steps[index]) * STRIDE - 1
            )
            for index in rows.tolist()
        ]
        draws = []
        for node in range(int(steps[rows].max()), 0, -1):
            z = noise.reverse(torch.full((len(x_0),), node))[rows]
            draws.append(z[steps[rows] >= node] if active_only else z)
        forward = noise.forward(torch.ones(len(x_0), dtype=torch.int64))[rows]
        with mock.patch("diffusers.schedulers.scheduling_ddpm.randn_tensor", side_effect=draws):
            found, evaluated = loop.boomerang(items, active_only=active_only, noise=forward)
        needed = steps[rows].sum() if active_only else len(rows) * steps[rows].max()
        if evaluated != int(needed):
            raise SystemExit(f"the loop did {evaluated} evaluations instead of {int(needed)}")
        return found

    everyone = torch.arange(len(samples))
    expected = torch.empty_like(x_0)
    differences = []
    for count in steps.unique().tolist():
        rows = everyone[steps == count]
        expected[rows] = tool(rows, count)
        differences.append(looped(rows, active_only=False) - expected[rows])
    differences += [looped(everyone, active_only=active) - expected for active in (False, True)]
    worst = max(float(one.abs().max()) for one in differences)
    if worst > LARGEST_FLOAT_DIFFERENCE:
        raise SystemExit(f"tool and loop differ by {worst:g} given the same noise: not the same job")
    return worst
