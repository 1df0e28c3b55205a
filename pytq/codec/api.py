"""``codec(name, head_dim=...)``: every quantiser of head vectors behind encode, decode and inner."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pytq.codec import block, polarquant, qjl, rabitq, table, turboquant
from pytq.codec.rotation import Rotation, gaussian, matvec
from pytq.codec.scalars import F32, U8, dot16, exponent_of, get_scalar, halves, put_scalar, qjl_factor, scale2
from pytq.errors import PytqError

PAPER = {"turboquant_mse": 0, "turboquant_prod": 1, "qjl": 2, "polarquant": 3, "rabitq": 4}
BLOCK = tuple(dict.fromkeys(row.family for row in table.load_types()))
# ggml name -> values per block, bytes per block (ggml-common.h)
GGML = {
    "q4_0": (32, 18),
    "q5_1": (32, 24),
    "q8_0": (32, 34),
    "iq4_nl": (32, 18),
    "mxfp4": (32, 17),
    "nvfp4": (64, 36),
}
NAMES = (*PAPER, *BLOCK, *GGML)
BACKENDS = ("c", "numpy")
MAX_DIM = 4096
# norms up to this times sqrt(4096) stay below 2^14, the largest scale of any format here
LARGE = 256.0


def codec(
    name: str,
    head_dim: int,
    bits: int | None = None,
    rotation: str = "hadamard",
    seed: int = 0,
    backend: str = "c",
    scalars: str = "f16",
    projections: int | None = None,
    search: str = "exact",
) -> Codec:
    """Makes a codec of vectors of length ``head_dim``.

    Args:
        name: ``turboquant_mse``, ``turboquant_prod`` (arXiv 2504.19874, algorithms 1 and 2), ``qjl`` (2406.03482),
            ``polarquant`` (2502.02617), ``rabitq`` (2405.12497, 2409.09913); pytq's cache types ``turbo2`` .. ``kv4s``;
            ggml's ``q4_0``, ``q5_1``, ``q8_0``, ``iq4_nl``, ``mxfp4``, ``nvfp4``.
        head_dim: a multiple of 16 up to 4096 for the papers' codecs; the table's sizes for cache types; a multiple
            of the block for ggml's.
        bits: mse and rabitq 1..8, prod 1..8 (1 is QJL alone). None elsewhere: the name fixes the rate.
        rotation: ``hadamard`` (random signs, then H), ``random`` (Haar-random orthogonal) or ``none``.
        seed: of the rotation and of QJL's projection.
        backend: ``c`` or ``numpy``; for the papers' codecs both give the same bytes and floats. ggml types in C
            are those of libggml-base of the stock build; in NumPy those of the ``gguf`` package.
        scalars: ``f16`` or ``f32``, the type of stored norms and radii (papers' codecs only).
        projections: rows of QJL's projection, a multiple of 16; default head_dim (qjl and prod only).
        search: RaBitQ's scale per vector: ``exact`` (2409.09913, algorithm 1) or ``fast`` (one fixed scale).

    Raises:
        PytqError: an unknown name or an argument outside these limits.
    """
    if name not in NAMES:
        raise PytqError(f"unknown codec {name!r}: one of {', '.join(NAMES)}")
    if backend not in BACKENDS:
        raise PytqError(f"unknown backend {backend!r}: c or numpy")
    if not isinstance(head_dim, (int, np.integer)) or not 1 <= head_dim <= MAX_DIM:
        raise PytqError(f"head_dim must be an integer from 1 to {MAX_DIM}, not {head_dim!r}")
    if scalars not in ("f16", "f32"):
        raise PytqError(f"unknown type of scalars {scalars!r}: f16 or f32")
    if not isinstance(seed, (int, np.integer)) or seed < 0:
        raise PytqError(f"seed must be a non-negative integer, not {seed!r}")
    if search not in ("exact", "fast") or (search == "fast" and name != "rabitq"):
        raise PytqError(f"search must be exact, or fast for rabitq, not {search!r}")
    if name in PAPER:
        fast = search == "fast"
        return PaperCodec(name, int(head_dim), bits, rotation, int(seed), backend, scalars, projections, fast)
    if bits is not None:
        raise PytqError(f"{name} has a fixed rate: leave bits out")
    if scalars != "f16" or projections is not None:
        raise PytqError(f"{name} has a fixed format: leave scalars and projections out")
    kind = BlockCodec if name in BLOCK else GgmlCodec
    return kind(name, int(head_dim), rotation, int(seed), backend)


def _split(n: int, threads: int) -> list[slice]:
    step = max(1, -(-n // threads))
    return [slice(i, min(i + step, n)) for i in range(0, n, step)]


def _parallel(work: Callable[[slice], None], n: int, threads: int) -> None:
    """Runs ``work`` over slices of range(n); cffi and ctypes release the interpreter lock in between."""
    if threads < 1:
        raise PytqError(f"threads must be at least 1, not {threads}")
    parts = _split(n, threads)
    if len(parts) <= 1:
        for part in parts:
            work(part)
        return
    with ThreadPoolExecutor(len(parts)) as pool:
        list(pool.map(work, parts))


class Codec:
    """Encodes float32 head vectors into bytes; made by ``codec``.

    Attributes:
        name, head_dim, bits, backend: as given.
        code_bytes: bytes of one code.
        bits_per_value: 8 * code_bytes / head_dim, so norms, scales and padding count.
        rotation: the ``Rotation`` applied before quantising.
        unbiased: True if ``inner`` is unbiased over seeds (QJL, prod, RaBitQ with rotation="random").
    """

    unbiased = False

    def __init__(
        self,
        name: str,
        head_dim: int,
        bits: int | None,
        rotation: str,
        seed: int,
        backend: str,
        code_bytes: int,
    ) -> None:
        self.name, self.head_dim, self.bits, self.backend = name, head_dim, bits, backend
        self.code_bytes = code_bytes
        self.bits_per_value = 8 * code_bytes / head_dim
        self.rotation = Rotation(rotation, head_dim, seed)

    def __repr__(self) -> str:
        bits = "" if self.bits is None else f", bits={self.bits}"
        return f"<codec {self.name}, head_dim={self.head_dim}{bits}, {self.bits_per_value:g} bits per value>"

    # -- checks --

    def _vectors(self, x: ArrayLike, what: str) -> tuple[F32, tuple[int, ...]]:
        try:
            array = np.asarray(x)
        except ValueError as error:
            raise PytqError(f"{what} is not an array: {error}") from error
        if array.dtype not in (np.float16, np.float32, np.float64):
            raise PytqError(f"{what} must be float16, float32 or float64, not {array.dtype}")
        if array.ndim < 1 or array.shape[-1] != self.head_dim:
            raise PytqError(f"{what} must have shape [..., {self.head_dim}], not {list(array.shape)}")
        with np.errstate(over="ignore"):
            flat = np.ascontiguousarray(array, np.float32).reshape(-1, self.head_dim)
        finite = np.isfinite(flat).all(axis=1)
        if not finite.all():
            raise PytqError(
                f"vector {int(np.argmin(finite))} of {what} has a NaN, an infinity or a value beyond float32"
            )
        return flat, array.shape[:-1]

    def _codes(self, codes: ArrayLike) -> tuple[U8, tuple[int, ...]]:
        array = np.asarray(codes)
        if array.dtype != np.uint8:
            raise PytqError(f"codes must be uint8, not {array.dtype}")
        if array.ndim < 1 or array.shape[-1] != self.code_bytes:
            raise PytqError(f"codes must have shape [..., {self.code_bytes}], not {list(array.shape)}")
        return np.ascontiguousarray(array).reshape(-1, self.code_bytes), array.shape[:-1]

    # -- the interface --

    def encode(self, x: ArrayLike, threads: int = 1) -> U8:
        """Codes of vectors.

        Args:
            x: [..., head_dim], float32; float16 and float64 are converted to float32 first.
            threads: vectors are split among so many (C backend; NumPy runs in one).

        Returns:
            uint8 [..., code_bytes].

        Raises:
            PytqError: wrong shape or dtype, NaN or infinity, or a norm that the stored scalar cannot hold.
        """
        flat, lead = self._vectors(x, "x")
        out = np.zeros((len(flat), self.code_bytes), np.uint8)
        _parallel(lambda part: self._encode(flat[part], out[part], part.start), len(flat), threads)
        return out.reshape(*lead, self.code_bytes)

    def decode(self, codes: ArrayLike, threads: int = 1) -> F32:
        """The reconstruction of least squared error that the method offers.

        uint8 [..., code_bytes] -> float32 [..., head_dim]. PytqError for a wrong shape or dtype.
        """
        flat, lead = self._codes(codes)
        out = np.zeros((len(flat), self.head_dim), np.float32)
        _parallel(lambda part: self._decode(flat[part], out[part]), len(flat), threads)
        return out.reshape(*lead, self.head_dim)

    def inner(self, q: ArrayLike, codes: ArrayLike, threads: int = 1) -> F32:
        """Estimates of <q, x> for every query and code; the method's unbiased estimator where it has one.

        Args:
            q: [..., nq, head_dim], float16, float32 or float64, not quantised.
            codes: uint8 [..., n, code_bytes] with the same leading dimensions.

        Returns:
            float32 [..., nq, n].

        Raises:
            PytqError: wrong shape or dtype, NaN or infinity.
        """
        queries, qlead = self._vectors(q, "q")
        flat, clead = self._codes(codes)
        if len(qlead) < 1 or len(clead) < 1 or qlead[:-1] != clead[:-1]:
            raise PytqError(f"q {[*qlead, self.head_dim]} and codes {[*clead, self.code_bytes]} do not pair")
        nq, n = qlead[-1], clead[-1]
        groups = int(np.prod(qlead[:-1], dtype=np.int64))
        prepared = self._prepare(queries)
        out = np.zeros((groups, nq, n), np.float32)
        for g in range(groups):
            q_g = prepared[g * nq : (g + 1) * nq]
            c_g = flat[g * n : (g + 1) * n]

            def work(part: slice, q_g: F32 = q_g, c_g: U8 = c_g, to: F32 = out[g]) -> None:
                to[:, part] = self._inner(q_g, c_g[part])

            _parallel(work, n, threads)
        return out.reshape(*qlead[:-1], nq, n)

    # -- what the kinds of codec implement --

    def _encode(self, x: F32, out: U8, first: int) -> None:
        raise NotImplementedError

    def _decode(self, codes: U8, out: F32) -> None:
        raise NotImplementedError

    def _prepare(self, q: F32) -> F32:
        raise NotImplementedError

    def _inner(self, prepared: F32, codes: U8) -> F32:
        raise NotImplementedError


class _CStruct:
    """The C view of a rotation and a method; keeps what its pointers borrow alive."""

    def __init__(self, rotation: Rotation, **fields: Any) -> None:
        from pytq import ffi as binding

        self.ffi, self.lib = binding.ffi(), binding.lib()
        self.keep: list[Any] = []
        self.c = self.ffi.new("pytq_codec *")
        kinds = {"none": 0, "hadamard": 1, "random": 2}
        arrays = {"signs": rotation.signs, "matrix": rotation.matrix, "matrix_t": rotation.transposed}
        for key, value in {"dim": rotation.dim, "rotation": kinds[rotation.kind], **fields, **arrays}.items():
            if isinstance(value, np.ndarray):
                self.keep.append(value)
                value = self.f32(value)
            if value is not None:
                setattr(self.c, key, value)

    def f32(self, a: F32) -> Any:
        return self.ffi.cast("float *", a.ctypes.data)

    def u8(self, a: U8) -> Any:
        return self.ffi.cast("uint8_t *", a.ctypes.data)

    def rotate(self, x: F32, inverse: bool = False) -> F32:
        y = np.empty_like(x)
        self.lib.pytq_codec_rotate(self.c, self.f32(x), len(x), self.f32(y), int(inverse))
        return y


def _unfit(first: int) -> PytqError:
    return PytqError(
        f"the norm of vector {first} does not fit a 16-bit float: use scalars='f32' or scale the input"
    )


class PaperCodec(Codec):
    """TurboQuant, QJL, PolarQuant and RaBitQ: the same bytes and floats from C and NumPy."""

    def __init__(
        self,
        name: str,
        head_dim: int,
        bits: int | None,
        rotation: str,
        seed: int,
        backend: str,
        scalars: str,
        projections: int | None,
        fast: bool,
    ) -> None:
        if head_dim % 16:
            raise PytqError(f"head_dim must be a multiple of 16 for {name}, not {head_dim}")
        if name in ("qjl", "polarquant"):
            if bits not in (None, 1) or (name == "polarquant" and bits is not None):
                raise PytqError(f"{name} has a fixed rate: leave bits out")
            bits = 1 if name == "qjl" else None
        elif not isinstance(bits, (int, np.integer)) or not 1 <= bits <= 8:
            raise PytqError(f"bits must be an integer from 1 to 8 for {name}, not {bits!r}")
        # One bit leaves nothing for the mse part: prod is QJL then (TurboQuant, algorithm 2 with b = 1).
        self.method = "qjl" if name == "turboquant_prod" and bits == 1 else name
        projected = self.method in ("qjl", "turboquant_prod")
        if projections is not None and not projected:
            raise PytqError(f"{name} has no projection: leave projections out")
        m = projections if projections is not None else head_dim
        if projected and (not isinstance(m, (int, np.integer)) or m % 16 or not 16 <= m <= MAX_DIM):
            raise PytqError(f"projections must be a multiple of 16 from 16 to {MAX_DIM}, not {m!r}")
        self.m, self.wide, self.fast, d = int(m), scalars == "f32", fast, head_dim
        s = 4 if self.wide else 2
        size = {
            "turboquant_mse": lambda b: s + d // 8 * b,
            "turboquant_prod": lambda b: 2 * s + d // 8 * (b - 1) + self.m // 8,
            "qjl": lambda b: s + self.m // 8,
            "polarquant": lambda b: s * (d // 16) + d // 4 + (7 * d // 16 + 3) // 4,
            "rabitq": lambda b: 2 * s + d // 8 * b,
        }[self.method](bits)
        super().__init__(name, head_dim, bits, rotation, seed, backend, size)
        self.proj: Any = None
        self.proj_t: Any = None
        if projected:
            self.proj = gaussian(self.m, head_dim, seed)
            self.proj_t = np.ascontiguousarray(self.proj.T)
        self.unbiased = projected or self.method == "rabitq"
        self.struct: _CStruct | None = None
        if backend == "c":
            self.struct = _CStruct(
                self.rotation,
                method=PAPER[self.method],
                bits=int(bits or 0),
                n_proj=self.m,
                wide=int(self.wide),
                fast=int(fast),
                proj=self.proj,
                proj_t=self.proj_t,
            )
            if self.struct.lib.pytq_codec_bytes(self.struct.c) != size:
                raise PytqError("the compiled library is of another version: reinstall pytq")

    def _encode(self, x: F32, out: U8, first: int) -> None:
        if self.struct:
            c = self.struct
            bad = c.lib.pytq_codec_encode(c.c, c.f32(x), len(x), c.u8(out))
            if bad >= 0:
                raise _unfit(first + bad)
            return
        e = exponent_of(np.abs(x).max(axis=1)) if len(x) else np.zeros(0, np.int64)
        p, q = halves(-e)
        y = self.rotation.forward(x * p[:, None] * q[:, None])
        if self.method == "polarquant":
            parts, fits = polarquant.encode(y, e, self.wide)
        else:
            norm = np.sqrt(dot16(y, y))
            with np.errstate(over="ignore"):
                raw, fits = put_scalar(scale2(norm, e)[:, None], self.wide)
            more = np.ones(len(x), bool)
            if self.method == "turboquant_mse":
                parts = turboquant.encode_mse(y, norm, self._bits)
            elif self.method == "turboquant_prod":
                parts, more = turboquant.encode_prod(y, norm, self._bits, self.proj_t, self.wide)
            elif self.method == "qjl":
                parts = qjl.encode(y, self.proj_t)
            else:
                parts, more = rabitq.encode(y, norm, self._bits, self.wide, self.fast)
            parts, fits = [raw, *parts], fits & more
        if not fits.all():
            raise _unfit(first + int(np.argmin(fits)))
        out[:] = np.concatenate(parts, axis=1)

    @property
    def _bits(self) -> int:
        assert self.bits is not None
        return int(self.bits)

    def _open(self, codes: U8) -> tuple[F32 | None, F32, F32, F32 | None, Any, Any]:
        """level, scale, inner scale, signs, signs' factor for decoding, signs' factor for inner products."""
        d = self.head_dim
        if self.method == "polarquant":
            level, scale = polarquant.open_code(codes, d, self.wide)
            return level, scale, scale, None, None, None
        scalar, rest = get_scalar(codes, 1, self.wide)
        norm = scalar[:, 0]
        if self.method == "turboquant_mse":
            level, scale = turboquant.open_mse(rest, norm, d, self._bits)
            return level, scale, scale, None, None, None
        if self.method == "turboquant_prod":
            level, scale, sign, a, b = turboquant.open_prod(rest, norm, d, self._bits, self.m, self.wide)
            return level, scale, scale, sign, a, b
        if self.method == "qjl":
            k = qjl_factor(self.m)
            return None, norm, norm, qjl.unpack_signs(rest, self.m), np.full_like(norm, k), norm * k
        level, scale, inner = rabitq.open_code(rest, norm, d, self._bits, self.wide)
        return level, scale, inner, None, None, None

    def _decode(self, codes: U8, out: F32) -> None:
        if self.struct:
            c = self.struct
            c.lib.pytq_codec_decode(c.c, c.u8(codes), len(codes), c.f32(out))
            return
        level, scale, _, sign, factor, _ = self._open(codes)
        if level is None:
            level = np.zeros((len(codes), self.head_dim), np.float32)
        if sign is not None and self.proj is not None:
            level = level + factor[:, None] * matvec(sign, self.proj)
        out[:] = self.rotation.inverse(level) * scale[:, None]

    def _prepare(self, q: F32) -> F32:
        d = self.head_dim
        length = {"qjl": self.m, "turboquant_prod": d + self.m}.get(self.method, d)
        if self.struct:
            c = self.struct
            out = np.empty((len(q), length), np.float32)
            c.lib.pytq_codec_query(c.c, c.f32(q), len(q), c.f32(out))
            return out
        y = self.rotation.forward(q)
        if self.proj_t is None:
            return y
        projected = matvec(y, self.proj_t)
        return projected if self.method == "qjl" else np.concatenate([y, projected], axis=1)

    def _inner(self, prepared: F32, codes: U8) -> F32:
        out = np.zeros((len(prepared), len(codes)), np.float32)
        if self.struct:
            c = self.struct
            c.lib.pytq_codec_inner(
                c.c, c.f32(prepared), len(prepared), c.u8(codes), len(codes), c.f32(out), len(codes)
            )
            return out
        level, _, inner, sign, _, factor = self._open(codes)
        d = 0 if level is None else self.head_dim
        for i, row in enumerate(prepared):
            if level is not None:
                out[i] = inner * dot16(level, row[None, :d])
            if sign is not None:
                out[i] = out[i] + factor * dot16(sign, row[None, d:])
        return out


class _Rotated(Codec):
    """Formats that quantise rotated coordinates themselves; ``inner`` is the dot product with the decoded vector."""

    def __init__(
        self, name: str, head_dim: int, rotation: str, seed: int, backend: str, code_bytes: int
    ) -> None:
        super().__init__(name, head_dim, None, rotation, seed, backend, code_bytes)
        self.struct = _CStruct(self.rotation) if backend == "c" else None

    def _to(self, x: F32) -> F32:
        return self.struct.rotate(x) if self.struct else self.rotation.forward(x)

    def _encode(self, x: F32, out: U8, first: int) -> None:
        with np.errstate(over="ignore", invalid="ignore"):
            y = self._to(x)
            self._quantize(y, out)
            # These formats saturate, or store what is not finite as zero, without a word. Within range no scale is
            # at its end, so only large vectors are decoded again and compared.
            large = np.flatnonzero(~(np.abs(y).max(axis=1, initial=0) < LARGE))
            if len(large):
                before = y[large].astype(np.float64)
                error = ((self._dequantize(np.ascontiguousarray(out[large])) - before) ** 2).sum(axis=1)
                bad = ~(error < 0.5 * (before**2).sum(axis=1))
                if bad.any():
                    raise PytqError(
                        f"vector {first + int(large[np.argmax(bad)])} is too large for the scale of {self.name}"
                    )

    def _decode(self, codes: U8, out: F32) -> None:
        y = self._dequantize(codes)
        out[:] = self.struct.rotate(y, True) if self.struct else self.rotation.inverse(y)

    def _prepare(self, q: F32) -> F32:
        return self._to(q)

    def _inner(self, prepared: F32, codes: U8) -> F32:
        return prepared @ self._dequantize(codes).T

    def _quantize(self, y: F32, out: U8) -> None:
        raise NotImplementedError

    def _dequantize(self, codes: U8) -> F32:
        raise NotImplementedError


class BlockCodec(_Rotated):
    """pytq's ggml cache types (csrc/ref and csrc/cpu; docs/format.md): one block per head vector."""

    def __init__(self, name: str, head_dim: int, rotation: str, seed: int, backend: str) -> None:
        self.row = table.find_type(name, head_dim)
        super().__init__(name, head_dim, rotation, seed, backend, self.row.block_bytes)
        self.info = self.struct.lib.pytq_type_get(self.row.id) if self.struct else None

    def _quantize(self, y: F32, out: U8) -> None:
        if self.struct:
            y = np.ascontiguousarray(y)
            self.struct.lib.pytq_quantize(self.info, self.struct.f32(y), self.struct.u8(out), y.size)
        else:
            out[:] = block.encode(self.row, y)

    def _dequantize(self, codes: U8) -> F32:
        if not self.struct:
            return block.decode(self.row, codes)
        y = np.empty((len(codes), self.head_dim), np.float32)
        self.struct.lib.pytq_dequantize(self.info, self.struct.u8(codes), self.struct.f32(y), y.size)
        return y


@functools.cache
def _ggml() -> ctypes.CDLL:
    """libggml-base of the stock build, else of the patched one; PytqError if neither exists."""
    from pytq.paths import find_build

    try:
        build = find_build("stock")
    except PytqError:
        build = find_build("patched")
    for suffix in ("so", "dylib"):
        path = build.lib / f"libggml-base.{suffix}"
        if path.exists():
            return ctypes.CDLL(str(path))
    raise PytqError(f"libggml-base is not in {build.lib}: run `pytq build --stock --force`")


class GgmlCodec(_Rotated):
    """Stock ggml types: ``quantize_row_*_ref`` and ``dequantize_row_*`` of libggml-base, or ``gguf.quants`` in NumPy."""

    def __init__(self, name: str, head_dim: int, rotation: str, seed: int, backend: str) -> None:
        values, size = GGML[name]
        if head_dim % values:
            raise PytqError(f"head_dim must be a multiple of {values} for {name}, not {head_dim}")
        super().__init__(name, head_dim, rotation, seed, backend, head_dim // values * size)
        if backend == "c":
            self._to_code = getattr(_ggml(), f"quantize_row_{name}_ref")
            self._to_float = getattr(_ggml(), f"dequantize_row_{name}")
            for function in (self._to_code, self._to_float):
                function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
                function.restype = None
        else:
            import gguf

            self._type = getattr(gguf.GGMLQuantizationType, name.upper())
            self._gguf = gguf

    def _quantize(self, y: F32, out: U8) -> None:
        if self.backend == "c":
            self._to_code(y.ctypes.data, out.ctypes.data, y.size)
            return
        try:
            out[:] = self._gguf.quants.quantize(y, self._type)
        except NotImplementedError as error:
            raise PytqError(f"the gguf package cannot encode {self.name}: use backend='c'") from error

    def _dequantize(self, codes: U8) -> F32:
        if self.backend == "c":
            y: NDArray[np.float32] = np.empty((len(codes), self.head_dim), np.float32)
            self._to_float(codes.ctypes.data, y.ctypes.data, y.size)
            return y
        return np.asarray(self._gguf.quants.dequantize(codes, self._type), np.float32)
