"""Do outputs keep their labels? Asked of a classifier that was trained on other sources, and of those given.

The trained one is a ridge classifier on an embedder's features: one linear score per class, its strength by
generalized cross-validation (Golub, Heath and Wahba 1979). Better ones exist, and may be given. What each makes
of sources stands beside: that is what agreement is to be compared with. A given one may have seen these.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from boomerang_batch.audit.findings import OUTPUTS, Reading
from boomerang_batch.audit.readings import LABEL_AGREEMENT, rate_of
from boomerang_batch.audit.records import LABEL_FIELD, NO_LABEL, Records
from boomerang_batch.errors import MeasureError
from boomerang_batch.measures.attackers import training_half
from boomerang_batch.measures.classifiers import Classifier

_STRENGTHS = np.logspace(-6, 2, 9)
_LEAST = 20
NO_LABELS = (
    "no source audited has a label to compare with, neither one that the model was told nor a number in the "
    f"field {LABEL_FIELD}"
)


@dataclass(frozen=True, kw_only=True)
class Ridge:
    """What was learned."""

    classes: NDArray[np.int64]
    centre: NDArray[np.float64]
    weights: NDArray[np.float64]
    """(d, classes)."""
    offsets: NDArray[np.float64]

    def predict(self, features: NDArray[np.float32]) -> NDArray[np.int64]:
        """A class for each row (n, d)."""
        scores = (features - self.centre) @ self.weights + self.offsets
        best: NDArray[np.int64] = self.classes[scores.argmax(axis=1)]
        return best


def learn_labels(features: NDArray[np.float32], labels: NDArray[np.int64]) -> Ridge:
    """A classifier from features (n, d) with labels (n,)."""
    classes = np.unique(labels)
    wanted = (labels[:, None] == classes).astype(np.float64)
    centre: NDArray[np.float64] = np.asarray(features, dtype=np.float64).mean(axis=0)
    offsets: NDArray[np.float64] = wanted.mean(axis=0)
    left, values, right = np.linalg.svd(features - centre, full_matrices=False)
    target = left.T @ (wanted - offsets)
    rest = ((wanted - offsets) ** 2).sum() - (target**2).sum()

    def score(strength: float) -> float:
        kept = values**2 / (values**2 + strength)
        error = rest + (((1 - kept)[:, None] * target) ** 2).sum()
        return float(error / (len(features) - kept.sum() - 1) ** 2)

    strengths = _STRENGTHS * (values[:1] ** 2).sum()
    strength = min(strengths, key=score)
    weights = right.T @ ((values / (values**2 + strength))[:, None] * target)
    return Ridge(classes=classes, centre=centre, weights=weights, offsets=offsets)


def label_agreement(
    outputs: NDArray[np.float32],
    sources: NDArray[np.float32],
    labels: NDArray[np.int64],
    identities: NDArray[np.int64],
    *,
    features: str,
) -> Iterator[Reading]:
    """The share of outputs, and of sources, that a classifier of other records' sources gives their label.

    Nothing where `no_agreement` of the records in which something was found.
    """
    usable = (labels != NO_LABEL) & ~(np.isnan(outputs).any(axis=1) | np.isnan(sources).any(axis=1))
    if no_agreement(np.where(usable, labels, NO_LABEL), identities):
        return
    train = training_half(identities)
    learned, asked = usable & train, usable & ~train
    classifier = learn_labels(sources[learned], labels[learned])
    for subject, rows in ((OUTPUTS, outputs), ("sources", sources)):
        right = classifier.predict(rows[asked]) == labels[asked]
        yield from _agreement(right, labels[asked], subject=subject, features=features)


def no_agreement(labels: NDArray[np.int64], identities: NDArray[np.int64]) -> str | None:
    """Why no classifier can be trained and asked; None where one can be.

    It takes 20 labelled records to learn from, of two classes, and as many to ask about.
    """
    if (labels == NO_LABEL).all():
        return NO_LABELS
    train = training_half(identities)
    learned, asked = (int((labels[half] != NO_LABEL).sum()) for half in (train, ~train))
    if min(learned, asked) < _LEAST:
        return (
            f"{learned} labelled records to train a classifier on and {asked} to ask it about are too few; "
            f"take {_LEAST} of each"
        )
    if len(np.unique(labels[train & (labels != NO_LABEL)])) < 2:
        return "all records to train a classifier on have the same label"
    return None


def require_labels(classifiers: Sequence[Classifier], records: Records) -> None:
    """Raises MeasureError where a classifier is given and no record has a label to compare with."""
    if classifiers and (records.labels == NO_LABEL).all():
        raise MeasureError(f"--classifier {classifiers[0].name}: {NO_LABELS}; leave it out")


def given_agreement(classifier: Classifier, records: Records) -> Iterator[Reading]:
    """The share of outputs, and of their sources, that a given classifier gives their label, compared as text.

    Raises MeasureError where no record has a label.
    """
    require_labels([classifier], records)
    labelled = records.labels != NO_LABEL
    labels = records.labels[labelled]
    wanted = np.array([str(label) for label in labels])
    first, every = np.unique(records.identities, return_index=True, return_inverse=True)[1:]
    said = {
        OUTPUTS: np.array(classifier.classify(records.outputs)),
        "sources": np.array(classifier.classify(records.sources[first]))[every],
    }
    for subject, told in said.items():
        yield from _agreement(told[labelled] == wanted, labels, subject=subject, features=classifier.name)


def _agreement(
    right: NDArray[np.bool_], labels: NDArray[np.int64], *, subject: str, features: str
) -> Iterator[Reading]:
    """Over all, and of each label."""
    yield rate_of(LABEL_AGREEMENT, right, subject=subject, features=features)
    for label in np.unique(labels):
        of_label = right[labels == label]
        yield rate_of(LABEL_AGREEMENT, of_label, subject=subject, features=features, stratum=f"label={label}")
