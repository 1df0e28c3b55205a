"""The shim itself: known kernels of upstream, read from the unpacked source, and what it has to refuse."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from pathlib import Path

import metal_shim as shim
import metal_translate as translate
import numpy as np
import pytest

FWHT = {128: ("kernel_fwht_f32_128", 64), 512: ("kernel_fwht_f32_512", 256)}
VEC = "kernel_flash_attn_ext_vec_q8_0_dk64_dv64"
# f32 butterflies of depth 9 on unit values; f16 K, V and Q of upstream's kernel
FWHT_ERROR = 2e-6
VEC_NMSE = 1e-6


def upstream_kernels(upstream: Path, name: str, keep: set[str]) -> str:
    metal = upstream / "ggml" / "src" / "ggml-metal"
    text = shim.flatten(metal / "kernels" / name, [metal, metal / "kernels", metal.parent])
    return translate.translate(text, keep)


@pytest.fixture(scope="module")
def library(upstream: Path, objects: Path) -> shim.Library:
    fwht = upstream_kernels(upstream, "misc.metal", {name for name, _ in FWHT.values()})
    vec = upstream_kernels(upstream, "fa_vec_q8_0.metal", {VEC})
    return shim.Library(shim.compile_library(objects, {"fwht": (fwht, ["-w"]), "vec": (vec, ["-w"])}))


@pytest.mark.parametrize("order", shim.ORDERS)
@pytest.mark.parametrize("n", FWHT)
def test_upstream_fwht(library: shim.Library, n: int, order: str) -> None:
    name, threads = FWHT[n]
    rows = 5
    x = np.random.default_rng(n).standard_normal((rows, n)).astype(np.float32)
    y = np.zeros_like(x)
    arguments = np.frombuffer(struct.pack("<i", rows), dtype=np.uint8).copy()
    # two rows a threadgroup at 128: the last one is half empty
    library.run(name, [arguments, x, y], (3 if n == 128 else rows, 1, 1), (threads, 1, 1), order=order)
    hadamard = np.ones((1, 1))
    while len(hadamard) < n:
        hadamard = np.kron(np.array([[1, 1], [1, -1]]), hadamard)
    assert np.abs(y - x @ hadamard / np.sqrt(n)).max() < FWHT_ERROR


def q8_0(x: np.ndarray) -> np.ndarray:
    """Blocks of 32: a half scale and 32 int8."""
    groups = x.reshape(-1, 32)
    scale = (np.abs(groups).max(axis=1) / 127).astype(np.float16)
    values = np.rint(groups / scale.astype(np.float32)[:, None]).clip(-127, 127).astype(np.int8)
    return np.concatenate([scale[:, None].view(np.uint8), values.view(np.uint8)], axis=1)


def q8_0_values(blocks: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    return (scale * blocks[:, 2:].view(np.int8)).reshape(shape)


# With two SIMD groups the kernel's final reduction reads and writes its sums without a barrier between (lanes in true
# lock-step read before lane 0 writes): only an order in which lane 0 comes last reproduces that.
@pytest.mark.parametrize(("n_sg", "order"), [*((1, order) for order in shim.ORDERS), (2, "reverse")])
def test_upstream_vector_attention(library: shim.Library, n_sg: int, order: str) -> None:
    d, n_kv, n_head = 64, 96, 2
    rng = np.random.default_rng(3)
    q = rng.standard_normal((n_head, 1, d)).astype(np.float32)
    k, v = (q8_0(rng.standard_normal((n_head, n_kv, d)).astype(np.float32)) for _ in range(2))
    mask = np.zeros((1, n_kv), np.float16)
    mask[0, 70:] = -np.inf
    sinks = rng.standard_normal(n_head).astype(np.float32)
    out = np.zeros((n_head, d), np.float32)
    row = d // 32 * 34
    scale = d**-0.5
    arguments = struct.pack(
        "<3i4x3Q 3ii3Q i4x3Q 3i4x3Q3i4f2i",
        *(1, n_head, 1, 4 * d, 4 * d, 4 * d * n_head),
        *(n_kv, n_head, 1, row // 34, row, row * n_kv, row * n_kv * n_head),
        *(row // 34, row, row * n_kv, row * n_kv * n_head),
        *(1, 1, 1, 2 * n_kv, 2 * n_kv, 2 * n_kv),
        *(n_head, 1, 1, scale, 0.0, 0.0, 0.0, 0, 0),
    ) + bytes(16)
    # FC_FLASH_ATTN_EXT_VEC: mask, sinks, bias, soft-cap, padding, sparse, then strides, SIMD groups, threadgroups
    for number, value in {
        0: 1,
        1: 1,
        2: 0,
        3: 0,
        4: 0,
        5: 0,
        20: row // 34,
        21: row // 34,
        22: n_sg,
        23: 1,
    }.items():
        library.constant(400 + number, value)
    pad = np.zeros(1, np.uint8)
    library.run(
        VEC,
        [np.frombuffer(arguments, np.uint8).copy(), q, k, v, mask, sinks, pad, out, pad],
        (1, n_head, 1),
        (32, n_sg, 1),
        [2 * n_sg * (128 + 4 * 32 + 2 * 128)],
        order,
    )
    kf, vf = (q8_0_values(x, (n_head, n_kv, d)) for x in (k, v))
    logit = scale * np.einsum("hid,htd->hit", q, kf)[:, 0] + mask.astype(np.float32)
    e = np.exp(np.concatenate([logit, sinks[:, None]], axis=1))
    expected = np.einsum("ht,htd->hd", e[:, :-1] / e.sum(axis=1, keepdims=True), vf)
    assert np.sum((out - expected) ** 2) < VEC_NMSE * np.sum(expected**2)


# ------------------------------------------------------------------------------------------- what it has to notice

FAULTY = """
#include <metal_stdlib>
using namespace metal;
kernel void divergent_barrier(device float * x, ushort i [[thread_index_in_simdgroup]]) {
    if (i < 16) {
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    x[i] = 1.0f;
}
kernel void divergent_shuffle(device float * x, ushort i [[thread_index_in_simdgroup]]) {
    x[i] = 0.0f;
    if (i & 1) {
        x[i] = simd_sum(x[i]);
    } else {
        x[i] = simd_sum(x[i] + 1.0f);
    }
}
kernel void missing_barrier(device float * x, threadgroup float * s [[threadgroup(0)]],
                            ushort i [[thread_index_in_threadgroup]]) {
    s[i] = (float) i;
    x[i] = s[(i + 1) % 64];
}
kernel void with_barrier(device float * x, threadgroup float * s [[threadgroup(0)]],
                         ushort i [[thread_index_in_threadgroup]]) {
    s[i] = (float) i;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    x[i] = s[(i + 1) % 64];
}
kernel void matrices(device float * x, device half * a, device half * b) {
    simdgroup_half8x8 ma, mb;
    simdgroup_float8x8 mc = make_filled_simdgroup_matrix<float, 8, 8>(1.0f);
    simdgroup_load(ma, a, 8);
    simdgroup_load(mb, b, 8, 0, true);
    simdgroup_multiply_accumulate(mc, ma, mb, mc);
    simdgroup_store(mc, x, 8);
}
"""


@pytest.fixture(scope="module")
def faulty(objects: Path) -> Path:
    return shim.compile_library(objects, {"faulty": (translate.translate(FAULTY), ["-w"])})


@pytest.mark.parametrize("name", ["divergent_barrier", "divergent_shuffle"])
def test_divergence_aborts(faulty: Path, name: str) -> None:
    code = (
        f"import sys; sys.path.insert(0, {os.fspath(Path(__file__).parent)!r})\n"
        "import numpy, metal_shim as shim, pathlib\n"
        f"shim.Library(pathlib.Path({os.fspath(faulty)!r})).run({name!r}, [numpy.zeros(32, 'f4')], (1, 1, 1), (32, 1, 1))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode < 0
    assert "metal shim: divergence: thread 0 waits in " in done.stderr


def test_the_order_of_threads_shows_a_missing_barrier(faulty: Path) -> None:
    library = shim.Library(faulty)
    results = {}
    for name in ("missing_barrier", "with_barrier"):
        for order in shim.ORDERS:
            x = np.zeros(64, np.float32)
            library.run(name, [x], (1, 1, 1), (64, 1, 1), [256], order)
            results[name, order] = x
    expected = (np.arange(64) + 1) % 64
    for order in shim.ORDERS:
        np.testing.assert_array_equal(results["with_barrier", order], expected)
    assert not np.array_equal(
        results["missing_barrier", "forward"], results["missing_barrier", "reverse"], equal_nan=True
    )


def test_matrices(faulty: Path) -> None:
    rng = np.random.default_rng(5)
    a, b = (rng.standard_normal((8, 8)).astype(np.float16) for _ in range(2))
    x = np.zeros((8, 8), np.float32)
    shim.Library(faulty).run("matrices", [x, a, b], (1, 1, 1), (32, 1, 1))
    np.testing.assert_allclose(x, 1 + a.astype(np.float32) @ b.astype(np.float32).T, rtol=1e-5, atol=1e-5)


def test_unknown_kernels_and_constants(faulty: Path) -> None:
    library = shim.Library(faulty)
    with pytest.raises(KeyError):
        library.run("none", [], (1, 1, 1), (32, 1, 1))
    with pytest.raises(KeyError):
        library.constant(12345, 1)


@pytest.mark.parametrize(
    "parameter",
    [
        "device float * x [[buffer(3)]]",
        "uint i [[thread_execution_width]]",
        "threadgroup float s [[threadgroup(0)]]",
    ],
)
def test_unknown_source_is_refused(parameter: str) -> None:
    with pytest.raises(translate.TranslationError):
        translate.translate(f"kernel void k({parameter}) {{ }}")
