"""Compiles translated Metal sources with the shim and runs their kernels.

Everything here says "executed under a shim": no Metal compiler and no Apple hardware is involved.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
MAX_THREADGROUP_MEMORY = 32768
ORDERS = ("forward", "reverse", "shuffled")


def compiler() -> str | None:
    """A C++ compiler with _Float16: clang++ (Metal's own front end is a clang) or g++ 12 and newer."""
    for name in ("clang++", "clang++-19", "g++"):
        found = shutil.which(name)
        if found and _has_half(found):
            return found
    return None


def _has_half(program: str) -> bool:
    source = "_Float16 f(float x) { return (_Float16) x; }"
    command = [program, "-x", "c++", "-std=gnu++14", "-fsyntax-only", "-"]
    return subprocess.run(command, input=source, capture_output=True, text=True).returncode == 0


def flatten(path: Path, search: Sequence[Path], seen: set[Path] | None = None) -> str:
    """The source with its quoted includes inlined, each file once, as upstream's build embeds it."""
    seen = set() if seen is None else seen
    lines = []
    for line in path.read_text().splitlines():
        include = re.match(r'\s*#\s*include\s+"([^"]+)"', line)
        if include is None:
            lines.append("" if line.strip() == "#pragma once" else line)
            continue
        found = next((d / include[1] for d in (path.parent, *search) if (d / include[1]).is_file()), None)
        if found is None:
            raise FileNotFoundError(f"{path.name} includes {include[1]}")
        if found.resolve() not in seen:
            seen.add(found.resolve())
            lines.append(flatten(found, search, seen))
    return "\n".join(lines) + "\n"


def compile_library(
    directory: Path,
    sources: Mapping[str, tuple[str, Sequence[str]]],
    files: Sequence[tuple[Path, Sequence[str]]] = (),
    link: Sequence[str] = (),
) -> Path:
    """A shared library of translated sources (name -> text and flags), further files and the shim; link: linker options.

    Objects are named by their content, so tests of one session share them.
    """
    program = compiler()
    assert program is not None
    shim = HERE / "shim"
    common = ["-O1", "-fPIC", "-U_FORTIFY_SOURCE", f"-I{shim}", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
    jobs: list[tuple[Path, list[str]]] = []
    for name, (text, flags) in sources.items():
        source = directory / f"{name}.cpp"
        if not source.exists() or source.read_text() != text:
            source.write_text(text)
        # Metal knows its scalar types before any include
        jobs.append((source, ["-std=gnu++14", "-include", str(shim / "metal_stdlib"), *flags]))
    for path, flags in files:
        language = ["-x", "c", "-std=gnu11"] if path.suffix == ".c" else ["-std=c++17"]
        jobs.append((path, [*language, *flags]))
    jobs += [(shim / "executor.cpp", ["-std=c++17"]), (shim / "capi.cpp", ["-std=c++17"])]
    headers = b"".join(p.read_bytes() for p in sorted(shim.iterdir()) if p.is_file())
    ccache = ["ccache"] if shutil.which("ccache") else []
    objects = []
    for source, flags in jobs:
        digest = hashlib.sha256(headers + source.read_bytes() + repr(flags).encode()).hexdigest()[:16]
        target = directory / f"{source.stem}-{digest}.o"
        objects.append(target)
        if not target.exists():
            # relative names, so that ccache knows a source again in another session's directory
            name = source.name if source.parent == directory else str(source)
            command = [*ccache, program, *common, *flags, "-c", name, "-o", target.name]
            done = subprocess.run(command, capture_output=True, text=True, cwd=directory)
            assert done.returncode == 0, done.stderr[:6000]
            assert "warning" not in done.stderr, done.stderr[:6000]
    digest = hashlib.sha256(" ".join([*(o.name for o in objects), *link]).encode()).hexdigest()[:16]
    library = directory / f"libshim-{digest}.so"
    if not library.exists():
        command = [program, "-shared", "-o", str(library), *map(str, objects), *link]
        subprocess.run(command, check=True, capture_output=True)
    return library


class Library:
    """Kernels by name on NumPy arrays."""

    def __init__(self, path: Path) -> None:
        self.dll = ctypes.CDLL(os.fspath(path))
        self.dll.shim_set_constant.argtypes = [ctypes.c_int, ctypes.c_double]

    def constant(self, number: int, value: float) -> None:
        """Sets a function constant; KeyError if no kernel has it."""
        if self.dll.shim_set_constant(number, float(value)):
            raise KeyError(number)

    def run(
        self,
        name: str,
        buffers: Sequence[np.ndarray],
        grid: tuple[int, int, int],
        threads: tuple[int, int, int],
        memory: Sequence[int] = (),
        order: str = "forward",
    ) -> None:
        """Runs a kernel; KeyError if it does not exist."""
        assert all(n <= MAX_THREADGROUP_MEMORY for n in memory)
        pointers = (ctypes.c_void_p * len(buffers))(*(b.ctypes.data for b in buffers))
        sizes = (ctypes.c_size_t * max(1, len(memory)))(*memory)
        done = self.dll.shim_run(
            name.encode(),
            pointers,
            len(buffers),
            sizes,
            len(memory),
            (ctypes.c_uint32 * 3)(*grid),
            (ctypes.c_uint32 * 3)(*threads),
            ORDERS.index(order),
        )
        if done:
            raise KeyError(name)
