"""What every paper codec shares: exact power-of-two scaling, 16-lane sums, scalars and bit packing (csrc/codecs/common.h)."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]
SQRT_HALF_PI = 1.2533141373155003


def dot16(a: F32, b: F32) -> F32:
    """Row-wise sums of products, [..., n] x [..., n] -> [...]: 16 lanes, then lanes 8, 4, 2, 1 apart, all float32."""
    shape = np.broadcast_shapes(a.shape, b.shape)
    acc = np.zeros((*shape[:-1], 16), np.float32)
    for i in range(0, shape[-1], 16):
        acc += a[..., i : i + 16] * b[..., i : i + 16]
    for h in (8, 4, 2, 1):
        acc = acc[..., :h] + acc[..., h : 2 * h]
    return np.asarray(acc[..., 0])


def exp2_int(e: NDArray[np.int64]) -> F32:
    """2^e as float32 for -149 <= e <= 127."""
    return np.ldexp(np.float32(1.0), e).astype(np.float32)


def halves(e: NDArray[np.int64]) -> tuple[F32, F32]:
    """Two float32 factors whose product is 2^e, |e| <= 149; 2^e itself may overflow."""
    a = np.trunc(e / 2).astype(np.int64)
    return exp2_int(a), exp2_int(e - a)


def scale2(v: F32, e: NDArray[np.int64]) -> F32:
    """v * 2^e through ``halves``."""
    p, q = halves(e)
    return v * p * q


def exponent_of(v: F32) -> NDArray[np.int64]:
    """floor(log2 v) per element, 0 where v is 0."""
    return np.where(v > 0, np.frexp(v)[1].astype(np.int64) - 1, 0)


def put_scalar(v: F32, wide: bool) -> tuple[U8, NDArray[np.bool_]]:
    """[N, k] scalars -> their bytes [N, 2k or 4k] as fp16 or float32, and whether each row fits."""
    with np.errstate(over="ignore"):
        stored = v.astype(np.float32 if wide else np.float16)
    fits: NDArray[np.bool_] = np.asarray(np.isfinite(stored).all(axis=1))
    return stored.view(np.uint8).reshape(len(v), -1), fits


def get_scalar(code: U8, k: int, wide: bool) -> tuple[F32, U8]:
    """The first k scalars of each code, float32 [N, k], and the rest of the code."""
    size = 4 * k if wide else 2 * k
    raw = np.ascontiguousarray(code[:, :size])
    return raw.view(np.float32 if wide else np.float16).astype(np.float32), code[:, size:]


def pack_bits(index: U8, bits: int) -> U8:
    """[N, n] numbers of ``bits`` bits -> little-endian bit stream, uint8 [N, ceil(n * bits / 8)]."""
    planes = (index[:, :, None] >> np.arange(bits, dtype=np.uint8)) & 1
    return np.packbits(planes.reshape(len(index), -1), axis=1, bitorder="little")


def unpack_bits(code: U8, n: int, bits: int) -> U8:
    """Inverse of ``pack_bits`` for n numbers."""
    stream = np.unpackbits(code, axis=1, bitorder="little")[:, : n * bits].reshape(len(code), n, bits)
    return (stream << np.arange(bits, dtype=np.uint8)).sum(axis=2, dtype=np.uint8)


def root(d: int) -> F32:
    """float32(sqrt(d)), a scalar array."""
    return np.array(math.sqrt(d), np.float32)


def qjl_factor(m: int) -> F32:
    """float32(sqrt(pi / 2) / m): makes the sign estimator unbiased (QJL, arXiv 2406.03482, lemma 3.2)."""
    return np.array(SQRT_HALF_PI / m, np.float32)
