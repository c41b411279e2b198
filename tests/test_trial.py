"""trial.py: a recipe on chosen samples gives what the run gives, and leaves nothing behind."""

from __future__ import annotations

import dataclasses
import json
import stat
import tempfile
import tracemalloc
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest

from boomerang_batch import storage
from boomerang_batch.config.pipeline import Recipe
from boomerang_batch.data.manifest import load_manifest
from boomerang_batch.data.provenance import Row, read_rows
from boomerang_batch.data.shards import Sample, read_samples
from boomerang_batch.errors import ConfigError, PrivateDirError, RecipeError, StoppedError, StorageError
from boomerang_batch.models.pixel import PixelDenoiser
from boomerang_batch.run import trial
from boomerang_batch.run.naming import Naming, member_key
from boomerang_batch.run.trial import Chosen, Outcome, Rig, at_t, fresh_noise, own_secret
from tests import stand_ins, worlds

SAMPLES = 6
MIXED = ("variants=2", "t=[{fraction: {uniform: [0.3, 0.9]}}, {timestep: 6}]")
CASCADE = ("passes={count: 3, outputs: all}", "variants=2")


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    return worlds.save_shards(tmp_path / "in", shards=2, samples=SAMPLES)


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where all scratch folders are made from now on."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def rig(recipe: Recipe) -> Rig:
    return Rig(recipe, device="cpu", threads=1)


def chosen(manifest: Path, *keys: str) -> list[Chosen]:
    """The samples of all shards, or those with these keys, in the order of `keys`."""
    found = []
    for entry in load_manifest(str(manifest)).shards:
        with storage.open_read(entry.url) as stream:
            for item in read_samples(stream, shard=entry.stem):
                assert isinstance(item, Sample)
                found.append(Chosen(stem=entry.stem, key=item.key, fields=item.fields))
    return (
        sorted((one for one in found if one.key in keys), key=lambda one: keys.index(one.key))
        if keys
        else found
    )


Published = Mapping[tuple[str, str, int], tuple[Row, bytes | None]]


def published(recipe: Recipe, out: Path) -> Published:
    """Every row of OUT with its image, by shard, key and variant."""
    found = {}
    for path in out.glob("*.parquet"):
        outputs = dict(worlds.read_output(out, path.stem))
        for row in read_rows(path):
            fields = outputs.get(member_key(recipe, row.key, row.variant), {})
            found[path.stem, row.key, row.variant] = (dataclasses.replace(row, offset=None), fields.get("png"))
    return found


def as_published(recipe: Recipe, secret: bytes | None, outcomes: Iterable[Outcome]) -> Published:
    naming = Naming(recipe, secret)
    return {
        (naming.stem(one.stem), one.row.key, one.row.variant): (one.row, one.image)
        for one in outcomes
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.usefixtures("secret")
@pytest.mark.parametrize("purpose", ["anonymize", "augment"])
@pytest.mark.parametrize("more", [(), MIXED, CASCADE], ids=["plain", "mixed t", "cascade"])
def test_with_its_own_secret_it_gives_the_bytes_and_rows_of_the_run(
    tmp_path: Path, tiny_model: Path, manifest: Path, purpose: str, more: tuple[str, ...]
):
    recipe = worlds.recipe(tiny_model, *more, purpose=purpose)
    out = tmp_path / "out"
    assert worlds.run(recipe, manifest, out).exit_code == 0
    private = Path(f"{out}-private")
    before = worlds.tree(out), worlds.tree(private)
    secret = own_secret(recipe, str(private))
    # Of both shards, and not in their order.
    keys = ("img00009", "img00001", "img00004", "img00007")
    with rig(recipe) as loaded:
        outcomes = list(loaded.run(recipe, chosen(manifest, *keys), secret=secret))
        every = list(loaded.run(recipe, chosen(manifest), secret=secret))
    assert [one.key for one in outcomes] == [key for key in keys for _ in range(recipe.outputs)]
    expected = published(recipe, out)
    assert as_published(recipe, secret, every) == expected
    few = as_published(recipe, secret, outcomes)
    assert len(few) == len(keys) * recipe.outputs
    assert few == {place: expected[place] for place in few}
    assert (worlds.tree(out), worlds.tree(private)) == before


@pytest.mark.slow
@pytest.mark.usefixtures("secret")
@pytest.mark.parametrize("identity", ["shard+key", "content"])
@pytest.mark.parametrize("purpose", ["anonymize", "augment"])
def test_the_shard_is_part_of_a_name_where_the_recipe_says_so(
    tmp_path: Path, tiny_model: Path, purpose: str, identity: str
):
    fields = [{"png": worlds.png(number), "cls": b"1"} for number in range(3)]
    # The same keys in both shards, and the same image under other keys.
    shards = ({"a": fields[0], "b": fields[1]}, {"a": fields[0], "b": fields[2]})
    manifest = worlds.save_samples(tmp_path / "in", *shards)
    recipe = worlds.recipe(tiny_model, f"identity={identity}", purpose=purpose)
    out = tmp_path / "out"
    worlds.run(recipe, manifest, out)
    secret = own_secret(recipe, f"{out}-private")
    with rig(recipe) as loaded:
        outcomes = list(loaded.run(recipe, chosen(manifest), secret=secret))
    assert as_published(recipe, secret, outcomes) == published(recipe, out)
    assert len({one.image for one in outcomes}) == (4 if identity == "shard+key" else 3)


@pytest.mark.slow
@pytest.mark.usefixtures("secret")
@pytest.mark.parametrize("purpose", ["anonymize", "augment"])
def test_what_fails_in_the_run_fails_in_the_trial(tmp_path: Path, tiny_model: Path, purpose: str):
    good = {"png": worlds.png(1), "cls": b"1"}
    samples = {"a": good, "b": good | {"png": b"no image"}, "c": good | {"cls": b"99"}, "d": good}
    manifest = worlds.save_samples(tmp_path / "in", samples)
    recipe = worlds.recipe(tiny_model, "variants=2", purpose=purpose)
    out = tmp_path / "out"
    assert worlds.run(recipe, manifest, out).rows == {"failed": 4, "ok": 4}
    secret = own_secret(recipe, f"{out}-private")
    with rig(recipe) as loaded:
        outcomes = list(loaded.run(recipe, chosen(manifest), secret=secret))
    assert as_published(recipe, secret, outcomes) == published(recipe, out)
    told = {one.key: (one.row.status, one.row.reason, one.image is None) for one in outcomes}
    assert told["b"] == ("failed", "undecodable", True)
    assert told["c"] == ("failed", "label-out-of-range", True)
    assert told["a"] == told["d"] == ("ok", None, False)
    assert all("99" in one.detail for one in outcomes if one.key == "c")


@pytest.mark.slow
def test_what_the_run_drew_again_in_float32_the_trial_does_too(
    tmp_path: Path, tiny_model: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch
):
    real = PixelDenoiser.denoise

    def overflowing(self, x_t, tau, conditions):
        output = real(self, x_t, tau, conditions)
        if self.placement.is_half:
            output[[label == 2 for label in conditions]] = float("nan")
        return output

    monkeypatch.setattr(PixelDenoiser, "denoise", overflowing)
    recipe = worlds.recipe(tiny_model, "model.dtype=bfloat16", *CASCADE, purpose="augment")
    worlds.run(recipe, manifest, tmp_path / "out")
    with rig(recipe) as loaded:
        outcomes = list(loaded.run(recipe, chosen(manifest), secret=None))
    assert {one.row.dtype for one in outcomes} == {"float32", "bfloat16"}
    assert as_published(recipe, None, outcomes) == published(recipe, tmp_path / "out")


def test_of_a_sample_only_the_wanted_outputs_are_drawn(tiny_model: Path, manifest: Path):
    recipe = worlds.recipe(tiny_model, "variants=4", purpose="augment")
    first, second, third = chosen(manifest)[:3]
    some = [dataclasses.replace(first, numbers=(2,)), dataclasses.replace(second, numbers=(3, 0)), third]
    with rig(recipe) as loaded:
        few = list(loaded.run(recipe, some, secret=None))
        drawn = loaded._engine.totals["evaluations_total"]
        every = list(loaded.run(recipe, [first, second, third], secret=None))
    assert [(one.key, one.row.variant) for one in few] == [
        (first.key, 2), (second.key, 0), (second.key, 3), *((third.key, number) for number in range(4))
    ]  # fmt: skip
    assert drawn == sum(one.row.evaluations for one in few)
    assert all(one in every for one in few)


@pytest.mark.slow
def test_one_loading_serves_every_t(tiny_model: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch):
    loads = []
    real = trial.load
    monkeypatch.setattr(trial, "load", lambda *words, **options: loads.append(1) or real(*words, **options))
    recipe = worlds.recipe(tiny_model)
    samples, secret = chosen(manifest)[:5], bytes(range(32))
    swept = [("fraction", 0.25), ("fraction", 0.5), ("timestep", 20), ("sigma", 1.0), ("snr", 2.0)]
    with rig(recipe) as loaded:
        together = [list(loaded.run(at_t(recipe, *t), samples, secret=secret)) for t in swept]
        assert len(loads) == 1
    assert at_t(recipe, "fraction", 0.5) == recipe
    for t, outcomes in zip(swept, together, strict=True):
        alone = at_t(recipe, *t)
        with rig(alone) as loaded:
            assert list(loaded.run(alone, samples, secret=secret)) == outcomes
        assert {one.row.t for one in outcomes} == {f"{t[0]}={t[1]!r}"}
    assert len({one.image for outcomes in together for one in outcomes}) == len(swept) * len(samples)


def test_at_t_0_the_images_come_back_whatever_the_purpose(tiny_model: Path, manifest: Path):
    for purpose in ("anonymize", "augment"):
        recipe = worlds.recipe(
            tiny_model, "variants=2", "t=[{fraction: 0.2}, {fraction: 0.4}]", purpose=purpose
        )
        samples = chosen(manifest)
        with rig(recipe) as loaded:
            still = at_t(recipe, "fraction", 0.0)
            outcomes = list(loaded.run(still, samples, secret=None))
        assert len(outcomes) == 2 * len(samples)
        assert {one.row.status for one in outcomes} == {"ok"}
        sources = {one.key: worlds.pixels(one.fields["png"]) for one in samples}
        assert all(np.array_equal(worlds.pixels(one.image), sources[one.key]) for one in outcomes)


def test_a_t_that_can_not_be_is_refused(tiny_model: Path):
    recipe = worlds.recipe(tiny_model)
    with pytest.raises(RecipeError, match=r"t fraction=1.5: .*less than or equal to 1"):
        at_t(recipe, "fraction", 1.5)
    with pytest.raises(RecipeError, match="strength"):
        at_t(recipe, "strength", 0.5)


@pytest.mark.parametrize("purpose", ["anonymize", "augment"])
def test_fresh_noise_is_nobodys(tiny_model: Path, manifest: Path, purpose: str):
    recipe = worlds.recipe(tiny_model, purpose=purpose)
    own = (recipe, bytes(32) if purpose == "anonymize" else None)
    samples = chosen(manifest)[:3]
    with rig(recipe) as loaded:
        tries = [list(loaded.run(used, samples, secret=secret))
                 for used, secret in (own, fresh_noise(recipe), fresh_noise(recipe), own)]  # fmt: skip
    assert tries[0] == tries[3]
    assert len({one.image for outcomes in tries[:3] for one in outcomes}) == 9
    assert len({one.row.noise_key_id for outcomes in tries for one in outcomes}) == 3


def watched(samples: Iterable[Chosen], scratch: Path, seen: list[bytes]) -> Iterator[Chosen]:
    """The samples, while all that lies in the scratch folder is looked at."""
    for sample in samples:
        seen.append(everything(scratch))
        yield sample


def everything(folder: Path) -> bytes:
    paths = sorted(folder.rglob("*"))
    return b"\n".join(
        [*(str(path).encode() for path in paths), *(p.read_bytes() for p in paths if p.is_file())]
    )


@pytest.mark.slow
def test_the_scratch_folder_is_shut_and_holds_no_secret_and_no_link(
    tiny_model: Path, manifest: Path, scratch: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("DEBUG")
    recipe = worlds.recipe(tiny_model, "variants=2")
    secret = bytes.fromhex(worlds.SECRET)
    samples, seen = chosen(manifest), []
    with rig(recipe) as loaded:
        outcomes = loaded.run(recipe, watched(samples, scratch, seen), secret=secret)
        first = next(outcomes)
        (folder,) = scratch.iterdir()
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        seen.append(everything(scratch))
        assert samples[0].fields["png"] in seen[-1]  # so it has looked in the right place
        rest = [first, *outcomes]
        assert list(scratch.iterdir()) == []
    forbidden = [secret, secret.hex().encode(), worlds.SECRET.encode(), *(one.row.key.encode() for one in rest)]
    forbidden += [one.key.encode() for one in samples] + [b"s-000", b"s-001"]
    said = "\n".join(f"{record.getMessage()} {vars(record)}" for record in caplog.records).encode()
    for text in forbidden:
        assert not any(text in data for data in (*seen, said)), text


def test_the_scratch_folder_is_gone_after_every_end(tiny_model: Path, manifest: Path, scratch: Path):
    recipe = worlds.recipe(tiny_model, purpose="augment")
    samples = chosen(manifest)

    def gone() -> Iterator[Chosen]:
        yield from samples[:2]
        assert list(scratch.iterdir()) != []
        raise StorageError("can't read s3://bucket/s-001.tar: it is gone")

    with rig(recipe) as loaded:
        with pytest.raises(StorageError, match="it is gone"):
            list(loaded.run(recipe, gone(), secret=None))
        assert list(scratch.iterdir()) == []
        with pytest.raises(StoppedError):
            list(loaded.run(recipe, samples, secret=None, stopped=lambda: True))
        assert list(scratch.iterdir()) == []
        left = loaded.run(recipe, samples, secret=None)
        next(left)
        assert list(scratch.iterdir()) != []
        left.close()
        assert list(scratch.iterdir()) == []
        assert list(loaded.run(recipe, [], secret=None)) == []
        assert list(scratch.iterdir()) == []
        assert len(list(loaded.run(recipe, samples, secret=None))) == len(samples)  # it is none the worse


def test_the_guards_of_a_run_are_those_of_a_trial(
    manifest: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
):
    """A model that gives everybody one image is found out, across shards too."""
    one = stand_ins.Pixelwise()
    monkeypatch.setattr(one, "denoise", lambda x_t, tau, conditions: x_t * 0)
    monkeypatch.setattr(one, "_spec", dataclasses.replace(one.spec, prediction="sample"))
    stand_ins.install(monkeypatch, one)
    recipe = stand_ins.recipe("sampler.eta=0")
    with rig(recipe) as loaded:
        outcomes = list(loaded.run(recipe, chosen(manifest), secret=None))
    assert {(made.row.status, made.row.reason, made.image) for made in outcomes} == {
        ("failed", "flat-output", None)
    }
    assert list(scratch.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "agrees"),
    [
        ("t.fraction=0.9", True),
        ("seed=8", True),
        ("sampler.eta=0", True),
        ("variants=3", True),
        ("batch_size=8", False),
        ("model.dtype=bfloat16", False),
        ("model.class_labels.guidance=2", False),
        ("images.sizes=[[8, 8], [16, 16]]", False),
        ("batching=elastic", False),
    ],
)
def test_a_recipe_that_needs_another_loading_is_refused(
    tiny_model: Path, manifest: Path, override: str, agrees: bool
):
    other = worlds.recipe(tiny_model, override, purpose="augment")
    with rig(worlds.recipe(tiny_model, purpose="augment")) as loaded:
        if agrees:
            assert list(loaded.run(other, chosen(manifest)[:1], secret=None))
        else:
            with pytest.raises(ConfigError, match="load it anew"):
                loaded.run(other, chosen(manifest)[:1], secret=None)


def test_where_the_model_lies_is_not_part_of_the_recipe(tmp_path: Path, tiny_model: Path, manifest: Path):
    recipe = worlds.recipe(tiny_model)
    recorded = Recipe.model_validate_json(json.dumps({"name": "tiny", **recipe.canonical()}))
    assert recorded.model.source == tiny_model.name
    assert recorded.digest == recipe.digest
    samples, secret = chosen(manifest)[:3], bytes(32)
    with rig(recipe) as loaded:
        assert list(loaded.run(recorded, samples, secret=secret)) == list(
            loaded.run(recipe, samples, secret=secret)
        )


def test_the_secret_goes_with_the_purpose(tiny_model: Path, manifest: Path, tmp_path: Path):
    hiding, open_ = worlds.recipe(tiny_model), worlds.recipe(tiny_model, purpose="augment")
    assert own_secret(open_, None) is None
    with pytest.raises(PrivateDirError):
        own_secret(hiding, str(tmp_path))
    with rig(hiding) as loaded:
        for recipe, secret in ((hiding, None), (open_, bytes(32))):
            with pytest.raises(PrivateDirError, match="only then"):
                loaded.run(recipe, chosen(manifest)[:1], secret=secret)


@pytest.mark.slow
@pytest.mark.usefixtures("scratch")
def test_memory_does_not_grow_with_the_trial(monkeypatch: pytest.MonkeyPatch):
    stand_ins.install(monkeypatch, stand_ins.Pixelwise(channels=3, side=64))
    recipe = stand_ins.recipe("batch_size=4")

    def samples(count: int) -> Iterator[Chosen]:
        for number in range(count):
            picture = worlds.encoded(worlds.noise(number, 64, 64, 3))
            yield Chosen(stem="s", key=f"img{number}", fields={"png": picture})

    peaks = {}
    with rig(recipe) as loaded:
        list(loaded.run(recipe, samples(8), secret=None))  # what is made once
        for count in (50, 200):
            tracemalloc.start()
            size = sum(len(one.image) for one in loaded.run(recipe, samples(count), secret=None))
            _, peaks[count] = tracemalloc.get_traced_memory()
            tracemalloc.stop()
    assert size > 200 * 8_000  # more than it may take
    assert peaks[200] - peaks[50] < 0.3 * size
