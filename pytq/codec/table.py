"""The table of cache types as Python sees it: csrc/types.def and csrc/codebooks.def, read once.

Nothing is repeated here: names, head sizes, groups, bits and codebooks come from the two files that C and CUDA include.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pytq.errors import PytqError

CSRC = Path(__file__).resolve().parents[2] / "csrc"
TYPE_BASE = 128
FAMILY_STRIDE = 8
HEAD_DIMS = (64, 80, 96, 128, 192, 256)
SCALE_BYTES = {"FP16": 2, "LOG8": 1}

# Stock types that llama.cpp offers for the cache: (name, ggml id, values per block, bytes per block), from ggml.h and ggml-common.h.
STOCK = (
    ("f32", 0, 1, 4),
    ("f16", 1, 1, 2),
    ("bf16", 30, 1, 2),
    ("q8_0", 8, 32, 34),
    ("q5_1", 7, 32, 24),
    ("q5_0", 6, 32, 22),
    ("q4_1", 3, 32, 20),
    ("q4_0", 2, 32, 18),
    ("iq4_nl", 20, 32, 18),
    ("mxfp4", 39, 32, 17),
    ("nvfp4", 40, 64, 36),
)
# Offered by the patched build only: upstream has these formats but no cache flag for them.
PATCHED_ONLY = ("mxfp4", "nvfp4")


@dataclass(frozen=True)
class TypeRow:
    """One concrete type: the block of one family at one head size."""

    id: int
    family: str
    head_dim: int
    code: str  # "SCALAR" or "TRELLIS"
    scale: str  # "FP16" or "LOG8"
    groups: tuple[tuple[int, int], ...]  # (coordinates, bits per coordinate)

    @property
    def name(self) -> str:
        return f"{self.family}_d{self.head_dim}"

    @property
    def n_planes(self) -> int:
        return self.groups[0][1]

    @property
    def scale_bytes(self) -> int:
        return SCALE_BYTES[self.scale] * len(self.groups)

    def plane_len(self, p: int) -> int:
        """Coordinates of bit plane ``p``: those of all groups with more than ``p`` bits."""
        return sum(n for n, bits in self.groups if bits > p)

    def plane_offset(self, p: int) -> int:
        """Byte offset of bit plane ``p`` in the block."""
        return self.scale_bytes + sum(self.plane_len(i) for i in range(p)) // 8

    @property
    def block_bytes(self) -> int:
        return self.plane_offset(self.n_planes)

    @property
    def bits_per_value(self) -> float:
        """Bits per cached value, scales counted."""
        return 8 * self.block_bytes / self.head_dim


@dataclass(frozen=True)
class Codebook:
    """int8 levels in ascending order; value = scale * step * level."""

    step: np.float32
    levels: NDArray[np.int8]


def _calls(text: str, macro: str) -> list[list[str]]:
    body = re.findall(rf"^{macro}\((.*)\)\s*$", text, flags=re.MULTILINE)
    return [[a.strip() for a in line.split(",")] for line in body]


def _read(name: str) -> str:
    path = CSRC / name
    if not path.is_file():
        path = Path(__file__).with_name(name)  # an installed wheel carries the tables beside this file
    return path.read_text()


@cache
def load_types() -> tuple[TypeRow, ...]:
    """All concrete types, in the order of csrc/types.def."""
    text = _read("types.def")
    families = {f[0]: (int(f[1]), f[2], f[3]) for f in _calls(text, "PYTQ_FAMILY")}
    rows = []
    for name, slot, head_dim, *groups in _calls(text, "PYTQ_TYPE"):
        index, code, scale = families[name]
        pairs = tuple((int(groups[i]), int(groups[i + 1])) for i in range(0, 6, 2) if int(groups[i]))
        rows.append(
            TypeRow(TYPE_BASE + FAMILY_STRIDE * index + int(slot), name, int(head_dim), code, scale, pairs)
        )
    return tuple(rows)


@cache
def families() -> dict[str, int]:
    """Family name -> ggml id of its flag (an alias that the KV cache resolves by head size)."""
    calls = _calls(_read("types.def"), "PYTQ_FAMILY")
    return {f[0]: TYPE_BASE + FAMILY_STRIDE * int(f[1]) for f in calls}


def flags() -> tuple[str, ...]:
    """pytq's cache type flags as users write them (split layouts are chosen by a profile, not by a flag)."""
    return tuple(name for name in families() if not name.endswith("s"))


def profile_flags() -> tuple[str, ...]:
    """The flags that only a profile resolves: they have no block of their own."""
    with_blocks = {row.family for row in load_types()}
    return tuple(name for name in flags() if name not in with_blocks)


def find_type(family: str, head_dim: int) -> TypeRow:
    """The concrete type of a family at a head size.

    Raises:
        PytqError: unknown family, or a head size without a block.
    """
    if family not in families():
        raise PytqError(f"unknown cache type {family!r}: one of {', '.join(cache_type_names())}")
    for row in load_types():
        if row.family == family and row.head_dim == head_dim:
            return row
    sizes = ", ".join(map(str, HEAD_DIMS))
    raise PytqError(f"cache type {family} has no block for head_dim {head_dim}; supported: {sizes}")


def cache_type_names() -> tuple[str, ...]:
    """Every name that --cache-type-k/-v of the patched build takes."""
    return (*flags(), *(name for name, *_ in STOCK))


def cache_type_id(name: str) -> int:
    """ggml id of a cache type flag, stock or pytq.

    Raises:
        PytqError: unknown name; the message lists the known ones.
    """
    for stock, id_, _, _ in STOCK:
        if name == stock:
            return id_
    if name in families():
        return families()[name]
    raise PytqError(f"unknown cache type {name!r}: one of {', '.join(cache_type_names())}")


def type_bytes(name: str, head_dim: int, n: int) -> int:
    """Bytes of ``n`` cached values (a multiple of head_dim) of a type, scales counted."""
    for stock, _, block, size in STOCK:
        if name == stock:
            return n // block * size if n % block == 0 else -(-n // block) * size
    return n // head_dim * find_type(name, head_dim).block_bytes


def bits_per_value(name: str, head_dim: int) -> float:
    """Bits per cached value of a type flag at a head size, scales counted."""
    for stock, _, block, size in STOCK:
        if name == stock:
            return 8 * size / block
    return find_type(name, head_dim).bits_per_value


@cache
def load_codebook(code: str, bits: int) -> Codebook:
    """Codebook of a code ("SCALAR", "TRELLIS") at a rate.

    Raises:
        PytqError: no such table.
    """
    for c, b, n, step, *levels in _calls(_read("codebooks.def"), "PYTQ_CODEBOOK"):
        if c == code and int(b) == bits:
            table = np.array([int(v) for v in levels], np.int8)
            assert len(table) == int(n)
            return Codebook(np.float32(float.fromhex(step.rstrip("f"))), table)
    raise PytqError(f"no codebook for {code.lower()} code at {bits} bits")
