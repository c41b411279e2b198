"""Privacy accounting: every field of the recipe states its own, and the figures are those of real attacks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from boomerang_batch import shipped
from boomerang_batch.audit.records import known_of
from boomerang_batch.config.accounting import account, mu
from boomerang_batch.config.blocks import Sampler
from boomerang_batch.config.features import FEATURES
from boomerang_batch.config.messages import blocks_in
from boomerang_batch.config.pipeline import Recipe, parse_recipe
from boomerang_batch.data.provenance import Row
from boomerang_batch.data.shards import Sample
from boomerang_batch.measures.bound import two_candidate_accuracy

PRIVATE = {
    "name": "a-test",
    "purpose": "anonymize",
    "model": {"source": "shipped:demo/model"},
    "t": {"sigma": 2.0},
    "steps": 20,
}
PUBLIC = PRIVATE | {"purpose": "augment", "seed": 7}


def recipe(change=None, data=PRIVATE):
    return parse_recipe(yaml.safe_dump(data | (change or {})), source="recipe.yaml")


# --- every field has its entry ---


def fields_of(block: type[BaseModel], prefix: str = "") -> set[str]:
    """The dotted paths of everything a recipe may say; a value of several forms has a path for each block."""
    found = set()
    for name, known in block.model_fields.items():
        inner = set().union(*(fields_of(part, f"{prefix}{name}.") for part in blocks_in(known.annotation)))
        simple = not inner or set(blocks_in(known.annotation)) <= {*blocks_of_numbers()}
        found |= inner | ({f"{prefix}{name}"} if simple else set())
    return found


def blocks_of_numbers():
    """Blocks that stand beside a plain number in one field: {uniform: ...} and {field: ...}."""
    return blocks_in(Recipe.model_fields["t"].annotation.__args__[0].model_fields["sigma"].annotation)


def test_every_field_states_its_accounting_and_no_other_does():
    assert fields_of(Recipe) == set(FEATURES)


def test_a_new_field_would_be_noticed():
    class Wider(Sampler):
        look_again: bool = False

    class Later(Recipe):
        sampler: Wider = Wider()
        churn: float = 0.0

    assert fields_of(Later) - set(FEATURES) == {"churn", "sampler.look_again"}


def test_every_statement_is_a_sentence_about_its_field():
    for path, feature in FEATURES.items():
        assert feature.says, path
        assert feature.says[0].islower() or feature.says.startswith("K "), path
        assert not feature.says.endswith("."), path


# --- what is certified, and what is not ---


def test_the_plain_case_is_certified():
    accounting = account(recipe())
    assert accounting.certified
    assert accounting.reasons == ()
    assert accounting.observations == 1
    assert accounting.least_noise == (("sigma", 2.0),)
    assert accounting.within == ("the shard", "grey or colour", "width and height", "the image format")
    assert not accounting.region_only


@pytest.mark.parametrize("name", [name for name in shipped.names("pipelines") if "anonymize" in name])
def test_the_shipped_recipes_that_anonymize_are_certified(name):
    parsed = parse_recipe(shipped.named("pipelines", name).read_text(), source=name)
    assert account(parsed).certified


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (PUBLIC, "published seed"),
        (PUBLIC, "keys and fields travel"),
        (PUBLIC | {"keep_originals": True}, "originals are kept"),
        (PUBLIC | {"images": {"alpha": "keep"}}, "alpha channel"),
        (PUBLIC | {"fields": {"default": "keep"}}, "nobody listed"),
        (PUBLIC | {"upscale": {"factor": 2, "consistent": True}}, "looks at the source again"),
        (PRIVATE | {"t": {"sigma": {"field": "noise.txt"}}}, "t comes from the field noise.txt"),
        (PRIVATE | {"variants": 2, "t": [{"sigma": 3}, {"snr": {"field": "a"}}]}, "the field a: how noisy"),
        (PRIVATE | {"images": {"tiles": {"overlap": 8}}}, "the difference of their latents is without noise"),
    ],
)
def test_what_has_no_bound_says_why(data, told):
    accounting = account(recipe(data=data))
    assert not accounting.certified
    assert any(told in reason for reason in accounting.reasons)


@pytest.mark.parametrize(
    ("data", "in_picture"),
    [
        (PRIVATE, False),
        (PRIVATE | {"purpose": "augment", "seed": 7, "keep_originals": True}, False),
        (PRIVATE | {"purpose": "augment", "seed": 7, "images": {"alpha": "keep"}}, True),
        (PRIVATE | {"purpose": "enhance", "seed": 7, "upscale": {"factor": 2, "consistent": True}}, True),
        (PRIVATE | {"t": {"sigma": {"field": "a"}}}, True),
        (PRIVATE | {"images": {"tiles": {"overlap": 8}}}, True),
    ],
)
def test_what_a_picture_alone_shows_beyond_its_noised_source_is_told_from_what_lies_beside_it(data, in_picture):
    accounting = account(recipe(data=data))
    assert bool(accounting.in_pictures) == in_picture
    assert set(accounting.in_pictures) <= set(accounting.reasons)


@pytest.mark.parametrize("method", ["dpm-encoder", "edit-friendly", "unseen", "whatever comes"])
def test_a_method_nobody_has_accounted_for_has_no_bound(method):
    accounting = account(recipe().model_copy(update={"method": method}))
    assert accounting.reasons == ("the method looks at the source again after noising it",)


@pytest.mark.parametrize(
    "change",
    [
        {"passes": {"count": 5, "outputs": "all"}},
        {"upscale": {"factor": 2}},
        {"sampler": {"eta": 0, "order": 2}},
        {"model": {"source": "x", "prompts": {"text": "a face", "guidance": 7.5, "negative": "b"}}},
        {"model": {"source": "x", "safety": "drop"}},
        {"model": {"source": "x", "dtype": "bfloat16", "autoencoder": {"float32": True}}},
        {"batch_size": "auto", "batching": "elastic"},
        {"start": "snap", "grid": "trailing"},
    ],
)
def test_post_processing_and_what_comes_before_the_noise_cost_nothing(change):
    accounting = account(recipe(change))
    assert accounting.certified
    assert accounting.observations == 1
    assert accounting.least_noise == (("sigma", 2.0),)


def test_tiles_of_pixels_are_one_observation():
    accounting = account(recipe({"images": {"tiles": {"overlap": 8}}}), latent=False)
    assert accounting.certified
    assert accounting.observations == 1


def test_each_variant_is_an_observation_at_the_least_noise_it_may_have():
    many = account(recipe({"variants": 3}))
    assert many.observations == 3
    assert many.least_noise == (("sigma", 2.0),) * 3
    levels = [{"sigma": 3}, {"fraction": {"uniform": [0.3, 0.8]}}, {"snr": {"uniform": [0.1, 0.5]}}]
    mixed = account(recipe({"variants": 3, "t": levels}))
    assert mixed.certified
    assert mixed.least_noise == (("sigma", 3.0), ("fraction", 0.3), ("snr", 0.5))
    assert account(recipe({"t": {"sigma": {"field": "x"}}})).least_noise == ()


def test_a_region_is_accounted_for_alone():
    accounting = account(recipe({"region": {"field": "mask.png"}, "images": {"resize": "contain"}}))
    assert accounting.certified
    assert accounting.region_only
    assert "the region and all outside it" in accounting.within


def test_what_is_known_of_a_record_narrows_the_gallery():
    changes = {
        "fields": {"fields": {"cls": "keep", "id": "pseudonymize", "x": "drop"}, "json_keys": {"age": "keep"}},
        "images": {"format": "png", "restore_size": False, "sizes": [[64, 64]]},
        "model": {"source": "x", "class_labels": {"field": "cls"}},
    }
    assert account(recipe(changes)).within == (
        "the shard",
        "grey or colour",
        "the label in cls",
        "the size bucket",
        "the field cls",
        "which records share a value of the field id",
        "the json key age",
    )
    prompted = recipe({"model": {"source": "x", "prompts": {"field": "txt"}}})
    assert "the prompt in txt" in account(prompted).within
    led = {"energy": {"source": "entry-point:x", "toward": {"field": "to.cls"}, "scale": 0.1}}
    assert "the label in to.cls" in account(recipe(led)).within
    coded = {"method": "edit-friendly", "target": {"field": "To.cls"}, "model": {"source": "x"}}
    assert "the target in To.cls" in account(recipe(coded)).within


@pytest.mark.parametrize(
    "change",
    [
        {"fields": {"fields": {"To.cls": "keep"}}},
        {"model": {"source": "x", "class_labels": {"field": "To.cls"}}},
        {"model": {"source": "x", "prompts": {"field": "To.cls"}}},
        {"energy": {"source": "entry-point:x", "toward": {"field": "To.cls"}, "scale": 0.1}},
        {"method": "edit-friendly", "target": {"field": "To.cls"}},
    ],
)
def test_candidates_agree_in_what_outputs_are_drawn_under(change):
    """What is known of a record by `within` parts the groups of an audit."""
    told = recipe(change)
    one, other = (Sample(key="a", offset=0, fields={"png": b"", "to.cls": label}) for label in (b"1", b"2"))
    row = Row(variant=0, status="ok", model_digest="", recipe_digest="", versions="")
    grey = np.zeros((2, 2, 3), np.uint8)
    assert known_of(one, row, grey, told) != known_of(other, row, grey, told)
    assert known_of(one, row, grey, recipe()) == known_of(other, row, grey, recipe())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, "another recipe under the same secret"),
        ({}, "weights don't depend on the record"),
        ({"sampler": {"eta": 0}}, "prefer eta 1"),
        ({"identity": "content"}, "Equal images give equal outputs"),
        ({"model": {"source": "entry-point:x"}}, "trusted"),
    ],
)
def test_what_the_bound_supposes_is_noted(change, told):
    assert any(told in note for note in account(recipe(change)).notes)
    if change:
        assert not any(told in note for note in account(recipe()).notes)


# --- the figures ---


def test_mu_and_accuracy_of_known_cases():
    assert mu(3.0, [1.5]) == 2.0
    assert mu(3.0, [1.5] * 4) == pytest.approx(2.0 * math.sqrt(4))  # K variants
    assert mu(1.0, [3.0, 4.0]) == pytest.approx(5 / 12)
    assert mu(0.0, [0.0]) == 0.0
    assert mu(1.0, [1.0, 0.0]) == math.inf
    assert mu(1.0, []) == 0.0
    assert two_candidate_accuracy(0.0) == 0.5
    assert two_candidate_accuracy(math.inf) == 1.0
    # A 32x32 colour image at its largest distance, 2 sqrt(d), under sigma 25.5: a weak guarantee.
    assert mu(2 * math.sqrt(3072), [25.5]) == pytest.approx(4.347, abs=1e-3)
    assert two_candidate_accuracy(2 * 1.959963984540054) == pytest.approx(0.975)


@pytest.mark.parametrize(
    ("delta", "sigmas"), [(-1.0, [1.0]), (1.0, [-1.0]), (math.nan, [1.0]), (1.0, [math.nan])]
)
def test_impossible_figures_are_refused(delta, sigmas):
    with pytest.raises(ValueError, match="at least 0"):
        mu(delta, sigmas)


@pytest.mark.slow
@given(st.floats(0.01, 100), st.lists(st.floats(0.01, 100), min_size=1, max_size=8))
def test_more_observations_and_less_noise_never_hide_more(delta, sigmas):
    whole = mu(delta, sigmas)
    assert whole >= mu(delta, sigmas[1:])
    assert whole >= mu(delta, [sigma * 1.1 for sigma in sigmas])
    assert 0.5 <= two_candidate_accuracy(whole) <= 1


@pytest.mark.parametrize("sigmas", [[2.0], [2.0, 2.0, 2.0], [2.0, 4.0]])
def test_the_best_attack_attains_the_bound_and_does_not_pass_it(sigmas):
    """The likelihood ratio over all observations, against 100,000 drawn jumps in 16 dimensions."""
    generator = torch.Generator().manual_seed(1)
    count = 100_000
    candidates = torch.randn(2, 16, generator=generator) / 2
    truth = torch.randint(2, (count,), generator=generator)
    score = torch.zeros(count)
    for sigma in sigmas:
        seen = candidates[truth] + sigma * torch.randn(count, 16, generator=generator)
        score += ((seen - candidates[0]).square().sum(1) - (seen - candidates[1]).square().sum(1)) / sigma**2
    right = float(((score > 0).long() == truth).double().mean())
    bound = two_candidate_accuracy(mu(float((candidates[0] - candidates[1]).norm()), sigmas))
    assert 0.6 < bound < 0.9
    assert abs(right - bound) < 4 * math.sqrt(bound * (1 - bound) / count)


def test_equal_noise_at_two_levels_hides_nothing():
    """Why the noise key mixes the recipe: equal noise at two levels is two equations for two unknowns."""
    generator = torch.Generator().manual_seed(1)
    x_0, eps = torch.randn(2, 64, generator=generator, dtype=torch.float64)
    near, far = x_0 + 2.0 * eps, x_0 + 5.0 * eps
    assert torch.allclose((5.0 * near - 2.0 * far) / 3.0, x_0)
