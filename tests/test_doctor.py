"""The doctor: what it says about a healthy and an ill machine, and that its self-tests can fail."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from pytq import doctor, paths
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
