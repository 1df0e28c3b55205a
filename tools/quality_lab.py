"""Compares key transforms offline: calibrates on one text, replays another one's queries and keys through the codec.

    python tools/quality_lab.py MODEL.gguf [--text FILE] [--windows 3] [--layers 0,4,8] [--families kv3,kv4]

Prints, per variant and layout, the squared error of the attention branch relative to the residual stream (the sum over layers) and
the mean KL divergence of the attention weights. Seconds per row; llama-perplexity (``pytq eval``) has the last word.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from pytq import calibrate as cal
from pytq.codec.rotation import hadamard
from pytq.codec.table import find_type
from pytq.evaluate import default_text
from pytq.ffi import ffi, lib
from pytq.paths import find_build
from pytq.stats import Attention, LayerStats, accumulate, attention_weights, output_factors, run_windows

WINDOW, ROWS = 2048, 48


def roundtrip(family: str, x: np.ndarray) -> np.ndarray:
    f, c = ffi(), lib()
    t = c.pytq_type_get(find_type(family, x.shape[1]).id)
    flat = np.ascontiguousarray(x, np.float32)
    blocks, out = np.zeros(len(x) * t.block_bytes, np.uint8), np.empty_like(flat)
    c.pytq_quantize(t, f.cast("float *", flat.ctypes.data), f.cast("void *", blocks.ctypes.data), flat.size)
    c.pytq_dequantize(t, f.cast("void *", blocks.ctypes.data), f.cast("float *", out.ctypes.data), flat.size)
    return out


def folded(s: cal.Solution, groups: tuple[tuple[int, int], ...]) -> tuple[np.ndarray, np.ndarray]:
    a, b, at = s.rot_k.copy(), s.rot_q.copy(), 0
    for n, _ in groups:
        part = slice(at, at + n)
        scale = np.sqrt(s.q_var[part].mean())
        h = np.asarray(hadamard(n), np.float64)
        a[part], b[part] = h @ a[part] * scale, h @ b[part] / scale
        at += n
    return a, b


def transform(
    variant: str, st: LayerStats, head: int, family: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:
    """(A, A^-T, c, type) of one KV head."""
    h = np.asarray(hadamard(st.d_k), np.float64)
    if variant == "hadamard":
        return h, h, np.zeros(st.d_k), family
    if variant == "centre":
        return h, h, st.k_mean()[head], family
    share = {
        "plain": (1.0, 1e9),
        "weighted": (0.0, 0.0),
        "blend 50 %": (0.5, 0.1),
        "blend 15 %": (0.15, 0.1),
    }[variant]
    cal.PLAIN_SHARE_K, cal.PLAIN_SHARE_Q = share
    s = cal.solve(st, head)
    kind = f"{family}s" if family != "kv5" else family
    return *folded(s, find_type(kind, st.d_k).groups), s.centre, kind


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", type=Path)
    p.add_argument("--text", type=Path)
    p.add_argument("--windows", type=int, default=3)
    p.add_argument("--layers")
    p.add_argument("--families", default="kv2,kv3,kv4")
    a = p.parse_args()
    keep = None if a.layers is None else {int(x) for x in a.layers.split(",")}
    lib_dir = find_build("stock").lib
    wo = output_factors(a.model, 10**6)
    stats: dict[int, LayerStats] = {}
    share: dict[int, list[float]] = {}
    test: dict[int, Attention] = {}

    def spread(text: bytes, count: int):  # type: ignore[no-untyped-def]
        def windows(tokenize, n_train):  # type: ignore[no-untyped-def]
            ids = tokenize(text)
            step = (len(ids) - WINDOW) // max(count - 1, 1)
            return [ids[i * step : i * step + WINDOW] for i in range(count)]

        return windows

    def collect(x: Attention) -> None:
        if keep is None or x.layer in keep:
            st = stats.setdefault(x.layer, LayerStats(x.q.shape[0], x.k.shape[0], x.k.shape[2], x.v.shape[2]))
            accumulate(st, x, wo.get(x.layer))

    def on_window(c, i, n):  # type: ignore[no-untyped-def]
        for il, parts in c.shares.items():
            share.setdefault(il, []).append(float(np.mean(parts)))
        c.shares.clear()

    run_windows(a.model, lib_dir, spread(cal.calibration_text(), a.windows), collect, on_window=on_window)
    text = a.text.read_bytes() if a.text else default_text()
    run_windows(a.model, lib_dir, spread(text, 1), lambda x: test.__setitem__(x.layer, x))
    rows = slice(WINDOW // 2 + 5, None, WINDOW // 2 // ROWS)
    for family in a.families.split(","):
        for variant in ("hadamard", "centre", "plain", "weighted", "blend 50 %", "blend 15 %"):
            error = kl = bits = 0.0
            for il, st in stats.items():
                x = test[il]
                k = np.empty_like(x.k)
                for h in range(st.n_kv):
                    rot, back, c, kind = transform(variant, st, h, family)
                    k[h] = roundtrip(kind, (x.k[h] - c) @ rot.T) @ back + c
                bits += find_type(kind, st.d_k).bits_per_value / len(stats)
                moved = Attention(il, x.q, k, x.v, x.mask, x.scale, x.softcap, x.sinks)
                num = den = 0.0
                for q in range(st.n_head):
                    v = x.v[q // (st.n_head // st.n_kv)] @ (
                        wo[il][q] if il in wo else np.eye(st.d_v, dtype=np.float32)
                    )
                    p0, p1 = attention_weights(x, q, rows), attention_weights(moved, q, rows)
                    num += float((((p1 - p0) @ v) ** 2).sum())
                    den += float(((p0 @ v) ** 2).sum())
                    kl += (
                        float((p0 * np.log(np.maximum(p0, 1e-20) / np.maximum(p1, 1e-20))).sum() / len(p0))
                        / st.n_head
                        / len(stats)
                    )
                error += num / den * float(np.mean(share.get(il, [0.25])))
            print(
                f"{family}  {variant:12s} {bits:.3f} bits   branch error {error:.5f}   attention KL {kl:.5f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
