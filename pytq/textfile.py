"""Texts that users name: read whole, and refused in one line where they cannot be used."""

from __future__ import annotations

from pathlib import Path

from pytq.errors import PytqError


def read_text(path: Path) -> bytes:
    """The bytes of a UTF-8 text. PytqError when it cannot be read, is not UTF-8 (with the offset), or holds nothing."""
    try:
        data = path.read_bytes()
        text = data.decode("utf-8")
    except OSError as error:
        raise PytqError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise PytqError(f"{path} is not UTF-8 text (byte {error.start})") from error
    if not text.strip():
        raise PytqError(f"{path} holds no text")
    return data
