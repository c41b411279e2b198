"""audit/: linkability between its controls, a planted leak, gates that tell the truth, and no source named."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from boomerang_batch.audit import audit as module
from boomerang_batch.audit import compare, controls, names, readings
from boomerang_batch.audit.audit import AuditRequest, audit
from boomerang_batch.audit.calibrate import Calibration, Target, calibrate
from boomerang_batch.audit.controls import AT_0, AT_T, SECRET_KNOWN
from boomerang_batch.audit.findings import ALL, Findings, load_findings
from boomerang_batch.audit.gates import judge
from boomerang_batch.audit.pairs import Pairing, gather
from boomerang_batch.audit.records import NO_LABEL, Records
from boomerang_batch.audit.sweep import choose, sweep
from boomerang_batch.audit.words import describe
from boomerang_batch.cli import main
from boomerang_batch.config.blocks import Gates
from boomerang_batch.config.pipeline import Recipe
from boomerang_batch.data.manifest import load_manifest
from boomerang_batch.errors import ConfigError, ManifestError, MeasureError, PrivateDirError, VerificationError
from boomerang_batch.measures import embedders
from boomerang_batch.measures.ceiling import noise_ceiling
from boomerang_batch.measures.classifiers import CheckedClassifier
from boomerang_batch.report.facts import read_facts
from boomerang_batch.report.measured import sections
from boomerang_batch.report.privacy import in_short, section
from boomerang_batch.report.sections import Verdict
from boomerang_batch.report.words import sentence
from boomerang_batch.run.record import require_record
from boomerang_batch.run.trial import Rig
from tests import worlds

SAMPLES = 40
SHARDS = 2


def image(number: int) -> bytes:
    """Unlike every other, all over: smooth enough for a network, rich enough to be told apart."""
    pixels = np.random.default_rng(number).integers(0, 256, (4, 4), dtype=np.uint8)
    return worlds.encoded(np.asarray(Image.fromarray(pixels).resize((8, 8), Image.Resampling.BICUBIC)))


def save_world(folder: Path, *, first: int = 0) -> Path:
    """Shards of images whose keys are canaries, with labels by turns; the manifest's path."""
    shards = [
        {
            f"canary-{number:04d}": {"png": image(number), "cls": str(number % 2).encode()}
            for number in range(first + shard * SAMPLES, first + (shard + 1) * SAMPLES)
        }
        for shard in range(SHARDS)
    ]
    return worlds.save_samples(folder, *shards)


def asked(out: Path, manifest: Path, **options: object) -> AuditRequest:
    given: dict[str, object] = {
        "private_dir": f"{out}-private",
        "embedders": ("pixels", "pca"),
        "samples": 1000,
        "redraws": 0,
        "gates": Gates(),
        "device": "cpu",
        "threads": 1,
    }
    return AuditRequest(out=str(out), manifest=load_manifest(str(manifest)), **given | options)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> tuple[Path, Path, Recipe]:
    """(OUT, manifest, recipe) of a run at a t where sources still show."""
    folder = tmp_path_factory.mktemp("audited")
    manifest = save_world(folder / "in")
    recipe = worlds.recipe(tiny_model, "t.sigma=0.3")
    report = worlds.run(recipe, manifest, folder / "out")
    assert report.rows == {"ok": SHARDS * SAMPLES}
    return folder / "out", manifest, recipe


@pytest.fixture(scope="module")
def found(world: tuple[Path, Path, Recipe], tiny_model: Path) -> Findings:
    out, manifest, _ = world
    return audit(asked(out, manifest, redraws=40, model=str(tiny_model)))


def rank1(found: Findings, subject: str, attacker: str = readings.NEAREST) -> list[float]:
    return [one.value for one in found.of("rank-1", subject) if one.attacker == attacker]


@pytest.mark.slow
def test_every_control_is_where_it_belongs(found: Findings):
    assert rank1(found, "sources") == [1, 1]
    assert min(rank1(found, AT_0)) == 1  # a model of pixels: nothing hides
    assert rank1(found, SECRET_KNOWN, readings.RE_RUN) == [1, 1]  # so the secret is one
    for subject in (AT_T, "unrelated"):
        for one in found.of("rank-1", subject):
            assert one.chance is not None
            off = math.sqrt(one.chance * (1 - one.chance) / one.count)
            assert abs(one.value - one.chance) < 4 * off
    [nearest, *_] = rank1(found, "outputs")
    assert max(rank1(found, AT_T)) < nearest <= 1
    assert {one.attacker for one in found.of("rank-1")} == {
        readings.NEAREST,
        readings.TRAINED,
        readings.RE_RUN,
    }


def test_the_noise_lets_through_no_less_than_is_linked(found: Findings):
    for k in (1, 5, 10):
        ceilings = {one.attacker: one for one in found.of(f"rank-{k}", readings.CEILING)}
        assert set(ceilings) == {readings.NEAREST, readings.TRAINED, readings.RE_RUN}
        for one in found.of(f"rank-{k}"):
            own = ceilings[one.attacker]
            assert (own.count, own.chance) == (one.count, one.chance)  # among the same candidates
            assert one.low is not None
            assert one.low <= own.value
    assert not [warning for warning in found.warnings if "above the noise ceiling" in warning]


def test_what_bounds_no_matching_of_all_at_once_is_not_called_a_ceiling(found: Findings):
    assert not found.of("one-to-one", readings.CEILING)
    assert [one.attacker for one in found.of("one-to-one", readings.JUMP)] == [
        one.attacker for one in found.of("rank-1", readings.CEILING)
    ]


def test_the_re_run_attackers_ceiling_is_among_those_that_could_be_drawn(
    world: tuple[Path, Path, Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out, manifest, _ = world
    pairing = Pairing(
        str(out), require_record(str(out)), load_manifest(str(manifest)), private_dir=f"{out}-private"
    )
    records = gather(pairing, samples=SAMPLES, folder=tmp_path)

    def redraw(rig, recipe, pairing, records, places, *, secret):
        done = np.array(places[3:])
        return controls.Redrawn(places=done, outputs=records.outputs[done])

    monkeypatch.setattr(controls, "redraw", redraw)
    pixels = [embedders.load("pixels", fit_on=records.sources)]
    found, candidates = controls.redrawn(None, pairing, records, range(30), pixels, secret=None)
    assert candidates.tolist() == [*range(3, 30)]
    assert {one.count for one in found if one.attacker == readings.RE_RUN and one.measure == "rank-1"} == {27}


def test_the_bound_stands_for_the_records_own_noise(found: Findings):
    assert found.bound.reasons == ()
    [sigma] = found.bound.sigmas
    assert sigma == pytest.approx(0.3, rel=0.2)
    assert [one.distance for one in found.bound.promises] == ["least", "median", "largest possible"]
    least, median, largest = found.bound.promises
    assert 0 < least.delta < median.delta < largest.delta == pytest.approx(2 * 8)
    assert 0.5 < least.accuracy < largest.accuracy <= 1
    assert "the label in cls" in found.bound.within


def test_findings_are_what_they_were_when_read_again(found: Findings, tmp_path: Path):
    (tmp_path / "audit.json").write_bytes(found.to_bytes())
    again = load_findings(str(tmp_path / "audit.json"))
    assert again.to_bytes() == found.to_bytes()
    assert again.of("auc") == found.of("auc")
    (tmp_path / "audit.json").write_text("{}")
    with pytest.raises(MeasureError, match="is no audit"):
        load_findings(str(tmp_path / "audit.json"))


def test_no_source_is_named(found: Findings):
    assert b"canary" not in found.to_bytes()
    assert {len(case.key) for case in found.worst} == {32}


def leaky(records: Records, sigma: float, share: float) -> Records:
    """The records as outputs of noise alone, with a share of the source mixed in."""
    generator = np.random.default_rng(1)
    x_0 = records.sources[..., :1].astype(np.float64)
    noised = x_0 - 127.5 + 127.5 * sigma * generator.standard_normal(x_0.shape)
    mixed = (1 - share) * noised / (1 + sigma) + share * (x_0 - 127.5)
    pixels = np.clip(np.rint(mixed + 127.5), 0, 255).astype(np.uint8)
    return dataclasses.replace(records, outputs=np.repeat(pixels, 3, axis=3))


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_a_planted_leak_is_told(world: tuple[Path, Path, Recipe], tmp_path: Path, share: float):
    out, manifest, _ = world
    pairing = Pairing(
        str(out), require_record(str(out)), load_manifest(str(manifest)), private_dir=f"{out}-private"
    )
    records = gather(pairing, samples=1000, folder=tmp_path)
    mixed = leaky(records, 6.0, share)
    seen = compare.Seen.by(embedders.load("pixels", fit_on=records.sources), mixed)
    x_0 = (records.sources[..., :1] / 127.5 - 1).reshape(len(records.rows), -1)
    ceiling = noise_ceiling(x_0, np.full(len(records.rows), 6.0), groups=records.groups)
    measured = [*compare.links(mixed, seen)]
    told = [*module._above(measured, readings.NEAREST, ceiling.rank[1])]
    assert bool(told) == bool(share), told
    # Where an embedder missed one, the others are fewer candidates, and this is not their ceiling.
    missed = [dataclasses.replace(one, count=one.count - 1) for one in measured]
    assert not [*module._above(missed, readings.NEAREST, ceiling.rank[1])]


def test_a_gate_is_judged_by_the_bad_end(found: Findings):
    rated = dataclasses.replace(found.of("rank-1")[0], value=0.5, low=0.4, high=0.6)
    trained = dataclasses.replace(rated, attacker=readings.TRAINED, value=0.45, high=0.55)
    found = dataclasses.replace(
        found, embeddings=found.embeddings[:1], readings=(rated, trained, *found.of("label-agreement"))
    )
    gates = judge(found, Gates(max_rank1=0.5, min_label_agreement=0.0)).gates
    assert [gate.broken for gate in gates if gate.gate == "min_label_agreement"] == [False, False]
    assert all(gate.broken for gate in gates if gate.gate == "max_rank1")
    assert [gate.broken for gate in judge(found, Gates(max_rank1=0.6)).gates] == [False, False]
    assert judge(found, Gates()) == found


def test_a_limit_that_nothing_tells_of_is_neither_kept_nor_broken(found: Findings):
    nearest = dataclasses.replace(found.of("rank-1")[0], value=0.5, low=0.4, high=0.6)
    alone = dataclasses.replace(found, embeddings=found.embeddings[:1], readings=(nearest,))
    judged = judge(alone, Gates(max_rank1=0.6, max_tar=0.5))
    assert [gate.broken for gate in judged.gates] == [False]
    assert [said.partition(": audit")[0].partition(";")[0] for said in judged.unjudged] == [
        "gate max_rank1: nothing was measured of it in the features pixels by the attacker trained",
        "gate max_tar: nothing was measured of it in the features pixels by the attacker nearest",
    ]
    page = describe(judged)
    assert "NOT JUDGED: gate max_tar" in page
    [linked, *_] = sections(judged)
    assert linked.verdict == Verdict(fine=False, text="Limits were set that could not be judged")
    assert "Gate max_tar: nothing was measured" in linked.points[0].sentences[1]


@pytest.mark.slow
def test_an_audit_whose_gate_can_not_be_judged_is_kept_and_is_no_success(
    world: tuple[Path, Path, Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def unknown(records: Records, seen: compare.Seen) -> list[object]:
        raise MeasureError("nobody can tell")

    monkeypatch.setattr(compare, "kept", unknown)
    out, manifest, _ = world
    words = ["audit", str(out), "--against", str(manifest), "--redraw", "0", "--save", str(tmp_path / "a.json")]
    words += ["--private-dir", f"{out}-private", "--embedder", "pixels", "--max-fd", "1"]
    told = CliRunner().invoke(main, words)
    assert told.exit_code == 1, told.output
    assert "NOT JUDGED: gate max_fd: nothing was measured of it" in told.stdout
    assert "error: gate max_fd: nothing was measured of it" in told.stderr
    assert load_findings(str(tmp_path / "a.json")).unjudged
    told = CliRunner().invoke(main, [*words, "--max-rank1", "0"])
    assert told.exit_code == 4, told.output


@pytest.mark.parametrize(
    ("limits", "changes", "reason"),
    [
        ({"min_label_agreement": 0.8}, {"labels": np.full(80, NO_LABEL)}, "no source audited has a label"),
        ({"min_label_agreement": 0.8}, {"labels": np.zeros(80, np.int64)}, "have the same label"),
        ({"max_rank1": 0.5}, {"identities": np.zeros(80, np.int64)}, "half of the records are 0 pairs"),
        ({"max_rank1": 0.5}, {"groups": np.arange(80)}, "a guess is always right"),
        ({"max_tar": 0.5}, {"groups": np.arange(80) // 2}, "80 pairs of strangers are too few"),
    ],
)
def test_what_no_record_tells_is_refused_before_any_is_compared(
    world: tuple[Path, Path, Recipe], monkeypatch: pytest.MonkeyPatch, limits, changes, reason
):
    out, manifest, _ = world
    gathered = module.gather
    monkeypatch.setattr(module, "gather", lambda *a, **b: dataclasses.replace(gathered(*a, **b), **changes))
    monkeypatch.setattr(module.known, "load", lambda *a, **b: pytest.fail("was loaded"))
    with pytest.raises(MeasureError, match=f"gate {next(iter(limits))}: nothing can be measured .*{reason}"):
        audit(asked(out, manifest, gates=Gates(**limits)))


@pytest.mark.slow
def test_the_command_ends_with_4_where_a_gate_is_broken(world: tuple[Path, Path, Recipe], tmp_path: Path):
    out, manifest, _ = world
    words = ["audit", str(out), "--against", str(manifest), "--redraw", "0", "--save", str(tmp_path / "a.json")]
    told = CliRunner().invoke(main, [*words, "--private-dir", f"{out}-private", "--max-rank1", "0"])
    assert told.exit_code == 4, told.output
    assert "gate max_rank1 0: BROKEN by rank-1 · outputs · nearest · pixels" in told.stdout
    assert "no noise ceiling" in told.stdout
    assert any(gate.broken for gate in load_findings(str(tmp_path / "a.json")).gates)
    told = CliRunner().invoke(main, [*words, "--private-dir", f"{out}-private", "--max-rank1", "1", "--json"])
    assert (told.exit_code, json.loads(told.stdout)["audited"]) == (0, SHARDS * SAMPLES)
    told = CliRunner().invoke(main, words)
    assert told.exit_code == 2
    assert "--private-dir" in told.stderr


class Even:
    """Takes every picture for one of the even label."""

    name, digest, licence = "even", "0" * 64, "MIT"

    def classify(self, images: np.ndarray) -> list[int]:
        return [0] * len(images)


@pytest.mark.slow
def test_images_besides_and_a_given_classifier_are_told_by_number_alone(
    world: tuple[Path, Path, Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out, manifest, _ = world
    monkeypatch.setattr(module.makers, "load", lambda name: CheckedClassifier(Even()))
    beside = {
        flag: str(save_world(tmp_path / flag, first=first))
        for flag, first in (("training", 5000), ("holdout", 6000))
    }
    words = ["audit", str(out), "--against", str(manifest), "--private-dir", f"{out}-private", "--redraw", "0"]
    words += ["--embedder", "pixels", "--classifier", "even", "--min-label-agreement", "0.7", "--json"]
    saved = tmp_path / "a.json"
    told = CliRunner().invoke(
        main, [*words, "--training", beside["training"], "--holdout", beside["holdout"], "--save", str(saved)]
    )
    assert told.exit_code == 4, told.output
    found = load_findings(str(saved))
    assert (found.training, found.holdout) == (SHARDS * SAMPLES, SHARDS * SAMPLES)
    assert [one.name for one in found.classifiers] == ["even"]
    assert {one.features: one.value for one in found.of("label-agreement")}["even"] == 0.5
    assert found.of("training-swaps")
    assert found.of("median-dcr", "hold-out")
    assert found.unread == {"training": 0, "holdout": 0}
    assert not [said for said in (b"canary", str(tmp_path).encode(), b"s-000") if said in saved.read_bytes()]
    gone = CliRunner().invoke(main, [*words, "--holdout", str(tmp_path / "nowhere.yaml")])
    assert gone.exit_code != 0
    assert "--holdout: " in gone.stderr
    assert "nowhere.yaml" in gone.stderr
    taken = CliRunner().invoke(main, [*words, "--embedder", "even"])
    assert taken.exit_code == 2
    assert "--classifier even: it has the name of an embedder" in taken.stderr


@pytest.mark.slow
def test_a_model_that_was_trained_on_sources_has_no_bound(world: tuple[Path, Path, Recipe]):
    out, manifest, _ = world
    both = save_world(manifest.parent / "more", first=SAMPLES)  # half of them are sources
    told = audit(asked(out, manifest, training=load_manifest(str(both)), embedders=("pixels",)))
    assert told.training == SAMPLES
    [reason] = told.bound.reasons
    assert reason.startswith(f"the model was trained on {SAMPLES} of the audited sources")
    assert told.bound.promises == ()
    assert f"none: {reason}" in describe(told)
    facts = read_facts(str(out))
    assert in_short(facts, None) == ("A bound is", "proven")
    assert in_short(facts, told) == ("Proven bound", "none")
    promised = section(facts, told)
    assert promised.verdict == Verdict(fine=False, text="No certified bound")
    assert promised.points[0].sentences == (sentence(reason),)


def test_every_measure_has_its_words(found: Findings):
    assert {one.measure for one in found.readings} <= {*names.LINKED, *names.COPIES, *names.USE}


@pytest.mark.slow
def test_a_runs_gate_judges_before_the_rest_is_spent(tmp_path: Path, tiny_model: Path):
    manifest = save_world(tmp_path / "in")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(worlds.recipe_text(tiny_model))
    words = [
        "run",
        str(recipe),
        str(manifest),
        str(tmp_path / "out"),
        "--private-dir",
        str(tmp_path / "private"),
    ]
    words += ["--device", "cpu", "--threads", "1", "--set", f"run.gate.samples={SAMPLES}"]
    told = CliRunner().invoke(main, [*words, "--set", "run.gate.max_rank1=0"])
    assert told.exit_code == 4, told.output
    assert f"the gate is broken by the first {SAMPLES} outputs: max_rank1 0: rank-1" in told.stderr
    assert len([*(tmp_path / "out").glob("*_stats.json")]) == 1
    told = CliRunner().invoke(main, [*words, "--set", "run.gate.max_rank1=1"])
    assert told.exit_code == 0, told.output
    assert len([*(tmp_path / "out").glob("*_stats.json")]) == SHARDS


def test_a_sample_is_whole_shards_and_the_same_each_time(world: tuple[Path, Path, Recipe], tmp_path: Path):
    out, manifest, _ = world
    record, listed = require_record(str(out)), load_manifest(str(manifest))
    pairing = Pairing(str(out), record, listed, private_dir=f"{out}-private")
    chosen = pairing.choose(SAMPLES + 5)
    assert [len(rows) for _, rows in chosen] == [SAMPLES, 5]
    assert pairing.choose(SAMPLES + 5) == chosen
    records = gather(pairing, samples=SAMPLES + 5, folder=tmp_path)
    assert len(set(records.samples)) == len(records.rows) == SAMPLES + 5
    assert records.outputs.shape == records.sources.shape == (SAMPLES + 5, 8, 8, 3)
    # Each source is the one that its own key names.
    for place, identity in enumerate(records.identities):
        number = int(records.samples[identity][1].removeprefix("canary-"))
        with Image.open(io.BytesIO(image(number))) as picture:
            assert (records.sources[place, ..., 0] == np.asarray(picture)).all()
        assert records.labels[place] == number % 2


@pytest.mark.slow
def test_variants_of_a_sample_are_one_identity(tmp_path: Path, tiny_model: Path):
    manifest = save_world(tmp_path / "in")
    recipe = worlds.recipe(tiny_model, "variants=2", "fields.fields={}", "t.sigma=0.2")
    worlds.run(recipe, manifest, tmp_path / "out")
    told = audit(asked(tmp_path / "out", manifest, model=str(tiny_model), redraws=20))
    assert told.audited == 2 * SHARDS * SAMPLES
    assert len(told.bound.sigmas) == told.bound.observations == 2
    assert rank1(told, "sources") == [1, 1]
    assert min(rank1(told, SECRET_KNOWN, readings.RE_RUN)) == 1


@pytest.mark.slow
def test_the_bound_counts_every_variant_and_no_pass(tmp_path: Path, tiny_model: Path):
    manifest = save_world(tmp_path / "in")
    levels = ("t=[{sigma: 2.0}, {sigma: 0.3}]", "passes={count: 2, outputs: all}")
    recipe = worlds.recipe(tiny_model, "variants=2", *levels)
    worlds.run(recipe, manifest, tmp_path / "out")
    told = audit(asked(tmp_path / "out", manifest, model=str(tiny_model), redraws=4))
    assert sorted(told.bound.sigmas) == pytest.approx([0.3, 2.0], rel=0.2)
    assert told.bound.promises[0].accuracy > 0.99
    # Of one variant alone nothing is promised, for the other shows more.
    alone = audit(asked(tmp_path / "out", manifest, samples=3))
    assert len(alone.bound.sigmas) in (0, 2)


def test_an_equal_pair_is_the_most_alike_there_is(world: tuple[Path, Path, Recipe], tmp_path: Path):
    out, manifest, _ = world
    pairing = Pairing(
        str(out), require_record(str(out)), load_manifest(str(manifest)), private_dir=f"{out}-private"
    )
    records = gather(pairing, samples=SAMPLES, folder=tmp_path)
    equal = dataclasses.replace(records, outputs=records.sources)
    [like] = [one for one in compare.pictures(equal) if (one.measure, one.stratum) == ("median-psnr-db", ALL)]
    assert (like.value, like.count) == (readings.EQUAL_DB, SAMPLES)


def test_an_output_that_is_gone_is_told(world: tuple[Path, Path, Recipe], tmp_path: Path):
    out, manifest, _ = world
    harmed = tmp_path / "out"
    shutil.copytree(out, harmed)
    for tar in harmed.glob("*.tar"):
        tar.write_bytes(tar.read_bytes()[:4096] + bytes(1024))
    with pytest.raises(VerificationError, match=r"lacks \d+ output"):
        audit(asked(harmed, manifest, private_dir=f"{out}-private"))


def test_findings_are_not_saved_where_they_would_be_published(world: tuple[Path, Path, Recipe]):
    out, manifest, _ = world
    words = ["audit", str(out), "--against", str(manifest), "--private-dir", f"{out}-private"]
    told = CliRunner().invoke(main, [*words, "--save", str(out / "audit.json")])
    assert told.exit_code == 2
    assert "lies in OUT" in told.stderr
    assert not (out / "audit.json").exists()


@pytest.mark.slow
def test_outputs_that_anyone_may_link_are_measured_too(tmp_path: Path, tiny_model: Path):
    manifest = save_world(tmp_path / "in")
    worlds.run(worlds.recipe(tiny_model, purpose="augment"), manifest, tmp_path / "out")
    told = audit(asked(tmp_path / "out", manifest, private_dir=None))
    assert told.bound.reasons
    assert told.bound.promises == ()


@pytest.mark.slow
def test_little_noise_on_the_way_back_is_warned_of(tmp_path: Path, tiny_model: Path):
    manifest = save_world(tmp_path / "in")
    worlds.run(worlds.recipe(tiny_model, "sampler.eta=0.0"), manifest, tmp_path / "out")
    told = audit(asked(tmp_path / "out", manifest))
    assert any("sampler.eta is 0" in warning for warning in told.warnings)


def test_what_does_not_belong_together_is_refused(world: tuple[Path, Path, Recipe], tmp_path: Path):
    out, manifest, _ = world
    other = tmp_path / "other" / "manifest.yaml"
    other.parent.mkdir()
    other.write_text("format_version: 1\nname: other\nshards: ['x-000.tar']\n")
    with pytest.raises(ManifestError, match="manifest other lists no shard that"):
        audit(asked(out, other))
    with pytest.raises(PrivateDirError):
        audit(asked(out, manifest, private_dir=None))
    # Shards of the same names, but other samples.
    strangers = save_world(tmp_path / "strangers", first=1000)
    with pytest.raises(ManifestError, match=r"lacks .* sample"):
        audit(asked(out, strangers))
    # Samples of the same names, but other pictures.
    others = [
        {
            f"canary-{number:04d}": {"png": image(number + 500), "cls": b"0"}
            for number in range(first, first + SAMPLES)
        }
        for first in (0, SAMPLES)
    ]
    with pytest.raises(ManifestError, match="is not the picture that OUT was made from"):
        audit(asked(out, worlds.save_samples(tmp_path / "others", *others)))


class Constant:
    """Sees the same in every picture."""

    name, digest, licence = "constant", "0" * 64, "none"

    def embed(self, images: np.ndarray) -> np.ndarray:
        return np.ones((len(images), 4), np.float32)


def test_an_embedder_that_sees_nothing_is_refused(
    world: tuple[Path, Path, Recipe], monkeypatch: pytest.MonkeyPatch
):
    out, manifest, _ = world
    monkeypatch.setitem(embedders.BUILT_IN, "constant", lambda fit_on: Constant())
    with pytest.raises(MeasureError, match=r"differ|same"):
        audit(asked(out, manifest, embedders=("pixels", "constant")))


@pytest.fixture(scope="module")
def rig(world: tuple[Path, Path, Recipe]):
    with Rig(world[2], device="cpu", threads=1) as open_rig:
        yield open_rig


@pytest.mark.slow
def test_a_sweep_shows_each_t(world: tuple[Path, Path, Recipe], rig: Rig):
    _, manifest, recipe = world
    [samples], left_out = choose(load_manifest(str(manifest)), 30, named=True)
    assert left_out == ()
    told = sweep(rig, recipe, samples, [("fraction", 0.0), ("sigma", 1.0)], embedders=("pixels",), shown=4)
    assert [level.t for level in told.levels] == ["fraction=0", "sigma=1"]
    nothing, much = told.levels
    assert nothing.evaluations == 0 < much.evaluations
    assert much.sigma == pytest.approx(1.0, rel=0.3)
    ranks = [
        [
            one.value
            for one in level.readings
            if (one.measure, one.subject, one.stratum) == ("rank-1", "outputs", ALL)
        ]
        for level in told.levels
    ]
    assert ranks[0][0] == 1 > ranks[1][0]
    with Image.open(io.BytesIO(told.grid)) as grid:
        assert grid.size == (3 * 100 + 4, 24 + 4 * 100 + 4)
    json.dumps(told.facts())


def searched(rig: Rig, world: tuple[Path, Path, Recipe], text: str) -> Calibration:
    _, manifest, recipe = world
    (search, check), _ = choose(load_manifest(str(manifest)), 2 * SAMPLES, parts=2, named=True)
    assert not {sample.key for sample in search} & {sample.key for sample in check}
    return calibrate(rig, recipe, search, check, Target.parse(text), embedders=("pixels",))


@pytest.mark.slow
def test_calibrate_finds_the_least_t(rig: Rig, world: tuple[Path, Path, Recipe]):
    told = searched(rig, world, "rank1<=.6")
    assert told.checked is not None
    assert told.beside == pytest.approx(told.t - 0.05)
    reached = {level.t: told.target.reached(level) for level in told.searched}
    assert reached[f"fraction={told.t:g}"]
    assert not reached[f"fraction={told.beside:g}"]


@pytest.mark.slow
def test_calibrate_says_that_no_t_reaches_a_target(rig: Rig, world: tuple[Path, Path, Recipe]):
    told = searched(rig, world, "psnr>=90")
    assert (told.t, told.checked, told.holds) == (None, None, False)


@pytest.mark.parametrize("text", ["rank1<.5", "rank1<=much", "beauty>=1", "rank1<=1.2.3"])
def test_a_target_without_meaning_is_refused(text: str):
    with pytest.raises(ConfigError, match="--target"):
        Target.parse(text)
