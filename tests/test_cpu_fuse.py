"""Rotations and cache writes that the CPU backend computes together give the bits of the nodes computed one by one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pytq.bench.shapes import Shape, write_model
from pytq.paths import BuildDir
from tests.shape_models import vocab_file

pytestmark = pytest.mark.slow

LAYERS = 2
BATCHES = 7  # that tests.matrix_worker decodes
# Nodes of one layer that are left out: the rotations of keys, queries, values and the result, and the second write.
PAIRS = {"kv4/kv4": 5, "turbo4/kv3": 5, "kv3/f16": 2, "f16/turbo3": 2}
# no Hadamard rotation that the fused steps take; the two writes still share one
WITHOUT_ROTATION = {"kv4/kv4": 1, "turbo4/kv3": 1, "kv3/f16": 0, "f16/turbo3": 0}


def run(
    model: Path, pairs: dict[str, int], observer: str = "none", threads: int = 2, **environment: str
) -> dict[str, dict]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuse_worker", str(model), observer, str(threads), *pairs],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "are not kept" not in done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("tier", ["", "scalar", "avx2"])
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
def test_same_bits_with_and_without_fusion(
    head_dim: int, tier: str, tmp_path: Path, patched: BuildDir
) -> None:
    model = tmp_path / "m.gguf"
    write_model(
        Shape(LAYERS, 256, 4, 2, head_dim, 256, ctx=512), "fuse", vocab_file(tmp_path / "v.gguf"), model
    )
    pairs = WITHOUT_ROTATION if head_dim == 80 else PAIRS
    fused = run(model, pairs, PYTQ_CPU_FUSE="", PYTQ_CPU_CAPS=tier)
    apart = run(model, pairs, PYTQ_CPU_FUSE="0", PYTQ_CPU_CAPS=tier)
    for pair, per_layer in pairs.items():
        assert fused[pair]["logits"] == apart[pair]["logits"], pair
        assert fused[pair]["left_out"] == per_layer * LAYERS * BATCHES, pair
        assert apart[pair]["left_out"] == 0, pair


@pytest.mark.parametrize("threads", [1, 3])
def test_any_number_of_threads(threads: int, tmp_path: Path, patched: BuildDir) -> None:
    model = tmp_path / "m.gguf"
    write_model(Shape(LAYERS, 256, 6, 2, 64, 256, ctx=512), "fuse", vocab_file(tmp_path / "v.gguf"), model)
    fused = run(model, PAIRS, threads=threads)
    apart = run(model, PAIRS, threads=threads, PYTQ_CPU_FUSE="0")
    for pair, per_layer in PAIRS.items():
        assert fused[pair]["logits"] == apart[pair]["logits"], pair
        assert fused[pair]["left_out"] == per_layer * LAYERS * BATCHES, pair


@pytest.mark.parametrize("observer", ["every", "attention"])
def test_a_graph_that_is_run_in_parts(observer: str, tmp_path: Path, patched: BuildDir) -> None:
    model = tmp_path / "m.gguf"
    write_model(Shape(LAYERS, 256, 4, 2, 64, 256, ctx=512), "fuse", vocab_file(tmp_path / "v.gguf"), model)
    whole, parts = run(model, PAIRS), run(model, PAIRS, observer)
    for pair, per_layer in PAIRS.items():
        assert parts[pair]["logits"] == whole[pair]["logits"], pair
        assert parts[pair]["observed"] >= LAYERS * BATCHES, pair
        # every: no part holds two nodes; attention: parts end between attention and the rotation of its result
        per_part = 0 if observer == "every" else per_layer - (not pair.endswith("/f16"))
        assert parts[pair]["left_out"] == per_part * LAYERS * BATCHES, pair


def test_rotations_that_something_else_needs(patched: BuildDir) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuse_graph_worker", str(patched.lib)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        env=os.environ | {"PYTQ_CPU_FUSE": ""},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(done.stdout.splitlines()[-1])
    assert {case: row["left_out"] for case, row in rows.items()} == {
        "plain": 1,
        "used twice": 0,
        "wanted": 0,
        "overwritten": 0,
    }
    assert all(row["right"] for row in rows.values()), rows
    assert done.stderr.count("are not kept") == 1  # overwritten
