"""The recipe's energy: what leads samples, and where to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, model_validator

from boomerang_batch.config.blocks import ENTRY_POINT
from boomerang_batch.config.forms import Block, Scalar


class Toward(Block):
    """The class that an energy leads samples to."""

    label: int | None = Field(None, ge=0, description="the class that all are led to")
    field: str | None = Field(None, min_length=1, description="field that holds each sample's own class")

    @model_validator(mode="after")
    def _one_class(self) -> Toward:
        if (self.label is None) == (self.field is None):
            raise ValueError("toward is one of label and field")
        return self


class EnergySpec(Block):
    """What leads each step's estimate of the clean image, by the gradient of a classifier or an embedder."""

    source: str = Field(description="efficientnet-lite0, or entry-point:NAME of an installed one")
    options: Mapping[str, Scalar] = Field(
        default_factory=dict, description="what an entry point's factory is given"
    )
    toward: Toward | None = Field(None, description="the class, of a classifier, that samples are led to")
    away_from: Literal["source"] | None = Field(
        None, description="source: each sample is led to where an embedder no longer sees its own source in it"
    )
    scale: float = Field(gt=0, description="root mean square of a step's move, in units of the noise there")
    range: tuple[float, float] = Field(
        (0.0, 1.0), description="fractions of the noise chain, as t.fraction counts, between which it leads"
    )

    @model_validator(mode="after")
    def _parts_fit(self) -> EnergySpec:
        if (self.toward is None) == (self.away_from is None):
            raise ValueError("an energy leads somewhere: give one of toward and away_from")
        if self.options and not self.source.startswith(ENTRY_POINT):
            raise ValueError("options go to an entry point's factory; source names none, so remove them")
        low, high = self.range
        if not 0 <= low <= high <= 1:
            raise ValueError(f"range takes the lower and the higher end, both in 0..1; it is {low:g}, {high:g}")
        return self
