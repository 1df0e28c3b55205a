"""Every CPU tier against the reference: natively, and in qemu for CPUs this machine is not.

The program compares encoder and decoder to the bit and attention to a double precision sum, for every type, head size
and odd lengths (tests/kernels/cpu_selftest.cpp). A tier the machine lacks is skipped by name.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# the scalar tier is the same C++ natively, where all types are tested: an emulator shows that it is reached
EMULATED = {"scalar": ["--quick", "--every", "5"], "avx2": ["--quick"], "neon": ["--quick"]}
TIER_MISSING = 2  # exit code of the program when a tier named on its command line is not available


def build(cc: str, cxx: str, out: Path, *extra: str) -> Path:
    """Compiles csrc/ref, csrc/cpu and the program; returns its path."""
    if not shutil.which(cc) or not shutil.which(cxx):
        pytest.skip(f"{cxx} is not installed")
    objects = []
    jobs = []
    for source in sorted(
        [*ROOT.glob("csrc/ref/*.c"), *ROOT.glob("csrc/cpu/*.c*"), ROOT / "tests/kernels/cpu_selftest.cpp"]
    ):
        target = out / (source.name + ".o")
        objects.append(str(target))
        compiler = [cc, "-std=c11"] if source.suffix == ".c" else [cxx, "-std=c++17", "-Wno-psabi"]
        command = [
            *compiler,
            "-O2",
            "-ffp-contract=off",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-Icsrc",
            "-c",
            str(source),
            "-o",
            str(target),
        ]
        jobs.append(subprocess.Popen(command, cwd=ROOT))
        if len(jobs) == (os.cpu_count() or 1):
            assert all(job.wait() == 0 for job in jobs)
            jobs.clear()
    assert all(job.wait() == 0 for job in jobs)
    program = out / "cpu_selftest"
    subprocess.run([cxx, *extra, *objects, "-o", str(program), "-lm"], check=True)
    return program


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("gcc", "g++", tmp_path_factory.mktemp("native"))


@pytest.fixture(scope="module")
def arm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("aarch64-linux-gnu-gcc", "aarch64-linux-gnu-g++", tmp_path_factory.mktemp("arm"), "-static")


def check(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == TIER_MISSING:
        pytest.skip(done.stdout.strip().splitlines()[-1])
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 failures" in done.stdout


@pytest.mark.parametrize("tier", ["scalar", "avx2", "avx512", "neon"])
def test_native(native: Path, tier: str) -> None:
    check([str(native), tier])


@pytest.mark.parametrize("tier", ["scalar", "avx2"])
def test_haswell(native: Path, tier: str) -> None:
    """A CPU without AVX-512: its instructions must not be reached, by dispatch or by the compiler."""
    if not shutil.which("qemu-x86_64-static") or os.uname().machine != "x86_64":
        pytest.skip("qemu-x86_64-static on x86-64 is needed")
    check(["qemu-x86_64-static", "-cpu", "Haswell", str(native), *EMULATED[tier], tier])


def test_haswell_has_no_avx512(native: Path) -> None:
    if not shutil.which("qemu-x86_64-static") or os.uname().machine != "x86_64":
        pytest.skip("qemu-x86_64-static on x86-64 is needed")
    done = subprocess.run(
        ["qemu-x86_64-static", "-cpu", "Haswell", str(native), "--quick", "avx512"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == TIER_MISSING


@pytest.mark.parametrize(("cpu", "tier"), [("cortex-a76", "neon"), ("cortex-a57", "scalar")])
def test_arm(arm: Path, cpu: str, tier: str) -> None:
    if not shutil.which("qemu-aarch64-static"):
        pytest.skip("qemu-aarch64-static is needed")
    check(["qemu-aarch64-static", "-cpu", cpu, str(arm), *EMULATED[tier], tier])


def test_cortex_a57_has_no_dot_product(arm: Path) -> None:
    if not shutil.which("qemu-aarch64-static"):
        pytest.skip("qemu-aarch64-static is needed")
    done = subprocess.run(
        ["qemu-aarch64-static", "-cpu", "cortex-a57", str(arm), "--quick", "neon"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == TIER_MISSING
