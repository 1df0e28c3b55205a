"""A profile goes into a model and comes out again, both byte for byte."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from pytq.errors import PytqError
from pytq.gguf import edit, profile
from pytq.gguf.layout import read_layout
from pytq.gguf.split import read_model


def embed(model: Path, kv: Path, out: Path) -> Path:
    edit.write(edit.plan(read_layout(model), profile.edit_embed(read_layout(model), read_layout(kv))), out)
    return out


@pytest.mark.parametrize("alignment", [32, 128])
def test_round_trip(make_model: Callable[..., Path], profile: Path, tmp_path: Path, alignment: int) -> None:
    from pytq.gguf import profile as module

    model = make_model(tmp_path / "m.gguf", alignment=alignment)
    both = embed(model, profile, tmp_path / "both.gguf")
    layout = read_layout(both)
    assert module.has_profile(layout) and module.problems(layout) == []
    assert layout.get("pytq.profile.fingerprint") == "abc"
    module.extract(layout, tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == profile.read_bytes()
    edit.write(edit.plan(layout, module.edit_strip(layout)), tmp_path / "plain.gguf")
    assert (tmp_path / "plain.gguf").read_bytes() == model.read_bytes()


def test_gguf_package_reads_it(model: Path, profile: Path, tmp_path: Path) -> None:
    both = gguf.GGUFReader(embed(model, profile, tmp_path / "both.gguf"))
    want = {t.name: t for t in gguf.GGUFReader(profile).tensors}
    got = {t.name: t for t in both.tensors}
    for name, tensor in want.items():
        np.testing.assert_array_equal(got["kvprofile." + name].data, tensor.data)
    model_tensors = {t.name: t for t in gguf.GGUFReader(model).tensors}
    for name, tensor in model_tensors.items():
        np.testing.assert_array_equal(got[name].data, tensor.data)


def test_unpadded_end_of_file_is_restored(model: Path, profile: Path, tmp_path: Path) -> None:
    """Some writers do not pad the last tensor: stripping must not add the padding either."""
    from pytq.gguf import profile as module

    layout = read_layout(model)
    model.write_bytes(model.read_bytes()[: layout.data_end] + b"tail")
    both = embed(model, profile, tmp_path / "both.gguf")
    edit.write(edit.plan(read_layout(both), module.edit_strip(read_layout(both))), tmp_path / "plain.gguf")
    assert (tmp_path / "plain.gguf").read_bytes() == model.read_bytes()


def test_split_model_counts_its_tensors(split_model: list[Path], profile: Path) -> None:
    from pytq.gguf import profile as module

    first = split_model[0]
    original = first.read_bytes()
    embed(first, profile, first)
    layout, parts = read_model(first)
    assert layout.get("split.tensors.count") == sum(len(p.tensors) for p in parts) == 6
    edit.write(edit.plan(layout, module.edit_strip(layout)), first)
    assert first.read_bytes() == original


def test_refusals(model: Path, profile: Path, tmp_path: Path) -> None:
    from pytq.gguf import profile as module

    both = embed(model, profile, tmp_path / "both.gguf")
    with pytest.raises(PytqError, match="is no profile"):
        module.edit_embed(read_layout(model), read_layout(model))
    with pytest.raises(PytqError, match="is a profile, not a model"):
        module.edit_embed(read_layout(profile), read_layout(profile))
    with pytest.raises(PytqError, match="already has a profile"):
        module.edit_embed(read_layout(both), read_layout(profile))
    with pytest.raises(PytqError, match="no profile inside"):
        module.extract(read_layout(model), tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()


def test_profile_of_another_architecture(model: Path, tmp_path: Path) -> None:
    from pytq.gguf import profile as module

    path = tmp_path / "other.gguf"
    writer = gguf.GGUFWriter(path, "gemma3")
    writer.add_type("kvprofile")
    writer.add_string("pytq.profile.architecture", "gemma3")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(PytqError, match="profile of a gemma3 model"):
        module.edit_embed(read_layout(model), read_layout(path))
