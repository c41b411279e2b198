"""The layers of docs/architecture.md, enforced: who may import whom, and who may import which library."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import boomerang_batch

ROOT = Path(boomerang_batch.__file__).parent
PACKAGE = "boomerang_batch"

LAYERS = {
    "": 0,
    "errors": 0,
    "config": 1,
    "storage": 1,
    "shipped": 1,
    "installed": 1,
    "diffusion": 1,
    "measures": 2,
    "data": 2,
    "models": 2,
    "run": 3,
    "run.worker": 4,
    "run.ray_cluster": 4,
    "run.member": 5,
    "run.crew": 5,
    "run.dispatch": 5,
    "run.driver": 5,
    "run.jobs.cluster": 6,
    "loader": 4,
    "audit": 6,
    "audit.findings": 2,
    "audit.names": 2,
    "report": 6,
    "cli": 7,
    "demo": 7,
    "__main__": 8,
}
"""Layer of a room, or of a module that stands above the rest of its room. A module imports its own room's
modules up to its own layer, and other rooms only from lower layers."""

SOLE_IMPORTERS = {
    "PIL": {"data.images"},
    "braceexpand": {"data.manifest"},
    "click": {"cli"},
    "diffusers": {"models", "demo"},
    "fsspec": {"storage"},
    "ray": {"run.worker", "run.dispatch", "run.ray_cluster", "run.metrics", "run.jobs.cluster"},
    "tarfile": {"data.shards", "data.tars"},
    "transformers": {"models"},
    "webdataset": {"data.shards", "data.manifest"},
}
"""Which modules, or whole rooms, may import a library that one place is to own."""

CLOSED = {"diffusion": {"torch"}}
"""Rooms that may import nothing from outside but the standard library and these."""


@functools.cache
def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name below the package; the package itself is ''."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = list(path.relative_to(ROOT).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(source: str, module: str, *, is_package: bool) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of every import in `source`, those inside functions included."""
    inside = [PACKAGE, *filter(None, module.split("."))]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            up = inside[: len(inside) - node.level + is_package] if node.level else []
            base = ".".join([*up, node.module] if node.module else up)
            for alias in node.names:
                # `from package import name`: the name may be a module of its own.
                inner = f"{base}.{alias.name}".removeprefix(f"{PACKAGE}.")
                yield node.lineno, f"{base}.{alias.name}" if inner in modules() else base


def layer(module: str) -> int:
    return LAYERS[module] if module in LAYERS else LAYERS[module.split(".")[0]]


def violations(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """What `source`, standing as `module`, imports and must not."""
    room = module.split(".")[0]
    problems = []
    for line, name in imports(source, module, is_package=is_package):
        top = name.split(".")[0]
        if top == PACKAGE:
            target = name.removeprefix(PACKAGE).removeprefix(".")
            same_room = target.split(".")[0] == room
            highest = layer(module) if same_room else layer(module) - 1
            if target and layer(target) > highest:
                problems.append(f"{module}:{line} (L{layer(module)}) imports {target} (L{layer(target)})")
            continue
        if top in SOLE_IMPORTERS and not SOLE_IMPORTERS[top] & {module, room}:
            problems.append(f"{module}:{line} imports {top}, which belongs to {sorted(SOLE_IMPORTERS[top])}")
        if room in CLOSED and top not in sys.stdlib_module_names | CLOSED[room]:
            problems.append(f"{module}:{line} imports {top}; {room} may import only {sorted(CLOSED[room])}")
    return problems


@pytest.mark.parametrize("module", modules())
def test_module_keeps_to_its_layer(module):
    path = modules()[module]
    assert violations(path.read_text(), module, is_package=path.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("module", "source", "named"),
    [
        ("diffusion.noise", "import numpy", "numpy"),
        ("diffusion.noise", "from boomerang_batch import storage", "storage"),
        ("diffusion.noise", "def f():\n    from boomerang_batch.data.shards import Sample", "data.shards"),
        ("storage", "from boomerang_batch.config.pipeline import Recipe", "config.pipeline"),
        ("data.images", "from boomerang_batch.models import load_denoiser", "models"),
        ("data.geometry", "from PIL import Image", "PIL"),
        ("data.manifest", "import tarfile", "tarfile"),
        ("data.manifest", "import fsspec.core", "fsspec"),
        ("data.manifest", "from ..run import commit", "run.commit"),
        ("run.driver", "import ray", "ray"),
        ("run.runner", "from . import worker", "run.worker"),
        ("run.worker", "from boomerang_batch.run.driver import run", "run.driver"),
        ("run.driver", "import boomerang_batch.cli", "cli"),
        ("run.commit", "import diffusers", "diffusers"),
        ("errors", "import boomerang_batch.shipped", "shipped"),
    ],
)
def test_a_planted_violation_is_found(module, source, named):
    found = violations(source, module)
    assert len(found) == 1
    assert named in found[0]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("run.worker", "import ray\nfrom boomerang_batch.run import runner"),
        ("diffusion.engine", "import math\nimport torch\nfrom boomerang_batch.errors import SampleError"),
        ("data.images", "from PIL import Image\nfrom boomerang_batch import storage"),
        ("cli.run", "import click\nfrom boomerang_batch.run.driver import run"),
        ("storage", "from boomerang_batch import __version__"),
    ],
)
def test_what_the_layers_allow_passes(module, source):
    assert violations(source, module) == []


def test_help_imports_neither_torch_nor_ray():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", PACKAGE, "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    imported = {match[1].split(".")[0] for match in re.finditer(r"\| +([\w.]+)$", done.stderr, re.MULTILINE)}
    assert done.returncode == 0, done.stderr[-2000:]
    assert {"click", PACKAGE} <= imported
    assert not imported & {"torch", "ray", "diffusers", "numpy", "pyarrow", "PIL", "transformers", "webdataset"}
