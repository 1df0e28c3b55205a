"""The doctor: what it says about a healthy and an ill machine, and that its self-tests can fail."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from pytq import doctor, ffi, paths
from pytq.build import source_key
from pytq.cli import main
from pytq.codec.block import encode
from pytq.codec.table import find_type, load_types
from pytq.doctor import FAIL, OK, WARN, Finding


def level(findings: list[Finding], name: str) -> str:
    return next(f.level for f in findings if f.name == name)


def test_golden_file_is_what_the_reference_encodes() -> None:
    want = json.loads(doctor.GOLDEN.read_text())
    assert list(want) == [row.name for row in load_types()]
    for row in load_types():
        if row.head_dim in (64, 96):  # all sizes are tools/gen_golden.py --check
            assert doctor.digest(encode(row, doctor.golden_vectors(row.head_dim)).tobytes()) == want[row.name]


def test_golden_vectors_never_change() -> None:
    x = doctor.golden_vectors(64)
    assert x.shape == (doctor.GOLDEN_VECTORS, 64) and x.dtype == np.float32
    assert (x * 4096 == np.round(x * 4096)).all(), "exact in binary"
    assert abs(float(x.mean())) < 0.1 and 0.7 < float(x.std()) < 1.3


def test_encoders_pass_here() -> None:
    assert level(doctor.check_golden(), "encoders") == OK


def test_wrong_bytes_are_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = json.loads(doctor.GOLDEN.read_text()) | {"kv3_d128": "0" * 32}
    (tmp_path / "golden.json").write_text(json.dumps(wrong))
    monkeypatch.setattr(doctor, "GOLDEN", tmp_path / "golden.json")
    finding = doctor.check_golden()[0]
    assert finding.level == FAIL and "kv3_d128" in finding.found and finding.do


def test_attention_of_every_tier() -> None:
    findings = doctor.check_attention()
    assert len(findings) >= 1 and findings[0].name == "attention scalar"
    assert all(f.level == OK for f in findings), findings


def test_attention_error_sees_a_wrong_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    row = find_type("kv4", 128)
    assert doctor.attention_error(row, row) < doctor.ATTENTION_BOUND
    real = doctor._dequantize
    monkeypatch.setattr(doctor, "_dequantize", lambda r, b, n: real(r, b, n)[::-1].copy())
    assert doctor.attention_error(row, row) > 10 * doctor.ATTENTION_BOUND


def test_missing_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTQ_HOME", str(tmp_path))
    for kind in paths.KINDS:
        monkeypatch.delenv(f"PYTQ_{kind.upper()}_BUILD", raising=False)
    findings = doctor.check_builds()
    assert level(findings, "patched build") == FAIL and level(findings, "stock build") == WARN
    assert all("pytq build" in f.do for f in findings)


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    finding = doctor.check_tools()[0]
    assert finding.level == FAIL and finding.do


class OldExtension:
    """The compiled library before a type was added to the table."""

    def __init__(self, lib: object) -> None:
        self.lib = lib

    def __getattr__(self, name: str) -> object:
        return getattr(self.lib, name)

    def pytq_type_get(self, identifier: int) -> object:
        known = identifier != find_type("kv5", 64).id
        return self.lib.pytq_type_get(identifier) if known else ffi.ffi().NULL  # type: ignore[attr-defined]


def test_a_stale_extension_is_a_problem_and_no_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    old = OldExtension(ffi.lib())
    monkeypatch.setattr(ffi, "lib", lambda: old)
    finding = doctor.check_extension()[0]
    assert finding.level == FAIL and "kv5_d64" in finding.found and "rebuild" in finding.do
    assert doctor.check_golden() == doctor.check_attention() == []


def test_named_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an environment variable names is used unchecked, so the doctor says whether it fits."""
    (tmp_path / "bin").mkdir()
    for name in ("llama-bench", paths.library_name()):
        (tmp_path / "bin" / name).touch()
    monkeypatch.setenv("PYTQ_PATCHED_BUILD", str(tmp_path))
    monkeypatch.setenv("PYTQ_STOCK_BUILD", str(tmp_path))
    assert "of your own" in doctor.check_builds()[1].found
    (tmp_path / "build.json").write_text(json.dumps({"source_key": "other"}))
    finding = doctor.check_builds()[1]
    assert finding.level == WARN and "another pin or series" in finding.found and finding.do
    (tmp_path / "build.json").write_text(json.dumps({"source_key": source_key("patched", "cpu")}))
    assert doctor.check_builds()[1].level == OK


def test_an_outdated_gpu_build_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTQ_HOME", str(tmp_path))
    monkeypatch.delenv("PYTQ_PATCHED_BUILD", raising=False)
    (tmp_path / "builds" / "patched-cuda-0").mkdir(parents=True)
    assert level(doctor.check_builds(), "patched build, cuda") == WARN


def test_forced_tier_is_mentioned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTQ_CPU_CAPS", "scalar")
    assert "PYTQ_CPU_CAPS" in doctor.check_extension()[0].found


def test_a_broken_check_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def check_python() -> list[Finding]:
        raise RuntimeError("boom\nand more")

    monkeypatch.setattr(doctor, "check_python", check_python)
    finding = doctor.run()[0]
    assert (finding.name, finding.level, finding.found) == ("python", FAIL, "RuntimeError: boom and more")


@pytest.mark.parametrize(("levels", "code"), [([], 0), ([OK], 0), ([OK, WARN], 1), ([WARN, FAIL, OK], 2)])
def test_exit_code_by_severity(levels: list[str], code: int) -> None:
    assert doctor.exit_code([Finding("x", value, "", "") for value in levels]) == code


def test_command(monkeypatch: pytest.MonkeyPatch) -> None:
    findings = [Finding("a", OK, "fine", "w"), Finding("b", WARN, "odd", "matters", "fix it")]
    monkeypatch.setattr(doctor, "run", lambda full: findings)
    done = CliRunner().invoke(main, ["doctor"])
    assert done.exit_code == 1
    assert "b: odd" in done.stdout and "why: matters" in done.stdout and "do:  fix it" in done.stdout
    done = CliRunner().invoke(main, ["doctor", "--json"])
    assert done.exit_code == 1 and json.loads(done.stdout)["findings"][1]["do"] == "fix it"


@pytest.mark.slow
def test_full_on_this_machine(patched: object, stock: object) -> None:
    findings = doctor.run(full=True)
    assert [f for f in findings if f.level == FAIL] == []
    assert sum(f.name.startswith("flash attention") for f in findings) == 6


@pytest.mark.slow
def test_short_run_of_flash_attention(
    patched: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without --full two types run, nothing is fetched, and a build that cannot run is a problem."""
    findings = doctor.check_runs()
    assert [(f.name, f.level) for f in findings] == [("flash attention d128", OK)]
    for name in ("llama-bench", paths.library_name()):
        (tmp_path / name).write_text("#!/bin/sh\necho broken >&2; exit 1\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PYTQ_PATCHED_BUILD", str(tmp_path))
    assert [f.level for f in doctor.check_runs()] == [FAIL]
