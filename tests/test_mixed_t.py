"""Runs in which t differs: by variant, drawn for each, or brought along by each sample."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import pytest

from boomerang_batch.data.manifest import load_manifest
from boomerang_batch.errors import ConfigError
from boomerang_batch.run.verify import verify
from tests import stand_ins, worlds
from tests.stand_ins import Pixelwise


@pytest.fixture
def pixelwise(monkeypatch: pytest.MonkeyPatch) -> Pixelwise:
    """Every recipe's model is one whose answer is known and cheap."""
    made = Pixelwise()
    stand_ins.install(monkeypatch, made)
    return made


def told(row) -> float:
    """The number in a row's t."""
    return float(row.t.partition("=")[2])


@pytest.mark.slow
def test_a_list_gives_each_variant_its_own(tmp_path: Path, tiny_model: Path):
    manifest = worlds.save_shards(tmp_path / "in", shards=2, samples=3)
    levels = (4, 20, 9)
    listed = "t=[{timestep: 4}, {timestep: 20}, {timestep: 9}]"
    recipe = worlds.recipe(tiny_model, listed, "variants=3", purpose="augment")
    assert worlds.run(recipe, manifest, tmp_path / "out").rows == {"ok": 18}
    assert verify(str(tmp_path / "out"), deep=True).problems == ()
    for row in worlds.rows(tmp_path / "out"):
        timestep = levels[row.variant]
        assert (row.t, row.tau) == (f"timestep={timestep}", timestep - 1)
        assert row.evaluations == row.node
    mixed = worlds.outputs(tmp_path / "out")
    for variant, timestep in enumerate(levels):
        alike = worlds.recipe(tiny_model, f"t.timestep={timestep}", "variants=3", purpose="augment")
        worlds.run(alike, manifest, tmp_path / f"t{timestep}")
        same = worlds.outputs(tmp_path / f"t{timestep}")
        keys = [key for key in mixed if key.endswith(f"-v{variant}")]
        assert len(keys) == 6
        assert all(mixed[key] == same[key] for key in keys)


@pytest.mark.slow
@pytest.mark.usefixtures("pixelwise")
def test_a_drawn_t_is_uniform_and_each_variants_own(tmp_path: Path):
    manifest = worlds.save_shards(tmp_path / "in", shards=2, samples=75)
    recipe = stand_ins.recipe("t.fraction={uniform: [0.2, 0.8]}", "variants=2", "batch_size=16")
    worlds.run(recipe, manifest, tmp_path / "out")
    assert verify(str(tmp_path / "out"), deep=True).problems == ()
    rows = worlds.rows(tmp_path / "out")
    drawn = [told(row) for row in rows]
    assert len(set(drawn)) == len(drawn) == 300
    assert 0.2 < min(drawn) < 0.21
    assert 0.79 < max(drawn) < 0.8
    bins = Counter(int((t - 0.2) / 0.1) for t in drawn)
    chi_squared = sum((bins[i] - 50) ** 2 / 50 for i in range(6))
    assert chi_squared < 11.1  # one in twenty by chance, and the seed is fixed
    # The rows' other numbers are those of that t.
    levels = Pixelwise().spec.levels
    for row in rows:
        index = round(told(row) * 100) - 1
        assert row.tau == index
        assert row.sigma == pytest.approx(float(levels.relative_sigma[index]))
    assert len({row.evaluations for row in rows}) > 1

    # It belongs to the sample and the variant, not to their place in the run.
    members = worlds.read_output(tmp_path / "in", "s-001")[::-7]
    apart = worlds.save_samples(tmp_path / "apart", dict(members))
    smaller = stand_ins.recipe("t.fraction={uniform: [0.2, 0.8]}", "variants=2", "batch_size=3")
    worlds.run(smaller, apart, tmp_path / "again")
    again = {(row.key, row.variant): row.t for row in worlds.rows(tmp_path / "again")}
    assert len(again) == 22
    assert again.items() <= {(row.key, row.variant): row.t for row in rows}.items()


@pytest.mark.usefixtures("pixelwise")
def test_a_drawn_timestep_is_whole_and_reaches_both_ends(tmp_path: Path):
    manifest = worlds.save_shards(tmp_path / "in", shards=1, samples=40)
    worlds.run(stand_ins.recipe("t.timestep={uniform: [30, 32]}"), manifest, tmp_path / "out")
    assert {row.t for row in worlds.rows(tmp_path / "out")} == {"timestep=30", "timestep=31", "timestep=32"}


@pytest.mark.usefixtures("pixelwise")
@pytest.mark.parametrize("spread", ["t.fraction={uniform: [0.0, 0.8]}", "t.sigma={uniform: [0.0, 0.8]}"])
def test_a_spread_that_the_chain_can_not_follow_to_0_is_refused_at_once(tmp_path: Path, spread: str):
    """0 is the identity; between it and the lowest level of noise there is nothing the model was trained on."""
    manifest = worlds.save_shards(tmp_path / "in", shards=1, samples=1)
    with pytest.raises(ConfigError, match="begins at 0, just above which"):
        worlds.run(stand_ins.recipe(spread), manifest, tmp_path / "out")


BROUGHT = {
    "plain": (b"0.5\n", "ok", None),
    "far": (b"0.9", "ok", None),
    "zero": (b"0", "ok", None),
    "absent": (None, "failed", "missing-t"),
    "word": (b"half", "failed", "bad-t"),
    "bytes": (b"\xff\xfe", "failed", "bad-t"),
    "nan": (b"nan", "failed", "bad-t"),
    "endless": (b"inf", "failed", "bad-t"),
    "beyond": (b"1.5", "failed", "bad-t"),
    "negative": (b"-0.1", "failed", "bad-t"),
    "tiny": (b"0.001", "failed", "bad-t"),
}


def bring(folder: Path, brought: dict[str, bytes | None]) -> Path:
    """A shard whose samples have their t in the field `far`."""
    samples = {}
    for number, (key, t) in enumerate(brought.items()):
        fields = {"png": worlds.png(number), "cls": b"1", **({} if t is None else {"far": t})}
        samples[key] = fields
    return worlds.save_samples(folder, samples)


@pytest.mark.usefixtures("pixelwise")
def test_a_t_from_a_field(tmp_path: Path):
    manifest = bring(tmp_path / "in", {key: data for key, (data, _, _) in BROUGHT.items()})
    report = worlds.run(stand_ins.recipe("t.fraction={field: FAR}"), manifest, tmp_path / "out")
    assert report.exit_code == 3
    assert verify(str(tmp_path / "out"), deep=True).problems == ()
    rows = {row.key: row for row in worlds.rows(tmp_path / "out")}
    assert {key: (row.status, row.reason) for key, row in rows.items()} == {
        key: (status, reason) for key, (_, status, reason) in BROUGHT.items()
    }
    assert [rows[key].t for key in ("plain", "far", "zero")] == ["fraction=0.5", "fraction=0.9", "fraction=0.0"]
    assert rows["zero"].evaluations == 0
    assert worlds.outputs(tmp_path / "out")["zero"]["png"] == worlds.png(2)
    for key in ("word", "beyond", "tiny"):
        assert "field far" in rows[key].detail


@pytest.mark.usefixtures("pixelwise")
@pytest.mark.parametrize("text", [b"12.5", b"inf", b"nan", b"1e300"])
def test_a_timestep_from_a_field_is_whole(tmp_path: Path, text: bytes):
    manifest = bring(tmp_path / "in", {"good": b"12", "bad": text})
    worlds.run(stand_ins.recipe("t.timestep={field: far}"), manifest, tmp_path / "out")
    good, bad = worlds.rows(tmp_path / "out")
    assert (good.status, good.t) == ("ok", "timestep=12")
    assert (bad.status, bad.reason) == ("failed", "bad-t")


@pytest.mark.usefixtures("secret")
@pytest.mark.parametrize(("action", "shown"), [("drop", False), ("pseudonymize", False), ("keep", True)])
def test_anonymized_rows_tell_t_only_where_its_field_travels(
    tmp_path: Path, tiny_model: Path, action: str, shown: bool
):
    manifest = bring(tmp_path / "in", {"a": b"0.5", "b": b"0.9", "identity": b"0", "c": b"1"})
    recipe = worlds.recipe(tiny_model, "t.fraction={field: far}", f"fields.fields.far={action}")
    report = worlds.run(recipe, manifest, tmp_path / "out")
    assert report.rows == {"failed": 1, "ok": 3}  # t = 0 would publish the input
    assert verify(str(tmp_path / "out"), deep=True).problems == ()
    for row in worlds.rows(tmp_path / "out"):
        facts = (row.t, row.node, row.tau, row.sigma, row.evaluations)
        if row.status == "ok" and shown:
            assert None not in facts
        else:
            assert facts == (None,) * 5
        assert row.detail is None


@pytest.mark.slow
@pytest.mark.usefixtures("secret")
def test_no_order_or_interruption_changes_a_byte_of_a_mixed_run(tmp_path: Path, tiny_model: Path):
    manifest = load_manifest(str(worlds.save_shards(tmp_path / "in", shards=3, samples=10)))
    recipe = worlds.recipe(
        tiny_model,
        "t=[{fraction: {uniform: [0.1, 1.0]}}, {timestep: 5}]",
        "variants=2",
        "passes={count: 2, outputs: all}",
        "sampler={eta: 0.0, order: 2}",
    )
    report = worlds.run(recipe, manifest, tmp_path / "whole")
    assert report.rows == {"ok": 3 * 10 * 4}
    assert verify(str(tmp_path / "whole"), deep=True).problems == ()
    expected = worlds.tree(tmp_path / "whole")

    backwards = dataclasses.replace(manifest, shards=manifest.shards[::-1])
    worlds.run(recipe, backwards, tmp_path / "backwards")
    assert worlds.tree(tmp_path / "backwards") == expected

    with pytest.MonkeyPatch.context() as patch:
        stop = worlds.stop_within_the_second_shard(patch, tmp_path / "cut")
        assert worlds.run(recipe, manifest, tmp_path / "cut", stop=stop).exit_code == 75
    assert 0 < len(list((tmp_path / "cut").glob("*_stats.json"))) < 3
    assert worlds.run(recipe, manifest, tmp_path / "cut").exit_code == 0
    assert worlds.tree(tmp_path / "cut") == expected
