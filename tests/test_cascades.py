"""Cascades through the runner: which pass is which output, and that a pass does not depend on later ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from boomerang_batch.run.verify import verify
from tests import stand_ins, worlds
from tests.stand_ins import Pixelwise

COUNT, VARIANTS = 3, 2


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    return worlds.save_shards(tmp_path / "in", shards=1, samples=3)


def cascade(model: Path, count: int, outputs: str):
    passes = f"passes={{count: {count}, outputs: {outputs}}}"
    levels = "t=[{timestep: 6}, {fraction: {uniform: [0.3, 0.9]}}]"
    return worlds.recipe(model, levels, f"variants={VARIANTS}", passes, purpose="augment")


@pytest.mark.slow
def test_every_pass_is_numbered_and_is_what_a_shorter_cascade_gives(
    tmp_path: Path, tiny_model: Path, manifest: Path
):
    out = tmp_path / "all"
    assert worlds.run(cascade(tiny_model, COUNT, "all"), manifest, out).rows == {"ok": 18}
    assert verify(str(out), deep=True).problems == ()
    rows, outputs = worlds.rows(out), worlds.outputs(out)
    keys = ["img00000", "img00001", "img00002"]
    assert list(outputs) == [f"{key}-v{number}" for key in keys for number in range(6)]
    assert [(row.key, row.variant) for row in rows] == [(key, number) for key in keys for number in range(6)]
    for row in rows:
        variant, before = divmod(row.variant, COUNT)
        assert row.passes == before + 1
        assert row.evaluations == row.passes * row.node
        assert (row.t == "timestep=6") == (variant == 0)
    assert len({fields["png"] for fields in outputs.values()}) == 18

    for count in (1, 2, 3):
        shorter = tmp_path / f"last-{count}"
        assert worlds.run(cascade(tiny_model, count, "last"), manifest, shorter).rows == {"ok": 6}
        assert verify(str(shorter), deep=True).problems == ()
        for row in worlds.rows(shorter):
            number = row.variant * COUNT + count - 1
            same = next(one for one in rows if (one.key, one.variant) == (row.key, number))
            assert (row.passes, row.evaluations, row.t) == (count, same.evaluations, same.t)
            assert row.output_digest == same.output_digest
        for key, fields in worlds.outputs(shorter).items():
            name, _, variant = key.rpartition("-v")
            assert fields == outputs[f"{name}-v{int(variant) * COUNT + count - 1}"]


def test_originals_stand_beside_all_passes(tmp_path: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch):
    stand_ins.install(monkeypatch, Pixelwise())
    recipe = stand_ins.recipe("passes={count: 2, outputs: all}", "keep_originals=true")
    assert worlds.run(recipe, manifest, tmp_path / "out").rows == {"ok": 6, "original": 3}
    assert list(worlds.outputs(tmp_path / "out"))[:3] == ["img00000", "img00000-v0", "img00000-v1"]
    assert verify(str(tmp_path / "out"), deep=True).problems == ()


def test_a_single_output_keeps_its_key(tmp_path: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch):
    stand_ins.install(monkeypatch, Pixelwise())
    worlds.run(stand_ins.recipe("passes={count: 4, outputs: last}"), manifest, tmp_path / "out")
    assert list(worlds.outputs(tmp_path / "out")) == ["img00000", "img00001", "img00002"]
    assert {(row.passes, row.evaluations // row.node) for row in worlds.rows(tmp_path / "out")} == {(4, 4)}


@pytest.mark.usefixtures("secret")
def test_anonymized_passes_have_pseudonyms_of_their_own(
    tmp_path: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch
):
    stand_ins.install(monkeypatch, Pixelwise())
    anonymous = ("purpose=anonymize", "seed=null", "passes={count: 2, outputs: all}", "variants=2")
    worlds.run(stand_ins.recipe(*anonymous), manifest, tmp_path / "out")
    assert verify(str(tmp_path / "out"), deep=True).problems == ()
    rows = worlds.rows(tmp_path / "out")
    assert len({row.key for row in rows}) == len({row.source_digest for row in rows}) == 12
    assert {row.key for row in rows} == set(worlds.outputs(tmp_path / "out"))


def test_a_failed_sample_fails_in_every_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    stand_ins.install(monkeypatch, Pixelwise())
    manifest = worlds.save_samples(
        tmp_path / "in", {"bad": {"png": b"no image"}, "good": {"png": worlds.png(1)}}
    )
    recipe = stand_ins.recipe("passes={count: 3, outputs: all}", "variants=2")
    report = worlds.run(recipe, manifest, tmp_path / "out")
    assert (report.exit_code, report.rows) == (3, {"failed": 6, "ok": 6})
    assert [row.variant for row in worlds.rows(tmp_path / "out") if row.key == "bad"] == list(range(6))
