"""`pytq build --backend hip` as far as it goes without ROCm: the configure step against an installation that is none."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import fetch_hip
import hip_objects
import pytest
import rocm

from pytq import build, paths
from pytq.errors import PytqError


@pytest.fixture
def installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stub ROCm, the only one in PATH."""
    root = tmp_path / "rocm"
    toolchain = fetch_hip.location()
    programs = rocm.install(root, toolchain, toolchain / fetch_hip.BITCODE)
    monkeypatch.setenv("PATH", str(programs), prepend=":")
    monkeypatch.delenv("ROCM_PATH", raising=False)
    monkeypatch.delenv("HIPCXX", raising=False)
    return root


def test_a_whole_installation_is_accepted(installation: Path) -> None:
    assert build.find_tools("hip").cmake


@pytest.mark.parametrize("package", build.ROCM_PACKAGES)
def test_a_missing_package_is_named(installation: Path, package: str) -> None:
    shutil.rmtree(installation / "lib" / "cmake" / package)
    with pytest.raises(PytqError, match=f"lacks {package} "):
        build.find_tools("hip")


def test_an_old_hip_is_refused(installation: Path) -> None:
    text = (installation / "bin" / "hipconfig").read_text()
    (installation / "bin" / "hipconfig").write_text(text.replace(rocm.VERSION, "6.0.32830"))
    with pytest.raises(PytqError, match=r"HIP 6\.0: llama.cpp needs 6\.1"):
        build.find_tools("hip")


def test_no_rocm_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("cmake", "ninja", "git", "cc", "c++"):
        found = shutil.which(name)
        if found:
            (tmp_path / name).symlink_to(found)
    monkeypatch.setenv("PATH", str(tmp_path))
    if any(shutil.which(name) is None for name in ("git", "cc", "c++")):
        pytest.skip("this machine builds nothing")
    monkeypatch.setattr(build, "_wheel_program", lambda name: name)
    with pytest.raises(PytqError, match="no hipconfig found in PATH: install ROCm"):
        build.find_tools("hip")


class Configured(Exception):
    """The build is stopped where the compiler would be called."""


@pytest.mark.slow
def test_configure(
    installation: Path, hip: Path, llama_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    (home / "downloads").mkdir(parents=True)
    for archive in (paths.home() / "downloads").glob("*"):
        (home / "downloads" / archive.name).symlink_to(archive)
    monkeypatch.setenv("PYTQ_HOME", str(home))

    def stop(*_: object) -> None:
        raise Configured

    monkeypatch.setattr(build, "_compile", stop)
    with pytest.raises(Configured):
        build.build("patched", "hip", defines=["GPU_TARGETS=gfx1100;gfx90a"])
    (work,) = (home / "work").glob("hip-*")
    ninja = (work / "build" / "build.ninja").read_text()
    for name in [*(source.name for source in hip_objects.sources()), "ggml-cuda.cu", "mmvq.cu"]:
        pattern = rf"^build \S*/ggml-hip\.dir/\S*/{re.escape(name)}\.o: HIP_COMPILER\S* [\s\S]*?\n\n"
        rule = re.search(pattern, ninja, re.MULTILINE)
        assert rule, f"{name} is not compiled as HIP code of ggml-hip"
        assert "GGML_USE_HIP" in rule[0] and f"-I{paths.source_root() / 'csrc'}" in rule[0]
        assert "--offload-arch=gfx1100" in rule[0] and "--offload-arch=gfx90a" in rule[0]
    # upstream's other files are compiled as in a stock build, so their objects are shared
    assert not re.search(rf"ggml-cuda/argmax\.cu\.o: [^:]*-I{re.escape(str(paths.source_root()))}", ninja)
    # NVIDIA's tensor-core kernels stay out
    assert not re.search(r"ggml-hip\.dir/\S*pytq-cuda-(decode|side|slice)", ninja)
