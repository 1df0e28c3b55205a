"""Scalar codebooks of the published codecs: Lloyd-Max levels for N(0,1) and PolarQuant's angle bins.

Sources: Max 1960 and Lloyd 1982 for the fixed point; TurboQuant (arXiv 2504.19874) section 3.1 for its use on the
coordinates of a rotated unit vector, which are close to N(0, 1/d); PolarQuant (arXiv 2502.02617) section 4 for the
angle densities. The solved tables are checked in (``_tables.py`` for Python, ``csrc/codecs/tables.inc`` for C) so that
nothing is solved at run time; ``python -m pytq.codec.lloydmax`` rewrites both and a test fails when they are stale.
"""

from __future__ import annotations

import math
from pathlib import Path
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

MAX_BITS = 8
POLAR_LEVELS = 4
POLAR_BITS = (4, 2, 2, 2)


def _phi(t: float) -> float:
    return math.exp(-0.5 * t * t) / math.sqrt(2.0 * math.pi)


def solve_gaussian(bits: int) -> NDArray[np.float64]:
    """Lloyd-Max levels of N(0,1) with 2**bits levels, ascending, float64 [2**bits].

    Newton's method on level - centroid(cell) = 0 over the positive half (the optimum is symmetric and unique, as
    the Gaussian density is log-concave). Raises ValueError for bits outside 1..8.
    """
    if not 1 <= bits <= MAX_BITS:
        raise ValueError(f"bits must be 1..{MAX_BITS}, not {bits}")
    half = 2 ** (bits - 1)
    # Start from the optimal companding of high-resolution theory: point density ~ p^(1/3), that of N(0, 3).
    node, weight = np.polynomial.legendre.leggauss(32)
    inv = NormalDist(0.0, math.sqrt(3.0)).inv_cdf
    x = np.array([inv(0.5 + (i + 0.5) / (2 * half)) for i in range(half)])
    for _ in range(100):
        edges = [0.0, *((x[1:] + x[:-1]) / 2), math.inf]
        residual = np.empty(half)
        jacobian = np.zeros((half, half))
        for i in range(half):
            a, b = float(edges[i]), float(edges[i + 1])
            fb = 0.0 if math.isinf(b) else _phi(b)
            if math.isinf(b):
                mass = 0.5 * math.erfc(a / math.sqrt(2.0))
                centre = _phi(a) / mass
            else:
                # Quadrature about the midpoint: the closed form loses half its digits in narrow cells.
                offset = 0.5 * (b - a) * node
                density = weight * np.exp(-0.5 * ((a + b) / 2 + offset) ** 2)
                mass = float(density.sum()) * 0.5 * (b - a) / math.sqrt(2.0 * math.pi)
                centre = (a + b) / 2 + float((density * offset).sum() / density.sum())
            residual[i] = x[i] - centre
            jacobian[i, i] += 1.0
            # d centre / d edge = density(edge) * (edge - centre) / mass, each edge halfway between two levels.
            if i > 0:
                slope = _phi(a) * (centre - a) / mass / 2
                jacobian[i, i] -= slope
                jacobian[i, i - 1] -= slope
            if i + 1 < half:
                slope = fb * (b - centre) / mass / 2
                jacobian[i, i] -= slope
                jacobian[i, i + 1] -= slope
        step = np.linalg.solve(jacobian, residual)
        x = x - step
        if np.abs(step).max() < 1e-12:
            break
    else:
        raise ValueError(f"Lloyd-Max did not converge at {bits} bits")
    return np.concatenate([-x[::-1], x])


def solve_polar(level: int) -> NDArray[np.float64]:
    """Four angle centroids of PolarQuant level 2, 3 or 4 in (0, pi/2), ascending, float64 [4].

    The angle at level l has density ~ sin(2 psi)^(2^(l-1) - 1) (PolarQuant, Lemma 2); one-dimensional k-means on it.
    """
    power = 2 ** (level - 1) - 1
    node, weight = np.polynomial.legendre.leggauss(48)

    def centre(a: float, b: float) -> float:
        psi = 0.5 * (b - a) * node + 0.5 * (a + b)
        mass = weight * np.sin(2 * psi) ** power
        return float((mass * psi).sum() / mass.sum())

    x = np.array([0.3, 0.6])
    for _ in range(2000):
        mid = (x[0] + x[1]) / 2
        new = np.array([centre(0.0, mid), centre(mid, math.pi / 4)])
        done = np.abs(new - x).max() < 1e-15
        x = new
        if done:
            break
    return np.concatenate([x, math.pi / 2 - x[::-1]])


def solve_uniform(bits: int) -> float:
    """Step of the best uniform quantiser of N(0,1) with 2**bits levels at +-(k + 1/2) step (Max 1960, table II).

    The derivative of the squared error with respect to the step is -2 E[(k + 1/2) (|x| - (k + 1/2) step)]; bisection
    on it. Raises ValueError for bits outside 1..8.
    """
    if not 1 <= bits <= MAX_BITS:
        raise ValueError(f"bits must be 1..{MAX_BITS}, not {bits}")
    half = 2 ** (bits - 1)

    def slope(step: float) -> float:
        total = 0.0
        for k in range(half):
            a, b = k * step, (k + 1) * step if k + 1 < half else math.inf
            fb = 0.0 if math.isinf(b) else _phi(b)
            upper = 0.0 if math.isinf(b) else math.erfc(b / math.sqrt(2.0))
            mass = 0.5 * (math.erfc(a / math.sqrt(2.0)) - upper)
            total += (k + 0.5) * ((_phi(a) - fb) - (k + 0.5) * step * mass)
        return total

    low, high = 1e-3, 4.0
    for _ in range(100):
        mid = (low + high) / 2
        low, high = (mid, high) if slope(mid) > 0 else (low, mid)
    return (low + high) / 2


def thresholds(levels: NDArray[np.float32]) -> NDArray[np.float32]:
    """Decision thresholds float32 [2**bits - 1]: the midpoints, added in float64 and rounded once."""
    wide = levels.astype(np.float64)
    return ((wide[1:] + wide[:-1]) / 2).astype(np.float32)


def _solve_all() -> dict[str, list[float]]:
    out: dict[str, list[float]] = {}
    for bits in range(1, MAX_BITS + 1):
        levels = solve_gaussian(bits).astype(np.float32)
        out[f"lloyd_max_{bits}"] = levels.tolist()
        out[f"lloyd_max_thr_{bits}"] = thresholds(levels).tolist()
    # index = bits; entry 0 is unused
    out["uniform_step"] = [0.0, *(solve_uniform(bits) for bits in range(1, MAX_BITS + 1))]
    # Level 1: 16 equal bins of the full circle; inside a quadrant three slopes part four bins.
    full = (np.arange(16) + 0.5) * (math.pi / 8)
    out["polar_cos_1"] = np.cos(full).astype(np.float32).tolist()
    out["polar_sin_1"] = np.sin(full).astype(np.float32).tolist()
    out["polar_tan_1"] = [math.tan(math.pi / 8), 1.0, 1.0 / math.tan(math.pi / 8)]
    for level in range(2, POLAR_LEVELS + 1):
        psi = solve_polar(level)
        low = math.tan((psi[0] + psi[1]) / 2)
        out[f"polar_cos_{level}"] = np.cos(psi).tolist()
        out[f"polar_sin_{level}"] = np.sin(psi).tolist()
        out[f"polar_tan_{level}"] = [low, 1.0, 1.0 / low]
    return {k: np.asarray(v, np.float32).tolist() for k, v in out.items()}


def _hex(v: float) -> str:
    """Shortest exact C hexadecimal literal of a float32."""
    text = float(v).hex()
    mantissa, exponent = text.split("p")
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    return f"{mantissa}p{exponent}"


def _rows(values: list[float], suffix: str, per_line: int = 6) -> str:
    cells = [_hex(v) + suffix for v in values]
    return ",\n    ".join(", ".join(cells[i : i + per_line]) for i in range(0, len(cells), per_line))


def render() -> tuple[str, str]:
    """The text of ``_tables.py`` and of ``csrc/codecs/tables.inc``, freshly solved."""
    tables = _solve_all()
    note = "Written by `python -m pytq.codec.lloydmax`; do not edit. float32 values, exact in hexadecimal."
    py = [f'"""{note}"""\n\n# fmt: off\nTABLES: dict[str, str] = {{']
    c = [f"// {note}\n// clang-format off"]
    for name, values in tables.items():
        py.append(f'    "{name}": """\n    {_rows(values, "").replace(",", "")}""",')
        c.append(f"static const float {name}[{len(values)}] = {{\n    {_rows(values, 'f')} }};")
    py.append("}\n# fmt: on\n")
    c.append("// clang-format on\n")
    return "\n".join(py), "\n".join(c)


def table(name: str) -> NDArray[np.float32]:
    """A checked-in table by name (``lloyd_max_4``, ``lloyd_max_thr_4``, ``polar_cos_2`` ...), float32, read-only."""
    from pytq.codec._tables import TABLES

    out = np.array([float.fromhex(v) for v in TABLES[name].split()], np.float32)
    out.flags.writeable = False
    return out


def main() -> None:
    """Rewrites both table files in a source tree."""
    here = Path(__file__).resolve()
    py, c = render()
    (here.parent / "_tables.py").write_text(py)
    (here.parents[2] / "csrc" / "codecs" / "tables.inc").write_text(c)


if __name__ == "__main__":
    main()
