"""The CUDA kernels compile for sm_90a within their register budget, where nvcc is installed.

This checks compilation and resource use only; running them needs a GPU (tools/gpu/op_bench.sh).
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NVCC = shutil.which("nvcc")

# 16 warps on a multiprocessor leave 128 registers a thread; what the decode kernel spills lies between its tiles' phases.
MAX_REGISTERS = 128
MAX_SPILL_BYTES = 256

SOURCE = """
#include "attention-short.cuh"
#include "attention-decode.cuh"
#include "decode-values.cuh"
#include "encode.cuh"
template __global__ void pytq::attention_decode<{k}, {v}, false>(const PYTQ_GRID_CONSTANT pytq::decode_params);
template __global__ void pytq::attention_short<{k}, {v}, true>(const PYTQ_GRID_CONSTANT pytq::decode_params);
template __global__ void pytq::encode<{code}, {bits}, 32, 128>(const PYTQ_GRID_CONSTANT pytq::encode_job);
template __global__ void pytq::encode<1, {bits}, 8, 0>(const PYTQ_GRID_CONSTANT pytq::encode_job);
template __global__ void pytq::decode_slice<{k}>(const pytq::slice_params);
"""


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
@pytest.mark.parametrize(
    ("name", "k", "v", "code", "bits"),
    [("kv3", 164, 164, 1, 3), ("turbo4", 148, 148, 0, 4)],
)
def test_kernels_fit(tmp_path: Path, name: str, k: int, v: int, code: int, bits: int) -> None:
    source = tmp_path / "kernels.cu"
    source.write_text(SOURCE.format(k=k, v=v, code=code, bits=bits))
    command = [str(NVCC), "-std=c++17", "-O3", "-gencode", "arch=compute_90a,code=sm_90a", "-Xptxas", "-v"]
    command += ["-I", str(ROOT / "csrc" / "cuda"), "-c", str(source), "-o", str(tmp_path / "kernels.o")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", run.stderr)]
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", run.stderr)]
    assert len(registers) >= 5
    assert max(registers) <= MAX_REGISTERS
    assert max(spills) <= MAX_SPILL_BYTES
