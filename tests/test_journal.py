"""journal.py: what was finished before a stop or a death is not drawn again, and no byte tells."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from boomerang_batch import storage
from boomerang_batch.data.provenance import Row
from boomerang_batch.diffusion.slots import Slots
from boomerang_batch.errors import StorageError
from boomerang_batch.run import journal
from boomerang_batch.run.guards import Seen
from boomerang_batch.run.shard_drawing import ShardDrawing
from boomerang_batch.run.stages import Output
from tests import worlds

SAMPLES = 60
"""Many more than are read before the first is finished."""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Draws that were begun."""
    begun: list[int] = []
    real = Slots.admit

    def admit(self, draws):
        begun.append(len(draws))
        return real(self, draws)

    monkeypatch.setattr(Slots, "admit", admit)
    return begun


def stop_after(outputs: int, stop: threading.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set `stop` once so many outputs are finished."""
    real, finished = ShardDrawing._finish, []

    def finish(self, made, **options):
        real(self, made, **options)
        finished.append(made)
        if len(finished) >= outputs:
            stop.set()

    monkeypatch.setattr(ShardDrawing, "_finish", finish)


def segments(recipe, out: Path) -> list[Path]:
    """What is in the journals; under anonymize they are private, for their order is the input's."""
    private = Path(f"{out}-private")
    home, other = (private, out) if recipe.purpose == "anonymize" else (out, private)
    assert not list(other.rglob("logs/journal/*/*"))
    return sorted((home / "logs" / "journal").rglob("*.parquet"))


def begin(recipe, manifest, out, outputs, monkeypatch) -> int:
    """Run until so many outputs are finished; how many segments that left."""
    stop = threading.Event()
    with monkeypatch.context() as patch:
        stop_after(outputs, stop, patch)
        report = worlds.run(recipe, manifest, out, stop=stop)
    assert report.exit_code == 75
    return len(segments(recipe, out))


@pytest.mark.usefixtures("secret")
@pytest.mark.parametrize(
    ("purpose", "options"),
    [
        ("anonymize", ()),
        pytest.param(
            "anonymize", ("variants=2", "passes.count=2", "passes.outputs=all"), marks=pytest.mark.slow
        ),
        pytest.param("augment", ("variants=2", "passes.count=2", "passes.outputs=all"), marks=pytest.mark.slow),
        pytest.param("augment", ("keep_originals=true",), marks=pytest.mark.slow),
    ],
)
def test_a_stop_in_mid_shard_costs_a_batch_and_no_byte(
    tmp_path, tiny_model, monkeypatch, calls, purpose, options
):
    manifest = worlds.save_shards(tmp_path / "in", shards=1, samples=SAMPLES)
    recipe = worlds.recipe(tiny_model, *options, purpose=purpose)
    worlds.run(recipe, manifest, tmp_path / "whole")
    all_draws = sum(calls)
    assert begin(recipe, manifest, tmp_path / "out", recipe.outputs * SAMPLES // 3, monkeypatch) == 1
    calls.clear()
    report = worlds.run(recipe, manifest, tmp_path / "out")
    assert report.exit_code == 0
    assert 0 < sum(calls) < all_draws * 0.8
    assert worlds.tree(tmp_path / "out") == worlds.tree(tmp_path / "whole")
    assert segments(recipe, tmp_path / "out") == []


@pytest.mark.slow
def test_segments_come_every_so_many_samples(tmp_path, tiny_model, monkeypatch):
    manifest = worlds.save_shards(tmp_path / "in", shards=1, samples=SAMPLES)
    recipe = worlds.recipe(tiny_model, "run.journal_every=3", "variants=2", purpose="augment")
    assert begin(recipe, manifest, tmp_path / "out", 20, monkeypatch) >= 4


@pytest.mark.slow
def test_no_journal_where_none_is_wanted(tmp_path, tiny_model, monkeypatch, calls):
    manifest = worlds.save_shards(tmp_path / "in", shards=1, samples=SAMPLES)
    recipe = worlds.recipe(tiny_model, "run.journal_every=0", purpose="augment")
    assert begin(recipe, manifest, tmp_path / "out", 12, monkeypatch) == 0
    calls.clear()
    worlds.run(recipe, manifest, tmp_path / "out")
    assert sum(calls) == SAMPLES


@pytest.mark.slow
def test_an_input_that_changed_is_drawn_and_not_restored(tmp_path, tiny_model, monkeypatch):
    """Same keys, other pictures: no manifest that tells digests is needed to notice."""
    recipe = worlds.recipe(tiny_model, purpose="augment")
    manifest = worlds.save_shards(tmp_path / "in", shards=1, samples=SAMPLES)
    begin(recipe, manifest, tmp_path / "out", 12, monkeypatch)
    members = [
        (name, data)
        for number in range(SAMPLES)
        for name, data in worlds.sample_members(f"img{number:05d}", number + 1)
    ]
    worlds.write_tar(tmp_path / "in" / "s-000.tar", members)
    worlds.run(recipe, manifest, tmp_path / "out")
    worlds.run(recipe, manifest, tmp_path / "fresh")
    assert worlds.tree(tmp_path / "out") == worlds.tree(tmp_path / "fresh")


@pytest.mark.slow
def test_a_broken_segment_is_told_and_drawn_again(tmp_path, tiny_model, monkeypatch, caplog):
    recipe = worlds.recipe(tiny_model, purpose="augment")
    manifest = worlds.save_shards(tmp_path / "in", shards=1, samples=SAMPLES)
    begin(recipe, manifest, tmp_path / "out", 12, monkeypatch)
    (segment,) = (tmp_path / "out" / "logs" / "journal").rglob("*.parquet")
    segment.write_bytes(segment.read_bytes()[:-100])
    worlds.run(recipe, manifest, tmp_path / "out")
    assert "is of no use" in caplog.text
    worlds.run(recipe, manifest, tmp_path / "fresh")
    assert worlds.tree(tmp_path / "out") == worlds.tree(tmp_path / "fresh")


@pytest.mark.usefixtures("secret")
def test_under_anonymize_it_holds_no_name_of_the_input(tmp_path, tiny_model, monkeypatch):
    recipe = worlds.recipe(tiny_model)
    manifest = worlds.save_shards(tmp_path / "in", shards=1, samples=SAMPLES)
    begin(recipe, manifest, tmp_path / "out", 12, monkeypatch)
    (segment,) = segments(recipe, tmp_path / "out")
    assert b"img0" not in segment.read_bytes()
    assert b"s-000" not in segment.read_bytes()


@pytest.mark.slow
def test_repeated_outputs_are_refused_as_if_nothing_had_happened(tmp_path, tiny_model, monkeypatch):
    """One of two twins was kept before the stop, the other comes after it: both must go."""
    recipe = worlds.recipe(tiny_model, purpose="augment")
    manifest = worlds.save_shards(tmp_path / "in", shards=1, samples=SAMPLES)
    monkeypatch.setattr(Seen, "digest", lambda self, x_0: b"all alike")
    worlds.run(recipe, manifest, tmp_path / "alike")
    begin(recipe, manifest, tmp_path / "out", 12, monkeypatch)
    report = worlds.run(recipe, manifest, tmp_path / "out")
    assert report.rows == {"failed": SAMPLES}
    assert worlds.tree(tmp_path / "out") == worlds.tree(tmp_path / "alike")


def test_the_journal_of_a_shard_that_was_committed_is_swept(tmp_path, tiny_model, monkeypatch):
    recipe = worlds.recipe(tiny_model, purpose="augment")
    manifest = worlds.save_shards(tmp_path / "in", shards=1, samples=4)
    with monkeypatch.context() as patch:
        patch.setattr(journal, "remove", lambda out, name: None)
        left = tmp_path / "out" / "logs" / "journal" / "s-000"
        left.mkdir(parents=True)
        (left / "00.parquet").write_bytes(b"x")
        worlds.run(recipe, manifest, tmp_path / "out")
        assert (left / "00.parquet").exists()
    worlds.run(recipe, manifest, tmp_path / "out")
    assert not left.exists()


def an_output(number: int, size: int = 1000) -> Output:
    row = Row(key=f"k{number}", variant=0, status="ok", model_digest="m", recipe_digest="r", versions="v")
    return Output(
        row=row,
        member_key=f"k{number}",
        fields={"png": bytes([number]) * size, "cls": b"1"},
        digests=(None, b"d"),
    )


@pytest.mark.slow
def test_outputs_come_back_as_they_were(tmp_path):
    out = f"memory://journal/{tmp_path.name}"
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    with journal.opened(out, "s", scratch=first, every=4) as kept:
        for number in range(10):
            kept.add(an_output(number, size=3 << 20), bytes([number]))  # larger than the buffer
        kept.flush()
        kept.flush()
    assert len(storage.list_names(journal.folder_of(out, "s"))) == 3
    with journal.opened(out, "s", scratch=second, every=4) as kept:
        for number in (7, 0, 9, 3):
            assert kept.find(bytes([number])) == an_output(number, size=3 << 20)
        assert kept.find(b"other") is None
    journal.remove(out, "s")
    assert storage.list_names(journal.folder_of(out, "s")) == []


def test_a_store_that_refuses_the_journal_costs_the_journal_alone(tmp_path, monkeypatch, caplog):
    def refuse(source, url):
        raise StorageError("can't write it")

    monkeypatch.setattr(storage, "publish", refuse)
    with journal.opened(str(tmp_path / "out"), "s", scratch=tmp_path, every=1) as kept:
        kept.add(an_output(1), b"1")
    assert "goes on without a segment" in caplog.text


KILLED = """
import sys
from pathlib import Path
from tests import worlds
model, manifest, out = map(Path, sys.argv[1:])
worlds.run(worlds.recipe(model, "run.journal_every=4", purpose="augment"), manifest, out)
"""


@pytest.mark.slow
def test_a_kill_in_mid_shard_costs_what_came_after_the_last_segment(tmp_path, tiny_model, calls):
    manifest = worlds.save_shards(tmp_path / "in", shards=1, samples=200)
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(tiny_model), str(manifest), str(out)]
    with subprocess.Popen(command, cwd=Path(__file__).parent.parent) as process:
        deadline = time.monotonic() + 120
        while len(list(out.rglob("logs/journal/*/*.parquet"))) < 3 and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert not (out / "s-000_stats.json").exists(), "it was too fast to be killed"
    recipe = worlds.recipe(tiny_model, "run.journal_every=4", purpose="augment")
    worlds.run(recipe, manifest, out)
    assert sum(calls) <= 200 - 12
    worlds.run(recipe, manifest, tmp_path / "whole")
    assert worlds.tree(out) == worlds.tree(tmp_path / "whole")
