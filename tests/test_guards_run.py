"""Each guard tripped once, through the runner, by a fault put into the model on purpose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from boomerang_batch.diffusion.denoiser import Condition
from boomerang_batch.errors import ModelError
from boomerang_batch.models.pixel import PixelDenoiser
from boomerang_batch.run.verify import verify
from tests import stand_ins, worlds
from tests.stand_ins import Pixelwise

LABELLED = "model.class_labels={field: cls}"
Fault = Callable[[Tensor], Tensor]
NAN: Fault = lambda row: torch.full_like(row, torch.nan)  # noqa: E731
FLAT: Fault = lambda row: torch.full_like(row, 0.25)  # noqa: E731


class Faulty(Pixelwise):
    """Predicts x_0, but under some labels what `faults` makes of it."""

    def __init__(self, faults: dict[int, Fault], twin: dict[int, Fault] | None = None) -> None:
        super().__init__(prediction="sample", conditioning="label", classes=4)
        self._faults = faults
        self._twin = twin

    def denoise(self, x_t: Tensor, tau: Tensor, conditions: Sequence[Condition]) -> Tensor:
        rows = zip(super().denoise(x_t, tau, conditions), conditions, strict=True)
        return torch.stack([self._faults.get(label, lambda row: row)(row) for row, label in rows])

    def in_float32(self) -> Pixelwise:
        return self if self._twin is None else Faulty(self._twin)


def labelled(folder: Path, *labels: int) -> Path:
    """One shard of a sample n0, n1, ... for each label."""
    fields = [{"png": worlds.png(n), "cls": b"%d" % label} for n, label in enumerate(labels)]
    return worlds.save_samples(folder, {f"n{n}": one for n, one in enumerate(fields)})


def reasons(out: Path) -> dict[str, str | None]:
    """Why a sample has no output, by key; None where it has one."""
    assert verify(str(out), deep=True).problems == ()
    rows = worlds.rows(out)
    assert [row.key for row in rows if row.status == "ok"] == list(worlds.outputs(out))
    return {row.key: row.reason for row in rows}


@pytest.mark.slow
def test_what_half_precision_can_not_do_is_done_in_float32(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
):
    real = PixelDenoiser.denoise

    def overflowing(self, x_t, tau, conditions):
        output = real(self, x_t, tau, conditions)
        if self.placement.is_half:
            output[[label == 2 for label in conditions]] = torch.nan
        return output

    manifest = worlds.save_shards(tmp_path / "in", shards=1, samples=4)
    several = ("variants=2", "passes={count: 2, outputs: all}")
    exact = worlds.recipe(tiny_model, *several, purpose="augment")
    worlds.run(exact, manifest, tmp_path / "exact")
    monkeypatch.setattr(PixelDenoiser, "denoise", overflowing)
    half = worlds.recipe(tiny_model, "model.dtype=bfloat16", *several, purpose="augment")
    assert worlds.run(half, manifest, tmp_path / "out").rows == {"ok": 16}
    assert verify(str(tmp_path / "out"), deep=True).problems == ()
    dtypes = {f"{row.key}-v{row.variant}": row.dtype for row in worlds.rows(tmp_path / "out")}
    assert {key for key, dtype in dtypes.items() if dtype == "float32"} == {f"img00002-v{n}" for n in range(4)}
    assert set(dtypes.values()) == {"float32", "bfloat16"}
    drawn, expected = worlds.outputs(tmp_path / "out"), worlds.outputs(tmp_path / "exact")
    for key, dtype in dtypes.items():
        assert (drawn[key]["png"] == expected[key]["png"]) == (dtype == "float32")


@pytest.mark.parametrize(
    ("fault", "reason"), [(NAN, "non-finite-output"), (FLAT, "flat-output")], ids=["nan", "flat"]
)
@pytest.mark.parametrize(
    ("dtype", "twin", "saved"),
    [("float32", None, False), ("bfloat16", "faulty", False), ("bfloat16", "sound", True)],
    ids=["float32", "half and float32", "half alone"],
)
def test_nothing_that_is_no_image_is_saved(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: Fault,
    reason: str,
    dtype: str,
    twin: str,
    saved: bool,
):
    stand_ins.install(
        monkeypatch, Faulty({2: fault}, None if twin is None else {2: fault} if twin == "faulty" else {})
    )
    manifest = labelled(tmp_path / "in", 0, 2, 1)
    report = worlds.run(stand_ins.recipe(LABELLED, f"model.dtype={dtype}"), manifest, tmp_path / "out")
    assert report.exit_code == (0 if saved else 3)
    assert reasons(tmp_path / "out") == {"n0": None, "n1": None if saved else reason, "n2": None}
    if saved:
        assert [row.dtype for row in worlds.rows(tmp_path / "out")] == ["bfloat16", "float32", "bfloat16"]


def test_an_output_that_is_its_input_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = torch.from_numpy(worlds.pixels(worlds.png(1)).astype(np.float32))[None] / 255 * 2 - 1
    stand_ins.install(monkeypatch, Faulty({2: lambda row: source}))
    manifest = labelled(tmp_path / "in", 0, 2, 1)
    assert worlds.run(stand_ins.recipe(LABELLED), manifest, tmp_path / "out").exit_code == 3
    assert reasons(tmp_path / "out") == {"n0": None, "n1": "output-equals-input", "n2": None}


def test_of_equal_outputs_none_is_saved_whichever_came_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    collapsed = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    stand_ins.install(monkeypatch, Faulty({2: lambda row: collapsed}))
    manifest = labelled(tmp_path / "in", 2, 0, 2, 1, 2, 3)
    for name, order in (("one", "batch_size=1"), ("many", "batch_size=8")):
        levels = "t.timestep={uniform: [10, 90]}"
        assert worlds.run(stand_ins.recipe(LABELLED, levels, order), manifest, tmp_path / name).exit_code == 3
        same = "output-repeated"
        assert reasons(tmp_path / name) == {
            "n0": same,
            "n1": None,
            "n2": same,
            "n3": None,
            "n4": same,
            "n5": None,
        }


def test_one_image_under_one_name_may_give_one_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    stand_ins.install(monkeypatch, Pixelwise())
    picture = {"png": worlds.png(1)}
    manifest = worlds.save_samples(tmp_path / "in", {"a": picture, "b": picture})
    worlds.run(stand_ins.recipe("identity=content"), manifest, tmp_path / "out")
    assert reasons(tmp_path / "out") == {"a": None, "b": None}
    first, second = worlds.outputs(tmp_path / "out").values()
    assert first == second


class Mixing(Pixelwise):
    """Looks at the whole batch, as a network left in training mode does."""

    def denoise(self, x_t: Tensor, tau: Tensor, conditions: Sequence[Condition]) -> Tensor:
        return super().denoise(x_t, tau, conditions) - x_t.mean(dim=0)


@pytest.mark.usefixtures("secret")
def test_a_model_that_mixes_its_batch_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    stand_ins.install(monkeypatch, Mixing())
    manifest = worlds.save_shards(tmp_path / "in", shards=1, samples=1)
    with pytest.raises(ModelError, match="batching changes this model's output"):
        worlds.run(stand_ins.recipe("purpose=anonymize", "seed=null"), manifest, tmp_path / "out")
    assert worlds.tree(tmp_path / "out") == {}


class MixingWide(Pixelwise):
    """Mixes samples at one size only, as kernels chosen by shape may."""

    def denoise(self, x_t: Tensor, tau: Tensor, conditions: Sequence[Condition]) -> Tensor:
        answer = super().denoise(x_t, tau, conditions)
        return answer - x_t.mean(dim=0) if x_t.shape[-1] == 16 else answer


def test_every_bucket_is_tried_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    stand_ins.install(monkeypatch, MixingWide())
    manifest = worlds.save_shards(tmp_path / "in", shards=1, samples=2)
    with pytest.raises(ModelError, match="batching changes this model's output"):
        worlds.run(stand_ins.recipe("images.sizes=[[8, 8], [16, 8]]"), manifest, tmp_path / "out")
    worlds.run(stand_ins.recipe("images.sizes=[[8, 8], [24, 8]]"), manifest, tmp_path / "other")
    assert set(reasons(tmp_path / "other").values()) == {None}


@pytest.mark.slow
def test_no_false_alarm_over_a_thousand_clean_samples(tmp_path: Path, tiny_model: Path):
    """Smooth, noisy, flat, black, white and two-level pictures, some of them twice, close by and far out."""
    kinds = (
        lambda n: worlds.png(n),
        lambda n: worlds.encoded(worlds.noise(n, 8, 8)),
        lambda n: worlds.encoded(np.full((8, 8), n % 256, np.uint8)),
        lambda n: worlds.encoded(np.zeros((5, 8), np.uint8)),
        lambda n: worlds.encoded(np.full((8, 3), 255, np.uint8)),
        lambda n: worlds.encoded(worlds.noise(n % 20, 8, 8) // 128 * 255),
    )
    samples = {f"n{n:04d}": {"png": kinds[n % 6](n), "cls": b"%d" % (n % 4)} for n in range(500)}
    manifest = worlds.save_samples(tmp_path / "in", samples)
    levels = ("t=[{timestep: 1}, {timestep: 20}]", "variants=2", "steps=2", "sampler.eta=0.0")
    recipe = worlds.recipe(tiny_model, *levels, "batch_size=16", purpose="augment")
    report = worlds.run(recipe, manifest, tmp_path / "out")
    assert (report.exit_code, report.rows) == (0, {"ok": 1000})
