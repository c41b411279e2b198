"""What an audit found: readings with their intervals, as audit.json keeps them and gates and reports read them.

Everything measured is a row of one table, so that a gate, a curve or a page needs to know no more than names.
No reading quotes a source: keys are those of OUT, which under anonymize are pseudonyms.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from boomerang_batch import storage
from boomerang_batch.errors import MeasureError

FORMAT_VERSION = 1
AUDIT_NAME = "audit.json"

OUTPUTS = "outputs"
"""The subject that gates judge; every other subject is a control."""
ALL = "all"
"""The stratum that holds every record audited."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One measured number with its 95 % interval."""

    measure: str
    """What: rank-1, auc, tar@far=0.01, one-to-one, psnr-db, fd, label-agreement and so on."""
    subject: str = OUTPUTS
    """Of what: the outputs, or a control such as `sources`, `unrelated`, `noise ceiling`; `secret known` is
    what the outputs are to whoever has the run's secret. A ceiling is that of its attacker alone, and of those
    of his readings that have its count: among other candidates it is another."""
    attacker: str = ""
    """Who links: `nearest`, `trained` or `re-run`."""
    features: str = ""
    """In which embedder's features; of labels that a given classifier told, its name."""
    stratum: str = ALL
    """Of which records: all, or those of one label or t."""
    value: float
    low: float | None = None
    high: float | None = None
    chance: float | None = None
    """What guessing comes to, where that is known."""
    count: int
    """Records it rests on."""

    @property
    def name(self) -> str:
        """All but the numbers, for a line of text."""
        parts = (self.measure, self.subject, self.attacker, self.features, self.stratum)
        return " · ".join(part for part in parts if part and part != ALL)


@dataclass(frozen=True, kw_only=True)
class Promise:
    """What the certified bound comes to for two candidates at one distance."""

    distance: str
    """Which: least or median of the audited sources, or the largest there can be."""
    delta: float
    """That distance, in the model's own space."""
    mu: float
    accuracy: float
    """The most any attack can be right that decides between the two, 0.5 to 1."""
    epsilon: float
    """With which the release is (epsilon, delta)-indistinguishable for the two, at `Bound.dp_delta`."""


@dataclass(frozen=True, kw_only=True)
class Bound:
    """The certified bound, or why there is none."""

    reasons: tuple[str, ...]
    """Why there is none, a sentence each; empty where there is one."""
    within: tuple[str, ...]
    """What is known of each record besides: the bound holds among records that agree in it."""
    notes: tuple[str, ...]
    observations: int
    sigmas: tuple[float, ...]
    """The noise of each observation, relative to the clean signal."""
    dp_delta: float
    promises: tuple[Promise, ...]


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """Which features were compared, or who told labels: its name, the digest of its weights, its licence."""

    name: str
    digest: str
    licence: str


@dataclass(frozen=True, kw_only=True)
class Case:
    """One output among the worst, by its key in OUT."""

    shard: str
    key: str
    variant: int
    says: str
    """What is bad about it, in words: `nearest to its own source of 100 in pixels`."""
    severity: float
    """To sort by, the worst highest."""


@dataclass(frozen=True, kw_only=True)
class Gate:
    """A limit and whether it held: the end of the interval on the bad side has to keep it."""

    gate: str
    limit: float
    reading: str
    value: float
    bad_end: float
    broken: bool


@dataclass(frozen=True, kw_only=True)
class Findings:
    """Everything one audit has to say."""

    name: str
    purpose: str
    recipe_digest: str
    model_digest: str
    noise_key_id: str
    audited: int
    """Outputs looked at."""
    outputs: int
    """Outputs there are."""
    embeddings: tuple[Embedding, ...]
    readings: tuple[Reading, ...]
    bound: Bound
    classifiers: tuple[Embedding, ...] = ()
    """Those that were given; on each embedder's features one is trained besides."""
    training: int = 0
    """The model's own training images that outputs were compared with."""
    holdout: int = 0
    """Real images that were no sources, by which was told what is near; 0: sources among themselves tell it."""
    unread: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """What of `training` and `holdout` could not be read, by which: pictures, and pieces of damaged shards."""
    worst: tuple[Case, ...] = ()
    warnings: tuple[str, ...] = ()
    gates: tuple[Gate, ...] = ()
    unjudged: tuple[str, ...] = ()
    """What limits had nothing to go by, a sentence each: they are neither kept nor broken."""

    def of(self, measure: str, subject: str = OUTPUTS, stratum: str = ALL) -> list[Reading]:
        """The readings of one measure, one for each attacker and embedder."""
        return [
            reading
            for reading in self.readings
            if (reading.measure, reading.subject, reading.stratum) == (measure, subject, stratum)
        ]

    def to_bytes(self) -> bytes:
        """The file's content: JSON, in which a number that is none is null."""
        data = {"format_version": FORMAT_VERSION, **dataclasses.asdict(self)}
        return (json.dumps(_finite(data), indent=1, allow_nan=False) + "\n").encode()


def load_findings(url: str) -> Findings:
    """The findings in a file. Raises MeasureError when it holds none, StorageError when it can't be read."""
    try:
        data = json.loads(storage.read_bytes(url))
        version = data.pop("format_version")
        if version != FORMAT_VERSION:
            raise MeasureError(f"{url} has format_version {version}; audit again with this release")
        return Findings(**{name: _restored(name, value) for name, value in data.items()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise MeasureError(f"{url} is no audit, as `audit` writes it: {error}") from error


_ROWS: Mapping[str, type] = {
    "readings": Reading,
    "embeddings": Embedding,
    "classifiers": Embedding,
    "worst": Case,
    "gates": Gate,
}


def _restored(name: str, value: Any) -> Any:
    if name in _ROWS:
        return tuple(_ROWS[name](**_numbers(row)) for row in value)
    if name == "bound":
        promises = tuple(Promise(**_numbers(row)) for row in value.pop("promises"))
        lists: dict[str, Any] = {
            key: tuple(part) if isinstance(part, list) else part for key, part in value.items()
        }
        return Bound(promises=promises, **lists)
    return tuple(value) if isinstance(value, list) else value


def _numbers(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as it was: of its numbers, those that must be there and were none are NaN again."""
    optional = {"low", "high", "chance"}
    return {name: math.nan if value is None and name not in optional else value for name, value in row.items()}


def _finite(data: Any) -> Any:
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, Mapping):
        return {name: _finite(value) for name, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return data
