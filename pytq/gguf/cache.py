"""Default cache types stored in a model file, honoured by the patched llama.cpp when no flag is given.

Keys: ``pytq.cache.type_k`` and ``pytq.cache.type_v`` (strings), ``pytq.cache.layer_k`` and ``pytq.cache.layer_v``
(one string per layer; an empty string means the default type).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gguf import GGUFValueType

from pytq.errors import PytqError
from pytq.estimate import check_type, head_bytes
from pytq.gguf.edit import Edit, encode_field
from pytq.gguf.hparams import Hparams, read_hparams
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
    """The edit that stores these defaults; PytqError when a type does not fit the model."""
    if type_k is None and type_v is None and not overrides:
        raise PytqError("nothing to set: give --type-k, --type-v or --layer")
    model = read_hparams(layout)
    edit = Edit()
    for key, name in zip(TYPE_KEYS, (type_k, type_v), strict=True):
        if name is not None:
            edit.put[key] = encode_field(key, GGUFValueType.STRING, check_type(name))
    per_layer = {key: _layer_list(layout, key, len(model.layers)) for key in LAYER_KEYS}
    for rule in overrides:
        if rule.last >= len(model.layers):
            raise PytqError(
                f"layer {rule.last} does not exist: this model has layers 0 to {len(model.layers) - 1}"
            )
        for il in range(rule.first, rule.last + 1):
            if not model.layers[il].has_kv:
                raise PytqError(f"layer {il} has no KV cache of its own ({model.layers[il].kind})")
            for key, name in zip(LAYER_KEYS, (rule.type_k, rule.type_v), strict=True):
                if name is not None:
                    per_layer[key][il] = name
    for key, names in per_layer.items():
        if any(names):
            edit.put[key] = encode_field(key, GGUFValueType.ARRAY, names, GGUFValueType.STRING)
    default_k = type_k or layout.get(TYPE_KEYS[0]) or "f16"
    default_v = type_v or layout.get(TYPE_KEYS[1]) or "f16"
    _check_fit(model, default_k, default_v, per_layer)
    return edit


def edit_unset(layout: Layout) -> Edit:
    """The edit that removes all cache defaults; PytqError when there are none."""
    present = {key for key in ALL_KEYS if key in layout.fields}
    if not present:
        raise PytqError(f"{layout.path}: has no cache defaults to remove")
    return Edit(remove=present)


def _layer_list(layout: Layout, key: str, n_layer: int) -> list[str]:
    names = [str(name) for name in layout.get(key, [])][:n_layer]
    return names + [""] * (n_layer - len(names))


def _check_fit(model: Hparams, type_k: str, type_v: str, per_layer: dict[str, list[str]]) -> None:
    for layer in model.kv_layers:
        head_bytes(per_layer[LAYER_KEYS[0]][layer.index] or type_k, layer.head_dim_k)
        if layer.head_dim_v:
            head_bytes(per_layer[LAYER_KEYS[1]][layer.index] or type_v, layer.head_dim_v)


def problems(layout: Layout) -> list[str]:
    """What is wrong with the cache fields of a file; empty when they can be honoured."""
    if not any(key in layout.fields for key in ALL_KEYS):
        return []
    found = []
    for key in ALL_KEYS:
        field = layout.fields.get(key)
        if field is None:
            continue
        strings = field.type == GGUFValueType.STRING and key in TYPE_KEYS
        arrays = (
            field.type == GGUFValueType.ARRAY
            and field.item_type == GGUFValueType.STRING
            and key in LAYER_KEYS
        )
        if not strings and not arrays:
            found.append(f"{key} at offset {field.start} has the wrong value type")
    if found:
        return found
    try:
        model = read_hparams(layout)
        lists = {}
        for key in LAYER_KEYS:
            names = layout.get(key, [])
            if names and len(names) != len(model.layers):
                found.append(f"{key} has {len(names)} items for {len(model.layers)} layers")
            for name in names:
                if name:
                    check_type(name)
            lists[key] = _layer_list(layout, key, len(model.layers))
        for key in TYPE_KEYS:
            check_type(layout.get(key, "f16"))
        _check_fit(model, layout.get(TYPE_KEYS[0], "f16"), layout.get(TYPE_KEYS[1], "f16"), lists)
    except PytqError as error:
        found.append(str(error))
    return found
