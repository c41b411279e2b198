"""The report: whole and self-contained, nothing of a source in OUT's, and no way out of its quotes."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import html
import io
import itertools
import json
import math
import re
import shutil
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from boomerang_batch import storage
from boomerang_batch.audit.findings import Bound, Case, Findings, Gate, Promise, Reading
from boomerang_batch.cli import main
from boomerang_batch.config.accounting import account
from boomerang_batch.data.provenance import read_rows
from boomerang_batch.measures.bound import two_candidate_accuracy
from boomerang_batch.report import chart, failures, measured, privacy, timeline, words
from boomerang_batch.report.build import REPORT_NAME, build
from boomerang_batch.report.facts import read_facts
from boomerang_batch.report.markup import element, escape, join, raw, shortened
from boomerang_batch.report.page import render
from boomerang_batch.report.pictures import SIDE, Album, Shown, look
from boomerang_batch.report.sections import Curve, Line, Table
from tests import worlds

HOSTILE = "<script>alert(1)<!-- \"'&"
MARK = "zqCanary"
VOID = {"meta", "link", "img", "input", "br", "hr", "line", "polyline", "path"}


class Page(HTMLParser):
    """A report as the standard library reads it: every element, and the text by the section it stands in."""

    def __init__(self, data: bytes) -> None:
        super().__init__(convert_charrefs=True)
        self.source = data.decode()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.section = ""
        self.text: dict[str, str] = {}
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "section":
            self.section = dict(attrs)["id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "section":
            self.section = ""

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text[self.section] = f"{self.text.get(self.section, '')} {data.strip()}".lstrip()

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def words(self) -> str:
        return " ".join("\n".join(self.text.values()).split())

    @property
    def pictures(self) -> list[bytes]:
        return [base64.b64decode(image["src"].partition(",")[2]) for image in self.all("img")]

    @property
    def without_times(self) -> str:
        return re.sub(r'<section id="timeline".*?</section>', "", self.source, flags=re.DOTALL)


def command(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["report", *map(str, words)])
    return result.exit_code, result.output


def page(path: Path) -> Page:
    return Page(path.read_bytes())


def save_marked(folder: Path, *, samples: int = 6) -> Path:
    """Two shards with marks in every name; one image is broken."""
    shards = []
    for shard in range(2):
        numbers = range(shard * samples, (shard + 1) * samples)
        members = [worlds.sample_members(f"{MARK}-key-{number}", number) for number in numbers]
        if shard == 0:
            members[1][0] = (members[1][0][0], f"no image, {MARK}".encode())
        shards.append(dict_of(members))
    manifest = worlds.save_samples(folder, *shards)
    for path in sorted(folder.glob("s-*.tar")):
        path.rename(folder / f"{MARK}-{path.name}")
    manifest.write_text(f"format_version: 1\nname: tiny\nshards: ['{MARK}-s-{{000..001}}.tar']\n")
    return manifest


def dict_of(samples: list[list[tuple[str, bytes]]]) -> dict[str, dict[str, bytes]]:
    found = {}
    for members in samples:
        key = members[0][0].partition(".")[0]
        found[key] = {name.partition(".")[2]: data for name, data in members}
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class World:
    manifest: Path
    out: Path
    private: Path


@pytest.fixture(scope="module")
def anonymized(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> World:
    """A run of 12 samples, one of which failed, with both its reports."""
    folder = tmp_path_factory.mktemp("anonymized")
    manifest = save_marked(folder / f"{MARK}-data")
    worlds.run(worlds.recipe(tiny_model), manifest, folder / "out")
    world = World(manifest=manifest, out=folder / "out", private=folder / "out-private")
    code, said = command(world.out, "--private-dir", world.private)
    assert (code, said.split()) == (0, [str(world.private / REPORT_NAME), str(world.out / REPORT_NAME)])
    return world


@pytest.fixture(scope="module")
def augmented(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> World:
    """A run that keeps names, some of them hostile, with pairs in its report."""
    folder = tmp_path_factory.mktemp("augmented")
    samples = {f"{HOSTILE}{n}": dict(worlds_fields(n)) for n in range(10)}
    samples[f"{HOSTILE}bad"] = dict(worlds_fields(10)) | {"png": b"none", "cls": b"1"}
    manifest = worlds.save_samples(folder / "data", samples)
    worlds.run(worlds.recipe(tiny_model, "variants=2", purpose="augment"), manifest, folder / "out")
    code, said = command(folder / "out", "--against", manifest)
    assert (code, said.strip()) == (0, str(folder / "out" / REPORT_NAME))
    return World(manifest=manifest, out=folder / "out", private=folder / "none")


def worlds_fields(number: int) -> list[tuple[str, bytes]]:
    return [(name.partition(".")[2], data) for name, data in worlds.sample_members("k", number)]


# Markup


@given(st.text())
def test_whatever_is_escaped_is_read_as_text(text: str):
    written = element("p", text, title=text)
    read = Page(written.encode())
    assert [tag for tag, _ in read.elements] == ["p"]
    assert read.open == []
    expected = html.unescape(escape(text))
    assert read.elements[0][1]["title"] == expected
    # What an HTML parser makes of it must be what was meant, but for what no page may hold.
    kept = [one for one in text if one.isprintable() and ord(one) not in (0xFFFD,) and not _turns(one)]
    assert Counter(kept) <= Counter(expected)


def _turns(character: str) -> bool:
    return bool(re.match("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]", character))


@pytest.mark.parametrize("code", [0x00, 0x0B, 0x1B, 0x7F, 0x9B, 0xD800, 0xFDD0, 0xFFFE])
def test_what_no_page_may_hold_is_replaced(code: int):
    assert escape(f"a{chr(code)}b") == "a\ufffdb"


def test_text_that_turns_the_direction_shows_that_it_does():
    assert escape("cat\u202egnp.exe") == "cat[U+202E]gnp.exe"


def test_markup_stays_and_none_is_left_out():
    assert join(element("b", "<"), None, "<") == "<b>&lt;</b>&lt;"
    assert (
        element("input", type="range", hidden=True, disabled=False, id=None) == '<input type="range" hidden>\n'
    )


def test_style_and_script_can_not_end_themselves():
    with pytest.raises(ValueError, match="end tag"):
        raw("a </script> b")


def test_shortened_text_is_one_line_and_shows_its_cut():
    assert shortened("a\n b  c") == "a b c"
    assert shortened("x" * 200, 10) == "x" * 9 + "…"


# Curves and words


@given(st.floats(-1e6, 1e6), st.floats(0, 1e6))
def test_ticks_are_few_and_span_what_they_should(low: float, width: float):
    found = chart.ticks(low, low + width)
    assert found == sorted(set(found))
    assert 2 <= len(found) <= 9
    slack = 1e-6 * max(abs(low), width, 1)
    assert found[0] <= low + slack
    assert found[-1] >= low + width - slack


@given(
    st.lists(st.tuples(st.floats(0, 1e9), st.floats(0, 1e9)), min_size=1, max_size=600),
    st.booleans(),
)
def test_a_curve_stays_in_its_frame(points: list[tuple[float, float]], steps: bool):
    line = Line(name="a line", points=tuple(sorted(points)), steps=steps)
    table = Table(caption="", head=(), rows=())
    svg = chart.drawing(Curve(title="<t>", x="x", y="y", lines=(line,), table=table), name="c")
    (drawn,) = re.findall(r'points="([^"]*)"', svg)
    places = [tuple(map(float, place.split(","))) for place in drawn.split()]
    assert 1 <= len(places) <= 600
    assert all(0 <= x <= chart.WIDTH and 0 <= y <= chart.HEIGHT for x, y in places)
    assert "&lt;t&gt;" in svg


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0.0, "0 %"),
        (1.0, "100 %"),
        (0.5, "50 %"),
        (0.1234, "12.3 %"),
        (1e-9, "less than 0.1 %"),
        (1 - 1e-9, "more than 99.9 %"),
    ],
)
def test_a_share_is_never_rounded_to_all_or_nothing(share: float, text: str):
    assert words.percent(share) == text


@pytest.mark.parametrize(
    ("t", "told"),
    [
        ("t.fraction=0.85", "85 % of the way"),
        ("t.timestep=400", "timestep 400"),
        ("t.sigma={uniform: [1, 2.5]}", "1 to 2.5, drawn for each output"),
        ("t.snr={field: hint}", "what each sample's field hint says"),
    ],
)
def test_t_is_told_in_its_own_unit(tiny_model: Path, t: str, told: str):
    assert told in words.how_far(worlds.recipe(tiny_model, t))


# The page


@pytest.fixture(params=["out", "private", "augmented"])
def each(request: pytest.FixtureRequest, anonymized: World, augmented: World) -> Page:
    homes = {"out": anonymized.out, "private": anonymized.private, "augmented": augmented.out}
    return page(homes[request.param] / REPORT_NAME)


@pytest.mark.slow
def test_the_page_is_whole_and_has_its_landmarks(each: Page):
    assert each.open == []
    assert each.source.startswith("<!doctype html>")
    assert each.all("html") == [{"lang": "en"}]
    for tag in ("header", "nav", "main", "footer", "h1"):
        assert len(each.all(tag)) == 1
    assert [title for title in each.all("title") if "id" not in title] == [{}]  # those of curves have names
    levels = [int(tag[1]) for tag, _ in each.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert all(below - above <= 1 for above, below in itertools.pairwise(levels))


def test_every_name_is_unique_and_every_reference_leads_to_one(each: Page):
    names = [attributes["id"] for _, attributes in each.elements if "id" in attributes]
    assert len(names) == len(set(names))
    wanted = [link["href"].removeprefix("#") for link in each.all("a")]
    wanted += [label["for"] for label in each.all("label")]
    for _, attributes in each.elements:
        wanted += (attributes.get("aria-labelledby") or "").split()
    assert wanted
    assert set(wanted) <= set(names)


def test_whatever_is_shown_or_moved_has_a_name(each: Page):
    labels = {label["for"] for label in each.all("label")}
    assert {field["id"] for field in each.all("input")} == labels
    assert all(image["alt"] for image in each.all("img"))
    assert all(table is not None for table in each.all("table"))
    assert len(each.all("caption")) == len(each.all("table"))
    assert all("aria-labelledby" in svg or svg.get("aria-hidden") for svg in each.all("svg"))
    heads = each.all("th")
    assert {head["scope"] for head in heads} == {"col", "row"}


def test_the_page_asks_nobody_for_anything(each: Page):
    for tag, attributes in each.elements:
        for name, value in attributes.items():
            assert not name.startswith("on")
            assert name not in ("style", "srcset", "action", "formaction", "ping", "poster", "background")
            if name in ("href", "src"):
                assert value.startswith(("#", "data:image/", "data:,")), (tag, value)
    assert {tag for tag, _ in each.elements}.isdisjoint({"iframe", "object", "embed", "base", "form", "audio"})
    assert "@import" not in each.source
    assert not re.search(r"url\(|https?:|//[a-z]", re.sub(r"base64,[^\"]*", "", each.source))


def test_its_policy_allows_its_own_style_and_script_alone(each: Page):
    (policy,) = [meta["content"] for meta in each.all("meta") if meta.get("http-equiv")]
    rules = dict(rule.split(None, 1) for rule in policy.split("; "))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert rules["img-src"] == "data:"
    for tag in ("style", "script"):
        (code,) = re.findall(rf"<{tag}>(.*?)</{tag}>", each.source, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
        assert rules[f"{tag}-src"] == f"'sha256-{digest}'"


def test_every_curve_has_its_numbers_in_a_table(each: Page):
    curves = [attributes for tag, attributes in each.elements if attributes.get("class") == "curve"]
    assert curves
    assert each.source.count("<summary>The numbers</summary>") == len(curves)


def test_every_slider_stands_at_a_pair(each: Page):
    pairs = sum(attributes.get("class") == "side before" for _, attributes in each.elements)
    groups = sum(attributes.get("class") == "comparison" for _, attributes in each.elements)
    assert len(each.all("input")) == pairs + groups


# What it tells


def test_the_report_in_out_tells_nothing_of_a_source(anonymized: World):
    data = (anonymized.out / REPORT_NAME).read_bytes()
    read = Page(data)
    assert MARK.lower() not in data.decode().lower()
    assert str(anonymized.private) not in data.decode()
    assert str(anonymized.out) not in data.decode()
    assert worlds.SECRET not in data.decode()
    sources = {Image.open(io.BytesIO(worlds.png(number))).tobytes() for number in range(12)}
    shown = {Image.open(io.BytesIO(picture)).tobytes() for picture in read.pictures}
    assert len(shown) > 8
    assert not sources & shown
    assert not read.all("input")
    assert not any("before" in (attributes.get("class") or "") for _, attributes in read.elements)
    # Keys, and nothing else that looks like one.
    keys = {row.key for path in anonymized.out.glob("*.parquet") for row in read_rows(path)}
    stems = set(read_facts(str(anonymized.out)).record.shards)
    told = set(re.findall(r"\b[0-9a-f]{16,32}\b", read.words))
    assert told
    assert told <= keys | stems


def test_the_private_report_shows_and_names_sources(anonymized: World):
    read = page(anonymized.private / REPORT_NAME)
    sources = {Image.open(io.BytesIO(worlds.png(number))).tobytes() for number in range(12) if number != 1}
    shown = {Image.open(io.BytesIO(picture)).convert("L").tobytes() for picture in read.pictures}
    assert sources <= shown
    assert f"source {MARK}-key-0" in read.words
    assert f"{MARK}-key-1" in read.text["failures"]  # the one that failed, by its name
    assert f"{MARK}-s-000.tar" in read.text["failures"]
    assert "Private." in read.words


def test_every_pair_is_an_output_and_its_own_source(anonymized: World):
    facts = read_facts(str(anonymized.out))
    from boomerang_batch.report.sources import find_sources

    known = find_sources(facts, out=str(anonymized.out), private_dir=str(anonymized.private), manifest=None)
    album = look(str(anonymized.out), facts.recipe, facts.done, known)
    assert len(album.shown) == 11
    for one in album.shown:
        number = int(one.source_key.rpartition("-")[2])
        assert (one.before[..., 0] == worlds.pixels(worlds.png(number))).all()
        assert (one.after[..., 0] == worlds.image_of(worlds.outputs(anonymized.out)[one.row.key])).all()


def test_worst_cases_come_first(anonymized: World, augmented: World):
    def told(world: Path) -> list[float]:
        text = page(world / REPORT_NAME).text["worst"]
        return [float(found) for found in re.findall(r"([0-9.]+) % different", text)]

    alike, apart = told(anonymized.private), told(augmented.out)
    assert len(alike) == 11
    assert alike == sorted(alike)
    assert len(apart) == 12
    assert apart == sorted(apart, reverse=True)


def test_hostile_names_stay_names(augmented: World):
    read = page(augmented.out / REPORT_NAME)
    assert len(read.all("script")) == 1
    assert "<script>alert" not in read.source
    assert f"{HOSTILE}3" in read.words
    assert f"{HOSTILE}bad" in read.text["failures"]


def test_a_hostile_run_record_stays_text(augmented: World, tmp_path: Path):
    out = tmp_path / "out"
    shutil.copytree(augmented.out, out)
    record = json.loads((out / "run.json").read_text())
    record["recipe"]["model"]["source"] = HOSTILE
    record["stack"] |= {HOSTILE: HOSTILE}
    (out / "run.json").write_text(json.dumps(record))
    assert command(out)[0] == 0
    read = page(out / REPORT_NAME)
    assert len(read.all("script")) == 1
    assert read.words.count(HOSTILE) > 3


def test_a_run_record_whose_recipe_is_none_is_refused(augmented: World, tmp_path: Path):
    out = tmp_path / "out"
    shutil.copytree(augmented.out, out)
    record = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps(record | {"name": HOSTILE}))
    code, said = command(out)
    assert code == 1
    assert "no recipe that this release knows" in said


def test_failures_are_counted_by_reason(anonymized: World, augmented: World):
    for world in (anonymized, augmented):
        rows = [row for path in world.out.glob("*.parquet") for row in read_rows(path)]
        counted = Counter((row.status, row.reason) for row in rows if row.reason)
        facts = read_facts(str(world.out))
        assert facts.reasons == counted
        assert counted
        text = page(world.out / REPORT_NAME).text["failures"]
        assert all(reason in text for _, reason in counted)


def test_sentences_that_may_quote_an_input_are_left_out_under_anonymize(anonymized: World, augmented: World):
    assert "What is said" not in page(anonymized.out / REPORT_NAME).words
    assert "What is said" in page(anonymized.private / REPORT_NAME).words
    assert "What is said" in page(augmented.out / REPORT_NAME).words


def test_what_was_mended_counts_no_more(augmented: World, tiny_model: Path, tmp_path: Path):
    out, data = tmp_path / "out", tmp_path / "data"
    shutil.copytree(augmented.out, out)
    samples = {f"{HOSTILE}{n}": dict(worlds_fields(n)) for n in range(10)}
    samples[f"{HOSTILE}bad"] = dict(worlds_fields(10)) | {"cls": b"1"}
    manifest = worlds.save_samples(data, samples)
    worlds.run(worlds.recipe(tiny_model, "variants=2", purpose="augment"), manifest, out, only_failed=True)
    facts = read_facts(str(out))
    assert facts.reasons == {}
    assert facts.outputs == 22
    assert command(out)[0] == 0
    assert "Nothing: all 22 pictures" in page(out / REPORT_NAME).text["failures"]


def test_a_run_that_is_not_finished_says_so(anonymized: World, tmp_path: Path):
    out = tmp_path / "out"
    shutil.copytree(anonymized.out, out)
    gone = min(out.glob("*_stats.json"))
    gone.unlink()
    assert command(out)[0] == 0
    read = page(out / REPORT_NAME)
    assert "not finished: 1 of 2 shards" in read.words
    assert gone.name.removesuffix("_stats.json") in read.text["failures"]
    for path in out.glob("*_stats.json"):
        path.unlink()
    shutil.rmtree(out / "logs")
    assert command(out)[0] == 0
    assert "no output yet" in page(out / REPORT_NAME).words


# Sources


def test_originals_that_were_kept_are_the_sources(tiny_model: Path, tmp_path: Path):
    manifest = worlds.save_shards(tmp_path / "data", shards=1, samples=5)
    recipe = worlds.recipe(tiny_model, "keep_originals=true", purpose="augment")
    worlds.run(recipe, manifest, tmp_path / "out")
    assert command(tmp_path / "out")[0] == 0
    read = page(tmp_path / "out" / REPORT_NAME)
    sources = {Image.open(io.BytesIO(worlds.png(number))).tobytes() for number in range(5)}
    assert sources <= {Image.open(io.BytesIO(picture)).convert("L").tobytes() for picture in read.pictures}


def test_without_sources_outputs_stand_alone(augmented: World, tmp_path: Path):
    shutil.copytree(augmented.out, tmp_path / "out")
    assert command(tmp_path / "out")[0] == 0
    read = page(tmp_path / "out" / REPORT_NAME)
    assert len(read.pictures) == 12
    assert not read.all("input")


def test_sources_that_have_changed_stay_out(augmented: World, tmp_path: Path):
    shutil.copytree(augmented.out, tmp_path / "out")
    samples = {f"{HOSTILE}{n}": dict(worlds_fields(n + (n < 4) * 100)) for n in range(10)}
    manifest = worlds.save_samples(tmp_path / "other", samples)
    assert command(tmp_path / "out", "--against", manifest)[0] == 0
    read = page(tmp_path / "out" / REPORT_NAME)
    assert "8 sources found under the right name had other bytes" in read.words
    assert "Of the 12 pairs looked at" in read.words


def test_sources_that_are_gone_are_told_of(anonymized: World, tmp_path: Path):
    out, private = tmp_path / "out", tmp_path / "private"
    shutil.copytree(anonymized.out, out)
    shutil.copytree(anonymized.private, private)
    data = tmp_path / "moved"
    shutil.copytree(anonymized.manifest.parent, data)
    (data / f"{MARK}-s-001.tar").unlink()
    manifest = data / "manifest.yaml"
    code, _ = command(out, "--private-dir", private, "--against", manifest)
    assert code == 0
    read = page(private / REPORT_NAME)
    assert "The sources of 1 shard can't be read" in read.words
    assert "Of the 5 pairs looked at" in read.words


def test_the_manifest_of_something_else_is_refused(augmented: World, tmp_path: Path):
    manifest = worlds.save_shards(tmp_path, shards=2, samples=1)
    manifest.write_text("format_version: 1\nname: other\nshards: [{url: s-001.tar, id: other}]\n")
    code, said = command(augmented.out, "--against", manifest)
    assert code == 2
    assert "none of its shards" in said


def test_pairs_without_the_private_dir_are_refused(anonymized: World):
    before = (anonymized.out / REPORT_NAME).read_bytes()
    code, said = command(anonymized.out, "--against", anonymized.manifest)
    assert code == 2
    assert "--private-dir DIR" in said
    assert (anonymized.out / REPORT_NAME).read_bytes() == before


def test_a_private_dir_that_is_missing_is_not_made(anonymized: World, tmp_path: Path):
    code, said = command(anonymized.out, "--private-dir", tmp_path / "none")
    assert code == 2
    assert "no such private dir" in said
    assert not (tmp_path / "none").exists()


def test_a_private_dir_whose_secret_was_destroyed_gets_no_other(anonymized: World, tmp_path: Path):
    private = tmp_path / "private"
    shutil.copytree(anonymized.private, private)
    (private / "secret").unlink()
    code, said = command(anonymized.out, "--private-dir", private)
    assert code == 2
    assert "secret" in said
    assert not (private / "secret").exists()


def test_pairs_never_go_to_out(anonymized: World, monkeypatch: pytest.MonkeyPatch):
    secret = (anonymized.private / "secret").read_text().strip()
    for environment in ({}, {"BOOMERANG_SECRET": secret}):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        before = (anonymized.out / REPORT_NAME).read_bytes()
        for place in (anonymized.out, anonymized.out.parent):
            assert command(anonymized.out, "--private-dir", place)[0] == 2
        assert (anonymized.out / REPORT_NAME).read_bytes() == before


def test_the_private_dir_of_another_run_is_refused(anonymized: World, tiny_model: Path, tmp_path: Path):
    manifest = worlds.save_shards(tmp_path / "data", shards=1, samples=1)
    worlds.run(worlds.recipe(tiny_model), manifest, tmp_path / "other")
    code, said = command(anonymized.out, "--private-dir", tmp_path / "other-private")
    assert code == 2
    assert "not the private dir of the run" in said
    code, said = command(tmp_path / "other", "--private-dir", anonymized.private)
    assert code == 2


def test_a_private_dir_is_nothing_for_other_purposes(augmented: World, anonymized: World):
    code, said = command(augmented.out, "--private-dir", anonymized.private)
    assert code == 2
    assert "purpose augment" in said


def test_a_folder_without_a_run_is_refused(tmp_path: Path):
    code, said = command(tmp_path)
    assert code == 1
    assert "run.json" in said


# Privacy


def test_the_bound_is_that_of_the_accounting(anonymized: World):
    facts = read_facts(str(anonymized.out))
    accounting = account(facts.recipe)
    assert accounting.certified
    told = privacy.section(facts)
    assert told.verdict.fine is None
    ((low, _),) = facts.sigmas.values()
    rows = [row for path in anonymized.out.glob("*.parquet") for row in read_rows(path)]
    assert low == min(row.sigma for row in rows if row.sigma is not None)
    for right, distance in told.curves[0].table.rows:
        share = float(right.removesuffix(" %")) / 100
        assert two_candidate_accuracy(float(distance) / low) == pytest.approx(share, abs=0.003)
    for distance, share in told.curves[0].lines[0].points:
        assert share == pytest.approx(0.5 * math.erfc(-distance / low / 2 / math.sqrt(2)))
    text = page(anonymized.out / REPORT_NAME).text["privacy"]
    assert all(note in text for note in (*accounting.notes, *accounting.within))


def test_two_variants_tell_more_than_one(anonymized: World):
    facts = read_facts(str(anonymized.out))
    ((low, high),) = facts.sigmas.values()
    recipe = facts.recipe.model_copy(update={"variants": 2})
    twice = dataclasses.replace(facts, recipe=recipe, sigmas={0: (low, high), 1: (low, high)})
    for (_, one), (_, two) in zip(
        privacy.section(facts).curves[0].table.rows, privacy.section(twice).curves[0].table.rows, strict=True
    ):
        assert float(two) == pytest.approx(float(one) / math.sqrt(2), rel=0.01)
    assert not privacy.section(
        dataclasses.replace(facts, recipe=recipe)
    ).curves  # one variant's noise is unknown


def test_no_bound_is_claimed_where_there_is_none(augmented: World, anonymized: World):
    read = page(augmented.out / REPORT_NAME)
    assert "No certified bound" in read.text["privacy"]
    assert "A bound is proven" not in read.words
    facts = read_facts(str(augmented.out))
    for reason in account(facts.recipe).reasons:
        assert reason[1:] in read.text["privacy"]
    hinted = read_facts(str(anonymized.out))
    level = type(hinted.recipe.t)(fraction={"field": "hint"})
    hinted = dataclasses.replace(hinted, recipe=hinted.recipe.model_copy(update={"t": level}))
    told = privacy.section(hinted)
    assert (told.verdict.fine, told.curves) == (False, ())
    assert any("hint" in reason for reason in told.points[0].sentences)


# Timeline


def test_the_timeline_adds_up_the_commands(tmp_path: Path):
    def event(at_s, count, **more):
        return {"event": "shard", "status": "done", "at_s": at_s, "counts": {"ok": count}, "name": "s"} | more

    logs = {
        "20260102T030405.000000Z": [event(10, 50), event(20, 50), event(21, 0, status="quarantined")],
        "20260103T030405.000000Z": [{"event": "resumed", "at_s": 0, "shards": 2}, event(20, 100)],
    }
    (tmp_path / "logs").mkdir()
    for name, events in logs.items():
        (tmp_path / "logs" / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in events))
    told = timeline.section(timeline.read_stretches(str(tmp_path)))
    assert "200 pictures in 40 s of work: 5 a second" in told.prose[0]
    assert told.curves[0].lines[0].points[-1] == (40, 200)
    assert [row[0] for row in told.tables[0].rows] == ["2026-01-02 03:04 UTC", "2026-01-03 03:04 UTC"]
    assert [row[-1] for row in told.tables[0].rows] == ["1", "0"]


@pytest.mark.parametrize(
    "line",
    [
        b"no json",
        b"[]",
        b'{"event": "shard", "status": "done", "at_s": NaN, "counts": {"ok": 1}}',
        b'{"event": "shard", "status": "done", "at_s": -5, "counts": {"ok": 1}}',
        b'{"event": "shard", "status": "done", "at_s": 1e400, "counts": {"ok": 1}}',
        b'{"event": "shard", "status": "done", "at_s": 5, "counts": {"ok": "many"}}',
        b'{"event": "shard", "status": "done", "at_s": "soon", "counts": 3}',
        b'{"event": "shard", "status": ["done"], "name": {}}',
        b"\xff\xfe{",
        b"[" * 100_000,
    ],
)
def test_a_log_of_nonsense_is_no_timeline_and_no_harm(anonymized: World, tmp_path: Path, line: bytes):
    shutil.copytree(anonymized.out, tmp_path / "out")
    for path in (tmp_path / "out" / "logs").glob("*.jsonl"):
        path.write_bytes(line + b"\n")
    assert command(tmp_path / "out")[0] == 0
    read = page(tmp_path / "out" / REPORT_NAME)
    assert "nan" not in read.source.lower().split("base64")[0]


# Sameness and size


def test_the_same_run_gives_the_same_bytes(anonymized: World, tmp_path: Path):
    first = {home: (home / REPORT_NAME).read_bytes() for home in (anonymized.out, anonymized.private)}
    assert command(anonymized.out, "--private-dir", anonymized.private)[0] == 0
    assert {home: (home / REPORT_NAME).read_bytes() for home in first} == first


@pytest.mark.slow
def test_a_run_that_was_resumed_has_the_same_report_but_for_its_times(
    tiny_model: Path, tmp_path: Path, secret: str
):
    manifest = worlds.save_shards(tmp_path / "data", shards=3, samples=5)
    recipe = worlds.recipe(tiny_model)
    for name, limits in (("once", [None]), ("twice", [1, None])):
        for limit in limits:
            worlds.run(recipe, manifest, tmp_path / name, limit=limit, extend=limit is None and len(limits) > 1)
        assert command(tmp_path / name, "--private-dir", tmp_path / f"{name}-private")[0] == 0
    for end in ("", "-private"):
        once, twice = (page(tmp_path / f"{name}{end}" / REPORT_NAME) for name in ("once", "twice"))
        assert once.without_times == twice.without_times
        assert 'id="timeline"' not in once.without_times
        assert once.source != twice.source


@pytest.mark.slow
def test_the_page_stays_small_whatever_it_shows(anonymized: World):
    facts = read_facts(str(anonymized.out))
    noise = [worlds.noise(seed, SIDE, SIDE, 3) for seed in range(40)]
    key = "k" * 5000
    rows = [dataclasses.replace(_a_row(anonymized), key=f"{n}{key}", variant=0) for n in range(20)]
    shown = tuple(
        Shown(shard="s", row=row, after=noise[2 * n], before=noise[2 * n + 1], source_key=key)
        for n, row in enumerate(rows)
    )
    many = dataclasses.replace(
        facts,
        recipe=facts.recipe.model_copy(update={"purpose": "augment", "seed": 1}),
        record=dataclasses.replace(facts.record, shards=tuple(f"{n:020}" for n in range(100_000))),
        reasons={("failed", f"reason-{n}"): n for n in range(1, 1000)},
        examples=tuple(dataclasses.replace(facts.examples[0], detail="d" * 10_000) for _ in range(3000)),
    )
    built = build(many, Album(shown=shown), [], None)
    assert len(built.sections[0].pairs) == 12
    assert len(render(built)) < 3_000_000


def _a_row(world: World):
    return next(row for path in world.out.glob("*.parquet") for row in read_rows(path) if row.status == "ok")


@pytest.mark.slow
def test_a_large_picture_is_shown_small(tiny_model: Path, tmp_path: Path):
    big = worlds.encoded(np.asarray(Image.fromarray(worlds.noise(1, 30, 20)).resize((600, 900))))
    samples = {"big": {"png": big, "cls": b"1"}}
    manifest = worlds.save_samples(tmp_path / "data", samples)
    worlds.run(worlds.recipe(tiny_model, "images.resize=contain"), manifest, tmp_path / "out")
    assert command(tmp_path / "out", "--private-dir", tmp_path / "out-private")[0] == 0
    for image in page(tmp_path / "out-private" / REPORT_NAME).all("img"):
        assert (image["width"], image["height"]) == ("128", "192")
        assert image["src"].startswith("data:image/webp;")


def test_failures_are_cut_to_what_can_be_read(anonymized: World):
    facts = read_facts(str(anonymized.out))
    many = dataclasses.replace(facts, reasons={("failed", f"reason-{n:04}"): n for n in range(1, 1000)})
    told = failures.section(many, facts.examples)
    assert len(told.tables[0].rows) == 40
    assert told.tables[0].rows[0][0] == "reason-0999"


def test_out_in_a_store(anonymized: World, monkeypatch: pytest.MonkeyPatch):
    """The files of OUT in fsspec's own memory store."""
    place = "memory://bucket/out"
    for path in sorted(anonymized.out.rglob("*")):
        if path.is_file():
            storage.publish_bytes(path.read_bytes(), storage.join(place, str(path.relative_to(anonymized.out))))
    storage.publish_bytes(b"an old one", storage.join(place, REPORT_NAME))
    assert command(place) == (0, f"{place}/{REPORT_NAME}\n")
    assert storage.read_bytes(storage.join(place, REPORT_NAME)) == (anonymized.out / REPORT_NAME).read_bytes()


# An audit


def audited(world: World, **changes: object) -> Findings:
    """Findings that an audit of the run could have come to."""
    facts = read_facts(str(world.out))
    row = _a_row(world)
    ranks = [
        Reading(
            measure=f"rank-{k}",
            attacker="nearest",
            features=f"<{features}>",
            value=v,
            low=v / 2,
            high=v * 1.1,
            chance=k / 50,
            count=11,
        )
        for features, share in (("pixels", 0.25), ("pca", 0.5))
        for k, v in ((1, share), (5, share + 0.2), (10, share + 0.4))
    ]
    ranks += [
        Reading(measure=f"rank-{k}", subject="noise ceiling", attacker="nearest", value=v, count=11)
        for k, v in ((1, 0.6), (5, 0.9), (10, 1.0))
    ]
    kept = [
        Reading(measure="label-agreement", stratum=stratum, value=value, low=0.1, high=0.9, count=5)
        for stratum, value in (("all", 0.8), ("label 1", 0.9), ("label 0", 0.3))
    ]
    promise = Promise(distance="median", delta=3.0, mu=0.5, accuracy=0.612, epsilon=2.5)
    bound = Bound(
        reasons=(), within=(), notes=(), observations=1, sigmas=(4.0,), dp_delta=1e-5, promises=(promise,)
    )
    case = Case(
        shard=min(path.stem for path in world.out.glob("*.tar") if _holds(path, row.key)),
        key=row.key,
        variant=row.variant,
        says="nearest to its own source <in> pixels",
        severity=1.0,
    )
    findings = Findings(
        name="tiny",
        purpose=facts.recipe.purpose,
        recipe_digest=facts.record.recipe_digest,
        model_digest=facts.record.model_digest,
        noise_key_id=facts.record.noise_key_id,
        audited=11,
        outputs=11,
        embeddings=(),
        readings=(*ranks, *kept),
        bound=bound,
        worst=(case,),
        warnings=("a warning <of> the audit",),
    )
    return dataclasses.replace(findings, **changes)


def _holds(path: Path, key: str) -> bool:
    return any(row.key == key for row in read_rows(path.with_suffix(".parquet")))


@pytest.mark.parametrize(
    ("changes", "drawn"), [({}, True), ({"attacker": "trained"}, False), ({"attacker": "", "count": 9}, False),
                           ({"count": 9}, False)],
)  # fmt: skip
def test_a_ceiling_is_drawn_beside_none_that_it_does_not_bound(anonymized: World, changes, drawn):
    """Neither another attacker's, nor one among other candidates than the figures beside it."""
    findings = audited(anonymized)
    readings = [
        dataclasses.replace(one, **changes) if one.subject == "noise ceiling" else one
        for one in findings.readings
    ]
    [linked, *_] = measured.sections(dataclasses.replace(findings, readings=tuple(readings)))
    [curve] = linked.curves
    assert ("noise ceiling" in [line.name for line in curve.lines]) is drawn
    assert any("noise ceiling" in text for text in linked.prose) is drawn


@pytest.fixture
def both(anonymized: World, tmp_path: Path) -> World:
    """A copy of the run and its private dir."""
    world = World(manifest=anonymized.manifest, out=tmp_path / "out", private=tmp_path / "private")
    shutil.copytree(anonymized.out, world.out)
    shutil.copytree(anonymized.private, world.private)
    return world


def test_a_private_dir_inside_out_is_refused(both: World):
    inside = both.out / "private"
    shutil.copytree(both.private, inside)
    code, said = command(both.out, "--private-dir", inside)
    assert code == 2
    assert "must not contain one another" in said


def test_an_audit_is_told_with_its_worst_case_first(both: World):
    findings = audited(both)
    (both.private / "audit.json").write_bytes(findings.to_bytes())
    assert command(both.out, "--private-dir", both.private)[0] == 0
    read = page(both.private / REPORT_NAME)
    assert "nearest to its own source <in> pixels" in read.text["worst"]
    assert findings.worst[0].key in read.text["worst"]
    assert "At worst 50 % are led back to their own source, where guessing comes to 2 %" in read.text["linked"]
    first = re.search(r"its own source is the first guess nearest, (<\w+>)", read.text["linked"])
    assert first[1] == "<pca>"
    assert "a warning <of> the audit" in read.text["linked"]
    classes = read.text["use"].partition("By class")[2]
    assert classes.index("label 0") < classes.index("label 1")
    assert "61.2 %" in read.text["privacy"]
    assert ("Right, at most 61.2 %") in read.words
    # In OUT's there is no audit, because nobody put one there.
    assert "linked" not in page(both.out / REPORT_NAME).text


def test_in_out_an_audit_names_no_output(both: World):
    findings = audited(both)
    saved = both.out.parent / "findings.json"
    saved.write_bytes(findings.to_bytes())
    assert command(both.out, "--audit", saved)[0] == 0
    read = page(both.out / REPORT_NAME)
    assert "At worst 50 %" in read.text["linked"]
    assert "worst" not in read.text
    assert findings.worst[0].says not in read.words


@pytest.mark.parametrize(
    ("broken", "told"),
    [(True, "1 limit broken: max_rank1 0.1"), (False, "Every limit was kept: max_rank1 0.1")],
)
def test_a_broken_limit_is_what_comes_first(both: World, broken: bool, told: str):
    gate = Gate(gate="max_rank1", limit=0.1, reading="rank-1", value=0.5, bad_end=0.6, broken=broken)
    (both.out / "audit.json").write_bytes(audited(both, gates=(gate,)).to_bytes())
    assert command(both.out)[0] == 0
    assert told in page(both.out / REPORT_NAME).text["linked"]


def test_the_audit_of_something_else_is_refused(both: World):
    before = (both.out / REPORT_NAME).read_bytes()
    (case,) = audited(both).worst
    for other in (
        {"recipe_digest": "0" * 64},
        {"noise_key_id": "secret:0"},
        {"worst": (dataclasses.replace(case, shard="f" * 16),)},
    ):
        (both.out / "audit.json").write_bytes(audited(both, **other).to_bytes())
        code, said = command(both.out)
        assert code == 2
        assert "audit of another run" in said
    (both.out / "audit.json").write_bytes(b"{}")
    assert command(both.out)[0] == 1
    assert (both.out / REPORT_NAME).read_bytes() == before


def test_an_audit_finds_the_pictures_of_other_purposes_too(augmented: World, tmp_path: Path):
    world = World(manifest=augmented.manifest, out=tmp_path / "out", private=tmp_path / "none")
    shutil.copytree(augmented.out, world.out)
    findings = audited(world)
    (world.out / "audit.json").write_bytes(findings.to_bytes())
    assert command(world.out, "--against", world.manifest)[0] == 0
    read = page(world.out / REPORT_NAME)
    assert "The 1 output that the audit found worst" in read.text["worst"]
    assert findings.worst[0].key in read.text["worst"]
