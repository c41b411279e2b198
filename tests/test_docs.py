"""The documents are true: the command reference is fresh, links lead somewhere, and what is named exists."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from boomerang_batch import errors, shipped
from boomerang_batch.cli.reference import commands, reference
from boomerang_batch.config.features import FEATURES
from boomerang_batch.config.messages import blocks_in
from boomerang_batch.config.pipeline import Recipe, parse_recipe
from boomerang_batch.data.provenance import SCHEMA, Marker
from boomerang_batch.models.families import FAMILIES
from boomerang_batch.run.record import RunRecord

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    path
    for pattern in (
        "*.md",
        "docs/**/*.md",
        "manifests/*.md",
        "benchmarks/**/*.md",
        "boomerang_batch/**/*.md",
        "k8s/*.md",
    )
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
    recipes += re.findall(r"`((?:demo|cifar10|imagenet|faces|photo)-[a-z]+)`", text)
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


# --- recipes.md ---

RECIPES = (ROOT / "docs" / "recipes.md").read_text()
REFERENCE, PRIVACY = RECIPES.split("\n## Privacy, field by field\n")


def names(cell):
    """The inline code in a cell of a table."""
    return re.findall(r"`([^`]+)`", cell)


def rows(text, columns):
    """The rows of every table of so many columns, without heading and rule."""
    cells = [re.split(r"(?<!\\) \| ", line.strip("| ")) for line in text.splitlines() if line.startswith("| ")]
    return [row for row in cells if len(row) == columns]


def fields_told():
    """What the page says of each field: its default as written, by dotted path."""
    return {
        name: default
        for field, default, _ in rows(REFERENCE, 3)
        for name in names(field)
        if set(names(field)) & set(FEATURES)
    }


def at(path):
    """A recipe's field, by dotted path."""
    block, found = Recipe, None
    for name in path.split("."):
        found = block.model_fields[name]
        block = next(blocks_in(found.annotation), None)
    return found


def test_every_field_of_a_recipe_is_explained_and_no_other():
    assert set(fields_told()) == set(FEATURES)
    explained = [name for field, *_ in rows(REFERENCE, 3) for name in names(field)]
    assert sorted(name for name in explained if name in FEATURES) == sorted(FEATURES), "each just once"


@pytest.mark.parametrize("path", [path for path in FEATURES if not path.startswith("t.")])
def test_every_default_is_the_one_that_is_told(path):
    told, field = fields_told()[path], at(path)
    if field.is_required():
        assert told == "required"
        return
    default = field.get_default(call_default_factory=True)
    default = list(default) if isinstance(default, tuple) else default
    assert yaml.safe_load(told.strip("`")) == default
    assert told.startswith("`"), "a default is written as code"


def test_the_privacy_of_every_field_is_told_as_the_code_states_it():
    told = {name: says for field, says in rows(PRIVACY, 2) for name in names(field)}
    assert told == {path: feature.says for path, feature in FEATURES.items()}


def known_paths(block=Recipe, prefix=""):
    """The dotted paths of all fields and blocks of a recipe."""
    found = set()
    for name, field in block.model_fields.items():
        found |= {prefix + name}.union(
            *(known_paths(part, f"{prefix}{name}.") for part in blocks_in(field.annotation))
        )
    return found


@page
def test_fields_of_recipes_that_are_named_exist(page):
    text = page.read_text()
    found = re.findall(r"`([a-z_]+(?:\.[a-z0-9_]+)+)(?:[:=][^`]*)?`", prose(text))
    blocks = {path.partition(".")[0] for path in known_paths() if "." in path}
    told = {path for path in found if path.partition(".")[0] in blocks}
    files = {path for path in told if path.endswith((".json", ".yaml", ".md", ".py"))}
    assert told - files - known_paths() == set()


EXAMPLES = [
    pytest.param(page, number, block, id=f"{page.name}-{number}")
    for page in (
        ROOT / "README.md",
        *(ROOT / "docs" / name for name in ("recipes.md", "models.md", "denoisers.md", "energies.md")),
    )
    for number, block in enumerate(re.findall(r"^```yaml\n(.*?)^```", page.read_text(), re.M | re.S))
]


@pytest.mark.parametrize(("page", "number", "block"), EXAMPLES)
def test_every_example_of_a_recipe_parses(page, number, block):
    example = yaml.safe_load(block)
    base = yaml.safe_load(re.search(r"^```yaml\n(.*?)^```", RECIPES, re.M | re.S)[1])
    whole = example if "name" in example else base | example
    parse_recipe(yaml.safe_dump(whole), source=f"{page.name}, example {number}")


def test_every_section_about_a_block_has_an_example():
    told = {name for *_, block in (param.values for param in EXAMPLES) for name in yaml.safe_load(block)}
    assert told >= {"t", "sampler", "passes", "model", "images", "upscale", "region", "fields", "batching"}


# --- models.md, benchmarks ---


def test_every_pipeline_that_loads_is_on_the_models_page_and_no_other():
    text = (ROOT / "docs" / "models.md").read_text()
    assert set(re.findall(r"`(\w+Pipeline)`", text)) == {name for name in FAMILIES if name}
    for family in FAMILIES.values():
        layout = family.layout
        wanted = {layout.network, layout.network_class, layout.autoencoder, *(name for name, _ in layout.text)}
        assert [name for name in wanted if name and name not in text] == []


@page
def test_benchmarks_that_are_named_exist(page):
    named = re.findall(r"benchmarks/(\w+\.py)", page.read_text())
    assert [name for name in named if not (ROOT / "benchmarks" / name).is_file()] == []


def test_decisions_are_numbered_without_gaps_and_titled_alike():
    pages = sorted((ROOT / "docs" / "decisions").glob("*.md"))
    for number, path in enumerate(pages, start=1):
        assert path.name.startswith(f"{number:04d}-")
        assert path.read_text().startswith(f"# {number}. ")
