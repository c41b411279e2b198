"""Network namespaces joined by a bridge, which stand for machines on one network. Needs root and iproute2.

Names begin with the pid of who made them, so that several lanes may run at once, and the next one takes away
what a killed one has left.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

from tests.lanes.processes import find_program

PREFIX = "bbl"
"""Before the maker's pid; with that and a number a name must not pass the 15 characters of a device's."""
_GONE_WITHIN_S = 30.0
_NAMESPACES = Path("/run/netns")


def require_root() -> None:
    """Raise RuntimeError, saying what to do, where namespaces can't be made."""
    find_program("ip", fix="install iproute2 (apt-get install iproute2)")
    if os.geteuid() != 0:
        raise RuntimeError(
            "a cluster of network namespaces needs root: run the lane as root, or in a container"
        )


def add_bridge(name: str, *, address: str) -> None:
    """A bridge on which this machine has `address`."""
    ip("link", "add", name, "type", "bridge")
    try:
        ip("addr", "add", address, "dev", name)
        ip("link", "set", name, "up")
    except BaseException:
        ip("link", "del", name)
        raise


def add(name: str, *, address: str, bridge: str) -> None:
    """A namespace that has `address` on a bridge, by a device of the namespace's name."""
    ip("netns", "add", name)
    ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
    ip("link", "set", name, "master", bridge, "up")
    ip("-n", name, "addr", "add", address, "dev", "eth0")
    for device in ("lo", "eth0"):
        ip("-n", name, "link", "set", device, "up")


def sweep() -> None:
    """Take away what lanes left that were killed: their pid is in the names of all they made."""
    namespaces = {path.name for path in _NAMESPACES.glob(f"{PREFIX}*")}
    links = {path.name for path in Path("/sys/class/net").glob(f"{PREFIX}*")}
    left = {name for name in namespaces | links if _maker_is_dead(name)}
    for name in left & namespaces:
        kill_all(name)
        ip("netns", "del", name)  # its link goes with it
    for name in left - namespaces:
        with contextlib.suppress(RuntimeError):
            ip("link", "del", name)


def _maker_is_dead(name: str) -> bool:
    pid = name.removeprefix(PREFIX).partition("n")[0]
    return pid.isdecimal() and not Path(f"/proc/{pid}").exists()


def free_network() -> str:
    """The first three numbers of a network that nothing here uses; processes begin at different ones."""
    routes = ip("-4", "route", "show", "table", "all")
    for step in range(1 << 14):
        at = (os.getpid() + step) % (1 << 14)
        network = f"10.{64 + at // 256}.{at % 256}"
        if f"{network}." not in routes:
            return network
    raise RuntimeError("no network of the form 10.64.0.0/24 is free")


def kill_all(namespace: str) -> None:
    """End everything that runs in a namespace, at once."""
    deadline = time.monotonic() + _GONE_WITHIN_S
    while left := pids(namespace):
        if time.monotonic() > deadline:
            raise RuntimeError(f"{namespace}: processes {left} do not end")
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def pids(namespace: str) -> list[int]:
    """Everything that runs in a namespace; nothing where that is gone."""
    listed = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, check=False)
    return [int(word) for word in listed.stdout.split()]


def ip(*words: str) -> str:
    """What the command says. Raises RuntimeError when it fails."""
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout
