"""Fixtures of the whole suite."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytq import paths
from pytq.paths import BuildDir


@pytest.fixture(scope="session")
def model() -> Path:
    """The default model; `make test` has fetched it."""
    from pytq.model import default_model

    return default_model()


@pytest.fixture(scope="session")
def stock() -> BuildDir:
    """The unpatched build; `make test` has made it."""
    return paths.find_build("stock")


@pytest.fixture(scope="session")
def patched() -> BuildDir:
    """The patched build of the present sources; `make test` has made it."""
    return paths.find_build("patched")
