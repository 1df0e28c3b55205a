#!/usr/bin/env python3
"""Compiles the HIP backend's files into code objects and reports what their kernels use.

usage: python tools/hip_objects.py [--jobs N] [--gpus gfx1100,...] LLAMA_SOURCE

Writes benchmarks/hip-resources.json (vector and scalar registers, spills, scratch, static LDS per kernel and GPU), which
docs/backends.md shows and tests/hip/test_objects.py holds new code to. LLAMA_SOURCE: a patched llama.cpp tree, such as the
work tree of `pytq build`. The toolchain is that of tools/fetch_hip.py. Compiled is not run: no AMD GPU is involved.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import fetch_hip

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "benchmarks" / "hip-resources.json"
# CDNA2 and CDNA3 (waves of 64), RDNA3 and RDNA4 (waves of 32)
GPUS = {"gfx90a": 64, "gfx942": 64, "gfx1100": 32, "gfx1201": 32}


@dataclass(frozen=True, order=True)
class Kernel:
    """Resources of one kernel in one code object. scratch: bytes per lane; lds: static bytes per work-group."""

    gpu: str
    name: str
    vgpr: int
    sgpr: int
    vgpr_spills: int
    sgpr_spills: int
    scratch: int
    lds: int
    wave: int


def sources() -> list[Path]:
    """The files that csrc/ggml/pytq-hip.cmake adds to ggml-hip."""
    directory = ROOT / "csrc" / "ggml"
    text = (directory / "pytq-hip.cmake").read_text()
    patterns = re.findall(r"csrc/ggml/([\w*-]+\.cu)", text)
    found = {path for pattern in patterns for path in directory.glob(pattern)}
    if not found:
        raise RuntimeError("csrc/ggml/pytq-hip.cmake names no sources")
    return sorted(found)


def command(source: Path, llama: Path, *options: str) -> list[str]:
    """The compiler with the options that every file of ggml-hip gets."""
    root = fetch_hip.location()
    ccache = shutil.which("ccache")
    words = [ccache] if ccache else []
    words += [str(root / "bin" / "clang++"), "-x", "hip", "-std=c++17", "-O3", "-fPIC", *options]
    words += [f"--rocm-path={root / 'usr'}", f"--rocm-device-lib-path={root / fetch_hip.BITCODE}"]
    words += ["-DGGML_USE_HIP", "-D__HIP_PLATFORM_AMD__", "-Wno-pass-failed", "-Wno-cuda-compat"]
    words += ["-isystem", str(root / "usr" / "include")]
    ggml = llama / "ggml"
    for directory in (
        ggml / "include",
        ggml / "src",
        ggml / "src" / "ggml-cuda",
        ROOT / "csrc",
        ROOT / "csrc" / "ggml",
    ):
        words += ["-I", str(directory)]
    return [*words, str(source)]


def run(words: list[str]) -> str:
    """Output of the compiler; RuntimeError with its last words if it fails."""
    # the compiler is a script that never changes: what it runs is what counts
    environment = os.environ | {"CCACHE_COMPILERCHECK": "%compiler% --version"}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        raise RuntimeError(f"{Path(words[-1]).name}: {done.stderr[-3000:]}")
    return done.stdout


def compile_object(source: Path, gpu: str, llama: Path, target: Path) -> list[Kernel]:
    """Compiles one file for one GPU and reads its kernels' resources. RuntimeError: the compiler refuses it."""
    options = [
        "--cuda-device-only",
        "--no-gpu-bundle-output",
        f"--offload-arch={gpu}",
        "-o",
        str(target),
        "-c",
    ]
    run(command(source, llama, *options))
    return read_object(target, gpu)


def check_host(source: Path, llama: Path) -> None:
    """Checks the host's half of a file (launches, ggml's interfaces) without making code. RuntimeError: it is refused."""
    run(command(source, llama, "--cuda-host-only", "-fsyntax-only"))


def read_object(code_object: Path, gpu: str) -> list[Kernel]:
    """Kernels of a code object, from its notes."""
    readelf = fetch_hip.location() / "bin" / "llvm-readelf"
    text = subprocess.run(
        [readelf, "--notes", code_object], capture_output=True, text=True, check=True
    ).stdout
    kernels = []
    # the arguments of a kernel have names, too, but deeper in the tree
    for part in re.split(r"^  - \.agpr_count|^  - \.args", text, flags=re.MULTILINE)[1:]:
        value = dict(re.findall(r"^    \.(\w+): +(\S+)$", part, flags=re.MULTILINE))
        kernels.append(
            Kernel(
                gpu,
                readable(value["name"]),
                int(value["vgpr_count"]),
                int(value["sgpr_count"]),
                int(value["vgpr_spill_count"]),
                int(value["sgpr_spill_count"]),
                int(value["private_segment_fixed_size"]),
                int(value["group_segment_fixed_size"]),
                int(value["wavefront_size"]),
            )
        )
    return kernels


def readable(symbol: str) -> str:
    """`_ZN4pytq18portable_attentionILi64ELi1ELb0EEE...` -> `portable_attention<64, 1, false>`; other names stay."""
    match = re.match(r"_ZN4pytq(\d+)", symbol)
    if not match:
        return symbol
    start = match.end()
    name, rest = symbol[start : start + int(match[1])], symbol[start + int(match[1]) :]
    arguments = re.match(r"I((?:Li\d+E|Lb[01]E|f|6__half)+)E", rest)
    if not arguments:
        return name
    fixed = {"Lb0E": "false", "Lb1E": "true", "f": "float", "6__half": "half"}
    words = re.findall(r"Li\d+E|Lb[01]E|f|6__half", arguments[1])
    return f"{name}<{', '.join(fixed.get(word, word[2:-1]) for word in words)}>"


def collect(llama: Path, gpus: Iterable[str], jobs: int, work: Path) -> list[Kernel]:
    """All kernels of all files for these GPUs."""

    def one(task: tuple[str, Path]) -> list[Kernel]:
        gpu, source = task
        return compile_object(source, gpu, llama, work / f"{source.stem}.{gpu}.co")

    with ThreadPoolExecutor(jobs) as pool:
        parts = pool.map(one, [(gpu, source) for gpu in gpus for source in sources()])
        return sorted(kernel for part in parts for kernel in part)


def load_table() -> dict[tuple[str, str], Kernel]:
    """The committed table by GPU and kernel."""
    rows = [Kernel(**row) for row in json.loads(TABLE.read_text())["kernels"]]
    return {(row.gpu, row.name): row for row in rows}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--gpus", default=",".join(GPUS))
    parser.add_argument("source", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        kernels = collect(options.source, options.gpus.split(","), options.jobs, Path(directory))
    if options.gpus == ",".join(GPUS):
        rows = ",\n".join("  " + json.dumps(asdict(kernel)) for kernel in kernels)
        head = {"command": "python tools/hip_objects.py LLAMA_SOURCE", "compiler": "clang 19.1.7, -O3"}
        text = "{" + json.dumps(head)[1:-1] + ',\n "kernels": [\n' + rows + "\n]}\n"
        temporary = TABLE.with_suffix(".tmp")
        temporary.write_text(text)
        os.replace(temporary, TABLE)
    for kernel in kernels:
        print(
            f"{kernel.gpu:8} {kernel.name:32} vgpr {kernel.vgpr:3} sgpr {kernel.sgpr:3} "
            f"spills {kernel.vgpr_spills}+{kernel.sgpr_spills} scratch {kernel.scratch} lds {kernel.lds}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
