"""What `translate.py` measures: curves of scores over the distance to the source. Not a benchmark itself."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import classifier
import numpy as np
import torch
from distance_by_t import squared_distance
from picture_scores import edge_overlap

from boomerang_batch.measures.intervals import Rate, bootstrap
from boomerang_batch.measures.likeness import ssim

RESAMPLES = 500


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Every measure (1 + T, N) of one arm: of the sources, which are its t = 0, and at each of its t."""

    distance: np.ndarray
    scores: dict[str, np.ndarray]
    """agreement (0 or 1), ssim, edges, found (0 or 1)."""

    def at(self, distance: float, score: str, chosen: np.ndarray) -> float:
        """A score's mean over `chosen` garments where their median distance is this; nan beyond the last t."""
        reached = np.maximum.accumulate(np.median(self.distance[:, chosen], axis=1))
        values = self.scores[score][:, chosen].mean(axis=1)
        return float(np.interp(distance, reached, values, right=np.nan))


def curve_of(judge: torch.nn.Module, made: np.ndarray, sources: np.ndarray, targets: np.ndarray) -> Curve:
    """Measure an arm's outputs, uint8 (T, N, 28, 28), of uint8 sources (N, 28, 28) that become targets (N,)."""
    rows = [sources, *made]
    scores = {
        "agreement": [classifier.predict(judge, row) == targets for row in rows],
        "ssim": [ssim(row[..., None], sources[..., None]) for row in rows],
        "edges": [edge_overlap(row, sources) for row in rows],
        "found": [found_again(row, sources, targets) for row in rows],
    }
    return Curve(
        distance=np.stack([squared_distance(row, sources) for row in rows]),
        scores={name: np.stack(values).astype(np.float64) for name, values in scores.items()},
    )


def found_again(made: np.ndarray, sources: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Whose own source (N,) is the nearest, pixel by pixel, of those that become the same."""
    found = np.zeros(len(made), dtype=bool)
    for index, image in enumerate(made):
        same = np.flatnonzero(targets == targets[index])
        apart = squared_distance(sources[same], np.broadcast_to(image, sources[same].shape))
        found[index] = same[apart.argmin()] == index
    return found


def points_of(
    curve: Curve, fractions: Sequence[float], evaluations: Sequence[int], chosen: np.ndarray
) -> list[dict[str, Any]]:
    """The curve's points in numbers, t = 0 first."""
    found = []
    for index, fraction in enumerate((0.0, *fractions)):
        hits = Rate(hits=float(curve.scores["agreement"][index, chosen].sum()), trials=len(chosen))
        found.append(
            {
                "t": fraction,
                "evaluations": evaluations[index - 1] if index else 0,
                "distance": float(np.median(curve.distance[index, chosen])),
                "agreement": {"value": hits.value, "low": hits.low, "high": hits.high},
                **{
                    name: float(curve.scores[name][index, chosen].mean()) for name in ("ssim", "edges", "found")
                },
            }
        )
    return found


def at_equal_distance(
    curves: Mapping[str, Curve], beside: Mapping[str, str], distance: float, chosen: np.ndarray
) -> list[dict[str, Any]]:
    """Every arm that comes so far: its scores there, and what they are above those of the arm `beside` it."""
    found = []
    for name, curve in curves.items():
        if math.isnan(curve.at(distance, "ssim", chosen)):
            continue
        line: dict[str, Any] = {"arm": name}
        for score in curve.scores:
            own = functools.partial(curve.at, distance, score)
            line[score] = _estimate(own, chosen)
            if name in beside:
                other = functools.partial(curves[beside[name]].at, distance, score)
                line[f"{score}_more"] = _estimate(lambda drawn, a=own, b=other: a(drawn) - b(drawn), chosen)
        found.append(line)
    return found


def _estimate(statistic: Callable[[np.ndarray], float], chosen: np.ndarray) -> dict[str, float]:
    found = bootstrap(lambda drawn: statistic(chosen[drawn]), len(chosen), resamples=RESAMPLES)
    return dataclasses.asdict(found)
