"""Toolchains of the HIP tests: a compiler for AMD code objects, and the host's compiler for the shim."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pytq import paths
from pytq.errors import PytqError
from tests.shim.toolchain import host_compiler, reference

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import fetch_hip  # noqa: E402

__all__ = ["host_compiler", "reference"]  # fixtures of all shims


@pytest.fixture(scope="session")
def hip() -> Path:
    """The compiler for AMD code objects, fetched on first use; skips with the reason where it cannot be had."""
    if not fetch_hip.complete():
        try:
            fetch_hip.fetch()
        except (fetch_hip.Unavailable, PytqError) as reason:
            pytest.skip(f"no HIP toolchain: {reason}")
    return fetch_hip.location()


@pytest.fixture(scope="session")
def llama_source() -> Path:
    """A llama.cpp source tree of the pinned version: the work tree of a build. Our files include headers of it."""
    for tree in sorted((paths.home() / "work").glob("*/src")):
        if (tree / "ggml/src/ggml-cuda/common.cuh").exists():
            return tree
    pytest.skip("no llama.cpp source tree here: `pytq build` makes it")
