"""Blocks of the cache types in NumPy: the readable twin of csrc/ref/codec.c, equal to it to the bit.

A block is one head vector: scale bytes, then bit planes (docs/format.md). The order of every float operation is part of the
definition: float32, sums over 16 lanes folded by halves, products and sums rounded separately.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pytq.codec import trellis
from pytq.codec.table import Codebook, TypeRow, load_codebook
from pytq.errors import PytqError

F32 = np.float32
LANES = 16
LOG8_BIAS = 136
_LOG8_MANTISSA = (2.0 ** (np.arange(8) / 8)).astype(F32)
_LOG8_LIMIT = (2.0 ** ((np.arange(8) + 0.5) / 8)).astype(F32)


def log8_decode(e: NDArray[np.int64]) -> NDArray[np.float32]:
    """Scale of a LOG8 byte: 2^((e - 136) / 8), and 0 for e = 0."""
    k = e - LOG8_BIAS + 256
    return np.where(e == 0, F32(0), np.ldexp(_LOG8_MANTISSA[k % 8], k // 8 - 32)).astype(F32)


def log8_encode(sigma: NDArray[np.float32]) -> NDArray[np.int64]:
    """Nearest LOG8 byte in the log domain; 0 below the smallest scale, 255 above the largest."""
    half, exponent = np.frexp(sigma)
    mantissa = half * F32(2)
    k = (mantissa[..., None] >= _LOG8_LIMIT).sum(-1)
    e = 8 * (exponent.astype(np.int64) - 1) + k + LOG8_BIAS
    return np.where((sigma > 0) & (e >= 1), np.minimum(e, 255), 0)


def sum_product(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    """Sum of a * b over the last axis in the format's order."""
    p = a * b
    n = p.shape[-1]
    pad = -n % LANES
    acc = np.zeros((*p.shape[:-1], LANES), F32)
    for i in range(0, n + pad, LANES):
        part = p[..., i : i + LANES]
        acc[..., : part.shape[-1]] += part
    w = LANES // 2
    while w:
        acc = acc[..., :w] + acc[..., w : 2 * w]
        w //= 2
    return acc[..., 0]


def _range_shift(m: NDArray[np.float32]) -> NDArray[np.int32]:
    """Power of two that keeps squares of a vector with largest magnitude m inside float32."""
    inside = (m >= F32(2.0**-40)) & (m <= F32(2.0**40))
    return np.where(inside, 0, np.frexp(m)[1]).astype(np.int32)


def _put_planes(row: TypeRow, out: NDArray[np.uint8], bits: list[NDArray[np.uint8]]) -> None:
    for p, plane in enumerate(bits):
        packed = np.packbits(plane[:, : row.plane_len(p)], axis=1, bitorder="little")
        out[:, row.plane_offset(p) : row.plane_offset(p) + packed.shape[1]] = packed


def _encode_scalar(
    row: TypeRow, x: NDArray[np.float32], shift: NDArray[np.int32], out: NDArray[np.uint8]
) -> None:
    book = load_codebook(row.code, row.groups[0][1])
    levels = book.levels.astype(F32)
    ss = sum_product(x, x)
    sigma = np.sqrt(ss / F32(row.head_dim))
    inv = F32(1) / (sigma * book.step)
    y = x * inv[:, None]
    k = (y[..., None] > F32(0.5) * (levels[:-1] + levels[1:])).sum(-1)
    _put_planes(row, out, [(k >> p & 1).astype(np.uint8) for p in range(row.n_planes)])
    level = levels[k]
    scale = np.ldexp(np.sqrt(ss / sum_product(level, level)) / book.step, shift)
    half = np.minimum(scale, F32(65504)).astype(np.float16)
    out[:, :2] = half.view(np.uint8).reshape(-1, 2)


def _factor(e: NDArray[np.int64], shift: NDArray[np.int32], book: Codebook) -> NDArray[np.float32]:
    return np.ldexp(log8_decode(e), -shift) * book.step


def _encode_trellis(
    row: TypeRow, x: NDArray[np.float32], shift: NDArray[np.int32], out: NDArray[np.uint8]
) -> None:
    n = x.shape[0]
    cost = np.empty((n, row.head_dim, 4), F32)
    best = np.empty((n, row.head_dim, 4), np.int64)
    exponents = []
    at = 0
    for size, bits in row.groups:
        book = load_codebook(row.code, bits)
        levels = book.levels.astype(F32)
        part = x[:, at : at + size]
        e = log8_encode(np.ldexp(np.sqrt(sum_product(part, part) / F32(size)), shift))
        f = _factor(e, shift, book)
        inv = np.where(e > 0, F32(1) / f, F32(0)).astype(F32)
        weight = np.ones(n, F32) if len(row.groups) == 1 else f * f
        y = part * inv[:, None]
        index = trellis.nearest_in_subset(y, levels)
        err = y[..., None] - levels[index]
        cost[:, at : at + size] = weight[:, None, None] * (err * err)
        best[:, at : at + size] = index
        exponents.append(e)
        at += size
    index = trellis.viterbi(cost, best)
    at = 0
    for g, (size, bits) in enumerate(row.groups):
        book = load_codebook(row.code, bits)
        part = x[:, at : at + size]
        level = book.levels.astype(F32)[index[:, at : at + size]]
        xl, ll = sum_product(part, level), sum_product(level, level)
        chosen, least = exponents[g].copy(), np.zeros(n, F32)
        for k, step in enumerate((0, -1, 1)):
            cand = exponents[g] + step
            f = _factor(np.clip(cand, 1, 255), shift, book)
            err = f * (f * ll - F32(2) * xl)
            better = (exponents[g] > 0) & (cand >= 1) & (cand <= 255)
            if k:
                better &= err < least
            chosen, least = np.where(better, cand, chosen), np.where(better, err, least)
        out[:, g] = chosen
        at += size
    planes = [trellis.coded_bits(index)]
    planes += [(index >> (p + 1) & 1).astype(np.uint8) for p in range(1, row.n_planes)]
    _put_planes(row, out, planes)


def encode(row: TypeRow, x: ArrayLike) -> NDArray[np.uint8]:
    """Blocks of rotated head vectors.

    Args:
        row: the concrete type.
        x: float32 [..., head_dim]. A vector with a NaN or an infinity is stored as zero, as the kernels do;
            ``pytq.codec(...).encode`` refuses such input.

    Returns:
        uint8 [..., block_bytes].

    Raises:
        PytqError: the last axis is not head_dim.
    """
    v = np.asarray(x, F32)
    if v.ndim == 0 or v.shape[-1] != row.head_dim:
        raise PytqError(f"{row.name} takes vectors of {row.head_dim} values, not shape {v.shape}")
    flat = v.reshape(-1, row.head_dim)
    out = np.zeros((flat.shape[0], row.block_bytes), np.uint8)
    m = np.abs(flat).max(-1) if flat.size else np.zeros(flat.shape[0], F32)
    live = np.isfinite(m) & (m > 0)
    if live.any():
        shift = _range_shift(m[live])
        scaled = np.ldexp(flat[live], -shift[:, None])
        part = np.zeros((int(live.sum()), row.block_bytes), np.uint8)
        # scales outside the LOG8 range overflow in branches that are then discarded, as in C
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            (_encode_scalar if row.code == "SCALAR" else _encode_trellis)(row, scaled, shift, part)
        out[live] = part
    return out.reshape(*v.shape[:-1], row.block_bytes)


def unpack(row: TypeRow, blocks: ArrayLike) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """int8 levels [..., head_dim] and factors scale * step [..., groups] of blocks [..., block_bytes].

    Raises:
        PytqError: the last axis is not block_bytes.
    """
    b = np.asarray(blocks, np.uint8)
    if b.ndim == 0 or b.shape[-1] != row.block_bytes:
        raise PytqError(f"{row.name} has blocks of {row.block_bytes} bytes, not shape {b.shape}")
    flat = b.reshape(-1, row.block_bytes)
    index = np.zeros((flat.shape[0], row.head_dim), np.int64)
    for p in range(row.n_planes):
        n, at = row.plane_len(p), row.plane_offset(p)
        bits = np.unpackbits(flat[:, at : at + n // 8], axis=1, bitorder="little")
        index[:, :n] |= bits.astype(np.int64) << p
    if row.code == "TRELLIS":
        index = (index >> 1) * 4 + trellis.subsets((index & 1).astype(np.uint8))
    levels = np.empty(index.shape, np.int8)
    factor = np.empty((flat.shape[0], len(row.groups)), F32)
    at = 0
    for g, (size, bits_) in enumerate(row.groups):
        book = load_codebook(row.code, bits_)
        levels[:, at : at + size] = book.levels[index[:, at : at + size]]
        if row.scale == "FP16":
            scale = np.ascontiguousarray(flat[:, 2 * g : 2 * g + 2]).view(np.float16)[:, 0].astype(F32)
        else:
            scale = log8_decode(flat[:, g].astype(np.int64))
        factor[:, g] = scale * book.step
        at += size
    return levels.reshape(*b.shape[:-1], row.head_dim), factor.reshape(*b.shape[:-1], len(row.groups))


def decode(row: TypeRow, blocks: ArrayLike) -> NDArray[np.float32]:
    """Reconstructed vectors, float32 [..., head_dim], of blocks [..., block_bytes]."""
    levels, factor = unpack(row, blocks)
    per_value = np.repeat(factor, [n for n, _ in row.groups], axis=-1)
    return (per_value * levels.astype(F32)).astype(F32)
