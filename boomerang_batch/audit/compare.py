"""Outputs beside their sources, in each embedder's features: who is linked, what is copied, what is kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from boomerang_batch.audit import readings
from boomerang_batch.audit.classify import label_agreement
from boomerang_batch.audit.findings import OUTPUTS, Case, Reading
from boomerang_batch.audit.others import NONE, Others
from boomerang_batch.audit.records import NO_LABEL, Records
from boomerang_batch.measures.attackers import attack
from boomerang_batch.measures.copies import copies, exact_duplicates
from boomerang_batch.measures.distances import members, squared_distances, strips
from boomerang_batch.measures.embedders import Embedder
from boomerang_batch.measures.fidelity import fidelity
from boomerang_batch.measures.likeness import likeness, psnr
from boomerang_batch.measures.linkability import linkability

_LEAST_OF_A_STRATUM = 20
_WORST = 16


@dataclass(frozen=True, kw_only=True)
class Seen:
    """The records as one embedder sees them."""

    embedder: Embedder
    outputs: NDArray[np.float32]
    """(n, d)."""
    sources: NDArray[np.float32]
    """(n, d)."""

    @staticmethod
    def by(embedder: Embedder, records: Records) -> Seen:
        """Embed outputs and sources; each source once, whatever number of outputs it has."""
        first, every = np.unique(records.identities, return_index=True, return_inverse=True)[1:]
        sources = embedder.embed(records.sources[first])[every]
        return Seen(embedder=embedder, outputs=embedder.embed(records.outputs), sources=sources)


def links(records: Records, seen: Seen) -> Iterator[Reading]:
    """Who can be led back by features alone, and the controls that need no model."""
    name, unrelated = seen.embedder.name, _unrelated(records)
    rows = {OUTPUTS: seen.outputs, "sources": seen.sources, "unrelated": seen.sources[unrelated]}
    for subject, features in rows.items():
        found = linkability(features, seen.sources, groups=records.groups, identities=records.identities)
        yield from readings.linked(found, subject=subject, features=name)
    for stratum, at in _strata(records):
        found = linkability(
            seen.outputs[at], seen.sources[at], groups=records.groups[at], identities=records.identities[at]
        )
        yield from readings.linked(found, features=name, stratum=stratum)


def learned_links(records: Records, seen: Seen) -> Iterator[Reading]:
    """What an attacker reaches who learned from half of the pairs. Raises MeasureError with too few pairs."""
    found = attack(seen.outputs, seen.sources, groups=records.groups, identities=records.identities)
    yield from readings.linked(found.linkability, attacker=readings.TRAINED, features=seen.embedder.name)


def copied(records: Records, seen: Seen, others: Others = NONE) -> Iterator[Reading]:
    """Copies of sources and, where there are others, of training images; and near duplicates."""
    first = np.unique(records.identities, return_index=True)[1]
    training, holdout = (
        None if pictures is None else seen.embedder.embed(pictures)
        for pictures in (others.training, others.holdout)
    )
    found = copies(
        seen.outputs, seen.sources[first], own=records.identities, training=training, holdout=holdout
    )
    yield from readings.copied(found, features=seen.embedder.name)


def kept(records: Records, seen: Seen) -> Iterator[Reading]:
    """What of the sources' use is left: the features as a whole, and labels."""
    first = np.unique(records.identities, return_index=True)[
        1
    ]  # a source that is there twice has no neighbourhood
    yield from readings.faithful(fidelity(seen.outputs, seen.sources[first], features=seen.embedder.name))
    yield from label_agreement(
        seen.outputs, seen.sources, records.labels, records.identities, features=seen.embedder.name
    )


def pictures(records: Records) -> Iterator[Reading]:
    """What pixels alone tell: how like the source, how much detail, and outputs that are equal."""
    yield from readings.alike(likeness(records.outputs, records.sources))
    for stratum, at in _strata(records):
        yield from readings.alike(likeness(records.outputs[at], records.sources[at]), stratum=stratum)
    yield readings.share("exact-duplicates", exact_duplicates(np.asarray(records.outputs)))


def worst(records: Records, seen: Sequence[Seen]) -> Iterator[Case]:
    """The outputs that most embedders lead back to their sources, the most alike to them first."""
    votes = np.zeros(len(records.rows), dtype=np.int64)
    for one in seen:
        votes += _picked(one, records)
    like = psnr(records.outputs, records.sources)
    order = sorted(np.flatnonzero(votes), key=lambda place: (-votes[place], -like[place]))
    sizes = np.bincount(records.groups)
    for place in order[:_WORST]:
        row = records.rows[place]
        yield Case(
            shard=records.shards[place],
            key=row.key or "",
            variant=row.variant,
            says=(
                f"nearest to its own source among {sizes[records.groups[place]]} for {votes[place]} of "
                f"{len(seen)} embedders; PSNR to it {like[place]:.1f} dB"
            ),
            severity=float(votes[place]),
        )


def _picked(seen: Seen, records: Records) -> NDArray[np.int64]:
    """1 for each record whose own source is the nearest of its group."""
    found = np.zeros(len(records.rows), dtype=np.int64)
    for part in members(records.groups):
        sources = np.nan_to_num(seen.sources[part].astype(np.float64))
        for strip in strips(len(part), len(part)):
            outputs = np.nan_to_num(seen.outputs[part[strip]].astype(np.float64))
            nearest = squared_distances(outputs, sources).argmin(axis=1)
            found[part[strip]] = records.identities[part[nearest]] == records.identities[part[strip]]
    return found


def _unrelated(records: Records) -> NDArray[np.int64]:
    """For each record one of its label from another shard, whose source is no candidate; by a fixed draw.

    Where there is none, any of its own group, itself as likely as any other: that is chance too.
    """
    generator = np.random.default_rng(0)
    shards = np.unique([records.samples[identity][0] for identity in records.identities], return_inverse=True)[
        1
    ]
    found = np.arange(len(records.rows))
    for part in members(records.groups):
        found[part] = generator.permutation(part)
        elsewhere = np.flatnonzero(shards != shards[part[0]])
        for label in np.unique(records.labels[part]):
            others = elsewhere[records.labels[elsewhere] == label]
            if len(others):
                same = part[records.labels[part] == label]
                found[same] = generator.choice(others, len(same))
    return found


def _strata(records: Records) -> Iterator[tuple[str, NDArray[np.int64]]]:
    """Records by label and by t, where there are several and each has enough of them."""
    levels = np.array([row.t or "" for row in records.rows])
    for name, values in (("label", records.labels), ("t", levels)):
        there = np.unique(values[records.labels != NO_LABEL] if name == "label" else values)
        if 1 < len(there) <= 100:
            for value in there:
                at = np.flatnonzero(values == value)
                if len(at) >= _LEAST_OF_A_STRATUM:
                    yield f"{name}={value}", at
