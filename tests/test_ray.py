"""The same run on Ray: the bytes do not depend on who did it, and no death costs anything.

`make test-chaos` runs the kill test in its long form: 20 killed workers and 5 killed drivers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from boomerang_batch.config.pipeline import Recipe
from boomerang_batch.data.manifest import Manifest, load_manifest
from boomerang_batch.errors import ModelError, StoppedError
from boomerang_batch.run import crew
from boomerang_batch.run.dispatch import RayPool
from boomerang_batch.run.tasks import RunSpec, ShardReport, Task
from boomerang_batch.run.verify import verify
from boomerang_batch.run.worker import Worker
from tests import worlds

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning")]

WorkerClass = Worker.__ray_metadata__.modified_class
LONG = os.environ.get("BOOMERANG_CHAOS") == "long"


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A Ray with two logical GPUs, which the pool joins because it is there."""
    # A cluster's workers have the environment that the cluster was started in, not the driver's.
    environment = {"RAY_AUTH_MODE": "disabled", "BOOMERANG_SECRET": worlds.SECRET}
    os.environ |= environment
    ray.init(
        address="local", num_cpus=2, num_gpus=2, include_dashboard=False, log_to_driver=False,
        logging_level="error", configure_logging=False,
    )  # fmt: skip
    yield
    ray.shutdown()
    for name in environment:
        del os.environ[name]


def actor(worker: type) -> Any:
    """A variation of the worker as an actor with the worker's own settings."""
    return ray.remote(max_restarts=0, max_task_retries=0, concurrency_groups={"work": 2, "ctl": 1})(worker)


def run_pool(
    out: Path, recipe: Recipe, manifest: Manifest, *, workers: int | None, worker: Any, max_attempts: int = 3
) -> dict[str, ShardReport]:
    """Every shard of `manifest` through a pool of `worker`s; the reports by name."""
    out.mkdir()
    spec = RunSpec(recipe=recipe, out=str(out), private_dir=None, device="auto", threads=1, epoch=1)
    pool = RayPool(spec, address="local", workers=workers, max_attempts=max_attempts, worker=worker)
    tasks = [Task(name=entry.stem, url=entry.url, source_stem=entry.stem) for entry in manifest.shards]
    try:
        pool.start(stop=threading.Event())
        reports = pool.run(tasks, stop=threading.Event(), progress=lambda name, finished: None)
        return {report.name: report for report in reports}
    finally:
        pool.close()


@pytest.mark.usefixtures("secret")
def test_bytes_do_not_depend_on_workers_or_order(tmp_path: Path, tiny_model: Path, cluster: None):
    manifest = load_manifest(str(worlds.save_shards(tmp_path / "in", shards=5, samples=6)))
    shuffled = dataclasses.replace(manifest, shards=tuple(reversed(manifest.shards)))
    recipe = worlds.recipe(tiny_model)
    worlds.run(recipe, manifest, tmp_path / "inline")
    worlds.run(recipe, manifest, tmp_path / "one", address="local", workers=1)
    report = worlds.run(recipe, shuffled, tmp_path / "two", address="local", workers=2)
    assert report.shards["done"] == 5
    expected = worlds.tree(tmp_path / "inline")
    assert worlds.tree(tmp_path / "one") == expected
    assert worlds.tree(tmp_path / "two") == expected


def test_two_gpus_two_actors_and_one_load_each(tmp_path: Path, tiny_model: Path, cluster: None):
    loads = tmp_path / "loads"
    loads.mkdir()

    class Watched(WorkerClass):
        """The real worker, leaving a file for each runner it makes and each task it does."""

        def load(self):
            made = self._runner is None
            facts = super().load()
            if made:
                (loads / f"load-{os.getpid()}-{os.environ['CUDA_VISIBLE_DEVICES']}").touch(exist_ok=False)
            return facts

        def run(self, task):
            (loads / f"task-{os.getpid()}-{task.name}").touch()
            # The first worker could do everything before the second has loaded: wait until both are at work.
            deadline = time.monotonic() + 120
            while len(_workers_at_work(loads)) < 2 and time.monotonic() < deadline:
                time.sleep(0.05)
            return super().run(task)

    recipe = worlds.recipe(tiny_model, purpose="augment")
    manifest = load_manifest(str(worlds.save_shards(tmp_path / "in", shards=6, samples=4)))
    reports = run_pool(tmp_path / "out", recipe, manifest, workers=None, worker=actor(Watched))
    assert [report.status for report in reports.values()] == ["done"] * 6
    loaded = [path.name.split("-")[1:] for path in loads.glob("load-*")]
    assert sorted(gpu for _, gpu in loaded) == ["0", "1"]
    assert _workers_at_work(loads) == {pid for pid, _ in loaded}


def _workers_at_work(loads: Path) -> set[str]:
    return {path.name.split("-")[1] for path in loads.glob("task-*")}


def test_a_model_that_can_not_load_is_one_clear_error(tmp_path: Path, tiny_model: Path, cluster: None):
    manifest = worlds.save_shards(tmp_path / "in", shards=1, samples=1)
    recipe = worlds.recipe(tiny_model, f"model.source={tmp_path / 'nowhere'}")
    with pytest.raises(ModelError, match="nowhere"):
        worlds.run(recipe, manifest, tmp_path / "out", address="local")


def test_a_poisoned_shard_is_quarantined_and_its_neighbours_are_not(
    tmp_path: Path, tiny_model: Path, cluster: None
):
    class Poisoned(WorkerClass):
        """The real worker, but one shard kills its process, as a broken driver or library would."""

        def run(self, task):
            if task.name == "s-002":
                os._exit(13)
            return super().run(task)

    manifest = load_manifest(str(worlds.save_shards(tmp_path / "in", shards=5, samples=4)))
    recipe = worlds.recipe(tiny_model, purpose="augment")
    out = tmp_path / "out"
    reports = run_pool(out, recipe, manifest, workers=1, worker=actor(Poisoned), max_attempts=2)
    assert {name for name, report in reports.items() if report.status == "quarantined"} == {"s-002"}
    assert "after 2 attempts" in reports["s-002"].reason
    assert sorted(path.name for path in out.glob("*_stats.json")) == [
        f"s-{number:03d}_stats.json" for number in (0, 1, 3, 4)
    ]


def test_waiting_for_gpus_is_told_and_ends_with_the_start_timeout(
    tmp_path: Path,
    tiny_model: Path,
    cluster: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    @ray.remote(num_gpus=2, num_cpus=0)
    class Other:
        """Somebody else's, who has all GPUs."""

        def there(self) -> bool:
            return True

    other = Other.remote()
    assert ray.get(other.there.remote())
    manifest = load_manifest(str(worlds.save_shards(tmp_path / "in", shards=2, samples=2)))
    recipe = worlds.recipe(tiny_model, "run.start_timeout_s=3", purpose="augment")
    standing = "0 of 3 workers have started; the cluster has 2 GPUs, 0 of them free"
    monkeypatch.setattr(crew, "_TELL_AFTER_S", 1.0)
    with pytest.raises(StoppedError, match=standing):
        run_pool(tmp_path / "out", recipe, manifest, workers=3, worker=Worker)
    assert caplog.text.count(f"waiting for GPUs: {standing}") == 1

    # Who waits gets the GPUs as soon as there are any.
    threading.Timer(2.0, ray.kill, [other]).start()
    recipe = worlds.recipe(tiny_model, purpose="augment")
    reports = run_pool(tmp_path / "later", recipe, manifest, workers=1, worker=Worker)
    assert [report.status for report in reports.values()] == ["done"] * 2


def test_a_worker_that_hangs_while_it_loads_is_replaced(
    tmp_path: Path, tiny_model: Path, cluster: None, caplog: pytest.LogCaptureFixture
):
    hung = tmp_path / "hung"

    class Away:
        """What is read from a file system that is away."""

        reached = frozenset()

        @property
        def recipe(self):
            hung.touch()
            time.sleep(600)

    class Hanging(WorkerClass):
        """The real worker, but the first of them hangs while it loads, and its clock runs ahead."""

        def load(self):
            if not hung.exists():
                self._spec = Away()
            return super().load()

        @ray.method(concurrency_group="ctl")
        def state(self):
            state = super().state()
            ahead_s = 28.0 if state.loading_s and isinstance(self._spec, Away) else 0.0
            return dataclasses.replace(state, loading_s=state.loading_s + ahead_s)

    manifest = load_manifest(str(worlds.save_shards(tmp_path / "in", shards=2, samples=2)))
    recipe = worlds.recipe(tiny_model, "run.load_deadline_s=30", purpose="augment")
    reports = run_pool(tmp_path / "out", recipe, manifest, workers=1, worker=actor(Hanging))
    assert [report.status for report in reports.values()] == ["done"] * 2
    assert "it was loading the model for" in caplog.text


@pytest.mark.timeout(1800)
def test_kills_at_random_moments_change_no_byte(tmp_path: Path, tiny_model: Path, secret: str):
    """Workers and drivers are SIGKILLed while shards are made; the tree ends as if nothing had happened."""
    worker_kills, driver_kills, shards = (20, 5, 120) if LONG else (4, 1, 40)
    manifest = worlds.save_shards(tmp_path / "in", shards=shards, samples=6)
    recipe_file = tmp_path / "recipe.yaml"
    recipe_file.write_text(worlds.recipe_text(tiny_model))
    slower = ("t.fraction=1.0", "steps=20")
    recipe = worlds.recipe(tiny_model, *slower)
    worlds.run(recipe, manifest, tmp_path / "calm")

    out = tmp_path / "wild"
    command = [
        sys.executable, "-m", "boomerang_batch", "run", str(recipe_file), str(manifest), str(out),
        "--private-dir", f"{out}-private", "--address", "local", "--workers", "2", "--threads", "1",
        "--device", "cpu", *(word for override in slower for word in ("--set", override)),
    ]  # fmt: skip
    dice = random.Random(2210_12100)
    killed_workers = killed_drivers = done_at_kill = 0
    while True:
        driver = subprocess.Popen(
            command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        committed = _markers(out)
        try:
            while driver.poll() is None:
                time.sleep(dice.uniform(0.05, 0.6))
                fresh = _markers(out) - committed
                if killed_drivers < driver_kills and fresh and dice.random() < 0.5:
                    driver.kill()
                    killed_drivers += 1
                    break
                # A kill waits for some progress since the last: three deaths in a row while loading end a run.
                workers = _descendants(driver.pid, "ray::Worker")
                if killed_workers < worker_kills and workers and _markers(out) > done_at_kill:
                    done_at_kill = _markers(out)
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(dice.choice(workers), signal.SIGKILL)
                        killed_workers += 1
            stdout, stderr = driver.communicate()
        finally:
            _end_session(driver.pid)
        if driver.returncode != -signal.SIGKILL:
            break
    assert driver.returncode == 0, (stdout, stderr)
    assert (killed_drivers, killed_workers) == (driver_kills, worker_kills)
    assert worlds.tree(out) == worlds.tree(tmp_path / "calm")
    assert verify(str(out), deep=True).problems == ()


def _markers(out: Path) -> int:
    return sum(1 for _ in out.glob("*_stats.json"))


def _descendants(root: int, name: str) -> list[int]:
    """Processes below `root` whose title starts with `name`."""
    parents = {}
    titles = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            pid = int(folder.name)
            parents[pid] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            titles[pid] = (folder / "cmdline").read_text()
    found = []
    for pid, title in titles.items():
        ancestor = pid
        while ancestor in parents and ancestor != root:
            ancestor = parents[ancestor]
        if ancestor == root and title.startswith(name):
            found.append(pid)
    return found


def _end_session(leader: int) -> None:
    """Whatever a killed driver's Ray left running; it ends by itself, but not at once."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError, ProcessLookupError):
            session = int((folder / "stat").read_text().rpartition(")")[2].split()[3])
            if session == leader:
                os.kill(int(folder.name), signal.SIGKILL)
