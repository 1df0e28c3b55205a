"""Smoke matrix: cache types x head sizes x batch sizes give finite logits within the expected error of f16."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pytq.bench.shapes import Shape, write_model
from pytq.paths import BuildDir
from tests.shape_models import vocab_file

pytestmark = pytest.mark.slow

# Relative squared error of one stored vector (unit Gaussian, design table), by type; 0 stands for "far below the others".
DISTORTION = {
    "turbo2": 0.1175,
    "turbo3": 0.0345,
    "turbo4": 0.0095,
    "kv2": 0.083,
    "kv3": 0.0231,
    "kv4": 0.0063,
}
DISTORTION |= {"f16": 0.0, "bf16": 0.0, "q8_0": 0.0, "q4_0": 0.0115, "mxfp4": 0.02, "nvfp4": 0.012}

PAIRS = ("turbo4/turbo3", "turbo2/f16", "kv3/kv2", "bf16/kv4", "kv4/turbo2")
# blocks of 32 (nvfp4: 64) that divide these head sizes
WITH_STOCK = {64: ("q8_0/kv3", "nvfp4/nvfp4"), 128: ("kv4/q4_0", "mxfp4/mxfp4"), 256: ("q4_0/turbo3",)}
HEAD_DIMS = (64, 80, 96, 128, 192, 256)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_logits_near_f16(head_dim: int, tmp_path: Path, patched: BuildDir) -> None:
    shape = Shape(2, 256, 4, 2, head_dim, 256, ctx=512)
    model = tmp_path / "m.gguf"
    write_model(shape, "matrix", vocab_file(tmp_path / "v.gguf"), model)
    pairs = (*PAIRS, *WITH_STOCK.get(head_dim, ()))
    done = subprocess.run(
        [sys.executable, "-m", "tests.matrix_worker", str(model), *pairs],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(done.stdout.splitlines()[-1])
    assert set(rows) == set(pairs)
    for pair, row in rows.items():
        k, v = pair.split("/")
        expected = np.sqrt(DISTORTION[k] + DISTORTION[v])
        assert row["finite"], pair
        for phase in ("prefill", "decode"):
            # the caches of both layers err independently; attention is one of several terms of the residual stream.
            # Never zero: a type that silently ran as f16 would show here
            bound = np.sqrt(shape.layers) * expected
            assert 0.005 * expected < row[phase] < bound, (pair, phase, row[phase], bound)


def test_the_matrix_has_thirty_combinations() -> None:
    assert sum(len(PAIRS) + len(WITH_STOCK.get(d, ())) for d in HEAD_DIMS) >= 30


def test_unsupported_head_dim_is_refused_by_name(tmp_path: Path, patched: BuildDir) -> None:
    model = tmp_path / "m.gguf"
    write_model(Shape(1, 256, 2, 2, 112, 256, ctx=512), "odd", vocab_file(tmp_path / "v.gguf"), model)
    done = subprocess.run(
        [
            patched.bin / "llama-bench",
            "-m",
            model,
            "-ctk",
            "kv3",
            "-ctv",
            "kv3",
            "-fa",
            "1",
            "-p",
            "8",
            "-n",
            "0",
            "-v",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "has no block for head_dim 112" in done.stdout + done.stderr
