"""Prompts to what a network is told: text encoders with their tokenizers, and each prompt encoded once.

A prompt is encoded alone and padded to one length, so its embedding depends on nothing but the prompt.
Tokenizers are read as data (tokenizer.json, vocabularies); no code of a model's repository is run.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from boomerang_batch.errors import ModelError
from boomerang_batch.models.device import Placement
from boomerang_batch.models.parts import Part
from boomerang_batch.models.source import Source
from boomerang_batch.models.weights import load_weights

_logger = logging.getLogger(__name__)

_TOKENIZERS = {
    "CLIPTextModel": "CLIPTokenizerFast",
    "CLIPTextModelWithProjection": "CLIPTokenizerFast",
    "T5EncoderModel": "T5TokenizerFast",
}

Told = TypeVar("Told")


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """One prompt, as one encoder says it; on the encoder's device and in its dtype."""

    hidden: Tensor
    """(length, width)."""
    pooled: Tensor | None
    """(width,): the projected embedding of a model with projection, else the pooled state; T5 has none."""


class TextEncoder:
    """A text encoder and its tokenizer."""

    def __init__(
        self, module: Any, tokenizer: Any, *, length: int, device: torch.device, where: str = "text encoder"
    ) -> None:
        self.width: int = module.config.hidden_size
        self.length = length
        self._module = module
        self._tokenizer = tokenizer
        self._device = device
        self._where = where
        self._told_of_cuts = False

    def encode(self, prompt: str, *, layer: int | None = None) -> Encoded:
        """The prompt's states, cut or padded to `length` tokens.

        `layer` picks one of the encoder's layers, counted as in its hidden_states (-2: all but the last, which
        SDXL and SD3 take, without the final norm); None is the encoder's output.
        """
        tokens = self._tokenizer(
            [prompt], padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        )
        self._tell_of_cuts(prompt)
        # diffusers masks the padding only where the encoder was trained with a mask.
        masked = getattr(self._module.config, "use_attention_mask", False)
        with torch.no_grad():
            states = self._module(
                tokens.input_ids.to(self._device),
                attention_mask=tokens.attention_mask.to(self._device) if masked else None,
                output_hidden_states=layer is not None,
            )
        hidden = states.last_hidden_state if layer is None else states.hidden_states[layer]
        pooled = states.get("text_embeds", states.get("pooler_output"))
        return Encoded(hidden=hidden[0], pooled=None if pooled is None else pooled[0])

    def _tell_of_cuts(self, prompt: str) -> None:
        """Say once that prompts are too long; never which, since a prompt may be a private caption."""
        if self._told_of_cuts:
            return
        count = len(self._tokenizer(prompt, truncation=False, verbose=False).input_ids)
        if count > self.length:
            self._told_of_cuts = True
            _logger.warning(
                "%s: a prompt of %d tokens was cut to %d, as will be any other that is too long",
                self._where,
                count,
                self.length,
            )


def load_text_encoder(
    part: Part, tokenizer: Path, placement: Placement, *, length: int | None = None
) -> TextEncoder:
    """The text encoder of a component folder, with the tokenizer of another.

    `length` in tokens; None: the tokenizer's own model_max_length. Raises ModelError when transformers is not
    installed, or a part is of a kind that is not supported or does not fit.
    """
    transformers = _transformers()
    name = (part.config.get("architectures") or [None])[0]
    if name not in _TOKENIZERS:
        raise ModelError(
            f"{part.where}: text encoder {name!r} (architectures) is not supported; supported are "
            f"{', '.join(_TOKENIZERS)}"
        )
    reader = _read_tokenizer(getattr(transformers, _TOKENIZERS[name]), tokenizer)
    longest = part.config.get("max_position_embeddings")
    length = reader.model_max_length if length is None else length
    if longest is not None and length > longest:
        raise ModelError(
            f"{tokenizer}: prompts of {length} tokens (model_max_length) don't fit the text encoder's "
            f"{longest} positions ({part.where}: max_position_embeddings); make them agree"
        )
    if length > 1_000_000:  # what transformers says when the file says nothing
        raise ModelError(f"{tokenizer}: model_max_length is missing; write it into tokenizer_config.json")
    module = load_weights(part, getattr(transformers, name), dtype=placement.dtype)
    vocabulary = part.config.get("vocab_size")
    if vocabulary is not None and len(reader) > vocabulary:
        raise ModelError(
            f"{tokenizer}: {len(reader)} tokens, but the text encoder embeds {vocabulary} "
            f"({part.where}: vocab_size); the two don't belong together"
        )
    return TextEncoder(
        module.to(device=placement.device),
        reader,
        length=length,
        device=placement.device,
        where=str(part.folder),
    )


def load_text_encoders(
    source: Source, placement: Placement, *, lengths: Sequence[int | None] = ()
) -> list[TextEncoder | None]:
    """The text encoders of a source in the layout's order, None for one that the pipeline does not have.

    `lengths` in tokens, by position; missing or None: the tokenizer's own.
    """
    encoders: list[TextEncoder | None] = []
    for position, (encoder, tokenizer) in enumerate(source.layout.text):
        length = lengths[position] if position < len(lengths) else None
        found = source.parts.get(encoder)
        encoders.append(
            None
            if found is None
            else load_text_encoder(found, source.data[tokenizer], placement, length=length)
        )
    return encoders


class PromptBook(Generic[Told]):
    """What the network is told for each prompt: worked out once, remembered, the least recent forgotten."""

    def __init__(self, encode: Callable[[str], Told], *, memory: int = 1 << 30) -> None:
        """`encode` holds the text encoders, and gives a dataclass of tensors; `memory`, in bytes, is for what
        is remembered, exceeded only by what one batch needs.
        """
        self._encode: Callable[[str], Told] | None = encode
        self._free = memory
        self._told: OrderedDict[str, Told] = OrderedDict()

    def look_up(self, prompts: Sequence[str]) -> list[Told]:
        """What the network is told for each of these. Raises ModelError for a new one after `release`."""
        for prompt in prompts:
            if prompt not in self._told:
                self._told[prompt] = self._work_out(prompt)
                self._free -= _bytes(self._told[prompt])
            self._told.move_to_end(prompt)
        found = [self._told[prompt] for prompt in prompts]
        while self._free < 0 and len(self._told) > len(set(prompts)):
            self._free += _bytes(self._told.popitem(last=False)[1])
        return found

    def release(self) -> None:
        """Let the text encoders go; from now on only the prompts looked up so far are known."""
        self._encode = None

    def _work_out(self, prompt: str) -> Told:
        if self._encode is None:
            raise ModelError(
                "a prompt other than the recipe's came after the text encoders were released; prompts that "
                "differ between samples need model.prompts.field"
            )
        return self._encode(prompt)


def _bytes(told: object) -> int:
    return sum(value.nbytes for value in vars(told).values() if isinstance(value, Tensor))


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ModelError(
            "this model has text encoders, which need transformers: pip install 'boomerang-batch[text]'"
        ) from error
    return transformers


def _read_tokenizer(kind: Any, folder: Path) -> Any:
    try:
        return kind.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError, ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(
            f"{folder}: not a tokenizer that can be read as data: {reason}; a fast tokenizer's folder holds "
            "tokenizer.json"
        ) from error
