"""How many shards a second does one driver hand out? Runs whose workers do nothing, of 1 to 192 workers.

    python benchmarks/driver_scaling.py

A whole run as `boomerang-batch run` does it (lease, record, hand-out, heartbeats, telemetry, log, count at the
end), but its workers only write each shard's marker. Beside it, in the same Ray, a bare loop over actors of the
same kind that holds two calls at each and refills whichever has answered: what Ray itself can do. Shards take
minutes, so what counts is how many workers one driver can serve. Timed is the hand-out, first shard to last.
Workers import neither torch nor the model's code, GPUs are made up, and all of them share this machine's cores.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

import figures
import report

HEARD_OF = ("torch", "diffusers", "boomerang_batch.run.runner")
SHARDS_EACH = {1: 3000, 8: 6000, 64: 6000, 192: 6000}
RECIPE = """
name: nothing
purpose: augment
seed: 1
identity: content
model: {source: nowhere}
t: {fraction: 0.5}
steps: 1
"""


class Idle:
    """A worker that does nothing but commit."""

    def __init__(self, spec: Any) -> None:
        self._spec = spec

    def load(self) -> Any:
        """What a worker tells of itself; that it heard of none of the model's code is checked."""
        from boomerang_batch.run.tasks import WorkerFacts

        heard = [name for name in HEARD_OF if name in sys.modules]
        if heard:
            raise RuntimeError(f"this worker was to import none of {heard}")
        return WorkerFacts(model_digest="none", stack={})

    def run(self, task: Any) -> Any:
        """Write the marker, not as safely as a real one."""
        from boomerang_batch.data.provenance import Marker
        from boomerang_batch.run.tasks import ShardReport

        marker = Marker(
            stem=task.name, counts={}, tar_sha256="0", tar_bytes=0, parquet_sha256="0", parquet_bytes=0,
            recipe_digest=self._spec.recipe.digest,
        )  # fmt: skip
        Path(self._spec.out, f"{task.name}_stats.json").write_bytes(marker.to_bytes())
        return ShardReport(name=task.name, status="done", marker_bytes=len(marker.to_bytes()))

    def state(self) -> Any:
        """Always well."""
        from boomerang_batch.run.tasks import WorkerState

        return WorkerState()

    def stop(self) -> None:
        """Nothing to stop."""


def actors(cls: type) -> Any:
    """A class as actors with the real worker's settings."""
    import ray

    grouped = {name: ray.method(concurrency_group="work")(getattr(cls, name)) for name in ("load", "run")}
    grouped |= {name: ray.method(concurrency_group="ctl")(getattr(cls, name)) for name in ("state", "stop")}
    groups = {"work": 2, "ctl": 1}
    worker = type(cls.__name__, (cls,), grouped)
    return ray.remote(max_restarts=0, max_task_retries=0, concurrency_groups=groups)(worker)


class Clock:
    """Wall and CPU seconds of this process, threads of Ray's included."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.monotonic(), time.process_time()

    def figures(self, shards: int) -> dict[str, float]:
        """Per shard, since it was made."""
        wall, cpu = time.monotonic() - self._wall, time.process_time() - self._cpu
        return {"shards_per_s": round(shards / wall, 1), "driver_cpu_ms": round(1000 * cpu / shards, 3)}


def bare(spec: Any, tasks: list[Any], workers: int) -> dict[str, float]:
    """The least that a loop over Ray actors does."""
    import ray

    worker = actors(Idle)
    crew = [worker.options(num_gpus=1, num_cpus=0).remote(spec) for _ in range(workers)]
    ray.get([member.load.remote() for member in crew])
    waiting, clock = deque(tasks), Clock()
    running = {member.run.remote(waiting.popleft()): member for _ in range(2) for member in crew if waiting}
    while running:
        [reference], _ = ray.wait(list(running), num_returns=1)
        member = running.pop(reference)
        ray.get(reference)
        if waiting:
            running[member.run.remote(waiting.popleft())] = member
    figures = clock.figures(len(tasks))
    for member in crew:
        ray.kill(member)
    return figures


def tool(request: Any, workers: int) -> dict[str, float]:
    """A run. Its hand-out begins when all workers are ready, which the bare loop's does too."""
    import ray

    from boomerang_batch.run import driver
    from boomerang_batch.run.dispatch import RayPool

    clocks: list[Clock] = []
    figures: dict[str, float] = {}

    class Timed(RayPool):
        """The pool itself; only when its work begins and ends is noted."""

        def start(self, *, stop: threading.Event) -> Any:
            facts = super().start(stop=stop)
            ray.get([member.loading for member in self._crew.members if member.loading is not None])
            return facts

        def run(self, tasks: Any, **options: Any) -> Any:
            clocks.append(Clock())
            yield from super().run(tasks, **options)
            figures.update(clocks[0].figures(len(tasks)))

    def pool(spec: Any, asked: Any) -> RayPool:
        return Timed(spec, address="local", workers=asked.workers, max_attempts=3, worker=actors(Idle))

    driver._pool = pool
    done = driver.execute(request, stop=threading.Event())
    if done.exit_code != 0 or done.shards["done"] != len(request.manifest.shards):
        sys.exit(f"the run did not do all: {done}")
    return figures


def run_arm(workers: int, folder: Path) -> dict[str, Any]:
    """Both loops over one number of workers, in one Ray."""
    import ray

    from boomerang_batch.config.pipeline import parse_recipe
    from boomerang_batch.data.manifest import load_manifest
    from boomerang_batch.run.request import RunRequest, list_tasks, open_naming
    from boomerang_batch.run.tasks import RunSpec

    shards = SHARDS_EACH.get(workers, 6000)
    manifest = folder / "manifest.yaml"
    manifest.write_text(f"format_version: 1\nname: n\nshards: ['s-{{000000..{shards - 1:06d}}}.tar']\n")
    recipe = parse_recipe(RECIPE, source="benchmark", overrides=())
    ray.init(num_cpus=2, num_gpus=workers, include_dashboard=False, log_to_driver=False, logging_level="error")
    request = RunRequest(
        recipe=recipe, manifest=load_manifest(str(manifest)), out=str(folder / "out"), address="local",
        workers=workers, device="cuda", quiet=True,
    )  # fmt: skip
    spec = RunSpec(recipe=recipe, out=str(folder / "bare"), private_dir=None, device="cuda", threads=1, epoch=1)
    Path(spec.out).mkdir()
    figures = {
        "bare": bare(spec, list_tasks(request, open_naming(request)), workers),
        "tool": tool(request, workers),
        "driver_peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3),
    }
    ray.shutdown()
    return figures


def panels(record: dict[str, Any]) -> list[figures.Panel]:
    """Medians over the number of workers, with the least and the greatest run."""

    def line(arm: str, what: str) -> figures.Line:
        runs = [(float(workers), [one[arm] for one in runs]) for workers, runs in record["runs"].items()]
        return figures.Line(
            points=[(workers, report.median(these, what)) for workers, these in runs],
            around=[report.spread(these, what) for _, these in runs],
        )

    arms = {"tool": "boomerang-batch", "bare": "bare loop over Ray actors"}
    return [
        figures.Panel(
            title=title,
            x="workers",
            y=y,
            lines={name: line(arm, what) for arm, name in arms.items()},
            band="least to greatest of all runs",
            log="x",
            y_range=(0, None),
        )
        for title, y, what in (
            ("Hand-out", "shards a second", "shards_per_s"),
            ("Driver", "CPU ms per shard", "driver_cpu_ms"),
        )
    ]


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=sorted(SHARDS_EACH))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--results", type=Path, default=report.RESULTS)
    parser.add_argument("--arm", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(run_arm(options.arm, Path(folder))))
        return 0

    os.environ["RAY_AUTH_MODE"] = "disabled"
    found = report.alternate(
        [str(workers) for workers in options.workers],
        options.repeats,
        lambda arm: report.run_json([sys.executable, __file__, "--arm", arm]),
    )
    medians = {
        workers: {
            arm: {
                name: report.median([one[arm] for one in runs], name)
                for name in ("shards_per_s", "driver_cpu_ms")
            }
            for arm in ("bare", "tool")
        }
        for workers, runs in found.items()
    }
    rows = [
        [
            workers,
            *(f"{of[arm]['shards_per_s']:.0f}" for arm in ("tool", "bare")),
            f"**{of['tool']['shards_per_s'] / of['bare']['shards_per_s']:.2f}**",
            *(f"{of[arm]['driver_cpu_ms']:.2f}" for arm in ("tool", "bare")),
            f"{report.median(found[workers], 'driver_peak_mb'):.0f}",
        ]
        for workers, of in medians.items()
    ]
    header = [
        "workers", "shards/s", "bare loop", "ratio", "driver CPU ms/shard", "bare loop", "driver's peak, MB",
    ]  # fmt: skip
    markdown = (
        "# Shards a second that one driver hands out to workers that do nothing\n\n"
        f"{report.table(header, rows)}\n\nMedians of {options.repeats} runs."
    )
    record = {"machine": report.machine(2), "runs": found}
    report.publish("driver_scaling", record, markdown, folder=options.results)
    figures.draw(panels(record), options.results / "driver_scaling.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
