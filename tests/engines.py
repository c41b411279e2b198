"""Small denoisers, walks and draws for the tests of the slot engine.

`Tiny` is a real network (convolutions, group norm, attention) of a millisecond, whose last bits change with
the shape of its batch, as every network's do: a draw computed in another shape anywhere comes out different.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from boomerang_batch.diffusion.denoiser import Condition, DenoiserSpec
from boomerang_batch.diffusion.engine import Draw, Region, Walk, Window
from boomerang_batch.diffusion.noise import Purpose, key_words, noise_key, normal
from boomerang_batch.diffusion.samplers import build_solver, jump, step
from boomerang_batch.diffusion.schedule import build_schedule, flow_levels, ve_levels, vp_levels
from tests.oracles import linear_levels

CHANNELS = 2
CLASSES = 5
SIZE = 8
STEPS = 5

_ZERO_SNR = vp_levels(torch.linspace(0.999, 0, 20, dtype=torch.float64) ** 2)
_FLOW = flow_levels(torch.linspace(0.05, 1, 20), 50.0 * torch.arange(1, 21))
_VE = ve_levels(torch.logspace(-2, 1, 20, dtype=torch.float64), torch.arange(20))

SAMPLERS: dict[str, dict] = {
    "ddpm": {"eta": 1.0},
    "ddim": {"eta": 0.0},
    "half": {"eta": 0.5},
    "2m": {"eta": 0.0, "order": 2},
    "sample": {"eta": 1.0, "prediction": "sample"},
    "guided": {"eta": 1.0, "guidance": 2.0},
    "optimal": {"eta": 1.0, "variance": "optimal", "data_variance": 0.3},
    "large": {"eta": 1.0, "variance": "fixed_large"},
    "learned": {"eta": 1.0, "variance": "learned"},
    "zero-snr": {"eta": 1.0, "levels": _ZERO_SNR, "prediction": "v_prediction"},
    "flow-euler": {"eta": 0.0, "levels": _FLOW, "prediction": "flow", "clip_range": None},
    "flow-2m": {"eta": 0.0, "order": 2, "levels": _FLOW, "prediction": "flow", "clip_range": None},
    "flow-ancestral": {"eta": 1.0, "levels": _FLOW, "prediction": "flow", "clip_range": None},
    "ve-euler": {"eta": 0.0, "levels": _VE, "prediction": "score"},
    "ve-score": {"eta": 1.0, "levels": _VE, "prediction": "score"},
    "ve-2m": {"eta": 0.0, "order": 2, "levels": _VE, "prediction": "score"},
}
"""Every way to step, each with the kind of model that it is for."""


def order_of(sampler: str) -> int:
    """1 or 2."""
    return SAMPLERS[sampler].get("order", 1)


class _Network(nn.Module):
    def __init__(self, out_channels: int, width: int = 16) -> None:
        super().__init__()
        self.into = nn.Conv2d(CHANNELS, width, 3, padding=1)
        self.time = nn.Linear(8, width)
        self.label = nn.Embedding(CLASSES, width)
        self.norm = nn.GroupNorm(4, width)
        self.attention = nn.Linear(width, 3 * width)
        self.out = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(self, x: Tensor, tau: Tensor, labels: Tensor) -> Tensor:
        waves = tau.float()[:, None] * torch.tensor([1.0, 0.1, 0.01, 0.001])
        told = self.time(torch.cat([waves.sin(), waves.cos()], 1)) + self.label(labels)
        hidden = nn.functional.silu(self.norm(self.into(x) + told[:, :, None, None]))
        query, key, value = self.attention(hidden.flatten(2).mT).chunk(3, -1)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.out(hidden + mixed.mT.view_as(hidden))


class Tiny:
    """A class-conditional denoiser, on images or on the latents of a real little autoencoder.

    `fault` is called with the name of the method and the shape of its batch, and may raise.
    """

    def __init__(self, sampler: str = "ddpm", *, latent: bool = False) -> None:
        facts = SAMPLERS[sampler]
        self.fault: Callable[[str, torch.Size], None] = lambda method, shape: None
        self.calls: list[torch.Size] = []
        learned = facts.get("variance") == "learned"
        self._guidance: float | None = facts.get("guidance")
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self._network = _Network(CHANNELS * (2 if learned else 1)).eval().requires_grad_(False)
            self._encoder = nn.Conv2d(CHANNELS, CHANNELS, 4, stride=2, padding=1).requires_grad_(False)
            self._decoder = nn.ConvTranspose2d(CHANNELS, CHANNELS, 4, stride=2, padding=1)
            self._decoder.requires_grad_(False)
        self.spec = DenoiserSpec(
            channels=CHANNELS,
            height=SIZE,
            width=SIZE,
            size_multiple=4,
            latent=latent,
            state_factor=2 if latent else 1,
            value_range=(-1.0, 1.0),
            levels=facts.get("levels") or linear_levels(20, 0.001, 0.3),
            prediction=facts.get("prediction", "epsilon"),
            learned_variance=learned,
            clip_range=facts.get("clip_range", 2.0),
            fractional_tau=True,
            conditioning="label",
            classes=CLASSES,
            digest="0" * 64,
        )

    def encode(self, images: Tensor) -> Tensor:
        self.fault("encode", images.shape)
        return self._encoder(images) if self.spec.latent else images

    def decode(self, x_0: Tensor) -> Tensor:
        self.fault("decode", x_0.shape)
        return self._decoder(x_0) if self.spec.latent else x_0

    def denoise(self, x_t: Tensor, tau: Tensor, conditions: Sequence[Condition]) -> Tensor:
        self.fault("denoise", x_t.shape)
        self.calls.append(x_t.shape)
        labels = torch.tensor(conditions)
        with torch.no_grad():
            if self._guidance is None:
                return self._network(x_t, tau, labels)
            # In one call of twice the rows, as the models do it.
            labels = torch.cat([labels, torch.full_like(labels, CLASSES - 1)])
            told, untold = self._network(torch.cat([x_t, x_t]), torch.cat([tau, tau]), labels).chunk(2)
            return untold + self._guidance * (told - untold)


@functools.cache
def walk_at(timestep: int, sampler: str = "ddpm") -> Walk:
    """The walk from one of the chain's 20 timesteps, on a grid of STEPS nodes."""
    facts = SAMPLERS[sampler]
    spec = Tiny(sampler).spec
    schedule = build_schedule(
        spec.levels, grid="linspace", steps=STEPS, t=("timestep", timestep), start="exact"
    )
    solver = build_solver(
        schedule,
        prediction=spec.prediction,
        eta=facts["eta"],
        variance=facts.get("variance", "fixed_small"),
        data_variance=facts.get("data_variance"),
        clip_range=spec.clip_range,
        order=order_of(sampler),
    )
    return Walk(schedule, solver)


def draw(
    number: int,
    *,
    timestep: int = 10,
    sampler: str = "ddpm",
    size: int = SIZE,
    variant: int = 0,
    **options: object,
) -> Draw:
    """One draw of many, told by its number; a variant has the same image and label, and other noise."""
    generator = torch.Generator().manual_seed(number)
    settings = {
        "tag": number,
        "image": torch.rand(CHANNELS, size, size, generator=generator) * 2 - 1,
        "noise_key": noise_key(bytes(32), identity=b"%d" % number, variant=variant),
        "walk": walk_at(timestep, sampler),
        "condition": number % CLASSES,
    }
    return Draw(**settings | options)


def region(number: int, *, size: int = SIZE, factor: int = 1) -> Region:
    """A region of a draw's own shape."""
    generator = torch.Generator().manual_seed(1000 + number)
    side = size // factor
    return Region(
        mask=torch.rand(1, side, side, generator=generator) > 0.5,
        outside=torch.rand(CHANNELS, size, size, generator=generator) * 2 - 1,
    )


def window(number: int, *, size: int = SIZE, factor: int = 1) -> Window:
    """A tile's place in a larger field."""
    side = size // factor
    return Window(corner=(number % 3, 2 * (number % 2)), field=(side + 3, side + 2 + number % 4))


def alone(draw: Draw, model: Tiny, *, batch_size: int, encode_batch: int = 1) -> dict[int, Tensor]:
    """What each emitted pass of a draw gives, computed one sample at a time by Algorithm 1, without slots.

    Every network call has the shape that a batch would have, the draw's row first and zeros in the others.
    """

    def in_shape(function: Callable[[Tensor], Tensor], row: Tensor, size: int) -> Tensor:
        return function(torch.cat([row, row.new_zeros((size - 1, *row.shape[1:]))]))[:1]

    def denoise(batch: Tensor) -> Tensor:
        tau = torch.full((batch_size,), draw.walk.tau[node], dtype=torch.float64)
        return model.denoise(batch, tau, [draw.condition] * batch_size)

    def noise(purpose: Purpose, at: int) -> Tensor:
        (top, left), (height, width) = draw.window.corner, draw.window.field
        whole = normal(
            key_words([draw.noise_key]),
            (CHANNELS, height, width),
            purpose=purpose,
            node=torch.tensor([at]),
            pass_index=number - 1,
        )
        return whole[:, :, top : top + x.shape[2], left : left + x.shape[3]]

    x = in_shape(model.encode, draw.image[None], encode_batch)
    if draw.window is None:
        draw = dataclasses.replace(draw, window=Window(corner=(0, 0), field=(x.shape[2], x.shape[3])))
    known = None
    if draw.region is not None and draw.walk.n:
        known = (in_shape(model.encode, draw.region.outside[None], encode_batch), draw.region.mask[None])
    table = draw.walk.solver.table.float()
    results = {}
    for number in range(1, draw.passes + 1):
        if draw.walk.n:
            if known is not None:
                x = torch.where(known[1], x, known[0])
            x = jump(table[-1:], x, noise(Purpose.FORWARD, 0))
        before = None
        for node in range(draw.walk.n, 0, -1):
            output = in_shape(denoise, x, batch_size)
            z = noise(Purpose.REVERSE, node)
            x, x0 = step(table[node : node + 1], x, output, z, before, known)
            before = x0 if draw.walk.solver.order == 2 else None
        if draw.emit_all or number == draw.passes:
            results[number] = in_shape(model.decode, x, encode_batch)[0]
    return results


@functools.cache
def alone_once(sampler: str, latent: bool, batch_size: int, encode_batch: int, **options: object) -> dict:
    """`alone`, of a draw that may be asked for again."""
    model = Tiny(sampler, latent=latent)
    with torch.inference_mode():
        return alone(
            planned(sampler, latent, **options), model, batch_size=batch_size, encode_batch=encode_batch
        )


def planned(
    sampler: str, latent: bool, *, number: int, tiled: bool = False, limited: bool = False, **options: object
) -> Draw:
    """A draw as a plan of plain values tells it."""
    size, factor = int(options.get("size", SIZE)), 2 if latent else 1
    return draw(
        number,
        sampler=sampler,
        window=window(number, size=size, factor=factor) if tiled else None,
        region=region(number, size=size, factor=factor) if limited else None,
        **options,
    )
