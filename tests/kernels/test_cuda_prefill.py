"""The prefill kernel of compute capability 9.0 as far as it goes without a GPU.

Compiled: its instances fit their registers, and ptxas neither serialises matrix products nor ignores setmaxnreg. Executed
under a shim: the decoder that fills its tiles. Whether the kernel is right is checked on a GPU (tools/gpu/op_bench.sh).
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from pytq import backends
from pytq.codec.table import load_types
from tests.hip.shim_flags import shim_flags

ROOT = Path(__file__).resolve().parents[2]
GGML = ROOT / "csrc" / "ggml"
NVCC = shutil.which("nvcc")
HEAD_DIMS = (64, 128)
# of the decoders, where a 5-bit code is looked up
MAX_SPILL_BYTES = 96
# of a value's largest coordinate: halves, and the factor of a block in half precision
MAX_VALUE_ERROR = 1e-3


def families() -> set[str]:
    """Families of keys that the dispatch knows."""
    text = (GGML / "pytq-prefill.h").read_text()
    listed = re.search(r"PYTQ_PREFILL_FAMILIES\(X\) (.*)", text)
    assert listed
    return set(re.findall(r"X\((\w+)\)", listed[1]))


def test_every_family_of_the_dispatch_has_its_file() -> None:
    assert {k for k, _, _ in backends.prefill_pairs()} == families()
    assert {dim for _, _, dim in backends.prefill_pairs()} == set(HEAD_DIMS)


def test_the_decode_kernel_takes_every_pair_of_the_prefill_kernel() -> None:
    """Small and large batches over one cache stay on fused kernels."""
    assert backends.prefill_pairs() <= backends.tensor_core_pairs()


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
@pytest.mark.parametrize("family", ["kv3", "turbo4", "kv5"])
def test_kernels_fit(tmp_path: Path, family: str) -> None:
    """Both head sizes and all values of a family of keys."""
    command = [str(NVCC), "-std=c++17", "-O3", "-gencode", "arch=compute_90a,code=sm_90a", "-Xptxas", "-v"]
    command += ["-I", str(ROOT / "csrc"), "-I", str(GGML), "-c", str(GGML / f"pytq-prefill-{family}.cu")]
    command += ["-o", str(tmp_path / "prefill.o")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert re.findall(r"\(C75\d\d\).*", run.stderr) == []
    kernels = re.split(r"Compiling entry function '", run.stderr)[1:]
    named = [kernel for kernel in kernels if re.match(r"_ZN4pytq17attention_prefillI", kernel)]
    assert len(named) == (4 if family == "kv5" else 2)
    for kernel in named:
        # 512 threads: what the launch may give each of them
        assert [int(n) for n in re.findall(r"Used (\d+) registers", kernel)] == [128]
        spills = [int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", kernel)]
        assert max(spills) <= MAX_SPILL_BYTES, kernel


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
def test_other_architectures_compile_to_nothing(tmp_path: Path) -> None:
    command = [str(NVCC), "-std=c++17", "-gencode", "arch=compute_80,code=sm_80", "-Xptxas", "-v"]
    command += ["-I", str(ROOT / "csrc"), "-I", str(GGML), "-c", str(GGML / "pytq-prefill-turbo2.cu")]
    command += ["-o", str(tmp_path / "prefill.o")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    kernels = re.split(r"Compiling entry function '", run.stderr)[1:]
    sizes = [re.search(r"Used (\d+) registers", k) for k in kernels if "attention_prefillI" in k]
    assert sizes and all(n and int(n[1]) < 16 for n in sizes)


def test_tiles_hold_the_references_values(tmp_path: Path) -> None:
    """Every type, blocks at any alignment; read back through the swizzle."""
    if shutil.which("g++") is None:
        pytest.skip("the shim needs g++ (Debian: apt install g++)")
    objects = []
    for source in sorted((ROOT / "csrc" / "ref").glob("*.c")):
        objects.append(str(tmp_path / f"{source.stem}.o"))
        subprocess.run(
            ["gcc", "-std=c11", "-O2", "-ffp-contract=off", "-c", str(source), "-o", objects[-1]], check=True
        )
    program = str(tmp_path / "prefill_tiles")
    source = str(Path(__file__).with_suffix("").parent / "prefill_tiles.cpp")
    subprocess.run(["g++", *shim_flags(32), source, *objects, "-o", program], check=True)
    rows = [
        line.split()
        for line in subprocess.run([program], capture_output=True, text=True, check=True).stdout.splitlines()
    ]
    wanted = {
        (t.family, str(t.head_dim))
        for t in load_types()
        if t.head_dim in HEAD_DIMS and t.family in families()
    }
    assert {(name, d) for name, d, _, _ in rows} == wanted
    for name, d, wrong, error in rows:
        assert wrong == "0", f"{name} {d}: levels of keys"
        assert float(error) <= MAX_VALUE_ERROR, f"{name} {d}: values"
