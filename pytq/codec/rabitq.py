"""RaBitQ (arXiv 2405.12497) and its extension to 1..8 bits (arXiv 2409.09913), in NumPy.

The rotated vector goes to the grid vector +-(k + 1/2), k < 2^(bits-1), of the largest cosine (extended RaBitQ, section
3.2, algorithm 1: the scale is searched exactly). The code keeps |x| and cos = <x, grid> / (|x| |grid|), as the published
index does; then |x| / (cos |grid|) <grid, q> is an unbiased estimate of <x, q> over the rotation (RaBitQ, theorem 3.2),
and |x| cos / |grid| grid is the reconstruction of least squared error.
"""

from __future__ import annotations

import numpy as np

from pytq.codec.lloydmax import table
from pytq.codec.scalars import F32, U8, dot16, get_scalar, pack_bits, put_scalar, root, unpack_bits

WINDOW_FROM_BITS = 4


def grid(index: U8, bits: int) -> F32:
    """Grid coordinates of indices: index - (2^bits - 1) / 2."""
    return index.astype(np.float32) - np.float32(0.5 * (2**bits - 1))


def search(a: F32, bits: int) -> U8:
    """Magnitudes k, uint8 [N, d], of the grid vector of largest cosine to a >= 0 [N, d].

    The candidates are the roundings of t a for t > 0: coordinate i steps from k - 1 to k at t = k / a_i. Steps are sorted
    by (t, i); numerator and denominator are running float32 sums. From 4 bits on only 0.5 K < t max(a) < 1.5 K is
    searched: outside, the grid is twice too coarse or clips a third of the largest coordinate.
    """
    n, d = a.shape
    half = 2 ** (bits - 1)
    last = half - 1
    top = a.max(axis=1, keepdims=True)
    windowed = bits >= WINDOW_FROM_BITS
    with np.errstate(divide="ignore", over="ignore"):
        step = np.arange(1, half, dtype=np.float32) / a[:, :, None]
        low = np.float32(0.5) * np.float32(half) / top if windowed else np.zeros_like(top)
        high = np.float32(1.5) * np.float32(half) / top if windowed else np.full_like(top, np.inf)
    before = step < low[:, :, None]
    start = before.sum(axis=2)
    flat = np.where(before | ~(step < high[:, :, None]), np.float32(np.inf), step).reshape(n, -1)
    order = np.argsort(flat, axis=1, kind="stable")
    taken = np.take_along_axis(flat, order, axis=1) < np.inf
    origin = start.astype(np.float32) + np.float32(0.5)
    i, k = order // last, order % last + 1
    num = np.where(taken, np.take_along_axis(a, i, axis=1), np.float32(0))
    den = np.where(taken, (2 * k).astype(np.float32), np.float32(0))
    num = np.cumsum(np.concatenate([dot16(a, origin)[:, None], num], axis=1), axis=1, dtype=np.float32)
    den = np.cumsum(np.concatenate([dot16(origin, origin)[:, None], den], axis=1), axis=1, dtype=np.float32)
    best = np.argmax(num * num / den, axis=1)
    chosen = (np.arange(order.shape[1]) < best[:, None]) & taken
    passed = np.zeros((n, d * last), bool)
    np.put_along_axis(passed, order, chosen, axis=1)
    return (start + passed.reshape(n, d, last).sum(axis=2)).astype(np.uint8)


def round_fixed(a: F32, norm: F32, bits: int) -> U8:
    """Magnitudes k, uint8 [N, d], at the step that is best for N(0,1) coordinates: the search's average, far cheaper."""
    t = root(a.shape[1]) / (norm * table("uniform_step")[bits])
    return np.minimum(a * t[:, None], np.float32(2 ** (bits - 1) - 1)).astype(np.uint8)


def encode(y: F32, norm: F32, bits: int, wide: bool, fast: bool) -> tuple[list[U8], np.ndarray]:
    """Rotated vectors [N, d] with norms [N] -> cos, packed indices; and whether cos fits."""
    a = np.abs(y)
    k = np.zeros(y.shape, np.uint8)
    if bits > 1:
        rows = np.flatnonzero(norm > 0)
        if fast:
            k[rows] = round_fixed(a[rows], norm[rows], bits)
            rows = rows[:0]
        # bounds the memory of the sorted steps: 8 bits have 127 per coordinate
        block = max(1, 2**21 // (y.shape[1] * 2 ** (bits - 1)))
        for at in range(0, len(rows), block):
            k[rows[at : at + block]] = search(a[rows[at : at + block]], bits)
    half = 2 ** (bits - 1)
    index = np.where(y < 0, half - 1 - k.astype(np.int64), half + k.astype(np.int64)).astype(np.uint8)
    g = grid(index, bits)
    size = norm * np.sqrt(dot16(g, g))
    with np.errstate(divide="ignore", invalid="ignore"):
        cosine = np.where(size > 0, dot16(y, g) / size, np.float32(1))
    raw, fits = put_scalar(cosine[:, None], wide)
    return [raw, pack_bits(index, bits)], fits


def open_code(code: U8, norm: F32, d: int, bits: int, wide: bool) -> tuple[F32, F32, F32]:
    """Grid vectors [N, d], the scale of least error [N] and the unbiased scale [N]."""
    cosine, code = get_scalar(code, 1, wide)
    g = grid(unpack_bits(code, d, bits), bits)
    size: F32 = np.sqrt(dot16(g, g))
    return g, norm * cosine[:, 0] / size, norm / (cosine[:, 0] * size)
