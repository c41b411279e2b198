"""What befalls a cluster and its store, by a seeded dice: kills, cuts, frost, and machines asked to leave."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

from tests.lanes import counted_model
from tests.lanes.chronicle import Chronicle
from tests.lanes.cluster import DRAIN_S, Node, NodesOfRay
from tests.lanes.processes import ObjectServer


class Disasters:
    """Strikes one at a time, and writes down what it did."""

    def __init__(
        self, cluster: NodesOfRay, store: ObjectServer, counts: Path, chronicle: Chronicle, dice: random.Random
    ) -> None:
        self._cluster = cluster
        self._store = store
        self._counts = counts
        self._chronicle = chronicle
        self._dice = dice
        self._frozen: list[int] = []
        self._kinds: dict[Callable[[], None], int] = {
            self._kill_worker: 6,
            self._kill_node: 2,
            self._kill_driver: 2,
            self._kill_store: 2,
            self._cut_off_node: 1,
            self._drain_node: 1,
            self._freeze_worker: 1,
        }

    def strike(self) -> None:
        """One disaster; what it takes away for some seconds is back when this returns."""
        (kind,) = self._dice.choices(list(self._kinds), weights=list(self._kinds.values()))
        kind()

    def over(self) -> None:
        """Let what is frozen go on."""
        for pid in self._frozen:
            _signal(pid, signal.SIGCONT)

    def _kill_worker(self) -> None:
        pid, node = self._worker()
        if node is not None and _signal(pid, signal.SIGKILL):
            self._chronicle.note("worker killed", f"{pid} on {node.address}")

    def _freeze_worker(self) -> None:
        pid, node = self._worker()
        if node is not None and _signal(pid, signal.SIGSTOP):
            self._frozen.append(pid)
            self._chronicle.note("worker frozen", f"{pid} on {node.address}")

    def _kill_driver(self) -> None:
        for pid in self._cluster.head.drivers():
            if _signal(pid, signal.SIGKILL):
                self._chronicle.note("driver killed", str(pid))

    def _kill_store(self) -> None:
        self._store.kill()
        self._chronicle.note("store killed")
        if self._dice.random() < 0.5:
            time.sleep(self._dice.uniform(0, 3))
            self._dice.choice([self._kill_worker, self._kill_driver])()
        time.sleep(self._dice.uniform(2, 10))
        self._store.start()
        self._chronicle.note("store back")

    def _kill_node(self) -> None:
        node = self._node()
        node.kill()
        self._chronicle.note("node killed", node.address)
        self._replace(node)

    def _cut_off_node(self) -> None:
        """Its worker goes on for a while, alone, and what it finished then it can't publish."""
        node = self._node()
        node.cut_off()
        self._chronicle.note("node cut off", node.address)
        time.sleep(self._dice.uniform(5, 20))
        node.kill()
        self._replace(node)

    def _drain_node(self) -> None:
        node = self._node()
        node.drain()
        self._chronicle.note("node drained", node.address)
        deadline = time.monotonic() + 2 * DRAIN_S
        while not node.gone and time.monotonic() < deadline:
            time.sleep(0.5)
        self._chronicle.note("node left" if node.gone else "node did not leave", node.address)
        self._replace(node)

    def _replace(self, node: Node) -> None:
        self._cluster.remove(node)
        time.sleep(self._dice.uniform(1, 10))
        self._chronicle.note("node joined", self._cluster.add().address)

    def _node(self) -> Node:
        return self._dice.choice([node for node in self._cluster.nodes.values() if node != self._cluster.head])

    def _worker(self) -> tuple[int, Node | None]:
        """A worker that has done something: three deaths in a row while loading end a run, as they should."""
        done = counted_model.evaluations_of(self._counts)
        workers = {pid: node for pid, node in self._cluster.workers().items() if done.get(pid)}
        fit = sorted(workers.keys() - set(self._frozen))
        pid = self._dice.choice(fit) if fit else 0
        return pid, workers.get(pid)


def _signal(pid: int, number: int) -> bool:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True
