"""Denoisers of other makes: installed entry points of the group `boomerang_batch.denoisers`.

`model.source: entry-point:NAME` calls the installed factory NAME as factory(options, device), which returns a
`Denoiser`; docs/denoisers.md shows one. It may leave out `flagged`. What it returns is checked by one tiny call
before a run starts, and its distribution's version becomes part of the model's digest.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast, get_args

import torch
from torch import Tensor

from boomerang_batch import installed
from boomerang_batch.config.blocks import ENTRY_POINT
from boomerang_batch.config.pipeline import ModelSpec
from boomerang_batch.diffusion.denoiser import Condition, Denoiser, DenoiserSpec, Prediction
from boomerang_batch.diffusion.schedule import NoiseLevels
from boomerang_batch.errors import ModelError
from boomerang_batch.models.device import choose_device, settle_numerics

GROUP = "boomerang_batch.denoisers"


@dataclass(frozen=True, kw_only=True)
class InstalledDenoiser:
    """What an installed factory made, with the parts it may leave out; implements `Denoiser`."""

    spec: DenoiserSpec
    made: Any

    def encode(self, images: Tensor) -> Tensor:
        """The states of images (B, C, H, W)."""
        return cast("Tensor", self.made.encode(images))

    def decode(self, x_0: Tensor) -> Tensor:
        """The images of states (B, c, h, w)."""
        return cast("Tensor", self.made.decode(x_0))

    def denoise(self, x_t: Tensor, tau: Tensor, conditions: Sequence[Condition]) -> Tensor:
        """The network's raw output for states x_t (B, c, h, w), tau (B,) and one condition for each."""
        return cast("Tensor", self.made.denoise(x_t, tau, conditions))

    def flagged(self, images: Tensor) -> list[bool]:
        """The maker's own checker's verdicts on images (B, C, H, W); all False without one."""
        return list(self.made.flagged(images)) if self.spec.safety else [False] * len(images)

    def in_float32(self) -> Denoiser:
        """Itself: its precision is its maker's business, and the recipe's dtype is not for it."""
        return self


def load_installed(spec: ModelSpec, *, device: str, threads: int | None) -> Denoiser:
    """The denoiser of the entry point that `spec.source` names, on `device` (cpu, cuda or auto).

    Sets this process's PyTorch numerics to repeatable ones, with `threads` intra-op threads (None: unchanged).
    Raises ModelError when nothing of that name is installed, when it fails, or when what it makes is no
    denoiser or not the one that the recipe describes.
    """
    chosen = choose_device(device, dtype=spec.dtype)
    where = f"model.source {spec.source}"
    entry = installed.find(GROUP, spec.source.removeprefix(ENTRY_POINT), where=where, error=ModelError)
    settle_numerics(chosen, threads=threads)
    made = installed.make(entry, dict(spec.options), chosen.type, where=where, error=ModelError)
    described = _checked_spec(made, where)
    _check_conditions(described, spec, where)
    _check_by_calling(made, described, chosen, where)
    digest = installed.digest(entry, described.digest)
    return InstalledDenoiser(spec=dataclasses.replace(described, digest=digest), made=made)


def _checked_spec(made: Any, where: str) -> DenoiserSpec:
    spec = getattr(made, "spec", None)
    if not isinstance(spec, DenoiserSpec):
        raise ModelError(f"{where}: what its factory made has no spec; it must be a DenoiserSpec")
    needed = ["encode", "decode", "denoise", *(["flagged"] if spec.safety else [])]
    for name in needed:
        if not callable(getattr(made, name, None)):
            raise ModelError(f"{where}: what its factory made has no method {name}; see docs/denoisers.md")
    low, high = spec.value_range
    conditions = {"none", "label", "prompt"}
    for wrong, problem in (
        (spec.channels not in (1, 3), f"channels {spec.channels}; images have 1 or 3"),
        (min(spec.height, spec.width) < 1, f"size {spec.width}x{spec.height}"),
        (not low < high, f"value_range {low:g}..{high:g}; the lower end comes first"),
        (not isinstance(spec.levels, NoiseLevels), "levels of another type than NoiseLevels"),
        (spec.prediction not in get_args(Prediction), f"prediction {spec.prediction!r}"),
        (spec.conditioning not in conditions, f"conditioning {spec.conditioning!r}"),
        (
            (spec.conditioning == "label") != (spec.classes is not None),
            f"conditioning {spec.conditioning} with classes {spec.classes}; they go together",
        ),
        (
            re.fullmatch("[0-9a-f]{64}", spec.digest) is None,
            f"digest {spec.digest!r}; it must be the SHA-256 (hex) of the model's files",
        ),
    ):
        if wrong:
            raise ModelError(f"{where}: its spec has {problem}")
    return spec


def _check_conditions(described: DenoiserSpec, spec: ModelSpec, where: str) -> None:
    """The recipe must say what the model is conditioned on, and nothing else."""
    for asked, kind, key in (
        (spec.class_labels, "label", "class_labels"),
        (spec.prompts, "prompt", "prompts"),
    ):
        if asked is not None and described.conditioning != kind:
            raise ModelError(f"{where}: the model takes no {kind}; remove model.{key} from the recipe")
    if described.conditioning == "label":
        if spec.class_labels is None:
            raise ModelError(
                f"{where}: the model is class-conditional ({described.classes} labels); say in the recipe "
                "where they come from, for example model.class_labels: {field: cls}"
            )
        null_label = spec.class_labels.null_label
        if null_label is not None and null_label >= (described.classes or 0):
            raise ModelError(f"{where}: null_label {null_label} is none of its {described.classes} labels")
    if spec.safety != "unchecked" and not described.safety:
        raise ModelError(f"{where}: the model has no safety checker; set model.safety: unchecked")


def _check_by_calling(made: Any, spec: DenoiserSpec, device: torch.device, where: str) -> None:
    """One image there and back: every tensor must have the shape, type and device the contract says."""
    condition: Condition = {"none": None, "label": 0, "prompt": ""}[spec.conditioning]
    images = torch.full((1, spec.channels, spec.height, spec.width), sum(spec.value_range) / 2, device=device)

    def call(name: str, *arguments: Any) -> Any:
        with torch.inference_mode():
            failure = f"{where}: {name} failed on one image"
            return installed.attempt(lambda: getattr(made, name)(*arguments), failure, error=ModelError)

    states = call("encode", images)
    _check_tensor(states, None if spec.latent else images.shape, device, f"{where}: encode")
    shape = states.shape
    output = call("denoise", states, spec.levels.tau[-1:].double(), [condition])
    doubled = (1, shape[1] * (2 if spec.learned_variance else 1), *shape[2:])
    _check_tensor(output, torch.Size(doubled), device, f"{where}: denoise")
    _check_tensor(call("decode", states), images.shape, device, f"{where}: decode")


def _check_tensor(result: Any, shape: torch.Size | None, device: torch.device, where: str) -> None:
    if not isinstance(result, Tensor):
        raise ModelError(f"{where} gave a {type(result).__name__}; it must give a torch tensor")
    if result.dtype != torch.float32 or result.device.type != device.type:
        raise ModelError(
            f"{where} gave {result.dtype} on {result.device}; it must give float32 on {device.type}"
        )
    if result.ndim != 4 or len(result) != 1 or (shape is not None and result.shape != shape):
        wanted = "one row of four dimensions" if shape is None else f"shape {tuple(shape)}"
        raise ModelError(f"{where} gave shape {tuple(result.shape)} for one image; it must give {wanted}")
