"""appendix.py: what failed is done again, and nothing else, beside a shard that stays as it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from boomerang_batch.data.provenance import read_rows
from boomerang_batch.errors import PrivateDirError
from boomerang_batch.run.transform import Transform
from boomerang_batch.run.verify import verify
from tests import worlds

SAMPLES = 12


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    return worlds.save_shards(tmp_path / "in", shards=2, samples=SAMPLES)


def breaking(monkeypatch: pytest.MonkeyPatch, *numbers: tuple[str, int]):
    """Outputs of these keys and variants fail, as for a fault that passes by itself."""
    real = Transform.finish

    def finish(self, made, **options):
        if (made.prepared.source.key, self.number(made)) in numbers:
            raise RuntimeError("a cosmic ray")
        return real(self, made, **options)

    context = monkeypatch.context()
    patch = context.__enter__()
    patch.setattr(Transform, "finish", finish)
    return context


BROKEN = (("img00002", 0), ("img00003", 1), ("img00005", 0), ("img00005", 1))


@pytest.mark.slow
@pytest.mark.usefixtures("secret")
@pytest.mark.parametrize("purpose", ["anonymize", "augment"])
def test_what_failed_is_mended_and_is_what_it_would_have_been(
    tmp_path, tiny_model, monkeypatch, manifest, purpose
):
    recipe = worlds.recipe(tiny_model, "variants=2", purpose=purpose)
    whole, out = tmp_path / "whole", tmp_path / "out"
    worlds.run(recipe, manifest, whole)
    breaks = breaking(monkeypatch, *BROKEN)
    report = worlds.run(recipe, manifest, out)
    breaks.__exit__(None, None, None)
    assert (report.exit_code, report.rows["failed"]) == (3, 4)
    before = worlds.tree(out)

    report = worlds.run(recipe, manifest, out)
    assert (report.exit_code, report.rows["failed"]) == (3, 4)  # not without being asked to
    report = worlds.run(recipe, manifest, out, only_failed=True)
    assert report.exit_code == 0, report
    assert report.rows == {"ok": 4 * SAMPLES}
    assert report.shards["mended"] == 1
    after = worlds.tree(out)
    assert {name: after[name] for name in before if not name.endswith(".png")} == {
        name: data for name, data in before.items() if not name.endswith(".png")
    }
    added = sorted(set(after) - set(before))
    assert [name.partition("~")[2] for name in added] == ["1.parquet", "1.tar", "1_stats.json"]

    stem = added[0].partition(".")[0]
    mended = dict(worlds.read_output(out, stem))
    expected = dict(worlds.read_output(whole, stem.partition("~")[0]))
    assert len(mended) == 4
    assert mended == {key: expected[key] for key in mended}
    assert verify(str(out), deep=True).problems == ()
    assert verify(str(out), deep=True).rows == {"ok": 4 * SAMPLES}

    report = worlds.run(recipe, manifest, out, only_failed=True)  # nothing is left to mend
    assert (report.exit_code, report.shards["mended"]) == (0, 0)
    assert worlds.tree(out) == after


@pytest.mark.slow
def test_what_fails_again_fails_and_what_is_mended_later_is_mended(tmp_path, tiny_model, monkeypatch, manifest):
    recipe = worlds.recipe(tiny_model, purpose="augment")
    out = tmp_path / "out"
    for broken, failed in ((("img00001", "img00002"), 2), (("img00002",), 1)):
        breaks = breaking(monkeypatch, *((key, 0) for key in broken))
        report = worlds.run(recipe, manifest, out, only_failed=True)
        breaks.__exit__(None, None, None)
        assert (report.exit_code, report.rows["failed"]) == (3, failed)
    report = worlds.run(recipe, manifest, out, only_failed=True)
    assert (report.exit_code, report.rows) == (0, {"ok": 2 * SAMPLES})
    assert [row.key for row in read_rows(out / "s-000~1.parquet")] == ["img00001", "img00002"]
    assert [row.key for row in read_rows(out / "s-000~2.parquet")] == ["img00002"]
    assert verify(str(out), deep=True).problems == ()
    assert worlds.run(recipe, manifest, out).rows == {"ok": 2 * SAMPLES}


@pytest.mark.slow
@pytest.mark.usefixtures("secret")
def test_without_the_links_nobody_knows_whose_sample_failed(tmp_path, tiny_model, monkeypatch, manifest):
    recipe = worlds.recipe(tiny_model)
    breaks = breaking(monkeypatch, ("img00002", 0))
    worlds.run(recipe, manifest, tmp_path / "out")
    breaks.__exit__(None, None, None)
    for path in (tmp_path / "out-private" / "links").iterdir():
        path.unlink()
    with pytest.raises(PrivateDirError, match="which tells the sources of shard"):
        worlds.run(recipe, manifest, tmp_path / "out", only_failed=True)


@pytest.mark.slow
def test_verify_finds_an_appendix_that_is_none(tmp_path, tiny_model, monkeypatch, manifest):
    recipe = worlds.recipe(tiny_model, purpose="augment")
    out = tmp_path / "out"
    breaks = breaking(monkeypatch, ("img00002", 0))
    worlds.run(recipe, manifest, out)
    breaks.__exit__(None, None, None)
    worlds.run(recipe, manifest, out, only_failed=True)
    for suffix in (".tar", ".parquet"):
        (out / f"s-001~1{suffix}").write_bytes((out / f"s-000~1{suffix}").read_bytes())
    text = (out / "s-000~1_stats.json").read_text()
    (out / "s-001~1_stats.json").write_text(text.replace("s-000~1", "s-001~1"))
    assert any(
        "takes the place of no failed row" in problem for problem in verify(str(out), deep=False).problems
    )
