"""Methods that go by codes, through the runner: the artefact, what is made of it, and what a stop costs."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from boomerang_batch.audit.audit import AuditRequest, audit
from boomerang_batch.config.blocks import Gates
from boomerang_batch.data.codes import FIELD, code_bytes, read_codes
from boomerang_batch.data.manifest import load_manifest
from boomerang_batch.data.provenance import read_rows
from boomerang_batch.errors import ConfigError, RecipeError, RunMismatchError, SampleError
from boomerang_batch.run import coding
from boomerang_batch.run import runner as running
from boomerang_batch.run.coding import check_target
from boomerang_batch.run.decoder import check_decodes
from boomerang_batch.run.record import read_record
from boomerang_batch.run.tasks import RunSpec, Task
from boomerang_batch.run.verify import verify
from tests import tiny_models, worlds
from tests.engines import Tiny

METHODS = ("dpm-encoder", "edit-friendly")
OTHER = "target.label=2"


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    return worlds.save_shards(tmp_path / "in", shards=2, samples=3)


def coded(model: Path, method: str, *more: str, purpose: str = "augment"):
    return worlds.recipe(model, f"method={method}", *more, purpose=purpose)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_without_a_target_every_image_comes_back(tmp_path, tiny_model, manifest, method):
    out = tmp_path / "out"
    assert worlds.run(coded(tiny_model, method, "variants=2"), manifest, out).rows == {"ok": 12}
    assert verify(str(out), deep=True).problems == ()
    for key, fields in worlds.outputs(out).items():
        number = int(key.removeprefix("img").partition("-")[0])
        source = worlds.pixels(worlds.png(number)).astype(int)
        assert np.abs(worlds.image_of(fields).astype(int) - source).max() <= 1
    for row in worlds.rows(out):
        assert row.sigma is None  # no noise over the source is what hides it
        assert row.evaluations == row.node


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_target_changes_what_was_not_it_and_nothing_else(tmp_path, tiny_model, manifest, method):
    out = tmp_path / "out"
    assert worlds.run(coded(tiny_model, method, OTHER), manifest, out).rows == {"ok": 6}
    for key, fields in worlds.outputs(out).items():
        number = int(key.removeprefix("img"))
        apart = np.abs(worlds.image_of(fields).astype(int) - worlds.pixels(worlds.png(number)).astype(int))
        assert (apart.max() > 1) == (number % worlds.CLASSES != 2)
    assert {row.label for row in worlds.rows(out)} == {2}


@pytest.mark.slow
def test_several_variants_are_several_counterparts(tmp_path, tiny_model, manifest):
    out = tmp_path / "out"
    worlds.run(coded(tiny_model, "edit-friendly", OTHER, "variants=4"), manifest, out)
    shown = worlds.outputs(out)
    for number in range(6):
        if number % worlds.CLASSES != 2:
            found = {shown[f"img{number:05d}-v{variant}"]["png"] for variant in range(4)}
            assert len(found) == 4


@pytest.mark.slow
def test_a_shift_of_the_maps_moves_the_colours_of_every_output(tmp_path, tiny_model, manifest):
    outs = {}
    for by in (0.0, 0.3):
        out = outs[by] = tmp_path / f"out{by}"
        recipe = coded(tiny_model, "edit-friendly", f"target.shift.by=[{by}]")
        assert worlds.run(recipe, manifest, out).rows == {"ok": 6}
    assert max(changes(outs[0.0]).values()) <= 1
    assert min(changes(outs[0.3]).values()) > 3
    wrong = coded(tiny_model, "edit-friendly", "target.shift.by=[0.1, 0.2]")
    with pytest.raises(ConfigError, match="have 1 channels"):
        worlds.run(wrong, manifest, tmp_path / "wrong")
    with pytest.raises(RecipeError, match="in other colours"):
        coded(tiny_model, "edit-friendly", "target.shift.by=[0.1]", purpose="anonymize")


def test_the_target_may_be_a_field_of_each_sample(tmp_path, tiny_model):
    samples = {f"img{i}": {"png": worlds.png(i), "cls": b"0", "to.cls": str(i).encode()} for i in (1, 2, 7)}
    manifest = worlds.save_samples(tmp_path / "in", samples)
    out = tmp_path / "out"
    recipe = coded(tiny_model, "edit-friendly", "target.field=to.cls", "fields.fields={cls: keep}")
    assert worlds.run(recipe, manifest, out).rows == {"failed": 1, "ok": 2}
    found = {row.key: (row.status, row.reason, row.label) for row in worlds.rows(out)}
    assert found["img1"] == ("ok", None, 1)
    assert found["img2"] == ("ok", None, 2)
    assert found["img7"][:2] == ("failed", "label-out-of-range")


@pytest.mark.slow
def test_codes_are_kept_as_a_shard_with_rows_and_a_marker_and_not_drawn_again(
    tmp_path, tiny_model, manifest, monkeypatch
):
    out, recipe = tmp_path / "out", coded(tiny_model, "edit-friendly", OTHER)
    worlds.run(recipe, manifest, out)
    kept = worlds.tree(out)
    rows = read_rows(out / "codes" / "s-000.parquet")
    assert [row.key for row in rows] == ["img00000", "img00001", "img00002"]
    assert all(row.output_digest and row.pixel_digest is None for row in rows)
    codes = worlds.read_output(out / "codes", "s-000")
    assert [list(fields) for _, fields in codes] == [[FIELD]] * 3

    for name in ("s-000_stats.json", "s-000.tar", "s-000.parquet"):
        (out / name).unlink()
    encodings = []
    real = running.Encoding.draws
    monkeypatch.setattr(running.Encoding, "draws", lambda self, one: encodings.append(one) or real(self, one))
    worlds.run(recipe, manifest, out)
    assert worlds.tree(out) == kept
    assert encodings == []


@pytest.mark.slow
@pytest.mark.parametrize("harm", ["changed", "cut", "gone"])
def test_codes_that_were_harmed_are_drawn_again(tmp_path, tiny_model, manifest, caplog, harm):
    out, recipe = tmp_path / "out", coded(tiny_model, "dpm-encoder", OTHER)
    worlds.run(recipe, manifest, out)
    whole = worlds.tree(out)
    tar = out / "codes" / "s-000.tar"
    data = bytearray(tar.read_bytes())
    data[700] ^= 1
    tar.write_bytes(bytes(data if harm == "changed" else data[:900]))
    if harm == "gone":
        tar.unlink()
    assert any("codes" in problem for problem in verify(str(out), deep=True).problems)
    (out / "s-000_stats.json").unlink()
    assert worlds.run(recipe, manifest, out).rows == {"ok": 6}
    assert worlds.tree(out) == whole
    assert "its codes are drawn again" in caplog.text


@pytest.mark.slow
def test_verify_looks_at_codes_and_under_anonymize_where_it_is_told_to(tmp_path, tiny_model, manifest, secret):
    out = tmp_path / "out"
    worlds.run(coded(tiny_model, "edit-friendly", OTHER, purpose="anonymize"), manifest, out)
    private = Path(f"{out}-private")
    assert verify(str(out), deep=True, private_dir=str(private)).problems == ()
    [first, second] = sorted(private.glob("codes/*_stats.json"))
    first.unlink()
    parquet = Path(str(second).replace("_stats.json", ".parquet"))
    parquet.write_bytes(parquet.read_bytes()[:-1])
    assert verify(str(out), deep=True).problems == ()
    problems = verify(str(out), deep=False, private_dir=str(private)).problems
    assert any("there are no codes of shard" in problem for problem in problems)
    assert any("its marker says" in problem for problem in problems)
    assert len(problems) == 2


@pytest.mark.slow
@pytest.mark.parametrize("purpose", ["augment", "anonymize"])
def test_codes_drawn_before_a_stop_are_not_drawn_again(tmp_path, tiny_model, monkeypatch, secret, purpose):
    manifest = worlds.save_shards(tmp_path / "in", shards=1, samples=40)
    recipe = coded(tiny_model, "edit-friendly", OTHER, "run.journal_every=5", purpose=purpose)
    whole, out, home = tmp_path / "whole", tmp_path / "out", tmp_path / "out"
    worlds.run(recipe, manifest, whole)
    stop, real, drawn = threading.Event(), coding.Encoding.finish, []

    def finish(self, made, *, seen):
        drawn.append(made)
        if len(drawn) == 20:
            stop.set()
        return real(self, made, seen=seen)

    monkeypatch.setattr(coding.Encoding, "finish", finish)
    if purpose == "anonymize":
        home = Path(f"{out}-private")
    assert worlds.run(recipe, manifest, out, stop=stop).stopped
    kept = list((home / "logs" / "journal").rglob("*.parquet"))
    assert kept
    assert all(path.parent.name.endswith("~codes") for path in kept)
    assert purpose == "augment" or not (out / "logs" / "journal").exists()
    before, drawn[:] = len(drawn), []
    worlds.run(recipe, manifest, out)
    assert 0 < len(drawn) <= 40 - 20
    assert before >= 20
    assert worlds.tree(out) == worlds.tree(whole)
    assert not list((home / "logs").rglob("journal/*/*"))


def test_codes_count_as_getting_further(tmp_path, tiny_model, manifest):
    """A worker that dies over the codes of a large shard has done something."""
    out, counts = tmp_path / "out", []
    recipe = coded(tiny_model, "edit-friendly", OTHER)
    spec = RunSpec(recipe=recipe, out=str(out), private_dir=None, device="cpu", threads=1, epoch=0)
    out.mkdir()
    runner = running.Runner(spec)
    try:
        task = Task(name="s-000", url=str(manifest.parent / "s-000.tar"), source_stem="s-000")
        done = runner.run(
            task,
            stopped=lambda: False,
            progress=lambda count: counts.append(("outputs", count)),
            coded=lambda count: counts.append(("codes", count)),
        )
    finally:
        runner.close()
    assert done.status == "done"
    assert counts == [(what, count) for what in ("codes", "outputs") for count in (1, 2, 3)]


@pytest.mark.slow
def test_under_anonymize_codes_lie_in_the_private_dir_alone(tmp_path, tiny_model, manifest, secret):
    out = tmp_path / "out"
    recipe = coded(tiny_model, "edit-friendly", OTHER, purpose="anonymize")
    assert worlds.run(recipe, manifest, out).rows == {"failed": 1, "ok": 5}
    assert not (out / "codes").exists()
    assert len(list((tmp_path / "out-private" / "codes").glob("*.tar"))) == 2
    assert {row.reason for row in worlds.rows(out) if row.status == "failed"} == {"target-is-source"}
    with pytest.raises(RecipeError, match="without a target gives back the input"):
        coded(tiny_model, "edit-friendly", purpose="anonymize")


def test_a_sample_without_a_code_fails_alone(tmp_path, tiny_model):
    good = {"png": worlds.png(1), "cls": b"1"}
    manifest = worlds.save_samples(
        tmp_path / "in", {"a": good, "b": {"png": b"no image", "cls": b"1"}, "c": good | {"png": worlds.png(3)}}
    )
    out = tmp_path / "out"
    assert worlds.run(coded(tiny_model, "edit-friendly", OTHER), manifest, out).rows == {"failed": 1, "ok": 2}


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["method=boomerang", OTHER], "boomerang makes none"),
        (["method=dpm-encoder", "sampler.eta=0"], "eta must be above 0"),
        (["method=edit-friendly", "sampler={eta: 0, order: 2}"], "order 1"),
        (["method=edit-friendly", "passes.count=2"], "without passes"),
        (["method=edit-friendly", "region.field=mask.png"], "without region"),
        (["method=edit-friendly", "target={label: 1, field: x.cls}"], "one of label, prompt and field"),
    ],
)
def test_what_a_method_is_not_defined_for_is_refused(tiny_model, overrides, says):
    with pytest.raises(RecipeError, match=says):
        worlds.recipe(tiny_model, *overrides, purpose="augment")


@pytest.mark.parametrize(("target", "says"), [("label: 5", "no class"), ("prompt: a cat", "told no prompts")])
def test_a_target_that_the_model_can_not_be_told_ends_the_run(tmp_path, tiny_model, manifest, target, says):
    recipe = coded(tiny_model, "edit-friendly", f"target={{{target}}}")
    with pytest.raises(ConfigError, match=says):
        worlds.run(recipe, manifest, tmp_path / "out")


def test_bytes_that_are_no_code_are_refused():
    with pytest.raises(SampleError, match="no code"):
        read_codes(b"nothing", proof=b"p", pieces=1, steps=2)
    with pytest.raises(SampleError, match="no code"):
        read_codes(code_bytes([], proof=b"p"), proof=b"p", pieces=1, steps=2)
    with pytest.raises(SampleError, match="another image"):
        read_codes(code_bytes([], proof=b"p"), proof=b"q", pieces=1, steps=2)


def test_a_code_of_another_image_of_the_same_name_is_not_used(tmp_path, tiny_model, manifest):
    """The shard was replaced between its codes and its outputs; another attempt at what failed draws anew."""
    out, recipe = tmp_path / "out", coded(tiny_model, "edit-friendly")
    worlds.run(recipe, manifest, out)
    for path in out.glob("s-000*"):
        path.unlink()
    members = [one for i in range(3) for one in worlds.sample_members(f"img{i:05d}", 100 + i)]
    worlds.write_tar(tmp_path / "in" / "s-000.tar", members)
    assert worlds.run(recipe, manifest, out).rows == {"failed": 3, "ok": 3}
    assert {row.reason for row in worlds.rows(out) if row.status == "failed"} == {"stale-code"}
    assert worlds.run(recipe, manifest, out, only_failed=True).rows == {"ok": 6}
    found = dict(worlds.read_output(out, "s-000~1"))
    for i in range(3):
        apart = worlds.image_of(found[f"img{i:05d}"]).astype(int) - worlds.pixels(worlds.png(100 + i))
        assert np.abs(apart).max() <= 1


def test_one_failed_variant_of_several_is_done_again(tmp_path, tiny_model, manifest, monkeypatch):
    out, recipe = tmp_path / "out", coded(tiny_model, "dpm-encoder", OTHER, "variants=3")
    real, failed = running.Decoding.finish, []

    def once(self, made, *, seen):
        if made.variant == 1 and made.prepared.source.key == "img00001" and not failed:
            failed.append(True)
            raise SampleError("flagged", "for this test")
        return real(self, made, seen=seen)

    monkeypatch.setattr(running.Decoding, "finish", once)
    assert worlds.run(recipe, manifest, out).rows == {"failed": 1, "ok": 17}
    assert worlds.run(recipe, manifest, out, only_failed=True).rows == {"ok": 18}


def test_a_target_that_does_not_travel_is_not_told(tmp_path, tiny_model, secret):
    samples = {f"img{i}": {"png": worlds.png(i), "cls": b"0", "to.cls": b"%d" % (1 + i)} for i in range(3)}
    manifest = worlds.save_samples(tmp_path / "in", samples)
    out = tmp_path / "out"
    recipe = coded(tiny_model, "edit-friendly", "target.field=to.cls", purpose="anonymize")
    assert worlds.run(recipe, manifest, out).rows == {"ok": 3}
    assert {row.label for row in worlds.rows(out)} == {None}


def test_anonymize_refuses_models_behind_an_autoencoder_or_told_prompts(tiny_model):
    recipe = coded(tiny_model, "edit-friendly", OTHER, purpose="anonymize")
    with pytest.raises(ConfigError, match="takes a pixel model that is told classes"):
        check_target(recipe, Tiny(latent=True).spec)


@pytest.mark.slow
def test_an_audit_draws_nothing_anew_and_certifies_nothing(tmp_path, tiny_model):
    manifest, out = worlds.save_shards(tmp_path / "in", shards=2, samples=12), tmp_path / "out"
    worlds.run(coded(tiny_model, "edit-friendly", OTHER), manifest, out)
    found = audit(
        AuditRequest(
            out=str(out),
            manifest=load_manifest(str(manifest)),
            embedders=("pixels",),
            samples=24,
            redraws=10,
            gates=Gates(),
        )
    )
    assert {one.subject for one in found.readings} == {"outputs", "sources", "unrelated"}
    assert any("looks at the source again" in reason for reason in found.bound.reasons)
    assert any("nothing was drawn anew, which method edit-friendly" in text for text in found.warnings)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_is_killed_between_codes_and_outputs_ends_in_the_same_bytes(tmp_path, tiny_model, method):
    manifest = worlds.save_shards(tmp_path / "in", shards=3, samples=12)
    recipe = coded(tiny_model, method, OTHER, "variants=2")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    worlds.run(recipe, manifest, whole)

    pipeline = tmp_path / "recipe.yaml"
    pipeline.write_text(worlds.recipe_text(tiny_model, purpose="augment"))
    words = [sys.executable, "-m", "boomerang_batch", "run", str(pipeline), str(manifest), str(killed)]
    words += ["--device", "cpu", "--threads", "1", "--set", f"method={method}", "--set", OTHER]
    began = subprocess.Popen([*words, "--set", "variants=2"], stderr=subprocess.DEVNULL)
    until = time.monotonic() + 100
    while not list(killed.glob("codes/*_stats.json")) and time.monotonic() < until and began.poll() is None:
        time.sleep(0.005)
    began.kill()
    began.wait()
    assert list(killed.glob("codes/*_stats.json"))

    worlds.run(recipe, manifest, killed)
    expected = worlds.tree(whole)
    found = worlds.tree(killed)
    assert expected.keys() == found.keys()
    assert [name for name in expected if found[name] != expected[name] and name != "run.json"] == []


# --- both guidances, and another model ---


def noisier(folder: Path, *, seed: int = 0, labels: bool = True, **scheduler: object) -> Path:
    """A model like `save_model`'s, with other weights, or none of its labels, or another chain."""
    classes = {"num_class_embeds": worlds.CLASSES + 1} if labels else {}
    unet = tiny_models.network(seed, in_channels=1, out_channels=1, **classes)
    return tiny_models.save_pipeline(folder, unet=unet, noise=tiny_models.scheduler(**scheduler))


def changes(out: Path) -> dict[str, int]:
    """How far each output is from its source, at most, in grey levels."""
    return {
        key: int(np.abs(worlds.image_of(fields).astype(int) - worlds.pixels(worlds.png(int(key[3:])))).max())
        for key, fields in worlds.outputs(out).items()
    }


@pytest.mark.slow
def test_the_targets_guidance_acts_while_decoding_alone(tmp_path, tiny_model, manifest):
    own = coded(tiny_model, "dpm-encoder", OTHER, "model.class_labels.guidance=1")
    strong = coded(tiny_model, "dpm-encoder", OTHER, "target.guidance=4")
    same = coded(tiny_model, "dpm-encoder", OTHER, "target.guidance=1")
    for name, recipe in (("own", own), ("strong", strong), ("same", same)):
        assert worlds.run(recipe, manifest, tmp_path / name).rows == {"ok": 6}
    codes = [
        [fields[FIELD] for _, fields in worlds.read_output(tmp_path / name / "codes", "s-000")]
        for name in ("own", "strong")
    ]
    for ours, theirs in zip(*codes, strict=True):
        one, other = (safetensors.torch.load(data) for data in (ours, theirs))
        assert torch.equal(one["0.residuals"], other["0.residuals"])
    found = {name: worlds.outputs(tmp_path / name) for name in ("own", "strong", "same")}
    assert {key: f["png"] for key, f in found["own"].items()} == {k: f["png"] for k, f in found["same"].items()}
    assert all(f["png"] != found["strong"][key]["png"] for key, f in found["own"].items())
    digests = {row.model_digest for name in found for row in worlds.rows(tmp_path / name)}
    assert len(digests) == 1


@pytest.mark.slow
def test_another_model_of_no_classes_is_a_target_by_itself(tmp_path, tiny_model, manifest):
    dogs = noisier(tmp_path / "dogs", seed=3, labels=False)
    recipe = coded(tiny_model, "edit-friendly", f"target.model.source={dogs}")
    out = tmp_path / "out"
    assert worlds.run(recipe, manifest, out).rows == {"ok": 6}
    assert min(changes(out).values()) > 1
    assert {row.label for row in worlds.rows(out)} == {None}
    record = read_record(str(out))
    assert record.recipe["target"]["model"]["source"] == "dogs"
    assert {row.model_digest for row in worlds.rows(out)} == {record.model_digest}

    noisier(dogs, seed=4, labels=False)  # other weights under the same name
    (out / "s-000_stats.json").unlink()
    with pytest.raises(RunMismatchError, match="model weights or settings"):
        worlds.run(recipe, manifest, out)


@pytest.mark.slow
def test_the_same_model_as_another_gives_every_image_back(tmp_path, tiny_model, manifest):
    """Loaded twice, on an engine of its own, told each sample's label by its own block."""
    same = f"{{source: {tiny_model}, class_labels: {{field: cls, null_label: {worlds.CLASSES}}}}}"
    out = tmp_path / "out"
    recipe = coded(tiny_model, "edit-friendly", f"target={{model: {same}}}")
    assert worlds.run(recipe, manifest, out).rows == {"ok": 6}
    assert max(changes(out).values()) <= 1
    assert {row.label for row in worlds.rows(out)} == set(range(worlds.CLASSES))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"beta_end": 0.2}, "noise levels"),
        ({"num_train_timesteps": 30}, "training timesteps .30 of the target's model, 20 of the recipe's"),
    ],
)
def test_a_model_of_another_chain_is_refused_with_what_differs(tmp_path, tiny_model, manifest, options, says):
    other = noisier(tmp_path / "other", labels=False, **options)
    with pytest.raises(ConfigError, match=says):
        worlds.run(
            coded(tiny_model, "edit-friendly", f"target.model.source={other}"), manifest, tmp_path / "out"
        )


def test_a_decoding_model_may_predict_something_else_but_not_see_another_image():
    ours = Tiny().spec
    check_decodes(dataclasses.replace(ours, prediction="v_prediction", clip_range=None, digest="1" * 64), ours)
    for change, says in (
        ({"channels": 3}, "image channels"),
        ({"value_range": (0.0, 1.0)}, "value range"),
        ({"width": 16}, "image size"),
        ({"latent": True, "state_factor": 2}, "latent states"),
        ({"levels": Tiny("flow-euler").spec.levels}, "kind of chain"),
    ):
        with pytest.raises(ConfigError, match=says):
            check_decodes(dataclasses.replace(ours, **change), ours)


@pytest.mark.parametrize(
    ("target", "purpose", "says"),
    [
        ("{model: {source: x}, guidance: 2}", "augment", "another model has its own"),
        ("{model: {source: x, safety: drop}}", "augment", "remove safety"),
        ("{guidance: 2}", "augment", "a target is one of"),
        ("{model: {source: x}}", "anonymize", "decodes with the model itself"),
    ],
)
def test_targets_that_contradict_themselves_are_refused(tiny_model, target, purpose, says):
    with pytest.raises(RecipeError, match=says):
        coded(tiny_model, "edit-friendly", f"target={target}", purpose=purpose)


def test_guidance_of_a_model_that_has_none_is_refused(tiny_model):
    with pytest.raises(RecipeError, match="guidance needs class_labels with a null_label"):
        coded(tiny_model, "edit-friendly", OTHER, "target.guidance=2", "model.class_labels={field: cls}")
