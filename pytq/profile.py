"""The calibration profile: one GGUF file per model, written by ``pytq calibrate`` and read by the patched llama.cpp.

Layout (``csrc/ggml/pytq-profile.cpp`` reads the same; docs/calibrate.md lists every key):

    general.architecture = "kvprofile", kvprofile.format_version, kvprofile.model.fingerprint, ...
    blk.N.kv_k_rot   [n_kv, d, d]  A: keys are stored as A (k - c), sorted so that the first coordinates matter most
    blk.N.kv_q_rot   [n_kv, d, d]  A^-T: queries are multiplied by it
    blk.N.kv_k_mean  [n_kv, d]     c
    blk.N.kv_q_var   [n_kv, d]     mean square of A^-T q per coordinate
    blk.N.kv_k_var   [n_kv, d]     mean square of A (k - c) per coordinate
    blk.N.kv_v_var   [n_kv, d_v]   eigenvalues of V's second moment
    blk.N.q_pre_mean [n_head, 2, bands], blk.N.q_pre_abs [n_head, bands]   queries before RoPE, per frequency band

(shapes in NumPy order; GGUF writes them reversed). The mixing within groups of equal bits (a Hadamard matrix) is not in the
file: the loader folds it in for the layout of the cache type in use, so one profile serves all types.
"""

from __future__ import annotations

import hashlib
import struct
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pytq.errors import PytqError
from pytq.gguf.layout import Layout, read_layout
from pytq.gguf.profile import ARCH, default_path

FORMAT_VERSION = 1
SAMPLE = 256
# |A^T (A^-T) - I| of a sound file is rounding; anything larger means damage
INVERSE_TOLERANCE = 1e-2
LAYER_TENSORS = ("kv_k_rot", "kv_q_rot", "kv_k_mean", "kv_q_var", "kv_k_var", "kv_v_var")

F32 = npt.NDArray[np.float32]

__all__ = ["LayerProfile", "Profile", "default_path", "fingerprint", "load_profile", "write_profile"]


@dataclass
class LayerProfile:
    """One layer's tensors (module docstring); n_kv heads of d coordinates."""

    rot_k: F32
    rot_q: F32
    mean: F32
    q_var: F32
    k_var: F32
    v_var: F32
    pre_mean: F32 | None = None
    pre_abs: F32 | None = None


@dataclass
class Profile:
    """A whole profile.

    Attributes:
        types: per flag (auto, auto2, ...) the K and the V family of every layer, "" for layers without a cache of their own.
        bits: per flag the average bits per value of those types, all scales counted.
    """

    fingerprint: str
    model_name: str
    model_arch: str
    n_layer: int
    tokens: int
    text_sha256: str
    pytq_version: str
    upstream: str
    layers: dict[int, LayerProfile] = field(default_factory=dict)
    types: dict[str, tuple[list[str], list[str]]] = field(default_factory=dict)
    bits: dict[str, float] = field(default_factory=dict)


def fingerprint(layout: Layout) -> str:
    """SHA-256 over what makes the model compute what it computes.

    The architecture's own metadata, every tensor's name, type and shape, and the first and last 256 bytes of its data; not the
    tokenizer, chat template or descriptions, which may change. Of a split model, the first file.

    Raises:
        PytqError: the file is shorter than its header says.
    """
    h = hashlib.sha256()
    prefix = f"{layout.get('general.architecture', '')}."
    for key, f in layout.fields.items():
        if not key.startswith(prefix):
            continue
        value = f.raw[f.value_start - f.start :]
        h.update(key.encode() + b"\0" + struct.pack("<I", int(f.type)))
        if f.item_type is not None:
            h.update(struct.pack("<IQ", int(f.item_type), f.count))
            if int(f.item_type) not in (8, 9):  # strings and nested arrays
                h.update(value[12:])
        else:
            h.update(value[8:] if int(f.type) == 8 else value)
    with layout.path.open("rb") as file:
        for t in layout.tensors:
            dims = [*t.dims, *[1] * (4 - len(t.dims))]
            h.update(t.name.encode() + b"\0" + struct.pack("<I4Q", t.ggml_type, *dims))
            if t.nbytes is None:
                raise PytqError(f"{layout.path}: tensor {t.name} has an unknown type {t.ggml_type}")
            n = min(t.nbytes, SAMPLE)
            start = layout.data_start + t.offset
            for at in (start, start + t.nbytes - n):
                file.seek(at)
                piece = file.read(n)
                if len(piece) != n:
                    raise PytqError(f"{layout.path}: the file is shorter than its header says")
                h.update(piece)
    return h.hexdigest()


def write_profile(path: Path, profile: Profile) -> None:
    """Writes the file in one step (a temporary file in the same directory, then a rename)."""
    import gguf

    from pytq.gguf.edit import atomic

    with tempfile.TemporaryDirectory() as directory:
        temporary = Path(directory) / "profile.gguf"
        w = gguf.GGUFWriter(str(temporary), ARCH)
        w.add_type(ARCH)
        w.add_name(f"KV profile of {profile.model_name}")
        w.add_uint32(f"{ARCH}.format_version", FORMAT_VERSION)
        w.add_string(f"{ARCH}.pytq_version", profile.pytq_version)
        w.add_string(f"{ARCH}.upstream", profile.upstream)
        w.add_string(f"{ARCH}.model.fingerprint", profile.fingerprint)
        w.add_string(f"{ARCH}.model.name", profile.model_name)
        w.add_string(f"{ARCH}.model.architecture", profile.model_arch)
        w.add_uint32(f"{ARCH}.block_count", profile.n_layer)
        w.add_uint32(f"{ARCH}.tokens", profile.tokens)
        w.add_string(f"{ARCH}.text_sha256", profile.text_sha256)
        for flag, (k, v) in profile.types.items():
            w.add_array(f"{ARCH}.types.{flag}.k", k)
            w.add_array(f"{ARCH}.types.{flag}.v", v)
            w.add_float32(f"{ARCH}.types.{flag}.bits", profile.bits[flag])
        for il, layer in sorted(profile.layers.items()):
            tensors: dict[str, F32 | None] = {
                "kv_k_rot": layer.rot_k,
                "kv_q_rot": layer.rot_q,
                "kv_k_mean": layer.mean,
                "kv_q_var": layer.q_var,
                "kv_k_var": layer.k_var,
                "kv_v_var": layer.v_var,
                "q_pre_mean": layer.pre_mean,
                "q_pre_abs": layer.pre_abs,
            }
            for name, data in tensors.items():
                if data is not None:
                    w.add_tensor(f"blk.{il}.{name}", np.ascontiguousarray(data, np.float32))
        w.write_header_to_file()
        w.write_kv_data_to_file()
        w.write_tensors_to_file()
        w.close()
        data_bytes = temporary.read_bytes()
    with atomic(path) as out:
        out.write(data_bytes)


def load_profile(path: Path, model: Layout | None = None) -> Profile:
    """Reads and checks a profile; with ``model`` also that it belongs to that model.

    Raises:
        PytqError: not a profile, damaged or truncated, of another version or model, a wrong shape or a value that is not finite.
    """
    layout = read_layout(path)
    if layout.get("general.architecture") != ARCH:
        raise PytqError(f"{path}: is a GGUF file, but not a profile")
    version = layout.get(f"{ARCH}.format_version")
    if version != FORMAT_VERSION:
        raise PytqError(
            f"{path}: has format version {version}, expected {FORMAT_VERSION}: run `pytq calibrate` again"
        )
    if layout.data_end > layout.size:
        raise PytqError(
            f"{path}: is truncated ({layout.size} of {layout.data_end} bytes): run `pytq calibrate` again"
        )

    def text(key: str) -> str:
        value = layout.get(f"{ARCH}.{key}")
        if not isinstance(value, str):
            raise PytqError(f"{path}: lacks the text {ARCH}.{key}")
        return value

    def number(key: str) -> int:
        value = layout.get(f"{ARCH}.{key}")
        if not isinstance(value, int):
            raise PytqError(f"{path}: lacks the number {ARCH}.{key}")
        return value

    out = Profile(
        text("model.fingerprint"),
        text("model.name"),
        text("model.architecture"),
        number("block_count"),
        number("tokens"),
        text("text_sha256"),
        text("pytq_version"),
        text("upstream"),
    )
    if model is not None and out.fingerprint != fingerprint(model):
        raise PytqError(
            f"{path}: was made for another model ({out.model_name}): run `pytq calibrate {model.path}`"
        )
    raw = np.memmap(path, np.uint8, "r")
    found: dict[int, dict[str, F32]] = {}
    for t in layout.tensors:
        parts = t.name.split(".")
        if len(parts) != 3 or parts[0] != "blk" or not parts[1].isdigit():
            raise PytqError(f"{path}: unexpected tensor {t.name}")
        if t.ggml_type != 0:
            raise PytqError(f"{path}: tensor {t.name} is not f32")
        start = layout.data_start + t.offset
        x = np.frombuffer(raw[start : start + 4 * t.n_elements].tobytes(), np.float32).reshape(t.dims[::-1])
        if not np.isfinite(x).all():
            raise PytqError(f"{path}: tensor {t.name} holds a value that is not finite")
        found.setdefault(int(parts[1]), {})[parts[2]] = x
    for il, tensors in found.items():
        missing = [n for n in LAYER_TENSORS if n not in tensors]
        if missing or il >= out.n_layer:
            raise PytqError(f"{path}: layer {il} " + (f"lacks {missing[0]}" if missing else "does not exist"))
        # a single KV head: GGUF drops trailing dimensions of one
        a, b = (tensors[n].reshape(-1, *tensors[n].shape[-2:]) for n in ("kv_k_rot", "kv_q_rot"))
        d, heads = a.shape[-1], a.shape[0]
        if a.shape != (heads, d, d) or b.shape != a.shape:
            raise PytqError(f"{path}: the transforms of layer {il} have shapes {a.shape} and {b.shape}")
        flat = {n: tensors[n].reshape(-1, tensors[n].shape[-1]) for n in LAYER_TENSORS[2:]}
        for name in ("kv_k_mean", "kv_q_var", "kv_k_var"):
            if flat[name].shape != (heads, d):
                raise PytqError(
                    f"{path}: {name} of layer {il} has shape {flat[name].shape}, expected {(heads, d)}"
                )
        worst = float(np.abs(a.transpose(0, 2, 1).astype(np.float64) @ b - np.eye(d)).max())
        if worst > INVERSE_TOLERANCE:
            raise PytqError(
                f"{path}: the transforms of layer {il} are not inverse to each other (off by {worst:.2g})"
            )
        out.layers[il] = LayerProfile(
            a,
            b,
            flat["kv_k_mean"],
            flat["kv_q_var"],
            flat["kv_k_var"],
            flat["kv_v_var"],
            tensors.get("q_pre_mean"),
            tensors.get("q_pre_abs"),
        )
    prefix, suffix = f"{ARCH}.types.", ".k"
    for key in layout.fields:
        if key.startswith(prefix) and key.endswith(suffix):
            flag = key[len(prefix) : -len(suffix)]
            k, v = layout.get(key), layout.get(f"{prefix}{flag}.v")
            if (
                not isinstance(k, list)
                or not isinstance(v, list)
                or len(k) != out.n_layer
                or len(v) != out.n_layer
            ):
                raise PytqError(f"{path}: the types of {flag} do not cover {out.n_layer} layers")
            out.types[flag] = (k, v)
            out.bits[flag] = float(layout.get(f"{prefix}{flag}.bits", 0.0))
    return out
