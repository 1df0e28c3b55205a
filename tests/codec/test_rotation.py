"""Rotations: Hadamard orders, symmetry, C against NumPy."""

import numpy as np
import pytest

from pytq import ffi
from pytq.codec.rotation import Rotation, base_order, gaussian, hadamard, hadamard_apply, paley
from pytq.errors import PytqError

ORDERS = [1, 2, 4, 8, 12, 16, 20, 24, 40, 48, 64, 80, 96, 128, 192, 256, 320, 1536]
UNSUPPORTED = [0, -8, 3, 5, 6, 10, 28, 36, 52, 200]
F32_EPS = 2.0**-23


def c_hadamard(n):
    out = np.zeros((max(n, 1), max(n, 1)), np.float32)
    return ffi.lib().pytq_hadamard(ffi.ffi().cast("float *", out.ctypes.data), n), out


@pytest.mark.parametrize("n", ORDERS)
def test_symmetric_and_orthonormal(n):
    h = hadamard(n)
    assert h.dtype == np.float32 and np.array_equal(h, h.T)
    assert len(np.unique(np.abs(h))) == 1
    assert np.abs(h.astype(float) @ h - np.eye(n)).max() < 2 * F32_EPS


@pytest.mark.parametrize("n", ORDERS)
def test_c_matrix_and_transform_equal_numpy(n):
    status, c = c_hadamard(n)
    assert status == 0 and np.array_equal(c, hadamard(n))
    x = np.random.default_rng(n).standard_normal(n).astype(np.float32)
    y = x.copy()
    assert ffi.lib().pytq_hadamard_apply(ffi.ffi().cast("float *", y.ctypes.data), n) == 0
    assert np.array_equal(y, hadamard_apply(x))
    assert np.allclose(y, hadamard(n).astype(float) @ x, atol=1e-5)


@pytest.mark.parametrize("n", UNSUPPORTED)
def test_unsupported_orders(n):
    assert base_order(n) == 0 and ffi.lib().pytq_hadamard_base(n) == 0
    assert c_hadamard(n)[0] == -1
    with pytest.raises(PytqError, match="no Hadamard matrix"):
        hadamard(n)


@pytest.mark.parametrize("order", (12, 20))
def test_paley(order):
    h = paley(order).astype(int)
    assert np.array_equal(h @ h.T, order * np.eye(order, dtype=int)) and np.array_equal(h, h.T)


@pytest.mark.parametrize("kind", ("none", "hadamard", "random"))
@pytest.mark.parametrize("dim", (64, 80, 96, 128, 192, 256))
def test_rotation_inverts_and_keeps_norms(kind, dim):
    r = Rotation(kind, dim, seed=3)
    x = np.random.default_rng(0).standard_normal((5, dim)).astype(np.float32)
    y = r.forward(x)
    assert np.allclose(r.inverse(y), x, atol=1e-5)
    assert np.allclose(np.linalg.norm(y, axis=1), np.linalg.norm(x, axis=1), rtol=1e-5)
    if kind != "none":
        assert not np.allclose(y, Rotation(kind, dim, seed=4).forward(x), atol=0.1)


def test_rejects():
    with pytest.raises(PytqError, match="unknown rotation"):
        Rotation("givens", 64, 0)
    with pytest.raises(PytqError, match="no Hadamard rotation for head_dim 112"):
        Rotation("hadamard", 112, 0)


def test_projection_is_standard_normal():
    s = gaussian(256, 128, 0)
    assert (
        s.dtype == np.float32
        and abs(s.mean()) < 5 / np.sqrt(s.size)
        and abs(s.var() - 1) < 5 * np.sqrt(2 / s.size)
    )
