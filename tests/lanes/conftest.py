"""Lanes run where -m asks for them by name, never as part of `-m 'not slow'`; and what their tests share."""

from __future__ import annotations

import contextlib
import itertools
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from tests import worlds
from tests.lanes.commands import Place, demo_inputs, run_words
from tests.lanes.seaweedfs import SeaweedFS


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "lane" not in config.getoption("markexpr"):
        left_out = [item for item in items if item.get_closest_marker("lane")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedFS]:
    """One server for every test that doesn't harm it."""
    with SeaweedFS(tmp_path_factory.mktemp("seaweed")) as server:
        yield server


@pytest.fixture
def bucket(seaweed: SeaweedFS) -> str:
    """The name of a new empty bucket."""
    name = f"bucket-{next(_numbers)}"
    seaweed.make_bucket(name)
    return name


_numbers = itertools.count(1)


@pytest.fixture
def reach(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Mapping[str, str]], None]]:
    """Gives this process the environment of a store's client. Clients made before are forgotten."""

    def reach(environment: Mapping[str, str]) -> None:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        _forget_clients()

    yield reach
    _forget_clients()


def _forget_clients() -> None:
    """fsspec keeps clients by what they were made with, which the environment is no part of."""
    import fsspec
    from s3fs import S3FileSystem

    from boomerang_batch.storage import remote

    with contextlib.suppress(ImportError):
        S3FileSystem.clear_instance_cache()
        fsspec.get_filesystem_class("http").clear_instance_cache()
    remote._reached.clear()


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A folder whose name is short enough for the sockets that Ray makes in it."""
    folder = Path(tempfile.mkdtemp(prefix="lane-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def demo_here(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, bytes]:
    """The tree of the demo run from local disk to local disk."""
    folder = tmp_path_factory.mktemp("demo")
    for name, data in demo_inputs().items():
        (folder / name).write_bytes(data)
    here = Place(work=folder / "work", environment={})
    out = folder / "out"
    here.call(*run_words(f"{folder}/recipe.yaml", f"{folder}/manifest.yaml", str(out), here)).expect(0)
    return worlds.tree(out)


@pytest.fixture(scope="session")
def tiny_inputs(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe whose shards take a moment, its shards and their manifest."""
    folder = tmp_path_factory.mktemp("tiny")
    worlds.save_shards(folder, shards=12, samples=12)
    (folder / "recipe.yaml").write_text(worlds.recipe_text(tiny_model).replace("steps: 6", "steps: 20"))
    return folder


@pytest.fixture(scope="session")
def inputs(tiny_inputs: Path) -> Mapping[str, bytes]:
    """The files of `tiny_inputs`, to be put into a store."""
    return {path.name: path.read_bytes() for path in tiny_inputs.iterdir()}


@pytest.fixture(scope="session")
def tiny_here(tiny_inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, bytes]:
    """The tree of the run of `tiny_inputs` from local disk to local disk."""
    folder = tmp_path_factory.mktemp("tiny-here")
    here = Place(work=folder / "work", environment={})
    words = run_words(f"{tiny_inputs}/recipe.yaml", f"{tiny_inputs}/manifest.yaml", str(folder / "out"), here)
    here.call(*words).expect(0)
    return worlds.tree(folder / "out")
