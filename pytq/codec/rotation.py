"""Rotations that make the coordinates of a head vector look alike: Hadamard and random orthogonal.

TurboQuant (arXiv 2504.19874, section 3) and RaBitQ (arXiv 2405.12497, section 3.1) draw a random orthogonal matrix;
the randomised Hadamard transform (random signs, then H) costs d log d additions instead of d^2 products.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pytq.errors import PytqError

F32 = NDArray[np.float32]
KINDS = ("none", "hadamard", "random")


def base_order(n: int) -> int:
    """Order of the dense factor of H_n: 1, 12 or 20; 0 where n is none of 2^k, 12 * 2^k, 20 * 2^k."""
    if n < 1:
        return 0
    odd = n
    while odd % 2 == 0:
        odd //= 2
    if odd == 1:
        return 1
    return 4 * odd if odd in (3, 5) and n % 4 == 0 else 0


def paley(order: int) -> NDArray[np.int8]:
    """Symmetric Hadamard matrix of order 1, 12 or 20 with entries 1 and -1, int8 [order, order].

    Paley's second construction (Paley 1933) from the quadratic character chi of GF(q), q = order / 2 - 1 = 5 or 9.
    GF(9) is GF(3)[i], i^2 = -1, where chi(a + bi) = (a + bi)^4 = a^2 + b^2.
    """
    if order == 1:
        return np.ones((1, 1), np.int8)
    q = order // 2 - 1
    c = np.ones((q + 1, q + 1), int)
    for x in range(q):
        for y in range(q):
            if q == 5:
                chi = (0, 1, -1, -1, 1)[(x - y) % 5]
            else:
                chi = (0, 1, -1)[((x // 3 - y // 3) ** 2 + (x % 3 - y % 3) ** 2) % 3]
            c[x + 1, y + 1] = chi
    c[0, 0] = 0
    eye = np.eye(q + 1, dtype=int)
    return np.block([[c + eye, c - eye], [c - eye, -c - eye]]).astype(np.int8)


def hadamard(n: int) -> F32:
    """Symmetric orthonormal Hadamard matrix H = H^T, H H = I; float32 [n, n].

    n: 2^k, 12 * 2^k or 20 * 2^k, which covers head_dim 64, 80, 96, 128, 192 and 256. H_n is the Kronecker product
    of Paley's matrix of order 1, 12 or 20 with Sylvester's of order 2^k. Raises PytqError for other n.
    """
    base = base_order(n)
    if base == 0:
        raise PytqError(f"no Hadamard matrix of order {n} here: supported are 2^k, 12 * 2^k and 20 * 2^k")
    h = paley(base).astype(np.float32)
    while len(h) < n:
        h = np.kron(h, np.array([[1, 1], [1, -1]], np.float32))
    return h * np.float32(1.0 / math.sqrt(n))


def hadamard_apply(x: F32) -> F32:
    """H x for every vector in x, float32 [..., n] -> float32 [..., n]; same float operations as the C code.

    Order: butterflies of stride 1, 2, 4 ... inside runs of n / base values, the base rows added left to right, one
    product by float32(1 / sqrt(n)). Raises PytqError for an unsupported n.
    """
    n = x.shape[-1]
    base = base_order(n)
    if base == 0:
        raise PytqError(f"no Hadamard matrix of order {n} here: supported are 2^k, 12 * 2^k and 20 * 2^k")
    run = n // base
    y = np.array(x, np.float32).reshape(-1, n)
    h = 1
    while h < run:
        pairs = y.reshape(len(y), n // (2 * h), 2, h)
        a, b = pairs[:, :, 0].copy(), pairs[:, :, 1].copy()
        pairs[:, :, 0], pairs[:, :, 1] = a + b, a - b
        h *= 2
    if base > 1:
        rows = y.reshape(len(y), base, run)
        total = np.zeros_like(rows)
        sign = paley(base).astype(np.float32)
        for k in range(base):
            total += sign[None, :, k, None] * rows[:, k, None, :]
        y = total.reshape(-1, n)
    return (y * np.float32(1.0 / math.sqrt(n))).reshape(x.shape)


@functools.lru_cache(maxsize=64)
def random_orthogonal(n: int, seed: int) -> F32:
    """Haar-random orthogonal matrix, float32 [n, n]: QR of a seeded Gaussian, signs of diag(R) folded in."""
    q, r = np.linalg.qr(np.random.default_rng([seed, n, 1]).standard_normal((n, n)))
    out = np.ascontiguousarray((q * np.sign(np.diag(r))).astype(np.float32))
    out.flags.writeable = False
    return out


def gaussian(rows: int, n: int, seed: int) -> F32:
    """QJL's projection S with independent N(0,1) entries, float32 [rows, n] (arXiv 2406.03482, definition 3.1)."""
    return np.random.default_rng([seed, n, 2]).standard_normal((rows, n), np.float32)


def matvec(x: F32, transposed: F32) -> F32:
    """M x for every row of x given M^T: float32 [N, n], [n, m] -> [N, m], adding one column of M at a time.

    That order needs no horizontal sum, so C vectorises it and equals NumPy.
    """
    y = np.zeros((len(x), transposed.shape[1]), np.float32)
    for j in range(transposed.shape[0]):
        y += x[:, j : j + 1] * transposed[j]
    return y


class Rotation:
    """y = R x with R orthogonal: the identity, H D (randomised Hadamard, D = random signs) or a random orthogonal.

    Args:
        kind: "none", "hadamard" or "random".
        dim: n, the length of the vectors.
        seed: of the signs or of the matrix.

    Raises:
        PytqError: unknown kind, or "hadamard" with an n that has no matrix here.
    """

    def __init__(self, kind: str, dim: int, seed: int) -> None:
        if kind not in KINDS:
            raise PytqError(f"unknown rotation {kind!r}: one of {', '.join(KINDS)}")
        if kind == "hadamard" and base_order(dim) == 0:
            raise PytqError(f"no Hadamard rotation for head_dim {dim}: use rotation='random' or 'none'")
        self.kind, self.dim, self.seed = kind, dim, seed
        self.signs: Any = None
        self.matrix: Any = None
        self.transposed: Any = None
        if kind == "hadamard":
            self.signs = np.random.default_rng([seed, dim, 0]).choice(np.array([-1, 1], np.float32), dim)
        elif kind == "random":
            self.matrix = random_orthogonal(dim, seed)
            self.transposed = np.ascontiguousarray(self.matrix.T)

    def forward(self, x: F32) -> F32:
        """R x, float32 [N, n] -> [N, n]."""
        if self.kind == "hadamard":
            return hadamard_apply(x * self.signs)
        return matvec(x, self.transposed) if self.kind == "random" else x

    def inverse(self, y: F32) -> F32:
        """R^T y, float32 [N, n] -> [N, n]."""
        if self.kind == "hadamard":
            return hadamard_apply(y) * self.signs
        return matvec(y, self.matrix) if self.kind == "random" else y
