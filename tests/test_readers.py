"""Output as others read it, webdataset and Hugging Face datasets: its labels are the input's."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from boomerang_batch.data.provenance import read_rows
from tests import worlds

SHARDS, SAMPLES = 2, 7
BAD = "img00003"
"""A sample that fails, so that the output has a gap."""

Labels = dict[str, int]
Reader = Callable[[Path, list[str]], dict[str, tuple[int, np.ndarray]]]
"""From a scratch folder and tar files to label and pixels by key."""


def with_webdataset(scratch: Path, tars: list[str]) -> dict[str, tuple[int, np.ndarray]]:
    samples = webdataset.WebDataset(tars, shardshuffle=False, empty_check=False).decode("pil")
    return {sample["__key__"]: (sample["cls"], np.asarray(sample["png"].convert("L"))) for sample in samples}


def with_datasets(scratch: Path, tars: list[str]) -> dict[str, tuple[int, np.ndarray]]:
    import datasets

    table = datasets.load_dataset(
        "webdataset", data_files={"train": tars}, split="train", cache_dir=str(scratch / "cache")
    )
    return {row["__key__"]: (row["cls"], np.asarray(row["png"].convert("L"))) for row in table}


READERS = [
    # The library leaves closing its files to the garbage collector.
    pytest.param(
        with_webdataset,
        id="webdataset",
        marks=pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
    ),
    pytest.param(with_datasets, id="datasets", marks=pytest.mark.slow),
]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    for name in ("HF_HOME", "HF_DATASETS_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Shards as users have them, one sample with an image that is none."""
    path = worlds.save_shards(tmp_path / "in", shards=SHARDS, samples=SAMPLES)
    members = []
    for number in range(SAMPLES):
        members += worlds.sample_members(f"img{number:05d}", number)
    members = [(name, b"" if name == f"{BAD}.png" else data) for name, data in members]
    worlds.write_tar(tmp_path / "in" / "s-000.tar", members)
    return path


def expected() -> Labels:
    """The labels that went in, but for the bad sample."""
    labels = {f"img{number:05d}": number % worlds.CLASSES for number in range(SHARDS * SAMPLES)}
    del labels[BAD]
    return labels


def tars(out: Path) -> list[str]:
    return [str(path) for path in sorted(out.glob("*.tar"))]


def pixels(out: Path) -> dict[str, np.ndarray]:
    """Output images by key, as the standard library reads them."""
    return {
        key: np.asarray(Image.open(io.BytesIO(fields["png"])))
        for path in out.glob("*.tar")
        for key, fields in worlds.read_output(out, path.stem)
    }


@pytest.mark.slow
@pytest.mark.parametrize("read", READERS)
def test_augmented_labels_are_the_inputs(read: Reader, tmp_path: Path, tiny_model: Path, manifest: Path):
    out = tmp_path / "out"
    recipe = worlds.recipe(tiny_model, purpose="augment")
    assert worlds.run(recipe, manifest, out).rows == {"failed": 1, "ok": 13}
    found = read(tmp_path, tars(out))
    assert {key: label for key, (label, _) in found.items()} == expected()
    assert all((image == pixels(out)[key]).all() for key, (_, image) in found.items())


@pytest.mark.slow
@pytest.mark.parametrize("read", READERS)
def test_variants_and_originals_have_their_inputs_label(
    read: Reader, tmp_path: Path, tiny_model: Path, manifest: Path
):
    out = tmp_path / "out"
    recipe = worlds.recipe(tiny_model, "variants=2", "keep_originals=true", purpose="augment")
    assert worlds.run(recipe, manifest, out).exit_code == 3
    found = {key: label for key, (label, _) in read(tmp_path, tars(out)).items()}
    assert found == {key + end: label for key, label in expected().items() for end in ("", "-v0", "-v1")}


@pytest.mark.slow
@pytest.mark.parametrize("read", READERS)
def test_anonymized_labels_are_the_inputs_through_the_links(
    read: Reader, tmp_path: Path, tiny_model: Path, manifest: Path
):
    out = tmp_path / "out"
    assert worlds.run(worlds.recipe(tiny_model), manifest, out).exit_code == 3
    links = [
        link
        for path in (tmp_path / "out-private" / "links").glob("*.parquet")
        for link in pq.read_table(path).to_pylist()
    ]
    source = {link["row_key"]: link["source_key"] for link in links if link["status"] == "ok"}
    found = read(tmp_path, tars(out))
    assert {source[key]: label for key, (label, _) in found.items()} == expected()
    assert found.keys() == source.keys()
    assert all((image == pixels(out)[key]).all() for key, (_, image) in found.items())
    rows = [row for path in out.glob("*.parquet") for row in read_rows(path) if row.status == "ok"]
    assert {row.key: row.label for row in rows} == {key: label for key, (label, _) in found.items()}
