"""A report on one machine's GPU, to be sent back by its owner: what is in it, whether the kernels are right, how fast they are.

Nothing is fetched and nothing is sent: `pytq doctor --full --report FILE` writes one JSON file.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pytq import __version__, paths
from pytq.doctor import Finding, exit_code
from pytq.errors import PytqError
from pytq.paths import BuildDir
from pytq.progress import say

FORMAT = 1
# what names the GPU and its driver, where it is installed
GPU_TOOLS = {
    "nvidia-smi": [
        "nvidia-smi",
        "--query-gpu=name,memory.total,driver_version,compute_cap",
        "--format=csv,noheader",
    ],
    "rocminfo": ["rocminfo"],
    "rocm-smi": ["rocm-smi", "--showproductname", "--showdriverversion"],
    "hipconfig": ["hipconfig", "--version"],
    "system_profiler": ["system_profiler", "SPDisplaysDataType"],
}
# lines of rocminfo that tell something; it prints hundreds
ROCMINFO = re.compile(
    r"^\s*(Name|Marketing Name|Compute Unit|Wavefront Size|LDS|Max Waves Per CU):?", re.IGNORECASE
)
BACKEND_OPS = ("SET_ROWS", "GET_ROWS", "CPY", "FLASH_ATTN_EXT")
TYPES = "(kv[2-5]s?|turbo[2-4])_d"
OPS_SECONDS = 900
BENCH_TYPES = ("f16", "q8_0", "turbo4", "kv4")
BENCH_DEPTHS = (0, 4096)
MAX_LINES = 60


def report(findings: list[Finding], backend: str | None = None) -> dict[str, Any]:
    """Everything there is to know, in sections; a section that cannot be made says why.

    Args:
        findings: what `pytq doctor` found.
        backend: the patched build to test; default: the first GPU build there is, else the CPU's.

    Raises:
        PytqError: there is no patched build (of that backend).
    """
    build = choose_build(backend)
    sections: dict[str, Callable[[], Any]] = {
        "gpu": gpu,
        "build": lambda: build.info or str(build.root),
        "devices": lambda: output([str(build.program("llama-bench")), "--list-devices"], 60),
        "backend_ops": lambda: backend_ops(build),
        "bench": lambda: bench(build),
    }
    data: dict[str, Any] = {
        "format": FORMAT,
        "pytq": __version__,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "backend": build.backend,
        "exit_code": exit_code(findings),
        "findings": [asdict(finding) for finding in findings],
    }
    for name, section in sections.items():
        say(f"report: {name}")
        try:
            data[name] = section()
        except (PytqError, OSError, subprocess.SubprocessError) as error:
            data[name] = {"error": " ".join(str(error).split())}
    return data


def choose_build(backend: str | None) -> BuildDir:
    """The patched build to test."""
    if backend is not None:
        return paths.find_build("patched", backend)
    for candidate in ("cuda", "hip", "metal"):
        try:
            return paths.find_build("patched", candidate)
        except PytqError:
            continue
    return paths.find_build("patched")


def output(command: list[str], seconds: float) -> list[str]:
    """Lines that a command prints, both streams; OSError or SubprocessError when it cannot be run to its end."""
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=seconds,
    )
    return [line.rstrip() for line in done.stdout.splitlines() if line.strip()]


def gpu() -> dict[str, list[str]]:
    """What the vendors' tools say."""
    found = {}
    for name, command in GPU_TOOLS.items():
        if shutil.which(command[0]) is not None:
            lines = output(command, 60)
            if name == "rocminfo":
                lines = [line.strip() for line in lines if ROCMINFO.match(line)]
            found[name] = lines[:MAX_LINES]
    return found


def backend_ops(build: BuildDir) -> dict[str, Any]:
    """Upstream's test-backend-ops on the cache operations: each case is compared with the CPU."""
    program = str(build.program("test-backend-ops"))
    found: dict[str, Any] = {}
    for op in BACKEND_OPS:
        try:
            lines = output([program, "test", "-o", op, "-p", TYPES], OPS_SECONDS)
        except subprocess.TimeoutExpired:
            found[op] = {"error": f"not finished within {OPS_SECONDS} s"}
            continue
        plain = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip() for line in lines]
        cases = [line for line in plain if line.startswith(f"{op}(")]
        found[op] = {
            "ok": sum(line.endswith("OK") for line in cases),
            "failed": [line for line in cases if line.endswith("FAIL")][:MAX_LINES],
            "not_supported": sum("not supported" in line for line in cases),
            "summary": [line for line in plain if re.search(r"tests passed|Backend .*(OK|FAIL)", line)],
        }
    return found


def bench(build: BuildDir) -> list[dict[str, Any]]:
    """Tokens per second of a small random-weight model in which attention dominates, one sample each."""
    from pytq.bench.runner import Case, Options, run_once
    from pytq.bench.shapes import SHAPES, small_vocab, write_model

    rows: list[dict[str, Any]] = []
    program = build.program("llama-bench")
    with tempfile.TemporaryDirectory() as directory:
        vocab = small_vocab(Path(directory) / "vocab.gguf")
        model = Path(directory) / "attn-heavy.gguf"
        write_model(SHAPES["attn-heavy"], "attn-heavy", vocab, model)
        options = Options(
            model, BENCH_DEPTHS, 512, 32, 1, n_gpu_layers=None if build.backend == "cpu" else 99
        )
        for name in BENCH_TYPES:
            for depth in BENCH_DEPTHS:
                try:
                    measured = run_once(options.command(program, Case("patched", name, name), depth))
                except PytqError as error:
                    rows.append({"type": name, "depth": depth, "error": str(error)})
                    continue
                for row in measured:
                    keys = ("n_prompt", "n_gen", "avg_ts", "backends", "gpu_info", "cpu_info")
                    rows.append({"type": name, "depth": depth} | {k: row[k] for k in keys if k in row})
    return rows


def write(data: dict[str, Any], target: Path) -> None:
    """Writes the report; paths of the home directory are replaced by ``~``. PytqError: it cannot be written."""
    text = json.dumps(data, indent=1)
    home = str(Path.home())
    if home not in ("/", ""):
        text = text.replace(json.dumps(home)[1:-1], "~")
    temporary = target.with_name(target.name + ".tmp")
    try:
        temporary.write_text(text + "\n")
        os.replace(temporary, target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise PytqError(f"{target} cannot be written: {error.strerror or error}") from error
