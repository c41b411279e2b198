"""Draws made of what other draws gave: the right ones come together, and the best of several is kept."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from boomerang_batch.errors import SampleError
from boomerang_batch.run.chained import Choosing, Refining, chained
from boomerang_batch.run.stages import Made


def made(sample: int, trial: int = 0, variant: int = 0, batch_size: int = 4) -> Any:
    prepared: Any = SimpleNamespace(source=SimpleNamespace(offset=sample))
    return Made(
        prepared=prepared,
        variant=variant,
        pass_number=1,
        pieces=(),
        batch_size=batch_size,
        dtype="float32",
        trial=trial,
    )


@dataclasses.dataclass
class Echo:
    """A drawer for which a draw is the output that is to come of it, given in an order of its own."""

    order: Callable[[list[Any]], list[Any]] = list
    exact: bool = False
    calls: list[str] = dataclasses.field(default_factory=list)

    def run(self, draws: Iterable[Any], *, stopped: Callable[[], bool]) -> Iterator[Any]:
        self.calls.append("run")
        yield from self.order(list(draws))

    def run_in_float32(self, draws: Iterable[Any], *, stopped: Callable[[], bool]) -> Iterator[Any]:
        self.calls.append("float32")
        yield from self.order(list(draws))


def again(one: Made) -> Iterator[Any]:
    yield dataclasses.replace(one, batch_size=2)


@given(
    worths=st.lists(
        st.lists(st.sampled_from([0.0, 1.0, 2.0, float("nan"), float("inf")]), min_size=3, max_size=3),
        min_size=1,
        max_size=4,
    ),
    shuffled=st.randoms(use_true_random=False),
)
def test_the_best_trial_is_kept_whatever_the_order(worths, shuffled):
    def order(draws: list[Any]) -> list[Any]:
        shuffled.shuffle(draws)
        return draws

    choosing = Choosing(
        encoding=Echo(order),
        decoding=Echo(order),
        again=again,
        worth=lambda one: (worths[one.prepared.source.offset][one.trial],),
        trials=3,
    )
    draws = [made(sample, trial) for sample in range(len(worths)) for trial in range(3)]
    found = {one.prepared.source.offset: one for one in choosing.run(draws, stopped=lambda: False)}
    assert len(found) == len(worths)
    for sample, one in found.items():
        known = [worth if worth == worth else float("-inf") for worth in worths[sample]]
        assert one.trial == known.index(max(known))
        assert one.batch_size == 4, "the code is what comes out, not what it was judged by"


@given(
    unjudged=st.sets(st.sampled_from([(sample, trial) for sample in range(3) for trial in range(3)])),
    shuffled=st.randoms(use_true_random=False),
)
def test_a_trial_that_nobody_can_judge_costs_its_own_variant_alone_whatever_the_order(unjudged, shuffled):
    def order(draws: list[Any]) -> list[Any]:
        shuffled.shuffle(draws)
        return draws

    def worth(one: Made) -> tuple[float, ...]:
        place = (one.prepared.source.offset, one.trial)
        if place in unjudged:
            raise SampleError("not-judged", f"trial {one.trial}")
        return (float(one.trial),)

    choosing = Choosing(encoding=Echo(order), decoding=Echo(order), again=again, worth=worth, trials=3)
    draws = [made(sample, trial) for sample in range(3) for trial in range(3)]
    found = {one.prepared.source.offset: one for one in choosing.run(draws, stopped=lambda: False)}
    assert set(found) == {0, 1, 2}
    for sample, one in found.items():
        failed = sorted(trial for of, trial in unjudged if of == sample)
        told = None if one.refused is None else one.refused.detail
        assert (one.trial, told) == ((failed[0], f"trial {failed[0]}") if failed else (2, None))


def test_what_may_not_be_refined_is_refused_afterwards():
    def check(one: Made) -> None:
        if one.prepared.source.offset == 1:
            raise SampleError("output-equals-input", "for this test")

    refining = Refining(drawing=Echo(), again=again, check=check)
    found = list(refining.run([made(sample) for sample in range(3)], stopped=lambda: False))
    assert [one.refused is not None for one in found] == [False, True, False]


def test_what_is_refined_twice_in_float32_is_so_both_times():
    drawing = Echo()
    refining = Refining(drawing=drawing, again=again, check=lambda one: None)
    assert [one.batch_size for one in refining.run_in_float32([made(0)], stopped=lambda: False)] == [2]
    assert drawing.calls == ["float32", "float32"]
    assert not refining.exact


def test_whoever_has_enough_ends_the_first_drawer_too():
    ended = []

    def first() -> Iterator[Any]:
        try:
            for sample in itertools.count():
                yield made(sample)
        finally:
            ended.append(True)

    def second(draws: Iterable[Any]) -> Iterator[Any]:
        try:
            yield from draws
        finally:
            draws.close()

    pairs = chained(first(), again, second)
    before, after = next(pairs)
    assert (before.batch_size, after.batch_size) == (4, 2)
    pairs.close()
    assert ended == [True]
