"""What tools/gpu makes of a trace; the trace itself needs a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

LAYER = Path(__file__).resolve().parents[1] / "tools" / "gpu" / "layer.py"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, LAYER, *map(str, arguments)], capture_output=True, text=True, check=False
    )


def test_layer(tmp_path: Path) -> None:
    """Medians over the layers with the commonest sequence; launches in any order, the last layer open."""
    lines = ["N 0 _Z9attentionIfEvi", "N 1 _ZN12_GLOBAL__N_17productEv"]
    begins = [0, 10_000, 21_000, 40_000]
    for at in reversed(begins):
        lines += [f"K {at} {at + 4_000} 0 4 8 1 512", f"K {at + 3_000} {at + 9_000} 1 2 1 1 32"]
    lines.append("K 31000 32000 1 2 1 1 32")  # the third layer has another sequence
    trace = tmp_path / "trace"
    trace.write_text("\n".join(lines) + "\n")
    done = run(trace, "attention")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "layers": 2,
        "period_us": 10.5,
        "kernels": [
            {"begin_us": 0.0, "end_us": 4.0, "grid": [4, 8, 1], "threads": 512, "kernel": "attention<float>"},
            {"begin_us": 3.0, "end_us": 9.0, "grid": [2, 1, 1], "threads": 32, "kernel": "product"},
        ],
    }


def test_bad_input(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    trace.write_text("N 0 f\nK 0 1 0 1 1 1 32\n")
    for arguments, message in [((trace, "f"), "fewer than two launches of f"), ((), "usage")]:
        done = run(*arguments)
        assert done.returncode == 2
        assert message in done.stderr and len(done.stderr.splitlines()) == 1
