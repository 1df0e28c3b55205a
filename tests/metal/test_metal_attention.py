"""Attention kernels, executed under the shim through the real dispatching code, against NumPy in f64.

The decode kernel works in f32 throughout. The prefill kernel rounds queries, keys and values to half precision, as an f16
cache would; logits, weights and sums are f32.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import metal_device as device
import metal_shim as shim
import numpy as np
import pytest
from metal_device import F16, F32, Q8_0, ROWS, Device, Tensor

from pytq.codec.table import find_type

# squared error relative to the output's: rounding of f32 sums; halves have 11 bits, so 2^-22 and a little
VEC_NMSE = 1e-10
MM_NMSE = 1e-6
DIMS = (64, 80, 96, 128, 192, 256)
FAMILIES = sorted({row.family for row in ROWS.values()})


@dataclasses.dataclass
class Case:
    """One FLASH_ATTN_EXT node. Types are family names, ``f16`` or ``q8_0``."""

    k: str
    v: str
    dk: int = 64
    dv: int = 0
    n_q: int = 1
    n_kv: int = 37
    n_head_kv: int = 2
    gqa: int = 1
    n_seq: int = 1
    n_seq_kv: int = 0
    mask: str = "none"  # none, causal, random, heads, all
    sinks: bool = False
    softcap: float = 0.0
    max_bias: float = 0.0
    amplitude: float = 1.0
    seed: int = 0


def operand(
    dev: Device, name: str, d: int, case: Case, rng: np.random.Generator
) -> tuple[Tensor, np.ndarray]:
    """A cache tensor [d, n_kv, n_head_kv, n_seq] as the KV cache lays it out, and its values [seq, head, token, d]."""
    n_seq = case.n_seq_kv or case.n_seq
    x = rng.standard_normal((n_seq, case.n_kv, case.n_head_kv, d)).astype(np.float32) * np.float32(
        case.amplitude
    )
    x[..., : d // 4] *= 3  # split types give the first coordinates more bits
    if name == "f16":
        type_id, blocks = F16, x.astype(np.float16).view(np.uint8).reshape(-1, 2 * d)
        values = x.astype(np.float16).astype(np.float64)
    elif name == "q8_0":
        groups = x.reshape(-1, 32)
        scale = (np.abs(groups).max(axis=1, keepdims=True) / 127).astype(np.float16)
        q = np.rint(groups / scale.astype(np.float32)).clip(-127, 127).astype(np.int8)
        type_id, blocks = (
            Q8_0,
            np.concatenate([scale.view(np.uint8), q.view(np.uint8)], axis=1).reshape(-1, d // 32 * 34),
        )
        values = (scale.astype(np.float64) * q).reshape(x.shape)
    else:
        row = find_type(name, d)
        type_id, blocks = row.id, dev.encode_ref(row, x)
        values = dev.decode_ref(row, blocks).astype(np.float64).reshape(x.shape)
    size = blocks.shape[1]
    # a block more per token than there are heads: strides are not what a packed tensor would have
    memory = np.full((n_seq, case.n_kv, case.n_head_kv + 1, size), 0xFF, np.uint8)
    memory[:, :, : case.n_head_kv] = blocks.reshape(n_seq, case.n_kv, case.n_head_kv, size)
    token = size * (case.n_head_kv + 1)
    tensor = Tensor(
        type_id,
        (d, case.n_kv, case.n_head_kv, n_seq),
        memory,
        (device.block(type_id)[1], token, size, token * case.n_kv),
    )
    return tensor, values.transpose(0, 2, 1, 3)


def mask_of(case: Case, rng: np.random.Generator) -> np.ndarray | None:
    """Mask [seq or 1, head or 1, padded queries, n_kv] in f16."""
    n_head = case.n_head_kv * case.gqa
    heads = n_head if case.mask == "heads" else 1
    m = np.zeros((case.n_seq if case.mask == "random" else 1, heads, case.n_q + 3, case.n_kv), np.float16)
    if case.mask == "none":
        return None
    if case.mask == "all":
        m[:] = -np.inf
    if case.mask == "causal":
        token, query = np.arange(case.n_kv), np.arange(case.n_q + 3)
        m[..., token[None, :] > query[:, None] + max(0, case.n_kv - case.n_q)] = -np.inf
    if case.mask in ("random", "heads"):
        m += rng.standard_normal(m.shape).astype(np.float16)
        m[rng.random(m.shape) < 0.3] = -np.inf
        if case.n_kv > 100:
            m[..., 32:70] = -np.inf  # a whole tile unseen
    return m


def expected(
    case: Case,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    mask: np.ndarray | None,
    sinks: np.ndarray | None,
    scale: float,
) -> np.ndarray:
    """Output [seq, query, head, dv]."""
    n_head = case.n_head_kv * case.gqa
    ratio = case.n_seq // (case.n_seq_kv or case.n_seq)
    k, v = (np.repeat(np.repeat(x, case.gqa, axis=1), ratio, axis=0) for x in (k, v))
    logit = np.einsum("sqhd,shtd->shqt", q.astype(np.float64), k) * scale
    if case.softcap:
        logit = case.softcap * np.tanh(logit / case.softcap)
    if mask is not None:
        slope = np.ones(n_head)
        if case.max_bias:
            log2 = 2 ** int(np.floor(np.log2(n_head)))
            m0, m1 = 2 ** (-case.max_bias / log2), 2 ** (-case.max_bias / 2 / log2)
            slope = np.array(
                [m0 ** (h + 1) if h < log2 else m1 ** (2 * (h - log2) + 1) for h in range(n_head)]
            )
        logit = logit + mask[:, :, : case.n_q].astype(np.float64) * slope[None, :, None, None]
    top = logit.max(axis=-1, keepdims=True)
    if sinks is not None:
        top = np.maximum(top, sinks[None, :, None, None])
    top = np.where(np.isfinite(top), top, 0)
    weight = np.exp(logit - top)
    total = weight.sum(axis=-1, keepdims=True)
    if sinks is not None:
        total = total + np.exp(sinks[None, :, None, None] - top)
    weight = np.divide(weight, total, out=np.zeros_like(weight), where=total > 0)
    return np.einsum("shqt,shtd->sqhd", weight, v)


def run(dev: Device, case: Case) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Output of the kernels, of NumPy, and the kernels' names."""
    rng = np.random.default_rng(case.seed)
    dv, n_head = case.dv or case.dk, case.n_head_kv * case.gqa
    q = rng.standard_normal((case.n_seq, case.n_q, n_head, case.dk)).astype(np.float32) * np.float32(
        case.amplitude
    )
    row = 4 * case.dk * n_head
    qt = Tensor(F32, (case.dk, case.n_q, n_head, case.n_seq), q, (4, row, 4 * case.dk, row * case.n_q))
    kt, k = operand(dev, case.k, case.dk, case, rng)
    vt, v = operand(dev, case.v, dv, case, rng)
    mask = mask_of(case, rng)
    mt = None
    if mask is not None:
        mt = Tensor(F16, (case.n_kv, mask.shape[2], mask.shape[1], mask.shape[0]), mask)
    sinks = rng.standard_normal(n_head).astype(np.float32) if case.sinks else None
    st = Tensor(F32, (n_head,), sinks) if sinks is not None else None
    scale = case.dk**-0.5 / case.amplitude**2

    shape = (dv, n_head, case.n_q, case.n_seq)
    params = (scale, case.max_bias, case.softcap)
    sources = [qt, kt, vt, mt, st]
    kind, size = dev.supports("FLASH_ATTN_EXT", Tensor(F32, shape, np.zeros(1, np.float32)), sources, params)
    assert kind == "supported"
    guard = 64
    assert size % 4 == 0 and size >= 4 * np.prod(shape)
    out = np.full(size // 4 + guard, np.nan, np.float32)
    kernels = dev.run("FLASH_ATTN_EXT", Tensor(F32, shape, out), sources, params)
    assert np.isnan(out[size // 4 :]).all()
    result = out[: np.prod(shape)].reshape(case.n_seq, case.n_q, n_head, dv)
    return result, expected(case, q, k, v, mask, sinks, scale), kernels


def error(result: np.ndarray, reference: np.ndarray) -> float:
    assert np.isfinite(result).all()
    return float(np.sum((result - reference) ** 2) / np.sum(reference**2))


def check(dev: Device, case: Case) -> list[str]:
    result, reference, kernels = run(dev, case)
    bound = MM_NMSE if "_mm_" in kernels[0] else VEC_NMSE
    assert error(result, reference) < bound, (case, kernels)
    return kernels


@pytest.fixture(scope="module")
def dev(harness: Path) -> Device:
    return Device(harness)


@pytest.mark.parametrize("d", DIMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_type_and_head_dim(dev: Device, family: str, d: int) -> None:
    """Decode and prefill kernel, odd lengths, grouped queries, a mask."""
    seed = 1000 * FAMILIES.index(family) + d
    vec = check(dev, Case(family, family, d, n_q=1, n_kv=71, gqa=3, mask="causal", seed=seed))
    assert vec == [f"kernel_pytq_attn_vec_dk{d}_dv{d}_r4"]
    mm = check(dev, Case(family, family, d, n_q=19, n_kv=45, gqa=2, n_head_kv=1, mask="causal", seed=seed))
    assert mm == [f"kernel_pytq_attn_mm_dk{d}_dv{d}"]


@pytest.mark.parametrize("pair", [(k, v) for k in FAMILIES for v in FAMILIES if k != v])
def test_every_pair_of_types(dev: Device, pair: tuple[str, str]) -> None:
    check(dev, Case(*pair, 64, n_q=1, n_kv=33, n_head_kv=1, gqa=2, seed=len(pair[0])))


@pytest.mark.parametrize("other", ["f16", "q8_0"])
@pytest.mark.parametrize("n_q", [1, 20])
@pytest.mark.parametrize("d", [64, 128])
def test_a_compressed_and_a_stock_operand(dev: Device, other: str, n_q: int, d: int) -> None:
    check(dev, Case("kv4s", other, d, n_q=n_q, n_kv=50, gqa=2, mask="causal"))
    check(dev, Case(other, "turbo3", d, n_q=n_q, n_kv=50, gqa=2, mask="causal"))


@pytest.mark.parametrize("gqa", [1, 2, 3, 4, 5, 7, 8, 12, 16])
def test_grouped_queries(dev: Device, gqa: int) -> None:
    rows = next((r for r in (1, 2, 4, 8) if r >= gqa), 8)
    assert check(dev, Case("kv3", "kv2", 128, gqa=gqa, n_kv=65, mask="causal")) == [
        f"kernel_pytq_attn_vec_dk128_dv128_r{rows}"
    ]
    check(dev, Case("kv3", "kv2", 64, n_q=33, gqa=gqa, n_head_kv=1, n_kv=40, mask="causal"))


@pytest.mark.parametrize("n_kv", [1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 129])
@pytest.mark.parametrize("d", [80, 256])
def test_lengths(dev: Device, d: int, n_kv: int) -> None:
    check(dev, Case("kv3s", "turbo4", d, n_kv=n_kv, gqa=2, n_head_kv=1))
    check(dev, Case("kv3s", "turbo4", d, n_q=17, n_kv=n_kv, n_head_kv=1))


@pytest.mark.parametrize("n_q", [2, 5, 8, 16, 17, 31, 32, 33, 65])
def test_numbers_of_queries(dev: Device, n_q: int) -> None:
    kernels = check(dev, Case("kv4", "kv3", 96, n_q=n_q, n_kv=70, n_head_kv=1, mask="causal"))
    assert ("_mm_" in kernels[0]) == (n_q > 16)


@pytest.mark.parametrize("n_q", [1, 24])
@pytest.mark.parametrize(
    "options",
    [
        {"mask": "random"},
        {"mask": "heads"},
        {"sinks": True},
        {"sinks": True, "mask": "random"},
        {"softcap": 5.0},
        {"softcap": 20.0, "mask": "causal", "sinks": True},
        {"max_bias": 8.0, "mask": "random"},
        {"max_bias": 8.0, "mask": "heads", "softcap": 10.0, "sinks": True},
        {"n_seq": 3, "mask": "random"},
        {"n_seq": 4, "n_seq_kv": 2},
    ],
    ids=str,
)
def test_options(dev: Device, n_q: int, options: dict) -> None:
    check(dev, Case("kv4", "kv3", 128, n_q=n_q, n_kv=131, gqa=3, n_head_kv=2, seed=7, **options))


@pytest.mark.parametrize("n_q", [1, 24])
@pytest.mark.parametrize("sinks", [False, True])
def test_rows_that_see_nothing_are_zero(dev: Device, n_q: int, sinks: bool) -> None:
    result, _, _ = run(dev, Case("kv4", "kv4", 64, n_q=n_q, n_kv=40, gqa=2, mask="all", sinks=sinks))
    assert not result.any()


@pytest.mark.parametrize(("n_q", "n_kv", "d"), [(1, 1031, 64), (1, 2050, 256), (20, 1031, 128)])
@pytest.mark.parametrize("sinks", [False, True])
def test_long_caches_are_split_and_joined(dev: Device, n_q: int, n_kv: int, d: int, sinks: bool) -> None:
    case = Case("kv3", "kv3", d, n_q=n_q, n_kv=n_kv, gqa=2, n_head_kv=1, mask="causal", sinks=sinks)
    kernels = check(dev, case)
    assert kernels[1:] == [f"kernel_pytq_attn_reduce_dv{d}"]


def test_keys_and_values_of_different_size(dev: Device) -> None:
    for n_q in (1, 20):
        kernels = check(dev, Case("kv4", "kv3", 192, 128, n_q=n_q, n_kv=45, gqa=2, mask="causal"))
        assert "_dk192_dv128" in kernels[0]


@pytest.mark.parametrize("amplitude", [1e-3, 100.0])
@pytest.mark.parametrize("n_q", [1, 20])
def test_magnitudes(dev: Device, n_q: int, amplitude: float) -> None:
    """Transformed queries and keys may be large or small; the scale brings the logits back."""
    check(dev, Case("kv5", "f16", 64, n_q=n_q, n_kv=40, mask="causal", amplitude=amplitude))


@pytest.mark.parametrize("n_q", [3, 24])
@pytest.mark.parametrize("d", [80, 192])
def test_the_order_of_threads_does_not_matter(harness: Path, n_q: int, d: int) -> None:
    """A missing barrier would show as a result that depends on which thread runs first."""
    case = Case("kv3s", "kv2", d, n_q=n_q, n_kv=300, gqa=2, n_head_kv=1, mask="random", sinks=True)
    results = [run(Device(harness, order=order), case)[0] for order in shim.ORDERS]
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


def test_few_threads_and_no_matrices(harness: Path) -> None:
    """A pipeline may allow fewer threads than asked for, and an old GPU has no matrices: the decode kernel takes over."""
    case = Case("kv4", "kv4", 64, n_q=20, n_kv=70, gqa=2, mask="causal")
    for dev in (Device(harness, max_threads=64), Device(harness, has_mm=False)):
        assert check(dev, case) == ["kernel_pytq_attn_vec_dk64_dv64_r8"]
    assert "too few registers" in dev.dll.harness_log().decode()
