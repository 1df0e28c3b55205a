"""TurboQuant (arXiv 2504.19874): mse (algorithm 1) and prod (algorithm 2), in NumPy.

mse: the rotated unit vector times sqrt(d) has coordinates close to N(0,1); each goes to its Lloyd-Max level. prod: mse
at bits - 1, then one QJL sign per projection of the residual, which makes inner products unbiased. The residual is taken
in rotated space: S is Gaussian, so its law does not change and one inverse rotation is saved.
"""

from __future__ import annotations

import numpy as np

from pytq.codec.lloydmax import table
from pytq.codec.qjl import pack_signs, unpack_signs
from pytq.codec.rotation import matvec
from pytq.codec.scalars import (
    F32,
    U8,
    dot16,
    get_scalar,
    pack_bits,
    put_scalar,
    qjl_factor,
    root,
    unpack_bits,
)


def quantize(z: F32, bits: int) -> tuple[U8, F32]:
    """Nearest Lloyd-Max levels of z [N, d]: indices uint8 [N, d] and levels float32 [N, d]."""
    index = np.searchsorted(table(f"lloyd_max_thr_{bits}"), z, side="left").astype(np.uint8)
    return index, table(f"lloyd_max_{bits}")[index]


def _unit(y: F32, norm: F32) -> F32:
    with np.errstate(divide="ignore"):
        inverse = np.where(norm > 0, root(y.shape[1]) / norm, np.float32(0))
    return y * inverse[:, None]


def encode_mse(y: F32, norm: F32, bits: int) -> list[U8]:
    """Rotated vectors [N, d] with their norms [N] -> packed indices (the norm is stored by the caller)."""
    return [pack_bits(quantize(_unit(y, norm), bits)[0], bits)]


def open_mse(code: U8, norm: F32, d: int, bits: int) -> tuple[F32, F32]:
    """Levels [N, d] and the scale [N] that turns them into rotated coordinates."""
    return table(f"lloyd_max_{bits}")[unpack_bits(code, d, bits)], norm / root(d)


def encode_prod(y: F32, norm: F32, bits: int, proj_t: F32, wide: bool) -> tuple[list[U8], np.ndarray]:
    """As ``encode_mse``: gamma = |residual| / |x|, indices of bits - 1, signs of S residual; and whether gamma fits."""
    z = _unit(y, norm)
    index, level = quantize(z, bits - 1)
    residual = z - level
    gamma = (np.sqrt(dot16(residual, residual)) / root(y.shape[1])).astype(np.float32, copy=False)
    raw, fits = put_scalar(gamma[:, None], wide)
    return [raw, pack_bits(index, bits - 1), pack_signs(matvec(residual, proj_t))], fits


def open_prod(code: U8, norm: F32, d: int, bits: int, m: int, wide: bool) -> tuple[F32, F32, F32, F32, F32]:
    """Levels [N, d], scale [N], signs [N, m], and the signs' factors for decoding and for inner products [N]."""
    gamma, code = get_scalar(code, 1, wide)
    split = d // 8 * (bits - 1)
    level, scale = open_mse(code[:, :split], norm, d, bits - 1)
    k = qjl_factor(m)
    return level, scale, unpack_signs(code[:, split:], m), gamma[:, 0] * root(d) * k, norm * gamma[:, 0] * k
