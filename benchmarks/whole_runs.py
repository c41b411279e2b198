"""What several benchmarks need of whole runs: samples in, outputs and rows out. Not a benchmark itself.

A run into a folder that is kept goes on where it was stopped, and takes no time where it was finished.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from boomerang_batch.config.pipeline import ImagePolicy, Recipe
from boomerang_batch.data.images import Picture, decode, encode
from boomerang_batch.data.manifest import load_manifest
from boomerang_batch.data.provenance import Row, read_rows
from boomerang_batch.data.shards import Sample, read_samples, write_shard
from boomerang_batch.run.driver import execute
from boomerang_batch.run.naming import member_key
from boomerang_batch.run.request import RunRequest

Samples = Mapping[str, Mapping[str, bytes]]
"""Fields by key."""


@dataclass(frozen=True, kw_only=True)
class Output:
    """One output: its pixels, uint8 (H, W, C), and how it was made."""

    pixels: np.ndarray
    row: Row


def run_on(
    recipe: Recipe, shards: Mapping[str, Samples], folder: Path, *, device: str = "cpu", threads: int
) -> dict[str, dict[tuple[str, int], Output]]:
    """What one run makes of `shards`, by stem: the outputs by key and number. Exits where a sample fails.

    The shards are written to folder/in, and the run to folder/out.
    """
    (folder / "in").mkdir(parents=True, exist_ok=True)
    for stem, samples in shards.items():
        write_shard(folder / "in" / f"{stem}.tar", samples.items())
    manifest = folder / "in" / "manifest.yaml"
    names = ", ".join(f"{stem}.tar" for stem in shards)
    manifest.write_text(f"format_version: 1\nname: {recipe.name}\nshards: [{names}]\n")
    out = folder / "out"
    request = RunRequest(
        recipe=recipe,
        manifest=load_manifest(str(manifest)),
        out=str(out),
        device=device,
        threads=threads,
        quiet=True,
    )
    done = execute(request, stop=threading.Event())
    if done.exit_code:
        raise SystemExit(f"the run into {out} ended with {done.exit_code}: {done}")
    return {stem: _outputs(recipe, out, stem) for stem in shards}


def _outputs(recipe: Recipe, out: Path, stem: str) -> dict[tuple[str, int], Output]:
    with (out / f"{stem}.tar").open("rb") as stream:
        made = {
            sample.key: decode(sample.fields["png"], field="png", channels=None, policy=recipe.images).pixels
            for sample in read_samples(stream, shard=stem)
            if isinstance(sample, Sample)
        }
    rows = read_rows(out / f"{stem}.parquet")
    return {
        (row.key, row.variant): Output(pixels=made[member_key(recipe, row.key, row.variant)], row=row)
        for row in rows
    }


def png(pixels: np.ndarray) -> bytes:
    """uint8 pixels (H, W, C) as a PNG file."""
    return encode(Picture(pixels=pixels, alpha=None, format="png"), policy=ImagePolicy())[0]
