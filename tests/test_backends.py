"""The parity table: complete, and taken from the tables that the backends use."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest

from pytq import backends
from pytq.codec.table import load_types
from pytq.errors import PytqError

ROOT = Path(__file__).resolve().parents[1]


def test_page_is_fresh() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tools/gen_backends.py", "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_every_type_has_a_row_for_every_operation_and_backend() -> None:
    rows = list(backends.rows())
    types = {(row.family, row.head_dim) for row in load_types()}
    for op in ("SET_ROWS", "GET_ROWS", "CPY"):
        assert {(row.k, row.head_dim) for row in rows if row.op == op} == types
    for op in ("FLASH_ATTN_EXT, decode", "FLASH_ATTN_EXT, prefill"):
        pairs = {(row.k, row.v, row.head_dim) for row in rows if row.op == op}
        assert pairs >= {
            (k, v, dim) for (k, dim), (v, other) in itertools.product(types, types) if dim == other
        }
    kinds = {backends.FUSED, backends.GENERIC, backends.REFUSED}
    assert all(tuple(row.kinds) == backends.BACKENDS and set(row.kinds.values()) <= kinds for row in rows)


def test_nothing_is_refused_that_a_type_needs() -> None:
    assert backends.gaps() == []


def test_the_tables_are_what_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    real = backends._text

    def without(name: str) -> str:
        lines = (
            line
            for line in real(name).splitlines()
            if "PORTABLE(192)" not in line and "(GET_ROWS" not in line
        )
        return "\n".join(lines)

    monkeypatch.setattr(backends, "_text", without)
    gaps = backends.gaps()
    assert {row.head_dim for row in gaps if row.op.startswith("FLASH")} == {192}
    assert {
        backend
        for row in gaps
        if row.op.startswith("FLASH")
        for backend in row.kinds
        if row.kinds[backend] == "refused"
    } == {"hip"}
    assert {row.op for row in gaps if not row.op.startswith("FLASH")} == {"GET_ROWS"}


def test_a_partial_row_is_not_read_as_a_whole_one(monkeypatch: pytest.MonkeyPatch) -> None:
    real = backends._text
    monkeypatch.setattr(backends, "_text", lambda name: real(name).replace("(CPY, ALL,", "(CPY, KV,"))
    with pytest.raises(PytqError, match="CPY covers KV"):
        list(backends.rows())


def test_claims_name_files_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    backends.check_files()
    monkeypatch.setattr(backends, "CHECKS", (backends.Check("hip", "compiled", "x", "tests/nothing.py"),))
    with pytest.raises(PytqError, match=r"tests/nothing\.py"):
        backends.check_files()
