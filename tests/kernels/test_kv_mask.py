"""The mask row of one token equals upstream's loop over the cells, on random caches of upstream's own class."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
HEADER = ROOT / "csrc" / "ggml" / "pytq-kv-mask.h"
# faults that the comparison has to notice
FAULTS = {
    "the token itself is hidden": ("at <= pos", "at < pos"),
    "empty cells are seen": ("(Pos) INT_MAX", "(Pos) 0"),
    "cells of others are seen": ("cells.get_used() != cells.seq_pos_get(seq).size()", "false"),
    "other sequences are not noticed": ("!= cells.seq_pos_get(seq).size()", "< cells.seq_pos_get(seq).size()"),
    "one cell too few": ("j < (uint32_t) n_kv", "j + 1 < (uint32_t) n_kv"),
    "one cell too many": ("j < (uint32_t) n_kv", "j < (uint32_t) n_kv + (n_kv < cells.size())"),
    "the row is touched before it is refused": ("        return false;", "        row[0] = drop;\n        return false;"),
}  # fmt: skip


def run(source: Path, include: Path, work: Path, *flags: str) -> dict[str, int]:
    """Counts that kv_mask.cpp prints, with the header found in ``include``."""
    gxx = shutil.which("g++") or shutil.which("clang++")
    if gxx is None:
        pytest.skip("no C++ compiler")
    program = work / "kv_mask"
    command = [gxx, "-std=c++17", "-O1", "-Wall", *flags, "-I", str(include)]
    command += [f"-I{source / part}" for part in ("src", "include", "ggml/include")]
    subprocess.run([*command, str(Path(__file__).with_name("kv_mask.cpp")), "-o", str(program)], check=True)
    words = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout.split()
    return dict(zip(words[::2], map(int, words[1::2]), strict=True))


@pytest.mark.parametrize("flag", ["-DNDEBUG", "-UNDEBUG"])
def test_rows_are_upstreams(flag: str, llama_source: Path, tmp_path: Path) -> None:
    """Without NDEBUG upstream's cells check that no question is asked that a cell cannot answer."""
    counts = run(llama_source, HEADER.parent, tmp_path, flag)
    assert counts.pop("wrong") == 0
    # every kind of cache was among them
    assert all(count > 100 for count in counts.values()), counts


@pytest.mark.parametrize("fault", list(FAULTS))
def test_faults_are_noticed(fault: str, llama_source: Path, tmp_path: Path) -> None:
    old, new = FAULTS[fault]
    text = HEADER.read_text()
    assert text.count(old) == 1
    (tmp_path / HEADER.name).write_text(text.replace(old, new))
    assert run(llama_source, tmp_path, tmp_path, "-DNDEBUG", "-Wno-sign-compare")["wrong"] > 0
