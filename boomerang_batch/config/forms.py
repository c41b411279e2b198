"""Blocks of a recipe, and values that may be written in more than one form.

Where a value takes several forms (a number, {uniform: [low, high]}, {field: NAME}), its look decides which one
is meant before anything is checked, so that a mistake is told about that form alone instead of once for each.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

TAGS = frozenset(
    {"<number>", "<whole>", "<uniform>", "<field>", "<one>", "<list>", "<name>", "<switch>", "<text>"}
)
"""Names of forms. pydantic puts them into the path of a problem, where a user must not see them."""


class Block(BaseModel):
    """Strict, frozen, and closed: an unknown key is an error, never a silent default."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class Spread(Block):
    """A number drawn for each variant of each sample, uniformly between two."""

    uniform: tuple[float, float]

    @model_validator(mode="after")
    def _ascends(self) -> Spread:
        low, high = self.uniform
        if not 0 <= low < high:
            raise ValueError(
                f"uniform takes the lower and the higher end, both at least 0; it is {low:g}, {high:g}"
            )
        return self


class FromField(Block):
    """A number that each sample brings along, as text."""

    field: str = Field(min_length=1)


def _form(value: Any) -> str | None:
    if isinstance(value, Spread | FromField):
        return "<uniform>" if isinstance(value, Spread) else "<field>"
    if isinstance(value, Mapping):
        return {("uniform",): "<uniform>", ("field",): "<field>"}.get(tuple(value))
    return None if isinstance(value, list | tuple) else "<number>"


def _ends(check: Callable[[float], bool], needed: str) -> AfterValidator:
    """Refuse a Spread with an end that `check` does not accept."""

    def validate(spread: Spread) -> Spread:
        if not all(check(end) for end in spread.uniform):
            raise ValueError(f"both ends of uniform must be {needed}")
        return spread

    return AfterValidator(validate)


_FORMS = Discriminator(
    _form,
    custom_error_type="forms",
    custom_error_message="write a number, or {uniform: [low, high]} or {field: NAME} with nothing beside",
)
_Named = Annotated[FromField, Tag("<field>")]

Fraction = Annotated[
    Annotated[float, Field(ge=0, le=1), Tag("<number>")]
    | Annotated[Spread, _ends(lambda end: end <= 1, "in 0..1"), Tag("<uniform>")]
    | _Named,
    _FORMS,
]
Timestep = Annotated[
    Annotated[int, Field(ge=0), Tag("<number>")]
    | Annotated[Spread, _ends(float.is_integer, "whole numbers"), Tag("<uniform>")]
    | _Named,
    _FORMS,
]
Sigma = Annotated[
    Annotated[float, Field(ge=0), Tag("<number>")] | Annotated[Spread, Tag("<uniform>")] | _Named, _FORMS
]
Snr = Annotated[
    Annotated[float, Field(gt=0), Tag("<number>")]
    | Annotated[Spread, _ends(lambda end: end > 0, "above 0"), Tag("<uniform>")]
    | _Named,
    _FORMS,
]


class T(Block):
    """How far out to go, with its unit. Exactly one of the four.

    fraction of the training chain in [0, 1] (paper: t_Boom / T), timestep in 0..T as the paper counts it
    (timestep t uses array index t-1; 0 is the identity), sigma = noise std relative to the clean signal, or
    snr = 1 / sigma^2. The value is a number, {uniform: [low, high]} to draw it for each variant, or
    {field: NAME} to read it from each sample.
    """

    fraction: Fraction | None = None
    timestep: Timestep | None = None
    sigma: Sigma | None = None
    snr: Snr | None = None

    @model_validator(mode="after")
    def _exactly_one_unit(self) -> T:
        if len(self.model_fields_set) != 1 or None in self.unit:
            raise ValueError("t needs exactly one unit: fraction, timestep, sigma or snr")
        return self

    @property
    def unit(self) -> tuple[str, float | Spread | FromField]:
        """The unit's name and the value given."""
        (name,) = self.model_fields_set
        return name, getattr(self, name)

    @property
    def least_noise(self) -> tuple[str, float] | None:
        """(unit, value) of the least noise this can come to; None where a field says it."""
        name, value = self.unit
        if isinstance(value, Spread):
            return name, value.uniform[1 if name == "snr" else 0]
        return None if isinstance(value, FromField) else (name, value)


def one_or_list(value: Any) -> str:
    """The form of a value that may be one or a list."""
    return "<list>" if isinstance(value, list | tuple) else "<one>"


def _scalar(value: Any) -> str | None:
    forms = {bool: "<switch>", int: "<whole>", float: "<number>", str: "<text>"}
    return forms.get(type(value))


Scalar = Annotated[
    Annotated[bool, Tag("<switch>")]
    | Annotated[int, Tag("<whole>")]
    | Annotated[float, Tag("<number>")]
    | Annotated[str, Tag("<text>")],
    Discriminator(
        _scalar, custom_error_type="forms", custom_error_message="write true or false, a number or a text"
    ),
]


def matching(pattern: str, described: str) -> AfterValidator:
    """Refuse a text that does not match `pattern` as a whole, saying what it must be."""

    def validate(text: str | None) -> str | None:
        if text is not None and re.fullmatch(pattern, text) is None:
            raise ValueError(f"must be {described}")
        return text

    return AfterValidator(validate)
