"""Encoder and decoder kernels, executed under the shim through the real dispatching code, against the C reference.

Equality means every byte of a block and every bit of a value: the shim's floats are IEEE, the kernels' operations and
their order are the reference's. What Apple's compiler makes of them is not tested here.
"""

from __future__ import annotations

from pathlib import Path

import metal_shim as shim
import numpy as np
import pytest
from metal_device import F16, F32, I32, I64, ROWS, Device, Tensor

from pytq.codec.table import TypeRow, find_type

TYPES = sorted(ROWS.values(), key=lambda row: row.id)


@pytest.fixture(scope="module")
def dev(harness: Path) -> Device:
    return Device(harness)


def awkward(d: int) -> np.ndarray:
    """Vectors [n, d] that reach every branch of the encoder."""
    rng = np.random.default_rng(d)
    normal = rng.standard_normal((24, d)).astype(np.float32)
    rows = [normal[:6] * np.float32(10.0) ** np.arange(-3, 3, dtype=np.float32)[:, None]]
    rows.append(np.zeros((1, d), np.float32))
    for value in (np.nan, np.inf, -np.inf):
        row = normal[:1].copy()
        row[0, d // 2] = value
        rows.append(row)
    one = np.zeros((2, d), np.float32)
    one[0, 0], one[1, d - 1] = 3.0, -2.0
    rows.append(one)
    rows.append(np.ones((1, d), np.float32))  # ties
    rows.append(np.tile(np.float32([1, -1]), d // 2)[None])
    half = normal[6:7].copy()
    half[0, d // 2 :] = 0  # groups of zeros
    rows.append(half)
    tail = normal[7:8].copy()
    tail[0, : d // 2] *= 1e-6
    rows.append(tail)
    # squares that overflow or vanish; scales past both ends of the stored scale
    with np.errstate(over="ignore"):
        rows.append(
            normal[8:18] * np.float32([1e38, 1e30, 1e15, 1e5, 7e4, 1e-5, 1e-13, 1e-20, 1e-30, 1e-38])[:, None]
        )
    rows.append(normal[18:20] * np.float32(1e-42))  # subnormal
    rows.append(np.sort(normal[20:21], axis=1))
    rows.append(normal[21:24].round(0))
    return np.concatenate(rows)


@pytest.mark.parametrize("row", TYPES, ids=lambda row: row.name)
def test_set_rows_writes_the_references_bytes(dev: Device, row: TypeRow) -> None:
    x = awkward(row.head_dim)
    n = len(x)
    target = np.random.default_rng(1).permutation(n + 5)[:n].astype(np.int64)
    out = np.full((n + 5, row.block_bytes), 0xA5, np.uint8)
    kernels = dev.run(
        "SET_ROWS",
        Tensor(row.id, (row.head_dim, n + 5), out),
        [Tensor(F32, (row.head_dim, n), x), Tensor(I64, (n,), target)],
    )
    assert kernels == ["kernel_pytq_encode"]
    np.testing.assert_array_equal(out[target], dev.encode_ref(row, x))
    untouched = np.setdiff1d(np.arange(n + 5), target)
    assert (out[untouched] == 0xA5).all()


@pytest.mark.parametrize("row", TYPES, ids=lambda row: row.name)
def test_get_rows_gives_the_references_values(dev: Device, row: TypeRow) -> None:
    """All byte values in planes and scales, not only those that an encoder writes."""
    rng = np.random.default_rng(row.id)
    blocks = rng.integers(0, 256, (9, row.block_bytes), np.uint8)
    if row.scale == "FP16":
        blocks[:, 1] &= 0x7B  # positive and finite
    else:
        blocks[0, 0] = 0
    rows = rng.integers(0, 9, 13).astype(np.int32)
    out = np.full((13, row.head_dim), np.nan, np.float32)
    kernels = dev.run(
        "GET_ROWS",
        Tensor(F32, (row.head_dim, 13), out),
        [Tensor(row.id, (row.head_dim, 9), blocks), Tensor(I32, (13,), rows)],
    )
    assert kernels == ["kernel_pytq_values_f32"]
    np.testing.assert_array_equal(out, dev.decode_ref(row, blocks)[rows])


@pytest.mark.parametrize("order", shim.ORDERS)
@pytest.mark.parametrize("name", ["turbo3", "kv3", "kv3s"])
def test_cache_rows_of_several_heads(harness: Path, name: str, order: str) -> None:
    """A layer's cache write: all heads of a token in one row, 32-bit row numbers, streams in dimension 2."""
    dev = Device(harness, order=order)
    row = find_type(name, 128)
    heads, tokens, streams, length = 3, 7, 2, 11
    x = np.random.default_rng(2).standard_normal((streams, tokens, heads * 128)).astype(np.float32)
    target = np.stack([np.random.default_rng(s).permutation(length)[:tokens] for s in range(streams)]).astype(
        np.int32
    )
    out = np.zeros((streams, length, heads * row.block_bytes), np.uint8)
    dev.run(
        "SET_ROWS",
        Tensor(row.id, (heads * 128, length, streams), out),
        [Tensor(F32, (heads * 128, tokens, streams), x), Tensor(I32, (tokens, streams), target)],
    )
    expected = dev.encode_ref(row, x).reshape(streams, tokens, -1)
    for s in range(streams):
        np.testing.assert_array_equal(out[s, target[s]], expected[s])


def test_row_numbers_are_shared_by_streams(dev: Device) -> None:
    row = find_type("kv4", 64)
    x = np.random.default_rng(3).standard_normal((4, 3, 64)).astype(np.float32)
    out = np.zeros((4, 5, row.block_bytes), np.uint8)
    target = np.array([[4, 0, 2], [1, 2, 3]], np.int64)  # of the even and the odd streams
    dev.run(
        "SET_ROWS", Tensor(row.id, (64, 5, 4), out), [Tensor(F32, (64, 3, 4), x), Tensor(I64, (3, 2), target)]
    )
    expected = dev.encode_ref(row, x).reshape(4, 3, -1)
    for s in range(4):
        np.testing.assert_array_equal(out[s, target[s % 2]], expected[s])


def test_source_rows_with_strides(dev: Device) -> None:
    row = find_type("kv3", 80)
    memory = np.random.default_rng(4).standard_normal((6, 80 + 20)).astype(np.float32)
    out = np.zeros((6, row.block_bytes), np.uint8)
    source = Tensor(F32, (80, 6), memory, (4, 400, 2400, 2400))
    dev.run("SET_ROWS", Tensor(row.id, (80, 6), out), [source, Tensor(I64, (6,), np.arange(6))])
    np.testing.assert_array_equal(out, dev.encode_ref(row, memory[:, :80]))


@pytest.mark.parametrize("name", ["turbo2", "kv2s", "kv5"])
def test_copies(dev: Device, name: str) -> None:
    """f32 to blocks and back, f16, bytes; a context shift does the first two on [d, n_head, n_tokens] views."""
    row = find_type(name, 96)
    x = np.random.default_rng(5).standard_normal((4, 3, 96)).astype(np.float32)
    blocks = np.zeros((4, 5, row.block_bytes), np.uint8)  # room for five heads
    view = Tensor(
        row.id,
        (96, 3, 4),
        blocks,
        (row.block_bytes, row.block_bytes, 5 * row.block_bytes, 20 * row.block_bytes),
    )
    assert dev.run("CPY", view, [Tensor(F32, (96, 3, 4), x), view]) == ["kernel_pytq_encode"]
    reference = dev.encode_ref(row, x).reshape(4, 3, -1)
    np.testing.assert_array_equal(blocks[:, :3], reference)
    assert not blocks[:, 3:].any()
    values = dev.decode_ref(row, reference).reshape(4, 3, 96)
    for type_id, kind, kernel in (
        (F32, np.float32, "kernel_pytq_values_f32"),
        (F16, np.float16, "kernel_pytq_values_f16"),
    ):
        out = np.zeros((4, 3, 96), kind)
        target = Tensor(type_id, (96, 3, 4), out)
        assert dev.run("CPY", target, [view, target]) == [kernel]
        np.testing.assert_array_equal(out, values.astype(kind))
    for op in ("CPY", "DUP", "CONT"):
        copy = np.zeros(20 * row.block_bytes + 7, np.uint8)
        target = Tensor(row.id, (96, 5, 4), copy)
        assert dev.run(op, target, [Tensor(row.id, (96, 5, 4), blocks), target]) == ["kernel_pytq_copy"]
        np.testing.assert_array_equal(copy[:-7], blocks.ravel())
        assert not copy[-7:].any()


def test_get_rows_of_views(dev: Device) -> None:
    row = find_type("kv4s", 64)
    blocks = dev.encode_ref(row, np.random.default_rng(6).standard_normal((12, 64))).reshape(2, 6, -1)
    rows = np.array([[5, 0, 3], [1, 1, 2]], np.int32)
    out = np.zeros((2, 3, 64), np.float32)
    dev.run(
        "GET_ROWS",
        Tensor(F32, (64, 3, 2), out),
        [Tensor(row.id, (64, 6, 2), blocks), Tensor(I32, (3, 2), rows)],
    )
    values = dev.decode_ref(row, blocks).reshape(2, 6, 64)
    np.testing.assert_array_equal(out, np.stack([values[s][rows[s]] for s in range(2)]))


def test_a_pipeline_that_allows_few_threads(harness: Path) -> None:
    row = find_type("kv3", 128)
    x = np.random.default_rng(7).standard_normal((5, 128)).astype(np.float32)
    for threads in (32, 64):
        out = np.zeros((5, row.block_bytes), np.uint8)
        sources: list[Tensor | None] = [Tensor(F32, (128, 5), x), Tensor(I64, (5,), np.arange(5))]
        Device(harness, max_threads=threads).run("SET_ROWS", Tensor(row.id, (128, 5), out), sources)
        np.testing.assert_array_equal(out, Device(harness).encode_ref(row, x))
