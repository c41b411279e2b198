"""What becomes of outputs that the model's own safety checker flags: never a black one, never a silent loss."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from boomerang_batch.config.pipeline import Recipe, parse_recipe
from boomerang_batch.data import images
from boomerang_batch.errors import ModelError
from boomerang_batch.models import load_denoiser
from boomerang_batch.models.safety import SafetyChecker
from boomerang_batch.run.verify import verify
from tests import stand_ins, tiny_latents, worlds
from tests.stand_ins import Pixelwise

SIDE = 16
THRESHOLD = 0.015


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stable Diffusion with a checker."""
    folder = tmp_path_factory.mktemp("sd") / "model"
    tiny_latents.stable_diffusion(safety=tiny_latents.safety_checker(THRESHOLD)).save_pretrained(folder)
    return folder


def recipe(model: Path, safety: str, *overrides: str) -> Recipe:
    text = f"""
name: checked
purpose: augment
seed: 7
model: {{source: {model}, safety: {safety}}}
t: {{fraction: 0.6}}
steps: 3
variants: 2
images: {{resize: pad}}
batch_size: 4
"""
    return parse_recipe(text, source="test recipe", overrides=overrides)


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    samples = {
        f"p{n}": {
            "png": worlds.encoded(images.resize(worlds.noise(n, 4, 4, 3), (SIDE, SIDE), filter="bicubic"))
        }
        for n in range(6)
    }
    return worlds.save_samples(tmp_path / "in", samples)


def bright_on_the_left(pixels: np.ndarray) -> bool:
    return bool(pixels[:, :8].sum(dtype=int) > pixels[:, 8:].sum(dtype=int))


@pytest.fixture
def verdicts(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """The checker objects to images that are brighter on the left than on the right; what it said of each."""
    said: list[bool] = []

    def flagged(self: SafetyChecker, shown: torch.Tensor) -> list[bool]:
        said.extend(bright_on_the_left(images.to_pixels(image.numpy(), (-1.0, 1.0))) for image in shown)
        return said[-len(shown) :]

    monkeypatch.setattr(SafetyChecker, "flagged", flagged)
    return said


@pytest.mark.slow
def test_what_is_flagged_is_kept_dropped_or_quarantined_as_the_recipe_says(
    tmp_path: Path, model: Path, manifest: Path, verdicts: list[bool]
):
    reports = {
        safety: worlds.run(recipe(model, safety), manifest, tmp_path / safety)
        for safety in ("unchecked", "keep", "drop", "quarantine")
    }
    assert len(verdicts) == 36  # twelve images each but for unchecked
    made = {safety: worlds.outputs(tmp_path / safety) for safety in reports}
    flags = {key for key, fields in made["unchecked"].items() if bright_on_the_left(worlds.image_of(fields))}
    count = len(flags)
    assert 0 < count < 12

    assert {row.flagged for row in worlds.rows(tmp_path / "unchecked")} == {None}
    assert made["unchecked"].keys() == made["keep"].keys()
    for key, fields in made["keep"].items():
        assert fields == made["unchecked"][key] | {"flagged.cls": b"1" if key in flags else b"0"}
        assert worlds.image_of(fields).std() > 1
    for row in worlds.rows(tmp_path / "keep"):
        assert row.flagged == (f"{row.key}-v{row.variant}" in flags)

    for safety, status in (("drop", "dropped"), ("quarantine", "failed")):
        assert reports[safety].rows == {status: count, "ok": 12 - count}
        sound = {key: fields for key, fields in made["keep"].items() if key not in flags}
        assert made[safety] == sound
        bad = [row for row in worlds.rows(tmp_path / safety) if row.status != "ok"]
        assert {f"{row.key}-v{row.variant}" for row in bad} == flags
        assert {(row.status, row.reason) for row in bad} == {(status, "flagged")}
    assert {safety: report.exit_code for safety, report in reports.items()} == {
        "unchecked": 0,
        "keep": 0,
        "drop": 0,
        "quarantine": 3,
    }
    for safety in reports:
        assert verify(str(tmp_path / safety), deep=True).problems == ()


@pytest.mark.slow
def test_the_real_checker_is_asked(tmp_path: Path, model: Path, manifest: Path):
    wanted = recipe(model, "keep")
    assert worlds.run(wanted, manifest, tmp_path / "out").rows == {"ok": 12}
    checker = load_denoiser(wanted.model, device="cpu", threads=1)
    outputs = worlds.outputs(tmp_path / "out").values()
    shown = [images.to_model_values(worlds.image_of(fields), (-1.0, 1.0)) for fields in outputs]
    expected = checker.flagged(torch.from_numpy(np.stack(shown)))
    assert [row.flagged for row in worlds.rows(tmp_path / "out")] == expected
    assert 0 < sum(expected) < 12


def test_a_tiled_image_is_flagged_by_any_of_its_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Wary(Pixelwise):
        def flagged(self, shown):
            assert len(shown) == 1
            return [bool((image > 0.99).all(dim=0).any()) for image in shown]

    stand_ins.install(monkeypatch, Wary(safety=True))
    samples = {}
    for key, bright in (("plain", False), ("spotted", True)):
        picture = np.full((20, 20), 100, np.uint8)
        picture[::3] = 90
        picture[18:, 18:] = 255 if bright else 100
        samples[key] = {"png": worlds.encoded(picture)}
    manifest = worlds.save_samples(tmp_path / "in", samples)
    checked = ("model.safety=keep", "images.tiles={overlap: 2}", "t.timestep=1")
    assert worlds.run(stand_ins.recipe(*checked), manifest, tmp_path / "out").exit_code == 0
    assert {row.key: row.flagged for row in worlds.rows(tmp_path / "out")} == {"plain": False, "spotted": True}


def test_an_older_verdict_is_not_replaced_in_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    stand_ins.install(monkeypatch, Pixelwise(safety=True))
    samples = {"old": {"png": worlds.png(1), "flagged.cls": b"1"}, "new": {"png": worlds.png(2)}}
    manifest = worlds.save_samples(tmp_path / "in", samples)
    worlds.run(stand_ins.recipe("model.safety=keep"), manifest, tmp_path / "out")
    assert {row.key: row.reason for row in worlds.rows(tmp_path / "out")} == {
        "old": "field-collision",
        "new": None,
    }
    dropped = stand_ins.recipe("model.safety=keep", "fields.fields={flagged.cls: drop}")
    assert worlds.run(dropped, manifest, tmp_path / "dropped").exit_code == 0
    assert {fields["flagged.cls"] for fields in worlds.outputs(tmp_path / "dropped").values()} == {b"0"}


def test_a_model_without_a_checker_can_t_be_asked(tmp_path: Path, tiny_model: Path):
    manifest = worlds.save_shards(tmp_path / "few", shards=1, samples=1)
    with pytest.raises(ModelError, match="safety"):
        worlds.run(worlds.recipe(tiny_model, "model.safety=drop"), manifest, tmp_path / "out")
    assert worlds.tree(tmp_path / "out") == {}
