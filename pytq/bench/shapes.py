"""Models of a named shape with random weights, for machines where the user has no model.

Speed does not depend on the values of the weights, so these measure what a real model of the shape would do; their
text is noise. The vocabulary comes from a real model, because llama.cpp refuses a model without a tokenizer.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

from pytq.errors import PytqError
from pytq.gguf.edit import atomic, encode_field, encode_tensor
from pytq.gguf.layout import DEFAULT_ALIGNMENT, MAGIC, PREFIX, pad, read_layout

POOL_ROWS = 512  # distinct random rows per tensor; further rows repeat them
Q4_BLOCK, Q4_BYTES = 32, 18
CONV_KERNEL = 3  # taps of the hybrid's short convolutions


@dataclass(frozen=True)
class Shape:
    """A transformer's dimensions; ``window`` > 0 makes a Gemma-3-like model with sliding-window layers.

    ``conv_layers`` makes an LFM2-like hybrid: those layers hold a convolution state instead of a KV cache
    (LFM2 needs ``embd == heads * head_dim``).
    """

    layers: int
    embd: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    ctx: int = 131072
    window: int = 0
    period: int = 6
    conv_layers: tuple[int, ...] = ()
    about: str = ""

    @property
    def arch(self) -> str:
        if self.conv_layers:
            return "lfm2"
        return "gemma3" if self.window else "llama"


SHAPES: dict[str, Shape] = {
    "llama-8b": Shape(32, 4096, 32, 8, 128, 14336, about="Llama 3.1 8B: 4.2 GiB"),
    "llama-3b": Shape(28, 3072, 24, 8, 128, 8192, about="Llama 3.2 3B"),
    "llama-1b": Shape(16, 2048, 32, 8, 64, 8192, about="Llama 3.2 1B"),
    "qwen3-4b": Shape(36, 2560, 32, 8, 128, 9728, about="Qwen3 4B, without its q/k norms"),
    "phi-80": Shape(32, 2560, 32, 32, 80, 10240, about="head_dim 80, no grouping (Phi-2)"),
    "phi-96": Shape(32, 3072, 32, 32, 96, 8192, about="head_dim 96, no grouping (Phi-3 mini)"),
    "gemma-1b": Shape(
        26, 1152, 4, 1, 256, 6912, 32768, 512, about="Gemma 3 1B: head_dim 256, 512-token windows"
    ),
    "attn-heavy": Shape(4, 1024, 8, 2, 128, 2048, about="small weights, so attention dominates: 40 MB"),
    "tiny": Shape(2, 256, 4, 2, 64, 512, 8192, about="for a quick try: seconds on anything"),
}


def get_shape(name: str) -> Shape:
    """PytqError listing the known names when there is no such shape."""
    if name not in SHAPES:
        known = ", ".join(SHAPES)
        raise PytqError(f"unknown shape {name!r}; known: {known}")
    return SHAPES[name]


def tensors(shape: Shape, n_vocab: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes (rows first, as NumPy has them) of all tensors, in file order; one-dimensional ones are norms."""
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    yield "token_embd.weight", (n_vocab, shape.embd)
    norm = "token_embd_norm.weight" if shape.arch == "lfm2" else "output_norm.weight"
    yield norm, (shape.embd,)
    if shape.arch == "llama":
        yield "output.weight", (n_vocab, shape.embd)
    for i in range(shape.layers):
        p = f"blk.{i}."
        yield p + "attn_norm.weight", (shape.embd,)
        yield p + "ffn_norm.weight", (shape.embd,)
        if i in shape.conv_layers:
            yield p + "shortconv.conv.weight", (shape.embd, CONV_KERNEL)
            yield p + "shortconv.in_proj.weight", (3 * shape.embd, shape.embd)
            yield p + "shortconv.out_proj.weight", (shape.embd, shape.embd)
        else:
            yield p + "attn_q.weight", (q, shape.embd)
            yield p + "attn_k.weight", (kv, shape.embd)
            yield p + "attn_v.weight", (kv, shape.embd)
            yield p + "attn_output.weight", (shape.embd, q)
            if shape.arch != "llama":
                yield p + "attn_q_norm.weight", (shape.head_dim,)
                yield p + "attn_k_norm.weight", (shape.head_dim,)
        if shape.arch == "gemma3":
            yield p + "post_attention_norm.weight", (shape.embd,)
            yield p + "post_ffw_norm.weight", (shape.embd,)
        yield p + "ffn_gate.weight", (shape.ffn, shape.embd)
        yield p + "ffn_up.weight", (shape.ffn, shape.embd)
        yield p + "ffn_down.weight", (shape.embd, shape.ffn)


def model_bytes(shape: Shape, n_vocab: int) -> int:
    """Bytes of all tensors."""
    return sum(_nbytes(dims) for _, dims in tensors(shape, n_vocab))


def _is_f32(dims: tuple[int, ...]) -> bool:
    return len(dims) == 1 or dims[-1] % Q4_BLOCK != 0


def _nbytes(dims: tuple[int, ...]) -> int:
    return int(np.prod(dims)) * 4 if _is_f32(dims) else int(np.prod(dims)) // Q4_BLOCK * Q4_BYTES


def small_vocab(path: Path, n: int = 300) -> Path:
    """A tokenizer of bytes and digits without a model, so that a few hundred kilobytes are enough for a model that loads."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(
        ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *map(str, range(n - 259))]
    )
    writer.add_token_scores([0.0] * n)
    writer.add_token_types([2, 3, 3, *([6] * 256), *([1] * (n - 259))])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_model(
    shape: Shape,
    name: str,
    vocab: Path,
    target: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Writes the model atomically; ``progress`` gets the bytes of tensor data written so far, and all.

    Raises PytqError when ``vocab`` has no tokenizer or the disk is full.
    """
    source = read_layout(vocab)
    tokens = source.fields.get("tokenizer.ggml.tokens")
    if tokens is None:
        raise PytqError(f"{vocab}: has no tokenizer to take the vocabulary from")
    plan = list(tensors(shape, tokens.count))
    total = model_bytes(shape, tokens.count)
    need = total + (64 << 20)
    free = _free_bytes(target.parent)
    if free < need:
        raise PytqError(f"{name} needs {need >> 20} MiB in {target.parent}, {free >> 20} MiB are free")
    fields = _fields(shape, name, tokens.count)
    fields += [field.raw for key, field in source.fields.items() if key.startswith("tokenizer.")]
    entries, offset = [], 0
    for tensor, dims in plan:
        kind = gguf.GGMLQuantizationType.F32 if _is_f32(dims) else gguf.GGMLQuantizationType.Q4_0
        size = _nbytes(dims)
        entries.append(encode_tensor(tensor, dims[::-1], kind, offset))
        offset += pad(size, DEFAULT_ALIGNMENT)
    header = PREFIX.pack(MAGIC, gguf.GGUF_VERSION, len(entries), len(fields)) + b"".join(fields + entries)
    random = np.random.default_rng(0)
    done = 0
    with atomic(target) as out:
        out.write(header + bytes(-len(header) % DEFAULT_ALIGNMENT))
        for _, dims in plan:
            for chunk in _data(dims, random):
                out.write(chunk)
                done += len(chunk)
                progress(done, total)
            out.write(bytes(-out.tell() % DEFAULT_ALIGNMENT))


def _free_bytes(directory: Path) -> int:
    try:
        stat = os.statvfs(directory)
    except OSError as error:
        raise PytqError(f"cannot write in {directory}: {error.strerror}") from error
    return stat.f_bavail * stat.f_frsize


def _fields(shape: Shape, name: str, n_vocab: int) -> list[bytes]:
    """The encoded fields of the model, without the tokenizer's."""
    u32, f32, string, array = (
        gguf.GGUFValueType.UINT32,
        gguf.GGUFValueType.FLOAT32,
        gguf.GGUFValueType.STRING,
        gguf.GGUFValueType.ARRAY,
    )
    a = shape.arch
    out = [
        encode_field("general.architecture", string, a),
        encode_field("general.name", string, f"pytq shape {name} (random weights)"),
        encode_field(f"{a}.attention.layer_norm_rms_epsilon", f32, 1e-5),
        encode_field(f"{a}.rope.freq_base", f32, 500000.0),
    ]
    numbers = {
        "block_count": shape.layers,
        "context_length": shape.ctx,
        "embedding_length": shape.embd,
        "feed_forward_length": shape.ffn,
        "attention.head_count": shape.heads,
        "attention.key_length": shape.head_dim,
        "attention.value_length": shape.head_dim,
        "rope.dimension_count": shape.head_dim,
        "vocab_size": n_vocab,
    }
    heads_kv = [0 if i in shape.conv_layers else shape.kv_heads for i in range(shape.layers)]
    if shape.conv_layers:
        numbers["shortconv.l_cache"] = CONV_KERNEL
        out.append(encode_field(f"{a}.attention.head_count_kv", array, heads_kv, gguf.GGUFValueType.INT32))
    else:
        numbers["attention.head_count_kv"] = shape.kv_heads
    if shape.window:
        numbers["attention.sliding_window"] = shape.window
        pattern = [i % shape.period < shape.period - 1 for i in range(shape.layers)]
        key = f"{a}.attention.sliding_window_pattern"
        out.append(encode_field(key, array, pattern, gguf.GGUFValueType.BOOL))
    return out + [encode_field(f"{a}.{key}", u32, value) for key, value in numbers.items()]


def _data(dims: tuple[int, ...], random: np.random.Generator) -> Iterator[bytes]:
    """A tensor's bytes: ones for norms, small f32 values for convolutions, random Q4_0 blocks for matrices.

    Scales of 0.25 / sqrt(columns) keep the activations of every layer near 1, so no run meets infinities.
    """
    if len(dims) == 1:
        yield np.ones(dims, np.float32).tobytes()
    elif _is_f32(dims):
        yield (random.standard_normal(dims) * 0.3).astype(np.float32).tobytes()
    else:
        rows, blocks = dims[0], dims[1] // Q4_BLOCK
        pool = np.empty((min(rows, POOL_ROWS), blocks, Q4_BYTES), np.uint8)
        pool[:, :, :2] = np.float16(0.25 / np.sqrt(dims[1])).reshape(1).view(np.uint8)
        pool[:, :, 2:] = random.integers(0, 256, (len(pool), blocks, Q4_BYTES - 2), np.uint8)
        data = pool.tobytes()
        row = blocks * Q4_BYTES
        for start in range(0, rows, len(pool)):
            yield data[: min(len(pool), rows - start) * row]
