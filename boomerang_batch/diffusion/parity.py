"""What must be known of a model before a run spends anything: whether batching changes what it says.

That would make every promise of repeatability void. How large a batch may be is the business of `batch_size`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from boomerang_batch.diffusion.batch_size import in_fixed_batches
from boomerang_batch.diffusion.denoiser import Condition, Denoiser, DenoiserSpec
from boomerang_batch.diffusion.noise import Purpose, key_words, normal
from boomerang_batch.errors import ModelError

_ALONE = {torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.2}
"""How far a sample alone may be from the same one in a batch, RMS over RMS; see `check_batching`."""


def synthetic_images(
    spec: DenoiserSpec, count: int, *, size: tuple[int, int] | None = None, device: torch.device | str = "cpu"
) -> Tensor:
    """Noise of a model's (channels, height, width) and value range, (count, C, H, W) float32; no user's data.

    `size` is (height, width) where it is not the model's own.
    """
    height, width = size or (spec.height, spec.width)
    low, high = spec.value_range
    draws = _normals(count, (spec.channels, height, width), torch.device(device))
    return (low + high) / 2 + (high - low) / 2 * torch.tanh(draws)


def check_batching(
    denoiser: Denoiser,
    images: Tensor,
    conditions: Sequence[Condition],
    taus: Sequence[float],
    batch_size: int,
    *,
    dtype: torch.dtype = torch.float32,
    compiled: bool = False,
) -> None:
    """Raise ModelError if what the network says about a sample depends on what shares its batch.

    images (k, C, H, W) as from `synthetic_images`, on the model's device, k >= 3; conditions and taus one for
    each, taus different from one another; batch_size the planned one; dtype the network's; compiled whether it
    is compiled for batches of that size. As many of the samples as fill half a batch are denoised beside
    padding, then at other positions beside other neighbours: both must agree to the last bit. Each is also
    denoised alone, in a batch of one, where kernels of another shape may round differently: the RMS of the
    difference is within 1e-3 of the output's in float32, and within 0.2 in half precision, whose rounding
    guidance multiplies. Costs two batches and those samples.
    """
    if not len(images) == len(conditions) == len(taus) >= 3:
        raise ValueError(
            f"{len(images)} images, {len(conditions)} conditions, {len(taus)} taus: need 3 or more of each"
        )
    probes = _probes(denoiser, images, conditions, taus)
    count = min(len(probes), max(1, batch_size // 2))
    # First and last row are told different things in the two batches, lest a model that listens to one pass.
    pad = _Row(state=torch.zeros_like(probes[0].state), tau=probes[-1].tau, condition=probes[-1].condition)
    others = [
        # Every state another and louder, under the next sample's tau and condition.
        _Row(state=-2 * probe.state.flip(-1), tau=after.tau, condition=after.condition)
        for probe, after in zip(probes, probes[1:] + probes[:1], strict=True)
    ]
    padded = _denoise(denoiser, probes[:count] + [pad] * (batch_size - count))[:count]
    among = [others[slot % len(others)] for slot in range(batch_size - count)] + probes[:count][::-1]
    moved = _denoise(denoiser, among).flip(0)[:count]
    if not _same(padded, moved):
        cause = _cause(denoiser, probes[:count], pad, others, batch_size)
        raise ModelError(
            f"batching changes this model's output by up to {_distance(padded, moved):.2g} of its RMS: "
            f"{cause}. Every row must depend on its own sample, tau and condition alone; with a model that "
            "can't be mended set batch_size: 1"
        )
    # Of a compiled network uncompiled: it would be compiled anew for a shape that the run never shows it.
    with torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext():
        alone = torch.cat([_denoise(denoiser, [probe]) for probe in probes[:count]])
    _check_alone(padded, alone, batch_size, dtype, mend="batch_size: 1")


def check_autoencoder(
    denoiser: Denoiser, images: Tensor, batch_size: int, *, dtype: torch.dtype = torch.float32
) -> None:
    """Raise ModelError if a latent model's autoencoder lets images that share its batch change one another.

    images (k, C, H, W) as for `check_batching`; batch_size the autoencoder's own. As many images as fill half
    of that are encoded, in two companies and alone, as there. What comes of them is decoded in two companies;
    not alone, for the rounding of another shape may lead to another entry of a codebook. Raises ModelError
    also where memory runs out. A pixel model has no autoencoder, and passes.
    """
    if not denoiser.spec.latent:
        return
    mend = "model.autoencoder.batch_size: 1"
    low, high = denoiser.spec.value_range
    middle = (low + high) / 2
    with torch.inference_mode():
        latents = in_fixed_batches(denoiser.encode, images, 1)
        for name, function, rows in (
            ("encoder", denoiser.encode, images),
            ("decoder", denoiser.decode, latents),
        ):
            probes = rows[: max(1, batch_size // 2)]
            # Neighbours of larger values than any probe's: black and white, or louder latents.
            others = torch.where(rows.flip(-1) > middle, low, high) if name == "encoder" else -2 * rows.flip(-1)
            beside = others[torch.arange(batch_size - len(probes), device=others.device) % len(others)]
            padded = in_fixed_batches(function, probes, batch_size)
            moved = in_fixed_batches(function, torch.cat([beside, probes.flip(0)]), batch_size)
            moved = moved[len(beside) :].flip(0)
            if not _same(padded, moved):
                raise ModelError(
                    f"the images in one batch of this model's autoencoder change one another in its {name}, by "
                    f"up to {_distance(padded, moved):.2g} of its output's RMS (BatchNorm in training mode, "
                    f"dropout, or attention over the batch); if it can't be mended set {mend}"
                )
            if name == "encoder":
                _check_alone(padded, latents[: len(padded)], batch_size, dtype, mend=mend)


def _check_alone(padded: Tensor, alone: Tensor, batch_size: int, dtype: torch.dtype, *, mend: str) -> None:
    distance = float((padded - alone).square().mean().sqrt() / padded.square().mean().sqrt())
    if distance > _ALONE[dtype]:
        raise ModelError(
            f"a sample alone comes out {distance:.2g} of the output's RMS away from the same one in a batch of "
            f"{batch_size}, more than rounding explains ({_ALONE[dtype]:g}): the model depends on the batch's "
            f"size; mend it, or set {mend}"
        )


@dataclass(frozen=True, kw_only=True)
class _Row:
    """One row of a batch for the self-test: a state (c, h, w) and what the model is told with it."""

    state: Tensor
    tau: float
    condition: Condition


def _probes(
    denoiser: Denoiser, images: Tensor, conditions: Sequence[Condition], taus: Sequence[float]
) -> list[_Row]:
    """States as noisy as their tau says, one image through the encoder at a time."""
    levels, rows = denoiser.spec.levels_at(*images.shape[2:]), []
    with torch.inference_mode():
        states = torch.cat([denoiser.encode(image[None]) for image in images])
    noise = _normals(len(states), states.shape[1:], states.device)
    for state, eps, tau, condition in zip(states, noise, taus, conditions, strict=True):
        level = int((levels.tau - tau).abs().argmin())
        alpha, sigma = float(levels.alpha[level]), float(levels.sigma[level])
        rows.append(_Row(state=alpha * state + sigma * eps, tau=tau, condition=condition))
    return rows


def _denoise(denoiser: Denoiser, rows: Sequence[_Row]) -> Tensor:
    with torch.inference_mode():
        return denoiser.denoise(
            torch.stack([row.state for row in rows]),
            torch.tensor([row.tau for row in rows], dtype=torch.float64),
            [row.condition for row in rows],
        )


def _cause(
    denoiser: Denoiser, probes: Sequence[_Row], pad: _Row, others: Sequence[_Row], batch_size: int
) -> str:
    """Which of the ways a batch can matter is this model's."""
    rest = batch_size - len(probes)
    padded = _denoise(denoiser, [*probes, *[pad] * rest])
    if not _same(padded, _denoise(denoiser, [*probes, *[pad] * rest])):
        return "it says something else each time it is asked (dropout, or random draws of its own)"
    one = _denoise(denoiser, [probes[0]] * batch_size)
    if not _same(one, one[:1].expand_as(one)):
        return "one sample in every row comes out different by row, so it depends on the position"
    neighbours = [
        _Row(state=others[slot % len(others)].state, tau=pad.tau, condition=pad.condition)
        for slot in range(rest)
    ]
    if not _same(padded[: len(probes)], _denoise(denoiser, [*probes, *neighbours])[: len(probes)]):
        return "it mixes samples (BatchNorm in training mode, attention or a mean over the batch)"
    return "it uses one row's timestep or condition for other rows (a scalar timestep)"


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal to the last bit; NaN equals NaN, for it is not this test's concern."""
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def _distance(a: Tensor, b: Tensor) -> float:
    """The largest difference as a share of the RMS of `a`; 0 where both are 0."""
    difference = float((a - b).abs().nan_to_num(0.0).amax())
    return difference / float(a.nan_to_num(0.0).square().mean().sqrt()) if difference else 0.0


def _normals(count: int, shape: Sequence[int], device: torch.device) -> Tensor:
    keys = key_words([index.to_bytes(16, "little") for index in range(count)], device)
    return normal(keys, shape, purpose=Purpose.FORWARD, node=torch.zeros(count, dtype=torch.int64))
