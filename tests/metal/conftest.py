"""Fixtures of the Metal tests: upstream's sources, the compiler, one directory of objects for the session."""

from __future__ import annotations

import sys
import tarfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import metal_shim as shim

from pytq import fetch
from pytq.errors import PytqError

# directories of the pinned archive that the tests read
WANTED = ("ggml/include/", "ggml/src/ggml-metal/")
WANTED_FILES = ("ggml/src/ggml-common.h", "ggml/src/ggml-impl.h", "ggml/src/ggml-backend-impl.h")


@pytest.fixture(scope="session")
def archive() -> Path:
    """The pinned llama.cpp source, downloaded if need be."""
    try:
        return fetch.archive()
    except PytqError as error:
        pytest.skip(f"no upstream source: {error}")


@pytest.fixture(scope="session")
def upstream(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The parts of that source that these tests read, unpacked."""
    prefix = fetch.load_pin().path.rstrip("/") + "/"
    target = tmp_path_factory.mktemp("upstream")
    with tarfile.open(archive) as tar:
        for member in tar:
            name = member.name.removeprefix(prefix)
            if name == member.name or not member.isfile() or not name.startswith(WANTED + WANTED_FILES):
                continue
            data = tar.extractfile(member)
            assert data is not None
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes(data.read())
    return target


@pytest.fixture(scope="session")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where compiled sources lie; skips if no compiler knows _Float16."""
    if shim.compiler() is None:
        pytest.skip("no clang++ or g++ (12 or newer) with _Float16")
    return tmp_path_factory.mktemp("metal")


@pytest.fixture(scope="session")
def harness(objects: Path, upstream: Path) -> Path:
    """All kernels and the dispatching code, compiled with the shim."""
    import metal_device as device

    return device.build(objects, upstream)


@pytest.fixture(scope="session")
def patched_tree(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole pinned source with the series applied."""
    from pytq import build

    tree = tmp_path_factory.mktemp("patched") / "src"
    build._unpack(archive, fetch.load_pin().path, tree)
    build.apply_series(tree)
    return tree
