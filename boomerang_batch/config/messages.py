"""A mistake in a recipe, told in one clear sentence: where it stands, what is wrong, what to write instead."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel

from boomerang_batch.config.forms import TAGS, T


def explain(problems: Sequence[Mapping[str, Any]], model: type[BaseModel]) -> str:
    """All of pydantic's problems with a `model`, in the user's words, a sentence for each mistake."""
    # A key that is missing because it was misspelt is one mistake, told at the misspelt one.
    misspelt = [
        (*path[:-1], _nearest(path, model))
        for path, kind in ((_path(problem), problem["type"]) for problem in problems)
        if kind == "extra_forbidden"
    ]
    told = (problem for problem in problems if problem["type"] != "missing" or _path(problem) not in misspelt)
    return "; ".join(_explain(problem, model) for problem in told)


def _path(problem: Mapping[str, Any]) -> tuple[str | int, ...]:
    return tuple(part for part in problem["loc"] if part not in TAGS)


def _explain(problem: Mapping[str, Any], model: type[BaseModel]) -> str:
    path = _path(problem)
    place, kind, given = _place(path), problem["type"], problem.get("input")
    if kind == "extra_forbidden":
        return _unknown_key(place, path, model)
    if kind == "missing":
        if path and isinstance(path[-1], int):
            return f"{_place(path[:-1])}: the list ends before its item {path[-1] + 1}"
        return f"{place} is missing"
    if kind == "model_type":
        if problem["ctx"]["class_name"] == T.__name__:
            return f"{place} needs its unit, for example t: {{fraction: 0.4}}; or timestep, sigma, snr"
        message = "must be a block of keys"
    elif kind in ("float_type", "int_type") and _is_number(given):
        written = "with a decimal point, like 1.0e-3" if kind == "float_type" else "as a whole number"
        return f"{place}: YAML reads {given} as text; write it {written}"
    elif kind in ("tuple_type", "dict_type"):
        message = "must be a list" if kind == "tuple_type" else "must be a block of keys"
    else:
        message = problem["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    shown = "" if isinstance(given, dict | BaseModel) else f" (given: {given!r})"
    return f"{place}: {message}{shown}" if place else message


def _unknown_key(place: str, path: Sequence[str | int], model: type[BaseModel]) -> str:
    near = _nearest(path, model)
    known = ", ".join(sorted(_block_at(path[:-1], model).model_fields))
    return f"unknown key {place}; " + (f"did you mean {near}?" if near else f"known: {known}")


def _nearest(path: Sequence[str | int], model: type[BaseModel]) -> str | None:
    """The known key that the unknown one at the end of `path` was probably meant to be."""
    known = sorted(_block_at(path[:-1], model).model_fields)
    return next(iter(difflib.get_close_matches(str(path[-1]), known, n=1, cutoff=0.5)), None)


def _block_at(path: Sequence[str | int], block: type[BaseModel]) -> type[BaseModel]:
    """The block to which `path` leads; steps into lists change nothing."""
    for name in path:
        if isinstance(name, str):
            block = next(blocks_in(block.model_fields[name].annotation))
    return block


def blocks_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The blocks that a field of this type may hold, unions and lists unfolded."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from blocks_in(part)


def _place(path: Sequence[str | int]) -> str:
    """The dotted path; a key may hold anything, a line break too, and the message is one line."""
    return ".".join(str(part) if str(part).isprintable() else repr(part) for part in path)


def _is_number(given: Any) -> bool:
    if not isinstance(given, str):
        return False
    try:
        float(given)
    except ValueError:
        return False
    return True
