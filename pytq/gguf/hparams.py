"""Which layers of a model hold a KV cache, and of what shape.

Follows the rules of the pinned llama.cpp: ``llama-model.cpp`` (load_hparams, create_memory) and ``src/models/*.cpp``
(load_arch_hparams), which decide per architecture what the file's keys mean.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pytq.errors import PytqError
from pytq.gguf.layout import Layout

FULL, SWA, SHARED, RECURRENT, NONE = "full", "swa", "shared", "recurrent", "none"


@dataclass(frozen=True)
class SwaRule:
    """How an architecture places its sliding-window layers when the file has no explicit pattern.

    ``period`` n: every n-th layer is full (the first of each n if ``dense_first``); 0: the file must say.
    ``window`` replaces the file's value (``force``) or stands in for a missing one. ``optional``: no window, no SWA.
    """

    period: int
    dense_first: bool = False
    window: int = 0
    force: bool = False
    optional: bool = False


SWA_RULES: dict[str, SwaRule] = {
    "afmoe": SwaRule(4, optional=True),
    "cohere2": SwaRule(4),
    "cohere2moe": SwaRule(4, dense_first=True),
    "exaone-moe": SwaRule(4, window=128),
    "exaone4": SwaRule(4, window=4096),  # only its 64-layer model, see _swa_layers
    "gemma2": SwaRule(2, window=4096),
    "gemma3": SwaRule(6, optional=True),
    "gemma3n": SwaRule(5),
    "gemma4": SwaRule(0),
    "gpt-oss": SwaRule(2),
    "granite_swa": SwaRule(0),
    "laguna": SwaRule(4, dense_first=True, optional=True),
    "llama4": SwaRule(4, window=8192, force=True),
    "maple": SwaRule(0),
    "mellum": SwaRule(4, optional=True),
    "mimo2": SwaRule(0),
    "muse-glimmer": SwaRule(4),
    "olmo2": SwaRule(4, optional=True),
    "plamo3": SwaRule(8, optional=True),
    "smallthinker": SwaRule(4, dense_first=True, window=4096, force=True, optional=True),
    "spark2_5": SwaRule(0),
    "step35": SwaRule(0),
}
NO_CACHE = frozenset(
    [
        "bert",
        "modern-bert",
        "nomic-bert",
        "nomic-bert-moe",
        "neo-bert",
        "jina-bert-v2",
        "jina-bert-v3",
        "eurobert",
        "gemma-embedding",
        "dream",
        "llada",
        "llada-moe",
        "rnd1",
        "wavtokenizer-dec",
        "clip",
    ]
)
RECURRENT_ONLY = frozenset(["mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7"])
# hybrids whose recurrent layers are those without KV heads
HYBRID_BY_HEADS = frozenset(
    [
        "jamba",
        "plamo2",
        "granitehybrid",
        "lfm2",
        "lfm2moe",
        "kimi-linear",
        "kimi-k3",
        "bailingmoe3",
        "glm5-next",
    ]
)
HYBRID_BY_INTERVAL = {"qwen3next": 4, "qwen35": 4, "qwen35moe": 4, "qwen4exp": 4, "minimax-01": 8}
NEMOTRON = frozenset(("nemotron_h", "nemotron_h_moe"))
# they keep further per-token state (indexer keys, compressed streams) that these rules do not describe
EXTRA_CACHE = frozenset(
    ["minimax-m3", "glm-dsa", "deepseek32", "deepseek4", "glm5-next", "hy_v4", "dots3note", "qwen4exp"]
)
MAX_LAYERS = 512


@dataclass(frozen=True)
class Layer:
    """One layer's cache: ``kind`` is full, swa, shared (reads another layer's), recurrent or none."""

    index: int
    kind: str
    n_head_kv: int = 0
    head_dim_k: int = 0
    head_dim_v: int = 0  # 0: no V tensor (MLA keeps only the latent K)
    has_state: bool = False  # also (or only) recurrent state

    @property
    def has_kv(self) -> bool:
        return self.kind in (FULL, SWA)


@dataclass(frozen=True)
class Hparams:
    """The shape of a model as far as its caches go; sizes of recurrent state are in f32 values per sequence."""

    arch: str
    name: str
    n_layer: int
    n_ctx_train: int
    n_embd: int
    n_head: int
    n_swa: int
    layers: tuple[Layer, ...]
    state_values: int = 0
    notes: tuple[str, ...] = field(default=())

    @property
    def kv_layers(self) -> tuple[Layer, ...]:
        return tuple(layer for layer in self.layers if layer.has_kv)

    @property
    def head_dims(self) -> tuple[int, ...]:
        """All head sizes that a cache type must fit, ascending."""
        dims = {d for layer in self.kv_layers for d in (layer.head_dim_k, layer.head_dim_v) if d}
        return tuple(sorted(dims))


def read_hparams(layout: Layout) -> Hparams:
    """Raises PytqError naming the key when the file lacks one that llama.cpp needs."""
    arch = layout.get("general.architecture")
    if not isinstance(arch, str) or not arch:
        raise PytqError(f"{layout.path}: has no general.architecture, so it is no model")

    def key(name: str, default: Any = None) -> Any:
        return layout.get(f"{arch}.{name}", default)

    def need(name: str) -> int:
        value = key(name)
        if not isinstance(value, int) or value <= 0:
            raise PytqError(f"{layout.path}: {arch}.{name} is {value!r}, a positive number is needed")
        return value

    def per_layer(name: str, default: list[int]) -> list[int]:
        value = key(name)
        if value is None:
            return default
        if isinstance(value, list):
            if len(value) < n_all:
                raise PytqError(f"{layout.path}: {arch}.{name} has {len(value)} items for {n_all} layers")
            return [int(v) for v in value[:n_all]]
        return [int(value)] * n_all

    n_all = need("block_count")
    if n_all > MAX_LAYERS:
        raise PytqError(f"{layout.path}: {arch}.block_count is {n_all}, llama.cpp allows {MAX_LAYERS}")
    n_next = int(key("nextn_predict_layers", 0))
    loops = int(key("num_loops", 1)) if arch == "nanbeige" else 1
    n_layer = n_all - n_next
    n_embd = need("embedding_length")
    heads = per_layer("attention.head_count", [0] * n_all)
    heads_kv = per_layer("attention.head_count_kv", heads)
    ffs = per_layer("feed_forward_length", [0] * n_all)
    default_dim = n_embd // heads[0] if heads[0] else 0
    dim_k = int(key("attention.key_length", default_dim))
    dim_v = int(key("attention.value_length", default_dim))
    dim_k_swa = int(key("attention.key_length_swa", dim_k))
    dim_v_swa = int(key("attention.value_length_swa", dim_v))
    mla = bool(key("attention.key_length_mla", 0)) and bool(key("attention.value_length_mla", 0))
    window, swa = _swa_layers(layout, arch, n_all, n_layer, heads_kv)
    recurrent = _recurrent_layers(layout, arch, n_all, n_layer, heads_kv, ffs)
    n_own = n_all
    if arch == "gemma3n":
        n_own = 20
    elif arch == "gemma4":
        n_own = n_all - int(key("attention.shared_kv_layers", 0))
    layers = []
    for il in range(n_all):
        both = arch == "falcon-h1"
        if il >= n_layer or arch in NO_CACHE:
            kind = NONE
        elif recurrent[il] and not both:
            kind = RECURRENT
        elif arch in NEMOTRON and ffs[il]:
            kind = NONE
        elif il >= n_own:
            kind = SHARED
        elif heads_kv[il] == 0:
            kind = NONE
        else:
            kind = SWA if swa[il] else FULL
        k, v = (dim_k_swa, dim_v_swa) if swa[il] else (dim_k, dim_v)
        shape = (heads_kv[il], k, 0 if mla else v) if kind in (FULL, SWA) else (0, 0, 0)
        layers.append(Layer(il, kind, *shape, has_state=kind == RECURRENT or both))
    layers += [Layer(il + n_all * j, *_shape(layers[il])) for j in range(1, loops) for il in range(n_all)]
    notes = []
    if arch in EXTRA_CACHE:
        notes.append(f"{arch} also keeps sparse-attention or compressed state, which is not counted here")
    if mla:
        notes.append("MLA: only the latent K is stored")
    return Hparams(
        arch=arch,
        name=str(layout.get("general.name", layout.path.stem)),
        n_layer=n_layer * loops,
        n_ctx_train=need("context_length"),
        n_embd=n_embd,
        n_head=max(heads),
        n_swa=window,
        layers=tuple(layers),
        state_values=_state_values(layout, arch, n_embd, max(heads))
        if any(x.has_state for x in layers)
        else 0,
        notes=tuple(notes),
    )


def _shape(layer: Layer) -> tuple[str, int, int, int, bool]:
    return layer.kind, layer.n_head_kv, layer.head_dim_k, layer.head_dim_v, layer.has_state


def _swa_layers(
    layout: Layout, arch: str, n_all: int, n_layer: int, heads_kv: list[int]
) -> tuple[int, list[bool]]:
    """The window and, per layer, whether it is a sliding-window layer."""
    none = [False] * n_all
    value = layout.get(f"{arch}.attention.sliding_window", 0)
    window = int(value) if isinstance(value, int) else 0
    if arch == "lfm2":
        return window, [window > 0 and il < n_layer and heads_kv[il] > 0 for il in range(n_all)]
    rule = SWA_RULES.get(arch)
    if rule is None or (arch == "exaone4" and n_layer != 64):
        return 0, none
    if rule.optional and window == 0:
        return 0, none
    if arch == "llama4" and f"{arch}.attention.sliding_window" in layout.fields and window == 0:
        return 0, none
    if rule.force or window == 0:
        window = rule.window
    if window == 0:
        raise PytqError(f"{layout.path}: {arch}.attention.sliding_window is missing")
    pattern = layout.get(f"{arch}.attention.sliding_window_pattern")
    if isinstance(pattern, list):
        if len(pattern) < n_layer:
            raise PytqError(
                f"{layout.path}: the sliding-window pattern has {len(pattern)} items for {n_layer} layers"
            )
        return window, [il < len(pattern) and bool(pattern[il]) for il in range(n_all)]
    period = int(pattern) if isinstance(pattern, int) else rule.period
    if rule.period == 0:
        raise PytqError(f"{layout.path}: {arch}.attention.sliding_window_pattern is missing")
    return window, [il < n_layer and is_swa(il, period, rule.dense_first) for il in range(n_all)]


def is_swa(il: int, period: int, dense_first: bool) -> bool:
    """llama_hparams::set_swa_pattern for one layer."""
    if period == 0:
        return True
    return il % period != 0 if dense_first else il % period < period - 1


def _recurrent_layers(
    layout: Layout, arch: str, n_all: int, n_layer: int, heads_kv: list[int], ffs: list[int]
) -> list[bool]:
    if arch in RECURRENT_ONLY or arch == "falcon-h1":
        return [il < n_layer for il in range(n_all)]
    if arch in HYBRID_BY_HEADS:
        return [il < n_layer and heads_kv[il] == 0 for il in range(n_all)]
    if arch in NEMOTRON:
        return [il < n_layer and heads_kv[il] == 0 and ffs[il] == 0 for il in range(n_all)]
    if arch in HYBRID_BY_INTERVAL:
        marked = layout.get(f"{arch}.attention.recurrent_layers")
        if isinstance(marked, list):
            return [il < len(marked) and bool(marked[il]) for il in range(n_all)]
        interval = int(layout.get(f"{arch}.full_attention_interval", HYBRID_BY_INTERVAL[arch]))
        if interval <= 0:
            raise PytqError(
                f"{layout.path}: {arch}.full_attention_interval is {interval}, it must be positive"
            )
        return [il < n_layer and (il + 1) % interval != 0 for il in range(n_all)]
    return [False] * n_all


def _state_values(layout: Layout, arch: str, n_embd: int, n_head: int) -> int:
    """f32 values of recurrent state per layer and sequence: llama_hparams::n_embd_r + n_embd_s."""

    def key(name: str) -> int:
        return int(layout.get(f"{arch}.{name}", 0))

    conv, inner = key("ssm.conv_kernel"), key("ssm.inner_size")
    state, groups = key("ssm.state_size"), key("ssm.group_count")
    if wkv := key("wkv.head_size"):
        shift = 1 if arch in ("rwkv6qwen2", "arwkv7") else 2
        return shift * n_embd + n_embd * wkv
    if short := key("shortconv.l_cache"):
        return n_embd * (short - 1) + state * inner
    if kda := key("kda.head_dim"):
        return 3 * (conv - 1 if conv else 3) * n_head * kda + kda * kda * n_head
    if arch == "minimax-01":
        dim = int(layout.get(f"{arch}.attention.key_length", n_embd // max(1, n_head)))
        return dim * dim * n_head
    return (conv - 1 if conv else 0) * (inner + 2 * groups * state) + state * inner
