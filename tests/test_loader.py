"""The loader: coins that seed, epoch and name alone decide, and copies beside no original but their own."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import logging
import math
import pickle
import subprocess
import sys
import tracemalloc
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from boomerang_batch.config.pipeline import Recipe, parse_recipe
from boomerang_batch.data.provenance import Marker, Row, read_rows, write_rows
from boomerang_batch.data.shards import write_shard
from boomerang_batch.errors import ConfigError, RunMismatchError, VerificationError
from boomerang_batch.loader import Augment, AugmentedDataset, Copies, Counts
from boomerang_batch.loader.coin import Coin, coin_name
from boomerang_batch.run.commit import digest_file
from boomerang_batch.run.naming import ORIGINAL, member_key
from boomerang_batch.run.record import RunRecord
from boomerang_batch.run.transform import Transform
from tests import broken, worlds

# webdataset leaves closing its files to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")

ROOT = Path(__file__).parent.parent
SHARDS, SAMPLES, VARIANTS = 4, 9, 2

Fields = dict[str, bytes]
Copied = Mapping[int, bytes | None]
"""The copies of a sample by their numbers; None for one that failed."""


# --- an OUT made by hand, of the project's own parts ---


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A sample, and what became of it."""

    key: str
    fields: Fields
    copies: Copied


def source(number: int, **more: bytes) -> Source:
    """A sample of bytes that nobody decodes, with all its copies."""
    key = f"img{number:05d}"
    fields = {"png": b"original of " + key.encode(), "cls": str(number % 3).encode(), **more}
    copies = {variant: f"copy {variant} of {key}".encode() for variant in range(VARIANTS)}
    return Source(key=key, fields=fields, copies=copies)


def shards_of(count: int, *, size: int = SAMPLES) -> dict[str, list[Source]]:
    return {f"s-{shard:03d}": [source(shard * size + one) for one in range(size)] for shard in range(count)}


def recipe(*overrides: str, purpose: str = "augment") -> Recipe:
    text = worlds.recipe_text(Path("model"), purpose=purpose)
    return parse_recipe(text, source="test", overrides=[f"variants={VARIANTS}", *overrides])


def save_originals(folder: Path, shards: Mapping[str, Sequence[Source]]) -> list[str]:
    """The input's shards; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    for stem, samples in shards.items():
        write_shard(folder / f"{stem}.tar", ((one.key, one.fields) for one in samples))
    return [str(folder / f"{stem}.tar") for stem in shards]


def save_out(out: Path, shards: Mapping[str, Sequence[Source]], made_by: Recipe, *, field: str = "png") -> str:
    """What a run would leave, of these very copies; returns the path."""
    out.mkdir()
    for stem, samples in shards.items():
        save_shard(out, stem, samples, made_by, field=field)
    record = RunRecord(
        name="test",
        recipe=made_by.canonical(),
        recipe_digest=made_by.digest,
        manifest_digest="0" * 64,
        limit=None,
        shards=tuple(sorted(stem for stem in shards if "~" not in stem)),
        model_digest="0" * 64,
        noise_key_id="seed:7",
        stack={},
    )
    (out / "run.json").write_bytes(record.to_bytes())
    return str(out)


def save_shard(out: Path, stem: str, samples: Sequence[Source], made_by: Recipe, *, field: str = "png") -> None:
    rows, members = [], []
    made = Row(variant=0, status="ok", model_digest="m", recipe_digest=made_by.digest, versions="v")
    for one in samples:
        digest = hashlib.sha256(one.fields["png"]).hexdigest()
        for number, data in sorted(one.copies.items()):
            row = dataclasses.replace(made, key=one.key, variant=number)
            if data is None:
                rows.append(dataclasses.replace(row, status="failed", reason="undecodable"))
                continue
            status = "original" if number == ORIGINAL else "ok"
            outcome = dataclasses.replace(
                row, status=status, source_digest=digest, output_digest=hashlib.sha256(data).hexdigest()
            )
            rows.append(outcome)
            others = {name: value for name, value in one.fields.items() if name != "png"}
            members.append((member_key(made_by, one.key, number), {field: data, **others}))
    write_shard(out / f"{stem}.tar", members)
    write_rows(out / f"{stem}.parquet", rows)
    mark(out, stem, made_by, Counter(str(row.status) for row in rows))


def mark(out: Path, stem: str, made_by: Recipe, counts: Mapping[str, int]) -> None:
    tar, parquet = digest_file(out / f"{stem}.tar"), digest_file(out / f"{stem}.parquet")
    marker = Marker(
        stem=stem,
        counts=dict(counts),
        tar_sha256=tar.sha256,
        tar_bytes=tar.size_bytes,
        parquet_sha256=parquet.sha256,
        parquet_bytes=parquet.size_bytes,
        recipe_digest=made_by.digest,
    )
    (out / f"{stem}_stats.json").write_bytes(marker.to_bytes())


@dataclasses.dataclass(frozen=True, kw_only=True)
class World:
    """Originals and copies on disk."""

    urls: list[str]
    out: str
    shards: Mapping[str, Sequence[Source]]

    def expected(self, key: str, number: int) -> Fields:
        """What is to be shown of a sample."""
        one = next(one for samples in self.shards.values() for one in samples if one.key == key)
        return one.fields if number == ORIGINAL else {**one.fields, "png": one.copies[number]}


def world(folder: Path, shards: Mapping[str, Sequence[Source]] | None = None, *overrides: str) -> World:
    shards = shards or shards_of(SHARDS)
    urls = save_originals(folder / "in", shards)
    return World(urls=urls, out=save_out(folder / "out", shards, recipe(*overrides)), shards=shards)


def reader(urls: Sequence[str], *stages: object, **options: object) -> webdataset.WebDataset:
    made = webdataset.WebDataset(list(urls), shardshuffle=False, empty_check=False, **options)
    return made.compose(*stages)


def plain(samples: object) -> list[tuple[str, Fields, int]]:
    """(key, fields, variant) of each sample."""
    return [
        (
            one["__key__"],
            {name: data for name, data in one.items() if not name.startswith("__")},
            one["__variant__"],
        )
        for one in samples
    ]


def choices(samples: object) -> dict[str, int]:
    """Which copy is shown, by key."""
    found = [(key, number) for key, _, number in plain(samples)]
    assert len(dict(found)) == len(found)
    return dict(found)


def first(batch: list) -> object:
    """What a DataLoader is to make of a batch of one."""
    return batch[0]


def loaded(dataset: object, *, workers: int, **options: object) -> list:
    return list(DataLoader(dataset, batch_size=1, num_workers=workers, collate_fn=first, **options))


# --- coins ---


def names(count: int) -> list[bytes]:
    return [coin_name(f"key{number}") for number in range(count)]


def tosses(p: float, *, seed: int = 0, epoch: int = 0, count: int = 20_000, copies: int = 3) -> np.ndarray:
    coin = Coin(p=p, seed=seed)
    return np.array([coin.toss(name, epoch=epoch, copies=copies) for name in names(count)])


def within_five_sigma(hits: int, trials: int, p: float) -> bool:
    return abs(hits - trials * p) <= 5 * math.sqrt(trials * p * (1 - p))


@pytest.mark.parametrize("p", [0.5, 0.1, 0.85])
def test_copies_come_as_often_as_asked_for_and_each_as_often_as_the_others(p):
    found = tosses(p)
    assert within_five_sigma(int((found != ORIGINAL).sum()), len(found), p)
    for number in range(3):
        assert within_five_sigma(int((found == number).sum()), len(found), p / 3)


def test_at_the_ends_there_is_no_chance():
    assert set(tosses(0.0, count=2000)) == {ORIGINAL}
    assert set(tosses(1.0, count=2000)) == {0, 1, 2}


@pytest.mark.parametrize("other", [{"epoch": 1}, {"seed": 1}, {"epoch": 2**40}])
def test_another_epoch_or_seed_has_coins_of_its_own(other):
    one, two = tosses(0.5, copies=1), tosses(0.5, copies=1, **other)
    assert within_five_sigma(int((one == two).sum()), len(one), 0.5)


def test_a_larger_p_only_adds_copies():
    few, many = tosses(0.3), tosses(0.6)
    assert ((few == ORIGINAL) | (few == many)).all()


def test_coins_keep_their_value_from_release_to_release():
    coin = Coin(p=0.5, seed=7)
    found = [coin.toss(coin_name("a", stem=stem), epoch=3, copies=5) for stem in (None, "s", "t", "u", "v")]
    assert found == GOLDEN


GOLDEN = [ORIGINAL, 2, 0, 4, 3]


def test_names_of_shard_and_key_never_meet():
    pairs = [("a", "bc"), ("ab", "c"), ("", "abc"), ("abc", "")]
    assert len({coin_name(key, stem=stem) for stem, key in pairs}) == len(pairs)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"p": 1.5}, "p is 1.5"),
        ({"p": math.nan}, "p is nan"),
        ({"p": -0.1}, "p is -0.1"),
        ({"seed": -1}, "seed"),
    ],
)
def test_what_is_no_probability_or_seed_is_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        Coin(**{"p": 0.5, "seed": 0, **options})


def test_what_is_no_epoch_is_refused():
    with pytest.raises(ConfigError, match="the epoch is -1"):
        Coin(p=0.5, seed=0).set_epoch(-1)


# --- the stage, beside webdataset's own reader ---


@pytest.mark.slow
def test_without_copies_the_stage_gives_just_what_the_reader_gives(tmp_path):
    made = world(tmp_path)
    shown = list(reader(made.urls, Augment(made.out, p=0.0)))
    assert [one.pop("__variant__") for one in shown] == [ORIGINAL] * (SHARDS * SAMPLES)
    assert shown == list(reader(made.urls))


def test_with_copies_alone_the_stage_gives_just_the_images_of_the_outputs(tmp_path):
    made = world(tmp_path)
    stage = Augment(made.out, p=1.0)
    outputs = {one["__key__"]: one["png"] for one in reader(sorted(map(str, Path(made.out).glob("*.tar"))))}
    shown = plain(reader(made.urls, stage))
    assert [key for key, _, _ in shown] == [one["__key__"] for one in reader(made.urls)]
    for key, fields, number in shown:
        assert fields == {**made.expected(key, ORIGINAL), "png": outputs[f"{key}-v{number}"]}
    assert stage.counts == Counts(originals=0, copies=SHARDS * SAMPLES, fallbacks=0)


def test_half_and_half_each_sample_is_itself_or_its_own_copy(tmp_path):
    made = world(tmp_path)
    stage = Augment(made.out, seed=5)
    shown = plain(reader(made.urls, stage))
    assert all(fields == made.expected(key, number) for key, fields, number in shown)
    assert {number for _, _, number in shown} == {ORIGINAL, 0, 1}
    coin = Coin(p=0.5, seed=5)
    for key, _, number in shown:
        assert number == coin.toss(coin_name(key), epoch=0, copies=VARIANTS)
    assert stage.counts.originals + stage.counts.copies == SHARDS * SAMPLES


def test_epochs_differ_and_come_back(tmp_path):
    made = world(tmp_path)
    stage, found = Augment(made.out), []
    for epoch in (0, 1, 0):
        stage.set_epoch(epoch)
        found.append(choices(reader(made.urls, stage)))
    assert found[0] == found[2] != found[1]
    assert choices(reader(made.urls, Augment(made.out, seed=1))) != found[0]


def test_order_of_shards_has_no_say(tmp_path):
    made = world(tmp_path)
    forth, back = (choices(reader(urls, Augment(made.out))) for urls in (made.urls, made.urls[::-1]))
    assert forth == back


def test_keys_that_repeat_from_shard_to_shard_have_coins_of_their_own(tmp_path):
    same = [source(number) for number in range(40)]
    made = world(tmp_path, {"a": same, "b": same}, "identity=shard+key")
    shown = plain(reader(made.urls, Augment(made.out)))
    halves = [[number for _, _, number in shown[start : start + 40]] for start in (0, 40)]
    assert halves[0] != halves[1]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_workers_have_no_say(tmp_path, workers):
    made = world(tmp_path)
    stage = Augment(made.out, seed=3)
    found = loaded(reader(made.urls, stage), workers=workers)
    assert sorted(map(repr, plain(found))) == sorted(
        map(repr, plain(reader(made.urls, Augment(made.out, seed=3))))
    )
    alone = Augment(made.out, seed=3)
    list(reader(made.urls, alone))
    assert stage.counts == alone.counts


def test_ranks_have_no_say(tmp_path, monkeypatch):
    made = world(tmp_path)
    found: dict[str, int] = {}
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        ranks = choices(reader(made.urls, Augment(made.out), nodesplitter=webdataset.split_by_node))
        assert len(ranks) == SHARDS * SAMPLES // 2
        assert not found.keys() & ranks.keys()
        found |= ranks
    monkeypatch.undo()
    assert found == choices(reader(made.urls, Augment(made.out)))


@pytest.mark.slow
def test_workers_that_live_on_hear_of_the_next_epoch(tmp_path):
    made = world(tmp_path)
    stage = Augment(made.out)
    loader = DataLoader(
        reader(made.urls, stage), batch_size=1, num_workers=2, collate_fn=first, persistent_workers=True
    )
    found = []
    for epoch in range(3):
        stage.set_epoch(epoch)
        found.append(choices(loader))
    for epoch in range(3):
        stage.set_epoch(epoch)
        assert choices(reader(made.urls, stage)) == found[epoch]
    assert found[0] != found[1] != found[2]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_that_is_shown_twice_is_complained_of(tmp_path, caplog, workers, monkeypatch):
    made = world(tmp_path)
    stage = Augment(made.out)
    said = tmp_path / "said"
    monkeypatch.setattr(
        logging.getLogger("boomerang_batch.loader.coin"), "handlers", [logging.FileHandler(said)]
    )
    loaded(reader(made.urls, stage), workers=workers)
    stage.set_epoch(1)
    loaded(reader(made.urls, stage), workers=workers)
    assert not said.exists() or said.read_text() == ""
    loaded(reader(made.urls, stage), workers=workers)
    assert said.read_text() == "epoch 1 begins again, with the coins it had; call set_epoch before each epoch\n"


def test_a_shard_that_comes_twice_in_a_row_is_read_twice(tmp_path):
    made = world(tmp_path, shards_of(1))
    shown = plain(reader(made.urls * 3, Augment(made.out)))
    assert shown == plain(reader(made.urls, Augment(made.out))) * 3


def test_a_pipeline_goes_on_behind_the_stage(tmp_path):
    made = world(tmp_path)
    shown = reader(made.urls, Augment(made.out)).shuffle(100).decode().to_tuple("__key__", "cls")
    assert dict(shown) == {f"img{number:05d}": number % 3 for number in range(SHARDS * SAMPLES)}


def test_who_stops_in_the_middle_leaves_no_file_open(tmp_path):
    made = world(tmp_path)
    stage = Augment(made.out)(iter(list(reader(made.urls))))
    next(stage)
    stage.close()
    assert stage.gi_frame is None


def test_another_format_has_another_field(tmp_path):
    shards = shards_of(1)
    urls = save_originals(tmp_path / "in", shards)
    out = save_out(tmp_path / "out", shards, recipe("images.format=jpeg"), field="jpg")
    shown = plain(reader(urls, Augment(out, p=1.0)))
    assert all(list(fields) == ["jpg", "cls"] for _, fields, _ in shown)


def test_stems_may_be_told(tmp_path):
    made = world(tmp_path, shards_of(1))
    elsewhere = tmp_path / "in" / "renamed.tar"
    (tmp_path / "in" / "s-000.tar").rename(elsewhere)
    with pytest.raises(
        RunMismatchError, match=r"shard renamed has no copies in .*out: it is none of its shards"
    ):
        list(reader([str(elsewhere)], Augment(made.out)))
    assert len(list(reader([str(elsewhere)], Augment(made.out, stems={str(elsewhere): "s-000"})))) == SAMPLES
    with pytest.raises(ConfigError, match=r"stems=\{url: stem\}"):
        list(reader([f"pipe:cat {elsewhere}"], Augment(made.out)))


# --- copies that failed ---


def with_failures(shards: dict[str, list[Source]], *failures: tuple[int, int]) -> dict[str, list[Source]]:
    """The shards, with copies of the first one (by sample and number) failed."""
    samples = list(shards["s-000"])
    for place, number in failures:
        one = samples[place]
        samples[place] = dataclasses.replace(one, copies={**one.copies, number: None})
    return {**shards, "s-000": samples}


def test_a_copy_that_failed_gives_the_original_and_is_counted(tmp_path):
    made = world(tmp_path, with_failures(shards_of(2), (0, 0), (0, 1), (4, 0), (4, 1), (8, 0), (8, 1)))
    stage = Augment(made.out, p=1.0)
    shown = choices(reader(made.urls, stage))
    assert {key for key, number in shown.items() if number == ORIGINAL} == {"img00000", "img00004", "img00008"}
    assert stage.counts == Counts(originals=0, copies=2 * SAMPLES - 3, fallbacks=3)
    stage = Augment(made.out, p=0.0)
    list(reader(made.urls, stage))
    assert stage.counts == Counts(originals=2 * SAMPLES, copies=0, fallbacks=0)


def test_where_one_copy_failed_the_others_are_shown_as_often_as_before(tmp_path):
    whole = world(tmp_path / "whole", shards_of(1))
    harmed = world(tmp_path / "harmed", with_failures(shards_of(1), *((place, 0) for place in range(SAMPLES))))
    before = choices(reader(whole.urls, Augment(whole.out, p=1.0)))
    after = choices(reader(harmed.urls, Augment(harmed.out, p=1.0)))
    assert set(before.values()) == {0, 1}
    assert after == {key: ORIGINAL if number == 0 else number for key, number in before.items()}


def test_what_an_appendix_mended_is_shown(tmp_path):
    failures = [(1, 0), (1, 1), (5, 0), (5, 1), (7, 0)]
    broken_shards = with_failures(shards_of(2), *failures)
    whole = shards_of(2)["s-000"]
    mended = [dataclasses.replace(whole[1], copies={0: None, 1: whole[1].copies[1]})]
    mended += [dataclasses.replace(whole[7], copies={0: whole[7].copies[0]})]
    again = [dataclasses.replace(whole[1], copies={0: whole[1].copies[0]})]
    made = world(tmp_path, {**broken_shards, "s-000~1": mended, "s-000~2": again})
    urls = [url for url in made.urls if "~" not in url]
    stage = Augment(made.out, p=1.0)
    shown = plain(reader(urls, stage))
    assert {key for key, _, number in shown if number == ORIGINAL} == {"img00005"}
    complete = World(urls=urls, out=made.out, shards=shards_of(2))
    assert all(fields == complete.expected(key, number) for key, fields, number in shown)
    assert stage.counts.fallbacks == 1


def test_kept_originals_are_passed_over(tmp_path):
    shards = {
        stem: [dataclasses.replace(one, copies={ORIGINAL: one.fields["png"], **one.copies}) for one in samples]
        for stem, samples in shards_of(2).items()
    }
    made = world(tmp_path, shards, "keep_originals=true")
    shown = plain(reader(made.urls, Augment(made.out, p=1.0)))
    assert {number for _, _, number in shown} == {0, 1}
    assert all(fields == made.expected(key, number) for key, fields, number in shown)


def test_what_could_not_be_read_gives_the_original(tmp_path):
    """webdataset passes on what the project's reader withholds: here a sample with a link in it."""
    made = world(tmp_path, shards_of(1))
    members: list = [(f"{one.key}.png", one.fields["png"]) for one in made.shards["s-000"]]
    members.insert(3, (broken.link("img00002.alias"), b""))
    (tmp_path / "in" / "s-000.tar").write_bytes(broken.tar(members))
    withheld = {"key": "img00002", "variant": 0, "status": "unreadable", "reason": "link-member"}
    fixed = {"model_digest": "m", "recipe_digest": "r", "versions": "v"}
    out, made_by = Path(made.out), recipe()
    save_shard(out, "s-000", [one for one in made.shards["s-000"] if one.key != "img00002"], made_by)
    rows = read_rows(out / "s-000.parquet")
    rows.insert(4, Row(**withheld, **fixed))
    rows.append(Row(variant=0, status="unreadable", reason="truncated-tar", **fixed))
    write_rows(out / "s-000.parquet", rows)
    mark(out, "s-000", made_by, {"ok": 2 * SAMPLES - 2, "unreadable": 2})
    stage = Augment(made.out, p=1.0)
    shown = choices(reader(made.urls, stage))
    assert {key for key, number in shown.items() if number == ORIGINAL} == {"img00002"}
    assert stage.counts == Counts(originals=0, copies=SAMPLES - 1, fallbacks=1)


# --- what does not belong together ---


def without(shards: Mapping[str, Sequence[Source]], place: int) -> dict[str, list[Source]]:
    samples = list(shards["s-000"])
    del samples[place]
    return {**shards, "s-000": samples}


def swapped(shards: Mapping[str, Sequence[Source]]) -> dict[str, list[Source]]:
    samples = list(shards["s-000"])
    samples[2], samples[5] = samples[5], samples[2]
    return {**shards, "s-000": samples}


def other_images(shards: Mapping[str, Sequence[Source]]) -> dict[str, list[Source]]:
    samples = list(shards["s-000"])
    samples[3] = dataclasses.replace(samples[3], fields={**samples[3].fields, "png": b"another photograph"})
    return {**shards, "s-000": samples}


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    ("originals", "said"),
    [
        (
            lambda s: without(s, 0),
            r"shard s-000: the originals go on with img00001, and .*out has img00000 there",
        ),
        (
            lambda s: without(s, 4),
            r"shard s-000: the originals go on with img00005, and .*out has img00004 there",
        ),
        (lambda s: without(s, SAMPLES - 1), r"shard s-000: the originals end, and .*out has img00008;"),
        (
            lambda s: {**s, "s-000": [*s["s-000"], source(99)]},
            r"shard s-000: .* on with img00099, .* ends there",
        ),
        (
            swapped,
            r"shard s-000: the originals go on with img00005, and .*out has img00002 there; give the shards",
        ),
        (
            lambda s: {**s, "s-001": s["s-000"]},
            r"shard s-001: .* go on with img00000, and .*out has img00009 there",
        ),
        (other_images, r"shard s-000, key img00003: the image is not the one that its copies were made of"),
        (lambda s: {**s, "s-002": s["s-000"]}, r"shard s-002 has no copies in .*: it is none of its shards"),
    ],
)
def test_no_copy_gets_beside_another_original(tmp_path, originals, said, p):
    shards = shards_of(2)
    out = save_out(tmp_path / "out", shards, recipe())
    urls = save_originals(tmp_path / "in", originals(shards))
    with pytest.raises(RunMismatchError, match=said):
        list(reader(urls, Augment(out, p=p)))


def test_a_shard_that_is_not_done_is_named(tmp_path):
    made = world(tmp_path)
    (Path(made.out) / "s-002_stats.json").unlink()
    with pytest.raises(
        RunMismatchError, match=r"shard s-002 has no copies in .*: it is not done there; finish"
    ):
        list(reader(made.urls, Augment(made.out)))
    with pytest.raises(RunMismatchError, match="shard s-002"):
        Copies(made.out)


def test_an_error_in_a_worker_is_told_as_it_is(tmp_path):
    made = world(tmp_path)
    urls = save_originals(tmp_path / "in", swapped(made.shards))
    with pytest.raises(RunMismatchError, match="the originals go on with img00005"):
        loaded(reader(urls, Augment(made.out)), workers=1)


def test_behind_a_shuffle_the_stage_refuses_to_guess(tmp_path):
    made = world(tmp_path)
    with pytest.raises(RunMismatchError, match="before anything that shuffles"):
        list(reader(made.urls).shuffle(20, initial=20).compose(Augment(made.out)))


def test_behind_decode_the_stage_refuses(tmp_path):
    made = world(tmp_path)
    with pytest.raises(
        ConfigError, match=r"shard s-000, key img00000 is decoded already; put Augment right behind"
    ):
        list(reader(made.urls).decode().compose(Augment(made.out)))
    with pytest.raises(ConfigError, match="no __key__ and __url__"):
        list(Augment(made.out)([{"png": b""}]))


def test_a_tar_that_is_not_what_its_provenance_says_is_no_source_of_copies(tmp_path):
    made = world(tmp_path)
    out = Path(made.out)
    (out / "s-000.tar").write_bytes((out / "s-001.tar").read_bytes())
    with pytest.raises(VerificationError, match=r"s-000\.tar: img00000-v0 is not where its provenance says"):
        list(reader(made.urls, Augment(made.out)))
    with pytest.raises(VerificationError, match=r"s-000\.tar has no img00000-v0"):
        Copies(made.out)
    members = [
        (f"{key}.{name}", data)
        for key, fields in worlds.read_output(out, "s-002")
        for name, data in fields.items()
    ]
    worlds.write_tar(out / "s-000.tar", [])
    worlds.write_tar(out / "s-002.tar", [*members, ("more.png", b"")])
    with pytest.raises(VerificationError, match="more is in no row of its provenance"):
        list(reader(made.urls[2:], Augment(made.out)))


def test_masks_that_did_not_travel_are_not_put_beside_a_copy(tmp_path):
    boxed = {"s-000": [source(number, **{"mask.png": b"mask"}) for number in range(4)]}
    bare = {"s-000": [source(number) for number in range(4)]}
    urls = save_originals(tmp_path / "in", boxed)
    travelled, dropped = (
        save_out(tmp_path / name, shards, recipe("images.field=png"))
        for name, shards in (("travelled", boxed), ("dropped", bare))
    )
    assert len(list(reader(urls, Augment(travelled, p=1.0)))) == 4
    assert len(list(reader(urls, Augment(dropped, p=0.0)))) == 4
    with pytest.raises(
        ConfigError, match=r"shard s-000, key img00000: mask\.png tells places.* did not travel"
    ):
        list(reader(urls, Augment(dropped, p=1.0)))


def test_an_anonymized_out_can_not_be_joined(tmp_path):
    out = save_out(tmp_path / "out", {}, recipe(purpose="anonymize"))
    for open_it in (Augment, Copies):
        with pytest.raises(ConfigError, match="is anonymized: which original"):
            open_it(out)


def test_a_folder_that_is_no_out_is_refused(tmp_path):
    for open_it in (Augment, Copies):
        with pytest.raises(VerificationError, match=r"no run\.json"):
            open_it(str(tmp_path))


# --- memory, and workers that are spawned ---


@pytest.mark.slow
def test_memory_does_not_grow_with_the_shard(tmp_path):
    size = 100_000
    samples = [
        dataclasses.replace(one, fields={**one.fields, "png": one.key.encode() * (size // 8)}, copies=big)
        for one in map(source, range(100))
        for big in [{0: b"a" * size, 1: b"b" * size}]
    ]
    made = world(tmp_path, {"s-000": samples})
    stage = Augment(made.out, p=1.0)
    list(reader(made.urls, stage))  # what is allocated once
    stage.set_epoch(1)
    tracemalloc.start()
    for one in reader(made.urls, stage):
        assert len(one["png"]) == size
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30 * size


def test_both_kinds_pickle(tmp_path):
    made = world(tmp_path)
    stage = Augment(made.out, seed=9)
    stage.set_epoch(4)
    expected = choices(reader(made.urls, stage))
    assert choices(reader(made.urls, pickle.loads(pickle.dumps(stage)))) == expected
    assert choices(reader(made.urls, copy.deepcopy(stage))) == expected
    dataset = wrapped(made, seed=9)
    dataset.set_epoch(4)
    assert shown_by(pickle.loads(pickle.dumps(dataset))) == shown_by(dataset)


@pytest.mark.slow
def test_spawned_workers_hear_of_the_next_epoch_and_count(tmp_path):
    made = world(tmp_path)
    stage, dataset = Augment(made.out), wrapped(made)
    for part, data in ((stage, reader(made.urls, stage)), (dataset, dataset)):
        loader = DataLoader(
            data, batch_size=1, num_workers=1, collate_fn=first, persistent_workers=True,
            multiprocessing_context="spawn",
        )  # fmt: skip
        for epoch in range(2):
            part.set_epoch(epoch)
            found = sorted(map(repr, loader))
            counts = part.counts
            part.set_epoch(epoch)
            assert found == sorted(
                map(repr, data if part is stage else [dataset[i] for i in range(len(dataset))])
            )
            assert part.counts == counts


# --- map-style datasets ---


class Listed(Dataset):
    """(image, label) of each sample, as users have them."""

    def __init__(self, items: Sequence[tuple[bytes, int]]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        return self.items[index]


def replaced(original: tuple[bytes, int], image: bytes) -> tuple[bytes, int]:
    """The copy with the original's label."""
    return image, original[1]


def listed(made: World) -> tuple[Listed, list[str]]:
    everything = [one for samples in made.shards.values() for one in samples]
    return (
        Listed([(one.fields["png"], int(one.fields["cls"])) for one in everything]),
        [one.key for one in everything],
    )


def wrapped(made: World, **options: object) -> AugmentedDataset:
    originals, keys = listed(made)
    return AugmentedDataset(originals, Copies(made.out), join=replaced, keys=keys, **options)


def shown_by(dataset: Dataset) -> list:
    return [dataset[index] for index in range(len(dataset))]


def test_copies_are_those_of_the_tars_by_key(tmp_path):
    made = world(tmp_path, with_failures(shards_of(2), (1, 0)))
    copies = Copies(made.out)
    expected = {one.key: [one.copies[0], one.copies[1]] for samples in made.shards.values() for one in samples}
    assert {key: list(found) for key, found in copies.items()} == expected
    assert copies["img00001"][0] is None
    assert copies["img00003"][-1] == expected["img00003"][1]
    assert copies["img00003"][:1] == expected["img00003"][:1]
    assert len(copies) == 2 * SAMPLES
    assert "nothing" not in copies


def test_map_style_and_stage_show_the_same(tmp_path):
    made = world(tmp_path, with_failures(shards_of(3), (0, 0), (2, 1)))
    stage, dataset = Augment(made.out, seed=2), wrapped(made, seed=2)
    for epoch in range(3):
        stage.set_epoch(epoch)
        dataset.set_epoch(epoch)
        assert shown_by(dataset) == [
            (fields["png"], int(fields["cls"])) for _, fields, _ in plain(reader(made.urls, stage))
        ]
        assert dataset.counts == stage.counts


def test_map_style_at_the_ends(tmp_path):
    made = world(tmp_path)
    originals, keys = listed(made)
    assert shown_by(wrapped(made, p=0.0)) == originals.items
    images = [image for image, _ in shown_by(wrapped(made, p=1.0))]
    assert all(
        image in (f"copy {n} of {key}".encode() for n in (0, 1))
        for image, key in zip(images, keys, strict=True)
    )
    assert wrapped(made, p=1.0)[-1] == wrapped(made, p=1.0)[len(originals) - 1]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_map_style_workers_and_orders_have_no_say(tmp_path, workers):
    made = world(tmp_path)
    dataset = wrapped(made)
    expected = shown_by(dataset)
    shuffled = loaded(dataset, workers=workers, shuffle=True, generator=torch.Generator().manual_seed(1))
    assert shuffled != expected
    assert sorted(shuffled) == sorted(expected)


def test_map_style_ranks_have_no_say(tmp_path):
    dataset = wrapped(world(tmp_path))
    halves = [
        loaded(dataset, workers=0, sampler=DistributedSampler(dataset, num_replicas=2, rank=rank))
        for rank in range(2)
    ]
    assert sorted(halves[0] + halves[1]) == sorted(shown_by(dataset))


def test_map_style_workers_that_live_on_hear_of_the_next_epoch(tmp_path):
    dataset = wrapped(world(tmp_path))
    loader = DataLoader(dataset, batch_size=1, num_workers=2, collate_fn=first, persistent_workers=True)
    found = []
    for epoch in range(3):
        dataset.set_epoch(epoch)
        found.append(list(loader))
        assert found[-1] == shown_by(dataset)
    assert found[0] != found[1] != found[2]


def test_any_mapping_by_index_does():
    originals = Listed([(b"%d" % number, number) for number in range(200)])
    copies = {number: [b"copy of %d" % number] for number in range(200)} | {3: [], 4: [None]}
    dataset = AugmentedDataset(originals, copies, join=replaced, p=1.0)
    assert shown_by(dataset) == [
        (b"%d" % number if number in (3, 4) else b"copy of %d" % number, number) for number in range(200)
    ]
    assert dataset.counts == Counts(originals=0, copies=198, fallbacks=2)


def test_keys_that_do_not_fit_are_named():
    originals = Listed([(b"", 0)] * 3)
    copies = {"a": [b""], "b": [b""], "c": [b""]}
    for keys, said in (
        (["a", "b"], "there are 2 keys for 3 originals"),
        (["a", "b", "x"], "original 2 has the key x, and there are no copies of that"),
        (["a", "b", "a"], "original 2 has the key a, and so has one before it"),
    ):
        with pytest.raises(RunMismatchError, match=said):
            AugmentedDataset(originals, copies, join=replaced, keys=keys)


def test_keys_that_repeat_from_shard_to_shard_need_the_stage(tmp_path):
    made = world(tmp_path, {"a": [source(1)], "b": [source(1)]}, "identity=shard+key")
    with pytest.raises(ConfigError, match=r"key img00001 is in shard b and in another .*use Augment"):
        Copies(made.out)


def test_copies_in_a_store_are_refused():
    with pytest.raises(ConfigError, match="copy it to a disk first"):
        Copies("s3://bucket/out")


# --- beside a real run ---


@pytest.mark.slow
def test_a_real_run_with_failures_that_are_mended(tmp_path, tiny_model, monkeypatch):
    manifest = worlds.save_shards(tmp_path / "in", shards=2, samples=5)
    made_by = worlds.recipe(tiny_model, "variants=2", "keep_originals=true", purpose="augment")
    out = tmp_path / "out"
    real = Transform.finish

    def finish(self, made, **options):
        if made.prepared.source.key == "img00002":
            raise RuntimeError("a cosmic ray")
        return real(self, made, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Transform, "finish", finish)
        assert worlds.run(made_by, manifest, out).exit_code == 3
    urls = sorted(map(str, (tmp_path / "in").glob("*.tar")))
    outputs = worlds.outputs(out)

    def shown() -> dict[str, bytes]:
        stage = Augment(str(out), p=1.0)
        found = plain(reader(urls, stage))
        copies = Copies(str(out))
        for key, fields, number in found:
            assert fields["cls"] == str(int(key[3:]) % worlds.CLASSES).encode()
            if number != ORIGINAL:
                assert fields["png"] == outputs[f"{key}-v{number}"]["png"] == copies[key][number]
        return {key: number for key, _, number in found}

    before = shown()
    assert [key for key, number in before.items() if number == ORIGINAL] == ["img00002"]
    assert worlds.run(made_by, manifest, out, only_failed=True).exit_code == 0
    outputs = worlds.outputs(out)
    after = shown()
    assert before == after | {"img00002": ORIGINAL}
    assert after["img00002"] != ORIGINAL


def test_the_command_line_does_not_import_the_loader():
    code = "import sys, boomerang_batch.cli; print(*{'torch', 'boomerang_batch.loader'} & set(sys.modules))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.split() == []


@pytest.mark.slow
def test_the_example_trains(tmp_path):
    script = ROOT / "examples" / "train_with_boomerang.py"
    command = [
        sys.executable,
        str(script),
        "--out",
        str(tmp_path / "copies"),
        "--epochs",
        "2",
        "--workers",
        "1",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1]
    assert lines[1]["loss"] < lines[0]["loss"]
    for line in lines:
        assert line["originals"] + line["copies"] + line["fallbacks"] == 100
        assert within_five_sigma(line["copies"], 100, 0.5)
    again = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True, cwd=tmp_path)
    assert again.stdout == done.stdout
