"""The demo: both builds, a model and its profile, a paragraph through ``pytq.Llama``, a table of speed and quality."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from pytq import build, estimate, evaluate, fetch, paths
from pytq.errors import PytqError
from pytq.gguf.layout import read_layout
from pytq.model import default_model
from pytq.progress import say, step

PROMPT = "The capital of France is Paris. It is best known for"
N_PREDICT = 96
TYPE_K, TYPE_V = "kv4", "kv3"
# where each row runs: stock types in the unpatched build, so that nothing of ours touches the baseline; kv types with the profile
ROWS: tuple[tuple[paths.Kind, str], ...] = (
    ("stock", "f16"),
    ("stock", "q8_0"),
    ("stock", "q4_0"),
    ("patched", "turbo4"),
    ("patched", "turbo3"),
    ("patched", "turbo2"),
    ("patched", "kv4"),
    ("patched", "kv3"),
    ("patched", "kv2"),
)
CALIBRATION_TOKENS = 6144
CTX, CHUNKS = 512, 3  # of the KL divergence
DEPTH = 1024
N_GEN = 32
REPEAT = 2


def uses_profile(cache_type: str) -> bool:
    """Whether the demo measures this type with the profile."""
    return cache_type.startswith("kv")


def llama_bench(program: Path, model: Path, cache_type: str, threads: int, profile: str) -> float:
    """Tokens per second of generation at ``DEPTH`` tokens of context, by llama-bench."""
    command = [
        str(program), "-m", str(model), "-ctk", cache_type, "-ctv", cache_type, "-fa", "1", "-p", "0", "-n", str(N_GEN), "-d", str(DEPTH),
        "-t", str(threads), "-r", str(REPEAT), "-o", "jsonl",
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTQ_KV_PROFILE": profile}
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode != 0 or not lines:
        reason = [line for line in done.stderr.splitlines() if line.strip()] or [
            f"exit code {done.returncode}"
        ]
        raise PytqError(f"llama-bench failed for {cache_type}: {reason[-1]}")
    return float(json.loads(lines[-1])["avg_ts"])


def calibrated(model: Path) -> Path:
    """The demo's profile of the model, made unless it is there and fits.

    It lies in PYTQ_HOME/profiles, not beside the model, where every other command would take it up.
    """
    from pytq.profile import load_profile

    path = paths.writable(paths.home() / "profiles") / f"{model.stem}.kvprofile.gguf"
    try:
        load_profile(path, read_layout(model))
        return path
    except PytqError:
        pass
    # a process of its own: it loads the stock library, this one needs the patched
    command = [
        sys.executable,
        "-m",
        "pytq",
        "calibrate",
        str(model),
        "--tokens",
        str(CALIBRATION_TOKENS),
        "-o",
        str(path),
        "--json",
    ]
    done = subprocess.run(command, stdout=subprocess.DEVNULL)
    if done.returncode != 0:
        raise PytqError("the model could not be calibrated")
    return path


def measure(model: Path, profile: Path, again: bool = False) -> tuple[list[dict[str, Any]], str]:
    """One dict per row of the table, and when they were measured.

    Rows are kept in the cache directory and used again while builds, model and CPU are the same.
    """
    builds = {kind: paths.find_build(kind) for kind in paths.KINDS}
    threads = build.cpus()
    key: dict[str, Any] = {
        "builds": {kind: [str(found.root), found.info.get("date")] for kind, found in builds.items()},
        "model": str(model),
        "profile": fetch.sha256_file(profile),
        "kld": [CTX, CHUNKS],
        "depth": DEPTH,
        "n_gen": N_GEN,
        "threads": threads,
        "rows": [list(row) for row in ROWS],
    }
    kept = paths.home() / "demo.json"
    if kept.exists() and not again:
        try:
            data = json.loads(kept.read_text())
        except ValueError:
            data = {}
        if data.get("key") == key:
            return data["rows"], data["date"]

    info = estimate.open_model(model)
    layouts = {
        True: dataclasses.replace(info, profile=read_layout(profile)),
        False: dataclasses.replace(info, profile=None),
    }
    text = evaluate.default_text_file()
    setups = {
        True: evaluate.Setup(model, text, CTX, CHUNKS, threads, str(profile)),
        False: evaluate.Setup(model, text, CTX, CHUNKS, threads, "none"),
    }
    with step("reference logits of the f16 cache"):
        base = evaluate.reference(setups[False], builds["stock"])
    rows = []
    with step(f"{N_GEN} tokens at depth {DEPTH}, then the KL divergence", len(ROWS)) as progress:
        for i, (kind, name) in enumerate(ROWS):
            with_profile = uses_profile(name)
            types = estimate.resolve(layouts[with_profile], (name, name))
            size = estimate.cache_size(info.hparams, types, estimate.Plan(DEPTH))
            used = setups[with_profile].profile or "none"
            rate = llama_bench(builds[kind].program("llama-bench"), model, name, threads, used)
            exact = name == "f16"  # the reference itself
            score = None if exact else evaluate.score(setups[with_profile], builds[kind], base, name, name)
            rows.append(
                {
                    "build": kind,
                    "type": name,
                    "profile": with_profile,
                    "bits_per_value": size.bits,
                    "cache_mib": size.kv / 2**20,
                    "tokens_per_second": rate,
                    "kld": score.kld_mean if score else None,
                }
            )
            progress.update(i + 1)
    date = datetime.datetime.now().isoformat(sep=" ", timespec="minutes")
    temporary = kept.with_suffix(f".tmp{os.getpid()}")
    temporary.write_text(json.dumps({"key": key, "rows": rows, "date": date}))
    os.replace(temporary, kept)
    return rows, date


def run(again: bool = False) -> None:
    """Everything from nothing to the table. PytqError as the parts raise it."""
    from rich.console import Console
    from rich.table import Table

    for kind in paths.KINDS:
        named = os.environ.get(f"PYTQ_{kind.upper()}_BUILD")
        found = paths.find_build(kind) if named else build.build(kind)
        say(f"{kind} llama.cpp: {found.root}")
    model = default_model()
    say(f"model: {model}")

    from pytq.cli.run import generate
    from pytq.llama import Llama

    profile = calibrated(model)
    say(f"profile: {profile}")
    os.environ["PYTQ_KV_PROFILE"] = str(profile)
    llama = Llama(model, cache_type_k=TYPE_K, cache_type_v=TYPE_V, n_ctx=2048, verbose=False)
    console = Console(highlight=False)
    console.print(f"\npytq.Llama with {TYPE_K} keys and {TYPE_V} values, calibrated:\n", style="bold")
    console.print(PROMPT, end="", style="dim")
    result = generate(llama, PROMPT, N_PREDICT, 0.0, echo=True)
    report = llama.cache_report()
    console.print(
        f"\n\n{result['n_generated']} tokens, {report['bits_per_value']:.3f} bits per value with all scales, "
        f"{report['cache_bytes'] / 2**20:.2f} MiB of cache for {llama.n_ctx()} tokens\n"
    )
    llama.close()
    del os.environ["PYTQ_KV_PROFILE"]

    rows, date = measure(model, profile, again)
    table = Table(title=f"{model.stem}, {N_GEN} tokens at depth {DEPTH}, same type for K and V")
    table.add_column("build")
    table.add_column("cache type")
    table.add_column("profile")
    for title in ("bits/value", "cache MiB", "tokens/s", "KLD to f16"):
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(
            row["build"],
            row["type"],
            "yes" if row["profile"] else "",
            f"{row['bits_per_value']:.3f}",
            f"{row['cache_mib']:.2f}",
            f"{row['tokens_per_second']:.1f}",
            "" if row["kld"] is None else f"{row['kld']:.4f}",
        )
    console.print(table)
    console.print(
        f"measured {date} on this machine, {REPEAT} repetitions, {CHUNKS} chunks of {CTX} tokens; `pytq bench` and `pytq eval` compare "
        "with intervals, `pytq demo --again` measures anew",
        style="dim",
    )


def main() -> None:
    """``python -m pytq.demo``."""
    from pytq.cli import main as cli

    cli(["demo"], prog_name="pytq")


if __name__ == "__main__":
    main()
