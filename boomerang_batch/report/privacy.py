"""The privacy bound in words that a lawyer can read, with what it supposes, or why there is none.

Whether a bound may be claimed and under which suppositions is `config/accounting`'s to say; here it is written
out. The figures need the noise that was really laid over the sources, which provenance tells.
"""

from __future__ import annotations

import math
from statistics import NormalDist

from boomerang_batch.audit.findings import Bound, Findings
from boomerang_batch.config.accounting import Accounting, account, mu
from boomerang_batch.measures.bound import two_candidate_accuracy
from boomerang_batch.report.facts import Facts
from boomerang_batch.report.sections import Curve, Line, Points, Section, Table, Verdict
from boomerang_batch.report.words import number, percent, plural, sentence

_RIGHT = (0.55, 0.6, 0.75, 0.9, 0.99)
_CURVE_POINTS = 61


def section(facts: Facts, findings: Findings | None = None) -> Section:
    """What can be said about the privacy of the outputs; an audit knows how far its sources are apart."""
    accounting = account(facts.recipe)
    sigmas = observations(facts, accounting)
    if reasons := _reasons(accounting, findings):
        return _uncertified(facts, accounting, reasons)
    if sigmas is None:
        return _without_figures(accounting)
    return _certified(accounting, sigmas, findings.bound if findings else None)


def observations(facts: Facts, accounting: Accounting) -> tuple[float, ...] | None:
    """The least noise of each observation among all outputs; None where not all are told."""
    if set(facts.sigmas) != set(range(accounting.observations)):
        return None
    return tuple(low for low, _ in facts.sigmas.values())


def in_short(facts: Facts, findings: Findings | None) -> tuple[str, str]:
    """The same as one figure: (what, how much)."""
    if _reasons(account(facts.recipe), findings):
        return "Proven bound", "none"
    told = {one.distance: one.accuracy for one in findings.bound.promises} if findings else {}
    return ("Right, at most", percent(told["median"])) if "median" in told else ("A bound is", "proven")


def _reasons(accounting: Accounting, findings: Findings | None) -> tuple[str, ...]:
    """Why there is no bound: what the recipe tells, and what an audit has found besides."""
    found = findings.bound.reasons if findings else ()
    return tuple(dict.fromkeys((*accounting.reasons, *found)))


def _certified(accounting: Accounting, sigmas: tuple[float, ...], audited: Bound | None) -> Section:
    # All observations together are one with this noise.
    combined = 1 / mu(1.0, sigmas) if min(sigmas) > 0 else 0.0
    normal = NormalDist()
    rows = tuple((percent(right), number(2 * combined * normal.inv_cdf(right))) for right in _RIGHT)
    prose = (
        "A bound that is proven limits every method of telling where an output came from, known or not yet "
        "invented, with any computer. It does not rest on tests. It holds as long as what it supposes is true, "
        "which is listed below.",
        "It answers this question. Somebody holds an output and two candidate pictures, and knows that one of "
        "the two was its source. How often can they be right about which? By guessing half of the time. With "
        "the best possible method, never more often than the curve says. It depends on how different the two "
        "candidates are: the more they differ, the better they can be told apart.",
        f"The noise laid over each source was at least {number(min(sigmas))} times its scale"
        + (
            "."
            if len(sigmas) == 1
            else f", and {plural(len(sigmas), 'output')} were made of each, each under noise of its own: "
            f"together they show as much as one under noise of {number(combined)}."
        ),
        "Where the curve comes close to 100 % the bound promises nothing. That is no finding that sources can "
        "be told, but neither a promise that they can't: then only measuring shows how far outputs can be "
        "linked, and only for the methods that were tried.",
    )
    within: tuple[str, ...] = (
        "The two candidates are alike in all that is known of a record besides its picture: "
        f"{', '.join(accounting.within)}. What these give away the bound does not count.",
    )
    if accounting.region_only:
        within += ("It covers the region alone. All outside it is published as it was.",)
    return Section(
        anchor="privacy",
        title="What is promised",
        verdict=Verdict(fine=None, text="A bound is proven; how much it promises depends on the candidates"),
        prose=prose,
        curves=(_curve(combined, rows),) if combined > 0 and math.isfinite(combined) else (),
        tables=(_promises(audited),) if audited and audited.promises else (),
        points=(
            Points(heading="What the bound is about", sentences=within),
            Points(heading="What it supposes, and what it leaves out", sentences=accounting.notes),
        ),
    )


def _promises(bound: Bound) -> Table:
    return Table(
        caption="For the sources that were audited. Epsilon is that of differential privacy for two candidates "
        f"at that distance, at delta {bound.dp_delta:g}.",
        head=("Two candidates", "Their distance", "Right answers, at most", "Epsilon"),
        rows=tuple(
            (f"at the {one.distance} distance", number(one.delta), percent(one.accuracy), number(one.epsilon))
            for one in bound.promises
        ),
    )


def _curve(combined: float, rows: tuple[tuple[str, str], ...]) -> Curve:
    furthest = 6 * combined
    points = tuple(
        (distance, two_candidate_accuracy(distance / combined))
        for distance in (furthest * index / (_CURVE_POINTS - 1) for index in range(_CURVE_POINTS))
    )
    return Curve(
        title="How often the best possible method tells the source from another picture",
        x="distance between the two candidates",
        y="right answers, at most",
        lines=(Line(name="the bound", points=points),),
        y_percent=True,
        y_from=0.5,
        table=Table(
            caption="Distance: the root of the summed squared differences of all numbers the model works on. "
            "These are pixels from -1 to 1 (or 0 to 1, where it was trained so), or an autoencoder's latents.",
            head=("Right answers, at most", "if the candidates' distance is at most"),
            rows=rows,
        ),
    )


def _uncertified(facts: Facts, accounting: Accounting, reasons: tuple[str, ...]) -> Section:
    meant = facts.anonymize
    prose = (
        "No bound is proven for these outputs. That is no finding that their sources can be told; it means "
        "that nothing is promised, and that what was measured is all there is to go by."
        if meant
        else f"The purpose of this run is to {facts.recipe.purpose}. Its outputs are not anonymous: treat them "
        "like their sources.",
    )
    points: tuple[Points, ...] = (
        Points(heading="Why there is no bound", sentences=tuple(map(sentence, reasons))),
    )
    if meant:
        points += (Points(heading="What is known besides", sentences=(f"{', '.join(accounting.within)}.",)),)
    return Section(
        anchor="privacy",
        title="What is promised",
        verdict=Verdict(fine=False if meant else None, text="No certified bound"),
        prose=prose,
        points=points,
    )


def _without_figures(accounting: Accounting) -> Section:
    return Section(
        anchor="privacy",
        title="What is promised",
        verdict=Verdict(fine=False, text="A bound would hold, but no output tells its noise yet"),
        prose=("The figures follow from the noise that was laid over each source, which provenance tells.",),
        points=(Points(heading="What it would suppose, and leave out", sentences=accounting.notes),),
    )
