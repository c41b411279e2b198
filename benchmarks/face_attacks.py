"""What attacks make of redrawn faces, for the faces benchmark. Not a benchmark itself.

Three questions of one set of features, `outputs` (N, d) made of `sources` (N, d), several photographs of each
person: is an output's own photograph found among all; are other photographs of its person, where its own is not
in the gallery; and what does an attacker find who has learned from pairs of other people. And one of the model:
how many outputs are nearer to a face it was trained on than photographs of strangers are.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from boomerang_batch.errors import MeasureError
from boomerang_batch.measures.attackers import learn, training_half
from boomerang_batch.measures.copies import copies
from boomerang_batch.measures.intervals import Rate
from boomerang_batch.measures.linkability import Linkability, linkability

FAR = 0.01


def same_photo(outputs: np.ndarray, sources: np.ndarray) -> Linkability:
    """Who finds the very photograph that an output was made of, among all."""
    return linkability(outputs, sources, groups=np.zeros(len(outputs), np.int64), fars=(FAR,))


def other_photos(outputs: np.ndarray, sources: np.ndarray, people: np.ndarray) -> list[Linkability]:
    """Who finds its person among other photographs: half of everyone's are outputs, the other half the gallery.

    Two results, for the halves change places.
    """
    first = np.concatenate([np.flatnonzero(people == person)[::2] for person in np.unique(people)])
    second = np.concatenate([np.flatnonzero(people == person)[1::2] for person in np.unique(people)])
    found = []
    for asked, gallery in ((first, second), (second, first)):
        groups = np.zeros(len(asked), np.int64)
        found.append(
            linkability(outputs[asked], sources[gallery], groups=groups, identities=people[asked], fars=(FAR,))
        )
    return found


def learned(
    outputs: np.ndarray, sources: np.ndarray, people: np.ndarray
) -> tuple[list[Linkability], list[Linkability]]:
    """The attacker who has learned from one half of the people, against the other half: as the two above.

    The halves change places here too. Empty where an embedder found too little to learn from.
    """
    half = training_half(people)
    same, other = [], []
    for taught in (half, ~half):
        groups = np.zeros(len(people), np.int64)
        try:
            attacker = learn(outputs[taught], sources[taught], groups=groups[taught])
        except MeasureError:
            return [], []
        asked = attacker.outputs(outputs[~taught], groups[~taught])
        gallery = attacker.sources(sources[~taught], groups[~taught])
        same.append(same_photo(asked, gallery))
        other += other_photos(asked, gallery, people[~taught])
    return same, other


def pooled(parts: Sequence[Linkability], k: int = 1) -> Rate:
    """Rank k of several disjoint sets of outputs taken as one."""
    rates = [part.rank[k] for part in parts]
    return Rate(hits=sum(rate.hits for rate in rates), trials=sum(rate.trials for rate in rates))


def memorized(
    outputs: np.ndarray, sources: np.ndarray, people: np.ndarray, training: np.ndarray
) -> dict[str, Rate]:
    """How many outputs are nearer to a training face than all but 5 % of the sources are, and how many of these
    nearer to it than to their own source besides: swapped for one of the people whom the model knows by heart.
    """
    try:
        found = copies(outputs, sources, identities=people, training=training).training
    except MeasureError:  # no face was found in any output
        found = None
    nothing = Rate(hits=0, trials=0)
    return {"near": found.below if found else nothing, "swapped": found.swaps if found else nothing}
