"""What a worker has done, for Ray's metrics: a Prometheus that scrapes the cluster's nodes sees it.

Totals are kept by whoever does the work, and exported when the worker is asked how it is. Seconds are counters:
Ray's histograms sum the middles of their buckets, not what was observed.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

from ray.util.metrics import Counter, Gauge

PREFIX = "boomerang_batch_"
COUNTERS = {
    "outputs_total": "outputs finished, those that failed included",
    "evaluations_total": "network calls that outputs took part in",
    "device_busy_seconds_total": "seconds in which the device had draws to work on",
    "output_bytes_total": "bytes of tars and provenance committed",
    "shards_done_total": "shards committed",
    "shards_failed_total": "shards that could not be read",
    "storage_retries_total": "requests to stores that were tried again",
}
GAUGES = {
    "draws_waiting": "draws that wait for a slot",
    "outputs_waiting": "drawn outputs that wait to be encoded",
    "tasks": "shards in work",
}


class Exporter:
    """One worker's metrics. Ray tells workers apart by its own tags. Threads may share it."""

    def __init__(self) -> None:
        self._exporting = threading.Lock()
        self._counters = {name: Counter(PREFIX + name, description=text) for name, text in COUNTERS.items()}
        self._gauges = {name: Gauge(PREFIX + name, description=text) for name, text in GAUGES.items()}
        self._exported = dict.fromkeys(COUNTERS, 0.0)

    def export(self, totals: Mapping[str, float]) -> None:
        """Bring the metrics to `totals`, by the names above; each counter's is since the worker began."""
        with self._exporting:
            for name, counter in self._counters.items():
                grown = totals[name] - self._exported[name]
                if grown > 0:
                    counter.inc(grown)
                    self._exported[name] = totals[name]
            for name, gauge in self._gauges.items():
                gauge.set(totals[name])
