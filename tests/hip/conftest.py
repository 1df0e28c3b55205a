"""Toolchains of the HIP tests: a compiler for AMD code objects, and the host's compiler for the shim."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pytq import paths
from pytq.errors import PytqError

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import fetch_hip  # noqa: E402


def ccache() -> list[str]:
    found = shutil.which("ccache")
    return [found] if found else []


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


@pytest.fixture(scope="session")
def host_compiler() -> list[str]:
    """g++ (through ccache where it is installed); the shim uses what clang treats as its own builtins."""
    gxx = shutil.which("g++")
    if gxx is None:
        pytest.skip("the shim needs g++ (Debian: apt install g++)")
    return [*ccache(), gxx]


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Objects of the C reference."""
    directory = tmp_path_factory.mktemp("reference")
    objects = []
    for source in sorted((ROOT / "csrc" / "ref").glob("*.c")):
        target = directory / f"{source.stem}.o"
        command = [
            *ccache(),
            "gcc",
            "-std=c11",
            "-O2",
            "-ffp-contract=off",
            "-c",
            str(source),
            "-o",
            str(target),
        ]
        subprocess.run(command, check=True)
        objects.append(target)
    return objects
