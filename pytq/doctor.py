"""What is on this machine, whether it is as pytq needs it, and what to do where it is not. Changes nothing."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pytq import estimate, fetch, ffi, paths
from pytq.codec.table import TypeRow, load_types
from pytq.errors import PytqError

OK, WARN, FAIL = "ok", "warning", "problem"
EXIT_CODES = {OK: 0, WARN: 1, FAIL: 2}
GOLDEN = Path(__file__).parent / "golden.json"
GOLDEN_VECTORS = 8
# relative error of attention against float64 on the same decoded values: queries and weights in the integer tiers have
# 15 bits, sums are float32; measured 7e-5, so a wrong level or lane shows
ATTENTION_BOUND = 2e-3
# bits of pytq_cpu_caps() that each tier needs
CAPS = {"scalar": 0, "avx2": 1, "avx512": 1 | 2, "neon": 4}
MIN_FREE = 2 << 30


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: what was found, why it matters, what to do (empty when nothing)."""

    name: str
    level: str
    found: str
    why: str
    do: str = ""


def run(full: bool = False) -> list[Finding]:
    """All checks in order; a check that breaks is itself a finding."""
    checks: list[Callable[[], list[Finding]]] = [
        check_python,
        check_tools,
        check_gpu,
        check_builds,
        check_binding,
        check_space,
        check_extension,
        check_golden,
        check_attention,
        functools.partial(check_runs, full),
    ]
    found: list[Finding] = []
    for check in checks:
        try:
            found += check()
        except Exception as error:  # a doctor that dies on the patient's illness is no use
            text = f"{type(error).__name__}: {' '.join(str(error).split())}"
            name = getattr(check, "__name__", "check_runs").removeprefix("check_")
            found.append(Finding(name, FAIL, text, "this check could not finish"))
    return found


def exit_code(findings: list[Finding]) -> int:
    """0: all well, 1: warnings, 2: problems."""
    return max((EXIT_CODES[f.level] for f in findings), default=0)


def as_json(findings: list[Finding]) -> str:
    data = {"exit_code": exit_code(findings), "findings": [asdict(f) for f in findings]}
    return json.dumps(data, indent=1)


def _version(*command: str) -> str | None:
    """First line of a program's output, None when it is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = (done.stdout or done.stderr).strip().splitlines()
    return lines[0] if done.returncode == 0 and lines else None


def check_python() -> list[Finding]:
    from pytq import __version__

    text = f"Python {platform.python_version()}, pytq {__version__}, {platform.system()} {platform.machine()}"
    good = sys.version_info >= (3, 10)
    return [
        Finding(
            "python",
            OK if good else FAIL,
            text,
            "pytq needs 3.10 or newer",
            "" if good else "use a newer Python",
        )
    ]


def check_tools() -> list[Finding]:
    from pytq.build import find_tools

    why = "needed to build llama.cpp"
    try:
        tools = find_tools()
    except PytqError as error:
        return [Finding("build tools", FAIL, str(error), why, "see there, then run `pytq build`")]
    cmake = _version(tools.cmake, "--version") or tools.cmake
    found = [Finding("build tools", OK, f"{tools.compiler}; {cmake}; ninja and git", why)]
    ccache = _version("ccache", "--version")
    found.append(
        Finding(
            "ccache",
            OK,
            ccache or "not installed",
            "optional: makes a second build take seconds instead of minutes",
        )
    )
    return found


def check_gpu() -> list[Finding]:
    driver = _version("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
    nvcc = _version("nvcc", "--version")
    hip = _version("hipcc", "--version")
    why = "a GPU build is needed to use a GPU"
    if driver and not nvcc:
        return [
            Finding(
                "cuda",
                WARN,
                f"{driver}, no nvcc",
                why,
                "install the CUDA toolkit, then `pytq build --backend cuda`",
            )
        ]
    found = [Finding("cuda", OK, f"{driver or 'no NVIDIA GPU'}; {'nvcc found' if nvcc else 'no nvcc'}", why)]
    found.append(Finding("rocm", OK, hip or "no hipcc", why))
    return found


def check_builds() -> list[Finding]:
    """Both builds there and made from the present pin, series and sources, as find_build demands."""
    found = []
    whys = {"patched": "it holds the pytq cache types", "stock": "pytq bench and eval compare against it"}
    for kind in paths.KINDS:
        try:
            build = paths.find_build(kind)
        except PytqError as error:
            level = FAIL if kind == "patched" else WARN
            found.append(
                Finding(f"{kind} build", level, str(error), whys[kind], f"run `pytq build --{kind}`")
            )
            continue
        found.append(
            _named_build(kind, build)
            if os.environ.get(f"PYTQ_{kind.upper()}_BUILD")
            else _own_build(build, whys[kind])
        )
    for kind in paths.KINDS:
        for backend in paths.BACKENDS[1:]:
            named = os.environ.get(f"PYTQ_{kind.upper()}_BUILD")  # stands for all backends
            if not named and any((paths.home() / "builds").glob(f"{kind}-{backend}-*")):
                found.append(_gpu_build(kind, backend))
    return found


def _own_build(build: paths.BuildDir, why: str) -> Finding:
    commit = build.info.get("pin", {}).get("commit", "?")
    return Finding(
        f"{build.kind} build", OK, f"{build.root}, llama.cpp {commit}, of this pin and series", why
    )


def _named_build(kind: str, build: paths.BuildDir) -> Finding:
    """A build that an environment variable names is used as it is; whether it fits can be said if `pytq build` made it."""
    from pytq.build import source_key

    variable, name = f"PYTQ_{kind.upper()}_BUILD", f"{kind} build"
    why = "an environment variable names this build, and pytq uses it unchecked"
    made_from = build.info.get("source_key")
    if made_from is None:
        return Finding(name, OK, f"{build.root}, of your own ({variable})", why)
    if made_from == source_key(kind, build.info.get("backend", "cpu")):  # type: ignore[arg-type]
        return Finding(name, OK, f"{build.root} ({variable}), of this pin and series", why)
    return Finding(
        name,
        WARN,
        f"{build.root} ({variable}) was made from another pin or series",
        why,
        f"unset {variable} and run `pytq build --{kind}`",
    )


def _gpu_build(kind: paths.Kind, backend: str) -> Finding:
    name, why = f"{kind} build, {backend}", "an outdated one is not used"
    try:
        return Finding(name, OK, str(paths.find_build(kind, backend).root), why)
    except PytqError as error:
        return Finding(name, WARN, str(error), why, f"run `pytq build --{kind} --backend {backend}`")


def check_binding() -> list[Finding]:
    have, want = fetch.binding_version(), fetch.load_pin().version
    why = "pytq.Llama is llama-cpp-python on the patched library, and both must be of one version"
    if have == want:
        return [Finding("llama-cpp-python", OK, have, why)]
    return [
        Finding(
            "llama-cpp-python",
            WARN,
            f"{have or 'not installed'}, {want} is needed",
            why,
            "`python -m pytq.fetch binding`",
        )
    ]


def check_space() -> list[Finding]:
    import psutil

    home = paths.home()
    existing = next(p for p in (home, *home.parents) if p.exists())
    free = shutil.disk_usage(existing).free
    memory = psutil.virtual_memory()
    found = []
    low = free < MIN_FREE
    found.append(
        Finding(
            "cache directory",
            WARN if low or not os.access(existing, os.W_OK) else OK,
            f"{home}, {estimate.human(free)} free",
            "builds take about 1.5 GB",
            "free some space, or point PYTQ_HOME elsewhere" if low else "",
        )
    )
    text = f"{estimate.human(memory.available)} of {estimate.human(memory.total)} free"
    found.append(Finding("memory", OK, text, "weights and caches live there; see `pytq estimate`"))
    return found


def check_extension() -> list[Finding]:
    """The compiled part, the instruction sets it found, and the one it uses."""
    lib = ffi.lib()
    missing = missing_types()
    if missing:
        return [
            Finding(
                "extension",
                FAIL,
                f"pytq._pytq is older than csrc/types.def: it lacks {', '.join(missing[:4])}",
                "encoders and self-tests run in it",
                "rebuild it: `make ext` in the checkout, or `pip install -e .`",
            )
        ]
    caps = lib.pytq_cpu_caps()
    tier = ffi.ffi().string(lib.pytq_cpu_tier()).decode()
    able = [name for name, bits in CAPS.items() if bits and bits & caps == bits] or [
        "none beyond the baseline"
    ]
    forced = os.environ.get("PYTQ_CPU_CAPS")
    if tier == "scalar" and not forced:
        return [
            Finding(
                "cpu kernels",
                WARN,
                "scalar",
                "the scalar kernels are many times slower",
                "use a CPU with AVX2 or NEON dotprod",
            )
        ]
    if forced:
        return [
            Finding(
                "cpu kernels",
                WARN,
                f"{tier}, forced by PYTQ_CPU_CAPS",
                "the machine may have faster ones",
                "unset it",
            )
        ]
    return [
        Finding(
            "cpu kernels",
            OK,
            f"{tier} (machine: {', '.join(able)})",
            "the fastest set the machine has is chosen",
        )
    ]


# -- self-tests --------------------------------------------------------------------------------------------


@functools.cache
def golden_vectors(head_dim: int) -> NDArray[np.float32]:
    """The same float32 vectors on every machine: sums of small integers, exact in binary.

    A linear congruential generator (Knuth's MMIX constants); twelve uniform values add up to a roughly normal one.
    """
    n = GOLDEN_VECTORS * head_dim * 12
    state, values = 1442695040888963407, np.empty(n, np.int64)
    for i in range(n):
        state = (6364136223846793005 * state + 1442695040888963407) % (1 << 64)
        values[i] = state >> 52
    sums = values.reshape(GOLDEN_VECTORS, head_dim, 12).sum(-1) - 12 * 2048
    return (sums / 4096).astype(np.float32)


def digest(blocks: bytes | NDArray[np.uint8]) -> str:
    return hashlib.sha256(bytes(blocks)).hexdigest()[:32]


def _info(row: TypeRow) -> Any:
    info = ffi.lib().pytq_type_get(row.id)
    if info == ffi.ffi().NULL:
        raise PytqError(f"the extension has no type {row.name}: rebuild it with `make ext`")
    return info


def missing_types() -> list[str]:
    """Types of the table that the compiled extension does not know, or knows with other blocks."""
    null, get = ffi.ffi().NULL, ffi.lib().pytq_type_get
    return [
        row.name for row in load_types() if get(row.id) == null or get(row.id).block_bytes != row.block_bytes
    ]


def _quantize(row: TypeRow, x: NDArray[np.float32], reference: bool = False) -> NDArray[np.uint8]:
    ptr = ffi.ffi().from_buffer
    flat = np.ascontiguousarray(x, np.float32).reshape(-1)
    out = np.empty(flat.size // row.head_dim * row.block_bytes, np.uint8)
    lib = ffi.lib()
    function = lib.pytq_quantize_ref if reference else lib.pytq_quantize
    function(_info(row), ptr("float[]", flat), ptr("char[]", out, require_writable=True), flat.size)
    return out


def _dequantize(row: TypeRow, blocks: NDArray[np.uint8], n: int) -> NDArray[np.float32]:
    ptr = ffi.ffi().from_buffer
    out = np.empty(n, np.float32)
    ffi.lib().pytq_dequantize_ref(
        _info(row), ptr("char[]", blocks), ptr("float[]", out, require_writable=True), n
    )
    return out


def check_golden() -> list[Finding]:
    """Every type encodes the golden vectors to the bytes of the NumPy reference, in the reference and the fast code."""
    if missing_types():
        return []  # check_extension has said so
    want = json.loads(GOLDEN.read_text())
    wrong = []
    for row in load_types():
        x = golden_vectors(row.head_dim)
        for reference in (True, False):
            if digest(_quantize(row, x, reference)) != want.get(row.name):
                wrong.append(f"{row.name} ({'reference' if reference else 'fast'})")
    why = "saved states and other machines read the same bytes"
    if wrong:
        return [
            Finding(
                "encoders",
                FAIL,
                f"wrong bytes: {', '.join(wrong[:6])}",
                why,
                "reinstall pytq; if it stays, report it",
            )
        ]
    return [Finding("encoders", OK, f"{len(load_types())} types equal to the golden vectors", why)]


def tiers() -> Iterator[str]:
    """The kernel tiers this machine can run and this build has; each is in use while it is yielded."""
    lib = ffi.lib()
    try:
        for name, bits in CAPS.items():
            lib.pytq_force_caps(bits)
            if ffi.ffi().string(lib.pytq_cpu_tier()).decode() == name:
                yield name
    finally:
        lib.pytq_force_caps(lib.pytq_cpu_caps())


def attention_error(row_k: TypeRow, row_v: TypeRow, n_kv: int = 96) -> float:
    """Largest relative error of the kernel in use against float64 attention over the decoded cache."""
    f = ffi.ffi()
    d, heads, kv_heads = row_k.head_dim, 4, 2
    rng = np.random.default_rng(7)
    q = rng.standard_normal((heads, d)).astype(np.float32)
    k = _quantize(row_k, rng.standard_normal((n_kv, kv_heads, d)).astype(np.float32))
    v = _quantize(row_v, rng.standard_normal((n_kv, kv_heads, d)).astype(np.float32))
    out = np.zeros((heads, d), np.float32)
    a = f.new("pytq_attn *")
    a.n_q, a.n_kv, a.n_head, a.n_head_kv, a.n_stream, a.n_stream_kv, a.dk, a.dv = (
        1,
        n_kv,
        heads,
        kv_heads,
        1,
        1,
        d,
        d,
    )
    keep = [f.from_buffer("float[]", q), f.from_buffer("char[]", k), f.from_buffer("char[]", v)]
    a.q, a.q_nb_head, a.q_nb_token, a.q_nb_stream = keep[0], 4 * d, 4 * d * heads, 4 * d * heads
    for side, data, row in ((a.k, keep[1], row_k), (a.v, keep[2], row_v)):
        side.data, side.type = data, row.id
        side.nb_head, side.nb_token = row.block_bytes, row.block_bytes * kv_heads
        side.nb_stream = side.nb_token * n_kv
    a.mask = a.sinks = f.NULL
    a.dst = f.from_buffer("float[]", out, require_writable=True)
    a.scale, a.max_bias, a.logit_softcap = d**-0.5, 0.0, 0.0
    if not ffi.lib().pytq_attn_supported(a):
        raise PytqError(f"no attention kernel for K {row_k.name}, V {row_v.name}")
    if ffi.lib().pytq_attn_run(a, 1) != 0:
        raise PytqError(f"the attention kernel for K {row_k.name}, V {row_v.name} ran out of memory")
    keys = _dequantize(row_k, k, n_kv * kv_heads * d).reshape(n_kv, kv_heads, d).astype(np.float64)
    values = _dequantize(row_v, v, n_kv * kv_heads * d).reshape(n_kv, kv_heads, d).astype(np.float64)
    worst = 0.0
    for h in range(heads):
        g = h * kv_heads // heads
        logits = keys[:, g] @ q[h] * d**-0.5
        weights = np.exp(logits - logits.max())
        want = weights @ values[:, g] / weights.sum()
        worst = max(worst, float(np.abs(out[h] - want).max() / np.abs(want).max()))
    return worst


def check_attention() -> list[Finding]:
    """Every tier of the machine on every type as K and V."""
    found: list[Finding] = []
    if missing_types():
        return found
    for tier in tiers():
        errors = {row.name: attention_error(row, row) for row in load_types()}
        bad = [f"{name} ({error:.1e})" for name, error in errors.items() if not error <= ATTENTION_BOUND]
        why = "attention reads the compressed cache with these"
        if bad:
            text = f"{len(bad)} types beyond {ATTENTION_BOUND}: {', '.join(bad[:5])}"
            found.append(
                Finding(f"attention {tier}", FAIL, text, why, "reinstall pytq; if it stays, report it")
            )
        else:
            text = f"{len(errors)} types, largest relative error {max(errors.values()):.1e}"
            found.append(Finding(f"attention {tier}", OK, text, why))
    return found


def check_runs(full: bool = False) -> list[Finding]:
    """The patched build runs flash attention on random-weight models: two types at head_dim 128, or all of them at all sizes."""
    from pytq.bench.runner import Case, Options, run_once
    from pytq.bench.shapes import Shape, small_vocab, write_model

    try:
        program = paths.find_build("patched").program("llama-bench")
    except PytqError:
        return []  # check_builds has said so
    found = []
    flags = estimate.flags() if full else ["kv4", "turbo3"]
    with tempfile.TemporaryDirectory() as directory:
        vocab = small_vocab(Path(directory) / "vocab.gguf")
        for dim in sorted({row.head_dim for row in load_types()}) if full else [128]:
            model = Path(directory) / f"d{dim}.gguf"
            write_model(Shape(1, 2 * dim, 2, 1, dim, 256, 4096), f"d{dim}", vocab, model)
            bad = []
            for flag in flags:
                options = Options(model, (0,), 32, 2, 1, extra=("--no-warmup",))
                try:
                    run_once(options.command(program, Case("patched", flag, flag), 0))
                except PytqError as error:
                    bad.append(f"{flag}: {error}")
            name, why = f"flash attention d{dim}", "these types run in llama.cpp itself"
            if bad:
                found.append(Finding(name, FAIL, "; ".join(bad), why, "`pytq build --patched --force`"))
            else:
                more = "" if full else " (`--full`: all types and head sizes)"
                found.append(Finding(name, OK, ", ".join(flags) + more, why))
    return found
