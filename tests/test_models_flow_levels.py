"""Flow-matching scheduler configurations read as data, and the nodes of diffusers' img2img over them."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxImg2ImgPipeline, StableDiffusion3Img2ImgPipeline
from diffusers.pipelines.flux.pipeline_flux_img2img import calculate_shift
from hypothesis import given, settings
from hypothesis import strategies as st

from boomerang_batch.diffusion.schedule import NoiseLevels, Schedule, build_schedule
from boomerang_batch.errors import ConfigError, ModelError
from boomerang_batch.models.flow_levels import FlowChain, LowestNode, read_flow_chain

FIXED = {"shift": 3.0}
DYNAMIC = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
LINEAR = DYNAMIC | {"time_shift_type": "linear", "base_image_seq_len": 16, "max_image_seq_len": 64}


def chain_of(scheduler: FlowMatchEulerDiscreteScheduler, lowest_node: LowestNode = "chain") -> FlowChain:
    """Read the configuration as it would be read back from a saved folder."""
    return read_flow_chain(json.loads(scheduler.to_json_string()), source="there", lowest_node=lowest_node)


def mu_of(scheduler: FlowMatchEulerDiscreteScheduler, tokens: int) -> float:
    """What diffusers' pipelines tell a scheduler about the size, by their own function."""
    config = scheduler.config
    return calculate_shift(
        tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
    )


@pytest.mark.parametrize("shift", [1.0, 1.15, 3.0, 6.0])
@pytest.mark.parametrize("train_steps", [20, 1000])
def test_a_fixed_shift_gives_the_scheduler_s_own_levels(shift, train_steps):
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=train_steps, shift=shift)
    levels = chain_of(scheduler).levels(4096)
    assert levels.kind == "flow"
    assert len(levels) == train_steps
    torch.testing.assert_close(levels.sigma, scheduler.sigmas.flip(0).double(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(levels.tau, scheduler.timesteps.flip(0).double(), rtol=1e-6, atol=1e-4)
    assert torch.equal(levels.alpha, 1 - levels.sigma)


@pytest.mark.parametrize("options", [DYNAMIC, LINEAR])
@pytest.mark.parametrize("tokens", [16, 64, 256, 1024, 4096, 8000])
def test_a_dynamic_shift_grows_with_the_image(options, tokens):
    scheduler = FlowMatchEulerDiscreteScheduler(**options)
    scheduler.set_timesteps(1000, mu=mu_of(scheduler, tokens))  # every level of the chain
    levels = chain_of(scheduler).levels(tokens)
    torch.testing.assert_close(levels.sigma, scheduler.sigmas[:-1].flip(0).double(), rtol=2e-6, atol=1e-7)
    assert chain_of(scheduler).by_size


def test_larger_images_are_noisier():
    chain = chain_of(FlowMatchEulerDiscreteScheduler(**DYNAMIC))
    small, large = chain.levels(256), chain.levels(4096)
    assert bool((small.sigma[:-1] < large.sigma[:-1]).all())
    assert small.shift == pytest.approx(math.exp(0.5))
    assert large.shift == pytest.approx(math.exp(1.15))


def test_a_file_from_before_a_field_existed_means_its_default():
    chain = read_flow_chain(
        {"_class_name": "FlowMatchEulerDiscreteScheduler"}, source="there", lowest_node="step"
    )
    scheduler = FlowMatchEulerDiscreteScheduler()
    torch.testing.assert_close(chain.levels(1).sigma, scheduler.sigmas.flip(0).double(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"invert_sigmas": True}, "invert_sigmas"),
        ({"shift_terminal": 0.02}, "shift_terminal"),
        ({"use_karras_sigmas": True}, "use_karras_sigmas"),
        ({"use_exponential_sigmas": True}, "use_exponential_sigmas"),
        ({"use_beta_sigmas": True}, "use_beta_sigmas"),
        ({"shift": 0}, "shift is 0"),
        ({"shift": "3"}, "shift is '3'"),
        ({"num_train_timesteps": 1}, "num_train_timesteps is 1"),
        ({"_class_name": "FlowMatchHeunDiscreteScheduler"}, "FlowMatchHeunDiscreteScheduler"),
        (DYNAMIC | {"base_image_seq_len": 4096}, "base_image_seq_len 4096"),
        (DYNAMIC | {"time_shift_type": "cubic"}, "'cubic'"),
    ],
)
def test_what_would_change_the_levels_is_refused_by_its_name(options, message):
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler"} | options
    with pytest.raises(ModelError, match=message) as refusal:
        read_flow_chain(config, source="there/scheduler_config.json", lowest_node="step")
    assert "there/scheduler_config.json" in str(refusal.value)


def test_a_linear_shift_below_zero_is_refused():
    chain = chain_of(FlowMatchEulerDiscreteScheduler(**LINEAR | {"base_shift": 0.1, "max_shift": 5.0}))
    assert chain.levels(64).shift == pytest.approx(5.0)
    with pytest.raises(ModelError, match="larger images"):
        chain.levels(1)


# --- the nodes of diffusers' img2img ---


def walked(
    pipeline: type, scheduler: FlowMatchEulerDiscreteScheduler, tokens: int, steps: int, strength: float
) -> tuple[list[float], list[float]]:
    """(sigmas, timesteps) of a diffusers img2img pipeline, ascending, the clean end included in the sigmas.

    All computed by the scheduler's and the pipeline's own code, in the calls made before the loop.
    """
    mu = mu_of(scheduler, tokens) if scheduler.config.use_dynamic_shifting else None
    if pipeline is FluxImg2ImgPipeline:
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    else:
        scheduler.set_timesteps(steps, mu=mu)
    timesteps, _ = pipeline.get_timesteps(SimpleNamespace(scheduler=scheduler), steps, strength, "cpu")
    sigmas = scheduler.sigmas[scheduler.begin_index :]
    return sigmas.flip(0).tolist(), timesteps.flip(0).tolist()


def nodes(levels: NoiseLevels, steps: int, strength: float, grid: str = "linspace") -> Schedule:
    return build_schedule(levels, grid=grid, steps=steps, t=("fraction", strength), start="diffusers-strength")


@pytest.mark.slow
@settings(max_examples=300)
@given(
    pipeline=st.sampled_from([StableDiffusion3Img2ImgPipeline, FluxImg2ImgPipeline]),
    options=st.sampled_from([FIXED, {"shift": 1.0}, DYNAMIC, LINEAR]),
    tokens=st.sampled_from([16, 256, 1024, 4096]),
    steps=st.integers(1, 100),
    strength=st.one_of(st.integers(0, 100).map(lambda percent: percent / 100), st.floats(1e-3, 1)),
)
def test_strength_walks_the_nodes_of_diffusers_img2img(pipeline, options, tokens, steps, strength):
    scheduler = FlowMatchEulerDiscreteScheduler(**options)
    sigmas, timesteps = walked(pipeline, scheduler, tokens, steps, strength)
    lowest: LowestNode = "step" if pipeline is FluxImg2ImgPipeline else "chain"
    schedule = nodes(chain_of(scheduler, lowest).levels(tokens), steps, strength)
    assert schedule.n == len(timesteps)
    expected = torch.tensor(sigmas, dtype=torch.float64)
    torch.testing.assert_close(schedule.sigma, expected, rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(schedule.alpha, 1 - expected, rtol=2e-6, atol=2e-7)
    assert schedule.tau[1:].tolist() == pytest.approx(timesteps, rel=2e-6)


def test_strength_rounds_up_and_sd3_s_lowest_node_is_shifted_twice():
    """28 steps at .6 are 16.8: 17 evaluations. 0.001 shifted by 3 is .002994, and once more .008929."""
    scheduler = FlowMatchEulerDiscreteScheduler(**FIXED)
    schedule = nodes(chain_of(scheduler).levels(4096), 28, 0.6)
    assert schedule.n == 17
    assert float(schedule.sigma[1]) == pytest.approx(0.0089287, rel=1e-4)
    flux = nodes(chain_of(scheduler, "step").levels(4096), 28, 0.6)
    assert float(flux.sigma[1]) == pytest.approx(3 / 28 / (1 + 2 / 28))


@pytest.mark.parametrize("grid", ["leading", "trailing", "step-linear", "step-quadratic", (0, 500, 999)])
def test_strength_knows_no_other_grid_for_flow(grid):
    levels = chain_of(FlowMatchEulerDiscreteScheduler(**FIXED)).levels(4096)
    with pytest.raises(ConfigError, match="grid: linspace"):
        nodes(levels, 3, 0.5, grid)
