"""Classifiers that are given, to tell whether outputs keep their labels: `load(name)`.

They are installed entry points of the group `boomerang_batch.classifiers`: `--classifier NAME` calls the
factory NAME as factory(), which returns a `Classifier`; docs/embedders.md shows one.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from numbers import Integral
from typing import Any, Protocol

import numpy as np

from boomerang_batch import installed
from boomerang_batch.errors import ConfigError, MeasureError
from boomerang_batch.measures.given import Introduced, answers, introduced
from boomerang_batch.measures.images import Images

GROUP = "boomerang_batch.classifiers"


class Classifier(Introduced, Protocol):
    """Images to labels. It may have `probability(images, label)`, a number from 0 to 1 for each image."""

    def classify(self, images: Images) -> Sequence[str]:
        """The label of each image (N, H, W, C), written as the records' are."""
        ...


@dataclass
class CheckedClassifier:
    """A classifier that is called in batches, and whose every answer is checked; implements `Classifier`.

    Raises ConfigError where `made` has not what a classifier has, MeasureError where its labels are none.
    """

    made: Any
    entry: EntryPoint | None = None
    """What it was installed as."""

    def __post_init__(self) -> None:
        self.name, self.digest, self.licence = introduced(
            self.made, "classifier", method="classify", entry=self.entry
        )

    def classify(self, images: Images) -> list[str]:
        """See Classifier. Whole numbers count as text."""
        who = f"classifier {self.name}"
        return [
            label
            for answer, count in answers(self.made.classify, images, who=who)
            for label in _labels(answer, count, who=who)
        ]

    def probability(self, images: Images, label: str) -> list[float]:
        """How sure it is that each image (N, H, W, C) is a `label`, 0 to 1.

        One that tells classes alone is sure of what it tells.
        """
        if not callable(getattr(self.made, "probability", None)):
            return [float(told == label) for told in self.classify(images)]
        who = f"classifier {self.name}"
        asked = functools.partial(self.made.probability, label=label)
        return [
            number
            for answer, count in answers(asked, images, who=who)
            for number in _shares(answer, count, who=who)
        ]


def load(name: str, *, where: str = "--classifier") -> CheckedClassifier:
    """The installed classifier of this name. Raises ConfigError where there is none, or it is none."""
    where = f"{where} {name}"
    entry = installed.find(GROUP, name, where=where, error=ConfigError)
    return CheckedClassifier(installed.make(entry, where=where, error=ConfigError), entry=entry)


def _labels(answer: Any, count: int, *, who: str) -> list[str]:
    """The answer for a batch as texts. Raises MeasureError where it is no label for each image."""
    labels = answer.tolist() if isinstance(answer, np.ndarray) else answer
    if not isinstance(labels, Sequence) or isinstance(labels, str | bytes) or len(labels) != count:
        given = f"{len(labels)} labels" if isinstance(labels, list | tuple) else type(answer).__name__
        raise MeasureError(f"{who} gave {given} for {count} images; it must give a sequence with one for each")
    for label in labels:
        # True and False are whole numbers to Python, and no class's.
        if isinstance(label, bool) or not isinstance(label, str | Integral):
            raise MeasureError(
                f"{who} gave {label!r} for a label; it must be a whole number or a text, as the records' are"
            )
    return [str(label) for label in labels]


def _shares(answer: Any, count: int, *, who: str) -> list[float]:
    """The answer for a batch as numbers. Raises MeasureError where it is no probability for each image."""
    try:
        shares = np.asarray(answer, dtype=np.float64)
    except (TypeError, ValueError):
        shares = np.empty(0)
    if shares.shape != (count,) or not ((shares >= 0) & (shares <= 1)).all():
        raise MeasureError(f"{who} gave no probability from 0 to 1 for each of {count} images")
    return [float(share) for share in shares]
