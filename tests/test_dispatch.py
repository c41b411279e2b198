"""What the pool on Ray does when workers die, stop, or fail: its decisions, played on a Ray made of lists.

`test_ray` shows the same pool on real processes.
"""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayTaskError

from boomerang_batch.errors import BoomerangError, ModelError, StoppedError, StorageError
from boomerang_batch.run import crew, member, ray_cluster
from boomerang_batch.run.dispatch import RayPool
from boomerang_batch.run.tasks import RunSpec, ShardReport, Task, WorkerFacts, WorkerState
from tests import worlds

FACTS = WorkerFacts(model_digest="m", stack={"torch": "2"})
DIE = ActorDiedError()


class NotYetError(Exception):
    """What a call gives that has not been answered yet."""


@dataclass(eq=False)
class Call:
    """A call to an actor, answered when it is first looked at."""

    actor: Actor
    answer: Callable[[], Any]
    kept: Any = None

    def settle(self) -> bool:
        """Whether there is an answer by now, be it an error; once given it stays."""
        if self.kept is None:
            try:
                self.kept = DIE if self.actor.dead else self.answer()
            except NotYetError:
                return False
            except (ActorDiedError, OutOfMemoryError) as error:
                self.actor.dead, self.kept = True, error
            except Exception as error:
                wrapped = RayTaskError("run", f"Traceback of\n  {error}", error)
                self.kept = wrapped.as_instanceof_cause()
        return True

    def get(self) -> Any:
        assert self.settle(), "a get that would wait"
        if isinstance(self.kept, Exception):
            raise self.kept
        return self.kept


@dataclass(eq=False)
class Actor:
    """A worker that does what the test's `play` says."""

    number: int
    play: Play
    dead: bool = False
    asked_to_stop: bool = False

    def __getattr__(self, name: str) -> Any:
        answer = {"load": self._load, "run": self._run, "state": self._state, "stop": self._stop}[name]
        return SimpleNamespace(remote=lambda *words: answer(*words))

    def _load(self) -> Call:
        return Call(self, lambda: self.play.load(self))

    def _run(self, task: Task) -> Call:
        self.play.given.append((self.number, task.name))
        return Call(self, lambda: self.play.run(self, task))

    def _state(self) -> Call:
        return Call(self, lambda: self.play.state(self))

    def _stop(self) -> None:
        self.asked_to_stop = True


@dataclass(kw_only=True)
class Play:
    """How workers behave, and what was asked of them."""

    run: Callable[[Actor, Task], ShardReport]
    load: Callable[[Actor], WorkerFacts] = lambda actor: FACTS
    progress: dict[str, int] = field(default_factory=dict)
    """What every worker answers when asked how far it is."""
    state: Callable[[Actor], WorkerState] | None = None
    """What a worker answers when asked how it is, if more than its progress."""
    now: float = 0.0
    """Seconds on the clock of a play in `hours`."""
    leaving: dict[str, float] = field(default_factory=dict)
    """Seconds left, by machine; each worker has a machine of its own name."""
    gpus: int = 0
    actors: list[Actor] = field(default_factory=list)
    given: list[tuple[int, str]] = field(default_factory=list)
    killed: list[Actor] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.state is None:
            self.state = lambda actor: WorkerState(finished=dict(self.progress), node=f"node-{actor.number}")

    def options(self, **options: Any) -> Any:
        return SimpleNamespace(remote=self.hire)

    def hire(self, spec: RunSpec) -> Actor:
        self.actors.append(Actor(len(self.actors), self))
        assert len(self.actors) < 50, "the pool hires without end"
        return self.actors[-1]

    def wait(self, calls: Sequence[Call], *, num_returns: int = 1, timeout: float | None) -> tuple[list, list]:
        assert timeout is not None, "a wait that nothing can end"
        ready = [*itertools.islice((call for call in calls if call.settle()), num_returns)]
        self.now += timeout if len(ready) < num_returns else 0.0
        return ready, [call for call in calls if call not in ready]

    def get(self, call: Call) -> Any:
        return call.get()

    def kill(self, actor: Actor) -> None:
        actor.dead = True
        self.killed.append(actor)


def done(actor: Actor, task: Task) -> ShardReport:
    return ShardReport(name=task.name, status="done")


@pytest.fixture
def stage(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., RayPool]:
    """A pool on a play."""

    def build(play: Play, *overrides: str, workers: int | None = 1, max_attempts: int = 3) -> RayPool:
        ray = SimpleNamespace(
            is_initialized=lambda: True,
            cluster_resources=lambda: {"GPU": play.gpus},
            available_resources=dict,
            wait=play.wait,
            get=play.get,
            kill=play.kill,
        )
        monkeypatch.setattr(ray_cluster, "ray", ray)
        monkeypatch.setattr(ray_cluster, "leaving", lambda: play.leaving)
        monkeypatch.setattr(member, "_ASK_EVERY_S", 0.0)
        monkeypatch.setattr(member, "_ASK_S_PER_WORKER", 0.0)
        monkeypatch.setattr(crew, "_LOOK_EVERY_S", 0.0)
        recipe = worlds.recipe(tiny_model, "run.step_deadline_s=5", *overrides, purpose="augment")
        device = "auto" if play.gpus else "cpu"
        spec = RunSpec(recipe=recipe, out=str(tmp_path), private_dir=None, device=device, threads=1, epoch=1)
        return RayPool(spec, address="local", workers=workers, max_attempts=max_attempts, worker=play)

    return build


def work(
    pool: RayPool, *names: str, stop: threading.Event | None = None, seen: list | None = None
) -> dict[str, ShardReport]:
    """Start the pool and have it do tasks of these names; the reports by name."""
    stop = stop or threading.Event()
    pool.start(stop=stop)
    tasks = [Task(name=name, url=f"{name}.tar", source_stem=name) for name in names]
    progress = lambda name, finished: None if seen is None else seen.append((name, finished))  # noqa: E731
    return {report.name: report for report in pool.run(tasks, stop=stop, progress=progress)}


def test_every_task_is_done_once(stage):
    play = Play(run=done)
    reports = work(stage(play, workers=2), *"abcde")
    assert {name: report.status for name, report in reports.items()} == dict.fromkeys("abcde", "done")
    assert sorted(name for _, name in play.given) == list("abcde")


@pytest.mark.timeout(20)
@pytest.mark.parametrize("error", [DIE, RuntimeError("CUDA error")], ids=["death", "error"])
def test_a_worker_lost_while_stopping_ends_the_run(stage, error):
    stop = threading.Event()

    def run(actor, task):
        stop.set()
        if not actor.asked_to_stop:
            raise NotYetError
        raise error

    play = Play(run=run)
    assert work(stage(play), "a", "b", "c", stop=stop) == {}
    assert len(play.actors) == 1  # nobody is hired any more


@pytest.mark.slow
@pytest.mark.timeout(20)
def test_a_stop_before_anything_was_handed_out_hands_out_nothing(stage):
    play, stop = Play(run=done), threading.Event()
    pool = stage(play)
    pool.start(stop=stop)
    stop.set()
    assert list(pool.run([Task(name="a", url="a", source_stem="a")], stop=stop, progress=print)) == []
    assert play.given == []


def test_tasks_end_as_stopped_when_asked_to(stage):
    stop = threading.Event()

    def run(actor, task):
        stop.set()
        if not actor.asked_to_stop:
            raise NotYetError
        return ShardReport(name=task.name, status="stopped")

    reports = work(stage(Play(run=run)), "a", "b", "c", stop=stop)
    assert {name: report.status for name, report in reports.items()} == {"a": "stopped", "b": "stopped"}


@pytest.mark.timeout(20)
def test_waiting_for_a_first_worker_can_be_stopped(stage):
    stop = threading.Event()

    def load(actor):
        stop.set()
        raise NotYetError

    with pytest.raises(StoppedError, match="run the same command"):
        work(stage(Play(run=done, load=load)), "a", stop=stop)


def test_an_error_of_ours_keeps_its_words_and_loses_the_traceback(stage):
    def fail(actor, task):
        raise StorageError("can't write out/a.tar: no space")

    with pytest.raises(StorageError) as storage_error:
        work(stage(Play(run=fail)), "a")
    assert str(storage_error.value) == "can't write out/a.tar: no space"

    def refuse(actor):
        raise ModelError("no such folder")

    with pytest.raises(ModelError) as model_error:
        work(stage(Play(run=done, load=refuse)), "a")
    assert str(model_error.value) == "no such folder"


def test_a_worker_that_fails_everything_is_replaced_and_costs_no_shard(stage):
    """A CUDA error stays with its process: each further task there fails at once, innocent as it is."""
    broken = set()

    def run(actor, task):
        if task.name == "c" and not broken:
            broken.add(actor.number)
        if actor.number in broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return done(actor, task)

    play = Play(run=run)
    reports = work(stage(play), *"abcdefgh")
    assert {report.status for report in reports.values()} == {"done"}
    assert len(reports) == 8
    assert [actor.number for actor in play.killed] == [0]


def test_a_task_that_always_fails_is_quarantined_and_its_neighbours_are_not(stage):
    def run(actor, task):
        if task.name == "c":
            raise KeyError("pixel")
        return done(actor, task)

    reports = work(stage(Play(run=run), workers=2, max_attempts=2), *"abcdef")
    assert {name for name, report in reports.items() if report.status == "quarantined"} == {"c"}
    assert len(reports) == 6
    assert "after 2 attempts" in reports["c"].reason
    assert "pixel" in reports["c"].reason


def test_a_death_while_getting_further_is_no_attempt(stage):
    play, looks = Play(run=done), Counter[int]()

    def run(actor, task):
        looks[actor.number] += 1
        play.progress["a"] = actor.number + 1
        if looks[actor.number] < 3:
            raise NotYetError  # the pool asks how far it is, and hears
        if actor.number < 4:
            raise DIE
        return done(actor, task)

    play.run = run
    assert work(stage(play, max_attempts=1), "a")["a"].status == "done"


def test_a_death_no_further_than_the_last_is_an_attempt(stage):
    play, looks = Play(run=done), Counter[int]()

    def run(actor, task):
        looks[actor.number] += 1
        play.progress["a"] = 7
        if looks[actor.number] < 3:
            raise NotYetError
        raise DIE

    play.run = run
    assert work(stage(play, max_attempts=2), "a")["a"].status == "quarantined"
    assert len(looks) == 3  # the first got further than ever


def test_a_shards_attempts_in_one_phase_are_none_in_the_next(stage):
    play, tries = Play(run=done), Counter[str]()

    def run(actor, task):
        tries[task.phase] += 1
        if tries[task.phase] == 1:
            raise DIE
        return done(actor, task)

    play.run = run
    pool, stop = stage(play, max_attempts=2), threading.Event()
    pool.start(stop=stop)
    for phase in ("latents", "outputs"):
        task = Task(name="a", url="a.tar", source_stem="a", phase=phase)
        [report] = pool.run([task], stop=stop, progress=lambda name, finished: None)
        assert report.status == "done"


def test_a_lost_worker_is_killed_for_it_may_only_be_out_of_reach(stage):
    def run(actor, task):
        if actor.number == 0:
            raise DIE
        return done(actor, task)

    play = Play(run=run)
    work(stage(play), "a")
    assert [actor.number for actor in play.killed] == [0]


def test_workers_that_die_loading_don_t_cost_the_run_while_others_work(stage):
    looks = Counter[str]()

    def load(actor):
        if actor.number != 1:
            raise DIE
        return FACTS

    def run(actor, task):
        looks[task.name] += 1
        if looks[task.name] < 3:
            raise NotYetError
        return done(actor, task)

    play = Play(run=run, load=load)
    assert len(work(stage(play, workers=2), *"abcdefgh")) == 8
    assert len(play.actors) < 6


def test_when_every_worker_dies_loading_the_run_says_so(stage):
    def load(actor):
        raise DIE

    with pytest.raises(BoomerangError, match="could not load the model"):
        work(stage(Play(run=done, load=load), workers=2), "a")


def test_progress_of_a_task_that_is_over_is_not_told(stage):
    waits = []

    def run(actor, task):
        waits.append(task.name)
        if len(waits) < 4:
            raise NotYetError
        return done(actor, task)

    seen: list = []
    work(stage(Play(run=run, progress={"over": 9, "a": 1})), "a", seen=seen)
    assert set(seen) == {("a", 1)}


# --- workers that hang, machines that come and go ---


def slowly(turns: int) -> Callable[[Actor, Task], ShardReport]:
    """Do a task when it has been looked at for some turns, unless its worker is asked to stop."""
    looks = Counter[tuple[int, str]]()

    def run(actor: Actor, task: Task) -> ShardReport:
        looks[actor.number, task.name] += 1
        if actor.asked_to_stop:
            return ShardReport(name=task.name, status="stopped")
        if looks[actor.number, task.name] < turns:
            raise NotYetError
        return done(actor, task)

    return run


def test_a_worker_whose_device_hangs_is_replaced(stage):
    """It answers, but its one step never ends: a device that hangs."""

    def run(actor, task):
        if actor.number == 0:
            raise NotYetError
        return done(actor, task)

    play = Play(run=run, state=lambda actor: WorkerState(stalled_s=6.0 if actor.number == 0 else 0.0))
    reports = work(stage(play), "a", "b", "c")
    assert {report.status for report in reports.values()} == {"done"}
    assert len(reports) == 3
    assert play.killed[0].number == 0


def test_a_shard_that_hangs_every_device_is_quarantined(stage):
    play = Play(run=lambda actor, task: done(actor, task))

    def run(actor, task):
        if task.name == "b":
            raise NotYetError
        return done(actor, task)

    play.run, play.state = run, lambda actor: WorkerState(stalled_s=6.0)
    reports = work(stage(play, max_attempts=2), "a", "b", "c")
    assert {name: report.status for name, report in reports.items()} == {
        "a": "done",
        "b": "quarantined",
        "c": "done",
    }
    assert "its device was at one step for 6 s (run.step_deadline_s: 5)" in reports["b"].reason


def test_a_worker_that_does_not_answer_is_replaced(stage, monkeypatch):
    monkeypatch.setattr(member, "_SILENT_S", 0.05)

    def run(actor, task):
        if actor.number == 0:
            raise NotYetError
        return done(actor, task)

    def state(actor):
        if actor.number == 0:
            raise NotYetError
        return WorkerState()

    play = Play(run=run, state=state)
    assert {report.status for report in work(stage(play), "a", "b").values()} == {"done"}
    assert play.killed[0].number == 0


def test_machines_that_leave_give_their_tasks_back_in_time_and_cost_no_attempt(stage):
    play = Play(run=slowly(8), leaving={"node-0": 10.0, "node-1": 10.0})
    reports = work(stage(play, max_attempts=1), *"abc")
    assert {name: report.status for name, report in reports.items()} == dict.fromkeys("abc", "done")
    assert {actor.number for actor in play.killed if actor.asked_to_stop} == {0, 1}
    assert all(number == 2 for number, name in play.given[-3:])


def test_with_time_left_a_task_is_finished_on_a_machine_that_leaves_and_none_begun(stage):
    play = Play(run=slowly(5), leaving={"node-0": 100.0})
    reports = work(stage(play), *"abcd")
    assert len(reports) == 4
    assert not play.actors[0].asked_to_stop
    assert [name for number, name in play.given if number == 0] == ["a", "b"]


def test_a_death_on_a_machine_known_to_leave_is_no_attempt(stage):
    def run(actor, task):
        if actor.number > 0:
            return done(actor, task)
        play.leaving["node-0"] = 100.0
        looks.append(task.name)
        if len(looks) < 6:
            raise NotYetError
        raise DIE

    looks: list[str] = []
    play = Play(run=run)
    assert work(stage(play, max_attempts=1), "a")["a"].status == "done"


def test_gpus_that_join_are_used(stage):
    play = Play(run=slowly(6), gpus=1)

    def state(actor):
        play.gpus = 3
        return WorkerState()

    play.state = state
    assert len(work(stage(play, workers=None), *"abcdefgh")) == 8
    assert {number for number, _ in play.given} == {0, 1, 2}


def test_more_workers_than_gpus_are_wanted_all_the_same_and_told(stage, caplog):
    play = Play(run=done, gpus=2)
    pool = stage(play, workers=5)
    pool.start(stop=threading.Event())
    assert len(play.actors) == 5
    assert "5 workers wanted but Ray has 2 GPUs" in caplog.text


def test_workers_without_work_are_let_go_before_the_end(stage):
    """Machines can then be given back while the last shards are done."""
    turns = Counter[str]()

    def run(actor, task):
        turns[task.name] += 1
        if task.name == "long" and (turns["long"] < 4 or len(play.killed) < 2):
            assert turns["long"] < 50, "idle workers are kept"
            raise NotYetError
        return done(actor, task)

    play = Play(run=run)
    assert len(work(stage(play, workers=3), "long", *"abcd")) == 5


def test_memory_that_ran_out_is_told_apart(stage):
    def run(actor, task):
        raise OutOfMemoryError("Task was killed due to the node running low on memory")

    reports = work(stage(Play(run=run), max_attempts=2), "a")
    assert reports["a"].status == "quarantined"
    assert "its machine ran out of memory" in reports["a"].reason


def test_shards_are_spread_before_they_are_stacked(stage):
    """Else half the workers have two tasks each and the others none, and are let go."""
    play = Play(run=slowly(6))
    assert len(work(stage(play, workers=4), *"abcd")) == 4
    assert sorted(number for number, _ in play.given) == [0, 1, 2, 3]


def test_a_machine_that_can_not_load_or_differs_does_not_end_what_others_do(stage, caplog):
    others = iter(
        [RuntimeError("CUDA error"), ModelError("no such folder"), WorkerFacts(model_digest="m", stack={})]
    )

    def load(actor):
        if actor.number == 0:
            return FACTS
        answer = next(others, FACTS)
        if isinstance(answer, Exception):
            raise answer
        return answer

    reports = work(stage(Play(run=slowly(8), load=load), workers=2), *"abcdef")
    assert {report.status for report in reports.values()} == {"done"}
    assert len(reports) == 6
    for words in ("CUDA error", "no such folder", "workers differ"):
        assert words in caplog.text


def test_workers_that_can_never_load_are_not_hired_without_end(stage):
    def load(actor):
        if actor.number != 0:
            raise DIE
        return FACTS

    play = Play(run=slowly(20), load=load, gpus=4)
    assert len(work(stage(play, workers=None), *"abcdef")) == 6
    assert len(play.actors) <= 7


# --- workers that are waited for ---


@pytest.fixture
def hours(stage, monkeypatch: pytest.MonkeyPatch) -> Callable[..., RayPool]:
    """A pool whose time passes only while it waits in vain, half a second each, so that hours cost nothing."""

    def build(play: Play, *overrides: str, **options: Any) -> RayPool:
        pool = stage(play, *overrides, **options)
        clock = SimpleNamespace(monotonic=lambda: play.now)
        for module in (crew, member):
            monkeypatch.setattr(module, "time", clock)
        return pool

    return build


def never(actor: Actor) -> Any:
    raise NotYetError


def test_waiting_for_gpus_is_told_and_ends_in_time(hours, caplog):
    play = Play(run=done, load=never, state=never, gpus=2)
    with pytest.raises(StoppedError) as error:
        work(hours(play, "run.start_timeout_s=300", workers=4), "a")
    standing = "0 of 4 workers have started; the cluster has 2 GPUs, 0 of them free"
    assert str(error.value) == (
        f"no worker was ready within 300 s (run.start_timeout_s): {standing}; run the same command to try again"
    )
    told = [record for record in caplog.messages if record.startswith(f"waiting for GPUs: {standing}")]
    assert len(told) == 5  # after 20 s, and every minute
    assert play.killed == []  # however silent: they have no process that could answer


def test_a_first_worker_is_waited_for_for_ever_by_default(hours, caplog):
    def load(actor):
        return FACTS if play.now > 9_000 else never(actor)

    play = Play(run=done, load=load, state=never, gpus=1)
    assert work(hours(play), "a")["a"].status == "done"
    assert len(play.actors) == 1
    assert 140 < caplog.text.count("waiting for GPUs") <= 150


@pytest.mark.parametrize("gpus", [0, 2])
def test_nobody_waits_for_gpus_who_has_one_or_needs_none(hours, caplog, gpus):
    """They load, or are about to: that has a deadline of its own."""
    play = Play(run=done, load=never, state=never if gpus == 0 else None, gpus=gpus)
    with pytest.raises(StoppedError, match=f"{gpus} of 2 workers have started; run the same"):
        work(hours(play, "run.start_timeout_s=300", workers=2), "a")
    assert "waiting" not in caplog.text


def test_who_waits_for_gpus_after_all_are_lost_is_told_too(hours, caplog):
    def load(actor):
        return FACTS if actor.number == 0 or play.now > 100 else never(actor)

    def run(actor, task):
        if actor.number == 0:
            raise DIE
        return done(actor, task)

    play = Play(run=run, load=load, state=never, gpus=1)
    assert work(hours(play), "a")["a"].status == "done"
    assert caplog.text.count("waiting for GPUs: 0 of 1 workers have started") == 2


def test_while_some_work_others_wait_for_gpus_without_a_word(hours, caplog):
    def run(actor, task):
        return done(actor, task) if play.now > 200 else never(actor)

    play = Play(run=run, gpus=1)
    play.load = lambda actor: FACTS if actor.number == 0 else never(actor)
    play.state = lambda actor: WorkerState() if actor.number == 0 else never(actor)
    assert len(work(hours(play, workers=2), *"abcd")) == 4
    assert "waiting" not in caplog.text
    assert len(play.actors) == 2


def test_a_worker_that_takes_too_long_to_load_is_replaced(hours, caplog):
    def load(actor):
        return never(actor) if actor.number == 0 else FACTS

    play = Play(run=done, load=load, state=lambda actor: WorkerState(loading_s=play.now))
    assert work(hours(play, "run.load_deadline_s=7000"), "a")["a"].status == "done"
    assert [actor.number for actor in play.killed][:1] == [0]
    assert "it was loading the model for 7000 s (run.load_deadline_s: 7000)" in caplog.text
    assert 7000 <= play.now < 7010


def test_a_worker_that_freezes_while_it_loads_is_replaced(hours, caplog):
    def load(actor):
        return never(actor) if actor.number == 0 else FACTS

    def state(actor):
        return WorkerState() if play.now < 1000 else never(actor)

    play = Play(run=done, load=load, state=state)
    assert work(hours(play), "a")["a"].status == "done"
    assert [actor.number for actor in play.killed][:1] == [0]
    assert "no answer from it for 60 s" in caplog.text
    assert 1060 <= play.now < 1070


@pytest.mark.slow
def test_when_every_worker_hangs_loading_the_run_says_so(hours):
    began: dict[int, float] = {}

    def state(actor):
        return WorkerState(loading_s=play.now - began.setdefault(actor.number, play.now))

    play = Play(run=done, load=never, state=state)
    with pytest.raises(
        BoomerangError, match="in a row could not load the model, the last because it was loading"
    ):
        work(hours(play), "a")
    assert play.now < 3 * 3600 + 60  # though each hour apart


@pytest.mark.slow
def test_a_worker_that_hangs_loading_while_others_work_is_replaced(hours):
    def load(actor):
        return never(actor) if actor.number == 1 else FACTS

    def run(actor, task):
        if task.name == "a" and not any(other.number == 1 for other in play.killed):
            raise NotYetError
        return done(actor, task)

    def state(actor):
        return WorkerState(loading_s=play.now if actor.number == 1 else 0.0)

    play = Play(run=run, load=load, state=state)
    assert len(work(hours(play, workers=2), "a", *"bcdef")) == 6
    assert play.killed[0].number == 1
    assert len(play.actors) == 3


def test_a_question_from_before_a_worker_had_a_process_is_not_held_against_it(hours):
    looks: list[float] = []

    def load(actor):
        return FACTS if play.now > 1000 else never(actor)

    def state(actor):
        if play.now > 1000:
            looks.append(play.now)
        return never(actor) if len(looks) < 4 else WorkerState()

    play = Play(run=slowly(8), load=load, state=state, gpus=1)
    assert work(hours(play), "a")["a"].status == "done"
    assert len(looks) >= 4
    assert len(play.actors) == 1
