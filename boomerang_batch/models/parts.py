"""One network's folder: its configuration, read as data, and which of its weight files count."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from boomerang_batch.errors import ModelError

_STEMS = ("diffusion_pytorch_model", "model")
"""What diffusers and transformers call their weight files."""
_PICKLES = (".bin", ".ckpt", ".pkl", ".pt", ".pth")


@dataclass(frozen=True, kw_only=True)
class Part:
    """One network found on disk, its configuration read, its weights not."""

    folder: Path
    config: dict[str, Any]
    weights: tuple[Path, ...]
    variant: str | None
    """diffusers' word in the weight files' names, such as fp16."""

    @property
    def where(self) -> Path:
        """The configuration file, for messages."""
        return self.folder / "config.json"


def read_part(folder: Path) -> Part:
    """The network in `folder`. Raises ModelError naming the file that is missing, unreadable or refused."""
    config = read_json(folder / "config.json")
    weights, variant = _weights(folder)
    return Part(folder=folder, config=config, weights=tuple(weights), variant=variant)


def read_json(path: Path) -> dict[str, Any]:
    """A configuration file. Raises ModelError where it is no JSON object."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{path}: there is no such file; a diffusers folder has it") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(data, dict):
        raise ModelError(f"{path}: a configuration is a JSON object, this is {type(data).__name__}")
    return data


def _weights(folder: Path) -> tuple[list[Path], str | None]:
    """The weight files, in a fixed order, and diffusers' variant of them."""
    for stem in _STEMS:
        whole = folder / f"{stem}.safetensors"
        index = folder / f"{stem}.safetensors.index.json"
        if whole.is_file() and index.is_file():
            # diffusers would read the parts, whatever we take the digest of.
            raise ModelError(f"{folder}: both {whole.name} and {index.name} are there; keep one of them")
        if whole.is_file():
            return [whole], None
        if index.is_file():
            return [index, *_listed_weights(index)], None
        variants = sorted(folder.glob(f"{stem}.*.safetensors"))
        if len(variants) == 1:
            return variants, variants[0].name.split(".")[1]
        if variants:
            found = ", ".join(path.name for path in variants)
            raise ModelError(
                f"{folder}: several variants of the weights ({found}); keep {whole.name} or just one of them"
            )
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
    if pickles:
        raise ModelError(
            f"{folder / pickles[0]}: pickle weights are refused, since reading a pickle runs the code in it; "
            "if you trust it, convert it once: from_pretrained(FOLDER, use_safetensors=False) of its class, "
            "then save_pretrained(FOLDER)"
        )
    raise ModelError(
        f"{folder}: no {_STEMS[0]}.safetensors or {_STEMS[1]}.safetensors is there; a hub model that has "
        "pickle weights only must be converted first"
    )


def _listed_weights(index: Path) -> list[Path]:
    """The parts of sharded weights, by name."""
    names = sorted(set(read_json(index).get("weight_map", {}).values()))
    missing = [name for name in names if Path(name).name != name or not (index.parent / name).is_file()]
    if missing or not names:
        raise ModelError(
            f"{index}: names weight files that are not there: {', '.join(missing) or 'none named'}"
        )
    return [index.parent / name for name in names]
