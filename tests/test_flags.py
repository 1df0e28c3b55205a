"""Every program of the patched build takes the new cache types and lists them."""

from __future__ import annotations

import subprocess

import pytest

from pytq.codec import table
from pytq.paths import BuildDir

pytestmark = pytest.mark.slow

PROGRAMS = ("llama-cli", "llama-completion", "llama-server", "llama-perplexity", "llama-batched-bench")


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, stdin=subprocess.DEVNULL)


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_lists_the_types(program: str, patched: BuildDir) -> None:
    done = run(patched.bin / program, "--help")
    for name in (*table.flags(), *table.PATCHED_ONLY):
        assert name in done.stdout, name


@pytest.mark.parametrize("program", [*PROGRAMS, "llama-bench"])
def test_unknown_type_is_refused(program: str, patched: BuildDir) -> None:
    done = run(patched.bin / program, "-m", "none.gguf", "-ctk", "turbo9")
    assert done.returncode != 0
    if program != "llama-bench":  # llama-bench prints its usage instead
        assert "turbo9" in done.stdout + done.stderr and "turbo3" in done.stdout + done.stderr


def test_llama_bench_takes_every_flag(patched: BuildDir) -> None:
    """A missing model is the complaint, not the types."""
    names = [n for n in table.flags() if n not in table.profile_flags()] + list(table.PATCHED_ONLY)
    done = run(patched.bin / "llama-bench", "-m", "none.gguf", "-ctk", ",".join(names), "-ctv", "kv3")
    assert "none.gguf" in done.stdout + done.stderr
    assert "invalid parameter" not in done.stdout + done.stderr
