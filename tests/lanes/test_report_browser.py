"""Reports in a real Chromium: nothing asked for, nothing complained of, and all of it usable without a mouse.

Needs playwright and axe-playwright-python (the extra `lanes`), and a Chromium: on PATH, or where CHROMIUM says.
Screenshots go to the folder that SCREENSHOTS names, if it does.
"""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from boomerang_batch.cli import main
from tests import worlds
from tests.lanes.processes import find_program

pytestmark = [pytest.mark.lane, pytest.mark.timeout(300)]

_OPTIONS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking")
_SERIOUS = ("serious", "critical")
_WIDTHS = {"wide": 1280, "narrow": 360}


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    fix = "apt-get install chromium, or set CHROMIUM to the path of one"
    program = (
        os.environ.get("CHROMIUM") or shutil.which("chromium-browser") or find_program("chromium", fix=fix)
    )
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=list(_OPTIONS))
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> dict[str, Path]:
    """Of a run that anonymizes, as published and as kept, and of one that varies; something failed in each."""
    folder = tmp_path_factory.mktemp("reports")
    samples = [dict(_fields(number)) for number in range(24)]
    samples[5] |= {"png": b"no image"}
    named = {f"photo-{number:02}": fields for number, fields in enumerate(samples)}
    manifest = worlds.save_samples(folder / "data", named)
    for purpose in ("anonymize", "augment"):
        out = folder / purpose
        worlds.run(worlds.recipe(tiny_model, purpose=purpose), manifest, out)
        places = [f"--private-dir={out}-private"] if purpose == "anonymize" else []
        result = CliRunner().invoke(main, ["report", str(out), f"--against={manifest}", *places])
        assert result.exit_code == 0, result.output
    return {
        "published": folder / "anonymize" / "report.html",
        "private": folder / "anonymize-private" / "report.html",
        "augment": folder / "augment" / "report.html",
    }


def _fields(number: int) -> list[tuple[str, bytes]]:
    return [(name.partition(".")[2], data) for name, data in worlds.sample_members("k", number)]


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A page, and what it asked for and complained of since."""

    page: Any
    requests: list[str]
    complaints: list[str]


@pytest.fixture
def opened(chromium: Any, request: pytest.FixtureRequest) -> Iterator[Callable[..., Opened]]:
    """Opens reports; afterwards none of them may have asked for or complained of anything."""
    every: list[tuple[Any, Opened]] = []

    def open_report(path: Path, **options: Any) -> Opened:
        context = chromium.new_context(**{"viewport": {"width": 1280, "height": 900}} | options)
        page = context.new_page()
        found = Opened(page=page, requests=[], complaints=[])
        every.append((context, found))
        page.on("request", lambda asked: found.requests.append(asked.url))
        page.on("console", lambda said: found.complaints.append(said.text))
        page.on("pageerror", lambda error: found.complaints.append(str(error)))
        page.goto(path.as_uri())
        return found

    yield open_report
    for context, found in every:
        asked = [url for url in found.requests if not url.startswith("data:")]
        context.close()
        assert len(asked) == 1, asked
        assert found.complaints == []


@pytest.fixture(params=["published", "private", "augment"])
def report(request: pytest.FixtureRequest, reports: dict[str, Path]) -> tuple[str, Path]:
    return request.param, reports[request.param]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", _WIDTHS)
def test_it_can_be_read_in_every_light_and_width(opened, report, scheme: str, width: str):
    name, path = report
    page = opened(path, color_scheme=scheme, viewport={"width": _WIDTHS[width], "height": 900}).page
    # Everything that is folded away is looked at too.
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response
    assert len(found["passes"]) > 20
    problems = [
        f"{one['id']} ({one['impact']}): {one['nodes'][0]['html'][:200]}"
        for one in found["violations"]
        if one["impact"] in _SERIOUS
    ]
    assert problems == []
    unsure = [one["id"] for one in found["incomplete"] if one["impact"] in _SERIOUS]
    assert set(unsure) <= {"color-contrast"}  # of text beside a picture it can't tell
    sideways = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert sideways <= 0
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = false; })")
    _keep(page, f"{name}-{width}-{scheme}")


def test_every_picture_and_curve_is_drawn(opened, report):
    page = opened(report[1]).page
    sizes = page.evaluate("[...document.images].map((one) => [one.complete, one.naturalWidth])")
    assert sizes
    assert all(done and width > 0 for done, width in sizes)
    lines = page.evaluate(
        "[...document.querySelectorAll('polyline')]"
        ".map((one) => [one.getBBox().width, getComputedStyle(one).stroke])"
    )
    assert all(width > 50 and colour != "none" for width, colour in lines)


def test_keys_move_a_slider_and_it_says_where_it_is(opened, reports):
    page = opened(reports["private"]).page
    slider = page.get_by_role("slider", name="Pair 1:").first
    after = page.locator("#worst .pair .after").first
    slider.focus()
    before = after.evaluate("(one) => getComputedStyle(one).clipPath")
    page.keyboard.press("End")
    assert slider.get_attribute("aria-valuetext") == "100 % before, 0 % after"
    assert after.evaluate("(one) => getComputedStyle(one).clipPath") != before
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    assert slider.get_attribute("aria-valuetext") == "1 % before, 99 % after"
    assert after.evaluate("(one) => getComputedStyle(one).clipPath") == "inset(0px 0px 0px 1%)"
    other = page.locator("#worst .pair .after").nth(1)
    assert other.evaluate("(one) => getComputedStyle(one).clipPath") == before


def test_one_slider_moves_all_and_a_drag_moves_one(opened, reports):
    page = opened(reports["private"]).page
    page.get_by_role("slider", name="All at once").first.focus()
    page.keyboard.press("Home")
    ranges = "[...document.querySelectorAll('#worst .pair input')].map((one) => one.value)"
    assert set(page.evaluate(ranges)) == {"0"}
    stack = page.locator("#worst .stack").first
    stack.scroll_into_view_if_needed()
    box = stack.bounding_box()
    page.mouse.move(box["x"] + 5, box["y"] + 20)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.8 * box["width"], box["y"] + 25, steps=4)
    page.mouse.up()
    moved = page.evaluate(ranges)
    assert abs(int(moved[0]) - 80) <= 1
    assert set(moved[1:]) == {"0"}


def test_a_keyboard_reaches_everything_and_shows_where_it_is(opened, reports):
    page = opened(reports["private"]).page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    reached = []
    for _ in range(200):
        page.keyboard.press("Tab")
        tag, shown = page.evaluate(
            "[document.activeElement.tagName, getComputedStyle(document.activeElement).outlineStyle]"
        )
        if tag == "BODY":
            break
        assert shown != "none"
        reached.append(tag)
    wanted = page.evaluate("document.querySelectorAll('nav a, input, summary').length")
    assert sum(tag in ("A", "INPUT", "SUMMARY") for tag in reached) == wanted


def test_without_javascript_both_pictures_stand_side_by_side(opened, reports):
    page = opened(reports["private"], java_script_enabled=False).page
    before = page.locator("#worst .before img").first.bounding_box()
    after = page.locator("#worst .after img").first.bounding_box()
    assert before["x"] + before["width"] <= after["x"]
    assert abs(before["y"] - after["y"]) < 1
    assert not page.locator("#worst input").first.is_visible()
    assert page.locator("#worst .name").first.is_visible()
    _keep(page, "private-without-javascript")


def test_on_paper_both_pictures_stand_side_by_side(opened, reports):
    page = opened(reports["private"]).page
    page.emulate_media(media="print")
    before = page.locator("#worst .before img").first.bounding_box()
    after = page.locator("#worst .after img").first.bounding_box()
    assert before["x"] + before["width"] <= after["x"]
    assert not page.locator("nav").is_visible()


def test_markup_that_got_in_could_do_nothing(opened, reports, tmp_path: Path):
    """The page's policy, tried: a script and a picture from elsewhere, put into a copy by force."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        elsewhere = f"http://127.0.0.1:{listener.getsockname()[1]}/x.png"
        injected = f"<script>document.title = 'taken over'</script><img src='{elsewhere}'>"
        path = tmp_path / "report.html"
        path.write_text(reports["private"].read_text().replace("</main>", f"{injected}</main>"))
        found = opened(path)
        found.page.wait_for_load_state("load")
        assert found.page.title().endswith("report")
        assert len(found.complaints) == 2
        assert all("Content Security Policy" in said for said in found.complaints)
        listener.settimeout(1)
        with pytest.raises(TimeoutError):
            listener.accept()
    # The browser tells of the request that it then did not make.
    found.complaints.clear()
    found.requests.remove(elsewhere)


def _keep(page: Any, name: str) -> None:
    folder = os.environ.get("SCREENSHOTS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)
