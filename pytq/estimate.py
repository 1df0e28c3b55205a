"""Bytes of a KV cache, without loading the model: the size rules of the pinned llama.cpp.

Sizes follow ``llama_kv_cache`` (cells x layers x row bytes), ``llama_kv_cache_iswa`` (window layers get
``pad(min(n_ctx, n_swa * streams + n_ubatch), 256)`` cells), ``llama_memory_recurrent`` (f32 state per sequence) and
``llama_context`` (contexts padded to 256). Flash attention is taken to be on, as quantised V needs it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytq.codec.table import PATCHED_ONLY, STOCK, load_types
from pytq.errors import PytqError
from pytq.gguf.hparams import SWA, Hparams, Layer, read_hparams
from pytq.gguf.layout import Layout, pad
from pytq.gguf.split import read_model

CTX_PAD = 256  # llama_context pads n_ctx, llama_kv_cache_iswa its window
N_UBATCH = 512  # llama.cpp's default
MIB = 1 << 20
# ggml's own cache types: (values per block, bytes per block)
STOCK_TYPES = {name: (block, size) for name, _, block, size in STOCK}
DEFAULT_PAIRS = "f16,q8_0,q4_0,turbo4,turbo3,kv4,kv4/kv3,kv3,kv2"
UNITS = {"": 1, "k": 10, "m": 20, "g": 30, "t": 40}


AUTO = ("auto", "auto2", "auto3", "auto4")  # resolved per layer by a profile
STORED = "stored"  # no flag at all: what the model file stores, else f16
MIXED = "mixed"  # how llama.cpp's log calls types per layer


@functools.cache
def pytq_types() -> dict[str, dict[int, int]]:
    """Block bytes of every pytq type by flag and head_dim, from the table that C reads too."""
    found: dict[str, dict[int, int]] = {}
    for row in load_types():
        found.setdefault(row.family, {})[row.head_dim] = row.block_bytes
    return found


def flags() -> list[str]:
    """The pytq types a user can name (the split-rate layouts are chosen by a profile, not by a flag)."""
    return [name for name in pytq_types() if not name.endswith("s")]


def known_types() -> list[str]:
    """All names that ``--cache-type-k`` and ``-v`` of the patched build take."""
    return [*STOCK_TYPES, *flags(), *AUTO]


def is_pytq(name: str) -> bool:
    """True for a type that only the patched build has (the stock build does not look for stored types)."""
    return name in pytq_types() or name in AUTO or name in PATCHED_ONLY or name == STORED


def check_type(name: str) -> str:
    """The name itself; PytqError listing the known ones otherwise."""
    if name not in known_types():
        raise PytqError(f"unknown cache type {name!r}; known: {', '.join(known_types())}")
    return name


def parse_pair(text: str) -> tuple[str, str]:
    """``kv4/kv3`` is K and V, ``kv4`` both; PytqError for anything else."""
    parts = text.strip().lower().split("/")
    if len(parts) > 2 or not all(parts):
        raise PytqError(f"{text!r} is no cache type or K/V pair of cache types, such as kv4 or kv4/kv3")
    k, v = parts[0], parts[-1]
    return check_type(k), check_type(v)


def parse_pairs(text: str, stored: bool = False) -> list[tuple[str, str]]:
    """A comma-separated list of types or K/V pairs, without repetitions; with ``stored`` that word is a pair too."""
    pairs = [
        (STORED, STORED) if stored and part.strip().lower() == STORED else parse_pair(part)
        for part in text.split(",")
        if part.strip()
    ]
    if not pairs:
        raise PytqError("no cache type given")
    return list(dict.fromkeys(pairs))


def pair_name(k: str, v: str) -> str:
    return k if k == v else f"{k}/{v}"


def parse_bytes(text: str) -> int:
    """``8GiB``, ``500M`` or a plain number of bytes (all units are powers of 1024)."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?\s*", text, re.IGNORECASE)
    if match is None:
        raise PytqError(f"{text!r} is no size; write it like 8GiB or 500MiB")
    size = int(float(match[1]) * (1 << UNITS[match[2].lower()] if match[2] else 1))
    if size <= 0:
        raise PytqError(f"a size of {text!r} is nothing; give a positive one")
    return size


def head_bytes(name: str, head_dim: int) -> int:
    """Bytes of one stored head vector; PytqError when the type does not fit the head size."""
    table = pytq_types()
    if name in AUTO:
        raise PytqError(f"{name} needs a kv profile that says a type per layer: run `pytq calibrate MODEL`")
    if name in table:
        if head_dim not in table[name]:
            dims = ", ".join(str(d) for d in table[name])
            raise PytqError(
                f"{name} does not exist for head_dim {head_dim} (it does for {dims}); use a stock type"
            )
        return table[name][head_dim]
    block, block_bytes = STOCK_TYPES[check_type(name)]
    if head_dim % block:
        raise PytqError(f"{name} stores blocks of {block} values, which do not fit head_dim {head_dim}")
    return head_dim // block * block_bytes


def bits_per_value(name: str, head_dim: int) -> float:
    """Bits per stored value, every scale counted."""
    return 8 * head_bytes(name, head_dim) / head_dim


@dataclass(frozen=True)
class Plan:
    """How a context is laid out: total ``n_ctx`` tokens for ``n_seq`` sequences."""

    n_ctx: int
    n_seq: int = 1
    unified: bool = False
    n_ubatch: int = N_UBATCH
    swa_full: bool = False

    def __post_init__(self) -> None:
        for what, value in (("context", self.n_ctx), ("parallel", self.n_seq), ("ubatch", self.n_ubatch)):
            if value <= 0:
                raise PytqError(f"{what} must be a positive number, not {value}")

    @property
    def n_stream(self) -> int:
        return 1 if self.unified else self.n_seq

    @property
    def cells(self) -> int:
        """Cells of a full-attention layer, per stream (``n_ctx_seq``)."""
        n_ctx = pad(self.n_ctx, CTX_PAD)
        return n_ctx if self.unified else pad(n_ctx // self.n_seq, CTX_PAD)

    def swa_cells(self, n_swa: int) -> int:
        """Cells of a sliding-window layer, per stream."""
        if self.swa_full:
            return self.cells
        want = n_swa * (self.n_seq if self.unified else 1) + self.n_ubatch
        return pad(min(self.cells, want), CTX_PAD)


@dataclass(frozen=True)
class CacheSize:
    """Bytes of one context's memory: K, V and recurrent state; ``values_*`` count the stored values."""

    k: int
    v: int
    state: int
    values_k: int
    values_v: int

    @property
    def kv(self) -> int:
        return self.k + self.v

    @property
    def total(self) -> int:
        return self.kv + self.state

    @property
    def bits(self) -> float:
        """Bits per value over K and V together, scales counted."""
        values = self.values_k + self.values_v
        return 8 * self.kv / values if values else 0.0


LayerTypes = Callable[[Layer], tuple[str, str]]


def cache_size(model: Hparams, types: tuple[str, str] | LayerTypes, plan: Plan) -> CacheSize:
    """What llama.cpp allocates for ``types`` (K and V, or a function of the layer); PytqError if they do not fit."""
    choose: LayerTypes = types if callable(types) else lambda _: types
    k = v = values_k = values_v = 0
    for layer in model.kv_layers:
        type_k, type_v = choose(layer)
        cells = (plan.swa_cells(model.n_swa) if layer.kind == SWA else plan.cells) * plan.n_stream
        heads = cells * layer.n_head_kv
        k += heads * head_bytes(type_k, layer.head_dim_k)
        values_k += heads * layer.head_dim_k
        if layer.head_dim_v:
            v += heads * head_bytes(type_v, layer.head_dim_v)
            values_v += heads * layer.head_dim_v
    state = 4 * model.state_values * sum(layer.has_state for layer in model.layers) * max(1, plan.n_seq)
    return CacheSize(k, v, state, values_k, values_v)


def split_type(type_k: str) -> str:
    """The layout that a kv type takes for K under a profile: bits split by importance."""
    split = f"{type_k}s"
    return split if split in pytq_types() else type_k


@dataclass(frozen=True)
class ModelInfo:
    """A model as far as memory goes."""

    path: Path
    layout: Layout
    hparams: Hparams
    weights: int
    n_vocab: int
    profile: Layout | None = None  # what the patched build would load with it
    assume_profile: bool = False  # count as if every layer had one


def open_model(path: Path | str) -> ModelInfo:
    """Reads the headers of a model (all parts of a split one) and finds its kv profile."""
    from pytq.gguf import profile as kv_profile

    first, parts = read_model(path)
    hparams = read_hparams(first)
    if not hparams.kv_layers and not hparams.state_values:
        raise PytqError(f"{path}: {hparams.arch} models have no KV cache")
    weights = sum(t.nbytes or 0 for part in parts for t in part.tensors)
    tokens = first.fields.get("tokenizer.ggml.tokens")
    n_vocab = tokens.count if tokens else int(first.get(f"{hparams.arch}.vocab_size", 0))
    return ModelInfo(Path(path), first, hparams, weights, n_vocab, kv_profile.find(first))


def resolve(model: ModelInfo, types: tuple[str, str]) -> LayerTypes:
    """The types that the patched build stores per layer for requested ones, as ``pytq_kv_policy::layer_type`` does.

    ``stored`` takes what the model file says, ``auto`` types the profile's choice, and kv types of K the split layout
    where the profile has a transform. PytqError for stored types that llama.cpp would refuse.
    """
    return resolve_layers(model, *(_per_layer(model, *pair) for pair in zip("kv", types, strict=True)))


def _per_layer(model: ModelInfo, side: str, name: str) -> list[str]:
    from pytq.gguf.cache import stored_types

    n_layer = len(model.hparams.layers)
    if name == STORED:
        return stored_types(model.layout, side, n_layer) or ["f16"] * n_layer
    return [name] * n_layer


def resolve_layers(model: ModelInfo, types_k: list[str], types_v: list[str]) -> LayerTypes:
    """As ``resolve``, for types named layer by layer."""
    profile = model.profile
    tensors = {t.name for t in profile.tensors} if profile else set()

    def one(layer: Layer, side: str, name: str) -> str:
        if name in AUTO and profile is not None:
            choice = profile.get(f"kvprofile.types.{name}.{side}", [])
            name = choice[layer.index] if layer.index < len(choice) else ""
            if not name:
                raise PytqError(f"{profile.path}: recommends no type for layer {layer.index}")
        if side == "k" and (model.assume_profile or f"blk.{layer.index}.kv_k_rot" in tensors):
            return split_type(name)
        return name

    return lambda layer: (one(layer, "k", types_k[layer.index]), one(layer, "v", types_v[layer.index]))


def choose(model: ModelInfo, named: Sequence[str | None], own: tuple[str, str]) -> tuple[str, str]:
    """K and V as pytq's commands choose them: a named type (or ``stored``), else what the model stores, else ``own``."""
    from pytq.gguf.cache import has_stored

    def one(side: str, name: str | None, default: str) -> str:
        if name is not None:
            return name if name == STORED else check_type(name.lower())
        return STORED if has_stored(model.layout, side) else default

    k, v = (one(*x) for x in zip("kv", named, own, strict=True))
    return k, v


def stored_names(model: ModelInfo, types: tuple[str, str]) -> tuple[str, str]:
    """The requested names with stored ones in place of ``stored``; ``mixed`` where a file stores several."""
    names = [set(_per_layer(model, *pair)) for pair in zip("kv", types, strict=True)]
    k, v = (layers.pop() if len(layers) == 1 else MIXED for layers in names)
    return k, v


def compute_bytes(model: ModelInfo, plan: Plan) -> int:
    """Approximate compute buffer: logits of one ubatch, activations, and the attention mask."""
    return plan.n_ubatch * (4 * (model.n_vocab + 6 * model.hparams.n_embd) + 2 * plan.cells * plan.n_stream)


def check_ctx(model: ModelInfo, plan: Plan) -> None:
    """PytqError when one sequence would be longer than the model was trained for."""
    limit = model.hparams.n_ctx_train
    per_sequence = plan.n_ctx if plan.unified else plan.n_ctx // plan.n_seq
    if per_sequence > limit:
        raise PytqError(f"a context of {per_sequence} is beyond this model's limit of {limit} tokens")


def check_pair(model: ModelInfo, k: str, v: str) -> None:
    """PytqError when K and V cannot be stored as these types for this model."""
    cache_size(model.hparams, resolve(model, (k, v)), Plan(CTX_PAD))


def total_bytes(model: ModelInfo, types: tuple[str, str], plan: Plan) -> int:
    """Weights, caches and compute buffer together."""
    return (
        model.weights
        + cache_size(model.hparams, resolve(model, types), plan).total
        + compute_bytes(model, plan)
    )


def largest_ctx(
    model: ModelInfo, types: tuple[str, str], budget: int, n_seq: int = 1, unified: bool = False
) -> int:
    """The largest total context (a multiple of 256 per sequence) that fits ``budget`` bytes with the weights; 0 if none.

    Never beyond the model's own limit per sequence.
    """

    def fits(steps: int) -> bool:
        n_ctx = steps * CTX_PAD * (1 if unified else n_seq)
        return total_bytes(model, types, Plan(n_ctx, n_seq, unified)) <= budget

    low, high = 0, model.hparams.n_ctx_train // CTX_PAD
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low * CTX_PAD * (1 if unified else n_seq)


def paste_flags(types: tuple[str, str], n_ctx: int, n_seq: int) -> str:
    """The llama.cpp flags for this choice; stored types need none."""
    slots = f" -np {n_seq}" if n_seq > 1 else ""
    named = "".join(f" -ct{side} {name}" for side, name in zip("kv", types, strict=True) if name != STORED)
    return f"-fa on{named} -c {n_ctx}{slots}"


def estimate(
    model: ModelInfo,
    pairs: Iterable[tuple[str, str]],
    plan: Plan,
    budget: int | None = None,
) -> list[dict[str, Any]]:
    """One row per K/V pair: bytes, bits per value, the largest context in ``budget``, flags; or why it does not fit.

    Raises PytqError for a context beyond the model's limit and a budget smaller than the weights.
    """
    check_ctx(model, plan)
    if budget is not None and budget < model.weights:
        raise PytqError(
            f"a budget of {human(budget)} is smaller than the weights of this model ({human(model.weights)})"
        )
    rows = []
    for pair in pairs:
        row: dict[str, Any] = {
            "type_k": pair[0],
            "type_v": pair[1],
            "patched": is_pytq(pair[0]) or is_pytq(pair[1]),
        }
        try:
            size = cache_size(model.hparams, resolve(model, pair), plan)
        except PytqError as error:
            rows.append(row | {"error": str(error)})
            continue
        row |= {
            "k_bytes": size.k,
            "v_bytes": size.v,
            "state_bytes": size.state,
            "cache_bytes": size.total,
            "bits_per_value": round(size.bits, 4),
            "total_bytes": total_bytes(model, pair, plan),
            "flags": paste_flags(pair, plan.n_ctx, plan.n_seq),
        }
        if budget is not None:
            best = largest_ctx(model, pair, budget, plan.n_seq, plan.unified)
            row |= {"max_ctx": best, "max_ctx_flags": paste_flags(pair, best, plan.n_seq) if best else None}
        rows.append(row)
    return rows


def human(n: float) -> str:
    """Bytes for people: MiB below 10 GiB, GiB above."""
    return f"{n / MIB:.1f} MiB" if n < 10 << 30 else f"{n / (1 << 30):.2f} GiB"


KV_BUFFER = re.compile(r"KV buffer size\s*=\s*([\d.]+) MiB")
STATE_BUFFER = re.compile(r"RS buffer size\s*=\s*([\d.]+) MiB")


def logged_bytes(log: str) -> tuple[float, float]:
    """KV and recurrent-state bytes that a llama.cpp log says were allocated (all backends and caches added up)."""
    sums: Sequence[float] = [
        sum(float(x) for x in rule.findall(log)) * MIB for rule in (KV_BUFFER, STATE_BUFFER)
    ]
    return sums[0], sums[1]
