"""report/panels: every measure of a sweep has its panel, and what is drawn is what was measured."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from boomerang_batch.audit.findings import Reading
from boomerang_batch.report import panels

SVG = "{http://www.w3.org/2000/svg}"
Element = ET.Element


def reading(measure: str, value: float, **more: object) -> Reading:
    given: dict[str, object] = {"low": value - 0.1, "high": value + 0.05, "count": 40}
    return Reading(measure=measure, value=value, **given | more)  # type: ignore[arg-type]


def linked(measure: str, value: float) -> Iterator[Reading]:
    """What two embedders and two attackers say."""
    for features in ("pixels", "pca"):
        for attacker, chance in (("nearest", 0.05), ("trained", 0.1)):
            yield reading(measure, value, features=features, attacker=attacker, chance=chance)


LEVELS = [
    (
        t,
        [
            *linked("rank-1", 0.9 - t / 2),
            reading("fd", 10 * t, features="pixels", low=None, high=None),
            reading("fd", 2000 * t, features="pca", low=None, high=None),
            reading("median-psnr-db", 40 - 20 * t, low=39 - 20 * t, high=41 - 20 * t),
            reading("certified@median", 1 - t / 4, low=None, high=None, chance=0.5),
            reading("beauty", t),
            reading("auc", math.nan, features="pixels"),
            reading("rank-10", 1.0, features="pixels", chance=1.0),
            reading("rank-1", 0.123, subject="sources", features="pixels"),
            reading("rank-1", 0.456, stratum="label=1", features="pixels"),
        ],
    )
    for t in (0.2, 0.4, 0.9)
]


def drawn(levels: Sequence[tuple[float, Sequence[Reading]]], name: str = "a recipe") -> Element:
    return ET.fromstring(panels.picture(levels, name=name, samples=40))


def panel(svg: Element, measure: str) -> Element:
    [found] = [part for part in svg.iter(f"{SVG}g") if part.get("data-measure") == measure]
    return found


def text(part: Element, name: str) -> str:
    found = part.find(f"{SVG}{name}")
    assert found is not None
    return " ".join((found.text or "").split())


def of_class(part: Element, name: str) -> list[Element]:
    return [one for one in part.iter() if name in (one.get("class") or "").split()]


def points(written: str) -> list[tuple[float, float]]:
    """Of a list of points, or of a path of straight lines."""
    numbers = [float(number) for number in re.findall(r"-?[0-9.]+", written)]
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def marks(part: Element) -> list[tuple[float, float]]:
    return [points(one.get("transform") or "")[0] for one in of_class(part, "mark")]


def test_every_measure_of_the_outputs_has_its_panel_and_controls_have_none():
    svg = drawn(LEVELS)
    names = [part.get("data-measure") for part in svg.iter(f"{SVG}g") if part.get("data-measure")]
    assert names == ["rank-1", "certified@median", "fd", "fd", "median-psnr-db", "beauty"]
    assert len(marks(panel(svg, "rank-1"))) == 3 * 4
    assert "12.3 %" not in (told := text(panel(svg, "rank-1"), "desc"))
    assert "45.6 %" not in told


def test_features_whose_scales_differ_share_no_axis():
    fds = [part for part in drawn(LEVELS).iter(f"{SVG}g") if part.get("data-measure") == "fd"]
    assert [text(part, "title").partition(":")[0] for part in fds] == ["FD, pixels", "FD, pca"]


def test_a_panel_tells_all_its_numbers():
    told = text(panel(drawn(LEVELS), "rank-1"), "desc")
    assert told.count("80 % (70 % to 85 %) at t 0.2; 70 % (60 % to 75 %) at t 0.4; 45 %") == 4
    assert "pca, trained: 80 %" in told
    assert "38 (37 to 39)" not in told
    assert text(panel(drawn(LEVELS), "median-psnr-db"), "desc").startswith("36 (35 to 37) at t 0.2; 32 (31")


def test_marks_stand_where_the_axes_say():
    part = panel(drawn(LEVELS), "median-psnr-db")
    # Two ticks of each axis give its scale; a label of y stands 4 below its line.
    x, y = ({(one.text or "").strip(): float(one.get(axis) or "") for one in of_class(part, kind)}
            for axis, kind in (("x", "middle"), ("y", "end")))  # fmt: skip
    for (t, readings), (across, down) in zip(LEVELS, marks(part), strict=True):
        [value] = [one.value for one in readings if one.measure == "median-psnr-db"]
        assert across == pytest.approx(x["0"] + t * (x["1"] - x["0"]), abs=0.2)
        assert down == pytest.approx(y["0"] - 4 + value / 10 * (y["10"] - y["0"]), abs=0.2)


def test_bands_hold_their_marks_and_stand_only_where_an_interval_is_known():
    part = panel(drawn(LEVELS), "rank-1")
    bands = [points(one.get("d") or "") for one in of_class(part, "band")]
    assert len(bands) == 4
    for band in bands:
        above, below = band[:3], band[:2:-1]
        for (x, y), (left, high), (right, low) in zip(marks(part)[:3], above, below, strict=True):
            assert x == left == right
            assert high < y < low
    assert not of_class(panel(drawn(LEVELS), "certified@median"), "band")


def test_each_attackers_own_chance_is_drawn_once():
    part = panel(drawn(LEVELS), "rank-1")
    heights = [{y for _, y in points(one.get("d") or "")} for one in of_class(part, "chance")]
    assert len(heights) == 2
    assert all(len(one) == 1 for one in heights)
    assert not of_class(panel(drawn(LEVELS), "median-psnr-db"), "chance")


def test_embedders_differ_in_colour_and_mark_and_attackers_in_dashes():
    lines = [one for one in panel(drawn(LEVELS), "rank-1").iter(f"{SVG}g") if of_class(one, "line")][1:]
    looks = [
        (line.get("class"), of_class(line, "mark")[0].get("d"), of_class(line, "line")[0].get("class"))
        for line in lines
    ]
    colours, shapes, dashes = zip(*looks, strict=True)
    assert colours == ("c1", "c1", "c2", "c2")
    assert shapes[0] == shapes[1] != shapes[2] == shapes[3]
    assert dashes == ("line by-1", "line by-2") * 2


def test_the_picture_speaks_to_those_who_can_not_see_it():
    svg = drawn(LEVELS)
    names = [part.get("id") for part in svg.iter() if part.get("id")]
    assert len(names) == len(set(names))
    spoken = [part for part in svg.iter() if part.get("aria-labelledby")]
    assert len(spoken) == 1 + 6
    assert {name for part in spoken for name in part.get("aria-labelledby", "").split()} == set(names)
    assert text(svg, "title") == "a recipe: every measure at 3 values of t"
    assert "40 samples" in text(svg, "desc")


def test_what_is_no_number_is_not_drawn():
    data = panels.picture(LEVELS, name="a recipe", samples=40).decode()
    assert not re.search(r"\bnan\b", data)
    assert "auc" not in data


def test_names_can_break_nothing():
    hostile = "<script>&\"']]>"
    levels = [(0.5, [dataclasses.replace(LEVELS[0][1][0], features=hostile, measure=hostile)])]
    svg = drawn(levels, name=hostile)
    assert text(svg, "title").startswith(hostile)
    assert not list(svg.iter(f"{SVG}script"))
    assert text(panel(svg, hostile), "title") == hostile
    assert text(panel(svg, hostile), "desc").startswith(hostile)


def test_nothing_measured_is_an_empty_picture():
    assert not of_class(drawn([]), "mark")


@pytest.mark.slow
@given(
    st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=12),
    st.sampled_from(["median-psnr-db", "median-fine-detail-db", "kd", "unheard-of"]),
)
def test_whatever_is_measured_stays_in_its_panel(values: list[float], measure: str):
    levels = [(at / 12, [reading(measure, value)]) for at, value in enumerate(values)]
    part = panel(drawn(levels), measure)
    assert len(marks(part)) == len(values)
    every = [*marks(part), *(point for band in of_class(part, "band") for point in points(band.get("d") or ""))]
    assert all(0 <= x <= 300 and 0 <= y <= 224 for x, y in every)


def variables(style: str) -> dict[str, str]:
    return dict(re.findall(r"(--[a-z0-9]+): (#[0-9a-f]+)", style))


def test_the_colours_are_those_of_a_reports_page_in_light_and_dark():
    home = Path(panels.__file__).parent
    ours, theirs = (
        (home / name).read_text().partition("@media print")[0].split("@media (prefers-color-scheme: dark)")
        for name in ("panels.css", "page.css")
    )
    for scheme in (0, 1):
        mine, page = variables(ours[scheme]), variables(theirs[scheme])
        assert {name: page[name] for name in ("--paper", "--ink", "--quiet", "--rule")}.items() <= mine.items()
        assert (mine["--c1"], mine["--c2"]) == (page["--accent"], page["--second"])
        assert set(re.findall(r"var\((--[a-z0-9]+)\)", "".join(ours))) <= set(mine)


def test_the_picture_asks_nobody_for_anything():
    data = panels.picture(LEVELS, name="a recipe", samples=40).decode()
    assert re.findall(r"https?:[^\"]*", data) == ["http://www.w3.org/2000/svg"]
    assert not re.search(r"url\(|@import|href|<script|<image|<foreignObject", data)
