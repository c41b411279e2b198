"""Small complete worlds for end-to-end tests: a tiny class-conditional model, shards, a recipe, a run."""

from __future__ import annotations

import io
import itertools
import json
import tarfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from boomerang_batch import storage
from boomerang_batch.config.pipeline import Recipe, parse_recipe
from boomerang_batch.data.manifest import Manifest, load_manifest
from boomerang_batch.data.provenance import Row, read_rows
from boomerang_batch.run.driver import execute
from boomerang_batch.run.request import RunRequest
from boomerang_batch.run.runner import Runner
from boomerang_batch.run.tasks import RunReport
from tests import tiny_models

CLASSES = 4
SECRET = "5ec7e7" * 8


def save_model(folder: Path) -> Path:
    """A random class-conditional 8x8 grey model; label CLASSES means none."""
    unet = tiny_models.network(in_channels=1, out_channels=1, num_class_embeds=CLASSES + 1)
    return tiny_models.save_pipeline(folder, unet=unet)


def png(seed: int, size: tuple[int, int] = (8, 8)) -> bytes:
    """A grey PNG of smooth random content."""
    values = np.random.default_rng(seed).integers(0, 256, (2, 2), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).resize(size, Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


def encoded(pixels: np.ndarray, format: str = "PNG") -> bytes:
    """An image file of uint8 pixels (H, W) or (H, W, C)."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format)
    return buffer.getvalue()


def noise(seed: int, height: int, width: int, *channels: int) -> np.ndarray:
    """uint8 pixels (height, width, *channels), each independent of the others."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, *channels), dtype=np.uint8)


def pixels(data: bytes) -> np.ndarray:
    """An image file's pixels as Pillow decodes them."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image)


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> None:
    """A tar as the standard library writes it."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def sample_members(key: str, seed: int, **more: bytes) -> list[tuple[str, bytes]]:
    """One well-formed sample's members."""
    fields = {"png": png(seed), "cls": str(seed % CLASSES).encode(), "json": json.dumps({"n": seed}).encode()}
    return [(f"{key}.{name}", data) for name, data in (fields | more).items()]


def save_shards(folder: Path, *, shards: int, samples: int) -> Path:
    """Shards s-000.tar .. and their manifest; returns the manifest's path."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        members = []
        for sample in range(samples):
            number = shard * samples + sample
            members += sample_members(f"img{number:05d}", number)
        write_tar(folder / f"s-{shard:03d}.tar", members)
    manifest = folder / "manifest.yaml"
    manifest.write_text(f"format_version: 1\nname: tiny\nshards: ['s-{{000..{shards - 1:03d}}}.tar']\n")
    return manifest


Fields = Mapping[str, bytes]


def save_samples(folder: Path, *shards: Mapping[str, Fields]) -> Path:
    """Shards s-000.tar .. of the samples given, by key; returns the manifest's path."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, samples in enumerate(shards):
        members = [(f"{key}.{name}", data) for key, fields in samples.items() for name, data in fields.items()]
        write_tar(folder / f"s-{number:03d}.tar", members)
    manifest = folder / "manifest.yaml"
    manifest.write_text(f"format_version: 1\nname: tiny\nshards: ['s-{{000..{len(shards) - 1:03d}}}.tar']\n")
    return manifest


def recipe_text(model: Path, *, purpose: str = "anonymize") -> str:
    """A short pipeline file for `save_model`'s model."""
    return f"""
name: tiny
purpose: {purpose}
{"seed: 7" if purpose != "anonymize" else ""}
model: {{source: {model}, class_labels: {{field: cls, null_label: {CLASSES}}}}}
t: {{fraction: 0.5}}
steps: 6
images: {{resize: pad}}
fields: {{fields: {{cls: keep}}}}
batch_size: 4
"""


def recipe(model: Path, *overrides: str, purpose: str = "anonymize") -> Recipe:
    """`recipe_text`, parsed, with overrides as --set takes them."""
    return parse_recipe(recipe_text(model, purpose=purpose), source="test recipe", overrides=overrides)


def run(
    recipe: Recipe,
    manifest: Path | Manifest,
    out: Path,
    *,
    stop: threading.Event | None = None,
    **options: object,
) -> RunReport:
    """Execute quietly, with the private dir beside `out`."""
    loaded = manifest if isinstance(manifest, Manifest) else load_manifest(str(manifest))
    settings: dict[str, object] = {"device": "cpu", "threads": 1, "quiet": True}
    if recipe.purpose == "anonymize":
        settings["private_dir"] = str(out) + "-private"
    request = RunRequest(recipe=recipe, manifest=loaded, out=str(out), **settings | options)
    return execute(request, stop=stop or threading.Event())


def stop_within_the_second_shard(patch: pytest.MonkeyPatch, out: Path) -> threading.Event:
    """An event, for `run`, that is set when one shard is committed and four outputs of the next are drawn."""
    stop, real, numbers = threading.Event(), Runner.run, itertools.count(1)

    def watched(self, task, *, stopped, progress):
        number = next(numbers)
        # The pool begins two tasks at once, and a third beside the second.
        while number == 2 and not list(out.glob("*_stats.json")):
            time.sleep(0.01)
        if number > 2:
            stop.wait(120)
        return real(
            self, task, stopped=stopped, progress=lambda n: stop.set() if (number, n) == (2, 4) else None
        )

    patch.setattr(Runner, "run", watched)
    return stop


def tree(out: Path) -> Mapping[str, bytes]:
    """Every file under `out` but the logs, by relative path."""
    files = {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
    return {name: data for name, data in files.items() if not name.startswith("logs/")}


def read_output(out: Path, stem: str) -> list[tuple[str, dict[str, bytes]]]:
    """An output shard's samples as the standard library reads them, in order."""
    samples: dict[str, dict[str, bytes]] = {}
    with tarfile.open(storage.join(str(out), f"{stem}.tar")) as tar:
        for member in tar:
            key, _, field = member.name.partition(".")
            samples.setdefault(key, {})[field] = tar.extractfile(member).read()
    return list(samples.items())


def outputs(out: Path) -> dict[str, dict[str, bytes]]:
    """Every output sample of every shard, by key, in order."""
    return dict(sample for path in sorted(out.glob("*.tar")) for sample in read_output(out, path.stem))


def rows(out: Path) -> list[Row]:
    """Every provenance row of every shard, in order."""
    return [row for path in sorted(out.glob("*.parquet")) for row in read_rows(path)]


def image_of(fields: Mapping[str, bytes]) -> np.ndarray:
    """The pixels of an output sample's png."""
    return pixels(fields["png"])
