"""Runs llama-bench of the stock and the patched build in turns and collects its rows.

One process measures one (build, cache type, depth) once; a round visits them all, and rounds repeat. So the builds
alternate (ABAB...) and slow drift of the machine hits them alike. llama-bench warms up before each measurement.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pytq.bench import stats
from pytq.errors import PytqError
from pytq.estimate import MIB, ModelInfo, Plan, cache_size, check_pair, is_pytq, pair_name, resolve

Row = dict[str, Any]
BASELINE = ("f16", "f16")


class Build(Protocol):
    """What the runner needs of ``pytq.paths.BuildDir``."""

    @property
    def bin(self) -> Path: ...
    @property
    def info(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Case:
    """One thing to compare: a build (``stock`` or ``patched``) with types of K and V."""

    build: str
    type_k: str
    type_v: str

    @property
    def name(self) -> str:
        return f"{self.build} {pair_name(self.type_k, self.type_v)}"


@dataclass(frozen=True)
class Options:
    """What to measure; ``extra`` goes to llama-bench as it is."""

    model: Path
    depths: tuple[int, ...] = (0,)
    n_prompt: int = 512
    n_gen: int = 32
    repeat: int = 5
    threads: int | None = None
    n_gpu_layers: int | None = None
    extra: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for what, value, least in (
            ("--pp", self.n_prompt, 1),
            ("--tg", self.n_gen, 1),
            ("--repeat", self.repeat, 1),
            ("--threads", self.threads if self.threads is not None else 1, 1),
            ("--depths", min(self.depths, default=-1), 0),
        ):
            if value < least:
                raise PytqError(f"{what} must be at least {least}, not {value}")

    def command(self, program: Path, case: Case, depth: int) -> list[str]:
        """The llama-bench command line of one measurement."""
        args = [str(program), "-m", str(self.model), "-o", "jsonl", "-r", "1", "-fa", "1"]
        args += ["-p", str(self.n_prompt), "-n", str(self.n_gen), "-d", str(depth)]
        args += ["-ctk", case.type_k, "-ctv", case.type_v]
        if self.threads is not None:
            args += ["-t", str(self.threads)]
        if self.n_gpu_layers is not None:
            args += ["-ngl", str(self.n_gpu_layers)]
        return args + list(self.extra)


@dataclass
class Results:
    """Measured samples and what happened on the way; ``samples`` has one llama-bench row per measurement."""

    options: Options
    cases: list[Case]
    samples: dict[tuple[Case, int, str], list[Row]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    interrupted: bool = False


def plan_cases(pairs: Sequence[tuple[str, str]], both: bool = False) -> list[Case]:
    """Stock types run on the stock build (on both builds if ``both``), others on the patched one; f16 always first."""
    cases = [Case("stock", *BASELINE)]
    for k, v in pairs:
        if is_pytq(k) or is_pytq(v):
            cases.append(Case("patched", k, v))
            continue
        cases.append(Case("stock", k, v))
        if both:
            cases.append(Case("patched", k, v))
    return list(dict.fromkeys(cases))


def check(model: ModelInfo, options: Options, cases: Sequence[Case]) -> None:
    """PytqError when a type does not fit the model or a depth its context limit."""
    for case in cases:
        check_pair(model, case.type_k, case.type_v)
    need = max(options.depths) + options.n_prompt + options.n_gen
    limit = model.hparams.n_ctx_train
    if need > limit:
        raise PytqError(
            f"depth {max(options.depths)} with {options.n_prompt} + {options.n_gen} tokens is beyond this model's"
            f" limit of {limit} tokens"
        )


def run_once(command: list[str]) -> list[Row]:
    """Runs llama-bench and returns its JSON rows; PytqError with its last words when it fails."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        out, err = process.communicate()
    except BaseException:
        # Ctrl-C reaches the child too in a terminal, but not when it was sent to this process alone
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        raise
    if process.returncode:
        words = [line for line in err.splitlines() if line.strip()]
        raise PytqError(
            f"llama-bench failed ({process.returncode}): {words[-1] if words else 'it said nothing'}"
        )
    return [json.loads(line) for line in out.splitlines() if line.startswith("{")]


def run(
    options: Options,
    cases: Sequence[Case],
    programs: Mapping[str, Path],
    progress: Callable[[float, float, str], None] = lambda done, total, what: None,
    once: Callable[[list[str]], list[Row]] = run_once,
) -> Results:
    """Measures all cases at all depths, ``repeat`` rounds; ``programs`` maps a build's name to its llama-bench.

    Ctrl-C ends it early and keeps what was measured. A case that fails is reported and left out of later rounds;
    PytqError when nothing at all could be measured.
    """
    results = Results(options, list(cases))
    results.warnings += load_warnings()
    weights = {depth: 1.0 + depth / 2048 for depth in options.depths}
    total = sum(weights.values()) * len(cases) * options.repeat
    done = 0.0
    failed: dict[tuple[Case, int], PytqError] = {}
    try:
        progress(done, total, "warm-up")
        _warm_up(options, cases, programs, once)
        for round_ in range(options.repeat):
            for depth in options.depths:
                for case in cases:
                    progress(done, total, f"round {round_ + 1}/{options.repeat}, depth {depth}, {case.name}")
                    done += weights[depth]
                    if (case, depth) in failed:
                        continue
                    try:
                        rows = once(options.command(programs[case.build], case, depth))
                    except PytqError as error:
                        failed[case, depth] = error
                        results.warnings.append(f"{case.name} at depth {depth} left out: {error}")
                        continue
                    for row in rows:
                        kind = "pp" if row["n_prompt"] else "tg"
                        results.samples.setdefault((case, depth, kind), []).append(row)
        progress(done, total, "done")
    except KeyboardInterrupt:
        results.interrupted = True
        results.warnings.append("interrupted: rows hold what was measured until then")
    if not results.samples and failed:
        raise next(iter(failed.values()))
    return results


def _warm_up(
    options: Options,
    cases: Sequence[Case],
    programs: Mapping[str, Path],
    once: Callable[[list[str]], list[Row]],
) -> None:
    """One short discarded run per build: pages of the model and the libraries get into memory."""
    for build in dict.fromkeys(case.build for case in cases):
        short = Options(options.model, (0,), 16, 4, 1, options.threads, options.n_gpu_layers, options.extra)
        once(short.command(programs[build], Case(build, *BASELINE), 0))


def load_warnings() -> list[str]:
    """What other programs do to the machine right now, if it is enough to disturb a measurement."""
    import psutil

    busy = psutil.cpu_percent(interval=0.5) / 100
    if busy > stats.NOISY_LOAD:
        return [
            f"other programs used {busy:.0%} of the processors before the start: close them for steady numbers"
        ]
    return []


def summarise(results: Results, model: ModelInfo, builds: Mapping[str, Build]) -> list[Row]:
    """One row per case, depth and test with llama-bench's field names, its samples merged, and pytq's columns.

    Added: ``build``, ``median_ts``, ``ratio`` (median over stock f16's, with ``ratio_low`` and ``ratio_high``),
    ``cache_mib`` and ``bits_per_value`` at this depth, ``ttft_ms``, ``noisy``.
    """
    rows = []
    options = results.options
    base_case = Case("stock", *BASELINE)
    place = {case: index for index, case in enumerate(results.cases)}
    for case, depth, kind in sorted(results.samples, key=lambda key: (key[1], key[2], place[key[0]])):
        samples = results.samples[case, depth, kind]
        ns = [ns for row in samples for ns in row["samples_ns"]]
        ts = [ts for row in samples for ts in row["samples_ts"]]
        row = dict(samples[0])
        row.pop("samples_ns"), row.pop("samples_ts")
        if row.get("build_commit") in (None, "", "unknown"):
            row["build_commit"] = _commit(builds.get(case.build), case.build)
        size = cache_size(
            model.hparams,
            resolve(model, (case.type_k, case.type_v)),
            Plan(depth + options.n_prompt + options.n_gen),
        )
        row |= {
            "build": case.build,
            "test": f"{kind}{options.n_prompt if kind == 'pp' else options.n_gen}",
            "avg_ns": round(statistics.fmean(ns)),
            "stddev_ns": round(statistics.stdev(ns)) if len(ns) > 1 else 0,
            "avg_ts": statistics.fmean(ts),
            "stddev_ts": statistics.stdev(ts) if len(ts) > 1 else 0.0,
            "median_ts": statistics.median(ts),
            "cache_mib": size.kv / MIB,
            "bits_per_value": round(size.bits, 4),
            "noisy": stats.is_noisy(ts),
        }
        base = results.samples.get((base_case, depth, kind))
        row |= {"ratio": None, "ratio_low": None, "ratio_high": None, "baseline": base_case.name}
        if base and case != base_case:
            found = stats.ratio_of_medians(ts, [x for r in base for x in r["samples_ts"]])
            row |= {"ratio": found.value, "ratio_low": found.low, "ratio_high": found.high}
        row["ttft_ms"] = _ttft(results, case, depth)
        row |= {"samples_ns": ns, "samples_ts": ts}
        rows.append(row)
    if any(row["noisy"] for row in rows):
        text = f"repeated runs of some rows differ by more than {stats.NOISY_SPREAD:.0%}: trust no small difference"
        if text not in results.warnings:
            results.warnings.append(text)
    return rows


def _commit(build: Build | None, kind: str) -> str:
    """The two builds need different names here: people's comparison scripts group rows by commit."""
    commit = build.info.get("pin", {}).get("commit", "") if build else ""
    return (commit or "unknown") + ("-pytq" if kind == "patched" else "")


def _ttft(results: Results, case: Case, depth: int) -> float | None:
    """Milliseconds until the first token of a prompt of ``n_prompt`` tokens: its processing plus one token."""
    prompt = results.samples.get((case, depth, "pp"))
    token = results.samples.get((case, depth, "tg"))
    if not prompt or not token:
        return None
    first = statistics.median(ns for row in prompt for ns in row["samples_ns"])
    second = statistics.median(ns for row in token for ns in row["samples_ns"]) / results.options.n_gen
    return (first + second) / 1e6


def machine_facts() -> dict[str, Any]:
    """The machine, for the head of a report."""
    import platform

    import psutil

    return {
        "cpu_count": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / (1 << 30), 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": sys.version.split()[0],
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
