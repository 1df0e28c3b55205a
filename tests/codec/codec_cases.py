"""Vectors and helpers that the codec tests share."""

import numpy as np

import pytq.codec

HEAD_DIMS = (64, 80, 96, 128, 192, 256)
PAPER_CASES = [
    *(("turboquant_mse", b) for b in range(1, 9)),
    *(("turboquant_prod", b) for b in range(1, 9)),
    *(("rabitq", b) for b in range(1, 9)),
    ("qjl", None),
    ("polarquant", None),
]


def hard_vectors(d, seed=0):
    """Gaussian vectors among which zeros, one-hot, constant, tied, tiny, denormal and large ones, float32 [40, d]."""
    x = np.random.default_rng(seed).standard_normal((40, d)).astype(np.float32)
    x[0] = 0
    x[1] = 0
    x[1, d // 3] = -2
    x[2] = 1
    x[3] = np.round(x[3])
    x[4] *= 1e-30
    x[5] *= 1e-42
    x[6] = 0
    x[6, -1] = 1e-45
    x[7] *= 100
    x[8, 0] = 1000
    x[9] = -0.0
    return x


def assert_backends_equal(name, bits, d, x, **options):
    """Bytes, reconstructions and inner products of C and NumPy, compared bit for bit; returns the C codec and codes."""
    c = pytq.codec.codec(name, d, bits, **options)
    n = pytq.codec.codec(name, d, bits, backend="numpy", **options)
    codes = c.encode(x)
    assert codes.dtype == np.uint8 and codes.shape == (*x.shape[:-1], c.code_bytes)
    np.testing.assert_array_equal(codes, n.encode(x))
    a, b = c.decode(codes), n.decode(codes)
    np.testing.assert_array_equal(a.view(np.uint32) & 0x7FFFFFFF, b.view(np.uint32) & 0x7FFFFFFF)
    np.testing.assert_array_equal(a, b)
    q = np.random.default_rng(1).standard_normal((3, d)).astype(np.float32)
    np.testing.assert_array_equal(c.inner(q, codes), n.inner(q, codes))
    return c, codes


def gaussian_distortion(name, bits, d=128, n=20000, seed=0, **options):
    """sum |x - x'|^2 / sum |x|^2 on Gaussian vectors."""
    x = np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)
    codec = pytq.codec.codec(name, d, bits, seed=seed, **options)
    return float(((codec.decode(codec.encode(x)) - x) ** 2).sum() / (x**2).sum())


def inner_errors(name, bits, d=128, n=60, nq=60, seeds=40, **options):
    """Errors of <q, x> for unit q and x, float64 [seeds, nq, n], and the true products [nq, n]; a rotation per seed."""
    rng = np.random.default_rng(5)
    x, q = (
        v / np.linalg.norm(v, axis=1, keepdims=True) for v in (rng.standard_normal((k, d)) for k in (n, nq))
    )
    # correlated pairs: a shrinking estimator is unbiased on orthogonal ones
    q[:n] = 0.6 * x[:nq] + 0.8 * q[:n]
    q /= np.linalg.norm(q, axis=1, keepdims=True)
    x, q = x.astype(np.float32), q.astype(np.float32)
    true = q.astype(float) @ x.T
    errors = []
    for seed in range(seeds):
        codec = pytq.codec.codec(name, d, bits, seed=seed, scalars="f32", **options)
        errors.append(codec.inner(q, codec.encode(x)) - true)
    return np.array(errors), true
