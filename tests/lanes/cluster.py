"""A Ray cluster whose machines are network namespaces of this one, joined by a bridge.

Each node has an address, ports and processes of its own, started by plain `ray start` as on any machine; memory
and disks are shared. The head has no CPUs to give, as on Kubernetes; the others have fake GPUs. This machine is
on the bridge too, at `gateway`. Nodes can be killed, cut off, drained and added at any time. All of it is ended
by process id, for `ray stop` would end every other Ray here as well. Needs root and iproute2.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from tests.lanes import namespaces
from tests.lanes.processes import ServerProcess

DRAIN_S = 30.0
"""The notice that a node gives which is asked to end: Ray's default, and Kubernetes'."""
_BIN = Path(sys.executable).parent
_NOT_FOR_NODES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
_HEAD_PORT, _DASHBOARD_PORT = 6379, 8265
_FIXED_PORTS = (
    "--dashboard-agent-grpc-port=52366",
    "--dashboard-agent-listen-port=52365",
    "--metrics-export-port=8298",
    "--runtime-env-agent-port=52367",
)
"""Every node has all ports to itself. A raylet waits 15 s for ports that it is not told, and breaks down."""
_JOINED_WITHIN_S = 120.0
"""Some five seconds where nothing else runs."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """One machine."""

    name: str
    """Of its namespace."""
    address: str
    server: ServerProcess
    """Its `ray start --block`."""

    def processes(self) -> dict[int, str]:
        """Command lines of everything that runs on it, by pid."""
        found = {}
        for pid in namespaces.pids(self.name):
            with contextlib.suppress(OSError):
                found[pid] = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()
        return found

    def workers(self) -> list[int]:
        """Its processes that are, or are about to be, workers of a run."""
        return [pid for pid, title in self.processes().items() if title.startswith("ray::Worker")]

    def drivers(self) -> list[int]:
        """Its processes that are drivers of a run."""
        return [pid for pid, title in self.processes().items() if " -m boomerang_batch run " in title]

    def kill(self) -> None:
        """End all of it at once; others see its connections close, if it has not been cut off."""
        namespaces.kill_all(self.name)
        self.server.kill()

    def cut_off(self) -> None:
        """Take it from the network: to others it is silent from now on, as after a power cut."""
        namespaces.ip("-n", self.name, "link", "set", "eth0", "down")

    def drain(self) -> None:
        """Have it give notice and leave, as Kubernetes and spot markets do: SIGTERM. Does not wait."""
        (blocking,) = [
            pid for pid, title in self.processes().items() if " start " in title and "--block" in title
        ]
        os.kill(blocking, signal.SIGTERM)

    @property
    def gone(self) -> bool:
        """Whether nothing of it runs any more."""
        return not namespaces.pids(self.name)


class NodesOfRay:
    """A head, and nodes that come and go. Use as a context manager; `folder`'s name must be short."""

    def __init__(self, folder: Path) -> None:
        namespaces.require_root()
        self.folder = folder
        self._tag = f"{namespaces.PREFIX}{os.getpid()}"
        self._network = namespaces.free_network()
        self.gateway = f"{self._network}.254"
        self._head_address = f"{self._network}.1"
        self.url = f"http://{self._head_address}:{_DASHBOARD_PORT}"
        """Of the Jobs API and the dashboard."""
        self.nodes: dict[str, Node] = {}
        self._made = 0
        self.environment = {
            "PATH": f"{_BIN}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "RAY_AUTH_MODE": "disabled",
            "RAY_TMPDIR": str(folder),
            "RAY_USAGE_STATS_ENABLED": "0",
            # Its 15 would starve workers beside whatever else the cores are used for.
            "RAY_worker_niceness": "0",
            "RAY_raylet_start_wait_time_s": f"{_JOINED_WITHIN_S:.0f}",
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": f"{DRAIN_S:g}",
        }
        """What nodes, and so drivers and workers, have beside this process's own; to be added to beforehand."""

    def __enter__(self) -> NodesOfRay:
        namespaces.sweep()
        namespaces.add_bridge(self._tag, address=f"{self.gateway}/24")
        try:
            self.head = self._start(
                "--head",
                "--num-cpus=0",
                "--num-gpus=0",
                f"--port={_HEAD_PORT}",
                f"--dashboard-host={self._head_address}",
                f"--dashboard-port={_DASHBOARD_PORT}",
            )
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def add(self, *, gpus: int = 1) -> Node:
        """A new node, once the head counts it in."""
        return self._start(f"--address={self._head_address}:{_HEAD_PORT}", "--num-cpus=1", f"--num-gpus={gpus}")

    def remove(self, node: Node) -> None:
        """Take away what is left of a node that is gone, or kill it first."""
        node.kill()
        node.server.stop()
        namespaces.ip("netns", "del", node.name)
        self.nodes.pop(node.name, None)

    def alive(self) -> set[str]:
        """Addresses of the nodes that the head counts in."""
        with urllib.request.urlopen(f"{self.url}/api/v0/nodes", timeout=10) as answer:
            found = json.load(answer)["data"]["result"]["result"]
        return {node["node_ip"] for node in found if node["state"] == "ALIVE"}

    def workers(self) -> dict[int, Node]:
        """Every worker process with its node."""
        return {pid: node for node in self.nodes.values() for pid in node.workers()}

    def _start(self, *words: str) -> Node:
        self._made += 1
        name, address = f"{self._tag}n{self._made}", f"{self._network}.{self._made}"
        namespaces.add(name, address=f"{address}/24", bridge=self._tag)
        command = [
            "ip", "netns", "exec", name, "env", *(f"--unset={variable}" for variable in _NOT_FOR_NODES),
            str(_BIN / "ray"), "start", *words, "--block", f"--node-ip-address={address}",
            "--object-store-memory=80000000", *_FIXED_PORTS,
        ]  # fmt: skip

        log = self.folder / f"{name}.log"

        def begun() -> None:
            if not namespaces.pids(name):
                raise RuntimeError("nothing runs in its namespace")

        server = ServerProcess(command, log=log, ready=begun, environment=self.environment)
        node = self.nodes[name] = Node(name=name, address=address, server=server)
        server.start()
        deadline = time.monotonic() + _JOINED_WITHIN_S
        while not self._has_joined(node):
            if node.gone or time.monotonic() > deadline:
                raise RuntimeError(f"{address} has not joined the cluster:\n{log.read_text()[-2000:]}")
            time.sleep(0.5)
        return node

    def _has_joined(self, node: Node) -> bool:
        try:
            return node.address in self.alive()
        except OSError:  # the head is not there yet, or too busy to say
            return False

    def _end(self) -> None:
        """End every process and take the network away; what can't be ended is no reason to leave the rest."""
        with contextlib.ExitStack() as stack:
            stack.callback(namespaces.ip, "link", "del", self._tag)
            for node in list(self.nodes.values()):
                stack.callback(self.remove, node)
