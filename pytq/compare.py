"""`pytq compare-codecs`: every codec on the same vectors, rotation, threads and machine, over many seeds.

One row per codec: bits per value with every stored scalar counted, reconstruction error, inner-product error and bias,
recall@1@k of a nearest-neighbour search by estimated inner product, encode and decode time at 1 and at all threads.
"""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import pytq.codec
from pytq import ffi
from pytq.codec import Codec
from pytq.codec.api import BLOCK, GGML, PAPER
from pytq.errors import PytqError

F32 = NDArray[np.float32]
METRIC_VERSION = 1
RECALL_AT = (1, 10, 100)
RATED = ("turboquant_mse", "turboquant_prod", "rabitq")


def specs(names: Sequence[str], bits: Sequence[int]) -> list[dict[str, Any]]:
    """Arguments of ``pytq.codec`` for each row: rated codecs at each of ``bits``, RaBitQ with both searches.

    ``names`` may hold codec names or ``name:bits`` (``rabitq:4``). Raises PytqError for an unknown one.
    """
    rows: list[dict[str, Any]] = []
    for text in names:
        name, _, rate = text.partition(":")
        if name not in pytq.codec.NAMES:
            raise PytqError(f"unknown codec {name!r}: one of {', '.join(pytq.codec.NAMES)}")
        if rate and (name not in RATED or not rate.isdecimal() or not 1 <= int(rate) <= 8):
            raise PytqError(f"{text!r}: bits from 1 to 8 may follow {', '.join(RATED)}")
        for b in ([int(rate)] if rate else bits) if name in RATED else [None]:
            rows.append({"name": name, "bits": b})
            if name == "rabitq" and b is not None and b > 1:
                rows.append({"name": name, "bits": b, "search": "fast"})
    return rows


ALL = (*PAPER, *(n for n in BLOCK if not n.endswith("s")), *GGML)


def label(spec: dict[str, Any]) -> str:
    """Row name: ``rabitq 4 (fast)``."""
    bits = "" if spec.get("bits") is None else f" {spec['bits']}"
    return spec["name"] + bits + (" (fast)" if spec.get("search") == "fast" else "")


@dataclass
class Row:
    """Measurements of one codec; mean over seeds and standard deviation (``*_sd``) between seeds."""

    codec: str
    bits: int | None
    bits_per_value: float
    bytes_per_vector: int
    rotation: str
    seeds: int
    distortion: float = math.nan  # sum |x - x'|^2 / sum |x|^2, decode()
    distortion_sd: float = math.nan
    inner_error: float = math.nan  # head_dim * mean error^2 of inner() over |q|^2 |x|^2
    inner_error_sd: float = math.nan
    inner_bias: float = math.nan  # slope of error against <q, x>: -0.1 means estimates shrunk by a tenth
    inner_bias_sd: float = math.nan
    recall: dict[str, float] = field(
        default_factory=dict
    )  # true nearest neighbour among the k best estimates
    recall_sd: dict[str, float] = field(default_factory=dict)
    encode_us: dict[str, float] = field(default_factory=dict)  # per vector, by number of threads
    decode_us: dict[str, float] = field(default_factory=dict)


def gaussian_vectors(n: int, dim: int, seed: int) -> F32:
    """Isotropic Gaussian vectors, float32 [n, dim]: after a rotation every vector looks so."""
    return np.random.default_rng([seed, 11]).standard_normal((n, dim), np.float32)


def clustered_vectors(n: int, dim: int, seed: int) -> F32:
    """Unit vectors with the spectrum of embeddings: 64 clusters, coordinate variance ~ 1 / (1 + i), float32 [n, dim]."""
    rng = np.random.default_rng([seed, 12])
    scale = 1 / np.sqrt(1 + np.arange(dim))
    centre = rng.standard_normal((64, dim)) * scale
    x = centre[rng.integers(0, 64, n)] + 0.7 * rng.standard_normal((n, dim)) * scale
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def read_vectors(path: Path) -> F32:
    """A user's vectors: a .npy file with a float array [n, dim]. PytqError if it is anything else."""
    try:
        x = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise PytqError(f"{path} is not a .npy file: {error}") from error
    if not isinstance(x, np.ndarray) or x.ndim != 2 or x.dtype.kind != "f" or len(x) < 2:
        raise PytqError(f"{path} must hold a float array of shape [n, dim] with at least two vectors")
    if not np.isfinite(x).all():
        raise PytqError(f"{path} holds NaN or infinity")
    return x.astype(np.float32)


def quality(codec: Codec, x: F32, q: F32) -> dict[str, float]:
    """Errors of one codec on vectors x [n, dim] and queries q [nq, dim], in float64."""
    codes = codec.encode(x)
    wide = x.astype(np.float64)
    y = codec.decode(codes)
    true = q.astype(np.float64) @ wide.T
    estimate = codec.inner(q, codes).astype(np.float64)
    error = estimate - true
    scale = (q.astype(np.float64) ** 2).sum(axis=1)[:, None] * (wide**2).sum(axis=1)[None]
    out = {
        "distortion": float(((y - wide) ** 2).sum() / (wide**2).sum()),
        "inner_error": float(codec.head_dim * (error**2 / scale).mean()),
        "inner_bias": float((error * true / scale).sum() / (true**2 / scale).sum()),
    }
    best = true.argmax(axis=1)
    rank = (estimate > estimate[np.arange(len(q)), best][:, None]).sum(axis=1)
    for k in RECALL_AT:
        if k <= len(x):
            out[f"recall@{k}"] = float((rank < k).mean())
    return out


def best_time(work: Callable[[], Any], repeat: int) -> float:
    """Smallest of ``repeat`` wall times, seconds: what the code needs when nothing disturbs it."""
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def thread_counts(threads: int | None) -> list[int]:
    """1 and all (or the given number of) threads."""
    if threads is not None and threads < 1:
        raise PytqError(f"threads must be at least 1, not {threads}")
    return sorted({1, threads or os.cpu_count() or 1})


def cpu_name() -> str:
    """The processor as the system names it."""
    try:
        import cpuinfo

        return str(cpuinfo.get_cpu_info().get("brand_raw") or platform.processor())
    except Exception:  # py-cpuinfo raises what its parsers raise; the name is decoration
        return platform.processor() or platform.machine()


def compare(
    rows: Sequence[dict[str, Any]],
    *,
    dim: int = 128,
    rotation: str = "hadamard",
    data: str = "gaussian",
    vectors: F32 | None = None,
    n: int = 2000,
    queries: int = 200,
    seeds: int = 10,
    threads: int | None = None,
    time_vectors: int = 20000,
    repeat: int = 5,
    progress: Callable[[Iterable[Any], int], Iterable[Any]] = lambda it, total: it,
) -> dict[str, Any]:
    """Measures every row of ``specs``.

    Args:
        rows: arguments of ``pytq.codec`` beyond head_dim, rotation and seed.
        dim: length of the vectors (ignored with ``vectors``).
        rotation: the same for every codec: hadamard, random or none.
        data: ``gaussian`` or ``clustered`` vectors, drawn anew for each seed.
        vectors: own vectors [N, dim]; each seed draws n and the queries from them without replacement.
        n, queries: vectors stored and queries asked per seed.
        seeds: number of seeds; each draws data, rotation and projection.
        threads: the larger of the two thread counts timed (all by default); time_vectors: vectors per timed call,
            0 for no timing; repeat: timed calls, of which the fastest counts.
        progress: wraps the iteration for a progress bar.

    Returns:
        JSON-ready dict with ``conditions`` and ``rows``.

    Raises:
        PytqError: numbers that are not positive, unknown data or rotation, too few own vectors, a codec that has no
            block for dim.
    """
    for what, value, least in (
        ("vectors per seed", n, 2),
        ("queries", queries, 1),
        ("seeds", seeds, 2),
        ("timed vectors", time_vectors, 0),
        ("repeats", repeat, 1),
    ):
        if value < least:
            raise PytqError(f"number of {what} must be at least {least}, not {value}")
    makers = {"gaussian": gaussian_vectors, "clustered": clustered_vectors}
    if vectors is not None:
        dim, data = vectors.shape[1], "file"
        if len(vectors) < n + queries:
            raise PytqError(
                f"the file has {len(vectors)} vectors, {n} + {queries} are needed: lower --vectors or --queries"
            )
    elif data not in makers:
        raise PytqError(f"unknown data {data!r}: gaussian or clustered")
    counts = thread_counts(threads)

    def draw(seed: int) -> tuple[F32, F32]:
        if vectors is not None:
            pick = np.random.default_rng([seed, 13]).choice(len(vectors), n + queries, replace=False)
            return vectors[pick[:n]], vectors[pick[n:]]
        both = makers[data](n + queries, dim, seed)
        return both[:n], both[n:]

    # A codec that cannot be made must not cost the minutes before it.
    for spec in rows:
        pytq.codec.codec(head_dim=dim, rotation=rotation, **spec)

    samples: list[list[dict[str, float]]] = [[] for _ in rows]
    results = []
    steps = [(s, i) for s in range(seeds) for i in range(len(rows))]
    timing = [(-1, i) for i in range(len(rows))] if time_vectors else []
    times: dict[int, tuple[dict[str, float], dict[str, float]]] = {}
    current = -1
    for seed, i in progress(steps + timing, len(steps) + len(timing)):
        if seed < 0:
            codec = pytq.codec.codec(head_dim=dim, rotation=rotation, seed=0, **rows[i])
            times[i] = _speed(codec, draw(0)[0], time_vectors, repeat, counts)
            continue
        if seed != current:
            (x, q), current = draw(seed), seed
        codec = pytq.codec.codec(head_dim=dim, rotation=rotation, seed=seed, **rows[i])
        samples[i].append(quality(codec, x, q))
    for i, spec in enumerate(rows):
        codec = pytq.codec.codec(head_dim=dim, rotation=rotation, **spec)
        mean = {k: float(np.mean([s[k] for s in samples[i]])) for k in samples[i][0]}
        sd = {k: float(np.std([s[k] for s in samples[i]], ddof=1)) for k in samples[i][0]}
        row = Row(label(spec), spec.get("bits"), codec.bits_per_value, codec.code_bytes, rotation, seeds)
        for key in ("distortion", "inner_error", "inner_bias"):
            setattr(row, key, mean[key])
            setattr(row, f"{key}_sd", sd[key])
        row.recall = {k: v for k, v in mean.items() if k.startswith("recall")}
        row.recall_sd = {k: v for k, v in sd.items() if k.startswith("recall")}
        if i in times:
            row.encode_us, row.decode_us = times[i]
        results.append(asdict(row))
    conditions = {
        "metric_version": METRIC_VERSION,
        "pytq": pytq.__version__,
        "dim": dim,
        "rotation": rotation,
        "data": data,
        "vectors": n,
        "queries": queries,
        "seeds": seeds,
        "threads": counts if time_vectors else [],
        "timed_vectors": time_vectors,
        "repeats": repeat,
        "device": cpu_name(),
        "backend": "c",
        "tier": ffi.ffi().string(ffi.lib().pytq_cpu_tier()).decode(),
        "objective": "decode: least squared error; inner: unbiased where the method has such an estimator",
    }
    return {"conditions": conditions, "rows": results}


def _speed(
    codec: Codec, x: F32, n: int, repeat: int, counts: Sequence[int]
) -> tuple[dict[str, float], dict[str, float]]:
    """Microseconds per vector of encode and decode by thread count, rotation included, the checks of Python too."""
    many = np.resize(x, (n, x.shape[1]))
    codes = codec.encode(many)
    encode, decode = {}, {}
    for t in counts:
        encode[str(t)] = best_time(partial(codec.encode, many, threads=t), repeat) / n * 1e6
        decode[str(t)] = best_time(partial(codec.decode, codes, threads=t), repeat) / n * 1e6
    return encode, decode


def table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of text for people."""
    counts = [str(t) for t in result["conditions"]["threads"]]
    recalls = [k for k in (f"recall@{k}" for k in RECALL_AT) if any(k in r["recall"] for r in result["rows"])]
    head = [
        "codec",
        "bits/value",
        "bytes",
        "error",
        "d × inner error",
        "bias %",
        *(f"{k} %" for k in recalls),
    ]
    head += [f"encode us ({t}t)" for t in counts] + [f"decode us ({t}t)" for t in counts]
    lines = []
    for r in result["rows"]:
        line = [r["codec"], f"{r['bits_per_value']:.3f}", str(r["bytes_per_vector"])]
        line += [_pm(r["distortion"], r["distortion_sd"]), _pm(r["inner_error"], r["inner_error_sd"])]
        line.append(f"{100 * r['inner_bias']:+.2f} ± {100 * r['inner_bias_sd']:.2f}")
        line += [f"{100 * r['recall'][k]:.1f} ± {100 * r['recall_sd'][k]:.1f}" for k in recalls]
        line += [f"{r['encode_us'][t]:.2f}" for t in counts] + [f"{r['decode_us'][t]:.2f}" for t in counts]
        lines.append(line)
    return head, lines


def _timing(conditions: dict[str, Any]) -> str:
    if not conditions["threads"]:
        return ""
    threads = " and ".join(map(str, conditions["threads"]))
    return (
        f" ({conditions['tier']}); times: microseconds per vector, fastest of {conditions['repeats']} calls with"
        f" {conditions['timed_vectors']} vectors, {threads} threads"
    )


def _pm(mean: float, sd: float) -> str:
    digits = max(0, 3 - math.floor(math.log10(mean))) if mean > 0 else 4
    return f"{mean:.{digits}f} ± {sd:.{digits}f}"


def markdown(result: dict[str, Any]) -> str:
    """The table in Markdown with one line of conditions."""
    head, lines = table(result)
    c = result["conditions"]
    text = [
        f"{c['data']} vectors, d = {c['dim']}, rotation {c['rotation']}, {c['vectors']} vectors and {c['queries']} queries "
        f"per seed, {c['seeds']} seeds (± standard deviation between seeds), {c['device']}{_timing(c)}.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(line) + " |" for line in lines),
    ]
    return "\n".join(text) + "\n"
