"""Builds the extension pytq._pytq: CMake compiles csrc/ into a static library, cffi wraps it (abi3)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


def tool(name: str) -> str:
    """Path of cmake or ninja: the wheel in this environment first, then PATH."""
    try:
        module = __import__(name)
        candidate = Path(module.__file__).parent / "data" / "bin" / name
        if candidate.exists():
            return str(candidate)
        candidate = Path(module.BIN_DIR) / name
        if candidate.exists():
            return str(candidate)
    except (ImportError, AttributeError, TypeError):
        pass
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if not found:
        sys.exit(f"error: {name} is needed to build pytq: pip install {name}")
    return found


class BuildExt(build_ext):
    """Runs CMake first and links the static library it made."""

    def build_extension(self, ext) -> None:  # type: ignore[no-untyped-def]
        tree = Path(self.build_temp).resolve() / "pytq-cmake"
        tree.mkdir(parents=True, exist_ok=True)
        cmake = tool("cmake")
        configure = [cmake, "-S", str(ROOT), "-B", str(tree), "-DCMAKE_BUILD_TYPE=Release"]
        configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"]
        if shutil.which("ccache"):
            configure += ["-DCMAKE_C_COMPILER_LAUNCHER=ccache", "-DCMAKE_CXX_COMPILER_LAUNCHER=ccache"]
        for stale in (tree / "CMakeCache.txt",):
            # a cache made by another cmake (each isolated pip build has its own) is refused by this one
            stale.unlink(missing_ok=True)
        subprocess.check_call(configure)
        subprocess.check_call([cmake, "--build", str(tree), "--parallel", str(os.cpu_count() or 1)])
        library = tree / "libpytq.a"
        ext.extra_objects = [str(library)]
        ext.depends = [*ext.depends, str(library)]
        # the kernels may hold C++ without being C++ at the seam
        ext.libraries = [*ext.libraries, "stdc++"] if sys.platform != "darwin" else [*ext.libraries, "c++"]
        super().build_extension(ext)


class BuildPy(build_py):
    """Puts csrc/ and patches/ into the wheel: `pytq build` needs them away from a checkout too."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / "pytq" / "_src"
        if target.exists():
            shutil.rmtree(target)
        for name in ("csrc", "patches"):
            shutil.copytree(ROOT / name, target / name)
        shutil.copy(ROOT / "CMakeLists.txt", target)
        for table in ("types.def", "codebooks.def"):
            shutil.copy(ROOT / "csrc" / table, Path(self.build_lib) / "pytq" / "codec")


setup(
    cffi_modules=["pytq/ffi_build.py:ffibuilder"],
    cmdclass={"build_ext": BuildExt, "build_py": BuildPy},
)
