"""A report as one HTML file that asks nobody for anything.

Style and script stand in it, pictures are data: URLs, and its policy lets the browser run this script and load
nothing else: markup that got in where it should not could do nothing. Without JavaScript sources and outputs
stand side by side; with it a slider lays one over the other. No clock: the same report gives the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

from boomerang_batch.report.chart import drawing, legend
from boomerang_batch.report.markup import Html, element, join, raw, shortened
from boomerang_batch.report.sections import Curve, Pair, Points, Report, Section, Table, Thumbnail, Verdict

_CRISP_BELOW = 96
_STYLE, _SCRIPT = (Path(__file__).with_name(name).read_text("utf-8") for name in ("page.css", "page.js"))


def render(report: Report) -> bytes:
    """The file's bytes."""
    links = (element("li", element("a", part.title, href=f"#{part.anchor}")) for part in report.sections)
    body = element(
        "body",
        element("a", "Skip to the findings", class_="skip", href="#findings"),
        _notice(report) if report.notice else None,
        element(
            "header",
            element("p", "A report by boomerang-batch", class_="kind"),
            element("h1", report.title),
            element("p", report.lead, class_="lead"),
            element("dl", *(_figure(what, much) for what, much in report.figures), class_="figures"),
            element("nav", element("ul", *links), aria_label="Sections"),
        ),
        element("main", *map(_section, report.sections), id="findings"),
        element("footer", *(element("p", line) for line in report.imprint)),
        element("script", raw(_SCRIPT)),
    )
    page = join(Html("<!doctype html>\n"), element("html", _head(report.title), body, lang="en"))
    return page.encode()


def _notice(report: Report) -> Html:
    kind = "notice private" if report.private else "notice"
    return element("div", element("p", report.notice), class_=kind, role="note")


def _head(title: str) -> Html:
    policy = (
        f"default-src 'none'; img-src data:; style-src {_digest(_STYLE)}; script-src {_digest(_SCRIPT)}; "
        "base-uri 'none'; form-action 'none'"
    )
    return element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="referrer", content="no-referrer"),
        element("meta", name="robots", content="noindex"),
        element("link", rel="icon", href="data:,"),
        element("title", f"{title} · report"),
        element("style", raw(_STYLE)),
    )


def _digest(code: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()}'"


def _figure(what: str, much: str) -> Html:
    return element("div", element("dt", what), element("dd", much))


def _section(section: Section) -> Html:
    name = section.anchor
    return element(
        "section",
        element("h2", section.title, id=f"{name}-heading"),
        element(
            "div",
            _verdict(section.verdict) if section.verdict else None,
            *(element("p", paragraph) for paragraph in section.prose),
            _pairs(section.pairs, name) if section.pairs else None,
            *(_curve(curve, f"{name}-curve-{number}") for number, curve in enumerate(section.curves, 1)),
            *map(_table, section.tables),
            *map(_points, section.points),
            *(
                element("details", element("summary", table.caption), _table(table))
                for table in section.details
            ),
            class_="content",
        ),
        id=name,
        aria_labelledby=f"{name}-heading",
    )


def _verdict(verdict: Verdict) -> Html:
    sign, kind = {True: ("✓", "fine"), False: ("▲", "look"), None: ("●", "open")}[verdict.fine]
    return element("p", element("span", sign, aria_hidden="true"), verdict.text, class_=f"verdict {kind}")


def _points(points: Points) -> Html:
    sentences = (element("li", sentence) for sentence in points.sentences)
    return join(element("h3", points.heading), element("ul", *sentences, class_="points"))


def _table(table: Table) -> Html:
    def cell(name: str, place: int, text: str, scope: str | None = None) -> Html:
        return element(name, text, scope=scope, class_=None if place < table.words else "number")

    head = element("tr", *(cell("th", place, name, "col") for place, name in enumerate(table.head)))
    rows = (
        element(
            "tr",
            element("th", row[0], scope="row"),
            *(cell("td", place, text) for place, text in enumerate(row[1:], 1)),
        )
        for row in table.rows
    )
    inside = element(
        "table",
        element("caption", table.caption),
        element("thead", head),
        element("tbody", *rows),
    )
    # What may scroll sideways must be reachable by keyboard.
    return element("div", inside, class_="table", role="group", tabindex=0, aria_label=table.caption)


def _curve(curve: Curve, name: str) -> Html:
    return element(
        "figure",
        element("figcaption", curve.title),
        element("p", curve.y, class_="y-name", aria_hidden="true"),
        drawing(curve, name=name),
        legend(curve),
        element("details", element("summary", "The numbers"), _table(curve.table)),
        class_="curve",
    )


def _pairs(pairs: tuple[Pair, ...], name: str) -> Html:
    both = any(pair.before for pair in pairs)
    shown = (element("li", _pair(pair, f"{name}-{number}", number)) for number, pair in enumerate(pairs, 1))
    pictures = element("ul", *shown, class_="pairs both" if both else "pairs single")
    if not both:
        return pictures
    return element("div", _slider("All at once", f"{name}-all", shown=True), pictures, class_="comparison")


def _pair(pair: Pair, name: str, number: int) -> Html:
    key = shortened(pair.key)
    sides = [_side(pair.after, f"Output {number}", None if pair.before is None else "after")]
    if pair.before is not None:
        sides = [_side(pair.before, f"Source of output {number}", "before"), *sides]
    caption = (element("span", shortened(note), class_="note") for note in pair.notes)
    return element(
        "figure",
        element("div", *sides, class_="stack"),
        _slider(f"Pair {number}", name) if pair.before is not None else None,
        element("figcaption", *caption, element("code", key, title=key)),
        class_="pair",
    )


def _side(picture: Thumbnail, alt: str, side: str | None) -> Html:
    image = element(
        "img",
        src=f"data:{picture.mime};base64,{base64.b64encode(picture.data).decode()}",
        alt=alt,
        width=picture.width,
        height=picture.height,
        class_="small" if max(picture.width, picture.height) < _CRISP_BELOW else None,
    )
    name = element("span", side, class_="name") if side else None
    return element("div", image, name, class_=f"side {side or ''}".strip())


def _slider(label: str, name: str, *, shown: bool = False) -> Html:
    """A slider over one pair, or over all. CSS shows it where JavaScript runs."""
    told = element("span", ": how much is before; the rest is after", class_="unseen" if shown else None)
    return element(
        "div",
        element("label", label, told, for_=f"{name}-range", class_=None if shown else "unseen"),
        element("span", "before", aria_hidden="true"),
        element("input", type="range", id=f"{name}-range", min=0, max=100, step=1, value=50),
        element("span", "after", aria_hidden="true"),
        class_="slider all" if shown else "slider",
    )
