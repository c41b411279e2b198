"""Codes drawn and fed in the engine's slots, beside draws of every other kind."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from boomerang_batch.diffusion.boomerang import KeyedNoise
from boomerang_batch.diffusion.codes import Code, decode, encode, inverted
from boomerang_batch.diffusion.engine import Draw, Drawn, Engine, Walk
from boomerang_batch.diffusion.samplers import build_solver
from boomerang_batch.diffusion.slots import Slots
from tests.engines import CLASSES, Tiny, draw, planned, walk_at

PATHS = ("dpm-encoder", "edit-friendly")
STOCHASTIC = ("ddpm", "half", "sample", "guided", "flow-ancestral", "ve-score")


@contextlib.contextmanager
def engine_of(sampler: str = "ddpm", *, latent: bool = False, **options: object) -> Iterator[Engine]:
    settings = {"batch_size": 4, "encode_batch": 2, "threads": 1}
    engine = Engine(Tiny(sampler, latent=latent), **settings | options)
    try:
        yield engine
    finally:
        engine.close()


def by_tag(drawn: list[Drawn]) -> dict[object, Drawn]:
    return {one.draw.tag: one for one in drawn}


def feeding(one: Drawn, **changes: object) -> Draw:
    """The draw that feeds a code to the walk it came from; its image says no more than the size."""
    size = torch.zeros(()).expand(one.image.shape)
    return dataclasses.replace(one.draw, path=None, code=one.code, image=size, **changes)


def rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def mixed(sampler: str, path: str) -> list[Draw]:
    """Paths from three t and t = 0, between draws as Boomerang makes them, one with a region."""
    at = {0: 20, 1: 13, 2: 0, 3: 5, 4: 1}
    paths = [draw(i, timestep=t, sampler=sampler, path=path) for i, t in at.items()]
    others = [planned(sampler, False, number=10 + i, timestep=9 + i, limited=i == 1) for i in range(4)]
    return [one for pair in zip(paths[:4], others, strict=True) for one in pair] + paths[4:]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("sampler", STOCHASTIC)
def test_a_code_fed_back_gives_the_image_whatever_shares_its_calls(sampler, path):
    draws = mixed(sampler, path)
    with engine_of(sampler) as engine:
        found = by_tag(list(engine.run(draws)))
        paths = [one for one in found.values() if one.draw.path]
        for one in paths:
            [alone] = engine.run([one.draw])
            assert torch.equal(alone.code.x_n, one.code.x_n)
            assert torch.equal(alone.code.residuals, one.code.residuals)
            assert one.code.residuals.shape == (one.draw.walk.n + 1, *one.draw.image.shape)
            assert torch.equal(one.image, one.draw.image)
        back = by_tag(list(engine.run([*map(feeding, paths), *(one for one in draws if not one.path)])))
    for tag, one in back.items():
        if one.draw.code is None:  # those beside it are as they were
            assert torch.equal(one.image, found[tag].image)
        else:
            assert one.code is None
            assert rms(one.image - found[tag].draw.image) < 1e-4 * rms(found[tag].draw.image)


@pytest.mark.parametrize("path", PATHS)
def test_a_latent_models_code_leads_back_to_the_latent(path):
    draws = [draw(i, timestep=4 + 3 * i, path=path) for i in range(5)]
    with engine_of(latent=True) as engine, torch.inference_mode():
        found = list(engine.run(draws))
        back = by_tag(list(engine.run(map(feeding, found))))
        model = engine.denoiser
        for one in draws:
            through = model.decode(model.encode(one.image[None]))[0]
            assert rms(back[one.tag].image - through) < 1e-4 * rms(through)


@pytest.mark.parametrize("path", PATHS)
def test_slots_draw_the_paths_of_the_reference(path):
    draws = [draw(i, timestep=17, path=path) for i in range(3)]
    model = Tiny()
    with engine_of() as engine:
        found = by_tag(list(engine.run(draws)))
    for one in draws:
        x_0, walk = one.image[None], one.walk
        noise = KeyedNoise([one.noise_key], x_0)
        expected = encode(x_0, model, walk.schedule, walk.solver, noise, [one.condition], path=path)
        code = found[one.tag].code
        assert torch.allclose(code.x_n, expected.x_n[0], atol=1e-5)
        assert torch.allclose(code.residuals, expected.residuals[:, 0], atol=1e-4)


@pytest.mark.parametrize("path", PATHS)
def test_another_label_makes_another_image_of_a_code(path):
    with engine_of() as engine:
        found = by_tag(list(engine.run([draw(i, timestep=15, path=path) for i in range(3)])))
        others = [feeding(one, condition=(one.draw.condition + 1) % CLASSES) for one in found.values()]
        for one in engine.run(others):
            assert rms(one.image - found[one.draw.tag].image) > 1e-3


@pytest.mark.parametrize("latent", [False, True])
def test_ddim_inversion_in_slots_is_the_reference_walked_up_and_down(latent):
    model, down = Tiny("ddim", latent=latent), walk_at(18, "ddim")
    turned = inverted(down.schedule)
    up = Walk(turned, build_solver(turned, prediction="epsilon", eta=0.0, clip_range=model.spec.clip_range))
    draws = [draw(i, walk=up, path="ddim") for i in range(3)] + [draw(9, walk=walk_at(0), path="ddim")]
    others = [draw(20 + i, sampler="ddim") for i in range(3)]
    with engine_of("ddim", latent=latent) as engine:
        found = by_tag(list(engine.run([*draws, *others])))
        back = by_tag(list(engine.run([feeding(found[i], walk=down) for i in range(3)])))
    with torch.inference_mode():
        for i in range(3):
            one, x_0 = found[i], model.encode(draws[i].image[None])
            begun = Code(x_n=x_0, residuals=None)
            x_n = decode(begun, model, up.schedule, up.solver, [one.draw.condition])
            assert one.code.residuals is None
            assert torch.allclose(one.code.x_n, x_n[0], atol=1e-5)
            ends = Code(x_n=x_n, residuals=None)
            x = decode(ends, model, down.schedule, down.solver, [one.draw.condition])
            assert torch.allclose(back[i].image, model.decode(x)[0], atol=1e-4)
        assert torch.allclose(found[9].code.x_n, model.encode(draws[3].image[None])[0], atol=1e-6)


@pytest.mark.parametrize("path", PATHS)
def test_a_parked_path_and_a_parked_code_go_on_where_they_were(path):
    device = torch.device("cpu")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            codes: dict[object, Code] = {}
            for resized in (False, True):
                slots = Slots(Tiny(), batch_size=4, device=device, order=1)
                slots.admit([draw(i, timestep=20, path=path) for i in range(4)])
                finished = slots.advance()
                if resized:
                    slots.resize(2)
                    slots.resize(4)
                while slots.busy:
                    finished += slots.advance()
                for one in finished:
                    code = codes.setdefault(one.draw.tag, one.code)
                    assert torch.equal(code.residuals, one.code.residuals)
                    assert torch.equal(code.x_n, one.code.x_n)
            slots = Slots(Tiny(), batch_size=4, device=device, order=1)
            fed = [dataclasses.replace(one.draw, path=None, code=codes[one.draw.tag]) for one in finished]
            slots.admit(fed)
            slots.advance()
            slots.resize(2)
            slots.resize(4)
            arrived = []
            while slots.busy:
                arrived += slots.advance()
            assert len(arrived) == 4
            for one in arrived:
                assert rms(one.x_0 - one.draw.image) < 1e-4 * rms(one.draw.image)
    finally:
        torch.set_num_threads(before)


def test_an_iteration_that_fails_leaves_no_residual_behind():
    failing = []

    def fault(method: str, shape: torch.Size) -> None:
        if method == "denoise" and failing:
            failing.pop()
            raise MemoryError

    model = Tiny()
    model.fault = fault
    with torch.inference_mode():
        slots = Slots(model, batch_size=2, device=torch.device("cpu"), order=1)
        slots.admit([draw(0, timestep=20, path="edit-friendly")])
        finished = []
        while slots.busy:
            failing.append(True)
            with contextlib.suppress(MemoryError):
                finished += slots.advance()
            finished += slots.advance()
    [one] = finished
    assert len(one.code.residuals) == one.draw.walk.n + 1
