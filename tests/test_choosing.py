"""sweep and calibrate: what each t brings is told by independent means too, and the t found is the least."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist, median
from types import SimpleNamespace
from typing import Any, cast
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from boomerang_batch.audit import calibrate as module
from boomerang_batch.audit.bounding import cautions, least_noise, noise_of, promised_noise
from boomerang_batch.audit.calibrate import Calibration, Target, calibrate
from boomerang_batch.audit.findings import ALL, OUTPUTS
from boomerang_batch.audit.sweep import Sweep, choose, plain, sweep
from boomerang_batch.audit.tried import Level
from boomerang_batch.cli import main
from boomerang_batch.config.pipeline import Recipe
from boomerang_batch.data.manifest import load_manifest
from boomerang_batch.errors import ConfigError, ManifestError, MeasureError
from boomerang_batch.run.trial import Chosen, Rig
from boomerang_batch.run.walks import Walks
from tests import worlds

SHARDS, SAMPLES, LABELS = 2, 13, 2
PIXELS = 64


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of images unlike each other, with labels by turns."""
    shards = [
        {
            f"k{number:03d}": {"png": worlds.png(number), "cls": str(number % LABELS).encode()}
            for number in range(shard * SAMPLES, (shard + 1) * SAMPLES)
        }
        for shard in range(SHARDS)
    ]
    return worlds.save_samples(tmp_path_factory.mktemp("chosen"), *shards)


@pytest.fixture(scope="module")
def recipe(tiny_model: Path) -> Recipe:
    return worlds.recipe(tiny_model)


@pytest.fixture(scope="module")
def rig(recipe: Recipe):
    with Rig(recipe, device="cpu", threads=1) as open_rig:
        yield open_rig


@pytest.fixture(scope="module")
def parts(manifest: Path) -> list[list[Chosen]]:
    """A shard each."""
    return choose(load_manifest(str(manifest)), SHARDS * SAMPLES, parts=SHARDS, named=True)[0]


@pytest.fixture(scope="module")
def told(rig: Rig, recipe: Recipe, parts: list[list[Chosen]]) -> Sweep:
    levels = [("fraction", 0.0), ("fraction", 0.3), ("sigma", 2.0)]
    return sweep(rig, recipe, parts[0], levels, embedders=(), shown=3)


def figure(level: Level, measure: str) -> float:
    [found] = [
        one.value
        for one in level.readings
        if (one.measure, one.subject, one.stratum) == (measure, OUTPUTS, ALL)
    ]
    return found


def measures(level: Level) -> set[str]:
    return {one.measure for one in level.readings}


def apart(samples: Sequence[Chosen]) -> list[float]:
    """How far sources of one label are apart in the model's range, as the files alone tell it."""
    pixels = [worlds.pixels(sample.fields["png"]).astype(float) / 127.5 - 1 for sample in samples]
    labels = [sample.fields["cls"] for sample in samples]
    return [
        float(np.linalg.norm(pixels[one] - pixels[other]))
        for one in range(len(samples))
        for other in range(one)
        if labels[one] == labels[other]
    ]


def accuracy(distance: float, sigma: float) -> float:
    return NormalDist().cdf(distance / sigma / 2)


@pytest.mark.slow
def test_the_certified_accuracy_is_that_of_the_sources_and_the_noise(told: Sweep, parts: list[list[Chosen]]):
    distances = apart(parts[0])
    expected = {"least": min(distances), "median": median(distances), "largest": 2 * math.sqrt(PIXELS)}
    for level in told.levels[1:]:
        assert level.sigma is not None
        for name, distance in expected.items():
            assert figure(level, f"certified@{name}") == pytest.approx(
                accuracy(distance, level.sigma), rel=1e-6
            )


def test_without_noise_nothing_is_certified_and_nothing_is_changed(told: Sweep):
    nothing, some, _ = told.levels
    assert not {one for one in measures(nothing) if one.startswith("certified")}
    assert figure(nothing, "median-distance") == 0 < figure(some, "median-distance") < 1


def test_the_distance_is_what_psnr_has_in_decibels(told: Sweep):
    for level in told.levels[1:]:  # an odd number of samples, so the median is one of them
        psnr = figure(level, "median-psnr-db")
        assert figure(level, "median-distance") == pytest.approx(10 ** (-psnr / 20), rel=1e-9)


@pytest.mark.slow
def test_more_variants_show_more(rig: Rig, recipe: Recipe, parts: list[list[Chosen]], told: Sweep):
    twice = recipe.model_copy(update={"variants": 2})
    [level] = sweep(rig, twice, parts[0], [("sigma", 2.0)], embedders=(), shown=1).levels
    assert level.sigma is not None
    expected = accuracy(median(apart(parts[0])) * math.sqrt(2), level.sigma)
    assert figure(level, "certified@median") == pytest.approx(expected, rel=1e-6)
    assert figure(level, "certified@median") > figure(told.levels[-1], "certified@median")


def test_what_is_written_is_strict_json(told: Sweep):
    json.dumps(told.facts(), allow_nan=False)
    assert plain({"a": math.nan, "b": (1.5, math.inf)}) == {"a": None, "b": [1.5, None]}


def test_the_least_noise_of_each_variant_counts(recipe: Recipe):
    def row(variant: int, sigma: float | None) -> Any:
        return SimpleNamespace(variant=variant, sigma=sigma)

    twice = recipe.model_copy(update={"variants": 2})
    assert noise_of(twice, [row(1, 2.0), row(0, 3.0), row(1, 1.0), row(0, None)]) == (1.0, 3.0)


def test_the_bound_counts_the_least_noise_of_a_spread_and_not_of_a_sample(tiny_model: Path):
    """A sample of few may have more than some record that is not in it."""
    spread = worlds.recipe(tiny_model, "t={fraction: {uniform: [0.3, 0.9]}}", "steps=20", "variants=2")
    with Rig(spread, device="cpu", threads=1) as rig:
        least = least_noise(spread, rig.model)
        floor = Walks(spread, rig.model).at("fraction", 0.3).schedule.relative_sigma
    assert least == (floor, floor)
    assert promised_noise((5.0, 4.0), least) == least
    assert promised_noise((5.0,), least) == (5.0,)  # of one variant nothing is known, and nothing is promised


@pytest.mark.slow
def test_at_every_t_candidates_agree_in_what_the_recipe_releases(tmp_path: Path, tiny_model: Path):
    """At t 0 too, where nothing is anonymized and the recipe is another."""
    samples = {f"k{number}": {"png": worlds.png(number), "cls": b"0", "txt": b"AB"[number % 2 :][:1]}
               for number in range(8)}  # fmt: skip
    manifest = worlds.save_samples(tmp_path, samples)
    recipe = worlds.recipe(tiny_model, "fields.fields={cls: keep, txt: keep}")
    [chosen], _ = choose(load_manifest(str(manifest)), 8, named=True)
    with Rig(recipe, device="cpu", threads=1) as rig:
        levels = [("fraction", 0.0), ("fraction", 0.5), ("fraction", 1.0)]
        told = sweep(rig, recipe, chosen, levels, embedders=("pixels",), shown=1)
    chances = [
        [one.chance for one in level.readings if (one.measure, one.stratum) == ("rank-1", ALL)]
        for level in told.levels
    ]
    assert chances == [[0.25] * 3] * 3


@pytest.mark.slow
def test_what_is_left_out_and_what_spoils_the_numbers_is_told(
    tmp_path: Path, pipeline: Path, manifest: Path, tiny_model: Path
):
    """Damaged shards, samples that come to nothing, a way back without noise."""
    damaged = worlds.save_samples(
        tmp_path / "in",
        {f"k{number:03d}": {"png": worlds.png(number), "cls": b"1"} for number in range(14)},
        {f"l{number:03d}": {"png": b"" if number == 3 else worlds.png(number), "cls": b"1"}
         for number in range(14)},
    )  # fmt: skip
    shard = damaged.with_name("s-000.tar")
    shard.write_bytes(shard.read_bytes()[:-12000])
    words = (damaged, "--set", "sampler.eta=0.5", "--device", "cpu", "--threads", 1, "--embedder", "pixels")
    code, said, _ = command("sweep", pipeline, *words, "--t", ".5", "--samples", 24, "-o", tmp_path / "sweep")
    assert code == 0
    warnings = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["warnings"]
    assert [f"warning: {one}" for one in warnings] == [
        line for line in said.splitlines() if line.startswith("warning: ")
    ]
    assert warnings == [
        "manifest tiny: what can't be read in shard 1 of 2 (truncated-tar) is left out",
        *cautions(worlds.recipe(tiny_model, "sampler.eta=0.5")),
        "fraction=0.5: nothing came of 1 sample(s), which are in none of its numbers",
    ]
    assert "sampler.eta is 0.5" in warnings[1]
    code, said, _ = command("calibrate", pipeline, *words, "--target", "distance>=.0001", "--samples", 24)
    assert code == 0
    assert [f"warning: {one}" in said for one in warnings[:2]] == [True, True]


def test_a_manifest_of_which_nothing_can_be_read_is_named_with_the_reason(tmp_path: Path):
    damaged = worlds.save_samples(tmp_path, {"k": {"png": worlds.png(0)}})
    shard = damaged.with_name("s-000.tar")
    shard.write_bytes(shard.read_bytes()[:600])
    with pytest.raises(ManifestError, match=r"manifest tiny: .* in shard s-000 \(truncated-tar\)"):
        choose(load_manifest(str(damaged)), 8, named=True)


# calibrate


def searched(rig: Rig, recipe: Recipe, parts: list[list[Chosen]], text: str) -> Calibration:
    return calibrate(rig, recipe, parts[0], parts[1], Target.parse(text), embedders=())


@pytest.mark.slow
def test_a_certified_target_is_reached_at_the_least_t(rig: Rig, recipe: Recipe, parts: list[list[Chosen]]):
    walks = Walks(recipe, rig.model)
    sigmas = {step: walks.at("fraction", step / 20).schedule.relative_sigma for step in range(1, 21)}
    right = {step: accuracy(median(apart(parts[0])), sigma) for step, sigma in sigmas.items()}
    limit = (right[9] + right[10]) / 2
    found = searched(rig, recipe, parts, f"certified@median<={limit:.6f}")
    assert (found.t, found.beside) == (0.5, 0.45)
    assert found.checked is not None
    checked = accuracy(median(apart(parts[1])), sigmas[10])
    assert figure(found.checked, "certified@median") == pytest.approx(checked, rel=1e-6)
    assert found.holds == (checked <= limit)
    assert found.told(found.checked) == f"certified@median · outputs {checked:.3g} (by chance 0.5)"


@pytest.mark.slow
def test_a_distance_is_reached_from_some_t_on(rig: Rig, recipe: Recipe, parts: list[list[Chosen]]):
    everything = searched(rig, recipe, parts, "distance>=.0001")
    assert (everything.t, everything.beside) == (0.05, None)
    nothing = searched(rig, recipe, parts, "distance>=1")
    assert (nothing.t, nothing.beside, nothing.holds) == (None, 1.0, False)


@pytest.mark.parametrize(
    ("text", "least"),
    [
        ("rank1<=.1", True),
        ("certified@least<=.9", True),
        ("distance>=.1", True),
        ("distance<=.1", False),
        ("psnr>=20", False),
        ("label-agreement>=.9", False),
    ],
)
def test_what_is_sought_is_next_to_what_misses_it(text: str, least: bool):
    assert Target.parse(text).least is least
    for edge in range(1, module.STEPS + 2):
        asked: list[int] = []

        def reached(step: int, edge: int = edge, asked: list[int] = asked) -> bool:
            asked.append(step)
            return step >= edge if least else step < edge

        good, bad = module._halve(reached, least=least)
        assert len(asked) <= 7
        if good is None:
            assert edge == (module.STEPS + 1 if least else 1)
        elif bad is None:
            assert good == (1 if least else module.STEPS)
        else:
            assert (good, bad) == ((edge, edge - 1) if least else (edge - 1, edge))


def model(*, latent: bool) -> Rig:
    """As much of a rig as a refusal looks at."""
    return cast(Rig, SimpleNamespace(model=SimpleNamespace(latent=latent)))


@pytest.mark.parametrize(
    ("override", "purpose", "latent", "target", "reason"),
    [
        ("batch_size=4", "augment", False, "certified@median", "the purpose is not anonymize"),
        ("images={tiles: {overlap: 2}}", "anonymize", True, "certified@least", "tiles are encoded apart"),
        ("region.field=mask.png", "anonymize", False, "certified@median", "region alone"),
        ("batch_size=4", "anonymize", True, "certified@largest", "take the median"),
    ],
)
def test_a_bound_that_there_is_none_of_is_refused_with_its_reasons(
    tiny_model: Path, override: str, purpose: str, latent: bool, target: str, reason: str
):
    recipe = worlds.recipe(tiny_model, override, purpose=purpose)
    with pytest.raises(ConfigError, match=rf"--target {target}: .*{reason}"):
        calibrate(model(latent=latent), recipe, [], [], Target.parse(f"{target}<=.75"), embedders=())


def test_a_target_that_nothing_tells_of_is_refused(told: Sweep):
    alone = Level(t="fraction=0.3", sigma=1.0, evaluations=1, readings=())
    with pytest.raises(MeasureError, match=r"nothing tells certified@median of fraction=0\.3"):
        Target.parse("certified@median<=.75").reached(alone)
    assert Target.parse("certified@median<=1").reached(told.levels[1])
    assert not Target.parse("certified@median<=.5").reached(told.levels[1])


# The commands


def command(*words: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, [*map(str, words)])
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def pipeline(tmp_path: Path, tiny_model: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(worlds.recipe_text(tiny_model))
    return path


@pytest.mark.slow
def test_sweep_writes_pictures_and_numbers(pipeline: Path, manifest: Path, tmp_path: Path):
    words = ("sweep", pipeline, manifest, "--t", "0,.5", "--samples", SAMPLES, "--device", "cpu")
    code, said, _ = command(*words, "--threads", 1, "--embedder", "pixels", "-o", tmp_path / "sweep")
    assert code == 0
    _, _, nothing, half = said.splitlines()[:4]
    facts = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    [right] = [one["value"] for one in facts["levels"][1]["readings"] if one["measure"] == "certified@median"]
    assert half.split()[4:6] == [f"{right:.3g}", "(0.5)"]
    assert "(0.5)" not in nothing  # at t 0 nothing is certified
    with Image.open(io.BytesIO((tmp_path / "sweep" / "grid.png").read_bytes())) as grid:
        assert grid.width > 3 * 96
    curves = ET.fromstring((tmp_path / "sweep" / "curves.svg").read_bytes())
    told = {part.get("data-measure") for part in curves.iter()} - {None}
    assert told == {
        one["measure"]
        for level in facts["levels"]
        for one in level["readings"]
        if (one["subject"], one["stratum"]) == (OUTPUTS, ALL) and one["value"] is not None
        if one["chance"] is None or one["chance"] < 1
    }


def test_calibrate_ends_with_2_where_nothing_is_certified(pipeline: Path, manifest: Path):
    words = ("calibrate", pipeline, manifest, "--target", "certified@median<=.75", "--device", "cpu")
    code, _, said = command(*words, "--threads", 1, "--set", "purpose=augment", "--set", "seed=7")
    assert code == 2
    assert "the purpose is not anonymize: keys and fields travel" in said


@pytest.mark.slow
def test_the_demo_is_chosen_for_by_its_bound(tmp_path: Path):
    words = ("demo-anonymize", "demo", "--device", "cpu", "--threads", 1, "--embedder", "pixels")
    code, said, _ = command("calibrate", *words, "--target", "certified@median<=.75", "--samples", 60)
    assert code in (0, 4)
    assert "is the least that reaches certified@median<=.75" in said
    code, said, _ = command("sweep", *words, "--t", ".4,.8", "--samples", 20, "-o", tmp_path)
    assert code == 0
    ET.parse(tmp_path / "curves.svg")


@pytest.mark.parametrize("text", ["rank1<=5", "certified@median<=1.2", "ssim>=30", "distance>=2"])
def test_a_limit_that_says_nothing_is_refused(text):
    with pytest.raises(ConfigError, match="is between 0 and 1"):
        Target.parse(text)
