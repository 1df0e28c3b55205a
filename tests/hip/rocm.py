"""A ROCm installation that has everything CMake looks for and nothing that runs on a GPU."""

from __future__ import annotations

import stat
from pathlib import Path

VERSION = "6.3.0"
HIPCONFIG = """#!/bin/sh
case "$1" in
    --hipclangpath) printf %s '{root}/llvm/bin' ;;
    --rocmpath | --path) printf %s '{root}' ;;
    --version) printf %s '{version}-1' ;;
    *) exit 1 ;;
esac
"""
CLANG = """#!/bin/sh
exec '{toolchain}/bin/clang++' --rocm-path='{toolchain}/usr' --rocm-device-lib-path='{bitcode}' \\
    -isystem '{toolchain}/usr/include' -D__HIP_PLATFORM_AMD__ "$@"
"""
PACKAGES = {
    "hip": "add_library(hip::host INTERFACE IMPORTED)\nadd_library(hip::device INTERFACE IMPORTED)\n",
    "hip-lang": (
        "add_library(hip-lang::device INTERFACE IMPORTED)\nset(_CMAKE_HIP_DEVICE_RUNTIME_TARGET hip-lang::device)\n"
    ),
    "hipblas": "add_library(roc::hipblas INTERFACE IMPORTED)\n",
    "rocblas": "add_library(roc::rocblas INTERFACE IMPORTED)\n",
}


def script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)


def install(root: Path, toolchain: Path, bitcode: Path, version: str = VERSION) -> Path:
    """Writes the installation into ``root``; ``toolchain`` compiles for it. Returns the directory for PATH."""
    script(root / "bin" / "hipconfig", HIPCONFIG.format(root=root, version=version))
    script(root / "bin" / "hipcc", "#!/bin/sh\nexit 1\n")
    script(root / "llvm" / "bin" / "clang++", CLANG.format(toolchain=toolchain, bitcode=bitcode))
    for name, targets in PACKAGES.items():
        directory = root / "lib" / "cmake" / name
        directory.mkdir(parents=True)
        (directory / f"{name}-config.cmake").write_text(targets)
        (directory / f"{name}-config-version.cmake").write_text(
            f"set(PACKAGE_VERSION {version})\nset(PACKAGE_VERSION_COMPATIBLE TRUE)\n"
        )
    return root / "bin"
