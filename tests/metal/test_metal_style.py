"""What the shim cannot see: rules of the Metal shading language, checked on the very text that a device compiles.

With a clang at hand, address spaces are also checked by a compiler: its C++ for OpenCL has the same ones.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import metal_device as device
import metal_shim as shim
import metal_translate as translate
import numpy as np
import pytest
from metal_device import F16, F32, I32, I64, ROWS, Device, Tensor

from pytq.codec.table import families

DIMS = (64, 80, 96, 128, 192, 256)
PAIRS = [(d, d) for d in DIMS] + [(192, 128)]
SPACES = r"(?:device|constant|threadgroup|thread)"
SIGNED = ("bool", "char", "short", "int", "long", "float", "half", "int8_t", "int32_t", "int64_t")
SCALARS = [*SIGNED, "uchar", "ushort", "uint", "ulong", "uint8_t", "uint32_t", "uint64_t"]
FORBIDDEN = {
    r"\bdouble\b": "double",
    r"(?<![\w.])\d+\.\d*(?:e[-+]?\d+)?(?![\w.])": "a literal of type double",
    r"(?<![\w.])\d+e[-+]?\d+(?![\w.])": "a literal of type double",
    r"\bgoto\b|\bthrow\b|\btry\b|\bcatch\b|\bnew\b|\bdelete\b|\bvirtual\b|\bdynamic_cast\b|\btypeid\b": "a C++ feature that Metal lacks",
    r"\[\s*[&=]?\s*\]\s*\(": "a lambda",
    r"\bif\s+constexpr\b": "C++17",
    r"\bstd::": "the C++ library",
    r"(?m)^\s+static\s+(?!inline)": "a static inside a function",
    r"(?m)^\s+threadgroup\s+[\w<>]+\s+\w+\s*\[": "threadgroup memory that the dispatching code does not count",
    r"\bINFINITY\b|\bNAN\b|\bisinf\b|\bisnan\b|\bisfinite\b": "infinities, which relaxed mathematics may assume away",
}


def style_errors(text: str) -> list[str]:
    """Violations in a Metal source, one line each."""
    text = translate.without_comments(text)
    errors = []
    for pattern, what in FORBIDDEN.items():
        errors += [f"{what}: {m[0].strip()!r}" for m in re.finditer(pattern, text)]

    names = {*SCALARS, *(f"{s}{n}" for s in SCALARS for n in (2, 3, 4)), *(f"packed_{s}4" for s in SCALARS)}
    names |= set(re.findall(r"\bstruct\s+(\w+)", text)) | set(re.findall(r"}\s*(\w+)\s*;", text))
    names |= {
        name
        for names in re.findall(r"template\s*<([^>]*)>", text)
        for name in re.findall(r"typename\s+(\w+)", names)
    }
    declarator = re.compile(
        rf"([\w ]*?)\b({'|'.join(sorted(names, key=len, reverse=True))})\s*(?:const\s*)?[*&](?!&)"
    )
    for m in declarator.finditer(text):
        if not re.search(rf"\b{SPACES}\s+(?:const\s+)?$", m[1]):
            errors.append(f"a pointer or reference without address space: {m[0].strip()!r}")

    calls = {}
    for m in re.finditer(r"\b(\w+)\s*\(", text):
        end = translate.balanced(text, m.end() - 1)
        after = text[end:].lstrip()
        if after.startswith("{") and m[1] not in ("if", "for", "while", "switch"):
            begin = text.index("{", end)
            calls[m[1]] = set(
                re.findall(r"\b(\w+)\s*[<(]", text[begin : translate.balanced(text, begin, "{}")])
            )

    def reaches(function: str, seen: set[str]) -> set[str]:
        for callee in calls.get(function, set()) & calls.keys():
            if callee not in seen:
                seen.add(callee)
                reaches(callee, seen)
        return seen

    errors += [f"recursion: {name}" for name in calls if name in reaches(name, set())]
    return errors


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return device.flat_source(tmp_path_factory.mktemp("flat"))


def test_style(text: str) -> None:
    assert style_errors(text) == []


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("void f(float * x) { }", "without address space"),
        ("void f(device float * x, float & y) { }", "without address space"),
        ("struct s { int a; }; void f(const s & x) { }", "without address space"),
        ("template <typename T> void f(T * x) { }", "without address space"),
        ("void f(device float * x) { float y = *(const half *) x; }", "without address space"),
        ("float f(float x) { return 2.0 * x; }", "literal of type double"),
        ("float f(float x) { return 1e3 * x; }", "literal of type double"),
        ("double f() { return 1; }", "double"),
        ("int f(int x) { return x < 2 ? x : f(x - 1); }", "recursion: f"),
        ("int g(int x); int f(int x) { return g(x); } int g(int x) { return f(x); }", "recursion"),
        ("void f() {\n    threadgroup float x[32];\n}", "does not count"),
        ("void f() { auto g = [&](int x) { return x; }; }", "lambda"),
        ("float f(float x) { return x == INFINITY ? 0.0f : x; }", "infinities"),
    ],
)
def test_style_notices(source: str, message: str) -> None:
    assert any(message in error for error in style_errors(source)), style_errors(source)


def clang() -> str | None:
    """A clang++ of this machine, or the one that tools/fetch_hip.py unpacks."""
    from pytq import paths

    fetched = paths.home() / "toolchains" / "hip" / "bin" / "clang++"
    names = ("clang++", *(f"clang++-{n}" for n in range(21, 14, -1)), str(fetched))
    return next((found for name in names if (found := shutil.which(name))), None)


def compile_address_spaces(text: str, directory: Path) -> str:
    """Messages of clang in its C++ for OpenCL mode; empty if every pointer goes where its memory is.

    All warnings are on: ggml takes any message about a library for a failure, so the text has to be silent by itself.
    """
    program = clang()
    if program is None:
        pytest.skip("no clang++: address spaces are checked by the style rules only")
    source = directory / "pytq.clcpp"
    source.write_text(translate.for_address_spaces(text))
    command = [
        program,
        "-x",
        "clcpp",
        "-cl-std=clc++2021",
        "-cl-no-stdinc",
        "-fsyntax-only",
        "-Weverything",
    ]
    command += ["-isystem", str(shim.HERE / "shim"), "-include", "address_spaces.h", str(source)]
    return subprocess.run(command, capture_output=True, text=True).stderr


def test_address_spaces(text: str, tmp_path: Path) -> None:
    assert compile_address_spaces(text, tmp_path) == ""


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("layout l, threadgroup const float * tab,", "layout l, device const float * tab,"),
        ("thread float4 & lo", "device float4 & lo"),
        ("threadgroup half4 * to = (threadgroup half4 *)", "device half4 * to = (threadgroup half4 *)"),
        ("device float * out;", "threadgroup float * out;"),
        (
            "constant pytq_metal_attention_args & args, int row,",
            "device pytq_metal_attention_args & args, int row,",
        ),
    ],
)
def test_address_spaces_notices(text: str, tmp_path: Path, right: str, wrong: str) -> None:
    assert right in text
    errors = compile_address_spaces(text.replace(right, wrong), tmp_path)
    assert "error" in errors and re.search(r"address space|__global|__local", errors)


def test_kernels_are_those_that_the_dispatching_code_names(text: str) -> None:
    expected = {"kernel_pytq_encode", "kernel_pytq_copy", "kernel_pytq_values_f32", "kernel_pytq_values_f16"}
    expected |= {f"kernel_pytq_attn_vec_dk{dk}_dv{dv}_r{r}" for dk, dv in PAIRS for r in (1, 2, 4, 8)}
    expected |= {f"kernel_pytq_attn_mm_dk{dk}_dv{dv}" for dk, dv in PAIRS}
    expected |= {f"kernel_pytq_attn_reduce_dv{dv}" for dv in DIMS}
    assert sorted(translate.kernel_names(text)) == sorted(expected)


# ------------------------------------------------------------------------------------------- memory, what runs


@pytest.fixture(scope="module")
def dev(harness: Path) -> Device:
    return Device(harness)


def attention_node(
    row_id: int, d: int, n_q: int = 1, dv: int = 0, v: int = 0
) -> tuple[Tensor, list[Tensor | None]]:
    """A node whose tensors have shapes but no memory worth reading: for supports()."""
    none = np.zeros(1, np.float32)
    q = Tensor(F32, (d, n_q, 4), none)
    return Tensor(F32, (dv or d, 4, n_q), none), [
        q,
        Tensor(row_id, (d, 9, 2), none),
        Tensor(v or row_id, (dv or d, 9, 2), none),
    ]


@pytest.mark.parametrize("pair", PAIRS)
def test_threadgroup_memory(harness: Path, pair: tuple[int, int]) -> None:
    """The largest threadgroups of each kernel; the harness also aborts on any that asks for more than 32 KiB."""
    import test_metal_attention as attention

    dev = Device(harness)
    dk, dv = pair
    for n_q in (1, 17):
        attention.check(dev, attention.Case("kv4s", "kv3s", dk, dv, n_q=n_q, n_kv=128, n_head_kv=1, gqa=8))
    assert 8192 < dev.dll.harness_most_memory() <= shim.MAX_THREADGROUP_MEMORY


def test_the_device_gets_the_text_that_was_executed(dev: Device, text: str) -> None:
    assert dev.supports("GET_ROWS", *rows_node(next(iter(ROWS))))[0] == "supported"
    assert dev.dll.harness_source().decode() == text


def rows_node(row_id: int) -> tuple[Tensor, list[Tensor | None]]:
    none, d = np.zeros(1, np.float32), ROWS[row_id].head_dim
    return Tensor(F32, (d, 3), none), [Tensor(row_id, (d, 5), none), Tensor(I32, (3,), none)]


def table() -> list[tuple[str, str, str, str]]:
    """Rows (op, families, head_dims, kind) of csrc/ggml/pytq-metal-ops.def."""
    lines = (device.CSRC / "ggml" / "pytq-metal-ops.def").read_text().splitlines()
    rows = [re.match(r'PYTQ_METAL_OP\((\w+), (\w+), (\w+), (\w+), "[^"]+"\)$', line) for line in lines]
    return [row.groups() for row in rows if row]  # type: ignore[misc]


def node_of(op: str, row_id: int) -> tuple[Tensor, list[Tensor | None]]:
    none, d = np.zeros(1, np.float32), ROWS[row_id].head_dim
    compressed = Tensor(row_id, (d, 3), none)
    if op == "SET_ROWS":
        return compressed, [Tensor(F32, (d, 2), none), Tensor(I64, (2,), none)]
    if op == "GET_ROWS":
        return rows_node(row_id)
    if op == "FLASH_ATTN_EXT":
        return attention_node(row_id, d)
    if op == "CPY":
        return compressed, [Tensor(F32, (d, 3), none), compressed]
    return compressed, [compressed]


@pytest.mark.parametrize("row", table(), ids=lambda row: row[0])
def test_supports_op_says_what_the_table_says(dev: Device, row: tuple[str, str, str, str]) -> None:
    op, families_, head_dims, kind = row
    assert (families_, head_dims) == ("ALL", "ALL")
    assert kind in ("FUSED", "GENERIC", "REFUSED")
    for row_id in ROWS:
        answer = dev.supports(op, *node_of(op, row_id))[0]
        assert answer == ("refused" if kind == "REFUSED" else "supported"), ROWS[row_id].name


def test_operations_outside_the_table(dev: Device) -> None:
    row_id = next(iter(ROWS))
    assert len(table()) == len({row[0] for row in table()})
    assert dev.supports("ADD", *node_of("ADD", row_id))[0] == "refused"
    assert dev.supports("VIEW", *node_of("VIEW", row_id))[0] == "supported"
    plain = Tensor(F32, (64, 3), np.zeros(1, np.float32))
    assert dev.supports("ADD", plain, [plain, plain])[0] == "foreign"
    flag = Tensor(families()["kv3"], (64, 3), np.zeros(1, np.float32))
    assert dev.supports("SET_ROWS", flag, [plain, Tensor(I64, (2,), plain.data)])[0] == "refused"


def test_nodes_that_would_run_wrong_are_refused(dev: Device) -> None:
    kv3 = next(row.id for row in ROWS.values() if row.name == "kv3_d128")
    none = np.zeros(1, np.float32)

    def answer(dst: Tensor, sources: list[Tensor | None]) -> str:
        return dev.supports("FLASH_ATTN_EXT", dst, sources)[0]

    dst, sources = attention_node(kv3, 128)
    q, k, v = sources
    assert answer(dst, sources) == "supported"
    assert answer(dst, [q, k, Tensor(F16, (128, 9, 2), none)]) == "supported"
    assert answer(dst, [q, k, Tensor(F32, (128, 9, 2), none)]) == "refused"
    assert answer(dst, [q, k, v, Tensor(F32, (9, 1), none)]) == "refused"  # mask in f32
    assert answer(dst, [Tensor(F32, (128, 1, 3), none), k, v]) == "refused"  # 3 heads on 2 KV heads
    assert answer(dst, [Tensor(F16, (128, 1, 4), none), k, v]) == "refused"
    assert answer(dst, [q, k, Tensor(kv3, (128, 8, 2), none)]) == "refused"  # fewer values than keys
    other = next(row.id for row in ROWS.values() if row.name == "kv3_d64")
    assert answer(*attention_node(kv3, 128, dv=64, v=other)) == "refused"  # a pair without a kernel
    d192, d128 = (next(r.id for r in ROWS.values() if r.name == f"kv4_d{d}") for d in (192, 128))
    assert answer(*attention_node(d192, 192, dv=128, v=d128)) == "supported"
    assert answer(*attention_node(d128, 128, dv=192, v=d192)) == "refused"
    assert dev.supports("FLASH_ATTN_EXT", dst, sources, reduction=False)[0] == "refused"

    blocks = Tensor(kv3, (128, 3), none)
    assert dev.supports("CPY", Tensor(F32, (64, 6), none), [blocks])[0] == "refused"  # another shape
    assert dev.supports("CPY", blocks, [Tensor(F16, (128, 3), none)])[0] == "refused"
    assert dev.supports("CPY", Tensor(kv3, (128, 3), none, nb=(49, 98, 294, 294)), [blocks])[0] == "refused"
    assert (
        dev.supports("SET_ROWS", blocks, [Tensor(F16, (128, 2), none), Tensor(I64, (2,), none)])[0]
        == "refused"
    )


def test_kernels_that_do_not_compile_are_refused(harness: Path, tmp_path: Path) -> None:
    """One message, and everything with a compressed tensor goes to the CPU."""
    copy = tmp_path / "broken.so"
    shutil.copy(harness, copy)  # a library of its own: the device remembers its kernels
    dev = Device(copy)
    dev.dll.harness_break_compiler()
    row_id = next(iter(ROWS))
    for _ in range(2):
        assert dev.supports("GET_ROWS", *rows_node(row_id))[0] == "refused"
    assert dev.dll.harness_log().decode().count("do not compile on this device") == 1
