"""CUDA's decode kernel executed on the CPU (shim.h, instructions.h), against double precision over the same blocks.

"Executed under a shim" is what this proves: arithmetic, indexing, exchanges between lanes, copies, barriers, clusters and the
shapes of launches are right. It proves nothing about speed, and nothing here has run on a GPU; tools/gpu/attention_bench.cu
makes the same comparison on one.
"""

from __future__ import annotations

import itertools
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from pytq import backends
from pytq.codec.table import load_types
from tests.shim.toolchain import BASE_FLAGS

HERE = Path(__file__).resolve().parent

# relative errors of the whole output and of one output row: queries and weights in 16-bit fixed point
MAX_ERROR = 1e-4
MAX_ROW_ERROR = 4e-4

# K, V, head size
Pair = tuple[str, str, int]
# the pair that sees everything
FIRST: Pair = ("kv3", "kv3", 128)
# those that are executed, in programs of five or six
PROGRAMS = 8
# with the instructions for copies of devices before compute capability 9.0; the copies are all that is different
OLDER: list[Pair] = [FIRST, ("turbo4", "turbo4", 128), ("kv4s", "kv4", 128), ("kv3", "kv3", 256)]

# What every pair of head size 128 runs, and others every second of. Devices of 3 to 12 multiprocessors: splits, teams,
# clusters and parts with few tokens.
SHAPES = [
    "n_kv=200 heads=8 gqa=4 mask=1 sinks=1 rotate=1 n_sm=3",
    "n_kv=113 heads=2 gqa=3 n_q=3 alibi=1 permuted=1 odd=3 mask=1",
    "n_kv=77 heads=3 gqa=1 softcap=30 odd=6",
    "n_kv=1 heads=1 gqa=8 n_q=2 sinks=1 rotate=1",
    "n_kv=328 heads=8 gqa=1 permuted=1 mask=1 fresh=0 n_sm=4 q8_1=1",
    "n_kv=500 heads=8 gqa=4 mask=1 sinks=1 rotate=1 fresh=255 n_sm=6 q8_1=1",
    "n_kv=1101 heads=4 gqa=5 softcap=20 alibi=1 fresh=1100 n_sm=9 few=1",
    "n_kv=1300 heads=2 gqa=4 n_sm=12",
    "n_kv=600 heads=16 gqa=2 n_q=5 mask=2 n_sm=6",
    "n_kv=1000 heads=8 gqa=7 n_seq=2 mask=2 odd=5 softcap=15 n_sm=11 few=2",
]
# Once, with kv3: every size of cluster, many parts, all blocks at once.
MORE = [
    "n_kv=2500 heads=8 gqa=6 mask=1 sinks=1 n_sm=8 together=1",
    "n_kv=4000 heads=8 gqa=4 n_sm=64 few=1 many=4 together=1 fresh=3999 rotate=1 q8_1=1",
    "n_kv=19300 heads=4 gqa=1 n_sm=151 few=1 rotate=1",
    "n_kv=3001 heads=1 gqa=8 permuted=1 softcap=15 n_sm=5 few=4",
    "n_kv=30 heads=8 gqa=2 fresh=29",
    "n_kv=900 heads=6 gqa=2 n_q=4 n_seq=3 mask=2 sinks=1 rotate=1 alibi=1 n_sm=3",
    "n_kv=700 heads=32 gqa=1 mask=1 n_sm=16 shared=50000",
    "n_kv=2047 heads=5 gqa=3 mask=1 n_sm=7 shared=101376",
    "n_kv=4200 heads=1 gqa=4 n_seq=16 n_sm=128",  # as many results of a row as are joined at once, and more
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


def pairs() -> list[Pair]:
    """All pairs of head size 128; of the others each family with every second head size, in turn."""
    families = sorted({k for k, _, _ in backends.tensor_core_pairs()})
    dims = sorted({dim for _, _, dim in backends.tensor_core_pairs()})
    return sorted(
        (k, v, dim)
        for k, v, dim in backends.tensor_core_pairs()
        if dim == 128 or (families.index(k) + dims.index(dim)) % 2 == 0
    )


def pairs_of(program: int) -> list[Pair]:
    return pairs()[program::PROGRAMS]


def cases(pairs: list[Pair]) -> list[str]:
    """Lines for the program. Orders of threads and of copies take turns, so that all pairs see most of them."""
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
    for n, (k, v, dim) in enumerate(pairs):
        shapes = SHAPES if dim == 128 else SHAPES[n % 2 :: 2]
        for turn, shape in enumerate(shapes + (MORE if (k, v, dim) == FIRST else [])):
            if not walsh_order(dim):
                shape = shape.replace("rotate=1", "")
            if dim % 32:
                shape = shape.replace("q8_1=1", "")
            out.append(f"k={k} v={v} d={dim} {shape} {next(orders)}")
            small = int(shape.split()[0].removeprefix("n_kv=")) <= 1024
            if small and ((turn + n) % 2 == 0 or (k, v, dim) == FIRST):
                out.append(f"{out[-1]} short=8")  # by the kernel for short caches
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


def assert_found(program: Path, fault: str, line: str = "n_kv=1900 heads=8 gqa=4 mask=1 n_sm=8") -> None:
    """A function of the shim that does something else makes the result wrong, or ends the program."""
    status, message, results = run(program, [line], f"fault={fault}")
    ended = status == 3 and message.startswith("shim: ")
    assert ended or (status == 0 and not results[0].right), fault


@pytest.mark.parametrize("program", range(PROGRAMS))
def test_decode(tmp_path: Path, host_compiler: list[str], reference: list[Path], program: int) -> None:
    pairs = pairs_of(program)
    executable = compile_program(host_compiler, reference, tmp_path, pairs)
    results = check(executable, cases(pairs))
    if FIRST not in pairs:
        return
    results = [result for result in results if (result["k"], result["v"], int(result["d"])) == FIRST]
    assert {result.number("teams") for result in results} == {1, 2}
    short = [result for result in results if result["is_short"] == "1"]
    assert {result.number("cluster") for result in short} == {2, 4, 8}
    assert {result["aligned"] for result in short} == {"0", "1"}
    results = [result for result in results if result["is_short"] == "0"]
    assert {result.number("cluster") for result in results} == {1, 2, 4, 8}
    assert {result["aligned"] for result in results} == {"0", "1"}
    # tokens copied one by one and as one range; masks in whole vectors and not
    assert {result["ranges"] for result in results} >= {"00", "11"}
    assert {result["vectors"] for result in results} == {"0", "1"}
    assert max(result.number("tiles") for result in results) > 2
    # more than one round of attention_join, which takes 144 at a time
    assert max(result.number("parts") for result in results) > 144
    for fault in ("keys", "values", "wait", "publish", "leave"):
        assert_found(executable, fault)


def test_before_capability_9(tmp_path: Path, host_compiler: list[str], reference: list[Path]) -> None:
    program = compile_program(host_compiler, reference, tmp_path, OLDER, "-DSHIM_NO_BULK")
    results = check(
        program, list(dict.fromkeys(re.sub(r" (few|many|short)=\d", "", line) for line in cases(OLDER)))
    )
    assert {result.number("teams") for result in results} == {1, 2}
    assert {result.number("cluster") for result in results} == {1}
    for fault in ("values", "wait", "publish"):
        assert_found(program, fault)


def test_every_family_and_head_size_is_executed() -> None:
    every = backends.tensor_core_pairs()
    assert {k for k, _, _ in pairs()} == {k for k, _, _ in every}
    for dim in {dim for _, _, dim in every}:
        assert len({k for k, _, d in pairs() if d == dim}) >= 5


def test_shapes_of_both_kinds_of_head_sizes() -> None:
    """Every second shape is enough for the others only if each half has everything."""
    for half in (SHAPES[0::2], SHAPES[1::2]):
        for word in ("mask=", "fresh=", "softcap=", "alibi=", "odd=", "permuted=", "q8_1="):
            assert any(word in shape for shape in half), word
