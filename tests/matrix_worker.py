"""Runs one model with many cache types in a process of its own and prints the logits' errors against f16 as JSON.

usage: python -m tests.matrix_worker MODEL PAIR [PAIR ...]     a pair is TYPE_K/TYPE_V
"""

from __future__ import annotations

import json
import sys

import numpy as np

from pytq.codec.table import cache_type_id
from pytq.llama import _load_binding

N_PROMPT, N_DECODE = 64, 6


def logits(lc, model, type_k: str, type_v: str, observe=None, threads: int = 2) -> np.ndarray:
    """Logits of every token: one batch of 64, then single tokens. float32 [N_PROMPT + N_DECODE, n_vocab].

    observe: a ggml_backend_sched_eval_callback, or None.
    """
    params = lc.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = 256, 64, 64
    params.type_k, params.type_v = cache_type_id(type_k), cache_type_id(type_v)
    params.flash_attn_type = lc.LLAMA_FLASH_ATTN_TYPE_ENABLED
    params.n_threads = params.n_threads_batch = threads
    if observe is not None:
        params.cb_eval = observe
    ctx = lc.llama_init_from_model(model, params)
    if not ctx:
        raise SystemExit(f"no context for {type_k}/{type_v}")
    n_vocab = lc.llama_vocab_n_tokens(lc.llama_model_get_vocab(model))
    tokens = np.random.default_rng(5).integers(10, n_vocab, N_PROMPT + N_DECODE)
    out = np.empty((len(tokens), n_vocab), np.float32)
    at = 0
    for n in (N_PROMPT, *([1] * N_DECODE)):
        batch = lc.llama_batch_init(n, 0, 1)
        batch.n_tokens = n
        for i in range(n):
            batch.token[i] = int(tokens[at + i])
            batch.pos[i] = at + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = 1
        if lc.llama_decode(ctx, batch) != 0:
            raise SystemExit(f"decode failed for {type_k}/{type_v}")
        for i in range(n):
            out[at + i] = np.ctypeslib.as_array(lc.llama_get_logits_ith(ctx, i), (n_vocab,))
        lc.llama_batch_free(batch)
        at += n
    lc.llama_free(ctx)
    return out


def main() -> None:
    lc = _load_binding()
    lc.llama_backend_init()
    params = lc.llama_model_default_params()
    model = lc.llama_model_load_from_file(sys.argv[1].encode(), params)
    if not model:
        raise SystemExit("model did not load")
    ref = logits(lc, model, "f16", "f16")
    rows = {}
    for pair in sys.argv[2:]:
        got = logits(lc, model, *pair.split("/"))
        err = np.linalg.norm(got - ref, axis=1) / np.linalg.norm(ref, axis=1)
        rows[pair] = {
            "finite": bool(np.isfinite(got).all()),
            "prefill": float(np.sqrt((err[:N_PROMPT] ** 2).mean())),
            "decode": float(np.sqrt((err[N_PROMPT:] ** 2).mean())),
        }
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
