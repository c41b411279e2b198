"""What a job is told: its id, its command, the files that travel with it; and what must not travel.

The id comes from what is asked for, so asking twice is asking once. Whatever a job is told can be read by
everyone who can list jobs, so no secret is in it: not the noise's, and no URL that carries credentials. Names
and URLs are passed on as they are. A recipe or manifest on this machine's disk travels as text. Local paths are
refused unless they are shared, and then a manifest of relative ones is shared with them and stays where it is.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from boomerang_batch import __version__, shipped, storage
from boomerang_batch.config.blocks import ENTRY_POINT
from boomerang_batch.config.pipeline import Recipe
from boomerang_batch.data.manifest import Manifest, ShardEntry
from boomerang_batch.errors import ConfigError, PrivateDirError
from boomerang_batch.run.jobs.job import TOOL
from boomerang_batch.run.private import SECRET_VARIABLE
from boomerang_batch.run.request import models_of, refuse_secrets

STOP_WAIT_S = 120
"""How long a stopped job may take to come to a batch boundary before Ray kills it."""


@dataclass(frozen=True, kw_only=True)
class Wish:
    """A run as it was typed, and what was read here of what it names."""

    pipeline: str
    manifest: str
    out: str
    private_dir: str | None
    limit: int | None
    options: Sequence[str]
    """Every option of `run` in words, but for its address."""
    recipe: Recipe
    shards: Manifest


@dataclass(frozen=True, kw_only=True)
class JobRequest:
    """What is handed to the cluster."""

    run_id: str
    entrypoint: str
    files: Mapping[str, bytes]
    """Files in the folder the entrypoint runs in, by name."""
    metadata: Mapping[str, str]


def job_request(wish: Wish, *, shared: bool, done: int | None = None) -> JobRequest:
    """Put a wish in words for the cluster. Raises ConfigError naming what can't be sent, and the fix.

    `shared` says that local paths mean the same files on every machine of the cluster; `done`, how many
    shards OUT has already, which tells the job's own pace later.
    """
    _refuse_secrets(wish)
    if not shared:
        _refuse_local_paths(wish)
    files: dict[str, bytes] = {}
    out = storage.absolute(wish.out)
    words = [
        _sent(files, "pipeline.yaml", _file("pipelines", wish.pipeline), wish.pipeline),
        _manifest_word(files, wish),
        out,
        # Inside a job this is the job's own cluster, by the RAY_ADDRESS that Ray sets there.
        "--address=auto",
        *wish.options,
    ]
    for place, folder in _model_folders(wish.recipe):
        if not folder.startswith("/"):
            # The job runs in another folder than this one. The digest knows a model's folder by name only.
            words.append(f"--set={place}={json.dumps(str(Path(folder).expanduser().absolute()))}")
    metadata = {
        "tool": TOOL,
        "version": __version__,
        "run": _run_id(wish),
        "recipe": wish.recipe.name,
        "out": out,
        **({} if done is None else {"done": str(done)}),
    }
    # `exec`: a stop signals the shell as well, and the run must be what Ray waits for.
    entrypoint = shlex.join(["exec", "python", "-m", "boomerang_batch", "run", *words])
    return JobRequest(run_id=metadata["run"], entrypoint=entrypoint, files=files, metadata=metadata)


def _run_id(wish: Wish) -> str:
    """The same for the same recipe, shards and OUT."""
    asked = [wish.recipe.digest, wish.shards.digest, storage.absolute(wish.out), wish.limit]
    return "bb-" + hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:12]


def _refuse_secrets(wish: Wish) -> None:
    refuse_secrets(wish.recipe)
    named = [("PIPELINE", wish.pipeline), ("MANIFEST", wish.manifest), ("OUT", wish.out)]
    named += [
        (f"{place}.source in {wish.pipeline}", model.source) for place, model in models_of(wish.recipe).items()
    ]
    if _file("manifests", wish.manifest) is not None:
        named += [(f"a shard in {wish.manifest}", entry.url) for entry in wish.shards.shards]
    for what, url in named:
        if _carries_credentials(url):
            raise ConfigError(
                f"{what} is a URL with credentials in it, and everyone who can list the cluster's jobs would "
                "read them; give a plain URL and let the cluster's own credentials open it, or put a manifest "
                "of such URLs where the cluster can read it and give its URL"
            )
    if wish.recipe.purpose != "anonymize":
        return
    if wish.private_dir is None:
        raise PrivateDirError("purpose anonymize writes the table of pseudonyms: give --private-dir DIR")
    if SECRET_VARIABLE in os.environ:
        raise PrivateDirError(
            f"{SECRET_VARIABLE} is set here, and a secret is never sent to a cluster, where everyone who can "
            "list jobs would read it: set it in the environment of the cluster's own machines (on Kubernetes "
            "from a Secret) or keep it in the private dir, and unset it here"
        )


def _carries_credentials(url: str) -> bool:
    if "://" not in url:
        return False
    return storage.holds_credentials(url) or (url.startswith(("http:", "https:")) and "?" in url)


def _refuse_local_paths(wish: Wish) -> None:
    for what, path in _local_paths(wish):
        raise ConfigError(
            f"{what} is the path {path}, and the cluster may have other disks than this machine: give a URL "
            "such as s3://bucket/name, or say --shared-files if that path is the same on every machine of the "
            "cluster"
        )


def _local_paths(wish: Wish) -> Iterator[tuple[str, str]]:
    """Whatever the run reads or writes at a path, with what it is."""
    if storage.is_local(wish.out):
        yield "OUT", wish.out
    if wish.private_dir is not None:
        yield "--private-dir", wish.private_dir
    for entry in _local_shards(wish.shards):
        yield f"a shard in {wish.manifest}", entry.url
    for place, folder in _model_folders(wish.recipe):
        yield f"{place} in {wish.pipeline}", folder


def _local_shards(manifest: Manifest) -> list[ShardEntry]:
    entries = [entry for entry in manifest.shards if not entry.written.startswith(shipped.SCHEME)]
    return [entry for entry in entries if storage.is_local(entry.url)]


def _model_folders(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Where the recipe names a local folder for a model, and which; not what a cluster finds by itself."""
    for place, model in models_of(recipe).items():
        elsewhere = model.source.startswith((shipped.SCHEME, ENTRY_POINT)) or not storage.is_local(model.source)
        if not elsewhere and model.revision is None:
            yield f"{place}.source", model.source


def _manifest_word(files: dict[str, bytes], wish: Wish) -> str:
    path = _file("manifests", wish.manifest)
    if path is not None and any(
        not entry.written.startswith(("/", "file://")) for entry in _local_shards(wish.shards)
    ):
        # They are relative to the manifest's own folder, and how they are written enters the run's record.
        return str(path.absolute())
    return _sent(files, f"manifest{path.suffix if path else ''}", path, wish.manifest)


def _file(kind: str, ref: str) -> Path | None:
    """The local file that `ref` means; None where it is a shipped one's name or a URL."""
    if shipped.named(kind, ref) or ref.startswith(shipped.SCHEME) or not storage.is_local(ref):
        return None
    return storage.local_path(ref)


def _sent(files: dict[str, bytes], name: str, path: Path | None, ref: str) -> str:
    """The word for a recipe or manifest; a local file goes along under `name`."""
    if path is None:
        return ref
    files[name] = storage.read_bytes(str(path))
    return name
