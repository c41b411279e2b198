"""Threads that compute: how many PyTorch may use for one, and work in one that ends."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

import torch

Result = TypeVar("Result")


def use_threads(count: int) -> None:
    """Let operations called from this thread, and no other, use `count` threads.

    `torch.set_num_threads` alone does not do that: a thread's first operation takes over what any thread set
    last, in whose favour it forgets what was set for itself. Asking for the number is such a first operation.
    """
    torch.get_num_threads()
    torch.set_num_threads(count)


def run_apart(work: Callable[[], Result], *, name: str) -> Result:
    """What `work` returns or raises, done in a thread of its own, which an interrupted caller leaves behind.

    (A `ThreadPoolExecutor` would make Ctrl-C wait for it.)
    """
    future: Future[Result] = Future()

    def serve() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # it is raised again on the caller's thread
            future.set_exception(error)

    threading.Thread(target=serve, name=name, daemon=True).start()
    return future.result()
