"""Codes that are tried several times and outputs that are refined, through the runner."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from boomerang_batch.config.pipeline import ModelSpec
from boomerang_batch.data.provenance import read_rows
from boomerang_batch.diffusion.boomerang import KeyedNoise, boomerang
from boomerang_batch.diffusion.noise import derived_key
from boomerang_batch.errors import ConfigError, MeasureError, RecipeError, SampleError
from boomerang_batch.measures.classifiers import CheckedClassifier
from boomerang_batch.models import load_denoiser
from boomerang_batch.run import chained, coding, decoder
from boomerang_batch.run.coding import check_target
from boomerang_batch.run.verify import verify
from boomerang_batch.run.walks import Walks
from tests import tiny_models, worlds
from tests.engines import Tiny

OTHER = "target.label=2"


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    return worlds.save_shards(tmp_path / "in", shards=2, samples=3)


def coded(model: Path, *more: str, method: str = "edit-friendly", purpose: str = "augment"):
    return worlds.recipe(model, f"method={method}", OTHER, *more, purpose=purpose)


def pictures(out: Path) -> dict[str, np.ndarray]:
    return {key: worlds.image_of(fields).astype(int) for key, fields in worlds.outputs(out).items()}


# --- trials ---


@pytest.mark.slow
def test_of_several_trials_the_one_nearest_to_its_source_is_kept(tmp_path, tiny_model, manifest, monkeypatch):
    one, four = tmp_path / "one", tmp_path / "four"
    worlds.run(coded(tiny_model, "variants=2", method="dpm-encoder"), manifest, one)
    seen: dict[tuple[str, int], dict[int, float]] = {}
    real = coding.Encoding._worth

    def watched(self, made):
        [worth] = real(self, made)
        seen.setdefault((made.prepared.source.key, made.variant), {})[made.trial] = worth
        return (worth,)

    monkeypatch.setattr(coding.Encoding, "_worth", watched)
    recipe = coded(tiny_model, "variants=2", "target.trials=4", method="dpm-encoder")
    assert worlds.run(recipe, manifest, four).rows == {"ok": 12}
    kept = {(row.key, row.variant): row.trial for row in worlds.rows(four)}
    assert kept == {place: max(of, key=of.get) for place, of in seen.items()}
    assert all(set(of) == set(range(4)) for of in seen.values())
    assert len(set(kept.values())) > 1
    files = (four / "codes" / f"s-00{i}.parquet" for i in range(2))
    codes = {(row.key, row.variant): row for file in files for row in read_rows(file)}
    assert {place: row.trial for place, row in codes.items()} == kept
    assert all(row.evaluations == 8 * row.node for row in codes.values())
    assert all(row.evaluations == row.node for row in worlds.rows(four))
    assert verify(str(four), deep=True).problems == ()

    # The first trial is what there would be without others; what was kept is no farther away.
    apart = {}
    for out in (one, four):
        for key, image in pictures(out).items():
            source = worlds.pixels(worlds.png(int(key[3:8]))).astype(int)
            apart.setdefault(key, []).append((float(np.square(image - source).mean()), image))
    for key, ((before, first), (after, best)) in apart.items():
        number, _, variant = key.removeprefix("img").partition("-v")
        if kept[f"img{number}", int(variant)] == 0:
            assert np.array_equal(first, best)
        else:
            assert after <= before + 1
    assert all(row.trial is None for row in worlds.rows(one))


@pytest.mark.slow
def test_trials_may_be_chosen_by_a_classifier_which_is_part_of_what_made_them(
    tmp_path, tiny_model, manifest, monkeypatch, secret
):
    class Bright:
        name, licence = "bright", "test"

        def __init__(self, digest: str) -> None:
            self.digest = digest * 64

        def classify(self, images):
            return ["2"] * len(images)

        def probability(self, images, label):
            assert label == "2"
            return images.mean(axis=(1, 2, 3)) / 255

    chosen = [Bright("a")]
    monkeypatch.setattr(decoder, "load_classifier", lambda name, where: CheckedClassifier(chosen[0]))
    several = ("target.trials=5", "target.select=class", "target.classifier=bright")
    worlds.run(coded(tiny_model, purpose="anonymize"), manifest, tmp_path / "one")
    worlds.run(coded(tiny_model, *several, purpose="anonymize"), manifest, tmp_path / "five")
    brightness = {
        out: sum(float(image.mean()) for image in pictures(tmp_path / out).values()) for out in ("one", "five")
    }
    assert brightness["five"] > brightness["one"] + 1
    digests = {row.model_digest for out in ("one", "five") for row in worlds.rows(tmp_path / out)}
    assert len(digests) == 2
    chosen[0] = Bright("b")
    with pytest.raises(Exception, match="model weights or settings"):
        worlds.run(coded(tiny_model, *several, purpose="anonymize"), manifest, tmp_path / "five")


@pytest.mark.slow
def test_a_trial_that_is_no_number_is_never_the_best(tmp_path, tiny_model, manifest, monkeypatch):
    real = coding.Encoding._worth

    def broken(self, made):
        worth = real(self, made)
        return worth if made.trial == 2 else (float("nan"),)

    monkeypatch.setattr(coding.Encoding, "_worth", broken)
    out = tmp_path / "out"
    worlds.run(coded(tiny_model, "target.trials=3"), manifest, out)
    assert {row.trial for row in worlds.rows(out)} == {2}


class Sure:
    """A classifier that tells classes alone, and of the pictures in `unseen` nothing."""

    name, licence, digest = "sure", "test", "a" * 64

    def __init__(self, unseen=()) -> None:
        self.asked, self._unseen = 0, unseen

    def classify(self, images):
        self.asked += 1
        if self.asked in self._unseen:
            raise ValueError("no garment in it")
        return ["2"] * len(images)


CHOSEN = ("target.trials=3", "target.select=class", "target.classifier=sure")


def test_a_picture_that_the_classifier_can_not_take_fails_alone(tmp_path, tiny_model, manifest, monkeypatch):
    # The first picture that it is asked about is no sample's.
    monkeypatch.setattr(decoder, "load_classifier", lambda name, where: CheckedClassifier(Sure({6})))
    out = tmp_path / "out"
    assert worlds.run(coded(tiny_model, *CHOSEN, "target.refine={t: {fraction: 0.2}}"), manifest, out).rows == {
        "failed": 1,
        "ok": 5,
    }
    rows = [row for name in ("s-000", "s-001") for row in read_rows(out / "codes" / f"{name}.parquet")]
    [row] = [row for row in rows if row.status == "failed"]
    assert row.reason == "not-judged"
    assert "classifier sure failed on images of shape (1, 8, 8, 3): ValueError: no garment in it" in row.detail
    assert {row.reason for row in worlds.rows(out) if row.status == "failed"} == {"no-code"}
    assert verify(str(out), deep=True).problems == ()


def test_a_classifier_that_takes_no_picture_ends_the_run_before_it_costs(
    tmp_path, tiny_model, manifest, monkeypatch
):
    monkeypatch.setattr(decoder, "load_classifier", lambda name, where: CheckedClassifier(Sure({1})))
    with pytest.raises(MeasureError, match="no garment in it"):
        worlds.run(coded(tiny_model, *CHOSEN), manifest, tmp_path / "out")
    assert not list((tmp_path / "out" / "codes").glob("*"))


@pytest.mark.slow
@pytest.mark.usefixtures("secret")
def test_under_anonymize_no_trial_is_kept_for_being_near_its_source(
    tmp_path, tiny_model, manifest, monkeypatch
):
    monkeypatch.setattr(decoder, "load_classifier", lambda name, where: CheckedClassifier(Sure()))
    kept = {}
    for purpose in ("anonymize", "augment"):
        worlds.run(coded(tiny_model, *CHOSEN, purpose=purpose), manifest, tmp_path / purpose)
        kept[purpose] = {row.trial for row in worlds.rows(tmp_path / purpose) if row.status == "ok"}
    assert kept["anonymize"] == {0}, "all are equally sure, and the first of equals is as good as any"
    assert len(kept["augment"]) > 1


@pytest.mark.usefixtures("secret")
def test_a_code_that_was_chosen_for_another_target_is_not_used(tmp_path, tiny_model, monkeypatch):
    """The field that says what a sample is to become need not travel."""
    monkeypatch.setattr(decoder, "load_classifier", lambda name, where: CheckedClassifier(Sure()))
    several = "target={field: to.cls, trials: 2, select: class, classifier: sure}"
    recipe = worlds.recipe(tiny_model, "method=edit-friendly", several)
    out = tmp_path / "out"
    for label, came in ((b"1", {"ok": 2}), (b"2", {"failed": 2})):
        samples = {f"k{i}": {"png": worlds.png(i), "cls": b"0", "to.cls": label} for i in range(2)}
        assert worlds.run(recipe, worlds.save_samples(tmp_path / "in", samples), out).rows == came
        reasons = {row.reason for row in worlds.rows(out)}
        for path in out.glob("*.*"):
            if path.name != "run.json":
                path.unlink()
    assert reasons == {"stale-code"}


@pytest.mark.parametrize(
    ("overrides", "purpose", "says"),
    [
        (["target.select=class"], "augment", "set trials"),
        (["target.trials=2", "target.select=class"], "augment", "name an installed one"),
        (["target.trials=2", "target.classifier=x"], "augment", "goes with select: class"),
        (["target.trials=2"], "anonymize", "most like the source"),
    ],
)
def test_trials_that_have_no_judge_are_refused(tiny_model, overrides, purpose, says):
    with pytest.raises(RecipeError, match=says):
        coded(tiny_model, *overrides, purpose=purpose)


def test_a_model_told_no_class_has_none_to_choose_by(tiny_model):
    recipe = coded(tiny_model, "target={model: {source: x}, trials: 2, select: class, classifier: y}")
    with pytest.raises(ConfigError, match="told none"):
        check_target(recipe, dataclasses.replace(Tiny().spec, conditioning="none", classes=None))


# --- refine ---


@pytest.mark.slow
def test_refining_is_boomerang_on_what_was_decoded(tmp_path, tiny_model, manifest, monkeypatch):
    pairs, real = [], chained.chained

    def watched(first, again, second):
        for pair in real(first, again, second):
            pairs.append(pair)
            yield pair

    monkeypatch.setattr(chained, "chained", watched)
    recipe = coded(tiny_model, "target.refine={t: {timestep: 6}, steps: 10, eta: 0.5}", "variants=2")
    out = tmp_path / "out"
    assert worlds.run(recipe, manifest, out).rows == {"ok": 12}
    model = load_denoiser(
        ModelSpec(source=str(tiny_model), class_labels=recipe.model.class_labels), device="cpu", threads=1
    )
    sampler = recipe.sampler.model_copy(update={"eta": 0.5})
    again = recipe.model_copy(update={"steps": 10, "sampler": sampler})
    walk = Walks(again, model.spec).at("timestep", 6)
    assert len(pairs) == 12
    for before, after in pairs:
        key = derived_key(after.prepared.noise_keys[after.variant], "refine")
        x_0 = before.pieces[0][None]
        expected = boomerang(x_0, model, walk.schedule, walk.solver, KeyedNoise([key], x_0), [2])
        assert torch.allclose(after.pieces[0], expected[0], atol=1e-4)
        assert not torch.allclose(after.pieces[0], before.pieces[0], atol=1e-2)
    assert all(row.evaluations == row.node + walk.n for row in worlds.rows(out))


@pytest.mark.usefixtures("secret")
def test_a_source_that_came_back_is_not_hidden_by_refining_it(tmp_path, manifest):
    unet = tiny_models.network(in_channels=1, out_channels=1, num_class_embeds=worlds.CLASSES + 1)
    with torch.no_grad():
        unet.class_embedding.weight.zero_()  # every class is the same to it
    model = tiny_models.save_pipeline(tmp_path / "blind", unet=unet)
    recipe = coded(model, "target.refine={t: {fraction: 0.1}}", purpose="anonymize")
    worlds.run(recipe, manifest, tmp_path / "out")
    assert {row.reason for row in worlds.rows(tmp_path / "out")} <= {"output-equals-input", "target-is-source"}


def test_a_sample_that_can_not_be_refined_at_its_size_fails_alone(tmp_path, tiny_model, manifest, monkeypatch):
    real = coding.Decoding._refining_walk

    def walk(self, prepared, variant):
        if prepared.source.key == "img00001":
            raise SampleError("bad-t", "for this test: the chain of this size does not reach so far")
        return real(self, prepared, variant)

    monkeypatch.setattr(coding.Decoding, "_refining_walk", walk)
    recipe = coded(tiny_model, "target.refine={t: {fraction: 0.2}}")
    assert worlds.run(recipe, manifest, tmp_path / "out").rows == {"failed": 1, "ok": 5}


def test_a_refining_that_goes_where_no_noise_is_is_told_by_its_name(tmp_path, tiny_model, manifest):
    recipe = coded(tiny_model, "target.refine={t: {sigma: 0.000001}}")
    with pytest.raises(ConfigError, match=r"target\.refine: t sigma=1e-06 .* lies outside"):
        worlds.run(recipe, manifest, tmp_path / "out")


def test_what_a_refining_has_no_t_for_is_refused(tiny_model):
    with pytest.raises(RecipeError, match="exactly one unit"):
        coded(tiny_model, "target.refine={t: {}}")
    with pytest.raises(RecipeError, match="exactly one unit"):
        coded(tiny_model, "target.refine={t: {fraction: 0.1, sigma: 1.0}}")


# --- kills ---


@pytest.mark.slow
def test_a_translation_with_another_model_trials_and_refining_survives_kills(tmp_path, tiny_model):
    """Killed once codes are there, then once an output is, at whatever moment that happens to be."""
    manifest = worlds.save_shards(tmp_path / "in", shards=4, samples=6)
    unet = tiny_models.network(5, in_channels=1, out_channels=1)
    dogs = tiny_models.save_pipeline(tmp_path / "dogs", unet=unet)
    target = f"target={{model: {{source: {dogs}}}, trials: 3, refine: {{t: {{fraction: 0.2}}}}}}"
    changes = ["method=dpm-encoder", target, "variants=2", "sampler.eta=0.3", "run.journal_every=2"]
    recipe = worlds.recipe(tiny_model, *changes, purpose="augment")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert worlds.run(recipe, manifest, whole).rows == {"ok": 48}

    pipeline = tmp_path / "recipe.yaml"
    pipeline.write_text(worlds.recipe_text(tiny_model, purpose="augment"))
    words = [sys.executable, "-m", "boomerang_batch", "run", str(pipeline), str(manifest), str(killed)]
    words += ["--device", "cpu", "--threads", "1"]
    words += [word for change in changes for word in ("--set", change)]
    for marks in ("codes/*_stats.json", "*_stats.json"):
        there = len(list(killed.glob(marks)))
        began = subprocess.Popen(words, stderr=subprocess.DEVNULL)
        until = time.monotonic() + 200
        while len(list(killed.glob(marks))) == there and time.monotonic() < until and began.poll() is None:
            time.sleep(0.005)
        began.kill()
        began.wait()
        assert len(list(killed.glob(marks))) > there
    assert not list(killed.glob("s-003_stats.json")), "the second kill came before the end"

    worlds.run(recipe, manifest, killed)
    expected, found = worlds.tree(whole), worlds.tree(killed)
    assert expected.keys() == found.keys()
    assert [name for name in expected if found[name] != expected[name] and name != "run.json"] == []
