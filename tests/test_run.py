"""Runs without Ray, end to end: what is written, resumed, refused."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
import tempfile
import threading
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from boomerang_batch import storage
from boomerang_batch.data.manifest import load_manifest
from boomerang_batch.data.provenance import read_rows
from boomerang_batch.errors import ConfigError, PrivateDirError, RecipeError, RunMismatchError
from boomerang_batch.run.inline import InlinePool
from boomerang_batch.run.private import load_secret
from boomerang_batch.run.runner import Runner
from boomerang_batch.run.verify import verify
from boomerang_batch.storage import remote
from tests import worlds

pytestmark = pytest.mark.slow


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    return worlds.save_shards(tmp_path / "in", shards=3, samples=5)


def test_a_run_writes_every_sample_and_verifies(tmp_path: Path, tiny_model: Path, manifest: Path):
    out = tmp_path / "out"
    report = worlds.run(worlds.recipe(tiny_model), manifest, out)
    assert report.exit_code == 0
    assert report.shards == {"done": 3, "there": 0, "mended": 0, "quarantined": 0, "left": 0}
    assert report.rows == {"ok": 15}
    assert verify(str(out), deep=True).problems == ()


def test_an_augment_run_keeps_keys_and_originals(tmp_path: Path, tiny_model: Path, manifest: Path):
    out = tmp_path / "out"
    recipe = worlds.recipe(tiny_model, "variants=2", "keep_originals=true", purpose="augment")
    assert worlds.run(recipe, manifest, out).rows == {"ok": 30, "original": 15}
    samples = worlds.read_output(out, "s-001")
    assert [key for key, _ in samples[:3]] == ["img00005", "img00005-v0", "img00005-v1"]
    original, first, second = (fields for _, fields in samples[:3])
    assert original["png"] == worlds.png(5)
    assert len({fields["png"] for fields in (original, first, second)}) == 3
    assert {fields["cls"] for fields in (original, first, second)} == {b"1"}
    assert {fields["json"] for fields in (original, first, second)} == {b'{"n": 5}'}
    assert verify(str(out), deep=True).problems == ()


def test_t_zero_gives_back_the_pixels(tmp_path: Path, tiny_model: Path, manifest: Path):
    out = tmp_path / "out"
    worlds.run(worlds.recipe(tiny_model, "t.fraction=0.0", purpose="augment"), manifest, out)
    for number, (_, fields) in enumerate(worlds.read_output(out, "s-000")):
        assert fields["png"] == worlds.png(number)


def test_the_provenance_tells_how_each_output_was_made(tmp_path: Path, tiny_model: Path, manifest: Path):
    out = tmp_path / "out"
    recipe = worlds.recipe(tiny_model, purpose="augment")
    worlds.run(recipe, manifest, out)
    with (out / "s-000.parquet").open("rb") as stream:
        rows = read_rows(stream)
    record = json.loads((out / "run.json").read_text())
    assert [row.key for row in rows] == [f"img{number:05d}" for number in range(5)]
    row = rows[2]
    assert (row.status, row.variant, row.t, row.eta, row.label) == ("ok", 0, "fraction=0.5", 1.0, 2)
    assert row.node == row.evaluations == 4
    assert row.tau == 9.0
    assert row.sigma == pytest.approx(worlds_sigma(10), rel=1e-9)
    assert row.recipe_digest == recipe.digest == record["recipe_digest"]
    assert row.model_digest == record["model_digest"]
    assert (row.width, row.height) == (8, 8)


def worlds_sigma(timestep: int) -> float:
    """Relative noise of the tiny model's chain, by hand."""
    product = 1.0
    for j in range(timestep):
        product *= 1 - (0.0001 + (0.3 - 0.0001) * j / 19)
    return ((1 - product) / product) ** 0.5


@pytest.mark.usefixtures("secret")
def test_order_of_the_manifest_changes_no_byte(tmp_path: Path, tiny_model: Path, manifest: Path):
    recipe = worlds.recipe(tiny_model)
    loaded = load_manifest(str(manifest))
    shuffled = list(loaded.shards)
    random.Random(3).shuffle(shuffled)
    worlds.run(recipe, loaded, tmp_path / "a")
    worlds.run(recipe, dataclasses.replace(loaded, shards=tuple(shuffled)), tmp_path / "b")
    assert worlds.tree(tmp_path / "a") == worlds.tree(tmp_path / "b")


@pytest.mark.slow
@pytest.mark.usefixtures("secret")
def test_a_stopped_run_resumes_to_the_same_bytes(tmp_path: Path, tiny_model: Path):
    # Far more samples than a stream has in slots and queues.
    manifest = worlds.save_shards(tmp_path / "long", shards=3, samples=30)
    recipe = worlds.recipe(tiny_model, "batch_size=2")
    worlds.run(recipe, manifest, tmp_path / "whole")

    with pytest.MonkeyPatch.context() as patch:
        stop = worlds.stop_within_the_second_shard(patch, tmp_path / "cut")
        first = worlds.run(recipe, manifest, tmp_path / "cut", stop=stop)
    assert (first.exit_code, first.shards["done"], first.shards["left"]) == (75, 1, 2)

    second = worlds.run(recipe, manifest, tmp_path / "cut")
    assert (second.exit_code, second.shards["there"], second.shards["done"]) == (0, 1, 2)
    assert worlds.tree(tmp_path / "cut") == worlds.tree(tmp_path / "whole")


def test_a_second_call_does_nothing_again(tmp_path: Path, tiny_model: Path, manifest: Path):
    out = tmp_path / "out"
    recipe = worlds.recipe(tiny_model)
    worlds.run(recipe, manifest, out)
    before = worlds.tree(out)
    report = worlds.run(recipe, manifest, out)
    assert report.shards == {"done": 0, "there": 3, "mended": 0, "quarantined": 0, "left": 0}
    assert worlds.tree(out) == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda recipe, options: (recipe, {**options, "limit": 2}), "limit (None there, 2 now)"),
        (lambda recipe, options: (recipe, {**options, "threads": 2}), "threads (1 there, 2 now)"),
    ],
)
def test_another_limit_or_stack_is_refused(
    tmp_path: Path, tiny_model: Path, manifest: Path, change, named: str
):
    recipe = worlds.recipe(tiny_model)
    worlds.run(recipe, manifest, tmp_path / "out")
    other, options = change(recipe, {})
    with pytest.raises(RunMismatchError) as refusal:
        worlds.run(other, manifest, tmp_path / "out", **options)
    assert named in str(refusal.value)


def test_another_recipe_is_refused_naming_the_field(tmp_path: Path, tiny_model: Path, manifest: Path):
    worlds.run(worlds.recipe(tiny_model), manifest, tmp_path / "out")
    with pytest.raises(RunMismatchError, match=r"steps \(6 there, 7 now\)"):
        worlds.run(worlds.recipe(tiny_model, "steps=7"), manifest, tmp_path / "out")


def test_another_secret_is_refused(
    tmp_path: Path, tiny_model: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch
):
    worlds.run(worlds.recipe(tiny_model), manifest, tmp_path / "out")
    monkeypatch.setenv("BOOMERANG_SECRET", "00" * 32)
    with pytest.raises(RunMismatchError, match="secret or seed"):
        worlds.run(worlds.recipe(tiny_model), manifest, tmp_path / "out")


def test_another_stack_goes_on_when_accepted_and_is_recorded(tmp_path: Path, tiny_model: Path, manifest: Path):
    worlds.run(worlds.recipe(tiny_model), manifest, tmp_path / "out")
    report = worlds.run(worlds.recipe(tiny_model), manifest, tmp_path / "out", threads=2, accept_stack=True)
    assert report.exit_code == 0
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["stack"]["threads"] == "1"
    assert [stack["threads"] for stack in record["accepted_stacks"]] == ["2"]


@pytest.mark.usefixtures("secret")
def test_extend_adds_shards_and_ends_as_if_never_cut(tmp_path: Path, tiny_model: Path, manifest: Path):
    recipe = worlds.recipe(tiny_model)
    whole = load_manifest(str(manifest))
    less = dataclasses.replace(whole, shards=whole.shards[:2])
    worlds.run(recipe, whole, tmp_path / "at-once")
    worlds.run(recipe, less, tmp_path / "grown")
    with pytest.raises(RunMismatchError, match="--extend"):
        worlds.run(recipe, whole, tmp_path / "grown")
    worlds.run(recipe, whole, tmp_path / "grown", extend=True)
    assert worlds.tree(tmp_path / "grown") == worlds.tree(tmp_path / "at-once")
    with pytest.raises(RunMismatchError, match="not in it"):
        worlds.run(recipe, less, tmp_path / "grown", extend=True)


def test_keys_that_repeat_across_shards_make_the_output_unfit(tmp_path: Path, tiny_model: Path):
    folder = tmp_path / "in"
    manifest = worlds.save_shards(folder, shards=2, samples=2)
    worlds.write_tar(folder / "s-001.tar", worlds.sample_members("img00001", 9))
    with pytest.raises(RecipeError, match=r"img00001.*shard\+key"):
        worlds.run(worlds.recipe(tiny_model, purpose="augment"), manifest, tmp_path / "out")
    with pytest.raises(RecipeError, match="same noise"):
        worlds.run(worlds.recipe(tiny_model), manifest, tmp_path / "anonymized")
    for identity in ("shard+key", "content"):
        recipe = worlds.recipe(tiny_model, f"identity={identity}")
        assert worlds.run(recipe, manifest, tmp_path / identity).exit_code == 0
        assert verify(str(tmp_path / identity), deep=True).problems == ()


def test_anonymize_without_a_private_dir_is_refused(tmp_path: Path, tiny_model: Path, manifest: Path):
    with pytest.raises(PrivateDirError, match="--private-dir"):
        worlds.run(worlds.recipe(tiny_model), manifest, tmp_path / "out", private_dir=None)


def test_a_private_dir_inside_out_is_refused(tmp_path: Path, tiny_model: Path, manifest: Path):
    with pytest.raises(PrivateDirError, match="must not contain one another"):
        worlds.run(
            worlds.recipe(tiny_model), manifest, tmp_path / "out", private_dir=str(tmp_path / "out" / "private")
        )


def test_the_secret_is_made_once_for_its_owner_alone(tmp_path: Path, tiny_model: Path, manifest: Path):
    worlds.run(worlds.recipe(tiny_model), manifest, tmp_path / "out")
    file = tmp_path / "out-private" / "secret"
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.parent.stat().st_mode & 0o777 == 0o700
    assert len(load_secret(str(file.parent))) == 32
    file.chmod(0o644)
    with pytest.raises(PrivateDirError, match="chmod 600"):
        load_secret(str(file.parent))


def test_links_lead_back_from_every_output(tmp_path: Path, tiny_model: Path, manifest: Path):
    out = tmp_path / "out"
    worlds.run(worlds.recipe(tiny_model), manifest, out)
    found = {}
    for path in (tmp_path / "out-private" / "links").glob("*.parquet"):
        for link in pq.read_table(path).to_pylist():
            found[link["row_key"]] = (Path(link["source_url"]).name, link["source_key"])
    outputs = {key for stem in out.glob("*.tar") for key, _ in worlds.read_output(out, stem.stem)}
    assert found.keys() == outputs
    assert sorted(found.values()) == [(f"s-{number // 5:03d}.tar", f"img{number:05d}") for number in range(15)]


def test_a_private_dir_serves_one_run(tmp_path: Path, tiny_model: Path, manifest: Path):
    private = str(tmp_path / "private")
    worlds.run(worlds.recipe(tiny_model), manifest, tmp_path / "a", private_dir=private)
    with pytest.raises(RunMismatchError, match=r"private holds another run: recipe steps"):
        worlds.run(worlds.recipe(tiny_model, "steps=7"), manifest, tmp_path / "b", private_dir=private)
    assert not (tmp_path / "b" / "run.json").exists()


@pytest.mark.parametrize("t", ["t.fraction=0.0", "t.timestep=0", "t.sigma=0.0"])
def test_anonymize_refuses_to_publish_the_input(tmp_path: Path, tiny_model: Path, manifest: Path, t: str):
    with pytest.raises(ConfigError, match="0 evaluations"):
        worlds.run(worlds.recipe(tiny_model, t), manifest, tmp_path / "out")


@pytest.mark.usefixtures("secret")
def test_the_order_of_work_does_not_tell_which_pseudonym_is_whose(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
):
    """The log in OUT lists shards as they end, and files have times: the manifest's order would link."""
    manifest = worlds.save_shards(tmp_path / "in", shards=6, samples=1)
    real, begun = Runner.run, []

    def noted(self, task, **options):
        begun.append(task.name)
        return real(self, task, **options)

    monkeypatch.setattr(Runner, "run", noted)
    worlds.run(worlds.recipe(tiny_model), manifest, tmp_path / "out")
    assert len(begun) == 6
    assert begun == sorted(begun)


@pytest.mark.parametrize(("action", "shown"), [("keep", True), ("pseudonymize", False), ("drop", False)])
def test_a_label_shows_in_the_provenance_only_where_it_travels_as_it_is(
    tmp_path: Path, tiny_model: Path, manifest: Path, action: str, shown: bool
):
    worlds.run(worlds.recipe(tiny_model, f"fields.fields.cls={action}"), manifest, tmp_path / "out")
    labels = {row.label for path in (tmp_path / "out").glob("*.parquet") for row in read_rows(path)}
    assert labels == ({0, 1, 2, 3} if shown else {None})


def test_variants_of_one_image_can_t_be_told_by_their_source_digest(
    tmp_path: Path, tiny_model: Path, manifest: Path
):
    worlds.run(worlds.recipe(tiny_model, "variants=3"), manifest, tmp_path / "out")
    rows = [row for path in (tmp_path / "out").glob("*.parquet") for row in read_rows(path)]
    assert len({row.source_digest for row in rows}) == len(rows) == 45


def test_a_private_dir_that_others_can_enter_is_refused(tmp_path: Path, tiny_model: Path, manifest: Path):
    private = tmp_path / "out-private"
    private.mkdir()
    private.chmod(0o755)
    with pytest.raises(PrivateDirError, match="chmod 700"):
        worlds.run(worlds.recipe(tiny_model), manifest, tmp_path / "out")
    private.chmod(0o700)
    assert worlds.run(worlds.recipe(tiny_model), manifest, tmp_path / "out").exit_code == 0


def test_what_links_back_is_never_on_scratch_disk(
    tmp_path: Path, tiny_model: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch
):
    """A killed worker leaves its scratch folder, and nobody guards that."""
    scratch, seen = tmp_path / "scratch", {}
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))

    def die(out, marker, **files):
        seen.update(worlds.tree(scratch))
        raise KeyboardInterrupt

    monkeypatch.setattr("boomerang_batch.run.runner.commit", die)
    with pytest.raises(KeyboardInterrupt):
        worlds.run(worlds.recipe(tiny_model), manifest, tmp_path / "out")
    assert seen
    for number in range(15):
        assert not any(f"img{number:05d}".encode() in data for data in seen.values())


def test_extend_does_not_accept_other_files_under_the_same_stems(
    tmp_path: Path, tiny_model: Path, manifest: Path
):
    recipe, whole = worlds.recipe(tiny_model), load_manifest(str(manifest))
    first, second, third = (
        dataclasses.replace(entry, digest=f"{n}" * 64) for n, entry in enumerate(whole.shards)
    )
    worlds.run(recipe, dataclasses.replace(whole, shards=(first, second)), tmp_path / "out")
    swapped = dataclasses.replace(first, digest="9" * 64)
    with pytest.raises(RunMismatchError, match="other files"):
        worlds.run(
            recipe, dataclasses.replace(whole, shards=(swapped, second, third)), tmp_path / "out", extend=True
        )


def test_shards_of_another_recipe_are_refused_even_without_the_record(
    tmp_path: Path, tiny_model: Path, manifest: Path
):
    out = tmp_path / "out"
    worlds.run(worlds.recipe(tiny_model, purpose="augment"), manifest, out)
    (out / "run.json").unlink()
    before = worlds.tree(out)
    with pytest.raises(RunMismatchError, match="another recipe"):
        worlds.run(worlds.recipe(tiny_model, "steps=5", purpose="augment"), manifest, out)
    assert worlds.tree(out) == before


def test_a_finished_run_needs_its_inputs_no_more(
    tmp_path: Path, tiny_model: Path, manifest: Path, caplog: pytest.LogCaptureFixture
):
    recipe, out = worlds.recipe(tiny_model), tmp_path / "out"
    worlds.run(recipe, manifest, out)
    pairs = (tmp_path / "out-private" / "before-after.png").read_bytes()
    loaded = load_manifest(str(manifest))
    for path in manifest.parent.glob("*.tar"):
        path.unlink()
    assert worlds.run(recipe, loaded, out).exit_code == 0
    assert (tmp_path / "out-private" / "before-after.png").read_bytes() == pairs
    assert "before-after.png stays as it is" in caplog.text


def test_a_stop_is_heeded_between_the_batches_of_one_sample(tmp_path: Path, tiny_model: Path):
    manifest = worlds.save_shards(tmp_path / "in", shards=1, samples=1)
    recipe = worlds.recipe(tiny_model, "variants=40", "batch_size=2")
    stop, drawn = threading.Event(), []

    real = Runner.run

    def stopping(self, task, *, stopped, progress):
        return real(self, task, stopped=stopped, progress=lambda n: (drawn.append(n), stop.set()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runner, "run", stopping)
        assert worlds.run(recipe, manifest, tmp_path / "out", stop=stop).exit_code == 75
    assert 1 <= len(drawn) <= 6


def test_workers_are_told_where_out_is_whatever_their_folder(
    tmp_path: Path, tiny_model: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch
):
    class Elsewhere(InlinePool):
        """A pool in another folder than the driver, as a Ray worker may be."""

        def run(self, tasks, *, stop, progress):
            for task in tasks:
                with contextlib.chdir(tmp_path / "in"):
                    reports = list(super().run([task], stop=stop, progress=progress))
                yield from reports

    monkeypatch.setattr("boomerang_batch.run.inline.InlinePool", Elsewhere)
    monkeypatch.chdir(tmp_path)
    assert worlds.run(worlds.recipe(tiny_model), manifest, Path("out")).exit_code == 0
    assert len(list((tmp_path / "out-private" / "links").iterdir())) == 3


def test_a_worker_counts_on_the_stores_that_answered_the_driver(tmp_path, tiny_model, monkeypatch):
    """One that is hired while OUT's store is away must be as patient as those that knew it."""
    specs, known, real = [], [], Runner.__init__

    def in_another_process(self, spec):
        specs.append(spec)
        monkeypatch.setattr(remote, "_reached", set())
        real(self, spec)
        known.append(storage.reached())

    monkeypatch.setattr(Runner, "__init__", in_another_process)
    manifest = worlds.save_shards(tmp_path / "in", shards=1, samples=1)
    out = "memory://reached/out"
    worlds.run(worlds.recipe(tiny_model, purpose="augment"), manifest, out)
    assert "memory://reached" in specs[0].reached
    assert known == [specs[0].reached]
    for name in storage.list_tree(out):
        storage.delete(storage.join(out, name))
