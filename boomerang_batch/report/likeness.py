"""How far the outputs that were looked at are from their sources, in pixels: the plainest measure there is.

Beside it stands what it comes to with a source that is not the output's own, of the same label where labels are
known. It is no attack worth the name and proves nothing; it puts the pairs in order and a scale under them.
"""

from __future__ import annotations

from collections.abc import Sequence

from boomerang_batch.report.pictures import Shown, difference
from boomerang_batch.report.sections import Curve, Line, Table
from boomerang_batch.report.words import percent

_SHARES = (
    (0.0, "least"),
    (0.05, "5 % are below"),
    (0.5, "half are below"),
    (0.95, "95 % are below"),
    (1.0, "most"),
)
_FEWEST = 8


def with_others(pairs: Sequence[Shown]) -> list[tuple[float, float]]:
    """For each pair whose output has another's source to be compared with: (to its own, to the other's)."""
    found = []
    for index, one in enumerate(pairs):
        following = (*pairs[index + 1 :], *pairs[:index])
        other = next((each for each in following if _comparable(one, each)), None)
        if one.difference is not None and other is not None and other.before is not None:
            found.append((one.difference, difference(other.before, one.after)))
    return found


def curve(compared: Sequence[tuple[float, float]]) -> Curve | None:
    """The distribution of both; None where there are too few to draw one."""
    if len(compared) < _FEWEST:
        return None
    own, other = (sorted(100 * pair[side] for pair in compared) for side in (0, 1))
    rows = tuple(
        (name, *(percent(_quantile(values, share) / 100) for values in (own, other))) for share, name in _SHARES
    )
    return Curve(
        title="How different outputs are from their own source, and from another's",
        x="difference in % of the whole range",
        y="share of outputs with at most that difference",
        lines=(_line("to its own source", own, other[-1]), _line("to another output's source", other, own[-1])),
        y_percent=True,
        table=Table(
            caption="Root mean square difference of pixels, as a share of the whole range",
            head=("Outputs", "To its own source", "To another's"),
            rows=rows,
        ),
    )


def _comparable(one: Shown, other: Shown) -> bool:
    return (
        other.before is not None
        and one.row.label == other.row.label
        and (one.shard, one.row.key) != (other.shard, other.row.key)
        and (one.source_key is None or one.source_key != other.source_key)
    )


def _line(name: str, values: Sequence[float], until: float) -> Line:
    points = [(0.0, 0.0), *((value, (rank + 1) / len(values)) for rank, value in enumerate(values))]
    return Line(name=name, points=(*points, (max(until, values[-1]), 1.0)), steps=True)


def _quantile(values: Sequence[float], share: float) -> float:
    return values[round(share * (len(values) - 1))]
