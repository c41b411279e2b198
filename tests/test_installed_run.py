"""A denoiser that another package installed, from the command line."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from boomerang_batch.cli import main
from boomerang_batch.models.plugins import GROUP
from boomerang_batch.run.verify import verify
from tests import worlds

MODULE = """
from tests.stand_ins import Pixelwise

def load(options, device):
    return Pixelwise(side=options["side"], size_multiple=None)
"""
RECIPE = """
name: installed
purpose: augment
seed: 7
model: {source: "entry-point:pixelwise", options: {side: 8}}
t: {fraction: {uniform: [0.2, 0.9]}}
steps: 5
images: {resize: pad}
batch_size: 4
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of installed packages with one that brings a denoiser."""
    folder = tmp_path / "site"
    (folder / "brought-1.0.dist-info").mkdir(parents=True)
    (folder / "brought_denoisers.py").write_text(MODULE)
    (folder / "brought-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: brought\nVersion: 1.0\n"
    )
    (folder / "brought-1.0.dist-info" / "entry_points.txt").write_text(
        f"[{GROUP}]\npixelwise = brought_denoisers:load\n"
    )
    monkeypatch.syspath_prepend(str(folder))
    importlib.invalidate_caches()
    yield folder
    sys.modules.pop("brought_denoisers", None)


def test_an_installed_denoiser_runs_and_its_release_is_part_of_the_run(tmp_path: Path, site: Path):
    pipeline, out = tmp_path / "installed.yaml", tmp_path / "out"
    pipeline.write_text(RECIPE)
    manifest = worlds.save_shards(tmp_path / "in", shards=2, samples=3)

    def call(*more: str) -> Result:
        words = ["run", str(pipeline), str(manifest), str(out), "--threads", "1", "--device", "cpu", *more]
        return CliRunner().invoke(main, words, catch_exceptions=False)

    first = call("--json")
    assert (first.exit_code, json.loads(first.stdout)["rows"]) == (0, {"ok": 6})
    assert verify(str(out), deep=True).problems == ()
    record = json.loads((out / "run.json").read_text())
    assert record["recipe"]["model"]["source"] == "entry-point:pixelwise"
    assert record["recipe"]["model"]["options"] == {"side": 8}
    assert all(fields["png"] != worlds.png(n) for n, fields in enumerate(worlds.outputs(out).values()))

    metadata = site / "brought-1.0.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text().replace("1.0", "1.1"))
    importlib.invalidate_caches()
    upgraded = call()
    assert upgraded.exit_code == 2
    assert "model weights or settings" in upgraded.stderr
    unknown = call("--set", "model.source=entry-point:pixelwide")
    assert unknown.exit_code == 2
    assert "installed are pixelwise" in unknown.stderr
