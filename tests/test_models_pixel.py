"""The pixel denoiser, against the diffusers network, pipelines and schedulers it wraps."""

from __future__ import annotations

import json

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

from boomerang_batch.config.blocks import Autoencoder
from boomerang_batch.config.pipeline import ClassLabels, ModelSpec
from boomerang_batch.diffusion.samplers import build_solver, step
from boomerang_batch.diffusion.schedule import build_schedule
from boomerang_batch.errors import ModelError
from boomerang_batch.models import load_denoiser
from tests import tiny_models

TAU = torch.tensor([0, 3, 11, 19], dtype=torch.float64)
LABELS = [0, 2, 1, 0]


@pytest.fixture(autouse=True)
def process_numerics():
    """Loading a model settles the process's numerics; give the next test what was there."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)
    torch.set_float32_matmul_precision(precision)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


def load(folder, *, class_labels=None, **options):
    spec = ModelSpec(source=str(folder), class_labels=class_labels, **options)
    return load_denoiser(spec, device="cpu", threads=1)


def save(tmp_path, unet, **options):
    return tiny_models.save_pipeline(tmp_path / "model", unet=unet, noise=tiny_models.scheduler(**options))


def test_denoise_is_the_network_row_by_row(tmp_path):
    unet = tiny_models.network()
    denoiser = load(save(tmp_path, unet, prediction_type="v_prediction"))
    x_t = noise(4, 3, 8, 8)
    output = denoiser.denoise(x_t, TAU, [None] * 4)
    with torch.no_grad():
        assert torch.equal(output, unet(x_t, TAU.long()).sample)
        for row in range(4):
            alone = unet(x_t[row : row + 1], int(TAU[row])).sample
            torch.testing.assert_close(output[row : row + 1], alone, rtol=1e-4, atol=1e-5)
    spec = denoiser.spec
    assert (spec.channels, spec.height, spec.width, spec.classes) == (3, 8, 8, None)
    assert (spec.prediction, spec.clip_range, spec.value_range) == ("v_prediction", 1.0, (-1.0, 1.0))
    assert spec.fractional_tau
    assert output.dtype == torch.float32
    assert not output.requires_grad


@pytest.mark.slow
def test_where_tensors_lie_in_memory_changes_no_bit(tmp_path):
    """CPU kernels choose by alignment, so weights must not stay where the file's header put them."""
    folder, unet, _ = tiny_models.save_score_model(tmp_path / "model")
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    x_t, sigma = noise(4, 3, 8, 8), torch.tensor([0.02, 0.3, 4.0, 50.0], dtype=torch.float64)
    with torch.no_grad():
        expected = unet(x_t, sigma.float()).sample
    for length in range(0, 64, 12):
        save_file(weights, path, metadata={"format": "pt", "padding": "-" * length})
        denoiser = load(folder)
        assert all(weight.data_ptr() % 64 == 0 for weight in denoiser.network.parameters())
        assert torch.equal(denoiser.denoise(x_t, sigma, [None] * 4), expected)
        shifted = torch.empty(x_t.numel() + 1)[1:].view_as(x_t).copy_(x_t)
        assert torch.equal(denoiser.denoise(shifted, sigma, [None] * 4), expected)


def test_the_network_is_told_tau(tmp_path):
    denoiser = load(save(tmp_path, tiny_models.network()))
    x_t = noise(1, 3, 8, 8).expand(3, -1, -1, -1)
    low, between, high = denoiser.denoise(x_t, torch.tensor([5.0, 5.5, 6.0], dtype=torch.float64), [None] * 3)
    assert not torch.equal(low, between)
    assert not torch.equal(between, high)


def test_a_table_of_timesteps_takes_whole_ones(tmp_path):
    unet = tiny_models.network(time_embedding_type="learned", num_train_timesteps=20)
    denoiser = load(save(tmp_path, unet))
    assert not denoiser.spec.fractional_tau
    x_t = noise(4, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(denoiser.denoise(x_t, TAU, [None] * 4), unet(x_t, TAU.long()).sample)


def test_a_table_shorter_than_the_chain_is_refused(tmp_path):
    unet = tiny_models.network(time_embedding_type="learned", num_train_timesteps=10)
    with pytest.raises(ModelError, match=r"10 rows.*20 noise levels"):
        load(save(tmp_path, unet))


def test_labels_reach_a_conditional_network(tmp_path):
    unet = tiny_models.network(num_class_embeds=4)
    denoiser = load(save(tmp_path, unet), class_labels=ClassLabels())
    x_t = noise(4, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(
            denoiser.denoise(x_t, TAU, LABELS), unet(x_t, TAU.long(), torch.tensor(LABELS)).sample
        )
    assert denoiser.spec.classes == 4


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0, 3.0])
def test_classifier_free_guidance(tmp_path, weight):
    unet = tiny_models.network(num_class_embeds=4)
    denoiser = load(save(tmp_path, unet), class_labels=ClassLabels(null_label=3, guidance=weight))
    x_t = noise(4, 3, 8, 8)
    with torch.no_grad():
        conditional = unet(x_t, TAU.long(), torch.tensor(LABELS)).sample
        unconditional = unet(x_t, TAU.long(), torch.full((4,), 3)).sample
    expected = unconditional + weight * (conditional - unconditional)
    torch.testing.assert_close(denoiser.denoise(x_t, TAU, LABELS), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(conditional, unconditional, atol=1e-3)


def test_a_learned_variance_comes_with_the_output_unguided(tmp_path):
    """Guidance moves the mean's channels; the variance's stay the label's own."""
    unet = tiny_models.network(num_class_embeds=4, out_channels=6)
    folder = save(tmp_path, unet, variance_type="learned_range")
    denoiser = load(folder, class_labels=ClassLabels(null_label=3, guidance=3.0))
    assert denoiser.spec.learned_variance
    assert denoiser.spec.channels == 3
    x_t = noise(4, 3, 8, 8)
    with torch.no_grad():
        conditional = unet(x_t, TAU.long(), torch.tensor(LABELS)).sample
        unconditional = unet(x_t, TAU.long(), torch.full((4,), 3)).sample
    output = denoiser.denoise(x_t, TAU, LABELS)
    mean = unconditional[:, :3] + 3.0 * (conditional[:, :3] - unconditional[:, :3])
    torch.testing.assert_close(output[:, :3], mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output[:, 3:], conditional[:, 3:], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_walk_with_learned_variance_is_diffusers_own(tmp_path):
    """From pure noise to the image, each side going on from its own state, as DDPMPipeline does."""
    unet = tiny_models.network(out_channels=6)
    denoiser = load(save(tmp_path, unet, variance_type="learned_range"))
    theirs = tiny_models.scheduler(variance_type="learned_range")
    theirs.set_timesteps(20)
    schedule = build_schedule(
        denoiser.spec.levels, grid="leading", steps=20, t=("fraction", 1.0), start="exact"
    )
    solver = build_solver(
        schedule, prediction="epsilon", eta=1.0, variance="learned", clip_range=denoiser.spec.clip_range
    )
    ours = expected = noise(1, 3, 8, 8)
    for i in range(schedule.n, 0, -1):
        with torch.no_grad():
            output = unet(expected, i - 1).sample
        seeded = torch.Generator().manual_seed(i)
        expected = theirs.step(output, i - 1, expected, generator=seeded).prev_sample
        z = torch.randn(ours.shape, generator=torch.Generator().manual_seed(i))
        ours, _ = step(solver.table[[i]], ours, denoiser.denoise(ours, schedule.tau[[i]], [None]), z)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    assert float(ours.std()) > 0.05


def test_a_learned_variance_must_be_there(tmp_path):
    with pytest.raises(ModelError, match=r"out_channels 3 is not twice in_channels 3.*learned_range"):
        load(save(tmp_path, tiny_models.network(), variance_type="learned_range"))


def test_patches_of_a_network_with_learned_variance(tmp_path):
    unet = tiny_models.network(in_channels=4, out_channels=8)
    denoiser = load(save(tmp_path, unet, variance_type="learned_range"), patch_size=2)
    x_t = noise(4, 1, 16, 16)
    with torch.no_grad():
        inside = unet(functional.pixel_unshuffle(x_t, 2), TAU.long()).sample
    output = denoiser.denoise(x_t, TAU, [None] * 4)
    assert torch.equal(output[:, :1], functional.pixel_shuffle(inside[:, :4], 2))
    assert torch.equal(output[:, 1:], functional.pixel_shuffle(inside[:, 4:], 2))


def test_a_pixel_model_flags_nothing_and_has_a_float32_twin(tmp_path):
    folder = save(tmp_path, tiny_models.network())
    full, half = load(folder), load(folder, dtype="bfloat16")
    x_t = noise(4, 3, 8, 8)
    expected = full.denoise(x_t, TAU, [None] * 4)
    assert not torch.equal(half.denoise(x_t, TAU, [None] * 4), expected)
    twin = half.in_float32()
    assert torch.equal(twin.denoise(x_t, TAU, [None] * 4), expected)
    assert half.in_float32() is twin
    assert full.in_float32() is full
    assert full.flagged(x_t) == [False] * 4
    assert torch.equal(full.encode(x_t), x_t)
    assert torch.equal(full.decode(x_t), x_t)


@pytest.mark.slow
def test_a_pixel_model_has_no_autoencoder_to_set(tmp_path):
    with pytest.raises(ModelError, match=r"no autoencoder; remove model\.autoencoder"):
        load(save(tmp_path, tiny_models.network()), autoencoder=Autoencoder(batch_size=4))


@pytest.mark.parametrize(("patch_size", "channels"), [(2, 1), (2, 3), (4, 1)])
def test_patches(tmp_path, patch_size, channels):
    """The network sees sub-pixels as channels: channel c p^2 + i p + j is row i, column j of a patch."""
    folded = channels * patch_size**2
    unet = tiny_models.network(in_channels=folded, out_channels=folded)
    denoiser = load(save(tmp_path, unet), patch_size=patch_size)
    side = 8 * patch_size
    assert (denoiser.spec.channels, denoiser.spec.height, denoiser.spec.width) == (channels, side, side)
    x_t = noise(4, channels, side, side)
    inside = torch.empty(4, folded, 8, 8)
    for c in range(channels):
        for i in range(patch_size):
            for j in range(patch_size):
                inside[:, c * patch_size**2 + i * patch_size + j] = x_t[:, c, i::patch_size, j::patch_size]
    with torch.no_grad():
        expected = functional.pixel_shuffle(unet(inside, TAU.long()).sample, patch_size)
    assert torch.equal(denoiser.denoise(x_t, TAU, [None] * 4), expected)


def test_folding_is_undone(tmp_path, monkeypatch):
    """With a network that answers its input, the patched denoiser is the identity."""
    unet = tiny_models.network(in_channels=4, out_channels=4)
    denoiser = load(save(tmp_path, unet), patch_size=2)
    monkeypatch.setattr(
        denoiser.network, "forward", lambda x, t, class_labels: diffusers.utils.BaseOutput(sample=x)
    )
    x_t = noise(4, 1, 16, 16)
    assert torch.equal(denoiser.denoise(x_t, TAU, [None] * 4), x_t)


@pytest.mark.parametrize("class_labels", [None, ClassLabels(null_label=3, guidance=2.0)])
def test_bfloat16_stays_close_to_float32(tmp_path, class_labels):
    classes = None if class_labels is None else 4
    labels = [None] * 4 if class_labels is None else LABELS
    folder = save(tmp_path, tiny_models.network(num_class_embeds=classes))
    x_t = noise(4, 3, 8, 8)
    full = load(folder, class_labels=class_labels).denoise(x_t, TAU, labels)
    half = load(folder, class_labels=class_labels, dtype="bfloat16").denoise(x_t, TAU, labels)
    assert half.dtype == torch.float32
    error = (half - full).pow(2).mean().sqrt() / full.pow(2).mean().sqrt()
    assert 0 < error < 0.03


def test_channels_last_changes_the_layout_only(tmp_path):
    folder = save(tmp_path, tiny_models.network())
    x_t = noise(4, 3, 8, 8)
    plain, last = load(folder), load(folder, channels_last=True)
    assert last.network.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    output = last.denoise(x_t, TAU, [None] * 4)
    assert output.is_contiguous()
    torch.testing.assert_close(output, plain.denoise(x_t, TAU, [None] * 4), rtol=1e-4, atol=1e-5)


def test_a_ddim_pipeline_and_our_sampler_make_the_same_image(tmp_path):
    """Network, noise levels, prediction and value range, all together: full sampling from the same noise."""
    unet = tiny_models.network()
    noise_scheduler = diffusers.DDIMScheduler(num_train_timesteps=20, beta_end=0.3, clip_sample=False)
    pipeline = diffusers.DDIMPipeline(unet, noise_scheduler)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(tmp_path / "model")
    images = pipeline(
        batch_size=2,
        generator=torch.Generator().manual_seed(3),
        num_inference_steps=10,
        eta=0.0,
        output_type="np",
    ).images

    denoiser = load(tmp_path / "model")
    schedule = build_schedule(
        denoiser.spec.levels, grid="leading", steps=10, t=("fraction", 1.0), start="diffusers-strength"
    )
    solver = build_solver(schedule, prediction=denoiser.spec.prediction, eta=0.0)
    x_t = torch.randn((2, 3, 8, 8), generator=torch.Generator().manual_seed(3))
    for i in range(schedule.n, 0, -1):
        node = torch.full((2,), i)
        output = denoiser.denoise(x_t, schedule.tau[node], [None] * 2)
        x_t, _ = step(solver.table[node], x_t, output, None)
    low, high = denoiser.spec.value_range
    ours = ((x_t - low) / (high - low)).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert abs(ours - images).max() < 1e-4
    assert images.std() > 0.01


def test_a_score_model_steps_like_its_own_scheduler(tmp_path):
    """The output is a score, sigma is what the network is told, and a step is diffusers' own.

    Its noise is the forward step's, which is fixed_large; the mean is the same whatever the noise.
    """
    folder, unet, scheduler = tiny_models.save_score_model(tmp_path / "model")
    denoiser = load(folder)
    spec = denoiser.spec
    assert (spec.prediction, spec.value_range, spec.clip_range) == ("score", (0.0, 1.0), None)
    count = len(spec.levels)
    scheduler.set_timesteps(count)
    scheduler.set_sigmas(count)
    schedule = build_schedule(spec.levels, grid="linspace", steps=count, t=("fraction", 1.0), start="exact")
    small, large = (
        build_solver(schedule, prediction=spec.prediction, eta=1.0, variance=variance)
        for variance in ("fixed_small", "fixed_large")
    )
    x_0 = noise(1, 3, 8, 8).sigmoid()
    for index in range(1, count):
        sigma = spec.levels.sigma[index : index + 1].float()
        x_t = x_0 + sigma * noise(1, 3, 8, 8)
        output = denoiser.denoise(x_t, spec.levels.tau[index : index + 1], [None])
        with torch.no_grad():
            assert torch.equal(output, unet(x_t, sigma).sample)
        # diffusers turns a time in [0, 1] back into an index by flooring; aim at the middle.
        time = (index + 0.5) / (count - 1) if index < count - 1 else 1.0
        theirs = scheduler.step_pred(output, time, x_t, generator=torch.Generator().manual_seed(index))
        z = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(index))
        for solver, given, expected in (
            (small, None, theirs.prev_sample_mean),
            (large, z, theirs.prev_sample),
        ):
            ours, _ = step(solver.table[[index + 1]], x_t, output, given)
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4 * float(sigma))


def test_a_score_network_needs_its_scheduler(tmp_path):
    unet = tiny_models.network(time_embedding_type="fourier")
    with pytest.raises(ModelError, match="time_embedding_type fourier"):
        load(save(tmp_path, unet))


@pytest.mark.parametrize(
    ("options", "recipe", "words"),
    [
        ({"num_class_embeds": 4}, {}, ["class-conditional", "class_labels"]),
        ({}, {"class_labels": ClassLabels()}, ["unconditional", "remove model.class_labels"]),
        ({"num_class_embeds": 4}, {"class_labels": ClassLabels(null_label=4)}, ["null_label 4", "0..3"]),
        ({"class_embed_type": "timestep"}, {"class_labels": ClassLabels()}, ["class_embed_type"]),
        ({"out_channels": 6}, {}, ["out_channels 6", "variance_type: learned_range"]),
        ({"out_channels": 4}, {}, ["out_channels 4", "in_channels 3"]),
        ({"in_channels": 4, "out_channels": 4}, {}, ["in_channels 4", "patch_size 1"]),
        ({}, {"patch_size": 2}, ["in_channels 3", "patch_size 2", "0.75"]),
        ({"sample_size": None}, {}, ["sample_size is None"]),
        ({}, {"dtype": "float16"}, ["float16", "CPU"]),
    ],
)
def test_what_a_model_can_not_do_is_refused(tmp_path, options, recipe, words):
    # The pipeline is not asked to run, so a network of any shape can be saved.
    folder = save(tmp_path, tiny_models.network(**options))
    with pytest.raises(ModelError) as refusal:
        load(folder, **recipe)
    for word in words:
        assert word in str(refusal.value)


@pytest.mark.parametrize("field", ["sample_size", "in_channels", "out_channels"])
def test_a_missing_field_is_named(tmp_path, field):
    folder = save(tmp_path, tiny_models.network())
    path = folder / "unet" / "config.json"
    config = json.loads(path.read_text())
    del config[field]
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match=field):
        load(folder)


def test_rectangular_models(tmp_path):
    unet = tiny_models.network(sample_size=(8, 12))
    spec = load(save(tmp_path, unet)).spec
    assert (spec.height, spec.width) == (8, 12)


def test_devices(tmp_path):
    spec = ModelSpec(source=str(save(tmp_path, tiny_models.network())))
    with pytest.raises(ModelError, match="device tpu"):
        load_denoiser(spec, device="tpu", threads=None)
    if not torch.cuda.is_available():
        with pytest.raises(ModelError, match="no CUDA device"):
            load_denoiser(spec, device="cuda", threads=None)
        assert load_denoiser(spec, device="auto", threads=None).device.type == "cpu"


def test_loading_settles_the_numerics(tmp_path):
    folder = save(tmp_path, tiny_models.network())
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(False)
    before = torch.random.get_rng_state()
    load(folder)
    assert torch.get_num_threads() == 1
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.equal(torch.random.get_rng_state(), before)
