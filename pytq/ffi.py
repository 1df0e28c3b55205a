"""The compiled library, imported on first use.

``lib()`` gives csrc/'s functions, ``ffi()`` cffi's object for pointers and buffers.
"""

from __future__ import annotations

import functools
from typing import Any

from pytq.errors import PytqError


@functools.cache
def _module() -> Any:
    try:
        from pytq import _pytq
    except ImportError as error:
        raise PytqError(
            f"the compiled part of pytq could not be loaded ({error}): reinstall with `pip install -e .` in the checkout"
        ) from error
    return _pytq


def lib() -> Any:
    """The functions of csrc/ (see csrc/ffi/*_cdef.h). PytqError when the extension is missing or broken."""
    return _module().lib


def ffi() -> Any:
    """cffi's ``FFI`` object of the extension."""
    return _module().ffi
