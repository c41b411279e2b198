"""Boomerang in Ray Data, tuned by its own documentation: an arm of peers.py.

    python benchmarks/peer_ray_data.py ray-data|ray-data-sorted JOB.json OUT

`read_webdataset`, then `map_batches` with a class, so that one actor loads the model once; `batch_size` and
the actor's `num_cpus` are given, the pool's size is 1, and the images cross as arrays. Ray is told of one CPU
more than the actor has, so that reading and writing run beside it. With t different per image,
`ray-data-sorted` sorts by it first. What one batch does is peer_loops.py's `batched-active`.

The seconds run from the moment the actor has loaded the model, by which time the first blocks are read, to
the last file written; both are in Ray Data's favour.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import peer_arm
import ray
from PIL import Image

ARMS = ("ray-data", "ray-data-sorted")


class Boomerang:
    """What the actor holds, and does to each batch."""

    def __init__(self, job: dict[str, Any], here: str, ready: str) -> None:
        os.environ["OMP_NUM_THREADS"] = str(job["threads"])
        sys.path.insert(0, here)
        import peer_loops

        self.loops = peer_loops
        self.model = peer_loops.Model(job)
        self.model.warm_up(job["batch"])
        self.done = Path(ready).with_suffix(".done")
        Path(ready).write_text(repr(time.time()))

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        items = [
            self.loops.Item(
                key=str(key),
                x_0=self.loops.to_x_0(Image.fromarray(pixels)),
                label=int(label),
                start=int(start) - 1,
            )
            for key, pixels, label, start in zip(
                batch["__key__"], batch["png"], batch["cls"], batch["timestep"], strict=True
            )
        ]
        x_0, evaluated = self.model.boomerang(items, active_only=True)
        with self.done.open("a") as done:
            done.write(f"{len(items)} {evaluated}\n")
        outputs = np.stack([np.asarray(self.loops.to_image(row)) for row in x_0])
        return {"__key__": batch["__key__"], "png": outputs, "cls": batch["cls"]}


def decode(sample: dict[str, Any]) -> dict[str, Any]:
    """A sample of a tar as `read_webdataset` hands it over: grey pixels, and numbers for the texts."""
    import io

    with Image.open(io.BytesIO(sample["png"])) as image:
        pixels = np.asarray(image.convert("L"))
    return {
        "__key__": sample["__key__"],
        "png": pixels,
        "cls": int(sample["cls"]),
        "timestep": int(sample["timestep"]),
    }


def run(arm: str, job: dict[str, Any], out: Path) -> dict[str, Any]:
    """Do the job and say how long it took."""
    ray.init(
        address="local",
        num_cpus=job["threads"] + 1,
        include_dashboard=False,
        logging_level="ERROR",
        log_to_driver=False,
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    ready = out.with_suffix(".ready")
    out.mkdir(parents=True, exist_ok=True)
    dataset = ray.data.read_webdataset(job["shards"], decoder=decode)
    if arm == "ray-data-sorted":
        dataset = dataset.sort("timestep")
    dataset = dataset.map_batches(
        Boomerang,
        fn_constructor_args=(job, str(Path(__file__).parent), str(ready)),
        batch_size=job["batch"],
        num_cpus=job["threads"],
        compute=ray.data.ActorPoolStrategy(size=1),
    )
    dataset.write_webdataset(str(out))
    seconds = time.time() - float(ready.read_text())
    ray.shutdown()
    done = [line.split() for line in ready.with_suffix(".done").read_text().splitlines()]
    images, evaluations = (sum(map(int, column)) for column in zip(*done, strict=True))
    return {"images": images, "seconds": round(seconds, 3), "evaluations": evaluations}


if __name__ == "__main__":
    peer_arm.main(__doc__, ARMS, run)
