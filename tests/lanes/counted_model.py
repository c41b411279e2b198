"""A real model whose network calls are counted where no SIGKILL reaches, and take as long as one likes.

It is installed as an entry point, as any other maker's denoiser is. Each process has a counter file, mapped
into its memory: the kernel keeps what was written there, whatever becomes of the process. A row of a call that
moves a draw counts as one evaluation, so that nothing is estimated: idle slots do not blur it, and draws that
never came to their end are in it. Calls can be made to take longer, as a larger model's do.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from boomerang_batch.config.pipeline import ModelSpec
from boomerang_batch.diffusion.denoiser import Condition, Denoiser, DenoiserSpec
from boomerang_batch.models.plugins import GROUP
from tests import worlds

NAME = "counted"
COUNTS_VARIABLE = "COUNTED_MODEL_COUNTS"
SECONDS_VARIABLE = "COUNTED_MODEL_SECONDS_A_CALL"
_IDLE_LABEL = 0
"""What slots without a draw are told; `save_shards` gives it to no sample."""
_NUMBER = struct.Struct("<q")


class Counted:
    """The denoiser `within`, counted; see denoiser.Denoiser."""

    def __init__(self, within: Denoiser, *, counts: Path, seconds_a_call: float) -> None:
        self._within = within
        self._seconds = seconds_a_call
        self._calls = self._rows = 0
        with (counts / f"{os.getpid()}-{time.time_ns()}").open("w+b") as file:
            file.write(_NUMBER.pack(0))
            file.flush()
            self._counter = mmap.mmap(file.fileno(), _NUMBER.size)

    @property
    def spec(self) -> DenoiserSpec:
        return self._within.spec

    def encode(self, images: Tensor) -> Tensor:
        return self._within.encode(images)

    def decode(self, x_0: Tensor) -> Tensor:
        return self._within.decode(x_0)

    def denoise(self, x_t: Tensor, tau: Tensor, conditions: Sequence[Condition]) -> Tensor:
        self._calls += 1
        if self._calls > 1:  # the first is the tool's look at a denoiser that others made
            self._rows += sum(condition != _IDLE_LABEL for condition in conditions)
            _NUMBER.pack_into(self._counter, 0, self._rows)
            time.sleep(self._seconds)
        return self._within.denoise(x_t, tau, conditions)


def load(options: Mapping[str, str], device: str) -> Counted:
    """The entry point: the model in the folder that the recipe names, on one thread."""
    from boomerang_batch.models.families import load_denoiser

    torch.set_num_threads(1)
    spec = ModelSpec.model_validate(
        {"source": options["folder"], "class_labels": {"field": "cls", "null_label": worlds.CLASSES}}
    )
    return Counted(
        load_denoiser(spec, device=device, threads=1),
        counts=Path(os.environ[COUNTS_VARIABLE]),
        seconds_a_call=float(os.environ.get(SECONDS_VARIABLE, "0")),
    )


def install(folder: Path) -> Path:
    """A folder of installed packages that has the model; it goes into PYTHONPATH."""
    metadata = folder / f"{NAME}-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {NAME}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[{GROUP}]\n{NAME} = {__name__}:load\n")
    return folder


def environment(site: Path, counts: Path, *, seconds_a_call: float = 0.0) -> Mapping[str, str]:
    """What a process needs to have the model, and these very sources, and to count in the folder `counts`."""
    counts.mkdir(parents=True, exist_ok=True)
    return {
        "PYTHONPATH": f"{site}:{Path(__file__).parents[2]}",
        COUNTS_VARIABLE: str(counts),
        SECONDS_VARIABLE: str(seconds_a_call),
    }


def recipe_text(model: Path, *, steps: int) -> str:
    """The recipe of the tiny world, by the counted model in its model's place."""
    named = f"source: {model},"
    text = worlds.recipe_text(model).replace("steps: 6", f"steps: {steps}")
    return text.replace(named, f'source: "entry-point:{NAME}", options: {{folder: {model}}},')


def save_shards(folder: Path, *, shards: int, samples: int) -> None:
    """The tiny world's shards and their manifest, of samples whose labels tell them from idle slots."""
    folder.mkdir(parents=True)
    for shard in range(shards):
        members = []
        for number in range(shard * samples, (shard + 1) * samples):
            label = 1 + number % (worlds.CLASSES - 1)
            members += worlds.sample_members(f"img{number:05d}", number, cls=str(label).encode())
        worlds.write_tar(folder / f"s-{shard:03d}.tar", members)
    (folder / "manifest.yaml").write_text(
        f"format_version: 1\nname: tiny\nshards: ['s-{{000..{shards - 1:03d}}}.tar']\n"
    )


def evaluations(counts: Path) -> int:
    """Rows of network calls that moved a draw, in all processes so far, the dead ones too."""
    return sum(evaluations_of(counts).values())


def evaluations_of(counts: Path) -> dict[int, int]:
    """The same by process."""
    found: dict[int, int] = {}
    for path in counts.iterdir():
        data = path.read_bytes()
        if len(data) == _NUMBER.size:  # one that is just being made is empty
            pid = int(path.name.partition("-")[0])
            found[pid] = found.get(pid, 0) + _NUMBER.unpack(data)[0]
    return found
