"""The command group itself, and the commands that only look."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from pytq.cli import COMMANDS, main
from pytq.codec.table import load_types


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str) -> None:
    module = importlib.import_module(f"pytq.cli.{name.replace('-', '_')}")
    assert isinstance(module.command, click.Command)
    result = CliRunner().invoke(main, [name, "--help"])
    assert result.exit_code == 0 and "Usage:" in result.stdout
    assert module.command.help, "a command without a sentence of help"


def test_help_lists_all_commands() -> None:
    result = CliRunner().invoke(main, ["--help"])
    assert result.exit_code == 0
    for name in COMMANDS:
        assert f"  {name} " in result.stdout


def test_the_group_imports_no_command() -> None:
    """Starting must stay fast: nothing heavy is imported before a command needs it."""
    code = (
        "import sys; from pytq.cli import main\n"
        "heavy = {'numpy', 'scipy', 'matplotlib', 'llama_cpp', 'gguf', 'rich'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_version() -> None:
    import pytq

    assert pytq.__version__ in CliRunner().invoke(main, ["--version"]).stdout


def test_types_agree_with_the_table() -> None:
    data = {row["name"]: row for row in json.loads(CliRunner().invoke(main, ["types", "--json"]).stdout)}
    concrete = [row for row in load_types() if not row.family.endswith("s")]
    assert len(concrete) == 42
    for row in concrete:
        shown = data[row.family]
        assert shown["block_bytes"][str(row.head_dim)] == row.block_bytes
        assert shown["bits_per_value"][str(row.head_dim)] == 8 * row.block_bytes / row.head_dim
        assert "cpu" in shown["backends"] and shown["kernel"]["cpu"]
    # stock formats, counted from their definitions: 32 values and one or two fp16
    assert data["q4_0"]["bits_per_value"]["128"] == 4.5 and data["q8_0"]["bits_per_value"]["128"] == 8.5
    assert data["f16"]["bits_per_value"]["80"] == 16
    assert "80" not in data["q8_0"]["bits_per_value"]
    assert not [name for name in data if name.endswith("s")]
    assert data["auto3"]["source"] == "profile" and not data["auto3"]["bits_per_value"]


def test_types_table_shows_every_type() -> None:
    result = CliRunner().invoke(main, ["types"])
    assert result.exit_code == 0
    for name in ("f16", "q4_0", "iq4_nl", "nvfp4", "turbo2", "turbo3", "turbo4", "kv2", "kv3", "kv4"):
        assert name in result.stdout
