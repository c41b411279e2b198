"""Images between images, through the runner: who is whose partner, and what comes of their latents."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from boomerang_batch.audit.bounding import cautions
from boomerang_batch.audit.explain import explain
from boomerang_batch.config.accounting import account
from boomerang_batch.data import images
from boomerang_batch.data.codes import FIELD, read_codes
from boomerang_batch.data.provenance import read_rows
from boomerang_batch.diffusion.codes import Code, decode, inverted
from boomerang_batch.diffusion.latents import slerp
from boomerang_batch.diffusion.samplers import build_solver
from boomerang_batch.diffusion.schedule import build_schedule
from boomerang_batch.errors import RecipeError
from boomerang_batch.run.links import read_links
from boomerang_batch.run.loading import load
from boomerang_batch.run.transform import Transform
from boomerang_batch.run.verify import verify
from tests import worlds

GRIDS = ("linspace", "var-linear", "var-quadratic")


def between(model: Path, *more: str, purpose: str = "augment"):
    words = ("method=interpolate", "sampler.eta=0.0", "interpolate={weights: [0.5]}", *more)
    return worlds.recipe(model, *words, purpose=purpose)


def told(row) -> dict[str, str]:
    return dict(pair.split("=") for pair in row.detail.split())


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    return worlds.save_shards(tmp_path / "in", shards=2, samples=5)


@pytest.mark.slow
@pytest.mark.parametrize("grid", GRIDS)
def test_outputs_are_what_the_algorithm_says_of_two_latents(tmp_path, tiny_model, manifest, grid):
    out = tmp_path / "out"
    recipe = between(
        tiny_model, f"grid={grid}", "variants=3", "interpolate={weights: [0.25, 0.5, 0.75]}", "t.fraction=0.8"
    )
    assert worlds.run(recipe, manifest, out).rows == {"ok": 30}
    assert verify(str(out), deep=True).problems == ()
    found = worlds.outputs(out)
    model, spec = (engine := load(recipe, device="cpu", threads=1)[0]).denoiser, engine.denoiser.spec
    down = build_schedule(spec.levels, grid=grid, steps=6, t=("fraction", 0.8), start="exact")
    walks = [
        (schedule, build_solver(schedule, prediction=spec.prediction, eta=0.0, clip_range=spec.clip_range))
        for schedule in (inverted(down), down)
    ]

    def walked(x, number, which):
        begin = Code(x_n=x, residuals=None)
        return decode(begin, model, *walks[which], [number % worlds.CLASSES])

    def latent(number):
        values = images.to_model_values(worlds.pixels(worlds.png(number))[..., None], spec.value_range)
        return walked(torch.from_numpy(values)[None], number, 0)

    with torch.inference_mode():
        for row in worlds.rows(out):
            number, partner = (int(key.removeprefix("img")) for key in (row.key, told(row)["partner"]))
            assert number // 5 == partner // 5
            weight = (0.25, 0.5, 0.75)[row.variant]
            assert told(row)["weight"] == str(weight)
            mixed = slerp(latent(number)[0], latent(partner)[0], weight)[None]
            expected = images.to_pixels(walked(mixed, number, 1)[0].numpy(), spec.value_range)
            apart = worlds.image_of(found[f"{row.key}-v{row.variant}"]).astype(int) - expected[..., 0]
            assert abs(apart).max() <= 1
    engine.close()


def test_partners_form_one_circle_in_an_order_of_the_seeds(tmp_path, tiny_model, manifest):
    following = {}
    for seed in (7, 8):
        out = tmp_path / f"out-{seed}"
        worlds.run(between(tiny_model, f"seed={seed}"), manifest, out)
        following[seed] = {row.key: told(row)["partner"] for row in worlds.rows(out)}
        for shard in (0, 1):
            begin = key = f"img{5 * shard:05d}"
            seen = []
            while not seen or key != begin:
                key = following[seed][key]
                seen.append(key)
            assert len(set(seen)) == len(seen) == 5
    assert following[7] != following[8]


def test_rows_of_the_codes_tell_one_latent_for_each_sample(tmp_path, tiny_model, manifest):
    out = tmp_path / "out"
    worlds.run(between(tiny_model, "variants=2", "interpolate={weights: [0.3, 0.6]}"), manifest, out)
    rows = read_rows(out / "codes" / "s-000.parquet")
    assert [(row.key, row.variant, row.label) for row in rows] == [(f"img{i:05d}", 0, i % 4) for i in range(5)]
    for _, fields in worlds.read_output(out / "codes", "s-000"):
        [code] = read_codes(fields[FIELD], proof=None, pieces=1, steps=None)
        assert code.x_n.shape == (1, 8, 8)


def test_partners_may_be_kept_to_one_class(tmp_path, tiny_model):
    manifest, out = worlds.save_shards(tmp_path / "in", shards=1, samples=9), tmp_path / "out"
    recipe = between(tiny_model, "interpolate={same: label}")
    assert worlds.run(recipe, manifest, out).rows == {"ok": 9}
    for row in worlds.rows(out):
        assert int(told(row)["partner"][3:]) % 4 == row.label


def test_a_sample_without_another_has_no_partner(tmp_path, tiny_model):
    manifest, out = worlds.save_shards(tmp_path / "in", shards=1, samples=5), tmp_path / "out"
    assert worlds.run(between(tiny_model, "interpolate={same: label}"), manifest, out).rows == {
        "failed": 3,
        "ok": 2,
    }
    assert {row.reason for row in worlds.rows(out) if row.status == "failed"} == {"no-partner"}


def test_two_that_are_each_others_partners_share_the_image_between_them(tmp_path, tiny_model):
    same = {"a": {"png": worlds.png(1), "cls": b"1"}, "b": {"png": worlds.png(5), "cls": b"1"}}
    out = tmp_path / "out"
    manifest = worlds.save_samples(tmp_path / "in", same)
    assert worlds.run(between(tiny_model), manifest, out).rows == {"ok": 2}
    first, second = (worlds.image_of(fields).astype(int) for fields in worlds.outputs(out).values())
    assert abs(first - second).max() <= 1


def test_a_model_that_gives_different_mixtures_one_image_is_found_out(tmp_path, tiny_model, monkeypatch):
    manifest, out = worlds.save_shards(tmp_path / "in", shards=1, samples=5), tmp_path / "out"
    alike = torch.linspace(-1, 1, 64).reshape(1, 8, 8)
    real = Transform.finish

    def collapsed(self, made, *, seen):
        return real(self, dataclasses.replace(made, pieces=(alike,)), seen=seen)

    monkeypatch.setattr(Transform, "finish", collapsed)
    assert worlds.run(between(tiny_model), manifest, out).rows == {"failed": 5}
    assert {row.reason for row in worlds.rows(out)} == {"output-repeated"}


def test_both_ways_between_two_meet_in_the_same_images(tmp_path, tiny_model):
    same = {"a": {"png": worlds.png(1), "cls": b"1"}, "b": {"png": worlds.png(5), "cls": b"1"}}
    manifest, out = worlds.save_samples(tmp_path / "in", same), tmp_path / "out"
    recipe = between(tiny_model, "variants=2", "interpolate={weights: [0.25, 0.75]}")
    assert worlds.run(recipe, manifest, out).rows == {"ok": 4}


def test_a_field_may_name_the_partner(tmp_path, tiny_model):
    def sample(number: int, to: bytes) -> dict[str, bytes]:
        return {"png": worlds.png(number), "cls": b"1", "to.txt": to}

    first = {"a": sample(1, b"b"), "b": sample(2, b"a"), "c": sample(3, b"c"), "d": sample(4, b"x")}
    manifest, out = worlds.save_samples(tmp_path / "in", first, {"x": sample(5, b"")}), tmp_path / "out"
    recipe = between(tiny_model, "interpolate={partner: {field: to.txt}}")
    assert worlds.run(recipe, manifest, out).rows == {"failed": 3, "ok": 2}
    rows = {row.key: row for row in worlds.rows(out)}
    assert told(rows["a"])["partner"] == "b"
    assert "names the sample itself" in rows["c"].detail
    assert (
        "names x, which has no latent in this shard; partners of other shards can't be had" in rows["d"].detail
    )
    assert {rows[key].reason for key in "cdx"} == {"no-partner"}


def test_a_broken_sample_is_nobodys_partner_and_is_mended_alone(tmp_path, tiny_model):
    samples = {f"k{i}": {"png": worlds.png(i), "cls": b"1"} for i in range(4)}
    manifest, out = (
        worlds.save_samples(tmp_path / "in", samples | {"k2": {"png": b"no", "cls": b"1"}}),
        tmp_path / "out",
    )
    recipe = between(tiny_model)
    assert worlds.run(recipe, manifest, out).rows == {"failed": 1, "ok": 3}
    before = worlds.tree(out)
    assert "k2" not in {told(row)["partner"] for row in worlds.rows(out) if row.status == "ok"}
    worlds.save_samples(tmp_path / "in", samples)
    assert worlds.run(recipe, manifest, out, only_failed=True).rows == {"ok": 4}
    [mended] = read_rows(out / "s-000~1.parquet")
    assert mended.key == "k2"
    assert told(mended)["partner"] in {"k0", "k1", "k3"}
    assert {name: data for name, data in worlds.tree(out).items() if name in before} == before
    assert [row.key for row in read_rows(out / "codes" / "s-000~1.parquet")] == ["k2"]


@pytest.mark.usefixtures("secret")
def test_under_anonymize_only_the_private_dir_knows_the_partners(tmp_path, tiny_model, manifest):
    out = tmp_path / "out"
    assert worlds.run(between(tiny_model, purpose="anonymize"), manifest, out).rows == {"ok": 10}
    assert not (out / "codes").exists()
    assert {row.detail for row in worlds.rows(out)} == {None}
    private = tmp_path / "out-private"
    assert len(list((private / "codes").glob("*.tar"))) == 2
    for stem in {path.stem for path in out.glob("*.parquet")}:
        links = read_links(str(private), stem).to_pylist()
        keys = {link["row_key"] for link in links}
        assert {link["detail"].split()[0].removeprefix("partner=") for link in links} == keys


@pytest.mark.usefixtures("secret")
@pytest.mark.parametrize("weight", [0.001, 0.999])
def test_under_anonymize_no_mixture_is_all_but_one_of_the_two(tmp_path, tiny_model, weight):
    samples = {f"k{i}": {"png": worlds.png(i), "cls": b"1"} for i in range(4)}
    manifest, out = worlds.save_samples(tmp_path / "in", samples), tmp_path / "out"
    recipe = between(tiny_model, f"interpolate={{weights: [{weight}]}}", "t.fraction=0.2", purpose="anonymize")
    assert worlds.run(recipe, manifest, out).rows == {"failed": 4}
    assert {row.reason for row in worlds.rows(out)} == {"mixture-is-source"}


@pytest.mark.usefixtures("secret")
def test_under_anonymize_equal_images_are_not_mixed_with_each_other(tmp_path, tiny_model):
    samples = {key: {"png": worlds.png(3), "cls": b"1"} for key in "ab"}
    manifest, out = worlds.save_samples(tmp_path / "in", samples), tmp_path / "out"
    assert worlds.run(between(tiny_model, purpose="anonymize"), manifest, out).rows == {"failed": 2}
    assert {row.reason for row in worlds.rows(out)} == {"mixture-is-source"}


def test_an_image_between_two_is_explained_by_both(tmp_path, tiny_model, manifest):
    out = tmp_path / "out"
    worlds.run(between(tiny_model), manifest, out)
    [told_of] = explain(str(out), key="img00003", private_dir=None)
    [row] = [row for row in worlds.rows(out) if row.key == "img00003"]
    assert told_of.words["mixed"] == row.detail
    assert "partner=" in row.detail
    assert "the image shows both" in told_of.words["distance"]
    assert "who is whose partner" in told_of.words["noise"]


def test_no_bound_is_spoken_of_nor_an_eta_asked_for_that_the_method_refuses(tiny_model):
    recipe = between(tiny_model, purpose="anonymize")
    [caution] = cautions(recipe)
    assert "links are counted to the own source alone" in caution
    assert not [note for note in account(recipe).notes if "eta" in note]
    assert not account(recipe).certified


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["sampler.eta=1.0"], "set sampler.eta"),
        (["sampler.order=2"], "order 1"),
        (["t={fraction: {uniform: [0.2, 0.4]}}"], "one t"),
        (["t.fraction=0.0"], "at t 0 there is none"),
        (["passes.count=2"], "without passes"),
        (["upscale.factor=2"], "without upscale"),
        (["images.tiles={overlap: 2}"], "without images.tiles"),
        (["target.label=1"], "interpolate makes none"),
        (["variants=3", "interpolate={weights: [0.2, 0.4]}"], "2 weights for 3 variants"),
        (["variants=2"], "all variants would be one image"),
        (["interpolate={weights: [1.0]}"], "less than 1"),
        (["interpolate={partner: before}"], "next"),
        (["interpolate={partner: {field: a}, same: label}"], "remove same"),
        (["interpolate=null"], "needs the block interpolate"),
        (["unseen={}"], "block for method unseen"),
        (["interpolate={same: label}", "model.class_labels=null"], "goes by model.class_labels"),
        (["method=edit-friendly"], "block for method interpolate"),
    ],
)
def test_what_can_not_be_mixed_is_refused(tiny_model, overrides, says):
    with pytest.raises(RecipeError, match=says):
        between(tiny_model, *overrides)
