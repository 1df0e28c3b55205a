"""``pytq calibrate``: from a model and a text to the transforms, and to the types that spend a budget of bits best.

Attention only sees q.k. With keys stored as A (k - c) and queries multiplied by A^-T, an error e of the stored key adds
(A^-T q).e to the logit. To first order that moves the attention's output by p (v - o) (q.e), p the attention weight of the key, o
the output. So the expected squared error is a sum over (query, key) pairs with weights w = p^2 |W_o (v - o)|^2, and with errors
isotropic in the stored space and in proportion to the stored key's norm it is

    tr(Sq A^-1 A^-T) tr(A Sk A^T),   Sq = E_w[q q^T],  Sk = E_w[(k - c)(k - c)^T],  c = E_w[k].

With G = Sk^1/2 Sq Sk^1/2 = U diag(g) U^T the minimum is at A = diag(g^1/4) U^T Sk^-1/2 (docs/calibrate.md derives it). What the
weights change is measured in docs/quality.md: plain averages are dominated by keys that no query attends to.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sysconfig
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pytq import __version__
from pytq.codec.table import load_types
from pytq.errors import PytqError
from pytq.gguf.layout import Layout, read_layout
from pytq.paths import source_root
from pytq.profile import LayerProfile, Profile, fingerprint
from pytq.stats import (
    Attention,
    Collector,
    LayerStats,
    accumulate,
    band_statistics,
    dequantize,
    output_factors,
    run_windows,
)

F64 = npt.NDArray[np.float64]

WINDOW = 2048
DEFAULT_TOKENS = 12288
MIN_DOCSTRING = 200
# Blend of the weighted moments with the plain ones: the weights concentrate on few pairs, so their moments alone are noisy.
PLAIN_SHARE_K = 0.15
PLAIN_SHARE_Q = 0.1
RIDGE = 1e-3
# Mean squared error of the codes for unit variance, whole blocks with 8-bit scales (docs/quality.md has the command).
CODE_MSE = {1: 0.262, 2: 0.0846, 3: 0.0239, 4: 0.00655, 5: 0.0022}
# Errors of values count this much of what the prediction says, next to errors of keys (docs/quality.md).
VALUE_WEIGHT = 0.55
BUDGETS = {"auto2": 2.5, "auto3": 3.5, "auto4": 4.5}
DEFAULT_BITS = 3.5
FAMILIES = ("kv2", "kv3", "kv4", "kv5")


def calibration_text() -> bytes:
    """Docstrings of the standard library's top-level modules, in the order of file names: UTF-8, the same for one Python version."""
    out: list[str] = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                doc = ast.get_docstring(node)
                if doc and len(doc) > MIN_DOCSTRING:
                    out.append(doc)
    if not out:
        raise PytqError("this Python has no sources of its standard library: give a text with --text")
    return "\n\n".join(out).encode()


@dataclass(frozen=True)
class Solution:
    """One KV head: A and A^-T [d, d], c [d], and the spectra of stored queries and keys [d]."""

    rot_k: F64
    rot_q: F64
    centre: F64
    q_var: F64
    k_var: F64
    gain: float


def _unit(s: F64) -> F64:
    trace = float(np.trace(s))
    return s * (len(s) / trace) if trace > 0 else np.eye(len(s))


def _power(s: F64, p: float) -> F64:
    val, vec = np.linalg.eigh(s)
    return np.asarray((vec * np.maximum(val, val[-1] * 1e-12) ** p) @ vec.T)


def solve(st: LayerStats, head: int, *, keep_centre: bool = False) -> Solution:
    """The transform of one KV head (module docstring). keep_centre: c = 0, for models whose softmax sees q.c."""
    d = st.d_k
    w = st.w_sum[head]
    if not (w > 0 and st.tokens > 0):
        raise PytqError("a KV head received no attention in the calibration text: give more text")
    wk, plain = st.wk_sum[head] / w, st.k_mean()[head]
    c = np.zeros(d) if keep_centre else (1 - PLAIN_SHARE_K) * wk + PLAIN_SHARE_K * plain

    def about(second: F64, mean: F64) -> F64:
        return second - np.outer(mean, c) - np.outer(c, mean) + np.outer(c, c)

    weighted = about(st.wk_out[head] / w, wk)
    unweighted = about(st.k_out[head] / st.tokens, plain)
    blend = (1 - PLAIN_SHARE_K) * _unit(weighted) + PLAIN_SHARE_K * _unit(unweighted)
    sk = _unit(blend) + RIDGE * np.eye(d)
    sq = _unit(_unit(st.wq_out[head]) + PLAIN_SHARE_Q * _unit(st.q_out[head])) + RIDGE * np.eye(d)
    half, inverse = _power(sk, 0.5), _power(sk, -0.5)
    g, u = np.linalg.eigh(half @ sq @ half)
    g, u = np.maximum(g[::-1], 1e-12), u[:, ::-1]
    # eigenvectors have no sign of their own: fix it, so that every BLAS gives the same file
    u = u * np.where(u[np.abs(u).argmax(axis=0), np.arange(d)] < 0, -1.0, 1.0)
    a = g**0.25
    rot_k, rot_q = (a[:, None] * u.T) @ inverse, (u.T / a[:, None]) @ half
    q_true, k_true = st.wq_out[head] / w, weighted
    q_var = np.einsum("ij,jk,ik->i", rot_q, q_true, rot_q)
    k_var = np.einsum("ij,jk,ik->i", rot_k, k_true, rot_k)
    plain_cost = (
        np.trace(q_true)
        * np.trace(about(st.wk_out[head] / w, wk) if keep_centre else st.wk_out[head] / w)
        / d
    )
    return Solution(
        rot_k,
        rot_q,
        c,
        np.maximum(q_var, 1e-30),
        np.maximum(k_var, 1e-30),
        float(plain_cost / (q_var.sum() * k_var.sum() / d)),
    )


def groups_of(family: str, head_dim: int, side: str) -> list[tuple[int, int]]:
    """(coordinates, bits) of the layout that a flag takes for keys with a profile ("k": split where there is one) or values ("v")."""
    rows = {(t.family, t.head_dim): t for t in load_types()}
    split = rows.get((f"{family}s", head_dim)) if side == "k" else None
    row = split or rows.get((family, head_dim))
    if row is None:
        raise PytqError(f"cache type {family} has no block for head_dim {head_dim}")
    return list(row.groups)


def type_bits(family: str, head_dim: int, side: str) -> float:
    """Bits per value as stored, scales counted."""
    groups = groups_of(family, head_dim, side)
    return (sum(n * b for n, b in groups) + 8 * len(groups)) / head_dim


def key_error(s: Solution, groups: Sequence[tuple[int, int]]) -> float:
    """Expected squared logit error per pair, weighted; the mixing makes the error of a group isotropic."""
    total, at = 0.0, 0
    for n, b in groups:
        part = slice(at, at + n)
        total += CODE_MSE[b] * float(s.q_var[part].mean() * s.k_var[part].sum())
        at += n
    return total


@dataclass
class LayerReport:
    """Predicted squared error of the layer's attention branch, relative to the residual stream, by family."""

    layer: int
    head_dim: int
    n_kv: int
    d_v: int
    gain: float
    error_k: dict[str, float]
    error_v: dict[str, float]


def layer_report(
    layer: int, st: LayerStats, heads: Sequence[Solution], scale: float, wo: npt.NDArray[np.float32] | None
) -> LayerReport:
    """Predictions for one layer. scale: the factor between q.k and the logit."""
    share = st.share / st.share_n if st.share_n else 0.25
    out = max(st.o_sum, 1e-30)
    error_k = {
        f: share
        * scale**2
        * sum(float(st.w_sum[h]) * key_error(heads[h], groups_of(f, st.d_k, "k")) for h in range(st.n_kv))
        / out
        for f in FAMILIES
    }
    group = st.n_head // st.n_kv
    error_v = {}
    for f in FAMILIES:
        mse = CODE_MSE[groups_of(f, st.d_v, "v")[0][1]]
        total = 0.0
        for h in range(st.n_kv):
            power = st.d_v if wo is None else np.mean([np.sum(wo[h * group + i] ** 2) for i in range(group)])
            total += float(st.wv[h]) * mse * float(power)
        error_v[f] = VALUE_WEIGHT * share * total / out
    gain = float(np.mean([s.gain for s in heads]))
    return LayerReport(layer, st.d_k, st.n_kv, st.d_v, gain, error_k, error_v)


def spend(reports: Sequence[LayerReport], budget: float, n_layer: int) -> tuple[list[str], list[str], float]:
    """Families per layer for K and V whose mean bits per value stay within the budget, with the least predicted error.

    Greedy on the convex hull of (bytes, error) of every tensor: the best use of each next byte, exact up to the last step.
    """
    choice: dict[tuple[int, str], str] = {}
    values: dict[tuple[int, str], int] = {}
    for r in reports:
        for side, d in (("k", r.head_dim), ("v", r.d_v)):
            choice[r.layer, side] = FAMILIES[0]
            values[r.layer, side] = r.n_kv * d
    dims = {(r.layer, s): d for r in reports for s, d in (("k", r.head_dim), ("v", r.d_v))}
    errors = {(r.layer, s): e for r in reports for s, e in (("k", r.error_k), ("v", r.error_v))}
    total = sum(values.values())

    def cost(key: tuple[int, str], family: str) -> float:
        return type_bits(family, dims[key], key[1]) * values[key]

    used = sum(cost(key, f) for key, f in choice.items())
    if used > budget * total:
        raise PytqError(
            f"{budget:g} bits per value are fewer than kv2 takes on this model ({used / total:.3f})"
        )
    while True:
        best: tuple[float, tuple[int, str], str] | None = None
        for key, now in choice.items():
            for family in FAMILIES[FAMILIES.index(now) + 1 :]:
                extra = cost(key, family) - cost(key, now)
                if used + extra > budget * total + 1e-9:
                    continue
                rate = (errors[key][now] - errors[key][family]) / extra
                if best is None or rate > best[0]:
                    best = (rate, key, family)
        if best is None:
            break
        _, key, family = best
        used += cost(key, family) - cost(key, choice[key])
        choice[key] = family
    k = [choice.get((i, "k"), "") for i in range(n_layer)]
    v = [choice.get((i, "v"), "") for i in range(n_layer)]
    return k, v, used / total


def window_start(index: int, count: int, n_train: int) -> int:
    """Position of the first token of a calibration window.

    RoPE turns the slow bands of a key with its position, so a transform computed on the first positions alone fails on later ones (at
    8192 tokens it was worse than none). Every other window begins at 0; the rest are spread geometrically up to the training context.
    """
    last = n_train - WINDOW
    if index % 2 == 0 or last < WINDOW:
        return 0
    spread = count // 2  # windows that do not begin at 0
    share = (index // 2) / (spread - 1) if spread > 1 else 1.0
    return int(WINDOW * (last / WINDOW) ** share)


@dataclass
class Calibration:
    profile: Profile
    reports: list[LayerReport]
    gains: dict[int, list[float]]
    seconds: float


def calibrate(
    model: Path,
    lib: Path,
    *,
    text: bytes | None = None,
    tokens: int = DEFAULT_TOKENS,
    bits: float = DEFAULT_BITS,
    threads: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    quiet: bool = True,
) -> Calibration:
    """Runs the model over the text and solves the transforms of every layer that has a cache.

    Args:
        lib: directory of a build's libllama (the stock one will do).
        text: UTF-8; the default is :func:`calibration_text`.
        tokens: at most this many, in windows of 2048 spread over the whole text.
        bits: budget of the type ``auto`` recommends.
    Raises:
        PytqError: text too short, model without a cache that calibration understands, or values that are not finite.
    """
    started = time.monotonic()
    layout = read_layout(model)
    if text is None:
        text = calibration_text()
    arch = str(layout.get("general.architecture"))
    n_layer = int(layout.get(f"{arch}.block_count", 0))
    wo = output_factors(model, n_layer)
    stats: dict[int, LayerStats] = {}
    scales: dict[int, float] = {}
    source = text

    def windows(tokenize: Callable[[bytes], list[int]], n_train: int) -> list[list[int]]:
        size = min(WINDOW, max(n_train, 1)) if n_train else WINDOW
        need = max(1, tokens // size)
        ids = tokenize(source)
        have = len(ids) // size
        if have == 0:
            if len(ids) < 256:
                raise PytqError(
                    f"the calibration text has only {len(ids)} tokens: 256 are needed, {tokens} recommended"
                )
            return [ids]
        count = min(need, have)
        step = (len(ids) - size) // max(count - 1, 1) if count > 1 else 0
        return [ids[i * step : i * step + size] for i in range(count)]

    def on_attention(a: Attention) -> None:
        if a.layer not in stats:
            stats[a.layer] = LayerStats(a.q.shape[0], a.k.shape[0], a.k.shape[2], a.v.shape[2])
        scales[a.layer] = a.scale
        accumulate(stats[a.layer], a, wo.get(a.layer))

    def on_window(collector: Collector, index: int, count: int) -> None:
        for il, parts in collector.shares.items():
            if il in stats:
                stats[il].share += float(np.mean(parts))
                stats[il].share_n += 1
        collector.shares.clear()
        for il, (q, n_rot, mode) in collector.pre_q.items():
            if il in stats:
                st = stats[il]
                total, magnitude = band_statistics(q, n_rot, mode)
                st.pre_q = total if st.pre_q is None else st.pre_q + total
                st.pre_q_abs = magnitude if st.pre_q_abs is None else st.pre_q_abs + magnitude
                st.pre_n += len(q)
        collector.pre_q.clear()
        if on_progress is not None:
            on_progress(index + 1, count)

    info = run_windows(
        model,
        lib,
        windows,
        on_attention,
        on_window=on_window,
        first_position=window_start,
        threads=threads,
        quiet=quiet,
    )
    profile = Profile(
        fingerprint(layout),
        str(layout.get("general.name", model.stem)),
        arch,
        n_layer,
        int(info["tokens"]),
        hashlib.sha256(text).hexdigest(),
        __version__,
        str(json.loads((source_root() / "patches" / "pin.json").read_text())["commit"]),
    )
    reports: list[LayerReport] = []
    gains: dict[int, list[float]] = {}
    for il, st in sorted(stats.items()):
        for name, x in (
            ("keys", st.k_out),
            ("queries", st.q_out),
            ("values", st.v_out),
            ("weights", st.wq_out),
        ):
            if not np.isfinite(x).all():
                raise PytqError(f"layer {il}: the model's {name} are not finite on this text")
        heads = [solve(st, h, keep_centre=bool(st.softcap) or st.sinks) for h in range(st.n_kv)]
        f32 = np.float32
        profile.layers[il] = LayerProfile(
            np.stack([s.rot_k for s in heads]).astype(f32),
            np.stack([s.rot_q for s in heads]).astype(f32),
            np.stack([s.centre for s in heads]).astype(f32),
            np.stack([s.q_var for s in heads]).astype(f32),
            np.stack([s.k_var for s in heads]).astype(f32),
            np.stack([np.linalg.eigvalsh(v / st.tokens)[::-1] for v in st.v_out]).astype(f32),
            None if st.pre_q is None else (st.pre_q / st.pre_n).astype(f32),
            None if st.pre_q_abs is None else (st.pre_q_abs / st.pre_n).astype(f32),
        )
        gains[il] = [s.gain for s in heads]
        reports.append(layer_report(il, st, heads, scales[il], wo.get(il)))
    for flag, budget in {**BUDGETS, "auto": bits}.items():
        k, v, used = spend(reports, budget, n_layer)
        profile.types[flag], profile.bits[flag] = (k, v), used
    return Calibration(profile, reports, gains, time.monotonic() - started)


# A key bias this many times the spread that the weights can produce means that one scale per vector is spent on a constant.
BIAS_RATIO = 4.0


def constant_key_warning(model: Path | Layout) -> str | None:
    """A sentence for users whose model adds a large constant to every key (QKV bias, as in Qwen2), None for the others.

    Such a model needs a profile: the centre takes the constant out; without, 4-bit caches can fail outright.
    """
    layout = model if isinstance(model, Layout) else read_layout(model)
    raw = np.memmap(layout.path, np.uint8, "r")
    by_name = {t.name: t for t in layout.tensors}

    def read(name: str) -> F64 | None:
        t = by_name.get(name)
        if t is None or t.nbytes is None:
            return None
        start = layout.data_start + t.offset
        try:
            return dequantize(np.asarray(raw[start : start + t.nbytes]), t.ggml_type, t.dims).astype(
                np.float64
            )
        except NotImplementedError:
            return None

    worst = 0.0
    for name in by_name:
        if not name.endswith(".attn_k.bias"):
            continue
        bias, weight = read(name), read(name.removesuffix(".bias") + ".weight")
        if bias is None or weight is None:
            continue
        norm = read(name.replace("attn_k.bias", "attn_norm.weight"))
        # spread of a key's coordinates: rows of the weight times an input of the norm's mean square
        gain = 1.0 if norm is None else float(np.sqrt(np.mean(norm**2)))
        spread = float(np.median(np.sqrt((weight**2).sum(axis=1)))) * gain
        worst = max(worst, float(np.abs(bias).max()) / max(spread, 1e-12))
    if worst < BIAS_RATIO:
        return None
    return (
        f"this model adds large constants to its keys (up to {worst:.0f} times their spread): "
        f"quantised keys need a profile here, run `pytq calibrate {layout.path}`"
    )
