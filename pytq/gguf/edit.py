"""Changing the header of a GGUF file around tensor data that stays as it is.

An edit lists the fields to put and remove. Everything else is copied byte for byte: untouched fields, tensor entries,
and the data region, which goes through the kernel (``copy_file_range``, a reference
copy on file systems that have it) and never through Python. Every result appears under its name in one step
(``os.replace``); only an edit that leaves the data where it is writes into the file itself, and then behind a journal.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from gguf import GGUFValueType

from pytq.errors import PytqError
from pytq.gguf.layout import MAGIC, PREFIX, SCALAR_FORMATS, Layout, pad, read_layout

CHUNK = 1 << 30  # one copy_file_range call; the kernel caps it near 2 GiB anyway
MAX_NAME = 63  # GGML_MAX_NAME less the terminating zero


def encode_string(text: str) -> bytes:
    """A GGUF string: byte length and UTF-8."""
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def encode_field(key: str, kind: GGUFValueType, value: object, item: GGUFValueType | None = None) -> bytes:
    """A whole key-value entry; ``item`` is the type of the elements when ``kind`` is ARRAY."""
    head = encode_string(key) + struct.pack("<I", kind)
    if kind == GGUFValueType.ARRAY:
        assert item is not None and isinstance(value, Sequence)
        body = b"".join(
            encode_string(v) if item == GGUFValueType.STRING else struct.pack(SCALAR_FORMATS[item], v)
            for v in value
        )
        return head + struct.pack("<IQ", item, len(value)) + body
    if kind == GGUFValueType.STRING:
        return head + encode_string(str(value))
    return head + struct.pack(SCALAR_FORMATS[kind], value)


def encode_tensor(name: str, dims: Sequence[int], ggml_type: int, offset: int) -> bytes:
    """A tensor entry; ``dims`` in GGUF order (row length first), ``offset`` relative to the data region."""
    if len(name.encode()) > MAX_NAME:
        raise PytqError(f"tensor name {name!r} is longer than {MAX_NAME} bytes")
    return encode_string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, ggml_type, offset)


@dataclass
class Edit:
    """What to change: encoded entries by key, and keys to drop."""

    put: dict[str, bytes] = field(default_factory=dict)
    remove: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Plan:
    """A new header for ``layout``, padded: the data region follows directly."""

    layout: Layout
    header: bytes

    @property
    def in_place(self) -> bool:
        """True when the data region can stay where it is in the file."""
        return len(self.header) == self.layout.data_start

    @property
    def data_size(self) -> int:
        """Bytes of the data region, with whatever follows the last tensor."""
        return max(0, self.layout.size - self.layout.data_start)


def plan(layout: Layout, edit: Edit) -> Plan:
    """The new header: fields keep their order, changed ones their place, new ones come last."""
    if "general.alignment" in edit.put or "general.alignment" in edit.remove:
        raise PytqError("general.alignment cannot be edited: every tensor's place depends on it")
    fields = [edit.put.get(key, f.raw) for key, f in layout.fields.items() if key not in edit.remove]
    fields += [raw for key, raw in edit.put.items() if key not in layout.fields]
    prefix = PREFIX.pack(MAGIC, layout.version, len(layout.tensors), len(fields))
    header = prefix + b"".join(fields) + b"".join(t.raw for t in layout.tensors)
    return Plan(layout, header + bytes(pad(len(header), layout.alignment) - len(header)))


def write(step: Plan, target: Path) -> str:
    """Makes ``target`` from the plan; returns how: ``in place`` or ``copy``. ``target`` may be the source itself."""
    target = Path(
        os.path.realpath(target)
    )  # a link (a model hub's cache) stays a link: its target is replaced
    recover(target)
    if target.exists() and os.path.samefile(target, step.layout.path) and step.in_place:
        _write_in_place(target, step.header)
        return "in place"
    with atomic(target, like=step.layout.path) as out, step.layout.path.open("rb") as source:
        out.write(step.header)
        out.flush()
        copy_range(source, step.layout.data_start, out, step.data_size)
    return "copy"


def copy_file(source: Path, target: Path) -> None:
    """A plain copy that appears under its name in one step."""
    with atomic(target, like=source) as out, source.open("rb") as data:
        copy_range(data, 0, out, source.stat().st_size)


@contextlib.contextmanager
def atomic(target: Path, like: Path | None = None) -> Iterator[BinaryIO]:
    """An open temporary file beside ``target`` that takes its name when the block ends well and vanishes otherwise.

    Raises PytqError when the directory cannot be written or the disk is full. ``like`` lends its permission bits.
    """
    temporary: Path | None = None
    try:
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
        temporary = Path(name)
        with os.fdopen(handle, "wb") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        if like is not None:
            shutil.copymode(like, temporary)
        else:
            mask = os.umask(0)
            os.umask(mask)
            temporary.chmod(0o666 & ~mask)
        os.replace(temporary, target)
        temporary = None
    except OSError as error:
        raise PytqError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def copy_range(source: BinaryIO, offset: int, out: BinaryIO, count: int) -> None:
    """Copies ``count`` bytes at ``offset`` of ``source`` to the current position of ``out``, inside the kernel if it can."""
    out.flush()
    position = out.tell()
    left = count
    fast: Callable[..., int] | None = getattr(os, "copy_file_range", None)
    while left and fast:
        try:
            done = fast(source.fileno(), out.fileno(), min(left, CHUNK), offset, position)
        except OSError as error:
            # these say "not between these two files"; a full disk or an I/O error is the caller's to see
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
                raise
            break
        if done == 0:
            break
        offset, position, left = offset + done, position + done, left - done
    out.seek(position)
    source.seek(offset)
    while left:
        data = source.read(min(left, 1 << 24))
        if not data:
            raise PytqError(f"{source.name}: ends {left} bytes early (did it change while it was read?)")
        out.write(data)
        left -= len(data)


def journal_of(path: Path) -> Path:
    """Where the old header waits while a new one is written over it."""
    return path.with_name(f"{path.name}.pytq-journal")


def _write_in_place(path: Path, header: bytes) -> None:
    """Overwrites the header; the old one is on disk first, so an interrupted write can be undone by ``recover``."""
    try:
        file = path.open("r+b")
    except OSError as error:
        raise PytqError(f"cannot write {path}: {error.strerror}") from error
    journal = journal_of(path)
    with file:
        old = file.read(len(header))
        with atomic(journal) as out:
            out.write(old)
        try:
            file.seek(0)
            file.write(header)
            file.flush()
            os.fsync(file.fileno())
        except OSError as error:
            raise PytqError(
                f"writing the header of {path} failed ({error.strerror}); run any `pytq gguf` command on it to put the"
                f" old one back from {journal.name}"
            ) from error
    journal.unlink()


def recover(path: Path) -> bool:
    """Puts back the header of an interrupted in-place edit; True when there was one."""
    journal = journal_of(path)
    if not journal.is_file():
        return False
    old = journal.read_bytes()
    with path.open("r+b") as file:
        file.write(old)
        file.flush()
        os.fsync(file.fileno())
    journal.unlink()
    read_layout(path)
    return True
