"""llama.cpp with its cache on a Metal device made of the shim: upstream's own C++ files with our patch, loaded as a backend.

Cache writes and attention run there, everything else on the CPU. What stands in for Apple's frameworks is backend.cpp.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import metal_device as device
import pytest

from pytq.paths import BuildDir

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="the stand-in backend is an ELF library"),
]
# one obvious continuation: rounding must not decide it
PROMPT = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13,"


@pytest.fixture(scope="module")
def backend(objects: Path, patched_tree: Path, patched: BuildDir) -> Path:
    return device.build_backend(objects, patched_tree, patched.lib)


def generate(
    patched: BuildDir, model: Path, arguments: list[str], environment: dict[str, str]
) -> tuple[str, str]:
    """Text and messages of a short greedy run."""
    command = [
        str(patched.bin / "llama-completion"),
        "-m",
        str(model),
        "-p",
        PROMPT,
        "-n",
        "8",
        "--temp",
        "0",
    ]
    command += [
        "-fa",
        "on",
        "-c",
        "256",
        "-no-cnv",
        "--no-warmup",
        "-t",
        "1",
        "-fit",
        "off",
        "-v",
        *arguments,
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, done.stderr


# both compressed: the stand-in runs no node without a compressed tensor, so it could not write an f16 cache
@pytest.mark.parametrize("types", [("kv4", "kv3"), ("turbo4", "turbo3")])
def test_a_model_with_its_cache_on_the_shim(
    backend: Path, patched: BuildDir, model: Path, tmp_path: Path, types: tuple[str, str]
) -> None:
    log = tmp_path / "kernels"
    flags = ["-ctk", types[0], "-ctv", types[1]]
    environment = {"GGML_BACKEND_PATH": str(backend), "PYTQ_METAL_SHIM_LOG": str(log)}
    text, messages = generate(patched, model, [*flags, "-dev", "MTL0", "-ngl", "99"], environment)
    assert "using device MTL0 (Metal shim)" in messages
    assert "13, 14, 15" in text
    kernels = log.read_text().split()
    assert "kernel_pytq_encode" in kernels
    # the prompt with matrices, single tokens without
    assert any("_mm_" in k for k in kernels) and any("_vec_" in k for k in kernels)
    assert text == generate(patched, model, flags, {})[0]
