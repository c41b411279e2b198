"""What must never be saved as a success, and what must be known before a run spends anything.

After each output: not finite, flat, untouched, or the same as another's. Before the first: whether batching
changes what the model says about a sample, which would make every promise of repeatability void. How large a
batch may be is the business of `batch_size`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from boomerang_batch.diffusion.denoiser import Condition, Denoiser, DenoiserSpec
from boomerang_batch.diffusion.noise import Purpose, key_words, normal
from boomerang_batch.errors import ModelError, SampleError

OVERFLOWS = ("non-finite-output", "flat-output")
"""Reasons for which half precision may be to blame, so that float32 deserves a try."""

_FLAT = 0.5 / 255
"""Half a grey level, as a share of the value range: less contrast than this is one shade once it is rounded."""

ValueRange = tuple[float, float]
"""Black and white, as a model has them. An image keeps nothing that is beyond them."""

_ALONE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}
"""How far, of the output's RMS, a sample alone may be from the same one in a batch; see `check_batching`."""


def check_output(x_0: Tensor, source: Tensor, *, value_range: ValueRange) -> None:
    """Raise SampleError if `x_0` (C, H, W) can't be an image made from `source` of the same shape.

    Half-precision networks overflow to NaN, which an encoder would turn into a black image; a collapsed one
    gives a single colour. Both have passed for success in other tools.
    """
    contrast = _contrast(x_0, value_range)
    if not math.isfinite(contrast):
        raise SampleError("non-finite-output", "the model returned NaN or infinity; try dtype float32")
    if contrast < _FLAT <= _contrast(source, value_range):
        raise SampleError("flat-output", "the model returned a single colour for an image that has several")


def check_changed(x_0: Tensor, source: Tensor, *, value_range: ValueRange) -> None:
    """Raise SampleError if `x_0` (C, H, W) is `source` bit for bit, where the source has any contrast.

    For outputs that took at least one evaluation: with none, the input is the right answer. Both are float
    states or images before rounding, which no noise and denoising bring back exactly.
    """
    if torch.equal(x_0, source) and _contrast(source, value_range) >= _FLAT:
        raise SampleError(
            "output-equals-input", "the model gave the image back unchanged; check its weights and t"
        )


class RepeatedOutputError(SampleError):
    """Two draws gave the same output; `first` is the one that was there before, as good or bad as this one."""

    def __init__(self, first: Hashable) -> None:
        super().__init__(
            "output-repeated",
            "the model gave this sample exactly what it gave another one drawn with other noise",
        )
        self.first = first


class Seen:
    """The outputs of one task so far, by digest, to tell when two draws gave the same one.

    A collapsed model, or noise used twice, gives different samples one image.
    """

    def __init__(self, value_range: ValueRange) -> None:
        self._range = value_range
        self._draws: dict[bytes, Hashable] = {}

    def check(self, x_0: Tensor, *, draw: Hashable) -> None:
        """Raise RepeatedOutputError if another draw gave just this output (C, H, W), unless it has no contrast.

        `draw` names where the noise came from: noise key and pass. Equal images under one noise key rightly
        give equal outputs, and so does a repetition. For outputs that took at least one evaluation.
        """
        if _contrast(x_0, self._range) < _FLAT:
            return
        data = x_0.detach().cpu().contiguous().view(torch.uint8).numpy()
        digest = hashlib.blake2b(data.tobytes(), digest_size=16).digest()
        first = self._draws.setdefault(digest, draw)
        if first != draw:
            raise RepeatedOutputError(first)


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
) -> None:
    """Raise ModelError if what the model says about a sample depends on what shares its batch.

    images (k, C, H, W) as from `synthetic_images`, on the model's device, k >= 3; conditions and taus one for
    each, taus different from one another; batch_size the planned one; dtype the network's. As many of the
    samples as fill half a batch are denoised beside padding, then at other positions beside other neighbours:
    both must agree to the last bit. The first sample is also denoised alone, in a batch of one, where kernels
    of another shape may round differently: within 1e-3 of the output's RMS in float32, 0.1 in half precision.
    Measured on a CPU over 52 random UNets of 8 to 32 pixels and the shipped model, batches of 2 to 64: at most
    4e-6 and 0.04 (bfloat16). Costs two batches and one sample.
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
        # Every state anew, under the next sample's tau and condition.
        _Row(state=-probe.state.flip(-1), tau=after.tau, condition=after.condition)
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
    alone = _denoise(denoiser, probes[:1])
    distance = _distance(padded[:1], alone)
    if distance > _ALONE[dtype]:
        raise ModelError(
            f"a sample alone comes out {distance:.2g} of the output's RMS away from the same one in a batch of "
            f"{batch_size}, more than rounding explains ({_ALONE[dtype]:g}): the model depends on the batch's "
            "size; mend it, or set batch_size: 1"
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
    levels, rows = denoiser.spec.levels, []
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


def _contrast(image: Tensor, value_range: ValueRange) -> float:
    """The largest range of any one channel of `image` (C, H, W) within `value_range`, as a share of it.

    NaN if any value is NaN or infinite.
    """
    channels = image.flatten(1)
    # One at a time: each is vectorised, and `aminmax` over a dimension is not (seven times as slow).
    least, most = channels.amin(1), channels.amax(1)
    if not (least.isfinite() & most.isfinite()).all():
        return math.nan
    low, high = value_range
    return float((most.clamp(low, high) - least.clamp(low, high)).amax()) / (high - low)
