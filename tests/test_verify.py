"""What `verify` finds in an output that was touched afterwards, with and without --deep."""

from __future__ import annotations

import hashlib
import json
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner

from boomerang_batch.cli import main
from tests import broken, worlds


@dataclass(frozen=True, kw_only=True)
class Harm:
    """What is done to an output, and what `verify` and `verify --deep` must say; no words: all well."""

    id: str
    change: Callable[[Path], object]
    plain: str
    deep: str


def flip(name: str, at: float) -> Callable[[Path], object]:
    """One byte changed, so many parts of the way through the file."""

    def change(out: Path) -> None:
        data = bytearray((out / name).read_bytes())
        data[int(len(data) * at)] ^= 0xFF
        (out / name).write_bytes(data)

    return change


def scrub(name: str) -> Callable[[Path], object]:
    """A few hundred bytes changed."""
    return lambda out: (out / name).write_bytes(broken.harmed((out / name).read_bytes(), 0.1, by=b"\xa5" * 400))


def cut(name: str) -> Callable[[Path], object]:
    return lambda out: (out / name).write_bytes((out / name).read_bytes()[:-1])


def remove(*names: str) -> Callable[[Path], object]:
    return lambda out: [(out / name).unlink() for name in names]


def copy(source: str, target: str) -> Callable[[Path], object]:
    return lambda out: shutil.copy(out / source, out / target)


def remark(change: Callable[[Path, dict[str, object]], object]) -> Callable[[Path], object]:
    """The first shard's marker changed."""

    def changed(out: Path) -> None:
        path = out / "s-000_stats.json"
        facts = json.loads(path.read_text())
        change(out, facts)
        path.write_text(json.dumps(facts))

    return changed


def forge(members: Callable[[list[tuple[str, bytes]]], broken.Members]) -> Callable[[Path], object]:
    """Another tar, and a marker that agrees with it."""

    def changed(out: Path, facts: dict[str, object]) -> None:
        path = out / "s-000.tar"
        with tarfile.open(path) as archive:
            there = [(member.name, archive.extractfile(member).read()) for member in archive]
        path.write_bytes(broken.tar(members(there)))
        data = path.read_bytes()
        facts |= {"tar_sha256": hashlib.sha256(data).hexdigest(), "tar_bytes": len(data)}

    return remark(changed)


NOT_DONE = "shard s-000 is not done"
HARMS = [
    Harm(id="nothing", change=lambda out: None, plain="", deep=""),
    Harm(id="a pixel", change=flip("s-000.tar", 0.07), plain="", deep="s-000.tar does not have the digest"),
    Harm(id="a tar header", change=flip("s-000.tar", 0), plain="not-a-tar", deep="does not have the digest"),
    Harm(
        id="provenance's end", change=flip("s-000.parquet", 0.9999), plain="s-000.parquet", deep="s-000.parquet"
    ),
    Harm(id="provenance", change=scrub("s-000.parquet"), plain="s-000.parquet", deep="s-000.parquet"),
    Harm(id="tar shorter", change=cut("s-000.tar"), plain="its marker says", deep="its marker says"),
    Harm(id="provenance shorter", change=cut("s-000.parquet"), plain="its marker says", deep="its marker says"),
    Harm(id="tar gone", change=remove("s-000.tar"), plain="s-000.tar is missing", deep="s-000.tar is missing"),
    Harm(id="provenance gone", change=remove("s-000.parquet"), plain="is missing", deep="is missing"),
    Harm(id="marker gone", change=remove("s-000_stats.json"), plain=NOT_DONE, deep=NOT_DONE),
    Harm(
        id="shard gone",
        change=remove("s-000.tar", "s-000.parquet", "s-000_stats.json"),
        plain=NOT_DONE,
        deep=NOT_DONE,
    ),
    Harm(id="marker cut", change=cut("s-000_stats.json"), plain="", deep=""),
    Harm(id="marker no marker", change=flip("s-000_stats.json", 0), plain=NOT_DONE, deep=NOT_DONE),
    Harm(
        id="marker of another shard",
        change=copy("s-001_stats.json", "s-000_stats.json"),
        plain=NOT_DONE,
        deep=NOT_DONE,
    ),
    Harm(
        id="marker miscounts",
        change=remark(lambda _, facts: facts.update(counts={"ok": 1})),
        plain="not those the marker counts",
        deep="not those the marker counts",
    ),
    Harm(
        id="marker of another recipe",
        change=remark(lambda _, facts: facts.update(recipe_digest="0" * 64)),
        plain="made by another recipe",
        deep="made by another recipe",
    ),
    Harm(
        id="a sample swapped, forged",
        change=forge(lambda there: [("img00000.png", worlds.png(99)), *there[1:]]),
        plain="",
        deep="no field of sample img00000 has the output digest",
    ),
    Harm(
        id="a sample too many, forged",
        change=forge(lambda there: [*there, ("more.png", worlds.png(99))]),
        plain="sample more has no provenance row",
        deep="sample more has no provenance row",
    ),
    Harm(
        id="a sample too few, forged",
        change=forge(lambda there: there[3:]),
        plain="sample img00000 is missing",
        deep="sample img00000 is missing",
    ),
    Harm(
        id="a stranger",
        change=copy("s-000.tar", "t-000.tar"),
        plain="t-000.tar is not part of this run",
        deep="t-000.tar is not part of this run",
    ),
    Harm(id="record gone", change=remove("run.json"), plain="no run.json", deep="no run.json"),
    Harm(id="record no record", change=flip("run.json", 0), plain="not a run record", deep="not a run record"),
    Harm(
        id="record with no recipe",
        change=lambda out: (out / "run.json").write_text(
            json.dumps(json.loads((out / "run.json").read_text()) | {"recipe": {"steps": -1}})
        ),
        plain="run.json",
        deep="run.json",
    ),
]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A good run's OUT, to be copied and harmed."""
    folder = tmp_path_factory.mktemp("verify")
    manifest = worlds.save_shards(folder / "in", shards=2, samples=2)
    assert worlds.run(worlds.recipe(tiny_model, purpose="augment"), manifest, folder / "out").exit_code == 0
    return folder / "out"


@pytest.mark.parametrize("harm", HARMS, ids=lambda harm: harm.id)
def test_verify_finds_harm(harm: Harm, tmp_path: Path, output: Path):
    out = Path(shutil.copytree(output, tmp_path / "out"))
    harm.change(out)
    for flags, words in (([], harm.plain), (["--deep"], harm.deep)):
        result = CliRunner().invoke(main, ["verify", str(out), *flags])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
        assert words in result.output
        assert ("problem: " in result.output or "error: " in result.output) == bool(words), result.output
        assert (result.exit_code != 0) == bool(words)
        assert "s-001" not in result.output
