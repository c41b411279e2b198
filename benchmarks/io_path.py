"""What does a run cost beside its denoiser? Reading, decoding, encoding and writing 256x256 JPEG.

    python benchmarks/io_path.py --images 4000 --repeats 5

Against a bare loop (webdataset reads, Pillow decodes and encodes with the same settings, quality 95 and 4:4:4,
webdataset writes) stand the tool's own functions for these stages, called in a row, and a whole run with the
identity for a denoiser. The target of .9 is for the stages. A run does more than the loop: pixels to float and
back, the guards, a second decoding of what was encoded, digests of sources, outputs, pixels and shards,
provenance, a spool, a published copy that is read back. Each arm is a process pinned to one core; a first small
shard warms it up. Its rate is taken twice: over the seconds of the work, loading left out, and over the CPU
seconds it cost more than the warm-up did, which other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import identity_world
import numpy as np
import peer_tool
import report
import webdataset
from PIL import Image

from boomerang_batch import storage
from boomerang_batch.config.pipeline import ImagePolicy
from boomerang_batch.data.images import decode, encode
from boomerang_batch.data.shards import Unreadable, read_samples, write_shard

PER_SHARD = 1000
WARM_UP = 200
TARGET = 0.9
ARMS = ("run", "stages", "bare")
STAGES = ("read", "decode", "encode", "write")


def bare(shards: list[Path], out: Path) -> tuple[int, dict[str, float]]:
    """The loop a user would write; its images, and seconds by stage."""
    spent: Counter[str] = Counter()
    images = 0
    out.mkdir(parents=True)
    for shard in shards:
        with webdataset.TarWriter(str(out / shard.name)) as writer:
            clock = time.perf_counter()
            for sample in webdataset.WebDataset([str(shard)], shardshuffle=False):
                marks = [clock, time.perf_counter()]
                with Image.open(io.BytesIO(sample["jpg"])) as image:
                    pixels = np.array(image.convert("RGB"))
                marks.append(time.perf_counter())
                buffer = io.BytesIO()
                Image.fromarray(pixels).save(buffer, "JPEG", quality=identity_world.QUALITY, subsampling=0)
                marks.append(time.perf_counter())
                writer.write(sample | {"jpg": buffer.getvalue()})
                clock = time.perf_counter()
                marks.append(clock)
                images += 1
                for stage, begin, end in zip(STAGES, marks, marks[1:], strict=False):
                    spent[stage] += end - begin
    return images, dict(spent)


def stages(shards: list[Path], out: Path) -> int:
    """The same loop of the tool's own functions; its images."""
    policy = ImagePolicy(format="jpeg", quality=identity_world.QUALITY)
    images = 0

    def twins(stream: BinaryIO, name: str) -> Iterator[tuple[str, dict[str, bytes]]]:
        nonlocal images
        for sample in read_samples(stream, shard=name):
            if isinstance(sample, Unreadable):
                raise SystemExit(sample.detail)
            picture = decode(sample.fields["jpg"], field="jpg", channels=3, policy=policy)
            images += 1
            yield sample.key, {**sample.fields, "jpg": encode(picture, policy=policy)[0]}

    out.mkdir(parents=True)
    for shard in shards:
        with storage.open_read(str(shard)) as stream:
            write_shard(out / shard.name, twins(stream, shard.name))
    return images


def run_arm(arm: str, folder: Path, out: Path) -> dict[str, Any]:
    """Warm up twice, then do the job; what it took. Called in the arm's own process."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    by_stage: dict[str, float] = {}
    images, cpu = [], []
    for step in ("warm", "again", "job"):
        shards = sorted(folder.glob("job-*.tar" if step == "job" else "warm-*.tar"))
        began = time.process_time()
        since = time.monotonic()
        if arm == "bare":
            done, spent = bare(shards, out / step)
            seconds = time.monotonic() - since
            by_stage = {f"{stage}_ms": round(1000 * spent[stage] / done, 4) for stage in STAGES}
        elif arm == "stages":
            done = stages(shards, out / step)
            seconds = time.monotonic() - since
        else:
            manifest = identity_world.write_manifest(out / f"{step}.yaml", shards)
            done = identity_world.run_identity(folder / "model", manifest, out / step)
            seconds = peer_tool.last_commit_s(out / step)
        images.append(done)
        cpu.append(time.process_time() - began)
    return {
        "images": images[-1],
        "seconds": round(seconds, 3),
        "images_per_s": round(images[-1] / seconds, 2),
        # What loading costs is in both of the later runs, and cancels.
        "images_per_cpu_s": round((images[-1] - images[-2]) / (cpu[-1] - cpu[-2]), 2),
        **by_stage,
    }


def measure(arm: str, *, folder: Path) -> dict[str, Any]:
    """One arm in a process of its own."""
    with tempfile.TemporaryDirectory(dir=folder) as out:
        command = [sys.executable, __file__, "--arm", arm, str(folder), out]
        return report.run_json(command, environment={"OMP_NUM_THREADS": "1"})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--results", type=Path, default=report.RESULTS)
    parser.add_argument("--arm", nargs=3, metavar=("ARM", "FOLDER", "OUT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm:
        print(json.dumps(run_arm(args.arm[0], Path(args.arm[1]), Path(args.arm[2]))))
        return 0

    with tempfile.TemporaryDirectory(prefix="io-path-") as name:
        folder = Path(name)
        identity_world.save_model(folder / "model")
        pictures = identity_world.jpegs(grain=0.12)
        identity_world.write_shard(folder / "warm-0.tar", pictures, WARM_UP)
        for first in range(0, args.images, PER_SHARD):
            count = min(PER_SHARD, args.images - first)
            identity_world.write_shard(folder / f"job-{first:07d}.tar", pictures, count, first=first)
        found = report.alternate(ARMS, args.repeats, functools.partial(measure, folder=folder))

    rates = ("images_per_s", "images_per_cpu_s")
    loop = {rate: report.median(found["bare"], rate) for rate in rates}
    ratios = {
        arm: {rate: round(report.median(found[arm], rate) / loop[rate], 3) for rate in rates}
        for arm in ("stages", "run")
    }
    rows = [
        [
            rate.replace("_", " "),
            f"{loop[rate]:.1f}",
            *(
                f"{report.median(found[arm], rate):.1f} ({ratio[rate]:.2f} of the loop)"
                for arm, ratio in ratios.items()
            ),
        ]
        for rate in rates
    ]
    stages_ms = {stage: report.median(found["bare"], f"{stage}_ms") for stage in STAGES}
    mean_kb = sum(map(len, pictures)) / len(pictures) / 1000
    text = [
        "# What a run costs beside its denoiser",
        "",
        f"{args.images} JPEG of 256x256 and {mean_kb:.0f} kB on average; one core. "
        f"Target for the stages: {TARGET}.",
        "",
        report.table(["on one core", "bare loop", "the tool's stages", "the tool's run"], rows),
        "",
        "The bare loop's stages, ms per image: "
        + ", ".join(f"{stage} {ms:.2f}" for stage, ms in stages_ms.items()),
    ]
    record = {
        "question": __doc__.splitlines()[0],
        "machine": report.machine(1),
        "ratios": ratios,
        "stages_ms": stages_ms,
        "arms": found,
    }
    report.publish("io_path", record, "\n".join(text), folder=args.results)
    return 0 if ratios["stages"]["images_per_cpu_s"] >= TARGET else 1


if __name__ == "__main__":
    sys.exit(main())
