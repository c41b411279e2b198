"""The best batch, found on made-up machines, and memory that runs out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from boomerang_batch.diffusion.batch_size import (
    find_batch_size,
    in_fixed_batches,
    is_out_of_memory,
    largest_that_fits,
)
from boomerang_batch.errors import ModelError

CPU_MEMORY = "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to "
FAULTS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    MemoryError(),
    RuntimeError(CPU_MEMORY + "allocate 4398046511104 bytes. Error code 12 (Cannot allocate memory)"),
    RuntimeError("[enforce fail] not enough memory: you tried to allocate 137438953472 bytes."),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GiB, max allowed: 9.07 GiB)."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]

fault = pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__ + str(fault)[:12])


def machine(speeds, *, memory=None, fault=None):
    """A `measure` for a machine with these speeds at 1, 2, 4, ...; more than `memory` samples don't fit."""
    tried = []

    def measure(size):
        tried.append(size)
        if memory is not None and size > memory:
            raise fault
        return speeds[size.bit_length() - 1]

    return measure, tried


@pytest.mark.parametrize(
    ("speeds", "chosen", "probed"),
    [
        ([10, 20, 40, 80, 160], 16, [1, 2, 4, 8, 16]),  # still growing at the limit
        ([10, 18, 30, 31, 62], 4, [1, 2, 4, 8]),  # what lies beyond a step that gains nothing isn't tried
        ([10, 10, 10, 10, 10], 1, [1, 2]),
        ([10, 9, 99, 99, 99], 1, [1, 2]),
        ([10, 10.6, 11.2, 11.9, 12.6], 16, [1, 2, 4, 8, 16]),
        ([100, 120, 130, 124, 0], 4, [1, 2, 4, 8]),
        ([100, 120, 125, 0, 0], 2, [1, 2, 4]),  # within 5 % of the best, and half the size
    ],
)
def test_the_smallest_size_near_the_best_is_chosen(speeds, chosen, probed):
    measure, tried = machine(speeds)
    assert find_batch_size(measure, 16) == chosen
    assert tried == probed


def test_the_limit_is_kept():
    measure, tried = machine([2.0**i for i in range(12)])
    assert find_batch_size(measure, 50) == 32
    assert tried[-1] == 32
    assert find_batch_size(measure, 1) == 1


@fault
def test_memory_that_runs_out_ends_the_probing(fault):
    measure, tried = machine([10, 20, 40, 80, 160], memory=6, fault=fault)
    assert find_batch_size(measure, 4096) == 4
    assert tried == [1, 2, 4, 8]
    with pytest.raises(ModelError, match="not even a batch of one"):
        find_batch_size(machine([10], memory=0, fault=fault)[0], 16)


@given(st.lists(st.floats(0.01, 1e6), min_size=1, max_size=10))
def test_nothing_probed_is_much_faster_than_what_is_chosen(speeds):
    measure, tried = machine(speeds)
    size = find_batch_size(measure, 2 ** (len(speeds) - 1))
    measured = {size: speeds[size.bit_length() - 1] for size in tried}
    assert measured[size] >= 0.95 * max(measured.values())
    assert not any(other < size and speed >= 0.95 * max(measured.values()) for other, speed in measured.items())


@fault
def test_out_of_memory_is_recognised(fault):
    assert is_out_of_memory(fault)


def test_a_real_allocation_that_fails_is_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize(
    "error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("x"), KeyboardInterrupt()]
)
def test_other_errors_are_not_and_go_through(error):
    assert not is_out_of_memory(error)

    def fail(size):
        raise error

    with pytest.raises(type(error)):
        find_batch_size(fail, 4)
    with pytest.raises(type(error)):
        largest_that_fits(fail, 4)


@fault
@pytest.mark.parametrize(
    ("start", "memory", "size"), [(64, 20, 16), (64, 64, 64), (50, 20, 12), (7, 1, 1), (8, 0, 0)]
)
def test_the_size_that_fits_is_found_by_halving(fault, start, memory, size):
    measure, _ = machine([1.0] * 12, memory=memory, fault=fault)
    assert largest_that_fits(measure, start) == size


def test_a_failed_attempt_keeps_nothing_alive():
    """While an exception lives so do its frames, and with them the memory that the next attempt needs."""
    import weakref

    held = []

    def attempt(size):
        assert all(reference() is None for reference in held)
        block = torch.zeros(4)
        held.append(weakref.ref(block))
        raise MemoryError

    assert largest_that_fits(attempt, 8) == 0
    assert len(held) == 4


# --- batches of one size ---


@given(count=st.integers(1, 9), size=st.integers(1, 4))
def test_rows_go_through_in_batches_of_exactly_one_size(count, size):
    seen = []

    def function(batch):
        seen.append(batch)
        return 10 * batch

    rows = 1.0 + torch.arange(count).view(-1, 1)
    assert torch.equal(in_fixed_batches(function, rows, size), 10 * rows)
    assert [len(batch) for batch in seen] == [size] * -(-count // size)
    assert not seen[-1][count - size * (len(seen) - 1) :].any()  # padded with zeros


@fault
@pytest.mark.parametrize(("memory", "told"), [(3, "batch_size: 2 fits"), (0, "not even 1 fits")])
def test_an_autoencoder_without_memory_is_told_what_fits(fault, memory, told):
    measure, tried = machine([1.0] * 12, memory=memory, fault=fault)
    with pytest.raises(ModelError, match=told) as caught:
        in_fixed_batches(lambda batch: batch * measure(len(batch)), torch.zeros(6, 1), 4)
    assert "model.autoencoder.batch_size: 4" in str(caught.value)
    assert tried[:2] == [4, 2]


def test_an_autoencoders_other_errors_go_through():
    def fail(batch):
        raise ValueError("shapes")

    with pytest.raises(ValueError, match="shapes"):
        in_fixed_batches(fail, torch.zeros(6, 1), 4)
