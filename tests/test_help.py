"""The generated command help is up to date and complete."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from pytq.cli import COMMANDS

ROOT = Path(__file__).resolve().parent.parent


def test_help_is_fresh() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tools/gen_help.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_every_command_has_a_section() -> None:
    text = (ROOT / "docs/help.md").read_text(encoding="utf-8")
    for name in COMMANDS:
        if (ROOT / "pytq/cli" / f"{name.replace('-', '_')}.py").exists():
            assert f"## pytq {name}\n" in text
