"""PolarQuant (arXiv 2502.02617): recursive polar coordinates in groups of 16, in NumPy.

Definition 1: pairs become (radius, angle), the radii are paired again, four times: 8 + 4 + 2 + 1 angles and one radius for
16 coordinates. Section 4.2: the first angle is uniform on the circle (16 bins, 4 bits), the others have the density
sin(2 psi)^(2^(l-1) - 1) on a quarter circle (4 bins, 2 bits). 32 + 8 + 4 + 2 bits and a 16-bit radius are 62 bits for 16
values: 3.875 bits per value, as the paper counts. Bins are found by comparing slopes with tangents, never by atan2.
"""

from __future__ import annotations

import numpy as np

from pytq.codec.lloydmax import POLAR_LEVELS, table
from pytq.codec.scalars import (
    F32,
    U8,
    exp2_int,
    exponent_of,
    get_scalar,
    pack_bits,
    put_scalar,
    scale2,
    unpack_bits,
)


def encode(y: F32, exponent: np.ndarray, wide: bool) -> tuple[list[U8], np.ndarray]:
    """Rotated vectors [N, d] divided by 2^exponent [N] -> radii, 4-bit angles, 2-bit angles; and whether radii fit."""
    bins = []
    radius = y
    for level in range(1, POLAR_LEVELS + 1):
        a, b = radius[:, 0::2], radius[:, 1::2]
        slopes = table(f"polar_tan_{level}")
        s = sum(((np.abs(b) > t * np.abs(a)).astype(np.int64) for t in slopes), np.zeros(a.shape, np.int64))
        if level == 1:
            s = np.where(a < 0, np.where(b < 0, 8 + s, 7 - s), np.where(b < 0, 15 - s, s))
        bins.append(s.astype(np.uint8))
        radius = np.sqrt(a * a + b * b)
    raw, fits = put_scalar(scale2(radius, exponent[:, None]), wide)
    return [raw, pack_bits(bins[0], 4), pack_bits(np.concatenate(bins[1:], axis=1), 2)], fits


def open_code(code: U8, d: int, wide: bool) -> tuple[F32, F32]:
    """Rotated coordinates [N, d] divided by the scale [N], a power of two near the largest radius."""
    radius, code = get_scalar(code, d // 16, wide)
    e = exponent_of(radius.max(axis=1))
    radius = scale2(radius, -e[:, None])
    first = unpack_bits(code[:, : d // 4], d // 2, 4)
    fine = unpack_bits(code[:, d // 4 :], 7 * d // 16, 2)
    ends = {2: (0, d // 4), 3: (d // 4, 3 * d // 8), 4: (3 * d // 8, 7 * d // 16)}
    for level in range(POLAR_LEVELS, 0, -1):
        index = first if level == 1 else fine[:, ends[level][0] : ends[level][1]]
        pair = np.stack(
            [radius * table(f"polar_cos_{level}")[index], radius * table(f"polar_sin_{level}")[index]], 2
        )
        radius = pair.reshape(len(code), -1)
    return radius, exp2_int(e)
