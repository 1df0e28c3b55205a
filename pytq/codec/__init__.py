"""Codecs of head vectors: the published ones, pytq's cache types and stock ggml types behind one interface.

``pytq.codec(name, head_dim=..., ...)`` is short for ``pytq.codec.codec(...)``, see ``pytq/codec/api.py``.
"""

from __future__ import annotations

import sys
import types
from typing import Any

from pytq.codec.api import NAMES, Codec, codec

__all__ = ["NAMES", "Codec", "codec"]


class _CallableModule(types.ModuleType):
    """The package is its own factory: `pytq.codec("rabitq", ...)` reads as it is meant."""

    def __call__(self, *args: Any, **kwargs: Any) -> Codec:
        return codec(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule
