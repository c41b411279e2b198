"""The contract of an embedder, and the check that holds it to it.

Every batch is checked: one row per image, float32, finite, as wide as the others; a row of NaN, and only a
whole one, means that nothing was found.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from boomerang_batch.errors import ConfigError, MeasureError
from boomerang_batch.measures.given import Introduced, answers, introduced
from boomerang_batch.measures.images import Images

Features = NDArray[np.float32]
"""(N, d); a row of NaN: nothing was found in that image."""


class Embedder(Introduced, Protocol):
    """Images to features whose Euclidean distances mean something."""

    def embed(self, images: Images) -> Features:
        """The features (N, d) of images (N, H, W, C), each row decided by its own image alone."""
        ...


@dataclass
class CheckedEmbedder:
    """An embedder that is called in batches, and whose every answer is checked; implements `Embedder`.

    Raises ConfigError where `made` has not what an embedder has, MeasureError where its features are none.
    """

    made: Any
    entry: EntryPoint | None = None
    """What it was installed as; None where it comes with the tool."""
    _width: int | None = None

    def __post_init__(self) -> None:
        self.name, self.digest, self.licence = introduced(
            self.made, "embedder", method="embed", entry=self.entry
        )

    def embed(self, images: Images) -> Features:
        """See Embedder."""
        parts = []
        for features, count in answers(self.made.embed, images, who=f"embedder {self.name}"):
            self._check(features, count)
            parts.append(np.ascontiguousarray(features))
        return np.concatenate(parts)

    def _check(self, features: Any, count: int) -> None:
        if not isinstance(features, np.ndarray) or features.dtype != np.float32:
            kind = features.dtype if isinstance(features, np.ndarray) else type(features).__name__
            raise MeasureError(f"embedder {self.name} gave {kind}; it must give a numpy array of float32")
        if features.ndim != 2 or len(features) != count or not features.shape[1]:
            raise MeasureError(
                f"embedder {self.name} gave shape {features.shape} for {count} images, and not ({count}, d)"
            )
        if self._width not in (None, features.shape[1]):
            raise MeasureError(
                f"embedder {self.name} gave {features.shape[1]} numbers per image, and {self._width} before; "
                "features of different lengths have no distance"
            )
        self._width = features.shape[1]
        finite = np.isfinite(features)
        missed = np.isnan(features).all(axis=1)
        if not (finite.all(axis=1) | missed).all():
            raise MeasureError(
                f"embedder {self.name} gave NaN or infinity within a row; only a whole row of NaN means "
                "something: that nothing was found in the image"
            )


def as_colour(images: Images) -> Images:
    """(N, H, W, 3): grey stands in all three channels."""
    return images if images.shape[3] == 3 else np.repeat(images, 3, axis=3)


def missing_package(where: str, *, extra: str, packages: Sequence[str]) -> ConfigError:
    """The error for an embedder, named as the user named it, whose packages aren't installed."""
    return ConfigError(
        f"{where} needs {' and '.join(packages)}: pip install 'boomerang-batch[{extra}]', or leave it out"
    )


def package_folder(package: str) -> Path | None:
    """Where an installed package lies, without importing it; None where there is none."""
    found = importlib.util.find_spec(package)
    places = None if found is None else found.submodule_search_locations
    return Path(places[0]) if places else None
