"""Text encoders and tokenizers against transformers' own, and the book that remembers prompts."""

from __future__ import annotations

import builtins
import gc
import json
import logging
import shutil
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from boomerang_batch.config.pipeline import ModelSpec, Prompts
from boomerang_batch.errors import ModelError
from boomerang_batch.models import load_denoiser
from boomerang_batch.models.device import Placement
from boomerang_batch.models.parts import read_part
from boomerang_batch.models.text import Encoded, PromptBook, load_text_encoder
from tests import tiny_latents, tiny_transformers

CPU = Placement(device=torch.device("cpu"))
BUILDERS = {
    "clip": (tiny_transformers.clip, tiny_transformers.clip_tokenizer),
    "projecting": (tiny_transformers.projecting_clip, tiny_transformers.clip_tokenizer),
    "t5": (tiny_transformers.t5, tiny_transformers.t5_tokenizer),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("text")
    for name, (encoder, tokenizer) in BUILDERS.items():
        tiny_latents.loud(encoder()).save_pretrained(root / name / "encoder")
        tokenizer().save_pretrained(root / name / "tokenizer")
    return root


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy of the CLIP encoder and tokenizer that a test may spoil."""
    return Path(shutil.copytree(saved / "clip", tmp_path / "clip"))


def load(folder: Path, **options):
    return load_text_encoder(read_part(folder / "encoder"), folder / "tokenizer", CPU, **options)


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("layer", [None, -2])
@pytest.mark.parametrize("name", BUILDERS)
def test_states_are_those_of_transformers(saved, name, layer):
    encoder, tokenizer = (build() for build in BUILDERS[name])
    tiny_latents.loud(encoder)
    prompt, length = "a cat, 2 dogs", 77 if name != "t5" else 24
    tokens = tokenizer(prompt, padding="max_length", max_length=length, return_tensors="pt")
    with torch.no_grad():
        states = encoder(tokens.input_ids, output_hidden_states=True)
    encoded = load(saved / name, length=24 if name == "t5" else None).encode(prompt, layer=layer)
    hidden = states.last_hidden_state if layer is None else states.hidden_states[layer]
    torch.testing.assert_close(encoded.hidden, hidden[0])
    if name == "t5":
        assert encoded.pooled is None
    else:
        pooled = states.text_embeds if name == "projecting" else states.pooler_output
        torch.testing.assert_close(encoded.pooled, pooled[0])


def test_prompts_are_cut_to_one_length_and_that_is_said_without_saying_which(saved, caplog):
    encoder = load(saved / "clip")
    with caplog.at_level(logging.WARNING):
        short, long = encoder.encode("x"), encoder.encode("secret " * 40)
        encoder.encode("secret " * 41)
    assert short.hidden.shape == long.hidden.shape == (77, encoder.width)
    assert len(caplog.messages) == 1
    assert "was cut to 77" in caplog.messages[0]
    assert "secret" not in caplog.text


def test_a_mask_is_used_where_the_encoder_was_trained_with_one(folder):
    plain = load(folder).encode("a cat")
    edit_json(folder / "encoder" / "config.json", use_attention_mask=True)
    masked = load(folder).encode("a cat")
    torch.testing.assert_close(masked.hidden[:3], plain.hidden[:3])
    assert not torch.allclose(masked.hidden[-1], plain.hidden[-1], atol=1e-3)


def test_weights_under_their_older_names_load(folder):
    """Files on the hub have text_model. before each name, and a table of positions."""
    expected = load(folder).encode("a cat")
    path = folder / "encoder" / "model.safetensors"
    old = {f"text_model.{name}": tensor for name, tensor in load_file(path).items()}
    old["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(old, path, metadata={"format": "pt"})
    assert torch.equal(load(folder).encode("a cat").hidden, expected.hidden)


def test_half_precision(saved):
    half = Placement(device=torch.device("cpu"), dtype=torch.bfloat16)
    encoded = load_text_encoder(
        read_part(saved / "clip" / "encoder"), saved / "clip" / "tokenizer", half
    ).encode("a cat")
    assert encoded.hidden.dtype == torch.bfloat16


def vocabulary_too_large(folder: Path) -> None:
    edit_json(folder / "encoder" / "config.json", architectures=["CLIPTextModel"])
    tokens = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())
    tokens["model"]["vocab"]["more"] = len(tokens["model"]["vocab"])
    (folder / "tokenizer" / "tokenizer.json").write_text(json.dumps(tokens))


def unknown_length(folder: Path) -> None:
    path = folder / "tokenizer" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["model_max_length"]
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (vocabulary_too_large, ["vocab_size", "don't belong together"]),
        (unknown_length, ["model_max_length", "77"]),
        (lambda folder: (folder / "tokenizer" / "tokenizer.json").write_text("{"), ["tokenizer.json"]),
        (lambda folder: (folder / "encoder" / "model.safetensors").write_bytes(b"x"), ["don't load"]),
        (
            lambda folder: edit_json(folder / "encoder" / "config.json", architectures=None),
            ["architectures", "T5EncoderModel"],
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused(folder, spoil: Callable[[Path], object], words):
    spoil(folder)
    with pytest.raises(ModelError) as refusal:
        load(folder)
    assert all(word in str(refusal.value) for word in words), refusal.value


def test_without_transformers_the_extra_is_named(saved, monkeypatch):
    importer = builtins.__import__

    def missing(name, *rest, **more):
        if name == "transformers":
            raise ImportError(name)
        return importer(name, *rest, **more)

    monkeypatch.delitem(sys.modules, "transformers")
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ModelError, match=r"boomerang-batch\[text\]"):
        load(saved / "clip")


@settings(max_examples=40)
@given(
    remembered=st.integers(1, 6),
    batches=st.lists(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=8), max_size=12),
)
def test_a_book_answers_like_the_encoder_and_forgets_the_least_recent(remembered, batches):
    """Against the plainest bookkeeping: a list of what was used, the latest last."""
    encoded: list[str] = []

    def encode(prompt: str) -> Encoded:
        encoded.append(prompt)
        return shades(prompt)

    book = PromptBook(encode, memory=remembered * shades("a").hidden.nbytes)
    known: list[str] = []
    for batch in batches:
        expected = [prompt for prompt in dict.fromkeys(batch) if prompt not in known]
        encoded.clear()
        told = book.look_up(batch)
        assert [int(one.hidden[0]) for one in told] == [ord(prompt) for prompt in batch]
        assert encoded == expected
        for prompt in batch:
            known = [one for one in known if one != prompt] + [prompt]
        known = known[-max(remembered, len(set(batch))) :]


def shades(prompt: str) -> Encoded:
    return Encoded(hidden=torch.tensor([float(ord(prompt))] * 3), pooled=None)


def test_a_released_book_knows_what_it_knew_and_keeps_no_encoder():
    class Encoder:
        def __call__(self, prompt: str) -> Encoded:
            return shades(prompt)

    encoder = Encoder()
    book, kept = PromptBook(encoder), weakref.ref(encoder)
    del encoder
    book.look_up(["a"])
    book.release()
    gc.collect()
    assert kept() is None
    assert [int(one.hidden[0]) for one in book.look_up(["a", "a"])] == [ord("a")] * 2
    with pytest.raises(ModelError, match=r"model\.prompts\.field"):
        book.look_up(["b"])


def encoders_in_memory() -> int:
    gc.collect()
    return sum(type(one) is CLIPTextModel for one in gc.get_objects())


@pytest.mark.slow
@pytest.mark.parametrize("field", [None, "txt"])
def test_encoders_are_kept_for_captions_only(tmp_path, monkeypatch, field):
    tiny_latents.stable_diffusion().save_pretrained(tmp_path / "sd")
    prompts = Prompts(field=field, text="" if field else "a cat", guidance=2.0)
    spec = ModelSpec(source=str(tmp_path / "sd"), prompts=prompts)
    before = encoders_in_memory()
    denoiser = load_denoiser(spec, device="cpu", threads=1)
    assert encoders_in_memory() - before == (0 if field is None else 1)
    x_t, tau = torch.zeros(1, 4, 8, 8), torch.tensor([3.0], dtype=torch.float64)
    denoiser.denoise(x_t, tau, [None])
    if field is None:
        denoiser.denoise(x_t, tau, ["a cat"])
        denoiser.denoise(x_t, tau, [""])  # an idle slot
        with pytest.raises(ModelError, match="released"):
            denoiser.denoise(x_t, tau, ["another caption"])
    else:
        denoiser.denoise(x_t, tau, ["another caption"])
