"""What each backend does with each cache type: fused, generic or refused, and how that was checked.

Read from the tables that the backends themselves use, so the page made of it (docs/backends.md) cannot say anything else:

    csrc/types.def                       families and head sizes; CPU kernels exist for all rows
    csrc/ggml/pytq-cuda-ops.def          operations of CUDA and HIP; head sizes of the portable attention
    csrc/ggml/pytq-cuda-decode-*.cu      pairs of types of CUDA's tensor-core attention
    csrc/ggml/pytq-prefill*              pairs and head sizes of CUDA's prefill attention (compute capability 9.0)
    csrc/ggml/pytq-metal-ops.def         operations of Metal
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pytq import paths
from pytq.codec.table import FAMILY_STRIDE, load_types
from pytq.errors import PytqError

BACKENDS = ("cpu", "cuda", "hip", "metal")
# fused: the kernel works on the blocks; generic: it runs on the device through an f16 copy of bounded size, or moves
# bytes; refused: supports_op says no and ggml's scheduler gives the node to the CPU
FUSED, GENERIC, REFUSED = "fused", "generic", "refused"
PLAIN = ("f16", "q8_0")


@dataclass(frozen=True)
class Check:
    """One claim of a backend: what kind of claim, how it is made, and the file that makes it."""

    backend: str
    kind: str  # "compiled", "executed under a shim", "executed under emulation" or "measured on hardware"
    what: str
    where: str


# The claims differ in kind and are never mixed.
CHECKS = (
    Check(
        "cpu",
        "measured on hardware",
        "x86-64 with AVX-512 and AVX2; speed in docs/performance.md",
        "tests/kernels",
    ),
    Check(
        "cpu", "executed under emulation", "NEON and AVX2 tiers by qemu", "tests/kernels/test_cpu_tiers.py"
    ),
    Check("cuda", "compiled", "sm_90a, within register budgets", "tests/kernels/test_cuda_build.py"),
    Check(
        "cuda",
        "executed under a shim",
        "the decoder of the prefill kernel, on the CPU",
        "tests/kernels/test_cuda_prefill.py",
    ),
    Check("cuda", "measured on hardware", "one H100: docs/performance-cuda.md", "tools/gpu/full_run.sh"),
    Check(
        "hip", "compiled", "code objects for gfx90a, gfx942, gfx1100 and gfx1201", "tests/hip/test_objects.py"
    ),
    Check(
        "hip",
        "executed under a shim",
        "all device code at 32 and 64 lanes per wave, on the CPU",
        "tests/hip/test_exec.py",
    ),
    Check(
        "metal",
        "compiled",
        "the patched C++ files of ggml-metal; address spaces by clang's C++ for OpenCL",
        "tests/metal/test_metal_style.py",
    ),
    Check("metal", "executed under a shim", "all kernels as C++, on the CPU", "tests/metal"),
)


@dataclass(frozen=True)
class Operation:
    """One operation of a backend's table."""

    name: str
    kind: str
    condition: str


@dataclass(frozen=True)
class Row:
    """One line of the parity table.

    Attributes:
        op: operation, with the shape where the kernel depends on it.
        k, v: families of keys and values; for other operations ``k`` is the type and ``v`` empty.
        head_dim: head size.
        kinds: backend to fused, generic or refused.
    """

    op: str
    k: str
    v: str
    head_dim: int
    kinds: dict[str, str]


def _text(name: str) -> str:
    path = paths.source_root() / "csrc" / "ggml" / name
    try:
        return path.read_text()
    except OSError as error:
        raise PytqError(f"{path} is missing: restore it from the repository") from error


def operations(backend: str) -> list[Operation]:
    """Operations on compressed tensors that a GPU backend's supports_op knows."""
    table, macro = {"metal": ("pytq-metal-ops.def", "PYTQ_METAL_OP")}.get(
        backend, ("pytq-cuda-ops.def", "PYTQ_CUDA_OP")
    )
    rows = re.findall(rf'^{macro}\((\w+), (\w+), (\w+), (\w+), "(.*)"\)$', _text(table), flags=re.MULTILINE)
    for name, types, dims, _, _ in rows:
        if (types, dims) != ("ALL", "ALL"):
            raise PytqError(f"{table}: {name} covers {types} x {dims}; pytq/backends.py knows ALL x ALL only")
    return [Operation(name, kind.lower(), condition) for name, _, _, kind, condition in rows]


def families() -> list[str]:
    """Families with blocks, in the order of the types table."""
    return list(dict.fromkeys(row.family for row in load_types()))


def head_dims() -> list[int]:
    return sorted({row.head_dim for row in load_types()})


def portable_head_dims() -> set[int]:
    """Head sizes of the portable attention kernel."""
    found = re.findall(r"^PYTQ_PORTABLE\((\d+)\)$", _text("pytq-cuda-ops.def"), flags=re.MULTILINE)
    return {int(dim) for dim in found}


def _pairs(files: str, dims: list[int]) -> set[tuple[str, str, int]]:
    """(K, V, head_dim) that the files of a kernel name: own values for dims, further ones for 128."""
    pairs = set()
    for path in (paths.source_root() / "csrc" / "ggml").glob(files):
        text = path.read_text()
        key = re.search(r"^#define PYTQ_K\s+(\w+)$", text, flags=re.MULTILINE)
        if key is None:
            raise PytqError(f"{path} names no family of keys")
        own = re.search(r"^#define PYTQ_OWN_V\s+(\w+)$", text, flags=re.MULTILINE)
        more = re.search(r"^#define PYTQ_EXTRA_V\(X\)\s+(.*)$", text, flags=re.MULTILINE)
        pairs |= {(key[1], (own or key)[1], dim) for dim in dims}
        pairs |= {(key[1], value, 128) for value in re.findall(r"X\((\w+)\)", more[1] if more else "")}
    return pairs


def tensor_core_pairs() -> set[tuple[str, str, int]]:
    """(K, V, head_dim) of CUDA's tensor-core kernel as built by default."""
    return _pairs("pytq-cuda-decode-*.cu", head_dims())


def prefill_pairs() -> set[tuple[str, str, int]]:
    """(K, V, head_dim) of CUDA's prefill kernel, which runs on compute capability 9.0 only."""
    listed = re.search(r"PYTQ_PREFILL_SLOTS\(X\)(.*)", _text("pytq-prefill.h"))
    slots = {int(slot) for slot in re.findall(r"X\((\d)\)", listed[1] if listed else "")}
    return _pairs(
        "pytq-prefill-*.cu", sorted({row.head_dim for row in load_types() if row.id % FAMILY_STRIDE in slots})
    )


def plain_ok(name: str, dim: int) -> bool:
    """Whether a stock type has rows of this length."""
    return name != "q8_0" or dim % 32 == 0


def rows() -> Iterator[Row]:
    """The parity table, one row per operation, types and head size."""
    known = {backend: {op.name: op for op in operations(backend)} for backend in BACKENDS if backend != "cpu"}
    pairs, prefill, portable = tensor_core_pairs(), prefill_pairs(), portable_head_dims()

    def attention(backend: str, k: str, v: str, dim: int, few_rows: bool) -> str:
        if backend == "cpu":
            return FUSED
        if "FLASH_ATTN_EXT" not in known[backend]:
            return REFUSED
        if backend == "hip":
            return FUSED if dim in portable else REFUSED
        if backend == "cuda":
            return FUSED if (k, v, dim) in (pairs if few_rows else prefill) else GENERIC
        return known[backend]["FLASH_ATTN_EXT"].kind

    for name in ("SET_ROWS", "GET_ROWS", "CPY", "DUP", "CONT"):
        for family in families():
            for dim in head_dims():
                kinds = {"cpu": GENERIC if name in ("DUP", "CONT") else FUSED}
                for backend, ops in known.items():
                    kinds[backend] = ops[name].kind if name in ops else REFUSED
                yield Row(name, family, "", dim, kinds)
    for shape, few in (("decode", True), ("prefill", False)):
        for k in (*families(), *PLAIN):
            for v in (*families(), *PLAIN):
                for dim in head_dims():
                    if (k in PLAIN and v in PLAIN) or not (plain_ok(k, dim) and plain_ok(v, dim)):
                        continue
                    kinds = {backend: attention(backend, k, v, dim, few) for backend in BACKENDS}
                    yield Row(f"FLASH_ATTN_EXT, {shape}", k, v, dim, kinds)


def gaps() -> list[Row]:
    """Rows that some GPU backend refuses."""
    return [row for row in rows() if REFUSED in row.kinds.values()]


def check_files() -> None:
    """Every file that CHECKS names exists. PytqError: one does not."""
    root = paths.source_root()
    for check in CHECKS:
        if not (root / check.where).exists():
            raise PytqError(f"pytq/backends.py names {check.where}, which does not exist")


def resources() -> Path:
    """The table of registers that tools/hip_objects.py writes."""
    return paths.source_root() / "benchmarks" / "hip-resources.json"
