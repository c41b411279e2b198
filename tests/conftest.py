"""Fixtures that several rooms' tests share."""

from __future__ import annotations

from pathlib import Path

import hypothesis
import pytest
import torch

from tests import worlds

# Machines are busy; a slow example is no failure. CI=true must not change what is tested either.
hypothesis.settings.register_profile("steady", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("steady")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """On tensors this small a second thread only spins."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return worlds.save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def secret(monkeypatch: pytest.MonkeyPatch) -> str:
    """One secret for every run of a test, so that their outputs can be compared."""
    monkeypatch.setenv("BOOMERANG_SECRET", worlds.SECRET)
    return worlds.SECRET
