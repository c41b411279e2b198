"""Ray as the pool needs it: joining a cluster, its GPUs, the machines that are leaving, and calls' answers."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import threading
import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError, WorkerCrashedError

from boomerang_batch.errors import BoomerangError
from boomerang_batch.run import log_lines

DEATHS = (RayActorError, OutOfMemoryError, WorkerCrashedError)
"""What a call raises whose worker is gone, or out of reach."""

_log = logging.getLogger(__name__)


def connect(address: str) -> bool:
    """Join the cluster at `address`, or start one where that is `local`. Whether it is ours to leave again.

    Raises BoomerangError when there is none.
    """
    log_lines.speak_for("ray")
    if ray.is_initialized():
        return False
    # Ray installs signal handlers of its own; ours decide how a run ends.
    main = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM) if main}
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "error", "configure_logging": False}
    if address == "local":
        # A throwaway token keeps other users of this machine out, and Ray from writing one to HOME.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        options["include_dashboard"] = False
    try:
        ray.init(address=address, **options)
    except (OSError, RuntimeError, ValueError) as error:
        raise BoomerangError(f"can't reach a Ray cluster at {address}: {error}") from error
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return True


def leave() -> None:
    """Leave a cluster, and end it if it is ours."""
    ray.shutdown()


def end(actor: Any) -> None:
    """Kill a worker, whatever it is at."""
    ray.kill(actor)


def gpus() -> int:
    """GPUs of all machines that are there now, busy ones too."""
    return int(ray.cluster_resources().get("GPU", 0))


def offer(resource: str) -> str:
    """What there is of a resource, GPU or CPU, for people."""
    total, free = (
        int(found.get(resource, 0)) for found in (ray.cluster_resources(), ray.available_resources())
    )
    return f"the cluster has {total} {resource}s, {free} of them free"


def leaving() -> dict[str, float]:
    """Machines that are to be shut down: seconds left for each node id (hex)."""
    try:
        from ray._private.state import state

        deadlines = state.get_draining_nodes()
    except Exception as error:  # private to Ray, so that any release may change it
        _log.debug("Ray does not tell which machines are leaving: %s", error)
        return {}
    # Without a deadline of its own a machine leaves when Ray finds it idle.
    return {node: (at_ms / 1000 - time.time() if at_ms else 0.0) for node, at_ms in deadlines.items()}


def answered(references: Sequence[Any], *, timeout_s: float) -> list[Any]:
    """Those calls that have an answer, as soon as there are any or time is over."""
    calls = list(references)
    if not calls or not ray.wait(calls, num_returns=1, timeout=timeout_s)[0]:
        return []
    ready, _ = ray.wait(calls, num_returns=len(calls), timeout=0)
    return list(ready)


def answer(reference: Any) -> Any:
    """What a call returned. An error of ours comes as it was raised, not with Ray's traceback for its words."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, BoomerangError):
            raise error.cause from None
        raise


def why(error: BaseException) -> str:
    """What ended a worker, in a line."""
    if isinstance(error, OutOfMemoryError):
        return (
            "its machine ran out of memory, and Ray ended some of what ran there; run fewer workers on a "
            f"machine, or set a smaller batch_size ({first_line(error)})"
        )
    return f"its worker died: {first_line(error)}"


def first_line(error: BaseException) -> str:
    """The first line of what an error says; of one that a worker raised without Ray's traceback."""
    said = error.cause if isinstance(error, RayTaskError) else error
    return str(said).strip().partition("\n")[0]
