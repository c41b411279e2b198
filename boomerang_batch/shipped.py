"""What travels inside the package: recipes, manifests, and the demo's model and shards, found by name.

`shipped:demo/model` names a file or folder of the package, wherever it is installed. A bare name such as
`demo-anonymize` where a pipeline or a manifest is expected means the shipped file of that name.
"""

from __future__ import annotations

import os
from pathlib import Path

from boomerang_batch.errors import BoomerangError, ConfigError

SCHEME = "shipped:"
_PACKAGE = Path(__file__).parent


def resolve(ref: str) -> str:
    """The real path behind `shipped:...`; any other reference unchanged."""
    if not ref.startswith(SCHEME):
        return ref
    inside = ref.removeprefix(SCHEME)
    # Not resolve(): some installers make every file a link into their cache.
    path = Path(os.path.normpath(_PACKAGE / inside))
    if not path.is_relative_to(_PACKAGE):
        raise ConfigError(f"{ref}: leads outside the package")
    return str(path)


def named(kind: str, name: str) -> Path | None:
    """The shipped file of `kind` ("pipelines" or "manifests") called `name`, or None."""
    path = _folder(kind) / f"{name}.yaml"
    return path if name.replace("-", "").replace("_", "").isalnum() and path.is_file() else None


def names(kind: str) -> list[str]:
    """Every shipped name of `kind`, sorted."""
    return sorted(path.stem for path in _folder(kind).glob("*.yaml"))


def _folder(kind: str) -> Path:
    # A wheel carries these folders inside the package; a checkout has them beside it.
    for folder in (_PACKAGE / kind, _PACKAGE.parent / kind):
        if folder.is_dir():
            return folder
    raise BoomerangError(f"this installation has no {kind} folder; install boomerang-batch anew")
