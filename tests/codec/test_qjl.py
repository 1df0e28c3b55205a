"""QJL: unbiased estimator, its variance, C against NumPy."""

import numpy as np
import pytest
from scipy import stats

import pytq.codec
from pytq.errors import PytqError

from .codec_cases import HEAD_DIMS, assert_backends_equal, hard_vectors, inner_errors


@pytest.mark.parametrize("rotation", ("none", "hadamard"))
def test_unbiased_with_the_published_variance(rotation):
    """Lemma 3.2 and 3.5 of QJL: E = <q, x>, variance (pi / 2 - <q, x>^2) / m for unit vectors."""
    errors, true = inner_errors("qjl", None, rotation=rotation)
    slope = (errors * true).sum(axis=(1, 2)) / (true**2).sum()
    assert stats.ttest_1samp(slope, 0).pvalue > 1e-3
    assert float((errors**2).mean()) == pytest.approx(float((np.pi / 2 - true**2).mean()) / 128, rel=0.03)


def test_more_projections_less_error():
    few, _ = inner_errors("qjl", None, projections=64, seeds=10)
    many, _ = inner_errors("qjl", None, projections=512, seeds=10)
    assert (many**2).mean() == pytest.approx((few**2).mean() / 8, rel=0.1)


@pytest.mark.parametrize("d", HEAD_DIMS)
def test_c_equals_numpy(d):
    assert_backends_equal("qjl", None, d, hard_vectors(d))
    assert_backends_equal("qjl", None, d, hard_vectors(d), projections=32, scalars="f32", rotation="random")


def test_bytes_and_bad_projections():
    assert pytq.codec.codec("qjl", 128).bits_per_value == 1.125
    for m in (0, 8, 40, 8192, 16.0):
        with pytest.raises(PytqError, match="projections"):
            pytq.codec.codec("qjl", 128, projections=m)
