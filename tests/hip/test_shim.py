"""The shim itself: exchanges between lanes are right at both widths, and what a GPU would leave undefined ends the program."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
SOURCE = """
#include "shim.h"
static thread_local char none[16];
static int out[256];
__global__ void lanes() {
    const int t = threadIdx.x, l = t % SHIM_WAVE;
    out[t] = 0;
    out[t] += __ballot(l % 3 == 0) == (0x9249249249249249ull & (SHIM_WAVE == 64 ? ~0ull : 0xffffffffull));
    out[t] += __shfl_xor(t, 5, 32) == (t ^ 5);
    out[t] += __shfl(t, 7, 32) == t / 32 * 32 + 7;
    out[t] += __shfl_up(t, 2, 32) == (t % 32 < 2 ? t : t - 2);
    if (t % 64 < 32) { // the two halves take different branches
        out[t] += __shfl_xor(t, 1, 32) == (t ^ 1);
        out[t] += (unsigned) (__ballot(true) >> (__lane_id() & 32)) == ~0u;
    } else {
        out[t] += (unsigned) (__ballot(true) >> (__lane_id() & 32)) == ~0u;
        out[t] += 1;
    }
}
__global__ void shared() {
    __shared__ int sum[4];
    if (threadIdx.x < 4) {
        sum[threadIdx.x] = blockIdx.x;
    }
    __syncthreads();
    out[threadIdx.x] = sum[threadIdx.x % 4] + blockIdx.y;
}
__global__ void absent() {
    if (threadIdx.x % 32 != 3) {
        out[threadIdx.x] = __shfl(1, 3, 32);
    }
}
__global__ void divergent() {
    if (threadIdx.x < 32) {
        __syncthreads();
    } else {
        __syncthreads();
    }
}
__global__ void behind(char * at) {
    at[8] = 1;
}
int main(int, char ** argv) {
    const char what = argv[1][0];
    if (what == 'l') {
        shim::launch(lanes, dim3(1), dim3(128), none, sizeof none, 0);
        for (int i = 0; i < 128; i++) {
            if (out[i] != 6) return 1;
        }
    } else if (what == 's') {
        shim::launch(shared, dim3(3, 2), dim3(40), none, sizeof none, 0);
        for (int i = 0; i < 40; i++) {
            if (out[i] != 3) return 1;
        }
    } else if (what == 'a') {
        shim::launch(absent, dim3(1), dim3(32), none, sizeof none, 0);
    } else if (what == 'd') {
        shim::launch(divergent, dim3(1), dim3(64), none, sizeof none, 0);
    } else if (what == 'b') {
        shim::launch(behind, dim3(1), dim3(1), none, sizeof none, 8, none);
    } else { // halves: every one to float and back, and roundings half way
        for (unsigned h = 0; h < 0x7c00; h++) {
            const float f = shim_half_to_float((unsigned short) h), g = shim_half_to_float((unsigned short) (h + 1));
            if (shim_float_to_half(f) != h || shim_float_to_half(-f) != (h | 0x8000)) return 1;
            if (h + 1 < 0x7c00 && shim_float_to_half((f + g) / 2) != h + (h & 1)) return 1;
        }
        return shim_float_to_half(65520.0f) != 0x7c00 || shim_float_to_half(65519.0f) != 0x7bff;
    }
    return 0;
}
"""


@pytest.fixture(scope="module", params=[32, 64])
def program(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, host_compiler: list[str]
) -> Path:
    directory = tmp_path_factory.mktemp("shim")
    (directory / "test.cpp").write_text(SOURCE)
    flags = ["-std=c++17", "-O1", "-Wno-unused-result", "-U_FORTIFY_SOURCE", f"-DSHIM_WAVE={request.param}"]
    flags += ["-I", str(HERE)]
    subprocess.run(
        [*host_compiler, *flags, str(directory / "test.cpp"), "-o", str(directory / "test")], check=True
    )
    return directory / "test"


def code(program: Path, what: str) -> tuple[int, str]:
    done = subprocess.run([program, what], capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


@pytest.mark.parametrize("what", ["lanes", "shared", "halves"])
def test_right(program: Path, what: str) -> None:
    assert code(program, what) == (0, "")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("absent", "does not take part"),
        ("divergent", "different barriers"),
        ("behind", "behind its shared memory"),
    ],
)
def test_undefined_behaviour_ends_the_program(program: Path, what: str, message: str) -> None:
    status, text = code(program, what)
    assert status == 3 and message in text
