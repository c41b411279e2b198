"""shipped.py and what it names: every shipped file is found by its name, parses, and travels in the wheel."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from boomerang_batch import shipped
from boomerang_batch.config.pipeline import parse_recipe
from boomerang_batch.data.manifest import load_manifest
from boomerang_batch.errors import BoomerangError, ConfigError

ROOT = Path(__file__).parent.parent


def test_other_references_pass_unchanged():
    for ref in ("/data/a.tar", "s3://bucket/a.tar", "google/ddpm-cifar10-32", "shipped"):
        assert shipped.resolve(ref) == ref


def test_a_shipped_reference_is_a_real_path_wherever_the_package_lies(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    path = Path(shipped.resolve("shipped:demo/shards/README.md"))
    assert path.is_absolute()
    assert path.read_text().startswith("# The demo's input")


def test_an_installation_made_of_links_works(monkeypatch, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "a.tar").touch()
    package = tmp_path / "site-packages" / "boomerang_batch"
    package.mkdir(parents=True)
    (package / "a.tar").symlink_to(tmp_path / "cache" / "a.tar")
    monkeypatch.setattr(shipped, "_PACKAGE", package)
    assert Path(shipped.resolve("shipped:a.tar")).is_file()


@pytest.mark.parametrize(
    "ref", ["shipped:../pyproject.toml", "shipped:/etc/passwd", "shipped:demo/../../tests", "shipped:../"]
)
def test_a_reference_out_of_the_package_is_refused(ref):
    with pytest.raises(ConfigError, match="leads outside the package") as caught:
        shipped.resolve(ref)
    assert str(caught.value).startswith(ref)


@pytest.mark.parametrize(
    "name", ["../pyproject", "a/b", "", ".", "nothing-of-that-name", "demo-anonymize.yaml"]
)
def test_what_is_no_shipped_name_is_none(name):
    assert shipped.named("pipelines", name) is None


@pytest.mark.parametrize("kind", ["pipelines", "manifests"])
def test_every_file_of_the_folder_has_a_name(kind):
    names = shipped.names(kind)
    assert names == sorted(path.stem for path in (ROOT / kind).glob("*.yaml"))
    for name in names:
        path = shipped.named(kind, name)
        assert path is not None
        assert path.samefile(ROOT / kind / f"{name}.yaml")


def test_an_installation_without_the_folders_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(shipped, "_PACKAGE", tmp_path / "boomerang_batch")
    with pytest.raises(BoomerangError, match="no pipelines folder; install boomerang-batch anew"):
        shipped.names("pipelines")


def test_the_recipes_people_are_told_about_are_there():
    assert shipped.names("pipelines") == [
        "cifar10-anonymize",
        "demo-anonymize",
        "demo-augment",
        "demo-spread",
        "faces-anonymize",
        "imagenet-augment",
        "photo-upscale",
    ]
    assert "demo" in shipped.names("manifests")


@pytest.mark.parametrize("name", [path.stem for path in sorted((ROOT / "pipelines").glob("*.yaml"))])
def test_a_shipped_recipe_parses_and_is_called_what_its_file_is(name):
    path = shipped.named("pipelines", name)
    recipe = parse_recipe(path.read_text(), source=str(path))
    assert recipe.name == name
    assert recipe.description
    if recipe.model.source.startswith(shipped.SCHEME):
        assert Path(shipped.resolve(recipe.model.source)).is_dir()
    else:  # a hub model: the reader is told to pin the commit they have looked at, and that nobody ran it
        said = " ".join(path.read_text().replace("#", " ").split())
        assert recipe.model.revision or "--set model.revision=" in said
        assert re.search("not run by this project's tests", said, re.IGNORECASE)


@pytest.mark.parametrize("name", [path.stem for path in sorted((ROOT / "pipelines").glob("*.yaml"))])
def test_a_shipped_recipe_says_what_it_anonymizes_by_its_name(name):
    recipe = parse_recipe((ROOT / "pipelines" / f"{name}.yaml").read_text(), source=name)
    assert (recipe.purpose == "anonymize") == name.endswith("-anonymize")
    if recipe.purpose == "anonymize":
        assert recipe.sampler.eta == 1
        assert set(recipe.fields.fields.values()) <= {"keep"}
        assert set(recipe.fields.fields) <= {"cls"}


def test_the_demo_recipe_makes_at_most_20_evaluations_of_a_secretly_keyed_draw():
    recipe = parse_recipe((ROOT / "pipelines" / "demo-anonymize.yaml").read_text(), source="demo-anonymize")
    assert recipe.purpose == "anonymize"
    assert recipe.sampler.eta == 1
    unit, value = recipe.t.unit
    assert unit == "fraction"
    assert round(recipe.steps * value) <= 20


@pytest.mark.parametrize("name", [path.stem for path in sorted((ROOT / "manifests").glob("*.yaml"))])
def test_a_shipped_manifest_names_files_that_exist(name):
    manifest = load_manifest(name)
    assert manifest.shards
    for shard in manifest.shards:
        assert Path(shard.url).is_file()


@pytest.mark.slow
def test_the_wheel_carries_what_the_names_name(tmp_path):
    built = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
    for kind in ("pipelines", "manifests"):
        for name in shipped.names(kind):
            assert f"boomerang_batch/{kind}/{name}.yaml" in inside
    for path in (ROOT / "boomerang_batch" / "demo").rglob("*"):
        if path.is_file() and path.suffix in {".tar", ".safetensors", ".json", ".md", ".py"}:
            assert path.relative_to(ROOT).as_posix() in inside
    assert "boomerang_batch/py.typed" in inside
    assert not any(name.startswith(("tests/", "benchmarks/", ".ci/", "docs/")) for name in inside)
