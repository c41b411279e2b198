"""The contract of an embedder, and the check that holds it to it.

Nobody who audits can see from a number that its features were wrong. So every batch is checked: one row per
image, float32, finite, as wide as the others; a row of NaN, and only a whole one, means that nothing was found.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from boomerang_batch.errors import BoomerangError, ConfigError, MeasureError
from boomerang_batch.measures.images import Images, check_images

Features = NDArray[np.float32]
"""(N, d); a row of NaN: nothing was found in that image."""

BATCH = 32
"""Images that an embedder gets at a time: what it needs then doesn't grow with the number of images."""


class Embedder(Protocol):
    """Images to features whose Euclidean distances mean something."""

    @property
    def name(self) -> str:
        """A word for tables: measures on its features are named after it."""
        ...

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of what decides on the features: weights, and what was fitted."""
        ...

    @property
    def licence(self) -> str:
        """Of its weights and code, as a short name."""
        ...

    def embed(self, images: Images) -> Features:
        """The features (N, d) of images (N, H, W, C), each row decided by its own image alone."""
        ...


@dataclass
class CheckedEmbedder:
    """An embedder that is called in batches, and whose every answer is checked; implements `Embedder`.

    Raises ConfigError where `made` has not what an embedder has, MeasureError where its features are none.
    """

    made: Any
    _width: int | None = None

    def __post_init__(self) -> None:
        self.name: str = _said(self.made, "name")
        self.digest: str = _said(self.made, "digest")
        self.licence: str = _said(self.made, "licence")
        if re.fullmatch("[0-9a-f]{64}", self.digest) is None:
            raise ConfigError(
                f"embedder {self.name}: its digest {self.digest!r} is no SHA-256 (64 hex digits) of its weights"
            )
        if not callable(getattr(self.made, "embed", None)):
            raise ConfigError(f"embedder {self.name}: it has no method embed; see docs/embedders.md")

    def embed(self, images: Images) -> Features:
        """See Embedder."""
        check_images(images)
        parts = [self._batch(images[start : start + BATCH]) for start in range(0, len(images), BATCH)]
        return np.concatenate(parts)

    def _batch(self, images: Images) -> Features:
        try:
            features = self.made.embed(images)
        except BoomerangError:
            raise
        except Exception as error:  # someone else's code may raise anything
            reason = " ".join(str(error).split())
            raise MeasureError(
                f"embedder {self.name} failed on images of shape {images.shape}: {type(error).__name__}: "
                f"{reason}"
            ) from error
        self._check(features, len(images))
        return np.ascontiguousarray(features)

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


def missing_package(name: str, *, extra: str, packages: Sequence[str]) -> ConfigError:
    """The error for an embedder whose packages aren't installed."""
    return ConfigError(
        f"--embedder {name} needs {' and '.join(packages)}: pip install 'boomerang-batch[{extra}]', or leave "
        "it out"
    )


def package_folder(package: str) -> Path | None:
    """Where an installed package lies, without importing it; None where there is none."""
    found = importlib.util.find_spec(package)
    places = None if found is None else found.submodule_search_locations
    return Path(places[0]) if places else None


def _said(made: Any, name: str) -> str:
    value = getattr(made, name, None)
    if not isinstance(value, str) or not value:
        raise ConfigError(
            f"embedder {made!r}: its {name} is {value!r}; it must be a text, see docs/embedders.md"
        )
    return value
