"""keys.py: a key in two shards is found, whatever the order, and nothing else is."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from boomerang_batch.errors import RecipeError, StoppedError, VerificationError
from boomerang_batch.run import keys as module
from boomerang_batch.run.keys import KeyRegistry, KeyWatch


def put(out: Path, stem: str, *keys: str | None) -> None:
    pq.write_table(pa.table({"key": pa.array(keys, pa.string())}), out / f"{stem}.parquet")


SHARDS = st.lists(st.lists(st.integers(0, 60).map(str), unique=True, max_size=7), max_size=12)


@pytest.mark.slow
@given(shards=SHARDS)
def test_the_first_key_of_two_shards_is_found(tmp_path_factory, shards):
    out = tmp_path_factory.mktemp("out")
    registry, seen = KeyRegistry(str(out)), {}
    for number, keys in enumerate(shards):
        stem = f"s-{number}"
        put(out, stem, *keys)
        repeated = registry.add(stem, keys)
        both = {key: seen[key] for key in keys if key in seen}
        if both:
            assert repeated is not None
            assert any(
                f"key {key} is in shard {other} and in shard {stem}" in repeated for key, other in both.items()
            )
            return
        assert repeated is None
        seen |= dict.fromkeys(keys, stem)


def test_many_shards_stay_in_few_sorted_runs(tmp_path: Path):
    registry = KeyRegistry(str(tmp_path))
    for number in range(1000):
        assert registry.add(f"s-{number}", [f"{number}-{key}" for key in range(20)]) is None
    assert len(registry._runs) <= 10
    assert sum(len(run.digests) for run in registry._runs) == 20_000
    put(tmp_path, "s-77", *(f"77-{key}" for key in range(20)))
    assert "key 77-3 is in shard s-77 and in shard new" in (registry.add("new", ["other", "77-3"]) or "")


def test_equal_digests_of_other_keys_are_no_repetition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_digest", lambda key: bytes(8))
    for stem, key in (("one", "a"), ("two", "b")):
        put(tmp_path, stem, key)
    registry = KeyRegistry(str(tmp_path))
    assert registry.add("one", ["a"]) is None
    assert registry.add("two", ["b"]) is None
    assert "key a is in shard one and in shard three" in (registry.add("three", ["a"]) or "")


def test_shards_without_a_key_are_nothing_special(tmp_path: Path):
    put(tmp_path, "broken", None, None)
    registry = KeyRegistry(str(tmp_path))
    for stem in ("broken", "as broken"):
        assert registry.add(stem, module.read_keys(str(tmp_path), "broken")) is None


def watch(out: Path, *stems: str) -> None:
    with KeyWatch(str(out)) as keys:
        for stem in stems:
            keys.add(stem)
        keys.finish(threading.Event())


def test_the_watch_finds_one_among_many(tmp_path: Path):
    stems = [f"s-{number}" for number in range(40)]
    for number, stem in enumerate(stems):
        put(tmp_path, stem, f"{number}", f"{number}b", None)
    put(tmp_path, "bad", "new", "17b")
    watch(tmp_path, *stems)
    with pytest.raises(RecipeError, match="key 17b is in shard"):
        watch(tmp_path, "bad", *stems)


def _add_for(keys: KeyWatch, stem: str, *, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        keys.add(stem)
        time.sleep(0.01)


def test_the_watch_tells_before_the_end(tmp_path: Path):
    put(tmp_path, "without", None)
    put(tmp_path, "one", "a")
    put(tmp_path, "two", "a")
    with KeyWatch(str(tmp_path)) as keys:
        keys.add("one")
        keys.add("two")
        with pytest.raises(RecipeError, match="key a"):
            _add_for(keys, "without", seconds=20)


@pytest.mark.slow
def test_a_stop_ends_the_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked, go_on = threading.Event(), threading.Event()
    monkeypatch.setattr(module, "read_keys", lambda out, stem: asked.set() or (go_on.wait(60) and []))
    stop = threading.Event()
    with KeyWatch(str(tmp_path)) as keys:
        keys.add("one")
        assert asked.wait(20)
        threading.Timer(0.3, stop.set).start()
        with pytest.raises(StoppedError, match="before the keys of all shards were compared"):
            keys.finish(stop)
        go_on.set()
        for reader in keys._readers:
            reader.join(20)
        keys.finish(stop)  # nothing is left to wait for


def test_a_file_that_is_none_is_told(tmp_path: Path):
    (tmp_path / "one.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(VerificationError, match=r"one\.parquet"):
        watch(tmp_path, "one")
