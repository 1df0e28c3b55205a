"""The interface of ``pytq.codec``: shapes, dtypes, errors, threads, round trips of hard vectors."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import pytq
import pytq.codec
from pytq.codec.api import GGML, PAPER
from pytq.errors import PytqError

from .codec_cases import PAPER_CASES, assert_backends_equal

# |x - x'| / |x| that no vector may exceed, by the coarsest case of each method (d = 64); prod and qjl are noisier than
# their mean, which is sqrt(D)
ROUND_TRIP = {"turboquant_mse": 1.0, "rabitq": 1.0, "polarquant": 0.5, "turboquant_prod": 3.0, "qjl": 3.0}


def ggml_codec(name, d, **options):
    try:
        return pytq.codec.codec(name, d, **options)
    except PytqError as error:
        if "build" in str(error):
            pytest.skip(str(error))
        raise


def test_callable_package():
    script = "import pytq; print(pytq.codec('qjl', head_dim=64).code_bytes)"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "10\n"
    assert pytq.codec("qjl", head_dim=64).name == "qjl"


@pytest.mark.parametrize(("name", "bits"), PAPER_CASES)
def test_shapes(name, bits):
    codec = pytq.codec(name, head_dim=64, bits=bits)
    x = np.random.default_rng(0).standard_normal((2, 3, 5, 64))
    codes = codec.encode(x)
    assert codes.shape == (2, 3, 5, codec.code_bytes) and codes.dtype == np.uint8
    y = codec.decode(codes)
    assert y.shape == x.shape and y.dtype == np.float32
    q = np.random.default_rng(1).standard_normal((2, 3, 7, 64)).astype(np.float16)
    s = codec.inner(q, codes)
    assert s.shape == (2, 3, 7, 5) and s.dtype == np.float32
    np.testing.assert_array_equal(s[1, 2], codec.inner(q[1, 2], codes[1, 2]))
    assert codec.bits_per_value == codec.code_bytes / 8
    for threads in (2, 3, 16):
        np.testing.assert_array_equal(codec.encode(x, threads=threads), codes)
        np.testing.assert_array_equal(codec.decode(codes, threads=threads), y)
        np.testing.assert_array_equal(codec.inner(q, codes, threads=threads), s)
    assert codec.encode(np.zeros((0, 64), np.float32)).shape == (0, codec.code_bytes)


@pytest.mark.parametrize("name", ("turboquant_mse", "rabitq", "polarquant"))
def test_inner_is_that_of_the_reconstruction(name):
    """Up to RaBitQ's factor 1 / cos^2, which makes it unbiased."""
    rng = np.random.default_rng(0)
    codec = pytq.codec(name, head_dim=128, bits=None if name == "polarquant" else 4)
    x, q = rng.standard_normal((20, 128)), rng.standard_normal((4, 128))
    codes = codec.encode(x)
    ratio = codec.inner(q, codes) / (q @ codec.decode(codes).T)
    if name == "rabitq":
        cos = codes[:, 2:4].copy().view(np.float16).astype(float)[:, 0]
        ratio = ratio * cos**2
    assert np.allclose(ratio, 1, atol=2e-3)


@st.composite
def vectors(draw):
    scale = draw(st.sampled_from([1.0, 1e-3, 1e-30, 1e-42, 1e30, 1e3]))
    kind = draw(st.sampled_from(["any", "one-hot", "zeros", "constant"]))
    x = np.zeros((3, 64))
    if kind == "any":
        x = draw(hnp.arrays(np.float64, (3, 64), elements=st.floats(-1, 1, width=32)))
    elif kind == "one-hot":
        x[:, draw(st.integers(0, 63))] = draw(st.sampled_from([-1.0, 1.0]))
    elif kind == "constant":
        x += draw(st.floats(-1, 1))
    return (x * scale).astype(np.float32)


@pytest.mark.parametrize("name", PAPER)
@settings(max_examples=25, deadline=None)
@given(data=st.data(), x=vectors())
def test_round_trip(name, data, x):
    bits = None if name in ("qjl", "polarquant") else data.draw(st.integers(1, 6), label="bits")
    codec, codes = assert_backends_equal(name, bits, 64, x, scalars="f32")
    y = codec.decode(codes).astype(float)
    norm = np.linalg.norm(x.astype(float), axis=1)
    error = np.linalg.norm(y - x, axis=1)
    # 64 denormal steps: below them the reconstruction itself cannot be represented
    assert (error <= ROUND_TRIP[name] * norm + 64 * 1.5e-45).all()
    np.testing.assert_array_equal(y[norm == 0], 0)


@pytest.mark.parametrize(("name", "bits"), PAPER_CASES)
def test_scale_is_exact(name, bits):
    """A power of two passes through: same codes up to the scalars, same reconstruction times it."""
    x = np.random.default_rng(0).standard_normal((10, 64)).astype(np.float32)
    codec = pytq.codec(name, head_dim=64, bits=bits, scalars="f32")
    a, b = codec.decode(codec.encode(x)), codec.decode(codec.encode(x * np.float32(2.0**90)))
    np.testing.assert_array_equal(a * np.float32(2.0**90), b)


@pytest.mark.parametrize(("name", "bits"), PAPER_CASES)
@pytest.mark.parametrize("backend", ("c", "numpy"))
def test_bad_vectors(name, bits, backend):
    codec = pytq.codec(name, head_dim=64, bits=bits, backend=backend)
    x = np.ones((4, 64), np.float32)
    for value in (np.nan, np.inf, -np.inf):
        bad = x.copy()
        bad[2, 5] = value
        with pytest.raises(PytqError, match="vector 2 of x"):
            codec.encode(bad)
        with pytest.raises(PytqError, match="vector 2 of q"):
            codec.inner(bad, codec.encode(x))
    with pytest.raises(PytqError, match="vector 0 of x"):
        codec.encode(np.full((1, 64), 1e39))
    for shape in ((4, 63), (64, 1), ()):
        with pytest.raises(PytqError, match="shape"):
            codec.encode(np.zeros(shape, np.float32))
    for dtype in (np.int32, bool, complex, object):
        with pytest.raises(PytqError, match="float16, float32 or float64"):
            codec.encode(np.ones((4, 64)).astype(dtype))
    big = x.copy()
    big[3] = 1e30
    with pytest.raises(PytqError, match="vector 3 does not fit"):
        codec.encode(big)
    if backend == "c":
        with pytest.raises(PytqError, match="vector 3 does not fit"):
            codec.encode(big, threads=4)
    codes = codec.encode(x)
    with pytest.raises(PytqError, match="uint8"):
        codec.decode(codes.astype(np.int8))
    with pytest.raises(PytqError, match="shape"):
        codec.decode(codes[:, :-1])
    with pytest.raises(PytqError, match="do not pair"):
        codec.inner(x[None], codes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "kv9"}, "unknown codec 'kv9': one of turboquant_mse"),
        ({"name": "rabitq"}, "bits must be"),
        ({"name": "rabitq", "bits": 9}, "bits must be"),
        ({"name": "rabitq", "bits": 2.5}, "bits must be"),
        ({"name": "rabitq", "bits": 2, "projections": 64}, "no projection"),
        ({"name": "rabitq", "bits": 2, "search": "lazy"}, "search must be"),
        ({"name": "qjl", "search": "fast"}, "search must be"),
        ({"name": "polarquant", "bits": 4}, "fixed rate"),
        ({"name": "q4_0", "bits": 4}, "fixed rate"),
        ({"name": "q4_0", "scalars": "f32"}, "fixed format"),
        ({"name": "qjl", "head_dim": 100}, "multiple of 16"),
        ({"name": "qjl", "head_dim": 0}, "head_dim must be"),
        ({"name": "qjl", "head_dim": 112}, "no Hadamard rotation"),
        ({"name": "q4_0", "head_dim": 80}, "multiple of 32"),
        ({"name": "kv4", "head_dim": 112}, "112"),
        ({"name": "qjl", "backend": "cuda"}, "unknown backend"),
        ({"name": "qjl", "rotation": "x"}, "unknown rotation"),
        ({"name": "qjl", "seed": -1}, "seed must be"),
        ({"name": "qjl", "scalars": "f8"}, "unknown type of scalars"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(PytqError, match=message):
        pytq.codec(**{"head_dim": 64, **arguments})


# relative squared error on Gaussian vectors, upper limits
BLOCK = {
    "turbo2": 0.124,
    "turbo3": 0.036,
    "turbo4": 0.0105,
    "kv2": 0.09,
    "kv3": 0.026,
    "kv4": 0.0075,
    "kv5": 0.0026,
}


@pytest.mark.parametrize("name", BLOCK)
@pytest.mark.parametrize("d", (64, 80, 96, 128, 192, 256))
def test_cache_types(name, d):
    codec = pytq.codec(name, head_dim=d)
    x = np.random.default_rng(0).standard_normal((100, d)).astype(np.float32)
    codes = codec.encode(x)
    assert ((codec.decode(codes) - x) ** 2).sum() < BLOCK[name] * (x**2).sum()
    q = np.random.default_rng(1).standard_normal((3, d)).astype(np.float32)
    assert np.allclose(codec.inner(q, codes), q @ codec.decode(codes).T, atol=1e-3)
    with pytest.raises(PytqError, match="too large"):
        codec.encode(x * np.float32(1e37))


@pytest.mark.parametrize("name", BLOCK)
def test_cache_types_in_numpy(name):
    c, n = (pytq.codec(name, head_dim=80, backend=b) for b in ("c", "numpy"))
    x = np.random.default_rng(0).standard_normal((20, 80)).astype(np.float32)
    codes = c.encode(x)
    np.testing.assert_array_equal(n.encode(x), codes)
    np.testing.assert_array_equal(n.decode(codes), c.decode(codes))


STOCK = {"q8_0": 1e-4, "q5_1": 0.002, "q4_0": 0.009, "iq4_nl": 0.0075, "mxfp4": 0.015, "nvfp4": 0.011}


@pytest.mark.slow
@pytest.mark.parametrize("name", STOCK)
def test_stock_types(name):
    codec = ggml_codec(name, 128)
    values, size = GGML[name]
    assert codec.bits_per_value == 8 * size / values
    x = np.random.default_rng(0).standard_normal((500, 128)).astype(np.float32)
    error = ((codec.decode(codec.encode(x)) - x) ** 2).sum() / (x**2).sum()
    assert STOCK[name] / 5 < error < STOCK[name]


@pytest.mark.parametrize("name", ("q4_0", "q5_1", "q8_0"))
def test_stock_types_in_numpy(name):
    codec = pytq.codec(name, head_dim=64, backend="numpy")
    x = np.random.default_rng(0).standard_normal((50, 64)).astype(np.float32)
    assert ((codec.decode(codec.encode(x)) - x) ** 2).sum() < STOCK[name] * (x**2).sum()
    with pytest.raises(PytqError, match="cannot encode iq4_nl"):
        pytq.codec("iq4_nl", head_dim=64, backend="numpy").encode(x)
