"""Writes a small Qwen2-shaped model with random weights and large constant QKV biases, for testing caches of constant keys.

    python tools/make_biased_model.py TOKENIZER_FROM.gguf OUT.gguf [--bias 30]

The tokenizer is copied from another GGUF model. The weights mean nothing, but attention is selective enough (logits of a few
units) that a cache which spends its bits on the constant loses what distinguishes one key from the next.
"""

from __future__ import annotations

import argparse

import gguf
import numpy as np

SLOW_BAND = 24  # of 32; slower than a turn in 200,000 tokens at the rotary base below
LAYERS, EMBD, HEADS, KV_HEADS, HEAD_DIM, FFN = 4, 256, 4, 2, 64, 512


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("tokenizer")
    p.add_argument("out")
    p.add_argument(
        "--bias", type=float, default=30.0, help="largest bias of K, in units of the spread of keys"
    )
    p.add_argument("--seed", type=int, default=0)
    a = p.parse_args()
    rng = np.random.default_rng(a.seed)
    reader = gguf.GGUFReader(a.tokenizer)
    w = gguf.GGUFWriter(a.out, "qwen2")
    w.add_name(f"biased {a.bias:g}")
    w.add_block_count(LAYERS)
    w.add_context_length(8192)
    w.add_embedding_length(EMBD)
    w.add_feed_forward_length(FFN)
    w.add_head_count(HEADS)
    w.add_head_count_kv(KV_HEADS)
    w.add_rope_freq_base(1e6)
    w.add_layer_norm_rms_eps(1e-6)
    for key, f in reader.fields.items():
        if key.startswith("tokenizer."):
            sub = f.types[-1] if f.types[0] == gguf.GGUFValueType.ARRAY else None
            w.add_key_value(key, f.contents(), f.types[0], sub)
    n_vocab = len(reader.fields["tokenizer.ggml.tokens"].data)

    def matrix(rows: int, cols: int, gain: float = 1.0) -> np.ndarray:
        return (gain * rng.standard_normal((rows, cols)) / np.sqrt(cols)).astype(np.float16)

    w.add_tensor("token_embd.weight", rng.standard_normal((n_vocab, EMBD)).astype(np.float16))
    ones = np.ones(EMBD, np.float32)
    for i in range(LAYERS):
        b = f"blk.{i}."
        w.add_tensor(b + "attn_norm.weight", ones)
        w.add_tensor(b + "ffn_norm.weight", ones)
        for name, rows, gain in (
            ("attn_q", HEADS * HEAD_DIM, 1.5),
            ("attn_k", KV_HEADS * HEAD_DIM, 1.0),
            ("attn_v", KV_HEADS * HEAD_DIM, 1.0),
        ):
            w.add_tensor(f"{b}{name}.weight", matrix(rows, EMBD, gain))
            # as in the models this imitates, a few coordinates carry very large constants, in the slowest rotary bands
            band = np.arange(rows) % (HEAD_DIM // 2)
            size = 0.5 * rng.random(rows)
            if name == "attn_k":
                size = np.where(band >= SLOW_BAND, a.bias * rng.random(rows) ** 2, size)
            w.add_tensor(f"{b}{name}.bias", (size * np.sign(rng.standard_normal(rows))).astype(np.float32))
        w.add_tensor(b + "attn_output.weight", matrix(EMBD, HEADS * HEAD_DIM, 2.0))
        w.add_tensor(b + "ffn_gate.weight", matrix(FFN, EMBD))
        w.add_tensor(b + "ffn_up.weight", matrix(FFN, EMBD))
        w.add_tensor(b + "ffn_down.weight", matrix(EMBD, FFN))
    w.add_tensor("output_norm.weight", ones / 4)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


if __name__ == "__main__":
    main()
