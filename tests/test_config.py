"""config/: what a recipe may say, what its digest is taken over, and how a mistake is told."""

from __future__ import annotations

import contextlib
import json
import math
import random

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from boomerang_batch.config.forms import TAGS
from boomerang_batch.config.pipeline import FromField, Recipe, Spread, Upscale, parse_recipe
from boomerang_batch.errors import RecipeError

AUGMENT = {
    "name": "a-test",
    "purpose": "augment",
    "seed": 7,
    "model": {"source": "shipped:demo/model"},
    "t": {"fraction": 0.4},
    "steps": 20,
}
AWAY = {"source": "efficientnet-lite0", "away_from": "source", "scale": 0.1}
TOWARD = {"source": "entry-point:net", "toward": {"field": "to.cls"}, "scale": 0.2}
DDIM = {"sampler": {"eta": 0.0}}
ANONYMIZE = {key: value for key, value in AUGMENT.items() if key != "seed"} | {"purpose": "anonymize"}


def parse(data, *overrides):
    return parse_recipe(yaml.safe_dump(data), source="recipe.yaml", overrides=overrides)


def refusal(data, *overrides):
    with pytest.raises(RecipeError) as caught:
        parse(data, *overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- what is refused, and how it is told ---


@pytest.mark.parametrize(
    ("change", "place", "nearest"),
    [
        ({"step": 20}, "step", "steps"),
        ({"t": {"fracton": 0.4}}, "t.fracton", "fraction"),
        ({"images": {"resise": "pad"}}, "images.resise", "resize"),
        ({"sampler": {"etaa": 0}}, "sampler.etaa", "eta"),
        ({"run": {"worker": 2}}, "run.worker", "workers"),
        ({"model": {"source": "x", "patchsize": 4}}, "model.patchsize", "patch_size"),
        (
            {"model": {"source": "x", "class_labels": {"guidence": 1}}},
            "model.class_labels.guidence",
            "guidance",
        ),
        ({"variants": 2, "t": [{"fraction": 0.4}, {"fracton": 0.5}]}, "t.1.fracton", "fraction"),
        ({"model": {"source": "x", "prompts": {"guidence": 1}}}, "model.prompts.guidence", "guidance"),
        ({"model": {"source": "x", "autoencoder": {"scales": 1}}}, "model.autoencoder.scales", "scale"),
        ({"images": {"tiles": {"overlaps": 8}}}, "images.tiles.overlaps", "overlap"),
        ({"upscale": {"factr": 2}}, "upscale.factr", "factor"),
        ({"region": {"feild": "mask.png"}}, "region.feild", "field"),
        ({"passes": {"counts": 2}}, "passes.counts", "count"),
    ],
)
def test_an_unknown_key_is_told_with_the_nearest_known_one(change, place, nearest):
    message = refusal(AUGMENT | change)
    assert message == f"recipe.yaml: unknown key {place}; did you mean {nearest}?"


def test_an_unknown_key_near_nothing_is_told_with_all_known_ones():
    message = refusal(AUGMENT | {"run": {"zzz": 1}})
    known = "gate, journal_every, load_deadline_s, max_attempts, on_error, start_timeout_s, step_deadline_s"
    assert message == f"recipe.yaml: unknown key run.zzz; known: {known}, workers"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"t": [0.4]}, "t.0 needs its unit, for example t: {fraction: 0.4}; or timestep, sigma, snr"),
        (
            {"t": {"fraction": [0.2, 0.4]}},
            "t.fraction: write a number, or {uniform: [low, high]} or {field: NAME} with nothing beside "
            "(given: [0.2, 0.4])",
        ),
        (
            {"t": {"sigma": {"uniform": [0.2, 0.4], "field": "x"}}},
            "t.sigma: write a number, or {uniform: [low, high]} or {field: NAME} with nothing beside",
        ),
        (
            {"t": {"sigma": {"unifrom": [0.2, 0.4]}}},
            "t.sigma: write a number, or {uniform: [low, high]} or {field: NAME} with nothing beside",
        ),
        (
            {"t": {"fraction": {"uniform": [0.4, 0.2]}}},
            "t.fraction: uniform takes the lower and the higher end, both at least 0; it is 0.4, 0.2",
        ),
        ({"t": {"fraction": {"uniform": [0.4]}}}, "t.fraction.uniform: the list ends before its item 2"),
        ({"t": {"fraction": {"uniform": 0.4}}}, "t.fraction.uniform: must be a list (given: 0.4)"),
        (
            {"t": {"sigma": {"uniform": ["1e-3", 2]}}},
            "t.sigma.uniform.0: YAML reads 1e-3 as text; write it with a decimal point, like 1.0e-3",
        ),
        ({"t": {"fraction": {"uniform": [0.4, 1.2]}}}, "t.fraction: both ends of uniform must be in 0..1"),
        ({"t": {"timestep": {"uniform": [0.5, 2]}}}, "t.timestep: both ends of uniform must be whole numbers"),
        ({"t": {"snr": {"uniform": [0, 2]}}}, "t.snr: both ends of uniform must be above 0"),
        (
            {"t": {"sigma": {"field": ""}}},
            "t.sigma.field: String should have at least 1 character (given: '')",
        ),
        ({"steps": "1e3"}, "steps: YAML reads 1e3 as text; write it as a whole number"),
        ({"batch_size": "many"}, "batch_size: must be a valid integer (given: 'many')"),
        ({"batch_size": 0}, "batch_size: must be greater than or equal to 1 (given: 0)"),
        ({"grid": [0, "5"]}, "grid.1: YAML reads 5 as text; write it as a whole number"),
        ({"images": {"sizes": [64, 64]}}, "images.sizes.0: must be a list (given: 64); "),
        (
            {"images": {"sizes": [[64, 0]]}},
            "images.sizes.0.1: must be greater than or equal to 1 (given: 0)",
        ),
        ({"model": "folder"}, "model: must be a block of keys (given: 'folder')"),
        ({"name": "../up"}, "name: must be 1 to 63 lower-case letters, digits and hyphens, no hyphen first"),
        (
            {"model": {"source": "x", "revision": "main"}},
            "model.revision: must be a commit's 40 hex digits, no branch or tag (given: 'main')",
        ),
        (
            {"model": {"source": "entry-point:x", "options": {"a": [1]}}},
            "model.options.a: write true or false, a number or a text (given: [1])",
        ),
        (
            {"model": {"source": "entry-point:x", "options": {"a": math.nan}}},
            "model.options.a: must be a finite number (given: nan)",
        ),
    ],
)
def test_a_mistake_in_one_of_several_forms_is_told_once(change, message):
    told = refusal(AUGMENT | change)
    assert told.startswith(f"recipe.yaml: {message}")
    assert "<" not in told  # the names of forms are for us
    if not message.endswith("; "):
        assert "; " not in told.removeprefix(f"recipe.yaml: {message}")


def test_every_problem_is_told_at_once():
    message = refusal(AUGMENT | {"step": 1, "variants": 0})
    assert "unknown key step;" in message
    assert "variants: " in message


@pytest.mark.parametrize("missing", ["name", "purpose", "model", "t", "steps"])
def test_a_missing_field_is_named(missing):
    data = {key: value for key, value in AUGMENT.items() if key != missing}
    assert f"{missing} is missing" in refusal(data)


@pytest.mark.parametrize(
    "t", [{}, {"fraction": None}, {"fraction": 0.4, "sigma": 1.0}, {"timestep": 3, "snr": 1.0}]
)
def test_t_needs_exactly_one_unit(t):
    assert "exactly one unit: fraction, timestep, sigma or snr" in refusal(AUGMENT | {"t": t})


@pytest.mark.parametrize("bare", [0.4, 400, 0, "0.4"])
def test_a_bare_t_is_refused_with_an_example(bare):
    assert "t needs its unit, for example t: {fraction: 0.4}" in refusal(AUGMENT | {"t": bare})


@pytest.mark.parametrize(
    ("unit", "value"),
    [
        ("fraction", -0.1),
        ("fraction", 1.1),
        ("fraction", True),
        ("timestep", -1),
        ("timestep", 4.5),
        ("sigma", -1.0),
        ("sigma", math.inf),
        ("sigma", math.nan),
        ("snr", 0),
        ("snr", "3"),
    ],
)
def test_t_out_of_range_or_type_is_refused_with_its_place(unit, value):
    assert f"t.{unit}: " in refusal(AUGMENT | {"t": {unit: value}})


@pytest.mark.parametrize(
    ("unit", "value"),
    [("fraction", 0), ("fraction", 1), ("timestep", 0), ("timestep", 400), ("sigma", 0), ("snr", 0.7)],
)
def test_t_takes_each_unit_zero_included(unit, value):
    assert parse(AUGMENT | {"t": {unit: value}}).t.unit == (unit, value)


@pytest.mark.parametrize(
    ("unit", "low", "high", "least"),
    [("fraction", 0, 1, 0), ("timestep", 100, 800, 100), ("sigma", 0.5, 30, 0.5), ("snr", 0.01, 4, 4)],
)
def test_t_may_be_drawn_or_brought_along(unit, low, high, least):
    drawn = parse(AUGMENT | {"t": {unit: {"uniform": [low, high]}}}).t
    assert drawn.unit == (unit, Spread(uniform=(low, high)))
    assert drawn.least_noise == (unit, least)
    brought = parse(AUGMENT | {"t": {unit: {"field": "noise.txt"}}}).t
    assert brought.unit == (unit, FromField(field="noise.txt"))
    assert brought.least_noise is None


def test_a_t_for_each_variant():
    levels = [{"fraction": 0.2}, {"sigma": {"uniform": [1, 2]}}]
    recipe = parse(AUGMENT | {"variants": 2, "t": levels, "passes": {"count": 3, "outputs": "all"}})
    assert [level.unit[0] for level in recipe.levels] == ["fraction", "sigma"]
    assert recipe.outputs == 6
    assert "t lists 2 levels for 3 variants" in refusal(AUGMENT | {"variants": 3, "t": levels})
    assert "t lists 0 levels for 1 variants" in refusal(AUGMENT | {"t": []})


def test_a_number_that_yaml_reads_as_text_is_explained():
    message = refusal(AUGMENT, "t.sigma=1e-3")
    assert message == (
        "recipe.yaml: t.sigma: YAML reads 1e-3 as text; write it with a decimal point, like 1.0e-3"
    )
    assert parse(AUGMENT, "t.sigma=1.0e-3").t.unit == ("sigma", 0.001)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (ANONYMIZE | {"seed": 7}, "remove seed"),
        (ANONYMIZE | {"keep_originals": True}, "keep_originals"),
        (ANONYMIZE | {"purpose": "augment"}, "purpose augment needs a seed"),
        (ANONYMIZE | {"purpose": "enhance"}, "purpose enhance needs a seed"),
        (AUGMENT | {"purpose": "hide"}, "'anonymize', 'augment' or 'enhance'"),
        (AUGMENT | {"start": "diffusers-strength", "t": {"timestep": 3}}, "as a fraction"),
        (AUGMENT | {"sampler": {"eta": 0, "variance": "fixed_large"}}, "for eta 1 only"),
        (AUGMENT | {"sampler": {"variance": "optimal"}}, "data_variance"),
        (AUGMENT | {"sampler": {"data_variance": 0.2}}, "data_variance"),
        (
            AUGMENT | {"model": {"source": "x", "class_labels": {"guidance": 2.0}}},
            "guidance other than 1 needs null_label",
        ),
        (AUGMENT | {"model": {"source": "x", "revision": "main"}}, "model.revision: "),
        (AUGMENT | {"name": "../up"}, "name: "),
        (AUGMENT | {"format_version": 2}, "format_version: "),
        (AUGMENT | {"steps": "20"}, "steps: "),
        (AUGMENT | {"grid": "linspac"}, "recipe.yaml: grid: "),
        (AUGMENT | {"fields": {"fields": {"cls": "keeep"}}}, "fields.fields.cls: "),
        (AUGMENT | {"images": None}, "images: "),
        (ANONYMIZE | {"t": {"sigma": 0}}, "t sigma 0 comes to 0 evaluations"),
        (ANONYMIZE | {"t": {"fraction": {"uniform": [0, 0.8]}}}, "let a uniform t begin above 0"),
        (ANONYMIZE | {"variants": 2, "t": [{"snr": 1.0}, {"timestep": 0}]}, "t timestep 0 comes to 0"),
        (ANONYMIZE | {"upscale": {"factor": 2, "consistent": True}}, "upscale.consistent makes each output"),
        (ANONYMIZE | {"fields": {"default": "pseudonymize"}}, "list what may travel"),
        (AUGMENT | {"sampler": {"eta": 0.5, "variance": "learned"}}, "for eta 1 only"),
        (AUGMENT | {"region": {"field": "mask.png"}}, "set images.resize to contain, stretch or pad"),
        (
            AUGMENT | {"region": {"field": "mask.png"}, "images": {"resize": "pad", "restore_size": False}},
            "remove images.restore_size: false",
        ),
        (
            AUGMENT | {"region": {"field": "x"}, "images": {"resize": "pad"}, "upscale": {"factor": 2}},
            "remove one of them",
        ),
        (
            AUGMENT | {"region": {"field": "png"}, "images": {"resize": "pad"}},
            "region.field png is the image's own field",
        ),
        (
            AUGMENT | {"images": {"tiles": {"overlap": 8}, "sizes": [[64, 64]]}},
            "images: sizes and tiles are two answers",
        ),
        (AUGMENT | {"images": {"sizes": [[64, 64], [64, 64]]}}, "images: sizes lists one size twice"),
        (AUGMENT | {"images": {"sizes": [[64, 8 * n] for n in range(1, 18)]}}, "images.sizes: "),
        (AUGMENT | {"passes": {"count": 0}}, "passes.count: "),
        (
            AUGMENT | {"model": {"source": "x", "prompts": {}, "class_labels": {}}},
            "model: a model is told a class or a text, not both",
        ),
        (
            AUGMENT | {"model": {"source": "x", "prompts": {"text": "a", "field": "txt"}}},
            "model.prompts: prompts come from text or from a field, not from both",
        ),
        (
            AUGMENT | {"model": {"source": "x", "prompts": {"negative": "a"}}},
            "model.prompts: negative and rescale act on guidance, and there is none",
        ),
        (
            AUGMENT | {"model": {"source": "x", "prompts": {"guidance": 1, "rescale": 0.5}}},
            "model.prompts: negative and rescale act on guidance, and there is none",
        ),
        (AUGMENT | {"model": {"source": "x", "options": {"a": 1}}}, "options go to an entry point's factory"),
        (
            AUGMENT
            | {
                "model": {
                    "source": "entry-point:x",
                    "dtype": "bfloat16",
                    "autoencoder": {"scale": 0.2},
                    "prompts": {"guidance": 2.0},
                }
            },
            "so dtype, autoencoder.scale, prompts.guidance would say nothing; tell it by options",
        ),
    ],
)
def test_what_contradicts_itself_is_refused(data, told):
    assert told in refusal(data)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "a recipe is a mapping of fields, this is NoneType"),
        ("- a\n- b", "a recipe is a mapping of fields, this is list"),
        ("a: b: c", "not valid YAML: "),
        ("a: 1\n\tb: 2", "line 2"),
        ("steps: 20\nsteps: 30", "the key steps is given twice"),
        ("t: {sigma: 1, sigma: 2}", "the key sigma is given twice"),
        ("? [a, b]\n: 1", "not valid YAML: "),
        ("name: !!python/object/apply:os.system ['touch pwned']", "could not determine a constructor"),
        ("name: !!python/name:os.system", "could not determine a constructor"),
        ("name: !!python/object/new:os.stat_result [[]]", "could not determine a constructor"),
        ("name: 2020-13-45", "recipe.yaml: "),
        ("name: &a [*a]", "recipe.yaml: "),
        ("\x00", "not valid YAML: "),
    ],
)
def test_text_that_is_no_plain_recipe_is_refused(text, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, source="recipe.yaml")
    assert str(caught.value).startswith("recipe.yaml: ")
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []  # no tag was obeyed


@pytest.mark.slow
@settings(max_examples=50, deadline=None)
@given(st.text() | st.recursive(st.none() | st.integers(), lambda inner: st.lists(inner)).map(yaml.safe_dump))
def test_arbitrary_text_never_escapes_as_another_error(text):
    with pytest.raises(RecipeError):
        parse_recipe(text, source="recipe.yaml")


RICH = AUGMENT | {
    "variants": 2,
    "t": [{"fraction": {"uniform": [0.1, 0.8]}}, {"sigma": {"field": "noise.txt"}}],
    "grid": [0, 10, 20],
    "model": {"source": "entry-point:x", "options": {"a": 1}, "prompts": {"field": "txt"}},
    "images": {"resize": "pad", "sizes": [[64, 32]]},
    "passes": {"count": 2},
    "region": {"field": "mask.png"},
    "fields": {"fields": {"txt": "keep"}},
    "batch_size": "auto",
}


def places(data, path=()):
    """The paths of everything in `data`."""
    if path:
        yield path
    for key in data if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ():
        yield from places(data[key], (*path, key))


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3000) | st.floats() | st.text(max_size=5) | st.just("1e3"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=2),
    max_leaves=4,
)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(places(RICH), key=str)), ANYTHING)
def test_any_value_anywhere_is_taken_or_told_in_one_line_without_our_words(path, value):
    data = json.loads(json.dumps(RICH))
    node = data
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    with contextlib.suppress(RecipeError):
        parse_recipe(json.dumps(data), source="recipe.yaml")
        return
    told = refusal(data)
    assert not any(tag in told for tag in TAGS)
    assert "union" not in told


# --- --set ---


def test_overrides_reach_any_depth_and_later_ones_win():
    recipe = parse(
        AUGMENT,
        "steps=10",
        "steps=30",
        "images.resize=pad",
        "sampler.eta=0",
        "model.class_labels.null_label=10",
    )
    assert recipe.steps == 30
    assert recipe.images.resize == "pad"
    assert recipe.sampler.eta == 0
    assert recipe.model.class_labels is not None
    assert recipe.model.class_labels.null_label == 10


def test_an_override_of_t_replaces_the_recipes_own_unit():
    assert parse(AUGMENT, "t.sigma=.5").t.unit == ("sigma", 0.5)
    drawn = parse(AUGMENT, "t.fraction.uniform=[0.1, 0.8]").t.unit
    assert drawn == ("fraction", Spread(uniform=(0.1, 0.8)))


def test_an_override_of_t_replaces_a_list_as_a_whole():
    listed = AUGMENT | {"variants": 2, "t": [{"fraction": 0.2}, {"fraction": 0.6}]}
    assert parse(listed, "t.fraction=0.3").levels == parse(AUGMENT | {"t": {"fraction": 0.3}}).levels
    assert len(parse(AUGMENT, "variants=2", "t=[{sigma: 1}, {sigma: 2}]").levels) == 2
    assert "unknown key t.0" in refusal(listed, "t.0.fraction=0.3")


def test_an_override_opens_a_block_that_is_null():
    assert parse(AUGMENT | {"upscale": None}, "upscale.factor=4").upscale == Upscale(factor=4)


def test_an_override_equals_the_same_words_in_the_file():
    assert parse(AUGMENT, "variants=2").digest == parse(AUGMENT | {"variants": 2}).digest


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("steps", "--set steps: write it as key=value"),
        ("=3", "--set =3: write it as key=value"),
        ("steps.x=3", "--set steps.x=3: steps is a value, not a block"),
        ("steps=[", "--set steps=[: the value is not valid YAML"),
        ("imagez.resize=pad", "unknown key imagez; did you mean images?"),
        ("t=0.4", "t needs its unit"),
    ],
)
def test_a_bad_override_is_told(override, told):
    assert told in refusal(AUGMENT, override)


# --- the canonical form and its digest ---

GOLDEN_CANONICAL = {
    "batch_size": 16,
    "batching": "fixed",
    "fields": {"default": None, "fields": {}, "json_keys": {}},
    "format_version": 1,
    "grid": "linspace",
    "identity": "key",
    "images": {
        "alpha": "refuse",
        "field": "jpg;png;jpeg;webp",
        "format": "input",
        "max_pixels": 50000000,
        "quality": 95,
        "resize": "cover",
        "restore_size": True,
        "sizes": [],
        "tiles": None,
    },
    "keep_originals": False,
    "method": "boomerang",
    "model": {
        "autoencoder": {"batch_size": 1, "float32": False, "scale": None},
        "channels_last": False,
        "class_labels": None,
        "compile": False,
        "dtype": "float32",
        "options": {},
        "patch_size": 1,
        "prompts": None,
        "revision": None,
        "safety": "unchecked",
        "source": "shipped:demo/model",
        "subfolder": None,
    },
    "passes": {"count": 1, "outputs": "last"},
    "purpose": "augment",
    "region": None,
    "sampler": {"clip": None, "data_variance": None, "eta": 1.0, "order": 1, "variance": "fixed_small"},
    "seed": 7,
    "start": "exact",
    "steps": 20,
    "t": {"fraction": 0.4},
    "upscale": None,
    "variants": 1,
}
GOLDEN_DIGEST = "9e85d5a884b8fe08151043fb85846a03f0bf191f1613a8c0ccb69c128ad069fe"


def test_the_canonical_form_spells_out_every_default():
    assert parse(AUGMENT).canonical() == GOLDEN_CANONICAL


def test_the_digest_of_format_version_1_never_changes():
    """Outputs on people's disks carry it: a changed format needs a new format_version, not a new value here."""
    assert parse(AUGMENT).digest == GOLDEN_DIGEST


def test_spelling_out_a_default_changes_nothing():
    spelled = {key: value for key, value in GOLDEN_CANONICAL.items() if value is not None}
    assert parse({"name": "other", **spelled}).digest == parse(AUGMENT).digest


def test_key_order_number_form_and_prose_change_nothing():
    for attempt in range(5):
        items = list(AUGMENT.items())
        random.Random(attempt).shuffle(items)
        text = "# a comment\n" + yaml.safe_dump(dict(items), sort_keys=False)
        assert parse_recipe(text, source="elsewhere.yaml").digest == GOLDEN_DIGEST
    assert parse(AUGMENT | {"sampler": {"eta": 1}, "description": "words", "name": "b"}).digest == GOLDEN_DIGEST


def test_run_options_never_enter_the_digest():
    assert parse(AUGMENT | {"run": {"workers": 8, "max_attempts": 1}}).digest == GOLDEN_DIGEST


@pytest.mark.parametrize(
    "change",
    [
        {"purpose": "enhance"},
        {"model": {"source": "elsewhere"}},
        {"model": {"source": "shipped:demo/model", "dtype": "float16"}},
        {"t": {"fraction": 0.5}},
        {"t": {"sigma": 0.4}},
        {"steps": 21},
        {"grid": "leading"},
        {"grid": [0, 10, 20]},
        {"start": "snap"},
        {"sampler": {"eta": 0}},
        {"variants": 2},
        {"keep_originals": True},
        {"identity": "content"},
        {"seed": 8},
        {"images": {"quality": 90}},
        {"fields": {"fields": {"json": "drop"}}},
        {"batch_size": 32},
        {"batch_size": "auto"},
        {"batching": "elastic"},
        {"t": {"fraction": {"uniform": [0.3, 0.4]}}},
        {"t": {"fraction": {"field": "t.txt"}}},
        {"passes": {"count": 2}},
        {"upscale": {"factor": 2}},
        {"images": {"resize": "pad"}, "region": {"field": "mask.png"}},
        {"images": {"sizes": [[64, 32]]}},
        {"images": {"tiles": {"overlap": 8}}},
        {"model": {"source": "shipped:demo/model", "prompts": {"text": "a"}}},
        {"model": {"source": "shipped:demo/model", "autoencoder": {"float32": True}}},
        {"sampler": {"variance": "learned"}},
        {"energy": AWAY},
    ],
)
def test_whatever_determines_the_output_enters_the_digest(change):
    assert parse(AUGMENT | change).digest != GOLDEN_DIGEST


def test_every_recipe_field_is_in_the_canonical_form_or_known_to_be_left_out():
    named = set(Recipe.model_fields) - {"name", "description", "run"}
    later = {"target", "energy", "interpolate", "unseen"}
    assert set(parse(AUGMENT).canonical()) == named - later
    for method, name in (("edit-friendly", "target"), ("interpolate", "interpolate"), ("unseen", "unseen")):
        block = {"label": 1} if name == "target" else {}
        coded = AUGMENT | {"method": method, name: block, "variants": 1, "sampler": {"eta": 0.3}}
        assert set(parse(coded).canonical()) == named - later | {name}
    assert set(parse(AUGMENT | {"energy": AWAY}).canonical()) == named - later | {"energy"}


def test_the_canonical_form_parses_back_to_itself():
    plugin = {"source": "entry-point:mine", "options": {"a": 1, "b": 0.5, "c": "x", "d": True}}
    for data in (
        AUGMENT,
        ANONYMIZE,
        AUGMENT | {"grid": [0, 5, 9], "t": {"snr": 0.7}},
        AUGMENT | {"variants": 2, "t": [{"snr": {"uniform": [1, 2]}}, {"timestep": {"field": "t"}}]},
        AUGMENT | {"method": "dpm-encoder", "target": {"field": "to.cls"}},
        AUGMENT | {"energy": AWAY},
        AUGMENT | {"energy": TOWARD | {"options": {"a": 1}, "range": [0.1, 0.4]}},
        AUGMENT | {"method": "interpolate", "interpolate": {"partner": {"field": "to"}}} | DDIM,
        AUGMENT | {"method": "unseen", "unseen": {"weight": 0.5}} | DDIM,
        AUGMENT | {"model": plugin, "images": {"sizes": [[64, 32], [32, 64]]}, "upscale": {"factor": 2}},
    ):
        recipe = parse(data)
        again = parse_recipe(json.dumps({"name": "again", **recipe.canonical()}), source="run.json")
        assert again.digest == recipe.digest


def test_a_recipe_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        parse(AUGMENT).steps = 3


def test_a_model_folder_is_named_but_not_placed():
    """run.json is published; where a model lies on someone's disk is not."""
    here = parse(AUGMENT | {"model": {"source": "/home/alice/models/faces"}})
    there = parse(AUGMENT | {"model": {"source": "../faces/"}})
    assert here.canonical()["model"]["source"] == "faces"
    assert here.digest == there.digest
    assert parse(AUGMENT | {"model": {"source": "/"}}).canonical()["model"]["source"] == "."
    hub = {"source": "owner/name", "revision": "0" * 40}
    assert parse(AUGMENT | {"model": hub}).canonical()["model"]["source"] == "owner/name"
