"""Grids against diffusers and the papers' formulas; start policies; how a user's t becomes a node."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.special import gammaln

from boomerang_batch.diffusion.grids import grid_indices
from boomerang_batch.diffusion.schedule import (
    Schedule,
    build_schedule,
    flow_levels,
    ve_levels,
    vp_levels,
)
from boomerang_batch.errors import ConfigError
from tests.oracles import levels_of, linear_levels

CHAIN_SIZES = [10, 50, 250, 999, 1000, 4000]
NAMED_GRIDS = ["leading", "trailing", "linspace", "step-linear", "step-quadratic"]
LINEAR = linear_levels()


def resolve(t: tuple[str, float], *, levels=LINEAR, grid="linspace", steps=50, start="exact") -> Schedule:
    return build_schedule(levels, grid=grid, steps=steps, t=t, start=start)


def ratios_of(schedule: Schedule) -> list[float]:
    return (schedule.sigma / schedule.alpha).tolist()


# --- grids ---


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("train_steps", CHAIN_SIZES)
def test_grids_are_diffusers_timestep_spacings(spacing, train_steps):
    scheduler = DDPMScheduler(num_train_timesteps=train_steps, timestep_spacing=spacing)
    for steps in range(2, min(train_steps, 1000) + 1, 1 if train_steps <= 1000 else 17):
        scheduler.set_timesteps(steps)
        # numpy.arange rounds its length up for some sizes, which gives trailing one node too many: index -1.
        theirs = scheduler.timesteps.tolist()[:steps]
        assert grid_indices(spacing, steps=steps, train_steps=train_steps) == theirs[::-1], steps


def test_diffusers_schedulers_agree_among_themselves_on_the_spacings():
    """So that comparing with one of them, above, stands for all."""
    for spacing, steps in itertools.product(["leading", "trailing", "linspace"], [10, 27, 48, 50, 100]):
        ddpm, ddim = (kind(timestep_spacing=spacing) for kind in (DDPMScheduler, DDIMScheduler))
        ddpm.set_timesteps(steps)
        ddim.set_timesteps(steps)
        assert ddpm.timesteps.tolist() == ddim.timesteps.tolist()


@pytest.mark.parametrize("steps", [2, 5, 10, 20, 50, 100])
@pytest.mark.parametrize("train_steps", [100, 250, 999, 1000, 1024, 4000])
def test_step_linear_is_the_papers_formula(train_steps, steps):
    expected = [math.floor(Fraction(i * (train_steps - 1), steps - 1)) for i in range(steps)]
    assert grid_indices("step-linear", steps=steps, train_steps=train_steps) == expected
    assert expected[0] == 0
    assert expected[-1] == train_steps - 1


@pytest.mark.parametrize("steps", [2, 5, 10, 20, 50, 100])
@pytest.mark.parametrize("train_steps", [100, 250, 999, 1000, 1024, 4000])
def test_step_quadratic_is_the_papers_formula(train_steps, steps):
    expected = (np.linspace(0, np.sqrt(0.8 * train_steps), steps) ** 2).astype(int).tolist()
    assert grid_indices("step-quadratic", steps=steps, train_steps=train_steps) == expected


def test_step_quadratic_reaches_only_four_fifths_of_the_chain():
    assert grid_indices("step-quadratic", steps=20, train_steps=1000)[-1] == 800


def test_the_papers_cifar10_setting_on_both_fastdpm_grids():
    """S = 100 of T = 1000 and t = 40 %: grid index 39 is train index 393 on linear steps, 124 on quadratic."""
    assert grid_indices("step-linear", steps=100, train_steps=1000)[39] == 393
    assert grid_indices("step-quadratic", steps=100, train_steps=1000)[39] == 124
    sigma = LINEAR.relative_sigma
    assert float(sigma[393]) == pytest.approx(1.97, abs=0.005)
    assert float(sigma[124]) == pytest.approx(0.43, abs=0.005)


@pytest.mark.parametrize("start", ["exact", "snap", "diffusers-strength"])
def test_repeated_nodes_of_the_quadratic_grid_are_walked_once(start):
    """In FastDPM a step from a level to itself leaves x as it is and costs an evaluation."""
    indices = grid_indices("step-quadratic", steps=100, train_steps=1000)
    assert len(set(indices)) < len(indices)
    t = ("fraction", 0.4) if start == "diffusers-strength" else ("timestep", 125)
    schedule = resolve(t, grid="step-quadratic", steps=100, start=start)
    assert schedule.tau.tolist() == [0, *sorted({index for index in indices if index <= 124})]


VAR_GRIDS = ["var-linear", "var-quadratic"]


@pytest.mark.parametrize("steps", [5, 10, 20, 50, 100])
@pytest.mark.parametrize("grid", VAR_GRIDS)
def test_a_var_grid_is_the_papers_own_chain(grid, steps):
    """Betas that begin with the model's and end where its chain does, evenly or squared."""
    schedule = resolve(("fraction", 1.0), grid=grid, steps=steps)
    assert schedule.n == steps
    betas = 1 - (schedule.alpha[1:] / schedule.alpha[:-1]) ** 2
    assert float(betas[0]) == pytest.approx(1e-4)
    assert float(schedule.alpha[-1]) == pytest.approx(float(LINEAR.alpha[-1]), rel=1e-6)
    even = betas if grid == "var-linear" else betas.sqrt()
    assert even.diff().tolist() == pytest.approx([float(even.diff().mean())] * (steps - 1), rel=1e-6)
    assert schedule.tau[1:].tolist()[:: steps - 1] == pytest.approx([0, 999], abs=1e-4)


@pytest.mark.parametrize("grid", VAR_GRIDS)
def test_a_var_grids_times_are_those_of_the_papers_formula(grid):
    """Theirs for linear betas: alpha_bar as a product of terms (c - i) d, by the gamma function."""
    schedule = resolve(("fraction", 1.0), grid=grid, steps=20)
    d = (0.02 - 1e-4) / 999
    c = (1 - 1e-4) / d

    def log_alpha_bar(t: float) -> float:
        return (t + 1) * math.log(d) + gammaln(c + 1) - gammaln(c - t)

    for alpha, tau in zip(schedule.alpha[2:-1].tolist(), schedule.tau[2:-1].tolist(), strict=True):
        exact = brentq(lambda t, level: log_alpha_bar(t) - level, 0, 999, args=(2 * math.log(alpha),))
        assert tau == pytest.approx(exact, abs=0.05)


@pytest.mark.parametrize("grid", VAR_GRIDS)
@given(t=st.integers(1, 1000), start=st.sampled_from(["exact", "snap"]))
@settings(max_examples=20, deadline=None)
def test_a_var_grid_is_cut_like_any_other(grid, t, start):
    whole = ratios_of(resolve(("fraction", 1.0), grid=grid, steps=30))
    schedule = resolve(("timestep", t), grid=grid, steps=30, start=start)
    found = ratios_of(schedule)
    assert found == sorted(found)
    assert found[:-1] == pytest.approx(whole[: len(found) - 1])
    if start == "exact":
        assert found[-1] == pytest.approx(float(LINEAR.relative_sigma[t - 1]))
    else:
        assert found[-1] == pytest.approx(whole[len(found) - 1])


@pytest.mark.parametrize("grid", VAR_GRIDS)
def test_var_grids_are_refused_where_they_mean_nothing(grid):
    zero_snr = vp_levels(torch.linspace(0.999, 0, 20, dtype=torch.float64) ** 2)
    flow = flow_levels(torch.linspace(0.05, 1, 20), torch.arange(20))
    for levels, says in ((zero_snr, "pure noise"), (flow, r"has none of")):
        with pytest.raises(ConfigError, match=says):
            resolve(("fraction", 0.5), grid=grid, levels=levels, steps=10)
    for steps in (1, 200_000):
        with pytest.raises(ConfigError, match="take 2 to"):
            resolve(("fraction", 0.5), grid=grid, steps=steps)
    with pytest.raises(ConfigError, match="diffusers knows no grid"):
        resolve(("fraction", 0.5), grid=grid, start="diffusers-strength")
    with pytest.raises(ConfigError, match="in a table"):
        build_schedule(LINEAR, grid=grid, steps=10, t=("fraction", 0.5), start="exact", fractional_tau=False)


@pytest.mark.parametrize("grid", ["leading", "trailing", "linspace", "step-linear"])
def test_a_grid_of_every_step_is_the_whole_chain(grid):
    assert grid_indices(grid, steps=1000, train_steps=1000) == list(range(1000))


@pytest.mark.parametrize("grid", NAMED_GRIDS)
@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_a_named_grid_refuses_more_steps_than_the_chain_has(grid, steps):
    with pytest.raises(ConfigError, match=r"choose 1\.\.1000"):
        grid_indices(grid, steps=steps, train_steps=1000)


def test_an_explicit_list_is_taken_as_it_is():
    assert grid_indices((3, 14, 159), steps=3, train_steps=1000) == [3, 14, 159]


@pytest.mark.parametrize(
    ("grid", "steps", "message"),
    [
        ((3, 14, 159), 4, "3 train indices but steps is 4"),
        ((3, 159, 14), 3, "do not ascend"),
        ((3, 3, 14), 3, "do not ascend"),
        ((), 0, "do not ascend"),
        ((-1, 3), 2, r"outside the chain's 0\.\.999"),
        ((3, 1000), 2, r"outside the chain's 0\.\.999"),
    ],
)
def test_a_list_that_can_not_be_walked_is_refused(grid, steps, message):
    with pytest.raises(ConfigError, match=message):
        grid_indices(grid, steps=steps, train_steps=1000)


@given(grid=st.sampled_from(NAMED_GRIDS), train_steps=st.integers(1, 1500), data=st.data())
@settings(max_examples=200, deadline=None)
def test_named_grids_ascend_inside_the_chain(grid, train_steps, data):
    steps = data.draw(st.integers(1, train_steps))
    indices = grid_indices(grid, steps=steps, train_steps=train_steps)
    assert len(indices) == steps
    assert indices[0] >= 0
    assert indices[-1] <= train_steps - 1
    assert indices == sorted(indices)
    assert grid == "step-quadratic" or len(set(indices)) == steps


# --- levels ---


def test_relative_sigma_of_the_published_schedules():
    """The table of the design's operating points: sigma at fractions of T."""
    fractions = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.8)
    scaled = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    cosine = DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod
    published = [
        (LINEAR, (0.34, 0.72, 1.23, 2.03, 3.42, 11.9, 25.5)),
        (vp_levels((1 - scaled).cumprod(0)), (0.34, 0.57, 0.83, 1.16, 1.61, 3.32, 5.09)),
        (vp_levels(cosine), (0.17, 0.34, 0.52, 0.74, 1.01, 1.98, 3.10)),
    ]
    for levels, sigmas in published:
        for fraction, sigma in zip(fractions, sigmas, strict=True):
            schedule = resolve(("fraction", fraction), levels=levels)
            assert schedule.relative_sigma == pytest.approx(sigma, rel=0.02)


def test_vp_and_flow_levels_are_on_their_circle_and_line():
    assert torch.allclose(LINEAR.alpha**2 + LINEAR.sigma**2, torch.ones(1000, dtype=torch.float64))
    flow = flow_levels(torch.linspace(0.1, 1, 10), torch.arange(10))
    assert torch.equal(flow.alpha + flow.sigma, torch.ones(10, dtype=torch.float64))
    assert flow.relative_sigma[-1] == math.inf


def test_tables_are_float64_whatever_they_were_made_of():
    for levels in (
        vp_levels(torch.tensor([0.9, 0.5])),
        ve_levels(torch.tensor([0.1, 1.0]), torch.tensor([0, 1])),
        flow_levels(torch.tensor([0.5, 1.0]), torch.tensor([500, 1000])),
    ):
        assert {table.dtype for table in (levels.alpha, levels.sigma, levels.tau)} == {torch.float64}
        assert len(levels) == 2


@pytest.mark.parametrize(
    "alpha_bar", [[0.5, 0.9], [0.9, 0.9], [1.0, 0.9], [0.9, math.nan], [0.9, 0.0, 0.0], [1.5, 0.5]]
)
def test_levels_that_do_not_ascend_in_noise_are_refused(alpha_bar):
    with pytest.raises(ConfigError, match="positive and ascending"):
        vp_levels(torch.tensor(alpha_bar))


# --- from t to a node ---


@pytest.mark.parametrize("start", ["exact", "snap", "diffusers-strength"])
@pytest.mark.parametrize("kind", ["vp", "ve", "flow"])
def test_t_zero_is_the_identity(start, kind):
    levels = levels_of(kind, torch.linspace(0.1, 5, 20))
    units = ["fraction"] if start == "diffusers-strength" else ["fraction", "timestep", "sigma"]
    for unit in units:
        schedule = resolve((unit, 0), levels=levels, start=start, steps=10)
        assert schedule.n == 0
        assert (schedule.alpha.tolist(), schedule.sigma.tolist()) == ([1], [0])
        assert schedule.relative_sigma == 0


@pytest.mark.parametrize("timestep", [1, 2, 200, 500, 999, 1000])
def test_timestep_counts_as_the_paper_does(timestep):
    """Timestep t noises with array index t - 1 and, with every step kept, takes t evaluations."""
    schedule = resolve(("timestep", timestep), steps=1000)
    assert schedule.n == timestep
    assert schedule.tau[-1] == timestep - 1
    assert schedule.alpha[-1] == LINEAR.alpha[timestep - 1]
    assert schedule.tau[1:].tolist() == list(range(timestep))


@given(fraction=st.floats(0.001, 1))
def test_a_fraction_is_the_nearest_timestep(fraction):
    schedule = resolve(("fraction", fraction))
    assert abs(schedule.tau[-1] + 1 - 1000 * fraction) <= 0.5 + 1e-9


@pytest.mark.parametrize("start", ["exact", "snap"])
@pytest.mark.parametrize(
    ("t", "message"),
    [
        (("timestep", 1001), r"choose 0\.\.1000"),
        (("timestep", -1), r"choose 0\.\.1000"),
        (("fraction", 1.001), r"choose 0\.\.1000"),
        (("fraction", -0.1), r"choose 0\.\.1000"),
        (("fraction", 0.0004), "rounds to timestep 0"),
        (("sigma", 0.00999), r"sigma 0\.01 to 157"),
        (("sigma", 158), r"sigma 0\.01 to 157"),
        (("sigma", -1), "lies outside"),
        (("sigma", math.inf), "lies outside"),
        (("sigma", math.nan), "lies outside"),
        (("snr", 10001), "lies outside"),
        (("snr", 1 / 158**2), "lies outside"),
        (("snr", 0), "lies outside"),
        (("snr", -1), "lies outside"),
    ],
)
def test_t_outside_the_chain_is_refused(start, t, message):
    with pytest.raises(ConfigError, match=message):
        resolve(t, start=start)


def test_sigma_and_snr_are_inverses_of_each_other_and_of_the_chain():
    for timestep in (1, 7, 400, 1000):
        by_index = resolve(("timestep", timestep))
        sigma = by_index.relative_sigma
        for t in (("sigma", sigma), ("snr", sigma**-2)):
            by_level = resolve(t)
            assert by_level.alpha.tolist() == pytest.approx(by_index.alpha.tolist(), rel=1e-12)
            assert by_level.sigma.tolist() == pytest.approx(by_index.sigma.tolist(), rel=1e-12)
            assert by_level.tau.tolist() == pytest.approx(by_index.tau.tolist(), abs=1e-6)


@given(kind=st.sampled_from(["vp", "ve", "flow"]), log_sigma=st.floats(math.log(0.011), math.log(150)))
def test_exact_hits_any_sigma(kind, log_sigma):
    levels = levels_of(kind, LINEAR.relative_sigma)
    sigma = math.exp(log_sigma)
    schedule = resolve(("sigma", sigma), levels=levels)
    alpha, noise = float(schedule.alpha[-1]), float(schedule.sigma[-1])
    assert noise / alpha == pytest.approx(sigma, rel=1e-12)
    assert {"vp": alpha**2 + noise**2, "ve": alpha, "flow": alpha + noise}[kind] == pytest.approx(1, rel=1e-12)
    # The network is told a level between the two trained ones around it.
    index = int(torch.searchsorted(levels.relative_sigma, sigma))
    assert index - 1 <= schedule.tau[-1] <= index


def test_between_levels_tau_is_interpolated_in_log_noise():
    levels = ve_levels(torch.tensor([1.0, 100.0], dtype=torch.float64), torch.tensor([0, 10]))
    schedule = resolve(("sigma", 10), levels=levels, grid=(0, 1), steps=2)
    assert schedule.tau.tolist() == pytest.approx([0, 0, 5])


@given(s=st.floats(0.05, 0.9999))
def test_flow_tau_follows_s_up_to_pure_noise(s):
    """A flow network is told 1000 s: exact even on the few levels of a short chain, and beside s = 1."""
    levels = flow_levels(torch.linspace(0.05, 1, 12, dtype=torch.float64), torch.linspace(50, 1000, 12))
    schedule = resolve(("sigma", s / (1 - s)), levels=levels, steps=12)
    assert schedule.sigma[-1] == pytest.approx(s, rel=1e-9)
    assert schedule.tau[-1] == pytest.approx(1000 * s, rel=1e-6)


def test_a_lookup_table_takes_trained_timesteps_only():
    def with_table(t, start="exact"):
        return build_schedule(LINEAR, grid="linspace", steps=50, t=t, start=start, fractional_tau=False)

    assert with_table(("timestep", 400)).tau[-1] == 399
    assert with_table(("sigma", float(LINEAR.relative_sigma[399]))).tau[-1] == 399
    with pytest.raises(ConfigError, match=r"looks its timesteps up in a table.*start: snap"):
        with_table(("sigma", 2.0))
    assert float(with_table(("sigma", 2.0), start="snap").tau[-1]).is_integer()


# --- start policies ---


@pytest.mark.slow
@given(
    grid=st.sampled_from([*NAMED_GRIDS, "list"]),
    kind=st.sampled_from(["vp", "ve", "flow"]),
    start=st.sampled_from(["exact", "snap", "diffusers-strength"]),
    data=st.data(),
)
@settings(max_examples=200, deadline=None)
def test_nodes_ascend_and_exact_ends_at_the_target(grid, kind, start, data):
    steps_of_noise = data.draw(st.lists(st.floats(0.01, 2), min_size=2, max_size=60))
    levels = levels_of(kind, torch.tensor(steps_of_noise, dtype=torch.float64).cumsum(0))
    if kind == "flow" and start == "diffusers-strength":
        grid = "linspace"  # diffusers has no other for flow matching
    if grid == "list":
        chosen = data.draw(st.sets(st.integers(0, len(levels) - 1), min_size=1))
        grid, steps = tuple(sorted(chosen)), len(chosen)
    else:
        steps = data.draw(st.integers(1, len(levels)))
    timestep = data.draw(st.integers(1, len(levels)))
    t = ("fraction", timestep / len(levels)) if start == "diffusers-strength" else ("timestep", timestep)
    schedule = resolve(t, levels=levels, grid=grid, steps=steps, start=start)

    ratios = ratios_of(schedule)
    assert (float(schedule.alpha[0]), ratios[0]) == (1, 0)
    assert all(low < high for low, high in itertools.pairwise(ratios))
    if start == "exact":
        assert schedule.relative_sigma == float(levels.relative_sigma[timestep - 1])
    if kind == "flow" and start == "diffusers-strength":
        return  # nodes of diffusers' own, between those of the chain
    known = dict(zip(levels.tau.tolist(), levels.relative_sigma.tolist(), strict=True))
    assert all(known[tau] == ratio for tau, ratio in zip(schedule.tau.tolist()[1:], ratios[1:], strict=True))


@given(grid=st.sampled_from(NAMED_GRIDS), steps=st.integers(1, 200), start=st.sampled_from(["exact", "snap"]))
@settings(max_examples=20, deadline=None)
def test_evaluations_never_fall_as_t_grows(grid, steps, start):
    counts = [
        resolve(("timestep", timestep), grid=grid, steps=steps, start=start).n
        for timestep in range(0, 1001, 25)
    ]
    assert counts == sorted(counts)
    assert counts[-1] <= steps + 1


@pytest.mark.parametrize("steps", [20, 50, 100, 250])
@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.4, 0.8, 1.0])
def test_evaluations_stay_near_the_fraction_of_the_steps(steps, fraction):
    """The paper's cost claim: time is about t / T of full sampling."""
    assert abs(resolve(("fraction", fraction), steps=steps).n - fraction * steps) < 2


def test_snap_takes_the_node_nearest_in_log_noise():
    nodes = grid_indices("linspace", steps=50, train_steps=1000)
    logs = LINEAR.relative_sigma.log()
    for timestep in range(1, 1001, 13):
        schedule = resolve(("timestep", timestep), start="snap")
        gaps = (logs[nodes] - logs[timestep - 1]).abs()
        assert float(gaps[schedule.n - 1]) == float(gaps.min())
        assert schedule.tau[-1] == nodes[schedule.n - 1]


@pytest.mark.parametrize("top", [9, 19])
@pytest.mark.parametrize("start", ["exact", "snap"])
def test_pure_noise_starts_at_the_top_of_the_grid(top, start):
    """Also when the grid itself has no node of pure noise."""
    levels = flow_levels(torch.linspace(0.05, 1, 20, dtype=torch.float64), torch.arange(20))
    schedule = resolve(("fraction", 1.0), levels=levels, grid=(0, 5, top), steps=3, start=start)
    assert schedule.tau[-1] == (19 if start == "exact" else top)


def test_a_finite_level_never_snaps_to_pure_noise():
    levels = flow_levels(torch.linspace(0.05, 1, 20, dtype=torch.float64), torch.arange(20))
    schedule = resolve(("timestep", 19), levels=levels, grid=(0, 5, 19), steps=3, start="snap")
    assert schedule.tau[-1] == 5


def img2img_timesteps(scheduler: DDPMScheduler, steps: int, strength: float) -> list[int]:
    """What Stable Diffusion's and most other img2img pipelines of diffusers walk, in their own words."""
    init_timestep = min(int(steps * strength), steps)
    t_start = max(steps - init_timestep, 0)
    return scheduler.timesteps[t_start:].tolist()


@given(
    spacing=st.sampled_from(["leading", "trailing", "linspace"]),
    steps=st.integers(2, 100),
    percent=st.integers(0, 100),
)
@settings(max_examples=100, deadline=None)
def test_diffusers_strength_is_img2img(spacing, steps, percent):
    scheduler = DDPMScheduler(timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    schedule = resolve(("fraction", percent / 100), grid=spacing, steps=steps, start="diffusers-strength")
    walked = img2img_timesteps(scheduler, steps, percent / 100)
    if len(scheduler.timesteps) == steps:  # else diffusers' own trailing grid holds an index -1
        assert schedule.tau.tolist()[:0:-1] == walked


def test_diffusers_strength_keeps_img2imgs_float_floor():
    """int(50 * .58) and int(100 * .29) are both 28, not 29."""
    assert resolve(("fraction", 0.58), steps=50, start="diffusers-strength").n == 28
    assert resolve(("fraction", 0.29), steps=100, start="diffusers-strength").n == 28


@pytest.mark.parametrize("t", [("timestep", 400), ("sigma", 1.0), ("fraction", 1.1), ("fraction", -0.1)])
def test_diffusers_strength_reads_a_fraction_only(t):
    with pytest.raises(ConfigError, match="fraction"):
        resolve(t, start="diffusers-strength")


def test_flow_levels_fit_diffusers_own_sigmas():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    levels = flow_levels(scheduler.sigmas.flip(0), scheduler.timesteps.flip(0))
    for fraction, sigma in ((0.1, 0.33), (0.2, 0.75), (0.5, 3.0), (0.7, 7.0), (0.8, 12)):
        assert resolve(("fraction", fraction), levels=levels).relative_sigma == pytest.approx(sigma, rel=0.02)
