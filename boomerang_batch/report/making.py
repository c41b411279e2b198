"""What was run, for readers of two kinds: in words, and as the exact recipe and stack."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from boomerang_batch import __version__
from boomerang_batch.config.pipeline import Recipe
from boomerang_batch.report.facts import Facts
from boomerang_batch.report.sections import Section, Table
from boomerang_batch.report.words import how_far, noise, plural, walk_back

_ROWS = 200
_FOR = {
    "anonymize": "each to stand in for a picture of the input without giving it away",
    "augment": "each a variation of a picture of the input, to train on beside it",
    "enhance": "each a redrawn version of a picture of the input",
}


def lead(facts: Facts) -> str:
    """The report in two or three sentences."""
    recipe, seen = facts.recipe, facts.progress
    parts = [f"{plural(facts.outputs, 'new picture')}, {_FOR[recipe.purpose]}."]
    parts.append(
        f"Its source went {how_far(recipe)}; from there the model {_model(recipe)} drew the output"
        f"{_steps(facts)}."
    )
    if seen.shards and seen.done < seen.shards:
        parts.append(f"The run is not finished: {seen.done:,} of {plural(seen.shards, 'shard')} are done.")
    return " ".join(parts)


def section(facts: Facts) -> Section:
    """How it was made."""
    recipe = facts.recipe
    sigmas = [sigma for both in facts.sigmas.values() for sigma in both]
    prose = [f"Each source was covered with {noise(sigmas)}."] if sigmas else []
    prose.append(
        "What comes next knows the source by what is left of it, and by nothing else: the model draws a "
        f"picture that fits, step by step, {walk_back(recipe)}{_steps(facts)}."
    )
    if recipe.variants > 1 or recipe.passes.count > 1:
        prose.append(
            f"Of each source {plural(recipe.variants, 'variant')} were made, each by "
            f"{plural(recipe.passes.count, 'pass', 'passes')}."
        )
    if facts.untouched:
        prose.append(
            f"In {plural(facts.untouched, 'output')} the region to be redrawn was empty: they are as they were."
        )
    if facts.flagged:
        prose.append(f"The model's safety checker objects to {plural(facts.flagged, 'output')}.")
    prose.append(
        "The noise was drawn under a secret, without which nobody can draw it again."
        if facts.anonymize
        else f"The noise was drawn from the published seed {recipe.seed}: anybody can draw it again."
    )
    prose.append(_travels(recipe))
    stack = tuple(sorted(facts.record.stack.items()))
    more = facts.record.accepted_stacks
    return Section(
        anchor="making",
        title="How it was made",
        prose=tuple(prose),
        tables=(Table(caption="In figures", head=("Fact", "Value"), rows=tuple(_figures(facts)), words=9),),
        details=(
            Table(caption="The whole recipe", head=("Field", "Value"), rows=_flat(recipe.canonical()), words=9),
            Table(
                caption="Software and hardware" + (f", the first of {len(more) + 1}" if more else ""),
                head=("Part", "Version"),
                rows=stack,
                words=9,
            ),
        ),
    )


def imprint(facts: Facts) -> tuple[str, ...]:
    """What made the report, and of what."""
    record = facts.record
    return (
        f"Recipe {record.recipe_digest}",
        f"Model {record.model_digest}",
        f"Made by boomerang-batch {__version__} of what `boomerang-batch verify` checks. This page asks no "
        "server for anything.",
    )


def _figures(facts: Facts) -> Iterator[tuple[str, str]]:
    yield "Purpose", facts.recipe.purpose
    yield "Model", _model(facts.recipe)
    if facts.recipe.energy is not None:
        to = "away from each source" if facts.recipe.energy.toward is None else "to a class"
        yield "Led", f"{to}, by {facts.recipe.energy.source}"
    yield "How far", how_far(facts.recipe)
    if facts.evaluations:
        least, most = facts.evaluations
        yield "Steps of the model", f"{least:,}" if least == most else f"{least:,} to {most:,}"
    if len(facts.sizes) == 1:
        ((width, height),) = facts.sizes
        yield "Size of outputs", f"{width} × {height} pixels"
    elif facts.sizes:
        yield "Sizes of outputs", f"{len(facts.sizes):,} different ones" if len(facts.sizes) < 1000 else "many"
    yield "Device", facts.record.stack.get("device", "not told")
    for status, count in facts.progress.rows.items():
        yield f"Rows: {status}", f"{count:,}"


def _model(recipe: Recipe) -> str:
    return recipe.model.source.removeprefix("shipped:")


def _steps(facts: Facts) -> str:
    if not facts.evaluations:
        return ""
    least, most = facts.evaluations
    return f" in {plural(least, 'step')}" if least == most else f" in {least:,} to {most:,} steps"


def _travels(recipe: Recipe) -> str:
    listed = {name: action for name, action in recipe.fields.fields.items() if action != "drop"}
    listed |= {
        f"{name} of json": action for name, action in recipe.fields.json_keys.items() if action != "drop"
    }
    names = ", ".join(
        f"{name} (as a pseudonym)" if listed[name] == "pseudonymize" else name for name in sorted(listed)
    )
    if recipe.fields.default in ("keep", "pseudonymize") or (
        recipe.purpose != "anonymize" and recipe.fields.default is None
    ):
        return "Fields beside the picture travel with it."
    return (
        f"Beside the picture travels: {names}. All else was left behind."
        if names
        else "Nothing travels beside the picture."
    )


def _flat(recipe: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    rows = list(_leaves(recipe, ""))
    return tuple(rows[:_ROWS])


def _leaves(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for name in sorted(value):
            yield from _leaves(value[name], f"{path}.{name}" if path else str(name))
    else:
        yield path, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
