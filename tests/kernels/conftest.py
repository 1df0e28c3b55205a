"""Upstream's sources, for tests that compile against its internal headers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pytq import paths
from pytq.paths import BuildDir


@pytest.fixture(scope="session")
def llama_source(patched: BuildDir) -> Path:
    """The patched tree that the patched build was made from."""
    cache = patched.root / "CMakeCache.txt"
    trees = sorted((paths.home() / "work").glob("*/src"))
    if cache.exists():
        trees = [
            Path(t) for t in re.findall(r"^CMAKE_HOME_DIRECTORY:INTERNAL=(.*)$", cache.read_text(), re.M)
        ]
    for tree in trees:
        if (tree / "src" / "llama-kv-cells.h").exists() and (tree / "ggml" / "src" / "ggml-impl.h").exists():
            return tree
    pytest.skip("no llama.cpp source tree here: `pytq build` makes it")
