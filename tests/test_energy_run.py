"""Energies that another package installed, from the recipe to the report: what they lead, tell and refuse."""

from __future__ import annotations

import importlib
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import nn

from boomerang_batch.audit.audit import AuditRequest, audit
from boomerang_batch.audit.sweep import choose, sweep
from boomerang_batch.cli import main
from boomerang_batch.config.accounting import account
from boomerang_batch.config.blocks import Gates
from boomerang_batch.config.energy import EnergySpec
from boomerang_batch.data.manifest import load_manifest
from boomerang_batch.errors import ConfigError, ModelError, RecipeError, RunMismatchError
from boomerang_batch.measures import energies
from boomerang_batch.measures.embedders import efficientnet
from boomerang_batch.run.loading import load, warnings
from boomerang_batch.run.plan import make_plan
from boomerang_batch.run.request import refuse_secrets
from boomerang_batch.run.trial import Rig
from boomerang_batch.run.verify import verify
from tests import stand_ins, worlds

MODULE = """
import torch
from torch import nn

class Net:
    digest, licence, classes = "a" * 64, "MIT", 4

    def __init__(self, name="net"):
        self.name = name
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.body = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(288, 4)).eval()
        self.body.requires_grad_(False)

    def logits(self, images):
        return self.body(images)

    def embed(self, images):
        return self.body[:3](images)

class Mixing(Net):
    def logits(self, images):
        logits = super().logits(images)
        return logits - logits.mean(0, keepdim=True) ** 2

class Nan(Net):
    def logits(self, images):
        return super().logits(images) + images.flatten(1).sum(1, keepdim=True).log() * float("nan")

class NanAtTimes(Net):
    def logits(self, images):
        bright = images.mean((1, 2, 3), keepdim=True).flatten(1)
        return super().logits(images) + torch.where(bright > 0.62, float("nan"), 0.0)

class Detached(Net):
    def logits(self, images):
        return super().logits(images.detach())

class Wide(Net):
    def logits(self, images):
        return super().logits(images)[:, :3]

class Failing(Net):
    def logits(self, images):
        raise KeyError("weights")

class Nameless(Net):
    def __init__(self):
        super().__init__(name="")

class Classless(Net):
    classes = None

MADE = {made.__name__.lower(): made for made in Net.__subclasses__()} | {"net": Net}

def make(kind):
    return lambda options, device: MADE[kind](**options)

globals().update({f"make_{kind}": make(kind) for kind in MADE})
"""
KINDS = ("net", "mixing", "nan", "nanattimes", "detached", "wide", "failing", "nameless", "classless")
AWAY = "energy={source: 'entry-point:net', away_from: source, scale: 0.3}"
TOWARD = "energy={source: 'entry-point:net', toward: {label: 2}, scale: 0.3}"


@pytest.fixture(autouse=True)
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of installed packages with one that brings energies."""
    folder = tmp_path / "site"
    (folder / "brought-1.0.dist-info").mkdir(parents=True)
    (folder / "brought_energies.py").write_text(MODULE)
    (folder / "brought-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: brought\nVersion: 1.0\n"
    )
    lines = [f"{kind} = brought_energies:make_{kind}" for kind in KINDS]
    (folder / "brought-1.0.dist-info" / "entry_points.txt").write_text(
        "\n".join([f"[{energies.GROUP}]", *lines, ""])
    )
    monkeypatch.syspath_prepend(str(folder))
    importlib.invalidate_caches()
    yield folder
    sys.modules.pop("brought_energies", None)


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    return worlds.save_shards(tmp_path / "in", shards=3, samples=4)


def net() -> object:
    return importlib.import_module("brought_energies").Net()


def pictures(out: Path) -> torch.Tensor:
    """(N, 1, H, W) in 0..1, by key."""
    shown = [worlds.image_of(fields) for _, fields in sorted(worlds.outputs(out).items())]
    return torch.from_numpy(np.stack(shown)[:, None] / np.float32(255))


@pytest.mark.slow
def test_towards_a_class_its_classifier_sees_more_of_it(tmp_path, tiny_model, manifest):
    plain, led = tmp_path / "plain", tmp_path / "led"
    worlds.run(worlds.recipe(tiny_model, purpose="augment"), manifest, plain)
    assert worlds.run(worlds.recipe(tiny_model, TOWARD, purpose="augment"), manifest, led).rows == {"ok": 12}
    assert verify(str(led), deep=True).problems == ()
    shares = [net().logits(pictures(out)).log_softmax(1)[:, 2] for out in (plain, led)]
    assert bool((shares[1] > shares[0]).all())
    models = {row.model_digest for out in (plain, led) for row in worlds.rows(out)}
    assert len(models) == 2
    # Led to a class a step looks at x_t alone, so its noise still limits what an output tells.
    assert {row.sigma for row in worlds.rows(led)} == {row.sigma for row in worlds.rows(plain)} != {None}


@pytest.mark.slow
@pytest.mark.usefixtures("secret")
def test_away_from_the_source_its_embedder_sees_less_of_that(tmp_path, tiny_model, manifest):
    plain, led = tmp_path / "plain", tmp_path / "led"
    low = "t.fraction=0.3"
    worlds.run(worlds.recipe(tiny_model, low, purpose="augment"), manifest, plain)
    worlds.run(worlds.recipe(tiny_model, low, AWAY, purpose="augment"), manifest, led)
    sources = torch.from_numpy(
        np.stack([worlds.pixels(worlds.png(number)) for number in range(12)])[:, None] / np.float32(255)
    )
    likeness = [
        torch.cosine_similarity(net().embed(pictures(out)), net().embed(sources)) for out in (plain, led)
    ]
    assert bool((likeness[1] < likeness[0]).all())
    assert {row.sigma for row in worlds.rows(led)} == {None}  # it limits nothing here


@pytest.mark.slow
@pytest.mark.usefixtures("secret")
@pytest.mark.parametrize("energy", [TOWARD, AWAY], ids=["toward", "away"])
def test_a_killed_run_goes_on_to_the_same_bytes_whatever_its_shards(
    tmp_path, tiny_model, manifest, monkeypatch, energy
):
    recipe = worlds.recipe(tiny_model, energy, "variants=2")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert worlds.run(recipe, manifest, whole).exit_code == 0
    with monkeypatch.context() as patch:
        stop = worlds.stop_within_the_second_shard(patch, cut)
        assert worlds.run(recipe, manifest, cut, stop=stop).exit_code == 75
    assert 0 < len(list(cut.glob("*_stats.json"))) < 3
    assert worlds.run(recipe, manifest, cut).exit_code == 0
    assert worlds.tree(cut) == worlds.tree(whole)
    # Each sample among others than before.
    samples = {
        f"img{n:05d}": {name.partition(".")[2]: data for name, data in worlds.sample_members("a", n)}
        for n in range(12)
    }
    odd = worlds.save_samples(tmp_path / "odd", dict(list(samples.items())[1::2][::-1]))
    alone = tmp_path / "alone"
    assert worlds.run(recipe, odd, alone).rows == {"ok": 12}
    among = {fields["png"] for fields in worlds.outputs(whole).values()}
    assert {fields["png"] for fields in worlds.outputs(alone).values()} < among


@pytest.mark.slow
def test_another_energy_is_another_run(tmp_path, tiny_model, manifest, site):
    recipe, out = worlds.recipe(tiny_model, TOWARD, purpose="augment"), tmp_path / "out"
    worlds.run(recipe, manifest, out)
    metadata = site / "brought-1.0.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text().replace("1.0", "1.1"))
    importlib.invalidate_caches()
    (out / "s-001_stats.json").unlink()
    with pytest.raises(RunMismatchError, match="model weights or settings, or the energy's"):
        worlds.run(recipe, manifest, out)
    other = worlds.recipe(tiny_model, TOWARD.replace("0.3", "0.2"), purpose="augment")
    with pytest.raises(RunMismatchError, match=r"recipe energy.scale \(0.3 there, 0.2 now\)"):
        worlds.run(other, manifest, out)


def test_each_sample_may_name_its_class(tmp_path, tiny_model):
    fields = {"png": worlds.png(1), "cls": b"0"}
    samples = {
        "a": fields | {"to.cls": b"3"},
        "b": fields | {"to.cls": b"4"},
        "c": fields,
        "d": fields | {"to.cls": b"x"},
    }
    out = tmp_path / "out"
    recipe = worlds.recipe(
        tiny_model, TOWARD.replace("label: 2", "field: to.cls"), "fields.fields={cls: keep}", purpose="augment"
    )
    worlds.run(recipe, worlds.save_samples(tmp_path / "in", samples), out)
    assert {row.key: row.reason for row in worlds.rows(out)} == {
        "a": None,
        "b": "label-out-of-range",
        "c": "missing-label",
        "d": "bad-label",
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "target", [(), ("target={label: 1, guidance: 2.0}",)], ids=["itself", "another guidance"]
)
def test_codes_are_found_without_it_and_decoded_with_it(tmp_path, tiny_model, manifest, target):
    outs = {}
    for name, energy in (("plain", ()), ("led", (TOWARD,))):
        outs[name] = tmp_path / name
        recipe = worlds.recipe(tiny_model, "method=edit-friendly", *target, *energy, purpose="augment")
        worlds.run(recipe, manifest, outs[name])
    back, led = (pictures(out) for out in outs.values())
    sources = [worlds.pixels(worlds.png(number)) for number in range(12)]
    apart = float((back[:, 0] * 255 - torch.from_numpy(np.stack(sources))).abs().max())
    assert (apart <= 1) == (not target)
    shares = [net().logits(found).log_softmax(1)[:, 2] for found in (back, led)]
    assert bool((shares[1] > shares[0]).all())


def test_a_sample_of_which_it_says_nothing_fails_alone_and_says_whose_fault_it_is(tmp_path, monkeypatch):
    stand_ins.install(monkeypatch, stand_ins.Pixelwise())
    recipe = stand_ins.recipe(TOWARD.replace(":net", ":nanattimes"), "t.fraction=0.2")
    grey, bright = ((worlds.noise(1, 8, 8) // 8 + level).astype(np.uint8) for level in (100, 220))
    samples = {name: {"png": worlds.encoded(image)} for name, image in (("a", grey), ("b", bright))}
    both, alone = tmp_path / "both", tmp_path / "alone"
    assert worlds.run(recipe, worlds.save_samples(tmp_path / "in", samples), both).rows == {
        "failed": 1,
        "ok": 1,
    }
    [row] = [row for row in worlds.rows(both) if row.status == "failed"]
    assert (row.key, row.reason) == ("b", "non-finite-output")
    assert "the model, led by entry-point:nanattimes, returned NaN" in row.detail
    worlds.run(recipe, worlds.save_samples(tmp_path / "less", {"a": samples["a"]}), alone)
    assert worlds.outputs(alone) == worlds.outputs(both)


@pytest.mark.parametrize("lead", ["toward: {label: 1}", "away_from: source"])
def test_one_that_fails_on_the_way_says_who_it_is_and_what_to_do_but_not_where_memory_is_short(
    lead, monkeypatch
):
    spec = stand_ins.recipe(f"energy={{source: 'entry-point:net', {lead}, scale: 0.3}}").energy
    energy, images = energies.load(spec, device=torch.device("cpu")), torch.rand(4, 1, 8, 8)
    references = torch.ones(4, dtype=torch.int64) if "toward" in lead else torch.rand(4, 288)
    assert energy.of(images, references).shape == (4,)

    for raised, seen, message in (
        (
            ValueError("no face"),
            ModelError,
            r"energy net: .* \(4, 1, 8, 8\): ValueError: no face; .* NaN, see docs",
        ),
        (torch.OutOfMemoryError("no room"), torch.OutOfMemoryError, "no room"),
    ):

        def fail(images, raised=raised):
            raise raised

        for method in ("logits", "embed"):
            monkeypatch.setattr(energy.made, method, fail)
        with pytest.raises(seen, match=message):
            energy.of(images, references)


@pytest.mark.parametrize(
    ("energy", "error", "message"),
    [
        ("source: 'entry-point:mixing', toward: {label: 1}", ModelError, "mixing: batching changes this model"),
        ("source: 'entry-point:nan', toward: {label: 1}", ModelError, "nan: it gives NaN or infinity"),
        ("source: 'entry-point:detached', toward: {label: 1}", ModelError, "detached has no gradient"),
        ("source: 'entry-point:wide', toward: {label: 1}", ModelError, r"logits gave torch.float32 \(8, 3\)"),
        (
            "source: 'entry-point:failing', toward: {label: 1}",
            ModelError,
            r"logits failed on images .*: KeyError: 'weights'",
        ),
        ("source: 'entry-point:nameless', toward: {label: 1}", ConfigError, "its name is ''"),
        ("source: 'entry-point:classless', toward: {label: 1}", ConfigError, "its classes is None"),
        ("source: 'entry-point:net', toward: {label: 4}", ConfigError, "4 is none of the 4 classes"),
        ("source: 'entry-point:nett', toward: {label: 1}", ConfigError, "installed are classless, detached"),
        ("source: efficientnet-lite9, away_from: source", ConfigError, "there are efficientnet-lite0 and"),
        ("source: efficientnet-lite0, toward: {label: 1}", ConfigError, "has no method logits; see docs/ener"),
        ("source: 'entry-point:net', options: {size: 3}, away_from: source", ModelError, "its factory failed"),
        ("source: 'entry-point:net', away_from: source, range: [0.501, 0.509]", ConfigError, "between two of"),
    ],
)
def test_what_can_not_lead_is_refused_with_its_name(energy, error, message, monkeypatch):
    stand_ins.install(monkeypatch, stand_ins.Pixelwise())
    recipe = stand_ins.recipe(f"energy={{{energy}, scale: 0.3}}", "batch_size=8")
    with pytest.raises(error, match=message):
        load(recipe, device="cpu", threads=1)


def test_a_range_that_no_step_lies_in_is_warned_of(monkeypatch):
    model = stand_ins.Pixelwise().spec
    for ends, warned in (("[0.5, 0.9]", 1), ("[0.4, 0.9]", 0), ("[0.0, 0.1]", 0)):
        recipe = stand_ins.recipe(AWAY.replace("}", f", range: {ends}}}"))
        found = warnings(recipe, model)
        assert len(found) == warned
        assert all("no step of t fraction=0.4 lies in it" in one for one in found)


def test_its_options_hold_no_secret():
    recipe = stand_ins.recipe(AWAY.replace("scale", "options: {api_token: abc}, scale"))
    with pytest.raises(RecipeError, match=r"energy\.options\.api_token looks like a secret"):
        refuse_secrets(recipe)


def test_a_model_of_latents_is_refused(monkeypatch):
    stand_ins.install(monkeypatch, stand_ins.Pixelwise(latent=True))
    with pytest.raises(ConfigError, match="works on an autoencoder's latents"):
        load(stand_ins.recipe(AWAY), device="cpu", threads=1)


@pytest.mark.slow
@pytest.mark.usefixtures("secret")
@pytest.mark.parametrize("energy", [TOWARD, AWAY], ids=["toward", "away"])
def test_plan_trial_sweep_audit_and_regenerate_know_it(tmp_path, tiny_model, energy):
    samples = [
        {f"k{n:03d}": {"png": worlds.png(n), "cls": b"%d" % (n // 2 % 2)} for n in range(shard, 24, 2)}
        for shard in (0, 1)
    ]
    manifest, out = worlds.save_samples(tmp_path / "in", *samples), tmp_path / "out"
    recipe = worlds.recipe(tiny_model, energy)
    loaded = load_manifest(str(manifest))
    assert worlds.run(recipe, manifest, out).rows == {"ok": 24}
    plan = make_plan(recipe, loaded, samples=4, workers=1, price_per_hour=None, device="cpu", threads=1)
    assert plan.outputs == 24

    with Rig(recipe, device="cpu", threads=1) as rig:
        [part], _ = choose(loaded, 24, named=True)
        levels = [("fraction", 0.0), ("fraction", 0.5)]
        found = sweep(rig, recipe, part, levels, embedders=(), shown=1)
        with pytest.raises(ConfigError, match="energy"):
            rig.run(worlds.recipe(tiny_model), [], secret=b"0" * 32)
    certified = [one for level in found.levels for one in level.readings if one.measure.startswith("certified")]
    assert bool(certified) == (energy == TOWARD)

    findings = audit(
        AuditRequest(
            out=str(out), manifest=loaded, private_dir=f"{out}-private", embedders=("pixels",), samples=24,
            redraws=10, gates=Gates(), model=str(tiny_model), device="cpu",
        )
    )  # fmt: skip
    subjects = {one.subject for one in findings.readings}
    assert {"t = 0", "t = T", "secret known"} <= subjects
    assert bool(findings.bound.reasons) == (energy == AWAY)
    assert account(recipe).certified == (energy == TOWARD)
    for key in [row.key for row in worlds.rows(out)][:2]:
        words = ["regenerate", out, "--key", key, "--model", tiny_model, "--device", "cpu"]
        again = CliRunner().invoke(main, [str(word) for word in [*words, "--private-dir", f"{out}-private"]])
        assert "identical, all " in again.stdout, again.output
        words = ["explain", out, "--key", key, "--private-dir", f"{out}-private"]
        story = CliRunner().invoke(main, [str(word) for word in words])
        led = "to class 2" if energy == TOWARD else "away from the source"
        assert f"{led}, by entry-point:net with scale 0.3 between 0 and 1 of the noise chain" in story.stdout
        assert ("looked at the source again" in story.stdout) == (energy == AWAY)


def test_the_built_in_embedder_says_what_the_audits_says_and_has_a_gradient():
    pytest.importorskip("efficientnet_lite_pytorch")
    energy = energies.load(
        EnergySpec(source="efficientnet-lite0", away_from="source", scale=0.1), device=torch.device("cpu")
    )
    pixels = np.random.default_rng(0).integers(0, 256, (2, 40, 28, 1), dtype=np.uint8)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    features = torch.stack([energy.reference(image) for image in images])
    told = torch.from_numpy(efficientnet.efficientnet_lite0(pixels).embed(pixels))
    torch.testing.assert_close(features, told, rtol=1e-3, atol=1e-4)
    images.requires_grad_()
    similar = energy.of(images, features.flip(0))
    (gradient,) = torch.autograd.grad(similar.sum(), images)
    assert gradient.shape == images.shape
    assert bool((gradient.abs().amax((1, 2, 3)) > 0).all())
    with torch.no_grad():
        lower = energy.of(images - 0.02 * gradient / gradient.abs().amax(), features.flip(0))
    assert bool((lower < similar).all())


def test_the_documented_energy_works_as_documented(tmp_path, site, monkeypatch):
    page = (Path(__file__).parent.parent / "docs" / "energies.md").read_text()
    [code] = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    [project] = [tomllib.loads(block) for block in re.findall(r"^```toml\n(.*?)^```", page, re.M | re.S)]
    [name, value] = next(iter(project["project"]["entry-points"][energies.GROUP].items()))
    module = value.partition(":")[0]
    (site / f"{module}.py").write_text(code)
    with (site / "brought-1.0.dist-info" / "entry_points.txt").open("a") as points:
        points.write(f"{name} = {value}\n")
    importlib.invalidate_caches()
    layers = [nn.Conv2d(1, 16, 5, stride=2), nn.GELU(), nn.Conv2d(16, 32, 5, stride=2), nn.GELU()]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    save_file(network.state_dict(), tmp_path / "garments.safetensors")

    stand_ins.install(monkeypatch, stand_ins.Pixelwise(side=28))
    [block] = re.findall(r"^```yaml\n(.*?)^```", page, re.M | re.S)
    energy = yaml.safe_load(block.replace("/models", str(tmp_path)))["energy"]
    for lead in ({"toward": {"label": 3}}, {"away_from": "source"}):
        led = {key: value for key, value in energy.items() if key != "toward"} | lead
        recipe = stand_ins.recipe(f"energy={yaml.safe_dump(led, default_flow_style=True)}")
        engine, _ = load(recipe, device="cpu", threads=1)
        assert engine.denoiser.spec.guided_classes == (10 if "toward" in lead else None)
        engine.close()
    sys.modules.pop(module)
