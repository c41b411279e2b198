"""Images of other sizes than the model's, through the runner: buckets, tiles, and super-resolution."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from boomerang_batch.data import upscale
from boomerang_batch.errors import ConfigError
from boomerang_batch.run.verify import verify
from tests import stand_ins, worlds
from tests.stand_ins import Pixelwise


def save_pictures(folder: Path, *sizes: tuple[int, ...], **more: bytes) -> tuple[Path, dict[str, np.ndarray]]:
    """One shard of pictures of these (height, width[, channels]), and their pixels by key."""
    pictures = {"x".join(map(str, size)): worlds.noise(n, *size) for n, size in enumerate(sizes)}
    samples = {key: {"png": worlds.encoded(pixels), **more} for key, pixels in pictures.items()}
    return worlds.save_samples(folder, samples), pictures


def drawn(tmp_path: Path, name: str, manifest: Path, *overrides: str) -> dict[str, np.ndarray]:
    """The pixels of every output of a run that must be clean, by key."""
    report = worlds.run(stand_ins.recipe(*overrides), manifest, tmp_path / name)
    assert (report.exit_code, set(report.rows)) == (0, {"ok"})
    assert verify(str(tmp_path / name), deep=True).problems == ()
    images = {key: worlds.image_of(fields) for key, fields in worlds.outputs(tmp_path / name).items()}
    rows = worlds.rows(tmp_path / name)
    assert sorted((row.height, row.width) for row in rows) == sorted(one.shape[:2] for one in images.values())
    return images


def test_each_image_goes_to_its_bucket_and_comes_back_at_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    stand_ins.install(monkeypatch, Pixelwise(size_multiple=4))
    sizes = [(8, 8), (9, 9), (8, 17), (30, 14), (3, 4), (16, 9), (40, 40)]
    manifest, pictures = save_pictures(tmp_path / "in", *sizes)
    buckets = ("images.sizes=[[8, 8], [16, 8], [8, 16], [24, 24]]", "images.resize=stretch")
    images = drawn(tmp_path, "out", manifest, *buckets)
    assert {key: image.shape for key, image in images.items()} == {
        key: picture.shape for key, picture in pictures.items()
    }
    assert all((images[key] != pictures[key]).any() for key in images)
    # What the model saw shows where its size is not undone.
    seen = drawn(tmp_path, "seen", manifest, *buckets, "images.restore_size=false")
    assert {key: image.shape for key, image in seen.items()} == {
        "8x8": (8, 8),
        "9x9": (8, 8),
        "8x17": (8, 16),
        "30x14": (16, 8),
        "3x4": (8, 8),
        "16x9": (16, 8),
        "40x40": (24, 24),
    }


@pytest.mark.parametrize(
    ("multiple", "sizes", "told"),
    [
        (4, "[[8, 8], [10, 8]]", "10x8: this model draws at widths and heights that are multiples of 4"),
        (None, "[[16, 16]]", "16x16 is not the one size of this model"),
    ],
)
def test_a_bucket_the_model_can_t_draw_at_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, multiple: int | None, sizes: str, told: str
):
    stand_ins.install(monkeypatch, Pixelwise(size_multiple=multiple))
    manifest, _ = save_pictures(tmp_path / "in", (8, 8))
    with pytest.raises(ConfigError, match=told):
        worlds.run(stand_ins.recipe(f"images.sizes={sizes}"), manifest, tmp_path / "out")
    assert worlds.tree(tmp_path / "out") == {}


TILES = "images.tiles={overlap: 3}"


def test_an_identity_through_tiles_is_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    stand_ins.install(monkeypatch, Pixelwise(channels=3, size_multiple=None))
    manifest, pictures = save_pictures(
        tmp_path / "in", (21, 30, 3), (5, 6, 3), (8, 8, 3), (64, 9, 3), (1, 1, 3)
    )
    images = drawn(tmp_path, "out", manifest, TILES, "t.fraction=0.0")
    assert images.keys() == pictures.keys()
    for key, picture in pictures.items():
        assert np.array_equal(images[key], picture)


@pytest.mark.slow
def test_tiles_are_the_whole_image_drawn_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """They share one noise field: a model that looks at one pixel at a time gives what it gives untiled."""
    model = Pixelwise(channels=3)
    stand_ins.install(monkeypatch, model)
    sizes = [(21, 30, 3), (13, 8, 3), (8, 8, 3)]
    manifest, pictures = save_pictures(tmp_path / "in", *sizes)
    more = ("passes={count: 2, outputs: all}", "variants=2")
    tiled = drawn(tmp_path, "tiled", manifest, TILES, *more)
    assert len(tiled) == 12
    whole = drawn(tmp_path, "whole", manifest, "images.sizes=[[30, 21], [8, 13], [8, 8]]", *more)
    for key, image in tiled.items():
        assert np.array_equal(image, whole[key])
        assert (image != pictures[key.partition("-")[0]]).any()


def test_an_image_smaller_than_a_tile_is_drawn_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    stand_ins.install(monkeypatch, Pixelwise(size_multiple=None))
    manifest, pictures = save_pictures(tmp_path / "in", (3, 5), (1, 30), (2, 2))
    for key, image in drawn(tmp_path, "out", manifest, TILES).items():
        assert image.shape == pictures[key].shape
        assert (image != pictures[key]).any()


@pytest.mark.slow
@pytest.mark.usefixtures("secret")
def test_tiles_of_a_real_network_come_back_as_one_image(tmp_path: Path, tiny_model: Path):
    manifest, _ = save_pictures(tmp_path / "in", (21, 30), (9, 17), cls=b"2")
    assert worlds.run(worlds.recipe(tiny_model, TILES), manifest, tmp_path / "out").rows == {"ok": 2}
    shapes = [worlds.image_of(fields).shape for fields in worlds.outputs(tmp_path / "out").values()]
    assert sorted(shapes) == [(9, 17), (21, 30)]
    assert verify(str(tmp_path / "out"), deep=True).problems == ()


def test_an_overlap_as_wide_as_a_tile_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    stand_ins.install(monkeypatch, Pixelwise())
    manifest, _ = save_pictures(tmp_path / "in", (8, 8))
    with pytest.raises(ConfigError, match="can't overlap by 8 pixels"):
        worlds.run(stand_ins.recipe("images.tiles={overlap: 8}"), manifest, tmp_path / "out")


def test_upscaled_outputs_are_factor_times_the_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Beyond the model's size, in tiles, each pass of a cascade an output of its own."""
    stand_ins.install(monkeypatch, Pixelwise(channels=3, size_multiple=None))
    manifest, pictures = save_pictures(tmp_path / "in", (7, 9, 3), (4, 4, 3), (3, 2, 3))
    enlarging = (TILES, "upscale={factor: 3}", "t.fraction=0.3", "passes={count: 2, outputs: all}")
    images = drawn(tmp_path, "out", manifest, *enlarging)
    assert len(images) == 6
    for key, image in images.items():
        low = pictures[key.partition("-")[0]]
        assert image.shape == (low.shape[0] * 3, low.shape[1] * 3, 3)
    plain = drawn(tmp_path, "plain", manifest, TILES, "upscale={factor: 3, filter: lanczos}", "t.fraction=0.0")
    for key, image in plain.items():
        assert np.array_equal(image, upscale.enlarge(pictures[key], 3, "lanczos"))


def test_consistent_outputs_shrink_to_exactly_their_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    stand_ins.install(monkeypatch, Pixelwise(channels=3, size_multiple=None))
    manifest, pictures = save_pictures(tmp_path / "in", (7, 9, 3), (4, 4, 3))
    enlarging = (TILES, "t.fraction=0.5", "passes={count: 2, outputs: all}")
    images = drawn(tmp_path, "out", manifest, *enlarging, "upscale={factor: 2, consistent: true}")
    loose = drawn(tmp_path, "loose", manifest, *enlarging, "upscale={factor: 2}")
    assert len(images) == 4
    for key, image in images.items():
        low = pictures[key.partition("-")[0]]
        assert np.array_equal(upscale.reduced(image, 2), low)
        assert not np.array_equal(upscale.reduced(loose[key], 2), low)


@pytest.mark.parametrize("policy", ["images.resize=cover", "images.restore_size=false"])
def test_consistency_needs_the_whole_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str):
    stand_ins.install(monkeypatch, Pixelwise())
    manifest, _ = save_pictures(tmp_path / "in", (4, 4))
    recipe = stand_ins.recipe(policy, "upscale={factor: 2, consistent: true}")
    with pytest.raises(ConfigError, match="consistent compares each output"):
        worlds.run(recipe, manifest, tmp_path / "out")
    assert worlds.tree(tmp_path / "out") == {}


def test_transparency_is_enlarged_with_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    stand_ins.install(monkeypatch, Pixelwise(channels=3))
    manifest, pictures = save_pictures(tmp_path / "in", (4, 4, 4))
    keep = ("images.alpha=keep", "upscale={factor: 2, consistent: true}")
    image = drawn(tmp_path, "out", manifest, *keep)["4x4x4"]
    alpha = pictures["4x4x4"][..., 3:]
    assert image.shape == (8, 8, 4)
    assert np.array_equal(image[..., 3:], upscale.enlarge(alpha, 2, "bicubic"))
    assert np.array_equal(upscale.reduced(image[..., :3], 2), pictures["4x4x4"][..., :3])


def test_what_would_be_too_large_fails_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    stand_ins.install(monkeypatch, Pixelwise())
    manifest, _ = save_pictures(tmp_path / "in", (4, 4), (20, 20))
    recipe = stand_ins.recipe("upscale={factor: 2}", "images.max_pixels=500")
    assert worlds.run(recipe, manifest, tmp_path / "out").rows == {"failed": 1, "ok": 1}
    assert [row.reason for row in worlds.rows(tmp_path / "out")] == [None, "too-many-pixels"]
