"""Latent, text and transformer models end to end, on pipelines as diffusers saves them, with random weights."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler

from boomerang_batch.config.pipeline import Recipe, parse_recipe
from boomerang_batch.data import images
from boomerang_batch.data.manifest import load_manifest
from boomerang_batch.models import load_denoiser
from boomerang_batch.models.stable_diffusion import StableDiffusionDenoiser
from boomerang_batch.run.verify import verify
from tests import tiny_latents, tiny_models, tiny_transformers, worlds

pytestmark = pytest.mark.slow

SIDE = tiny_transformers.SIDE


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a pipeline, made when first asked for."""
    folder = tmp_path_factory.mktemp("pipelines")
    makers = {
        "sd": tiny_latents.stable_diffusion,
        "ldm": lambda: tiny_latents.ldm(tiny_latents.vq()),
        "dit": tiny_transformers.dit,
        "learned": lambda: DDPMPipeline(
            tiny_models.network(out_channels=6),
            DDPMScheduler(num_train_timesteps=20, variance_type="learned_range"),
        ),
    }

    def path(name: str) -> Path:
        if not (folder / name).exists():
            makers[name]().save_pretrained(folder / name)
        return folder / name

    return path


def recipe(model: Path, *overrides: str) -> Recipe:
    text = f"""
name: latent
purpose: augment
seed: 7
model: {{source: {model}}}
t: {{fraction: 0.6}}
steps: 3
images: {{resize: pad}}
batch_size: 3
"""
    return parse_recipe(text, source="test recipe", overrides=overrides)


def picture(seed: int, *, side: int = SIDE) -> np.ndarray:
    """Smooth colours, as an autoencoder likes them."""
    return images.resize(worlds.noise(seed, 4, 4, 3), (side, side), filter="bicubic")


def save_pictures(folder: Path, count: int = 5, shards: int = 1, **more: Callable[[int], bytes]) -> Path:
    made = [
        {"png": worlds.encoded(picture(n))} | {name: value(n) for name, value in more.items()}
        for n in range(count)
    ]
    return worlds.save_samples(
        folder, *({f"p{n}": fields for n, fields in enumerate(made) if n % shards == s} for s in range(shards))
    )


def drawn(out: Path, manifest: object, wanted: Recipe) -> dict[str, np.ndarray]:
    """The pixels of every output of a run that must be clean, by key."""
    report = worlds.run(wanted, manifest, out)
    assert (report.exit_code, set(report.rows)) == (0, {"ok"})
    assert verify(str(out), deep=True).problems == ()
    return {key: worlds.image_of(fields) for key, fields in worlds.outputs(out).items()}


def differ(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> set[str]:
    """Keys whose pictures are not the same."""
    assert a.keys() == b.keys()
    return {key for key in a if not np.array_equal(a[key], b[key])}


@pytest.mark.slow
def test_prompts_come_from_the_recipe_or_from_each_sample(tmp_path: Path, saved):
    model = saved("sd")
    captions = lambda n: b" a cat\n" if n < 3 else b"a dog"  # noqa: E731
    manifest = save_pictures(tmp_path / "in", 5, txt=captions)
    told = {
        "none": (),
        "cat": ("model.prompts={text: a cat}",),
        "dog": ("model.prompts={text: a dog}",),
        "own": ("model.prompts={field: TXT}",),
        "loud": ("model.prompts={text: a cat, guidance: 4.0, negative: a dog}",),
    }
    runs = {name: drawn(tmp_path / name, manifest, recipe(model, *words)) for name, words in told.items()}
    everyone, cats = {"p0", "p1", "p2", "p3", "p4"}, {"p0", "p1", "p2"}
    assert differ(runs["none"], runs["cat"]) == everyone
    assert differ(runs["cat"], runs["loud"]) == everyone
    assert differ(runs["own"], runs["cat"]) == everyone - cats
    assert differ(runs["own"], runs["dog"]) == cats


def test_a_sample_without_its_prompt_fails_alone(tmp_path: Path, saved):
    picture_file = worlds.encoded(picture(1))
    samples = {
        "told": {"png": picture_file, "txt": b"a cat"},
        "silent": {"png": picture_file},
        "latin": {"png": picture_file, "txt": b"caf\xe9"},
    }
    manifest = worlds.save_samples(tmp_path / "in", samples)
    wanted = recipe(saved("sd"), "model.prompts={field: txt}")
    assert worlds.run(wanted, manifest, tmp_path / "out").exit_code == 3
    reasons = {row.key: row.reason for row in worlds.rows(tmp_path / "out")}
    assert reasons == {"told": None, "silent": "missing-text", "latin": "bad-text"}


@pytest.mark.parametrize("name", ["ldm", "learned"])
def test_models_that_are_told_nothing(tmp_path: Path, saved, name: str):
    sampler = "sampler.variance=learned" if name == "learned" else "sampler.eta=0.0"
    pad = "images.resize=stretch"  # the pixel model has 8x8
    manifest = save_pictures(tmp_path / "in", 4)
    images = drawn(tmp_path / "out", manifest, recipe(saved(name), sampler, pad))
    assert {image.shape for image in images.values()} == {(SIDE, SIDE, 3)}
    assert {row.label for row in worlds.rows(tmp_path / "out")} == {None}
    if name == "learned":
        fixed = drawn(tmp_path / "fixed", manifest, recipe(saved(name), pad))
        assert differ(images, fixed) == set(images)


@pytest.mark.slow
def test_labels_steer_a_transformer_and_others_fail(tmp_path: Path, saved):
    labels = [b"3", b"4", b"999", b"1000", b"1001"]
    manifest = save_pictures(tmp_path / "in", 5, cls=lambda n: labels[n])
    told = "model.class_labels={field: CLS, null_label: 1000, guidance: 2.0}"
    worlds.run(recipe(saved("dit"), told, "t.fraction=0.9"), manifest, tmp_path / "out")
    rows = {row.key: row for row in worlds.rows(tmp_path / "out")}
    assert [rows[f"p{n}"].label for n in range(5)] == [3, 4, 999, None, None]
    assert [rows[f"p{n}"].reason for n in range(5)] == [None] * 3 + ["label-out-of-range"] * 2
    swapped = save_pictures(tmp_path / "swapped", 5, cls=lambda n: b"4")
    worlds.run(recipe(saved("dit"), told, "t.fraction=0.9"), swapped, tmp_path / "again")
    first, again = worlds.outputs(tmp_path / "out"), worlds.outputs(tmp_path / "again")
    assert first["p1"] == again["p1"]
    assert first["p0"]["png"] != again["p0"]["png"]


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 3])
def test_the_autoencoder_s_batches_leave_no_trace_of_the_order(tmp_path: Path, saved, size: int):
    manifest = load_manifest(str(save_pictures(tmp_path / "in", 10, shards=2)))
    backwards = dataclasses.replace(manifest, shards=manifest.shards[::-1])
    mixed = ("t.fraction={uniform: [0.1, 0.9]}", "passes={count: 2, outputs: all}")
    wanted = recipe(saved("sd"), *mixed, f"model.autoencoder.batch_size={size}")
    drawn(tmp_path / "out", manifest, wanted)
    drawn(tmp_path / "backwards", backwards, wanted)
    assert worlds.tree(tmp_path / "out") == worlds.tree(tmp_path / "backwards")
    assert {row.batch_size for row in worlds.rows(tmp_path / "out")} == {3}


@pytest.mark.slow
def test_buckets_of_a_latent_model_share_the_device_without_a_trace(tmp_path: Path, saved):
    """Slots of two shapes take turns, whatever the order of the shards."""
    sides = (16, 24)
    samples = [
        {f"p{s}{n}": {"png": worlds.encoded(picture(9 * s + n, side=sides[(n + s) % 2]))} for n in range(5)}
        for s in range(2)
    ]
    manifest = load_manifest(str(worlds.save_samples(tmp_path / "in", *samples)))
    backwards = dataclasses.replace(manifest, shards=manifest.shards[::-1])
    wanted = recipe(saved("sd"), "images.sizes=[[16, 16], [24, 24]]", "model.autoencoder.batch_size=2")
    shapes = {image.shape for image in drawn(tmp_path / "out", manifest, wanted).values()}
    assert shapes == {(side, side, 3) for side in sides}
    drawn(tmp_path / "backwards", backwards, wanted)
    assert worlds.tree(tmp_path / "out") == worlds.tree(tmp_path / "backwards")


@pytest.mark.parametrize("name", ["sd", "ldm"])
def test_at_t_0_only_the_autoencoder_is_seen(tmp_path: Path, saved, name: str):
    manifest = save_pictures(tmp_path / "in", 2)
    model = recipe(saved(name), "t.fraction=0.0")
    there_and_back = drawn(tmp_path / "out", manifest, model)
    denoiser = load_denoiser(model.model, device="cpu", threads=1)
    for n in range(2):
        image = torch.from_numpy(images.to_model_values(picture(n), (-1.0, 1.0)))[None]
        expected = images.to_pixels(denoiser.decode(denoiser.encode(image))[0].numpy(), (-1.0, 1.0))
        assert np.array_equal(there_and_back[f"p{n}"], expected)
        assert not np.array_equal(expected, picture(n))
    for row in worlds.rows(tmp_path / "out"):
        assert (row.evaluations, row.node, row.batch_size) == (0, 0, None)


@pytest.mark.slow
def test_the_latents_outside_a_region_know_nothing_of_its_inside(
    tmp_path: Path, saved, monkeypatch: pytest.MonkeyPatch
):
    """An autoencoder sees far; what the outside is noised from must be the picture with the region blank."""
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[4:8, 6:12] = 255
    source = picture(1)
    other = np.where(mask[..., None] > 0, 255 - source, source)
    seen: list[torch.Tensor] = []
    denoise = StableDiffusionDenoiser.denoise

    def watched(self, x_t, tau, conditions):
        seen.append(x_t.clone())
        return denoise(self, x_t, tau, conditions)

    monkeypatch.setattr(StableDiffusionDenoiser, "denoise", watched)
    wanted = recipe(saved("sd"), "region={field: mask.png, feather: 1}")
    results = []
    for name, pixels in (("first", source), ("second", other)):
        fields = {"png": worlds.encoded(pixels), "mask.png": worlds.encoded(mask)}
        manifest = worlds.save_samples(tmp_path / name, {"p0": fields})
        results.append(drawn(tmp_path / f"{name}-out", manifest, wanted)["p0"])
    calls = len(seen) // 2
    states = torch.cat(seen[:calls]), torch.cat(seen[calls:])
    outside = torch.ones(8, 8, dtype=torch.bool)
    outside[1:5, 2:7] = False  # the feathered region's cells, of 2x2 pixels each
    assert torch.equal(states[0][..., outside], states[1][..., outside])
    assert not torch.equal(states[0][..., ~outside], states[1][..., ~outside])
    beyond = np.ones((SIDE, SIDE), bool)
    beyond[3:9, 5:13] = False
    assert np.array_equal(results[0][beyond], source[beyond])
    assert np.array_equal(results[1][beyond], source[beyond])
    assert not np.array_equal(results[0][mask > 0], results[1][mask > 0])


def test_upscaling_with_a_latent_model_is_warned_of(tmp_path: Path, saved, caplog: pytest.LogCaptureFixture):
    manifest = worlds.save_samples(tmp_path / "in", {"p": {"png": worlds.encoded(picture(1, side=8))}})
    with caplog.at_level(logging.WARNING, logger="boomerang_batch"):
        image = drawn(tmp_path / "out", manifest, recipe(saved("sd"), "upscale={factor: 2}"))["p"]
    assert image.shape == (16, 16, 3)
    assert [record.message for record in caplog.records if "upscale" in record.message] == [
        "upscale with a latent model: the Boomerang paper (arXiv 2210.12100) saw super-resolution fail "
        "with one, for its autoencoder keeps no fine detail; take a pixel model"
    ]


def test_tiles_of_a_latent_model(tmp_path: Path, saved):
    """One tile is the image undivided; several give the size back and owe nothing to the order of work."""
    model = saved("sd")
    tiles = "images.tiles={overlap: 8}"
    small = save_pictures(tmp_path / "small", 3)
    whole, tiled = (
        drawn(tmp_path / name, small, recipe(model, *more)) for name, more in (("whole", ()), ("one", (tiles,)))
    )
    assert differ(whole, tiled) == set()
    sizes = {"wide": (SIDE, 2 * SIDE + 5), "tall": (3 * SIDE, SIDE), "both": (SIDE + 7, SIDE + 1)}
    pictures = {
        name: images.resize(worlds.noise(n, 4, 4, 3), (height, width), filter="bicubic")
        for n, (name, (height, width)) in enumerate(sizes.items())
    }
    encoded = {name: {"png": worlds.encoded(one)} for name, one in pictures.items()}
    there = worlds.save_samples(tmp_path / "there", encoded)
    back = worlds.save_samples(tmp_path / "back", dict(reversed(encoded.items())))
    first = drawn(tmp_path / "first", there, recipe(model, tiles))
    assert {name: one.shape[:2] for name, one in first.items()} == sizes
    again = drawn(tmp_path / "again", back, recipe(model, tiles, "identity=content"))
    once = drawn(tmp_path / "once", there, recipe(model, tiles, "identity=content"))
    assert differ(once, again) == set()
    assert differ(first, {name: pictures[name] for name in first}) == set(sizes)


def test_a_compiled_network_is_compiled_for_one_shape(tmp_path: Path, saved, monkeypatch):
    """From the trial to the last sample; the backend that generates code takes minutes and is torch's own."""
    shapes = set()
    compile_ = torch.compile

    def backend(graph, inputs):
        def call(*values):
            shapes.update(tuple(one.shape) for one in values if one.shape[1:] == (4, SIDE // 2, SIDE // 2))
            return graph(*values)

        return call

    monkeypatch.setattr(
        torch, "compile", lambda module, **options: compile_(module, backend=backend, **options)
    )
    manifest = save_pictures(tmp_path / "in", 4)
    plain = drawn(tmp_path / "plain", manifest, recipe(saved("sd")))
    compiled = drawn(tmp_path / "compiled", manifest, recipe(saved("sd"), "model.compile=true"))
    assert {shape[0] for shape in shapes} == {3}
    for name, image in compiled.items():
        assert np.abs(image.astype(int) - plain[name]).max() <= 1
