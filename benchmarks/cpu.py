#!/usr/bin/env python3
"""Interleaved llama-bench runs of cache types on CPU: stock build and patched build in turn, medians and ratios.

Every round runs every configuration once, in an order that rotates, and appends one JSON line per test to the result file
(llama-bench's own fields plus round, build and machine). `--report` prints medians and ratios against stock f16.

usage: cpu.py --stock BIN --patched BIN --model MODEL.gguf --out RESULT.jsonl [--rounds 5] [--types kv3,turbo3,kv4,turbo4]
       cpu.py --report RESULT.jsonl
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path


def cpu_name() -> str:
    """Model name and number of cores, as the kernel gives them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(x.split(":", 1)[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model}, {os.cpu_count()} cores"


def run(
    binary: Path, model: Path, kv: tuple[str, str], test: list[str], threads: int, repeat: int
) -> tuple[list[dict], list[str]]:
    """One llama-bench call; returns its JSON records and the command's arguments."""
    args = [
        "-m",
        str(model),
        "-t",
        str(threads),
        "-fa",
        "1",
        "-ctk",
        kv[0],
        "-ctv",
        kv[1],
        "-r",
        str(repeat),
        *test,
        "-o",
        "jsonl",
    ]
    env = {**os.environ, "LD_LIBRARY_PATH": str(binary)}
    done = subprocess.run([str(binary / "llama-bench"), *args], capture_output=True, text=True, env=env)
    if done.returncode != 0:
        sys.exit(f"error: llama-bench {' '.join(args)}: {done.stderr.strip().splitlines()[-1:]}")
    return [json.loads(x) for x in done.stdout.splitlines() if x.startswith("{")], args


def measure(opt: argparse.Namespace) -> None:
    configs = [("stock", t) for t in opt.stock_types.split(",") if t] + [
        ("patched", t) for t in opt.types.split(",") if t
    ]
    machine = cpu_name()
    with open(opt.out, "a") as out:
        for i in range(opt.rounds):
            shift = (i + opt.first) % len(configs)
            for build, types in configs[shift:] + configs[:shift]:
                k, _, v = types.partition("/")
                binary = Path(opt.stock if build == "stock" else opt.patched)
                load = os.getloadavg()[0]
                records, args = run(
                    binary, Path(opt.model), (k, v or k), opt.test.split(), opt.threads, opt.repeat
                )
                for r in records:
                    name = f"pp{r['n_prompt']}" if r["n_prompt"] else f"tg{r['n_gen']}"
                    line = {"build": build, "types": types, "test": f"{name}@{r['n_depth']}",
                            "tok_s": [round(x, 2) for x in r["samples_ts"]],
                            "model": Path(opt.model).name, "threads": opt.threads, "load": load, "machine": machine,
                            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                            "command": "llama-bench " + " ".join(args[2:])}  # fmt: skip
                    out.write(json.dumps(line) + "\n")
                    out.flush()


def report(path: str) -> None:
    rows: dict[tuple[str, str], dict[tuple[str, str], list[float]]] = defaultdict(lambda: defaultdict(list))
    for text in Path(path).read_text().splitlines():
        r = json.loads(text)
        rows[r["model"], r["test"]][r["build"], r["types"]].extend(r["tok_s"])
    print(
        "| model | test | build | cache K/V | tokens/s (median) | samples | median against stock f16 | best against best |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for (model, test), configs in sorted(rows.items()):
        base = configs.get(("stock", "f16"))
        for (build, types), v in sorted(configs.items(), key=lambda x: (x[0][0] != "stock", x[0])):
            m = statistics.median(v)
            ratio = f"{m / statistics.median(base):.2f} | {max(v) / max(base):.2f}" if base else " | "
            print(f"| {model} | {test} | {build} | {types} | {m:.1f} | {len(v)} | {ratio} |")


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--report", metavar="RESULT.jsonl")
    ap.add_argument("--stock", help="directory with the stock llama-bench")
    ap.add_argument("--patched", help="directory with the patched llama-bench")
    ap.add_argument("--model")
    ap.add_argument("--out")
    ap.add_argument("--rounds", type=int, default=5)
    ap.add_argument("--first", type=int, default=0, help="rotation of the first round")
    ap.add_argument("--repeat", type=int, default=3, help="repetitions inside one llama-bench call")
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--stock-types", default="f16")
    ap.add_argument("--types", default="kv3,turbo3,kv4,turbo4")
    ap.add_argument(
        "--test", default="-p 0 -n 32 -d 8192", help="arguments of llama-bench that choose the tests"
    )
    opt = ap.parse_args()
    if opt.report:
        report(opt.report)
    elif opt.stock and opt.patched and opt.model and opt.out:
        measure(opt)
    else:
        ap.error("--stock, --patched, --model and --out are needed (or --report)")


if __name__ == "__main__":
    main()
