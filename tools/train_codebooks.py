#!/usr/bin/env python3
"""Write csrc/codebooks.def: Lloyd-Max levels (scalar code) and trained trellis levels, both as int8 tables.

usage: tools/train_codebooks.py [--check] [--samples N] [--iterations N]

The scalar levels solve the Lloyd-Max conditions for N(0, 1) exactly (Max, IRE Trans. IT-6, 1960). The trellis levels are
trained like a vector quantiser: assign Gaussian samples by the encoder's own Viterbi search, move each level to the mean of its
samples, repeat (generalised Lloyd, Marcellin and Fischer 1990, section IV), with the mirror symmetry of the source enforced.
Each table is then rounded to int8 with the step that loses least.
"""

import argparse
import ctypes
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from scipy.stats import norm

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "csrc" / "codebooks.def"


def lloyd_max(bits: int) -> np.ndarray:
    """Levels of the optimal scalar quantiser of N(0, 1) with 2**bits levels."""
    n = 2**bits
    x = norm.ppf((np.arange(n) + 0.5) / n)
    for _ in range(200_000):
        edges = np.concatenate([[-np.inf], (x[1:] + x[:-1]) / 2, [np.inf]])
        new = (norm.pdf(edges[:-1]) - norm.pdf(edges[1:])) / np.diff(norm.cdf(edges))
        if np.abs(new - x).max() < 1e-14:
            break
        x = new
    return (x - x[::-1]) / 2


def to_int8(levels: np.ndarray, weight: np.ndarray) -> tuple[float, np.ndarray]:
    """The step and int8 levels that lose least in weighted squared error."""
    best = None
    for top in np.arange(96, 127.49, 0.01):
        step = levels.max() / top
        k = np.rint(levels / step)
        err = float((weight * (k * step - levels) ** 2).sum())
        if len(set(k)) == len(k) and (best is None or err < best[0]):
            best = (err, float(np.float32(step)), k.astype(int))
    assert best is not None
    return best[1], best[2]


class Viterbi:
    """The reference search of csrc/ref through ctypes."""

    def __init__(self) -> None:
        self.tmp = tempfile.TemporaryDirectory()
        lib = Path(self.tmp.name) / "ref.so"
        stub = Path(self.tmp.name) / "stub.c"
        stub.write_text(
            '#include "pytq.h"\n'
            "const pytq_codebook *pytq_codebook_get(enum pytq_code c, int b) { (void) c; (void) b; return 0; }\n"
        )
        flags = ["-O3", "-march=native", "-ffp-contract=off", "-shared", "-fPIC", f"-I{ROOT}/csrc"]
        subprocess.run(
            ["gcc", *flags, str(ROOT / "csrc/ref/codec.c"), str(stub), "-o", str(lib), "-lm"], check=True
        )
        self.fn = ctypes.CDLL(str(lib)).pytq_viterbi_ref
        self.fn.restype = ctypes.c_float

    def __call__(self, x: np.ndarray, levels: np.ndarray) -> np.ndarray:
        levels = np.ascontiguousarray(levels, np.float32)
        out = np.empty(x.shape, np.uint8)
        table = levels.ctypes.data_as(ctypes.c_void_p)
        for row, dst in zip(x, out, strict=True):
            y, index = row.ctypes.data_as(ctypes.c_void_p), dst.ctypes.data_as(ctypes.c_void_p)
            self.fn(y, None, row.size, table, levels.size // 4, index)
        return out


def train(bits: int, vit: Viterbi, samples: int, iterations: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Trellis levels for one rate: (levels, share of each, mean squared error)."""
    n = 2 ** (bits + 1)
    rng = np.random.default_rng(bits)
    x = rng.standard_normal((samples // 256, 256)).astype(np.float32)
    levels = lloyd_max(bits + 1) if n > 2 else np.array([-1.0, 1.0])
    err, share = 0.0, np.ones(n)
    for _ in range(iterations):
        k = vit(x, levels)
        count = np.bincount(k.ravel(), minlength=n)
        total = np.bincount(k.ravel(), weights=x.ravel(), minlength=n)
        err = float(((x - levels[k]) ** 2).mean())
        mean = np.where(count > 0, total / np.maximum(count, 1), levels)
        share = (count + count[::-1]) / 2
        levels = np.sort((mean - mean[::-1]) / 2)
    return levels, share, err


def render(samples: int, iterations: int) -> str:
    lines = [
        "// Codebooks, written by tools/train_codebooks.py: do not edit.",
        "// PYTQ_CODEBOOK(code, bits, n_levels, step, levels...): value = scale * step * level, levels ascending.",
        "#ifndef PYTQ_CODEBOOK",
        "#define PYTQ_CODEBOOK(code, bits, n_levels, step, ...)",
        "#endif",
        "",
    ]

    def row(code: str, bits: int, step: float, k: np.ndarray) -> None:
        lines.append(
            f"PYTQ_CODEBOOK({code}, {bits}, {len(k)}, {step.hex()}f, " + ", ".join(map(str, k)) + ")"
        )

    for bits in range(1, 6):
        x = lloyd_max(bits)
        edges = np.concatenate([[-np.inf], (x[1:] + x[:-1]) / 2, [np.inf]])
        row("SCALAR", bits, *to_int8(x, np.diff(norm.cdf(edges))))
    vit = Viterbi()
    for bits in range(1, 6):
        x, share, err = train(bits, vit, samples, iterations)
        print(f"trellis {bits} bits: mse {err:.5f}", file=sys.stderr)
        row("TRELLIS", bits, *to_int8(x, share))
    return "\n".join([*lines, "", "#undef PYTQ_CODEBOOK", ""])


def main() -> int:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument(
        "--check", action="store_true", help="compare with the checked-in file instead of writing it"
    )
    ap.add_argument("--samples", type=int, default=2_000_000)
    ap.add_argument("--iterations", type=int, default=25)
    a = ap.parse_args()
    text = render(a.samples, a.iterations)
    if a.check:
        same = OUT.read_text() == text
        print(
            "codebooks.def is up to date" if same else "codebooks.def differs: run tools/train_codebooks.py"
        )
        return 0 if same else 1
    OUT.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
