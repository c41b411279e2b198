"""Where a model lies on disk, which of its files count, and the digest that pins it.

A source is a diffusers pipeline folder (model_index.json), a bare network folder (config.json beside the
weights), either of them in a store, `shipped:...`, or a hub id at a pinned commit. Configurations are parsed as
data and weights are safetensors only: reading a pickle runs whatever code it holds.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.errors import HTTPError as HubError  # type: ignore[attr-defined]  # its client's base

from boomerang_batch.config.pipeline import ModelSpec
from boomerang_batch.errors import ModelError
from boomerang_batch.models.fetch import fetch
from boomerang_batch.models.parts import Part, read_json, read_part
from boomerang_batch.shipped import SCHEME, resolve

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_MODEL_FILES = ["*.json", "*.txt", "*/*.safetensors", "diffusion_pytorch_model*.safetensors"]
_DATA_FILES = (
    "added_tokens.json",
    "merges.txt",
    "preprocessor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)
"""What a tokenizer or an image processor is made of: data, no code."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Which folders of a diffusers pipeline make a denoiser. A text encoder that is null there is left out."""

    network: str
    network_class: str
    former_class: str | None = None
    """What diffusers called the network's class once, in files written then."""
    autoencoder: str | None = None
    text: tuple[tuple[str, str], ...] = ()
    """(text encoder, its tokenizer), in the order in which the family combines them."""
    safety: str | None = None
    """The safety checker; its image processor lies in feature_extractor."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model found on disk."""

    pipeline: str | None
    """The diffusers pipeline that model_index.json names; None for a bare network."""
    index: Mapping[str, Any]
    """model_index.json, empty for a bare network."""
    layout: Layout
    network: Part
    scheduler: Path
    """The scheduler_config.json."""
    scheduler_config: dict[str, Any]
    parts: Mapping[str, Part]
    """The other networks that are used, by folder name: autoencoder, text encoders, safety checker."""
    data: Mapping[str, Path]
    """Folders of tokenizers and image processors that are used, by folder name."""
    digest: str
    """SHA-256 (hex) over every file that is used."""


def find_source(spec: ModelSpec, layouts: Mapping[str | None, Layout]) -> Source:
    """Find the model a recipe names, downloading a pinned hub id if it is not in the hub's cache.

    `layouts` are the diffusers pipelines that are supported; None stands for a bare network. Raises ModelError
    saying what is missing or not supported, and the fix.
    """
    root = _root(spec)
    index = read_json(root / "model_index.json") if (root / "model_index.json").is_file() else {}
    pipeline = index.get("_class_name")
    if spec.subfolder is None and index and (pipeline is None or pipeline not in layouts):
        supported = ", ".join(sorted(filter(None, layouts)))
        raise ModelError(
            f"{root / 'model_index.json'}: diffusers pipeline {pipeline!r} is not supported; supported are "
            f"{supported} and a bare {layouts[None].network_class} folder"
        )
    pipeline = pipeline if pipeline in layouts else None
    layout = layouts[pipeline]
    network = read_part(_network_folder(root, spec, layout))
    found = network.config.get("_class_name")
    if found not in (layout.network_class, layout.former_class):
        raise ModelError(
            f"{network.where}: _class_name {found!r} is not supported; supported is {layout.network_class}"
        )
    scheduler = _scheduler_file(root, network.folder)
    parts = {name: read_part(root / name) for name in _other_networks(root, index, layout, spec)}
    data = {tokenizer: root / tokenizer for encoder, tokenizer in layout.text if encoder in parts}
    if layout.safety in parts:
        data["feature_extractor"] = root / "feature_extractor"
    for folder in data.values():
        if not any((folder / name).is_file() for name in _DATA_FILES):
            raise ModelError(f"{folder}: there is nothing of a tokenizer or image processor; copy it there")
    source = Source(
        pipeline=pipeline,
        index=index if pipeline else {},
        layout=layout,
        network=network,
        scheduler=scheduler,
        scheduler_config=read_json(scheduler),
        parts=parts,
        data=data,
        digest="",
    )
    return replace(source, digest=_digest(source, root))


def _other_networks(root: Path, index: Mapping[str, Any], layout: Layout, spec: ModelSpec) -> Iterator[str]:
    """Folder names of the networks beside the main one."""
    if layout.autoencoder is not None:
        yield layout.autoencoder
    for encoder, _ in layout.text:
        if _is_listed(index, encoder):
            yield encoder
    if spec.safety == "unchecked":
        return
    if layout.safety is None or not _is_listed(index, layout.safety):
        raise ModelError(
            f"model.safety {spec.safety}: {root} brings no safety checker; set model.safety: unchecked, or "
            "name a model whose model_index.json lists safety_checker"
        )
    yield layout.safety


def _is_listed(index: Mapping[str, Any], component: str) -> bool:
    """Whether model_index.json says that the pipeline has this component: [library, class] or [null, null]."""
    entry = index.get(component)
    return isinstance(entry, list) and bool(entry) and None not in entry


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
        return fetch(spec.source, patterns=_MODEL_FILES)
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
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=_MODEL_FILES))
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


def _network_folder(root: Path, spec: ModelSpec, layout: Layout) -> Path:
    if spec.subfolder is not None:
        folder = root / spec.subfolder
        if not folder.is_dir() or not folder.resolve().is_relative_to(root.resolve()):
            raise ModelError(f"model.subfolder {spec.subfolder}: there is no such folder in {root}")
        return folder
    # Early diffusers wrote every component of a pipeline into one folder.
    folder = root / layout.network if (root / layout.network).is_dir() else root
    if folder == root and not any((root / name).is_file() for name in ("model_index.json", "config.json")):
        raise ModelError(
            f"{root}: neither model_index.json nor config.json is there; give a folder that save_pretrained "
            "wrote, or model.subfolder where the network lies deeper"
        )
    return folder


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


def _digest(source: Source, root: Path) -> str:
    """SHA-256 over one line `name hex` per file, the network first; independent of where the folder lies."""
    named = [("network", source.network.where), ("scheduler", source.scheduler)]
    named += [(path.name, path) for path in source.network.weights]
    if source.layout.text:  # the index holds settings of its own, for example what an empty prompt means
        named.append(("model_index", root / "model_index.json"))
    for name, part in source.parts.items():
        named += [(f"{name}/{path.name}", path) for path in (part.where, *part.weights)]
    for name, folder in source.data.items():
        present = [folder / file for file in _DATA_FILES if (folder / file).is_file()]
        named += [(f"{name}/{path.name}", path) for path in present]
    lines = []
    for name, path in named:
        with path.open("rb") as stream:
            lines.append(f"{name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()
