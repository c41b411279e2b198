"""boomerang-batch itself: the arms of peers.py and peer_data_juicer.py that the others are measured against.

    python benchmarks/peer_tool.py tool|tool-ray JOB.json OUT

One run by the public driver, inline or with one local Ray worker; `tool-elastic` lets batches shrink at the
run's end, as the loops' do, and gives up equal bits for that. The seconds are the run's own: from the
moment the model is loaded to the last shard committed (tar, provenance and marker published), as OUT/logs
tells.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import peer_arm
import pyarrow.parquet

from boomerang_batch.config.pipeline import Recipe, parse_recipe
from boomerang_batch.data.manifest import load_manifest
from boomerang_batch.run.driver import execute
from boomerang_batch.run.request import RunRequest

ARMS = ("tool", "tool-elastic", "tool-ray")


def recipe(job: dict[str, Any], *, batching: str = "fixed") -> Recipe:
    """The job's own recipe, or what peer_loops.py does, said in the tool's words."""
    text = (
        job.get("recipe")
        or f"""
name: peers
purpose: augment
seed: 1
model:
  source: {job["model"]}
  patch_size: 2
  channels_last: true
  class_labels: {{field: cls, null_label: {job["null_label"]}, guidance: {job["guidance"]}}}
t: {{timestep: {job["t"]}}}
steps: {job["steps"]}
grid: trailing
sampler: {{eta: 1.0}}
images: {{resize: pad}}
batch_size: {job["batch"]}
batching: {batching}
"""
    )
    return parse_recipe(text, source="peers")


def last_commit_s(out: Path) -> float:
    """Seconds from the loaded model to the last shard's commit, from the run's own log."""
    (log,) = (out / "logs").glob("*.jsonl")
    events = [json.loads(line) for line in log.read_text().splitlines()]
    return max(event["at_s"] for event in events if event["event"] == "shard")


def rows(out: Path) -> list[dict[str, Any]]:
    """Every provenance row of a run."""
    return [
        row for path in sorted(out.glob("*.parquet")) for row in pyarrow.parquet.read_table(path).to_pylist()
    ]


def run(arm: str, job: dict[str, Any], out: Path) -> dict[str, Any]:
    """Do the job and say how long it took."""
    request = RunRequest(
        recipe=recipe(job, batching="elastic" if arm == "tool-elastic" else "fixed"),
        manifest=load_manifest(job["manifest"]),
        out=str(out),
        device="cpu",
        threads=job["threads"],
        quiet=True,
        address="local" if arm == "tool-ray" else "inline",
        workers=1 if arm == "tool-ray" else None,
    )
    report = execute(request, stop=threading.Event())
    if report.exit_code:
        raise SystemExit(f"the run ended with {report.exit_code}: {report}")
    return {
        "images": report.rows["ok"],
        "seconds": last_commit_s(out),
        "evaluations": sum(row["evaluations"] for row in rows(out)),
    }


if __name__ == "__main__":
    peer_arm.main(__doc__, ARMS, run)
