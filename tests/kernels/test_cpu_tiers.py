"""CPU tiers through the extension: selection, encoders on arbitrary input, attention against NumPy."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytq.ffi import ffi, lib

TIERS = ["scalar", "avx2", "avx512", "neon"]
# 15-bit weights and queries: relative error of the output about 2^-15 times a small factor
MAX_RELATIVE_ERROR = 4e-4


def caps_of(tier: str) -> int:
    c = lib()
    return {
        "scalar": 0,
        "avx2": c.PYTQ_CAP_AVX2,
        "avx512": c.PYTQ_CAP_AVX2 | c.PYTQ_CAP_AVX512,
        "neon": c.PYTQ_CAP_NEON,
    }[tier]


@pytest.fixture(params=TIERS)
def tier(request: pytest.FixtureRequest):
    caps = caps_of(request.param)
    if caps & ~lib().pytq_cpu_caps():
        pytest.skip(f"this CPU has no {request.param}")
    lib().pytq_force_caps(caps)
    assert ffi().string(lib().pytq_cpu_tier()).decode() == request.param
    yield request.param
    lib().pytq_force_caps(0xFFFFFFFF)


def type_named(name: str):
    t = lib().pytq_type_get(lib().pytq_type_from_name(name.encode()))
    assert t != ffi().NULL
    return t


def floats(a: np.ndarray):
    return ffi().cast("float *", a.ctypes.data)


def encode(t, x: np.ndarray, reference: bool = False) -> np.ndarray:
    out = np.zeros((x.size // t.head_dim, t.block_bytes), np.uint8)
    f = lib().pytq_quantize_ref if reference else lib().pytq_quantize
    f(t, floats(x), ffi().cast("void *", out.ctypes.data), x.size)
    return out


def decode(t, blocks: np.ndarray) -> np.ndarray:
    out = np.empty((len(blocks), t.head_dim), np.float32)
    lib().pytq_dequantize_ref(t, ffi().cast("void *", blocks.ctypes.data), floats(out), out.size)
    return out


@pytest.mark.parametrize(
    "name", ["kv3_d128", "kv4_d64", "kv2s_d96", "kv3s_d80", "turbo3_d192", "turbo4_d256"]
)
def test_encoder_on_any_floats(tier: str, name: str) -> None:
    """Subnormal, huge, infinite and not-a-number coordinates included: the same bytes as the reference."""
    t = type_named(name)

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.floats(width=32), min_size=16, max_size=16), st.integers(0, 2**32 - 1))
    def same(head: list[float], seed: int) -> None:
        rng = np.random.default_rng(seed)
        x = rng.standard_normal(t.head_dim).astype(np.float32)
        x[rng.integers(0, t.head_dim, 16)] = np.array(head, np.float32)
        np.testing.assert_array_equal(encode(t, x), encode(t, x, reference=True))

    same()


@pytest.mark.parametrize(
    "k_name,v_name", [("kv3_d128", "kv3_d128"), ("kv4s_d128", "turbo3_d128"), ("turbo4_d128", "kv2_d128")]
)
def test_attention_against_numpy(tier: str, k_name: str, v_name: str) -> None:
    """Grouped queries, causal mask, encoded (not random) blocks, an attention sink token with a large logit."""
    rng = np.random.default_rng(7)
    n_q, n_kv, heads, kv_heads, d = 5, 201, 8, 2, 128
    tk, tv = type_named(k_name), type_named(v_name)
    k = rng.standard_normal((n_kv, kv_heads, d)).astype(np.float32)
    v = rng.standard_normal((n_kv, kv_heads, d)).astype(np.float32)
    q = rng.standard_normal((n_q, heads, d)).astype(np.float32)
    k[0] *= 4.0
    v[0] *= 0.05
    kb, vb = encode(tk, k, reference=True), encode(tv, v, reference=True)
    kf, vf = decode(tk, kb).reshape(k.shape), decode(tv, vb).reshape(v.shape)
    mask = np.where(np.arange(n_kv)[None, :] > np.arange(n_q)[:, None] + n_kv - n_q, -np.inf, 0).astype(
        np.float16
    )
    out = np.zeros((n_q, heads, d), np.float32)
    a = ffi().new("pytq_attn *")
    a.n_q, a.n_kv, a.n_head, a.n_head_kv, a.n_stream, a.n_stream_kv, a.dk, a.dv = (
        n_q,
        n_kv,
        heads,
        kv_heads,
        1,
        1,
        d,
        d,
    )
    a.q = floats(q)
    a.q_nb_token, a.q_nb_head = q.strides[:2]
    for part, t, blocks in ((a.k, tk, kb), (a.v, tv, vb)):
        part.data, part.type = ffi().cast("void *", blocks.ctypes.data), t.id
        part.nb_token, part.nb_head = t.block_bytes * kv_heads, t.block_bytes
    a.mask = ffi().cast("uint16_t *", mask.ctypes.data)
    a.mask_nb_token, a.mask_n_head, a.mask_n_stream = mask.strides[0], 1, 1
    a.dst, a.scale = floats(out), d**-0.5
    for split in (1, 2, 7):
        out[:] = np.nan
        assert lib().pytq_attn_run(a, split) == 0
        group = heads // kv_heads
        logits = np.einsum(
            "qhd,khd->hqk", q.astype(np.float64), np.repeat(kf, group, 1)
        ) * a.scale + mask.astype(np.float64)
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        want = np.einsum("hqk,khd->qhd", p, np.repeat(vf, group, 1).astype(np.float64))
        assert np.linalg.norm(out - want) / np.linalg.norm(want) < MAX_RELATIVE_ERROR


def test_what_is_not_taken_is_refused() -> None:
    a = ffi().new("pytq_attn *")
    a.n_q = a.n_kv = a.n_head = a.n_head_kv = a.n_stream = a.n_stream_kv = 1
    a.dk = a.dv = 64
    a.k.type = a.v.type = -1
    assert not lib().pytq_attn_supported(a)
    a.k.type = a.v.type = type_named("kv3_d128").id
    assert not lib().pytq_attn_supported(a)
    assert lib().pytq_attn_run(a, 1) == -1


@pytest.mark.parametrize(("value", "warns"), [("scalar", False), ("sse9", True)])
def test_environment_variable(value: str, warns: bool) -> None:
    code = "from pytq.ffi import ffi, lib; print(ffi().string(lib().pytq_cpu_tier()).decode())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTQ_CPU_CAPS": value},
    )
    assert done.returncode == 0
    assert ("sse9" in done.stderr) == warns
    if not warns:
        assert done.stdout.strip() == "scalar"
