"""Denoisers from installed entry points, with docs/denoisers.md's example installed and drawn through."""

from __future__ import annotations

import importlib
import math
import re
import sys
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
import torch
from onnx import TensorProto, helper

from boomerang_batch.config.blocks import ClassLabels, ModelSpec, Prompts
from boomerang_batch.config.pipeline import Recipe, parse_recipe
from boomerang_batch.diffusion.boomerang import KeyedNoise, boomerang
from boomerang_batch.diffusion.denoiser import DenoiserSpec
from boomerang_batch.diffusion.parity import check_batching, synthetic_images
from boomerang_batch.diffusion.samplers import build_solver
from boomerang_batch.diffusion.schedule import build_schedule
from boomerang_batch.errors import ModelError
from boomerang_batch.models.plugins import GROUP, load_installed
from boomerang_batch.run.verify import verify
from tests import worlds
from tests.oracles import GivenNoise, linear_levels

PAGE = (Path(__file__).parent.parent / "docs" / "denoisers.md").read_text()


def example(language: str) -> str:
    """The page's one code block in `language`."""
    (block,) = re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    return block


def install(folder: Path, name: str, version: str, entries: dict[str, str]) -> None:
    """What an installer leaves of a distribution: its metadata and its entry points."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = [f"{entry} = {value}" for entry, value in entries.items()]
    (info / "entry_points.txt").write_text("\n".join([f"[{GROUP}]", *lines]) + "\n")
    importlib.invalidate_caches()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A folder of installed packages, forgotten afterwards."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    before = set(sys.modules)
    yield folder
    for module in set(sys.modules) - before:
        if str(folder) in str(getattr(sys.modules[module], "__file__", "")):
            del sys.modules[module]


@pytest.fixture(autouse=True)
def _numerics():
    """Loading sets the process's numerics; the tests after this one find them as they were."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(deterministic)


# --- the documented example, against the closed form ---

MEAN, VARIANCE = 0.25, 0.3


def gaussian_network(path: Path, shape: tuple[int, int, int]) -> Path:
    """An ONNX file with the exact posterior mean of N(MEAN, VARIANCE): mu + s2 / (s2 + sigma^2) (x - mu)."""

    def constant(name: str, *values: float):
        return helper.make_tensor(name, TensorProto.FLOAT, [len(values)] if len(values) > 1 else [], values)

    nodes = [
        helper.make_node("Mul", ["sigma", "sigma"], ["squared"]),
        helper.make_node("Add", ["squared", "s2"], ["spread"]),
        helper.make_node("Div", ["s2", "spread"], ["gains"]),
        helper.make_node("Reshape", ["gains", "column"], ["gain"]),
        helper.make_node("Sub", ["x", "mu"], ["offset"]),
        helper.make_node("Mul", ["gain", "offset"], ["kept"]),
        helper.make_node("Add", ["kept", "mu"], ["x_0"]),
    ]
    column = helper.make_tensor("column", TensorProto.INT64, [4], [-1, 1, 1, 1])
    graph = helper.make_graph(
        nodes,
        "gaussian",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *shape]),
            helper.make_tensor_value_info("sigma", TensorProto.FLOAT, ["batch"]),
        ],
        [helper.make_tensor_value_info("x_0", TensorProto.FLOAT, ["batch", *shape])],
        [constant("mu", MEAN), constant("s2", VARIANCE), column],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())
    return path


@pytest.fixture
def onnx_model(site: Path, tmp_path: Path):
    """The page's package, installed, with the page's recipe pointed at a Gaussian network."""
    project = tomllib.loads(example("toml"))["project"]
    (entries,) = project["entry-points"].values()
    assert list(project["entry-points"]) == [GROUP]
    module = next(iter(entries.values())).partition(":")[0]
    (site / f"{module}.py").write_text(example("python"))
    install(site, project["name"], project["version"], entries)
    path = gaussian_network(tmp_path / "gaussian.onnx", (3, 4, 4))
    recipe = parse_recipe(example("yaml").replace("/models/edm.onnx", str(path)), source="docs/denoisers.md")
    return recipe, load_installed(recipe.model, device="cpu", threads=1)


def closed_form(schedule, eta: float) -> tuple[float, float]:
    """Gain and variance of the output, given x_0, for the Gaussian data on this schedule."""
    product, spread = 1.0, 0.0
    for i in range(1, schedule.n + 1):
        (a, s), (b, r) = ((float(schedule.alpha[j]), float(schedule.sigma[j])) for j in (i, i - 1))
        zeta2 = eta**2 * r**2 / s**2 * (s**2 - (a / b) ** 2 * r**2)
        k = a * VARIANCE / (a**2 * VARIANCE + s**2)
        spread += zeta2 * product**2
        product *= b * k + math.sqrt(r**2 - zeta2) * (1 - a * k) / s
    return float(schedule.alpha[-1]) * product, spread + float(schedule.sigma[-1]) ** 2 * product**2


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("t", [("sigma", 0.5), ("sigma", 7.7), ("fraction", 0.6)])
def test_the_documented_example_draws_the_closed_forms_law(onnx_model, t, eta):
    recipe, denoiser = onnx_model
    schedule = build_schedule(
        denoiser.spec.levels, grid=recipe.grid, steps=recipe.steps, t=t, start=recipe.start
    )
    solver = build_solver(schedule, prediction=denoiser.spec.prediction, eta=eta)
    # Rows: the mean; a unit above it; then a unit of noise in the jump and in each step alone.
    rows = schedule.n + 3
    x_0 = torch.full((rows, 3, 4, 4), MEAN)
    x_0[1] += 1
    forward = torch.zeros_like(x_0)
    forward[2] = 1
    reverse = {i: torch.zeros_like(x_0) for i in range(1, schedule.n + 1)}
    for i, z in reverse.items():
        z[2 + i] = 1
    out = boomerang(x_0, denoiser, schedule, solver, GivenNoise(forward, reverse), [None] * rows)
    assert torch.allclose(out[0], torch.full((3, 4, 4), MEAN), atol=1e-6)
    response = (out[1:] - out[:1]).double().amax(dim=(1, 2, 3))
    gain, variance = closed_form(schedule, eta)
    assert float(response[0]) == pytest.approx(gain, abs=2e-5)
    assert float(response[1:].square().sum()) == pytest.approx(variance, rel=1e-4)
    if eta == 1.0:  # exact on every grid
        assert gain == pytest.approx(VARIANCE / (VARIANCE + schedule.relative_sigma**2), rel=1e-9)


def test_the_network_is_told_the_exact_sigma_of_any_t(onnx_model):
    _, denoiser = onnx_model
    for sigma in (0.0123, 0.5, 3.3333, 60.0):
        schedule = build_schedule(
            denoiser.spec.levels, grid="linspace", steps=7, t=("sigma", sigma), start="exact"
        )
        assert float(schedule.tau[-1].exp()) == pytest.approx(sigma, rel=1e-12)


def test_the_documented_example_may_be_batched(onnx_model):
    _, denoiser = onnx_model
    check_batching(denoiser, synthetic_images(denoiser.spec, 3), [None] * 3, [3.0, 0.0, -4.0], 8)
    assert denoiser.in_float32() is denoiser
    assert denoiser.flagged(torch.zeros(2, 3, 4, 4)) == [False, False]


def test_draws_depend_on_their_key_and_not_on_their_neighbours(onnx_model):
    _, denoiser = onnx_model
    schedule = build_schedule(denoiser.spec.levels, grid="linspace", steps=8, t=("sigma", 1.0), start="exact")
    solver = build_solver(schedule, prediction="sample", eta=1.0)
    x_0 = synthetic_images(denoiser.spec, 4)
    keys = [bytes([n]) * 16 for n in range(4)]
    out = boomerang(x_0, denoiser, schedule, solver, KeyedNoise(keys, x_0))
    again = boomerang(x_0.flip(0), denoiser, schedule, solver, KeyedNoise(keys[::-1], x_0))
    assert torch.equal(out, again.flip(0))
    assert not torch.equal(out[0], out[1])


def test_the_documented_example_runs(onnx_model, tmp_path):
    recipe, _ = onnx_model
    pictures = {f"n{n}": worlds.noise(n, 4, 4, 3) for n in range(5)}
    encoded = {name: {"png": worlds.encoded(one)} for name, one in pictures.items()}
    manifest = worlds.save_samples(tmp_path / "in", encoded)
    report = worlds.run(recipe, manifest, tmp_path / "out")
    assert (report.exit_code, report.rows) == (0, {"ok": 5})
    assert verify(str(tmp_path / "out"), deep=True).problems == ()
    for name, fields in worlds.outputs(tmp_path / "out").items():
        drawn = worlds.image_of(fields)
        assert drawn.shape == (4, 4, 3)
        assert (drawn != pictures[name]).any()
    assert {row.evaluations for row in worlds.rows(tmp_path / "out")} == {evaluations_of(recipe)}


def evaluations_of(recipe: Recipe) -> int:
    """How many evaluations the recipe's t takes, from the chain alone."""
    denoiser = load_installed(recipe.model, device="cpu", threads=1)
    unit, value = next(iter(recipe.t.model_dump(exclude_none=True).items()))
    schedule = build_schedule(
        denoiser.spec.levels, grid=recipe.grid, steps=recipe.steps, t=(unit, value), start=recipe.start
    )
    return schedule.n


def test_the_packages_version_and_the_weights_enter_the_digest(onnx_model, site, tmp_path):
    recipe, first = onnx_model
    assert re.fullmatch("[0-9a-f]{64}", first.spec.digest)
    assert load_installed(recipe.model, device="cpu", threads=1).spec.digest == first.spec.digest
    (info,) = site.glob("*.dist-info")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: onnx-denoisers\nVersion: 1.1\n")
    importlib.invalidate_caches()
    assert load_installed(recipe.model, device="cpu", threads=1).spec.digest != first.spec.digest
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: onnx-denoisers\nVersion: 1.0\n")
    gaussian_network(tmp_path / "gaussian.onnx", (3, 8, 8))
    assert load_installed(recipe.model, device="cpu", threads=1).spec.digest != first.spec.digest


# --- what a factory may get wrong ---

SPEC = DenoiserSpec(
    channels=3,
    height=8,
    width=8,
    value_range=(-1.0, 1.0),
    levels=linear_levels(),
    prediction="epsilon",
    clip_range=1.0,
    fractional_tau=True,
    classes=None,
    digest="ab" * 32,
)


@dataclass
class Good:
    spec: DenoiserSpec = SPEC

    def encode(self, images):
        return images

    def decode(self, x_0):
        return x_0

    def denoise(self, x_t, tau, conditions):
        assert tau.dtype == torch.float64
        return torch.cat([x_t, x_t], dim=1) if self.spec.learned_variance else x_t


MADE: dict[str, object] = {}
"""What the factory below returns next."""


def factory(options, device):
    assert device == "cpu"
    made = MADE["next"]
    return made(options) if isinstance(made, type(lambda: 0)) else made


def load(made: object, **model: object):
    MADE["next"] = made
    return load_installed(ModelSpec(source="entry-point:mine", **model), device="cpu", threads=None)


@pytest.fixture
def mine(site: Path) -> None:
    install(site, "my-models", "0.3", {"mine": f"{__name__}:factory", "gone": "no_such_module:load"})


@pytest.mark.usefixtures("mine")
def test_a_denoiser_of_the_least_that_is_asked_gets_the_rest():
    denoiser = load(Good())
    assert denoiser.spec == replace(SPEC, digest=denoiser.spec.digest)
    assert denoiser.spec.digest != SPEC.digest
    x = torch.ones(2, 3, 8, 8)
    assert torch.equal(denoiser.denoise(x, torch.zeros(2).double(), [None, None]), x)


@pytest.mark.usefixtures("mine")
def test_what_it_offers_beyond_that_is_used():
    class Checked(Good):
        def flagged(self, images):
            return [bool(image.mean() > 0) for image in images]

    denoiser = load(Checked(replace(SPEC, safety=True)), safety="drop")
    assert denoiser.flagged(torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1)) == [False, True]


@pytest.mark.usefixtures("mine")
def test_options_reach_the_factory_with_their_types():
    given = {}

    def make(options):
        given.update(options)
        return Good()

    load(make, options={"a": 1, "b": 0.5, "c": "x", "d": True})
    assert [(name, type(value)) for name, value in given.items()] == [
        ("a", int),
        ("b", float),
        ("c", str),
        ("d", bool),
    ]


@pytest.mark.usefixtures("mine")
def test_conditional_and_learned_and_latent_models_load():
    labelled = replace(SPEC, conditioning="label", classes=5)
    assert load(Good(labelled), class_labels=ClassLabels(null_label=4)).spec.classes == 5
    assert (
        load(Good(replace(SPEC, conditioning="prompt")), prompts=Prompts(text="a")).spec.conditioning
        == "prompt"
    )
    assert load(Good(replace(SPEC, learned_variance=True))).spec.learned_variance

    class Latent(Good):
        def encode(self, images):
            return images[:, :1, ::4, ::4]

        def decode(self, x_0):
            return x_0.repeat_interleave(4, 2).repeat_interleave(4, 3).expand(-1, 3, -1, -1)

    assert load(Latent(replace(SPEC, latent=True))).spec.latent


def test_a_name_that_is_not_installed_is_told_with_those_that_are(site):
    with pytest.raises(
        ModelError, match=r"no such entry point in the group boomerang_batch\.denoisers; none is"
    ):
        load(Good())
    install(site, "others", "1", {"b-model": "x:y", "a-model": "x:y"})
    with pytest.raises(ModelError, match=r"entry-point:mine: .*; installed are a-model, b-model"):
        load(Good())


def test_one_name_in_two_packages_is_refused(site):
    install(site, "one", "1.5", {"mine": f"{__name__}:factory"})
    install(site, "two", "2", {"mine": f"{__name__}:factory"})
    with pytest.raises(ModelError, match=r"several have it: one 1\.5, two 2; uninstall all but one"):
        load(Good())


@pytest.mark.usefixtures("mine")
def test_a_module_that_is_not_there_is_told():
    with pytest.raises(ModelError, match="no_such_module:load can't be imported: ModuleNotFoundError"):
        load_installed(ModelSpec(source="entry-point:gone"), device="cpu", threads=None)


def fail(options):
    raise KeyError("path")


def refuse(options):
    raise ModelError("option path is missing: write where the network lies")


@pytest.mark.usefixtures("mine")
def test_a_factory_that_raises_is_told_in_one_line_with_its_cause():
    with pytest.raises(ModelError, match=r"entry-point:mine: its factory failed: KeyError: 'path'") as caught:
        load(fail)
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(ModelError, match=r"^option path is missing"):
        load(refuse)  # it knows better what to say


class Wrong(Good):
    def __init__(self, method, result, **spec):
        super().__init__(replace(SPEC, **spec))
        setattr(self, method, result)


def _raise(*arguments):
    raise ValueError("unexpected\nshape")


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize(
    ("made", "told"),
    [
        (None, "has no spec; it must be a DenoiserSpec"),
        (SimpleNamespace(spec={"channels": 3}), "has no spec; it must be a DenoiserSpec"),
        (SimpleNamespace(spec=SPEC, encode=len, decode=len), "no method denoise"),
        (SimpleNamespace(spec=SPEC, encode=len, denoise=len), "no method decode"),
        (Good(replace(SPEC, safety=True)), "no method flagged"),
        (Good(replace(SPEC, digest="")), "digest ''; it must be the SHA-256"),
        (Good(replace(SPEC, digest="AB" * 32)), "it must be the SHA-256"),
        (Good(replace(SPEC, channels=4)), "channels 4; images have 1 or 3"),
        (Good(replace(SPEC, height=0)), "size 8x0"),
        (Good(replace(SPEC, value_range=(1.0, -1.0))), "value_range 1..-1"),
        (Good(replace(SPEC, levels=[1, 2])), "levels of another type"),
        (Good(replace(SPEC, prediction="x0")), "prediction 'x0'"),
        (Good(replace(SPEC, conditioning="text")), "conditioning 'text'"),
        (Good(replace(SPEC, classes=10)), "conditioning none with classes 10"),
        (
            Good(replace(SPEC, conditioning="label", classes=10)),
            "class-conditional (10 labels); say in the recipe",
        ),
        (Good(replace(SPEC, learned_variance=True, latent=True)), None),
        (
            Wrong("encode", lambda images: images[:, :1]),
            "encode gave shape (1, 1, 8, 8) for one image; it must give",
        ),
        (Wrong("encode", lambda images: images[0], latent=True), "encode gave shape (3, 8, 8) for one image"),
        (Wrong("decode", lambda x_0: x_0[..., :4]), "decode gave shape (1, 3, 8, 4) for one image"),
        (Wrong("denoise", lambda x, tau, c: x[:, :1]), "denoise gave shape (1, 1, 8, 8) for one image"),
        (Wrong("denoise", lambda x, tau, c: x, learned_variance=True), "it must give shape (1, 6, 8, 8)"),
        (
            Wrong("denoise", lambda x, tau, c: x.half()),
            "denoise gave torch.float16 on cpu; it must give float32",
        ),
        (Wrong("denoise", lambda x, tau, c: x.numpy()), "denoise gave a ndarray; it must give a torch tensor"),
        (Wrong("denoise", _raise), "denoise failed on one image: ValueError: unexpected shape"),
    ],
)
def test_what_is_no_denoiser_is_told_by_what_it_lacks(made, told):
    if told is None:
        load(made)
        return
    with pytest.raises(ModelError) as caught:
        load(made)
    assert str(caught.value).startswith("model.source entry-point:mine: ")
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize(
    ("model", "told"),
    [
        ({"class_labels": ClassLabels()}, "takes no label; remove model.class_labels"),
        ({"prompts": Prompts()}, "takes no prompt; remove model.prompts"),
        ({"safety": "drop"}, "has no safety checker; set model.safety: unchecked"),
    ],
)
def test_a_recipe_that_asks_for_what_the_model_has_not_is_refused(model, told):
    with pytest.raises(ModelError, match=told):
        load(Good(), **model)


@pytest.mark.usefixtures("mine")
def test_a_null_label_out_of_range_is_refused():
    with pytest.raises(ModelError, match="null_label 5 is none of its 5 labels"):
        load(Good(replace(SPEC, conditioning="label", classes=5)), class_labels=ClassLabels(null_label=5))
