"""Statistics of a model's queries, keys and values, taken at its attention nodes while llama.cpp evaluates a text.

llama.cpp calls an evaluation callback at every node of its graph. At a flash attention node the sources are everything that
attention sees: queries after RoPE, the keys and values of the (f16, unrotated) cache, the mask. So the collector works for every
architecture whose attention runs through that node, whatever it calls its tensors, and for caches that layers share.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pytq.errors import PytqError

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

# One query in this many enters the attention-weighted sums; the plain sums take every token.
QUERY_STRIDE = 4
_CACHE_NAME = re.compile(r"cache_(?:\w+_)?k_l(\d+)")
_GGML_F32, _GGML_F16 = 0, 1


class GgmlTensor(ctypes.Structure):
    """``struct ggml_tensor`` of the pinned upstream (ggml.h)."""


GgmlTensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(GgmlTensor) * 10),
    ("view_src", ctypes.POINTER(GgmlTensor)),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
    ("extra", ctypes.c_void_p),
    ("padding", ctypes.c_char * 8),
]

_TensorPtr = ctypes.POINTER(GgmlTensor)
EVAL_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_bool, _TensorPtr, ctypes.c_bool, ctypes.c_void_p)


@dataclass
class LayerStats:
    """Sums over the calibration text for one layer's cache; heads are KV heads, queries of sharing layers included.

    Attributes:
        n_head, n_kv, d_k, d_v: shape of the attention.
        tokens: keys seen; queries: (query, query head) pairs per KV head.
        k_sum [n_kv, d_k], k_out [n_kv, d_k, d_k]: keys after RoPE, the first token of every window left out.
        q_out [n_kv, d_k, d_k], v_out [n_kv, d_v, d_v]: second moments.
        w_sum [n_kv], wk_sum, wk_out, wq_out: the same weighted by each (query, key) pair's share of the output error,
            p^2 |W_o (v - o)|^2, p the attention weight, o the attention's output: the first-order effect of an error in that logit.
        wv [n_kv]: sum of p^2 |v|^2 / d_v, which a value's quantisation error is in proportion to.
        o_sum: mean squared attention output through W_o; share: squared attention branch over squared residual stream.
        pre_q [n_head, 2, bands], pre_q_abs [n_head, bands]: mean and mean magnitude of pre-RoPE queries per frequency band.
    """

    n_head: int
    n_kv: int
    d_k: int
    d_v: int
    softcap: float = 0.0
    sinks: bool = False
    tokens: int = 0
    queries: int = 0
    sampled: int = 0
    k_sum: F64 = field(default_factory=lambda: np.zeros(0))
    k_out: F64 = field(default_factory=lambda: np.zeros(0))
    q_out: F64 = field(default_factory=lambda: np.zeros(0))
    v_out: F64 = field(default_factory=lambda: np.zeros(0))
    w_sum: F64 = field(default_factory=lambda: np.zeros(0))
    wk_sum: F64 = field(default_factory=lambda: np.zeros(0))
    wk_out: F64 = field(default_factory=lambda: np.zeros(0))
    wq_out: F64 = field(default_factory=lambda: np.zeros(0))
    wv: F64 = field(default_factory=lambda: np.zeros(0))
    o_sum: float = 0.0
    share: float = 0.0
    share_n: int = 0
    pre_q: F64 | None = None
    pre_q_abs: F64 | None = None
    pre_n: int = 0

    def __post_init__(self) -> None:
        self.k_sum = np.zeros((self.n_kv, self.d_k))
        self.k_out = np.zeros((self.n_kv, self.d_k, self.d_k))
        self.q_out = np.zeros((self.n_kv, self.d_k, self.d_k))
        self.v_out = np.zeros((self.n_kv, self.d_v, self.d_v))
        self.w_sum = np.zeros(self.n_kv)
        self.wk_sum = np.zeros((self.n_kv, self.d_k))
        self.wk_out = np.zeros((self.n_kv, self.d_k, self.d_k))
        self.wq_out = np.zeros((self.n_kv, self.d_k, self.d_k))
        self.wv = np.zeros(self.n_kv)

    def k_mean(self) -> F64:
        """[n_kv, d_k]"""
        return self.k_sum / max(self.tokens, 1)

    def k_cov(self) -> F64:
        """[n_kv, d_k, d_k], centred"""
        m = self.k_mean()
        return self.k_out / max(self.tokens, 1) - m[:, :, None] * m[:, None, :]


@dataclass(frozen=True)
class Attention:
    """What one attention node saw (float32): q [n_head, T, d_k], k [n_kv, T, d_k], v [n_kv, T, d_v], mask [T, T]."""

    layer: int
    q: F32
    k: F32
    v: F32
    mask: F32
    scale: float
    softcap: float
    sinks: bool


def attention_weights(a: Attention, head: int, rows: slice) -> F32:
    """Softmax weights [rows, T] of one query head, as flash attention computes them (without sinks)."""
    group = a.q.shape[0] // a.k.shape[0]
    s = (a.q[head, rows] * np.float32(a.scale if not a.softcap else a.scale / a.softcap)) @ a.k[
        head // group
    ].T
    if a.softcap:
        s = np.tanh(s) * np.float32(a.softcap)
    s += a.mask[rows]
    s -= s.max(axis=1, keepdims=True)
    np.exp(s, out=s)
    s /= s.sum(axis=1, keepdims=True)
    return s


def accumulate(st: LayerStats, a: Attention, wo: F32 | None, stride: int = QUERY_STRIDE) -> None:
    """Adds one window to the sums. wo [n_head, d_v, r]: factors with |v wo_h| = |W_o,h v|, None for the identity."""
    group = st.n_head // st.n_kv
    T = a.k.shape[1]
    st.softcap, st.sinks = a.softcap, a.sinks
    k1 = a.k[:, 1:].astype(np.float64)
    st.tokens += T - 1
    st.queries += T * group
    st.k_sum += k1.sum(axis=1)
    st.k_out += k1.transpose(0, 2, 1) @ k1
    st.v_out += (a.v.transpose(0, 2, 1) @ a.v).astype(np.float64)
    rows = slice(stride - 1, None, stride)
    n_rows = len(range(T)[rows])
    st.sampled += n_rows
    for h in range(st.n_head):
        kv = h // group
        st.q_out[kv] += (a.q[h].T @ a.q[h]).astype(np.float64)
        p = attention_weights(a, h, rows)
        v = a.v[kv] if wo is None else a.v[kv] @ wo[h]
        o = p @ v
        # |v_j - o_i|^2 = |v_j|^2 - 2 v_j.o_i + |o_i|^2
        dist = o @ v.T
        dist *= -2
        dist += (v * v).sum(axis=1)[None, :]
        dist += (o * o).sum(axis=1)[:, None]
        np.maximum(dist, 0, out=dist)
        p2 = p * p
        st.wv[kv] += float(p2.sum(axis=0) @ (a.v[kv] ** 2).sum(axis=1)) / st.d_v
        dist *= p2
        per_key = dist.sum(axis=0)
        per_query = dist.sum(axis=1)
        st.w_sum[kv] += per_key.sum()
        st.wk_sum[kv] += per_key @ a.k[kv]
        st.wk_out[kv] += (a.k[kv].T * per_key) @ a.k[kv]
        q = a.q[h, rows]
        st.wq_out[kv] += (q.T * per_query) @ q
        st.o_sum += float((o * o).sum())


def dequantize(data: npt.NDArray[np.uint8], ggml_type: int, dims: Sequence[int]) -> F32:
    """A tensor's bytes as float32 in NumPy order (dims reversed); NotImplementedError for types that gguf cannot decode."""
    import gguf

    kind = gguf.GGMLQuantizationType(ggml_type)
    shape = gguf.quant_shape_to_byte_shape(tuple(dims[::-1]), kind)
    plain = {gguf.GGMLQuantizationType.F32: np.float32, gguf.GGMLQuantizationType.F16: np.float16}.get(kind)
    if plain is not None:
        return data.view(plain).reshape(dims[::-1]).astype(np.float32)
    return np.asarray(gguf.dequantize(data.reshape(shape), kind), np.float32).reshape(dims[::-1])


def output_factors(model: Path, n_layer: int) -> dict[int, F32]:
    """{layer: [n_head, d_v, d_v]}: R_h with R_h R_h^T = W_o,h^T W_o,h, for layers whose output projection is found under its usual name."""
    from pytq.gguf.layout import read_layout

    layout = read_layout(model)
    arch = layout.get("general.architecture")
    n_head = layout.get(f"{arch}.attention.head_count")
    if n_head is None:
        return {}
    out: dict[int, F32] = {}
    raw = np.memmap(model, np.uint8, "r")
    for t in layout.tensors:
        m = re.fullmatch(r"blk\.(\d+)\.attn_output\.weight", t.name)
        if m is None or int(m[1]) >= n_layer or t.nbytes is None:
            continue
        nh = int(n_head[int(m[1])]) if isinstance(n_head, list) else int(n_head)
        start = layout.data_start + t.offset
        data = np.asarray(raw[start : start + t.nbytes])
        try:
            w = dequantize(data, t.ggml_type, t.dims)
        except NotImplementedError:
            continue
        if w.ndim != 2 or w.shape[1] % nh:
            continue
        w3 = w.reshape(w.shape[0], nh, w.shape[1] // nh)
        gram = np.einsum("ehd,ehf->hdf", w3, w3, optimize=True).astype(np.float64)
        val, vec = np.linalg.eigh(gram)
        out[int(m[1])] = (vec * np.sqrt(np.maximum(val, 0))[:, None, :]).astype(np.float32)
    return out


class Collector:
    """Receives graph nodes through llama.cpp's callback and passes each attention node to ``on_attention``.

    Errors raised inside the callback stop the evaluation and are raised again by :meth:`check`.
    """

    def __init__(self, ggml: ctypes.CDLL, on_attention: Callable[[Attention], None]) -> None:
        self.on_attention = on_attention
        self.error: BaseException | None = None
        self.shares: dict[int, list[float]] = {}
        self.pre_q: dict[int, tuple[F32, int, int]] = {}
        self.last_layer = -1
        self.quantised: str | None = None
        self._get = ggml.ggml_backend_tensor_get
        self._get.argtypes = [_TensorPtr, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
        self._get.restype = None
        self._nbytes = ggml.ggml_nbytes
        self._nbytes.argtypes = [_TensorPtr]
        self._nbytes.restype = ctypes.c_size_t
        name = ggml.ggml_op_name
        name.argtypes = [ctypes.c_int]
        name.restype = ctypes.c_char_p
        ops = {name(i): i for i in range(200) if i < _op_count(ggml)}
        self._flash, self._rope, self._add = ops[b"FLASH_ATTN_EXT"], ops[b"ROPE"], ops[b"ADD"]
        self.callback = EVAL_CALLBACK(self._node)

    def read(self, t: Any) -> F32:
        """The tensor as float32 in ggml's order reversed: shape [ne3, ne2, ne1, ne0]."""
        c = t.contents
        size = self._nbytes(t)
        buf = np.empty(size, np.uint8)
        self._get(t, buf.ctypes.data, 0, size)
        dtype = {_GGML_F32: np.float32, _GGML_F16: np.float16}.get(c.type)
        if dtype is None:
            raise PytqError(
                f"tensor {c.name.decode()} has ggml type {c.type}: calibration needs f32 or f16 here"
            )
        view = np.ndarray(tuple(c.ne[3::-1]), dtype, buf.data, 0, tuple(c.nb[3::-1]))
        return view.astype(np.float32)

    def _node(self, t: Any, ask: bool, _user: Any) -> bool:
        try:
            c = t.contents
            op = c.op
            if op == self._flash:
                return True if ask else self._attention(c)
            if op == self._rope and c.name.startswith(b"Qcur"):
                return True if ask else self._pre_rope(c)
            if op == self._add and c.name.startswith((b"ffn_inp-", b"sa_out-", b"sa_add-")):
                return True if ask else self._residual(c)
            # asked: not wanted. Not asked: carry on
            return not ask
        except BaseException as error:  # an exception must not cross C frames
            self.error = error
            return False

    def _attention(self, c: Any) -> bool:
        owner = c.src[1]
        while owner.contents.view_src:
            owner = owner.contents.view_src
        m = _CACHE_NAME.match(owner.contents.name.decode())
        if m is None:  # an encoder's or a cacheless attention: nothing is stored
            return True
        self.last_layer = int(m[1])
        params = np.frombuffer(bytes(c.op_params), np.float32)[:3]
        if params[1] != 0:
            raise PytqError("models with ALiBi position biases are not supported by calibration")
        mask_t = c.src[3]
        if not mask_t:
            raise PytqError("attention without a mask: calibration cannot tell which tokens a query sees")
        q = self.read(c.src[0])[0]
        T = q.shape[1]
        k, v, mask = (self.read(x) for x in (c.src[1], c.src[2], mask_t))
        if mask.shape[0] != 1 or k.shape[0] != 1 or k.shape[2] < T:
            raise PytqError("calibration expects one sequence whose window fits into one batch")
        self.on_attention(
            Attention(
                self.last_layer,
                q,
                k[0, :, :T],
                v[0, :, :T],
                mask[0, 0, :T, :T],
                float(params[0]),
                float(params[2]),
                bool(c.src[4]),
            )
        )
        return True

    def _pre_rope(self, c: Any) -> bool:
        try:
            layer = int(c.name.decode().split("-")[1].split()[0])
        except (IndexError, ValueError):
            return True
        q = self.read(c.src[0])[0]  # [T, n_head, d]
        self.pre_q[layer] = (q, c.op_params[1], c.op_params[2])
        return True

    def _residual(self, c: Any) -> bool:
        if self.last_layer >= 0 and c.ne[1] > 1:
            x, y = self.read(c.src[0]), self.read(c.src[1])
            # the branch is the source that is not the residual stream: it comes from the attention output
            total = x + y
            branch = y if _feeds(c.src[1], self._flash) else x
            # the first token's residual can be thousands of times the others': leave it out
            b2, t2 = (branch[0, 0, 1:] ** 2).sum(axis=1), (total[0, 0, 1:] ** 2).sum(axis=1)
            self.shares.setdefault(self.last_layer, []).append(float(np.mean(b2 / np.maximum(t2, 1e-20))))
        return True

    def check(self) -> None:
        if self.error is not None:
            raise self.error


def _feeds(t: Any, op: int, depth: int = 12) -> bool:
    """Whether a node of kind ``op`` lies within ``depth`` first-or-second sources above ``t``."""
    for _ in range(depth):
        if not t:
            return False
        if t.contents.op == op:
            return True
        nxt = t.contents.src[0]
        second = t.contents.src[1]
        # matrix products carry their input second
        t = second if second and not nxt.contents.src[0] and not nxt.contents.view_src else nxt
    return False


def _op_count(ggml: ctypes.CDLL) -> int:
    # ggml_op_name asserts its range only in debug builds; the operations wanted here lie in the first hundred
    return 100


def band_statistics(q: F32, n_rot: int, mode: int) -> tuple[F64, F64]:
    """Sums over tokens of pre-RoPE queries q [T, n_head, d] as complex bands: ([n_head, 2, bands], [n_head, bands] magnitudes)."""
    x = q[:, :, :n_rot].astype(np.float64)
    # mode bit 2: NEOX pairs (i, i + n_rot/2); otherwise neighbours (2i, 2i + 1)
    re_, im = (x[..., : n_rot // 2], x[..., n_rot // 2 :]) if mode & 2 else (x[..., 0::2], x[..., 1::2])
    return np.stack([re_.sum(0), im.sum(0)], axis=1), np.hypot(re_, im).sum(0)


@contextmanager
def _quiet(enabled: bool) -> Iterator[None]:
    """llama.cpp logs to file descriptor 2; keep it off the terminal while a progress bar runs."""
    if not enabled:
        yield
        return
    saved = os.dup(2)
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


def load_binding(lib: Path) -> tuple[Any, ctypes.CDLL]:
    """(llama_cpp's low-level module, libggml-base) of the build whose libraries lie in ``lib``."""
    before = os.environ.get("LLAMA_CPP_LIB_PATH")
    os.environ["LLAMA_CPP_LIB_PATH"] = str(lib)
    try:
        import llama_cpp.llama_cpp as low
    except (ImportError, OSError, RuntimeError) as error:
        raise PytqError(
            f"the llama-cpp-python binding could not load libllama from {lib}: {error}"
        ) from error
    finally:
        if before is None:
            del os.environ["LLAMA_CPP_LIB_PATH"]
        else:
            os.environ["LLAMA_CPP_LIB_PATH"] = before
    suffix = "dylib" if os.uname().sysname == "Darwin" else "so"
    found = sorted(lib.glob(f"libggml-base*.{suffix}*"))
    if not found:
        raise PytqError(f"libggml-base is not in {lib}: run `pytq build --stock --force`")
    return low, ctypes.CDLL(str(found[0]))


def run_windows(
    model: Path,
    lib: Path,
    windows: Callable[[Callable[[bytes], list[int]], int], Sequence[list[int]]],
    on_attention: Callable[[Attention], None],
    *,
    on_window: Callable[[Collector, int, int], None] | None = None,
    first_position: Callable[[int, int, int], int] = lambda index, count, n_train: 0,
    threads: int | None = None,
    quiet: bool = True,
) -> dict[str, Any]:
    """Evaluates token windows, each from an empty cache, and passes every attention node on.

    Args:
        windows: gets (tokenizer, the model's training context) and returns the windows, lists of token ids.
        first_position: position of a window's first token, from (index, number of windows, the model's training context).
        on_window: called after each window with (collector, index, number of windows).
    Returns:
        facts about the model: n_ctx_train, n_layer, n_embd, vocabulary size, tokens evaluated.
    Raises:
        PytqError: the model cannot be loaded or evaluated, or has no attention that calibration understands.
    """
    low, ggml = load_binding(lib)
    seen = [0]

    def count(a: Attention) -> None:
        seen[0] += 1
        on_attention(a)

    collector = Collector(ggml, count)
    with _quiet(quiet):
        low.llama_backend_init()
        mp = low.llama_model_default_params()
        mp.n_gpu_layers = 0
        handle = low.llama_model_load_from_file(str(model).encode(), mp)
    if not handle:
        raise PytqError(f"llama.cpp could not load {model}")
    ctx = None
    try:
        vocab = low.llama_model_get_vocab(handle)

        def tokenize(text: bytes) -> list[int]:
            n = max(8, len(text) + 8)
            buf = (low.llama_token * n)()
            got = low.llama_tokenize(vocab, text, len(text), buf, n, False, False)
            if got < 0:
                raise PytqError("the calibration text could not be tokenized")
            return list(buf[:got])

        n_train = int(low.llama_model_n_ctx_train(handle))
        wins = windows(tokenize, n_train)
        if low.llama_vocab_get_add_bos(vocab):
            bos = int(low.llama_vocab_bos(vocab))
            wins = [[bos, *w[:-1]] for w in wins]
        size = max(len(w) for w in wins)
        cp = low.llama_context_default_params()
        cp.n_ctx = cp.n_batch = cp.n_ubatch = (size + 255) // 256 * 256
        cp.n_threads = cp.n_threads_batch = threads or os.cpu_count() or 1
        cp.flash_attn_type = 1
        cp.type_k = cp.type_v = _GGML_F16
        cp.swa_full = True
        # only the last token's logits are computed: without this, room for a whole window's is reserved (GiB for large vocabularies)
        cp.n_outputs_max = cp.n_outputs_max_per_seq = 1
        cp.no_perf = True
        cp.cb_eval = (
            ctypes.cast(collector.callback, type(cp.cb_eval))
            if cp.cb_eval is not None
            else collector.callback
        )
        with _quiet(quiet):
            ctx = low.llama_init_from_model(handle, cp)
        if not ctx:
            raise PytqError(f"llama.cpp could not make a context for {model} with flash attention")
        memory = low.llama_get_memory(ctx)
        total = 0
        for i, tokens in enumerate(wins):
            low.llama_memory_clear(memory, True)
            batch = low.llama_batch_init(len(tokens), 0, 1)
            start = first_position(i, len(wins), n_train)
            batch.n_tokens = len(tokens)
            for j, token in enumerate(tokens):
                batch.token[j], batch.pos[j] = token, start + j
                batch.n_seq_id[j], batch.seq_id[j][0] = 1, 0
                batch.logits[j] = j + 1 == len(tokens)
            status = low.llama_decode(ctx, batch)
            low.llama_batch_free(batch)
            collector.check()
            if status != 0:
                raise PytqError(f"llama.cpp failed to evaluate the calibration text (status {status})")
            if seen[0] == 0:
                raise PytqError(
                    "no flash attention over a key/value cache was seen: this architecture cannot be calibrated"
                )
            total += len(tokens)
            if on_window is not None:
                on_window(collector, i, len(wins))
        return {
            "n_ctx_train": n_train,
            "n_layer": int(low.llama_model_n_layer(handle)),
            "n_embd": int(low.llama_model_n_embd(handle)),
            "n_vocab": int(low.llama_vocab_n_tokens(vocab)),
            "tokens": total,
        }
    finally:
        if ctx:
            low.llama_free(ctx)
        low.llama_model_free(handle)
