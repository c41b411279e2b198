"""The engine on a real small UNet: a sample's bits depend on the sample, never on its batch."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from boomerang_batch.diffusion.boomerang import KeyedNoise, boomerang
from boomerang_batch.diffusion.denoiser import DenoiserSpec
from boomerang_batch.diffusion.engine import Draw, Engine
from boomerang_batch.diffusion.noise import noise_key
from boomerang_batch.diffusion.samplers import build_solver
from boomerang_batch.diffusion.schedule import build_schedule
from tests.oracles import linear_levels

BATCH = 4
CLASSES = 5
SIZE = 8


class SmallUNet:
    """An untrained UNet with attention and group norm, class-conditional, as a Denoiser."""

    def __init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self._network = UNet2DModel(
                sample_size=SIZE,
                in_channels=1,
                out_channels=1,
                layers_per_block=1,
                block_out_channels=(8, 16),
                down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                up_block_types=("AttnUpBlock2D", "UpBlock2D"),
                norm_num_groups=4,
                attention_head_dim=4,
                num_class_embeds=CLASSES,
            ).eval()
        self.shapes: list[torch.Size] = []
        self.spec = DenoiserSpec(
            channels=1,
            height=SIZE,
            width=SIZE,
            value_range=(-1.0, 1.0),
            levels=linear_levels(),
            prediction="epsilon",
            clip_range=1.0,
            fractional_tau=True,
            classes=CLASSES,
            digest="0" * 64,
        )

    def denoise(self, x_t: Tensor, tau: Tensor, labels: Tensor | None) -> Tensor:
        self.shapes.append(x_t.shape)
        with torch.no_grad():
            return self._network(x_t, tau.float(), class_labels=labels).sample


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def denoiser() -> SmallUNet:
    return SmallUNet()


@pytest.fixture(scope="module")
def engine(denoiser) -> Engine:
    return engine_of(denoiser)


def engine_of(denoiser: SmallUNet, *, timestep: int = 400, batch_size: int = BATCH) -> Engine:
    schedule = build_schedule(
        denoiser.spec.levels, grid="linspace", steps=8, t=("timestep", timestep), start="exact"
    )
    solver = build_solver(schedule, prediction="epsilon", eta=1.0, clip_range=1.0)
    return Engine(denoiser, schedule, solver, batch_size=batch_size)


def draw(number: int, variant: int = 0) -> Draw:
    generator = torch.Generator().manual_seed(number)
    return Draw(
        tag=(number, variant),
        x_0=torch.rand(1, SIZE, SIZE, generator=generator) * 2 - 1,
        noise_key=noise_key(bytes(32), identity=b"%d" % number, variant=variant),
        label=number % CLASSES,
    )


@pytest.fixture(scope="module")
def reference(engine) -> dict[int, Tensor]:
    """Every sample as it comes out alone, in a batch of padding."""
    return {i: next(engine.run([draw(i)]))[1].clone() for i in range(8)}


@given(order=st.permutations(range(8)), count=st.integers(1, 8))
@settings(max_examples=12, deadline=None)
def test_bits_depend_on_neither_neighbours_nor_position_nor_padding(engine, reference, order, count):
    results = list(engine.run(draw(i) for i in order[:count]))
    assert [drawn.tag[0] for drawn, _ in results] == list(order[:count])
    for drawn, result in results:
        assert torch.equal(result, reference[drawn.tag[0]])


def test_a_sample_in_every_position_beside_itself(engine, reference):
    for position in range(BATCH):
        numbers = [7] * BATCH
        numbers[position] = 3
        results = [result for _, result in engine.run([draw(i) for i in numbers])]
        for number, result in zip(numbers, results, strict=True):
            assert torch.equal(result, reference[number])


def test_a_poisoned_neighbour_spoils_no_one(engine, reference):
    bad = draw(1)
    for poison in (float("nan"), float("inf"), 1e30):
        poisoned = Draw(
            tag="bad", x_0=torch.full_like(bad.x_0, poison), noise_key=bad.noise_key, label=bad.label
        )
        results = list(engine.run([draw(0), poisoned, draw(2), draw(3)]))
        for position in (0, 2, 3):
            assert torch.equal(results[position][1], reference[position])


def test_the_result_is_boomerangs_own(engine, denoiser, reference):
    batch = [draw(i) for i in range(BATCH)]
    x_0 = torch.stack([one.x_0 for one in batch])
    out = boomerang(
        x_0,
        denoiser,
        engine.schedule,
        engine.solver,
        KeyedNoise([one.noise_key for one in batch], x_0),
        torch.tensor([one.label for one in batch]),
    )
    for i in range(BATCH):
        assert torch.equal(out[i], reference[i])


def test_label_variant_and_key_all_matter(engine, reference):
    original = draw(0)
    other_label = Draw(tag=0, x_0=original.x_0, noise_key=original.noise_key, label=1)
    results = [result for _, result in engine.run([draw(0, variant=1), other_label])]
    assert not torch.equal(results[0], reference[0])
    assert not torch.equal(results[1], reference[0])


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 8, 9])
def test_every_draw_comes_back_once_in_order_in_one_shape(denoiser, count):
    engine = engine_of(denoiser)
    denoiser.shapes.clear()
    results = list(engine.run(draw(i) for i in range(count)))
    assert [drawn.tag for drawn, _ in results] == [(i, 0) for i in range(count)]
    assert {result.shape for _, result in results} <= {torch.Size([1, SIZE, SIZE])}
    assert {result.dtype for _, result in results} <= {torch.float32}
    assert set(denoiser.shapes) <= {torch.Size([BATCH, 1, SIZE, SIZE])}
    assert len(denoiser.shapes) == -(-count // BATCH) * engine.schedule.n


def test_draws_are_taken_batch_by_batch_as_results_are_asked_for(engine):
    taken = []

    def draws():
        for i in itertools.count():
            taken.append(i)
            yield draw(i % 8)

    results = engine.run(draws())
    assert taken == []
    next(results)
    assert len(taken) == BATCH
    for _ in range(BATCH):
        next(results)
    assert len(taken) == 2 * BATCH


def test_two_threads_share_an_engine(engine, reference):
    """Each thread gets its own results, bit for bit, and no batch runs beside another."""
    orders = [[i % 8 for i in range(start, start + 12)] for start in (0, 3)]

    def run(numbers):
        return [(drawn.tag[0], result) for drawn, result in engine.run(draw(i) for i in numbers)]

    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(run, orders))
    for numbers, outcome in zip(orders, outcomes, strict=True):
        assert [number for number, _ in outcome] == numbers
        assert all(torch.equal(result, reference[number]) for number, result in outcome)


def test_batches_of_two_threads_take_turns(denoiser):
    class Watched:
        spec = denoiser.spec
        inside = 0
        most = 0

        def denoise(self, x_t, tau, labels):
            Watched.inside += 1
            Watched.most = max(Watched.most, Watched.inside)
            output = denoiser.denoise(x_t, tau, labels)
            Watched.inside -= 1
            return output

    watched = engine_of(denoiser)
    watched.denoiser = Watched()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda start: list(watched.run(draw(start + i) for i in range(8))), range(4)))
    assert Watched.most == 1


def test_an_unconditional_denoiser_gets_no_labels(denoiser):
    seen = []

    class Unconditional:
        spec = denoiser.spec

        def denoise(self, x_t, tau, labels):
            seen.append(labels)
            return torch.zeros_like(x_t)

    plain = engine_of(denoiser)
    plain.denoiser = Unconditional()
    one = draw(0)
    list(plain.run([Draw(tag=None, x_0=one.x_0, noise_key=one.noise_key)]))
    assert seen == [None] * plain.schedule.n


def test_t_zero_returns_the_draws_own_images(denoiser):
    engine = engine_of(denoiser, timestep=0)
    denoiser.shapes.clear()
    for drawn, result in engine.run(draw(i) for i in range(6)):
        assert torch.equal(result, drawn.x_0)
    assert denoiser.shapes == []


def test_other_batch_sizes_agree_within_a_grey_level(denoiser, reference):
    """Bits may differ there, which is why the batch shape belongs to the recipe; images must not."""
    for batch_size in (1, 3, 8):
        for drawn, result in engine_of(denoiser, batch_size=batch_size).run(draw(i) for i in range(8)):
            assert float((result - reference[drawn.tag[0]]).abs().max()) < 1e-3
