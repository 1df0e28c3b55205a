#!/usr/bin/env python3
"""The kernels of one layer while a model decodes, from a file of tools/gpu/trace.cpp.

    tools/gpu/layer.py TRACE KERNEL

A layer goes from one launch whose name contains KERNEL to the next. Of all layers with the commonest sequence of launches this
prints the medians, as JSON: the period, and begin and end of each kernel in microseconds after the layer's begin.
"""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple, NoReturn


class Launch(NamedTuple):
    begin: int  # ns
    end: int
    kernel: int
    grid: tuple[int, int, int]
    threads: int


def fail(message: str) -> NoReturn:
    print(f"layer.py: {message}", file=sys.stderr)
    raise SystemExit(2)


def read(path: Path) -> tuple[list[Launch], dict[int, str]]:
    launches, names = [], {}
    for line in path.read_text().splitlines():
        kind, *words = line.split()
        if kind == "N":
            names[int(words[0])] = words[1]
        elif kind == "K":
            begin, end, kernel, x, y, z, threads = map(int, words)
            launches.append(Launch(begin, end, kernel, (x, y, z), threads))
    done = subprocess.run(
        ["c++filt"], input="\n".join(names.values()), capture_output=True, text=True, check=True
    )
    readable = (
        name.removeprefix("void ").replace("(anonymous namespace)::", "").split("(")[0]
        for name in done.stdout.splitlines()
    )
    return sorted(launches), dict(zip(names, readable, strict=True))


def layer(launches: list[Launch], names: dict[int, str], kernel: str) -> dict[str, object]:
    first = [i for i, launch in enumerate(launches) if kernel in names[launch.kernel]]
    layers = [launches[a : b + 1] for a, b in itertools.pairwise(first)]
    if not layers:
        fail(f"fewer than two launches of {kernel}")
    kinds = [tuple(launch.kernel for launch in one) for one in layers]
    commonest = Counter(kinds).most_common(1)[0][0]
    alike = [one for one, kind in zip(layers, kinds, strict=True) if kind == commonest]

    def median(i: int, field: str) -> float:
        return round(statistics.median(getattr(one[i], field) - one[0].begin for one in alike) / 1e3, 2)

    return {
        "layers": len(alike),
        "period_us": median(-1, "begin"),
        "kernels": [
            {
                "begin_us": median(i, "begin"),
                "end_us": median(i, "end"),
                "grid": list(alike[0][i].grid),
                "threads": alike[0][i].threads,
                "kernel": names[alike[0][i].kernel],
            }
            for i in range(len(commonest) - 1)
        ],
    }


def main() -> None:
    if len(sys.argv) != 3:
        fail("usage: layer.py TRACE KERNEL")
    launches, names = read(Path(sys.argv[1]))
    print(json.dumps(layer(launches, names, sys.argv[2])))


if __name__ == "__main__":
    main()
