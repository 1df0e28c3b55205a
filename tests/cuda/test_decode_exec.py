"""CUDA's decode kernel executed on the CPU (shim.h, instructions.h), against double precision over the same blocks.

"Executed under a shim" is what this proves: arithmetic, indexing, exchanges between lanes, copies, barriers, clusters and the
shapes of launches are right. It proves nothing about speed, and nothing here has run on a GPU; tools/gpu/attention_bench.cu
makes the same comparison on one.
"""

from __future__ import annotations

import itertools
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from pytq import backends
from pytq.codec.table import load_types
from tests.shim.toolchain import BASE_FLAGS

pytestmark = pytest.mark.slow
HERE = Path(__file__).resolve().parent

# relative errors of the whole output and of one output row: queries and weights in 16-bit fixed point
MAX_ERROR = 1e-4
MAX_ROW_ERROR = 4e-4

# K, V, head size
Pair = tuple[str, str, int]
# compiled together; those of one line take about as long as those of another
PROGRAMS: list[list[Pair]] = [
    [("kv3", "kv3", 128), ("kv4", "kv2", 128), ("kv3", "kv3", 64), ("kv3", "kv3", 192)],
    [("kv4", "kv4", 128), ("turbo3", "turbo3", 128), ("kv3", "kv3", 80), ("kv3", "kv3", 256)],
    [("turbo4", "turbo4", 128), ("turbo2", "turbo2", 128), ("kv2s", "kv2", 128), ("kv4", "kv4", 96)],
    [("kv5", "kv5", 128), ("kv3s", "kv3", 128), ("kv4s", "kv4", 128), ("kv2", "kv2", 128)],
]
# with the instructions for copies of devices before compute capability 9.0; the copies are all that is different
OLDER: list[Pair] = [
    ("kv3", "kv3", 128),
    ("turbo4", "turbo4", 128),
    ("kv4s", "kv4", 128),
    ("kv3", "kv3", 256),
]

# What every pair runs. Devices of 3 to 12 multiprocessors: splits, teams, clusters and parts with few tokens.
SHAPES = [
    "n_kv=200 heads=8 gqa=4 mask=1 sinks=1 rotate=1 n_sm=3",
    "n_kv=113 heads=2 gqa=3 n_q=3 alibi=1 permuted=1 odd=3 mask=1",
    "n_kv=77 heads=3 gqa=1 softcap=30 odd=6",
    "n_kv=1 heads=1 gqa=8 n_q=2 sinks=1 rotate=1",
    "n_kv=1300 heads=2 gqa=4 n_sm=12",
    "n_kv=500 heads=8 gqa=4 mask=1 sinks=1 rotate=1 fresh=255 n_sm=6",
    "n_kv=1101 heads=4 gqa=5 softcap=20 alibi=1 fresh=1100 n_sm=9 few=1",
    "n_kv=328 heads=8 gqa=1 permuted=1 mask=1 fresh=0 n_sm=4",
    "n_kv=600 heads=16 gqa=2 n_q=5 mask=2 n_sm=6",
    "n_kv=1000 heads=8 gqa=7 n_seq=2 mask=2 odd=5 n_sm=11 few=2 many=2",
]
# Once, with kv3: every size of cluster, many parts, all blocks at once.
MORE = [
    "n_kv=2500 heads=8 gqa=6 mask=1 sinks=1 n_sm=8 together=1",
    "n_kv=4000 heads=8 gqa=4 n_sm=64 few=1 many=4 together=1 fresh=3999",
    "n_kv=19300 heads=4 gqa=1 n_sm=151 few=1 rotate=1",
    "n_kv=3001 heads=1 gqa=8 permuted=1 softcap=15 n_sm=5 few=4",
    "n_kv=900 heads=6 gqa=2 n_q=4 n_seq=3 mask=2 sinks=1 rotate=1 alibi=1 n_sm=3",
    "n_kv=700 heads=32 gqa=1 mask=1 n_sm=16 shared=50000",
    "n_kv=2047 heads=5 gqa=3 mask=1 n_sm=7 shared=101376",
]


@dataclass(frozen=True)
class Result:
    """One line of the program: the case and the shape of its launch."""

    line: str

    def __getitem__(self, name: str) -> str:
        return dict(word.split("=") for word in self.line.split())[name]

    def number(self, name: str) -> int:
        return int(self[name])

    @property
    def right(self) -> bool:
        return float(self["error"]) <= MAX_ERROR and float(self["row_error"]) <= MAX_ROW_ERROR


def walsh_order(dim: int) -> bool:
    """Whether the graph rotates vectors of this length."""
    return dim & (dim - 1) == 0


def cases(pairs: list[Pair]) -> list[str]:
    """Lines for the program. Orders of threads and of copies take turns, so that all pairs see all of them."""
    orders = itertools.cycle(
        [
            "copies=late seed=0",
            "copies=early seed=0",
            "copies=late seed=7",
            "copies=any seed=8",
            "copies=early seed=9",
        ]
    )
    out = []
    for k, v, dim in pairs:
        for shape in SHAPES + (MORE if (k, v, dim) == ("kv3", "kv3", 128) else []):
            if not walsh_order(dim):
                shape = shape.replace("rotate=1", "")
            out.append(f"k={k} v={v} d={dim} {shape} {next(orders)}")
        next(orders)
    return out


def compile_program(
    compiler: list[str], reference: list[Path], directory: Path, pairs: list[Pair], *flags: str
) -> Path:
    slots = {(row.family, row.head_dim): row.id % 8 for row in load_types()}
    listed = " ".join(f"X({k},{v},{slots[k, dim]})" for k, v, dim in pairs)
    defines = ['-DPYTQ_CUDA_SHIM="instructions.h"', f"-DSHIM_PAIRS(X)={listed}"]
    # constants that only pragmas of the device compiler name; memory that is thread_local needs no constructor
    more = ["-Wno-unused-variable", "-fno-extern-tls-init", "-I", str(HERE)]
    target = directory / "exec.o"
    source = str(HERE / "exec.cpp")
    subprocess.run(
        [*compiler, *BASE_FLAGS, *more, *defines, *flags, "-c", source, "-o", str(target)], check=True
    )
    program = directory / "exec"
    subprocess.run(["g++", str(target), *map(str, reference), "-o", str(program)], check=True)
    return program


def run(program: Path, lines: list[str], *arguments: str) -> tuple[int, str, list[Result]]:
    done = subprocess.run(
        [program, *arguments],
        input="".join(line + "\n" for line in lines),
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    return done.returncode, done.stderr, [Result(line) for line in done.stdout.splitlines()]


def check(program: Path, lines: list[str]) -> list[Result]:
    status, message, results = run(program, lines)
    assert status == 0, f"{lines[len(results)]}: {message}"
    assert len(results) == len(lines)
    assert [result.line for result in results if not result.right] == []
    return results


@pytest.mark.parametrize("pairs", PROGRAMS, ids=lambda pairs: pairs[0][0])
def test_decode(tmp_path: Path, host_compiler: list[str], reference: list[Path], pairs: list[Pair]) -> None:
    program = compile_program(host_compiler, reference, tmp_path, pairs)
    results = check(program, cases(pairs))
    assert {result.number("teams") for result in results} == {1, 2}
    assert {result["ranges"] for result in results} >= {"00", "11"}
    assert {result["vectors"] for result in results} == {"0", "1"}
    assert max(result.number("parts") for result in results) > 2
    assert max(result.number("tiles") for result in results) > 2
    if pairs is PROGRAMS[0]:
        wide = [result for result in results if result["d"] == "128"]
        assert {result["aligned"] for result in wide} == {"0", "1"}
        assert {result.number("cluster") for result in wide} == {1, 2, 4, 8}
        # more than one round of attention_join, which takes 144 at a time
        assert max(result.number("parts") for result in wide) > 144
        for fault in ("keys", "values", "wait", "publish", "leave"):
            assert_found(program, fault)


def test_decode_before_capability_9(tmp_path: Path, host_compiler: list[str], reference: list[Path]) -> None:
    program = compile_program(host_compiler, reference, tmp_path, OLDER, "-DSHIM_NO_BULK")
    results = check(program, [line for line in cases(OLDER) if "many=4" not in line])
    assert {result.number("teams") for result in results} == {1, 2}
    assert_found(program, "wait")


def assert_found(program: Path, fault: str) -> None:
    """A function of the shim that does something else makes the result wrong, or ends the program."""
    line = "n_kv=1900 heads=8 gqa=4 mask=1 n_sm=8"
    status, message, results = run(program, [line], f"fault={fault}")
    assert status == 3 and message.startswith("shim: ") if status else not any(r.right for r in results), (
        fault
    )


def test_every_family_is_executed() -> None:
    pairs = {pair for program in PROGRAMS for pair in program}
    known = backends.tensor_core_pairs()
    assert pairs <= known
    assert {(k, v) for k, v, _ in pairs} >= {(k, v) for k, v, dim in known if dim == 64}
    assert {dim for _, _, dim in pairs} == {dim for _, _, dim in known}
