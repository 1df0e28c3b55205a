"""The shim as a Metal device: ggml nodes on NumPy memory go through csrc/ggml/pytq-metal.cpp and its kernels."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import metal_shim as shim
import metal_translate as translate
import numpy as np

from pytq.codec.table import TypeRow, load_types

CSRC = shim.ROOT / "csrc"
# ggml's type numbers
F32, F16, Q8_0, I32, I64 = 0, 1, 8, 26, 27
NUMPY = {F32: np.float32, F16: np.float16, I32: np.int32, I64: np.int64}
OTHER_BLOCKS = {F32: (1, 4), F16: (1, 2), Q8_0: (32, 34), I32: (1, 4), I64: (1, 8)}


def flat_source(directory: Path) -> str:
    """The text that ggml-metal compiles on a device, made by the same CMake file."""
    target = directory / "pytq.metal"
    cmake = _cmake()
    command = [cmake, f"-DPYTQ_DIR={shim.ROOT}", f"-DPYTQ_METAL_OUT={target}"]
    subprocess.run([*command, "-P", str(CSRC / "ggml" / "pytq-metal.cmake")], check=True, capture_output=True)
    return target.read_text()


def _cmake() -> str:
    from pytq.build import _wheel_program

    found = _wheel_program("cmake") or shutil.which("cmake")
    assert found, "cmake is missing"
    return found


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int32),
        ("used", ctypes.c_int32),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_uint64 * 4),
        ("data", ctypes.c_void_p),
    )


@dataclass
class Tensor:
    """A ggml tensor: memory that starts at ``data``, ne and nb as ggml counts them (innermost first)."""

    type: int
    ne: tuple[int, ...]
    data: np.ndarray
    nb: tuple[int, ...] = ()
    offset: int = 0

    def __post_init__(self) -> None:
        self.ne = (*self.ne, *(1,) * (4 - len(self.ne)))
        if not self.nb:
            n, size = block(self.type)
            strides = [size, self.ne[0] // n * size]
            for count in self.ne[1:3]:
                strides.append(strides[-1] * count)
            self.nb = tuple(strides)


def block(type_id: int) -> tuple[int, int]:
    """Values and bytes of a block."""
    if type_id in OTHER_BLOCKS:
        return OTHER_BLOCKS[type_id]
    row = ROWS.get(type_id)
    return (row.head_dim, row.block_bytes) if row else (8, 8)  # a flag of the types table


ROWS: dict[int, TypeRow] = {row.id: row for row in load_types()}


def _unused() -> _Tensor:
    return _Tensor(0, 0, (1,) * 4, (4,) * 4, None)


@dataclass
class Device:
    """The harness; results are compared byte for byte between thread orders by the caller."""

    path: Path
    order: str = "forward"
    max_threads: int = 1024
    has_mm: bool = True
    dll: ctypes.CDLL = field(init=False)

    def __post_init__(self) -> None:
        self.dll = ctypes.CDLL(str(self.path))
        self.dll.harness_run.restype = ctypes.c_char_p
        self.dll.harness_source.restype = ctypes.c_char_p
        self.dll.harness_log.restype = ctypes.c_char_p
        self.dll.harness_most_memory.restype = ctypes.c_size_t
        self.dll.pytq_type_get.restype = ctypes.c_void_p

    def _node(
        self, dst: Tensor, sources: list[Tensor | None], params: tuple[float, ...]
    ) -> tuple[object, object]:
        nodes = (_Tensor * 6)(*(_unused() for _ in range(6)))
        for i, t in enumerate([dst, *sources]):
            if t is not None:
                data = t.data.ctypes.data + t.offset
                nodes[i] = _Tensor(t.type, 1, (ctypes.c_int64 * 4)(*t.ne), (ctypes.c_uint64 * 4)(*t.nb), data)
        return nodes, (ctypes.c_float * 3)(*params)

    def supports(
        self,
        op: str,
        dst: Tensor,
        sources: list[Tensor | None],
        params: tuple[float, ...] = (0, 0, 0),
        reduction: bool = True,
    ) -> tuple[str, int]:
        """``foreign``, ``refused`` or ``supported``, and the bytes the result needs (0: the tensor's own)."""
        nodes, p = self._node(dst, sources, params)
        size = ctypes.c_size_t()
        answer = self.dll.harness_supports(
            self.op(op), nodes, p, int(self.has_mm), int(reduction), ctypes.byref(size)
        )
        return ("foreign", "refused", "supported")[answer], size.value

    def op(self, name: str) -> int:
        """The operation's number in ggml."""
        number = self.dll.harness_op(name.encode())
        assert number >= 0, name
        return number

    def run(
        self, op: str, dst: Tensor, sources: list[Tensor | None], params: tuple[float, ...] = (0, 0, 0)
    ) -> list[str]:
        """Runs a supported node; names of the kernels in order."""
        assert self.supports(op, dst, sources, params)[0] == "supported"
        nodes, p = self._node(dst, sources, params)
        answer = self.dll.harness_run(
            self.op(op), nodes, p, int(self.has_mm), shim.ORDERS.index(self.order), self.max_threads
        )
        assert answer is not None
        return answer.decode().split()

    def encode_ref(self, row: TypeRow, x: np.ndarray) -> np.ndarray:
        """Blocks [n, block_bytes] of vectors [n, head_dim], by the C reference."""
        x = np.ascontiguousarray(x, np.float32).reshape(-1, row.head_dim)
        out = np.zeros((len(x), row.block_bytes), np.uint8)
        self.dll.pytq_quantize_ref(
            ctypes.c_void_p(self.dll.pytq_type_get(row.id)),
            ctypes.c_void_p(x.ctypes.data),
            ctypes.c_void_p(out.ctypes.data),
            ctypes.c_int64(x.size),
        )
        return out

    def decode_ref(self, row: TypeRow, blocks: np.ndarray) -> np.ndarray:
        """Vectors of blocks, by the C reference."""
        blocks = np.ascontiguousarray(blocks).reshape(-1, row.block_bytes)
        out = np.zeros((len(blocks), row.head_dim), np.float32)
        self.dll.pytq_dequantize_ref(
            ctypes.c_void_p(self.dll.pytq_type_get(row.id)),
            ctypes.c_void_p(blocks.ctypes.data),
            ctypes.c_void_p(out.ctypes.data),
            ctypes.c_int64(out.size),
        )
        return out


def generate(objects: Path) -> tuple[Path, str]:
    """The directory with the text of the kernels as a C++ string, as CMake writes it, and the text."""
    generated = objects / "generated"
    generated.mkdir(exist_ok=True)
    text = flat_source(generated)
    (generated / "pytq-metal-source.inc").write_text(f'R"PYTQ({text})PYTQ"\n')
    return generated, text


def build(objects: Path, upstream: Path) -> Path:
    """The harness with all kernels."""
    generated, text = generate(objects)
    host = host_flags(generated, upstream / "ggml")
    return shim.compile_library(
        objects,
        {"pytq": (translate.translate(text), [])},
        [
            (CSRC / "ggml" / "pytq-metal.cpp", host),
            (shim.HERE / "harness.cpp", host),
            (CSRC / "ref" / "types.c", ["-ffp-contract=off", f"-I{CSRC}"]),
            (CSRC / "ref" / "codec.c", ["-ffp-contract=off", f"-I{CSRC}"]),
        ],
    )


def host_flags(generated: Path, ggml: Path) -> list[str]:
    """Include directories of the dispatching code; upstream's headers count as the system's."""
    own, foreign = [generated, CSRC, CSRC / "ggml"], ["include", "src", "src/ggml-metal"]
    return [f"-I{d}" for d in own] + [f"-isystem{ggml / d}" for d in foreign]


def build_backend(objects: Path, tree: Path, libraries: Path) -> Path:
    """A ggml backend: the patched C++ files of ggml-metal on the shim's device, linked to a patched build's libraries."""
    generated, text = generate(objects)
    host = host_flags(generated, tree / "ggml")
    metal = tree / "ggml" / "src" / "ggml-metal"
    # Apple's <string> brings in <memory>
    flags = [
        "-w",
        "-include",
        "memory",
        "-DGGML_BACKEND_DL",
        "-DGGML_BACKEND_BUILD",
        "-DGGML_BACKEND_SHARED",
        *host,
    ]
    own = [CSRC / "ggml" / "pytq-metal.cpp", shim.HERE / "backend.cpp"]
    return shim.compile_library(
        objects,
        {"pytq": (translate.translate(text), [])},
        [(p, host) for p in own] + [(p, flags) for p in sorted(metal.glob("*.cpp"))],
        [f"-L{libraries}", "-lggml-base", f"-Wl,-rpath,{libraries}", "-Wl,-z,defs"],
    )
