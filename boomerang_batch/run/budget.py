"""The error budget: how much of a run may fail before it gives up, so that a bad start costs no week."""

from __future__ import annotations

from boomerang_batch.config.blocks import ErrorBudget
from boomerang_batch.data.provenance import BAD
from boomerang_batch.run.tasks import ShardReport


class Spending:
    """What has failed so far in this run. What failed in earlier ones may be what this one is to mend."""

    def __init__(self, budget: ErrorBudget) -> None:
        self._budget = budget
        self._samples = self._shards = 0

    def add(self, report: ShardReport) -> str:
        """Count what a shard's report tells; why the run must give up, in words, or nothing."""
        if report.status == "there":
            return ""
        self._samples += sum(count for status, count in report.counts.items() if status in BAD)
        self._shards += report.status == "quarantined"
        for failed, what, allowed in (
            (self._samples, "samples", self._budget.max_failed_samples),
            (self._shards, "shards", self._budget.max_failed_shards),
        ):
            if allowed is not None and failed > allowed:
                return (
                    f"{failed} {what} failed, more than run.on_error.max_failed_{what} allows ({allowed}); "
                    "mend the cause, or allow more"
                )
        return ""
