"""Toolchains of the HIP tests: a compiler for AMD code objects, and the host's compiler for the shim."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

from pytq import fetch, paths
from pytq.errors import PytqError

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent


def load_tool(name: str) -> ModuleType:
    """A script of tools/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ccache() -> list[str]:
    found = shutil.which("ccache")
    return [found] if found else []


@dataclass(frozen=True)
class HipToolchain:
    """clang and the ROCm device code of tools/fetch_hip.py."""

    root: Path
    bitcode: Path

    def compile(self, source: Path, target: Path, gpu: str, includes: list[Path]) -> None:
        """Compiles one file into a code object of one GPU; the test fails with the compiler's words otherwise."""
        command = [
            *ccache(),
            str(self.root / "bin" / "clang++"),
            "-x",
            "hip",
            "-std=c++17",
            f"--offload-arch={gpu}",
        ]
        command += [
            "-O3",
            "-fPIC",
            f"--rocm-path={self.root / 'usr'}",
            f"--rocm-device-lib-path={self.bitcode}",
        ]
        command += [
            "--no-gpu-bundle-output",
            "--cuda-device-only",
            "-DGGML_USE_HIP",
            "-D__HIP_PLATFORM_AMD__",
        ]
        command += ["-Wno-pass-failed", "-Wno-cuda-compat", "-isystem", str(self.root / "usr" / "include")]
        command += [word for directory in includes for word in ("-I", str(directory))]
        command += ["-c", str(source), "-o", str(target)]
        # the compiler is a wrapper that never changes: its version, not its text, is what matters
        environment = os.environ | {"CCACHE_COMPILERCHECK": "%compiler% --version"}
        run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert run.returncode == 0, f"{source.name} for {gpu}:\n{run.stderr[-4000:]}"

    def notes(self, code_object: Path) -> str:
        run = subprocess.run(
            [self.root / "bin" / "llvm-readelf", "--notes", code_object],
            capture_output=True,
            text=True,
            check=True,
        )
        return run.stdout


@pytest.fixture(scope="session")
def hip() -> HipToolchain:
    """The toolchain, fetched on first use; skips with the reason where it cannot be had."""
    tool = load_tool("fetch_hip")
    if not (tool.location() / "bin" / "clang++").exists():
        try:
            tool.fetch()
        except (tool.Unavailable, PytqError) as reason:
            pytest.skip(f"no HIP toolchain: {reason}")
    return HipToolchain(tool.location(), tool.location() / tool.BITCODE)


@pytest.fixture(scope="session")
def llama_source() -> Path:
    """llama.cpp's source with the series applied: the work tree of a patched build."""
    pin = fetch.load_pin()
    for tree in sorted((paths.home() / "work").glob("*/src")):
        if (tree / "ggml/src/ggml-cuda/common.cuh").exists() and "pytq" in (
            tree / "ggml/src/ggml.c"
        ).read_text():
            return tree
    pytest.skip(f"no patched llama.cpp {pin.commit} source tree here: `pytq build` makes it")


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
