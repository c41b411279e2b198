"""Scheduler configurations read as data, against diffusers' own schedulers."""

from __future__ import annotations

import json
import math

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from boomerang_batch.errors import ModelError
from boomerang_batch.models.levels import VP_SCHEDULERS, read_chain

# Some of diffusers' schedulers convert tensors the way NumPy 2 asks them not to.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


def config_of(scheduler) -> dict:
    """The configuration as it would be read back from a saved folder."""
    return json.loads(scheduler.to_json_string())


def assert_same_chain(scheduler, **expected):
    chain = read_chain(config_of(scheduler), source="there")
    # diffusers multiplies float32 betas; 1 - 0.999 alone loses 6e-5 there.
    torch.testing.assert_close(
        chain.levels.alpha.square(), scheduler.alphas_cumprod.double(), rtol=2e-4, atol=2e-7
    )
    torch.testing.assert_close(
        chain.levels.sigma.square(), 1 - scheduler.alphas_cumprod.double(), rtol=2e-4, atol=1e-6
    )
    assert chain.levels.alpha.dtype == chain.levels.sigma.dtype == chain.levels.tau.dtype == torch.float64
    assert chain.levels.tau.tolist() == list(range(len(scheduler.alphas_cumprod)))
    assert (chain.levels.kind, chain.value_range) == ("vp", (-1.0, 1.0))
    for field, value in expected.items():
        assert getattr(chain, field) == value
    return chain


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", VP_SCHEDULERS)
def test_every_scheduler_and_schedule_gives_its_own_alphas(name, schedule):
    assert_same_chain(getattr(diffusers, name)(beta_schedule=schedule, num_train_timesteps=100))


def test_sigmoid_schedule():
    assert_same_chain(diffusers.DDPMScheduler(beta_schedule="sigmoid"))


@settings(max_examples=25, deadline=None)
@given(
    steps=st.integers(2, 300),
    low=st.floats(1e-5, 1e-2),
    high=st.floats(1e-2, 0.5),
    schedule=st.sampled_from(("linear", "scaled_linear", "sigmoid")),
)
def test_any_beta_range(steps, low, high, schedule):
    options = {"num_train_timesteps": steps, "beta_start": low, "beta_end": high, "beta_schedule": schedule}
    assert_same_chain(diffusers.DDPMScheduler(**options))


@pytest.mark.parametrize("options", [{}, {"set_alpha_to_one": True}, {"set_alpha_to_one": False}])
@pytest.mark.parametrize("name", ["DDIMScheduler", "PNDMScheduler"])
def test_where_the_walk_of_ddim_and_pndm_ends(name, options):
    scheduler = getattr(diffusers, name)(**options)
    written = config_of(scheduler)
    if not options:  # a file older than the field: the class's default
        del written["set_alpha_to_one"]
    alpha, sigma = read_chain(written, source="there").levels.end
    final = float(scheduler.final_alpha_cumprod)
    assert (alpha**2, sigma**2) == (pytest.approx(final, rel=1e-6), pytest.approx(1 - final, rel=1e-3))


@pytest.mark.parametrize("last", ["zero", "sigma_min"])
@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_where_the_walk_of_sigmas_ends(name, last):
    options = {"algorithm_type": "dpmsolver++"} if "DPM" in name else {}
    scheduler = getattr(diffusers, name)(final_sigmas_type=last, **options)
    scheduler.set_timesteps(10)
    alpha, sigma = read_chain(config_of(scheduler), source="there").levels.end
    assert sigma / alpha == pytest.approx(float(scheduler.sigmas[-1]), rel=1e-4)


def test_the_offset_and_the_learned_variance_are_read():
    assert_same_chain(diffusers.DDIMScheduler(), learned_variance=False)
    chain = assert_same_chain(diffusers.DDPMScheduler(variance_type="learned_range"), learned_variance=True)
    assert chain.levels.steps_offset == 0
    shifted = read_chain(config_of(diffusers.DDIMScheduler(steps_offset=1)), source="there")
    assert shifted.levels.steps_offset == 1


def test_trained_betas():
    betas = [0.01, 0.3, 0.05, 0.2]
    assert_same_chain(diffusers.DDPMScheduler(num_train_timesteps=4, trained_betas=betas))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_zero_terminal_snr(schedule):
    noise = diffusers.DDPMScheduler(
        beta_schedule=schedule, rescale_betas_zero_snr=True, prediction_type="v_prediction"
    )
    chain = assert_same_chain(noise, prediction="v_prediction")
    assert chain.levels.alpha[-1] == 0


def test_score_sde_ve():
    noise = diffusers.ScoreSdeVeScheduler(num_train_timesteps=30, sigma_min=0.02, sigma_max=90.0)
    chain = read_chain(config_of(noise), source="there")
    torch.testing.assert_close(chain.levels.sigma, noise.discrete_sigmas.double(), rtol=1e-5, atol=0)
    assert chain.levels.alpha.tolist() == [1.0] * 30
    # What ScoreSdeVePipeline tells the network is sigma itself, high to low.
    torch.testing.assert_close(chain.levels.tau.flip(0), noise.sigmas.double(), rtol=1e-4, atol=0)
    assert (chain.levels.kind, chain.prediction, chain.clip_range) == ("ve", "score", None)
    assert chain.value_range == (0.0, 1.0)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_prediction_is_carried_over(prediction):
    assert_same_chain(diffusers.DDPMScheduler(prediction_type=prediction), prediction=prediction)


@pytest.mark.parametrize(
    ("name", "options", "clip"),
    [
        ("DDPMScheduler", {}, 1.0),
        ("DDPMScheduler", {"clip_sample": False}, None),
        ("DDIMScheduler", {"clip_sample_range": 2.5}, 2.5),
        ("HeunDiscreteScheduler", {}, None),
        ("EulerDiscreteScheduler", {}, None),
    ],
)
def test_clip_range(name, options, clip):
    assert_same_chain(getattr(diffusers, name)(**options), clip_range=clip)


def test_clip_sample_means_nothing_to_a_scheduler_that_never_clamps():
    config = config_of(diffusers.EulerDiscreteScheduler()) | {"clip_sample": True}
    assert read_chain(config, source="there").clip_range is None


def test_a_file_older_than_its_fields_reads_as_diffusers_reads_it():
    old = {
        "_class_name": "DDPMScheduler",
        "_diffusers_version": "0.1.1",
        "beta_start": 0.0001,
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "num_train_timesteps": 1000,
        "clip_sample": True,
        "variance_type": "fixed_large",
    }
    chain = read_chain(old, source="there")
    today = diffusers.DDPMScheduler.from_config(old)
    assert (chain.prediction, chain.clip_range) == (
        today.config.prediction_type,
        today.config.clip_sample_range,
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"_class_name": "FlowMatchEulerDiscreteScheduler"},
            ["FlowMatchEulerDiscreteScheduler", "DDPMScheduler"],
        ),
        ({"_class_name": None}, ["_class_name", "DDPMScheduler"]),
        ({"thresholding": True}, ["thresholding", "not supported"]),
        ({"variance_type": "learned"}, ["variance_type", "learned_range"]),
        ({"steps_offset": -1}, ["steps_offset is -1"]),
        ({"use_flow_sigmas": True}, ["use_flow_sigmas"]),
        ({"timestep_type": "continuous"}, ["timestep_type"]),
        ({"prediction_type": "flow_prediction"}, ["prediction_type", "flow_prediction", "epsilon"]),
        ({"rescale_betas_zero_snr": True}, ["rescale_betas_zero_snr", "epsilon"]),
        ({"beta_schedule": "laplace"}, ["beta_schedule", "laplace", "squaredcos_cap_v2"]),
        ({"beta_schedule": None}, ["beta_schedule is missing"]),
        ({"beta_start": None}, ["beta_start is missing"]),
        ({"beta_end": "0.02"}, ["beta_end is '0.02'"]),
        ({"beta_end": math.inf}, ["beta_end is inf"]),
        ({"beta_end": 1.5}, ["linear", "outside (0, 1)"]),
        ({"num_train_timesteps": None}, ["num_train_timesteps is missing"]),
        ({"num_train_timesteps": True}, ["num_train_timesteps"]),
        ({"trained_betas": [0.1, 0.2]}, ["trained_betas has 2 values", "1000"]),
        ({"trained_betas": [0.1, 0.0], "num_train_timesteps": 2}, ["trained_betas", "outside (0, 1)"]),
        ({"trained_betas": ["a"], "num_train_timesteps": 1}, ["num_train_timesteps"]),
        ({"trained_betas": ["a", "b"], "num_train_timesteps": 2}, ["trained_betas", "numbers"]),
        ({"trained_betas": "much", "num_train_timesteps": 2}, ["trained_betas", "numbers"]),
        ({"clip_sample_range": "wide"}, ["clip_sample_range"]),
    ],
)
def test_refusals_name_the_file_and_the_field(change, words):
    config = config_of(diffusers.DDPMScheduler()) | change
    config = {field: value for field, value in config.items() if value is not None}
    with pytest.raises(ModelError) as refusal:
        read_chain(config, source="the/file.json")
    assert str(refusal.value).startswith("the/file.json: ")
    for word in words:
        assert word in str(refusal.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sigma_min": None}, "sigma_min is missing"),
        ({"sigma_max": -1}, "sigma_max is -1"),
        ({"sigma_min": 9999.0}, "sigma_min 9999 must lie below"),
    ],
)
def test_variance_exploding_refusals(change, words):
    config = config_of(diffusers.ScoreSdeVeScheduler()) | change
    with pytest.raises(ModelError, match=words):
        read_chain({k: v for k, v in config.items() if v is not None}, source="there")
