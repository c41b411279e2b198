"""Each guard tripped once, through the runner, by a fault put into the model on purpose."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from boomerang_batch.diffusion.denoiser import Condition
from boomerang_batch.diffusion.engine import Draw
from boomerang_batch.errors import ModelError, SampleError
from boomerang_batch.models.pixel import PixelDenoiser
from boomerang_batch.run.drawing import Drawing
from boomerang_batch.run.guards import Seen
from boomerang_batch.run.shard_drawing import ShardDrawing
from boomerang_batch.run.stages import Made, Output
from boomerang_batch.run.transform import Transform
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

    @classmethod
    def with_twin(cls, faults: dict[int, Fault], twin: str | None) -> Faulty:
        """Its float32 twin is itself, as "faulty" as it is, or "sound"."""
        return cls(faults, {None: None, "faulty": faults, "sound": {}}[twin])

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


PRECISIONS = pytest.mark.parametrize(
    ("dtype", "twin", "saved"),
    [("float32", None, False), ("bfloat16", "faulty", False), ("bfloat16", "sound", True)],
    ids=["float32", "half and float32", "half alone"],
)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [(NAN, "non-finite-output"), (FLAT, "flat-output"), (lambda row: SOURCE, "output-equals-input")],
    ids=["nan", "flat", "input"],
)
@PRECISIONS
def test_nothing_that_is_no_image_is_saved(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: Fault,
    reason: str,
    dtype: str,
    twin: str | None,
    saved: bool,
):
    stand_ins.install(monkeypatch, Faulty.with_twin({2: fault}, twin))
    manifest = labelled(tmp_path / "in", 0, 2, 1)
    report = worlds.run(stand_ins.recipe(LABELLED, f"model.dtype={dtype}"), manifest, tmp_path / "out")
    assert report.exit_code == (0 if saved else 3)
    assert reasons(tmp_path / "out") == {"n0": None, "n1": None if saved else reason, "n2": None}
    if saved:
        assert [row.dtype for row in worlds.rows(tmp_path / "out")] == ["bfloat16", "float32", "bfloat16"]


SOURCE = torch.from_numpy(worlds.pixels(worlds.png(1)).astype(np.float32))[None] / 255 * 2 - 1
COLLAPSED = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.slow
@PRECISIONS
def test_of_equal_outputs_none_is_saved_whichever_came_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, twin: str | None, saved: bool
):
    stand_ins.install(monkeypatch, Faulty.with_twin({2: lambda row: COLLAPSED}, twin))
    manifest = labelled(tmp_path / "in", 2, 0, 2, 1, 2, 3)
    outputs = []
    for name, order in (("one", "batch_size=1"), ("many", "batch_size=8")):
        recipe = stand_ins.recipe(LABELLED, f"model.dtype={dtype}", "t.timestep={uniform: [10, 90]}", order)
        assert worlds.run(recipe, manifest, tmp_path / name).exit_code == (0 if saved else 3)
        repeated = {"n0", "n2", "n4"}
        assert reasons(tmp_path / name) == {
            f"n{n}": "output-repeated" if f"n{n}" in repeated and not saved else None for n in range(6)
        }
        if saved:
            redrawn = {row.key for row in worlds.rows(tmp_path / name) if row.dtype == "float32"}
            assert redrawn == repeated
        outputs.append(worlds.outputs(tmp_path / name))
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("order", list(itertools.permutations("ACB")), ids="".join)
def test_equal_outputs_are_refused_beside_a_twin_of_one_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: tuple[str, ...]
):
    """A and C are one image, which may give one output; but here B gives it too."""
    stand_ins.install(monkeypatch, Faulty({2: lambda row: COLLAPSED}))
    pictures = {"A": 1, "C": 1, "B": 2}
    samples = {key: {"png": worlds.png(pictures[key]), "cls": b"2"} for key in order}
    manifest = worlds.save_samples(tmp_path / "in", samples)
    worlds.run(stand_ins.recipe(LABELLED, "identity=content"), manifest, tmp_path / "out")
    assert reasons(tmp_path / "out") == dict.fromkeys(order, "output-repeated")


HALF = "model.dtype=bfloat16"


def test_only_what_was_refused_is_saved_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of variants and passes, each by itself."""
    spoilt, real = {("n1", 3), ("n2", 4)}, Transform.finish

    def finish(self: Transform, made: Made, *, seen: Seen) -> Output:
        if made.dtype == "bfloat16" and (made.prepared.source.key, self.number(made)) in spoilt:
            raise SampleError("non-finite-output", "a test says so")
        return real(self, made, seen=seen)

    drawn, run = [], Drawing.run_in_float32

    def run_in_float32(self: Drawing, draws: Iterable[Draw], **options) -> Iterator[Made]:
        wanted = list(draws)
        drawn.extend((one.tag.prepared.source.key, one.tag.variant) for one in wanted)
        return run(self, wanted, **options)

    monkeypatch.setattr(Transform, "finish", finish)
    monkeypatch.setattr(Drawing, "run_in_float32", run_in_float32)
    stand_ins.install(monkeypatch, Faulty.with_twin({}, "sound"))
    manifest = labelled(tmp_path / "in", 0, 1, 2)
    recipe = stand_ins.recipe(LABELLED, HALF, "variants=2", "passes={count: 3, outputs: all}")
    assert worlds.run(recipe, manifest, tmp_path / "out").rows == {"ok": 18}
    assert verify(str(tmp_path / "out"), deep=True).problems == ()
    rows = worlds.rows(tmp_path / "out")
    assert {(row.key, row.variant) for row in rows if row.dtype == "float32"} == spoilt
    assert drawn == [("n1", 1), ("n2", 1)]


def test_a_float32_output_is_compared_with_those_of_half_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model = Faulty({1: NAN, 2: lambda row: COLLAPSED}, {1: lambda row: COLLAPSED})
    stand_ins.install(monkeypatch, model)
    manifest = labelled(tmp_path / "in", 0, 1, 2)
    worlds.run(stand_ins.recipe(LABELLED, HALF), manifest, tmp_path / "out")
    assert reasons(tmp_path / "out") == {"n0": None, "n1": "output-repeated", "n2": "output-repeated"}


@pytest.mark.slow
def test_a_stop_is_heeded_while_float32_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    stop, calls = threading.Event(), []

    class Twin(Faulty):
        def denoise(self, x_t: Tensor, tau: Tensor, conditions: Sequence[Condition]) -> Tensor:
            stop.set()
            calls.append(len(x_t))
            return super().denoise(x_t, tau, conditions)

    monkeypatch.setattr(Faulty, "in_float32", lambda self: Twin({}))
    stand_ins.install(monkeypatch, Faulty({2: NAN}))
    manifest = labelled(tmp_path / "in", 2)
    recipe = stand_ins.recipe(LABELLED, HALF, "variants=400")
    assert worlds.run(recipe, manifest, tmp_path / "out", stop=stop).exit_code == 75
    assert len(calls) < 100
    assert worlds.outputs(tmp_path / "out") == {}


@pytest.mark.parametrize("what", ["pixels", "label", "key", "gone", "undecodable"])
def test_an_input_that_changes_between_the_looks_costs_its_shard_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
):
    stand_ins.install(monkeypatch, Faulty.with_twin({2: NAN}, "sound"))
    good = {f"n{n}": {"png": worlds.png(n), "cls": b"2" if n == 1 else b"0"} for n in range(3)}
    manifest = worlds.save_samples(tmp_path / "in", good, {"m": {"png": worlds.png(9), "cls": b"0"}})
    changed = {key: dict(fields) for key, fields in good.items()}
    if what == "key":
        changed["x1"] = changed.pop("n1")
    elif what == "gone":
        del changed["n1"]
    elif what == "label":
        changed["n1"]["cls"] = b"3"
    else:
        changed["n1"]["png"] = worlds.png(77) if what == "pixels" else b"no picture"
    first = sorted((tmp_path / "in").glob("*.tar"))[0]
    other = worlds.save_samples(tmp_path / "other", dict(sorted(changed.items())))
    real = ShardDrawing._look_again

    def look_again(self: ShardDrawing) -> None:
        first.write_bytes(next(other.parent.glob("*.tar")).read_bytes())
        real(self)

    monkeypatch.setattr(ShardDrawing, "_look_again", look_again)
    report = worlds.run(stand_ins.recipe(LABELLED, HALF), manifest, tmp_path / "out")
    assert report.exit_code == 3
    assert list(worlds.outputs(tmp_path / "out")) == ["m"]


def test_where_float32_does_not_fit_what_was_refused_stays_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    asked = []

    def no_memory(self: Faulty) -> Pixelwise:
        asked.append(self)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(Faulty, "in_float32", no_memory)
    stand_ins.install(monkeypatch, Faulty({2: NAN}))
    shards = [{f"s{s}": {"png": worlds.png(s), "cls": b"%d" % (2 * (s % 2))}} for s in range(4)]
    manifest = worlds.save_samples(tmp_path / "in", *shards)
    report = worlds.run(stand_ins.recipe(LABELLED, HALF), manifest, tmp_path / "out")
    assert report.exit_code == 3
    bad = "non-finite-output"
    assert reasons(tmp_path / "out") == {"s0": None, "s1": bad, "s2": None, "s3": bad}
    assert caplog.text.count("1 outputs stay refused that float32 might have saved: memory can't hold") == 2
    assert len(asked) == 1


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


class FirstPrompt(Pixelwise):
    """Tells every row what the first one's prompt says."""

    def denoise(self, x_t: Tensor, tau: Tensor, conditions: Sequence[Condition]) -> Tensor:
        return super().denoise(x_t, tau, conditions) * (1 + len(str(conditions[0] or "")) / 100)


def test_a_model_that_takes_one_prompt_for_all_is_refused_where_they_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    stand_ins.install(monkeypatch, FirstPrompt(conditioning="prompt"))
    captions = {f"n{n}": {"png": worlds.png(n), "txt": b"a " * n + b"cat"} for n in range(3)}
    manifest = worlds.save_samples(tmp_path / "in", captions)
    with pytest.raises(ModelError, match="one row's timestep or condition"):
        worlds.run(stand_ins.recipe("model.prompts={field: txt}"), manifest, tmp_path / "out")
    worlds.run(stand_ins.recipe("model.prompts={text: a dog}"), manifest, tmp_path / "other")
    assert set(reasons(tmp_path / "other").values()) == {None}


class MixingEncoder(Pixelwise):
    """A latent model whose encoder looks at the whole batch."""

    def encode(self, images: Tensor) -> Tensor:
        return images - 0.1 * images.mean(dim=0)


def test_an_autoencoder_that_mixes_its_batch_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    stand_ins.install(monkeypatch, MixingEncoder(latent=True))
    manifest = worlds.save_shards(tmp_path / "in", shards=1, samples=2)
    with pytest.raises(ModelError, match="change one another in its encoder"):
        worlds.run(stand_ins.recipe("model.autoencoder={batch_size: 4}"), manifest, tmp_path / "out")
    worlds.run(stand_ins.recipe(), manifest, tmp_path / "other")  # one image at a time is fine
    assert set(reasons(tmp_path / "other").values()) == {None}


class MixingWideEncoder(Pixelwise):
    """An autoencoder that mixes images of one size only."""

    def encode(self, images: Tensor) -> Tensor:
        return images - 0.1 * images.mean(dim=0) if images.shape[-1] == 16 else images


def test_the_autoencoder_is_tried_out_on_every_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    stand_ins.install(monkeypatch, MixingWideEncoder(latent=True))
    manifest = worlds.save_shards(tmp_path / "in", shards=1, samples=2)
    recipe = stand_ins.recipe("images.sizes=[[24, 8], [16, 8]]", "model.autoencoder={batch_size: 4}")
    with pytest.raises(ModelError, match="change one another in its encoder"):
        worlds.run(recipe, manifest, tmp_path / "out")


def test_every_bucket_is_tried_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    stand_ins.install(monkeypatch, MixingWide())
    manifest = worlds.save_shards(tmp_path / "in", shards=1, samples=2)
    with pytest.raises(ModelError, match="batching changes this model's output"):
        worlds.run(stand_ins.recipe("images.sizes=[[8, 8], [16, 8]]"), manifest, tmp_path / "out")
    worlds.run(stand_ins.recipe("images.sizes=[[8, 8], [24, 8]]"), manifest, tmp_path / "other")
    assert set(reasons(tmp_path / "other").values()) == {None}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_false_alarm_over_a_thousand_clean_samples(tmp_path: Path, tiny_model: Path, dtype: str):
    """1,000 with contrast, some of them twice, and 100 plain ones; close by and far out."""
    kinds = (
        lambda n: worlds.png(n),
        lambda n: worlds.encoded(worlds.noise(n, 8, 8)),
        lambda n: worlds.encoded(worlds.noise(n % 20, 8, 8) // 128 * 255),
        lambda n: worlds.encoded(255 - worlds.noise(n, 7, 8) // 16),  # faint, near white
    )
    plain = (
        lambda n: worlds.encoded(np.full((8, 8), n % 256, np.uint8)),
        lambda n: worlds.encoded(np.zeros((5, 8), np.uint8)),
        lambda n: worlds.encoded(np.full((8, 3), 255, np.uint8)),
    )
    pictures = [kinds[n % 4](n) for n in range(1000)] + [plain[n % 3](n) for n in range(100)]
    samples = {f"n{n:04d}": {"png": one, "cls": b"%d" % (n % 4)} for n, one in enumerate(pictures)}
    halves = [dict(list(samples.items())[start::2]) for start in range(2)]
    manifest = worlds.save_samples(tmp_path / "in", *halves)
    settings = ("t.timestep={uniform: [1, 20]}", "steps=2", "sampler.eta=0.0", f"model.dtype={dtype}")
    recipe = worlds.recipe(tiny_model, *settings, "batch_size=16", purpose="augment")
    report = worlds.run(recipe, manifest, tmp_path / "out")
    assert (report.exit_code, report.rows) == (0, {"ok": 1100})
    assert {row.dtype for row in worlds.rows(tmp_path / "out")} == {dtype}  # none was drawn a second time
