"""FlowMatchEulerDiscreteScheduler configurations, read as data: the levels of a flow-matching model.

s is the share of noise: x_s = (1 - s) x_0 + s eps, and the network predicts eps - x_0. The chain spreads raw
levels evenly over (0, 1] and shifts them towards noise (arXiv 2403.03206, eq. 23):

    s = shift * raw / (1 + (shift - 1) * raw)

The shift is a number of the configuration, or grows with the number of tokens of the image: mu is linear in
it, and shift = exp(mu) or mu itself. What the network is told is tau = T s, T the length of the chain (1000).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from boomerang_batch.diffusion.schedule import NoiseLevels, flow_levels
from boomerang_batch.errors import ModelError

FLOW_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler",)

LowestNode = Literal["chain", "step"]
"""The lowest raw level of diffusers' grid of S nodes: the chain's own lowest level (Stable Diffusion 3, whose
pipelines leave it to the scheduler), or 1 / S (Flux, whose pipelines choose it)."""

# Values of diffusers' class, for files written before a field existed.
_DEFAULTS: Mapping[str, Any] = {
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "use_dynamic_shifting": False,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "time_shift_type": "exponential",
}
_UNSUPPORTED = {
    "invert_sigmas": "levels counted from noise to image are not supported",
    "shift_terminal": "a grid stretched to a terminal level is not supported",
    "use_karras_sigmas": "Karras levels are not supported for flow matching",
    "use_exponential_sigmas": "exponential levels are not supported for flow matching",
    "use_beta_sigmas": "beta-distributed levels are not supported for flow matching",
}


@dataclass(frozen=True, kw_only=True)
class FlowChain:
    """A flow-matching chain whose shift may depend on the size of the image."""

    train_steps: int
    shift: float | None
    """None: it depends on the number of tokens."""
    slope: float
    intercept: float
    """mu = slope * tokens + intercept."""
    exponential: bool
    lowest_node: LowestNode
    source: str

    @property
    def by_size(self) -> bool:
        """Whether images of different sizes have different levels."""
        return self.shift is None

    def levels(self, tokens: int) -> NoiseLevels:
        """The chain for an image the network sees as `tokens` tokens, T = train_steps entries.

        Raises ModelError where the configuration gives that size no valid shift.
        """
        shift = self.shift_at(tokens)
        raw = torch.arange(1, self.train_steps + 1, dtype=torch.float64) / self.train_steps
        s = shift * raw / (1 + (shift - 1) * raw)
        # A fixed shift is already in the scheduler's lowest level when its grid is shifted once more.
        lowest = float(raw[0] if self.by_size else s[0])
        return flow_levels(
            s,
            tau=s * self.train_steps,
            shift=shift,
            raw_floor=lowest if self.lowest_node == "chain" else None,
        )

    def shift_at(self, tokens: int) -> float:
        """The shift for an image of `tokens` tokens."""
        if self.shift is not None:
            return self.shift
        mu = self.slope * tokens + self.intercept
        if not self.exponential and mu <= 0:
            raise ModelError(
                f"{self.source}: time_shift_type linear gives an image of {tokens} tokens the shift {mu:g}, "
                "which must be positive; use larger images"
            )
        return math.exp(mu) if self.exponential else mu


def read_flow_chain(config: Mapping[str, Any], *, source: str, lowest_node: LowestNode) -> FlowChain:
    """The chain that a scheduler configuration (parsed JSON) describes; `source` names the file in errors.

    Raises ModelError naming the field for a scheduler or an option that is not supported.
    """
    name = config.get("_class_name")
    if name not in FLOW_SCHEDULERS:
        raise ModelError(
            f"{source}: scheduler _class_name {name!r} is not supported for flow matching; supported is "
            f"{', '.join(FLOW_SCHEDULERS)}"
        )
    for field, reason in _UNSUPPORTED.items():
        if config.get(field):
            raise ModelError(f"{source}: {field}: {config[field]!r}: {reason}")
    known = {**_DEFAULTS, **config}
    train_steps = known["num_train_timesteps"]
    if not isinstance(train_steps, int) or isinstance(train_steps, bool) or train_steps < 2:
        raise ModelError(
            f"{source}: num_train_timesteps is {train_steps!r}; it must be the length of the training chain"
        )
    if not known["use_dynamic_shifting"]:
        shift = _number(known, "shift", source)
        if shift <= 0:
            raise ModelError(f"{source}: shift is {shift:g}; it must be positive")
        return FlowChain(
            train_steps=train_steps,
            shift=shift,
            slope=0.0,
            intercept=0.0,
            exponential=False,
            lowest_node=lowest_node,
            source=source,
        )
    low, high = (_number(known, field, source) for field in ("base_shift", "max_shift"))
    short, long = (_number(known, field, source) for field in ("base_image_seq_len", "max_image_seq_len"))
    if short >= long:
        raise ModelError(f"{source}: base_image_seq_len {short:g} must lie below max_image_seq_len {long:g}")
    if known["time_shift_type"] not in ("exponential", "linear"):
        raise ModelError(
            f"{source}: time_shift_type {known['time_shift_type']!r} is not supported; supported are "
            "exponential and linear"
        )
    slope = (high - low) / (long - short)
    return FlowChain(
        train_steps=train_steps,
        shift=None,
        slope=slope,
        intercept=low - slope * short,
        exponential=known["time_shift_type"] == "exponential",
        lowest_node=lowest_node,
        source=source,
    )


def _number(config: Mapping[str, Any], field: str, source: str) -> float:
    value = config[field]
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ModelError(f"{source}: {field} is {value!r}; it must be the number of the training")
    return float(value)
