"""HTML that can't be broken by what stands in it: text is escaped unless it was made here.

Keys, file names and reasons come from other people's data. An `Html` is made by `element` alone; every other
string is text, whatever it looks like. What no HTML file may hold, such as NUL or half a surrogate pair, is
replaced, and what turns the direction of the text around is shown by number.
"""

from __future__ import annotations

import html
import re

_FORBIDDEN = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
_TURNING = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_VOID = frozenset({"br", "hr", "img", "input", "link", "meta", "path", "polyline", "line"})
_WITHIN_A_LINE = frozenset({"a", "b", "code", "label", "span", "td", "th"})


class Html(str):
    """Markup; anything put into `element` that is none is escaped."""

    __slots__ = ()


def escape(text: str) -> Html:
    """Text as it may stand between tags or in a quoted attribute."""
    if isinstance(text, Html):
        return text
    text = _TURNING.sub(lambda found: f"[U+{ord(found[0]):04X}]", _FORBIDDEN.sub("\ufffd", text))
    return Html(html.escape(text, quote=True))


def element(name: str, /, *children: str | None, **attributes: str | int | bool | None) -> Html:
    """An element. None as a child or a value, and False, are left out; True is a bare attribute.

    Attributes are written with hyphens for underscores, and without one at the end: `class_`, `aria_label`.
    """
    written = []
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        written.append(f" {key}" if value is True else f' {key}="{escape(str(value))}"')
    end = "" if name in _WITHIN_A_LINE else "\n"
    start = f"<{name}{''.join(written)}>"
    if name in _VOID:
        return Html(
            f"{start.removesuffix('>')}/>{end}" if name in ("path", "polyline", "line") else start + end
        )
    return Html(f"{start}{join(*children)}</{name}>{end}")


def join(*parts: str | None) -> Html:
    """Parts one after the other; None is left out."""
    return Html("".join(escape(part) for part in parts if part is not None))


def raw(code: str) -> Html:
    """Style or script of our own, which HTML does not escape. Raises ValueError if it could end its element."""
    if "</" in code:
        raise ValueError("style and script must hold no end tag")
    return Html(code)


def shortened(text: str, length: int = 160) -> str:
    """Text of at most so many characters, in one line; a cut shows."""
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"
