"""How large a batch is, through the runner: as the recipe says, probed once and frozen, or as memory allows."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from boomerang_batch.cli import main
from boomerang_batch.diffusion.denoiser import Condition
from boomerang_batch.errors import ConfigError, ModelError
from boomerang_batch.run import dispatch, loading, ray_cluster
from boomerang_batch.run.dispatch import RayPool
from boomerang_batch.run.tasks import RunSpec, WorkerFacts
from boomerang_batch.run.verify import verify
from tests import stand_ins, worlds
from tests.stand_ins import Pixelwise


class Cramped(Pixelwise):
    """Memory holds `room` samples, at first or after so many calls."""

    def __init__(self, room: int, *, after: int = 0) -> None:
        super().__init__()
        self._room = room
        self._after = after

    def denoise(self, x_t: Tensor, tau: Tensor, conditions: Sequence[Condition]) -> Tensor:
        if len(self.batches) >= self._after and len(x_t) > self._room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().denoise(x_t, tau, conditions)


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    return worlds.save_shards(tmp_path / "in", shards=2, samples=12)


def test_a_fixed_batch_that_does_not_fit_says_which_does(
    tmp_path: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch
):
    stand_ins.install(monkeypatch, Cramped(3))
    with pytest.raises(ModelError, match="memory runs out with batch_size: 8; set batch_size: 2") as refusal:
        worlds.run(stand_ins.recipe("batch_size=8"), manifest, tmp_path / "out")
    assert refusal.value.exit_code == 2
    assert worlds.tree(tmp_path / "out") == {}
    stand_ins.install(monkeypatch, Cramped(0))
    with pytest.raises(ModelError, match="not even 1 fits"):
        worlds.run(stand_ins.recipe("batch_size=8"), manifest, tmp_path / "out")


@pytest.mark.slow
def test_memory_that_runs_out_on_the_way_loses_nothing(
    tmp_path: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch
):
    recipe, out = stand_ins.recipe("batch_size=8"), tmp_path / "out"
    stand_ins.install(monkeypatch, Pixelwise())
    worlds.run(recipe, manifest, tmp_path / "calm")
    stand_ins.install(monkeypatch, Cramped(4, after=7))
    with pytest.raises(ModelError, match=r"ran out with batch_size: 8; batch_size: 4 fits") as refusal:
        worlds.run(recipe, manifest, out)
    assert refusal.value.exit_code == 2
    stand_ins.install(monkeypatch, Pixelwise())  # the other process, which took the memory, has ended
    assert worlds.run(recipe, manifest, out).exit_code == 0
    assert worlds.tree(out) == worlds.tree(tmp_path / "calm")


@pytest.mark.parametrize("after", [0, 10])
def test_an_elastic_run_goes_on_with_half(
    tmp_path: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch, after: int
):
    model = Cramped(4, after=after)
    stand_ins.install(monkeypatch, model)
    recipe = stand_ins.recipe("batch_size=8", "batching=elastic")
    assert worlds.run(recipe, manifest, tmp_path / "out").rows == {"ok": 24}
    assert verify(str(tmp_path / "out"), deep=True).problems == ()
    sizes = {row.batch_size for row in worlds.rows(tmp_path / "out")}
    assert sizes >= {4}
    assert (8 in sizes) == (after > 0)
    assert max(model.batches[after:]) == 4
    assert json.loads((tmp_path / "out" / "run.json").read_text())["stack"]["batch_size"] == "8"


def test_an_elastic_run_halves_once(tmp_path: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch):
    stand_ins.install(monkeypatch, Cramped(2, after=7))
    with pytest.raises(ModelError, match="ran out with batch_size: 4; batch_size: 2 fits"):
        worlds.run(stand_ins.recipe("batch_size=8", "batching=elastic"), manifest, tmp_path / "out")
    stand_ins.install(monkeypatch, Cramped(2))
    with pytest.raises(ModelError, match="memory runs out with batch_size: 8; set batch_size: 2"):
        worlds.run(stand_ins.recipe("batch_size=8", "batching=elastic"), manifest, tmp_path / "other")


@pytest.mark.parametrize("batching", ["fixed", "elastic"])
def test_rows_tell_the_batch_they_were_made_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batching: str):
    model = Pixelwise()
    stand_ins.install(monkeypatch, model)
    recipe = stand_ins.recipe("batch_size=8", f"batching={batching}")
    # Three full batches and two: however the reader's pace splits them, two are on their way in the end.
    worlds.run(recipe, worlds.save_shards(tmp_path / "in", shards=1, samples=26), tmp_path / "out")
    sizes = [row.batch_size for row in worlds.rows(tmp_path / "out")]
    if batching == "fixed":
        assert set(sizes) == {8}
        assert set(model.batches[6:]) == {8}  # after the trials
    else:
        assert min(sizes) < 8
        assert set(sizes) <= set(model.batches)
        assert sizes.count(8) > 12  # the tail alone is shorter


def probed(monkeypatch: pytest.MonkeyPatch, size: int) -> list[int]:
    """Have the probe find that `size` is best; returns what it tries."""
    tried: list[int] = []

    def throughput(denoiser: object, images: Tensor, count: int, recipe: object) -> float:
        tried.append(count)
        return float(min(count, size))

    monkeypatch.setattr(loading, "_throughput", throughput)
    return tried


@pytest.mark.slow
def test_an_automatic_batch_is_probed_once_and_frozen(
    tmp_path: Path, tiny_model: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch
):
    recipe, out = worlds.recipe(tiny_model, "batch_size=auto", purpose="augment"), tmp_path / "out"
    tried = probed(monkeypatch, 2)
    worlds.run(recipe, manifest, tmp_path / "whole")
    assert tried == [1, 2, 4]
    with pytest.MonkeyPatch.context() as patch:
        stop = worlds.stop_within_the_second_shard(patch, out)
        assert worlds.run(recipe, manifest, out, stop=stop).exit_code == 75
    assert json.loads((out / "run.json").read_text())["stack"]["batch_size"] == "2"

    def fail(*words: object) -> float:
        raise AssertionError("probed again")

    monkeypatch.setattr(loading, "_throughput", fail)
    assert worlds.run(recipe, manifest, out).exit_code == 0
    assert {row.batch_size for row in worlds.rows(out)} == {2}
    assert worlds.tree(out) == worlds.tree(tmp_path / "whole")


@pytest.mark.slow
def test_the_real_probe_finds_a_size_that_runs(tmp_path: Path, tiny_model: Path):
    manifest = worlds.save_shards(tmp_path / "few", shards=1, samples=2)
    worlds.run(worlds.recipe(tiny_model, "batch_size=auto"), manifest, tmp_path / "out")
    size = int(json.loads((tmp_path / "out" / "run.json").read_text())["stack"]["batch_size"])
    assert size.bit_count() == 1
    assert {row.batch_size for row in worlds.rows(tmp_path / "out")} == {size}


def test_the_probe_looks_at_the_largest_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shapes: list[torch.Size] = []
    monkeypatch.setattr(
        loading, "_throughput", lambda denoiser, images, *more: shapes.append(images.shape) or 1.0
    )
    stand_ins.install(monkeypatch, Pixelwise())
    manifest = worlds.save_shards(tmp_path / "few", shards=1, samples=1)
    wide = stand_ins.recipe("batch_size=auto", "images.sizes=[[8, 8], [24, 16], [16, 8]]")
    worlds.run(wide, manifest, tmp_path / "out")
    assert {shape[1:] for shape in shapes} == {(1, 16, 24)}


def test_doctor_shows_what_an_automatic_batch_comes_to(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
):
    probed(monkeypatch, 8)
    pipeline = tmp_path / "tiny.yaml"
    pipeline.write_text(worlds.recipe_text(tiny_model))
    shown = CliRunner().invoke(main, ["doctor", str(pipeline), "--threads", "1", "--set", "batch_size=auto"])
    assert [line.split()[1] for line in shown.stdout.splitlines() if line.startswith("batch_size")] == ["8"]


def test_on_ray_the_first_worker_probes_and_the_others_are_told(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
):
    """Two that probe apart could come to two sizes, and their outputs would differ."""
    hired: list[int | None] = []

    class Actor:
        """Finds a batch of 16 unless it is told one."""

        def __init__(self, spec: RunSpec) -> None:
            hired.append(spec.batch_size)
            facts = WorkerFacts(model_digest="m", stack={"batch_size": str(spec.batch_size or 16)})
            self.load = SimpleNamespace(remote=lambda: facts)

    ray = SimpleNamespace(
        is_initialized=lambda: True,
        cluster_resources=dict,
        wait=lambda calls, **how: (list(calls), []),
        get=lambda call: call,
        kill=lambda actor: None,
    )
    for module in (dispatch, ray_cluster):
        monkeypatch.setattr(module, "ray", ray)

    def start(*overrides: str, batch_size: int | None = None) -> list[int | None]:
        hired.clear()
        recipe = worlds.recipe(tiny_model, *overrides, purpose="augment")
        spec = RunSpec(
            recipe=recipe,
            out=str(tmp_path),
            private_dir=None,
            device="cpu",
            threads=1,
            epoch=1,
            batch_size=batch_size,
        )
        worker = SimpleNamespace(options=lambda **options: SimpleNamespace(remote=Actor))
        RayPool(spec, address="local", workers=3, max_attempts=1, worker=worker).start(stop=threading.Event())
        return list(hired)

    assert start("batch_size=auto") == [None, 16, 16]
    assert start("batch_size=auto", batch_size=4) == [4, 4, 4]  # a resumed run knows
    assert start() == [None, None, None]


@pytest.mark.slow
def test_a_batch_of_another_run_is_no_batch_of_this_one(
    tmp_path: Path, tiny_model: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch
):
    probed(monkeypatch, 2)
    worlds.run(worlds.recipe(tiny_model, "batch_size=auto", purpose="augment"), manifest, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"batch_size \(auto there, 4 now\)"):
        worlds.run(worlds.recipe(tiny_model, purpose="augment"), manifest, tmp_path / "out")


def test_loading_leaves_no_openmp_helpers_behind(tiny_model: Path):
    """They would make those of the engine's own thread sleep at every barrier."""

    def tasks() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    torch.ones(1 << 20).mul(2)  # whatever helpers this thread has are there from the start
    before = tasks()
    engine, _ = loading.load(worlds.recipe(tiny_model, purpose="augment"), device="cpu", threads=4)
    deadline = time.monotonic() + 10
    while tasks() > before and time.monotonic() < deadline:  # they end a moment after their thread
        time.sleep(0.01)
    assert tasks() <= before
    engine.close()


def test_the_trial_has_the_runs_threads_whatever_a_factory_did(monkeypatch: pytest.MonkeyPatch):
    seen = set()

    class Watching(Pixelwise):
        def denoise(self, x_t: Tensor, tau: Tensor, conditions: Sequence[Condition]) -> Tensor:
            seen.add(torch.get_num_threads())
            return super().denoise(x_t, tau, conditions)

    def load(spec: object, *, device: str, threads: int | None) -> Pixelwise:
        torch.set_num_threads(1)
        return Watching()

    before = torch.get_num_threads()
    monkeypatch.setattr("boomerang_batch.run.loading.load_denoiser", load)
    engine, _ = loading.load(stand_ins.recipe("batch_size=auto"), device="cpu", threads=2)
    engine.close()
    torch.set_num_threads(before)
    assert seen == {2}


class Unhurried(Pixelwise):
    """Takes its time, so that shards are read while it computes."""

    def denoise(self, x_t: Tensor, tau: Tensor, conditions: Sequence[Condition]) -> Tensor:
        time.sleep(0.02)
        return super().denoise(x_t, tau, conditions)


@pytest.mark.slow
def test_one_shards_last_samples_share_their_calls_with_the_nexts_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    calls = []
    for shards in (1, 6):
        model = Unhurried()
        stand_ins.install(monkeypatch, model)
        manifest = worlds.save_shards(tmp_path / f"in{shards}", shards=shards, samples=1)
        assert worlds.run(stand_ins.recipe(), manifest, tmp_path / f"out{shards}").exit_code == 0
        calls.append(len(model.batches))
    (row,) = worlds.rows(tmp_path / "out1")
    assert calls[1] - calls[0] < 4 * row.evaluations  # five more shards, two of them at a time
