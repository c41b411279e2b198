"""DiT: its guidance, learned variance and class labels, against DiTPipeline and its components."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiTPipeline
from torch import Tensor

from boomerang_batch.config.pipeline import ClassLabels, ModelSpec
from boomerang_batch.diffusion.boomerang import boomerang
from boomerang_batch.diffusion.samplers import build_solver
from boomerang_batch.diffusion.schedule import Schedule, build_schedule
from boomerang_batch.errors import ModelError
from boomerang_batch.models import load_denoiser
from tests import tiny_transformers
from tests.oracles import GivenNoise

pytestmark = pytest.mark.slow

NULL = tiny_transformers.CLASSES
LABELS = [7, 0, 999]
STEPS = 10


@pytest.fixture(autouse=True)
def process_numerics():
    """Loading a model settles the process's numerics; give the next test what was there."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)
    torch.set_float32_matmul_precision(precision)


@pytest.fixture(scope="module")
def pipeline() -> DiTPipeline:
    made = tiny_transformers.dit()
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def folder(pipeline, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("dit") / "model"
    pipeline.save_pretrained(path)
    return path


def load(folder, **labels):
    spec = ModelSpec(source=str(folder), class_labels=ClassLabels(**labels))
    return load_denoiser(spec, device="cpu", threads=1)


def noise(*shape: int, seed: int = 7) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def walk(denoiser, strength: float) -> Schedule:
    return build_schedule(
        denoiser.spec.levels,
        grid="leading",
        steps=STEPS,
        t=("fraction", strength),
        start="diffusers-strength",
    )


def draw(denoiser, latents: Tensor, eps: Tensor, schedule: Schedule, *, eta: float = 0.0, **draws) -> Tensor:
    solver = build_solver(schedule, prediction=denoiser.spec.prediction, eta=eta)
    return boomerang(latents, denoiser, schedule, solver, GivenNoise(eps, **draws), LABELS)


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    """Equal to 1e-4 of their RMS."""
    assert ours.shape == theirs.shape
    rms = float(theirs.square().mean().sqrt())
    assert float((ours - theirs).abs().max()) < 1e-4 * rms


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("strength", [0.3, 0.75, 1.0])
def test_a_walk_from_mid_chain_is_ddim_s(pipeline, folder, guidance, strength):
    """A plain loop over DiTPipeline's own parts; the pipeline itself starts at pure noise only."""
    denoiser = load(folder, null_label=NULL, guidance=guidance)
    latents, eps = noise(3, 4, 8, 8, seed=1), noise(3, 4, 8, 8)
    scheduler, labels = pipeline.scheduler, torch.tensor(LABELS)
    scheduler.set_timesteps(STEPS)
    timesteps = scheduler.timesteps[STEPS - int(STEPS * strength) :]
    theirs = scheduler.add_noise(latents, eps, timesteps[:1])
    with torch.no_grad():
        for t in timesteps:
            output = pipeline.transformer(theirs, t.expand(3), labels).sample[:, :4]
            if guidance != 1:
                null = pipeline.transformer(theirs, t.expand(3), torch.full((3,), NULL)).sample[:, :4]
                output = null + guidance * (output - null)
            theirs = scheduler.step(output, t, theirs).prev_sample
    assert_same(draw(denoiser, latents, eps, walk(denoiser, strength)), theirs)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_walk_from_pure_noise_is_dit_pipeline_s(pipeline, folder, guidance):
    """The whole pipeline, called as users call it, decoded pixels and all."""
    images = pipeline(
        LABELS,
        guidance_scale=guidance,
        num_inference_steps=STEPS,
        generator=torch.Generator().manual_seed(7),
        output_type="pt",
    ).images
    denoiser = load(folder, null_label=NULL, guidance=guidance)
    schedule = walk(denoiser, 1.0)
    # Such that the jump lands on the pipeline's first latents.
    eps = noise(3, 4, 8, 8) / float(schedule.sigma[-1])
    ours = denoiser.decode(draw(denoiser, torch.zeros(3, 4, 8, 8), eps, schedule))
    assert_same((ours / 2 + 0.5).clamp(0, 1), images)


def test_guidance_moves_the_noise_and_not_the_variance(pipeline, folder):
    """As in diffusers: all four channels of noise are guided, and the variance is that under the label."""
    denoiser = load(folder, null_label=NULL, guidance=3.0)
    x_t, tau = noise(3, 4, 8, 8), torch.tensor([900.0, 31.0, 0.0], dtype=torch.float64)
    output = denoiser.denoise(x_t, tau, LABELS)
    with torch.no_grad():
        label = pipeline.transformer(x_t, tau.long(), torch.tensor(LABELS)).sample
        null = pipeline.transformer(x_t, tau.long(), torch.full((3,), NULL)).sample
    expected = torch.cat([null[:, :4] + 3 * (label[:, :4] - null[:, :4]), label[:, 4:]], dim=1)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(label, null, atol=1e-3)
    assert output.dtype == torch.float32
    assert not output.requires_grad


def test_what_the_model_is(folder):
    spec = load(folder).spec
    assert (spec.channels, spec.height, spec.width, spec.value_range) == (3, 16, 16, (-1.0, 1.0))
    assert spec.latent
    assert spec.learned_variance
    assert (spec.conditioning, spec.classes) == ("label", NULL + 1)
    assert (spec.prediction, spec.clip_range, spec.fractional_tau) == ("epsilon", None, True)
    # The network puts its patches back together as a square.
    assert spec.size_multiple is None


def test_the_network_is_told_levels_between_the_trained_ones(folder):
    denoiser = load(folder)
    x_t = noise(1, 4, 8, 8).expand(3, -1, -1, -1)
    tau = torch.tensor([5.0, 5.5, 6.0], dtype=torch.float64)
    low, between, high = denoiser.denoise(x_t, tau, [1, 1, 1])
    assert not torch.equal(low, between)
    assert not torch.equal(between, high)


def test_labels_come_from_the_recipe(folder):
    with pytest.raises(ModelError, match=r"class_labels"):
        load_denoiser(ModelSpec(source=str(folder)), device="cpu", threads=1)
    with pytest.raises(ModelError, match=rf"null_label 5.*{NULL}"):
        load(folder, null_label=5, guidance=2.0)


def test_folders_from_before_the_class_had_its_name(folder, tmp_path):
    """Published DiT weights say Transformer2DModel, with fields of that class that a DiT has no use for."""
    old = tmp_path / "old"
    pipeline = DiTPipeline.from_pretrained(folder)
    pipeline.save_pretrained(old)
    where = old / "transformer" / "config.json"
    config = json.loads(where.read_text()) | {"_class_name": "Transformer2DModel", "cross_attention_dim": None}
    where.write_text(json.dumps(config))
    x_t, tau = noise(3, 4, 8, 8), torch.tensor([900.0, 31.0, 0.0], dtype=torch.float64)
    assert torch.equal(load(old).denoise(x_t, tau, LABELS), load(folder).denoise(x_t, tau, LABELS))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [("out_channels", 6, "out_channels 6"), ("norm_type", "ada_norm", "norm_type 'ada_norm'")],
)
def test_other_transformers_are_refused(folder, tmp_path, field, value, message):
    other = tmp_path / "other"
    DiTPipeline.from_pretrained(folder).save_pretrained(other)
    where = other / "transformer" / "config.json"
    where.write_text(json.dumps(json.loads(where.read_text()) | {field: value}))
    with pytest.raises(ModelError, match=message):
        load(other)
