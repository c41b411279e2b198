"""The error budget, and the processors a run counts on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from boomerang_batch.config.blocks import ErrorBudget
from boomerang_batch.run import cpus
from boomerang_batch.run.budget import Spending
from boomerang_batch.run.tasks import ShardReport
from tests import worlds


def failed(samples: int = 0, status: str = "done") -> ShardReport:
    return ShardReport(name="a", status=status, counts={"ok": 5, "failed": samples})


def test_no_budget_is_no_limit():
    spending = Spending(ErrorBudget())
    assert spending.add(failed(10**6)) == ""
    assert spending.add(failed(status="quarantined")) == ""


def test_what_is_allowed_is_allowed_and_one_more_is_not():
    spending = Spending(ErrorBudget(max_failed_samples=3, max_failed_shards=1))
    assert spending.add(failed(2)) == ""
    assert spending.add(failed(9, status="there")) == ""  # an earlier run's
    assert spending.add(failed(1)) == ""
    assert "4 samples failed, more than run.on_error.max_failed_samples allows (3)" in spending.add(failed(1))
    spending = Spending(ErrorBudget(max_failed_samples=3, max_failed_shards=1))
    assert spending.add(failed(status="quarantined")) == ""
    assert "2 shards failed" in spending.add(failed(status="quarantined"))


@pytest.mark.slow
def test_a_run_over_its_budget_ends_early_with_exit_1_and_resumes(tmp_path, tiny_model):
    manifest = worlds.save_shards(tmp_path / "in", shards=8, samples=3)
    for shard in sorted((tmp_path / "in").glob("*.tar"))[:4]:
        shard.unlink()
    strict = worlds.recipe(tiny_model, "run.on_error.max_failed_shards=1", purpose="augment")
    report = worlds.run(strict, manifest, tmp_path / "out")
    assert report.exit_code == 1
    assert report.gave_up.startswith("2 shards failed")
    assert report.shards["left"] >= 3
    lenient = worlds.recipe(tiny_model, purpose="augment")
    report = worlds.run(lenient, manifest, tmp_path / "out")
    assert (report.exit_code, report.gave_up) == (3, "")
    assert report.shards["quarantined"] == 4


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"_CGROUP_2": "150000 100000"}, 1),
        ({"_CGROUP_2": "400000 100000"}, 4),
        ({"_CGROUP_2": "max 100000"}, 64),
        ({"_CGROUP_2": "20000 100000"}, 1),
        ({}, 64),
    ],
)
def test_a_containers_share_counts(tmp_path, monkeypatch, limits, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)))
    monkeypatch.setattr(cpus, "_CGROUP_1", (tmp_path / "none", tmp_path / "none"))
    for name in ("_CGROUP_2",):
        path = tmp_path / name
        monkeypatch.setattr(cpus, name, path)
        if name in limits:
            path.write_text(limits[name] + "\n")
    assert cpus.usable_cpus() == expected


def test_the_older_kind_of_container_counts_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)))
    monkeypatch.setattr(cpus, "_CGROUP_2", tmp_path / "none")
    quota, period = tmp_path / "quota", tmp_path / "period"
    monkeypatch.setattr(cpus, "_CGROUP_1", (quota, period))
    period.write_text("100000\n")
    for text, expected in (("200000\n", 2), ("-1\n", 64)):
        quota.write_text(text)
        assert cpus.usable_cpus() == expected
