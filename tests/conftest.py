"""Fixtures that several rooms' tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import worlds


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return worlds.save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def secret(monkeypatch: pytest.MonkeyPatch) -> str:
    """One secret for every run of a test, so that their outputs can be compared."""
    value = "5ec7e7" * 8
    monkeypatch.setenv("BOOMERANG_SECRET", value)
    return value
