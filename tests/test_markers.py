"""markers.py and survey.py: what is done comes from the listing, and the index only spares reading it again."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from boomerang_batch.data.provenance import Marker
from boomerang_batch.errors import RunMismatchError, StoppedError
from boomerang_batch.run import markers as module
from boomerang_batch.run.markers import Markers, Told
from boomerang_batch.run.survey import survey
from boomerang_batch.run.tasks import Task
from tests import worlds

NAMES = ["a", "b", "b~1", "b~2", "c", "d-10", "d-9"]
COUNTS = st.dictionaries(st.sampled_from(["ok", "failed", "unreadable"]), st.integers(1, 9))


def put(out: Path, name: str, counts: Mapping[str, int], recipe: str = "r") -> None:
    marker = Marker(
        stem=name, counts=counts, tar_sha256="0", tar_bytes=1, parquet_sha256="0", parquet_bytes=1,
        recipe_digest=recipe,
    )  # fmt: skip
    (out / f"{name}_stats.json").write_bytes(marker.to_bytes())


def sizes(out: Path) -> dict[str, int]:
    """Of all markers."""
    return {path.name.removesuffix("_stats.json"): path.stat().st_size for path in out.glob("*_stats.json")}


def tasks(*names: str) -> list[Task]:
    return [Task(name=name, url=f"{name}.tar", source_stem=name) for name in names]


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the markers that are read."""
    names: list[str] = []
    real = module.read_marker
    monkeypatch.setattr(module, "read_marker", lambda out, name: names.append(name) or real(out, name))
    return names


@pytest.mark.slow
@given(shards=st.dictionaries(st.sampled_from(NAMES), COUNTS))
def test_an_index_tells_what_the_markers_told(tmp_path_factory, shards):
    out = tmp_path_factory.mktemp("out")
    for name, counts in shards.items():
        put(out, name, counts)
    first = Markers(str(out))
    told = first.read(sizes(out))
    assert told == {name: Told("r", counts, sizes(out)[name]) for name, counts in shards.items()}
    first.save()
    assert Markers(str(out)).read(sizes(out)) == told


def test_what_the_index_has_is_not_read_again(tmp_path: Path, read: list[str]):
    put(tmp_path, "a", {"ok": 3})
    first = Markers(str(tmp_path))
    first.read(sizes(tmp_path))
    first.save()
    put(tmp_path, "b", {"ok": 2, "failed": 1})
    done = survey(str(tmp_path), Markers(str(tmp_path)), tasks("a", "b", "c"), "r")
    assert read == ["a", "b"]
    assert [(report.name, report.counts) for report in done.done] == [
        ("a", {"ok": 3}),
        ("b", {"failed": 1, "ok": 2}),
    ]
    assert [task.name for task in done.todo] == ["c"]
    assert done.committed == {"a", "b"}


def test_the_index_alone_makes_no_shard_done(tmp_path: Path):
    """A marker that the user removed is gone from the index too, before another may take its place."""
    put(tmp_path, "a", {"ok": 3})
    put(tmp_path, "b", {"ok": 4})
    first = Markers(str(tmp_path))
    first.read(sizes(tmp_path))
    first.save()
    (tmp_path / "a_stats.json").unlink()
    done = survey(str(tmp_path), Markers(str(tmp_path)), tasks("a", "b"), "r")
    assert ([report.name for report in done.done], [task.name for task in done.todo]) == (["b"], ["a"])
    put(tmp_path, "a", {"ok": 2, "failed": 1})
    assert Markers(str(tmp_path)).read(sizes(tmp_path))["a"].counts == {"ok": 2, "failed": 1}


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"format_version": 2}', '{"format_version": 1, "told": 3}']
)
def test_a_broken_index_is_none(tmp_path: Path, content: str):
    put(tmp_path, "a", {"ok": 3})
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / module.INDEX_NAME).write_text(content)
    assert Markers(str(tmp_path)).read(sizes(tmp_path))["a"].counts == {"ok": 3}


def test_compared_holds_for_the_known_alone(tmp_path: Path):
    put(tmp_path, "a", {"ok": 3})
    first = Markers(str(tmp_path))
    first.read(sizes(tmp_path))
    first.compared = True
    first.save()
    assert Markers(str(tmp_path)).compared
    put(tmp_path, "b", {"ok": 3})
    later = Markers(str(tmp_path))
    later.read(sizes(tmp_path))
    assert not later.compared
    later.save()
    assert not Markers(str(tmp_path)).compared


def test_a_shard_of_another_recipe_is_refused(tmp_path: Path):
    put(tmp_path, "a", {"ok": 3}, recipe="another")
    with pytest.raises(RunMismatchError, match="shard a of another recipe"):
        survey(str(tmp_path), Markers(str(tmp_path)), tasks("a"), "r")


@pytest.mark.slow
def test_a_finished_run_asked_for_again_reads_its_index_alone(
    tmp_path: Path, tiny_model: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
):
    from boomerang_batch.run import keys

    manifest = worlds.save_shards(tmp_path / "in", shards=3, samples=2)
    recipe = worlds.recipe(tiny_model, purpose="augment")
    first = worlds.run(recipe, manifest, tmp_path / "out")
    assert read == []  # the workers' reports had told
    compared: list[str] = []
    real = keys.read_keys
    monkeypatch.setattr(keys, "read_keys", lambda out, stem: compared.append(stem) or real(out, stem))
    second = worlds.run(recipe, manifest, tmp_path / "out")
    assert (second.shards["there"], second.rows) == (3, first.rows)
    assert (read, compared) == ([], [])
    (tmp_path / "out" / "logs" / module.INDEX_NAME).unlink()
    third = worlds.run(recipe, manifest, tmp_path / "out")
    assert (third.shards["there"], third.rows) == (3, first.rows)
    assert sorted(read) == sorted(compared) == ["s-000", "s-001", "s-002"]
    events = sorted((tmp_path / "out" / "logs").glob("*.jsonl"))
    [event] = map(json.loads, events[-1].read_text().splitlines())
    assert (event["event"], event["shards"], event["counts"]) == ("resumed", 3, {"ok": 6})


def test_a_stop_after_the_last_shard_says_that_keys_were_not_compared(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
):
    from boomerang_batch.run import keys

    manifest = worlds.save_shards(tmp_path / "in", shards=2, samples=2)
    recipe = worlds.recipe(tiny_model, purpose="augment")
    stop, go_on, added = threading.Event(), threading.Event(), []
    real_add, real_read = keys.KeyWatch.add, keys.read_keys

    def add(watch: keys.KeyWatch, stem: str) -> None:
        real_add(watch, stem)
        added.append(stem)
        if len(added) == 2:
            stop.set()

    monkeypatch.setattr(keys.KeyWatch, "add", add)
    monkeypatch.setattr(keys, "read_keys", lambda out, stem: go_on.wait(60) and real_read(out, stem))
    with pytest.raises(StoppedError, match="before the keys"):
        worlds.run(recipe, manifest, tmp_path / "out", stop=stop)
    go_on.set()
    index = json.loads((tmp_path / "out" / "logs" / module.INDEX_NAME).read_text())
    assert (sorted(*index["told"].values()), index["compared"]) == (["s-000", "s-001"], False)
    monkeypatch.undo()
    again = worlds.run(recipe, manifest, tmp_path / "out")
    assert (again.exit_code, again.shards["there"]) == (0, 2)
