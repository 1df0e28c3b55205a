"""Where things live: the cache directory, the sources pytq builds from, and the finished builds."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pytq.errors import PytqError

Kind = Literal["stock", "patched"]
KINDS: tuple[Kind, Kind] = ("stock", "patched")
BACKENDS = ("cpu", "cuda", "hip", "metal")


def home() -> Path:
    """The cache directory: ``PYTQ_HOME``, else the platform's cache directory for pytq. Not created here."""
    override = os.environ.get("PYTQ_HOME")
    if override:
        return Path(override).expanduser().absolute()
    import platformdirs

    return Path(platformdirs.user_cache_dir("pytq"))


def writable(directory: Path) -> Path:
    """Creates ``directory`` and proves that it can be written to.

    Raises:
        PytqError: it cannot be created or written; says how to choose another.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # the mode bits say nothing on read-only mounts or for root: write a file to know
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise PytqError(
            f"cache directory {directory} is not writable ({error.strerror or error}): "
            "set PYTQ_HOME to a directory that is"
        ) from error
    return directory


def source_root() -> Path:
    """The directory with ``csrc/``, ``patches/`` and ``CMakeLists.txt``: the checkout, or its copy in a wheel."""
    package = Path(__file__).resolve().parent
    for candidate in (package / "_src", package.parent):
        if (candidate / "csrc").is_dir() and (candidate / "patches").is_dir():
            return candidate
    raise PytqError(f"csrc/ and patches/ were not found beside {package}: reinstall pytq")


@dataclass(frozen=True)
class BuildDir:
    """A finished build of llama.cpp.

    Attributes:
        kind: ``stock`` (unpatched) or ``patched``.
        backend: ``cpu``, ``cuda``, ``hip`` or ``metal``.
        root: its directory.
        bin: directory with llama-bench, llama-server and the other programs.
        lib: directory with libllama.
        info: what ``build.json`` says (empty for a directory named by an environment variable).
    """

    kind: str
    backend: str
    root: Path
    bin: Path
    lib: Path
    info: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def has_library(self, stem: str) -> bool:
        """Whether there is a library of this name, where llama.cpp's loader looks: beside libllama or the programs."""
        return any((d / f"{stem}{end}").exists() for d in (self.lib, self.bin) for end in (".so", ".dylib"))

    def program(self, name: str) -> Path:
        """Path of one program, such as ``llama-bench``; PytqError when this build lacks it."""
        path = self.bin / name
        if not path.exists():
            raise PytqError(f"{name} is not in {self.bin}: run `pytq build --{self.kind} --force`")
        return path


def library_name() -> str:
    import sys

    return "libllama.dylib" if sys.platform == "darwin" else "libllama.so"


def open_build(root: Path, kind: str, backend: str) -> BuildDir | None:
    """The build in ``root``, or None if there is none: programs in ``bin/`` (or ``root``), libllama in ``lib/`` or ``bin/``."""
    for bin_dir in (root / "bin", root):
        for lib_dir in (root / "lib", bin_dir):
            if (bin_dir / "llama-bench").exists() and (lib_dir / library_name()).exists():
                info: dict[str, Any] = {}
                if (root / "build.json").exists():
                    try:
                        info = json.loads((root / "build.json").read_text())
                    except ValueError:
                        return None
                return BuildDir(kind, backend, root, bin_dir, lib_dir, info)
    return None


def find_build(kind: Kind, backend: str = "cpu") -> BuildDir:
    """The build of ``kind`` that belongs to the present pin, series and ``csrc/``.

    ``PYTQ_STOCK_BUILD`` and ``PYTQ_PATCHED_BUILD`` name a build directory of one's own instead; they
    are for work on llama.cpp itself, and nothing is checked about what is in it but that it holds ``backend``.

    Raises:
        PytqError: there is none, or only one of other sources (says which command makes it); a named one without
            the backend's library.
    """
    if kind not in KINDS:
        raise PytqError(f"unknown build kind {kind!r}: stock or patched")
    if backend not in BACKENDS:
        raise PytqError(f"unknown backend {backend!r}: one of {', '.join(BACKENDS)}")
    variable = f"PYTQ_{kind.upper()}_BUILD"
    named = os.environ.get(variable)
    if named:
        build = open_build(Path(named).expanduser().absolute(), kind, backend)
        if build is None:
            raise PytqError(
                f"{variable}={named} holds no build: bin/llama-bench and {library_name()} are expected"
            )
        if backend != "cpu" and not build.has_library(f"libggml-{backend}"):
            raise PytqError(
                f"{variable}={named} holds no libggml-{backend}: unset {variable} or name a build with"
                f" --backend {backend}"
            )
        return build

    from pytq import build as builder

    wanted = builder.source_key(kind, backend)
    machine = builder.machine_key()
    command = f"pytq build --{kind}" + ("" if backend == "cpu" else f" --backend {backend}")
    stale = None
    for root in sorted((home() / "builds").glob(f"{kind}-{backend}-*"), key=_mtime, reverse=True):
        found = open_build(root, kind, backend)
        if found is None or found.info.get("custom_source"):
            continue
        if found.info.get("source_key") == wanted and found.info.get("machine_key") == machine:
            return found
        stale = stale or found
    if stale is not None:
        raise PytqError(
            f"the {kind} build in {stale.root} was made from other sources or on another machine: run `{command}`"
        )
    raise PytqError(f"no {kind} build of llama.cpp for {backend} yet: run `{command}`")


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
