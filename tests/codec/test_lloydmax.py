"""Codebooks: the checked-in tables against independent solutions, never against themselves."""

from pathlib import Path

import numpy as np
import pytest
from scipy import integrate, stats

from pytq.codec import lloydmax

ROOT = Path(__file__).resolve().parents[2]
# Max 1960, table I, whose .002499 at 5 bits is .2 % low; Lloyd's iteration gives .002505
GAUSSIAN_DISTORTION = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497, 5: 0.002505}
FLOAT32_ULP = 2.0**-23


def test_tables_are_fresh():
    py, c = lloydmax.render()
    assert (ROOT / "pytq/codec/_tables.py").read_text() == py, "run python -m pytq.codec.lloydmax"
    assert (ROOT / "csrc/codecs/tables.inc").read_text() == c, "run python -m pytq.codec.lloydmax"


@pytest.mark.parametrize("bits", range(1, 9))
def test_levels_are_centroids(bits):
    """Lloyd's conditions by adaptive quadrature: every level is the mean of its cell, edges lie halfway."""
    levels = lloydmax.table(f"lloyd_max_{bits}").astype(float)
    edges = np.concatenate([[-12.0], (levels[1:] + levels[:-1]) / 2, [12.0]])
    for level, a, b in zip(levels, edges[:-1], edges[1:], strict=True):
        moment = integrate.quad(
            lambda t, c=level: (t - c) * stats.norm.pdf(t), a, b, epsabs=1e-12, epsrel=1e-9
        )[0]
        assert abs(moment) / (stats.norm.cdf(b) - stats.norm.cdf(a)) < 4 * FLOAT32_ULP * 4
    assert np.array_equal(lloydmax.table(f"lloyd_max_thr_{bits}"), edges[1:-1].astype(np.float32))


def test_outer_level_of_four_bits():
    """2.7326 for N(0,1), 0.2415 for N(0, 1/128); a fork shipped another table for months."""
    outer = float(lloydmax.table("lloyd_max_4")[-1])
    assert outer == pytest.approx(2.7326, abs=5e-5)
    assert outer / np.sqrt(128) == pytest.approx(0.2415, abs=5e-5)


@pytest.mark.parametrize("bits", GAUSSIAN_DISTORTION)
def test_distortion_by_quadrature(bits):
    levels = lloydmax.table(f"lloyd_max_{bits}").astype(float)
    edges = np.concatenate([[-12.0], (levels[1:] + levels[:-1]) / 2, [12.0]])
    error = sum(
        integrate.quad(lambda t, c=c: (t - c) ** 2 * stats.norm.pdf(t), a, b)[0]
        for c, a, b in zip(levels, edges[:-1], edges[1:], strict=True)
    )
    assert error == pytest.approx(GAUSSIAN_DISTORTION[bits], rel=1e-3)


@pytest.mark.parametrize("bits", range(1, 9))
def test_uniform_step_is_a_minimum(bits):
    step = float(lloydmax.table("uniform_step")[bits])
    k = np.arange(2 ** (bits - 1))

    def error(s):
        edges = np.append(k * s, 12.0)
        return sum(
            integrate.quad(lambda t, c=c: (t - c) ** 2 * stats.norm.pdf(t), a, b)[0]
            for c, a, b in zip((k + 0.5) * s, edges[:-1], edges[1:], strict=True)
        )

    assert error(step) < min(error(step * 0.99), error(step * 1.01))


@pytest.mark.parametrize("level", (2, 3, 4))
def test_polar_angles_are_centroids(level):
    cos, sin = (lloydmax.table(f"polar_{f}_{level}").astype(float) for f in ("cos", "sin"))
    slopes = lloydmax.table(f"polar_tan_{level}").astype(float)
    psi = np.arctan2(sin, cos)
    edges = np.concatenate([[0], np.arctan(slopes), [np.pi / 2]])
    power = 2 ** (level - 1) - 1
    for centre, a, b in zip(psi, edges[:-1], edges[1:], strict=True):
        mass = integrate.quad(lambda t: np.sin(2 * t) ** power, a, b)[0]
        mean = integrate.quad(lambda t: t * np.sin(2 * t) ** power, a, b)[0] / mass
        assert centre == pytest.approx(mean, abs=1e-6)
    assert np.allclose(edges[1:-1], (psi[1:] + psi[:-1]) / 2, atol=1e-6)


def test_polar_angle_density():
    """The density assumed for level l is that of radii of Gaussian groups (PolarQuant, lemma 2)."""
    rng = np.random.default_rng(0)
    for level in (2, 3, 4):
        half = 2 ** (level - 1)
        x = rng.standard_normal((20000, 2, half))
        a, b = np.linalg.norm(x, axis=2).T
        power = half - 1
        grid = np.linspace(0, np.pi / 2, 2001)
        cdf = integrate.cumulative_trapezoid(np.sin(2 * grid) ** power, grid, initial=0)
        p = stats.kstest(np.arctan2(b, a), lambda t, g=grid, c=cdf: np.interp(t, g, c / c[-1])).pvalue
        assert p > 1e-4


def test_solver_rejects():
    for bits in (0, 9):
        with pytest.raises(ValueError):
            lloydmax.solve_gaussian(bits)
        with pytest.raises(ValueError):
            lloydmax.solve_uniform(bits)
