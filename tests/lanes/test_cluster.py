"""Jobs on a real Ray cluster whose machines die, leave, join and hang: no byte of the output tells of it.

Every event is seen to have happened before the next one. The chronicle of it all is kept, and its path and what
was computed in vain are printed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from boomerang_batch.run.verify import verify
from tests import worlds
from tests.lanes import counted_model
from tests.lanes.chronicle import Chronicle
from tests.lanes.cluster import DRAIN_S, NodesOfRay
from tests.lanes.commands import Place, ended, run_words

pytestmark = [pytest.mark.lane, pytest.mark.timeout(1200)]

SHARDS, SAMPLES, STEPS = 160, 4, 20
SECONDS_A_CALL = 0.2
RUN_OPTIONS = ("--set", "run.journal_every=2")


@dataclass(frozen=True, kw_only=True)
class Ground:
    """What every test here needs: the inputs, and what an undisturbed run on this machine makes of them."""

    inputs: Path
    site: Path
    calm: Mapping[str, bytes]
    needed: int
    """Evaluations of the draws of an undisturbed run."""
    checks: int
    """Evaluations of what a worker checks when it has loaded the model."""


@pytest.fixture(scope="module")
def ground(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Ground:
    folder = tmp_path_factory.mktemp("ground") / "in"
    counted_model.save_shards(folder, shards=SHARDS, samples=SAMPLES)
    (folder / "recipe.yaml").write_text(counted_model.recipe_text(tiny_model, steps=STEPS))
    site, counts, out = counted_model.install(folder / "site"), folder / "counts", folder / "out"
    place = Place(work=folder / "work", environment=counted_model.environment(site, counts))
    words = run_words(f"{folder}/recipe.yaml", f"{folder}/manifest.yaml", str(out), place)
    place.call(*words, *RUN_OPTIONS).expect(0)
    needed = sum(row.evaluations or 0 for row in worlds.rows(out))
    checks = counted_model.evaluations(counts) - needed
    assert 0 <= checks < 10  # or the counter counts wrongly
    return Ground(inputs=folder, site=site, calm=worlds.tree(out), needed=needed, checks=checks)


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A cluster of three machines with a GPU each, and one OUT."""

    cluster: NodesOfRay
    place: Place
    out: Path
    counts: Path
    words: tuple[str, ...]
    chronicle: Chronicle

    def submit(self) -> subprocess.Popen[str]:
        """Ask for the run and wait for it, in a process of its own."""
        self.chronicle.note("submitted")
        return self.place.begin(*self.words)

    def markers(self) -> int:
        return sum(1 for _ in self.out.glob("*_stats.json"))

    def at_work(self) -> set[str]:
        """Names of the nodes with a worker that has evaluated something."""
        done = counted_model.evaluations_of(self.counts)
        return {node.name for pid, node in self.cluster.workers().items() if done.get(pid)}

    def log(self) -> str:
        """What the drivers of all jobs have said."""
        jobs = self.place.call("list", "--address", self.cluster.url).expect(0).stdout.split()
        ids = [word for word in jobs if word.startswith("bb-")]
        calls = [self.place.call("logs", job, "--address", self.cluster.url) for job in ids]
        return "".join(said.expect(0).stdout for said in calls)


@pytest.fixture
def scene(ground: Ground, tmp_path: Path, short_folder: Path) -> Iterator[Scene]:
    counts = tmp_path / "counts"
    model = counted_model.environment(ground.site, counts, seconds_a_call=SECONDS_A_CALL)
    # A secret is never sent: the cluster's machines have it.
    nodes = {**model, "BOOMERANG_SECRET": worlds.SECRET, "TMPDIR": str(short_folder)}
    kept, path = tempfile.mkstemp(prefix="cluster-chronicle-", suffix=".txt")
    os.close(kept)
    chronicle = Chronicle(Path(path))
    place = Place(work=tmp_path / "work", environment=model)
    place.environment.pop("BOOMERANG_SECRET")
    out = tmp_path / "out"
    submit = (
        "submit", f"{ground.inputs}/recipe.yaml", f"{ground.inputs}/manifest.yaml", str(out), *RUN_OPTIONS,
        "--private-dir", str(place.private), "--threads", "1", "--shared-files", "--wait",
    )  # fmt: skip
    cluster = NodesOfRay(short_folder)
    cluster.environment |= nodes
    with cluster:
        for _ in range(3):
            cluster.add()
        chronicle.note("cluster", f"a head and {len(cluster.nodes) - 1} nodes with a GPU each at {cluster.url}")
        yield Scene(
            cluster=cluster,
            place=place,
            out=out,
            counts=counts,
            words=(*submit, "--address", cluster.url),
            chronicle=chronicle,
        )


def until(true: Callable[[], object], process: subprocess.Popen[str], *, within_s: float = 180) -> None:
    """Wait for something to come true while a command is at work."""
    deadline = time.monotonic() + within_s
    while not true():
        assert process.poll() is None, ended(process)
        assert time.monotonic() < deadline
        time.sleep(0.1)


@contextlib.contextmanager
def attended(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """A command that is not waited for when what happens meanwhile fails."""
    try:
        yield process
    except BaseException:
        process.kill()
        ended(process)
        raise


def judge(scene: Scene, ground: Ground, capsys: pytest.CaptureFixture[str]) -> None:
    """The output is as if nothing had happened; what that took is written down and printed."""
    assert worlds.tree(scene.out) == ground.calm
    assert verify(str(scene.out), deep=True).problems == ()
    evaluated = counted_model.evaluations_of(scene.counts)
    drawn = sum(evaluated.values()) - ground.checks * len(evaluated)
    wasted = drawn - ground.needed
    figures = (
        f"{SHARDS} shards byte-identical in {scene.chronicle.seconds:.0f} s by {len(evaluated)} workers; "
        f"{drawn} evaluations where {ground.needed} are needed: {wasted} in vain ({wasted / ground.needed:.1%})"
    )
    scene.chronicle.note("figures", figures)
    with capsys.disabled():
        print(f"\n{figures}\nchronicle: {scene.chronicle.path}")
    assert 0 <= wasted < ground.needed / 2


def test_a_run_survives_everything_that_befalls_a_cluster(
    scene: Scene, ground: Ground, capsys: pytest.CaptureFixture[str]
):
    cluster, chronicle = scene.cluster, scene.chronicle
    frozen_on, killed, drained = list(cluster.nodes.values())[1:]
    with attended(scene.submit()) as first:
        until(lambda: scene.markers() >= 3 and len(scene.at_work()) == 3, first)
        chronicle.note("at work", f"all nodes; {scene.markers()} shards done")

        (frozen,) = frozen_on.workers()
        os.kill(frozen, signal.SIGSTOP)
        frozen_at = chronicle.seconds
        chronicle.note("worker frozen", f"process {frozen} on {frozen_on.address}")

        late = cluster.add()
        chronicle.note("node joined", late.address)
        until(lambda: late.name in scene.at_work(), first)
        chronicle.note("late node at work", late.address)

        assert killed.name in scene.at_work()
        killed.kill()
        chronicle.note("node killed", killed.address)
        until(lambda: killed.address not in cluster.alive(), first)
        chronicle.note("node dead", f"{killed.address}, as the head sees it")

        assert drained.name in scene.at_work()
        began = time.monotonic()
        drained.drain()
        chronicle.note("node drained", drained.address)
        until(lambda: drained.gone, first, within_s=DRAIN_S + 10)
        assert time.monotonic() - began < DRAIN_S  # of itself, before anybody had to end it
        chronicle.note("node left", drained.address)

        # Nobody but the pool's own clock notices this one; its end frees its GPU, which is used again.
        until(lambda: "no answer from it for" in scene.log(), first)
        until(lambda: frozen not in frozen_on.workers(), first)
        late_s = chronicle.seconds - frozen_at
        chronicle.note("frozen worker given up and ended", f"{late_s:.0f} s later at most")
        until(lambda: frozen_on.name in scene.at_work(), first)
        chronicle.note("its GPU at work again", frozen_on.address)
        # The killed node's worker and the frozen one, but not the drained node's.
        assert scene.log().count("a worker is lost") == 2
        done = scene.markers()
        assert 3 < done < SHARDS - 3
        (driver,) = cluster.head.drivers()
        os.kill(driver, signal.SIGKILL)
        chronicle.note("driver killed", f"{done} shards done")
    (first_job,) = ended(first).expect(1).stdout.split()

    with attended(scene.submit()) as second:
        until(lambda: scene.at_work() == {late.name, frozen_on.name}, second)
    resumed = ended(second).expect(0)
    assert resumed.stdout.split() == [f"{first_job}-2"]
    chronicle.note("finished", resumed.stderr.splitlines()[-1])
    judge(scene, ground, capsys)


def test_a_machine_that_is_cut_off_goes_on_and_harms_nothing(
    scene: Scene, ground: Ground, capsys: pytest.CaptureFixture[str]
):
    """The disk that all share is not on that network: what the lost worker finishes, it still publishes."""
    cluster, chronicle = scene.cluster, scene.chronicle
    lost = list(cluster.nodes.values())[-1]
    with attended(scene.submit()) as job:
        until(lambda: scene.markers() >= 3 and len(scene.at_work()) == 3, job)
        (worker,) = lost.workers()
        lost.cut_off()
        chronicle.note("node cut off", lost.address)
        before = counted_model.evaluations_of(scene.counts)[worker]
        until(lambda: "a worker is lost" in scene.log(), job)
        chronicle.note("its worker given up")
        more = counted_model.evaluations_of(scene.counts)[worker] - before
        assert more > 0
        chronicle.note("it went on", f"{more} evaluations since")
        until(lambda: lost.address not in cluster.alive(), job)
        chronicle.note("node dead", f"{lost.address}, as the head sees it")
        assert scene.markers() < SHARDS
    chronicle.note("finished", ended(job).expect(0).stderr.splitlines()[-1])
    judge(scene, ground, capsys)
