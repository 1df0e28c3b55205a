"""``pytq.Llama``: llama-cpp-python's ``Llama`` on the patched library, with cache types by name.

Importing this module loads the shared library of the patched build, so it has to come before any other
import of ``llama_cpp`` in the process (or ``LLAMA_CPP_LIB_PATH`` has to name that library from the start).
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from pytq import estimate, paths
from pytq.codec.table import STOCK, families, load_types
from pytq.errors import PytqError
from pytq.model import gguf_check

# types llama.cpp can hold in V without flash attention
PLAIN = ("f32", "f16", "bf16")
DEFAULT_K, DEFAULT_V = "turbo4", "turbo3"


def type_ids() -> dict[str, int]:
    """ggml type id of every cache type by the name of its flag."""
    # the id of a family is the flag; the KV cache picks the concrete type by head_dim
    return {name: identifier for name, identifier, _, _ in STOCK} | families()


def type_id(cache_type: str | int) -> int:
    """The id of a cache type given by name or id (``llama_cpp.GGML_TYPE_*`` are ids).

    Raises:
        PytqError: unknown; lists the known names.
    """
    ids = type_ids()
    if isinstance(cache_type, str):
        name = cache_type.lower()
        if name in ids:
            return ids[name]
    elif isinstance(cache_type, int) and not isinstance(cache_type, bool):
        if cache_type in ids.values():
            return int(cache_type)
        for row in load_types():
            if row.id == cache_type:
                return int(cache_type)
    raise PytqError(f"unknown cache type {cache_type!r}; known: {', '.join(estimate.known_types())}")


def type_name(identifier: int) -> str:
    """Name of the flag that ``identifier`` belongs to; PytqError for an unknown id."""
    for name, known in type_ids().items():
        if known == identifier:
            return name
    for row in load_types():
        if row.id == identifier:
            return str(row.family)
    raise PytqError(f"unknown cache type {identifier}; known: {', '.join(estimate.known_types())}")


def needs_flash_attention(cache_type_k: str, cache_type_v: str) -> bool:
    """Quantised V and all of pytq's types need it: without, V is stored transposed, and blocks do not fit that."""
    return cache_type_v not in PLAIN or estimate.is_pytq(cache_type_k)


def _load_binding() -> ModuleType:
    """Imports llama_cpp on the patched library."""
    named = os.environ.get("LLAMA_CPP_LIB_PATH")
    library = Path(named) if named else paths.find_build("patched").lib
    loaded = sys.modules.get("llama_cpp.llama_cpp")
    if loaded is not None:
        base = Path(loaded._base_path)
        if base.resolve() != library.resolve():
            raise PytqError(
                f"llama_cpp was imported before pytq.Llama, with the library in {base}: import pytq.Llama first, or "
                f"set LLAMA_CPP_LIB_PATH={library} in the environment"
            )
    else:
        os.environ["LLAMA_CPP_LIB_PATH"] = str(library)
        # the vision part has a variable of its own
        os.environ.setdefault("MTMD_CPP_LIB", str(library))
    try:
        import llama_cpp
    except ModuleNotFoundError as error:
        raise PytqError(
            "llama-cpp-python is not installed: run `python -m pytq.fetch binding` in this environment"
        ) from error
    except (OSError, RuntimeError, AttributeError) as error:
        raise PytqError(
            f"the library in {library} could not be loaded ({error}): `pytq build --patched --force` makes it anew"
        ) from error
    return llama_cpp


llama_cpp = _load_binding()


class Llama(llama_cpp.Llama):  # type: ignore[name-defined]
    """``llama_cpp.Llama`` with pytq's cache types.

    Args:
        model_path: a GGUF file.
        cache_type_k: type of the key cache: a name (``pytq types`` lists them) or a ggml type id. None takes what the
            model file stores (``pytq gguf set-cache``), else turbo4; "stored" takes that or f16.
        cache_type_v: type of the value cache; None: what the model file stores, else turbo3.
        flash_attn: None turns flash attention on where the types need it; False with such a type is an error.
        type_k: the id as ``llama_cpp.Llama`` takes it; used instead of ``cache_type_k`` when given.
        type_v: likewise for values.
        **kwargs: everything else of ``llama_cpp.Llama``, unchanged.

    Raises:
        PytqError: unknown type, a head size the type has no block for, a damaged model, flash attention
            switched off where it is needed, or llama.cpp could not make the context.
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        *,
        cache_type_k: str | int | None = None,
        cache_type_v: str | int | None = None,
        flash_attn: bool | None = None,
        type_k: int | None = None,
        type_v: int | None = None,
        **kwargs: Any,
    ) -> None:
        # the binding's destructor expects it, whatever is refused below
        self._stack = contextlib.ExitStack()
        named = [
            _named(cache_type_k if type_k is None else type_k),
            _named(cache_type_v if type_v is None else type_v),
        ]
        gguf_check(model_path)
        self._info = estimate.open_model(Path(model_path))
        self.cache_type_k, self.cache_type_v = estimate.choose(self._info, named, (DEFAULT_K, DEFAULT_V))
        estimate.check_pair(self._info, self.cache_type_k, self.cache_type_v)
        for name in (self.cache_type_k, self.cache_type_v):
            # the types' own functions are in the library exactly if this one is
            if estimate.is_pytq(name) and not hasattr(llama_cpp.llama_cpp._lib, "pytq_type_from_name"):
                raise PytqError(
                    f"the library in {os.environ['LLAMA_CPP_LIB_PATH']} has no cache type {name}: it is not a patched "
                    "build; unset LLAMA_CPP_LIB_PATH and run `pytq build --patched`"
                )
        # stored types are not passed on: an id would set aside what the file says per layer
        id_k, id_v = (
            None if name == estimate.STORED else type_id(name)
            for name in (self.cache_type_k, self.cache_type_v)
        )
        pairs = map(
            estimate.resolve(self._info, (self.cache_type_k, self.cache_type_v)), self._info.hparams.kv_layers
        )
        needed = any(needs_flash_attention(k, v) for k, v in pairs)
        if needed and flash_attn is False:
            raise PytqError(
                f"cache types {self.cache_type_k} / {self.cache_type_v} need flash attention: leave flash_attn "
                "out or set it to True"
            )
        try:
            super().__init__(
                os.fspath(model_path),
                flash_attn=needed if flash_attn is None else flash_attn,
                type_k=id_k,
                type_v=id_v,
                **kwargs,
            )
        except (ValueError, RuntimeError) as error:
            raise PytqError(
                f"llama.cpp could not open {model_path} with cache types {self.cache_type_k} / {self.cache_type_v}: "
                f"{error} (verbose=True shows its log)"
            ) from error

    def cache_report(self) -> dict[str, Any]:
        """What the KV cache of this context is.

        Returns:
            ``requested`` types of K and V (names of flags; a stored one in place of "stored", "mixed" if the file
            stores several), ``effective`` ones (what the layers hold, each once: profile, stored types and head_dim
            decide), ``bits_per_value`` over both and of each, every scale counted, and ``cache_bytes``.
        """
        shape = self._info.hparams
        params = self.context_params
        plan = estimate.Plan(
            self.n_ctx(),
            max(1, params.n_seq_max),
            bool(params.kv_unified),
            max(1, params.n_ubatch),
            bool(params.swa_full),
        )
        types = (self.cache_type_k, self.cache_type_v)
        resolve = estimate.resolve(self._info, types)
        size = estimate.cache_size(shape, resolve, plan)
        requested = estimate.stored_names(self._info, types)
        return {
            "requested": dict(zip("kv", requested, strict=True)),
            "effective": {
                "k": _once(_concrete(resolve(x)[0], x.head_dim_k) for x in shape.kv_layers),
                "v": _once(_concrete(resolve(x)[1], x.head_dim_v) for x in shape.kv_layers if x.head_dim_v),
            },
            "bits_per_value": size.bits,
            "bits_k": 8 * size.k / size.values_k if size.values_k else 0.0,
            "bits_v": 8 * size.v / size.values_v if size.values_v else 0.0,
            "cache_bytes": size.kv,
            "flash_attn": bool(params.flash_attn_type == llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED),
        }


def _named(cache_type: str | int | None) -> str | None:
    """Name of the flag that was asked for, ``stored``, or None; PytqError for an unknown one."""
    unset = int(llama_cpp.llama_context_default_params().type_k)  # a value of its own in the patched library
    if cache_type is None or cache_type == estimate.STORED:
        return cache_type
    if cache_type == unset and unset not in type_ids().values():
        return estimate.STORED
    return type_name(type_id(cache_type))


def _concrete(name: str, head_dim: int) -> str:
    return f"{name}_d{head_dim}" if name in estimate.pytq_types() else name


def _once(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
