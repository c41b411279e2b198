"""dlib's face identity network: 128 numbers that are near for two photographs of one person.

`dlib` looks for a face first and gives NaN where it finds none; of several it takes the largest. Such misses
must be counted apart: a picture that was spoilt has no face to be compared. `dlib-cropped` takes the whole
image for the face, without looking, for images that are crops of faces already. Networks and code are the extra
`faces`. Their files are read by a C++ library, from a path: their digests are compared with those below before
that.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from boomerang_batch.errors import ConfigError
from boomerang_batch.measures.embedders.contract import (
    Embedder,
    Features,
    as_colour,
    missing_package,
    package_folder,
)
from boomerang_batch.measures.images import Images

IDENTITY, LANDMARKS = "dlib_face_recognition_resnet_model_v1.dat", "shape_predictor_5_face_landmarks.dat"
DIGESTS = {
    IDENTITY: "55533b28a95800a551ba546ba62fe69625c7e95a7061c338adffead08719da30",
    LANDMARKS: "c4b1e9804792707d3a405c2c16a80a20269e6675021f64a41d30fffafbc41888",
}
"""SHA-256 of the files in face-recognition-models 0.3.0. Its 68 landmarks are for research only: not used."""
NUMBERS = 128
CHIP = 150
"""Pixels of the upright square face that the network is shown."""
_DETECTABLE = 2 * CHIP
"""The detector needs faces of 80 pixels; an image is enlarged until its shorter side has this many."""


@dataclass(frozen=True, kw_only=True, eq=False)
class DlibFaces:
    """The identity numbers of the face in each image; `detector` None: the image is the face."""

    detector: Any
    landmarks: Any
    network: Any
    digest: str
    name: str
    licence: str = "CC0-1.0"

    def embed(self, images: Images) -> Features:
        """See Embedder."""
        features = np.full((len(images), NUMBERS), np.nan, np.float32)
        for place, image in enumerate(as_colour(images)):
            chip = self._chip(np.ascontiguousarray(image))
            if chip is not None:
                features[place] = self.network.compute_face_descriptor(chip)
        return features

    def _chip(self, image: NDArray[np.uint8]) -> NDArray[np.uint8] | None:
        """The face, upright in a square of 150 pixels; None where there is none."""
        dlib = importlib.import_module("dlib")
        if self.detector is None:
            image = dlib.resize_image(image, CHIP, CHIP)
            face = dlib.rectangle(0, 0, CHIP - 1, CHIP - 1)
        else:
            scale = max(1.0, _DETECTABLE / min(image.shape[:2]))
            image = dlib.resize_image(image, *(round(side * scale) for side in image.shape[:2]))
            found = list(self.detector(image, 0))
            if not found:
                return None
            face = max(found, key=lambda rectangle: rectangle.area())
        chip: NDArray[np.uint8] = dlib.get_face_chip(image, self.landmarks(image, face), size=CHIP)
        return chip


def detected(fit_on: Images) -> Embedder:
    """Faces where the detector finds one; nothing is fitted. Raises ConfigError without the extra `faces`."""
    return _load("dlib", detects=True)


def cropped(fit_on: Images) -> Embedder:
    """Images that are faces; nothing is fitted. Raises ConfigError without the extra `faces`."""
    return _load("dlib-cropped", detects=False)


def _load(name: str, *, detects: bool) -> DlibFaces:
    package = package_folder("face_recognition_models")
    if package is None or package_folder("dlib") is None:
        raise missing_package(
            f"--embedder {name}", extra="faces", packages=("dlib-bin", "face-recognition-models")
        )
    # The package is not imported, only looked into: its code needs setuptools of long ago.
    folder = package / "models"
    for file, digest in DIGESTS.items():
        found = hashlib.sha256((folder / file).read_bytes()).hexdigest()
        if found != digest:
            raise ConfigError(
                f"--embedder {name}: {file} has SHA-256 {found}, not {digest}; install "
                "face-recognition-models==0.3.0 anew"
            )
    dlib = importlib.import_module("dlib")
    described = [name, CHIP, _DETECTABLE, dlib.__version__, DIGESTS]
    return DlibFaces(
        detector=dlib.get_frontal_face_detector() if detects else None,
        landmarks=dlib.shape_predictor(str(folder / LANDMARKS)),
        network=dlib.face_recognition_model_v1(str(folder / IDENTITY)),
        digest=hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest(),
        name=name,
    )
