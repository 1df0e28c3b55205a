"""The files of the HIP backend become code objects of real GPUs, and their kernels keep to the committed table.

Compiled is what this proves, nothing more: no AMD GPU is involved.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import hip_objects
import pytest
from hip_objects import GPUS, Kernel

from pytq import build

pytestmark = pytest.mark.slow
HERE = Path(__file__).resolve().parent

# over the committed number of vector registers; more means that something is kept that should not be
SLACK = 12
# a compute unit's shared memory; the dynamic part is at most 50176 bytes (two kv5 tensors with 256 coordinates, 8 rows)
MAX_LDS = 65536
MAX_DYNAMIC_LDS = 50176


@pytest.fixture(scope="module", params=list(GPUS))
def kernels(
    request: pytest.FixtureRequest, hip: Path, llama_source: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[Kernel]:
    """Kernels of all files, compiled for one GPU."""
    work = tmp_path_factory.mktemp(request.param)
    return hip_objects.collect(llama_source, [request.param], 1, work)


def test_kernels_fit(kernels: list[Kernel]) -> None:
    table = hip_objects.load_table()
    gpu = kernels[0].gpu
    assert {(k.gpu, k.name) for k in kernels} == {key for key in table if key[0] == gpu}, (
        "benchmarks/hip-resources.json is stale: run tools/hip_objects.py"
    )
    for kernel in kernels:
        assert kernel.wave == GPUS[gpu]
        assert (kernel.vgpr_spills, kernel.scratch) == (0, 0), kernel
        assert kernel.vgpr <= table[gpu, kernel.name].vgpr + SLACK, kernel
        assert kernel.lds + MAX_DYNAMIC_LDS <= MAX_LDS, kernel


def test_host_code(hip: Path, llama_source: Path) -> None:
    for source in hip_objects.sources():
        hip_objects.check_host(source, llama_source)


def test_patched_backend_compiles(hip: Path, llama_source: Path, tmp_path: Path) -> None:
    """Upstream's files with the series' hooks, as ggml-hip compiles them."""
    tree = tmp_path / "llama"
    shutil.copytree(llama_source, tree, ignore=shutil.ignore_patterns("*.png", "*.ipynb"))
    originals = llama_source.parent / "original"
    if originals.exists():
        shutil.copytree(originals, tree, dirs_exist_ok=True)
    build.apply_series(tree)
    for name in ("ggml-cuda.cu", "mmvq.cu"):
        words = hip_objects.command(tree / "ggml/src/ggml-cuda" / name, tree)
        words[-1:-1] = ["--cuda-host-only", "-fsyntax-only", "-include", str(HERE / "hip57.h")]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize(
    ("symbol", "name"),
    [
        (
            "_ZN4pytq18portable_attentionILi128ELi4ELb0EEEvNS_15portable_paramsE",
            "portable_attention<128, 4, false>",
        ),
        ("_ZN4pytq13decode_valuesILi1E6__halfEEvNS_13values_paramsE", "decode_values<1, half>"),
        ("_ZN12_GLOBAL__N_1L4noneEv", "_ZN12_GLOBAL__N_1L4noneEv"),
    ],
)
def test_readable_names(symbol: str, name: str) -> None:
    assert hip_objects.readable(symbol) == name
