"""Fetching what pytq does not hold itself: the pinned llama.cpp source and the Python binding.

Both come from one source archive of llama-cpp-python (``patches/pin.json``), so the binding and the
library always match, and the archive is downloaded once. pip does the download: it knows the user's index,
proxy and certificates.

    python -m pytq.fetch archive   prints the path of the verified archive
    python -m pytq.fetch binding   installs the binding into this environment, without a build of llama.cpp
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from pytq import paths
from pytq.errors import PytqError
from pytq.progress import say, step

# the binding's own CMake builds nothing then: pytq's build supplies the library
BINDING_CMAKE_ARGS = "-DLLAMA_BUILD=OFF -DLLAVA_BUILD=OFF"


@dataclass(frozen=True)
class Pin:
    """The upstream version everything is built from (``patches/pin.json``)."""

    package: str
    version: str
    archive: str
    sha256: str
    path: str
    commit: str
    ggml: str


def load_pin() -> Pin:
    """Reads ``patches/pin.json``; PytqError when it is damaged."""
    path = paths.source_root() / "patches" / "pin.json"
    try:
        return Pin(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise PytqError(f"{path} cannot be read ({error}): restore it from the repository") from error


def sha256_file(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def pip_download(requirement: str, name: str, sha256: str, *, source: bool) -> Path:
    """The file ``name`` of ``requirement``, in the cache, verified.

    Args:
        requirement: such as ``package==1.2``.
        name: the file name pip saves it under.
        sha256: expected hash, hexadecimal.
        source: the source archive rather than a wheel.

    Raises:
        PytqError: no network, another hash, an unwritable cache. Nothing is left behind then.
    """
    downloads = paths.writable(paths.home() / "downloads")
    target = downloads / name
    if target.exists():
        if sha256_file(target) != sha256:
            raise PytqError(f"{target} is damaged (its sha256 is not {sha256}): delete it and run again")
        return target
    package = requirement.partition("==")[0]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "--quiet"]
    command += ["--no-binary" if source else "--only-binary", package, requirement]
    with tempfile.TemporaryDirectory(dir=downloads, prefix=".tmp-") as temporary:
        with step(f"downloading {requirement}"):
            _pip([*command, "--dest", temporary], f"{requirement} could not be downloaded")
        got = Path(temporary) / name
        if not got.exists():
            found = ", ".join(sorted(os.listdir(temporary))) or "nothing"
            raise PytqError(f"{requirement} was expected as {name}, the package index gave {found}")
        actual = sha256_file(got)
        if actual != sha256:
            raise PytqError(
                f"{name} has sha256 {actual}, expected {sha256}: the package index serves another file; "
                "nothing was kept"
            )
        os.replace(got, target)
    return target


def archive() -> Path:
    """The pinned source archive, in the cache, verified by sha256."""
    pin = load_pin()
    return pip_download(f"{pin.package}=={pin.version}", pin.archive, pin.sha256, source=True)


def binding_version() -> str | None:
    """Version of the llama-cpp-python in this environment, or None."""
    try:
        return importlib.metadata.version("llama_cpp_python")
    except importlib.metadata.PackageNotFoundError:
        return None


def binding() -> None:
    """Installs llama-cpp-python of the pin into this environment, without compiling llama.cpp."""
    pin = load_pin()
    if binding_version() == pin.version:
        return
    file = archive()
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
    with step(f"installing {pin.package} {pin.version}"):
        _pip([*command, str(file)], f"{pin.package} {pin.version} could not be installed")


def _pip(command: list[str], what: str) -> None:
    done = subprocess.run(
        command, env=os.environ | {"CMAKE_ARGS": BINDING_CMAKE_ARGS}, text=True, capture_output=True
    )
    if done.returncode == 0:
        return
    lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    reasons = [line for line in lines if "error" in line.lower()] or lines or ["no output"]
    raise PytqError(f"{what}: pip says: {reasons[-1]}")


def main(arguments: list[str]) -> int:
    """The command line of this module."""
    try:
        if arguments == ["archive"]:
            print(archive())
        elif arguments == ["binding"]:
            binding()
        else:
            say("usage: python -m pytq.fetch archive|binding")
            return 2
    except PytqError as error:
        say(f"error: {error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
