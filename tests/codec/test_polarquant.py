"""PolarQuant: rate, distortion of each level, C against NumPy."""

import numpy as np
import pytest
from scipy import integrate

import pytq.codec
from pytq.codec.lloydmax import table

from .codec_cases import HEAD_DIMS, assert_backends_equal, gaussian_distortion, hard_vectors


def test_rate_of_the_paper():
    codec = pytq.codec.codec("polarquant", 128)
    assert codec.bits_per_value == 3.875 == (8 * 4 + 4 * 2 + 2 * 2 + 2 + 16) / 16
    # 35 two-bit angles at 80 do not fill their last byte
    assert pytq.codec.codec("polarquant", 80).code_bytes == 10 + 20 + 9


def test_distortion_matches_the_angles():
    """|x - x'|^2 follows from the angle errors alone: 1 - E prod cos(error) over the four levels, doubled."""
    keep = np.sin(np.pi / 16) / (np.pi / 16)  # mean cosine in a bin of width pi / 8
    for level in (2, 3, 4):
        psi = np.arctan2(table(f"polar_sin_{level}").astype(float), table(f"polar_cos_{level}"))
        edges = np.concatenate([[0], np.arctan(table(f"polar_tan_{level}").astype(float)), [np.pi / 2]])
        power = 2 ** (level - 1) - 1
        total = integrate.quad(lambda t, p=power: np.sin(2 * t) ** p, 0, np.pi / 2)[0]
        keep *= sum(
            integrate.quad(lambda t, c=c, p=power: np.cos(t - c) * np.sin(2 * t) ** p, a, b)[0] / total
            for c, a, b in zip(psi, edges[:-1], edges[1:], strict=True)
        )
    assert gaussian_distortion("polarquant", None) == pytest.approx(2 * (1 - keep), rel=0.01)


@pytest.mark.parametrize("d", (16, *HEAD_DIMS))
def test_c_equals_numpy(d):
    for rotation in ("hadamard", "random", "none"):
        assert_backends_equal("polarquant", None, d, hard_vectors(d), rotation=rotation)
    assert_backends_equal("polarquant", None, d, hard_vectors(d) * np.float32(1e30), scalars="f32")


def test_quadrants():
    """Level 1 covers the full circle: sixteen directions come back within half a bin."""
    angle = (np.arange(64) + 0.5) * (2 * np.pi / 64)
    x = np.zeros((64, 16), np.float32)
    x[:, 0], x[:, 1] = np.cos(angle), np.sin(angle)
    codec = pytq.codec.codec("polarquant", 16, rotation="none")
    y = codec.decode(codec.encode(x))
    turn = np.angle((y[:, 0] + 1j * y[:, 1]) / (x[:, 0] + 1j * x[:, 1]))
    assert np.abs(turn).max() <= np.pi / 16 + 1e-6
