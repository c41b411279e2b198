"""audit/others, given classifiers and measures' names: images beside the sources, and labels told by others."""

from __future__ import annotations

import dataclasses
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from boomerang_batch.audit import compare, names
from boomerang_batch.audit.classify import given_agreement
from boomerang_batch.audit.findings import ALL, Bound, Embedding, Findings, Reading
from boomerang_batch.audit.gates import judge
from boomerang_batch.audit.others import Others, read_others
from boomerang_batch.audit.records import NO_LABEL, Records
from boomerang_batch.audit.words import describe
from boomerang_batch.config.blocks import Gates
from boomerang_batch.data import images
from boomerang_batch.data.manifest import load_manifest
from boomerang_batch.data.provenance import Row
from boomerang_batch.data.spread import Unread, spread_samples
from boomerang_batch.errors import ManifestError, MeasureError, StorageError
from boomerang_batch.measures import embedders
from boomerang_batch.measures.classifiers import CheckedClassifier
from boomerang_batch.report.measured import sections
from tests import worlds

COUNT, SIDE = 60, 8
RECIPE = worlds.recipe(Path("model"))


def pictures(first: int, count: int = COUNT) -> np.ndarray:
    """(count, 8, 8, 3), each unlike all others."""
    return np.stack([worlds.noise(number, SIDE, SIDE, 3) for number in range(first, first + count)])


def recorded(outputs: np.ndarray, sources: np.ndarray, **changes: object) -> Records:
    """Records of one shard, one output for each source, of two labels by turns."""
    count = len(outputs)
    row = Row(key="k", variant=0, status="ok", model_digest="", recipe_digest="", versions="")
    records = Records(
        rows=(row,) * count,
        shards=("s",) * count,
        outputs=outputs,
        sources=sources,
        labels=np.arange(count) % 2,
        groups=np.zeros(count, np.int64),
        identities=np.arange(count),
        samples=tuple(("s", str(number)) for number in range(count)),
    )
    return dataclasses.replace(records, **changes)


def shard_of(folder: Path, shown: np.ndarray, **broken: bytes) -> Path:
    """A shard of these pictures, whose keys are canaries, and of broken ones; its manifest's path."""
    samples: Mapping[str, Mapping[str, bytes]] = {
        f"canary-{number:04d}": {"png": worlds.encoded(picture)} for number, picture in enumerate(shown)
    }
    return worlds.save_samples(folder, {**samples, **{name: {"png": data} for name, data in broken.items()}})


def read(manifest: Path, records: Records, folder: Path, *, samples: int = 1000, flag: str = "--training"):
    return read_others(
        load_manifest(str(manifest)), flag, recipe=RECIPE, records=records, samples=samples, folder=folder
    )


def value(found: list[Reading], measure: str, subject: str = "outputs") -> float:
    (one,) = [one for one in found if (one.measure, one.subject, one.stratum) == (measure, subject, ALL)]
    return one.value


# --- images beside the sources ---


def test_images_are_read_at_the_records_size_and_named_nowhere(tmp_path: Path):
    records = recorded(pictures(0), pictures(100))
    large = [images.resize(picture, (20, 12)) for picture in pictures(200, 5)]
    given = read(shard_of(tmp_path / "in", np.stack(large)), records, tmp_path)
    found, left_out = given.pictures, given.left_out
    assert found.shape == (5, SIDE, SIDE, 3)
    expected = [images.resize(picture, (SIDE, SIDE)) for picture in large]
    assert (found == np.stack(expected)).all()
    assert left_out == ("--training: 5 images hardly tell what is near; give 100 or more",)


def test_no_more_are_read_than_asked_for(tmp_path: Path):
    records = recorded(pictures(0), pictures(100))
    manifest = shard_of(tmp_path / "in", pictures(200, 9))
    found = read(manifest, records, tmp_path, samples=4).pictures
    assert (found == pictures(200, 4)).all()


def test_sources_and_what_can_not_be_read_are_left_out_and_counted(tmp_path: Path):
    records = recorded(pictures(0), pictures(100))
    shown = np.concatenate([pictures(100, 3), pictures(200, 5)])
    given = read(shard_of(tmp_path / "in", shown, secret=b"no picture"), records, tmp_path)
    assert (given.pictures == pictures(200, 5)).all()
    assert (given.unread, given.sources) == (1, 3)
    assert given.left_out == (
        "--training: 1 of the images looked at can't be read and are left out",
        "--training: 3 of the images looked at are audited sources and are left out",
        "--training: 5 images hardly tell what is near; give 100 or more",
    )


def broken_off(manifest: Path, name: str = "s-000.tar") -> Path:
    """Cut a shard within its last member."""
    shard = manifest.with_name(name)
    with tarfile.open(shard) as tar:
        *_, last = tar.getmembers()
    shard.write_bytes(shard.read_bytes()[: last.offset_data + 1])
    return manifest


@pytest.mark.parametrize("purpose", ["anonymize", "augment"])
def test_a_damaged_shard_is_told_and_counted_and_named_where_it_may_be(tmp_path: Path, purpose: str):
    records = recorded(pictures(0), pictures(100))
    manifest = broken_off(shard_of(tmp_path / "in", pictures(200, 5)))
    options = {"recipe": worlds.recipe(Path("model"), purpose=purpose), "records": records, "samples": 9}
    given = read_others(load_manifest(str(manifest)), "--training", folder=tmp_path, **options)
    assert (len(given.pictures), given.unread) == (4, 1)
    where = "shard 1 of 1" if purpose == "anonymize" else "shard s-000"
    assert given.left_out[0] == f"--training: what can't be read in {where} (truncated-tar) is left out"
    nothing = broken_off(shard_of(tmp_path / "less", pictures(200, 1)))
    with pytest.raises(ManifestError, match=rf"--training tiny: no image is left .*{where} \(truncated-tar\)"):
        read_others(load_manifest(str(nothing)), "--training", folder=tmp_path, **options)


def test_what_is_damaged_is_counted_once_however_often_it_is_read(tmp_path: Path):
    members = [(f"k{number}.png", b"x") for number in (0, 1, 0, 2, 0, 3)]
    for number in range(12):
        worlds.write_tar(tmp_path / f"s-{number:03d}.tar", members)
    (tmp_path / "m.yaml").write_text("format_version: 1\nname: m\nshards: ['*.tar']\n")
    manifest, unread = load_manifest(str(tmp_path / "m.yaml")), Unread()
    assert len([*spread_samples(manifest.shards, 1000, unread)]) == 12 * 4
    assert len(unread) == 12 * 2
    told = unread.told(manifest, named=True)
    assert told.startswith("shard s-000 (key-repeated, 2 times), shard s-001 (key-repeated, 2 times), ")
    assert told.endswith(" and 7 more")


def test_where_nothing_is_left_flag_and_manifest_are_named(tmp_path: Path):
    records = recorded(pictures(0), pictures(100))
    with pytest.raises(ManifestError, match=r"--holdout tiny: no image is left .*3 of .* audited sources"):
        read(shard_of(tmp_path / "same", pictures(100, 3)), records, tmp_path, flag="--holdout")
    with pytest.raises(ManifestError, match=r"--training tiny: .*1 of .* can't be read"):
        read(shard_of(tmp_path / "bad", pictures(0)[:0], secret=b"no picture"), records, tmp_path)
    gone = shard_of(tmp_path / "gone", pictures(200, 3))
    gone.with_name("s-000.tar").unlink()
    with pytest.raises(StorageError, match=r"--holdout tiny: .*s-000\.tar"):
        read(gone, records, tmp_path, flag="--holdout")


def test_copies_of_training_images_are_told_and_a_holdout_tells_what_is_near():
    sources, training, holdout = pictures(100), pictures(200), pictures(300)
    outputs = sources.copy()
    outputs[:12] = training[:12]
    records = recorded(outputs, sources)
    seen = compare.Seen.by(embedders.load("pixels", fit_on=sources), records)
    found = [*compare.copied(records, seen, Others(training=training, holdout=holdout))]
    assert value(found, "training-swaps") == 12 / COUNT
    assert value(found, "training-copies") >= 12 / COUNT
    assert value(found, "copies") >= (COUNT - 12) / COUNT
    assert value(found, "median-dcr", "hold-out") > value(found, "median-dcr") == 0
    assert value(found, "median-dcr-to-training", "sources") > 0
    alone = [*compare.copied(records, seen)]
    assert not [one for one in alone if "training" in one.measure]
    assert {one.subject for one in alone} == {"outputs", "sources"}


# --- labels told by a given classifier ---


class Parity:
    """Tells odd from even by the first pixel, as it is told."""

    name, digest, licence = "parity", "0" * 64, "MIT"

    def classify(self, shown: np.ndarray) -> np.ndarray:
        return shown[:, 0, 0, 0] % 2


def parities(odd: np.ndarray) -> np.ndarray:
    """Pictures that are odd or not."""
    shown = pictures(0, len(odd))
    shown[:, 0, 0, 0] = odd
    return shown


def test_a_given_classifier_tells_who_keeps_the_label():
    labels = np.arange(COUNT) % 2
    changed = np.where(np.arange(COUNT) < 15, 1 - labels, labels)
    records = recorded(parities(changed), parities(labels), labels=np.where(labels == 0, 0, 1))
    records.labels[-10:] = NO_LABEL
    found = [*given_agreement(CheckedClassifier(Parity()), records)]
    whole = {one.subject: one for one in found if one.stratum == ALL}
    assert (whole["outputs"].value, whole["sources"].value) == (35 / 50, 1)
    assert {(one.features, one.attacker) for one in found} == {("parity", "")}
    assert [one.count for one in found] == [50, 25, 25] * 2
    records.labels[:] = NO_LABEL
    with pytest.raises(MeasureError, match=r"--classifier parity: no source audited has a label"):
        list(given_agreement(CheckedClassifier(Parity()), records))


def test_each_source_is_classified_once_for_all_its_outputs():
    asked = []

    class Counting(Parity):
        def classify(self, shown: np.ndarray) -> np.ndarray:
            asked.append(len(shown))
            return super().classify(shown)

    odd = np.repeat(np.arange(5) % 2, 4)
    records = recorded(parities(odd), parities(odd), labels=odd, identities=np.repeat(np.arange(5), 4))
    found = [*given_agreement(CheckedClassifier(Counting()), records)]
    assert {one.value for one in found} == {1}
    assert asked == [20, 5]


def told(*found: Reading, **changes: object) -> Findings:
    bound = Bound(reasons=("none",), within=(), notes=(), observations=1, sigmas=(), dp_delta=1e-5, promises=())
    findings = Findings(
        name="tiny",
        purpose="augment",
        recipe_digest="",
        model_digest="",
        noise_key_id="",
        audited=COUNT,
        outputs=COUNT,
        embeddings=(),
        readings=found,
        bound=bound,
    )
    return dataclasses.replace(findings, **changes)


def test_the_worst_classifier_keeps_a_gate_or_breaks_it():
    labels = np.arange(COUNT) % 2
    records = recorded(parities(1 - labels), parities(labels), labels=labels)
    given = [*given_agreement(CheckedClassifier(Parity()), records)]
    trained = dataclasses.replace(given[0], features="pixels", value=1.0, low=0.94, high=1.0)
    gates = judge(told(trained, *given), Gates(min_label_agreement=0.9)).gates
    assert [gate.broken for gate in gates] == [False, True]


# --- how it is said ---


def test_the_page_says_by_what_nearness_is_told_and_who_told_labels():
    near = Reading(measure="copies", value=0.1, count=COUNT, chance=0.05)
    assert "copies: nearer than 95 % of sources are to each other" in describe(told(near))
    parity = Embedding(name="parity", digest="0" * 64, licence="MIT")
    page = describe(told(near, training=1200, holdout=800, classifiers=(parity,)))
    assert "nearer than 95 % of 800 images of the hold-out are to a source" in page
    assert "1,200 of the model's training images" in page
    assert "labels told by parity too" in page


def test_the_report_says_it_too():
    rate = Reading(measure="copies", features="pixels", value=0.1, count=COUNT, chance=0.05)
    usual = Reading(measure="median-dcr", subject="hold-out", features="pixels", value=3.5, count=800)
    (copied,) = sections(told(rate, usual, training=1, holdout=800))
    (prose,) = copied.prose
    assert "800 real pictures that were no sources, a hold-out" in prose
    assert "1 picture that the model was trained on" in prose
    assert [row[1] for row in copied.tables[0].rows] == ["pixels"]
    (everything,) = copied.details
    assert ("distance to the nearest source, median", "hold-out, pixels", "3.5") in [
        row[:3] for row in everything.rows
    ]
    (copied,) = sections(told(rate))
    assert "the sources themselves" in copied.prose[0]


def test_every_measure_is_said_in_words_once():
    groups = (names.LINKED, names.PROVEN, names.COPIES, names.USE)
    assert sum(map(len, groups)) == len({name for group in groups for name in group})
    measures = [measure for group in groups for measure in group.values()]
    assert len({one.brief for one in measures}) == len({one.says for one in measures}) == len(measures)
