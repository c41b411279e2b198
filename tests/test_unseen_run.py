"""Unseen images, through the runner: three phases, their artefacts, and what a stop in any of them costs."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from safetensors.torch import load_file

from boomerang_batch.data import images
from boomerang_batch.data.codes import FIELD, read_codes
from boomerang_batch.diffusion.codes import Code, decode
from boomerang_batch.diffusion.latents import slerp
from boomerang_batch.diffusion.noise import Purpose, key_words, normal
from boomerang_batch.diffusion.samplers import build_solver
from boomerang_batch.diffusion.schedule import build_schedule
from boomerang_batch.errors import ConfigError, RecipeError, StorageError
from boomerang_batch.run import artefacts
from boomerang_batch.run.links import read_links
from boomerang_batch.run.loading import load
from boomerang_batch.run.naming import Naming
from boomerang_batch.run.runner import Runner
from boomerang_batch.run.verify import verify
from tests import worlds
from tests.test_latents import by_numpy

WORDS = ("method=unseen", "sampler.eta=0.0", "unseen={references: 4, tolerance: 3.0}")

FIGURES = ("distance", "angle", "pair_angle")


def unseen(model: Path, *more: str, purpose: str = "augment"):
    return worlds.recipe(model, *WORDS, *more, purpose=purpose)


def told(row) -> dict[str, float]:
    return {name: float(value) for name, value in (pair.split("=") for pair in row.detail.split())}


def latents_of(home: Path) -> dict[str, np.ndarray]:
    """Every latent by key, in float64."""
    found = {}
    for tar in sorted(home.glob("*.tar")):
        for key, fields in worlds.read_output(home, tar.stem):
            [code] = read_codes(fields[FIELD], proof=None, pieces=1, steps=None)
            found[key.partition("-")[0]] = code.x_n.double().numpy()
    return found


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    return worlds.save_shards(tmp_path / "in", shards=3, samples=8)


@pytest.mark.slow
@pytest.mark.parametrize("grid", ["linspace", "var-quadratic"])
@pytest.mark.parametrize("weight", [1.0, 0.6])
def test_outputs_are_decoded_new_latents_that_the_fit_accepts(tmp_path, tiny_model, manifest, weight, grid):
    out = tmp_path / "out"
    recipe = unseen(
        tiny_model,
        f"unseen.weight={weight}",
        "unseen.tolerance=2.5",
        "variants=2",
        f"grid={grid}",
        "t.fraction=0.9",
    )
    report = worlds.run(recipe, manifest, out)
    assert report.rows.get("ok", 0) + report.rows.get("failed", 0) == 48
    assert report.rows["ok"] >= 30
    assert verify(str(out), deep=True).problems == ()

    # The fit, anew from the latents.
    own = latents_of(out / "codes")
    made, marker = (
        load_file(out / "codes" / "fit.safetensors"),
        json.loads((out / "codes" / "fit.json").read_text()),
    )
    others = made["references"].double().numpy()
    rest = [x for x in own.values() if not any(np.array_equal(x, other) for other in others)]
    assert len(rest) == len(own) - 4 == 20
    assert np.allclose(made["mean"].numpy(), np.mean(rest, axis=0), atol=1e-12)
    variance = np.sum((rest - np.mean(rest, axis=0)) ** 2) / (19 * 64)
    assert marker["told"]["variance"] == pytest.approx(variance)
    flat = others.reshape(4, -1)
    figures = np.array([by_numpy(x.ravel(), flat) for x in rest])
    usual, spread = figures.mean(0), figures.std(0, ddof=1)
    for name, figures in (("usual", usual), ("spread", spread)):
        assert [marker["told"][name][figure] for figure in FIGURES] == pytest.approx(list(figures))

    # What was accepted, anew from its noise; and what was made of it.
    engine, _ = load(recipe, device="cpu", threads=1)
    spec, naming = engine.denoiser.spec, Naming(recipe, None)
    schedule = build_schedule(spec.levels, grid=grid, steps=6, t=("fraction", 0.9), start="exact")
    solver = build_solver(schedule, prediction=spec.prediction, eta=0.0, clip_range=spec.clip_range)
    found = worlds.outputs(out)
    for row in worlds.rows(out):
        if row.status == "failed":
            assert row.reason == "not-accepted"
            continue
        words = key_words([naming.noise_key(row.key.encode(), row.variant)])
        for tries in range(1, int(told(row)["tries"]) + 1):
            z = normal(words, (1, 8, 8), purpose=Purpose.NEW_LATENT, node=torch.tensor([tries]))[0]
            candidate = made["mean"] + math.sqrt(variance) * z.double()
            latent = slerp(torch.from_numpy(own[row.key]), candidate, weight).float()
            placed = by_numpy(latent.double().numpy().ravel(), flat)
            accepted = bool((np.abs(placed - usual) <= 2.5 * spread).all())
            assert accepted == (tries == told(row)["tries"])
        assert placed == pytest.approx(
            [told(row)[name] for name in ("distance", "angle", "pair_angle")], rel=1e-5
        )
        with torch.inference_mode():
            begin = Code(x_n=latent[None], residuals=None)
            x_0 = decode(begin, engine.denoiser, schedule, solver, [int(row.key[3:]) % worlds.CLASSES])[0]
        expected = images.to_pixels(x_0.numpy(), spec.value_range)[..., 0]
        assert abs(worlds.image_of(found[f"{row.key}-v{row.variant}"]).astype(int) - expected).max() <= 1
    engine.close()


def test_each_phase_leaves_what_the_next_one_needs_and_nothing_is_done_twice(
    tmp_path, tiny_model, manifest, monkeypatch
):
    out, recipe = tmp_path / "out", unseen(tiny_model)
    phases, real = [], Runner.run
    monkeypatch.setattr(
        Runner,
        "run",
        lambda self, task, **more: phases.append((task.phase, task.name)) or real(self, task, **more),
    )
    names = ["s-000", "s-001", "s-002"]
    assert worlds.run(recipe, manifest, out).rows == {"ok": 24}
    assert [phase for phase, _ in phases] == ["latents"] * 3 + ["fit"] + ["outputs"] * 3
    whole = worlds.tree(out)

    # Outputs that are gone are made anew; what they were made of is there.
    phases.clear()
    for path in out.glob("s-001*"):
        path.unlink()
    worlds.run(recipe, manifest, out)
    assert phases == [("outputs", "s-001")]
    assert worlds.tree(out) == whole

    # And so is the fit, of what the shards add to it.
    phases.clear()
    for path in [
        *out.glob("s-*_stats.json"),
        *(out / "codes").glob("fit*"),
        out / "codes" / "s-001_moments.json",
    ]:
        path.unlink()
    worlds.run(recipe, manifest, out)
    assert phases[:2] == [("latents", "s-001"), ("fit", "fit")]
    assert sorted(phases[2:]) == [("outputs", name) for name in names]
    assert worlds.tree(out) == whole


def test_a_harmed_fit_is_refused(tmp_path, tiny_model, manifest):
    out, recipe = tmp_path / "out", unseen(tiny_model)
    worlds.run(recipe, manifest, out)
    (out / "s-000_stats.json").unlink()
    place = out / "codes" / "fit.safetensors"
    data = bytearray(place.read_bytes())
    data[-9] ^= 1
    place.write_bytes(bytes(data))
    assert "not what its marker says" in artefacts.problem(str(out / "codes"), "fit")
    assert any(
        "fit.safetensors is not what its marker says" in text for text in verify(str(out), deep=False).problems
    )
    with pytest.raises(StorageError, match=r"not what its marker says; remove fit\.json"):
        worlds.run(recipe, manifest, out)
    (out / "codes" / "fit.json").unlink()
    assert worlds.run(recipe, manifest, out).rows == {"ok": 24}
    assert artefacts.problem(str(out / "codes"), "fit") is None
    (out / "codes" / "s-002_moments.json").write_text("{}")
    assert verify(str(out), deep=False).problems == ()
    [problem] = verify(str(out), deep=True).problems
    assert "s-002_moments.json is no marker" in problem
    (out / "codes" / "fit.json").unlink()
    [problem] = verify(str(out), deep=False).problems
    assert "no fit of this run's shards" in problem


@pytest.mark.parametrize("lost", ["s-001.tar", "s-001.parquet", "s-001_stats.json", "harmed"])
def test_latents_lost_before_the_fit_are_drawn_again_when_the_command_is_run_again(
    tmp_path, tiny_model, manifest, lost
):
    out, recipe = tmp_path / "out", unseen(tiny_model)
    worlds.run(recipe, manifest, out)
    whole, codes = worlds.tree(out), out / "codes"
    for path in [*out.glob("s-*"), *codes.glob("fit*")]:
        path.unlink()
    if lost == "harmed":
        data = bytearray((codes / "s-001.tar").read_bytes())
        data[1500] ^= 1
        (codes / "s-001.tar").write_bytes(bytes(data))
    else:
        (codes / lost).unlink()
    if lost != "s-001_stats.json":  # that one is missed before the fit is begun
        with pytest.raises(StorageError, match="run the same command again, and these codes are drawn again"):
            worlds.run(recipe, manifest, out)
    worlds.run(recipe, manifest, out)
    assert worlds.tree(out) == whole


def test_a_shard_that_can_not_be_read_leaves_all_undone_and_is_waited_for(tmp_path, tiny_model, manifest):
    out, recipe = tmp_path / "out", unseen(tiny_model)
    place = tmp_path / "in" / "s-001.tar"
    kept = place.read_bytes()
    place.unlink()
    report = worlds.run(recipe, manifest, out)
    assert (report.quarantined, report.shards["left"], report.exit_code) == (("s-001",), 2, 1)
    assert not list(out.glob("*.tar"))
    place.write_bytes(kept)
    assert worlds.run(recipe, manifest, out).rows == {"ok": 24}
    other = tmp_path / "other"
    worlds.run(recipe, manifest, other)
    assert worlds.tree(other) == worlds.tree(out)


def test_too_few_latents_have_no_fit(tmp_path, tiny_model):
    manifest = worlds.save_shards(tmp_path / "in", shards=2, samples=2)
    with pytest.raises(ConfigError, match="no fit can be made of 4 latents: 4 different latents are too few"):
        worlds.run(unseen(tiny_model), manifest, tmp_path / "out")


def test_equal_images_are_no_hindrance(tmp_path, tiny_model):
    twice = {f"k{i}": {"png": worlds.png(i // 2), "cls": b"1"} for i in range(16)}
    manifest, out = worlds.save_samples(tmp_path / "in", twice), tmp_path / "out"
    assert worlds.run(unseen(tiny_model), manifest, out).rows["ok"] >= 14
    assert json.loads((out / "codes" / "fit.json").read_text())["told"]["count"] == 16


def test_the_fits_sample_is_not_the_same_keys_of_every_shard(tmp_path, tiny_model):
    """Where keys are numbers that begin anew in each shard, as identity shard+key lets them."""
    shards = [{f"k{i}": {"png": worlds.png(8 * n + i), "cls": b"1"} for i in range(8)} for n in range(3)]
    manifest, out = worlds.save_samples(tmp_path / "in", *shards), tmp_path / "out"
    worlds.run(unseen(tiny_model, "identity=shard+key"), manifest, out)
    orders = set()
    for place in sorted((out / "codes").glob("*_moments.safetensors")):
        ranked = json.loads(load_file(place)["ranked"].numpy().tobytes())
        orders.add(tuple(key for _, key in ranked))
    assert len(orders) == 3


def test_what_is_never_accepted_fails_with_its_figures(tmp_path, tiny_model, manifest):
    out = tmp_path / "out"
    recipe = unseen(tiny_model, "unseen={references: 4, tolerance: 0.000001, max_tries: 2}")
    assert worlds.run(recipe, manifest, out).rows == {"failed": 24}
    for row in worlds.rows(out):
        assert row.reason == "not-accepted"
        assert "none of 2 new latents is usual: the nearest, distance=" in row.detail


def test_more_shards_would_be_another_fit(tmp_path, tiny_model, manifest):
    out, recipe = tmp_path / "out", unseen(tiny_model)
    with pytest.raises(ConfigError, match="more shards would change the fit"):
        worlds.run(recipe, manifest, out, extend=True)


def test_what_failed_is_done_again_by_the_same_fit(tmp_path, tiny_model):
    samples = {f"k{i}": {"png": worlds.png(i), "cls": b"1"} for i in range(9)}
    broken = samples | {"k2": {"png": b"no", "cls": b"1"}}
    manifest, out = worlds.save_samples(tmp_path / "in", broken), tmp_path / "out"
    recipe = unseen(tiny_model)
    assert worlds.run(recipe, manifest, out).rows == {"failed": 1, "ok": 8}
    before = worlds.tree(out)
    worlds.save_samples(tmp_path / "in", samples)
    assert worlds.run(recipe, manifest, out, only_failed=True).rows == {"ok": 9}
    assert {name: data for name, data in worlds.tree(out).items() if name in before} == before
    assert [key for key, _ in worlds.read_output(out, "s-000~1")] == ["k2"]


@pytest.mark.usefixtures("secret")
def test_under_anonymize_fit_and_latents_lie_in_the_private_dir_alone(tmp_path, tiny_model, manifest):
    out = tmp_path / "out"
    assert worlds.run(unseen(tiny_model, purpose="anonymize"), manifest, out).rows == {"ok": 24}
    assert not (out / "codes").exists()
    assert {row.detail for row in worlds.rows(out)} == {None}
    private = tmp_path / "out-private"
    assert (private / "codes" / "fit.safetensors").is_file()
    for stem in {path.stem for path in out.glob("*.parquet")}:
        assert all(link["detail"].startswith("tries=") for link in read_links(str(private), stem).to_pylist())


@pytest.mark.usefixtures("secret")
def test_under_anonymize_a_new_latent_that_is_all_but_the_samples_own_is_refused(
    tmp_path, tiny_model, manifest
):
    out = tmp_path / "out"
    words = ("unseen={references: 4, tolerance: 9.0, weight: 0.001}", "t.fraction=0.2")
    assert worlds.run(unseen(tiny_model, *words, purpose="anonymize"), manifest, out).rows == {"failed": 24}
    assert {row.reason for row in worlds.rows(out)} == {"mixture-is-source"}


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["sampler.eta=0.5"], "set sampler.eta"),
        (["t={fraction: {field: t.txt}}"], "one t"),
        (["images.sizes=[[8, 8], [16, 16]]"], "without images.sizes"),
        (["unseen.weight=0.0"], "greater than 0"),
        (["unseen=null"], "needs the block unseen"),
        (["interpolate={}"], "block for method interpolate"),
    ],
)
def test_what_has_no_meaning_is_refused(tiny_model, overrides, says):
    with pytest.raises(RecipeError, match=says):
        unseen(tiny_model, *overrides)


KILLED = [
    ("unseen", "codes/s-000_stats.json"),
    ("unseen", "codes/s-000_moments.json"),
    ("unseen", "codes/fit.safetensors"),
    ("unseen", "s-000_stats.json"),
    ("interpolate", "codes/s-000_stats.json"),
    ("interpolate", "s-000.tar"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "until"), KILLED)
def test_a_run_that_is_killed_anywhere_ends_in_the_same_bytes(tmp_path, tiny_model, method, until):
    manifest = worlds.save_shards(tmp_path / "in", shards=3, samples=12)
    mixed = {"interpolate": "interpolate={weights: [0.3, 0.6]}", "unseen": WORDS[-1]}[method]
    settings = [f"method={method}", mixed, "sampler.eta=0.2", "variants=2", "t.fraction=0.8"]
    recipe = worlds.recipe(tiny_model, *settings, purpose="augment")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    worlds.run(recipe, manifest, whole)

    pipeline = tmp_path / "recipe.yaml"
    pipeline.write_text(worlds.recipe_text(tiny_model, purpose="augment"))
    words = [sys.executable, "-m", "boomerang_batch", "run", str(pipeline), str(manifest), str(killed)]
    words += ["--device", "cpu", "--threads", "1"]
    words += [word for setting in settings for word in ("--set", setting)]
    began = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 100
    while not (killed / until).exists() and time.monotonic() < deadline and began.poll() is None:
        time.sleep(0.002)
    began.kill()
    began.wait()
    assert (killed / until).exists()

    worlds.run(recipe, manifest, killed)
    expected, found = worlds.tree(whole), worlds.tree(killed)
    assert expected.keys() == found.keys()
    assert [name for name in expected if found[name] != expected[name] and name != "run.json"] == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_workers_on_ray_come_to_the_same_fit_and_the_same_bytes(tmp_path, tiny_model, manifest, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    recipe = unseen(tiny_model)
    here, there = tmp_path / "here", tmp_path / "there"
    worlds.run(recipe, manifest, here)
    try:
        worlds.run(recipe, manifest, there, address="local", workers=2)
    finally:
        ray.shutdown()
    assert worlds.tree(there) == worlds.tree(here)
