"""QJL (arXiv 2406.03482): one sign bit per row of a Gaussian projection, and the norm; in NumPy.

Encoding keeps sign(S x) and |x| (definition 3.1). <q, x> is estimated by |x| sqrt(pi/2) / m <S q, sign(S x)>, which is
unbiased over S (lemma 3.2).
"""

from __future__ import annotations

import numpy as np

from pytq.codec.rotation import matvec
from pytq.codec.scalars import F32, U8


def pack_signs(v: F32) -> U8:
    """One bit per value, set where it is positive: [N, m] -> uint8 [N, m / 8]."""
    return np.packbits(v > 0, axis=1, bitorder="little")


def unpack_signs(code: U8, m: int) -> F32:
    """Signs as 1 and -1, float32 [N, m]."""
    bit = np.unpackbits(code, axis=1, bitorder="little")[:, :m]
    return np.where(bit == 1, np.float32(1), np.float32(-1))


def encode(y: F32, proj_t: F32) -> list[U8]:
    """Vectors [N, d] and S^T [d, m] -> packed signs of S y."""
    return [pack_signs(matvec(y, proj_t))]
