"""The CUDA shim itself: exchanges, matrix products, copies, clusters and whole grids are right, and what a GPU would leave undefined
ends the program."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.shim.toolchain import BASE_FLAGS

HERE = Path(__file__).resolve().parent

KINDS = {"bulk": [], "older": ["-DSHIM_NO_BULK"]}
RIGHT = ["lanes", "product32", "product16", "grid", "grid of clusters", "cluster", "phases"]
WRONG = {
    "absent": "has left",
    "mixed": "different instructions",
    "part of a warp": "deadlock",
    "divergent": "different barriers",
    "behind": "behind its shared memory",
    "endless": "deadlock",
    "grid, one after another": "deadlock",
    "unpublished": "has not published",
    "left": "block that has left",
    "not waited": "before its copies arrived",
}
WRONG_BULK = {
    "unaligned": "aligned to 16",
    "over": "reads outside the buffers",
    "outside": "leaves the block's shared memory",
    "too few bytes": "deadlock",
    "twice": "more arrivals",
    "overwritten": "overwritten",
}


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory, host_compiler: list[str]) -> dict[str, Path]:
    """shim_cases.cpp with either kind of copies."""
    directory = tmp_path_factory.mktemp("shim")
    for kind, flags in KINDS.items():
        command = [*host_compiler, *BASE_FLAGS, *flags, "-I", str(HERE), "-c", str(HERE / "shim_cases.cpp")]
        subprocess.run([*command, "-o", str(directory / f"{kind}.o")], check=True)
        subprocess.run(["g++", str(directory / f"{kind}.o"), "-o", str(directory / kind)], check=True)
    return {kind: directory / kind for kind in KINDS}


def code(program: Path, what: str) -> tuple[int, str]:
    done = subprocess.run([program, what], capture_output=True, text=True, check=False, timeout=60)
    return done.returncode, done.stderr


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", RIGHT)
def test_right(programs: dict[str, Path], kind: str, what: str) -> None:
    assert code(programs[kind], what) == (0, "")


@pytest.mark.parametrize(
    ("kind", "what"),
    [*((kind, what) for kind in KINDS for what in WRONG), *(("bulk", what) for what in WRONG_BULK)],
)
def test_undefined_behaviour_ends_the_program(programs: dict[str, Path], kind: str, what: str) -> None:
    status, text = code(programs[kind], what)
    assert status == 3 and {**WRONG, **WRONG_BULK}[what] in text
