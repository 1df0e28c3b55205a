#!/usr/bin/env python3
"""Fetches a compiler for AMD GPUs without installing anything: clang 19, lld, llvm tools, ROCm's device code and headers.

usage: python tools/fetch_hip.py [--force]

Debian packages are downloaded by apt from the mirrors that this machine is set up for, and unpacked with `dpkg -x` into
PYTQ_HOME/toolchains/hip; no root, no change to the system. clang comes from the machine's own suite, ROCm's device
libraries from a newer one (ROCM_SUITE). Those know GPUs up to gfx1103; the one constant that names a newer one (NEWER) is
added here. Code objects can be compiled and inspected with it; running them needs a GPU and ROCm.

Exit code 0: it is there (its directory is printed), 1: it cannot be had here (the reason on stderr), 2: a broken package.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from pytq import paths

CLANG = ("clang-19", "clang-tools-19", "lld-19", "llvm-19")
ROCM = ("rocm-device-libs-17", "libamdhip64-dev", "libhipblas-dev", "libhsa-runtime-dev")
ROCM_SUITE = "trixie"
PROGRAMS = ("clang++", "clang-offload-bundler", "llvm-readelf", "llvm-objdump", "ld.lld")
# GPUs newer than the packaged device libraries: number and the constant that device code reads
NEWER = {"1200": 12000, "1201": 12001}
ISA_VERSION = """target triple = "amdgcn-amd-amdhsa"
@__oclc_ISA_version = linkonce_odr hidden local_unnamed_addr addrspace(4) constant i32 {value}, align 4
"""
BITCODE = "usr/lib/llvm-17/lib/clang/17/amdgcn/bitcode"
# unpacked programs find their libraries through this; nothing of the machine is replaced
WRAPPER = """#!/bin/sh
root=$(cd "$(dirname "$0")/.." && pwd)
LD_LIBRARY_PATH="$root/usr/lib/llvm-19/lib:$root/usr/lib/{triple}${{LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}}"
export LD_LIBRARY_PATH
exec "$root/usr/lib/llvm-19/bin/{name}" "$@"
"""


class Unavailable(Exception):
    """The packages cannot be had on this machine."""


def location() -> Path:
    """Where the toolchain is or will be; `bin/` in it holds the programs."""
    return paths.home() / "toolchains" / "hip"


def complete() -> bool:
    """Whether every program is there; an older toolchain may lack some."""
    return all((location() / "bin" / name).exists() for name in PROGRAMS)


def run(*command: str, **options: object) -> str:
    """Output of a command; Unavailable with its last line of complaint when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    if done.returncode != 0:
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        raise Unavailable(f"{' '.join(command[:2])}: {lines[-1] if lines else 'failed'}")
    return str(done.stdout)


def own_lists(work: Path, name: str, *more: str) -> list[str]:
    """apt options for package lists and a cache of our own in ``work``; brings the lists up to date."""
    for directory in ("lists/partial", "cache/archives/partial"):
        (work / name / directory).mkdir(parents=True)
    settings = [f"Dir::State::lists={work / name / 'lists'}", f"Dir::Cache={work / name / 'cache'}"]
    settings += ["APT::Sandbox::User=", "Debug::NoLocking=1", *more]
    options = [word for setting in settings for word in ("-o", setting)]
    run("apt-get", *options, "update")
    return options


def mirror(options: list[str]) -> str:
    """The Debian mirror of the machine's own apt configuration."""
    for line in run("apt-get", *options, "indextargets", "--format", "$(REPO_URI) $(ORIGIN)").splitlines():
        uri, _, origin = line.partition(" ")
        if origin == "Debian" and not uri.rstrip("/").endswith("security"):
            return uri
    raise Unavailable("apt knows no Debian mirror here")


def download_clang(options: list[str], packages: Path) -> None:
    """Downloads CLANG and what it needs beyond the packages that the machine has."""
    # nothing is installed: apt prints the plan, and only the packages of the plan are downloaded
    plan = run("apt-get", *options, "install", "--no-install-recommends", "-y", "-s", *CLANG)
    names = {line.split()[1] for line in plan.splitlines() if line.startswith("Inst ")} | set(CLANG)
    run("apt-get", *options, "download", *sorted(names), cwd=packages)


def download_rocm(work: Path, uri: str, packages: Path) -> None:
    """Downloads ROCM from ROCM_SUITE."""
    sources, status = work / "sources.list", work / "status"
    sources.write_text(f"deb {uri} {ROCM_SUITE} main\n")
    status.touch()
    options = own_lists(
        work,
        "rocm",
        f"Dir::Etc::sourcelist={sources}",
        "Dir::Etc::sourceparts=/dev/null",
        f"Dir::State::status={status}",
    )
    run("apt-get", *options, "download", *ROCM, cwd=packages)


def fetch() -> Path:
    """Downloads, unpacks and renames into place.

    Raises:
        Unavailable: no apt, no dpkg, no network, no such package.
        RuntimeError: the unpacked compiler does not run.
    """
    for program in ("apt-get", "dpkg"):
        if shutil.which(program) is None:
            raise Unavailable(f"no {program} on this machine")
    target = location()
    paths.writable(target.parent)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".tmp-") as directory:
        work, root = Path(directory) / "work", Path(directory) / "root"
        packages = work / "packages"
        packages.mkdir(parents=True)
        options = own_lists(work, "host")
        download_clang(options, packages)
        download_rocm(work, mirror(options), packages)
        for package in sorted(packages.glob("*.deb")):
            run("dpkg", "-x", str(package), str(root))
        triple = run(
            str(shutil.which("dpkg-architecture") or "dpkg-architecture"), "-qDEB_HOST_MULTIARCH"
        ).strip()
        (root / "bin").mkdir()
        for name in PROGRAMS:
            wrapper = root / "bin" / name
            wrapper.write_text(WRAPPER.format(name=name, triple=triple))
            wrapper.chmod(0o755)
        add_newer(root, work)
        check(root)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(root, target)
    return target


def add_newer(root: Path, work: Path) -> None:
    """Writes the ISA constants of NEWER that the packages lack."""
    for gpu, value in NEWER.items():
        target = root / BITCODE / f"oclc_isa_version_{gpu}.bc"
        if not target.exists():
            source = work / f"{gpu}.ll"
            source.write_text(ISA_VERSION.format(value=value))
            run(str(root / "bin" / "clang++"), "-x", "ir", "-emit-llvm", "-c", str(source), "-o", str(target))


def check(root: Path) -> None:
    """The compiler runs and the device code is there."""
    for name in ("ocml.bc", "ockl.bc", "oclc_isa_version_942.bc", "oclc_abi_version_500.bc"):
        if not (root / BITCODE / name).exists():
            raise RuntimeError(f"{ROCM[0]} of {ROCM_SUITE} holds no {name}")
    for name in ("clang++", "llvm-readelf"):
        done = subprocess.run([root / "bin" / name, "--version"], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"unpacked {name} does not run: {done.stderr.strip().splitlines()[-1]}")


def main(arguments: list[str]) -> int:
    if not set(arguments) <= {"--force"}:
        print(__doc__, file=sys.stderr)
        return 2
    target = location()
    try:
        if "--force" in arguments or not complete():
            fetch()
    except Unavailable as reason:
        print(f"no HIP toolchain: {reason}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
