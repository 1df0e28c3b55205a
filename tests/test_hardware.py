"""The report that owners of a GPU send back: right from what programs print, whole when something is missing, no home paths."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from pytq import doctor, hardware, paths
from pytq.cli import main
from pytq.doctor import OK, WARN, Finding
from pytq.errors import PytqError
from pytq.paths import BuildDir

BENCH = """#!/bin/sh
case "$*" in
    *--list-devices*) echo 'Available devices:'; echo '  ROCm0: a GPU (24560 MiB)'; exit 0 ;;
    *"-ctk turbo4"*) echo 'error: out of memory' >&2; exit 1 ;;
esac
echo '{"n_prompt": 512, "n_gen": 0, "avg_ts": 100.5, "gpu_info": "a GPU", "model_filename": "secret"}'
echo '{"n_prompt": 0, "n_gen": 32, "avg_ts": 10.25, "gpu_info": "a GPU"}'
"""
OPS = """#!/bin/sh
echo 'Testing 2 devices'
echo "  $3(type=kv3_d64,ne=[64,11,1,1]): \033[1;32mOK\033[0m"
echo "  $3(type=kv4_d64,ne=[64,11,1,1]): not supported [ROCm0]"
test "$3" = CPY && echo "  CPY(type=kv2_d64,ne=[64,11,1,1]): \033[1;31mFAIL\033[0m"
echo '  1/1 tests passed'
"""


@pytest.fixture
def gpu_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BuildDir:
    for name, text in (("llama-bench", BENCH), ("test-backend-ops", OPS)):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    build = BuildDir("patched", "hip", tmp_path, tmp_path / "bin", tmp_path / "lib", {"key": "abc"})

    def find(kind: str, backend: str = "cpu") -> BuildDir:
        if backend != "hip":
            raise PytqError(f"no {backend} build")
        return build

    monkeypatch.setattr(paths, "find_build", find)
    return build


FINDINGS = [Finding("a", OK, f"fine in {Path.home()}/x", "w"), Finding("b", WARN, "odd", "matters", "fix it")]


def test_report(gpu_build: BuildDir) -> None:
    data = hardware.report(FINDINGS)
    assert data["backend"] == "hip" and data["exit_code"] == 1 and len(data["findings"]) == 2
    assert data["build"] == {"key": "abc"}
    assert any("ROCm0" in line for line in data["devices"])
    assert set(data["backend_ops"]) == set(hardware.BACKEND_OPS)
    assert data["backend_ops"]["GET_ROWS"] == {
        "ok": 1,
        "failed": [],
        "not_supported": 1,
        "summary": ["1/1 tests passed"],
    }
    assert data["backend_ops"]["CPY"]["failed"] == ["CPY(type=kv2_d64,ne=[64,11,1,1]): FAIL"]
    rows = data["bench"]
    assert {row["type"] for row in rows} == set(hardware.BENCH_TYPES)
    assert [row for row in rows if row["type"] == "kv4" and row["depth"] == 4096] == [
        {"type": "kv4", "depth": 4096, "n_prompt": 512, "n_gen": 0, "avg_ts": 100.5, "gpu_info": "a GPU"},
        {"type": "kv4", "depth": 4096, "n_prompt": 0, "n_gen": 32, "avg_ts": 10.25, "gpu_info": "a GPU"},
    ]
    assert all("out of memory" in row["error"] for row in rows if row["type"] == "turbo4")


def test_what_is_missing_is_a_section_that_says_so(gpu_build: BuildDir) -> None:
    (gpu_build.bin / "test-backend-ops").unlink()
    data = hardware.report([])
    assert "test-backend-ops" in data["backend_ops"]["error"]
    assert data["bench"] and data["devices"]


def test_the_cpu_build_is_the_last_choice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cpu = BuildDir("patched", "cpu", tmp_path, tmp_path, tmp_path, {})

    def find(kind: str, backend: str = "cpu") -> BuildDir:
        if backend == "cpu":
            return cpu
        raise PytqError("none")

    monkeypatch.setattr(paths, "find_build", find)
    assert hardware.choose_build(None) is cpu
    with pytest.raises(PytqError):
        hardware.choose_build("metal")


def test_command(gpu_build: BuildDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "run", lambda full: FINDINGS)
    target = tmp_path / "report.json"
    done = CliRunner().invoke(main, ["doctor", "--full", "--report", str(target)])
    assert done.exit_code == 1 and "report written" in done.stdout
    text = target.read_text()
    assert json.loads(text)["findings"][0]["found"] == "fine in ~/x"
    assert str(Path.home()) not in text
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("arguments", [["--report", "x.json"], ["--full", "--report", "/nonexistent/x.json"]])
def test_bad_arguments(arguments: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "run", lambda full: [])
    done = CliRunner().invoke(main, ["doctor", *arguments])
    assert done.exit_code == 2 and done.stderr.startswith("error: ")
    assert not list(tmp_path.iterdir())
