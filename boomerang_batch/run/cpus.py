"""How many processors this process may use: a container's share, not the machine's."""

from __future__ import annotations

import contextlib
import math
import os
from pathlib import Path

_CGROUP_2 = Path("/sys/fs/cgroup/cpu.max")
_CGROUP_1 = (Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"), Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us"))


def usable_cpus() -> int:
    """At least 1. What the process is bound to, or the container's limit, whichever is less."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = _limit()
    return max(bound if limit is None else min(bound, math.floor(limit)), 1)


def _limit() -> float | None:
    """Processors of time that the container gets; None where there is no limit."""
    with contextlib.suppress(OSError, ValueError):
        quota, period = _CGROUP_2.read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    with contextlib.suppress(OSError, ValueError):
        quota_us, period_us = (int(path.read_text()) for path in _CGROUP_1)
        return None if quota_us < 0 else quota_us / period_us
    return None
