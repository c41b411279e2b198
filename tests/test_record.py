"""run.json: what may go on in an OUT, and what is refused by name."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection
from pathlib import Path

import pytest

from boomerang_batch.config.pipeline import parse_recipe
from boomerang_batch.errors import RecipeError, RunMismatchError
from boomerang_batch.run.record import RunRecord, open_record, read_record
from boomerang_batch.run.request import paths_told, refuse_secrets

FILES = {"a": "1", "b": "2", "c": "3"}


def digest_over(files: dict[str, str], stems: Collection[str]) -> str:
    """A manifest's digest over the shards of these stems, as the driver gives it."""
    return " ".join(f"{stem}={file}" for stem, file in sorted(files.items()) if stem in stems)


def record(files: dict[str, str] = FILES, **changes: object) -> RunRecord:
    facts = {
        "name": "tiny",
        "recipe": {"steps": 6, "t": {"fraction": 0.5}},
        "recipe_digest": "r",
        "manifest_digest": digest_over(files, files),
        "limit": None,
        "shards": tuple(sorted(files)),
        "model_digest": "m" * 64,
        "noise_key_id": "seed:7",
        "stack": {"torch": "2", "threads": "1"},
    }
    return RunRecord(**facts | changes)


def open_again(
    out: Path, wanted: RunRecord, files: dict[str, str] = FILES, *, extend: bool = False, accept: bool = False
) -> RunRecord:
    return open_record(
        str(out),
        wanted,
        digest_over=lambda stems: digest_over(files, stems),
        extend=extend,
        accept_stack=accept,
    )


def refusal(out: Path, wanted: RunRecord, files: dict[str, str] = FILES, *, extend: bool = False) -> str:
    before = (out / "run.json").read_bytes()
    with pytest.raises(RunMismatchError) as caught:
        open_again(out, wanted, files, extend=extend)
    assert (out / "run.json").read_bytes() == before
    return str(caught.value)


def test_what_is_written_reads_back(tmp_path: Path):
    made = open_again(tmp_path, record())
    assert made == record() == read_record(str(tmp_path))
    assert open_again(tmp_path, record()) == made


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            {"recipe": {"steps": 7, "t": {"fraction": 0.5}}, "recipe_digest": "s"},
            "recipe steps (6 there, 7 now)",
        ),
        (
            {"recipe": {"steps": 6, "t": {"sigma": 1.0}}, "recipe_digest": "s"},
            "recipe t.fraction (0.5 there, None now), t.sigma (None there, 1.0 now)",
        ),
        ({"model_digest": "n" * 64}, "model weights"),
        ({"noise_key_id": "seed:8"}, "secret or seed (seed:7 there, seed:8 now)"),
        ({"stack": {"torch": "3", "threads": "1"}}, "stack torch (2 there, 3 now) (--accept-stack"),
        ({"limit": 3}, "limit (None there, 3 now)"),
    ],
)
def test_what_differs_is_named_and_nothing_else(tmp_path: Path, change: dict, named: str):
    open_again(tmp_path, record())
    message = refusal(tmp_path, record(**change))
    assert named in message
    assert message.count(";") == 0


def test_more_shards_need_extend_and_fewer_are_never_accepted(tmp_path: Path):
    less = {"a": "1", "b": "2"}
    open_again(tmp_path, record(less))
    assert "--extend" in refusal(tmp_path, record())
    assert open_again(tmp_path, record(), extend=True) == record()
    assert read_record(str(tmp_path)) == record()
    assert "not in it" in refusal(tmp_path, record(less), less, extend=True)


def test_other_files_under_the_stems_that_are_done_are_refused_even_with_extend(tmp_path: Path):
    """Their outputs would stay, and tell of inputs they were not made from."""
    open_again(tmp_path, record({"a": "1", "b": "2"}))
    swapped = {"a": "other", "b": "2", "c": "3"}
    assert "same stems" in refusal(tmp_path, record(swapped), swapped, extend=True)
    same = {"a": "other", "b": "2"}
    assert "same stems" in refusal(tmp_path, record(same), same)


def test_another_limit_over_the_same_files_is_called_that_and_no_other_files(tmp_path: Path):
    first = {"a": "1"}
    open_again(tmp_path, record(first, limit=1))
    message = refusal(tmp_path, record({"a": "1", "b": "2"}, limit=2))
    assert "limit (1 there, 2 now)" in message
    assert "other files" not in message
    grown = open_again(tmp_path, record({"a": "1", "b": "2"}, limit=2), extend=True)
    assert (grown.limit, grown.shards) == (2, ("a", "b"))


def test_an_accepted_stack_is_remembered_once(tmp_path: Path):
    open_again(tmp_path, record())
    other = {"torch": "3", "threads": "1"}
    for _ in range(2):
        merged = open_again(tmp_path, record(stack=other), accept=True)
    assert merged.stack == record().stack
    assert merged.accepted_stacks == (other,)
    open_again(tmp_path, record(stack=other))  # known by now
    open_again(tmp_path, dataclasses.replace(record(), accepted_stacks=()))


def with_options(purpose: str, **options: object):
    """A recipe of an installed model that is given `options`."""
    seed = "" if purpose == "anonymize" else "seed: 7"
    text = f"""
name: tiny
purpose: {purpose}
{seed}
model: {{source: "entry-point:mine", options: {json.dumps(options)}}}
t: {{fraction: 0.5}}
steps: 6
"""
    return parse_recipe(text, source="test recipe")


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        ({"hf_token": "abc"}, {"augment", "anonymize"}),
        ({"API-KEY": "abc"}, {"augment", "anonymize"}),
        ({"password": "abc"}, {"augment", "anonymize"}),
        ({"endpoint": "https://user:abc@host/x"}, {"augment", "anonymize"}),
        ({"weights": "https://host/x?sig=abc"}, {"augment", "anonymize"}),
        ({"note": "it is in-the-environment"}, {"augment", "anonymize"}),
        ({"path": "/models/edm.onnx", "weights": "s3://bucket/x", "url": "https://host/x"}, set()),
        ({"token_file": "token.txt", "key": "sigma", "tokens": 77, "tokenizer": "clip", "token": 5}, set()),
        ({"token": "", "password": False}, set()),
    ],
)
def test_options_that_must_not_stand_in_run_json_are_refused(options, refused, monkeypatch):
    monkeypatch.setenv("MY_SECRET", "in-the-environment")
    for purpose in ("augment", "anonymize"):
        recipe = with_options(purpose, **options)
        if purpose not in refused:
            refuse_secrets(recipe)
            continue
        with pytest.raises(RecipeError, match=f"model.options.{next(iter(options))}") as caught:
            refuse_secrets(recipe)
        assert not any(value in str(caught.value) for value in options.values())


def test_paths_in_options_are_told_where_out_is_to_be_published():
    options = {"path": "/models/edm.onnx", "home": "~/x", "name": "edm.onnx", "steps": 7}
    told = list(paths_told(with_options("anonymize", **options)))
    assert [text.split()[0] for text in told] == ["model.options.path", "model.options.home"]
    assert list(paths_told(with_options("augment", **options))) == []
