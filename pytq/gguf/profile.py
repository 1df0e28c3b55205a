"""A calibration profile inside a model file, and out again.

A profile is a GGUF file with ``general.type = "kvprofile"``. Embedding copies its ``pytq.profile.*`` fields under
their own names, every other field as ``kvprofile.<name>``, and its tensors as ``kvprofile.<name>``, in their order;
so extraction gives back the same bytes. The model's own fields and tensor data are not touched.

An unpatched llama.cpp refuses a file with tensors it does not know: keep the profile beside the model for those.
"""

from __future__ import annotations

from pathlib import Path

from gguf import GGUFValueType

from pytq.errors import PytqError
from pytq.gguf.edit import Edit, NewTensor, encode_field, encode_string, write_new
from pytq.gguf.layout import DEFAULT_ALIGNMENT, Field, Layout, TensorEntry

KIND = "kvprofile"
PREFIX = "kvprofile."
OWN = "pytq.profile."
DATA_SIZE = "pytq.embedded.data_size"  # size of the model's data region before the profile came
ALIGNMENT = "pytq.embedded.alignment"
VERSION = "pytq.embedded.version"
BOOKKEEPING = (DATA_SIZE, ALIGNMENT, VERSION)
SPLIT_COUNT = "split.tensors.count"


def is_profile(layout: Layout) -> bool:
    return layout.get("general.type") == KIND


def embedded_tensors(layout: Layout) -> list[TensorEntry]:
    return [t for t in layout.tensors if t.name.startswith(PREFIX)]


def has_profile(layout: Layout) -> bool:
    """True for a model with a profile inside."""
    return not is_profile(layout) and any(key.startswith((OWN, PREFIX)) for key in layout.fields)


def _renamed(field: Field, key: str) -> bytes:
    """The entry of a field under another key, its value byte for byte."""
    return encode_string(key) + field.raw[8 + len(field.key.encode()) :]


def _tensor(source: Layout, entry: TensorEntry, name: str) -> NewTensor:
    if entry.nbytes is None:
        raise PytqError(f"{source.path}: tensor {entry.name!r} has a type of unknown size")
    return NewTensor(
        name, entry.dims, entry.ggml_type, source.path, source.data_start + entry.offset, entry.nbytes
    )


def edit_embed(model: Layout, profile: Layout) -> Edit:
    """The edit that puts ``profile`` into ``model``; PytqError when one is not what it should be."""
    if not is_profile(profile):
        raise PytqError(f"{profile.path}: is no profile (general.type is {profile.get('general.type')!r})")
    if is_profile(model):
        raise PytqError(f"{model.path}: is a profile, not a model")
    if has_profile(model):
        raise PytqError(
            f"{model.path}: already has a profile inside; take it out with extract-profile --strip first"
        )
    arch, wanted = model.get("general.architecture"), profile.get("pytq.profile.architecture")
    if wanted is not None and wanted != arch:
        raise PytqError(f"{profile.path}: is a profile of a {wanted} model, {model.path} is {arch}")
    edit = Edit()
    for key, field in profile.fields.items():
        name = key if key.startswith(OWN) else PREFIX + key
        if name in model.fields:
            raise PytqError(f"{model.path}: already has a field {name!r}")
        edit.put[name] = _renamed(field, name)
    size = max(0, model.size - model.data_start)
    edit.put[DATA_SIZE] = encode_field(DATA_SIZE, GGUFValueType.UINT64, size)
    edit.put[ALIGNMENT] = encode_field(ALIGNMENT, GGUFValueType.UINT32, profile.alignment)
    edit.put[VERSION] = encode_field(VERSION, GGUFValueType.UINT32, profile.version)
    edit.add = [_tensor(profile, t, PREFIX + t.name) for t in _by_offset(profile)]
    _count_split(model, edit, len(edit.add))
    return edit


def _by_offset(layout: Layout) -> list[TensorEntry]:
    """Tensors in file order, which must be the order of their data or extraction would not be exact."""
    if sorted(layout.tensors, key=lambda t: t.offset) != layout.tensors:
        raise PytqError(f"{layout.path}: tensor entries are not in the order of their data")
    return layout.tensors


def edit_strip(model: Layout) -> Edit:
    """The edit that takes the profile out of ``model``: exactly the file it was embedded into."""
    _need(model)
    remove = {key for key in model.fields if key.startswith((OWN, PREFIX)) or key in BOOKKEEPING}
    size = model.get(DATA_SIZE)
    edit = Edit(remove=remove, drop={t.name for t in embedded_tensors(model)}, data_size=size)
    _count_split(model, edit, -len(edit.drop))
    return edit


def _count_split(model: Layout, edit: Edit, change: int) -> None:
    """A split model says in its first file how many tensors all files have; llama.cpp compares."""
    field = model.fields.get(SPLIT_COUNT)
    if field is not None:
        assert field.item_type is None
        edit.put[SPLIT_COUNT] = encode_field(SPLIT_COUNT, field.type, field.value() + change)


def extract(model: Layout, target: Path) -> None:
    """Writes the profile inside ``model`` to ``target``, byte for byte as it was embedded."""
    _need(model)
    fields = []
    for key, field in model.fields.items():
        if key.startswith(OWN):
            fields.append(field.raw)
        elif key.startswith(PREFIX):
            fields.append(_renamed(field, key.removeprefix(PREFIX)))
    tensors = [_tensor(model, t, t.name.removeprefix(PREFIX)) for t in embedded_tensors(model)]
    write_new(
        target, fields, tensors, int(model.get(ALIGNMENT, DEFAULT_ALIGNMENT)), int(model.get(VERSION, 3))
    )


def _need(model: Layout) -> None:
    if is_profile(model):
        raise PytqError(f"{model.path}: is a profile itself")
    if not has_profile(model):
        raise PytqError(f"{model.path}: has no profile inside")


def problems(layout: Layout) -> list[str]:
    """What is wrong with an embedded profile; empty when there is none or it is whole."""
    if not has_profile(layout):
        return []
    found = []
    if layout.get(PREFIX + "general.type") != KIND:
        found.append(f"the embedded profile has no {PREFIX}general.type = {KIND!r}")
    if not embedded_tensors(layout):
        found.append("fields of a profile are there but no kvprofile. tensors")
    return found
