"""A calibration profile inside a model file, and out again.

A profile is a GGUF file with ``general.architecture = "kvprofile"``. Embedding stores the whole file as one field of
the model, ``pytq.kvprofile`` (an array of bytes): the model's tensors stay as they are, every llama.cpp still loads
it, and extraction is exact by construction.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

from gguf import GGUFValueType

from pytq.errors import PytqError
from pytq.gguf.edit import Edit, atomic, encode_string
from pytq.gguf.layout import Layout, parse_layout, read_layout

ARCH = "kvprofile"
KEY = "pytq.kvprofile"
SUFFIX = ".kvprofile.gguf"
# the loader keeps fields in memory: a profile far beyond a few MB per layer is a mistake
MAX_BYTES = 1 << 30


def default_path(model: Path) -> Path:
    """``MODEL.kvprofile.gguf`` beside the model, where the patched llama.cpp looks."""
    return model.with_name(model.name.removesuffix(".gguf") + SUFFIX)


def is_profile(layout: Layout) -> bool:
    return layout.get("general.architecture") == ARCH


def has_profile(layout: Layout) -> bool:
    """True for a model with a profile inside."""
    return KEY in layout.fields


def edit_embed(model: Layout, profile: Layout) -> Edit:
    """The edit that puts ``profile`` into ``model``; PytqError when one is not what it should be."""
    if not is_profile(profile):
        raise PytqError(
            f"{profile.path}: is no profile (its architecture is {profile.get('general.architecture')!r})"
        )
    if is_profile(model):
        raise PytqError(f"{model.path}: is a profile, not a model")
    if profile.size > MAX_BYTES:
        raise PytqError(f"{profile.path}: {profile.size} bytes are too many for a profile")
    data = profile.path.read_bytes()
    head = encode_string(KEY) + struct.pack("<IIQ", GGUFValueType.ARRAY, GGUFValueType.UINT8, len(data))
    return Edit(put={KEY: head + data})


def edit_strip(model: Layout) -> Edit:
    """The edit that takes the profile out of ``model``: exactly the file it was embedded into."""
    embedded(model)
    return Edit(remove={KEY})


def embedded(model: Layout) -> bytes:
    """The bytes of the profile inside ``model``; PytqError when there is none or the field is of another kind."""
    field = model.fields.get(KEY)
    if field is None:
        raise PytqError(f"{model.path}: has no profile inside")
    if field.type != GGUFValueType.ARRAY or field.item_type != GGUFValueType.UINT8:
        raise PytqError(f"{model.path}: {KEY} at offset {field.start} is no array of bytes")
    return field.raw[len(field.raw) - field.count :]


def read_embedded(model: Layout) -> Layout:
    """The layout of the profile inside ``model``."""
    return parse_layout(embedded(model), Path(f"profile inside {model.path}"))


def find(model: Layout) -> Layout | None:
    """The profile that the patched llama.cpp would use for this file, or None.

    Its order: the file that PYTQ_KV_PROFILE names (``none``: no profile), MODEL.kvprofile.gguf beside the model, the
    embedded one. PytqError when the one that counts is damaged.
    """
    named = os.environ.get("PYTQ_KV_PROFILE", "")
    if named == "none":
        return None
    beside = default_path(model.path)
    if named:
        found = read_layout(named)
    elif beside.is_file():
        found = read_layout(beside)
    elif has_profile(model):
        found = read_embedded(model)
    else:
        return None
    if not is_profile(found):
        raise PytqError(f"{found.path}: is a GGUF file, but no profile")
    return found


def extract(model: Layout, target: Path) -> None:
    """Writes the profile inside ``model`` to ``target``, byte for byte as it was embedded."""
    data = embedded(model)
    with atomic(target) as out:
        out.write(data)


def problems(layout: Layout) -> list[str]:
    """What is wrong with an embedded profile; empty when there is none or it is whole."""
    if not has_profile(layout):
        return []
    try:
        if not is_profile(read_embedded(layout)):
            return ["the embedded profile is a GGUF file, but no profile"]
    except PytqError as error:
        return [str(error)]
    return []
