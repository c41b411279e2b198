"""dlib's face identity on real photographs of 40 people: `make test-faces`. Fetches them, some 45 MB, once."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from boomerang_batch.errors import ConfigError
from boomerang_batch.measures.embedders import faces, load
from boomerang_batch.measures.fidelity import fidelity
from boomerang_batch.measures.linkability import linkability

pytestmark = [pytest.mark.lane, pytest.mark.timeout(600)]

ROOT = Path(__file__).parent.parent.parent
PEOPLE, PHOTOS = 40, 4


@pytest.fixture(scope="module")
def photographs() -> np.ndarray:
    """Four photographs (40, 4, 64, 64, 1) of each person."""
    script, folder = ROOT / "benchmarks" / "olivetti.py", ROOT / ".cache" / "olivetti"
    subprocess.run([sys.executable, script, folder], check=True)
    spec = importlib.util.spec_from_file_location("olivetti", script)
    module = importlib.util.module_from_spec(spec)
    sys.modules["olivetti"] = module
    spec.loader.exec_module(module)
    images = module.read(folder).images
    return images.reshape(PEOPLE, -1, *images.shape[1:])[:, :PHOTOS]


@pytest.fixture(scope="module")
def features(photographs: np.ndarray) -> dict[str, np.ndarray]:
    """The identities (160, 128) of all, by embedder."""
    images = photographs.reshape(-1, *photographs.shape[2:])
    return {name: load(name, fit_on=images).embed(images) for name in ("dlib", "dlib-cropped")}


@pytest.mark.parametrize(("name", "missed"), [("dlib", 5), ("dlib-cropped", 0)])
def test_people_are_known_by_their_faces(name, missed, features):
    found = features[name]
    assert np.isnan(found).all(axis=1).sum() <= missed
    people = np.repeat(np.arange(PEOPLE), PHOTOS)
    asked, gallery = (np.flatnonzero(np.arange(len(people)) % 2 == part) for part in (0, 1))
    linked = linkability(
        found[asked], found[gallery], groups=np.zeros(len(asked), np.int64), identities=people[asked]
    )
    assert linked.misses <= missed
    assert linked.rank[1].value >= 0.98
    assert linked.auc.value >= 0.995


def test_no_face_is_a_miss_and_a_crop_never_is():
    noise = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    nothing = np.concatenate([noise, np.full((1, 64, 64, 3), 127, np.uint8)])
    assert np.isnan(load("dlib", fit_on=nothing).embed(nothing)).all()
    assert np.isfinite(load("dlib-cropped", fit_on=nothing).embed(nothing)).all()


def test_grey_and_colour_size_and_neighbours_change_no_identity(photographs, features):
    image = photographs[:1, 0]
    for name, row in features.items():
        colour = np.repeat(image, 3, axis=3)
        assert (load(name, fit_on=image).embed(colour)[0] == row[0]).all()
        # Twice as large without another pixel: as good as the same to a network of 150 pixels.
        large = image.repeat(2, axis=1).repeat(2, axis=2)
        assert np.linalg.norm(load(name, fit_on=image).embed(large)[0] - row[0]) < 0.3


def test_misses_are_counted_by_the_measures(features):
    rows = features["dlib-cropped"].copy()
    rows[:3] = np.nan
    assert fidelity(rows, features["dlib-cropped"], features="dlib-cropped").made_misses == 3


def test_the_two_differ_and_say_so(photographs):
    one, other = (load(name, fit_on=photographs[:, 0]) for name in ("dlib", "dlib-cropped"))
    assert (one.name, other.name) == ("dlib", "dlib-cropped")
    assert one.digest != other.digest
    assert one.licence == "CC0-1.0"


def test_another_file_is_refused_before_it_is_read(photographs, monkeypatch):
    monkeypatch.setitem(faces.DIGESTS, faces.IDENTITY, "e" * 64)
    with pytest.raises(ConfigError, match=rf"{faces.IDENTITY} has SHA-256 55533b28\w*, not e{{64}}"):
        load("dlib", fit_on=photographs[:, 0])
