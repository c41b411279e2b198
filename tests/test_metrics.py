"""metrics.py: what workers export, and that the dashboard asks for nothing else."""

from __future__ import annotations

import itertools
import json
import os
import re
import threading
import time
import urllib.request
from pathlib import Path

import pytest
import ray

from boomerang_batch.data.manifest import load_manifest
from boomerang_batch.run.metrics import COUNTERS, GAUGES, PREFIX
from boomerang_batch.run.runner import Runner
from boomerang_batch.run.tasks import RunSpec, Task
from tests import worlds

DASHBOARD = Path(__file__).parent.parent / "docs" / "grafana" / "dashboard.json"


def test_the_dashboard_shows_every_metric_and_no_other():
    asked = {
        name
        for panel in json.loads(DASHBOARD.read_text())["panels"]
        for target in panel["targets"]
        for name in re.findall(rf"ray_{PREFIX}(\w+)", target["expr"])
    }
    assert asked == {*COUNTERS, *GAUGES}


def test_the_dashboard_is_one_that_grafana_takes():
    board = json.loads(DASHBOARD.read_text())
    assert board["schemaVersion"] >= 36  # where a datasource became an object of type and uid
    (variable,) = board["templating"]["list"]
    assert (variable["type"], variable["query"]) == ("datasource", "prometheus")
    panels = board["panels"]
    assert sorted(panel["id"] for panel in panels) == list(range(1, len(panels) + 1))
    assert {panel["type"] for panel in panels} <= {"timeseries", "stat", "gauge", "bargauge", "table"}
    places = []
    for panel in panels:
        assert panel["datasource"] == {"type": "prometheus", "uid": f"${{{variable['name']}}}"}
        references = [target["refId"] for target in panel["targets"]]
        assert len(references) == len(set(references)) > 0
        place = panel["gridPos"]
        assert 0 <= place["x"] < place["x"] + place["w"] <= 24
        places += itertools.product(
            range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
        )
    assert len(places) == len(set(places))


def test_what_comes_once_is_not_asked_for_as_a_growth():
    """A counter is first seen when it has grown already: by that Prometheus would not count the first."""
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel["targets"]:
            assert "increase(" not in target["expr"]


@pytest.mark.slow
def test_a_runners_totals_are_what_it_did(tmp_path, tiny_model):
    manifest = load_manifest(str(worlds.save_shards(tmp_path / "in", shards=2, samples=5)))
    recipe = worlds.recipe(tiny_model, "variants=2", purpose="augment")
    out = tmp_path / "out"
    out.mkdir()
    spec = RunSpec(recipe=recipe, out=str(out), private_dir=None, device="cpu", threads=1, epoch=0)
    runner = Runner(spec)
    assert runner.totals.keys() == {*COUNTERS, *GAUGES}
    try:
        for entry in manifest.shards:
            task = Task(name=entry.stem, url=entry.url, source_stem=entry.stem)
            runner.run(task, stopped=lambda: False, progress=lambda finished: None)
        bad = Task(name="bad", url=str(tmp_path / "nowhere.tar"), source_stem="bad")
        assert runner.run(bad, stopped=lambda: False, progress=lambda finished: None).status == "quarantined"
    finally:
        runner.close()
    totals = runner.totals
    assert totals["outputs_total"] == 20
    assert totals["evaluations_total"] == 20 * 4
    assert totals["shards_done_total"] == 2
    assert totals["shards_failed_total"] == 1
    written = [path for path in out.iterdir() if path.suffix in (".tar", ".parquet")]
    assert totals["output_bytes_total"] == sum(path.stat().st_size for path in written)
    assert totals["device_busy_seconds_total"] > 0
    assert [totals[name] for name in GAUGES] == [0, 0, 0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_scrape_finds_them(tmp_path, tiny_model):
    """What Prometheus would read from the node, while a worker of the run is still there."""
    manifest = worlds.save_shards(tmp_path / "in", shards=12, samples=10)
    environment = {"RAY_AUTH_MODE": "disabled"}
    before = {name: os.environ.get(name) for name in environment}
    os.environ |= environment
    context = ray.init(
        address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error",
        configure_logging=False, _system_config={"metrics_report_interval_ms": 500},
    )  # fmt: skip
    try:
        (node,) = ray.nodes()
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        recipe = worlds.recipe(tiny_model, purpose="augment")
        run = threading.Thread(
            target=lambda: worlds.run(recipe, manifest, tmp_path / "out", address="local", workers=1)
        )
        run.start()
        wanted, text = f"ray_{PREFIX}outputs_total", ""
        deadline = time.monotonic() + 90
        while wanted not in text and time.monotonic() < deadline:
            time.sleep(0.2)
            with urllib.request.urlopen(url, timeout=10) as answer:
                text = answer.read().decode()
        run.join()
        assert re.search(rf"^{wanted}\{{.*\}} [1-9]", text, re.MULTILINE)
        assert all(f"ray_{PREFIX}{name}" in text for name in ("evaluations_total", "tasks"))
    finally:
        del context
        ray.shutdown()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
