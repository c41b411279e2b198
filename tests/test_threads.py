"""Work in a thread that ends: its result, its error, and a caller who does not wait for it."""

from __future__ import annotations

import signal
import threading
import time

import pytest

from boomerang_batch.diffusion.threads import run_apart


def test_the_result_comes_from_another_thread_which_ends():
    names = []
    assert run_apart(lambda: names.append(threading.current_thread().name) or 7, name="apart") == 7
    assert names == ["apart"]
    for thread in threading.enumerate():
        if thread.name == "apart":
            thread.join(5)
            assert not thread.is_alive()


@pytest.mark.parametrize("error", [ValueError("no"), MemoryError(), SystemExit(2)])
def test_what_it_raises_is_raised_here(error):
    def work() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        run_apart(work, name="apart")
    assert caught.value is error


def test_an_interrupt_does_not_wait_for_the_work():
    """Ctrl-C while a model loads."""
    release, main = threading.Event(), threading.main_thread()
    interrupt = threading.Timer(0.1, lambda: signal.pthread_kill(main.ident, signal.SIGINT))
    # A test run that was started in the background ignores Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    interrupt.start()
    since = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            run_apart(lambda: release.wait(30), name="apart")
    finally:
        release.set()
        interrupt.join()
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - since < 10
