"""``pytq eval``: how far a compressed cache moves the model's predictions, against the f16 cache of an unpatched build.

llama-perplexity does the arithmetic: the stock build writes the logits of an f16 cache once per (model, text, context, chunks,
build), and every type is compared with them by KL divergence. Stock types run in the stock build, pytq's in the patched one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import signal
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytq import estimate, fetch, figures
from pytq.errors import PytqError
from pytq.gguf.layout import read_layout
from pytq.paths import BuildDir, home, writable

# Raise it when the meaning of a stored or printed figure changes: old reference logits are then made again.
METRIC_VERSION = 1
DEFAULT_TYPES = ("q8_0", "q5_1", "q4_0", "kv4", "kv3", "kv2")
PLOT_STOCK, PLOT_PYTQ = "#7f7f7f", "#1f77b4"

_NUMBER = r"(-?\d+(?:\.\d+)?(?:e-?\d+)?|-?nan|-?inf)"
_PATTERNS = {
    "kld_mean": rf"^Mean\s+KLD:\s+{_NUMBER} ±\s+{_NUMBER}",
    "kld_median": rf"^Median\s+KLD:\s+{_NUMBER}",
    "kld_p99": rf"^99\.0%\s+KLD:\s+{_NUMBER}",
    "kld_p999": rf"^99\.9%\s+KLD:\s+{_NUMBER}",
    "same_top": rf"^Same top p:\s+{_NUMBER} ±\s+{_NUMBER} %",
    "ppl": rf"^Mean PPL\(Q\)\s+:\s+{_NUMBER} ±\s+{_NUMBER}",
    "ppl_base": rf"^Mean PPL\(base\)\s+:\s+{_NUMBER} ±\s+{_NUMBER}",
}
_WITH_ERROR = ("kld_mean", "same_top", "ppl")


@dataclass(frozen=True)
class Setup:
    """What is evaluated: text in chunks of ctx tokens; profile is a path, "none", or None for llama.cpp's own search."""

    model: Path
    text: Path
    ctx: int = 2048
    chunks: int = 6
    threads: int | None = None
    profile: str | None = None


@dataclass(frozen=True)
class Score:
    """One cache type. Errors are standard errors over tokens; bits per value count every scale, averaged over K and V."""

    type_k: str
    type_v: str
    build: str
    bits: float
    kld_mean: float
    kld_mean_err: float
    kld_median: float
    kld_p99: float
    kld_p999: float
    same_top: float
    same_top_err: float
    ppl: float
    ppl_err: float
    ppl_base: float
    note: str = ""

    @property
    def name(self) -> str:
        return self.note or estimate.pair_name(self.type_k, self.type_v)


def default_text() -> bytes:
    """Python's own language reference as plain text (pydoc_data.topics): the text of the project's figures."""
    import importlib

    topics = importlib.import_module("pydoc_data.topics").topics
    return "\n\n".join(topics[k] for k in sorted(topics)).encode()


def default_text_file() -> Path:
    """The default text as a file in the cache directory."""
    data = default_text()
    path = writable(home() / "eval") / f"topics-{hashlib.sha256(data).hexdigest()[:12]}.txt"
    if not path.exists() or path.read_bytes() != data:
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_bytes(data)
        os.replace(temporary, path)
    return path


def parse_statistics(output: str) -> dict[str, float]:
    """The figures of llama-perplexity's summary; PytqError when one is missing or not finite."""
    out: dict[str, float] = {}
    for key, pattern in _PATTERNS.items():
        m = re.search(pattern, output, flags=re.MULTILINE)
        if m is None:
            raise PytqError(f"llama-perplexity printed no {key.replace('_', ' ')}")
        values = [float(x) for x in m.groups()]
        if any(x != x or abs(x) == float("inf") for x in values):
            raise PytqError(
                f"llama-perplexity computed {key.replace('_', ' ')} = {m[1]}: the cache type gives no finite logits"
            )
        out[key] = values[0]
        if key in _WITH_ERROR:
            out[f"{key}_err"] = values[1]
    return out


def content_key(setup: Setup, build: BuildDir) -> str:
    """Name of the reference logits: what they depend on, hashed."""
    library = sorted(build.lib.glob("libllama.*"))[0].resolve()
    facts = [
        METRIC_VERSION,
        fetch.sha256_file(setup.model),
        fetch.sha256_file(setup.text),
        setup.ctx,
        setup.chunks,
        fetch.sha256_file(library),
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]


def _perplexity(
    setup: Setup,
    build: BuildDir,
    extra: Sequence[str],
    on_chunk: Callable[[int], None] | None,
    threads: int | None = None,
) -> str:
    command = [
        str(build.program("llama-perplexity")), "-m", str(setup.model), "-f", str(setup.text), "-c", str(setup.ctx),
        "--chunks", str(setup.chunks), "-fa", "on", *extra,
    ]  # fmt: skip
    n = threads or setup.threads
    if n:
        command += ["-t", str(n)]
    env = {k: v for k, v in os.environ.items() if not k.startswith(("LLAMA_ARG_", "LLAMA_ATTN"))}
    env["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, [str(build.lib), env.get("LD_LIBRARY_PATH")]))
    env.pop("PYTQ_KV_PROFILE", None)
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=env,
        start_new_session=True,
    )
    lines: list[str] = []
    try:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            # KLD mode prints a row per chunk, the reference run "[i]ppl," on one line
            m = re.match(r"\s*(\d+)\s+\d+\.\d+ ±", line)
            if m and on_chunk is not None:
                on_chunk(int(m[1]))
        status = process.wait()
    except BaseException:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()
        raise
    finally:
        if process.stdout is not None:
            process.stdout.close()
    output = "".join(lines)
    if status != 0 or "error:" in output:
        raise PytqError(f"llama-perplexity failed (status {status}): {_reason(lines)}")
    return output


def _reason(lines: Sequence[str]) -> str:
    """The most telling of the last lines."""
    plain = [re.sub(r"^[\d.]+ [A-Z] +", "", s).strip() for s in lines if s.strip()]
    for words in (("kv profile ", "cache type "), ("error", "failed", "not enough", "you need at least")):
        for s in plain:
            if any(w in s.lower() for w in words) and not s.startswith("pytq_kv_policy:"):
                return s
    return plain[-1] if plain else "no output"


def reference(setup: Setup, stock: BuildDir, on_chunk: Callable[[int], None] | None = None) -> Path:
    """The logits of the f16 cache: from PYTQ_HOME/eval, or made now.

    Raises:
        PytqError: the text is too short for the chunks, or llama-perplexity failed.
    """
    directory = writable(home() / "eval")
    path = directory / f"{content_key(setup, stock)}.logits"
    if path.exists():
        return path
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        _perplexity(
            setup, stock, ["-ctk", "f16", "-ctv", "f16", "--kl-divergence-base", str(temporary)], on_chunk
        )
        if not temporary.exists() or temporary.stat().st_size < 32:
            raise PytqError(f"the text is too short: llama-perplexity wants two chunks of {setup.ctx} tokens")
        made = int.from_bytes(
            temporary.read_bytes()[16:20] if temporary.stat().st_size < 64 else _head(temporary)[16:20],
            "little",
        )
        if made < setup.chunks:
            raise PytqError(
                f"the text has only {made} chunks of {setup.ctx} tokens: give a longer --text, or --chunks {max(made, 1)}"
            )
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(64)


def cache_bits(setup: Setup, type_k: str, type_v: str) -> float:
    """Bits per value over K and V of the whole cache, scales counted, with what the profile selects."""
    info = estimate.open_model(setup.model)
    if setup.profile == "none":
        info = dataclasses.replace(info, profile=None)
    elif setup.profile:
        info = dataclasses.replace(info, profile=read_layout(Path(setup.profile)))
    plan = estimate.Plan(setup.ctx)
    return float(estimate.cache_size(info.hparams, estimate.resolve(info, (type_k, type_v)), plan).bits)


def score(
    setup: Setup,
    build: BuildDir,
    base: Path,
    type_k: str,
    type_v: str,
    on_chunk: Callable[[int], None] | None = None,
) -> Score:
    """Compares one pair of types with the reference."""
    extra = ["-ctk", type_k, "-ctv", type_v, "--kl-divergence-base", str(base), "--kl-divergence"]
    if build.kind == "patched" and setup.profile:
        extra += ["--kv-profile", setup.profile]
    bits = cache_bits(setup, type_k, type_v)
    figures: dict[str, Any] = dict(parse_statistics(_perplexity(setup, build, extra, on_chunk)))
    return Score(type_k, type_v, build.kind, bits, **figures)


def noise_floor(
    setup: Setup, stock: BuildDir, base: Path, on_chunk: Callable[[int], None] | None = None
) -> Score:
    """f16 against f16 with one thread and micro-batches of another size: what a difference must exceed to mean anything."""
    extra = ["-ctk", "f16", "-ctv", "f16", "--kl-divergence-base", str(base), "--kl-divergence", "-ub", "256"]
    figures: dict[str, Any] = dict(parse_statistics(_perplexity(setup, stock, extra, on_chunk, threads=1)))
    return Score("f16", "f16", stock.kind, 16.0, **figures, note="f16, other batches (noise)")


def build_for(type_k: str, type_v: str, stock: BuildDir, patched: Callable[[], BuildDir]) -> BuildDir:
    """Stock types are measured in the stock build; anything that upstream does not offer in the patched one."""
    ours = ("mxfp4", "nvfp4")
    return patched() if any(estimate.is_pytq(t) or t in ours for t in (type_k, type_v)) else stock


def rows(scores: Sequence[Score]) -> list[dict[str, Any]]:
    """For --json: the fields of every score and its name."""
    return [{"name": s.name, **dataclasses.asdict(s)} for s in scores]


def plot(scores: Sequence[Score], floor: Score | None, target: Path) -> None:
    """KLD against bits per value as a picture; the noise floor as a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for s in scores:
        colour = PLOT_PYTQ if s.build == "patched" else PLOT_STOCK
        axes.errorbar(s.bits, s.kld_mean, yerr=s.kld_mean_err, fmt="o", color=colour, capsize=2)
        axes.annotate(s.name, (s.bits, s.kld_mean), textcoords="offset points", xytext=(5, 4), fontsize=8)
    if floor is not None and floor.kld_mean > 0:
        axes.axhline(floor.kld_mean, color="k", linestyle=":", linewidth=1)
    axes.set_yscale("log")
    axes.set_xlabel("bits per value of the KV cache, all scales counted")
    axes.set_ylabel("mean KL divergence from the f16 cache")
    axes.grid(True, which="both", alpha=0.3)
    figure.tight_layout()
    figures.save(figure, target)


# ------------------------------------------------------------------------------------------------ needle

NEEDLE = "The secret number of the blue lighthouse is {number}. Remember it."
QUESTION = "\n\nQuestion: What is the secret number of the blue lighthouse?\nAnswer: The secret number of the blue lighthouse is"


@dataclass(frozen=True)
class Needle:
    """One retrieval: found says for every pair of types whether the answer held the number."""

    length: int
    depth: float
    number: str
    found: dict[str, bool]


def haystack(text: str, words: int, depth: float, number: str) -> str:
    """``words`` words of the text with the needle after the share ``depth`` of them, and the question at the end."""
    pieces = text.split()
    if len(pieces) < words:
        raise PytqError(
            f"the text has {len(pieces)} words, {words} are needed: give a longer --text or smaller --lengths"
        )
    at = int(words * depth)
    return " ".join([*pieces[:at], NEEDLE.format(number=number), *pieces[at:words]]) + QUESTION


def ask(setup: Setup, build: BuildDir, type_k: str, type_v: str, prompt: Path) -> str:
    """Greedy continuation of a prompt file by llama-completion."""
    command = [
        str(build.program("llama-completion")), "-m", str(setup.model), "-f", str(prompt), "-c", str(setup.ctx), "-n", "12", "--temp", "0",
        "-no-cnv", "--no-display-prompt", "--no-warmup", "-fa", "on", "-ctk", type_k, "-ctv", type_v, "--seed", "1",
    ]  # fmt: skip
    if setup.threads:
        command += ["-t", str(setup.threads)]
    if build.kind == "patched" and setup.profile:
        command += ["--kv-profile", setup.profile]
    env = {**os.environ, "LD_LIBRARY_PATH": str(build.lib)}
    done = subprocess.run(
        command, capture_output=True, text=True, errors="replace", env=env, stdin=subprocess.DEVNULL
    )
    if done.returncode != 0:
        raise PytqError(
            f"llama-completion failed (status {done.returncode}): {_reason(done.stderr.splitlines())}"
        )
    return done.stdout
