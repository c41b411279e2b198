"""Stable Diffusion 3 and Flux: whole walks and single calls against diffusers' own img2img pipelines."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import FluxImg2ImgPipeline, StableDiffusion3Img2ImgPipeline
from torch import Tensor

from boomerang_batch.config.pipeline import ClassLabels, ModelSpec, Prompts
from boomerang_batch.diffusion.boomerang import boomerang
from boomerang_batch.diffusion.denoiser import Denoiser
from boomerang_batch.diffusion.samplers import build_solver
from boomerang_batch.diffusion.schedule import build_schedule
from boomerang_batch.errors import ModelError
from boomerang_batch.models import load_denoiser, with_guidance
from boomerang_batch.models.flux import pack, token_places, unpack
from tests import tiny_transformers
from tests.oracles import GivenNoise

pytestmark = pytest.mark.slow

PROMPTS = ["a person", "two cats, sleeping", ""]
FAMILIES = ["sd3", "sd3-without-t5", "flux-dev", "flux-schnell"]

MAKERS: dict[str, Callable] = {
    "sd3": tiny_transformers.sd3,
    "sd3-without-t5": lambda: tiny_transformers.sd3(with_t5=False),
    "flux-dev": tiny_transformers.flux,
    "flux-schnell": lambda: tiny_transformers.flux(
        guidance_embeds=False, use_dynamic_shifting=False, shift=1.0
    ),
}


@pytest.fixture(autouse=True)
def process_numerics():
    """Loading a model settles the process's numerics; give the next test what was there."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)
    torch.set_float32_matmul_precision(precision)


class Saved:
    """A pipeline in memory as diffusers' img2img, and the folder it was saved to."""

    def __init__(self, family: str, folder: Path) -> None:
        made = MAKERS[family]()
        made.save_pretrained(folder)
        self.folder = folder
        kind = FluxImg2ImgPipeline if family.startswith("flux") else StableDiffusion3Img2ImgPipeline
        self.pipeline = kind(**made.components)
        self.pipeline.set_progress_bar_config(disable=True)

    def img2img(self, latents: Tensor, *, seed: int, strength: float, steps: int, **options) -> Tensor:
        """The pipeline's latents, of our shape, from these latents of an image and noise of `seed`."""
        factor = self.pipeline.vae_scale_factor
        height, width = (side * factor for side in latents.shape[2:])
        moved = self.pipeline(
            PROMPTS[: len(latents)],
            image=latents,
            height=height,
            width=width,
            strength=strength,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
            **options,
        ).images
        if moved.ndim == 3:
            moved = FluxImg2ImgPipeline._unpack_latents(moved, height, width, factor)
        return moved


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Callable[[str], Saved]:
    made: dict[str, Saved] = {}

    def get(family: str) -> Saved:
        if family not in made:
            made[family] = Saved(family, tmp_path_factory.mktemp(family) / "model")
        return made[family]

    return get


@functools.cache
def load(folder: Path, prompts: Prompts = Prompts(field="txt"), dtype: str = "float32") -> Denoiser:  # noqa: B008
    """Loaded once for all tests: denoisers don't change."""
    return load_denoiser(ModelSpec(source=str(folder), prompts=prompts, dtype=dtype), device="cpu", threads=1)


def noise(*shape: int, seed: int = 7) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def draw(denoiser: Denoiser, latents: Tensor, *, seed: int, strength: float, steps: int) -> Tensor:
    height, width = (2 * side for side in latents.shape[2:])
    schedule = build_schedule(
        denoiser.spec.levels_at(height, width),
        grid="linspace",
        steps=steps,
        t=("fraction", strength),
        start="diffusers-strength",
    )
    solver = build_solver(schedule, prediction=denoiser.spec.prediction, eta=0.0)
    eps = GivenNoise(noise(*latents.shape, seed=seed))
    return boomerang(latents, denoiser, schedule, solver, eps, PROMPTS[: len(latents)])


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    """Equal to 1e-4 of their RMS."""
    assert ours.shape == theirs.shape
    rms = float(theirs.square().mean().sqrt())
    assert float((ours - theirs).abs().max()) < 1e-4 * rms


# --- whole walks ---


WALKS = pytest.mark.parametrize(
    ("steps", "strength", "guidance"),
    [(13, 0.3, 1.0), (13, 0.3, 5.0), (10, 0.35, 5.0), (4, 1.0, 1.0), (1, 0.5, 5.0)],
)


@WALKS
@pytest.mark.parametrize("family", ["sd3", "sd3-without-t5"])
def test_sd3_is_diffusers_img2img(saved, family, guidance, steps, strength):
    theirs = saved(family)
    denoiser = load(
        theirs.folder, Prompts(field="txt", negative="blurry" if guidance != 1 else "", guidance=guidance)
    )
    latents = noise(3, 16, 8, 8, seed=1)
    expected = theirs.img2img(
        latents,
        seed=3,
        strength=strength,
        steps=steps,
        guidance_scale=guidance,
        negative_prompt=["blurry"] * 3,
    )
    assert_same(draw(denoiser, latents, seed=3, strength=strength, steps=steps), expected)


@WALKS
def test_flux_with_guidance_as_an_input_is_diffusers_img2img(saved, guidance, steps, strength):
    theirs = saved("flux-dev")
    denoiser = load(theirs.folder, Prompts(field="txt", guidance=guidance))
    latents = noise(3, 16, 8, 8, seed=1)
    expected = theirs.img2img(latents, seed=3, strength=strength, steps=steps, guidance_scale=guidance)
    assert_same(draw(denoiser, latents, seed=3, strength=strength, steps=steps), expected)


@WALKS
def test_flux_without_is_diffusers_img2img_with_true_guidance(saved, guidance, steps, strength):
    theirs = saved("flux-schnell")
    denoiser = load(
        theirs.folder, Prompts(field="txt", negative="blurry" if guidance != 1 else "", guidance=guidance)
    )
    latents = noise(3, 16, 8, 8, seed=1)
    expected = theirs.img2img(
        latents,
        seed=3,
        strength=strength,
        steps=steps,
        true_cfg_scale=guidance,
        negative_prompt=["blurry"] * 3,
    )
    assert_same(draw(denoiser, latents, seed=3, strength=strength, steps=steps), expected)


@pytest.mark.parametrize("size", [(4, 8), (16, 12)])
@pytest.mark.parametrize("family", ["sd3", "flux-dev"])
def test_other_sizes_are_diffusers_img2img_too(saved, family, size):
    """Flux's shift is another one there; rows and columns must not be mixed up."""
    theirs = saved(family)
    denoiser = load(theirs.folder, Prompts(field="txt", guidance=1.0))
    latents = noise(2, 16, *size, seed=1)
    expected = theirs.img2img(latents, seed=3, strength=0.7, steps=6, guidance_scale=1.0)
    assert_same(draw(denoiser, latents, seed=3, strength=0.7, steps=6), expected)


# --- what the network is told ---


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_are_what_diffusers_says(saved, family):
    theirs, denoiser = saved(family), load(saved(family).folder)
    with torch.no_grad():
        if family.startswith("flux"):
            sequence, pooled, _ = theirs.pipeline.encode_prompt(PROMPTS, None, device="cpu")
        else:
            sequence, _, pooled, _ = theirs.pipeline.encode_prompt(
                PROMPTS, None, None, device="cpu", do_classifier_free_guidance=False
            )
    told = denoiser.book.look_up(PROMPTS)
    torch.testing.assert_close(torch.stack([one.sequence for one in told]), sequence, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.stack([one.pooled for one in told]), pooled, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(told[0].pooled, told[1].pooled, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_row_has_its_own_prompt_and_level(saved, family):
    denoiser = load(saved(family).folder)
    x_t = noise(3, 16, 8, 8)
    tau = torch.tensor([950.0, 400.25, 3.0], dtype=torch.float64)
    together = denoiser.denoise(x_t, tau, PROMPTS)
    for row in range(3):
        alone = denoiser.denoise(x_t[row : row + 1], tau[row : row + 1], PROMPTS[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together, denoiser.denoise(x_t, tau, PROMPTS[::-1]), atol=1e-4)
    assert not torch.allclose(together, denoiser.denoise(x_t, tau.flip(0), PROMPTS), atol=1e-4)
    assert together.dtype == torch.float32
    assert not together.requires_grad


@pytest.mark.parametrize("family", ["sd3", "flux-schnell"])
def test_guidance_rescale_restores_the_spread(saved, family):
    plain = load(saved(family).folder)
    rescaled = load(saved(family).folder, Prompts(field="txt", negative="blurry", guidance=6.0, rescale=1.0))
    x_t, tau = noise(3, 16, 8, 8), torch.full((3,), 500.0, dtype=torch.float64)
    expected = plain.denoise(x_t, tau, PROMPTS).std(dim=(1, 2, 3))
    torch.testing.assert_close(rescaled.denoise(x_t, tau, PROMPTS).std(dim=(1, 2, 3)), expected)


@pytest.mark.parametrize("family", ["sd3", "flux-dev", "flux-schnell"])
def test_another_weight_of_guidance_is_the_model_loaded_with_it_its_network_shared(saved, family):
    plain = load(saved(family).folder)
    x_t, tau = noise(3, 16, 8, 8), torch.full((3,), 500.0, dtype=torch.float64)
    for weight in (3.0, 1.0):
        expected = load(saved(family).folder, Prompts(field="txt", guidance=weight)).denoise(x_t, tau, PROMPTS)
        again = with_guidance(with_guidance(plain, 5.0), weight)
        assert torch.equal(again.denoise(x_t, tau, PROMPTS), expected)
        assert again.book is plain.book


def test_the_recipe_s_own_prompts_are_known_after_the_encoders_are_gone(saved):
    prompts = Prompts(text="a person", negative="blurry", guidance=2.0)
    denoiser = load(saved("sd3").folder, prompts)
    each = load(saved("sd3").folder, prompts.model_copy(update={"text": "", "field": "txt"}))
    x_t, tau = noise(2, 16, 8, 8), torch.full((2,), 500.0, dtype=torch.float64)
    expected = each.denoise(x_t, tau, ["a person", ""])
    # None: the recipe's prompt; the empty one is what the engine's idle slots are told.
    assert torch.equal(denoiser.denoise(x_t, tau, [None, ""]), expected)
    with pytest.raises(ModelError, match=r"model\.prompts\.field"):
        denoiser.denoise(x_t, tau, ["a person", "another one"])


# --- packing ---


def test_packing_is_diffusers_own():
    x = noise(2, 16, 6, 10)
    packed = pack(x)
    assert torch.equal(packed, FluxImg2ImgPipeline._pack_latents(x, 2, 16, 6, 10))
    assert torch.equal(unpack(packed, 6, 10), x)
    ids = FluxImg2ImgPipeline._prepare_latent_image_ids(2, 3, 5, torch.device("cpu"), torch.float32)
    assert torch.equal(token_places(6, 10, torch.device("cpu")), ids)


# --- latents ---


@pytest.mark.parametrize("family", ["sd3", "flux-dev"])
def test_latents_are_shifted_and_scaled_as_diffusers_does(saved, family):
    theirs, denoiser = saved(family).pipeline, load(saved(family).folder)
    images = noise(2, 3, 16, 16).clamp(-1, 1)
    with torch.no_grad():
        mode = theirs.vae.encode(images).latent_dist.mode()
        latents = (mode - theirs.vae.config.shift_factor) * theirs.vae.config.scaling_factor
        decoded = theirs.vae.decode(latents / theirs.vae.config.scaling_factor + theirs.vae.config.shift_factor)
    torch.testing.assert_close(denoiser.encode(images), latents)
    torch.testing.assert_close(denoiser.decode(latents), decoded.sample)
    assert denoiser.encode(images).shape == (2, 16, 8, 8)


# --- facts and refusals ---


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_model_is(saved, family):
    spec = load(saved(family).folder).spec
    assert (spec.channels, spec.height, spec.width, spec.value_range) == (3, 16, 16, (-1.0, 1.0))
    assert (spec.size_multiple, spec.latent, spec.learned_variance) == (4, True, False)
    assert (spec.prediction, spec.clip_range, spec.fractional_tau) == ("flow", None, True)
    assert (spec.conditioning, spec.classes) == ("prompt", None)
    assert spec.levels.kind == "flow"
    assert spec.levels.tau[-1] == 1000


def test_only_flux_s_levels_follow_the_size(saved):
    flux, sd3 = (load(saved(family).folder).spec for family in ("flux-dev", "sd3"))
    assert float(flux.levels_at(32, 16).shift) > float(flux.levels_at(16, 16).shift)
    assert torch.equal(sd3.levels_at(32, 16).sigma, sd3.levels.sigma)
    assert torch.equal(flux.levels_at(16, 16).sigma, flux.levels.sigma)


def test_sd3_refuses_images_beyond_its_table_of_places(saved):
    spec = load(saved("sd3").folder).spec
    spec.levels_at(32, 32)
    with pytest.raises(ModelError, match=r"pos_embed_max_size is 8; the longest side is 32 pixels"):
        spec.levels_at(16, 36)


@pytest.mark.parametrize("extra", [{"negative": "blurry"}, {"rescale": 0.7}])
def test_flux_with_guidance_as_an_input_refuses_what_would_be_ignored(saved, extra):
    with pytest.raises(ModelError, match="guidance_embeds"):
        load(saved("flux-dev").folder, Prompts(guidance=3.0, **extra))


def test_labels_are_refused(saved):
    spec = ModelSpec(source=str(saved("sd3").folder), class_labels=ClassLabels())
    with pytest.raises(ModelError, match="class_labels"):
        load_denoiser(spec, device="cpu", threads=1)


@pytest.mark.parametrize(
    ("family", "part", "change", "message"),
    [
        ("sd3", "transformer/config.json", {"in_channels": 33}, "in_channels 33"),
        ("sd3", "transformer/config.json", {"patch_size": 4}, "patch_size 4"),
        ("sd3", "transformer/config.json", {"joint_attention_dim": 8}, "joint_attention_dim is 8"),
        (
            "sd3-without-t5",
            "transformer/config.json",
            {"joint_attention_dim": 8},
            "both CLIPs together give 16",
        ),
        ("sd3", "transformer/config.json", {"pooled_projection_dim": 8}, "pooled_projection_dim is 8"),
        ("sd3", "transformer/config.json", {"sample_size": None}, "sample_size is None"),
        ("flux-dev", "transformer/config.json", {"in_channels": 384}, "in_channels 384"),
        ("flux-dev", "transformer/config.json", {"joint_attention_dim": 8}, "joint_attention_dim is 8"),
        ("flux-dev", "vae/config.json", {"sample_size": None}, "sample_size is None"),
        ("flux-dev", "scheduler/scheduler_config.json", {"shift_terminal": 0.02}, "shift_terminal"),
        ("flux-dev", "scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler"}, "DDIMScheduler"),
        ("flux-dev", "model_index.json", {"text_encoder": [None, None]}, "text_encoder"),
        ("sd3", "model_index.json", {"text_encoder_2": [None, None]}, "text_encoder_2"),
    ],
)
def test_folders_that_don_t_fit_are_refused(saved, tmp_path, family, part, change, message):
    folder = tmp_path / "model"
    shutil.copytree(saved(family).folder, folder)
    where = folder / part
    config = json.loads(where.read_text()) | change
    where.write_text(json.dumps({field: value for field, value in config.items() if value is not None}))
    with pytest.raises(ModelError, match=message):
        load(folder)


# --- precision ---


@pytest.mark.parametrize("family", ["sd3", "flux-dev"])
def test_half_precision_has_a_twin_in_full(saved, family):
    full, half = load(saved(family).folder), load(saved(family).folder, dtype="bfloat16")
    x_t, tau = noise(3, 16, 8, 8), torch.tensor([950.0, 400.25, 3.0], dtype=torch.float64)
    exact, rough = full.denoise(x_t, tau, PROMPTS), half.denoise(x_t, tau, PROMPTS)
    assert rough.dtype == torch.float32
    assert 1e-4 < float((rough - exact).abs().max()) < 0.2
    assert torch.equal(half.in_float32().denoise(x_t, tau, PROMPTS), exact)
    assert half.in_float32() is half.in_float32()
    assert full.in_float32() is full
