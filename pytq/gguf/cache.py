"""Default cache types stored in a model file, honoured by the patched llama.cpp when no flag is given.

Keys: ``pytq.cache.type_k`` and ``pytq.cache.type_v`` (strings), ``pytq.cache.layer_k`` and ``pytq.cache.layer_v``
(one string per layer; an empty string means the default type, which is f16 where there is no default either).
csrc/ggml/pytq-cache-keys.cpp reads the same; a flag for K sets aside both keys of K, and likewise for V.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gguf import GGUFValueType

from pytq.errors import PytqError
from pytq.estimate import CTX_PAD, STORED, ModelInfo, Plan, cache_size, check_pair, check_type, resolve_layers
from pytq.gguf import profile
from pytq.gguf.edit import Edit, encode_field
from pytq.gguf.hparams import read_hparams
from pytq.gguf.layout import Layout

TYPE_KEYS = ("pytq.cache.type_k", "pytq.cache.type_v")
LAYER_KEYS = ("pytq.cache.layer_k", "pytq.cache.layer_v")
ALL_KEYS = (*TYPE_KEYS, *LAYER_KEYS)


@dataclass(frozen=True)
class Override:
    """Types for layers ``first`` to ``last``; None leaves a side as it is."""

    first: int
    last: int
    type_k: str | None
    type_v: str | None


def parse_override(text: str) -> Override:
    """``0-3=q8_0/f16`` (K/V), ``5=kv4`` (both), ``7=/q8_0`` (V only), ``7=q8_0/`` (K only); layers count from 0."""
    layers, equals, types = text.partition("=")
    first, dash, last = layers.partition("-")
    if not equals or not first.strip().isdigit() or (dash and not last.strip().isdigit()):
        raise PytqError(f"{text!r} is no layer override; write it like 0-3=q8_0/f16 or 5=kv4")
    low, high = int(first), int(last) if dash else int(first)
    if high < low:
        raise PytqError(f"{text!r}: layer {high} comes before {low}")
    k, slash, v = types.strip().lower().partition("/")
    if not slash:
        v = k
    if not k and not v:
        raise PytqError(f"{text!r} names no type")
    return Override(low, high, check_type(k) if k else None, check_type(v) if v else None)


def edit_set(
    layout: Layout, type_k: str | None, type_v: str | None, overrides: Sequence[Override] = ()
) -> Edit:
    """The edit that stores these defaults; PytqError when a type does not fit the model.

    ``auto`` types need a profile beside or inside the model.
    """
    if type_k is None and type_v is None and not overrides:
        raise PytqError("nothing to set: give --type-k, --type-v or --layer")
    model = _info(layout)
    n_layer = len(model.hparams.layers)
    edit = Edit()
    defaults = []
    for key, name in zip(TYPE_KEYS, (type_k, type_v), strict=True):
        if name is not None:
            edit.put[key] = encode_field(key, GGUFValueType.STRING, check_type(name))
        defaults.append(name or str(layout.get(key) or "f16"))
    per_layer = [_layer_list(layout, key, n_layer) for key in LAYER_KEYS]
    for rule in overrides:
        if rule.last >= n_layer:
            raise PytqError(f"layer {rule.last} does not exist: this model has layers 0 to {n_layer - 1}")
        for il in range(rule.first, rule.last + 1):
            if not model.hparams.layers[il].has_kv:
                raise PytqError(f"layer {il} has no KV cache of its own ({model.hparams.layers[il].kind})")
            for names, name in zip(per_layer, (rule.type_k, rule.type_v), strict=True):
                if name is not None:
                    names[il] = name
    for key, names in zip(LAYER_KEYS, per_layer, strict=True):
        if any(names):
            edit.put[key] = encode_field(key, GGUFValueType.ARRAY, names, GGUFValueType.STRING)
    wanted = [
        [check_type(name or default) for name in names]
        for names, default in zip(per_layer, defaults, strict=True)
    ]
    cache_size(model.hparams, resolve_layers(model, *wanted), Plan(CTX_PAD))
    return edit


def edit_unset(layout: Layout) -> Edit:
    """The edit that removes all cache defaults; PytqError when there are none."""
    present = {key for key in ALL_KEYS if key in layout.fields}
    if not present:
        raise PytqError(f"{layout.path}: has no cache defaults to remove")
    return Edit(remove=present)


def stored_types(layout: Layout, side: str, n_layer: int) -> list[str]:
    """The type of every layer for ``side`` ("k" or "v") as the file stores it; empty when it stores none.

    PytqError, naming the key, for what the patched llama.cpp refuses too.
    """
    found = _wrong_kinds(layout, side)
    if found:
        raise PytqError(f"{layout.path}: {found[0]}")
    one, many = TYPE_KEYS["kv".index(side)], LAYER_KEYS["kv".index(side)]
    if one not in layout.fields and many not in layout.fields:
        return []
    names = [str(name) for name in layout.get(many, [])]
    if names and len(names) != n_layer:
        raise PytqError(f"{layout.path}: {many} has {len(names)} items for {n_layer} layers")
    default = str(layout.get(one, "f16"))
    try:
        return [check_type(name or default) for name in names or [default] * n_layer]
    except PytqError as error:
        raise PytqError(
            f"{layout.path}: the stored cache types cannot be used: {error} (`pytq gguf unset-cache` removes them)"
        ) from error


def has_stored(layout: Layout, side: str) -> bool:
    """True when the file stores a type, or types per layer, for ``side``."""
    return any(key.endswith(f"_{side}") and key in layout.fields for key in ALL_KEYS)


def _info(layout: Layout) -> ModelInfo:
    return ModelInfo(layout.path, layout, read_hparams(layout), 0, 0, profile.find(layout))


def _layer_list(layout: Layout, key: str, n_layer: int) -> list[str]:
    names = [str(name) for name in layout.get(key, [])][:n_layer]
    return names + [""] * (n_layer - len(names))


def _wrong_kinds(layout: Layout, side: str) -> list[str]:
    found = []
    for key in ALL_KEYS:
        field = layout.fields.get(key)
        if field is None or not key.endswith(f"_{side}"):
            continue
        text = field.type == GGUFValueType.STRING and key in TYPE_KEYS
        texts = (
            field.type == GGUFValueType.ARRAY
            and field.item_type == GGUFValueType.STRING
            and key in LAYER_KEYS
        )
        if not text and not texts:
            found.append(f"{key} at offset {field.start} has the wrong value type")
    return found


def problems(layout: Layout) -> list[str]:
    """What is wrong with the cache fields of a file; empty when they can be honoured."""
    found = [*_wrong_kinds(layout, "k"), *_wrong_kinds(layout, "v")]
    if found or not any(key in layout.fields for key in ALL_KEYS):
        return found
    try:
        check_pair(_info(layout), STORED, STORED)
    except PytqError as error:
        found.append(str(error))
    return found
