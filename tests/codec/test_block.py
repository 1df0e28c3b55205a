"""Cache-type blocks: NumPy equals C to the bit, rates and distortions are the theory's, and odd inputs survive."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytq.codec import block, table, trellis
from pytq.errors import PytqError
from pytq.ffi import ffi as get_ffi
from pytq.ffi import lib as get_lib

TYPES = table.load_types()
IDS = [t.name for t in TYPES]
RELATIVE_1_PERCENT = 0.01

# design figures for the unit Gaussian: Lloyd-Max and the 64-state trellis, by bits
LLOYD_MAX = {2: 0.1175, 3: 0.03454, 4: 0.009497, 5: 0.0025}
TRELLIS64 = {2: 0.0831, 3: 0.0231, 4: 0.0063, 5: 0.00165}  # 5: as trained; design has no figure


def c_encode(row: table.TypeRow, x: np.ndarray, fast: bool = False) -> np.ndarray:
    ffi, lib = get_ffi(), get_lib()
    x = np.ascontiguousarray(x, np.float32)
    out = np.full((x.shape[0], row.block_bytes), 0xAA, np.uint8)
    fn = lib.pytq_quantize if fast else lib.pytq_quantize_ref
    fn(
        lib.pytq_type_get(row.id),
        ffi.cast("float *", x.ctypes.data),
        ffi.cast("void *", out.ctypes.data),
        x.size,
    )
    return out


def c_decode(row: table.TypeRow, blocks: np.ndarray, fast: bool = False) -> np.ndarray:
    ffi, lib = get_ffi(), get_lib()
    out = np.full((blocks.shape[0], row.head_dim), np.nan, np.float32)
    fn = lib.pytq_dequantize if fast else lib.pytq_dequantize_ref
    fn(
        lib.pytq_type_get(row.id),
        ffi.cast("void *", blocks.ctypes.data),
        ffi.cast("float *", out.ctypes.data),
        out.size,
    )
    return out


def awkward(rng: np.random.Generator, d: int) -> np.ndarray:
    """Gaussian rows and every row shape that has broken a quantiser."""
    g = rng.standard_normal((24, d)).astype(np.float32)
    rows = [g, g[:3] * np.float32(1e-30), g[:3] * np.float32(1e30), g[:2] * np.float32(1e-4)]
    one = np.zeros((3, d), np.float32)
    one[0, 0], one[1, d - 1], one[2, d // 2] = 1, -3e4, 1e-45
    const = np.full((2, d), np.float32(-7.25))
    const[1] = np.float32(1.4e-45)
    spiky = g[:2].copy()
    spiky[:, 3] = 1e3
    half = g[:2].copy()
    half[:, : d // 4] = 0
    return np.concatenate([*rows, one, const, spiky, half, np.zeros((1, d), np.float32)])


def test_table_agrees_with_c() -> None:
    ffi, lib = get_ffi(), get_lib()
    for i, row in enumerate(TYPES):
        c = lib.pytq_type_at(i)
        assert (c.id, ffi.string(c.name).decode(), c.block_bytes) == (row.id, row.name, row.block_bytes)
        assert [c.plane_off[p] for p in range(row.n_planes)] == [
            row.plane_offset(p) for p in range(row.n_planes)
        ]
        assert row.block_bytes == row.scale_bytes + sum(n * b for n, b in row.groups) // 8, "no padding"
    assert lib.pytq_type_at(len(TYPES)) == ffi.NULL
    for name, id_ in table.families().items():
        assert lib.pytq_type_from_name(name.encode()) == id_
        for d in table.HEAD_DIMS:
            if name in table.profile_flags():
                assert lib.pytq_type_resolve(id_, d, 0) == -1
                continue
            assert lib.pytq_type_resolve(id_, d, 0) == table.find_type(name, d).id
    assert lib.pytq_type_resolve(table.families()["turbo3"], 112, 0) == -1


@pytest.mark.parametrize("row", TYPES, ids=IDS)
def test_numpy_equals_c(row: table.TypeRow) -> None:
    x = awkward(np.random.default_rng(row.id), row.head_dim)
    ours = block.encode(row, x)
    for fast in (False, True):
        np.testing.assert_array_equal(c_encode(row, x, fast), ours)
        np.testing.assert_array_equal(c_decode(row, ours, fast), block.decode(row, ours))
    assert np.isfinite(block.decode(row, ours)).all()


@pytest.mark.parametrize(
    "row", [t for t in TYPES if t.head_dim in (128, 256) and len(t.groups) == 1], ids=lambda t: t.name
)
def test_distortion(row: table.TypeRow) -> None:
    """Uniform layouts meet the table for the unit Gaussian; trellis codes are strictly better than Lloyd-Max."""
    rng = np.random.default_rng(7)
    x = rng.standard_normal((4000, row.head_dim)).astype(np.float32)
    y = c_decode(row, c_encode(row, x))
    mse = float(((x - y) ** 2).mean())
    bits = row.groups[0][1]
    if row.code == "SCALAR":
        # the stored norm restores the input's norm: error 2 - 2 sqrt(1 - D) instead of D, and less for a finite vector
        corrected = 2 - 2 * np.sqrt(1 - LLOYD_MAX[bits])
        assert corrected * (1 - 4 * RELATIVE_1_PERCENT) < mse < corrected * (1 + RELATIVE_1_PERCENT)
    else:
        assert mse < TRELLIS64[bits] * (1 + 3 * RELATIVE_1_PERCENT)
        assert mse < 0.75 * LLOYD_MAX[bits], "a trellis whose states constrain nothing equals Lloyd-Max"


def test_split_beats_uniform_where_theory_says_so() -> None:
    """Group variances 16 : 1 : 1/4 (geometric mean 1 over quarters, quarter, half): more bits go where they matter."""
    rng = np.random.default_rng(11)
    sd = np.repeat([4.0, 1.0, 0.5], [32, 32, 64])
    x = (rng.standard_normal((3000, 128)) * sd).astype(np.float32)

    def err(family: str, v: np.ndarray) -> float:
        row = table.find_type(family, 128)
        return float(((v - c_decode(row, c_encode(row, v))) ** 2).mean())

    mixed = x[:, rng.permutation(128)] @ np.linalg.qr(rng.standard_normal((128, 128)))[0].astype(np.float32)
    assert err("kv3s", x) < 0.55 * err("kv3", mixed.astype(np.float32))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([t for t in TYPES if t.head_dim in (64, 80)]),
    st.integers(0, 2**32 - 1),
    st.floats(-12, 12),
)
def test_round_trip(row: table.TypeRow, seed: int, log_scale: float) -> None:
    """Any scale inside the stored scale's range comes back with the same relative error; both languages agree."""
    x = (np.random.default_rng(seed).standard_normal((2, row.head_dim)) * 2.0**log_scale).astype(np.float32)
    blocks = block.encode(row, x)
    np.testing.assert_array_equal(c_encode(row, x), blocks)
    y = block.decode(row, blocks)
    assert np.linalg.norm(x - y) < 0.62 * np.linalg.norm(x)


@pytest.mark.parametrize("family", ["turbo3", "kv3", "kv3s"])
def test_non_finite_is_stored_as_zero(family: str) -> None:
    row = table.find_type(family, 64)
    x = np.ones((3, 64), np.float32)
    x[0, 5], x[1, 6] = np.nan, np.inf
    y = block.decode(row, block.encode(row, x))
    assert (y[:2] == 0).all() and (y[2] != 0).all()
    np.testing.assert_array_equal(c_encode(row, x), block.encode(row, x))


def test_wrong_shapes() -> None:
    row = table.find_type("kv3", 128)
    with pytest.raises(PytqError, match="128 values"):
        block.encode(row, np.zeros((2, 64)))
    with pytest.raises(PytqError, match="49 bytes"):
        block.unpack(row, np.zeros((2, 50), np.uint8))
    with pytest.raises(PytqError, match="supported: 64, 80"):
        table.find_type("kv3", 112)
    with pytest.raises(PytqError, match="turbo2, turbo3"):
        table.cache_type_id("turbo9")


def test_codebooks_satisfy_lloyd_max() -> None:
    """Scalar levels are the centroids of their cells, found here by integration instead of the generator's formula."""
    t = np.linspace(-9, 9, 2_000_001)
    pdf = np.exp(-t * t / 2)
    for bits in range(1, 6):
        book = table.load_codebook("SCALAR", bits)
        x = book.levels.astype(float) * float(book.step)
        cell = np.searchsorted((x[1:] + x[:-1]) / 2, t)
        mean = np.bincount(cell, pdf * t) / np.bincount(cell, pdf)
        # int8 rounding moves a level by at most half a step
        assert np.abs(mean - x).max() < 1.5 * float(book.step), bits
        mse = float((pdf * (t - x[cell]) ** 2).sum() / pdf.sum())
        assert mse < {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497, 5: 0.0025}[bits] * 1.01, bits
    assert (
        abs(
            float(table.load_codebook("SCALAR", 4).levels.max())
            * float(table.load_codebook("SCALAR", 4).step)
            - 2.7326
        )
        < 0.02
    )


def test_subsets_by_shifts_equal_the_window() -> None:
    u = np.random.default_rng(3).integers(0, 2, (4, 100)).astype(np.uint8)
    window, want = np.zeros(4, np.int64), np.empty((4, 100), np.int64)
    for i in range(100):
        window = (window << 1 | u[:, i]) & (2 * trellis.STATES - 1)
        want[:, i] = trellis.subset_of(window)
    np.testing.assert_array_equal(trellis.subsets(u), want)
    np.testing.assert_array_equal(trellis.coded_bits(want), u)
