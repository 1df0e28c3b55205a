"""pytq: KV-cache types of 2 to 4 bits for llama.cpp.

``pytq.Llama`` is llama-cpp-python's ``Llama`` on the patched library; ``pytq.codec`` holds the codecs.
Both are imported on first use: the command line must start fast, and ``Llama`` loads a shared library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pytq.errors import PytqError

if TYPE_CHECKING:
    from pytq.llama import Llama

__version__ = "0.1.0"
__all__ = ["Llama", "PytqError", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "Llama":
        from pytq.llama import Llama

        return Llama
    if name == "codec":
        return importlib.import_module("pytq.codec")
    raise AttributeError(f"module 'pytq' has no attribute {name!r}")
