"""Codes beside diffusers' own, CycleDiffusionPipeline and LEDITS++ with DDIM: random weights, equal noise."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, LEditsPPPipelineStableDiffusion
from diffusers.pipelines.deprecated.stable_diffusion_variants import pipeline_cycle_diffusion as cycle
from diffusers.pipelines.ledits_pp import pipeline_leditspp_stable_diffusion as ledits
from torch import Tensor

from boomerang_batch.diffusion.codes import Code, decode, encode, noise_maps
from boomerang_batch.diffusion.denoiser import Condition
from boomerang_batch.diffusion.samplers import Solver, build_solver
from boomerang_batch.diffusion.schedule import Schedule, build_schedule, vp_levels
from tests import tiny_latents

STEPS = 10


class Told:
    """A UNet under the text states that a condition numbers."""

    def __init__(self, unet: Any, states: Sequence[Tensor]) -> None:
        self._unet, self._states = unet, states

    def denoise(self, x_t: Tensor, tau: Tensor, conditions: Sequence[Condition]) -> Tensor:
        states = torch.cat([self._states[int(condition or 0)] for condition in conditions])
        with torch.no_grad():
            return self._unet(x_t, tau, encoder_hidden_states=states).sample


class Guided:
    """`Told`, classifier-free guided away from the last of its states, as the papers' codes do it."""

    def __init__(self, unet: Any, states: Sequence[Tensor], weight: float) -> None:
        self._told, self._weight, self._empty = Told(unet, states), weight, len(states) - 1

    def denoise(self, x_t: Tensor, tau: Tensor, conditions: Sequence[Condition]) -> Tensor:
        told = self._told.denoise(x_t, tau, conditions)
        if self._weight == 1:
            return told
        untold = self._told.denoise(x_t, tau, [self._empty] * len(x_t))
        return untold + self._weight * (told - untold)


class Draws:
    """Known normals, in the order in which they are asked for; stands for diffusers' randn_tensor."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(5)
        self.given: list[Tensor] = []

    def __call__(self, shape: Sequence[int], **_: object) -> Tensor:
        self.given.append(torch.randn(tuple(shape), generator=self._generator))
        return self.given[-1]


class Listed:
    """Noise as a list has it: for the jump, and for the steps that leave the nodes n, n - 1, ..."""

    def __init__(self, jump: Tensor, steps: Sequence[Tensor]) -> None:
        self._jump, self._steps = jump, steps

    def forward(self, node: Tensor) -> Tensor:
        return self._jump

    def reverse(self, node: Tensor) -> Tensor:
        place = len(self._steps) - int(node[0])
        return self._steps[place] if 0 <= place < len(self._steps) else torch.zeros_like(self._jump)


def scheduler() -> DDIMScheduler:
    """As Stable Diffusion has it: one up, and ending at the chain's first level instead of clean."""
    return DDIMScheduler(
        num_train_timesteps=100, beta_end=0.06, steps_offset=1, set_alpha_to_one=False, clip_sample=False
    )


def walk(strength: float, eta: float, steps: int = STEPS) -> tuple[Schedule, Solver]:
    bars = scheduler().alphas_cumprod.double()
    end = (float(bars[0].sqrt()), float((1 - bars[0]).sqrt()))
    levels = dataclasses.replace(vp_levels(bars), steps_offset=1, end=end)
    schedule = build_schedule(
        levels, grid="leading", steps=steps, t=("fraction", strength), start="diffusers-strength"
    )
    return schedule, build_solver(schedule, prediction="epsilon", eta=eta)


def far(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt())


@pytest.mark.slow
@pytest.mark.parametrize("eta", [0.1, 1.0])
@pytest.mark.parametrize("strength", [0.3, 0.8, 1.0])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 5.0), (3.0, 2.0)])
def test_cycle_diffusion_is_diffusers(weights, strength, eta, monkeypatch):
    """With the source's guidance while the code is drawn, and the target's while it is decoded."""
    parts = tiny_latents.stable_diffusion(noise=scheduler())
    pipeline = cycle.CycleDiffusionPipeline(
        vae=parts.vae,
        text_encoder=parts.text_encoder,
        tokenizer=parts.tokenizer,
        unet=parts.unet,
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    draws, clean = Draws(), []
    real = cycle.posterior_sample

    def watched(scheduler: Any, latents: Tensor, timestep: Any, clean_latents: Tensor, **rest: Any) -> Tensor:
        clean.append(clean_latents)
        return real(scheduler, latents, timestep, clean_latents, **rest)

    monkeypatch.setattr(cycle, "posterior_sample", watched)
    monkeypatch.setattr(cycle, "randn_tensor", draws)
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    settings = {"strength": strength, "num_inference_steps": STEPS, "eta": eta}
    told = {"prompt": "a red cat", "source_prompt": "a dog"}
    told |= {"source_guidance_scale": weights[0], "guidance_scale": weights[1]}
    theirs = pipeline(image=image, output_type="latent", **told, **settings).images

    states = [pipeline.encode_prompt(text, "cpu", 1, False)[0] for text in ("a dog", "a red cat", "")]
    schedule, solver = walk(strength, eta)
    model, decoder = (Guided(parts.unet, states, weight) for weight in weights)
    x_0 = clean[0]
    noise = Listed(draws.given[0], [*draws.given[1:], torch.zeros_like(x_0)])
    code = encode(x_0, model, schedule, solver, noise, [0], path="dpm-encoder")
    ours = decode(code, decoder, schedule, solver, [1])
    assert far(ours, theirs) < 1e-4
    assert far(decode(code, model, schedule, solver, [0]), x_0) < 1e-5
    assert far(ours, x_0) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("skip", [0.0, 0.3])
def test_edit_friendly_inversion_is_that_of_ledits(skip, monkeypatch):
    """But for eta below 1, which it does not offer, and skip, which is where our walk begins."""
    parts = tiny_latents.stable_diffusion(noise=scheduler())
    pipeline = LEditsPPPipelineStableDiffusion(
        vae=parts.vae,
        text_encoder=parts.text_encoder,
        tokenizer=parts.tokenizer,
        unet=parts.unet,
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    draws = Draws()
    monkeypatch.setattr(ledits, "randn_tensor", draws)
    add_noise = pipeline.scheduler.add_noise
    # It indexes a table by a float, which this scheduler takes no more.
    monkeypatch.setattr(pipeline.scheduler, "add_noise", lambda x, eps, t: add_noise(x, eps, t.long()))
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    pipeline.invert(image, source_prompt="", num_inversion_steps=STEPS, skip=skip)
    x_0, _ = pipeline.encode_image(image)

    empty = pipeline.encode_prompt(
        num_images_per_prompt=1, device="cpu", enable_edit_guidance=True, editing_prompt=""
    )[0]
    count = len(pipeline.zs)
    grid = int(STEPS * (1 + skip))
    schedule, solver = walk(STEPS / grid, 1.0, grid)
    assert schedule.n == count
    # Theirs come from the lowest level up, ours are asked for by the step that leads to a level.
    noise = Listed(draws.given[count - 1], [*reversed(draws.given[: count - 1]), torch.zeros_like(x_0)])
    model = Told(parts.unet, [empty])
    code = encode(x_0, model, schedule, solver, noise, [0], path="edit-friendly")
    assert far(code.x_n, pipeline.init_latents) < 1e-4
    maps = noise_maps(code, solver).flip(0)[:count]
    assert far(maps[:-1], pipeline.zs[:-1]) < 1e-4
    assert far(decode(code, model, schedule, solver, [0]), x_0) < 1e-5


def test_a_clean_end_loses_the_last_step_in_diffusers_and_not_here(monkeypatch):
    """set_alpha_to_one leaves the last step without noise: LEDITS++ sets its map to 0, and the image is off."""
    noise = DDIMScheduler(
        num_train_timesteps=100, beta_end=0.06, set_alpha_to_one=True, clip_sample=False, steps_offset=0
    )
    noise.set_timesteps(STEPS)
    x_0, eps = (torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(2))
    x_t = noise.add_noise(x_0, eps, torch.tensor([0]))
    z, reached = ledits.compute_noise_ddim(noise, x_0, x_t, 0, 0.9 * eps, 1.0)
    assert z.tolist() == [0.0]
    assert far(reached, x_0) > 1e-4
    levels = vp_levels(noise.alphas_cumprod)
    schedule = build_schedule(levels, grid="leading", steps=STEPS, t=("timestep", 1), start="exact")
    solver = build_solver(schedule, prediction="epsilon", eta=1.0)

    class Fixed:
        def denoise(self, x_t: Tensor, tau: Tensor, conditions: Sequence[Condition]) -> Tensor:
            return 0.9 * eps

    code = encode(x_0, Fixed(), schedule, solver, Listed(eps, []), [None], path="edit-friendly")
    assert far(decode(code, Fixed(), schedule, solver, [None]), x_0) < 1e-6
    residuals = code.residuals.clone()
    residuals[1] = 0
    theirs = decode(Code(x_n=code.x_n, residuals=residuals), Fixed(), schedule, solver, [None])
    assert far(theirs, reached) < 1e-4
