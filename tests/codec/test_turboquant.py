"""TurboQuant mse and prod: distortion, bias, C against NumPy."""

import numpy as np
import pytest
from scipy import stats

import pytq.codec
from pytq.codec.turboquant import quantize

from .codec_cases import assert_backends_equal, gaussian_distortion, hard_vectors, inner_errors

# design 4.1, the limits for N(0,1) coordinates
MSE = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497, 5: 0.0025}
WITHIN = 0.01
# On the sphere of d = 128 the coordinates have lighter tails than N(0,1): excess kurtosis -6 / (d + 2).
SPHERE_128 = 0.025


@pytest.mark.parametrize("bits", MSE)
def test_quantiser_meets_the_table(bits):
    z = np.random.default_rng(0).standard_normal((16000, 128)).astype(np.float32)
    _, level = quantize(z, bits)
    assert float(((z - level) ** 2).mean()) == pytest.approx(MSE[bits], rel=WITHIN)


@pytest.mark.parametrize("bits", MSE)
@pytest.mark.parametrize("rotation", ("hadamard", "random"))
def test_mse_codec_distortion(bits, rotation):
    got = gaussian_distortion("turboquant_mse", bits, rotation=rotation, n=8000)
    assert MSE[bits] * (1 - SPHERE_128) < got < MSE[bits] * (1 + WITHIN)


@pytest.mark.parametrize("bits", MSE)
def test_mse_codec_in_high_dimension(bits):
    assert gaussian_distortion("turboquant_mse", bits, d=2048, n=600) == pytest.approx(MSE[bits], rel=WITHIN)


@pytest.mark.parametrize("bits", range(1, 6))
def test_prod_inner_product_error(bits):
    """d * E error^2 = pi / 2 * D(bits - 1) for unit q and x: 1.571, .571, .185, .054, .0149 (theorem 2 of the paper)."""
    d, seeds = 256, 30
    rng = np.random.default_rng(2)
    x, q = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in rng.standard_normal((2, 200, d)))
    x, q = x.astype(np.float32), q.astype(np.float32)
    total = 0.0
    for seed in range(seeds):
        codec = pytq.codec.codec("turboquant_prod", d, bits, seed=seed, scalars="f32")
        total += float(((codec.inner(q, codec.encode(x)) - q.astype(float) @ x.T) ** 2).mean()) / seeds
    # the -(q.r)^2 term of the variance takes 1 / d off, the sphere takes its share off D
    limit = np.pi / 2 * {0: 1.0, **MSE}[bits - 1]
    assert limit * 0.97 < d * total < limit * 1.02


@pytest.mark.parametrize("bits", (1, 2, 4))
def test_prod_is_unbiased_and_mse_is_not(bits):
    errors, true = inner_errors("turboquant_prod", bits, rotation="random")
    slope = (errors * true).sum(axis=(1, 2)) / (true**2).sum()
    assert stats.ttest_1samp(slope, 0).pvalue > 1e-3
    errors, true = inner_errors("turboquant_mse", bits, rotation="random")
    slope = (errors * true).sum(axis=(1, 2)) / (true**2).sum()
    assert stats.ttest_1samp(slope, 0).pvalue < 1e-6 and slope.mean() < 0


@pytest.mark.parametrize("name", ("turboquant_mse", "turboquant_prod"))
@pytest.mark.parametrize("bits", range(1, 9))
def test_c_equals_numpy(name, bits):
    for d in (64, 80, 128):
        assert_backends_equal(name, bits, d, hard_vectors(d))
    assert_backends_equal(name, bits, 96, hard_vectors(96), rotation="random", scalars="f32")


def test_one_bit_prod_is_qjl():
    x = hard_vectors(128)
    a, b = pytq.codec.codec("turboquant_prod", 128, 1), pytq.codec.codec("qjl", 128)
    np.testing.assert_array_equal(a.encode(x), b.encode(x))


def test_bytes():
    assert pytq.codec.codec("turboquant_mse", 128, 3).bits_per_value == 3.125
    assert pytq.codec.codec("turboquant_prod", 128, 3).bits_per_value == 3.25
    assert pytq.codec.codec("turboquant_mse", 128, 3, scalars="f32").bits_per_value == 3.25
