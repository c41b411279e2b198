"""Runs that change a region of each image: nothing else of it moves by a bit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from boomerang_batch.data.regions import dilate
from boomerang_batch.run.verify import verify
from tests import stand_ins, worlds
from tests.stand_ins import Pixelwise

MASK = "region={field: mask.png}"
BOXES = "region={field: json, json_key: faces}"


@pytest.fixture(autouse=True)
def _pixelwise(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_ins.install(monkeypatch, Pixelwise(size_multiple=None))


def blob(*size: int) -> np.ndarray:
    """A region of two parts, one at the edge."""
    mask = np.zeros(size, bool)
    mask[1:4, 2:6] = True
    mask[-2:, -1:] = True
    return mask


def save_masked(folder: Path, *masks: np.ndarray, **more: bytes) -> tuple[Path, dict[str, np.ndarray]]:
    """A shard of pictures with these masks, and the pictures' pixels by key."""
    pictures = {f"p{n}": worlds.noise(n, *mask.shape) for n, mask in enumerate(masks)}
    samples = {
        key: {"png": worlds.encoded(picture), "mask.png": worlds.encoded(mask.astype(np.uint8) * 255), **more}
        for (key, picture), mask in zip(pictures.items(), masks, strict=True)
    }
    return worlds.save_samples(folder, samples), pictures


def clean_run(out: Path, manifest: Path, *overrides: str) -> dict[str, np.ndarray]:
    """The pixels of every output of a run that must be clean, by key."""
    report = worlds.run(stand_ins.recipe(*overrides), manifest, out)
    assert (report.exit_code, set(report.rows)) == (0, {"ok"})
    assert verify(str(out), deep=True).problems == ()
    return {key: worlds.image_of(fields) for key, fields in worlds.outputs(out).items()}


@pytest.mark.parametrize("feather", [0, 2])
@pytest.mark.parametrize(
    ("policy", "sizes"),
    [
        (("images.resize=pad",), [(8, 8), (6, 7)]),
        (("images.resize=contain",), [(8, 8), (20, 13)]),
        (("images.resize=stretch",), [(8, 8), (9, 30)]),
        (("images.tiles={overlap: 2}",), [(8, 8), (21, 30), (6, 7)]),
    ],
    ids=["pad", "contain", "stretch", "tiles"],
)
def test_outside_the_region_not_one_bit_moves(
    tmp_path: Path, policy: tuple[str, ...], sizes: list[tuple[int, int]], feather: int
):
    masks = [blob(*size) for size in sizes]
    manifest, pictures = save_masked(tmp_path / "in", *masks)
    region = f"region={{field: mask.png, feather: {feather}}}"
    images = clean_run(tmp_path / "out", manifest, region, *policy, "variants=2")
    for key, image in images.items():
        name, _, variant = key.partition("-v")
        picture, mask = pictures[name], masks[int(name[1:])]
        beyond = ~dilate(mask, feather)
        assert np.array_equal(image[beyond], picture[beyond])
        assert (image[mask] != picture[mask]).mean() > 0.7
        if feather:
            assert (image[~beyond & ~mask] != picture[~beyond & ~mask]).any()
        other = images[f"{name}-v{1 - int(variant)}"]
        assert (image[mask] != other[mask]).any()


def test_boxes_say_the_same_as_a_mask_of_them(tmp_path: Path):
    mask = np.zeros((8, 8), bool)
    mask[1:4, 2:6] = True
    boxes = json.dumps({"faces": [[2, 1, 6, 4]], "id": 7}).encode()
    manifest, pictures = save_masked(tmp_path / "in", mask, json=boxes)
    by_boxes = clean_run(tmp_path / "boxes", manifest, BOXES)["p0"]
    by_mask = clean_run(tmp_path / "mask", manifest, MASK)["p0"]
    assert np.array_equal(by_boxes, by_mask)
    assert not np.array_equal(by_boxes, pictures["p0"])
    # Both came along, for the picture's places are where they were.
    assert worlds.outputs(tmp_path / "boxes")["p0"].keys() == {"png", "json", "mask.png"}


@pytest.mark.parametrize("policy", ["images.resize=pad", "images.tiles={overlap: 2}"])
def test_an_empty_region_gives_the_source_back(tmp_path: Path, policy: str):
    manifest, pictures = save_masked(tmp_path / "in", blob(8, 8), np.zeros((8, 8), bool))
    cascade = "passes={count: 2, outputs: all}"
    images = clean_run(tmp_path / "out", manifest, MASK, policy, cascade, "variants=2", "identity=content")
    assert len(images) == 8
    for number in range(4):
        assert np.array_equal(images[f"p1-v{number}"], pictures["p1"])
        assert not np.array_equal(images[f"p0-v{number}"], pictures["p0"])
    for row in worlds.rows(tmp_path / "out"):
        facts = (row.t, row.node, row.tau, row.sigma, row.batch_size, row.dtype)
        assert (row.evaluations == 0) == (row.key == "p1")
        assert (facts == (None,) * 6) == (row.key == "p1")
        assert row.passes == row.variant % 2 + 1


def test_a_region_can_be_the_whole_picture(tmp_path: Path):
    manifest, _ = save_masked(tmp_path / "in", np.ones((8, 8), bool))
    limited = clean_run(tmp_path / "out", manifest, MASK)["p0"]
    worlds.run(stand_ins.recipe(), manifest, tmp_path / "plain")
    assert np.array_equal(limited, worlds.image_of(worlds.outputs(tmp_path / "plain")["p0"]))


def test_regions_that_can_t_be_meant_fail_alone_and_say_why(tmp_path: Path):
    picture = {"png": worlds.png(3)}
    samples = {
        "absent": picture,
        "keyless": picture | {"json": b'{"other": 1}'},
        "text": picture | {"json": b"no json"},
        "inverted": picture | {"json": b'{"faces": [[5, 5, 2, 7]]}'},
        "fractions": picture | {"json": b'{"faces": [[0.1, 0.1, 0.9, 0.9]]}'},
        "outside": picture | {"json": b'{"faces": [[10, 10, 12, 12]]}'},
        "none": picture | {"json": b'{"faces": []}'},
        "good": picture | {"json": b'{"faces": [[1, 1, 4, 4]]}'},
    }
    manifest = worlds.save_samples(tmp_path / "in", samples)
    report = worlds.run(stand_ins.recipe(BOXES), manifest, tmp_path / "out")
    assert (report.exit_code, report.rows) == (3, {"failed": 6, "ok": 2})
    rows = {row.key: row for row in worlds.rows(tmp_path / "out")}
    assert {key: row.reason for key, row in rows.items()} == {
        "absent": "missing-region",
        "keyless": "missing-region",
        "text": "bad-region",
        "inverted": "bad-region",
        "fractions": "bad-region",
        "outside": "bad-region",
        "none": None,
        "good": None,
    }
    assert "faces" in rows["keyless"].detail
    assert verify(str(tmp_path / "out"), deep=True).problems == ()


def test_masks_that_can_t_be_meant_fail_alone_and_say_why(tmp_path: Path):
    picture = {"png": worlds.png(3)}
    samples = {
        "small": picture | {"mask.png": worlds.encoded(np.full((4, 4), 255, np.uint8))},
        "dark": picture | {"mask.png": worlds.encoded(np.full((8, 8), 1, np.uint8))},
        "torn": picture | {"mask.png": b"\x89PNG\r\n"},
        "good": picture | {"mask.png": worlds.encoded(np.full((8, 8), 255, np.uint8))},
    }
    manifest = worlds.save_samples(tmp_path / "in", samples)
    assert worlds.run(stand_ins.recipe(MASK), manifest, tmp_path / "out").exit_code == 3
    reasons = {row.key: row.reason for row in worlds.rows(tmp_path / "out")}
    assert reasons == {"small": "bad-region", "dark": "bad-region", "torn": "bad-region", "good": None}


@pytest.mark.usefixtures("secret")
@pytest.mark.parametrize("region", [MASK, BOXES])
def test_anonymized_the_region_s_field_stays_behind(tmp_path: Path, region: str):
    boxes = json.dumps({"faces": [[2, 1, 6, 4]], "name": "Ada"}).encode()
    mask = np.zeros((8, 8), bool)
    mask[1:4, 2:6] = True
    manifest, pictures = save_masked(tmp_path / "in", mask, np.zeros((8, 8), bool), json=boxes)
    private = ("purpose=anonymize", "seed=null", "variants=2")
    worlds.run(stand_ins.recipe(region, *private), manifest, tmp_path / "out")
    assert verify(str(tmp_path / "out"), deep=True).problems == ()
    outputs = worlds.outputs(tmp_path / "out")
    assert [fields.keys() for fields in outputs.values()] == [{"png"}] * 4
    assert list(outputs) == sorted(row.key for row in worlds.rows(tmp_path / "out"))
    assert not any(name in outputs for name in ("p0", "p1"))
    kept = [key for key, fields in outputs.items() if (worlds.image_of(fields) == pictures["p1"]).all()]
    assert len(kept) == (2 if region == MASK else 0)
    published = b"".join(worlds.tree(tmp_path / "out").values())
    assert b"Ada" not in published
    assert b"p0" not in published
