"""Latent denoisers against the diffusers pipelines they replace, on small random weights."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from boomerang_batch.config.pipeline import Autoencoder, ClassLabels, ModelSpec, Prompts
from boomerang_batch.diffusion.boomerang import boomerang
from boomerang_batch.diffusion.parity import check_autoencoder
from boomerang_batch.diffusion.samplers import build_solver, step
from boomerang_batch.diffusion.schedule import build_schedule
from boomerang_batch.errors import ModelError
from boomerang_batch.models import autoencoder, load_denoiser, with_guidance
from tests import tiny_latents, tiny_models
from tests.oracles import GivenNoise

PROMPTS = ["a cat", "3 dogs in a field"]
TAU = torch.tensor([7, 640], dtype=torch.float64)

pytestmark = [
    pytest.mark.slow,
    # Some of diffusers' schedulers convert tensors the way NumPy 2 asks them not to.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.usefixtures("process_numerics"),
]


@pytest.fixture
def process_numerics():
    """Loading a model settles the process's numerics; give the next test what was there."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)
    torch.set_float32_matmul_precision(precision)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """One folder of each family, never to be changed."""
    root = tmp_path_factory.mktemp("families")
    tiny_latents.stable_diffusion().save_pretrained(root / "sd")
    tiny_latents.stable_diffusion_xl().save_pretrained(root / "xl")
    tiny_latents.ldm(tiny_latents.vq()).save_pretrained(root / "vq")
    tiny_latents.ldm(tiny_latents.vae()).save_pretrained(root / "kl")
    return root


def load(folder: Path, **options):
    return load_denoiser(ModelSpec(source=str(folder), **options), device="cpu", threads=1)


def noise(*shape: int, seed: int = 7) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def images(count: int = 2, seed: int = 1) -> torch.Tensor:
    return noise(count, 3, 16, 16, seed=seed).tanh()


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, *, share: float = 1e-4) -> None:
    """Equal to `share` of the RMS, everywhere."""
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max()) <= share * float(theirs.square().mean().sqrt())


def img2img(pipeline, monkeypatch, eps: torch.Tensor, **call):
    """diffusers' own img2img on latents, with `eps` for its noise: (latents, what each step was given)."""
    kind = {
        diffusers.StableDiffusionPipeline: diffusers.StableDiffusionImg2ImgPipeline,
        diffusers.StableDiffusionXLPipeline: diffusers.StableDiffusionXLImg2ImgPipeline,
    }[type(pipeline)]
    pipeline = kind.from_pipe(pipeline)
    pipeline.set_progress_bar_config(disable=True)
    module = __import__(kind.__module__, fromlist=["randn_tensor"])
    monkeypatch.setattr(module, "randn_tensor", lambda *shape, **rest: eps)
    told, take = [], pipeline.scheduler.step

    def record(model_output, t, sample, *more, **named):
        told.append((model_output, t, sample))
        return take(model_output, t, sample, *more, **named)

    monkeypatch.setattr(pipeline.scheduler, "step", record)
    return pipeline(output_type="latent", **call).images, told


def ours(denoiser, x_0: torch.Tensor, eps: torch.Tensor, *, grid: str, steps: int, strength: float, prompts):
    """Boomerang as it is run, with diffusers' start."""
    spec = denoiser.spec
    schedule = build_schedule(
        spec.levels, grid=grid, steps=steps, t=("fraction", strength), start="diffusers-strength"
    )
    solver = build_solver(schedule, prediction=spec.prediction, eta=0.0, clip_range=spec.clip_range)
    return boomerang(x_0, denoiser, schedule, solver, GivenNoise(eps), prompts)


ZERO_SNR = {
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}
SCHEDULERS = {
    "epsilon": tiny_latents.scheduler(),
    "velocity": tiny_latents.scheduler(prediction_type="v_prediction"),
    "zero-snr": tiny_latents.scheduler(**ZERO_SNR),
    "euler": tiny_latents.euler(),
    "euler-to-sigma-min": tiny_latents.euler(final_sigmas_type="sigma_min"),
}


@pytest.mark.parametrize(("chain", "guidance"), [("epsilon", 1.0), *((chain, 4.0) for chain in SCHEDULERS)])
def test_stable_diffusion_is_diffusers_img2img(saved, tmp_path, monkeypatch, chain, guidance):
    folder = Path(shutil.copytree(saved / "sd", tmp_path / "sd"))
    SCHEDULERS[chain].save_pretrained(folder / "scheduler")
    edit_json(folder / "model_index.json", scheduler=["diffusers", type(SCHEDULERS[chain]).__name__])
    grid = SCHEDULERS[chain].config.timestep_spacing
    denoiser = load(
        folder, prompts=Prompts(field="txt", negative="a dog" if guidance != 1 else "", guidance=guidance)
    )
    x_0, eps = denoiser.encode(images()), noise(2, 4, 8, 8)
    latents, told = img2img(
        tiny_latents.stable_diffusion(noise=SCHEDULERS[chain]),
        monkeypatch,
        eps,
        image=x_0,
        prompt=PROMPTS,
        negative_prompt=["a dog"] * 2,
        strength=0.58,
        num_inference_steps=10,
        guidance_scale=guidance,
    )
    result = ours(denoiser, x_0, eps, grid=grid, steps=10, strength=0.58, prompts=PROMPTS)
    assert len(told) == 5
    if chain == "euler-to-sigma-min":
        # diffusers' state there is the whole divided by alpha.
        result = result / denoiser.spec.levels.end[0]
    assert_close(result, latents)
    assert float((result - x_0).std()) > 0.05


@pytest.mark.parametrize(
    ("guidance", "negative", "rescale"), [(1.0, "", 0.0), (5.0, "", 0.7), (2.0, "a dog", 0.0)]
)
def test_stable_diffusion_xl_is_diffusers_img2img(saved, monkeypatch, guidance, negative, rescale):
    prompts = Prompts(field="txt", negative=negative, guidance=guidance, rescale=rescale)
    denoiser = load(saved / "xl", prompts=prompts)
    x_0, eps = denoiser.encode(images()), noise(2, 4, 8, 8)
    latents, _ = img2img(
        tiny_latents.stable_diffusion_xl(),
        monkeypatch,
        eps,
        image=x_0,
        prompt=PROMPTS,
        negative_prompt=[negative] * 2 if negative else None,
        strength=0.4,
        num_inference_steps=10,
        guidance_scale=guidance,
        guidance_rescale=rescale,
    )
    result = ours(denoiser, x_0, eps, grid="leading", steps=10, strength=0.4, prompts=PROMPTS)
    assert_close(result, latents)


def test_stable_diffusion_xl_with_its_usual_scheduler(saved, tmp_path, monkeypatch):
    """Published XL models come with Euler's."""
    folder = Path(shutil.copytree(saved / "xl", tmp_path / "xl"))
    tiny_latents.euler().save_pretrained(folder / "scheduler")
    edit_json(folder / "model_index.json", scheduler=["diffusers", "EulerDiscreteScheduler"])
    denoiser = load(folder, prompts=Prompts(field="txt", guidance=4.0))
    x_0, eps = denoiser.encode(images()), noise(2, 4, 8, 8)
    call = {"image": x_0, "prompt": PROMPTS, "strength": 0.58, "num_inference_steps": 10, "guidance_scale": 4.0}
    pipeline = tiny_latents.stable_diffusion_xl(noise=tiny_latents.euler())
    latents, _ = img2img(pipeline, monkeypatch, eps, **call)
    grid = tiny_latents.euler().config.timestep_spacing
    assert_close(ours(denoiser, x_0, eps, grid=grid, steps=10, strength=0.58, prompts=PROMPTS), latents)


@pytest.mark.parametrize("family", ["sd", "xl"])
def test_attention_is_torchs_own(saved, family):
    """scaled_dot_product_attention, in the network and in the autoencoder."""
    denoiser = load(saved / family)
    for module in (denoiser.network, denoiser.autoencoder.module):
        processors = {type(one).__name__ for one in module.attn_processors.values()}
        assert processors == {"AttnProcessor2_0"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["sd", "xl", "vq", "kl"])
def test_no_autoencoder_lets_images_change_one_another(saved, family, dtype):
    denoiser = load(saved / family, dtype=dtype)
    for batch_size in (1, 2, 5):
        check_autoencoder(denoiser, images(4), batch_size, dtype=getattr(torch, dtype))


@pytest.mark.parametrize("family", ["sd", "xl"])
def test_each_call_is_the_pipelines_noise_prediction(saved, monkeypatch, family):
    """What diffusers hands its scheduler, guidance applied, at each step of its own walk."""
    build = {"sd": tiny_latents.stable_diffusion, "xl": tiny_latents.stable_diffusion_xl}
    denoiser = load(saved / family, prompts=Prompts(field="txt", negative="a dog", guidance=3.0))
    _, told = img2img(
        build[family](),
        monkeypatch,
        noise(2, 4, 8, 8),
        image=denoiser.encode(images()),
        prompt=PROMPTS,
        negative_prompt=["a dog"] * 2,
        strength=0.5,
        num_inference_steps=6,
        guidance_scale=3.0,
    )
    assert len(told) == 3
    for output, t, sample in told:
        tau = torch.full((2,), float(t), dtype=torch.float64)
        assert_close(denoiser.denoise(sample, tau, PROMPTS), output, share=1e-5)
        other = denoiser.denoise(sample, tau, PROMPTS[::-1])
        assert float((other - output).abs().max()) > 1e-3 * float(output.std())


def test_another_weight_of_guidance_is_the_model_loaded_with_it(saved):
    plain = load(saved / "sd", prompts=Prompts(field="txt"), dtype="bfloat16")
    x_t, tau = noise(2, 4, 8, 8), torch.tensor([30.0, 5.0], dtype=torch.float64)
    other = with_guidance(plain, 4.0)
    for dtype, found in (("bfloat16", other), ("float32", other.in_float32())):
        expected = load(saved / "sd", prompts=Prompts(field="txt", guidance=4.0), dtype=dtype)
        told = ["a cat", "a dog"]
        assert torch.equal(found.denoise(x_t, tau, told), expected.denoise(x_t, tau, told))
    assert other.network is plain.network


def test_guidance_rescale_is_diffusers_own(saved):
    x_t = noise(2, 4, 8, 8)

    def output(**options):
        denoiser = load(saved / "sd", prompts=Prompts(text="a cat", **options))
        return denoiser.denoise(x_t, TAU, [None] * 2)

    guided = {"guidance": 6.0, "negative": "a dog"}
    expected = rescale_noise_cfg(output(**guided), output(), guidance_rescale=0.7)
    torch.testing.assert_close(output(**guided, rescale=0.7), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["sd", "xl"])
def test_rows_have_their_own_prompt_and_level(saved, family):
    """Each row equals itself in another batch of the same shape, beside another neighbour, to the bit."""
    denoiser = load(saved / family, prompts=Prompts(field="txt", guidance=2.0))
    x_t = noise(2, 4, 8, 8)
    first = denoiser.denoise(x_t, TAU, PROMPTS)
    other = denoiser.denoise(torch.stack([x_t[1], x_t[1] * 2]), TAU.flip(0), [PROMPTS[1], "x"])
    assert torch.equal(other[0], first[1])


def test_xl_told_nothing_is_told_zeros(saved, tmp_path):
    x_t, tau = noise(1, 4, 8, 8), TAU[1:]
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(saved / "xl")
    hidden, _, pooled, _ = pipeline.encode_prompt("", do_classifier_free_guidance=False)
    ids = torch.tensor([[16.0, 16, 0, 0, 16, 16]])

    def theirs(hidden, pooled):
        added = {"text_embeds": pooled, "time_ids": ids}
        with torch.no_grad():
            return pipeline.unet(x_t, tau, encoder_hidden_states=hidden, added_cond_kwargs=added).sample

    zeros = theirs(torch.zeros_like(hidden), torch.zeros_like(pooled))
    assert_close(load(saved / "xl").denoise(x_t, tau, [None]), zeros, share=1e-5)
    folder = Path(shutil.copytree(saved / "xl", tmp_path / "xl"))
    edit_json(folder / "model_index.json", force_zeros_for_empty_prompt=False)
    told = load(folder).denoise(x_t, tau, [None])
    assert_close(told, theirs(hidden, pooled), share=1e-5)
    assert not torch.allclose(told, zeros, atol=1e-4)


def test_xl_is_told_the_size_of_the_image(saved):
    """Latents of another size come with other size ids, in pixels."""
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(saved / "xl")
    x_t = noise(1, 4, 8, 12)
    added = {"text_embeds": torch.zeros(1, 8), "time_ids": torch.tensor([[16.0, 24, 0, 0, 16, 24]])}
    with torch.no_grad():
        theirs = pipeline.unet(
            x_t, TAU[1:], encoder_hidden_states=torch.zeros(1, 77, 16), added_cond_kwargs=added
        )
    assert_close(load(saved / "xl").denoise(x_t, TAU[1:], [None]), theirs.sample, share=1e-5)


@pytest.mark.parametrize(("family", "part"), [("sd", "vae"), ("xl", "vae"), ("kl", "vqvae")])
def test_encode_and_decode_are_the_vae_of_diffusers(saved, family, part):
    vae = diffusers.AutoencoderKL.from_pretrained(saved / family / part)
    denoiser = load(saved / family)
    with torch.no_grad():
        mode = vae.encode(images()).latent_dist.mode()
        decoded = vae.decode(mode).sample
    latents = denoiser.encode(images())
    torch.testing.assert_close(latents, mode * 1.5)
    torch.testing.assert_close(denoiser.decode(latents), decoded, rtol=1e-4, atol=1e-5)
    spec = denoiser.spec
    assert (spec.channels, spec.height, spec.width, spec.latent, spec.size_multiple) == (3, 16, 16, True, 4)


def test_a_vq_model_quantizes_when_it_decodes(saved):
    vq = diffusers.VQModel.from_pretrained(saved / "vq" / "vqvae")
    denoiser = load(saved / "vq", autoencoder=Autoencoder(scale=2.5))
    with torch.no_grad():
        encoded = vq.encode(images()).latents
        decoded = vq.decode(encoded).sample
        unquantized = vq.decode(encoded, force_not_quantize=True).sample
    latents = denoiser.encode(images())
    torch.testing.assert_close(latents, encoded * 2.5)
    torch.testing.assert_close(denoiser.decode(latents), decoded, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(decoded, unquantized, atol=1e-3)


def test_channel_means_of_latents(saved, tmp_path):
    """XL's relatives give a mean and a std for each latent channel."""
    mean, std = [0.5, -0.5, 0.1, 0.0], [2.0, 0.5, 1.0, 3.0]
    folder = Path(shutil.copytree(saved / "xl", tmp_path / "xl"))
    edit_json(folder / "vae" / "config.json", latents_mean=mean, latents_std=std)
    plain, shifted = load(saved / "xl"), load(folder)
    raw = plain.encode(images()) / 1.5
    rows = [torch.tensor(value).view(1, 4, 1, 1) for value in (mean, std)]
    torch.testing.assert_close(shifted.encode(images()), (raw - rows[0]) * 1.5 / rows[1])
    torch.testing.assert_close(
        shifted.decode(shifted.encode(images())), plain.decode(plain.encode(images())), rtol=1e-4, atol=1e-5
    )


def test_a_tiny_autoencoder(saved, tmp_path):
    folder = Path(shutil.copytree(saved / "sd", tmp_path / "sd"))
    shutil.rmtree(folder / "vae")
    blocks = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    counts = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    tiny = diffusers.AutoencoderTiny(**blocks, **counts).eval()
    tiny.save_pretrained(folder / "vae")
    denoiser = load(folder)
    with torch.no_grad():
        expected = tiny.encode(images()).latents
        torch.testing.assert_close(denoiser.encode(images()), expected)
        torch.testing.assert_close(denoiser.decode(expected), tiny.decode(expected).sample)
    assert (denoiser.spec.height, denoiser.spec.size_multiple) == (16, 4)


@pytest.mark.parametrize(("scale", "warned"), [(0.18215, True), (3.0, False)])
def test_a_wrong_scale_is_told_once(saved, monkeypatch, caplog, scale, warned):
    """VQModel's default scale on a model trained without one: garbage that nothing else would notice."""
    monkeypatch.setattr(autoencoder, "_warned", set())
    denoiser = load(saved / "vq", autoencoder=Autoencoder(scale=scale))
    with caplog.at_level(logging.WARNING):
        for seed in range(20):
            denoiser.encode(images(seed=seed))
    assert [("model.autoencoder.scale" in text, "vqvae" in text) for text in caplog.messages] == [
        (True, True)
    ] * warned


@pytest.mark.parametrize("family", ["vq", "kl"])
def test_ldm_samples_like_its_pipeline(saved, family):
    pipeline = diffusers.LDMPipeline.from_pretrained(saved / family)
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(
        batch_size=2, generator=torch.Generator().manual_seed(3), num_inference_steps=10, output_type="np"
    ).images
    denoiser = load(saved / family)
    schedule = build_schedule(
        denoiser.spec.levels, grid="leading", steps=10, t=("fraction", 1.0), start="diffusers-strength"
    )
    solver = build_solver(schedule, prediction="epsilon", eta=0.0, clip_range=denoiser.spec.clip_range)
    x_t = noise(2, pipeline.unet.config.in_channels, 8, 8, seed=3)
    for i in range(schedule.n, 0, -1):
        node = torch.full((2,), i)
        output = denoiser.denoise(x_t, schedule.tau[node], [None] * 2)
        x_t, _ = step(solver.table[node], x_t, output, None)
    images = (denoiser.decode(x_t) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert abs(images - made).max() < 1e-4
    assert made.std() > 0.01
    assert (denoiser.spec.conditioning, denoiser.spec.latent) == ("none", True)


def test_a_class_conditional_latent_model(tmp_path):
    tiny_latents.ldm(tiny_latents.vq(), num_class_embeds=4).save_pretrained(tmp_path / "model")
    unet = diffusers.UNet2DModel.from_pretrained(tmp_path / "model" / "unet")
    denoiser = load(tmp_path / "model", class_labels=ClassLabels(null_label=3, guidance=2.0))
    x_t = noise(2, 3, 8, 8)
    with torch.no_grad():
        conditional, nothing = (
            unet(x_t, TAU.long(), torch.tensor(labels)).sample for labels in ([0, 2], [3, 3])
        )
    expected = nothing + 2.0 * (conditional - nothing)
    torch.testing.assert_close(denoiser.denoise(x_t, TAU, [0, 2]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("family", "upcast"), [("sd", False), ("xl", True)])
def test_half_precision_and_its_float32_twin(saved, family, upcast):
    """XL's autoencoder says force_upcast; the twin is the same model, loaded in full."""
    full, half = load(saved / family), load(saved / family, dtype="bfloat16")
    x_t = noise(2, 4, 8, 8)
    expected, rough = full.denoise(x_t, TAU, [None] * 2), half.denoise(x_t, TAU, [None] * 2)
    assert rough.dtype == torch.float32
    error = (rough - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert 0 < error < 0.05
    assert torch.equal(half.encode(images()), full.encode(images())) is upcast
    assert torch.equal(half.decode(x_t), full.decode(x_t)) is upcast
    assert half.decode(x_t).isfinite().all()
    twin = half.in_float32()
    assert torch.equal(twin.denoise(x_t, TAU, [None] * 2), expected)
    assert half.in_float32() is twin
    assert full.in_float32() is full
    in_full = load(saved / family, dtype="bfloat16", autoencoder=Autoencoder(float32=True))
    assert torch.equal(in_full.encode(images()), full.encode(images()))


def test_channels_last_changes_the_layout_only(saved):
    x_t = noise(2, 4, 8, 8)
    plain, last = load(saved / "sd"), load(saved / "sd", channels_last=True)
    assert last.network.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    for ours, theirs in (
        (last.denoise(x_t, TAU, [None] * 2), plain.denoise(x_t, TAU, [None] * 2)),
        (last.encode(images()), plain.encode(images())),
        (last.decode(x_t), plain.decode(x_t)),
    ):
        assert ours.is_contiguous()
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_a_compiled_network_is_the_same_network(saved, monkeypatch):
    """Captured whole, for one shape; the backend that generates code takes minutes and is torch's own."""
    asked, compile_ = [], torch.compile

    def capture(module, **options):
        asked.append(options)
        return compile_(module, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", capture)
    x_t = noise(2, 4, 8, 8)
    plain, compiled = load(saved / "sd"), load(saved / "sd", compile=True)
    torch.testing.assert_close(
        compiled.denoise(x_t, TAU, [None] * 2), plain.denoise(x_t, TAU, [None] * 2), rtol=1e-4, atol=1e-5
    )
    assert asked == [{"dynamic": False}]


def test_older_files_are_read_as_the_pipeline_reads_them(tmp_path):
    """StableDiffusionPipeline overrules a scheduler file without steps_offset or with clip_sample."""
    old = tiny_latents.scheduler(clip_sample=True, steps_offset=0)
    pipeline = tiny_latents.stable_diffusion()
    pipeline.save_pretrained(tmp_path / "sd")
    old.save_pretrained(tmp_path / "sd" / "scheduler")
    spec = load(tmp_path / "sd").spec
    assert (spec.levels.steps_offset, spec.clip_range) == (1, None)


def test_the_safety_checker_flags_what_diffusers_flags(tmp_path):
    shown = images(24)
    counts = []
    for special in (1.0, -1.0):  # no image near a concept of special care, or every one
        checker = tiny_latents.safety_checker(0.015, special)
        pipeline = tiny_latents.stable_diffusion(safety=checker)
        folder = tmp_path / f"special{special}"
        pipeline.save_pretrained(folder)
        _, theirs = pipeline.run_safety_checker(shown.clone(), "cpu", torch.float32)
        denoiser = load(folder, safety="keep")
        assert denoiser.spec.safety
        assert denoiser.flagged(shown) == theirs
        counts.append(sum(theirs))
    assert 0 < counts[0] < counts[1] < 24
    assert not load(folder).spec.safety
    assert load(folder).flagged(shown) == [False] * 24
    assert load(folder).spec.digest != denoiser.spec.digest


def refusal(folder: Path, **options) -> str:
    with pytest.raises(ModelError) as caught:
        load(folder, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("family", "options", "words"),
    [
        ("sd", {"safety": "keep"}, ["model.safety", "no safety checker"]),
        ("vq", {"safety": "drop"}, ["model.safety", "no safety checker"]),
        ("sd", {"class_labels": ClassLabels()}, ["takes prompts", "model.class_labels"]),
        ("vq", {"prompts": Prompts()}, ["takes no prompts", "model.prompts"]),
        ("vq", {"patch_size": 2}, ["model.patch_size 2"]),
        ("vq", {"class_labels": ClassLabels()}, ["unconditional"]),
    ],
)
def test_what_a_recipe_can_not_ask(saved, family, options, words):
    message = refusal(saved / family, **options)
    assert all(word in message for word in words)


@pytest.mark.parametrize(
    ("family", "file", "changes", "words"),
    [
        ("sd", "unet/config.json", {"in_channels": 9}, ["out_channels 4", "in_channels 9"]),
        ("sd", "unet/config.json", {"in_channels": 9, "out_channels": 9}, ["in_channels 9", "4 channels"]),
        ("sd", "unet/config.json", {"time_cond_proj_dim": 8}, ["time_cond_proj_dim 8"]),
        ("sd", "unet/config.json", {"class_embed_type": "timestep"}, ["class_embed_type"]),
        ("sd", "unet/config.json", {"cross_attention_dim": 32}, ["cross_attention_dim 32", "give 8"]),
        ("sd", "unet/config.json", {"_class_name": "UNet3DConditionModel"}, ["UNet3DConditionModel"]),
        ("xl", "unet/config.json", {"addition_embed_type": None}, ["addition_embed_type", "text_time"]),
        ("xl", "model_index.json", {"requires_aesthetics_score": True}, ["requires_aesthetics_score"]),
        ("xl", "model_index.json", {"text_encoder": [None, None]}, ["lists no text_encoder"]),
        ("sd", "vae/config.json", {"_class_name": "AutoencoderDC"}, ["AutoencoderDC", "AutoencoderKL"]),
        ("vq", "unet/config.json", {"in_channels": 4, "out_channels": 4}, ["in_channels 4", "3 channels"]),
        ("sd", "text_encoder/config.json", {"architectures": ["BertModel"]}, ["BertModel", "CLIPTextModel"]),
        ("sd", "scheduler/scheduler_config.json", {"variance_type": "learned_range"}, ["learned_range"]),
    ],
)
def test_what_is_not_supported_is_named(saved, tmp_path, family, file, changes, words):
    folder = Path(shutil.copytree(saved / family, tmp_path / "model"))
    edit_json(folder / file, **changes)
    message = refusal(folder)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "text_encoder_2"])
def test_every_part_is_loaded_strictly(saved, tmp_path, part):
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(saved / "xl", tmp_path / "model"))
    (path,) = (folder / part).glob("*.safetensors")
    tensors = load_file(path)
    del tensors[sorted(tensors)[0]]
    save_file(tensors, path, metadata={"format": "pt"})
    message = refusal(folder)
    assert str(folder / part) in message
    assert "missing keys" in message
    path.rename(path.with_name("model.bin"))
    assert "pickle" in refusal(folder)


@pytest.mark.parametrize(
    "file",
    [
        "unet/config.json",
        "scheduler/scheduler_config.json",
        "vae/config.json",
        "text_encoder/config.json",
        "text_encoder_2/config.json",
        "tokenizer/tokenizer_config.json",
        "tokenizer_2/tokenizer.json",
        "model_index.json",
    ],
)
def test_the_digest_tells_of_every_part(saved, tmp_path, file):
    from boomerang_batch.models.families import find_model

    folder = Path(shutil.copytree(saved / "xl", tmp_path / "model"))
    before = find_model(ModelSpec(source=str(folder))).digest
    assert before == find_model(ModelSpec(source=str(saved / "xl"))).digest
    (folder / file).write_text((folder / file).read_text() + "\n")
    assert find_model(ModelSpec(source=str(folder))).digest != before


def test_unknown_pipelines_are_told_what_is_supported(tmp_path):
    folder = tiny_models.save_pipeline(tmp_path / "model")
    edit_json(folder / "model_index.json", _class_name="WanPipeline")
    message = refusal(folder)
    assert all(name in message for name in ("WanPipeline", "StableDiffusionXLPipeline", "LDMPipeline"))
