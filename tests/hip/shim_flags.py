"""Compiler flags for device code that runs on the CPU under the shim of this directory."""

from __future__ import annotations

from pathlib import Path

from tests.shim.toolchain import BASE_FLAGS

HERE = Path(__file__).resolve().parent


def shim_flags(wave: int) -> list[str]:
    """Flags for waves of 32 (as RDNA) or 64 lanes (as CDNA)."""
    gpu = {32: "__GFX11__", 64: "__gfx90a__"}[wave]
    defines = ["-D__HIPCC__", "-D__HIP_DEVICE_COMPILE__", f"-D{gpu}", f"-DSHIM_WAVE={wave}"]
    return [*BASE_FLAGS, *defines, "-I", str(HERE)]
