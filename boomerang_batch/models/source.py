"""Where a model lies on disk, which of its files count, and the digest that pins it.

A source is a diffusers pipeline folder (model_index.json), a bare network folder (config.json beside the
weights), `shipped:...`, or a hub id at a pinned commit. Configurations are parsed as data and weights are
safetensors only: reading a pickle runs whatever code it holds.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.errors import HTTPError as HubError  # type: ignore[attr-defined]  # its client's base

from boomerang_batch.config.pipeline import ModelSpec
from boomerang_batch.errors import ModelError
from boomerang_batch.shipped import SCHEME, resolve

PIPELINES = ("DDIMPipeline", "DDPMPipeline", "ScoreSdeVePipeline")
NETWORK = "UNet2DModel"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_WEIGHTS = "diffusion_pytorch_model"
_PICKLES = (".bin", ".ckpt", ".pkl", ".pt", ".pth")


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model found on disk, its configurations read, its weights not."""

    network: Path
    """Folder of config.json and the weights."""
    network_config: dict[str, Any]
    scheduler: Path
    """The scheduler_config.json."""
    scheduler_config: dict[str, Any]
    variant: str | None
    """diffusers' word in the weight files' names, such as fp16."""
    digest: str


def find_source(spec: ModelSpec) -> Source:
    """Find the model a recipe names, downloading a pinned hub id if it is not in the hub's cache.

    Raises ModelError saying what is missing or not supported, and the fix.
    """
    root = _root(spec)
    network = _network_folder(root, spec)
    config = _read_json(network / "config.json")
    if config.get("_class_name") != NETWORK:
        raise ModelError(
            f"{network / 'config.json'}: _class_name {config.get('_class_name')!r} is not supported; "
            f"pixel models are {NETWORK}"
        )
    scheduler = _scheduler_file(root, network)
    weights, variant = _weights(network)
    return Source(
        network=network,
        network_config=config,
        scheduler=scheduler,
        scheduler_config=_read_json(scheduler),
        variant=variant,
        digest=_digest({"network": network / "config.json", "scheduler": scheduler}, weights),
    )


def _root(spec: ModelSpec) -> Path:
    if spec.source.startswith(SCHEME):
        path = Path(resolve(spec.source))
        if not path.is_dir():
            raise ModelError(f"model.source {spec.source}: this installation ships no such folder")
        return path
    path = Path(spec.source).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise ModelError(
            f"model.source {path}: a single file; give a diffusers folder, as save_pretrained writes it"
        )
    if "://" in spec.source:
        raise ModelError(f"model.source {spec.source}: models load from a local folder; download it first")
    if not _HUB_ID.fullmatch(spec.source):
        raise ModelError(
            f"model.source {spec.source}: there is no such folder, and it is no hub id (owner/name)"
        )
    return _download(spec.source, spec.revision)


def _download(hub_id: str, revision: str | None) -> Path:
    if revision is None:
        raise ModelError(
            f"model.source {hub_id}: there is no such folder; a hub id needs model.revision, the 40-digit "
            "commit, so that the same recipe always means the same weights"
        )
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=["*.json", "*.safetensors"]))
    except GatedRepoError as error:
        raise ModelError(
            f"model.source {hub_id}: the hub wants you to accept its terms and log in (hf auth login)"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(f"model.revision {revision}: {hub_id} has no such commit on the hub") from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"model.source {hub_id}: the hub has no such model, or it is private: log in with hf auth login"
        ) from error
    except (HubError, OSError, ValueError) as error:
        raise ModelError(
            f"model.source {hub_id}: commit {revision[:12]} is not in the hub's local cache and the hub can't "
            "be reached; connect to the network once, or copy the model here and give its folder"
        ) from error


def _network_folder(root: Path, spec: ModelSpec) -> Path:
    if spec.subfolder is not None:
        folder = root / spec.subfolder
        if not folder.is_dir() or not folder.resolve().is_relative_to(root.resolve()):
            raise ModelError(f"model.subfolder {spec.subfolder}: there is no such folder in {root}")
        return folder
    index = root / "model_index.json"
    if not index.is_file():
        if (root / "config.json").is_file():
            return root
        raise ModelError(
            f"{root}: neither model_index.json nor config.json is there; give a folder that save_pretrained "
            "wrote, or model.subfolder where the network lies deeper"
        )
    pipeline = _read_json(index).get("_class_name")
    if pipeline not in PIPELINES:
        raise ModelError(
            f"{index}: diffusers pipeline {pipeline!r} is not supported; supported are {', '.join(PIPELINES)} "
            f"and a bare {NETWORK} folder"
        )
    # Early diffusers wrote every component of a pipeline into one folder.
    return root / "unet" if (root / "unet").is_dir() else root


def _scheduler_file(root: Path, network: Path) -> Path:
    name = "scheduler_config.json"
    places = [root / "scheduler" / name, network.parent / "scheduler" / name, network / name]
    for place in places:
        if place.is_file():
            return place
    raise ModelError(
        f"{network}: no scheduler configuration, so the noise levels the network was trained on are unknown; "
        f"put its {name} at {places[0]}"
    )


def _weights(network: Path) -> tuple[list[Path], str | None]:
    """The weight files, in a fixed order, and diffusers' variant of them."""
    whole = network / f"{_WEIGHTS}.safetensors"
    index = network / f"{_WEIGHTS}.safetensors.index.json"
    if whole.is_file() and index.is_file():
        # diffusers would read the parts, whatever we take the digest of.
        raise ModelError(f"{network}: both {whole.name} and {index.name} are there; keep one of them")
    if whole.is_file():
        return [whole], None
    if index.is_file():
        parts = sorted(set(_read_json(index).get("weight_map", {}).values()))
        missing = [part for part in parts if Path(part).name != part or not (network / part).is_file()]
        if missing or not parts:
            raise ModelError(
                f"{index}: names weight files that are not there: {', '.join(missing) or 'none named'}"
            )
        return [index, *(network / part for part in parts)], None
    variants = sorted(network.glob(f"{_WEIGHTS}.*.safetensors"))
    if len(variants) == 1:
        return variants, variants[0].name.split(".")[1]
    if variants:
        found = ", ".join(path.name for path in variants)
        raise ModelError(
            f"{network}: several variants of the weights ({found}); keep {whole.name} or just one of them"
        )
    pickles = sorted(path.name for path in network.iterdir() if path.suffix in _PICKLES)
    if pickles:
        raise ModelError(
            f"{network / pickles[0]}: pickle weights are refused, since reading a pickle runs the code in it; "
            f"if you trust it, convert it once: diffusers' {NETWORK}.from_pretrained(FOLDER, "
            "use_safetensors=False).save_pretrained(FOLDER)"
        )
    raise ModelError(
        f"{network}: no {whole.name} is there; a hub model that has pickle weights only must be converted first"
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{path}: there is no such file; a diffusers folder has it") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(data, dict):
        raise ModelError(f"{path}: a configuration is a JSON object, this is {type(data).__name__}")
    return data


def _digest(configs: dict[str, Path], weights: list[Path]) -> str:
    """SHA-256 over one line `name hex` per file, configurations first; independent of where the folder lies."""
    named = [*configs.items(), *((path.name, path) for path in weights)]
    lines = []
    for name, path in named:
        with path.open("rb") as stream:
            lines.append(f"{name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()
