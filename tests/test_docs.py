"""The documents are true: the command reference is fresh, links lead somewhere, and what is named exists."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from boomerang_batch import errors, shipped
from boomerang_batch.cli.reference import commands, reference
from boomerang_batch.data.provenance import SCHEMA, Marker
from boomerang_batch.run.record import RunRecord

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "manifests/*.md", "benchmarks/**/*.md", "boomerang_batch/**/*.md")
    for path in ROOT.glob(pattern)
)

page = pytest.mark.parametrize("page", [pytest.param(path, id=str(path.relative_to(ROOT))) for path in PAGES])


def prose(text):
    """`text` without its code blocks."""
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(text):
    """The names a browser can jump to, one per heading."""
    headings = re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(path, text):
    """Relative links in `text`, standing at `path`, that lead nowhere."""
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        there = path.parent / name if name else path
        if not there.exists() or (anchor and anchor not in anchors(there.read_text() if name else text)):
            found.append(target)
    return found


def test_the_command_reference_is_what_help_says():
    assert (ROOT / "docs" / "cli.md").read_text() == reference(), "run `make docs`"


@pytest.mark.parametrize("context", list(commands()), ids=lambda context: context.command_path)
def test_every_command_says_what_it_does(context):
    assert context.command.help


@page
def test_relative_links_lead_somewhere(page):
    assert broken_links(page, page.read_text()) == []


def test_a_broken_link_is_found():
    text = "# A head\n[a](docs/nowhere.md) [b](#a-head) [c](#nothing) [d](README.md#none) [e](LICENSE)"
    assert broken_links(ROOT / "README.md", text) == ["docs/nowhere.md", "#nothing", "README.md#none"]


@page
def test_named_recipes_commands_and_targets_exist(page):
    text = page.read_text()
    recipes = re.findall(r"boomerang-batch (?:run|doctor) ([a-z0-9-]+)(?= |$|`|\n)", text)
    recipes += re.findall(r"pipelines/([a-z0-9-]+)\.yaml", text)
    recipes += re.findall(r"`((?:demo|cifar10|imagenet)-[a-z]+)`", text)
    assert set(recipes) <= set(shipped.names("pipelines"))

    known = {context.command_path.removeprefix("boomerang-batch").strip() for context in commands()}
    assert set(re.findall(r"boomerang-batch ([a-z]+)\b(?!-)", "\n".join(code(text)))) <= known

    targets = re.findall(r"^([.a-z]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"(?:^|\s)make ([a-z]+)\b", "\n".join(code(text)))) <= set(targets)


def code(text):
    """Code blocks and inline code, where commands stand."""
    return re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL) + re.findall(
        r"`([^`\n]+)`", prose(text)
    )


def test_the_readme_presents_every_shipped_recipe():
    readme = (ROOT / "README.md").read_text()
    assert [name for name in shipped.names("pipelines") if f"`{name}`" not in readme] == []


def test_the_readme_tells_every_exit_code():
    told = set(re.findall(r"^\| (\d+) \|", (ROOT / "README.md").read_text(), re.MULTILINE))
    raised = {kind.exit_code for kind in vars(errors).values() if isinstance(kind, type)}
    assert told == {str(code) for code in raised | {0}}


def section(heading):
    """A section of the output format's page, without its heading."""
    text = (ROOT / "docs" / "output-format.md").read_text()
    return re.split(r"^## ", text.split(f"\n## {heading}\n")[1], flags=re.MULTILINE)[0]


def test_the_output_format_lists_every_provenance_column():
    listed = re.findall(r"^\| `(\w+)` \| (\w+) \|", section("`<stem>.parquet`"), re.MULTILINE)
    assert listed == [(column.name, str(column.type)) for column in SCHEMA]


def test_the_output_format_lists_every_fact_of_marker_and_run_record():
    facts = {field.name for field in dataclasses.fields(Marker)}
    assert facts <= set(re.findall(r"`(\w+)`", section("`<stem>_stats.json`")))
    rows = re.findall(r"^\| (`.*?) \|", section("`run.json`"), re.MULTILINE)
    facts = {field.name for field in dataclasses.fields(RunRecord)}
    assert set(re.findall(r"`(\w+)`", " ".join(rows))) == facts | {"format_version"}
