"""Around a region the network is shown each node's own noise level, and the seam does not show."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from boomerang_batch.diffusion.denoiser import Condition
from boomerang_batch.diffusion.draws import Draw
from boomerang_batch.diffusion.engine import Engine, Region, Walk
from boomerang_batch.diffusion.noise import noise_key
from boomerang_batch.diffusion.samplers import build_solver
from boomerang_batch.diffusion.schedule import build_schedule
from tests.engines import CHANNELS, SAMPLERS, SIZE, Tiny, order_of, walk_at
from tests.oracles import gaussian_oracle, linear_levels

ONE_THREAD = {"device": "cpu", "threads": 1}


class Watched(Tiny):
    """Keeps what it is shown, by tau."""

    def __init__(self, sampler: str) -> None:
        super().__init__(sampler)
        self.shown: dict[float, list[Tensor]] = defaultdict(list)

    def denoise(self, x_t: Tensor, tau: Tensor, conditions: Sequence[Condition]) -> Tensor:
        for state, at in zip(x_t, tau.tolist(), strict=True):
            if state.any():  # an idle slot's is zero
                self.shown[at].append(state.clone())
        return super().denoise(x_t, tau, conditions)


def key(number: int) -> bytes:
    return noise_key(bytes(32), identity=b"%d" % number, variant=0)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name not in ("large", "optimal", "learned")])
def test_around_a_region_each_node_has_its_own_noise_level(sampler):
    """Known pixels times alpha, plus noise of sigma: over 300 keys, at every node and in both passes.

    (The three left out add more noise than the forward law has, everywhere.)
    """
    generator = torch.Generator().manual_seed(1)
    outside = torch.rand(CHANNELS, SIZE, SIZE, generator=generator) * 2 - 1
    mask = torch.zeros(1, SIZE, SIZE, dtype=torch.bool)
    mask[:, 2:5, 3:6] = True
    walk = walk_at(14, sampler)
    model = Watched(sampler)
    draws = [
        Draw(
            tag=number,
            image=torch.zeros(CHANNELS, SIZE, SIZE),
            noise_key=key(number),
            walk=walk,
            condition=0,
            passes=2,
            region=Region(mask=mask, outside=outside),
        )
        for number in range(300)
    ]
    engine = Engine(model, batch_size=50, order=order_of(sampler), **ONE_THREAD)
    list(engine.run(draws))
    engine.close()
    there = ~mask.expand_as(outside)
    for node in range(1, walk.n + 1):
        states = torch.stack(model.shown[float(walk.tau[node])])
        alpha, sigma = float(walk.schedule.alpha[node]), float(walk.schedule.sigma[node])
        noise = (states[:, there].double() - alpha * outside[there]) / sigma
        count = noise.numel()
        assert count == 600 * (CHANNELS * (SIZE * SIZE - 9))
        assert abs(float(noise.mean())) < 5 / count**0.5
        assert abs(float(noise.var()) - 1) < 5 * (2 / count) ** 0.5


SIDE = 12


def smooth_fields() -> tuple[Tensor, Tensor]:
    """Mean and covariance of fields whose neighbours are alike (a length of 3 pixels)."""
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    places = torch.stack([rows.flatten(), columns.flatten()], 1).double()
    covariance = 0.25 * torch.exp(-torch.cdist(places, places).square() / (2 * 3.0**2))
    return torch.zeros(SIDE * SIDE, dtype=torch.float64), covariance + 1e-6 * torch.eye(SIDE * SIDE)


def roughness(images: Tensor, edge: Tensor) -> float:
    """The mean squared step between horizontal neighbours (..., SIDE, SIDE - 1) where `edge` says."""
    steps = images[..., :, 1:] - images[..., :, :-1]
    return float(steps[..., edge].square().mean())


def test_the_seam_does_not_show():
    """Steps across the edge are those of any smooth field; with a new inside pasted in they are not."""
    mean, covariance = smooth_fields()
    model = gaussian_oracle(mean, covariance, linear_levels(100, 1e-3, 0.2))
    schedule = build_schedule(model.spec.levels, grid="linspace", steps=50, t=("fraction", 1.0), start="exact")
    walk = Walk(schedule, build_solver(schedule, prediction="epsilon", eta=1.0))
    mask = torch.zeros(1, SIDE, SIDE, dtype=torch.bool)
    mask[:, 3:9, 4:9] = True
    fields = torch.distributions.MultivariateNormal(mean, covariance)
    torch.manual_seed(0)
    sources = fields.sample((64,)).float().view(-1, 1, SIDE, SIDE)

    def draw(number: int, region: Region | None) -> Draw:
        return Draw(tag=number, image=sources[number], noise_key=key(number), walk=walk, region=region)

    engine = Engine(model, batch_size=32, order=1, **ONE_THREAD)
    limited = {
        one.draw.tag: one.image
        for one in engine.run(draw(n, Region(mask=mask, outside=sources[n])) for n in range(64))
    }
    free = {one.draw.tag: one.image for one in engine.run(draw(n, None) for n in range(64))}
    engine.close()
    inside = torch.stack([limited[n] for n in range(64)])
    pasted = torch.where(mask, torch.stack([free[n] for n in range(64)]), sources)
    assert torch.equal(inside[:, ~mask], sources[:, ~mask])
    edge = mask[0, :, 1:] != mask[0, :, :-1]
    within = mask[0, :, 1:] & mask[0, :, :-1]
    natural = roughness(sources, edge)
    assert roughness(inside, within) == pytest.approx(natural, rel=0.3)
    assert float((inside - sources)[:, mask].square().mean()) > 0.1  # it is another field in there
    assert roughness(pasted, edge) > 5 * natural
    assert roughness(inside, edge) < 2 * natural
