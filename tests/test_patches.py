"""The patch tool notices orphans, missing files and headers without reasons."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location(
    "patches_tool", Path(__file__).parents[1] / "tools" / "patches.py"
)
assert spec and spec.loader
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)

PATCH = """From 0
Subject: [PATCH] x

Why: because.
How tested: here.
Can be dropped when: never.

diff --git a/f.txt b/f.txt
--- a/f.txt
+++ b/f.txt
@@ -1 +1,2 @@
 one
+two
"""


@pytest.fixture
def stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tool, "PATCHES", tmp_path)
    (tmp_path / "series").write_text("# order\n0001-x.patch\n")
    (tmp_path / "0001-x.patch").write_text(PATCH)
    return tmp_path


def test_counts_touched_lines(stack: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.touched_lines(stack / "0001-x.patch") == (1, 0)
    assert tool.cmd_stats() == 0
    assert "touched upstream lines: 1 " in capsys.readouterr().out


def test_size_is_bounded(stack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool, "MAX_TOUCHED_LINES", 0)
    with pytest.raises(tool.StackError, match="more than 0"):
        tool.cmd_stats()


def test_orphans_and_missing_files(stack: Path) -> None:
    (stack / "0002-y.patch").write_text(PATCH)
    with pytest.raises(tool.StackError, match="0002-y.patch is not listed"):
        tool.series()
    (stack / "0002-y.patch").unlink()
    (stack / "0001-x.patch").unlink()
    with pytest.raises(tool.StackError, match="0001-x.patch, which does not exist"):
        tool.series()


def test_header_needs_reasons(stack: Path) -> None:
    (stack / "0001-x.patch").write_text(PATCH.replace("How tested: here.\n", ""))
    with pytest.raises(tool.StackError, match="How tested:"):
        tool.cmd_check(None)


def test_patch_that_does_not_apply(stack: Path, tmp_path: Path) -> None:
    source = tmp_path / "upstream"
    source.mkdir()
    (source / "f.txt").write_text("another line\n")
    with pytest.raises(tool.StackError, match="0001-x.patch does not apply"):
        tool.cmd_check(source)
