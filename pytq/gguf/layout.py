"""The byte layout of a GGUF file: where each field and tensor starts and ends.

The ``gguf`` package reads values; an editor that keeps unknown fields byte for byte and never moves tensor data
needs offsets, and a damaged file must be reported with the offset where it stops making sense. Format: GGUF
version 2 and 3, little endian (ggml's docs/gguf.md).
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from pytq.errors import PytqError

MAGIC = b"GGUF"
PREFIX = struct.Struct("<4sIQQ")  # magic, version, tensor count, field count
DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4
SCALAR_FORMATS: dict[GGUFValueType, str] = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.BOOL: "<?",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT64: "<d",
}


@dataclass(frozen=True)
class Field:
    """One key-value pair; ``start`` and ``end`` are file offsets of the whole entry, ``value_start`` of its value."""

    key: str
    type: GGUFValueType
    item_type: GGUFValueType | None
    count: int
    start: int
    value_start: int
    end: int
    raw: bytes

    def value(self) -> Any:
        """The value as Python objects: a scalar, a string or a list."""
        at = self.value_start - self.start
        if self.type == GGUFValueType.STRING:
            return self.raw[at + 8 :].decode("utf-8", errors="replace")
        if self.type != GGUFValueType.ARRAY:
            return struct.unpack_from(SCALAR_FORMATS[self.type], self.raw, at)[0]
        at += 12
        if self.item_type == GGUFValueType.STRING:
            out = []
            for _ in range(self.count):
                (n,) = struct.unpack_from("<Q", self.raw, at)
                out.append(self.raw[at + 8 : at + 8 + n].decode("utf-8", errors="replace"))
                at += 8 + n
            return out
        assert self.item_type is not None
        return np.frombuffer(self.raw, np.dtype(SCALAR_FORMATS[self.item_type]), self.count, at).tolist()


@dataclass(frozen=True)
class TensorEntry:
    """One tensor: ``dims`` in GGUF order (row length first), ``offset`` relative to the data region.

    ``nbytes`` is None for a ggml type that the ``gguf`` package does not know.
    """

    name: str
    dims: tuple[int, ...]
    ggml_type: int
    offset: int
    start: int
    end: int
    raw: bytes
    nbytes: int | None

    @property
    def n_elements(self) -> int:
        return math.prod(self.dims)

    @property
    def type_name(self) -> str:
        return type_name(self.ggml_type)


@dataclass
class Layout:
    """Everything before the tensor data of one file, by offset."""

    path: Path
    size: int
    version: int
    fields: dict[str, Field] = field(default_factory=dict)
    tensors: list[TensorEntry] = field(default_factory=list)
    fields_end: int = 0
    header_end: int = 0
    alignment: int = DEFAULT_ALIGNMENT
    data_start: int = 0

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key, or ``default`` when the file does not have it."""
        found = self.fields.get(key)
        return default if found is None else found.value()

    @property
    def data_end(self) -> int:
        """File offset after the last byte of the last tensor (of known type)."""
        ends = [self.data_start + t.offset + (t.nbytes or 0) for t in self.tensors]
        return max(ends, default=self.data_start)


def type_name(ggml_type: int) -> str:
    """ggml's number of a tensor type as a lower-case name, or ``type N`` for an unknown one."""
    try:
        return GGMLQuantizationType(ggml_type).name.lower()
    except ValueError:
        return f"type {ggml_type}"


def pad(n: int, alignment: int) -> int:
    """``n`` rounded up to a multiple of ``alignment``."""
    return -(-n // alignment) * alignment


def decode_entry(raw: bytes) -> Field:
    """An encoded key-value entry as a Field."""
    return _field(_Cursor(raw, Path("entry")), 0)


class _Cursor:
    """Reads little-endian values and knows the offset that a complaint must name."""

    def __init__(self, data: mmap.mmap | bytes, path: Path) -> None:
        self.data, self.path, self.at, self.size = data, path, 0, len(data)

    def fail(self, reason: str, at: int | None = None) -> PytqError:
        return PytqError(f"{self.path}: damaged GGUF at offset {self.at if at is None else at}: {reason}")

    def take(self, n: int, what: str) -> int:
        """Moves over ``n`` bytes and returns the offset where they started."""
        start = self.at
        if n > self.size - start:
            raise self.fail(f"{what} needs {n} bytes, the file has {self.size - start} left")
        self.at = start + n
        return start

    def unpack(self, fmt: str, what: str) -> Any:
        return struct.unpack_from(fmt, self.data, self.take(struct.calcsize(fmt), what))[0]

    def string(self, what: str) -> str:
        start = self.at
        n = self.unpack("<Q", f"length of {what}")
        at = self.take(n, what)
        try:
            return bytes(self.data[at : at + n]).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"{what} is not UTF-8", start) from error

    def skip_strings(self, count: int, what: str) -> None:
        """Moves over ``count`` strings; a tokenizer has hundreds of thousands, so without a call for each."""
        length, data, at, size = struct.Struct("<Q").unpack_from, self.data, self.at, self.size
        for _ in range(count):
            if size - at < 8:
                raise self.fail(f"length of {what} is cut off", at)
            n = length(data, at)[0]
            if n > size - at - 8:
                raise self.fail(f"{what} needs {n} bytes, the file has {size - at - 8} left", at)
            at += 8 + n
        self.at = at

    def value_type(self, what: str) -> GGUFValueType:
        start = self.at
        number = self.unpack("<I", f"type of {what}")
        try:
            return GGUFValueType(number)
        except ValueError as error:
            raise self.fail(f"{what} has unknown value type {number}", start) from error


def read_layout(path: Path | str) -> Layout:
    """Parses the header of ``path``; raises PytqError naming the offset and the reason when it is damaged."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < PREFIX.size:
                raise PytqError(
                    f"{path}: not a GGUF file: {size} bytes, a GGUF header has at least {PREFIX.size}"
                )
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(_Cursor(data, path), path, size)
    except IsADirectoryError as error:
        raise PytqError(f"{path}: is a directory, a GGUF file is needed") from error
    except FileNotFoundError as error:
        raise PytqError(f"{path}: no such file") from error
    except OSError as error:
        raise PytqError(f"{path}: cannot read: {error.strerror}") from error


def parse_layout(data: bytes, name: Path) -> Layout:
    """Like read_layout for a file that is in memory; ``name`` is how errors call it."""
    if len(data) < PREFIX.size:
        raise PytqError(
            f"{name}: not a GGUF file: {len(data)} bytes, a GGUF header has at least {PREFIX.size}"
        )
    return _parse(_Cursor(data, name), name, len(data))


def _parse(cursor: _Cursor, path: Path, size: int) -> Layout:
    magic, version, n_tensors, n_fields = PREFIX.unpack_from(cursor.data, cursor.take(PREFIX.size, "header"))
    if magic != MAGIC:
        raise PytqError(f"{path}: not a GGUF file: starts with {magic!r}, not {MAGIC!r}")
    if version & 0xFFFF == 0:
        raise PytqError(
            f"{path}: big-endian GGUF files are not supported; convert it with gguf-convert-endian"
        )
    if version not in (2, 3):
        raise PytqError(f"{path}: GGUF version {version} is not supported (2 and 3 are)")
    layout = Layout(path, size, version)
    for index in range(n_fields):
        entry = _field(cursor, index)
        if entry.key in layout.fields:
            raise cursor.fail(f"key {entry.key!r} appears twice", entry.start)
        layout.fields[entry.key] = entry
    layout.fields_end = cursor.at
    layout.alignment = int(layout.get("general.alignment", DEFAULT_ALIGNMENT))
    if layout.alignment <= 0 or layout.alignment & (layout.alignment - 1):
        raise cursor.fail(
            f"general.alignment is {layout.alignment}, not a power of two",
            layout.fields["general.alignment"].value_start,
        )
    names: set[str] = set()
    for index in range(n_tensors):
        tensor = _tensor(cursor, index)
        if tensor.name in names:
            raise cursor.fail(f"tensor {tensor.name!r} appears twice", tensor.start)
        names.add(tensor.name)
        layout.tensors.append(tensor)
    layout.header_end = cursor.at
    layout.data_start = pad(cursor.at, layout.alignment)
    _check_tensors(cursor, layout)
    return layout


def _field(cursor: _Cursor, index: int) -> Field:
    start = cursor.at
    key = cursor.string(f"key {index}")
    what = f"value of {key!r}"
    kind = cursor.value_type(what)
    value_start = cursor.at
    item: GGUFValueType | None = None
    count = 1
    if kind == GGUFValueType.STRING:
        cursor.take(cursor.unpack("<Q", f"length of {what}"), what)
    elif kind == GGUFValueType.ARRAY:
        item = cursor.value_type(f"items of {key!r}")
        count = cursor.unpack("<Q", f"item count of {key!r}")
        if item == GGUFValueType.ARRAY:
            raise cursor.fail(f"{key!r} is an array of arrays, which llama.cpp does not read", value_start)
        if item == GGUFValueType.STRING:
            cursor.skip_strings(count, f"item of {key!r}")
        else:
            cursor.take(count * struct.calcsize(SCALAR_FORMATS[item]), what)
    else:
        cursor.take(struct.calcsize(SCALAR_FORMATS[kind]), what)
    return Field(key, kind, item, count, start, value_start, cursor.at, bytes(cursor.data[start : cursor.at]))


def _tensor(cursor: _Cursor, index: int) -> TensorEntry:
    start = cursor.at
    name = cursor.string(f"name of tensor {index}")
    n_dims = cursor.unpack("<I", f"dimension count of tensor {name!r}")
    if not 0 <= n_dims <= MAX_DIMS:
        raise cursor.fail(f"tensor {name!r} has {n_dims} dimensions, at most {MAX_DIMS} are allowed", start)
    dims = tuple(cursor.unpack("<Q", f"dimension of tensor {name!r}") for _ in range(n_dims))
    kind = cursor.unpack("<I", f"type of tensor {name!r}")
    offset = cursor.unpack("<Q", f"offset of tensor {name!r}")
    nbytes: int | None = None
    try:
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except (ValueError, KeyError):
        pass
    else:
        row = dims[0] if dims else 1
        if row % block:
            raise cursor.fail(f"tensor {name!r}: rows of {row} values do not fit blocks of {block}", start)
        nbytes = math.prod(dims) // block * block_bytes
    raw = bytes(cursor.data[start : cursor.at])
    return TensorEntry(name, dims, kind, offset, start, cursor.at, raw, nbytes)


def _check_tensors(cursor: _Cursor, layout: Layout) -> None:
    """Every tensor aligned, inside the file, and over no other."""
    end, previous = 0, ""
    for tensor in sorted(layout.tensors, key=lambda t: t.offset):
        where = layout.data_start + tensor.offset
        if tensor.offset % layout.alignment:
            raise cursor.fail(
                f"tensor {tensor.name!r} starts off the {layout.alignment}-byte alignment", tensor.start
            )
        if tensor.offset < end:
            raise cursor.fail(f"tensor {tensor.name!r} overlaps {previous!r}", tensor.start)
        end, previous = tensor.offset + (tensor.nbytes or 0), tensor.name
        if layout.data_start + end > layout.size:
            raise cursor.fail(
                f"data of tensor {tensor.name!r} ends at {layout.data_start + end}, the file at {layout.size}"
                " (a download cut short?)",
                where,
            )
