"""A scheduler's configuration, read as data: the noise levels a model was trained on.

Only what the training fixed is read: betas or sigmas, what the network predicts, and whether predicted x_0 is
clamped. How diffusers would sample (timestep spacing, solver order, Karras sigmas, variance_type of the fixed
kinds) is the recipe's business and ignored. What would change the meaning of the network's output, and is not
supported, is refused by the name of its field. The formulas are diffusers' own, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from boomerang_batch.diffusion.denoiser import Prediction
from boomerang_batch.diffusion.schedule import NoiseLevels, ve_levels, vp_levels
from boomerang_batch.errors import ModelError

Config = Mapping[str, Any]

VP_SCHEDULERS = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
)
VE_SCHEDULERS = ("ScoreSdeVeScheduler",)

# Files written before a field existed lack it; diffusers then takes the class's default, and so do we. Most
# schedulers never clamp: for them the field means nothing.
_CLIP_DEFAULT = {"DDPMScheduler": True, "DDIMScheduler": True, "HeunDiscreteScheduler": False}
# diffusers' DDIM and PNDM walk to abar_0 instead of the clean sample where set_alpha_to_one is false.
_ALPHA_TO_ONE_DEFAULT = {"DDIMScheduler": True, "PNDMScheduler": False}
_VP_PREDICTIONS = ("epsilon", "sample", "v_prediction")
_UNSUPPORTED = {
    "thresholding": (True, "dynamic thresholding of x_0 is not supported"),
    "use_flow_sigmas": (True, "flow-matching sigmas are not supported for pixel models"),
    "timestep_type": ("continuous", "a network told log-sigmas instead of timesteps is not supported"),
    "variance_type": ("learned", "of learned variances, only learned_range is supported"),
}


@dataclass(frozen=True, kw_only=True)
class Chain:
    """What a scheduler configuration says about the model."""

    levels: NoiseLevels
    prediction: Prediction
    clip_range: float | None
    value_range: tuple[float, float]
    learned_variance: bool = False


def read_chain(config: Config, *, source: str) -> Chain:
    """The chain that a scheduler configuration (parsed JSON) describes; `source` names the file in errors.

    Raises ModelError naming the field for a scheduler, schedule or option that is not supported.
    """
    name = config.get("_class_name")
    if name in VE_SCHEDULERS:
        return _variance_exploding(config, source)
    if name in VP_SCHEDULERS:
        return _variance_preserving(config, source)
    known = ", ".join(sorted((*VP_SCHEDULERS, *VE_SCHEDULERS)))
    raise ModelError(f"{source}: scheduler _class_name {name!r} is not supported; supported are {known}")


def _variance_exploding(config: Config, source: str) -> Chain:
    """Score SDE (arXiv 2011.13456): alpha = 1, sigma geometric, the network told sigma, pixels in [0, 1]."""
    count = _count(config, source)
    low, high = (_positive(config, field, source) for field in ("sigma_min", "sigma_max"))
    if low >= high:
        raise ModelError(f"{source}: sigma_min {low:g} must lie below sigma_max {high:g}")
    sigma = torch.linspace(math.log(low), math.log(high), count, dtype=torch.float64).exp()
    return Chain(
        levels=ve_levels(sigma, tau=sigma), prediction="score", clip_range=None, value_range=(0.0, 1.0)
    )


def _variance_preserving(config: Config, source: str) -> Chain:
    for field, (refused, reason) in _UNSUPPORTED.items():
        value = config.get(field)
        if value == refused:
            raise ModelError(f"{source}: {field}: {value!r}: {reason}")
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in _VP_PREDICTIONS:
        raise ModelError(
            f"{source}: prediction_type {prediction!r} is not supported; "
            f"supported are {', '.join(_VP_PREDICTIONS)}"
        )
    rescaled = bool(config.get("rescale_betas_zero_snr"))
    if rescaled and prediction == "epsilon":
        raise ModelError(
            f"{source}: rescale_betas_zero_snr with prediction_type epsilon: predicted noise says nothing "
            "about x_0 where no signal is left; such a model predicts v or the sample"
        )
    alpha_bar = (1 - _betas(config, source)).cumprod(0)
    if rescaled:
        alpha_bar = _zero_terminal_snr(alpha_bar)
    name = config["_class_name"]
    levels = vp_levels(alpha_bar)
    lowest = (float(levels.alpha[0]), float(levels.sigma[0]))
    clamps = name in _CLIP_DEFAULT and config.get("clip_sample", _CLIP_DEFAULT[name])
    return Chain(
        levels=replace(
            levels,
            steps_offset=_offset(config, source),
            end=levels.end if _ends_clean(config) else lowest,
        ),
        prediction=prediction,
        clip_range=_positive({"clip_sample_range": 1.0, **config}, "clip_sample_range", source)
        if clamps
        else None,
        value_range=(-1.0, 1.0),
        learned_variance=config.get("variance_type") == "learned_range",
    )


def _ends_clean(config: Config) -> bool:
    """Whether diffusers' walk ends at the clean sample; else at the lowest noise level of the training."""
    name = config["_class_name"]
    if name in _ALPHA_TO_ONE_DEFAULT:
        return bool(config.get("set_alpha_to_one", _ALPHA_TO_ONE_DEFAULT[name]))
    return config.get("final_sigmas_type", "zero") != "sigma_min"


def _offset(config: Config, source: str) -> int:
    value = config.get("steps_offset", 0)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ModelError(f"{source}: steps_offset is {value!r}; it must be a whole number, 0 or more")
    return value


def _betas(config: Config, source: str) -> Tensor:
    """(T,) float64, each in (0, 1)."""
    count = _count(config, source)
    trained = config.get("trained_betas")
    schedule = "trained_betas" if trained is not None else config.get("beta_schedule")
    if schedule == "trained_betas":
        if not isinstance(trained, list) or not all(isinstance(beta, int | float) for beta in trained):
            raise ModelError(f"{source}: trained_betas must be a list of numbers, one per training timestep")
        betas = torch.tensor(trained, dtype=torch.float64)
        if betas.shape != (count,):
            raise ModelError(
                f"{source}: trained_betas has {betas.numel()} values, num_train_timesteps says {count}; "
                "they must agree"
            )
    elif schedule == "squaredcos_cap_v2":
        betas = _cosine_betas(count)
    elif schedule in ("linear", "scaled_linear", "sigmoid"):
        low, high = (_positive(config, field, source) for field in ("beta_start", "beta_end"))
        if schedule == "linear":
            betas = torch.linspace(low, high, count, dtype=torch.float64)
        elif schedule == "scaled_linear":
            betas = torch.linspace(low**0.5, high**0.5, count, dtype=torch.float64).square()
        else:
            betas = torch.linspace(-6, 6, count, dtype=torch.float64).sigmoid() * (high - low) + low
    elif schedule is None:
        raise ModelError(f"{source}: beta_schedule is missing; add the schedule the model was trained with")
    else:
        raise ModelError(
            f"{source}: beta_schedule {schedule!r} is not supported; supported are linear, scaled_linear, "
            "squaredcos_cap_v2, sigmoid, or a list in trained_betas"
        )
    if not bool(((betas > 0) & (betas < 1)).all()):
        raise ModelError(f"{source}: {schedule} gives a beta outside (0, 1); every step must add some noise")
    return betas


def _cosine_betas(count: int) -> Tensor:
    """Improved DDPM's cosine schedule (arXiv 2102.09672, eq. 17), betas capped at 0.999."""
    at = torch.arange(count + 1, dtype=torch.float64) / count
    alpha_bar = ((at + 0.008) / 1.008 * math.pi / 2).cos().square()
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)


def _zero_terminal_snr(alpha_bar: Tensor) -> Tensor:
    """Shift and scale sqrt(alpha_bar) so that it ends at 0 and starts as before (arXiv 2305.08891, Alg. 1)."""
    root = alpha_bar.sqrt()
    first, last = root[0], root[-1]
    return ((root - last) * (first / (first - last))).square()


def _count(config: Config, source: str) -> int:
    value = config.get("num_train_timesteps")
    if not isinstance(value, int) or isinstance(value, bool) or value < 2:
        raise ModelError(
            f"{source}: num_train_timesteps is {_shown(value)}; it must be the length of the training chain"
        )
    return value


def _positive(config: Config, field: str, source: str) -> float:
    value = config.get(field)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ModelError(
            f"{source}: {field} is {_shown(value)}; it must be the positive number of the training"
        )
    return float(value)


def _shown(value: object) -> str:
    return "missing" if value is None else repr(value)
