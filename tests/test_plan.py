"""plan.py: the arithmetic, the probe, and what is read of a manifest for it."""

from __future__ import annotations

import json
import tempfile
import tracemalloc
from pathlib import Path

import pytest
from click.testing import CliRunner

from boomerang_batch.cli import main
from boomerang_batch.data.manifest import load_manifest
from boomerang_batch.data.manifest_build import build_manifest
from boomerang_batch.errors import ConfigError, ManifestError
from boomerang_batch.run import plan as plan_module
from boomerang_batch.run.plan import Plan, Probe, load_plan, make_plan
from tests import worlds

PROBE = Probe(
    samples=100, outputs=200, failed=0, evaluations=4000, load_s=10.0, seconds=50.0, input_bytes=10_000,
    output_bytes=30_000, batch_size=50, device="cpu",
)  # fmt: skip


def a_plan(**values) -> Plan:
    given = {
        "shards": 10,
        "samples": 1000,
        "estimated": False,
        "probe": PROBE,
        "workers": 4,
        "price_per_hour": 2.0,
    }
    return Plan(**given | values)


def test_the_rest_is_arithmetic():
    plan = a_plan()
    assert plan.images_per_s == 4.0
    assert plan.outputs == 2000
    assert plan.evaluations == 40_000
    assert plan.wall_s == pytest.approx(10 + 3 / 10 * 2000 / 4)  # ten shards: two workers do three
    assert plan.worker_hours == pytest.approx(4 * plan.wall_s / 3600)
    assert plan.cost == pytest.approx(2 * plan.worker_hours)
    assert plan.output_bytes == 300_000
    assert plan.spool_bytes == 6 * 30_000
    assert a_plan(price_per_hour=None).cost is None


def test_workers_beyond_the_shards_help_nobody():
    assert a_plan(workers=100).wall_s == a_plan(workers=10).wall_s
    assert a_plan(workers=100).worker_hours == a_plan(workers=10).worker_hours


def test_a_plan_is_saved_and_read_again(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(a_plan().facts()))
    assert load_plan(str(path)) == a_plan()
    path.write_text(json.dumps(a_plan().facts() | {"format_version": 9}))
    with pytest.raises(ConfigError, match="format_version 9"):
        load_plan(str(path))
    for text in ("", "[]", "{}", json.dumps({"format_version": 1, "probe": {}})):
        path.write_text(text)
        with pytest.raises(ConfigError, match="is not a plan"):
            load_plan(str(path))


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    return worlds.save_shards(tmp_path / "in", shards=5, samples=30)


def planned(recipe, manifest, **options) -> Plan:
    given = {"samples": None, "workers": 1, "price_per_hour": None, "device": "cpu", "threads": 1}
    return make_plan(recipe, load_manifest(str(manifest)), **given | options)


@pytest.mark.slow
@pytest.mark.parametrize("purpose", ["anonymize", "augment"])
def test_a_probe_is_of_whole_batches_and_leaves_nothing(
    tmp_path, tiny_model, manifest, purpose, monkeypatch: pytest.MonkeyPatch
):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    used: list[Path] = []
    real = plan_module._probe
    monkeypatch.setattr(
        plan_module, "_probe", lambda *words, **options: used.append(words[2]) or real(*words, **options)
    )
    recipe = worlds.recipe(tiny_model, "variants=3", purpose=purpose)
    plan = planned(recipe, manifest, samples=10)
    assert plan.probe.outputs == 33  # 11 samples: 32 outputs would be eight batches of 4
    assert plan.probe.samples == 11
    assert plan.probe.evaluations == 33 * 4
    assert plan.probe.failed == 0
    assert [path.parent for path in used] == [scratch]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "scratch"]
    assert list(scratch.iterdir()) == []


@pytest.mark.slow
def test_samples_of_a_manifest_that_tells_are_counted_and_of_others_guessed(tmp_path, tiny_model, manifest):
    recipe = worlds.recipe(tiny_model, purpose="augment")
    guess = planned(recipe, manifest, samples=20)
    assert guess.estimated
    assert guess.samples == pytest.approx(150, rel=0.1)
    built = tmp_path / "built.jsonl"
    build_manifest([str(tmp_path / "in" / "*.tar")], str(built))
    told = planned(recipe, built, samples=20)
    assert (told.samples, told.estimated) == (150, False)


@pytest.mark.slow
def test_the_plan_of_output_bytes_is_near_what_a_run_writes(tmp_path, tiny_model, manifest):
    recipe = worlds.recipe(tiny_model, purpose="augment")
    plan = planned(recipe, manifest)
    worlds.run(recipe, manifest, tmp_path / "out")
    written = sum(path.stat().st_size for path in (tmp_path / "out").glob("s-*") if path.suffix != ".json")
    assert plan.output_bytes == pytest.approx(written, rel=0.5)  # tars of 30 samples are mostly padding


def test_bad_samples_are_told_and_bad_manifests_refused(tmp_path, tiny_model, manifest):
    recipe = worlds.recipe(tiny_model, purpose="augment")
    for path in (tmp_path / "in").glob("*.tar"):
        path.write_bytes(bytes(10240))
    with pytest.raises(ManifestError, match="no sample that can be read"):
        planned(recipe, manifest)


@pytest.mark.slow
def test_the_command_prints_and_saves(tmp_path, tiny_model, manifest):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(worlds.recipe_text(tiny_model, purpose="augment"))
    saved = tmp_path / "plan.json"
    words = [
        "plan",
        str(recipe),
        str(manifest),
        "--gpus",
        "2",
        "--price-per-gpu-hour",
        "3",
        "--save",
        str(saved),
    ]
    result = CliRunner().invoke(main, [*words, "--threads", "1", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert "manifest     5 shards, about 1" in result.stdout
    assert "cost " in result.stdout
    assert load_plan(str(saved)).workers == 2
    result = CliRunner().invoke(main, [*words, "--json", "--threads", "1", "--device", "cpu"])
    assert json.loads(result.stdout)["shards"] == 5


@pytest.mark.slow
def test_a_manifest_of_many_shards_takes_little_memory(tmp_path):
    """100,000 shards: less than 300 MB. benchmarks/ tells the time."""
    line = {"samples": 30, "bytes": 10_240, "digest": "0" * 64}
    many = tmp_path / "many.jsonl"
    many.write_text("".join(json.dumps({"url": f"t-{n:06d}.tar", **line}) + "\n" for n in range(100_000)))
    tracemalloc.start()
    loaded = load_manifest(str(many))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(loaded.shards) == 100_000
    assert peak < 300e6


@pytest.mark.slow
def test_a_run_tells_how_its_plan_did(tmp_path, tiny_model, manifest):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(worlds.recipe_text(tiny_model, purpose="augment"))
    saved, out = str(tmp_path / "plan.json"), str(tmp_path / "out")
    here = ["--threads", "1", "--device", "cpu"]
    assert CliRunner().invoke(main, ["plan", str(recipe), str(manifest), "--save", saved, *here]).exit_code == 0
    words = ["run", str(recipe), str(manifest), out, "--plan", saved, *here]
    told = CliRunner().invoke(main, words)
    assert told.exit_code == 0, told.output
    assert "outputs were planned; it took" in told.stdout
    assert "and made 150 (" in told.stdout
    assert "it was for all 5 shards in one go; this run made 0" in CliRunner().invoke(main, words).stdout
