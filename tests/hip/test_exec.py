"""Device code executed on the CPU (shim.h) at 32 and 64 lanes per wave, against the C reference.

"Executed under a shim" is what this proves: the arithmetic, the indexing and the exchanges between lanes are right. It proves
nothing about speed, and nothing has run on an AMD GPU.
"""

from __future__ import annotations

import itertools
import subprocess
from pathlib import Path

import pytest

from pytq.codec.table import load_types
from tests.hip.shim_flags import shim_flags

pytestmark = pytest.mark.slow
HERE = Path(__file__).resolve().parent

# normalised mean square error against float64 over the decoded values; halves as weights give 5e-8
MAX_NMSE = 2e-7
# relative error of one output vector; 3e-4 measured
MAX_ROW_ERROR = 1e-3

# six to eight rounded additions in float32
MAX_ROTATION_NMSE = 1e-13

FAMILIES = list(dict.fromkeys(row.family for row in load_types()))
HEAD_DIMS = sorted({row.head_dim for row in load_types()})

# K, V, head_dim, n_kv, KV heads, query heads per KV head, queries, sequences, mask, sinks, ALiBi, soft-cap, splits,
# rows per block, bytes between rows of blocks
Case = tuple[str, str, int, int, int, int, int, int, int, int, float, float, int, int, int]


def cases() -> list[Case]:
    """Every type and head size with changing features, all pairs of families once, and shapes that break things."""
    out: list[Case] = []
    lengths = itertools.cycle([129, 1, 77, 300, 128, 3, 257, 31, 383])
    features = itertools.cycle([(1, 0, 0.0, 0.0), (0, 1, 0.0, 0.0), (1, 1, 8.0, 0.0), (2, 0, 0.0, 10.0)])
    shapes = itertools.cycle(
        [(1, 4, 1, 4), (2, 1, 1, 1), (1, 3, 3, 8), (2, 2, 1, 4), (1, 1, 5, 8), (1, 8, 2, 8)]
    )
    odd = itertools.cycle([0, 1, 2, 3, 0])
    for family, dim in itertools.product(FAMILIES, HEAD_DIMS):
        mask, sinks, bias, cap = next(features)
        heads, gqa, queries, rows = next(shapes)
        value = family[:-1] if family.endswith("s") else family
        n_kv = max(next(lengths), queries)
        splits = 2 if n_kv > 256 else 1
        out.append(
            (
                family,
                value,
                dim,
                n_kv,
                heads,
                gqa,
                queries,
                1,
                mask,
                sinks,
                bias,
                cap,
                splits,
                rows,
                next(odd),
            )
        )
    plain = ["f16", "q8_0"]
    for k, v in itertools.product([*FAMILIES, *plain], repeat=2):
        if not (k in plain and v in plain):
            out.append((k, v, 64, 133, 1, 2, 1, 1, 1, 0, 0.0, 0.0, 1, 4, 1))
    out.append(("f16", "kv3", 80, 45, 1, 1, 1, 1, 0, 0, 0.0, 0.0, 1, 1, 0))
    for sequences, splits, rows in itertools.product([1, 3], [1, 5], [1, 4, 8]):
        out.append(("kv3", "kv3", 128, 600, 2, 4, 5, sequences, 2, 1, 0.0, 0.0, splits, rows, 0))
    # more query heads than the ALiBi power of two; a batch of prefill
    out.append(("kv4", "kv3", 64, 140, 3, 4, 33, 2, 1, 1, 8.0, 20.0, 1, 8, 2))
    return out


@pytest.fixture(scope="session", params=[32, 64])
def program(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    host_compiler: list[str],
    reference: list[Path],
) -> Path:
    """exec.cpp for waves of 32 (as RDNA) or 64 lanes (as CDNA)."""
    wave = request.param
    directory = tmp_path_factory.mktemp(f"wave{wave}")
    source, target = HERE / "exec.cpp", directory / "exec.o"
    subprocess.run([*host_compiler, *shim_flags(wave), "-c", str(source), "-o", str(target)], check=True)
    program = directory / "exec"
    subprocess.run(["g++", str(target), *map(str, reference), "-o", str(program)], check=True)
    return program


def run(program: Path, what: str, lines: str = "") -> list[list[str]]:
    done = subprocess.run([program, what], input=lines, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr or done.returncode
    return [line.split() for line in done.stdout.splitlines()]


def test_encoder_writes_the_references_bytes(program: Path) -> None:
    rows = run(program, "encode")
    assert len(rows) == 2 * len(load_types())  # the shapes for latency and for throughput
    assert [row for row in rows if row[-1] != "0"] == []


def test_fused_rotation(program: Path) -> None:
    """Queries are multiplied by the Walsh matrix; keys are the reference's bytes of the rotated vectors."""
    rows = run(program, "rotate")
    assert len(rows) == sum(row.head_dim in (64, 128, 256) for row in load_types())
    assert max(float(row[-2]) for row in rows) <= MAX_ROTATION_NMSE
    assert [row for row in rows if row[-1] != "0"] == []


def test_decoded_values(program: Path) -> None:
    rows = run(program, "values")
    for what in ("values", "values16"):
        found = [row for row in rows if row[0] == what]
        assert len(found) == len(load_types())
        assert [row for row in found if row[-1] != "0"] == []


def test_attention(program: Path) -> None:
    wanted = cases()
    rows = run(program, "attention", "".join(" ".join(map(str, case)) + "\n" for case in wanted))
    assert len(rows) == len(wanted)
    bad = [row for row in rows if not (float(row[-2]) <= MAX_NMSE and float(row[-1]) <= MAX_ROW_ERROR)]
    assert bad == []


def test_every_type_is_executed() -> None:
    assert {(case[0], case[2]) for case in cases()} >= set(itertools.product(FAMILIES, HEAD_DIMS))
