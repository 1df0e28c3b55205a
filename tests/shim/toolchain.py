"""Compiler and flags for device code that runs on the CPU under a shim (tests/hip, tests/cuda)."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# a checked longjmp (_FORTIFY_SOURCE) refuses to go to another stack
BASE_FLAGS = ["-std=c++17", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE"]
BASE_FLAGS += ["-Wall", "-Werror", "-Wno-unknown-pragmas", "-I", str(ROOT / "csrc")]


def ccache() -> list[str]:
    found = shutil.which("ccache")
    return [found] if found else []


@pytest.fixture(scope="session")
def host_compiler() -> list[str]:
    """g++ (through ccache where it is installed); the shims use what clang treats as its own builtins."""
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
        flags = ["-std=c11", "-O2", "-ffp-contract=off"]
        subprocess.run([*ccache(), "gcc", *flags, "-c", str(source), "-o", str(target)], check=True)
        objects.append(target)
    return objects
