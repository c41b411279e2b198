"""pyproject, constraints, Makefile: what is asked for is pinned, and every target says what it does."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def asked_for():
    """Every distribution that pyproject.toml names, by its normal name."""
    requirements = [*PROJECT["project"]["dependencies"], *PROJECT["build-system"]["requires"]]
    for extra in PROJECT["project"]["optional-dependencies"].values():
        requirements += extra
    return sorted({normal(re.match(r"[\w.-]+", requirement)[0]) for requirement in requirements})


def pinned():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    return dict(re.fullmatch(r"([\w.-]+)==([\w.!+]+)", line).groups() for line in lines)


@pytest.mark.parametrize("name", [*asked_for(), "uv", "editables"])
def test_a_dependency_is_pinned(name):
    assert name in {normal(pin) for pin in pinned()}


def test_pins_are_sorted_and_carry_no_local_build():
    assert list(pinned()) == sorted(pinned())
    assert not [pin for pin, version in pinned().items() if "+" in version]
    assert pinned()["torch"] == "2.13.0"


def test_no_file_of_the_installation_names_an_index():
    for name in ("pyproject.toml", "constraints.txt", "Makefile", ".ci/run"):
        assert not re.search(r"https?://|--(extra-)?index-url", (ROOT / name).read_text()), name


def test_make_alone_lists_every_target():
    text = (ROOT / "Makefile").read_text()
    (phony,) = re.findall(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    shown = subprocess.run(["make", "-C", str(ROOT)], capture_output=True, text=True, check=True).stdout
    listed = re.findall(r"^  make (\S+) +\S", shown, re.MULTILINE)
    assert listed == phony.split()
